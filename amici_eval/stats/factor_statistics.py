"""The permutation statistic on packed factors, for ranges of permutations: compiled kernels, torch, circular shifts."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from amici_eval.stats.packing import LANES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import ModuleType

    from jaxtyping import Float32, Float64, Int64
    from torch import Tensor

    from amici_eval.stats.packing import PackedPair
    from amici_eval.stats.permutations import PermutationStream

    Take = Callable[[Float64[np.ndarray, "permutations alive"], Float64[np.ndarray, " alive"]], None]

__all__ = ["TIE_TOLERANCE", "compiled_statistics", "cyclic_statistics", "torch_statistics"]

TIE_TOLERANCE = 1e-10
"""Relative to ||F_h|| ||Z_h||: sums of one permutation differ by less than this between devices and orders."""

_GRAM_CELLS_PER_PERMUTATION = 6
"""Measured: the products of all cells cost less than gathering rows up to this many cells a permutation."""
_TORCH_GRAM_CELLS_PER_PERMUTATION = 16
_GRAM_COLUMNS = 2**17
_STORED_INDICES = 2**26
_TASK_PRODUCTS = 2**27
_INLINE_PRODUCTS = 2**22
"""Below this, handing work to threads costs more than it saves."""
_TORCH_ENTRIES = 2**23
_TORCH_CELLS = 1024
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
    exactly = partial(_exact_sums, kernels, pair, key)
    thresholds = exactly(np.array([kernels.IDENTITY]))[0] - TIE_TOLERANCE * pair.sizes
    chunk = max(1, min(n_permutations, _STORED_INDICES // n_cells, _GRAM_COLUMNS))
    if form == "auto":
        form = "gram" if n_cells <= _GRAM_CELLS_PER_PERMUTATION * chunk else "factor"
    if form == "gram":
        _gram(kernels, pair, key, n_permutations, chunk, thresholds, exactly, n_threads, take)
        return
    products = pair.f.size
    if products * n_permutations <= _INLINE_PRODUCTS:
        n_threads = 1
    step = max(4, min(_TASK_PRODUCTS // products, -(-n_permutations // (4 * n_threads))) // 4 * 4)
    numbers = [np.arange(first, min(first + step, n_permutations)) for first in range(0, n_permutations, step)]
    _in_threads([partial(exactly, own) for own in numbers], n_threads, lambda sums: take(sums, thresholds))


def _exact_sums(
    kernels: ModuleType, pair: PackedPair, key: Any, numbers: Int64[np.ndarray, " permutations"]
) -> Float64[np.ndarray, "permutations alive"]:
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
        cuts = _cuts(width, 4 * threads, multiple=LANES)
        _in_threads(
            [partial(kernels.shuffle_columns, key, start, *cut, n_cells, orders) for cut in cuts],
            threads,
            lambda _: None,
        )
        total = np.zeros((n_heads, width))
        cuts = _cuts(n_panels, max(threads, products // _TASK_PRODUCTS))
        _in_threads([partial(_gram_part, kernels, orders, f, z, *cut) for cut in cuts], threads, total.__iadd__)
        statistics = np.ascontiguousarray(total.T)
        undecided = np.flatnonzero((np.abs(statistics - thresholds) <= margin).any(axis=1))
        pieces = [undecided[first:last] for first, last in _cuts(undecided.size, 4 * threads)]
        sums: list[Float64[np.ndarray, "some alive"]] = []
        _in_threads([partial(exactly, start + piece) for piece in pieces], threads, sums.append)
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


def _cuts(length: int, n_parts: int, *, multiple: int = 1) -> list[tuple[int, int]]:
    """Cut 0 to ``length`` into at most ``n_parts`` ranges that begin at multiples of ``multiple``."""
    step = max(1, -(-length // (n_parts * multiple))) * multiple
    return [(first, min(first + step, length)) for first in range(0, length, step)]


def _in_threads(tasks: Sequence[Callable[[], Any]], n_threads: int, done: Callable[[Any], object]) -> None:
    """Run tasks that leave the interpreter alone; hand each result on in order, in the calling thread."""
    if n_threads == 1 or len(tasks) <= 1:
        for task in tasks:
            done(task())
        return
    with ThreadPoolExecutor(min(n_threads, len(tasks))) as pool:
        futures = [pool.submit(task) for task in tasks]
        try:
            while futures:
                done(futures.pop(0).result())
        finally:
            # an error or an interrupt waits for what is running, not for what is queued
            for future in futures:
                future.cancel()


def torch_statistics(
    pair: PackedPair, stream: PermutationStream, n_permutations: int, *, form: str, device: str, take: Take
) -> None:
    """Do what ``compiled_statistics`` does, in float64 on a torch device."""
    _, n_cells, width = pair.f.shape
    chunk = max(1, min(n_permutations, _STORED_INDICES // n_cells))
    if form == "auto":
        form = "gram" if n_cells <= _TORCH_GRAM_CELLS_PER_PERMUTATION * chunk else "factor"
    kernel = _torch_gram if form == "gram" else _torch_factor
    if form == "factor":
        chunk = max(1, min(chunk, _TORCH_ENTRIES // (min(n_cells, _TORCH_CELLS) * width)))
    f, z = (torch.from_numpy(values).to(device) for values in (pair.f, pair.z))
    identity = torch.arange(n_cells, device=device)[None]
    thresholds = kernel(pair, f, z, identity)[0] - TIE_TOLERANCE * pair.sizes
    for start in range(0, n_permutations, chunk):
        orders = torch.from_numpy(stream.batch(start, min(start + chunk, n_permutations))).to(device)
        take(kernel(pair, f, z, orders), thresholds)


def _torch_factor(pair: PackedPair, f: Tensor, z: Tensor, orders: Tensor) -> Float64[np.ndarray, "permutations alive"]:
    n_groups, n_cells, width = f.shape
    sums = torch.zeros(len(orders), n_groups, width, dtype=torch.float64, device=f.device)
    step = min(n_cells, _TORCH_CELLS)
    for group in range(n_groups):
        for first in range(0, n_cells, step):
            own = orders[:, first : first + step]
            rows = f[group].index_select(0, own.flatten()).reshape(*own.shape, width).double()
            sums[:, group] += (rows * z[group, first : first + step].double()).sum(dim=1)
    return pair.per_head(sums.reshape(len(orders), n_groups, -1, LANES).sum(dim=2).cpu().numpy())


def _torch_gram(pair: PackedPair, f: Tensor, z: Tensor, orders: Tensor) -> Float64[np.ndarray, "permutations alive"]:
    n_permutations, n_cells = orders.shape
    sums = torch.zeros(n_permutations, pair.heads.size, dtype=torch.float64, device=f.device)
    step = max(1, _TORCH_ENTRIES // _TORCH_CELLS)
    for head in range(pair.heads.size):
        group, lane = divmod(head, pair.lanes)
        columns = slice(lane, lane + pair.n_columns * pair.lanes, pair.lanes)
        left, right = f[group, :, columns].double(), z[group, :, columns].double()
        for first in range(0, n_cells, _TORCH_CELLS):
            products = left @ right[first : first + _TORCH_CELLS].T
            for row in range(0, n_permutations, step):
                own = orders[row : row + step, first : first + _TORCH_CELLS]
                sums[row : row + step, head] += products.gather(0, own).sum(dim=1)
    return sums.cpu().numpy()


def cyclic_statistics(
    pair: PackedPair, order: Int64[np.ndarray, " cells"], *, device: str
) -> Float64[np.ndarray, "shifts alive"]:
    """Return T of all circular shifts along ``order``: row s gives the place of cell ``order[k]`` to ``order[k + s]``.

    All of them are one circular cross-correlation, hence two Fourier transforms per column.
    """
    n_cells, (n_groups, _, width) = order.size, pair.f.shape
    taken = torch.from_numpy(order).to(device)
    f, z = (torch.from_numpy(values).to(device) for values in (pair.f, pair.z))
    spectrum = torch.zeros(n_groups * pair.lanes, n_cells // 2 + 1, dtype=torch.complex128, device=device)
    step = max(1, _TORCH_ENTRIES // (n_cells * pair.lanes)) * pair.lanes
    for group in range(n_groups):
        own = spectrum[group * pair.lanes : (group + 1) * pair.lanes]
        for first in range(0, width, step):
            left, right = (
                torch.fft.rfft(values[group, :, first : first + step].index_select(0, taken).T.double().contiguous())
                for values in (f, z)
            )
            own += (left * right.conj()).reshape(-1, *own.shape).sum(dim=0)
    statistics: Float64[np.ndarray, "shifts alive"] = (
        torch.fft.irfft(spectrum[: pair.heads.size], n=n_cells).T.cpu().numpy()
    )
    return statistics
