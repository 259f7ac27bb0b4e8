"""The test of one cell type's heads that holds in tissue: by the null of the settings, with its scale and its reach."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from amici_eval.stats.exact_moments import DRAWN_FOR_FEW, FEW_CELLS, permutation_moments
from amici_eval.stats.lag import LagGrid
from amici_eval.stats.lag_test import MIN_EFFECTIVE_CELLS, GeneSums, lag_test
from amici_eval.stats.near_pairs import NearPairs
from amici_eval.stats.nulls import MIN_CELLS_TEST
from amici_eval.stats.pvalues import p_values
from amici_eval.stats.spatial import default_widths, tiles_of_width
from amici_eval.stats.stratified import stratified_exceedances
from amici_eval.stats.torus import torus_statistics

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Float64, Int64

    from amici_eval.specs import PermutationSpec
    from amici_eval.stats.lag_test import LagTest
    from amici_eval.stats.moments import TypeMoments

__all__ = ["Place", "TypeSpatial", "spatial_test"]

_TORUS_TIES = 1e-10
"""Of a correlation."""
_ROUNDING = 1e-12
"""Numbers that vary by less than this share of their size are constants that float64 rounded."""
_SAME = "predicts the same for all cells of each section"


@dataclass(frozen=True, kw_only=True, eq=False)
class Place:
    """Where the cells of one type lie.

    Parameters
    ----------
    coordinates
        Shape (cells, dimensions), in the unit of the AnnData.
    samples
        Section of each cell, if known.
    grid, near
        Pixels over these cells, and pairs of those that are near each other.
    """

    coordinates: Float64[np.ndarray, "cells dimensions"]
    samples: np.ndarray | None
    grid: LagGrid
    near: NearPairs

    @classmethod
    def of(
        cls, coordinates: Float64[np.ndarray, "cells dimensions"], samples: np.ndarray | None, *, n_genes: int
    ) -> Place:
        """Lay a grid over cells and find near pairs; ``n_genes`` bounds of how many cells expression is kept."""
        grid = LagGrid.of(coordinates, samples=samples)
        near = NearPairs.of(grid, coordinates, n_genes=n_genes)
        return cls(coordinates=coordinates, samples=samples, grid=grid, near=near)


@dataclass(frozen=True, kw_only=True, eq=False)
class TypeSpatial:
    """What the spatial null says of one cell type; shapes and meanings as in :class:`SpatialTests`, without the types.

    Parameters
    ----------
    p, p_low, p_high, statistic, ess, detectable
        Shape (heads,).
    p_gene
        Shape (heads, genes).
    correlation_length, reach
        In coordinate units.
    method
        How p came about.
    widths, p_by_width
        Tile widths, and p within tiles of each, shape (widths, heads).
    reasons
        Why a head has no p, by head number; -1 means all.
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
    moments: TypeMoments,
    *,
    weights: Float64[np.ndarray, "heads genes rank"],
    place: Place,
    test: PermutationSpec,
    cell_type: str,
    n_permutations: int,
    dead: Bool[np.ndarray, " heads"],
    device: str = "cpu",
) -> TypeSpatial:
    """Test each head, and each head and gene, of one type with a null that respects where cells lie.

    Parameters
    ----------
    factors, images, moments, weights
        F, Z, sums over cells and A of the heads (:func:`amici_eval.stats.lag_test.lag_test`).
    place
        Where the cells lie.
    test
        The null (``spatial_null``) and its settings.
    cell_type, n_permutations
        Label and number of permutations, where some are drawn.
    dead
        Heads to leave out.
    device
        Torch device with float64.

    Notes
    -----
    Genes are tested by the lag null, whatever the null of the heads: it alone says something of single genes without a
    second pass over the cells.
    """
    n_heads = factors.shape[2]
    usable = np.where(dead | _same_in_sections(factors, place.grid.section), 0.0, 1.0)
    lag = lag_test(
        np.nan_to_num(factors) * usable,
        images,
        grid=place.grid,
        near=place.near,
        weights=weights,
        genes=GeneSums(
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
    p_gene = np.where(dead[:, None] | moments.constant_genes, np.nan, lag.p_gene)
    found = _Found(p=np.full(n_heads, np.nan), method="")
    if test.spatial_null == "lag":
        found = _by_lag(lag, dead, n_cells=len(factors))
    elif test.spatial_null == "torus":
        found = _by_torus(factors, images, place, test, cell_type, dead)
    else:
        width = test.tile_width or lag.correlation_length
        found = _within(factors, images, place, test, cell_type, dead, n_permutations, width=width, device=device)
    # where there is nothing to test, what rounding leaves of a statistic means nothing
    statistic = np.where(np.isnan(lag.ess), np.nan, lag.statistic) if found.statistic is None else found.statistic
    widths, p_by_width = _by_width(factors, images, place, test, lag.correlation_length, dead, device)
    return TypeSpatial(
        p=found.p,
        p_low=found.p if found.p_low is None else found.p_low,
        p_high=found.p if found.p_high is None else found.p_high,
        statistic=np.where(dead, np.nan, statistic),
        ess=np.where(dead, np.nan, lag.ess),
        detectable=np.where(dead, np.nan, lag.detectable),
        p_gene=p_gene,
        correlation_length=lag.correlation_length,
        reach=lag.reach if found.reach is None else found.reach,
        method=found.method,
        widths=widths,
        p_by_width=p_by_width,
        reasons=found.reasons,
    )


def _same_in_sections(
    factors: Float[np.ndarray, "cells rank heads"], section: Int64[np.ndarray, " cells"]
) -> Bool[np.ndarray, " heads"]:
    """Return which heads vary between sections at most: of these the lag null would test what rounding leaves."""
    numbers = np.unique(section)
    if len(numbers) == 1:
        return np.zeros(factors.shape[2], dtype=bool)
    left, size = np.zeros((2, factors.shape[2]))
    with np.errstate(invalid="ignore"):
        for number in numbers:
            own = factors[section == number].astype(np.float64)
            size += np.square(own).sum(axis=(0, 1))
            left += np.square(own - own.mean(axis=0)).sum(axis=(0, 1))
        return np.asarray(left <= _ROUNDING**2 * size)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Found:
    p: Float64[np.ndarray, " heads"]
    method: str
    p_low: Float64[np.ndarray, " heads"] | None = None
    p_high: Float64[np.ndarray, " heads"] | None = None
    statistic: Float64[np.ndarray, " heads"] | None = None
    reach: float | None = None
    reasons: dict[int, str] = field(default_factory=dict)


def _by_lag(lag: LagTest, dead: Bool[np.ndarray, " heads"], *, n_cells: int) -> _Found:
    reasons = {
        int(head): _SAME
        if np.isnan(lag.ess[head])
        else f"effective sample size {lag.ess[head]:.1f} of {n_cells} cells; the lag null needs at least "
        f"{MIN_EFFECTIVE_CELLS:g}"
        for head in np.flatnonzero(np.isnan(lag.p) & ~dead)
    }
    return _Found(p=np.where(dead, np.nan, lag.p), method="lag_t", reasons=reasons)


def _by_torus(
    factors: Float[np.ndarray, "cells rank heads"],
    images: Float[np.ndarray, "cells rank heads"],
    place: Place,
    test: PermutationSpec,
    cell_type: str,
    dead: Bool[np.ndarray, " heads"],
) -> _Found:
    found = torus_statistics(
        np.nan_to_num(factors),
        images,
        place.coordinates,
        samples=place.samples,
        n_shifts=test.n_shifts,
        seed=test.seed,
        cell_type=cell_type,
    )
    exceedances = np.count_nonzero(found.statistics >= found.observed - _TORUS_TIES, axis=0)
    raw = p_values(exceedances, n_permutations=test.n_shifts)
    # a shift that leaves nothing to compare has no place in the spread
    compared = np.ma.masked_invalid(found.statistics)
    statistic = np.ma.filled((found.observed - compared.mean(axis=0)) / compared.std(axis=0, ddof=1), np.nan)
    nothing = np.isnan(found.observed)
    gone = dead | nothing
    return _Found(
        p=np.where(gone, np.nan, raw.p),
        p_low=np.where(gone, np.nan, raw.ci_low),
        p_high=np.where(gone, np.nan, raw.ci_high),
        statistic=np.where(gone, np.nan, statistic),
        method="monte_carlo",
        reasons={int(head): _SAME for head in np.flatnonzero(nothing & ~dead)},
    )


def _within(
    factors: Float[np.ndarray, "cells rank heads"],
    images: Float[np.ndarray, "cells rank heads"],
    place: Place,
    test: PermutationSpec,
    cell_type: str,
    dead: Bool[np.ndarray, " heads"],
    n_permutations: int,
    *,
    width: float,
    device: str,
) -> _Found:
    """Shuffle within sections, or within tiles of them."""
    reach: float | None = None
    if test.spatial_null == "tile":
        if not width > 0.0:
            reason = "expression shows no spatial correlation, so that there is no default width; set tile_width"
            return _Found(p=np.full(len(dead), np.nan), method="", reasons={-1: reason})
        strata, reach = tiles_of_width(place.coordinates, width=width, samples=place.samples), width
    else:
        strata = place.grid.section
    exchanged = int(np.count_nonzero(np.bincount(strata)[strata] > 1))
    if exchanged < MIN_CELLS_TEST:
        where = f"tiles of width {width:.4g}" if test.spatial_null == "tile" else "sections"
        reason = f"{exchanged} of {len(strata)} cells share {where} with others of the type; at least {MIN_CELLS_TEST}"
        return _Found(p=np.full(len(dead), np.nan), method="", reach=reach, reasons={-1: reason})
    clean = np.nan_to_num(factors)
    # of few cells, a few moments do not tell the law
    few = len(strata) < FEW_CELLS
    if test.spatial_method == "moments" and not few:
        exact = permutation_moments(clean, images, strata=strata, device=device)
        p = np.where(dead, np.nan, exact.p_values())
        reasons = _constant_within(test, np.isnan(p) & ~dead)
        return _Found(p=p, method="moments", statistic=exact.standardised, reach=reach, reasons=reasons)
    if few:
        n_permutations = max(n_permutations, DRAWN_FOR_FEW)
    counts = stratified_exceedances(
        clean,
        images,
        strata=strata,
        labels=_labels(strata, test.spatial_null),
        seed=test.seed,
        cell_type=cell_type,
        n_permutations=n_permutations,
        dead=dead,
        device=device,
    )
    raw = p_values(counts.exceedances, n_permutations=n_permutations)
    gone = counts.dead
    return _Found(
        p=np.where(gone, np.nan, raw.p),
        p_low=np.where(gone, np.nan, raw.ci_low),
        p_high=np.where(gone, np.nan, raw.ci_high),
        method="monte_carlo",
        reach=reach,
        reasons=_constant_within(test, gone & ~dead),
    )


def _constant_within(test: PermutationSpec, untested: Bool[np.ndarray, " heads"]) -> dict[int, str]:
    where = "tile" if test.spatial_null == "tile" else "section"
    return {int(head): f"varies in no {where}" for head in np.flatnonzero(untested)}


def _labels(strata: Int64[np.ndarray, " cells"], null: str) -> list[str]:
    """Return a name for each stratum, of which its permutations are a function."""
    return [f"{null} {number}" for number in range(int(strata.max()) + 1)]


def _by_width(
    factors: Float[np.ndarray, "cells rank heads"],
    images: Float[np.ndarray, "cells rank heads"],
    place: Place,
    test: PermutationSpec,
    correlation_length: float,
    dead: Bool[np.ndarray, " heads"],
    device: str,
) -> tuple[tuple[float, ...], Float64[np.ndarray, "widths heads"]]:
    """Return p within tiles of several widths; 0 stands for a width that this type does not have."""
    if test.tile_widths is not None:
        widths = test.tile_widths
    elif test.spatial_null == "tile" and correlation_length > 0.0:
        extent = float(np.ptp(place.coordinates[:, :2], axis=0).max())
        widths = tuple(default_widths(correlation_length, extent))
    else:
        widths = ()
    p = np.full((len(widths), len(dead)), np.nan)
    for row, width in enumerate(widths):
        strata = tiles_of_width(place.coordinates, width=width, samples=place.samples)
        if np.count_nonzero(np.bincount(strata)[strata] > 1) >= MIN_CELLS_TEST:
            exact = permutation_moments(np.nan_to_num(factors), images, strata=strata, device=device)
            p[row] = np.where(dead, np.nan, exact.p_values())
    return widths, p
