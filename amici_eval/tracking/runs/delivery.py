"""Write a result to a local folder first, then send it to its run, so that nothing computed can be lost."""

from __future__ import annotations

import logging
import math
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amici_eval.common.errors import DataError, InvalidSpecError, OutputError, TrackingError
from amici_eval.common.files import is_disk_full
from amici_eval.common.text import mask_secrets, slugify
from amici_eval.tracking.runs.local_results import ARTIFACTS, RunRecord
from amici_eval.tracking.runs.tracked import mark_whole
from amici_eval.tracking.store import log_batches, optional, patiently, understood

if TYPE_CHECKING:
    from collections.abc import Sequence

    from amici_eval.results.evaluation import HeadEvaluation
    from amici_eval.settings.evaluation import ReportSpec

logger = logging.getLogger(__name__)

_LONGEST_PARAM, _LONGEST_TAG = 6000, 8000


def evaluation_metrics(evaluation: HeadEvaluation) -> dict[str, float]:
    """Return the metrics of a run; undefined values are left out and counted."""
    metrics: dict[str, float] = {}
    ablations, spatial, bounds = evaluation.ablations, evaluation.spatial, evaluation.intervals
    parts, trivial = evaluation.parts, evaluation.trivial
    of_heads = {"ev": evaluation.expl_var, "p_adj": evaluation.p_value_adj}
    of_types = {"ev_full_model": evaluation.expl_var_full, "ev_no_head": evaluation.expl_var_none}
    if ablations is not None and "shapley" in ablations.modes:
        of_heads["shapley"] = ablations.of("shapley")
    if spatial is not None:
        of_heads |= {"p_adj_spatial": spatial.p_value_adj, "ess": spatial.ess}
    if bounds is not None:
        of_heads |= {"ev_ci_low": bounds.low, "ev_ci_high": bounds.high}
    if parts is not None:
        of_heads["ev_held_out"], of_types["ev_full_model_held_out"] = parts.expl_var[1], parts.full[1]
    if trivial is not None:
        of_heads["gain"] = trivial.gain
    for index, cell_type in enumerate(evaluation.cell_types):
        slug = slugify(cell_type, evaluation.cell_types)
        metrics |= {f"{name}/{slug}": float(values[index]) for name, values in of_types.items()}
        for head in range(evaluation.n_heads):
            metrics |= {f"{name}/{slug}/head_{head}": float(values[head, index]) for name, values in of_heads.items()}
    if evaluation.parity is not None:
        metrics["parity/max_abs_difference"] = float(evaluation.parity)
    finite = [float(value) for value in evaluation.expl_var.ravel() if math.isfinite(value)]
    metrics["summary/n_cells"] = float(evaluation.n_cells.sum())
    metrics["summary/n_tests"] = float(evaluation.n_decided)
    metrics["summary/n_tests_free"] = float(evaluation.n_tests)
    metrics["summary/n_significant"] = float(evaluation.n_significant)
    metrics["summary/n_significant_free"] = float(evaluation.n_significant_free)
    metrics["summary/n_undefined"] = float(evaluation.p_value.size - evaluation.n_decided)
    metrics["summary/n_permutations"] = float(evaluation.n_permutations)
    metrics["summary/max_ev"] = max(finite, default=math.nan)
    # MLflow would store NaN as 0 and infinity as a number
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def metric_intervals(evaluation: HeadEvaluation) -> dict[str, tuple[float, float]]:
    """Return the confidence interval of each metric that has one, NaN where it is not known.

    That of ``gain`` is the interval of the head's explained variance minus what the predictor explains; the predictor's
    own uncertainty is not in it.
    """
    bounds, parts, trivial = evaluation.intervals, evaluation.parts, evaluation.trivial
    found: dict[str, tuple[float, float]] = {}
    for index, cell_type in enumerate(evaluation.cell_types):
        slug, missing = slugify(cell_type, evaluation.cell_types), (math.nan, math.nan)
        found[f"ev_full_model/{slug}"] = (
            missing if bounds is None else (float(bounds.full_low[index]), float(bounds.full_high[index]))
        )
        for head in range(evaluation.n_heads):
            own = missing if bounds is None else (float(bounds.low[head, index]), float(bounds.high[head, index]))
            found[f"ev/{slug}/head_{head}"] = own
            if parts is not None:
                ends = float(parts.low[1, head, index]), float(parts.high[1, head, index])
                found[f"ev_held_out/{slug}/head_{head}"] = ends
            if trivial is not None:
                less = float(evaluation.expl_var[head, index]) - float(trivial.gain[head, index])
                found[f"gain/{slug}/head_{head}"] = own[0] - less, own[1] - less
    return found


def evaluation_params(evaluation: HeadEvaluation) -> dict[str, str]:
    """Return the settings that determined the numbers, as ``cfg/...`` params."""
    params = {f"cfg/{name}": mask_secrets(value)[:_LONGEST_PARAM] for name, value in _flat(evaluation.spec.to_dict())}
    # the number that was used; the setting may be None, which stands for the default
    return {**params, "cfg/permutation.n_permutations": str(evaluation.n_permutations)}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{name}.")
        else:
            rows.append((f"{prefix}{name}", "" if value is None else str(value)))
    return rows


def run_tags(**model: str | None) -> dict[str, str]:
    """Return the tags by which a run of an evaluation names its model."""
    named = {f"amici_eval.{key}": mask_secrets(value) for key, value in model.items() if value is not None}
    return {"amici_eval.kind": "evaluation", **named}


def check_report(report: ReportSpec, cell_types: tuple[str, ...]) -> None:
    """Refuse settings that a run cannot hold, before anything is computed: unknown types or palettes, equal names."""
    named: dict[str, str] = {}
    for cell_type in cell_types:
        # names hold a 32-bit hash: they are equal only if somebody chose them so
        name = slugify(cell_type, cell_types)
        other = named.setdefault(name.lower(), cell_type)
        if other != cell_type:
            raise DataError(
                value=f"cell types {other!r} and {cell_type!r} have the same name {name} for files",
                rule="each type needs files and metrics of its own",
                fix="rename one of them in the data",
            )
    for cell_type in report.cell_types or ():
        if cell_type not in cell_types:
            raise InvalidSpecError(
                value=f"report.cell_types names {cell_type!r}",
                rule=f"the evaluated cells are of type {', '.join(cell_types)}",
                fix="choose among these",
            )
    if report.figures and report.palette is not None:
        from amici_eval.report.figures.drawing import type_colours

        type_colours(cell_types, report.palette)


def write_artifacts(
    evaluation: HeadEvaluation,
    folder: Path,
    *,
    report: ReportSpec,
    config_yaml: str,
) -> None:
    """Write the tables, figures and report of an evaluation, as a run holds them, into a folder."""
    from amici_eval.report.page.evaluation_page import write_html
    from amici_eval.report.tables import write_significance, write_tables

    folder.mkdir(parents=True, exist_ok=True)
    evaluation.save(folder)
    write_tables(evaluation, folder)
    write_significance(evaluation, folder)
    (folder / "config").mkdir(exist_ok=True)
    (folder / "config" / "resolved.yaml").write_text(config_yaml, encoding="utf-8")
    figures: dict[str, Path] = {}
    if report.figures:
        from amici_eval.report.figures.evaluation_figures import save_figures

        paths = save_figures(
            evaluation,
            folder / "figures",
            cell_types=report.cell_types,
            palette=report.palette,
            n_top_genes=report.n_top_genes,
            formats=report.formats,
        )
        figures = {path.stem: path for path in paths if path.suffix == ".svg"} or {
            path.stem: path for path in paths if path.suffix == ".png"
        }
    write_html(evaluation, folder, figures=figures)


def deliver(
    evaluation: HeadEvaluation,
    folder: Path,
    record: RunRecord,
    *,
    report: ReportSpec,
    config_yaml: str,
    log_metrics: bool = True,
    retry_s: float = 0.0,
) -> Path:
    """Write an evaluation into a folder, send it to its run, and return the folder; ``upload`` can send it again.

    Without ``log_metrics`` the caller logs the metrics of the record. If the folder is full or read-only, the results
    go to a temporary folder, which is returned.
    """
    try:
        whole = _write(evaluation, folder, record, report=report, config_yaml=config_yaml)
    except OSError as error:
        if not is_disk_full(error):
            raise
        full, folder = folder, Path(tempfile.mkdtemp(prefix=f"amici-eval-{record.run_id}-"))
        logger.warning("%s takes no more (%s): the results are written to %s", full, error.strerror or error, folder)
        try:
            whole = _write(evaluation, folder, record, report=report, config_yaml=config_yaml)
        except OSError as second:
            shutil.rmtree(folder, ignore_errors=True)
            raise OutputError(
                value=f"neither {full} nor {folder} takes the results ({second.strerror or second})",
                rule="they are written before they are sent",
                fix="make room and run the same command again: it takes up what could be kept",
            ) from second
    send(folder, whole if log_metrics else replace(whole, metrics={}), retry_s=retry_s)
    return folder


def _write(
    evaluation: HeadEvaluation, folder: Path, record: RunRecord, *, report: ReportSpec, config_yaml: str
) -> RunRecord:
    # artifacts of an earlier attempt, perhaps with other figures
    shutil.rmtree(folder / ARTIFACTS, ignore_errors=True)
    # numbers are saved before anything is drawn; moments are large and are written once, with the other artifacts
    replace(evaluation, moments=None).save(folder / ARTIFACTS)
    record.save(folder)
    try:
        write_artifacts(evaluation, folder / ARTIFACTS, report=report, config_yaml=config_yaml)
        whole = record.with_files(folder)
        whole.save(folder)
    except Exception as error:
        if not is_disk_full(error):
            record.with_files(folder, whole=False).save(folder)
            logger.error("not all artifacts could be written; what there is: amici-eval upload %s", folder)
        raise
    return whole


def send_written(folder: Path, record: RunRecord, *, retry_s: float) -> None:
    """Send a folder whose artifacts are all written, with a record of them beside them."""
    whole = record.with_files(folder)
    whole.save(folder)
    send(folder, whole, retry_s=retry_s)


def send(folder: Path, record: RunRecord, *, retry_s: float = 0.0) -> None:
    """Send a folder of results to its run; nothing is logged twice, and the folder stays if sending fails."""
    try:
        patiently(lambda: _send(folder, record), seconds=retry_s, what="sending the results")
    except KeyboardInterrupt:
        logger.error("interrupted while sending; all results are safe: amici-eval upload %s", folder)
        raise
    except Exception as error:
        fault = understood(error)
        if fault is None:
            logger.error("all results are safe in %s; to send them again: amici-eval upload %s", folder, folder)
            raise
        back = "when the tracking store is back, run the same command again, or"
        raise TrackingError(
            value=f"the run {record.run_id} could not be completed ({fault.said})",
            rule=f"all results are safe in {folder}; {fault.rule}",
            fix=f"{back if fault.passing else f'{fault.fix}, then'}: amici-eval upload {folder}",
        ) from error


def _send(folder: Path, record: RunRecord) -> None:
    from mlflow import MlflowClient
    from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelInput, Metric, Param, RunTag

    client = MlflowClient(tracking_uri=record.tracking_uri)
    run_id = record.run_id
    run = client.get_run(run_id)
    params = [Param(key, value) for key, value in record.params.items() if key not in run.data.params]
    tags = [RunTag(key, value[:_LONGEST_TAG]) for key, value in record.tags.items()]
    log_batches(client, run_id, params=params, tags=tags)
    if record.dataset is not None and not (run.inputs and run.inputs.dataset_inputs):
        datasets = [DatasetInput(Dataset(**record.dataset), tags=[InputTag("mlflow.data.context", "evaluation")])]
        models = [] if record.model_id is None else [LoggedModelInput(record.model_id)]
        client.log_inputs(run_id, datasets=datasets, models=models)
    metrics = [
        Metric(
            key,
            value,
            record.timestamp_ms,
            0,
            model_id=record.model_id,
            dataset_name=record.dataset["name"] if record.dataset else None,
            dataset_digest=record.dataset["digest"] if record.dataset else None,
            run_id=run_id,
        )
        for key, value in record.metrics.items()
        if key not in run.data.metrics
    ]
    metrics += [
        Metric(key, value, record.timestamp_ms, step)
        for key, values in record.series.items()
        for step, value in _missing_steps(client, run_id, key, values, there=key in run.data.metrics)
    ]
    log_batches(client, run_id, metrics=metrics)
    client.log_artifacts(run_id, str(folder / ARTIFACTS))
    _check_arrived(client, folder / ARTIFACTS, record)
    # last: a version or model that points to a run points to a complete one
    with optional("the model could not be tagged with its evaluation", unless_passing=True):
        if record.model_id is not None:
            client.set_logged_model_tags(record.model_id, {"amici_eval.evaluation_run_id": run_id})
        if record.model_name is not None and record.model_version is not None:
            client.set_model_version_tag(
                record.model_name, record.model_version, "amici_eval.evaluation_run_id", run_id
            )
    if record.whole:
        mark_whole(client, run_id)


def _check_arrived(client: Any, folder: Path, record: RunRecord) -> None:
    """Read back what was sent: MLflow takes any answer with 200 for a success, also a login page or an empty one."""
    held = client.get_run(record.run_id).data
    lacking = {*record.params, *record.metrics, *record.series, *record.tags}
    lacking -= {*held.params, *held.metrics, *held.tags}
    # a user may be allowed to write to a store of artifacts and not to list it
    with optional("what was sent could not be listed", unless_passing=True):
        for path in (folder, *(one for one in folder.rglob("*") if one.is_dir())):
            within = path.relative_to(folder).as_posix()
            there = {item.path for item in client.list_artifacts(record.run_id, None if path == folder else within)}
            lacking |= {one.relative_to(folder).as_posix() for one in path.iterdir() if one.is_file()} - there
    if lacking:
        shown = ", ".join(sorted(lacking)[:3])
        msg = (
            f"the store took what was sent, and does not hold {shown} ({len(lacking)} in all): a login page or a proxy "
            "may answer in its place"
        )
        raise ConnectionError(msg)


def _missing_steps(
    client: Any, run_id: str, key: str, values: Sequence[tuple[int, float]], *, there: bool
) -> Sequence[tuple[int, float]]:
    """Return what a run does not hold yet of a metric with several steps."""
    if not there:
        return values
    held = {point.step for point in client.get_metric_history(run_id, key)}
    return [(step, value) for step, value in values if step not in held]
