"""Finish a run from its local folder, and read an evaluation back from a run."""

from __future__ import annotations

import logging
import os
import tempfile
from dataclasses import replace
from typing import TYPE_CHECKING

from amici_eval.common.errors import DataError, OutputError
from amici_eval.common.files import FolderLock
from amici_eval.results.tile_sums import MOMENTS_FILE
from amici_eval.tracking.runs.delivery import send
from amici_eval.tracking.runs.local_results import RECORD_FILE, RunRecord
from amici_eval.tracking.runs.tracked import PARTIAL_TAG

if TYPE_CHECKING:
    from pathlib import Path

    from amici_eval.results.evaluation import HeadEvaluation

logger = logging.getLogger(__name__)


def upload(folder: Path, *, retry_s: float = 0.0) -> str:
    """Finish the run of an evaluation that could not be sent, and return its id; the folder stays."""
    from mlflow import MlflowClient

    from amici_eval.tracking.registry import connect
    from amici_eval.tracking.runs.unfinished import RESUME_FILE, forget_parts

    if (folder / RESUME_FILE).is_file() and not (folder / RECORD_FILE).exists():
        raise OutputError(
            value=f"{folder} holds partial results",
            rule="only an evaluation that is through can be sent",
            fix="run the same command again: it goes on from there, and sends them",
        )
    record = RunRecord.load(folder)
    record.check_files(folder)
    masked = "***" in record.tracking_uri
    if masked and not os.environ.get("MLFLOW_TRACKING_URI"):
        raise OutputError(
            value=f"the store is {record.tracking_uri}",
            rule="its credentials are not kept in the folder",
            fix="set MLFLOW_TRACKING_URI to its whole address",
        )
    lock = FolderLock.take(folder)
    if lock is None and (folder / RESUME_FILE).is_file():
        raise OutputError(
            value=f"an evaluation is at work in {folder}", rule="it sends its results itself", fix="wait for its end"
        )
    try:
        record = replace(record, tracking_uri=connect(None if masked else record.tracking_uri))
        send(folder, record, retry_s=retry_s)
        client = MlflowClient(tracking_uri=record.tracking_uri)
        client.set_terminated(record.run_id, "FINISHED" if record.whole else "FAILED")
        if record.whole:
            forget_parts(folder)
        else:
            client.set_tag(record.run_id, PARTIAL_TAG, "not all artifacts could be written")
            logger.warning("not all artifacts could be written: run %s is FAILED and marked as partial", record.run_id)
    finally:
        if lock is not None:
            lock.release(remove=True)
    return record.run_id


def load_evaluation(run_id: str, *, tracking_uri: str | None = None) -> HeadEvaluation:
    """Return the evaluation that a run holds, with its moments if it holds them."""
    import mlflow.artifacts

    from amici_eval.results.evaluation import FILE_NAME, HeadEvaluation

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
