"""Null distributions of a head's fit: run batches of permutations, count exceedances."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from amici_eval.common.memory import Shrinking

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Bool, Float, Float64, Int64
    from torch import Tensor

    from amici_eval.stats.permutation.permutations import PermutationStream

MIN_CELLS_TEST = 3
"""Two cells have one permutation besides the identity, too few for a test at any usual level."""

_TIE_TOLERANCE = 1e-10
"""Relative to ||P|| ||Y||: sums of one permutation differ by less between devices and summation orders."""
_DEAD_TOLERANCE = 1e-6
"""A head whose predictions vary by less than this share of their size varies only by float32 rounding."""
_CELL_BLOCK = 2048
_STORED_INDICES = 2**27
_GATHERED_ENTRIES = 2**24
_GRAM_CELLS_PER_PERMUTATION = 16


@dataclass(frozen=True)
class PermutationCounts:
    """How often a permutation fits at least as well as the truth.

    exceedances: meaningless where dead; dead: heads without a test, whose prediction is the same for all cells or not
    finite; n_permutations: random ones, without the identity.
    """

    exceedances: Int64[np.ndarray, " heads"]
    dead: Bool[np.ndarray, " heads"]
    n_permutations: int


def permutation_exceedances(
    predictions: Float[np.ndarray, "heads cells genes"],
    targets: Float[np.ndarray, "cells genes"],
    *,
    stream: PermutationStream,
    n_permutations: int,
    device: str = "cpu",
    form: str = "auto",
    progress: Callable[[int], None] | None = None,
) -> PermutationCounts:
    """Count the permutations of cells under which a head's prediction fits expression at least as well as in truth.

    Null: its rows are shuffled among the cells of ``stream``; exchangeable if, given the type, cells' expression is
    independent of their neighbourhoods and of each other; anticonservative under spatial autocorrelation. T(pi) = sum_i
    <P_pi(i), Y_i> >= T(identity), with P and Y centred, is MSE(pi) <= MSE(identity), as amici-st counts; that compares
    float32 means summed in different orders, so it can miscount near-ties, while T is a float64 sum from one kernel.
    ``progress`` gets (head, permutation) pairs finished since the last call.
    """
    n_heads, n_cells, _ = predictions.shape
    if targets.shape != predictions.shape[1:] or stream.n_cells != n_cells:
        msg = f"predictions {predictions.shape}, targets {targets.shape} and {stream.n_cells} permuted cells disagree"
        raise ValueError(msg)
    if n_cells < MIN_CELLS_TEST:
        msg = f"{n_cells} cells; at least {MIN_CELLS_TEST} are needed for a test"
        raise ValueError(msg)
    if form not in ("auto", "gram", "gather"):
        msg = f"form {form!r} is unknown; use 'auto', 'gram' or 'gather'"
        raise ValueError(msg)
    chunk = max(1, min(n_permutations, _STORED_INDICES // n_cells))
    if form == "auto":
        form = "gram" if n_cells <= _GRAM_CELLS_PER_PERMUTATION * chunk else "gather"
    kernel = _gram_statistics if form == "gram" else _gather_statistics

    room = Shrinking(
        _GATHERED_ENTRIES, floor=min(_GATHERED_ENTRIES, n_cells), what="permutations", unit="numbers", device=device
    )
    y = _centred(targets, device)
    y_norm = float(torch.linalg.norm(y))
    exceedances = np.zeros(n_heads, dtype=np.int64)
    dead = np.zeros(n_heads, dtype=bool)
    for start in range(0, n_permutations, chunk):
        stop = min(start + chunk, n_permutations)
        permutations = _with_identity(stream, start, stop)
        for head in range(n_heads):
            p = _centred(predictions[head], device)
            p_norm = float(torch.linalg.norm(p))
            size = float(np.linalg.norm(predictions[head].astype(np.float64)))
            # ``not (x > tol)`` is also True for NaN: a prediction that is not finite is dead
            if not p_norm > _DEAD_TOLERANCE * size:
                dead[head] = True
            else:
                statistics = room.run(partial(kernel, p, y, permutations))
                threshold = statistics[0] - _TIE_TOLERANCE * p_norm * y_norm
                exceedances[head] += int(np.count_nonzero(statistics[1:] >= threshold))
            if progress is not None:
                progress(stop - start)
    return PermutationCounts(exceedances=exceedances, dead=dead, n_permutations=n_permutations)


def _with_identity(stream: PermutationStream, start: int, stop: int) -> np.ndarray:
    """Return the identity and permutations ``start`` to ``stop - 1`` as int32, as they are kept for all heads."""
    permutations = np.empty((stop - start + 1, stream.n_cells), dtype=np.int32)
    permutations[0] = np.arange(stream.n_cells)
    step = max(1, _GATHERED_ENTRIES // stream.n_cells)
    for first in range(start, stop, step):
        last = min(first + step, stop)
        permutations[first - start + 1 : last - start + 1] = stream.batch(first, last)
    return permutations


def _centred(values: Float[np.ndarray, "cells genes"], device: str) -> Float64[Tensor, "cells genes"]:
    # a copy: PyTorch warns about read-only arrays
    tensor = torch.from_numpy(np.array(values, dtype=np.float64, order="C")).to(device)
    return tensor - tensor.mean(dim=0)


def _gram_statistics(
    p: Float64[Tensor, "cells genes"], y: Float64[Tensor, "cells genes"], permutations: np.ndarray, entries: int
) -> Float64[np.ndarray, " permutations"]:
    """Return T of each permutation from P Y^T, a block of columns at a time."""
    n_cells = p.shape[0]
    total = torch.zeros(len(permutations), dtype=torch.float64, device=p.device)
    block = max(1, min(_CELL_BLOCK, _CELL_BLOCK * entries // _GATHERED_ENTRIES))
    for first in range(0, n_cells, block):
        last = min(first + block, n_cells)
        products = p @ y[first:last].T
        step = max(1, entries // (last - first))
        for row in range(0, len(permutations), step):
            taken = torch.from_numpy(permutations[row : row + step, first:last].astype(np.int64)).to(p.device)
            total[row : row + step] += products.gather(0, taken).sum(dim=1)
    return total.cpu().numpy()


def _gather_statistics(
    p: Float64[Tensor, "cells genes"], y: Float64[Tensor, "cells genes"], permutations: np.ndarray, entries: int
) -> Float64[np.ndarray, " permutations"]:
    """Return T of each permutation from the gathered rows of P, a block of cells at a time."""
    n_cells = p.shape[0]
    block = max(1, entries // p.shape[1])
    total = np.zeros(len(permutations))
    for row, permutation in enumerate(permutations):
        index = torch.from_numpy(permutation.astype(np.int64)).to(p.device)
        for first in range(0, n_cells, block):
            rows = slice(first, first + block)
            total[row] += float(torch.einsum("ij,ij->", p[index[rows]], y[rows]))
    return total
