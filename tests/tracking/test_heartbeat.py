"""Signs of life: a run whose process is gone is closed by the next command, one whose process lives is not."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import mlflow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import BAD_REQUEST, RESOURCE_ALREADY_EXISTS
from requests import ConnectionError as RequestsConnectionError

from amici_eval.settings.evaluation import TrackingSpec
from amici_eval.tracking.registry import connect
from amici_eval.tracking.runs import tracked
from amici_eval.tracking.runs.tracked import (
    HEARTBEAT_TAG,
    PARTIAL_TAG,
    STOPPED_S,
    Heartbeat,
    SignOfLife,
    close_abandoned,
    tracked_run,
)
from amici_eval.tracking.store import patiently


def start(beat: SignOfLife | str, *, partial: bool = True) -> str:
    tags = {HEARTBEAT_TAG: beat if isinstance(beat, str) else beat.to_text()}
    if partial:
        tags[PARTIAL_TAG] = "in progress"
    return mlflow.MlflowClient().create_run("0", tags=tags).info.run_id


def status(run_id: str) -> str:
    return mlflow.get_run(run_id).info.status


def gone_process() -> SignOfLife:
    """Return the sign of life of a process that has ended."""
    code = "from amici_eval.tracking.runs.tracked import SignOfLife; print(SignOfLife.now().to_text())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    beat = SignOfLife.parse(done.stdout)
    assert beat is not None
    return beat


def test_runs_of_processes_that_are_gone_are_closed(bare_model):
    dead, alive = gone_process(), SignOfLife.now()
    killed, whole = start(dead), start(dead, partial=False)
    own, other_number = start(alive), start(replace(alive, started="1"))
    rebooted = start(replace(alive, boot="another", time=time.time() - 300.0))
    same_name = start(replace(alive, boot="another machine"))
    not_ours = mlflow.MlflowClient().create_run("0").info.run_id
    broken = start("{broken")
    closed = connect(bare_model.uri) and {name: status(name) for name in (killed, whole, own, other_number, rebooted)}
    assert closed == {
        killed: "KILLED",
        whole: "FINISHED",
        own: "RUNNING",
        other_number: "KILLED",
        rebooted: "KILLED",
    }
    tags = {name: mlflow.get_run(name).data.tags.get(PARTIAL_TAG) for name in (killed, whole, own)}
    assert tags == {killed: "KILLED (its process is gone)", whole: None, own: "in progress"}
    assert status(not_ours) == status(broken) == status(same_name) == "RUNNING"
    for run_id in (own, not_ours, broken, same_name):
        mlflow.MlflowClient().set_terminated(run_id)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_process_that_has_ended_and_is_not_collected_is_gone():
    with subprocess.Popen(["sleep", "60"]) as process:
        beat = replace(SignOfLife.now(), pid=process.pid, started=tracked._start_of(process.pid))
        assert not beat.has_stopped()
        process.kill()
        # until it is waited for, its entry stays, with the start that it had
        state = Path(f"/proc/{process.pid}/stat")
        while state.read_text().rpartition(")")[2].split()[0] != "Z":
            time.sleep(0.01)
        assert beat.has_stopped()


def test_elsewhere_only_time_tells(bare_model):
    far = replace(SignOfLife.now(), host="elsewhere")
    now = time.time()
    ages = {5.0: "RUNNING", STOPPED_S - 60: "RUNNING", STOPPED_S + 1: "KILLED", -86400.0: "RUNNING"}
    runs = {start(replace(far, time=now - age)): expected for age, expected in ages.items()}
    close_abandoned(mlflow.MlflowClient())
    assert {run_id: status(run_id) for run_id in runs} == runs
    for run_id in runs:
        mlflow.MlflowClient().set_terminated(run_id)


@pytest.mark.parametrize("jump", [-86400.0, 86400.0])
def test_a_clock_that_jumps_closes_no_living_run_of_this_machine(bare_model, monkeypatch, jump):
    run_id = start(SignOfLife.now())
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + jump)
    assert run_id not in close_abandoned(mlflow.MlflowClient())
    mlflow.MlflowClient().set_terminated(run_id)


def test_a_run_that_was_closed_too_early_is_what_its_process_makes_of_it(bare_model):
    with tracked_run(TrackingSpec(experiment="Default"), name="x", tags={}) as run:
        mlflow.MlflowClient().set_terminated(run.info.run_id, "KILLED")
    assert status(run.info.run_id) == "FINISHED"
    assert PARTIAL_TAG not in mlflow.get_run(run.info.run_id).data.tags


def test_signs_of_life_are_given_and_end(bare_model):
    run_id = start("{}")
    heart = Heartbeat(run_id, mlflow.MlflowClient(), every_s=0.05).start()
    until = time.monotonic() + 20
    while (beat := SignOfLife.parse(mlflow.get_run(run_id).data.tags[HEARTBEAT_TAG])) is None:
        assert time.monotonic() < until
        time.sleep(0.05)
    assert beat.pid == os.getpid()
    assert not beat.has_stopped()
    heart.stop()
    mlflow.MlflowClient().set_tag(run_id, HEARTBEAT_TAG, "stopped")
    time.sleep(0.3)
    assert mlflow.get_run(run_id).data.tags[HEARTBEAT_TAG] == "stopped"
    mlflow.MlflowClient().set_terminated(run_id)


def test_a_store_that_is_away_does_not_stop_the_heart(caplog):
    class Store:
        calls = 0

        def set_tag(self, *_: object) -> None:
            Store.calls += 1
            raise MlflowException("gone")

    heart = Heartbeat("run", Store(), every_s=0.01).start()
    until = time.monotonic() + 20
    while Store.calls < 5:
        assert time.monotonic() < until
        time.sleep(0.01)
    heart.stop()
    assert sum("does not answer" in one.message for one in caplog.records) == 1


def test_a_store_that_fails_is_no_obstacle():
    class Store:
        def search_experiments(self) -> None:
            raise MlflowException("gone")

        def search_runs(self, *_: object, **__: object) -> None:
            raise MlflowException("gone")

    assert close_abandoned(Store()) == []


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.text()
    | st.dictionaries(
        st.sampled_from(["host", "boot", "namespace", "pid", "started", "time"]),
        st.none() | st.text() | st.integers() | st.floats() | st.lists(st.integers()),
    ).map(lambda values: __import__("json").dumps(values))
)
def test_any_tag_is_a_sign_or_none(text):
    beat = SignOfLife.parse(text)
    assert beat is None or isinstance(beat.has_stopped(), bool)


def waiting(monkeypatch) -> list[float]:
    waits: list[float] = []
    monkeypatch.setattr("amici_eval.tracking.store.time.sleep", waits.append)
    return waits


def test_a_store_that_comes_back_is_waited_for(monkeypatch):
    lost = MlflowException("b")
    lost.__cause__ = RequestsConnectionError("gone")
    waits, answers = waiting(monkeypatch), [ConnectionError("a"), lost, "done"]

    def ask():
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert patiently(ask, seconds=60.0, what="asking") == "done"
    assert len(waits) == 2
    assert waits[0] < waits[1]


@pytest.mark.parametrize(
    "words",
    [
        "(sqlite3.IntegrityError) UNIQUE constraint failed: datasets.name",
        '(psycopg2.errors.UniqueViolation) duplicate key value violates unique constraint "dataset_pk"',
        "(pymysql.err.IntegrityError) (1062, \"Duplicate entry '1-a' for key 'datasets.PRIMARY'\")",
    ],
)
def test_two_that_write_the_same_at_once_ask_again(monkeypatch, words):
    waits, answers = waiting(monkeypatch), [MlflowException(words, error_code=BAD_REQUEST)]

    def ask():
        if answers:
            raise answers.pop()
        return "done"

    assert patiently(ask, seconds=60.0, what="asking") == "done"
    assert len(waits) == 1


def test_patience_ends(monkeypatch):
    waits = waiting(monkeypatch)

    def ask():
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError):
        patiently(ask, seconds=0.0, what="asking")
    assert waits == []


@pytest.mark.parametrize(
    "error",
    [
        ValueError("x"),
        OSError(28, "No space left on device"),
        PermissionError(13, "denied"),
        MlflowException("what has no code says nothing"),
        MlflowException("RESOURCE_DOES_NOT_EXIST", error_code=5),
        MlflowException("(sqlite3.OperationalError) database or disk is full"),
        MlflowException("(sqlite3.IntegrityError) NOT NULL constraint failed: a.b", error_code=BAD_REQUEST),
        MlflowException("(sqlite3.IntegrityError) UNIQUE constraint failed", error_code=RESOURCE_ALREADY_EXISTS),
    ],
    ids=str,
)
def test_what_does_not_pass_is_not_waited_for(monkeypatch, error):
    waits = waiting(monkeypatch)

    def ask():
        raise error

    with pytest.raises(type(error)):
        patiently(ask, seconds=60.0, what="asking")
    assert waits == []
