"""A run that never stays RUNNING, whatever happens inside it."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from amici_eval.errors import TrackingError, first_line
from amici_eval.masking import mask_mapping, masked
from amici_eval.tracking.heartbeat import HEARTBEAT_TAG, PARTIAL_TAG, Beat, Heartbeat
from amici_eval.tracking.patience import is_missing, patiently, store_errors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from amici_eval.specs import TrackingSpec

__all__ = ["NOTE_TAG", "PARENT_RUN_VARIABLE", "mark_whole", "tracked_run", "undisturbed"]

logger = logging.getLogger(__name__)

_SIGNALS = {"KeyboardInterrupt": "Ctrl-C", "TerminatedError": "SIGTERM"}
PARENT_RUN_VARIABLE = "AMICI_EVAL_PARENT_RUN_ID"
NOTE_TAG = "mlflow.note.content"
"""MLflow shows this tag as the description of a run; it reads Markdown."""


@contextmanager
def tracked_run(
    tracking: TrackingSpec,
    *,
    name: str | None,
    tags: dict[str, str],
    go_on: str | None = None,
    finished: Callable[[], str] | None = None,
) -> Iterator[Any]:
    """Run a body inside an MLflow run that never stays RUNNING: FINISHED, FAILED, or KILLED when interrupted.

    Takes over the run that ``mlflow run`` opened, becomes a child in a sweep, else starts a run of its own.

    Parameters
    ----------
    tracking, name, tags
        Experiment, name and tags of the run.
    go_on
        Id of a run that was interrupted, to be taken up instead of starting one.
    finished
        Says how much is finished, for a run that does not get through.

    Notes
    -----
    The run gives signs of life, so that another process can close it if this one is killed; and it is marked as partial
    until the body is through.
    """
    import mlflow

    parent = os.environ.get(PARENT_RUN_VARIABLE)
    if parent is not None:
        # the parent belongs to the sweep; each job starts a child of its own
        os.environ.pop("MLFLOW_RUN_ID", None)

    # MLflow forgets the run that `mlflow run` opened before it asks the store for it
    run_id = os.environ.pop("MLFLOW_RUN_ID", None) or go_on

    def start() -> Any:
        if tracking.experiment is not None and run_id is None:
            mlflow.set_experiment(tracking.experiment)
        own_tags = {HEARTBEAT_TAG: Beat.now().to_text(), PARTIAL_TAG: "in progress"}
        if go_on is not None:
            own_tags[NOTE_TAG] = "**Partial**: in progress, taken up after an interruption."
        run = mlflow.start_run(
            run_id=run_id,
            run_name=None if go_on is not None else masked(tracking.run_name or name),
            parent_run_id=parent if run_id is None else None,
            nested=parent is not None,
            tags={**tags, **mask_mapping(tracking.tags), **own_tags},
        )
        if not run.info.run_id:
            # MLflow takes an empty answer with 200 for a success
            with contextlib.suppress(*store_errors()):
                mlflow.end_run()
            msg = "the server answered with no run"
            raise ConnectionError(msg)
        return run

    # a run whose start was not answered has signs of life of this process, and is closed when it is gone
    run = patiently(start, seconds=tracking.retry_s, what="starting the run")
    status, why, safe = "FAILED", "", False
    heartbeat = Heartbeat(run.info.run_id, mlflow.MlflowClient())
    try:
        heartbeat.start()
        yield run
        # what could not be marked as whole stays partial, and is none of the body's errors
        status = "FINISHED"
    except BaseException as error:
        status = "KILLED" if isinstance(error, (KeyboardInterrupt, SystemExit)) else "FAILED"
        name = type(error).__name__
        why = f"{status} ({_SIGNALS.get(name, name)})"
        # such an error says itself where everything is
        safe = isinstance(error, TrackingError)
        raise
    finally:
        with undisturbed():
            heartbeat.stop()
            partial = why and f"{why}{'' if finished is None else finished()}"
            _end_run(run.info.run_id, status, retry_s=tracking.retry_s, partial=partial, safe=safe)


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


def mark_whole(client: Any, run_id: str) -> None:
    """Take the mark from a run that says that it is partial."""
    from mlflow.exceptions import MlflowException

    try:
        client.delete_tag(run_id, PARTIAL_TAG)
    except MlflowException as error:
        # it was not there
        if not is_missing(error):
            raise


def _end_run(run_id: str, status: str, *, retry_s: float, partial: str, safe: bool) -> None:
    import mlflow

    client = mlflow.MlflowClient()

    def end() -> None:
        if not partial:
            mark_whole(client, run_id)
        # by its id: mlflow.end_run would close the run below on its stack when it is asked again
        client.set_terminated(run_id, status)

    try:
        # after an error the store has been waited for, or is not to blame
        patiently(end, seconds=0.0 if partial else retry_s, what="closing the run")
        # what was sent whole stays so, also if something fails after it
        if partial and PARTIAL_TAG in client.get_run(run_id).data.tags:
            client.set_tag(run_id, PARTIAL_TAG, partial)
            client.set_tag(run_id, NOTE_TAG, f"**Partial**: {partial}. The same command takes up what is finished.")
    except store_errors() as error:
        # the body's own error matters more and says how to go on
        logger.log(
            logging.DEBUG if safe else logging.ERROR,
            "run %s could not be closed as %s (%s); the next command that reaches the store closes it",
            run_id,
            status,
            first_line(error),
        )
    finally:
        with contextlib.suppress(*store_errors()):
            mlflow.end_run(status)
