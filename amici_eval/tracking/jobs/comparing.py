"""The job behind ``compare``: evaluate versions on the same cells unless that was done before, compare, save, log."""

from __future__ import annotations

import logging
import math
import re
import tempfile
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from amici_eval.common.errors import AmiciEvalError, DataError, InvalidSpecError, ModelNotFoundError, first_line
from amici_eval.common.text import markdown, slugify
from amici_eval.common.threads import check_compiler
from amici_eval.comparison.pipeline import compare, matched_similarity
from amici_eval.comparison.version_pairs import similarity_of
from amici_eval.report.comparison_sentences import comparison_sentences
from amici_eval.report.page.comparison_page import write_comparison_html
from amici_eval.report.tables import write_comparison_tables
from amici_eval.results.comparison import FailedVersion
from amici_eval.results.evaluation import FILE_NAME
from amici_eval.results.moments import MOMENTS_FILE
from amici_eval.settings.evaluation import AblationSpec, EvaluationSpec, PermutationSpec, SubsetSpec
from amici_eval.tracking.flavor import open_stored_model
from amici_eval.tracking.jobs.evaluating import Opened, evaluate_opened, open_dataset
from amici_eval.tracking.registry import connect_to, resolve_model, tag_version
from amici_eval.tracking.runs.delivery import send_written
from amici_eval.tracking.runs.local_results import ARTIFACTS, RunRecord, checked_output, remove_local, run_folder
from amici_eval.tracking.runs.tracked import NOTE_TAG, PARENT_RUN_VARIABLE, environment, tracked_run
from amici_eval.tracking.runs.unfinished import download_evaluation, find_evaluation
from amici_eval.tracking.store import version_numbers

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from anndata import AnnData
    from jaxtyping import Bool, Float64

    from amici_eval.results.comparison import HeadComparison
    from amici_eval.settings.comparison import ComparisonSpec
    from amici_eval.settings.evaluation import ReportSpec
    from amici_eval.tracking.jobs import JobOptions
    from amici_eval.tracking.registry import ResolvedModel

logger = logging.getLogger(__name__)

MIN_HELD_OUT = 50
"""Least number of held-out cells that some type must have, or all cells are compared."""
_LATEST = re.compile(r"latest(?::(\d+))?")
_FLOOR_SEEDS = (1, 2)


@dataclass(frozen=True, kw_only=True)
class Column:
    """One evaluation to compare: that of a model, perhaps on data of its own, or without a model that of a run."""

    label: str
    model: ResolvedModel | None = None
    data_uri: str | None = None
    run_id: str = ""


@dataclass(frozen=True, kw_only=True)
class ComparedCells:
    """The cells that are compared, as settings and in words.

    ``opened``: versions by label, on the data that they share; ``failed``: those that cannot be read.
    """

    spec: EvaluationSpec
    text: str = "all evaluated cells"
    notes: tuple[str, ...] = ()
    opened: Mapping[str, Opened] = field(default_factory=dict)
    failed: tuple[FailedVersion, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ColumnEvaluation:
    """The evaluation of a column in a local folder, its run, and whether it existed before."""

    column: Column
    folder: Path
    run_id: str
    reused: bool


@dataclass(frozen=True, kw_only=True)
class GatheredEvaluations:
    """Evaluations in the order of their columns, and what failed and why."""

    evaluated: tuple[ColumnEvaluation, ...]
    failed: tuple[FailedVersion, ...]

    @property
    def labels(self) -> list[str]:
        """Labels of the columns."""
        return [one.column.label for one in self.evaluated]

    def of(self, column: Column) -> ColumnEvaluation | None:
        """Return the evaluation of a column, ``None`` if it failed."""
        return next((one for one in self.evaluated if one.column == column), None)

    def why_failed(self, column: Column) -> str:
        """Return why a column could not be evaluated."""
        return next((one.reason for one in self.failed if one.label == column.label), "unknown reason")

    def compared(self, spec: ComparisonSpec, **more: Any) -> HeadComparison:
        """Compare the evaluations, which must be two at least."""
        return compare(
            [one.folder for one in self.evaluated],
            spec,
            labels=self.labels,
            run_ids=[one.run_id for one in self.evaluated],
            reused=[one.reused for one in self.evaluated],
            **more,
        )


def model_uris(models: Sequence[str], versions: Sequence[str]) -> list[str]:
    """Return the URIs of registered versions."""
    from mlflow import MlflowClient

    uris: list[str] = []
    for model in models:
        if ":" in model or "/" in model:
            uris.append(model)
            continue
        for version in versions:
            name = version.strip()
            if name.startswith("@") or name.isdigit():
                uris.append(f"models:/{model}{name}" if name.startswith("@") else f"models:/{model}/{name}")
            elif name == "all" or _LATEST.fullmatch(name):
                numbers = version_numbers(MlflowClient(), model)
                if not numbers:
                    resolve_model(f"models:/{model}/1")  # says what there is instead
                match = _LATEST.fullmatch(name)
                uris += [f"models:/{model}/{number}" for number in numbers[-int(match[1] or 1) if match else 0 :]]
            else:
                raise InvalidSpecError(
                    value=f"versions names {version!r}",
                    rule="a version is a number, @alias, latest:N or all",
                    fix="write versions=[1,2], versions=[1,@champion], versions=latest:5 or versions=all",
                )
    return list(dict.fromkeys(uris))


def columns_of(uris: Sequence[str], runs: Sequence[str], datasets: Sequence[str]) -> list[Column]:
    """Return what is to be compared, in order."""
    if datasets and (len(uris) != 1 or runs):
        raise InvalidSpecError(
            value=f"datasets with {len(uris)} versions" + (" and runs" if runs else ""),
            rule="several data sets are compared for one version",
            fix="name one version, or give one data set as data.uri",
        )
    columns = [Column(label=f"run {run_id[:8]}", run_id=run_id) for run_id in runs]
    for uri in uris:
        model = resolve_model(uri)
        if datasets:
            columns += [Column(label=Path(one).stem or one, model=model, data_uri=one) for one in datasets]
        else:
            columns.append(Column(label=label_of(model), model=model))
    # two names of one version are one version
    columns = list({(one.label, one.run_id, one.data_uri): one for one in columns}.values())
    if len(columns) < 2:
        raise InvalidSpecError(
            value=f"{len(columns)} version{'s' * (len(columns) != 1)} to compare",
            rule="a comparison needs at least two versions, runs or data sets",
            fix="name more: versions=[1,2], versions=all, runs=[ID,ID] or datasets=[A.h5ad,B.h5ad]",
        )
    return columns


def label_of(model: ResolvedModel) -> str:
    """Return how a comparison calls a model."""
    return f"{model.name} {model.version}" if model.name else model.model_id or model.uri


@contextmanager
def compared_cells(
    columns: Sequence[Column], spec: EvaluationSpec, comparison: ComparisonSpec, data_uri: str | None
) -> Iterator[ComparedCells]:
    """Open versions and the data that they share, and choose the cells that none was fitted on, if there are enough."""
    from amici_eval.data.checks import chosen_cells, obs_column
    from amici_eval.data.tissue import prepare

    subset = spec.data.subset
    wanted = comparison.cells != "all" and subset.held_out is None and not subset.buffer
    versions = [(one.label, one.model) for one in columns if one.model is not None and one.data_uri is None]
    if not versions:
        yield ComparedCells(spec=spec)
        return
    dataset, labels_key, choice_is_sound = None, spec.data.labels_key or "", False
    opened: dict[str, Opened] = {}
    failed: list[FailedVersion] = []
    fitted: list[Bool[np.ndarray, " cells"] | None] = []
    with ExitStack() as folder_of_data:
        for label, model in versions:
            try:
                with ExitStack() as folder:
                    stored = folder.enter_context(open_stored_model(model.uri))
                    card = stored.trained.card
                    if dataset is None:
                        dataset = open_dataset(model, stored, data_uri, backed=spec.data.backed)
                        # the data may be bundled with this model
                        folder_of_data.enter_context(folder.pop_all())
                        labels_key = labels_key or card.labels_key
                    chosen_cells(dataset.adata, subset)
                    obs_column(dataset.adata, labels_key, "cell types")
                    choice_is_sound = True
                    if wanted:
                        fitted.append(prepare(dataset.adata, card, spec.data).fitted)
                    opened[label] = Opened.of(replace(model, asked=model.uri), stored, dataset)
            except AmiciEvalError as error:
                if not choice_is_sound and isinstance(error, DataError):
                    raise
                failed.append(FailedVersion(label=label, reason=str(error)))
        if dataset is None:
            raise ModelNotFoundError(
                value=f"none of {len(versions)} versions can be read ({failed[0].reason})",
                rule="each must be a model that amici_eval registered",
                fix="register them again",
            )
        cells = ComparedCells(spec=spec)
        if wanted:
            cells = _new_cells(dataset.adata, labels_key, spec, fitted, required=comparison.cells == "held_out")
        yield replace(cells, opened=opened, failed=tuple(failed))


def _new_cells(
    adata: AnnData,
    labels_key: str,
    spec: EvaluationSpec,
    fitted: Sequence[Bool[np.ndarray, " cells"] | None],
    *,
    required: bool,
) -> ComparedCells:
    """Choose the cells that no version was fitted on, or all if these are too few or not known, unless required."""
    from amici_eval.data.checks import chosen_cells, obs_column

    known = [one for one in fitted if one is not None]
    if len(known) < len(fitted):
        if required:
            raise DataError(
                value="compare.cells=held_out",
                rule="for some version it is not known which cells it was fitted on",
                fix="register it again together with its data, or set compare.cells=all",
            )
        return ComparedCells(
            spec=spec,
            text="all evaluated cells; it is not known which of them the versions were fitted on",
            notes=("it is not known for all versions which cells they were fitted on: read everything as in-sample",),
        )
    chosen = chosen_cells(adata, spec.data.subset)
    labels = obs_column(adata, labels_key, "cell types").astype(str).to_numpy()
    new = chosen & ~np.logical_or.reduce(known)
    most = max(np.unique(labels[new], return_counts=True)[1], default=0)
    if most >= (1 if required else MIN_HELD_OUT):
        rows = tuple(np.flatnonzero(new).tolist())
        return ComparedCells(
            spec=replace(spec, data=replace(spec.data, subset=SubsetSpec(indices=rows))),
            text=f"{len(rows):,} cells that no compared version was fitted on",
        )
    if required:
        raise DataError(
            value="compare.cells=held_out",
            rule="each cell was used to fit some compared version",
            fix="set compare.cells=all; everything is then in-sample",
        )
    return ComparedCells(
        spec=spec,
        text="all evaluated cells, in-sample",
        notes=(
            f"only {int(new.sum())} of {int(chosen.sum())} cells were used to fit none of the versions, at most {most} "
            f"of a cell type, and {MIN_HELD_OUT} of some type are needed: all cells are compared, in-sample, where "
            "each version is flattered by the cells that it was fitted on",
        ),
    )


@dataclass(frozen=True, kw_only=True)
class EvaluationsRun:
    """A run of what is made of several evaluations; ``found``: their folders are there as long as the run is open."""

    run_id: str
    tracking_uri: str
    tags: Mapping[str, str]
    folder: Path
    retry_s: float
    cells: ComparedCells
    found: GatheredEvaluations

    def send(self, tags: Mapping[str, str], **contents: Any) -> None:
        """Send the artifacts in the folder, tags, and further contents of the run."""
        tags = {**self.tags, **tags}
        record = RunRecord(tracking_uri=self.tracking_uri, run_id=self.run_id, tags=tags, **contents)
        send_written(self.folder, record, retry_s=self.retry_s)


@contextmanager
def evaluations_run(
    columns: Sequence[Column],
    comparison: ComparisonSpec,
    options: JobOptions,
    *,
    tracking_uri: str,
    data_uri: str | None,
    name: str,
    tags: Mapping[str, str],
    need_moments: bool,
) -> Iterator[EvaluationsRun]:
    """Start a run, and evaluate each column in a child run of it unless that was done before."""
    tracking = options.tracking
    check_compiler()
    output = checked_output(tracking.output_dir)
    with (
        compared_cells(columns, options.spec, comparison, data_uri) as cells,
        tracked_run(tracking, name=name, tags=dict(tags)) as run,
        run_folder(output, run.info.run_id) as folder,
        tempfile.TemporaryDirectory(prefix="evaluations-", dir=folder) as staging,
    ):
        own = replace(options, spec=cells.spec, tracking=replace(tracking, run_name=None, keep_local=False))
        # runs that are started meanwhile are children of this one
        with environment({PARENT_RUN_VARIABLE: run.info.run_id, "MLFLOW_EXPERIMENT_ID": run.info.experiment_id}):
            found = _gather(columns, cells, Path(staging), own, tracking_uri, need_moments=need_moments)
        yield EvaluationsRun(
            run_id=run.info.run_id,
            tracking_uri=tracking_uri,
            tags=tags,
            folder=folder,
            retry_s=tracking.retry_s,
            cells=cells,
            found=found,
        )
    if not tracking.keep_local:
        remove_local(folder, with_parent=output.made)


def _gather(
    columns: Sequence[Column],
    cells: ComparedCells,
    staging: Path,
    options: JobOptions,
    tracking_uri: str,
    *,
    need_moments: bool,
) -> GatheredEvaluations:
    """Put the evaluation of each column into a folder; one that fails is recorded, and the others go on."""
    evaluated: list[ColumnEvaluation] = []
    failed = list(cells.failed)
    unreadable = {one.label for one in failed}
    for number, column in enumerate(columns):
        if column.label in unreadable:
            continue
        try:
            found = _evaluation_in(staging / str(number), column, cells, options, tracking_uri)
            if need_moments and not (found.folder / MOMENTS_FILE).is_file():
                raise DataError(
                    value=f"run {found.run_id} holds no {MOMENTS_FILE}",
                    rule="heads are matched by what the factored engine keeps of its pass over the cells",
                    fix="evaluate it with ablation.engine=factored, on data with coordinates",
                )
            evaluated.append(found)
        except AmiciEvalError as error:
            logger.error("%s could not be evaluated and is left out: %s", column.label, error)
            failed.append(FailedVersion(label=column.label, reason=str(error)))
    return GatheredEvaluations(evaluated=tuple(evaluated), failed=tuple(failed))


def _evaluation_in(
    folder: Path, column: Column, cells: ComparedCells, options: JobOptions, tracking_uri: str
) -> ColumnEvaluation:
    """Put the evaluation of a column into a folder, a new one unless there is one already."""
    folder.mkdir()
    found = partial(ColumnEvaluation, column=column, folder=folder)
    if column.model is None:
        if not download_evaluation(column.run_id, folder):
            raise DataError(
                value=f"run {column.run_id} holds no {FILE_NAME}",
                rule="it must be a run of amici-eval evaluate that ended well",
                fix="give the id of such a run",
            )
        return found(run_id=column.run_id, reused=True)
    with ExitStack() as stack:
        opened = cells.opened.get(column.label)
        if opened is None:
            # each data set of its own is closed before the next is opened
            stored = stack.enter_context(open_stored_model(column.model.uri))
            dataset = open_dataset(column.model, stored, column.data_uri, backed=options.spec.data.backed)
            opened = Opened.of(replace(column.model, asked=column.model.uri), stored, dataset)
        if options.tracking.reuse:
            there = find_evaluation(opened.fingerprint(options.spec))
            if there is not None and download_evaluation(there, folder):
                logger.info("%s: evaluated before, taken from run %s", column.label, there)
                return found(run_id=there, reused=True)
        result = evaluate_opened(opened, options, tracking_uri=tracking_uri)
    result.evaluation.save(folder)
    return found(run_id=result.run_id, reused=False)


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
    comparison: ComparisonSpec,
    options: JobOptions,
) -> ComparisonRun:
    """Compare versions of models on the same cells, or one version on several data sets, and log that to a run."""
    tracking_uri = connect_to(options.tracking)
    columns = columns_of(model_uris(models, versions), runs, datasets)
    with evaluations_run(
        columns,
        comparison,
        options,
        tracking_uri=tracking_uri,
        data_uri=data_uri,
        name="compare",
        tags={"amici_eval.kind": "comparison"},
        need_moments=not datasets,
    ) as run:
        found = run.found
        if len(found.evaluated) < 2:
            reasons = "; ".join(f"{one.label}: {one.reason}" for one in found.failed)
            raise DataError(
                value=f"{len(found.evaluated)} of {len(columns)} evaluations are there ({reasons})",
                rule="a comparison needs at least two",
                fix="mend what failed, or compare other versions",
            )
        result = found.compared(
            comparison,
            failed=found.failed,
            floor=_floor(found, run.cells) if comparison.floor else None,
            cells=run.cells.text,
            notes=run.cells.notes,
            progress=options.progress,
        )
        write_comparison(result, run.folder / ARTIFACTS, report=options.report, config_yaml=options.config_yaml)
        run.send(
            {NOTE_TAG: "\n".join(f"- {markdown(one)}" for one in comparison_sentences(result))},
            params={"cfg/compare.cells": result.cells, **comparison_params(comparison)},
            series=comparison_series(result),
        )
        for one in found.evaluated:
            if one.column.model is not None:
                tag_version(one.column.model, {"amici_eval.comparison_run_id": run.run_id}, "its comparison")
    return ComparisonRun(
        comparison=result,
        run_id=run.run_id,
        tracking_uri=tracking_uri,
        folder=run.folder if options.tracking.keep_local else None,
    )


def _floor(found: GatheredEvaluations, cells: ComparedCells) -> Float64[np.ndarray, " heads"] | None:
    """Return how alike the heads of two untrained models of the last version's architecture are."""
    from amici_eval.evaluation.pipeline import evaluate
    from amici_eval.model.checkpoint import untrained_like

    last = next((cells.opened[label] for label in reversed(found.labels) if label in cells.opened), None)
    if last is None:
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
        untrained = [
            evaluate(untrained_like(last.stored.trained, seed=seed), last.dataset.adata, quick).moments
            for seed in _FLOOR_SEEDS
        ]
    except AmiciEvalError as error:
        logger.warning("untrained models could not be compared: %s", first_line(error))
        return None
    if untrained[0] is None or untrained[1] is None:
        return None
    return matched_similarity(similarity_of(untrained[0], untrained[1]))
