"""How often each null finds a planted effect."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

import numpy as np

from tests.benchmarks.common import write_table
from tests.calibration.common import spread, summary
from tests.calibration.fields import CellPositions, real_places
from tests.calibration.nulls import simulations

if TYPE_CHECKING:
    from tests.calibration.common import Options, Row

EFFECTS = (0.0, 0.04, 0.08, 0.12, 0.2)
"""Standard deviations of expression for one of the prediction."""
TILES = (0.25, 0.5, 1.0, 2.0, 4.0)
_SHAPES = (
    ("gaussian", 0.025, 0.0),
    ("gaussian", 0.05, 0.0),
    ("gaussian", 0.05, 0.7),
    ("exponential", 0.05, 0.0),
    ("gaussian", 0.1, 0.0),
)
_REAL = "Oligodendrocyte"


def run(options: Options) -> None:
    """Write ``power.csv``."""
    places: list[CellPositions | None] = [None]
    places += [place for place in real_places(options.data) if _REAL in place.name]
    cases = [(None, *shape) for shape in _SHAPES] + [(place, "gaussian", 0.05, 0.0) for place in places[1:]]
    jobs = [
        {
            "place": place,
            "kernel": kernel,
            "length": length,
            "nugget": nugget,
            "effect": effect,
            # the level decides which widths are calibrated, so it is measured more finely
            "n": options.simulations(500 if effect == 0.0 else 200),
            "n_torus": options.simulations(100),
            "seed": options.seed,
        }
        for (place, kernel, length, nugget), effect in product(
            cases[:1] if options.quick else cases, EFFECTS[:2] if options.quick else EFFECTS
        )
    ]
    write_table(options.results / "power.csv", spread(one_setting, jobs, workers=options.workers))


def one_setting(
    *,
    place: CellPositions | None,
    kernel: str,
    length: float,
    nugget: float,
    effect: float,
    n: int,
    n_torus: int,
    seed: int,
) -> list[Row]:
    """Test one head that knows some of expression, by every null."""
    smooth = {"kernel": kernel, "length": length, "nugget": nugget, "effect": effect}
    found = simulations(place=place, **smooth, n=n, n_torus=n_torus, seed=seed, stream=3, tiles=TILES, n_heads=1)
    setting: Row = {"place": found.place, **smooth}
    median = float(np.median(found.ess))
    return [{**setting, "null": name, "ess": median, **summary(values)} for name, values in found.p.items()]
