"""Wall time of one evaluation against each size, the others held at a base."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from tests.benchmarks.common import Job, Options, measure, say, write_table
from tests.benchmarks.engines import FEW, settings, time_evaluation, warm_up
from tests.benchmarks.tissues import TissueSize, random_model, read_tissue

if TYPE_CHECKING:
    from amici_eval.model.checkpoint import TrainedAMICI
    from tests.benchmarks.common import Emit

QUICK_DIMS = {"n_nn_embed": 16, "n_nn_embed_hidden": 32, "n_kv_dim": 16, "n_pos_coef_mlp_hidden": 16}


@dataclass(frozen=True, kw_only=True)
class Point:
    """The sizes of one measurement."""

    cells: int = 10_000
    genes: int = 300
    heads: int = 8
    head_size: int = 16
    neighbours: int = 20
    types: int = 8
    permutations: int = 640
    sampling: str = "independent"


BASE = Point()
AXES: dict[str, tuple[int, ...]] = {
    "cells": (1_000, 3_000, 10_000, 30_000, 100_000),
    "genes": (100, 200, 400, 800, 1_600),
    "heads": (2, 4, 8, 16),
    "types": (2, 4, 8, 16, 32),
    "neighbours": (5, 10, 20, 40, 80),
    "permutations": (160, 640, 2_560, 10_240),
}
QUICK_BASE = Point(cells=300, genes=10, heads=2, head_size=4, neighbours=4, types=3, permutations=16)
QUICK_AXES: dict[str, tuple[int, ...]] = {"cells": (150, 300), "permutations": (16, 32)}


def plan(options: Options) -> list[tuple[str, Point]]:
    """Return the axis and the sizes of each measurement."""
    base, axes = (QUICK_BASE, QUICK_AXES) if options.quick else (BASE, AXES)
    if options.million and not options.quick:
        axes = {**axes, "cells": (*axes["cells"], 1_000_000)}
    points = [(axis, replace(base, **{axis: value})) for axis, values in axes.items() for value in values]
    # all shifts of one order are counted: cells take the place of permutations
    cyclic = [("cells", replace(base, cells=value, permutations=FEW, sampling="cyclic")) for value in axes["cells"]]
    return points + cyclic


def run(options: Options) -> None:
    """Measure all points, in one process, and write ``scaling.csv``."""
    engine = options.engine or "factored"
    points = plan(options)
    job = Job(
        function=f"{__name__}:measure_points",
        arguments={
            "points": [(axis, asdict(point)) for axis, point in points],
            "engine": engine,
            "repeats": options.repeats,
            "dims": QUICK_DIMS if options.quick else {},
        },
    )
    rows = []
    for row in measure(job, options):
        rows.append(row)
        say(f"scaling, {row['axis']} {row[row['axis']]} ({row['sampling']}): {row['wall_s']:.2f} s")
        write_table(options.results / "scaling.csv", rows)


def measure_points(emit: Emit, *, points: list[Any], engine: str, repeats: int, dims: dict[str, int]) -> None:
    """Time evaluations with all permutations, with one, and with one and all ablation modes: differences are parts."""
    from amici_eval.data.tissue import prepare
    from amici_eval.settings.evaluation import DataSpec

    everything = "hooked" if engine == "hooked" else "catalogue"
    models: dict[Point, TrainedAMICI] = {}
    done: dict[Point, dict[str, Any]] = {}
    rest: dict[Point, dict[str, float]] = {}
    for axis, sizes in points:
        point = Point(**sizes)
        # what a model, and what an evaluation with one permutation, does not depend on
        any_cells = replace(point, cells=0, permutations=0, sampling="")
        any_test = replace(point, permutations=0, sampling="")
        if point not in done:
            size = TissueSize(n_cells=point.cells, n_genes=point.genes, n_types=point.types)
            if any_cells not in models:
                small = read_tissue(replace(size, n_cells=200 + 60 * point.types))
                models[any_cells] = random_model(
                    small, n_heads=point.heads, head_size=point.head_size, n_neighbors=point.neighbours, **dims
                )
                warm_up(models[any_cells], small, everything)
            model = models[any_cells]
            tissue = prepare(read_tissue(size), model.card, DataSpec())
            spec = settings(engine, n_permutations=point.permutations, sampling=point.sampling)
            timing = time_evaluation(model, tissue, spec, repeats=repeats)
            if any_test not in rest:
                least, most = (
                    time_evaluation(model, tissue, settings(side, n_permutations=1), repeats=repeats).wall_s
                    for side in (engine, everything)
                )
                rest[any_test] = {"without_permutations_s": least}
                if engine != everything:
                    rest[any_test]["catalogue_s"] = max(0.0, most - least)
            done[point] = {
                "wall_s": timing.wall_s,
                **rest[any_test],
                "open_s": timing.open_s,
                "peak_mb": timing.cost.peak_mb,
                "repeats": timing.cost.repeats,
            }
        emit({"axis": axis, "engine": engine, **asdict(point), **done[point]})
