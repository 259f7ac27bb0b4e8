"""Races between processes over a real `mlflow server`: one champion, no version judged twice."""

from __future__ import annotations

import multiprocessing
from collections import Counter

import mlflow
import pytest

from amici_eval.common.errors import TrackingError
from amici_eval.tracking.jobs.promotion import promotions
from amici_eval.tracking.jobs.watching import watch
from tests.racing import promoter, race_key, watcher
from tests.tracking.test_server import server  # noqa: F401 - a fixture

pytestmark = [pytest.mark.server, pytest.mark.slow]

RACES = 50


@pytest.fixture
def remote(server):  # noqa: F811
    client = mlflow.MlflowClient(server.uri)
    for name, n_versions in (("raced", 4), ("watched", 2)):
        client.create_registered_model(name)
        for number in range(n_versions):
            client.create_model_version(name, source=f"s3://nowhere/{number}")
    return server


def run(targets, *, n_results: int) -> list[list]:
    """Run (function, arguments, group) in a process each; return what each group put."""
    context = multiprocessing.get_context("spawn")
    groups = sorted({group for *_, group in targets})
    starts = {group: context.Barrier(sum(one[2] == group for one in targets), timeout=120) for group in groups}
    queues = {group: context.Queue() for group in groups}
    processes = [
        context.Process(target=function, args=(*arguments, starts[group], queues[group]), daemon=True)
        for function, arguments, group in targets
    ]
    for process in processes:
        process.start()
    try:
        results = [[queues[group].get(timeout=300) for _ in range(n_results)] for group in groups]
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0] * len(processes)
    finally:
        for process in processes:
            process.kill()
    return results


def test_fifty_races_of_two_promotions_and_two_watchers(remote, tmp_path):
    log = tmp_path / "judged"
    targets = [(promoter, (remote.uri, "raced", number, RACES), "promote") for number in (0, 1)]
    targets += [(watcher, (remote.uri, "watched", RACES, log), "watch")] * 2
    promoted, watched = run(targets, n_results=2 * RACES)
    client = mlflow.MlflowClient(remote.uri)
    mlflow.set_tracking_uri(remote.uri)

    winners = []
    for race in range(RACES):
        both = [result[1:] for result in promoted if result[0] == race]
        ((winner, champion, _, told, now),) = [one for one in both if one[2]]
        ((loser, judged_against, _, reason, now_too),) = [one for one in both if not one[2]]
        assert winner != loser
        assert now == now_too == winner
        assert champion == judged_against == (winners[-1] if winners else None)
        assert told.endswith(f"to version {winner}")
        against = champion or "no version"
        assert reason == f"champion is now version {winner}, this version was judged against {against}: judge it again"
        winners.append(winner)
    record = [one["version"] for one in promotions("raced", "champion")]
    assert record == winners[-len(record) :]
    assert not [tag for tag in client.get_registered_model("raced").tags if tag.startswith("amici_eval.lease")]

    judged = Counter(tuple(line.split()[:2]) for line in log.read_text().splitlines())
    assert judged == {(race_key(race), version): 1 for race in range(RACES) for version in "12"}
    assert sum(len(versions) for _, _, versions, _ in watched) == 2 * RACES
    assert not any(n_failed for *_, n_failed in watched)
    for version in "12":
        tags = client.get_model_version("watched", version).tags
        assert set(tags) == {f"amici_eval.verdict.{race_key(race)}" for race in range(RACES)}
    # both took part, else it was no race
    assert len({process for _, process, versions, _ in watched if versions}) == 2


def test_a_watcher_outlives_its_server(remote, caplog):
    mlflow.set_tracking_uri(remote.uri)
    calls, waits = [], []

    def judge(model_uri: str) -> str:
        calls.append(model_uri)
        name, version = model_uri.removeprefix("models:/").split("/")
        mlflow.MlflowClient().set_model_version_tag(name, version, "amici_eval.verdict.0123456789ab", "pass run")
        return "pass"

    def pause(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            remote.start()
        if len(waits) == 3:
            raise KeyboardInterrupt

    remote.stop()
    options = {"key": "0123456789ab", "judge": judge, "lease_s": 60, "interval_s": 5}
    with pytest.raises(TrackingError, match="the registry does not answer for watched"):
        watch("watched", once=True, **options)
    with pytest.raises(KeyboardInterrupt):
        watch("watched", once=False, pause=pause, **options)
    assert waits == [5, 10, 5]
    assert calls == ["models:/watched/1", "models:/watched/2"]
    assert "trying again in 10 s" in caplog.text
