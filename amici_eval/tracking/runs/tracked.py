"""A run that never stays RUNNING, whatever happens inside it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amici_eval.common.errors import InvalidSpecError, TrackingError, first_line
from amici_eval.common.text import mask_mapping, masked
from amici_eval.tracking.store import is_missing, patiently, runs_anywhere, store_errors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from amici_eval.settings.evaluation import TrackingSpec

logger = logging.getLogger(__name__)

HEARTBEAT_TAG = "amici_eval.heartbeat"
PARTIAL_TAG = "amici_eval.partial"
"""Tag of a run that does not hold all its results."""
BEAT_S = 30.0
FEW_BEATS_S = 120.0
STOPPED_S = 600.0
"""After so many seconds without a sign of life a process on another machine counts as gone."""
_JOIN_S = 5.0
_SEARCH_S = 10.0
"""Most seconds that a command searches for abandoned runs of others."""


@dataclass(frozen=True, kw_only=True)
class SignOfLife:
    """A sign of life of a process: its machine, the boot of that, its PID namespace, number and start, and the time.

    The start of a process tells it from a later one of the same number; the time is by the clock of its machine.
    """

    host: str
    boot: str
    namespace: str
    pid: int
    started: str
    time: float

    @classmethod
    def now(cls) -> SignOfLife:
        """Return a sign of life of this process."""
        pid = os.getpid()
        return cls(**_machine(), pid=pid, started=_start_of(pid) or "", time=round(time.time(), 3))

    @classmethod
    def parse(cls, text: str) -> SignOfLife | None:
        """Return the sign of life in the text of a tag; ``None`` if it is none."""
        try:
            values = json.loads(text)
            texts = {name: str(values[name]) for name in ("host", "boot", "namespace", "started")}
            return cls(**texts, pid=int(values["pid"]), time=float(values["time"]))
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            return None

    def to_text(self) -> str:
        """Return the text of the tag."""
        return json.dumps(asdict(self))

    def has_stopped(self) -> bool:
        """Return whether the process is gone.

        On its own machine the process table tells; if that machine was rebooted, the process is gone once its sign is
        two minutes old. Elsewhere the last sign must be older than ``STOPPED_S``: if clocks differ by more, a run may
        be closed too early, and its process sets the status again at its end.
        """
        here = _machine()
        age = time.time() - self.time
        if self.host == here["host"] and self.boot and here["boot"]:
            if self.boot != here["boot"]:
                # a recent sign may come from another machine of the same name
                return abs(age) > FEW_BEATS_S
            if self.namespace == here["namespace"]:
                started = _start_of(self.pid)
                return _is_gone(self.pid) if started is None else started != self.started
        return age > STOPPED_S


@cache
def _machine() -> dict[str, str]:
    def read(path: str) -> str:
        try:
            return Path(path).read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            return ""

    try:
        namespace = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        namespace = ""
    return {"host": socket.gethostname(), "boot": read("/proc/sys/kernel/random/boot_id"), "namespace": namespace}


def _start_of(pid: int) -> str | None:
    """Return when a process started, in ticks since boot; ``None`` if that is not known or it is a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # the name of the program, in brackets, may hold anything
    values = text.rpartition(")")[2].split()
    return None if len(values) < 20 or values[0] in "ZX" else values[19]


def _is_gone(pid: int) -> bool:
    """Return whether a process without a known start is gone; one of another user may be hidden, and is not gone."""
    if Path(f"/proc/{pid}/stat").exists():
        # its start was not told although it is listed: a zombie
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


class Heartbeat:
    """Gives signs of life for a run until it is stopped, from a thread of its own."""

    def __init__(self, run_id: str, client: Any, *, every_s: float = BEAT_S) -> None:
        self._run_id, self._client, self._every = run_id, client, every_s
        self._stop = threading.Event()
        self._missed = False
        self._thread = threading.Thread(target=self._beat, name="amici-eval-heartbeat", daemon=True)

    def start(self) -> Heartbeat:
        """Begin; the first sign is the tag that the run was started with."""
        self._thread.start()
        return self

    def stop(self) -> None:
        """End; a sign that is on its way may still arrive."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(_JOIN_S)

    def _beat(self) -> None:
        while not self._stop.wait(self._every):
            try:
                self._client.set_tag(self._run_id, HEARTBEAT_TAG, SignOfLife.now().to_text())
            except Exception as error:  # noqa: BLE001, RUF100 - whatever the store does, the work goes on
                if not self._missed:
                    logger.warning("the tracking store does not answer (%s); the work goes on", first_line(error))
                self._missed = True
            else:
                self._missed = False


def close_abandoned(client: Any) -> list[str]:
    """Close runs of amici_eval that are RUNNING although their process is gone, and return their ids.

    A complete run becomes FINISHED, any other KILLED. Errors of the store are only logged.
    """
    closed: list[str] = []
    try:
        running = f"attributes.status = 'RUNNING' and tags.`{HEARTBEAT_TAG}` LIKE '{{%'"
        for run in runs_anywhere(client, running, seconds=_SEARCH_S):
            beat = SignOfLife.parse(run.data.tags[HEARTBEAT_TAG])
            if beat is None or not beat.has_stopped():
                continue
            status = "KILLED" if PARTIAL_TAG in run.data.tags else "FINISHED"
            client.set_terminated(run.info.run_id, status)
            if status == "KILLED":
                client.set_tag(run.info.run_id, PARTIAL_TAG, "KILLED (its process is gone)")
            closed.append(run.info.run_id)
            logger.info(
                "run %s was left RUNNING by a process on %s that is gone; closed as %s",
                *(run.info.run_id, beat.host, status),
            )
    except store_errors() as error:
        logger.debug("runs of processes that are gone could not be closed: %s", first_line(error))
    return closed


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

    ``go_on``: the interrupted run to take up; ``finished``: returns how much is done, for the tag of a partial run.
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
        # from here on no error is the body's: a run that then cannot be marked as whole stays partial
        status = "FINISHED"
    except BaseException as error:
        status = "KILLED" if isinstance(error, (KeyboardInterrupt, SystemExit)) else "FAILED"
        name = type(error).__name__
        why = f"{status} ({_SIGNALS.get(name, name)})"
        # the message of a TrackingError says itself where the results are
        safe = isinstance(error, TrackingError)
        raise
    finally:
        with undisturbed():
            heartbeat.stop()
            partial = why and f"{why}{'' if finished is None else finished()}"
            _end_run(run.info.run_id, status, retry_s=tracking.retry_s, partial=partial, safe=safe)
            if given is not None:
                # for the next run of this process: MLflow removes the variable when a run ends
                os.environ[_RUN_VARIABLE] = given


def start_run(
    experiment: str | None, *, name: str | None, tags: dict[str, str], go_on: str | None = None, retry_s: float
) -> Any:
    """Start a run with a sign of life, marked as partial; a run that holds the results of others is never reused.

    The first of these that applies: the interrupted run that goes on, a child of the sweep or comparison, the run that
    ``MLFLOW_RUN_ID`` names if it is empty, a child of that run if it is not, a run of its own.
    """
    import mlflow

    parent, above, run_id = os.environ.get(PARENT_RUN_VARIABLE), None, go_on
    # MLflow would use it as the id of every run that is started
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

    # a run whose start was not answered has a sign of life, too, and is closed after this process is gone
    run = patiently(start, seconds=retry_s, what="starting the run")
    if above is not None:
        logger.info(
            "%s names run %s, which holds %s: run %s is a child of it", _RUN_VARIABLE, above, holds, run.info.run_id
        )
    return run


def _contents(run_id: str) -> str:
    """Return what a run holds besides what MLflow and ``mlflow run`` put into an empty one; "" if nothing."""
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
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables of the environment while a body runs."""
    before = {name: os.environ.pop(name, None) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name in values:
            os.environ.pop(name, None)
        os.environ.update({name: value for name, value in before.items() if value is not None})


@contextmanager
def undisturbed() -> Iterator[None]:
    """Keep signals from interrupting a body that must finish."""
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
    """Remove the tag that marks a run as partial."""
    from mlflow.exceptions import MlflowException

    try:
        client.delete_tag(run_id, PARTIAL_TAG)
    except MlflowException as error:
        # a run without the tag is no error
        if not is_missing(error):
            raise


def _end_run(run_id: str, status: str, *, retry_s: float, partial: str, safe: bool) -> None:
    import mlflow

    client = mlflow.MlflowClient()

    def end() -> None:
        if not partial:
            mark_whole(client, run_id)
        # by its id: a repeated mlflow.end_run would close the next run on its stack
        client.set_terminated(run_id, status)

    try:
        # after an error do not wait again: the store was waited for, or is not the cause
        patiently(end, seconds=0.0 if partial else retry_s, what="closing the run")
        # a run that is already marked as whole stays so, also if something failed later
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
