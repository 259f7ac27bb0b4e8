"""Promote a version to an alias of a registered model, keep a record of what it replaced, and roll back."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from typing import TYPE_CHECKING, Any

from amici_eval.common.errors import DataError, ModelNotFoundError, TrackingError
from amici_eval.tracking.registry_tags import RegistryTags, held

if TYPE_CHECKING:
    from amici_eval.tracking.registry_tags import Lease

logger = logging.getLogger(__name__)

PROMOTIONS_TAG = "amici_eval.promotions"
ROLLED_BACK_TAG = "amici_eval.rolled_back"
"""Tag of a version whose promotion to an alias was taken back."""
_RECORD_CHARACTERS = 5000
_LEASE_S = 60.0
_WAIT_S = 120.0


@dataclass(frozen=True, kw_only=True)
class Promotion:
    """What became of an alias.

    ``version``: where it was to point (``None``: nowhere); ``replaced``: where it pointed before, if anywhere;
    ``reason``: a sentence on what was done or why not.
    """

    name: str
    alias: str
    version: str | None
    replaced: str | None
    moved: bool
    reason: str


def promotions(name: str, alias: str) -> list[dict[str, Any]]:
    """Return the record of promotions to an alias, newest last."""
    return _seen(RegistryTags(name=name), alias).record


def promote(
    name: str,
    version: str,
    *,
    alias: str,
    expected: str | None,
    run_id: str | None = None,
    dry_run: bool = False,
    wait_s: float = _WAIT_S,
) -> Promotion:
    """Let an alias point to a version, if it still points to the one that this version was judged against.

    The promotion is written to the record, a tag of the registered model, before the alias is moved. If the process
    dies in between, the next promotion drops the entry, which was never carried out; no move stays unrecorded.
    """
    tags = RegistryTags(name=name)
    _version_must_exist(tags, version)
    not_moved = partial(Promotion, name=name, alias=alias, version=version, moved=False)
    if dry_run:
        now = _seen(tags, alias).version
        told = _refusal(alias, version, expected, now) or f"dry run: {_move(alias, now, version)} would be done"
        return not_moved(replaced=now, reason=told)
    with held(tags, f"alias.{alias}", ttl_s=_LEASE_S, wait_s=wait_s) as lease:
        seen = _seen(tags, alias)
        now, before = seen.version, seen.record
        refused = _refusal(alias, version, expected, now)
        if refused is not None:
            return not_moved(replaced=now, reason=refused)
        if before and _was_undone(before[-1], now):
            before = before[:-1]
        entry = {"version": version, "replaced": now, "run_id": run_id, "time": _now()}
        _must_be_mine(lease, tags, alias)
        _write_record(tags, alias, [*before, entry])
        # a slow registry may have taken longer than the lease lasts
        _must_be_mine(lease, tags, alias)
        done = _moved(tags, alias, version, now)
        if not done.moved:
            _write_record(tags, alias, before)
            return done
        own, undone = RegistryTags(name=name, version=version), f"{ROLLED_BACK_TAG}.{alias}"
        if undone in own.read():
            own.remove(undone)
        return done


def rollback(name: str, alias: str, *, dry_run: bool = False, wait_s: float = _WAIT_S) -> Promotion:
    """Take the last promotion back: the alias points again to what it replaced, or is deleted if that was nothing."""
    tags = RegistryTags(name=name)
    if dry_run:
        entry = _last(tags, alias, _seen(tags, alias))
        told = f"dry run: {_move(alias, entry['version'], entry['replaced'])} would be done"
        return Promotion(
            name=name, alias=alias, version=entry["replaced"], replaced=entry["version"], moved=False, reason=told
        )
    with held(tags, f"alias.{alias}", ttl_s=_LEASE_S, wait_s=wait_s) as lease:
        seen = _seen(tags, alias)
        entry = _last(tags, alias, seen)
        _must_be_mine(lease, tags, alias)
        done = _moved(tags, alias, entry["replaced"], entry["version"])
        if done.moved:
            _write_record(tags, alias, seen.record[:-1])
            # keeps watchers from promoting it again
            RegistryTags(name=name, version=entry["version"]).write(f"{ROLLED_BACK_TAG}.{alias}", _now())
        return done


def promoted_over(name: str, alias: str, version: str) -> dict[str, Any] | None:
    """Return the record of the promotion of a version to an alias; ``None``: none, or the alias points elsewhere."""
    seen = _seen(RegistryTags(name=name), alias)
    if seen.version != version:
        return None
    return next((entry for entry in reversed(seen.record) if entry["version"] == version), None)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _last(tags: RegistryTags, alias: str, seen: _AliasState) -> dict[str, Any]:
    """Return the last promotion on record, or refuse if it cannot be taken back."""
    now = seen.version
    if not seen.record:
        raise DataError(
            value=f"no promotion of {tags.name} to {alias} is on record",
            rule="a rollback takes back what amici-eval gate promoted",
            fix="set the alias by hand",
        )
    entry = seen.record[-1]
    if _was_undone(entry, now):
        raise DataError(
            value=f"{alias} of {tags.name} {_pointing(now)}, which the last promotion, to version {entry['version']}, "
            "replaced",
            rule="that promotion was taken back by hand, or never carried out: there is nothing to take back",
            fix="set the alias by hand to go further back",
        )
    if now != entry["version"]:
        raise DataError(
            value=f"{alias} of {tags.name} {_pointing(now)}, the last promotion set it to version {entry['version']}",
            rule="a rollback takes back only what is still so",
            fix=f"set {alias} to version {entry['version']} first, or set it by hand to what it should be",
        )
    if entry["replaced"] is not None:
        _version_must_exist(tags, entry["replaced"], f"{alias} pointed to it before version {entry['version']}; ")
    return entry


def _refusal(alias: str, version: str, expected: str | None, now: str | None) -> str | None:
    if now == version:
        return f"{alias} is version {version} already"
    if now != expected:
        against = "no version" if expected is None else expected
        is_now = f"{alias} is now version {now}" if now is not None else f"{alias} is now not set"
        return f"{is_now}, this version was judged against {against}: judge it again"
    return None


def _moved(tags: RegistryTags, alias: str, version: str | None, before: str | None) -> Promotion:
    if version is None:
        tags.ask("delete_{}_alias", alias)
    else:
        tags.ask("set_{}_alias", alias, version)
    now = _seen(tags, alias).version
    moved = now == version
    reason = _move(alias, before, version)
    if not moved:
        reason = f"{alias} {_pointing(now)}, though it was just set to {_named(version)}: somebody else moves it, too"
    logger.info("%s: %s", tags.name, reason)
    return Promotion(name=tags.name, alias=alias, version=version, replaced=before, moved=moved, reason=reason)


def _move(alias: str, before: str | None, after: str | None) -> str:
    return f"{alias} from {_named(before)} to {_named(after)}"


def _named(version: str | None) -> str:
    return "no version" if version is None else f"version {version}"


def _pointing(version: str | None) -> str:
    return "is not set" if version is None else f"is version {version}"


def _version_must_exist(tags: RegistryTags, version: str, why: str = "") -> None:
    try:
        replace(tags, version=version).ask("get_{}")
    except ModelNotFoundError as error:
        raise ModelNotFoundError(
            value=f"{tags.name} has no version {version}",
            rule=f"{why}an alias points to a version that is there",
            fix="name another version; one that was deleted does not come back",
        ) from error


def _must_be_mine(lease: Lease, tags: RegistryTags, alias: str) -> None:
    if not lease.still_mine():
        raise TrackingError(
            value=f"the lease on {alias} of {tags.name} ran out before the alias was moved",
            rule="only its holder moves the alias; nothing was changed",
            fix="try again; if it happens again, the registry is very slow",
        )


def _was_undone(entry: dict[str, Any], now: str | None) -> bool:
    """Return whether a promotion was never carried out, or taken back by hand."""
    return bool(entry["replaced"] == now and entry["version"] != now)


@dataclass(frozen=True, kw_only=True)
class _AliasState:
    """Where an alias points, and the record of promotions to it."""

    version: str | None
    record: list[dict[str, Any]]


def _seen(tags: RegistryTags, alias: str) -> _AliasState:
    model = tags.ask("get_{}")
    version = str(model.aliases[alias]) if alias in model.aliases else None
    try:
        record = [
            {
                "version": str(entry["version"]),
                "replaced": None if entry["replaced"] is None else str(entry["replaced"]),
                "run_id": entry.get("run_id"),
                "time": entry.get("time"),
            }
            for entry in json.loads(model.tags.get(f"{PROMOTIONS_TAG}.{alias}", "[]"))
        ]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            value=f"tag {PROMOTIONS_TAG}.{alias} of {tags.name} is no record of promotions",
            rule="it is a JSON list that amici-eval writes",
            fix="mend or delete the tag",
        ) from error
    return _AliasState(version=version, record=record)


def _write_record(tags: RegistryTags, alias: str, record: list[dict[str, Any]]) -> None:
    kept = list(record)
    while len(json.dumps(kept)) > _RECORD_CHARACTERS:
        kept.pop(0)
    tags.write(f"{PROMOTIONS_TAG}.{alias}", json.dumps(kept))
