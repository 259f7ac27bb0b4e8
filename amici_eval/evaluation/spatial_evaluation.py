"""The spatial test of one cell type's heads, by the null of the settings."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from amici_eval.stats.permutation.exact_moments import DRAWN_FOR_FEW, FEW_CELLS, permutation_moments
from amici_eval.stats.permutation.nulls import MIN_CELLS_TEST, stratified_exceedances
from amici_eval.stats.permutation.statistics import HeadFactors
from amici_eval.stats.pvalues import exact, p_values
from amici_eval.stats.spatial.lag_test import MIN_EFFECTIVE_CELLS, GeneSums, lag_test
from amici_eval.stats.spatial.tiles import default_widths, tiles_of_width
from amici_eval.stats.spatial.torus import torus_statistics

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Bool, Float, Float64, Int64

    from amici_eval.settings.evaluation import PermutationSpec
    from amici_eval.stats.permutation.exact_moments import PermutationMoments
    from amici_eval.stats.pvalues import PValues
    from amici_eval.stats.spatial.lag import CellPositions
    from amici_eval.stats.spatial.lag_test import LagTest
    from amici_eval.stats.type_sums import TypeSums

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


def spatial_test(
    factors: Float[np.ndarray, "cells rank heads"],
    images: Float[np.ndarray, "cells rank heads"],
    moments: TypeSums,
    *,
    weights: Float64[np.ndarray, "heads genes rank"],
    place: CellPositions,
    test: PermutationSpec,
    cell_type: str,
    n_permutations: int,
    dead: Bool[np.ndarray, " heads"],
    device: str = "cpu",
    heartbeat: Callable[[int], None] | None = None,
) -> TypeSpatial:
    """Test each head, and each head and gene, of one type with a null that respects where cells lie.

    Genes are tested by the lag null, whatever the null of the heads: only it tests single genes without a second pass
    over the cells.
    """
    usable = np.where(dead, 0.0, 1.0)
    asked = _SpatialQuestion(
        factors=np.nan_to_num(factors),
        images=images,
        dead=dead,
        place=place,
        test=test,
        cell_type=cell_type,
        n_permutations=n_permutations,
        device=device,
        heartbeat=heartbeat,
    )
    lag = lag_test(
        asked.factors * usable,
        images,
        place=place,
        genes=GeneSums(
            weights=weights,
            pixel_sums=moments.pixel_sums,
            near=moments.kept_values,
            target_ss=moments.target_ss_gene,
            predicted_ss=np.nan_to_num(moments.predicted_ss_gene) * usable[:, None],
            common=np.nan_to_num(moments.common) * usable[:, None],
        ),
        alpha=test.alpha,
        reach=test.reach,
        device=device,
    )
    if test.spatial_null == "lag":
        found = _by_lag(lag, dead, n_cells=len(factors))
    elif test.spatial_null == "torus":
        found = _by_torus(asked)
    elif test.spatial_null == "tile":
        found = _within_tiles(asked, lag.correlation_length)
    elif test.spatial_null == "sample":
        found = _shuffled(asked, place.grid.section, where="section", shared="sections")
    else:
        msg = f"no test is known for the spatial null {test.spatial_null!r}"
        raise NotImplementedError(msg)
    widths = _widths(test, place, lag.correlation_length)
    return TypeSpatial(
        p=found.p.p,
        p_low=found.p.ci_low,
        p_high=found.p.ci_high,
        statistic=found.statistic,
        ess=lag.ess,
        detectable=lag.detectable,
        p_gene=np.where(moments.by_tile.varies, lag.p_gene, np.nan),
        correlation_length=lag.correlation_length,
        reach=lag.reach if found.reach is None else found.reach,
        method=found.method,
        widths=widths,
        p_by_width=np.array([_by_width(asked, width, found) for width in widths]).reshape(len(widths), len(dead)),
        reasons=found.reasons,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _SpatialQuestion:
    """Inputs of the spatial nulls: the heads and cells of one type, and the settings."""

    factors: Float[np.ndarray, "cells rank heads"]
    images: Float[np.ndarray, "cells rank heads"]
    dead: Bool[np.ndarray, " heads"]
    place: CellPositions
    test: PermutationSpec
    cell_type: str
    n_permutations: int
    device: str
    heartbeat: Callable[[int], None] | None

    def within(self, strata: Int64[np.ndarray, " cells"]) -> PermutationMoments:
        """Return exact moments over permutations within strata."""
        return permutation_moments(self.factors, self.images, strata=strata, device=self.device)


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


def _by_torus(asked: _SpatialQuestion) -> _SpatialAnswer:
    found = torus_statistics(
        asked.factors,
        asked.images,
        asked.place.coordinates,
        samples=asked.place.samples,
        n_shifts=asked.test.n_shifts,
        seed=asked.test.seed,
        cell_type=asked.cell_type,
        progress=asked.heartbeat,
    )
    exceedances = np.count_nonzero(found.statistics >= found.observed - _TORUS_TIES, axis=0)
    # shifts without any overlap have NaN statistics and are left out of mean and spread
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


def _within_tiles(asked: _SpatialQuestion, correlation_length: float) -> _SpatialAnswer:
    """Test by shuffling cells within tiles of the width that is set, or of a share of the correlation length."""
    width = asked.test.tile_width or TILE_SHARE * correlation_length
    if not width > 0.0:
        reason = "expression shows no spatial correlation, so that there is no default width; set tile_width"
        return _SpatialAnswer.nothing(len(asked.dead), reason, reach=np.nan)
    return _shuffled_in_tiles(asked, width)


def _shuffled_in_tiles(asked: _SpatialQuestion, width: float) -> _SpatialAnswer:
    shared = f"tiles of width {width:.4g}"
    return replace(_shuffled(asked, _tiles(asked.place, width), where="tile", shared=shared), reach=width)


def _shuffled(
    asked: _SpatialQuestion, strata: Int64[np.ndarray, " cells"], *, where: str, shared: str
) -> _SpatialAnswer:
    """Test by shuffling cells within strata."""
    test, exchanged = asked.test, _exchanged(strata)
    if exchanged < MIN_CELLS_TEST:
        reason = f"{exchanged} of {len(strata)} cells share {shared} with others of the type; at least {MIN_CELLS_TEST}"
        return _SpatialAnswer.nothing(len(asked.dead), reason)
    moments = asked.within(strata)
    # with few exchangeable cells three moments do not determine the distribution
    few = exchanged < FEW_CELLS
    if test.spatial_method == "moments" and not few:
        p, method = exact(moments.p_values()), "moments"
    else:
        n_permutations = asked.n_permutations
        counts = stratified_exceedances(
            HeadFactors(factors=asked.factors, images=asked.images, dead=asked.dead),
            strata=strata,
            where=where,
            seed=test.seed,
            cell_type=asked.cell_type,
            n_permutations=max(n_permutations, DRAWN_FOR_FEW) if test.spatial_method == "moments" else n_permutations,
            device=asked.device,
            progress=asked.heartbeat,
        )
        p, method = (
            p_values(counts.exceedances, n_permutations=counts.n_permutations).without(counts.dead),
            "monte_carlo",
        )
    p = p.without(asked.dead)
    untested = np.flatnonzero(np.isnan(p.p) & ~asked.dead)
    return _SpatialAnswer(
        p=p,
        statistic=np.where(np.isnan(p.p), np.nan, moments.standardised),
        method=method,
        reasons={int(head): f"varies in no {where}" for head in untested},
    )


def _tiles(place: CellPositions, width: float) -> Int64[np.ndarray, " cells"]:
    return tiles_of_width(place.coordinates, width=width, samples=place.samples)


def _exchanged(strata: Int64[np.ndarray, " cells"]) -> int:
    """Return how many cells share a stratum with others."""
    return int(np.count_nonzero(np.bincount(strata)[strata] > 1))


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


def _by_width(asked: _SpatialQuestion, width: float, found: _SpatialAnswer) -> Float64[np.ndarray, " heads"]:
    """Return p within tiles of a width, from the main test if it used it; NaN where too few cells share a tile."""
    if asked.test.spatial_null == "tile" and found.reach == width:
        return found.p.p
    return _shuffled_in_tiles(asked, width).p.p
