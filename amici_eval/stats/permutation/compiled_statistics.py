"""The permutation statistic on packed factors by compiled kernels: row by row, or from the products of all cells."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from amici_eval.common import threads as compiled
from amici_eval.stats.memory import STORED_INDICES
from amici_eval.stats.permutation.packed_factors import LANES, TIE_TOLERANCE

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    from jaxtyping import Float32, Float64, Int64

    from amici_eval.stats.permutation.packed_factors import PackedPair
    from amici_eval.stats.permutation.permutations import PermutationStream

    Take = Callable[[Float64[np.ndarray, "permutations alive"], Float64[np.ndarray, " alive"]], None]

__all__ = ["compiled_statistics", "exact_sums"]

_GRAM_CELLS_PER_PERMUTATION = 6
"""Measured: the products of all cells cost less than gathering rows up to this many cells a permutation."""
_GRAM_COLUMNS = 2**17
_TASK_PRODUCTS = 2**27
_INLINE_PRODUCTS = 2**22
"""Below this, handing work to threads costs more than it saves."""
_FLOAT32_UNIT = 2.0**-24


def compiled_statistics(
    kernels: ModuleType,
    pair: PackedPair,
    stream: PermutationStream,
    n_permutations: int,
    *,
    form: str,
    n_threads: int,
    take: Take,
) -> None:
    """Call ``take(statistics, thresholds)`` for all permutations, range by range, in the calling thread.

    In form ``"gram"`` a statistic is a float32 sum unless it lies so near its threshold that float32 cannot tell on
    which side; then, and in form ``"factor"``, it is a sum in float64 of exact products.
    """
    key, n_cells = stream.key(), pair.f.shape[1]
    exactly = partial(exact_sums, kernels, pair, key)
    thresholds = exactly(np.array([kernels.IDENTITY]))[0] - TIE_TOLERANCE * pair.sizes
    chunk = max(1, min(n_permutations, STORED_INDICES // n_cells, _GRAM_COLUMNS))
    if form == "auto":
        form = "gram" if n_cells <= _GRAM_CELLS_PER_PERMUTATION * chunk else "factor"
    if form == "gram":
        _gram(kernels, pair, key, n_permutations, chunk, thresholds, exactly, n_threads, take)
        return
    products = pair.f.size
    if products * n_permutations <= _INLINE_PRODUCTS:
        n_threads = 1
    step = max(4, min(_TASK_PRODUCTS // products, -(-n_permutations // (4 * n_threads))) // 4 * 4)
    starts = range(0, n_permutations, step)
    # all of them may be more than memory holds
    tasks = (partial(exactly, np.arange(first, min(first + step, n_permutations))) for first in starts)
    compiled.in_threads(tasks, n_threads, lambda sums: take(sums, thresholds))


def exact_sums(
    kernels: ModuleType, pair: PackedPair, key: Any, numbers: Int64[np.ndarray, " permutations"]
) -> Float64[np.ndarray, "permutations alive"]:
    """Return T of the permutations with these numbers, in float64 of exact products."""
    out = np.empty((numbers.size, pair.f.shape[0], LANES))
    kernels.factor_sums(key, numbers, pair.f, pair.z, out)
    return pair.per_head(out)


def _gram(
    kernels: ModuleType,
    pair: PackedPair,
    key: Any,
    n_permutations: int,
    chunk: int,
    thresholds: Float64[np.ndarray, " alive"],
    exactly: Callable[[Int64[np.ndarray, " some"]], Float64[np.ndarray, "some alive"]],
    n_threads: int,
    take: Take,
) -> None:
    n_heads, n_cells, rows = pair.heads.size, pair.f.shape[1], kernels.ROWS
    f, z = _panels(pair, pair.f, LANES), _panels(pair, pair.z, rows)
    n_panels = z.shape[1]
    # |float32 sum - exact sum| <= gamma ||F|| ||Z|| by Cauchy-Schwarz (Higham 2002, section 3.1); 2 roundings more than
    # there are: for processors that round between product and sum, and for the sums in float64
    roundings = (pair.n_columns + rows + 2) * _FLOAT32_UNIT
    margin = roundings / (1.0 - roundings) * pair.sizes
    orders = np.zeros((n_panels * rows, chunk), dtype=np.uint32)
    for start in range(0, n_permutations, chunk):
        width = min(chunk, n_permutations - start)
        if width < chunk:
            orders = np.zeros((n_panels * rows, width), dtype=np.uint32)
        products = n_heads * n_cells * (n_cells * pair.n_columns // 4 + width)
        threads = n_threads if products > _INLINE_PRODUCTS else 1
        cuts = compiled.cuts(width, 4 * threads, multiple=LANES)
        compiled.in_threads(
            [partial(kernels.shuffle_columns, key, start, *cut, n_cells, orders) for cut in cuts],
            threads,
            lambda _: None,
        )
        total = np.zeros((n_heads, width))
        cuts = compiled.cuts(n_panels, max(threads, products // _TASK_PRODUCTS))
        compiled.in_threads([partial(_gram_part, kernels, orders, f, z, *cut) for cut in cuts], threads, total.__iadd__)
        statistics = np.ascontiguousarray(total.T)
        undecided = np.flatnonzero((np.abs(statistics - thresholds) <= margin).any(axis=1))
        pieces = [undecided[first:last] for first, last in compiled.cuts(undecided.size, 4 * threads)]
        sums: list[Float64[np.ndarray, "some alive"]] = []
        compiled.in_threads([partial(exactly, start + piece) for piece in pieces], threads, sums.append)
        for piece, own in zip(pieces, sums, strict=True):
            statistics[piece] = own
        take(statistics, thresholds)


def _gram_part(
    kernels: ModuleType, orders: Any, f: Any, z: Any, first: int, last: int
) -> Float64[np.ndarray, "alive permutations"]:
    out = np.zeros((f.shape[0], orders.shape[1]))
    kernels.gram_sums(orders, f, z, first, last, out)
    return out


def _panels(
    pair: PackedPair, values: Float32[np.ndarray, "groups cells width"], size: int
) -> Float32[np.ndarray, "alive panels columns size"]:
    """Lay cells out in panels: ``size`` cells side by side, the last ones zero."""
    n_cells = values.shape[1]
    n_panels = -(-n_cells // size)
    panels = np.zeros((pair.heads.size, n_panels, pair.n_columns, size), dtype=np.float32)
    whole = n_cells // size
    for head in range(pair.heads.size):
        own = pair.of_head(values, head)
        panels[head, :whole] = own[: whole * size].reshape(whole, size, pair.n_columns).transpose(0, 2, 1)
        panels[head, whole:, :, : n_cells - whole * size] = own[whole * size :].T
    return panels
