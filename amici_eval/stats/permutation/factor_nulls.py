"""The permutation test of keep-one heads on their factors: values in order of the permutation's number."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from amici_eval.common import threads as compiled
from amici_eval.stats.permutation.nulls import MIN_CELLS_TEST, PermutationCounts
from amici_eval.stats.permutation.statistics import (
    TIE_TOLERANCE,
    compiled_statistics,
    cyclic_statistics,
    exact_statistics,
    identity_statistics,
    pack,
    torch_statistics,
)
from amici_eval.stats.pvalues import sequential_p_values

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from jaxtyping import Bool, Float, Float64, Int64

    from amici_eval.stats.permutation.permutations import PermutationStream
    from amici_eval.stats.permutation.statistics import PackedPair

__all__ = [
    "FactorDraw",
    "FactorStatistics",
    "Part",
    "SequentialTest",
    "check_factors",
    "draw_from",
    "factor_draw",
    "factor_exceedances",
    "part_of",
    "sequential_exceedances",
]

_TASK_PRODUCTS = 2**27
_INLINE_PRODUCTS = 2**22
"""Below this, handing work to threads costs more than it saves."""
_NORM_ENTRIES = 2**18


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class FactorStatistics:
    """T of every permutation of a range, beside T as observed.

    Parameters
    ----------
    statistics
        T(pi) = sum_i <F_pi(i), Z_i> with F and Z centred over the cells that are permuted among themselves, so that its
        mean over all permutations is 0; shape (permutations, heads), in order of the permutation's number, in the units
        of F times Z; NaN where dead.
    observed
        T of the identity, from the same kernel, shape (heads,); NaN where dead.
    sizes
        ``||F_h|| ||Z_h||``, centred, shape (heads,): the largest value T can take.
    dead
        Heads that have no test, shape (heads,).
    """

    statistics: Float64[np.ndarray, "permutations heads"]
    observed: Float64[np.ndarray, " heads"]
    sizes: Float64[np.ndarray, " heads"]
    dead: Bool[np.ndarray, " heads"]

    @property
    def reached(self) -> Bool[np.ndarray, "permutations heads"]:
        """Whether a permutation fits at least as well as the truth; equal up to rounding counts, dead heads do not."""
        with np.errstate(invalid="ignore"):
            reached: Bool[np.ndarray, "permutations heads"] = (
                self.statistics >= self.observed - TIE_TOLERANCE * self.sizes
            )
        return reached


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Part:
    """Cells that are permuted among themselves.

    Parameters
    ----------
    pair
        Their packed factors.
    stream
        Their permutations.
    units
        What T of the packed factors is to be multiplied by, shape (alive,): powers of two.
    """

    pair: PackedPair
    stream: PermutationStream
    units: Float64[np.ndarray, " alive"]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class FactorDraw:
    """Factors packed once; call it with ``(start, stop)`` for the statistics of permutations ``start`` to ``stop - 1``.

    Parameters
    ----------
    parts
        T adds over them.
    observed, sizes, dead
        As in ``FactorStatistics``.
    device
        Torch device.
    n_threads
        Threads of the compiled kernels; as many as torch uses if ``None``.
    """

    parts: tuple[Part, ...]
    observed: Float64[np.ndarray, " heads"]
    sizes: Float64[np.ndarray, " heads"]
    dead: Bool[np.ndarray, " heads"]
    device: str
    n_threads: int | None

    def __call__(self, start: int, stop: int) -> FactorStatistics:
        """Return the statistics of permutations ``start`` to ``stop - 1``.

        Raises
        ------
        ValueError
            If this is no range of permutation numbers.

        Notes
        -----
        A permutation's T depends on its number alone: not on the range, nor, but for the last bits, on the device.
        """
        if not 0 <= start <= stop:
            msg = f"permutations {start} to {stop} are no range; numbers begin at 0"
            raise ValueError(msg)
        statistics = np.zeros((stop - start, self.dead.size))
        n_threads = torch.get_num_threads() if self.n_threads is None else self.n_threads
        products = sum(part.pair.f.size for part in self.parts) * (stop - start)
        # torch has threads of its own
        if products <= _INLINE_PRODUCTS or torch.device(self.device).type != "cpu" or compiled.kernels() is None:
            n_threads = 1
        pieces: list[tuple[Part, int, int]] = []
        for part in self.parts:
            n_cuts = max(-(-4 * n_threads // len(self.parts)), part.pair.f.size * (stop - start) // _TASK_PRODUCTS, 1)
            pieces += [(part, start + first, start + last) for first, last in compiled.cuts(stop - start, n_cuts)]
        places = iter(pieces)

        def add(sums: Float64[np.ndarray, "some alive"]) -> None:
            part, first, last = next(places)
            statistics[first - start : last - start, part.pair.heads] += sums * part.units

        tasks = (
            partial(exact_statistics, part.pair, part.stream, first, last, device=self.device)
            for part, first, last in pieces
        )
        # results come in the order of the tasks: parts are always added in the same order
        compiled.in_threads(tasks, n_threads, add)
        statistics[:, self.dead] = np.nan
        return FactorStatistics(statistics=statistics, observed=self.observed, sizes=self.sizes, dead=self.dead)


def check_factors(
    factors: Float[np.ndarray, "cells columns heads"],
    images: Float[np.ndarray, "cells columns heads"],
    *,
    n_permuted: int,
    dead: Bool[np.ndarray, " heads"] | None,
    n_threads: int | None,
) -> None:
    """Raise ``ValueError`` if these are no arguments of a permutation test of heads on their factors."""
    n_cells, _, n_heads = factors.shape
    if images.shape != factors.shape or n_permuted != n_cells:
        msg = f"factors {factors.shape}, images {images.shape} and {n_permuted} permuted cells disagree"
        raise ValueError(msg)
    if dead is not None and dead.shape != (n_heads,):
        msg = f"dead {dead.shape} and {n_heads} heads disagree"
        raise ValueError(msg)
    if n_cells < MIN_CELLS_TEST:
        msg = f"{n_cells} cells; at least {MIN_CELLS_TEST} are needed for a test"
        raise ValueError(msg)
    if n_threads is not None and n_threads < 1:
        msg = f"n_threads is {n_threads}; at least 1 is needed"
        raise ValueError(msg)


def part_of(
    pair: PackedPair,
    factors: Float[np.ndarray, "cells columns heads"],
    images: Float[np.ndarray, "cells columns heads"],
    *,
    stream: PermutationStream,
) -> Part:
    """Say in which units ``pair`` was packed from factors and images, and with which permutations it goes."""
    exponents = sum(_log_norms(values, pair.heads) for values in (factors, images))
    with np.errstate(divide="ignore", invalid="ignore"):
        exponents = exponents - np.log2(pair.sizes)
    # packing multiplied each head by a power of two; a constant image is 0 in any units
    units = np.exp2(np.where(np.isfinite(exponents), np.rint(exponents), 0.0))
    return Part(pair=pair, stream=stream, units=units)


def draw_from(
    parts: Sequence[Part], *, n_heads: int, dead: Bool[np.ndarray, " heads"], device: str, n_threads: int | None
) -> FactorDraw:
    """Put parts together; a head that is ``dead``, or alive in none of them, has no test."""
    dead = dead.copy()
    alive = np.zeros(n_heads, dtype=bool)
    observed, sizes = np.zeros(n_heads), np.zeros(n_heads)
    kept = tuple(part for part in parts if part.pair.heads.size)
    for part in kept:
        alive[part.pair.heads] = True
        observed[part.pair.heads] += identity_statistics(part.pair, device=device) * part.units
        sizes[part.pair.heads] += part.pair.sizes * part.units
    dead |= ~alive
    observed[dead], sizes[dead] = np.nan, np.nan
    return FactorDraw(parts=kept, observed=observed, sizes=sizes, dead=dead, device=device, n_threads=n_threads)


def _log_norms(
    values: Float[np.ndarray, "cells columns heads"], heads: Int64[np.ndarray, " alive"]
) -> Float64[np.ndarray, " alive"]:
    """Return the binary logarithm of each head's norm once centred over cells."""
    squares = np.zeros(values.shape[2])
    # heads that are not finite are not asked for
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        mean = values.mean(axis=0, dtype=np.float64)
        step = max(1, _NORM_ENTRIES // max(1, mean.size))
        for first in range(0, len(values), step):
            block = values[first : first + step] - mean
            squares += np.einsum("iah,iah->h", block, block)
        logarithms: Float64[np.ndarray, " alive"] = 0.5 * np.log2(squares[heads])
    return logarithms


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


_LARGEST_BATCH = 4096


@dataclass(frozen=True, kw_only=True, eq=False)
class SequentialTest:
    """p-values of tests of which each ended at its own number of permutations.

    Parameters
    ----------
    exceedances
        Permutations that fit at least as well as the truth until the test ended, shape (heads,).
    n_permutations
        Number of permutations until then, shape (heads,); 0 where dead.
    p
        h/l where the test stopped, (b+1)/(m+1) where it went on to the end, NaN where dead; shape (heads,).
    ci_low, ci_high
        95 % interval of the p-value that permutations without end would give (see ``sequential_p_values``).
    stopped
        Whether the test ended at its h-th exceedance, shape (heads,).
    dead
        Heads that have no test, shape (heads,).
    """

    exceedances: Int64[np.ndarray, " heads"]
    n_permutations: Int64[np.ndarray, " heads"]
    p: Float64[np.ndarray, " heads"]
    ci_low: Float64[np.ndarray, " heads"]
    ci_high: Float64[np.ndarray, " heads"]
    stopped: Bool[np.ndarray, " heads"]
    dead: Bool[np.ndarray, " heads"]


def sequential_exceedances(
    draw: Callable[[int, int], FactorStatistics],
    *,
    max_permutations: int,
    stop_at: int = 20,
    batch: int = 64,
    progress: Callable[[int], None] | None = None,
) -> SequentialTest:
    """Test heads until each has fitted by chance ``stop_at`` times, or for ``max_permutations``.

    A head that shows nothing has a p-value near 1/2 and ends after some 2 ``stop_at`` permutations; only heads that fit
    better than chance need them all. The null is that of ``draw``.

    Parameters
    ----------
    draw
        Gives the statistics of permutations ``start`` to ``stop - 1``: ``factor_draw`` or ``stratified_draw``.
    max_permutations
        Number m of permutations after which every test ends; the smallest p-value is 1/(m+1).
    stop_at
        Number h of exceedances at which a test ends; a p-value that stopped is off by about p/sqrt(h).
    batch
        Permutations that are drawn first; each further batch is twice as large, up to 4,096. No effect on the result.
    progress
        Called with the number of (head, permutation) pairs finished since the last call; their sum is heads x
        ``max_permutations``, also if all tests ended before.

    Raises
    ------
    ValueError
        If a setting is out of range.

    Notes
    -----
    A test ends with the permutation that brings its h-th exceedance, whatever was drawn with it. ``p <= a`` has a
    probability of at most a under the null (Besag & Clifford 1991).
    """
    if not 1 <= stop_at <= max_permutations:
        msg = f"stop_at is {stop_at}; it must lie in [1, max_permutations={max_permutations}]"
        raise ValueError(msg)
    if batch < 1:
        msg = f"batch is {batch}; at least 1 permutation is drawn at once"
        raise ValueError(msg)
    for start, stop in _ranges(batch, max_permutations):
        drawn = draw(start, stop)
        if start == 0:
            dead = drawn.dead
            exceedances = np.zeros(dead.size, dtype=np.int64)
            n_permutations = np.where(dead, 0, max_permutations).astype(np.int64)
            goes_on = ~dead
        so_far = exceedances + np.cumsum(drawn.reached, axis=0)
        ends = goes_on & (so_far[-1] >= stop_at)
        n_permutations[ends] = start + 1 + np.argmax(so_far[:, ends] >= stop_at, axis=0)
        exceedances[goes_on] = np.minimum(so_far[-1, goes_on], stop_at)
        goes_on &= ~ends
        if progress is not None:
            progress(dead.size * (stop - start))
        if not goes_on.any():
            break
    if progress is not None and stop < max_permutations:
        progress(dead.size * (max_permutations - stop))
    found = sequential_p_values(
        exceedances,
        n_permutations=np.where(dead, max_permutations, n_permutations),
        max_permutations=max_permutations,
        stop_at=stop_at,
    )
    return SequentialTest(
        exceedances=exceedances,
        n_permutations=n_permutations,
        p=np.where(dead, np.nan, found.p),
        ci_low=np.where(dead, np.nan, found.ci_low),
        ci_high=np.where(dead, np.nan, found.ci_high),
        stopped=~dead & ~goes_on,
        dead=dead,
    )


def _ranges(batch: int, stop: int) -> Iterator[tuple[int, int]]:
    first = 0
    while first < stop:
        yield first, min(first + batch, stop)
        first, batch = first + batch, max(batch, min(2 * batch, _LARGEST_BATCH))
