"""The demo: simulate a tissue with planted effects, train two models that learn them, and find them again.

Registration and evaluation run as the commands a user would type, in processes of their own.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from dataclasses import replace
from typing import IO, TYPE_CHECKING, Any, cast

import numpy as np

from amici_eval.common.errors import AmiciEvalError
from amici_eval.tracking.registry import keep_artifacts_in
from amici_eval.tracking.runs.local_results import check_writable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from amici_eval.data.simulate import PlantedEffect
    from amici_eval.results.evaluation import HeadEvaluation
    from amici_eval.settings.evaluation import TrackingSpec

MODEL_NAME = EXPERIMENT = "amici-demo"
HELD_OUT_REGION = "left_strip"


def run_demo(
    *,
    seed: int,
    output_dir: Path,
    n_permutations: int | None,
    tracking: TrackingSpec,
    say: Callable[..., None],
) -> None:
    """Simulate, train, register, evaluate, and print what was found beside what was planted."""
    from amici_eval.data.simulate import DEMO_TISSUE, simulate_tissue
    from amici_eval.model.training import DEMO_TRAINING, train_amici
    from amici_eval.stats.cell_chunks import one_thread

    started = time.monotonic()
    folder = output_dir.absolute()
    check_writable(folder)
    uri = tracking.uri or f"sqlite:///{folder / 'mlflow.db'}"
    if tracking.uri is None:
        keep_artifacts_in(folder / "artifacts", uri=uri, experiment=EXPERIMENT)
    say("1. A tissue with planted sender -> receiver effects")
    tissue = simulate_tissue(replace(DEMO_TISSUE, seed=seed))
    data = folder / "tissue.h5ad"
    tissue.adata.write_h5ad(data)
    say(f"   {tissue.adata.n_obs} cells x {tissue.adata.n_vars} genes -> {data}")
    for effect in tissue.effects:
        say(
            f"   planted: {effect.sender} -> {effect.receiver} within {effect.range_um:g} um: {', '.join(effect.genes)}"
        )

    say("", "2. Two models: version 1 on a random 90 % of the cells, version 2 without the region left_strip")
    outside = np.flatnonzero((tissue.adata.obs["region"] != HELD_OUT_REGION).to_numpy())
    runs = {}
    for version, rows in ((1, None), (2, outside)):
        begun = time.monotonic()
        say(f"   training version {version} takes about a minute")
        with one_thread():
            model = train_amici(tissue.adata, seed=seed + version - 1, train_indices=rows, **DEMO_TRAINING.kwargs())
        model_dir = folder / f"model_{version}"
        model.save(str(model_dir), overwrite=True)
        say(f"   trained version {version} in {time.monotonic() - begun:.0f} s")
        runs[version] = model_dir

    say("", "3. Register and evaluate both, as on any model of your own")
    evaluations = {}
    for version, model_dir in runs.items():
        common = [f"tracking.uri={uri}", f"tracking.experiment={EXPERIMENT}"]
        out = _command(["register", f"model_dir={model_dir}", f"name={MODEL_NAME}", f"data.uri={data}", *common], say)
        registered = out.split("models:/", 1)[1].split()[0]
        subset = [] if version == 1 else ["data.subset.key=region", f"data.subset.value={HELD_OUT_REGION}"]
        test = [] if n_permutations is None else [f"permutation.n_permutations={n_permutations}"]
        out = _command(
            [
                "evaluate",
                f"model_uri=models:/{registered}",
                *subset,
                *test,
                *common,
                f"tracking.output_dir={folder / 'results'}",
            ],
            say,
        )
        run_id = next(line.split()[1] for line in out.splitlines() if line.startswith("run "))
        evaluations[registered] = _evaluation_of(uri, run_id)

    say("", "4. Which heads of version 1 are those of version 2, and what changed")
    versions = ",".join(registered.split("/")[1] for registered in evaluations)
    of_both = [f"model={MODEL_NAME}", f"versions=[{versions}]", f"data.uri={data}"]
    _command(["compare", *of_both, *test, *common, f"tracking.output_dir={folder / 'results'}"], say)

    say("", "5. What was planted and what was found")
    for registered, evaluation in evaluations.items():
        cells = "held-out cells of a region never trained on" if all(evaluation.held_out) else "all cells, in-sample"
        say("", f"{registered}, {cells}:", *planted_table(evaluation, tissue.effects))
    say(
        "",
        f"done in {time.monotonic() - started:.0f} s; everything is in {folder}",
        f"look at runs, tables, figures and reports with: mlflow ui --backend-store-uri {uri}",
    )


def planted_table(evaluation: HeadEvaluation, effects: Sequence[PlantedEffect]) -> list[str]:
    """Return, as lines, the head that found each planted effect, and how many others are significant."""
    adjusted = f"adjusted p ({evaluation.decided_by})"
    rows = [("receiver", "planted sender", "full model EV", "head", "EV of planted genes", adjusted, "its top genes")]
    genes = np.array(evaluation.genes)
    for effect in effects:
        index = evaluation.type_index(effect.receiver)
        planted = np.isin(genes, effect.genes)
        of_planted = np.nanmean(evaluation.expl_var_gene[:, index, planted], axis=1)
        head = int(np.argmax(of_planted))
        p = evaluation.adjusted[head, index]
        top = genes[np.argsort(-evaluation.expl_var_gene[head, index])[: len(effect.genes)]]
        mark = " *" if p <= evaluation.spec.permutation.alpha else ""
        hit = len(set(top) & set(effect.genes))
        rows.append(
            (
                effect.receiver,
                effect.sender,
                f"{evaluation.expl_var_full[index]:.3f}",
                str(head),
                f"{of_planted[head]:.3f}",
                f"{p:.4f}{mark}",
                f"{', '.join(top)} ({hit} of {len(effect.genes)} planted)",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    for cell_type in evaluation.cell_types:
        if cell_type not in {effect.receiver for effect in effects}:
            index = evaluation.type_index(cell_type)
            n = int(np.sum(evaluation.adjusted[:, index] <= evaluation.spec.permutation.alpha))
            lines.append(
                f"  nothing planted in {cell_type}: {n} of {evaluation.n_heads} heads significant, full model EV "
                f"{evaluation.expl_var_full[index]:.3f}"
            )
    return lines


def _command(arguments: list[str], say: Callable[..., None]) -> str:
    """Run a command of ours in a process of its own, show it and its output, and return the output."""
    say(f"   $ amici-eval {shlex.join(arguments)}")
    process = subprocess.Popen(  # noqa: S603, RUF100 - our own command
        [sys.executable, "-m", "amici_eval", *arguments], stdout=subprocess.PIPE, text=True, encoding="utf-8"
    )
    output = cast("IO[str]", process.stdout)
    lines = []
    try:
        for line in output:
            lines.append(line)
            say(f"     {line.rstrip()}")
    except BaseException:
        process.terminate()
        process.wait()
        raise
    if process.wait() != 0:
        raise AmiciEvalError(
            value=f"amici-eval {arguments[0]} exited with {process.returncode}",
            rule="each step of the demo must succeed",
            fix="see its message above",
        )
    return "".join(lines)


def _evaluation_of(tracking_uri: str, run_id: str) -> Any:
    from amici_eval.tracking.jobs.evaluating import load_evaluation

    return load_evaluation(run_id, tracking_uri=tracking_uri)
