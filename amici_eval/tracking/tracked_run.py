"""A run that never stays RUNNING, whatever happens inside it."""

from __future__ import annotations

import logging
import os
import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from amici_eval.specs import TrackingSpec

__all__ = ["PARENT_RUN_VARIABLE", "tracked_run", "undisturbed"]

logger = logging.getLogger(__name__)

PARENT_RUN_VARIABLE = "AMICI_EVAL_PARENT_RUN_ID"


@contextmanager
def tracked_run(tracking: TrackingSpec, *, name: str | None, tags: dict[str, str]) -> Iterator[Any]:
    """Run a body inside an MLflow run that never stays RUNNING: FINISHED, FAILED, or KILLED when interrupted.

    Takes over the run that ``mlflow run`` opened, becomes a child in a sweep, else starts a run of its own.
    """
    import mlflow

    parent = os.environ.get(PARENT_RUN_VARIABLE)
    if parent is not None:
        # the parent belongs to the sweep; each job starts a child of its own
        os.environ.pop("MLFLOW_RUN_ID", None)
    if tracking.experiment is not None and "MLFLOW_RUN_ID" not in os.environ:
        mlflow.set_experiment(tracking.experiment)
    run = mlflow.start_run(
        run_name=tracking.run_name or name,
        parent_run_id=parent,
        nested=parent is not None,
        tags={**tags, **tracking.tags},
    )
    status = "FAILED"
    try:
        yield run
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit):
        status = "KILLED"
        raise
    finally:
        _end_run(status)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Let no further signal interrupt a body that must finish."""
    names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        names = []
    before = {name: signal.signal(getattr(signal, name), signal.SIG_IGN) for name in names}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)


def _end_run(status: str) -> None:
    import mlflow
    from mlflow.exceptions import MlflowException
    from requests import RequestException

    try:
        with undisturbed():
            mlflow.end_run(status)
    except (MlflowException, RequestException, OSError) as error:
        # the body's own error matters more and says how to go on
        logger.error("the run could not be closed as %s: %s", status, error)
