"""How often each null finds a planted effect."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

import numpy as np

from tests.benchmarks.common import write_table
from tests.calibration.common import spread, summary
from tests.calibration.fields import Place, Smooth, real_places, simulate, uniform_place
from tests.calibration.nulls import apply_nulls

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
_N_UNIFORM = 600
_REAL = "Oligodendrocyte"


def run(options: Options) -> None:
    """Write ``power.csv``."""
    places: list[Place | None] = [None]
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
    place: Place | None,
    kernel: str,
    length: float,
    nugget: float,
    effect: float,
    n: int,
    n_torus: int,
    seed: int,
) -> list[Row]:
    """Test one head that knows some of expression, by every null."""
    setting: Row = {}
    p: dict[str, list[np.ndarray]] = {}
    ess = []
    for number in range(n):
        # the same fields for each effect, so that power grows with it
        rng = np.random.default_rng([seed, 3, number, round(1000 * length), kernel == "gaussian", nugget > 0.0])
        here = uniform_place(rng, _N_UNIFORM) if place is None else place
        smooth = Smooth(kernel=kernel, length=length * here.extent, nugget=nugget)
        data = simulate(rng, here, smooth, n_heads=1, effect=effect)
        found = apply_nulls(data, here, length=smooth.length, tiles=TILES, torus=number < n_torus, number=number)
        setting = {"place": here.name, "kernel": kernel, "length": length, "nugget": nugget, "effect": effect}
        ess.append(found.ess)
        for name, values in found.p.items():
            p.setdefault(name, []).append(values)
    median = float(np.median(np.concatenate(ess)))
    return [{**setting, "null": name, "ess": median, **summary(values)} for name, values in p.items()]
