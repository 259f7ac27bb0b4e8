"""A run that never stays RUNNING, whatever happens inside it."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from amici_eval.common.errors import InvalidSpecError, TrackingError, first_line
from amici_eval.common.masking import mask_mapping, masked
from amici_eval.tracking.runs.heartbeat import HEARTBEAT_TAG, PARTIAL_TAG, Heartbeat, SignOfLife
from amici_eval.tracking.store.errors import is_missing, patiently, store_errors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from amici_eval.settings.evaluation import TrackingSpec

__all__ = ["NOTE_TAG", "PARENT_RUN_VARIABLE", "mark_whole", "start_run", "tracked_run", "undisturbed"]

logger = logging.getLogger(__name__)

_SIGNALS = {"KeyboardInterrupt": "Ctrl-C", "TerminatedError": "SIGTERM"}
PARENT_RUN_VARIABLE = "AMICI_EVAL_PARENT_RUN_ID"
_RUN_VARIABLE = "MLFLOW_RUN_ID"
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
    """Run a body inside a run (:func:`start_run`) that never stays RUNNING: FINISHED, FAILED, or KILLED if interrupted.

    ``go_on`` is the interrupted run to take up; ``finished`` says how much is done, for a run that does not end well.
    """
    import mlflow

    given = os.environ.get(_RUN_VARIABLE)
    try:
        run = start_run(
            tracking.experiment,
            name=masked(tracking.run_name or name),
            tags={**tags, **mask_mapping(tracking.tags)},
            go_on=go_on,
            retry_s=tracking.retry_s,
        )
    except BaseException:
        if given is not None:
            os.environ[_RUN_VARIABLE] = given
        raise
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
            if given is not None:
                # for the next run of this process: MLflow forgets it with the end of any run
                os.environ[_RUN_VARIABLE] = given


def start_run(
    experiment: str | None, *, name: str | None, tags: dict[str, str], go_on: str | None = None, retry_s: float
) -> Any:
    """Start a run with a sign of life, marked as partial; never one that mixes with what another run holds.

    In this order: the interrupted run that goes on, a child of the sweep or comparison, the run that ``MLFLOW_RUN_ID``
    names if it is empty, a child of that run if it is not, a run of its own.
    """
    import mlflow

    parent, above, run_id = os.environ.get(PARENT_RUN_VARIABLE), None, go_on
    # MLflow takes it for the id of any run that is started
    given = os.environ.pop(_RUN_VARIABLE, None) or None
    if given is not None and parent is None and go_on is None:
        holds = patiently(lambda: _contents(given), seconds=retry_s, what=f"looking at the run of {_RUN_VARIABLE}")
        above, run_id = (given, None) if holds else (None, given)

    def start() -> Any:
        if experiment is not None and run_id is None:
            mlflow.set_experiment(experiment)
        own_tags = {HEARTBEAT_TAG: SignOfLife.now().to_text(), PARTIAL_TAG: "in progress"}
        if go_on is not None:
            own_tags[NOTE_TAG] = "**Partial**: in progress, taken up after an interruption."
        run = mlflow.start_run(
            run_id=run_id,
            # children are shown where their parent is
            experiment_id=mlflow.get_run(above).info.experiment_id if above and experiment is None else None,
            run_name=None if go_on is not None else name,
            parent_run_id=(parent or above) if run_id is None else None,
            nested=parent is not None,
            tags={**tags, **own_tags},
        )
        if not run.info.run_id:
            # MLflow takes an empty answer with 200 for a success
            with contextlib.suppress(*store_errors()):
                mlflow.end_run()
            msg = "the server answered with no run"
            raise ConnectionError(msg)
        return run

    # a run whose start was not answered has signs of life of this process, and is closed when it is gone
    run = patiently(start, seconds=retry_s, what="starting the run")
    if above is not None:
        logger.info(
            "%s names run %s, which holds %s: run %s is a child of it", _RUN_VARIABLE, above, holds, run.info.run_id
        )
    return run


def _contents(run_id: str) -> str:
    """Say what a run holds besides what MLflow and ``mlflow run`` put into an empty one; "" if nothing."""
    import mlflow
    from mlflow.exceptions import MlflowException

    client, run = mlflow.MlflowClient(), None
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if not is_missing(error):
            raise
    if run is None or run.info.lifecycle_stage != "active":
        raise InvalidSpecError(
            value=f"{_RUN_VARIABLE}={run_id}",
            rule=f"the environment names a run that {mlflow.get_tracking_uri()} does not hold, or that is deleted",
            fix=f"unset {_RUN_VARIABLE}, or set tracking.uri to the store of that run",
        )
    inputs, outputs = run.inputs, run.outputs
    found = {
        "a run of amici-eval": any(name.startswith("amici_eval.") for name in run.data.tags),
        "metrics": any(not name.startswith("system/") for name in run.data.metrics),
        "params": bool(run.data.params) and "mlflow.project.entryPoint" not in run.data.tags,
        "data sets": bool(inputs and inputs.dataset_inputs),
        "models": bool((inputs and inputs.model_inputs) or (outputs and outputs.model_outputs)),
        "artifacts": bool(client.list_artifacts(run_id)),
    }
    return ", ".join(what for what, held in found.items() if held)


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
