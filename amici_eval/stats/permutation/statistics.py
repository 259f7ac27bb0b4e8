"""The permutation statistic on packed factors: by compiled kernels, by torch, and by Fourier transforms."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.fft import next_fast_len

from amici_eval.common.memory import Shrinking, memory_errors_explained, unless_memory_ends
from amici_eval.common.threads import cuts, in_threads
from amici_eval.stats.permutation.permutations import LANES, compiled_kernels

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from types import ModuleType

    from jaxtyping import Bool, Complex128, Float, Float32, Float64, Int32, Int64
    from torch import Tensor

    from amici_eval.stats.permutation.permutations import PermutationStream

    Take = Callable[[Float64[np.ndarray, "permutations alive"], Float64[np.ndarray, " alive"]], None]

STORED_INDICES = 2**26
"""Largest number of entries (permutations x cells) of the orders held at a time."""
TORCH_ENTRIES = 2**23
"""Largest number of entries of a temporary tensor."""


TIE_TOLERANCE = 1e-10
"""Relative to ||F_h|| ||Z_h||: sums of one permutation differ by less between devices and summation orders."""

_BLOCK_ENTRIES = 2**16
_INLINE_ENTRIES = 2**18
"""Below this, handing work to threads costs more than it saves."""
ROUNDING = 1e-12
"""Numbers whose centred norm is at most this share of their norm are constant up to float64 rounding."""


def float64_device(device: str) -> str:
    """Return the device, or the CPU in place of ``"mps"``, which has no float64."""
    return "cpu" if torch.device(device).type == "mps" else device


def cpu_kernels(device: str) -> ModuleType | None:
    """Return the compiled kernels for the CPU, None for a device on which torch computes."""
    return compiled_kernels() if torch.device(device).type == "cpu" else None


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class HeadFactors:
    """Factors F and images Z of the heads of one cell type.

    Head h predicts ``constant + F_h @ A_h.T``, Z_h is ``Y @ A_h``; neither need be centred. ``dead``: heads whose
    prediction does not vary, which have no test.
    """

    factors: Float[np.ndarray, "cells columns heads"]
    images: Float[np.ndarray, "cells columns heads"]
    dead: Bool[np.ndarray, " heads"]


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedPair:
    """Packed factors and images of the heads that have a test.

    In group g, entry ``a * lanes + l`` of a row is column a of head ``heads[g * lanes + l]``; other entries are zero.
    Each head's numbers are multiplied by a power of two, against over- and underflow. lanes: heads side by side, a
    divisor of 16; sizes: ``||F_h|| * ||Z_h||`` of the stored numbers.
    """

    factors: Float32[np.ndarray, "groups cells width"]
    images: Float32[np.ndarray, "groups cells width"]
    heads: Int64[np.ndarray, " alive"]
    n_columns: int
    lanes: int
    sizes: Float64[np.ndarray, " alive"]

    def of_head(
        self, values: Float32[np.ndarray, "groups cells width"], number: int
    ) -> Float32[np.ndarray, "cells columns"]:
        """Return the part of ``factors`` or ``images`` that belongs to the ``number``-th of these heads, as a view."""
        group, lane = divmod(number, self.lanes)
        return values[group, :, lane : lane + self.n_columns * self.lanes : self.lanes]

    def per_head(self, sums: Float64[np.ndarray, "... groups lanes"]) -> Float64[np.ndarray, "... alive"]:
        """Return the sums per head of sums per lane (``LANES`` of them)."""
        split = sums.reshape(*sums.shape[:-1], LANES // self.lanes, self.lanes).sum(axis=-2)
        heads: Float64[np.ndarray, "... alive"] = split.reshape(*sums.shape[:-2], -1)[..., : self.heads.size]
        return heads


def pack(heads: HeadFactors, *, order: Int64[np.ndarray, " cells"] | None = None) -> PackedPair:
    """Centre factors and images over cells in float64, round them to float32 and lay them out.

    Row k is cell ``order[k]``, if an order is given. Heads that are dead or not finite, and heads whose factors do not
    vary, are left out.
    """
    factors, images = (_ColumnSums.of(values) for values in (heads.factors, heads.images))
    with np.errstate(invalid="ignore"):
        dead = heads.dead | ~np.isfinite(factors.norm + images.norm)
    alive = np.flatnonzero(~dead)
    f, f_norms = _packed(heads.factors, alive, factors, order)
    varies = f_norms > 0.0
    if not varies.all():
        alive = alive[varies]
        f, f_norms = _packed(heads.factors, alive, factors, order)
    z, z_norms = _packed(heads.images, alive, images, order)
    lanes, n_columns = _lanes(alive.size), heads.factors.shape[1]
    return PackedPair(factors=f, images=z, heads=alive, n_columns=n_columns, lanes=lanes, sizes=f_norms * z_norms)


def _lanes(n_heads: int) -> int:
    return min(LANES, 1 << max(0, n_heads - 1).bit_length())


def _steps(n_cells: int, row: int) -> tuple[int, int]:
    """Return the cells per block (independent of the number of threads) and the number of blocks."""
    step = max(1, _BLOCK_ENTRIES // max(1, row))
    return step, -(-n_cells // step)


def _flat(values: Float[np.ndarray, "cells columns heads"]) -> Float[np.ndarray, "cells numbers"]:
    # numba compiles a kernel once more for each layout and for writable arrays
    flat = np.ascontiguousarray(values).reshape(len(values), -1).view()
    flat.flags.writeable = False
    return flat


def _by_block(
    n_blocks: int,
    n_entries: int,
    kernel: Callable[..., None],
    *arrays: Float64[np.ndarray, ...] | Float32[np.ndarray, ...],
) -> None:
    """Run ``kernel(first, last, *arrays)`` on ranges of blocks, in as many threads as torch uses."""
    n_threads = torch.get_num_threads() if n_entries > _INLINE_ENTRIES else 1
    ranges = cuts(n_blocks, 4 * n_threads if n_threads > 1 else 1)
    in_threads([partial(kernel, *own, *arrays) for own in ranges], n_threads, lambda _: None)


@dataclass(frozen=True)
class _ColumnSums:
    """Mean over cells of every column, and the norm of each head before centring."""

    mean: Float64[np.ndarray, "columns heads"]
    norm: Float64[np.ndarray, " heads"]

    @classmethod
    def of(cls, values: Float[np.ndarray, "cells columns heads"]) -> _ColumnSums:
        n_cells, n_columns, n_heads = values.shape
        step, n_blocks = _steps(n_cells, n_columns * n_heads)
        by_block = np.empty((2, n_blocks, n_columns * n_heads))
        kernel = partial(compiled_kernels().block_moments, _flat(values), step)
        _by_block(n_blocks, values.size, kernel, *by_block)
        # heads that are not finite are left out in ``pack``
        with np.errstate(invalid="ignore", over="ignore"):
            summed = by_block.sum(axis=1).reshape(2, n_columns, n_heads)
            return cls(mean=summed[0] / n_cells, norm=np.sqrt(summed[1].sum(axis=0)))


def _packed(
    values: Float[np.ndarray, "cells columns heads"],
    heads: Int64[np.ndarray, " alive"],
    sums: _ColumnSums,
    order: Int64[np.ndarray, " cells"] | None,
) -> tuple[Float32[np.ndarray, "groups cells width"], Float64[np.ndarray, " alive"]]:
    """Return the packed rows of some heads and the norm of each; a head that is constant up to rounding becomes 0."""
    n_cells, n_columns, n_heads = values.shape
    lanes = _lanes(heads.size)
    n_groups = max(1, -(-heads.size // lanes))
    packed = _aligned((n_groups, n_cells, -(-n_columns * lanes // LANES) * LANES))
    # scale to about size 1; a power of two does not change the rounding to float32
    scale = np.exp2(-np.frexp(sums.norm / np.sqrt(n_cells * n_columns))[1].astype(np.float64))
    step, n_blocks = _steps(n_cells, n_columns * n_heads)
    squares = np.empty((n_blocks, n_columns * n_heads))
    source = (np.arange(n_columns)[:, None] * n_heads + heads).ravel()
    groups, own_lanes = np.divmod(np.arange(heads.size), lanes)
    column = np.arange(n_columns)[:, None] * lanes + own_lanes
    place = np.stack([np.broadcast_to(groups, column.shape).ravel(), column.ravel()], axis=1)
    cells = np.empty(0, dtype=np.int64) if order is None else order
    scales = np.broadcast_to(scale, sums.mean.shape).ravel()
    rows = compiled_kernels().block_rows
    kernel = partial(rows, _flat(values), cells, sums.mean.ravel(), scales, source, place, step)
    _by_block(n_blocks, values.size, kernel, packed, squares)
    with np.errstate(invalid="ignore", over="ignore"):
        found = np.sqrt(squares.sum(axis=0).reshape(n_columns, n_heads).sum(axis=0)[heads])
    constant = np.flatnonzero(~(found > ROUNDING * sums.norm[heads] * scale[heads]))
    for number in constant:
        group, lane = divmod(int(number), lanes)
        packed[group, :, lane : lane + n_columns * lanes : lanes] = 0.0
    found[constant] = 0.0
    return packed, found


def _aligned(shape: tuple[int, ...]) -> Float32[np.ndarray, "groups cells width"]:
    """Return an uninitialised array that begins at a cache line.

    NumPy puts large arrays on huge pages, which random access to rows needs.
    """
    n = int(np.prod(shape))
    raw = np.empty(n + LANES, dtype=np.float32)
    first = (-raw.ctypes.data % 64) // 4
    return raw[first : first + n].reshape(shape)


_GRAM_CELLS_PER_PERMUTATION = 6
"""Measured: form ``"gram"`` costs less than ``"factor"`` up to this many cells per permutation."""
_GRAM_COLUMNS = 2**17
TASK_PRODUCTS = 2**27
INLINE_PRODUCTS = 2**22
"""Below this, handing work to threads costs more than it saves."""
_FLOAT32_UNIT = 2.0**-24


def compiled_statistics(
    pair: PackedPair, stream: PermutationStream, n_permutations: int, *, n_threads: int, take: Take
) -> None:
    """Call ``take(statistics, thresholds)`` for all permutations, range by range, in the calling thread.

    In form ``"gram"``, for few cells, a statistic is a float32 sum, unless it lies so near its threshold that float32
    cannot decide whether it is reached; then, and in form ``"factor"``, it is a sum in float64 of exact products.
    """
    key, n_cells = stream.key(), pair.factors.shape[1]
    identity = np.array([compiled_kernels().IDENTITY])
    thresholds = float64_sums(pair, key, identity)[0] - TIE_TOLERANCE * pair.sizes
    chunk = max(1, min(n_permutations, STORED_INDICES // n_cells, _GRAM_COLUMNS))
    if n_cells <= _GRAM_CELLS_PER_PERMUTATION * chunk:
        _gram(pair, key, n_permutations, chunk, thresholds, n_threads, take)
        return
    products = pair.factors.size
    if products * n_permutations <= INLINE_PRODUCTS:
        n_threads = 1
    step = max(4, min(TASK_PRODUCTS // products, -(-n_permutations // (4 * n_threads))) // 4 * 4)
    starts = range(0, n_permutations, step)
    # a generator: all index arrays together may not fit in memory
    tasks = (partial(float64_sums, pair, key, np.arange(first, min(first + step, n_permutations))) for first in starts)
    in_threads(tasks, n_threads, lambda sums: take(sums, thresholds))


def float64_sums(
    pair: PackedPair, key: Any, numbers: Int64[np.ndarray, " permutations"]
) -> Float64[np.ndarray, "permutations alive"]:
    """Return T of the permutations with these numbers, as float64 sums of exact products."""
    out = np.empty((numbers.size, pair.factors.shape[0], LANES))
    compiled_kernels().factor_sums(key, numbers, pair.factors, pair.images, out)
    return pair.per_head(out)


def _gram(
    pair: PackedPair,
    key: Any,
    n_permutations: int,
    chunk: int,
    thresholds: Float64[np.ndarray, " alive"],
    n_threads: int,
    take: Take,
) -> None:
    kernels = compiled_kernels()
    n_heads, n_cells, rows = pair.heads.size, pair.factors.shape[1], kernels.ROWS
    f, z = _panels(pair, pair.factors, LANES), _panels(pair, pair.images, rows)
    n_panels = z.shape[1]
    # |float32 sum - exact sum| <= gamma ||F|| ||Z|| by Cauchy-Schwarz (Higham 2002, section 3.1); 2 extra roundings
    # allow for processors that round between product and sum, and for the sums in float64
    roundings = (pair.n_columns + rows + 2) * _FLOAT32_UNIT
    margin = roundings / (1.0 - roundings) * pair.sizes
    orders = np.zeros((n_panels * rows, chunk), dtype=np.uint32)
    for start in range(0, n_permutations, chunk):
        width = min(chunk, n_permutations - start)
        if width < chunk:
            orders = np.zeros((n_panels * rows, width), dtype=np.uint32)
        products = n_heads * n_cells * (n_cells * pair.n_columns // 4 + width)
        threads = n_threads if products > INLINE_PRODUCTS else 1
        in_threads(
            [
                partial(kernels.shuffle_columns, key, start, *own, n_cells, orders)
                for own in cuts(width, 4 * threads, multiple=LANES)
            ],
            threads,
            lambda _: None,
        )
        total = np.zeros((n_heads, width))
        panels = cuts(n_panels, max(threads, products // TASK_PRODUCTS))
        in_threads([partial(_gram_sums, orders, f, z, *own) for own in panels], threads, total.__iadd__)
        statistics = np.ascontiguousarray(total.T)
        undecided = np.flatnonzero((np.abs(statistics - thresholds) <= margin).any(axis=1))
        pieces = [undecided[first:last] for first, last in cuts(undecided.size, 4 * threads)]
        sums: list[Float64[np.ndarray, "some alive"]] = []
        in_threads([partial(float64_sums, pair, key, start + piece) for piece in pieces], threads, sums.append)
        for piece, own in zip(pieces, sums, strict=True):
            statistics[piece] = own
        take(statistics, thresholds)


def _gram_sums(orders: Any, f: Any, z: Any, first: int, last: int) -> Float64[np.ndarray, "alive permutations"]:
    out = np.zeros((f.shape[0], orders.shape[1]))
    compiled_kernels().gram_sums(orders, f, z, first, last, out)
    return out


def _panels(
    pair: PackedPair, values: Float32[np.ndarray, "groups cells width"], size: int
) -> Float32[np.ndarray, "alive panels columns size"]:
    """Return the cells in panels of ``size`` cells side by side; the last panel is padded with zeros."""
    n_cells = values.shape[1]
    n_panels = -(-n_cells // size)
    panels = np.zeros((pair.heads.size, n_panels, pair.n_columns, size), dtype=np.float32)
    whole = n_cells // size
    for head in range(pair.heads.size):
        own = pair.of_head(values, head)
        panels[head, :whole] = own[: whole * size].reshape(whole, size, pair.n_columns).transpose(0, 2, 1)
        panels[head, whole:, :, : n_cells - whole * size] = own[whole * size :].T
    return panels


logger = logging.getLogger(__name__)

_TORCH_GRAM_CELLS_PER_PERMUTATION = 16
"""Measured: form ``"gram"`` costs less than ``"factor"`` up to this many cells per permutation."""
_DRAWN_INDICES = 2**24
_CELLS = 1024


def torch_statistics(
    pair: PackedPair,
    stream: PermutationStream,
    n_permutations: int,
    *,
    device: str,
    take: Take,
    start: int = 0,
    form: str = "auto",
) -> None:
    """Do what ``compiled_statistics`` does, in float64 on a torch device, for permutations from ``start`` on.

    The next orders are drawn while the device computes. If its memory runs out, fewer permutations are taken at once.
    """
    _, n_cells, width = pair.factors.shape
    drawn = max(1, min(n_permutations, STORED_INDICES // n_cells))
    chunk = max(1, min(drawn, TORCH_ENTRIES // (min(n_cells, _CELLS) * width)))
    if form == "auto":
        form = "gram" if n_cells <= _TORCH_GRAM_CELLS_PER_PERMUTATION * drawn else "factor"
    if form == "factor":
        drawn = max(chunk, min(drawn, _DRAWN_INDICES // n_cells))
    identity = np.arange(n_cells, dtype=np.int32)[None]
    with memory_errors_explained("one permutation of the test", device):
        f, z = (torch.from_numpy(values).to(device) for values in (pair.factors, pair.images))
        thresholds = torch_factor(pair, f, z, identity)[0] - TIE_TOLERANCE * pair.sizes
        with closing(_drawn_ahead(stream, start + n_permutations, drawn, start=start)) as chunks:
            for orders in chunks:
                first = 0
                while first < len(orders):
                    own = orders[first:] if form == "gram" else orders[first : first + chunk]
                    kernel = partial(_torch_gram if form == "gram" else torch_factor, pair, f, z, own)
                    sums = kernel() if form == "factor" and chunk == 1 else unless_memory_ends(kernel, device=device)
                    if sums is not None:
                        take(sums, thresholds)
                        first += len(own)
                    elif form == "gram":
                        # the products of all cells need the same memory for fewer permutations
                        form = "factor"
                    else:
                        chunk = (chunk + 1) // 2
                        logger.warning("out of memory on %s: going on with %d permutations at a time", device, chunk)


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


def torch_factor(
    pair: PackedPair, f: Tensor, z: Tensor, orders: Int32[np.ndarray, "permutations cells"]
) -> Float64[np.ndarray, "permutations alive"]:
    """Return T of the given orders of the cells, from gathered rows of F."""
    n_groups, n_cells, width = f.shape
    taken = torch.from_numpy(orders).to(f.device)
    sums = torch.zeros(len(orders), n_groups, width, dtype=torch.float64, device=f.device)
    step = min(n_cells, _CELLS)
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
    step = max(1, TORCH_ENTRIES // _CELLS)
    for head in range(pair.heads.size):
        group, lane = divmod(head, pair.lanes)
        columns = slice(lane, lane + pair.n_columns * pair.lanes, pair.lanes)
        left, right = f[group, :, columns].double(), z[group, :, columns].double()
        for first in range(0, n_cells, _CELLS):
            products = left @ right[first : first + _CELLS].T
            for row in range(0, n_permutations, step):
                own = taken[row : row + step, first : first + _CELLS].long()
                sums[row : row + step, head] += products.gather(0, own).sum(dim=1)
    return sums.cpu().numpy()


_FAST_PRIMES = (2, 3, 5, 7, 11, 13)
"""Measured: for a length with any other prime factor, a transform of more than twice the length costs no more."""


def cyclic_statistics(pair: PackedPair, *, device: str) -> Float64[np.ndarray, "shifts alive"]:
    """Return T of all circular shifts of the packed cells; in row s, cell k takes the factors of cell k + s.

    The shifts are one circular convolution of F with reversed Z, hence two Fourier transforms per column, in float64:
    float32 would leave hundreds of shifts undecided. If the number of cells has a large prime factor, there is no fast
    transform; columns are then padded with zeros, and the part of the longer convolution beyond the last cell is added
    to its start.
    """
    n_cells = pair.factors.shape[1]
    length = n_cells if _has_fast_transform(n_cells) else next_fast_len(2 * n_cells - 1, real=True)
    with memory_errors_explained("the transforms of the cyclic test", device):
        on_cpu = cpu_kernels(device) is not None
        spectrum = _compiled_spectrum(pair, length) if on_cpu else _torch_spectrum(pair, length, device)
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


def _compiled_spectrum(pair: PackedPair, length: int) -> Complex128[Tensor, "groups lanes frequencies"]:
    """Return the Fourier transform of the statistics, computed from 16 columns (a cache line) at a time."""
    (n_groups, n_cells, width), lanes = pair.factors.shape, pair.lanes
    n_threads = torch.get_num_threads() if n_cells * LANES > _INLINE_ENTRIES else 1
    ranges = cuts(n_cells, n_threads)
    columns = np.zeros((LANES, length))

    def transformed(values: Float32[np.ndarray, "cells width"], first: int, *, backwards: bool) -> Tensor:
        tasks = [partial(compiled_kernels().turned, values, first, backwards, *own, columns) for own in ranges]
        in_threads(tasks, n_threads, lambda _: None)
        found: Tensor = torch.fft.rfft(torch.from_numpy(columns))
        return found

    spectrum = torch.zeros(n_groups, lanes, length // 2 + 1, dtype=torch.complex128)
    for group in range(n_groups):
        for first in range(0, width, LANES):
            left = transformed(pair.factors[group], first, backwards=False)
            right = transformed(pair.images[group], first, backwards=True)
            for lane in range(0, LANES, lanes):
                spectrum[group].addcmul_(left[lane : lane + lanes], right[lane : lane + lanes])
    return spectrum


def _torch_spectrum(pair: PackedPair, length: int, device: str) -> Complex128[Tensor, "groups lanes frequencies"]:
    """Do what ``_compiled_spectrum`` does, as many columns at a time as the device's memory holds."""
    n_groups, _, width = pair.factors.shape
    f, z = (torch.from_numpy(values).to(device) for values in (pair.factors, pair.images))
    spectrum = torch.zeros(n_groups, pair.lanes, length // 2 + 1, dtype=torch.complex128, device=device)

    def part(group: int, first: int, last: int) -> Complex128[Tensor, "lanes frequencies"]:
        columns = f[group, :, first:last].T.double().contiguous()
        left = torch.fft.rfft(columns, n=length)
        columns = z[group, :, first:last].T.double().flip(1).roll(1, dims=1)
        right = torch.fft.rfft(columns, n=length)
        product: Tensor = left.mul_(right).reshape(-1, pair.lanes, length // 2 + 1).sum(dim=0)
        return product

    # counted in lines of ``lanes`` columns
    most = max(1, TORCH_ENTRIES // (length * pair.lanes))
    at_a_time = Shrinking(most, what="the cyclic test", unit="columns of the heads", device=device)
    for group in range(n_groups):
        first = 0
        while first < width:

            def columns(n_lines: int, group: int = group, first: int = first) -> tuple[Tensor, int]:
                last = min(first + n_lines * pair.lanes, width)
                return part(group, first, last), last

            found, first = at_a_time.run(columns)
            spectrum[group] += found
    return spectrum


def float64_statistics(
    pair: PackedPair, stream: PermutationStream, start: int, stop: int, *, device: str
) -> Float64[np.ndarray, "permutations alive"]:
    """Return T of permutations ``start`` to ``stop - 1`` in float64.

    On the CPU it is computed in the calling thread, and T of a permutation is the same to the last bit in any range.
    """
    if cpu_kernels(device) is not None:
        return float64_sums(pair, stream.key(), np.arange(start, stop))
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
    """Return T of the identity, from the kernel of ``float64_statistics``."""
    if (kernels := cpu_kernels(device)) is not None:
        sums = float64_sums(pair, np.zeros(2, dtype=np.uint64), np.array([kernels.IDENTITY]))
    else:
        f, z = (torch.from_numpy(values).to(device) for values in (pair.factors, pair.images))
        sums = torch_factor(pair, f, z, np.arange(pair.factors.shape[1], dtype=np.int32)[None])
    own: Float64[np.ndarray, " alive"] = sums[0]
    return own
