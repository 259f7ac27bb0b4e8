"""The permutation tests of one type's heads, free and spatial, and their p-values adjusted over all types."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from amici_eval.results.analyses import SpatialTests
from amici_eval.stats.permutation.exact_moments import DRAWN_FOR_FEW, FEW_CELLS, permutation_moments
from amici_eval.stats.permutation.nulls import (
    MIN_CELLS_TEST,
    PermutationCounts,
    factor_draw,
    factor_exceedances,
    stratified_exceedances,
)
from amici_eval.stats.permutation.permutations import PermutationStream
from amici_eval.stats.permutation.statistics import HeadFactors
from amici_eval.stats.pvalues import (
    MAX_EXCEEDANCES,
    adjust_p_values,
    exact,
    max_t_p_values,
    p_values,
    sequential_exceedances,
    tail_p_values,
)
from amici_eval.stats.spatial.lag_test import MIN_EFFECTIVE_CELLS, GeneSums, lag_test
from amici_eval.stats.spatial.tiles import default_widths, tiles_of_width
from amici_eval.stats.spatial.torus import torus_statistics
from amici_eval.stats.type_sums import factors_of, principal_factors

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from jaxtyping import Bool, Float, Float32, Float64, Int64

    from amici_eval.settings.evaluation import PermutationSpec
    from amici_eval.stats.permutation.exact_moments import PermutationMoments
    from amici_eval.stats.permutation.nulls import FactorDraw, FactorStatistics
    from amici_eval.stats.pvalues import PValues
    from amici_eval.stats.readout import Readout
    from amici_eval.stats.spatial.lag import CellPositions
    from amici_eval.stats.spatial.lag_test import LagTest
    from amici_eval.stats.type_sums import TypeSums


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class TypeFactors:
    """Factors F, images Z and weights A of each head of one type.

    A head's prediction is a constant plus ``F @ A.T``, and ``<P_i, Y_j> = <F_i, Z_j>`` plus a constant.
    """

    factors: Float[np.ndarray, "cells rank heads"]
    images: Float[np.ndarray, "cells rank heads"]
    weights: Float64[np.ndarray, "heads genes rank"]

    @classmethod
    def from_z(cls, z: Float32[np.ndarray, "cells outputs"], type_sums: TypeSums, readout: Readout) -> TypeFactors:
        """Return the factors ``[1, z] / scale``, of the scale that the pass over the cells found."""
        factors, images = factors_of(z, type_sums, readout)
        weights = np.stack([readout.weights[:, readout.columns([head])] for head in range(readout.n_heads)])
        return cls(factors=factors, images=images, weights=weights)

    @classmethod
    def from_predictions(
        cls, predictions: Float32[np.ndarray, "heads cells genes"], targets: Float32[np.ndarray, "cells genes"]
    ) -> TypeFactors:
        """Return the predictions as factors of rank genes, for the free test, which reads no weights."""
        n_heads, _, n_genes = predictions.shape
        return cls(
            factors=np.nan_to_num(predictions.transpose(1, 2, 0)),
            images=np.repeat(targets[:, :, None], n_heads, axis=2),
            weights=np.zeros((n_heads, 0, n_genes)),
        )

    @classmethod
    def from_principal_components(
        cls, predictions: Float32[np.ndarray, "heads cells genes"], targets: Float32[np.ndarray, "cells genes"]
    ) -> TypeFactors:
        """Return the principal components of each head's predictions as its factors."""
        factors, weights = principal_factors(predictions)
        centred = targets - targets.mean(axis=0, dtype=np.float64)
        images = np.einsum("ng,hgr->nrh", centred, weights, optimize=True)
        return cls(factors=factors, images=images, weights=weights)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class HeadsUnderTest:
    """The heads of one type, which of them are dead, and the settings of their tests; ``progress`` gets pairs drawn."""

    cell_type: str
    heads: TypeFactors
    dead: Bool[np.ndarray, " heads"]
    test: PermutationSpec
    n_permutations: int
    device: str = "cpu"
    progress: Callable[[int], None] | None = None

    @property
    def head_factors(self) -> HeadFactors:
        """The factors and images, with the dead heads marked."""
        return HeadFactors(factors=self.heads.factors, images=self.heads.images, dead=self.dead)

    @property
    def stream(self) -> PermutationStream:
        """The permutations of all cells of the type."""
        return PermutationStream(seed=self.test.seed, cell_type=self.cell_type, n_cells=len(self.heads.factors))

    @property
    def sampling(self) -> str:
        """Sampling of the free test."""
        return sampling_of(self.test, n_cells=len(self.heads.factors), n_permutations=self.n_permutations)

    def all_drawn(self) -> None:
        """Tell that the test is done at once."""
        if self.progress is not None:
            self.progress(len(self.dead) * self.n_permutations)

    def moments(self, strata: Int64[np.ndarray, " cells"] | None = None) -> PermutationMoments:
        """Return exact moments of the statistic over permutations of all cells, or of those within strata."""
        return permutation_moments(self.heads.factors, self.heads.images, strata=strata, device=self.device)


@dataclass(frozen=True, kw_only=True, eq=False)
class FreeTest:
    """Result of the free test of one cell type.

    p and its Monte Carlo interval are NaN without a test; ``exceedances`` are -1 where nothing was counted;
    ``n_permutations`` is 0 if p follows from moments. ``method``: independent, cyclic, sequential, moments, or gpd
    where a tail was fitted. ``standardised`` and ``permuted``, kept for maxT only, are the observed and permuted
    statistics, standardised by their exact moments.
    """

    p: Float64[np.ndarray, " heads"]
    p_low: Float64[np.ndarray, " heads"]
    p_high: Float64[np.ndarray, " heads"]
    exceedances: Int64[np.ndarray, " heads"]
    n_permutations: int
    method: str
    standardised: Float64[np.ndarray, " heads"] | None = None
    permuted: Float64[np.ndarray, "permutations heads"] | None = None


def free_test(asked: HeadsUnderTest, *, n_threads: int | None = None) -> FreeTest:
    """Test each head against permutations of all cells of the type.

    Null: the cells are exchangeable. In spatially autocorrelated tissue they are not, and the test is anticonservative.
    """
    test = asked.test
    if test.method == "moments" and len(asked.heads.factors) >= FEW_CELLS:
        p = np.where(asked.dead, np.nan, asked.moments().p_values())
        asked.all_drawn()
        exceedances = np.full(len(p), -1)
        return FreeTest(p=p, p_low=p, p_high=p, exceedances=exceedances, n_permutations=0, method="moments")
    factors, stream = asked.head_factors, asked.stream
    count = partial(factor_exceedances, factors, stream=stream, device=asked.device, n_threads=n_threads)
    if test.method == "moments":
        return counted(count(n_permutations=DRAWN_FOR_FEW), test, "independent")
    if only_counts(test):
        counts = count(n_permutations=asked.n_permutations, sampling=asked.sampling, progress=asked.progress)
        return counted(counts, test, asked.sampling)
    draw = factor_draw(factors, stream=stream, device=asked.device, n_threads=n_threads)
    if test.method == "sequential":
        return _sequential(draw, asked)
    statistics = draw(0, asked.n_permutations)
    asked.all_drawn()
    return _from_all_statistics(statistics, asked)


def sampling_of(test: PermutationSpec, *, n_cells: int, n_permutations: int) -> str:
    """Return the sampling of a type; with fewer cyclic shifts (one per cell) than permutations it is independent."""
    return "independent" if n_cells < n_permutations + 1 else test.sampling


def only_counts(test: PermutationSpec) -> bool:
    """Return whether counts of exceedances suffice: no tail and no maxT, which need every statistic."""
    return test.method == "monte_carlo" and test.tail == "none" and test.adjustment != "maxt"


def counted(counts: PermutationCounts, test: PermutationSpec, sampling: str) -> FreeTest:
    """Return the test from counts of exceedances."""
    exceedances = np.where(counts.dead, -1, counts.exceedances)
    raw = p_values(np.maximum(exceedances, 0), n_permutations=max(counts.n_permutations, 1), convention=test.convention)
    raw = raw.without(counts.dead)
    return FreeTest(
        p=raw.p,
        p_low=raw.ci_low,
        p_high=raw.ci_high,
        exceedances=exceedances,
        n_permutations=counts.n_permutations,
        method=sampling,
    )


def _sequential(draw: FactorDraw, asked: HeadsUnderTest) -> FreeTest:
    # with fewer permutations than stop_at all of them are drawn
    stop_at = min(asked.test.stop_at, asked.n_permutations)
    finished = 0

    def drawn(start: int, stop: int) -> FactorStatistics:
        nonlocal finished
        finished = stop
        return draw(start, stop)

    found = sequential_exceedances(
        drawn, max_permutations=asked.n_permutations, stop_at=stop_at, progress=asked.progress
    )
    return FreeTest(
        p=found.p,
        p_low=found.ci_low,
        p_high=found.ci_high,
        exceedances=np.where(np.isnan(found.p), -1, found.exceedances),
        n_permutations=finished,
        method="sequential",
    )


def _from_all_statistics(statistics: FactorStatistics, asked: HeadsUnderTest) -> FreeTest:
    """Return the test from the statistics of all permutations, which tails and maxT need."""
    dead = statistics.dead
    exceedances = np.count_nonzero(statistics.reached, axis=0).astype(np.int64)
    counts = PermutationCounts(exceedances=exceedances, dead=dead, n_permutations=asked.n_permutations)
    made = counted(counts, asked.test, "independent")
    if asked.test.tail == "gpd":
        fits = {
            head: tail_p_values(float(statistics.observed[head]), statistics.statistics[:, head])
            for head in np.flatnonzero(~dead & (exceedances < MAX_EXCEEDANCES))
        }
        fitted = {head: fit.p for head, fit in fits.items() if fit.fits}
        if fitted:
            p = made.p.copy()
            p[list(fitted)] = list(fitted.values())
            made = replace(made, p=p, method="gpd")
    if asked.test.adjustment != "maxt":
        return made
    with np.errstate(divide="ignore", invalid="ignore"):
        deviation = np.sqrt(asked.moments().variance)
        standardised = np.where(dead, np.nan, statistics.observed / deviation)
        permuted = np.where(dead, np.nan, statistics.statistics / deviation)
    return replace(made, standardised=standardised, permuted=permuted)


_TORUS_TIES = 1e-10
"""Correlations that differ by less are ties."""
TILE_SHARE = 0.5
"""Default width of tiles as a share of the correlation length; wider ones reject too often (docs/validity.md)."""
_SAME = "predicts the same for all cells of each section"


@dataclass(frozen=True, kw_only=True, eq=False)
class TypeSpatial:
    """Results of the spatial null for one cell type, with fields as in :class:`SpatialTests`, without the types.

    ``reasons`` are by head number; -1 means all.
    """

    p: Float64[np.ndarray, " heads"]
    p_low: Float64[np.ndarray, " heads"]
    p_high: Float64[np.ndarray, " heads"]
    statistic: Float64[np.ndarray, " heads"]
    ess: Float64[np.ndarray, " heads"]
    detectable: Float64[np.ndarray, " heads"]
    p_gene: Float64[np.ndarray, "heads genes"]
    correlation_length: float
    reach: float
    method: str
    widths: tuple[float, ...] = ()
    p_by_width: Float64[np.ndarray, "widths heads"] = field(default_factory=lambda: np.zeros((0, 0)))
    reasons: dict[int, str] = field(default_factory=dict)


def spatial_test(asked: HeadsUnderTest, type_sums: TypeSums, place: CellPositions) -> TypeSpatial:
    """Test each head, and each head and gene, of one type with a null that respects where cells lie.

    Genes are tested by the lag null, whatever the null of the heads: only it tests single genes without a second pass
    over the cells.
    """
    asked = replace(asked, heads=replace(asked.heads, factors=np.nan_to_num(asked.heads.factors)))
    lag = _lag(asked, type_sums, place)
    found = _by_null(asked, lag, place)
    widths = _widths(asked.test, place, lag.correlation_length)
    p_by_width = [_by_width(asked, width, found, place) for width in widths]
    return TypeSpatial(
        p=found.p.p,
        p_low=found.p.ci_low,
        p_high=found.p.ci_high,
        statistic=found.statistic,
        ess=lag.ess,
        detectable=lag.detectable,
        p_gene=np.where(type_sums.by_tile.varies, lag.p_gene, np.nan),
        correlation_length=lag.correlation_length,
        reach=lag.reach if found.reach is None else found.reach,
        method=found.method,
        widths=widths,
        p_by_width=np.array(p_by_width).reshape(len(widths), len(asked.dead)),
        reasons=found.reasons,
    )


def _lag(asked: HeadsUnderTest, type_sums: TypeSums, place: CellPositions) -> LagTest:
    """Return the lag test of heads and genes; dead heads count as 0."""
    alive = np.where(asked.dead, 0.0, 1.0)
    return lag_test(
        asked.heads.factors * alive,
        asked.heads.images,
        place=place,
        genes=GeneSums(
            weights=asked.heads.weights,
            pixel_sums=type_sums.pixel_sums,
            near=type_sums.kept_values,
            target_ss=type_sums.target_ss_gene,
            predicted_ss=np.nan_to_num(type_sums.predicted_ss_gene) * alive[:, None],
            common=np.nan_to_num(type_sums.common) * alive[:, None],
        ),
        alpha=asked.test.alpha,
        reach=asked.test.reach,
        device=asked.device,
    )


def _by_null(asked: HeadsUnderTest, lag: LagTest, place: CellPositions) -> _SpatialAnswer:
    """Return the test of the heads by the null of the settings."""
    null = asked.test.spatial_null
    if null == "lag":
        return _by_lag(lag, asked.dead, n_cells=len(asked.heads.factors))
    if null == "torus":
        return _by_torus(asked, place)
    if null == "tile":
        return _within_tiles(asked, lag.correlation_length, place)
    if null == "sample":
        return _shuffled(asked, place.grid.section, where="section", shared="sections")
    msg = f"no test is known for the spatial null {null!r}"
    raise NotImplementedError(msg)


@dataclass(frozen=True, kw_only=True, eq=False)
class _SpatialAnswer:
    p: PValues
    statistic: Float64[np.ndarray, " heads"]
    method: str
    reach: float | None = None
    reasons: dict[int, str] = field(default_factory=dict)

    @classmethod
    def nothing(cls, n_heads: int, reason: str, *, reach: float | None = None) -> _SpatialAnswer:
        """Return an answer without any test, with the reason."""
        missing = np.full(n_heads, np.nan)
        return cls(p=exact(missing), statistic=missing, method="", reach=reach, reasons={-1: reason})


def _by_lag(lag: LagTest, dead: Bool[np.ndarray, " heads"], *, n_cells: int) -> _SpatialAnswer:
    reasons = {
        int(head): _SAME
        if np.isnan(lag.ess[head])
        else f"effective sample size {lag.ess[head]:.1f} of {n_cells} cells; the lag null needs at least "
        f"{MIN_EFFECTIVE_CELLS:g}"
        for head in np.flatnonzero(np.isnan(lag.p) & ~dead)
    }
    return _SpatialAnswer(p=exact(lag.p), statistic=lag.statistic, method="lag_t", reasons=reasons)


def _by_torus(asked: HeadsUnderTest, place: CellPositions) -> _SpatialAnswer:
    found = torus_statistics(
        asked.heads.factors,
        asked.heads.images,
        place.coordinates,
        samples=place.samples,
        n_shifts=asked.test.n_shifts,
        seed=asked.test.seed,
        cell_type=asked.cell_type,
        progress=asked.progress,
    )
    exceedances = np.count_nonzero(found.statistics >= found.observed - _TORUS_TIES, axis=0)
    # shifts without any overlap (inf) and heads without a test (NaN) are left out of mean and spread
    compared = np.ma.masked_invalid(found.statistics)
    statistic = np.ma.filled((found.observed - compared.mean(axis=0)) / compared.std(axis=0, ddof=1), np.nan)
    nothing = np.isnan(found.observed)
    gone = asked.dead | nothing
    return _SpatialAnswer(
        p=p_values(exceedances, n_permutations=asked.test.n_shifts).without(gone),
        statistic=np.where(gone, np.nan, statistic),
        method="monte_carlo",
        reasons={int(head): _SAME for head in np.flatnonzero(nothing & ~asked.dead)},
    )


def _within_tiles(asked: HeadsUnderTest, correlation_length: float, place: CellPositions) -> _SpatialAnswer:
    """Test by shuffling cells within tiles of the width that is set, or of a share of the correlation length."""
    width = asked.test.tile_width or TILE_SHARE * correlation_length
    if not width > 0.0:
        reason = "expression shows no spatial correlation, so that there is no default width; set tile_width"
        return _SpatialAnswer.nothing(len(asked.dead), reason, reach=np.nan)
    return _shuffled_in_tiles(asked, width, place)


def _shuffled_in_tiles(asked: HeadsUnderTest, width: float, place: CellPositions) -> _SpatialAnswer:
    strata = tiles_of_width(place.coordinates, width=width, samples=place.samples)
    shared = f"tiles of width {width:.4g}"
    return replace(_shuffled(asked, strata, where="tile", shared=shared), reach=width)


def _shuffled(asked: HeadsUnderTest, strata: Int64[np.ndarray, " cells"], *, where: str, shared: str) -> _SpatialAnswer:
    """Test by shuffling cells within strata."""
    test = asked.test
    # cells that share a stratum with others
    exchanged = int(np.count_nonzero(np.bincount(strata)[strata] > 1))
    if exchanged < MIN_CELLS_TEST:
        reason = f"{exchanged} of {len(strata)} cells share {shared} with others of the type; at least {MIN_CELLS_TEST}"
        return _SpatialAnswer.nothing(len(asked.dead), reason)
    moments = asked.moments(strata)
    # with few exchangeable cells three moments do not determine the distribution
    few = exchanged < FEW_CELLS
    if test.spatial_method == "moments" and not few:
        p, method = exact(moments.p_values()), "moments"
    else:
        n_permutations = asked.n_permutations
        if test.spatial_method == "moments":
            n_permutations = max(n_permutations, DRAWN_FOR_FEW)
        counts = stratified_exceedances(
            asked.head_factors,
            strata=strata,
            where=where,
            seed=test.seed,
            cell_type=asked.cell_type,
            n_permutations=n_permutations,
            device=asked.device,
            progress=asked.progress,
        )
        p = p_values(counts.exceedances, n_permutations=counts.n_permutations).without(counts.dead)
        method = "monte_carlo"
    p = p.without(asked.dead)
    untested = np.flatnonzero(np.isnan(p.p) & ~asked.dead)
    return _SpatialAnswer(
        p=p,
        statistic=np.where(np.isnan(p.p), np.nan, moments.standardised),
        method=method,
        reasons={int(head): f"varies in no {where}" for head in untested},
    )


def _widths(test: PermutationSpec, place: CellPositions, correlation_length: float) -> tuple[float, ...]:
    if test.tile_widths is not None:
        return test.tile_widths
    if test.spatial_null == "tile" and correlation_length > 0.0:
        # the longest side of any section: tiles do not span sections
        sections = place.grid.section
        extent = max(
            float(np.ptp(place.coordinates[sections == number, :2], axis=0).max())
            for number in range(place.grid.n_sections)
        )
        return tuple(default_widths(correlation_length, extent))
    return ()


def _by_width(
    asked: HeadsUnderTest, width: float, found: _SpatialAnswer, place: CellPositions
) -> Float64[np.ndarray, " heads"]:
    """Return p within tiles of a width, from the main test if it used it; NaN where too few cells share a tile."""
    if asked.test.spatial_null == "tile" and found.reach == width:
        return found.p.p
    return _shuffled_in_tiles(asked, width, place).p.p


def adjusted_free(
    p: Float64[np.ndarray, "heads types"], drawn: Sequence[FreeTest | None], test: PermutationSpec
) -> Float64[np.ndarray, "heads types"]:
    """Return the free p-values adjusted over all heads and types."""
    if test.adjustment != "maxt":
        return adjust_p_values(p, method=test.adjustment)
    n_permutations = next((len(one.permuted) for one in drawn if one is not None and one.permuted is not None), 0)
    observed = np.full(p.shape, np.nan)
    permuted = np.full((n_permutations, *p.shape), np.nan)
    for index, one in enumerate(drawn):
        if one is not None and one.permuted is not None and one.standardised is not None:
            observed[:, index], permuted[:, :, index] = one.standardised, one.permuted
    return max_t_p_values(observed, permuted)


def spatial_tests(
    found: Mapping[str, TypeSpatial | None], *, test: PermutationSpec, n_heads: int, n_genes: int
) -> SpatialTests:
    """Return the tests of all types that hold in tissue, adjusted within their families; see :class:`SpatialTests`."""
    n_widths = max((len(one.widths) for one in found.values() if one is not None), default=0)

    def heads(name: str) -> Float64[np.ndarray, "heads types"]:
        return np.stack(
            [np.full(n_heads, np.nan) if one is None else getattr(one, name) for one in found.values()], axis=1
        )

    def of_type(name: str) -> Float64[np.ndarray, " types"]:
        return np.array([np.nan if one is None else getattr(one, name) for one in found.values()])

    p_gene = np.stack(
        [np.full((n_heads, n_genes), np.nan) if one is None else one.p_gene for one in found.values()], axis=1
    )
    widths = np.full((n_widths, len(found)), np.nan)
    p_by_width = np.full((n_widths, n_heads, len(found)), np.nan)
    reasons: list[tuple[int, str, str]] = []
    for index, (cell_type, one) in enumerate(found.items()):
        if one is None:
            continue
        widths[: len(one.widths), index] = one.widths
        if len(one.widths):
            p_by_width[: len(one.widths), :, index] = one.p_by_width
        reasons += [(head, cell_type, why) for head, why in one.reasons.items()]
    # maxT needs permutations shared by all types; Holm controls the same error under any dependence
    method = "holm" if test.adjustment == "maxt" else test.adjustment
    p = heads("p")
    return SpatialTests(
        null=test.spatial_null,
        method=tuple("" if one is None else one.method for one in found.values()),
        p_value=p,
        p_value_adj=adjust_p_values(p, method=method),
        p_ci_low=heads("p_low"),
        p_ci_high=heads("p_high"),
        statistic=heads("statistic"),
        ess=heads("ess"),
        detectable=heads("detectable"),
        correlation_length=of_type("correlation_length"),
        reach=of_type("reach"),
        p_value_gene=p_gene,
        p_value_adj_gene=adjust_p_values(p_gene, method=method),
        widths=widths,
        p_by_width=p_by_width,
        reasons=tuple(reasons),
    )
