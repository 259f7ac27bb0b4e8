"""From a result to a run: written to a local folder first, then sent, so that nothing computed can be lost."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from amici_eval.durable import FolderLock, is_disk_full, write_text_durably
from amici_eval.errors import DataError, OutputError, TrackingError, first_line, mask_secrets
from amici_eval.moments import MOMENTS_FILE
from amici_eval.tracking.patience import is_passing, patiently
from amici_eval.tracking.run_contents import write_artifacts
from amici_eval.tracking.tracked_run import mark_whole

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from amici_eval.results import HeadEvaluation
    from amici_eval.specs import ReportSpec

__all__ = [
    "RunRecord",
    "check_writable",
    "deliver",
    "output_folder",
    "send",
    "upload",
]

logger = logging.getLogger(__name__)

RECORD_FILE = "upload.json"
ARTIFACTS = "artifacts"
_METRICS_PER_BATCH = 1000
_PARAMS_PER_BATCH = 100
_LONGEST_TAG = 8000


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What has to be sent to a run besides its files.

    Parameters
    ----------
    tracking_uri, run_id
        The run.
    params, metrics, tags
        As logged.
    dataset
        The dataset input as text fields (name, digest, source, source_type, profile); ``None`` if MLflow logs it.
    model_id
        Logged model that the metrics belong to.
    model_name, model_version
        Registered version that gets tags pointing back to the run.
    timestamp_ms
        Time of the metrics.
    series
        Metrics with a value for several steps, as (step, value).
    files
        SHA-256 of each artifact by its path in the folder; ``None``: not all artifacts are written.
    """

    tracking_uri: str
    run_id: str
    params: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    dataset: Mapping[str, str] | None = None
    model_id: str | None = None
    model_name: str | None = None
    model_version: str | None = None
    timestamp_ms: int = field(default_factory=lambda: int(time.time() * 1000))
    series: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    files: Mapping[str, str] | None = None

    def save(self, folder: Path) -> None:
        """Write the record beside the artifacts, without the credentials of the tracking URI."""
        folder.mkdir(parents=True, exist_ok=True)
        values = {**asdict(self), "tracking_uri": mask_secrets(self.tracking_uri)}
        write_text_durably(folder / RECORD_FILE, json.dumps(values, indent=1))

    def with_files(self, folder: Path) -> RunRecord:
        """Return the record of a folder whose artifacts are all written."""
        return replace(self, files=_sums(folder / ARTIFACTS))

    def check_files(self, folder: Path) -> None:
        """Refuse artifacts that are not those that were written.

        Raises
        ------
        OutputError
            If one is missing or altered.
        """
        there = _sums(folder / ARTIFACTS)
        for name, expected in (self.files or {}).items():
            if there.get(name) != expected:
                state = "missing" if name not in there else "not as it was written (SHA-256 differs)"
                raise OutputError(
                    value=f"{folder / ARTIFACTS / name} is {state}",
                    rule="only whole results are sent",
                    fix="run the same command again: it takes up what is whole, and computes the rest",
                )

    @classmethod
    def load(cls, folder: Path) -> RunRecord:
        """Read a record back.

        Raises
        ------
        OutputError
            If the folder holds none.
        """
        try:
            return cls(**json.loads((folder / RECORD_FILE).read_text(encoding="utf-8")))
        except (OSError, TypeError, ValueError, RecursionError) as error:
            raise OutputError(
                value=f"{folder} holds no readable {RECORD_FILE} ({type(error).__name__})",
                rule="it must be the folder that an interrupted evaluation named",
                fix="give that folder",
            ) from error


def _sums(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@dataclass(frozen=True)
class OutputFolder:
    """The folder below which results are written.

    Parameters
    ----------
    path
        Absolute.
    made
        Whether it was made for this job.
    """

    path: Path
    made: bool


@contextlib.contextmanager
def output_folder(output_dir: str) -> Iterator[OutputFolder]:
    """Make the folder for results, or refuse it; one that was made for a body that left nothing in it goes again.

    Raises
    ------
    OutputError
        If it cannot be written.
    """
    path = Path(output_dir).absolute()
    made = not path.exists()
    check_writable(path)
    try:
        yield OutputFolder(path, made)
    finally:
        if made:
            with contextlib.suppress(OSError):
                path.rmdir()


def check_writable(folder: Path) -> None:
    """Make a folder and refuse one that cannot be written, before any long work."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # a name of its own: jobs of a sweep share the folder
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(
            value=f"{folder} cannot be written ({error.strerror or error})",
            rule="results are kept there until they are sent",
            fix="choose another folder with tracking.output_dir=...",
        ) from error


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
    """Write an evaluation into a folder and send it to its run; whatever fails, ``upload`` can send what there is.

    Parameters
    ----------
    evaluation, folder, record
        What to deliver, by way of which local folder, to which run.
    report, config_yaml
        What to draw, and the settings to keep with it.
    log_metrics
        ``False`` if the caller logs the metrics of the record; ``upload`` logs them in any case.
    retry_s
        As for :func:`send`.

    Returns
    -------
    Path
        The folder it was written into: one for temporary files where ``folder`` takes no more.

    Raises
    ------
    OutputError
        If there is no room for the results, neither there nor among temporary files.
    TrackingError
        If the store fails; the message says how to go on.
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
            logger.error("not all artifacts could be written; what there is: amici-eval upload %s", folder)
        raise
    return whole


def send(folder: Path, record: RunRecord, *, retry_s: float = 0.0) -> None:
    """Send a folder of results to its run; what is there already is not logged twice.

    Parameters
    ----------
    folder, record
        What to send.
    retry_s
        Seconds for which a store that is away is asked again.

    Raises
    ------
    TrackingError
        If the store fails half way; the folder stays and the message says how to go on.
    """
    try:
        patiently(lambda: _send(folder, record), seconds=retry_s, what="sending the results")
    except KeyboardInterrupt:
        logger.error("interrupted while sending; all results are safe: amici-eval upload %s", folder)
        raise
    except Exception as error:
        raise TrackingError(
            value=f"the run {record.run_id} could not be completed ({first_line(error)})",
            rule=f"all results are safe in {folder}",
            fix=f"when the tracking store is back, run: amici-eval upload {folder}",
        ) from error


def _send(folder: Path, record: RunRecord) -> None:
    from mlflow import MlflowClient
    from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelInput, Metric, Param, RunTag
    from mlflow.exceptions import MlflowException

    client = MlflowClient(tracking_uri=record.tracking_uri)
    run_id = record.run_id
    run = client.get_run(run_id)
    params = [Param(key, value) for key, value in record.params.items() if key not in run.data.params]
    for start in range(0, len(params), _PARAMS_PER_BATCH):
        client.log_batch(run_id, params=params[start : start + _PARAMS_PER_BATCH])
    client.log_batch(run_id, tags=[RunTag(key, value[:_LONGEST_TAG]) for key, value in record.tags.items()])
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
        if key not in run.data.metrics
        for step, value in values
    ]
    for start in range(0, len(metrics), _METRICS_PER_BATCH):
        client.log_batch(run_id, metrics=metrics[start : start + _METRICS_PER_BATCH])
    client.log_artifacts(run_id, str(folder / ARTIFACTS))
    # last: a version or model that points to a run points to a complete one
    try:
        if record.model_id is not None:
            client.set_logged_model_tags(record.model_id, {"amici_eval.evaluation_run_id": run_id})
        if record.model_name is not None and record.model_version is not None:
            client.set_model_version_tag(
                record.model_name, record.model_version, "amici_eval.evaluation_run_id", run_id
            )
    except MlflowException as error:
        # a user may read a model and not write to it; the run itself is complete
        if is_passing(error):
            raise
        logger.warning("the model could not be tagged with its evaluation: %s", first_line(error))
    if record.files is not None:
        mark_whole(client, run_id)


def upload(folder: Path, *, retry_s: float = 0.0) -> str:
    """Finish the run of an evaluation that could not be sent, and return its id; the folder stays.

    Parameters
    ----------
    folder
        The folder that the evaluation named.
    retry_s
        As for :func:`send`.

    Raises
    ------
    OutputError
        If the folder holds no results, partial ones, or damaged ones, or an evaluation is still at work there.
    TrackingError
        If the store still fails.
    """
    from mlflow import MlflowClient

    from amici_eval.tracking.registry import connect
    from amici_eval.tracking.unfinished import RESUME_FILE, forget_parts

    if (folder / RESUME_FILE).is_file() and not (folder / RECORD_FILE).exists():
        raise OutputError(
            value=f"{folder} holds partial results",
            rule="only an evaluation that is through can be sent",
            fix="run the same command again: it goes on from there, and sends them",
        )
    record = RunRecord.load(folder)
    record.check_files(folder)
    lock = FolderLock.take(folder)
    if lock is None and (folder / RESUME_FILE).is_file():
        raise OutputError(
            value=f"an evaluation is at work in {folder}", rule="it sends its results itself", fix="wait for its end"
        )
    if "***" in record.tracking_uri:
        # credentials are not kept: MLFLOW_TRACKING_URI must give them
        record = replace(record, tracking_uri=connect(None))
    else:
        connect(record.tracking_uri)
    try:
        if record.files is None:
            logger.warning("not all artifacts were written: the run is marked as partial")
        send(folder, record, retry_s=retry_s)
        MlflowClient(tracking_uri=record.tracking_uri).set_terminated(record.run_id, "FINISHED")
        if record.files is not None:
            forget_parts(folder)
    finally:
        if lock is not None:
            lock.release(remove=True)
    return record.run_id


def load_evaluation(run_id: str, *, tracking_uri: str | None = None) -> HeadEvaluation:
    """Return the evaluation that a run holds, with its moments if it holds them.

    Raises
    ------
    DataError
        If the run holds none.
    """
    import mlflow.artifacts

    from amici_eval.results import FILE_NAME, HeadEvaluation

    there = {item.path for item in mlflow.artifacts.list_artifacts(run_id=run_id, tracking_uri=tracking_uri)}
    if FILE_NAME not in there:
        raise DataError(
            value=f"run {run_id} holds no {FILE_NAME}",
            rule="it must be a run that amici_eval wrote and completed",
            fix="give the id of such a run, or complete it with: amici-eval upload DIR",
        )
    with tempfile.TemporaryDirectory(prefix="amici-eval-") as scratch:
        for name in sorted({FILE_NAME, MOMENTS_FILE} & there):
            mlflow.artifacts.download_artifacts(
                run_id=run_id, artifact_path=name, dst_path=scratch, tracking_uri=tracking_uri
            )
        return HeadEvaluation.load(scratch)


def remove_local(folder: Path, *, with_parent: bool) -> None:
    """Remove the local copy of what was sent, and the folder above if that was made for it and is empty."""
    shutil.rmtree(folder, ignore_errors=True)
    if with_parent:
        with contextlib.suppress(OSError):
            folder.parent.rmdir()
