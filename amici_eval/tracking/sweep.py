"""One parent run for a Hydra sweep; each job starts a child of it."""

from __future__ import annotations

import logging
import os
from functools import partial
from typing import TYPE_CHECKING, Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback

from amici_eval.common.errors import first_line
from amici_eval.common.text import mask_secrets
from amici_eval.tracking.runs.tracked import PARENT_RUN_VARIABLE, Heartbeat, mark_whole, start_run
from amici_eval.tracking.store import all_pages, patiently

if TYPE_CHECKING:
    from omegaconf import DictConfig

logger = logging.getLogger(__name__)

_RETRY_S = 60.0
_HEARTS: dict[str, Heartbeat] = {}
"""Heartbeats of the parents that this process opened, by run."""


def close_parent(status: str) -> None:
    """Close the parent run if one is open: Hydra does not tell its callbacks when a sweep fails or is interrupted."""
    run_id = os.environ.pop(PARENT_RUN_VARIABLE, None)
    if run_id is None:
        return
    if run_id in _HEARTS:
        _HEARTS.pop(run_id).stop()
    try:
        patiently(lambda: _close(run_id, status), seconds=_RETRY_S, what="closing the sweep")
    except Exception as error:  # noqa: BLE001, RUF100 - what ended the sweep matters more
        logger.error(
            "sweep %s could not be closed as %s (%s); the next command that reaches the store closes it",
            run_id,
            status,
            first_line(error),
        )


def _close(run_id: str, status: str) -> None:
    import mlflow

    client = mlflow.MlflowClient()
    parent = client.get_run(run_id)
    if status == "FINISHED":
        mark_whole(client, run_id)
    # workers that were killed could not close their runs
    children = f"tags.`mlflow.parentRunId` = '{run_id}'"
    for child in all_pages(partial(client.search_runs, [parent.info.experiment_id], children)):
        if child.info.status == "RUNNING":
            client.set_terminated(child.info.run_id, status)
    client.set_terminated(run_id, status)


class ParentRun(Callback):
    """Opens the parent before the jobs of ``-m`` and closes it after them.

    Jobs read its id from an environment variable, which worker processes inherit.
    """

    def __init__(self) -> None:
        self._run_id: str | None = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:  # noqa: ARG002, RUF100 - Hydra's signature
        """Start the parent run, or take over the one that ``mlflow run`` opened."""
        import mlflow

        from amici_eval.tracking.registry import connect

        tracking = config.tracking
        os.environ["MLFLOW_TRACKING_URI"] = connect(tracking.uri)
        run = start_run(
            tracking.experiment,
            name=mask_secrets(tracking.run_name or "sweep"),
            tags={"amici_eval.kind": "sweep"},
            retry_s=_RETRY_S,
        )
        self._run_id = run.info.run_id
        _HEARTS[self._run_id] = Heartbeat(self._run_id, mlflow.MlflowClient()).start()
        os.environ[PARENT_RUN_VARIABLE] = self._run_id
        # children belong to the parent's experiment, also in worker processes
        os.environ["MLFLOW_EXPERIMENT_ID"] = run.info.experiment_id
        # the fluent stack must be empty or a job's run in this process would have to be nested
        mlflow.end_run("RUNNING")

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:  # noqa: ARG002, RUF100 - Hydra's signature
        """Note on the parent that a child failed; this may run in a worker process."""
        parent = os.environ.get(PARENT_RUN_VARIABLE)
        if parent is not None and job_return.status is not JobStatus.COMPLETED:
            import mlflow

            mlflow.MlflowClient().set_tag(parent, "amici_eval.failed_child", "true")

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:  # noqa: ARG002, RUF100 - Hydra's signature
        """Close the parent: FAILED if a child failed."""
        import mlflow

        if self._run_id is not None:
            failed = "amici_eval.failed_child" in mlflow.MlflowClient().get_run(self._run_id).data.tags
            close_parent("FAILED" if failed else "FINISHED")
