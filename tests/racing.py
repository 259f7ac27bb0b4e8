"""Processes that race on one registry: they promote different versions, or watch the same model; see test_races."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path


def race_key(race: int) -> str:
    return f"{race:012x}"


def promoter(uri: str, name: str, number: int, races: int, start: Any, done: Any) -> None:
    """In each race, promote a version of one's own: it was judged against the champion from before the start."""
    import mlflow

    from amici_eval.tracking.jobs.promotion import promote

    mlflow.set_tracking_uri(uri)
    client = mlflow.MlflowClient()
    for race in range(races):
        champion = client.get_registered_model(name).aliases.get("champion")
        champion = None if champion is None else str(champion)
        mine = [version for version in "1234" if version != champion][number]
        start.wait()
        result = promote(name, mine, alias="champion", expected=champion, run_id=f"{race}")
        start.wait()
        now = str(client.get_registered_model(name).aliases["champion"])
        done.put((race, mine, champion, result.moved, result.reason, now))
        start.wait()


def watcher(uri: str, name: str, races: int, log: Path, start: Any, done: Any) -> None:
    """In each race, judge the versions that have no verdict for its configuration."""
    import mlflow

    from amici_eval.tracking.jobs.watching import watch

    mlflow.set_tracking_uri(uri)
    client = mlflow.MlflowClient()

    def judge_for(key: str) -> Any:
        def judge(model_uri: str) -> str:
            version = model_uri.rpartition("/")[2]
            with log.open("a") as lines:
                lines.write(f"{key} {version} {os.getpid()}\n")
            client.set_model_version_tag(name, version, f"amici_eval.verdict.{key}", "pass run")
            return "pass"

        return judge

    for race in range(races):
        key = race_key(race)
        start.wait()
        result = watch(name, key=key, judge=judge_for(key), once=True, lease_s=120)
        done.put((race, os.getpid(), [one.version for one in result.judged], len(result.failed)))
        start.wait()
