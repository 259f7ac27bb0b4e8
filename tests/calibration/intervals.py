"""How often intervals of explained variance, from whole tiles drawn again, hold the truth in smooth tissue."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

import numpy as np

from amici_eval.stats.tile_tests import tile_bootstrap
from tests.benchmarks.common import write_table
from tests.builders import make_tile_sums
from tests.calibration.common import spread
from tests.calibration.fields import CellPositions, Smooth, fields

if TYPE_CHECKING:
    from tests.calibration.common import Options, Row

SIDES = (3, 4, 5, 6)
LENGTHS = (0.05, 0.15, 0.3)
"""Of the side of a tile."""
SHARE = 0.3
"""Expected explained variance."""
_CELLS_PER_TILE, _N_GENES, _N_RESAMPLES = 40, 4, 499


def run(options: Options) -> None:
    """Write ``intervals.csv``."""
    jobs = [
        {"side": side, "length": length, "even": even, "n": options.simulations(400), "seed": options.seed}
        for side, length, even in product(SIDES[:2] if options.quick else SIDES, LENGTHS, (True, False))
    ]
    write_table(options.results / "intervals.csv", spread(one_setting, jobs, workers=options.workers))


def one_setting(*, side: int, length: float, even: bool, n: int, seed: int) -> list[Row]:
    """Simulate tissue of ``side`` x ``side`` tiles, of side 1; a prediction of known worth plus a smooth rest."""
    covered, widths = [], []
    for number in range(n):
        rng = np.random.default_rng([seed, 6, number, side, round(1000 * length), even])
        n_cells = _CELLS_PER_TILE * side * side
        xy = rng.uniform(0.0, side, (n_cells, 2))
        if not even:
            # cells of a type thin out from one side of the tissue to the other, by a factor of 20
            xy[:, 0] = side * np.log1p(19.0 * rng.uniform(size=n_cells)) / np.log(20.0)
            xy[:, 0] = side - xy[:, 0] if number % 2 else xy[:, 0]
        place = CellPositions(name="tiles", coordinates=xy)
        smooth = Smooth(kernel="gaussian", length=length)
        prediction, other = (fields(rng, place, _N_GENES, smooth) for _ in range(2))
        predicted, rest = np.sqrt(SHARE) * prediction.values, np.sqrt(1.0 - SHARE) * other.values
        # of endless tissue of the same waves: its fields never go together
        explained, left = SHARE * prediction.variance.sum(), (1.0 - SHARE) * other.variance.sum()
        truth = explained / (explained + left)
        tiles = np.floor(np.minimum(xy, side - 1e-9)).astype(np.int64) @ np.array([side, 1])
        sums = make_tile_sums(tiles, predicted + rest, -rest[:, None])
        found = tile_bootstrap(sums, n_resamples=_N_RESAMPLES, seed=number, cell_type="T")
        covered.append(bool(found.low[0] <= truth <= found.high[0]))
        widths.append(float(found.high[0] - found.low[0]))
    rate = float(np.mean(covered))
    return [
        {
            "tiles": side * side,
            "length": length,
            "even": even,
            "simulations": n,
            "coverage": rate,
            "se": float(np.sqrt(max(rate * (1.0 - rate), 1.0 / n) / n)),
            "median_width": float(np.median(widths)),
        }
    ]
