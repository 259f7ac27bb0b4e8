"""p-values of each null on simulated tissues, one-sided as users get them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from amici_eval.stats.permutation.exact_moments import permutation_moments
from amici_eval.stats.pvalues import p_values
from amici_eval.stats.spatial.lag_test import lag_test
from amici_eval.stats.spatial.tiles import tiles_of_width
from amici_eval.stats.spatial.torus import torus_statistics
from tests.calibration.fields import Smooth, simulate, uniform_place

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.calibration.fields import CellPositions, Data

N_SHIFTS = 199
_N_UNIFORM = 600
_TIES = 1e-10


@dataclass(frozen=True, kw_only=True, eq=False)
class Tested:
    """p-values by null, each of any shape, and the effective sample size of each head."""

    p: dict[str, np.ndarray]
    ess: np.ndarray


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
        p[f"tile {times:g} l"] = (
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


@dataclass(frozen=True, kw_only=True, eq=False)
class Simulations:
    """Name of the place, p-values by null and simulation, and the effective sample sizes of all heads."""

    place: str
    p: dict[str, list[np.ndarray]]
    ess: np.ndarray


def simulations(
    *,
    place: CellPositions | None,
    kernel: str,
    length: float,
    nugget: float,
    n: int,
    n_torus: int,
    seed: int,
    stream: int,
    tiles: Sequence[float],
    n_heads: int = 3,
    effect: float = 0.0,
) -> Simulations:
    """Simulate one kind of tissue ``n`` times and test it by every null, the first ``n_torus`` times by shifts, too.

    ``place=None`` draws cells anew each time; ``length`` is a share of the window's longer side. The fields depend on
    ``seed``, ``stream`` and the simulation's number and not on the effect, so that power grows with it.
    """
    name = ""
    p: dict[str, list[np.ndarray]] = {}
    ess = []
    for number in range(n):
        rng = np.random.default_rng([seed, stream, number, round(1000 * length), kernel == "gaussian", nugget > 0.0])
        here = uniform_place(rng, _N_UNIFORM) if place is None else place
        smooth = Smooth(kernel=kernel, length=length * here.extent, nugget=nugget)
        data = simulate(rng, here, smooth, n_heads=n_heads, effect=effect)
        found = apply_nulls(data, here, length=smooth.length, tiles=tiles, torus=number < n_torus, number=number)
        name = here.name
        ess.append(found.ess)
        for null, values in found.p.items():
            p.setdefault(null, []).append(values)
    return Simulations(place=name, p=p, ess=np.concatenate(ess))
