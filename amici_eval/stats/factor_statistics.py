"""The permutation statistic on packed factors, for ranges of permutations: compiled kernels, torch, circular shifts."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from scipy.fft import next_fast_len

from amici_eval.stats import compiled
from amici_eval.stats.packing import LANES

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from types import ModuleType

    from jaxtyping import Complex128, Float32, Float64, Int32, Int64
    from torch import Tensor

    from amici_eval.stats.packing import PackedPair
    from amici_eval.stats.permutations import PermutationStream

    Take = Callable[[Float64[np.ndarray, "permutations alive"], Float64[np.ndarray, " alive"]], None]

Result = TypeVar("Result")

__all__ = [
    "TIE_TOLERANCE",
    "compiled_statistics",
    "cyclic_statistics",
    "exact_statistics",
    "identity_statistics",
    "torch_statistics",
]

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
_INLINE_ENTRIES = 2**18
_DRAWN_INDICES = 2**24
_TORCH_ENTRIES = 2**23
_TORCH_CELLS = 1024
_FLOAT32_UNIT = 2.0**-24
_FAST_PRIMES = (2, 3, 5, 7, 11, 13)
"""Measured: with any other prime factor, a transform of more than twice the length costs less, or as much."""
_OutOfMemory = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)


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
    starts = range(0, n_permutations, step)
    # all of them may be more than memory holds
    tasks = (partial(exactly, np.arange(first, min(first + step, n_permutations))) for first in starts)
    compiled.in_threads(tasks, n_threads, lambda sums: take(sums, thresholds))


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


def torch_statistics(
    pair: PackedPair,
    stream: PermutationStream,
    n_permutations: int,
    *,
    form: str,
    device: str,
    take: Take,
    start: int = 0,
) -> None:
    """Do what ``compiled_statistics`` does, in float64 on a torch device, for permutations from ``start`` on.

    The next orders are drawn while the device is at work. Where its memory ends, fewer permutations are taken at once.
    """
    _, n_cells, width = pair.f.shape
    drawn = max(1, min(n_permutations, _STORED_INDICES // n_cells))
    chunk = max(1, min(drawn, _TORCH_ENTRIES // (min(n_cells, _TORCH_CELLS) * width)))
    if form == "auto":
        form = "gram" if n_cells <= _TORCH_GRAM_CELLS_PER_PERMUTATION * drawn else "factor"
    f, z = (torch.from_numpy(values).to(device) for values in (pair.f, pair.z))
    identity = np.arange(n_cells, dtype=np.int32)[None]
    thresholds = _torch_factor(pair, f, z, identity)[0] - TIE_TOLERANCE * pair.sizes
    if form == "factor":
        drawn = max(chunk, min(drawn, _DRAWN_INDICES // n_cells))
    with closing(_drawn_ahead(stream, start + n_permutations, drawn, start=start)) as chunks:
        for orders in chunks:
            first = 0
            while first < len(orders):
                own = orders[first:] if form == "gram" else orders[first : first + chunk]
                kernel = partial(_torch_gram if form == "gram" else _torch_factor, pair, f, z, own)
                sums = kernel() if form == "factor" and chunk == 1 else _unless_memory_ends(kernel)
                if sums is not None:
                    take(sums, thresholds)
                    first += len(own)
                elif form == "gram":
                    # fewer permutations would not make the products of all cells smaller
                    form = "factor"
                else:
                    chunk = (chunk + 1) // 2


def _drawn_ahead(
    stream: PermutationStream, stop: int, chunk: int, *, start: int = 0
) -> Generator[Int32[np.ndarray, "some cells"], None, None]:
    """Yield permutations ``start`` to ``stop - 1`` in chunks; a thread draws the next one meanwhile."""
    n_threads = torch.get_num_threads()

    def draw(first: int) -> Int32[np.ndarray, "some cells"]:
        return stream.narrow_batch(first, min(first + chunk, stop), n_threads=n_threads)

    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(draw, start)
        for first in range(start + chunk, stop, chunk):
            orders = following.result()
            following = pool.submit(draw, first)
            yield orders
        yield following.result()


def _unless_memory_ends(compute: Callable[[], Result]) -> Result | None:
    """Return ``None`` where the device has too little memory; the failed tensors are freed by then."""
    try:
        return compute()
    except _OutOfMemory:
        return None


def _torch_factor(
    pair: PackedPair, f: Tensor, z: Tensor, orders: Int32[np.ndarray, "permutations cells"]
) -> Float64[np.ndarray, "permutations alive"]:
    n_groups, n_cells, width = f.shape
    taken = torch.from_numpy(orders).to(f.device)
    sums = torch.zeros(len(orders), n_groups, width, dtype=torch.float64, device=f.device)
    step = min(n_cells, _TORCH_CELLS)
    for group in range(n_groups):
        for first in range(0, n_cells, step):
            own = taken[:, first : first + step]
            rows = f[group].index_select(0, own.flatten()).reshape(*own.shape, width).double()
            sums[:, group] += (rows * z[group, first : first + step].double()).sum(dim=1)
    return pair.per_head(sums.reshape(len(orders), n_groups, -1, LANES).sum(dim=2).cpu().numpy())


def _torch_gram(
    pair: PackedPair, f: Tensor, z: Tensor, orders: Int32[np.ndarray, "permutations cells"]
) -> Float64[np.ndarray, "permutations alive"]:
    n_permutations, n_cells = orders.shape
    taken = torch.from_numpy(orders).to(f.device)
    sums = torch.zeros(n_permutations, pair.heads.size, dtype=torch.float64, device=f.device)
    step = max(1, _TORCH_ENTRIES // _TORCH_CELLS)
    for head in range(pair.heads.size):
        group, lane = divmod(head, pair.lanes)
        columns = slice(lane, lane + pair.n_columns * pair.lanes, pair.lanes)
        left, right = f[group, :, columns].double(), z[group, :, columns].double()
        for first in range(0, n_cells, _TORCH_CELLS):
            products = left @ right[first : first + _TORCH_CELLS].T
            for row in range(0, n_permutations, step):
                own = taken[row : row + step, first : first + _TORCH_CELLS].long()
                sums[row : row + step, head] += products.gather(0, own).sum(dim=1)
    return sums.cpu().numpy()


def exact_statistics(
    pair: PackedPair, stream: PermutationStream, start: int, stop: int, *, device: str
) -> Float64[np.ndarray, "permutations alive"]:
    """Return T of permutations ``start`` to ``stop - 1`` in float64, in the calling thread; with numba, T of one
    permutation is the same to the last bit whatever range it is computed with.
    """
    if (kernels := _cpu_kernels(device)) is not None:
        return _exact_sums(kernels, pair, stream.key(), np.arange(start, stop))
    found = [np.empty((0, pair.heads.size))]
    if stop > start:
        torch_statistics(
            pair,
            stream,
            stop - start,
            start=start,
            form="factor",
            device=device,
            take=lambda sums, _: found.append(sums),
        )
    return np.concatenate(found)


def identity_statistics(pair: PackedPair, *, device: str) -> Float64[np.ndarray, " alive"]:
    """Return T with all cells where they are, from the kernel of ``exact_statistics``."""
    if (kernels := _cpu_kernels(device)) is not None:
        identity = np.array([kernels.IDENTITY])
        sums = _exact_sums(kernels, pair, np.zeros(2, dtype=np.uint64), identity)
    else:
        f, z = (torch.from_numpy(values).to(device) for values in (pair.f, pair.z))
        sums = _torch_factor(pair, f, z, np.arange(pair.f.shape[1], dtype=np.int32)[None])
    own: Float64[np.ndarray, " alive"] = sums[0]
    return own


def _cpu_kernels(device: str) -> ModuleType | None:
    return compiled.kernels() if torch.device(device).type == "cpu" else None


def cyclic_statistics(pair: PackedPair, *, device: str) -> Float64[np.ndarray, "shifts alive"]:
    """Return T of all circular shifts of the cells as packed: row s gives the place of cell k to cell k + s.

    All of them are one circular convolution of F with Z backwards, hence two Fourier transforms per column, in float64:
    float32 would leave hundreds of shifts undecided. A number of cells with a large prime factor has no fast transform;
    columns are then padded with zeros, and what the longer convolution has beyond the last cell is added to its begin.
    """
    n_cells = pair.f.shape[1]
    length = n_cells if _has_fast_transform(n_cells) else next_fast_len(2 * n_cells - 1, real=True)
    kernels = compiled.kernels() if torch.device(device).type == "cpu" else None
    if kernels is None:
        spectrum = _torch_spectrum(pair, length, device)
    else:
        spectrum = _compiled_spectrum(kernels, pair, length)
    sums = torch.fft.irfft(spectrum.flatten(0, 1)[: pair.heads.size], n=length)
    if length > n_cells:
        sums[:, : n_cells - 1] += sums[:, n_cells : 2 * n_cells - 1]
    statistics: Float64[np.ndarray, "shifts alive"] = sums[:, :n_cells].T.cpu().numpy()
    return statistics


def _has_fast_transform(n_cells: int) -> bool:
    for prime in _FAST_PRIMES:
        while n_cells % prime == 0:
            n_cells //= prime
    return n_cells == 1


def _compiled_spectrum(
    kernels: ModuleType, pair: PackedPair, length: int
) -> Complex128[Tensor, "groups lanes frequencies"]:
    """Return the transform of the statistics: a cache line of columns is turned and transformed at a time."""
    (n_groups, n_cells, width), lanes = pair.f.shape, pair.lanes
    n_threads = torch.get_num_threads() if n_cells * LANES > _INLINE_ENTRIES else 1
    cuts = compiled.cuts(n_cells, n_threads)
    columns = np.zeros((LANES, length))

    def transformed(values: Float32[np.ndarray, "cells width"], first: int, *, backwards: bool) -> Tensor:
        tasks = [partial(kernels.turned, values, first, backwards, *cut, columns) for cut in cuts]
        compiled.in_threads(tasks, n_threads, lambda _: None)
        found: Tensor = torch.fft.rfft(torch.from_numpy(columns))
        return found

    spectrum = torch.zeros(n_groups, lanes, length // 2 + 1, dtype=torch.complex128)
    for group in range(n_groups):
        for first in range(0, width, LANES):
            left = transformed(pair.f[group], first, backwards=False)
            right = transformed(pair.z[group], first, backwards=True)
            for lane in range(0, LANES, lanes):
                spectrum[group].addcmul_(left[lane : lane + lanes], right[lane : lane + lanes])
    return spectrum


def _torch_spectrum(pair: PackedPair, length: int, device: str) -> Complex128[Tensor, "groups lanes frequencies"]:
    """Do what ``_compiled_spectrum`` does, as many columns at a time as the device's memory holds."""
    n_groups, _, width = pair.f.shape
    f, z = (torch.from_numpy(values).to(device) for values in (pair.f, pair.z))
    spectrum = torch.zeros(n_groups, pair.lanes, length // 2 + 1, dtype=torch.complex128, device=device)

    def part(group: int, first: int, last: int) -> Complex128[Tensor, "lanes frequencies"]:
        columns = f[group, :, first:last].T.double().contiguous()
        left = torch.fft.rfft(columns, n=length)
        columns = z[group, :, first:last].T.double().flip(1).roll(1, dims=1)
        right = torch.fft.rfft(columns, n=length)
        product: Tensor = left.mul_(right).reshape(-1, pair.lanes, length // 2 + 1).sum(dim=0)
        return product

    step = max(1, _TORCH_ENTRIES // (length * pair.lanes)) * pair.lanes
    for group in range(n_groups):
        first = 0
        while first < width:
            own = partial(part, group, first, min(first + step, width))
            found = own() if step == pair.lanes else _unless_memory_ends(own)
            if found is None:
                step = step // pair.lanes // 2 * pair.lanes
            else:
                spectrum[group] += found
                first += step
    return spectrum
