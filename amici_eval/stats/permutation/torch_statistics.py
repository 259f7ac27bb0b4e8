"""The permutation statistic on packed factors by torch, in float64 on any device that has it."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from amici_eval.stats.memory import STORED_INDICES, TORCH_ENTRIES
from amici_eval.stats.permutation.packed_factors import LANES, TIE_TOLERANCE
from amici_eval.stats.shrinking import memory_errors_explained, unless_memory_ends

if TYPE_CHECKING:
    from collections.abc import Generator

    from jaxtyping import Float64, Int32
    from torch import Tensor

    from amici_eval.stats.permutation.compiled_statistics import Take
    from amici_eval.stats.permutation.packed_factors import PackedPair
    from amici_eval.stats.permutation.permutations import PermutationStream

__all__ = ["torch_factor", "torch_statistics"]

logger = logging.getLogger(__name__)

_GRAM_CELLS_PER_PERMUTATION = 16
"""Measured: the products of all cells cost less than gathering rows up to this many cells a permutation."""
_DRAWN_INDICES = 2**24
_CELLS = 1024


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

    Raises
    ------
    DeviceMemoryError
        If it has too little for a single one.
    """
    with memory_errors_explained("one permutation of the test", device):
        _all_statistics(pair, stream, n_permutations, form=form, device=device, take=take, start=start)


def _all_statistics(
    pair: PackedPair,
    stream: PermutationStream,
    n_permutations: int,
    *,
    form: str,
    device: str,
    take: Take,
    start: int,
) -> None:
    _, n_cells, width = pair.f.shape
    drawn = max(1, min(n_permutations, STORED_INDICES // n_cells))
    chunk = max(1, min(drawn, TORCH_ENTRIES // (min(n_cells, _CELLS) * width)))
    if form == "auto":
        form = "gram" if n_cells <= _GRAM_CELLS_PER_PERMUTATION * drawn else "factor"
    f, z = (torch.from_numpy(values).to(device) for values in (pair.f, pair.z))
    identity = np.arange(n_cells, dtype=np.int32)[None]
    thresholds = torch_factor(pair, f, z, identity)[0] - TIE_TOLERANCE * pair.sizes
    if form == "factor":
        drawn = max(chunk, min(drawn, _DRAWN_INDICES // n_cells))
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
                    # fewer permutations would not make the products of all cells smaller
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
    """Return T of some orders of the cells, from rows of F."""
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
