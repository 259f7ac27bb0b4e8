"""From a result to a run: written to a local folder first, then sent, so that nothing computed can be lost."""

from __future__ import annotations

import logging
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amici_eval.common.errors import OutputError, TrackingError
from amici_eval.common.files import is_disk_full
from amici_eval.tracking.runs.contents import write_artifacts
from amici_eval.tracking.runs.local_results import ARTIFACTS, RunRecord
from amici_eval.tracking.runs.tracked import mark_whole
from amici_eval.tracking.store.errors import optional, patiently, understood

if TYPE_CHECKING:
    from collections.abc import Sequence

    from amici_eval.results.evaluation import HeadEvaluation
    from amici_eval.settings.evaluation import ReportSpec

__all__ = ["deliver", "send"]

logger = logging.getLogger(__name__)

_METRICS_PER_BATCH = 1000
_PARAMS_PER_BATCH = 100
_LONGEST_TAG = 8000


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

    Without ``log_metrics`` the caller logs the metrics of the record. Where the folder takes no more, the results go to
    one for temporary files.
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
    # of an earlier attempt, perhaps with other figures
    shutil.rmtree(folder / ARTIFACTS, ignore_errors=True)
    # the numbers first, before anything is drawn; moments are large and follow once, with the other artifacts
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


def send(folder: Path, record: RunRecord, *, retry_s: float = 0.0) -> None:
    """Send a folder of results to its run; what is there is not logged twice, and what fails stays in the folder."""
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
    for start in range(0, len(params), _PARAMS_PER_BATCH):
        client.log_batch(run_id, params=params[start : start + _PARAMS_PER_BATCH], synchronous=True)
    tags = [RunTag(key, value[:_LONGEST_TAG]) for key, value in record.tags.items()]
    client.log_batch(run_id, tags=tags, synchronous=True)
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
    for start in range(0, len(metrics), _METRICS_PER_BATCH):
        client.log_batch(run_id, metrics=metrics[start : start + _METRICS_PER_BATCH], synchronous=True)
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
    # one may be allowed to write to a store of artifacts, and not to list it
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
