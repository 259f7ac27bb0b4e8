"""Permutation nulls: what is shuffled among which cells. A null that uses where cells lie belongs in ``spatial``.

``permutation_exceedances`` and ``factor_exceedances`` shuffle all cells of a type, from predictions and from factors;
``stratified_exceedances`` shuffles them within strata.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from amici_eval.common.memory import Shrinking
from amici_eval.common.threads import cuts, in_threads
from amici_eval.stats.permutation.permutations import PermutationStream
from amici_eval.stats.permutation.statistics import (
    INLINE_PRODUCTS,
    TASK_PRODUCTS,
    TIE_TOLERANCE,
    HeadFactors,
    PackedPair,
    compiled_statistics,
    cpu_kernels,
    cyclic_statistics,
    float64_device,
    float64_statistics,
    identity_statistics,
    pack,
    torch_statistics,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from jaxtyping import Bool, Float, Float64, Int64
    from torch import Tensor

MIN_CELLS_TEST = 3
"""Two cells have one permutation besides the identity, too few for a test at any usual level."""


@dataclass(frozen=True)
class PermutationCounts:
    """How often a permutation fits at least as well as the truth.

    exceedances: meaningless where dead; dead: heads without a test, whose prediction is the same for all cells or not
    finite; n_permutations: random ones, without the identity.
    """

    exceedances: Int64[np.ndarray, " heads"]
    dead: Bool[np.ndarray, " heads"]
    n_permutations: int


DEAD_TOLERANCE = 1e-6
"""A head whose predictions vary by less than this share of their size varies only by float32 rounding."""
_CELL_BLOCK = 2048
_STORED_INDICES = 2**27
_GATHERED_ENTRIES = 2**24
_GRAM_CELLS_PER_PERMUTATION = 16


def permutation_exceedances(
    predictions: Float[np.ndarray, "heads cells genes"],
    targets: Float[np.ndarray, "cells genes"],
    *,
    stream: PermutationStream,
    n_permutations: int,
    device: str = "cpu",
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
    chunk = max(1, min(n_permutations, _STORED_INDICES // n_cells))
    kernel = _gram_statistics if n_cells <= _GRAM_CELLS_PER_PERMUTATION * chunk else _gather_statistics
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
            if not p_norm > DEAD_TOLERANCE * size:
                dead[head] = True
            else:
                statistics = room.run(partial(kernel, p, y, permutations))
                threshold = statistics[0] - TIE_TOLERANCE * p_norm * y_norm
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
class _PermutedCells:
    """Cells that are permuted among themselves.

    units: powers of two by which T of the packed factors is multiplied to be in the units of F times Z.
    """

    pair: PackedPair
    stream: PermutationStream
    units: Float64[np.ndarray, " alive"]

    @classmethod
    def of(cls, heads: HeadFactors, stream: PermutationStream) -> _PermutedCells:
        pair = pack(heads)
        exponents = _log_norms(heads.factors, pair.heads) + _log_norms(heads.images, pair.heads)
        with np.errstate(divide="ignore", invalid="ignore"):
            exponents = exponents - np.log2(pair.sizes)
        # packing multiplied each head by a power of two; a constant image is 0 in all units
        units = np.exp2(np.where(np.isfinite(exponents), np.rint(exponents), 0.0))
        return cls(pair=pair, stream=stream, units=units)


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


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class FactorDraw:
    """Factors packed once, to be called for the statistics of any range of permutations.

    T adds over the groups of cells; observed, sizes and dead are as in ``FactorStatistics``; n_threads: as many as
    torch uses if None.
    """

    groups: tuple[_PermutedCells, ...]
    observed: Float64[np.ndarray, " heads"]
    sizes: Float64[np.ndarray, " heads"]
    dead: Bool[np.ndarray, " heads"]
    device: str
    n_threads: int | None

    @classmethod
    def of(
        cls, groups: Sequence[_PermutedCells], dead: Bool[np.ndarray, " heads"], *, device: str, n_threads: int | None
    ) -> FactorDraw:
        """Combine groups of cells; a head that is ``dead``, or alive in no group, has no test."""
        alive = np.zeros(dead.size, dtype=bool)
        observed, sizes = np.zeros(dead.size), np.zeros(dead.size)
        kept = tuple(group for group in groups if group.pair.heads.size)
        for group in kept:
            heads = group.pair.heads
            alive[heads] = True
            observed[heads] += identity_statistics(group.pair, device=device) * group.units
            sizes[heads] += group.pair.sizes * group.units
        dead = dead | ~alive
        observed[dead], sizes[dead] = np.nan, np.nan
        return cls(groups=kept, observed=observed, sizes=sizes, dead=dead, device=device, n_threads=n_threads)

    def __call__(self, start: int, stop: int) -> FactorStatistics:
        """Return the statistics of permutations ``start`` to ``stop - 1``.

        T depends on the permutation's number alone: not on the range and, except for the last bits, not on the device.
        """
        statistics = np.zeros((stop - start, self.dead.size))
        n_threads = torch.get_num_threads() if self.n_threads is None else self.n_threads
        products = sum(group.pair.factors.size for group in self.groups) * (stop - start)
        # torch uses threads of its own
        if products <= INLINE_PRODUCTS or cpu_kernels(self.device) is None:
            n_threads = 1
        pieces: list[tuple[_PermutedCells, int, int]] = []
        for group in self.groups:
            n_cuts = max(
                -(-4 * n_threads // len(self.groups)), group.pair.factors.size * (stop - start) // TASK_PRODUCTS, 1
            )
            pieces += [(group, start + first, start + last) for first, last in cuts(stop - start, n_cuts)]
        places = iter(pieces)

        def add(sums: Float64[np.ndarray, "some alive"]) -> None:
            group, first, last = next(places)
            statistics[first - start : last - start, group.pair.heads] += sums * group.units

        tasks = (
            partial(float64_statistics, group.pair, group.stream, first, last, device=self.device)
            for group, first, last in pieces
        )
        # results come in the order of the tasks: groups are always added in the same order
        in_threads(tasks, n_threads, add)
        statistics[:, self.dead] = np.nan
        return FactorStatistics(statistics=statistics, observed=self.observed, sizes=self.sizes, dead=self.dead)


_CYCLIC_LABEL = "\0cyclic"


def factor_exceedances(
    heads: HeadFactors,
    *,
    stream: PermutationStream,
    n_permutations: int,
    sampling: str = "independent",
    device: str = "cpu",
    n_threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> PermutationCounts:
    """Count the permutations of cells under which a head's prediction fits expression at least as well as in truth.

    Null: its rows are shuffled among the cells of ``stream``; exchangeable if, given the type, cells' expression is
    independent of their neighbourhoods and of each other; anticonservative under spatial autocorrelation.
    T(pi) >= T(identity) up to TIE_TOLERANCE is MSE(pi) <= MSE(identity), as amici-st counts. ``"cyclic"``: one random
    order and its ``cells - 1`` circular shifts, a subgroup, so exact (Southworth, Kim & Owen 2009). ``progress`` gets
    newly finished (head, permutation) pairs, in the calling thread.
    """
    device, n_heads = float64_device(device), heads.dead.size
    cyclic = sampling == "cyclic"
    order = replace(stream, stratum=stream.stratum + _CYCLIC_LABEL).batch(0, 1)[0] if cyclic else None
    pair = pack(heads, order=order)
    alive = pair.heads
    exceedances = np.zeros(n_heads, dtype=np.int64)
    finished = 0

    def take(statistics: Float64[np.ndarray, "permutations alive"], thresholds: Float64[np.ndarray, " alive"]) -> None:
        nonlocal finished
        exceedances[alive] += np.count_nonzero(statistics >= thresholds, axis=0)
        finished += len(statistics)
        if progress is not None:
            progress(n_heads * len(statistics))

    if cyclic:
        n_permutations = stream.n_cells - 1
        if alive.size:
            statistics = cyclic_statistics(pair, device=device)
            take(statistics[1:], statistics[0] - TIE_TOLERANCE * pair.sizes)
    elif alive.size and n_permutations:
        if cpu_kernels(device) is None:
            torch_statistics(pair, stream, n_permutations, device=device, take=take)
        else:
            threads = torch.get_num_threads() if n_threads is None else n_threads
            compiled_statistics(pair, stream, n_permutations, n_threads=threads, take=take)
    if progress is not None and finished < n_permutations:
        progress(n_heads * (n_permutations - finished))
    dead = np.ones(n_heads, dtype=bool)
    dead[alive] = False
    return PermutationCounts(exceedances=exceedances, dead=dead, n_permutations=n_permutations)


def factor_draw(
    heads: HeadFactors, *, stream: PermutationStream, device: str = "cpu", n_threads: int | None = None
) -> FactorDraw:
    """Pack factors once and return a callable for the statistics of any range of permutations of ``stream``.

    Null and arguments are those of ``factor_exceedances`` with ``"independent"``; T is summed in float64.
    """
    group = _PermutedCells.of(heads, stream)
    return FactorDraw.of([group], heads.dead, device=float64_device(device), n_threads=n_threads)


_PERMUTATIONS_AT_ONCE = 1024


def stratified_draw(
    heads: HeadFactors,
    *,
    strata: Int64[np.ndarray, " cells"],
    where: str,
    seed: int,
    cell_type: str,
    device: str = "cpu",
) -> FactorDraw:
    """Pack factors once and return a callable for the statistics of any range of permutations within strata.

    Null: rows of a head's prediction are shuffled among the cells of one type in each stratum. Exchangeable if, given
    type and stratum, expression is independent of the neighbourhood and the cells of a stratum are alike: strata lie in
    one sample each and are narrower than the scale at which tissue varies. T adds over strata, each centred by itself,
    so that its mean over permutations is 0. Permutations depend on (seed, cell type, stratum label, number); stratum k
    has the label ``"{where} {k}"``. A head whose factors vary in no stratum is dead.
    """
    dead = heads.dead | ~_finite(heads.factors) | ~_finite(heads.images)
    by_stratum = np.argsort(strata, kind="stable")
    ends = np.cumsum(np.bincount(strata))
    groups = []
    for label, number in sorted((f"{where} {number}", number) for number in range(len(ends))):
        cells = by_stratum[ends[number - 1] if number else 0 : ends[number]]
        if cells.size > 1:
            own = HeadFactors(factors=heads.factors[cells], images=heads.images[cells], dead=dead)
            stream = PermutationStream(seed=seed, cell_type=cell_type, n_cells=cells.size, stratum=label)
            groups.append(_PermutedCells.of(own, stream))
    return FactorDraw.of(groups, dead, device=float64_device(device), n_threads=None)


def stratified_exceedances(
    heads: HeadFactors,
    *,
    strata: Int64[np.ndarray, " cells"],
    where: str,
    seed: int,
    cell_type: str,
    n_permutations: int,
    device: str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> PermutationCounts:
    """Count the permutations within strata under which a head fits expression at least as well as in truth.

    Null and arguments are those of ``stratified_draw``; ``progress`` gets the number of (head, permutation) pairs
    finished since the last call.
    """
    draw = stratified_draw(heads, strata=strata, where=where, seed=seed, cell_type=cell_type, device=device)
    exceedances = np.zeros(draw.dead.size, dtype=np.int64)
    for start in range(0, n_permutations, _PERMUTATIONS_AT_ONCE):
        stop = min(start + _PERMUTATIONS_AT_ONCE, n_permutations)
        exceedances += np.count_nonzero(draw(start, stop).reached, axis=0)
        if progress is not None:
            progress(exceedances.size * (stop - start))
    return PermutationCounts(exceedances=exceedances, dead=draw.dead, n_permutations=n_permutations)


def _finite(values: Float[np.ndarray, "cells columns heads"]) -> Bool[np.ndarray, " heads"]:
    """Return whether the sum of squares of a head's numbers is finite."""
    with np.errstate(invalid="ignore", over="ignore"):
        finite: Bool[np.ndarray, " heads"] = np.isfinite(np.einsum("iah,iah->h", values, values, dtype=np.float64))
    return finite
