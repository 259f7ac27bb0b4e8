"""The permutation test of keep-one heads on their factors, in order of the permutation's number."""

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

_TASK_PRODUCTS = 2**27
_INLINE_PRODUCTS = 2**22
"""Below this, handing work to threads costs more than it saves."""
_NORM_ENTRIES = 2**18


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class FactorStatistics:
    """T of a range of permutations, in order of their number, and T as observed.

    T(pi) = sum_i <F_pi(i), Z_i>, with F and Z centred over the cells that are permuted among themselves, so that its
    mean over all permutations is 0; in the units of F times Z, NaN where dead (no test). observed: T of the identity,
    from the same kernel; sizes: ``||F_h|| ||Z_h||``, centred, the largest value of T.
    """

    statistics: Float64[np.ndarray, "permutations heads"]
    observed: Float64[np.ndarray, " heads"]
    sizes: Float64[np.ndarray, " heads"]
    dead: Bool[np.ndarray, " heads"]

    @property
    def reached(self) -> Bool[np.ndarray, "permutations heads"]:
        """Return whether a permutation fits at least as well as the truth, up to rounding; False for dead heads."""
        with np.errstate(invalid="ignore"):
            reached: Bool[np.ndarray, "permutations heads"] = (
                self.statistics >= self.observed - TIE_TOLERANCE * self.sizes
            )
        return reached


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Part:
    """Cells that are permuted among themselves.

    units: powers of two by which T of the packed factors is multiplied to be in the units of F times Z.
    """

    pair: PackedPair
    stream: PermutationStream
    units: Float64[np.ndarray, " alive"]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class FactorDraw:
    """Factors packed once, to be called for the statistics of any range of permutations.

    T adds over the parts; observed, sizes and dead are as in ``FactorStatistics``; n_threads: as many as torch uses if
    None.
    """

    parts: tuple[Part, ...]
    observed: Float64[np.ndarray, " heads"]
    sizes: Float64[np.ndarray, " heads"]
    dead: Bool[np.ndarray, " heads"]
    device: str
    n_threads: int | None

    def __call__(self, start: int, stop: int) -> FactorStatistics:
        """Return the statistics of permutations ``start`` to ``stop - 1``.

        T depends on the permutation's number alone: not on the range and, except for the last bits, not on the device.
        """
        if not 0 <= start <= stop:
            msg = f"permutations {start} to {stop} are no range; numbers begin at 0"
            raise ValueError(msg)
        statistics = np.zeros((stop - start, self.dead.size))
        n_threads = torch.get_num_threads() if self.n_threads is None else self.n_threads
        products = sum(part.pair.f.size for part in self.parts) * (stop - start)
        # torch uses threads of its own
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
    """Raise ``ValueError`` if the arguments of a permutation test of heads on their factors are invalid."""
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
    """Return ``pair`` with its permutations and the units in which it was packed from these factors and images."""
    exponents = sum(_log_norms(values, pair.heads) for values in (factors, images))
    with np.errstate(divide="ignore", invalid="ignore"):
        exponents = exponents - np.log2(pair.sizes)
    # packing multiplied each head by a power of two; a constant image is 0 in all units
    units = np.exp2(np.where(np.isfinite(exponents), np.rint(exponents), 0.0))
    return Part(pair=pair, stream=stream, units=units)


def draw_from(
    parts: Sequence[Part], *, n_heads: int, dead: Bool[np.ndarray, " heads"], device: str, n_threads: int | None
) -> FactorDraw:
    """Combine parts into one draw; a head that is ``dead``, or alive in no part, has no test."""
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
    """Return the binary logarithm of each head's norm after centring over cells."""
    squares = np.zeros(values.shape[2])
    # ``heads`` holds no heads that are not finite
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

    Null: its rows are shuffled among the cells of ``stream``; exchangeable if, given the type, cells' expression is
    independent of their neighbourhoods and of each other; anticonservative under spatial autocorrelation. F and Z as in
    ``permutation_moments``; T(pi) >= T(identity) up to TIE_TOLERANCE is MSE(pi) <= MSE(identity), as amici-st counts.
    ``"cyclic"``: one random order and its ``cells - 1`` circular shifts, a subgroup, so exact (Southworth, Kim & Owen
    2009). ``progress`` gets newly finished (head, permutation) pairs, in the calling thread.
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
    """Pack factors once and return a callable for the statistics of any range of permutations of ``stream``.

    Null and arguments are those of ``factor_exceedances`` with ``"independent"``; T is summed in float64.
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
    """p-values of tests that each ended at their own number of permutations.

    exceedances, n_permutations: until the test ended (0 permutations where dead); stopped: whether it ended at its h-th
    exceedance; p: h/l of l permutations if stopped, else (b+1)/(m+1), NaN where dead; ci_low, ci_high: 95 % interval of
    the p-value that infinitely many permutations would give (see ``sequential_p_values``).
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
    """Draw permutations until each head has ``stop_at`` exceedances, at most ``max_permutations``.

    The null is that of ``draw``; ``p <= a`` has a probability of at most a under it (Besag & Clifford 1991). A test
    ends with the permutation of its h-th exceedance, so ``batch`` (doubled up to 4,096) has no effect on the result. A
    stopped p-value is off by about p/sqrt(h). ``progress`` gets (head, permutation) pairs finished since the last call,
    heads x ``max_permutations`` in sum, also if all tests end before.
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
