"""The values of the permutation statistic of heads, in order of the permutation's number, for any range of numbers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from amici_eval.common import threads as compiled
from amici_eval.stats.permutation.factor_statistics import exact_statistics, identity_statistics
from amici_eval.stats.permutation.nulls import MIN_CELLS_TEST
from amici_eval.stats.permutation.packed_factors import TIE_TOLERANCE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Bool, Float, Float64, Int64

    from amici_eval.stats.permutation.packed_factors import PackedPair
    from amici_eval.stats.permutation.permutations import PermutationStream

__all__ = ["FactorDraw", "FactorStatistics", "Part", "check_factors", "draw_from", "part_of"]

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
