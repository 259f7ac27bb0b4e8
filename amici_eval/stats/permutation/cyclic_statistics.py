"""The permutation statistic of all circular shifts of the cells at once, by Fourier transforms."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.fft import next_fast_len

from amici_eval.common import threads as compiled
from amici_eval.stats.memory import TORCH_ENTRIES
from amici_eval.stats.permutation.packed_factors import LANES
from amici_eval.stats.shrinking import Shrinking, memory_errors_explained

if TYPE_CHECKING:
    from types import ModuleType

    from jaxtyping import Complex128, Float32, Float64
    from torch import Tensor

    from amici_eval.stats.permutation.packed_factors import PackedPair

__all__ = ["cyclic_statistics"]

_INLINE_ENTRIES = 2**18
"""Below this, handing work to threads costs more than it saves."""
_FAST_PRIMES = (2, 3, 5, 7, 11, 13)
"""Measured: with any other prime factor, a transform of more than twice the length costs less, or as much."""


def cyclic_statistics(pair: PackedPair, *, device: str) -> Float64[np.ndarray, "shifts alive"]:
    """Return T of all circular shifts of the cells as packed: row s gives the place of cell k to cell k + s.

    All of them are one circular convolution of F with Z backwards, hence two Fourier transforms per column, in float64:
    float32 would leave hundreds of shifts undecided. A number of cells with a large prime factor has no fast transform;
    columns are then padded with zeros, and what the longer convolution has beyond the last cell is added to its begin.

    Raises
    ------
    DeviceMemoryError
        If there is too little memory for the transforms of one cell's numbers.
    """
    with memory_errors_explained("the transforms of the cyclic test", device):
        return _statistics(pair, device=device)


def _statistics(pair: PackedPair, *, device: str) -> Float64[np.ndarray, "shifts alive"]:
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

    # in lines of lanes
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
