"""Evaluations that exist already: found again by what was evaluated on what, and how."""

from __future__ import annotations

import hashlib
import json
import logging
from typing import TYPE_CHECKING

from amici_eval import __version__
from amici_eval.common.errors import first_line
from amici_eval.results.evaluation import FILE_NAME, SCHEMA_VERSION
from amici_eval.results.tile_sums import MOMENTS_FILE
from amici_eval.settings.evaluation import settings_that_matter
from amici_eval.tracking.store.errors import asked_again, patiently, store_errors
from amici_eval.tracking.store.searching import runs_anywhere

if TYPE_CHECKING:
    from pathlib import Path

    from amici_eval.settings.evaluation import EvaluationSpec

__all__ = ["FINGERPRINT_TAG", "download_evaluation", "find_evaluation", "fingerprint", "resume_key"]

logger = logging.getLogger(__name__)

FINGERPRINT_TAG = "amici_eval.fingerprint"


def fingerprint(*, model: str, digest: str, spec: EvaluationSpec) -> str:
    """Return what evaluations share that give the same numbers; ``model`` is the id of the logged model, or its URI."""
    text = json.dumps([SCHEMA_VERSION, model, digest, settings_that_matter(spec)], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def resume_key(same: str, *, files: str, device: str, launch: str) -> str:
    """Return what evaluations share that may take up each other's finished parts."""
    # a model in a folder may have other files next time; workers have one thread each, whose sums may differ in a digit
    return hashlib.sha256(json.dumps([same, files, device, launch, __version__]).encode()).hexdigest()[:32]


def find_evaluation(fingerprint: str) -> str | None:
    """Return a run that holds such an evaluation and ended well, in any experiment; a refused search finds none."""
    from mlflow import MlflowClient

    condition = f"tags.`{FINGERPRINT_TAG}` = '{fingerprint}' and attributes.status = 'FINISHED'"

    def search() -> str | None:
        return next((run.info.run_id for run in runs_anywhere(MlflowClient(), condition)), None)

    try:
        return patiently(search, what="searching for an earlier evaluation")
    except store_errors() as error:
        logger.warning(
            "the store refused to search for an earlier evaluation (%s): a new one is made", first_line(error)
        )
        return None


@asked_again("fetching an evaluation")
def download_evaluation(run_id: str, folder: Path) -> Path:
    """Fetch an evaluation and its moments from a run into a folder, and return the folder."""
    import mlflow.artifacts

    there = {item.path for item in mlflow.artifacts.list_artifacts(run_id=run_id)}
    for name in (FILE_NAME, MOMENTS_FILE):
        if name in there:
            mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path=name, dst_path=str(folder))
    return folder
