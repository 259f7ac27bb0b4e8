"""The permutation test of keep-one heads on their factors: one permutation costs cells x columns, not cells x genes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from amici_eval.common import threads as compiled
from amici_eval.stats.permutation.compiled_statistics import compiled_statistics
from amici_eval.stats.permutation.cyclic_statistics import cyclic_statistics
from amici_eval.stats.permutation.factor_draws import FactorDraw, check_factors, draw_from, part_of
from amici_eval.stats.permutation.nulls import PermutationCounts
from amici_eval.stats.permutation.packed_factors import TIE_TOLERANCE, pack
from amici_eval.stats.permutation.torch_statistics import torch_statistics

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Bool, Float, Float64

    from amici_eval.stats.permutation.permutations import PermutationStream

__all__ = ["factor_draw", "factor_exceedances"]

_CYCLIC_LABEL = "\0cyclic"


def factor_exceedances(
    factors: Float[np.ndarray, "cells columns heads"],
    images: Float[np.ndarray, "cells columns heads"],
    *,
    stream: PermutationStream,
    n_permutations: int,
    sampling: str = "independent",
    dead: Bool[np.ndarray, " heads"] | None = None,
    device: str = "cpu",
    form: str = "auto",
    n_threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> PermutationCounts:
    """Count the permutations of cells under which a head's prediction fits expression at least as well as in truth.

    Null: the rows of the head's prediction are shuffled among the cells of ``stream`` (one cell type, one stratum).
    This is exchangeable when, given the type, a cell's expression is independent of its neighbourhood and cells are
    independent of each other; spatial autocorrelation breaks the second, and the test is then anticonservative.

    Parameters
    ----------
    factors
        F, shape (cells, columns, heads), cells in canonical order: head h predicts ``constant + F[:, :, h] @ A_h.T``.
    images
        Z, same shape: expression as the head sees it, ``Y @ A_h``. Neither need be centred.
    stream
        The permutations; all heads share them.
    n_permutations
        How many to draw.
    sampling
        ``"independent"``: permutations 0 to ``n_permutations - 1`` of ``stream``. ``"cyclic"``: one random order of the
        cells and all its circular shifts but the identity, ``cells - 1`` of them whatever ``n_permutations`` is.
    dead
        Shape (heads,): heads to leave out. Heads whose numbers are not finite or whose factors do not vary are left
        out in any case.
    device
        Torch device. Without numba, and on another device than ``"cpu"``, torch does the work, in float64, as it does
        the transforms of ``"cyclic"`` everywhere; ``"mps"``, which has no float64, is taken as ``"cpu"``.
    form
        ``"factor"``: gathers rows of F; ``"gram"``: gathers from the cells x cells products; ``"auto"``: the cheaper.
        No effect on the counts, or for ``"cyclic"``.
    n_threads
        Threads of the compiled kernels of ``"independent"``; as many as torch uses if ``None``, as for all else. No
        effect on the counts.
    progress
        Called in the calling thread with the number of (head, permutation) pairs finished since the last call; their
        sum is heads x ``n_permutations`` of the result.

    Returns
    -------
    PermutationCounts
        Its ``dead`` holds all heads that were left out. With ``"cyclic"``, ``(b + 1) / (n_permutations + 1)`` is the
        exact p-value of the group of shifts.

    Raises
    ------
    ValueError
        If shapes disagree, there are fewer than three cells, or a setting is unknown.

    Notes
    -----
    The statistic is T_h(pi) = sum_i sum_a F[pi(i), a, h] Z[i, a, h], with F and Z centred over cells in float64 and
    then rounded to float32, summed in float64; an exceedance is T_h(pi) >= T_h(identity) - 1e-10 ||F_h|| ||Z_h||. With
    P = F A^T, Z = Y A it is sum_i <P_pi(i), Y_i>: MSE(pi) <= MSE(identity), as amici-st counts. Sums in float32
    are only used where a bound on their error shows that float64 decides the same.

    Circular shifts along an order that is drawn independently of the data, brought back to the cells, are a subgroup
    of all permutations, so their test is exactly valid (Southworth, Kim & Owen 2009), and their statistics are one
    circular cross-correlation.
    """
    n_cells, _, n_heads = factors.shape
    check_factors(factors, images, n_permuted=stream.n_cells, dead=dead, n_threads=n_threads)
    if sampling not in ("independent", "cyclic"):
        msg = f"sampling {sampling!r} is unknown; use 'independent' or 'cyclic'"
        raise ValueError(msg)
    if form not in ("auto", "factor", "gram"):
        msg = f"form {form!r} is unknown; use 'auto', 'factor' or 'gram'"
        raise ValueError(msg)

    device = "cpu" if torch.device(device).type == "mps" else device
    order = replace(stream, stratum=stream.stratum + _CYCLIC_LABEL).batch(0, 1)[0] if sampling == "cyclic" else None
    is_dead = np.zeros(n_heads, dtype=bool) if dead is None else dead.astype(bool)
    pair = pack(factors, images, dead=is_dead, order=order)
    alive = pair.heads
    exceedances = np.zeros(n_heads, dtype=np.int64)
    finished = 0

    def take(statistics: Float64[np.ndarray, "permutations alive"], thresholds: Float64[np.ndarray, " alive"]) -> None:
        nonlocal finished
        exceedances[alive] += np.count_nonzero(statistics >= thresholds, axis=0)
        finished += len(statistics)
        if progress is not None:
            progress(n_heads * len(statistics))

    if sampling == "cyclic":
        n_permutations = n_cells - 1
        if alive.size:
            statistics = cyclic_statistics(pair, device=device)
            take(statistics[1:], statistics[0] - TIE_TOLERANCE * pair.sizes)
    elif alive.size and n_permutations:
        kernels = compiled.kernels() if torch.device(device).type == "cpu" else None
        if kernels is None:
            torch_statistics(pair, stream, n_permutations, form=form, device=device, take=take)
        else:
            threads = torch.get_num_threads() if n_threads is None else n_threads
            compiled_statistics(kernels, pair, stream, n_permutations, form=form, n_threads=threads, take=take)
    if progress is not None and finished < n_permutations:
        progress(n_heads * (n_permutations - finished))
    is_dead = np.ones(n_heads, dtype=bool)
    is_dead[alive] = False
    return PermutationCounts(exceedances=exceedances, dead=is_dead, n_permutations=n_permutations)


def factor_draw(
    factors: Float[np.ndarray, "cells columns heads"],
    images: Float[np.ndarray, "cells columns heads"],
    *,
    stream: PermutationStream,
    dead: Bool[np.ndarray, " heads"] | None = None,
    device: str = "cpu",
    n_threads: int | None = None,
) -> FactorDraw:
    """Pack factors once and return what gives the statistics of any range of permutations of ``stream``.

    Parameters, null and errors are those of ``factor_exceedances``; the result counts as ``"independent"`` does there,
    in exact float64 sums of what was centred in float64 and rounded to float32.
    """
    n_heads = factors.shape[2]
    check_factors(factors, images, n_permuted=stream.n_cells, dead=dead, n_threads=n_threads)
    device = "cpu" if torch.device(device).type == "mps" else device
    is_dead = np.zeros(n_heads, dtype=bool) if dead is None else dead.astype(bool)
    part = part_of(pack(factors, images, dead=is_dead), factors, images, stream=stream)
    return draw_from([part], n_heads=n_heads, dead=is_dead, device=device, n_threads=n_threads)
