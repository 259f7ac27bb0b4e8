"""The million: a tissue on disk, opened, checked, evaluated; time by phase and peak memory, a process per run."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tests.benchmarks.clock import process_peak_mb
from tests.benchmarks.common import Job, Options, measure, say, write_table
from tests.benchmarks.engines import SAMPLINGS, StageClock, settings, warm_up
from tests.benchmarks.tissues import TissueSize, random_model, read_tissue, write_tissue

if TYPE_CHECKING:
    from tests.benchmarks.common import Emit

SIZE = TissueSize(n_cells=1_000_000, n_genes=300, n_types=16)
HEADS, HEAD_SIZE, NEIGHBOURS, PERMUTATIONS = 8, 16, 20, 2_560
_COMPARE_WITH = 10


def run(options: Options) -> None:
    """Write a tissue and one a tenth its size, evaluate both with each sampling, and write ``million.csv``."""
    size = replace(SIZE, n_cells=options.million_cells)
    permutations, dims = PERMUTATIONS, {}
    if options.quick:
        from tests.benchmarks.scaling import QUICK_DIMS

        size, permutations, dims = replace(SIZE, n_cells=1_000, n_genes=12, n_types=3), 16, QUICK_DIMS
    engine = options.engine or "factored"
    if engine == "hooked" and size.n_cells > 50_000:
        say(f"million: the hooked engine holds predictions of every head; not run on {size.n_cells} cells")
        return
    rows = []
    with options.folder("million") as scratch:
        # imports the model's libraries; in this process, so that the measured ones start bare
        small = read_tissue(replace(size, n_cells=200 + 60 * size.n_types))
        model = random_model(small, n_heads=HEADS, head_size=HEAD_SIZE, n_neighbors=NEIGHBOURS, **dims)
        model.save(scratch / "model")
        small.write_h5ad(scratch / "small.h5ad")
        for n_cells in (size.n_cells // _COMPARE_WITH, size.n_cells):
            own = replace(size, n_cells=n_cells)
            path = scratch / f"{n_cells}.h5ad"
            job = Job(function=f"{__name__}:generate", arguments={"path": str(path), "size": own.to_dict()})
            written = list(measure(job, options))
            if not written:
                return
            say(f"million: {n_cells} cells written in {written[0]['write_s']:.0f} s")
            for sampling in SAMPLINGS:
                job = Job(
                    function=f"{__name__}:measure_phases",
                    arguments={
                        "path": str(path),
                        "model": str(scratch / "model"),
                        "small": str(scratch / "small.h5ad"),
                        "engine": engine,
                        "sampling": sampling,
                        "n_permutations": permutations,
                    },
                )
                for row in measure(job, options):
                    rows.append({**row, **written[0]})
                    say(f"million, {n_cells} cells, {sampling}: {row['total_s']:.0f} s, {row['peak_mb']:.0f} MB")
                write_table(options.results / "million.csv", rows)
            if not options.keep:
                path.unlink()


def generate(emit: Emit, *, path: str, size: dict[str, int]) -> None:
    """Write the tissue."""
    started = time.perf_counter()
    write_tissue(Path(path), TissueSize(**size))
    emit(
        {
            "write_s": time.perf_counter() - started,
            "write_peak_mb": process_peak_mb(),
            "file_mb": Path(path).stat().st_size / 2**20,
        }
    )


def measure_phases(
    emit: Emit, *, path: str, model: str, small: str, engine: str, sampling: str, n_permutations: int
) -> None:
    """Open, check, find neighbours, compute: time each, and the peak memory of all."""
    import anndata

    from amici_eval.data.files import open_anndata
    from amici_eval.data.tissue import prepare
    from amici_eval.evaluation.pipeline import evaluate_access
    from amici_eval.model.checkpoint import TrainedAMICI
    from amici_eval.model.engines.opening import open_access
    from amici_eval.settings.evaluation import DataSpec

    # as by default, with all ablation modes
    side = "hooked" if engine == "hooked" else "catalogue"
    trained = TrainedAMICI.load(Path(model))
    warm_up(trained, anndata.read_h5ad(small), side)
    base_mb = process_peak_mb()
    spec = settings(side, n_permutations=n_permutations, sampling=sampling)
    clock = [time.perf_counter()]
    adata = open_anndata(path, backed=True)
    clock.append(time.perf_counter())
    tissue = prepare(adata, trained.card, DataSpec())
    clock.append(time.perf_counter())
    with open_access(trained, tissue, spec.ablation) as access:
        clock.append(time.perf_counter())
        stages = StageClock()
        result = evaluate_access(access, spec, progress=stages.progress)
    clock.append(time.perf_counter())
    phases = {
        name: later - earlier
        for name, earlier, later in zip(
            ("open_s", "check_s", "neighbours_s", "computing_s"), clock, clock[1:], strict=False
        )
    }
    emit(
        {
            "n_cells": tissue.n_cells,
            "n_genes": len(trained.card.genes),
            "n_types": len(result.cell_types),
            "engine": result.engine,
            "sampling": sampling,
            "n_permutations": n_permutations,
            **phases,
            "attention_s": stages.attention_s,
            "total_s": clock[-1] - clock[0],
            "peak_mb": process_peak_mb(),
            "base_mb": base_mb,
        }
    )
