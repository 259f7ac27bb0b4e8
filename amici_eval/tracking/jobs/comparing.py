"""The job behind ``compare``: evaluate what is not evaluated yet, compare, save, log."""

from __future__ import annotations

import logging
import math
import tempfile
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from amici_eval.common.errors import AmiciEvalError, DataError, first_line
from amici_eval.common.text import markdown, slugify
from amici_eval.comparison.pipeline import compare, matched_similarity
from amici_eval.comparison.version_pairs import similarity_of
from amici_eval.report.comparison_sentences import comparison_sentences
from amici_eval.report.page.comparison_page import write_comparison_html
from amici_eval.report.tables import write_comparison_tables
from amici_eval.settings.evaluation import AblationSpec, EvaluationSpec, PermutationSpec
from amici_eval.tracking.jobs.version_evaluations import cells_of, columns_of, gather_evaluations, model_uris
from amici_eval.tracking.registry import connect_to, find_dataset
from amici_eval.tracking.runs.delivery import send
from amici_eval.tracking.runs.local_results import ARTIFACTS, RunRecord, checked_output, remove_local, run_folder
from amici_eval.tracking.runs.tracked import NOTE_TAG, tracked_run
from amici_eval.tracking.store.errors import optional, patiently
from amici_eval.tracking.stored_model import open_stored_model

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from jaxtyping import Float64

    from amici_eval.results.comparison import HeadComparison
    from amici_eval.settings.comparison import ComparisonSpec
    from amici_eval.settings.evaluation import ReportSpec, TrackingSpec
    from amici_eval.tracking.jobs.version_evaluations import Column, ComparedCells
    from amici_eval.tracking.registry import ResolvedModel


def comparison_params(spec: ComparisonSpec) -> dict[str, str]:
    """Return the settings as ``cfg/compare...`` params."""
    return {f"cfg/compare.{name}": str(value) for name, value in asdict(spec).items() if name != "cells"}


def comparison_series(comparison: HeadComparison) -> dict[str, list[tuple[int, float]]]:
    """Return metrics by version, so that MLflow's chart shows their history; undefined values are left out."""
    numbers = [str(version.model.get("version") or "") for version in comparison.versions]
    names = {version.model.get("name") for version in comparison.versions}
    steps = list(range(len(numbers)))
    if len(names) == 1 and all(number.isdigit() for number in numbers) and comparison.kind == "versions":
        given = [int(number) for number in numbers]
        steps = given if given == sorted(set(given)) else steps
    series: dict[str, list[tuple[int, float]]] = {}

    def add(name: str, step: int, value: float) -> None:
        if math.isfinite(value):
            series.setdefault(name, []).append((step, float(value)))

    lineage = {
        (position, head): number
        for number, one in enumerate(comparison.lineages)
        for position, head in enumerate(one.heads)
        if head is not None
    }
    cell_types = {cell_type for version in comparison.versions for cell_type in version.cell_types}
    for position, (step, version) in enumerate(zip(steps, comparison.versions, strict=True)):
        add("summary/n_significant", step, version.n_significant)
        for at, cell_type in enumerate(version.cell_types):
            slug = slugify(cell_type, cell_types)
            add(f"ev_full_model/{slug}", step, version.full[at])
            for head in range(version.n_heads):
                if (position, head) in lineage:
                    add(f"ev/{slug}/lineage_{lineage[position, head]}", step, version.expl_var[head, at])
    for whole in comparison.overall:
        add("overall/difference", steps[whole.after], whole.difference)
    return series


def write_comparison(
    comparison: HeadComparison, folder: Path, *, report: ReportSpec, config_yaml: str, first: str = ""
) -> None:
    """Write the tables, figures and page of a comparison, as a run holds them, into a folder."""
    comparison.save(folder)
    write_comparison_tables(comparison, folder)
    (folder / "config").mkdir(exist_ok=True)
    (folder / "config" / "resolved.yaml").write_text(config_yaml, encoding="utf-8")
    figures: dict[str, Path] = {}
    if report.figures:
        from amici_eval.report.figures.comparison_figures import save_comparison_figures

        paths = save_comparison_figures(comparison, folder / "figures", formats=report.formats)
        figures = {path.stem: path for path in paths if path.suffix == ".svg"} or {path.stem: path for path in paths}
    write_comparison_html(comparison, folder, figures=figures, first=first)


logger = logging.getLogger(__name__)

_FLOOR_SEEDS = (1, 2)


@dataclass(frozen=True, kw_only=True)
class ComparisonRun:
    """A comparison and the run that holds it; ``folder`` is the local copy of its artifacts, if it was kept."""

    comparison: HeadComparison
    run_id: str
    tracking_uri: str
    folder: Path | None


def compare_job(
    *,
    models: Sequence[str] = (),
    versions: Sequence[str] = (),
    runs: Sequence[str] = (),
    datasets: Sequence[str] = (),
    data_uri: str | None,
    spec: EvaluationSpec,
    comparison: ComparisonSpec,
    report: ReportSpec,
    tracking: TrackingSpec,
    config_yaml: str,
    progress: Callable[[int, int, str], None] | None = None,
) -> ComparisonRun:
    """Compare versions of models on the same cells, or one version on several data sets, and log that to a run."""
    tracking_uri = connect_to(tracking)
    output = checked_output(tracking.output_dir)
    columns = columns_of(model_uris(models, versions), runs, datasets, data_uri)
    cells = cells_of([column for column in columns if column.model is not None], spec, comparison, data_uri, datasets)
    tags = {"amici_eval.kind": "comparison"}
    with (
        tracked_run(tracking, name="compare", tags=tags) as run,
        run_folder(output, run.info.run_id) as folder,
    ):
        run_id, experiment_id = run.info.run_id, run.info.experiment_id
        with tempfile.TemporaryDirectory(prefix="evaluations-", dir=folder) as staging:
            found = gather_evaluations(
                columns,
                cells,
                Path(staging),
                parent=(run_id, experiment_id),
                need_moments=not datasets,
                report=report,
                tracking=tracking,
                config_yaml=config_yaml,
                progress=progress,
            )
            if len(found.folders) < 2:
                reasons = "; ".join(f"{one.label}: {one.reason}" for one in found.failed)
                raise DataError(
                    value=f"{len(found.folders)} of {len(columns)} evaluations are there ({reasons})",
                    rule="a comparison needs at least two",
                    fix="mend what failed, or compare other versions",
                )
            result = compare(
                found.folders,
                comparison,
                labels=[column.label for column in found.columns],
                run_ids=found.run_ids,
                reused=found.reused,
                failed=found.failed,
                floor=_floor(found.columns, cells, cells.data_uri) if comparison.floor and not datasets else None,
                cells=cells.text,
                notes=cells.notes,
                progress=progress,
            )
        record = RunRecord(
            tracking_uri=tracking_uri,
            run_id=run_id,
            params={"cfg/compare.cells": result.cells, **comparison_params(comparison)},
            tags={
                **tags,
                NOTE_TAG: "\n".join(f"- {markdown(one)}" for one in comparison_sentences(result)),
            },
            series=comparison_series(result),
        )
        write_comparison(result, folder / ARTIFACTS, report=report, config_yaml=config_yaml)
        record = record.with_files(folder)
        record.save(folder)
        send(folder, record, retry_s=tracking.retry_s)
        _tag_versions([column.model for column in found.columns if column.model is not None], run_id)
    if not tracking.keep_local:
        remove_local(folder, with_parent=output.made)
    return ComparisonRun(
        comparison=result, run_id=run_id, tracking_uri=tracking_uri, folder=folder if tracking.keep_local else None
    )


def _floor(
    columns: Sequence[Column], cells: ComparedCells, data_uri: str | None
) -> Float64[np.ndarray, " heads"] | None:
    """Return how alike the heads of two untrained models of the last version's architecture are."""
    from amici_eval.evaluation.pipeline import evaluate
    from amici_eval.model.checkpoint import untrained_like
    from amici_eval.tracking.dataset import from_anndata

    last = next((column for column in reversed(columns) if column.model is not None), None)
    if last is None or last.model is None:
        return None
    quick = EvaluationSpec(
        data=cells.spec.data,
        ablation=AblationSpec(
            device=cells.spec.ablation.device,
            memory_budget=cells.spec.ablation.memory_budget,
            modes=("keep_one",),
            baselines=False,
        ),
        permutation=PermutationSpec(n_permutations=1, method="moments", spatial_null="none", n_bootstrap=0),
    )
    try:
        with open_stored_model(last.model.uri) as stored:
            adata = from_anndata(find_dataset(last.model, stored, data_uri), backed=cells.spec.data.backed).adata
            untrained = [
                evaluate(untrained_like(stored.trained, seed=seed), adata, quick).moments for seed in _FLOOR_SEEDS
            ]
    except AmiciEvalError as error:
        logger.warning("untrained models could not be compared: %s", first_line(error))
        return None
    if untrained[0] is None or untrained[1] is None:
        return None
    return matched_similarity(similarity_of(untrained[0], untrained[1]))


def _tag_versions(models: Sequence[ResolvedModel], run_id: str) -> None:
    """Tag each version with the run of its newest comparison."""
    from mlflow import MlflowClient

    client = MlflowClient()
    for model in models:
        if model.name is None or model.version is None:
            continue
        tag = partial(client.set_model_version_tag, model.name, model.version, "amici_eval.comparison_run_id", run_id)
        with optional(f"version {model.version} could not be tagged with its comparison"):
            patiently(tag, what="tagging the version")
