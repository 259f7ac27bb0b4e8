"""Evaluations that exist already: found again by what was evaluated on what, and how."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

from amici_eval import __version__
from amici_eval.moments import MOMENTS_FILE
from amici_eval.results import FILE_NAME, SCHEMA_VERSION
from amici_eval.specs import settings_that_matter
from amici_eval.tracking.patience import asked_again

if TYPE_CHECKING:
    from pathlib import Path

    from amici_eval.specs import EvaluationSpec

__all__ = ["FINGERPRINT_TAG", "download_evaluation", "find_evaluation", "fingerprint", "resume_key"]

FINGERPRINT_TAG = "amici_eval.fingerprint"


def fingerprint(*, model: str, digest: str, spec: EvaluationSpec) -> str:
    """Return what two evaluations share that give the same numbers.

    Parameters
    ----------
    model
        Id of the logged model, or its URI where there is none.
    digest
        Of the data.
    spec
        Settings.
    """
    text = json.dumps([SCHEMA_VERSION, model, digest, settings_that_matter(spec)], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def resume_key(same: str, *, files: str, device: str, launch: str) -> str:
    """Return what evaluations share that may take up each other's finished parts.

    Parameters
    ----------
    same
        Their :func:`fingerprint`.
    files
        Digest of the model's files: a model in a folder may be another one next time.
    device
        Where statistics are computed.
    launch
        Where types are evaluated: workers have one thread each, whose sums may end in another digit.
    """
    return hashlib.sha256(json.dumps([same, files, device, launch, __version__]).encode()).hexdigest()[:32]


@asked_again("looking for an evaluation")
def find_evaluation(fingerprint: str) -> str | None:
    """Return the newest run that holds such an evaluation and ended well, in any experiment of the store."""
    from mlflow import MlflowClient

    client = MlflowClient()
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(
        experiments,
        f"tags.`{FINGERPRINT_TAG}` = '{fingerprint}' and attributes.status = 'FINISHED'",
        order_by=["attributes.start_time DESC"],
        max_results=1,
    )
    return runs[0].info.run_id if runs else None


@asked_again("fetching an evaluation")
def download_evaluation(run_id: str, folder: Path) -> Path:
    """Fetch an evaluation and its moments from a run into a folder, and return the folder."""
    import mlflow.artifacts

    there = {item.path for item in mlflow.artifacts.list_artifacts(run_id=run_id)}
    for name in (FILE_NAME, MOMENTS_FILE):
        if name in there:
            mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path=name, dst_path=str(folder))
    return folder
