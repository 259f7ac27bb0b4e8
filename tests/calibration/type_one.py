"""How often each null finds something where there is nothing, in smooth tissue; and how few cells `lag` may have."""

from __future__ import annotations

from itertools import pairwise, product
from typing import TYPE_CHECKING

import numpy as np

from tests.benchmarks.common import write_table
from tests.calibration.common import spread, summary
from tests.calibration.fields import CellPositions, Smooth, real_places, simulate, uniform_place
from tests.calibration.nulls import apply_nulls, simulations

if TYPE_CHECKING:
    from tests.calibration.common import Options, Row

LENGTHS = (0.025, 0.05, 0.1)
"""Of the window's longer side."""
TILES = (0.5, 1.0, 2.0)
NUGGET = 0.7
N_BINS = 20
ESS_EDGES = (5, 6, 7, 8, 10, 12, 15, 20, 30, 50, 100_000)


def run(options: Options) -> None:
    """Write ``type_one.csv`` and ``type_one_histogram.csv``."""
    jobs: list[Row] = []
    shapes = list(product(("gaussian", "exponential"), LENGTHS, (0.0, NUGGET)))
    for kernel, length, nugget in shapes[:1] if options.quick else shapes:
        common = {"kernel": kernel, "length": length, "nugget": nugget, "seed": options.seed}
        jobs.append({**common, "place": None, "n": options.simulations(300), "n_torus": options.simulations(100)})
    # in real windows: the hardest shape at three lengths, the others at one
    real = [shape for shape in shapes if shape[0] == "gaussian" and shape[2] == 0.0]
    real += [("gaussian", 0.05, NUGGET), ("exponential", 0.05, 0.0)]
    places = real_places(options.data)
    for place, (kernel, length, nugget) in product(places[:1] if options.quick else places, real):
        common = {"kernel": kernel, "length": length, "nugget": nugget, "seed": options.seed}
        large = len(place.coordinates) > 1_000
        n, n_torus = options.simulations(120 if large else 250), options.simulations(40 if large else 80)
        jobs.append({**common, "place": place, "n": n, "n_torus": n_torus if length == 0.05 else 0})
    rows = spread(one_setting, jobs, workers=options.workers)
    write_table(options.results / "type_one.csv", [row for row in rows if "at_05" in row])
    write_table(options.results / "type_one_histogram.csv", [row for row in rows if "at_05" not in row])


def one_setting(
    *, place: CellPositions | None, kernel: str, length: float, nugget: float, n: int, n_torus: int, seed: int
) -> list[Row]:
    """Simulate one kind of tissue ``n`` times; ``place=None`` draws cells anew each time."""
    smooth = {"kernel": kernel, "length": length, "nugget": nugget}
    found = simulations(place=place, **smooth, n=n, n_torus=n_torus, seed=seed, stream=1, tiles=TILES)
    setting: Row = {"place": found.place, **smooth}
    cells = np.quantile(found.ess, [0.05, 0.5, 0.95])
    rows = []
    for name, by_simulation in found.p.items():
        spread_of = dict(zip(("ess_05", "ess", "ess_95"), cells.tolist(), strict=True))
        rows.append({**setting, "null": name, **spread_of, **summary(by_simulation)})
        flat = np.concatenate([np.ravel(one) for one in by_simulation])
        counts = np.histogram(flat[np.isfinite(flat)], bins=N_BINS, range=(0.0, 1.0))[0]
        rows.append({**setting, "null": name, **{f"bin_{index:02d}": int(c) for index, c in enumerate(counts)}})
    return rows


def run_few(options: Options) -> None:
    """Write ``few.csv``: what `lag` does with few effective cells."""
    settings = list(product(("gaussian", "exponential"), (0.1, 0.15, 0.2, 0.3), (50, 100, 200, 400)))
    jobs = [
        {
            "kernel": kernel,
            "length": length,
            "n_cells": n_cells,
            "n": options.simulations(250),
            "seed": options.seed,
        }
        for kernel, length, n_cells in (settings[:1] if options.quick else settings)
    ]
    write_table(options.results / "few.csv", spread(one_few, jobs, workers=options.workers))


def one_few(*, kernel: str, length: float, n_cells: int, n: int, seed: int) -> list[Row]:
    """Count tests and rejections by the effective sample size that the test itself estimates."""
    ess, p = [], []
    for number in range(n):
        rng = np.random.default_rng([seed, 2, number, round(1000 * length), kernel == "gaussian", n_cells])
        place = uniform_place(rng, n_cells)
        found = apply_nulls(simulate(rng, place, Smooth(kernel=kernel, length=length)), place, length=length)
        ess.append(found.ess)
        p.append(found.p["lag"])
    sizes, values = np.concatenate(ess), np.concatenate(p)
    setting: Row = {"kernel": kernel, "length": length, "n_cells": n_cells, "ess": float(np.median(sizes))}
    setting["undefined"] = int(np.count_nonzero(np.isnan(values)))
    rows = []
    for low, high in pairwise(ESS_EDGES):
        own = values[(sizes >= low) & (sizes < high) & np.isfinite(values)]
        counts = {f"at_{name}": int(np.count_nonzero(own <= a)) for name, a in (("05", 0.05), ("01", 0.01))}
        rows.append({**setting, "from": low, "to": high, "tests": len(own), **counts})
    return rows
