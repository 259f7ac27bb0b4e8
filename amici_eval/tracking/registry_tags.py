"""Tags of a registered model, and leases made of them: registries have no compare-and-swap."""

from __future__ import annotations

import json
import logging
import os
import random
import secrets
import socket
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from typing import TYPE_CHECKING, Any

from amici_eval.common.errors import AmiciEvalError, InvalidSpecError, LeaseHeldError, first_line
from amici_eval.tracking.runs.tracked import undisturbed
from amici_eval.tracking.store import patiently, tracking_errors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

logger = logging.getLogger(__name__)

LEASE_TAG = "amici_eval.lease"
_SLACK = 0.2
"""Share of the time to live by which a holder gives up earlier than others take over: room for clocks that differ."""
_SETTLE_S = 10.0
"""How long to wait until it is clear which of several that ask at once gets the lease, even with ``wait_s=0``."""
_RETRY_S = (0.05, 0.2)
_LONGEST_RETRY_S = 3.0
_JOIN_S = 10.0


def _client() -> Any:
    from mlflow import MlflowClient

    return MlflowClient()


@dataclass(frozen=True, kw_only=True)
class RegistryTags:
    """Tags of a registered model, or of one of its versions if ``version`` is given."""

    name: str
    version: str | None = None
    client: Any = field(default_factory=_client, repr=False, compare=False)

    @property
    def where(self) -> str:
        """What the tags are of, for messages."""
        return self.name if self.version is None else f"{self.name} version {self.version}"

    def ask(self, call: str, *more: str) -> Any:
        """Call a method of the client for this model or version: ``get_{}``, ``set_{}_tag``, ``set_{}_alias``, ..."""
        of, where = (
            ("registered_model", [self.name]) if self.version is None else ("model_version", [self.name, self.version])
        )
        with tracking_errors(self.where):
            return patiently(partial(getattr(self.client, call.format(of)), *where, *more), what="asking the registry")

    def read(self) -> dict[str, str]:
        """Return all tags."""
        return dict(self.ask("get_{}").tags)

    def write(self, key: str, value: str) -> None:
        """Set a tag."""
        self.ask("set_{}_tag", key, value)

    def remove(self, key: str) -> None:
        """Delete a tag; one that is gone already is no error."""
        self.ask("delete_{}_tag", key)


def this_process() -> str:
    """Return what names this process to others: host and process id."""
    return f"{socket.gethostname()}:{os.getpid()}"


@dataclass(frozen=True, kw_only=True)
class _Marker:
    key: str
    owner: str
    expires: float
    holds: bool


def _markers(tags: dict[str, str], prefix: str) -> list[_Marker]:
    found = []
    for key, text in tags.items():
        # the name of a lease may have dots itself; the nonce has none
        if key.rpartition(".")[0] != prefix:
            continue
        try:
            value = json.loads(text)
            marker = _Marker(
                key=key,
                owner=str(value["owner"]),
                expires=float(value["expires"]),
                holds=bool(value.get("holds", False)),
            )
        except (ValueError, TypeError, KeyError, AttributeError):
            # not written by us: counted as run out, else it would block for ever
            marker = _Marker(key=key, owner="unknown", expires=float("-inf"), holds=False)
        found.append(marker)
    return found


def _patience(rival: _Marker, wait_s: float) -> float:
    """Return how long to wait for a rival: at least ``_SETTLE_S`` if it only asks for the lease."""
    return wait_s if rival.holds else max(wait_s, _SETTLE_S)


class Lease:
    """A marker among the tags of a model, renewed while it is held; `held` makes it.

    ``owner``: who asks, for others to read; ``ttl_s``: seconds after which others may take over a marker that is not
    renewed; ``clock``: returns seconds since 1970.
    """

    def __init__(self, tags: RegistryTags, *, what: str, owner: str, ttl_s: float, clock: Callable[[], float]) -> None:
        self._tags, self._owner, self._ttl, self._clock = tags, owner, ttl_s, clock
        self._prefix = f"{LEASE_TAG}.{what}"
        # a new name for each lease, so that a late removal of this marker hits no other
        self.key = f"{self._prefix}.{secrets.token_hex(8)}"
        self._safe_until = float("inf")
        self._holds = self._lost = False
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def mark(self, *, holds: bool) -> bool:
        """Write or renew the marker; return False if it had run out before that, and the lease is lost for good."""
        expires = self._clock() + self._ttl
        self._tags.write(self.key, json.dumps({"owner": self._owner, "expires": round(expires, 3), "holds": holds}))
        if self._lost or self._clock() >= min(self._safe_until, expires - _SLACK * self._ttl):
            # somebody may have removed the marker before it was written again, and hold the lease now
            self._lost = True
            return False
        self._safe_until = expires - _SLACK * self._ttl
        self._holds = holds
        return True

    def others(self) -> list[_Marker] | None:
        """Return the markers of others that have not run out, smallest key first; None if one's own is not there."""
        # read the clock first, or a marker that is renewed after the read would count as run out
        now = self._clock()
        there = _markers(self._tags.read(), self._prefix)
        for marker in there:
            if marker.expires <= now and marker.key != self.key:
                logger.info("%s: removing a lease of %s that ran out", self._tags.where, marker.owner)
                self._tags.remove(marker.key)
        if not any(marker.key == self.key for marker in there):
            return None
        alive = [marker for marker in there if marker.expires > now and marker.key != self.key]
        return sorted(alive, key=lambda marker: marker.key)

    def contend(self, *, begun: float, wait_s: float, sleep: Callable[[float], None]) -> _Marker | None:
        """Write a marker and read until it is alone (None: the lease is held) or must be withdrawn for a rival."""
        lost = _Marker(key="", owner="somebody else", expires=self._clock(), holds=False)
        marked = self._clock()
        if not self.mark(holds=False):
            return lost
        while True:
            others = self.others()
            if others is None:
                return lost
            if not others:
                return None if self.mark(holds=True) else lost
            rival = next((other for other in others if other.holds), others[0])
            behind = any(not other.holds and other.key < self.key for other in others)
            if behind or _patience(rival, wait_s) <= self._clock() - begun:
                return rival
            sleep(random.uniform(*_RETRY_S))  # noqa: S311, RUF100 - only to fall out of step
            if self._clock() - marked > self._ttl / 3:
                marked = self._clock()
                if not self.mark(holds=False):
                    return lost

    @property
    def held_until(self) -> float:
        """Time by the own clock until which nobody else can hold the lease; minus infinity if it is not held."""
        return self._safe_until if self._holds and not self._lost else float("-inf")

    def still_mine(self) -> bool:
        """Return whether the lease is held at this moment, by what the registry says."""
        return self._clock() < self.held_until and self.key in self._tags.read() and self._clock() < self.held_until

    def keep_renewed(self) -> None:
        """Renew the marker from a thread until the lease is released."""
        self._thread = threading.Thread(target=self._renew, name=f"renew {self._prefix}", daemon=True)
        self._thread.start()

    def _renew(self) -> None:
        wait = self._ttl / 3
        while not self._stop.wait(wait):
            try:
                if not self.mark(holds=True):
                    logger.warning("%s: lease %s ran out before it was renewed", self._tags.where, self._prefix)
                    self._tags.remove(self.key)
                    return
                wait = self._ttl / 3
            except AmiciEvalError as error:
                logger.warning("%s: lease %s could not be renewed: %s", self._tags.where, self._prefix, error)
                wait = self._ttl / 12
            if self._stop.is_set():
                self._try_to_remove()

    def release(self) -> None:
        """Stop renewing and remove the marker; where that fails it runs out by itself."""
        with undisturbed():
            self._stop.set()
            if self._thread is not None:
                self._thread.join(_JOIN_S)
            self._holds = False
            self._try_to_remove()

    def _try_to_remove(self) -> None:
        try:
            self._tags.remove(self.key)
        except AmiciEvalError as error:
            logger.warning("a lease stays until it runs out, in at most %g s: %s", self._ttl, first_line(error))


@contextmanager
def held(
    tags: RegistryTags,
    what: str,
    *,
    ttl_s: float,
    wait_s: float = 0.0,
    owner: str | None = None,
    renew: bool = True,
    clock: Callable[[], float] = time.time,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[Lease]:
    """Hold a lease while a body runs; whoever asks for the same one meanwhile waits or is refused.

    Each process writes a marker of its own, then reads all, and holds the lease if no other marker is alive: of two
    processes, the later reader sees the other's marker. If both see each other, the smallest marker stays, and the
    others withdraw and return under a new name. Reads must show all finished writes, and clocks agree to a fifth of
    ``ttl_s``. A holder that is stopped for longer has lost the lease: call ``Lease.still_mine()`` before a step that
    must not be done twice (a moment between the answer and the step stays unguarded).
    """
    if not ttl_s > 0:
        raise InvalidSpecError(value=f"a lease of {ttl_s!r} s", rule="it must last", fix="give it some seconds")
    begun, pause = clock(), _RETRY_S[1]
    while True:
        lease = Lease(tags, what=what, owner=owner or this_process(), ttl_s=ttl_s, clock=clock)
        try:
            rival = lease.contend(begun=begun, wait_s=wait_s, sleep=sleep)
        except BaseException:
            lease.release()
            raise
        if rival is None:
            break
        lease.release()
        if _patience(rival, wait_s) <= clock() - begun:
            until = datetime.fromtimestamp(rival.expires, timezone.utc) if rival.expires < 1e11 else None
            raise LeaseHeldError(
                value=f"{what} of {tags.where} is held by {rival.owner} until "
                f"{'further notice' if until is None else until.isoformat(timespec='seconds')}",
                rule="one process at a time works on it",
                fix="wait until it is done, or until then if it died",
            )
        sleep(random.uniform(pause / 4, pause))  # noqa: S311, RUF100 - only to fall out of step
        pause = min(2 * pause, _LONGEST_RETRY_S)
    try:
        if renew:
            lease.keep_renewed()
        yield lease
    finally:
        lease.release()
