"""Judge every version of a registered model once, together with other watchers, for ever or one round."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from amici_eval.common.errors import (
    AmiciEvalError,
    InvalidSpecError,
    LeaseHeldError,
    ModelNotFoundError,
    TrackingError,
    first_line,
)
from amici_eval.tracking.registry_tags import RegistryTags, held
from amici_eval.tracking.store import all_pages, patiently, tracking_errors

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger(__name__)

VERDICT_TAG = "amici_eval.verdict"
ERROR_TAG = "amici_eval.watch_error"
_TRIES = 3
_REASON_CHARACTERS = 500


@dataclass(frozen=True, kw_only=True)
class WatchedVersion:
    """What one round did with a version.

    ``state``: ``judged``; ``skipped`` (another watcher judges it or has judged it, or it was deleted); ``failed`` (it
    could not be judged); ``left`` (it failed in three earlier rounds and is not tried again). ``said``: the outcome,
    who judges it, or the error.
    """

    version: str
    state: str
    said: str


@dataclass(frozen=True, kw_only=True)
class WatchResult:
    """What one round did with the versions that had no verdict when it began, oldest first."""

    versions: tuple[WatchedVersion, ...] = ()

    def _in(self, *states: str) -> tuple[WatchedVersion, ...]:
        return tuple(one for one in self.versions if one.state in states)

    @property
    def judged(self) -> tuple[WatchedVersion, ...]:
        """Versions that were judged, with the outcome."""
        return self._in("judged")

    @property
    def skipped(self) -> tuple[WatchedVersion, ...]:
        """Versions that were left to other watchers."""
        return self._in("skipped")

    @property
    def failed(self) -> tuple[WatchedVersion, ...]:
        """Versions that could not be judged, now or in three earlier rounds."""
        return self._in("failed", "left")

    @property
    def worked(self) -> bool:
        """Whether there was anything to do."""
        return bool(self._in("judged", "failed"))


def watch(
    name: str,
    *,
    key: str,
    judge: Callable[[str], str],
    once: bool,
    lease_s: float,
    interval_s: float = 60.0,
    max_interval_s: float = 900.0,
    pause: Callable[[float], None] = time.sleep,
) -> WatchResult:
    """Judge the versions of a registered model that have no verdict yet, oldest first, in one round or until an error.

    A version has a verdict if it has the tag ``amici_eval.verdict.<key>``, which ``judge`` writes. Watchers share the
    work: each takes a lease on a version (``lease.held``) and reads its tags again before judging. A watcher that is
    stopped for longer than ``lease_s`` counts as dead; then two may judge one version, with the same configuration.
    The seconds between rounds double from ``interval_s`` to ``max_interval_s`` while there is nothing to do.
    """
    _check_times(lease_s=lease_s, interval_s=interval_s, max_interval_s=max_interval_s)
    one_round = partial(_one_round, name, key=key, judge=judge, lease_s=lease_s, given_up=set())
    if once:
        return one_round()
    wait = interval_s
    while True:
        try:
            busy = one_round().worked
        except TrackingError as error:
            logger.warning("%s; trying again in %g s", error, wait)
            busy = False
        if busy:
            wait = interval_s
        pause(wait)
        if not busy:
            wait = min(2 * wait, max_interval_s)


def _check_times(*, lease_s: float, interval_s: float, max_interval_s: float) -> None:
    for setting, value, least in (
        ("lease", lease_s, 0.0),
        ("interval", interval_s, 0.0),
        ("max_interval", max_interval_s, interval_s),
    ):
        if not value > 0 or value < least:
            raise InvalidSpecError(
                value=f"watch.{setting}={value!r}",
                rule="it must be a number of seconds above 0"
                + (f" and at least watch.interval={interval_s:g}" if setting == "max_interval" else ""),
                fix=f"leave watch.{setting} out for the default",
            )


def _one_round(
    name: str,
    *,
    key: str,
    judge: Callable[[str], str],
    lease_s: float,
    given_up: set[str],
) -> WatchResult:
    found = []
    for version, tags in _versions(name):
        if f"{VERDICT_TAG}.{key}" in tags:
            continue
        earlier = _failure(tags, key)
        if earlier.n < _TRIES:
            given_up.discard(version)
            found.append(_one_version(name, version, key=key, judge=judge, lease_s=lease_s))
            continue
        if version not in given_up:
            given_up.add(version)
            logger.warning(
                "version %s of %s is left: it could not be judged %d times, at last because of %s; delete its tag "
                "%s.%s to try again",
                *(version, name, earlier.n, earlier.reason, ERROR_TAG, key),
            )
        found.append(WatchedVersion(version=version, state="left", said=earlier.reason))
    return WatchResult(versions=tuple(found))


def _one_version(name: str, version: str, *, key: str, judge: Callable[[str], str], lease_s: float) -> WatchedVersion:
    tags = RegistryTags(name=name, version=version)
    try:
        with held(tags, f"verdict.{key}", ttl_s=lease_s) as lease:
            if f"{VERDICT_TAG}.{key}" in tags.read():
                return WatchedVersion(version=version, state="skipped", said="another watcher has judged it meanwhile")
            logger.info("judging version %s of %s", version, name)
            done = _judged(tags, version, key, judge)
            if time.time() >= lease.held_until:
                logger.warning("the lease on version %s ran out meanwhile: it may have been judged twice", version)
            return done
    except LeaseHeldError as error:
        logger.info("version %s is left to another watcher: %s", version, error.value)
        return WatchedVersion(version=version, state="skipped", said=error.value)
    except ModelNotFoundError as error:
        # deleted since the versions were listed
        return WatchedVersion(version=version, state="skipped", said=_reason(error))


def _judged(tags: RegistryTags, version: str, key: str, judge: Callable[[str], str]) -> WatchedVersion:
    """Judge a version; an error is counted in its tags, so that it is tried only a few times."""
    try:
        with tracking_errors():
            outcome = judge(f"models:/{tags.name}/{version}")
    except (TrackingError, LeaseHeldError):
        # not counted against the version: the server is gone, or somebody else moves the alias
        raise
    except AmiciEvalError as error:
        return _failed(tags, version, key, _reason(error))
    except Exception as error:
        # an unexpected error ends this watcher; it is counted, so that only a few later watchers end of it
        _failed(tags, version, key, _reason(error))
        raise
    now = tags.read()
    if f"{VERDICT_TAG}.{key}" not in now:
        return _failed(tags, version, key, f"judged ({outcome}), but its tag {VERDICT_TAG}.{key} is not there")
    if f"{ERROR_TAG}.{key}" in now:
        tags.remove(f"{ERROR_TAG}.{key}")
    logger.info("version %s of %s: %s", version, tags.name, outcome)
    return WatchedVersion(version=version, state="judged", said=outcome)


def _failed(tags: RegistryTags, version: str, key: str, reason: str) -> WatchedVersion:
    logger.error("version %s of %s could not be judged: %s", version, tags.name, reason)
    n = _failure(tags.read(), key).n + 1
    tags.write(f"{ERROR_TAG}.{key}", json.dumps({"n": n, "reason": reason}, ensure_ascii=False))
    return WatchedVersion(version=version, state="failed", said=reason)


@dataclass(frozen=True, kw_only=True)
class _Failure:
    n: int
    reason: str


def _failure(tags: dict[str, str], key: str) -> _Failure:
    try:
        value: Any = json.loads(tags[f"{ERROR_TAG}.{key}"])
        return _Failure(n=int(value["n"]), reason=str(value["reason"]))
    except (KeyError, ValueError, TypeError):
        return _Failure(n=0, reason="")


def _reason(error: Exception) -> str:
    text = str(error) if isinstance(error, AmiciEvalError) else first_line(error)
    return next(iter(text.splitlines()), type(error).__name__)[:_REASON_CHARACTERS]


def _versions(name: str) -> list[tuple[str, dict[str, str]]]:
    """Return the versions of a model with their tags, oldest first."""
    client = RegistryTags(name=name).client

    def ask() -> list[Any]:
        found = list(all_pages(partial(client.search_model_versions, f"name='{name}'")))
        if not found:
            client.get_registered_model(name)  # an error if there is no such model
        return found

    with tracking_errors(name):
        found = patiently(ask, what="listing the versions")
    return [(str(one.version), dict(one.tags)) for one in sorted(found, key=lambda one: int(one.version))]
