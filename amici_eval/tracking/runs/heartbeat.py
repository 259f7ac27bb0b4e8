"""Signs of life of the process behind a run, and the end of runs whose process is gone."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from amici_eval.common.errors import first_line
from amici_eval.tracking.store.errors import store_errors
from amici_eval.tracking.store.searching import runs_anywhere

__all__ = ["HEARTBEAT_TAG", "PARTIAL_TAG", "Heartbeat", "SignOfLife", "close_abandoned"]

logger = logging.getLogger(__name__)

HEARTBEAT_TAG = "amici_eval.heartbeat"
PARTIAL_TAG = "amici_eval.partial"
"""Is there as long as a run does not hold all that it is to hold."""
BEAT_S = 30.0
FEW_BEATS_S = 120.0
STOPPED_S = 600.0
"""A process on another machine that has given no sign of life for so long is taken to be gone."""
_JOIN_S = 5.0
_SEARCH_S = 10.0
"""Nobody waits longer for the runs of others to be found."""


@dataclass(frozen=True, kw_only=True)
class SignOfLife:
    """A sign of life: of which process, on which machine (since which start of it, in which namespace), and when.

    The start of a process tells it from a later one of the same number; the time is by the clock of that machine.
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
        """Return what a tag says, ``None`` if that is no sign of life."""
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

        Notes
        -----
        On the machine of the process that is known at once, and no clock is asked; a machine that was started anew
        has none of its old processes, once the sign is two minutes old. Of a process elsewhere the last sign of life
        must be old: where clocks differ by
        more than ten minutes, a run may be closed too early, and is then what its process makes of it at its end.
        """
        here = _machine()
        age = time.time() - self.time
        if self.host == here["host"] and self.boot and here["boot"]:
            if self.boot != here["boot"]:
                # or another machine of the same name, which gives signs of life
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
    """Return when a process of this machine started, in ticks since the machine did; ``None`` if that is not told."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # the name of the program, in brackets, may hold anything
    values = text.rpartition(")")[2].split()
    # a zombie computes nothing more
    return None if len(values) < 20 or values[0] in "ZX" else values[19]


def _is_gone(pid: int) -> bool:
    """Return whether there is no such process; those of others may be hidden, and are there."""
    if Path(f"/proc/{pid}/stat").exists():
        # a zombie
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

    One that holds all it was to hold becomes FINISHED, any other KILLED. Errors are ignored: this is a service to
    others.
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
