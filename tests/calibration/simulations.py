"""p-values of every null over many simulated tissues of one kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tests.calibration.fields import Smooth, simulate, uniform_place
from tests.calibration.nulls import apply_nulls

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.calibration.fields import CellPositions

_N_UNIFORM = 600


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
