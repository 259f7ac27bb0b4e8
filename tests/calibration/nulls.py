"""p-values of each null on simulated tissue, one-sided as users get them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from amici_eval.stats.permutation.exact_moments import permutation_moments
from amici_eval.stats.pvalues import p_values
from amici_eval.stats.spatial.lag_test import lag_test
from amici_eval.stats.spatial.tiles import tiles_of_width
from amici_eval.stats.spatial.torus import torus_statistics

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.calibration.fields import CellPositions, Data

N_SHIFTS = 199
_TIES = 1e-10


@dataclass(frozen=True, kw_only=True, eq=False)
class Tested:
    """p-values by null, each of any shape, and the effective sample size of each head."""

    p: dict[str, np.ndarray]
    ess: np.ndarray


def tile_name(times: float) -> str:
    return f"tile {times:g} l"


def apply_nulls(
    data: Data,
    place: CellPositions,
    *,
    length: float,
    tiles: Sequence[float] = (),
    torus: bool = False,
    number: int = 0,
) -> Tested:
    """Test the heads of one simulated tissue with each null; tile widths are given in correlation lengths."""
    lag = lag_test(data.factors, data.images, place=place.cells, genes=data.genes)
    p = {"lag": lag.p, "lag, genes": lag.p_gene}
    p["free"] = permutation_moments(data.factors, data.images).p_values()
    if place.samples is not None:
        p["sample"] = permutation_moments(data.factors, data.images, strata=place.cells.grid.section).p_values()
    for times in tiles:
        strata = tiles_of_width(place.coordinates, width=times * length, samples=place.samples)
        p[tile_name(times)] = (
            permutation_moments(data.factors, data.images, strata=strata).p_values()
            # as evaluation does: three cells must have another of their type in the tile
            if np.count_nonzero(np.bincount(strata)[strata] > 1) >= 3
            else np.full(data.factors.shape[2], np.nan)
        )
    if torus:
        found = torus_statistics(
            data.factors,
            data.images,
            place.coordinates,
            samples=place.samples,
            n_shifts=N_SHIFTS,
            seed=number,
            cell_type=place.name,
        )
        reached = np.count_nonzero(found.statistics >= found.observed - _TIES, axis=0)
        p["torus"] = p_values(reached, n_permutations=N_SHIFTS).p
    return Tested(p=p, ess=lag.ess)
