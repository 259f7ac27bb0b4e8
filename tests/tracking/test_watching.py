from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
from mlflow.exceptions import MlflowException

from amici_eval.common.errors import DataError, InvalidSpecError, ModelNotFoundError, TrackingError
from amici_eval.tracking.jobs import watching
from amici_eval.tracking.jobs.watching import WatchedVersion, watch
from amici_eval.tracking.registry_tags import RegistryTags, held

KEY = "0123456789ab"
VERDICT = f"amici_eval.verdict.{KEY}"
ERROR = f"amici_eval.watch_error.{KEY}"


class Judge:
    """Sets the tag of a verdict as the gate does, and counts; outcomes by version, errors are raised."""

    def __init__(self, model, **outcomes):
        self.model, self.outcomes, self.calls = model, outcomes, []

    def __call__(self, uri: str) -> str:
        self.calls.append(uri)
        name, version = uri.removeprefix("models:/").split("/")
        assert name == self.model.name
        outcome = self.outcomes.get(f"v{version}", "pass")
        if isinstance(outcome, BaseException):
            raise outcome
        if outcome is not None:
            self.model.client.set_model_version_tag(name, version, VERDICT, f"{outcome} run{version}")
        return str(outcome)


def look(model, judge, **options):
    return watch(model.name, key=KEY, judge=judge, once=True, **{"lease_s": 60.0, **options})


def test_versions_without_a_verdict_are_judged_oldest_first(bare_model):
    for number in range(4, 12):  # 10 comes after 9
        bare_model.client.create_model_version(bare_model.name, source=f"s3://nowhere/{number}")
    bare_model.client.set_model_version_tag(bare_model.name, "2", VERDICT, "fail run0")
    bare_model.client.set_model_version_tag(bare_model.name, "3", "amici_eval.verdict.ba9876543210", "fail run0")
    judge = Judge(bare_model, v3="fail", v4="undecided")
    done = look(bare_model, judge)
    versions = ["1", *map(str, range(3, 12))]
    assert judge.calls == [f"models:/{bare_model.name}/{version}" for version in versions]
    assert [(one.version, one.said) for one in done.judged][:3] == [("1", "pass"), ("3", "fail"), ("4", "undecided")]
    assert (len(done.judged), done.skipped, done.failed) == (10, (), ())
    assert bare_model.tags("1") == {VERDICT: "pass run1"}, "the lease is given back"
    again = look(bare_model, judge)
    assert (again.versions, len(judge.calls)) == ((), 10)


def test_a_version_that_another_watcher_judges_is_skipped(bare_model):
    judge = Judge(bare_model)
    with held(RegistryTags(name=bare_model.name, version="2"), f"verdict.{KEY}", ttl_s=60, owner="another"):
        done = look(bare_model, judge)
    assert [one.version for one in done.judged] == ["1", "3"]
    ((version, said),) = [(one.version, one.said) for one in done.skipped]
    assert version == "2"
    assert f"verdict.{KEY} of {bare_model.name} version 2 is held by another until" in said
    assert not done.failed


def test_a_verdict_that_comes_while_the_lease_is_waited_for_counts(bare_model, monkeypatch):
    real = watching.held

    def held_late(tags, *arguments, **options):
        if tags.version == "1":
            tags.write(VERDICT, "fail run7")
        return real(tags, *arguments, **options)

    monkeypatch.setattr(watching, "held", held_late)
    judge = Judge(bare_model)
    done = look(bare_model, judge)
    assert done.skipped == (
        WatchedVersion(version="1", state="skipped", said="another watcher has judged it meanwhile"),
    )
    assert len(judge.calls) == 2
    assert bare_model.tags("1") == {VERDICT: "fail run7"}


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (DataError(value="no data", rule="there must be some", fix="pass it"), "no data: there must be some; pass it"),
        (MlflowException("no artifact\nat all"), "no artifact at all: MLflow refuses this; do what it says"),
    ],
)
def test_what_cannot_be_judged_is_tried_three_times_and_left(bare_model, caplog, error, reason):
    judge = Judge(bare_model, v2=error)
    for number in (1, 2, 3):
        done = look(bare_model, judge)
        assert done.failed == (WatchedVersion(version="2", state="failed", said=reason),)
        assert json.loads(bare_model.tags("2")[ERROR]) == {"n": number, "reason": reason}
    assert len(judge.calls) == 2 + 3, "the others were judged once"
    done = look(bare_model, judge)
    assert done.failed == (WatchedVersion(version="2", state="left", said=reason),)
    assert (len(judge.calls), done.worked) == (5, False)
    assert (
        f"is left: it could not be judged 3 times, at last because of {reason}; delete its tag {ERROR}" in caplog.text
    )
    bare_model.client.delete_model_version_tag(bare_model.name, "2", ERROR)
    judge.outcomes = {}
    assert [one.version for one in look(bare_model, judge).judged] == ["2"]


def test_a_success_takes_the_note_of_an_error_away(bare_model):
    judge = Judge(bare_model, v2=DataError(value="a", rule="b", fix="c"))
    look(bare_model, judge)
    judge.outcomes = {}
    look(bare_model, judge)
    assert bare_model.tags("2") == {VERDICT: "pass run2"}


def test_a_judge_that_leaves_no_verdict_is_not_asked_for_ever(bare_model):
    judge = Judge(bare_model, v1=None)
    for _ in range(5):
        done = look(bare_model, judge)
    assert judge.calls.count(f"models:/{bare_model.name}/1") == 3
    assert done.failed[0].said == f"judged (None), but its tag {VERDICT} is not there"


@pytest.mark.parametrize("error", [ZeroDivisionError("by zero"), KeyboardInterrupt()])
def test_what_ends_a_watcher_leaves_no_lease(bare_model, error):
    judge = Judge(bare_model, v2=error)
    with pytest.raises(type(error)):
        look(bare_model, judge)
    assert len(judge.calls) == 2
    # an unforeseen error is noted, so that it does not end one watcher after the other; an interrupt says nothing
    expected = (
        {} if isinstance(error, KeyboardInterrupt) else {ERROR: '{"n": 1, "reason": "ZeroDivisionError: by zero"}'}
    )
    assert bare_model.tags("2") == expected


class EnoughError(Exception):
    pass


def pauses(enough: int, then=lambda number: None):
    """Return a pause that notes seconds, does something after each, and ends the watcher after some."""
    seen = []

    def pause(seconds: float) -> None:
        seen.append(seconds)
        if len(seen) == enough:
            raise EnoughError
        then(len(seen))

    pause.seen = seen
    return pause


def test_rounds_come_less_often_while_there_is_nothing_to_do(bare_model):
    def new_version(number: int) -> None:
        if number == 6:
            bare_model.client.create_model_version(bare_model.name, source="s3://nowhere/4")

    judge, pause = Judge(bare_model), pauses(9, new_version)
    with pytest.raises(EnoughError):
        watch(
            bare_model.name,
            key=KEY,
            judge=judge,
            once=False,
            lease_s=60,
            interval_s=10,
            max_interval_s=50,
            pause=pause,
        )
    assert pause.seen == [10, 10, 20, 40, 50, 50, 10, 10, 20]
    assert len(judge.calls) == 4


def test_a_server_that_does_not_answer_is_waited_for(bare_model, monkeypatch, caplog):
    real = watching._versions
    gone = [True]

    def versions(name):
        if gone[0]:
            raise TrackingError(value="the registry does not answer", rule="it must", fix="start it")
        return real(name)

    monkeypatch.setattr(watching, "_versions", versions)
    judge = Judge(bare_model)
    with pytest.raises(TrackingError):
        look(bare_model, judge)
    pause = pauses(4, lambda number: gone.__setitem__(0, number < 3))
    with pytest.raises(EnoughError):
        watch(bare_model.name, key=KEY, judge=judge, once=False, lease_s=60, interval_s=10, pause=pause)
    assert pause.seen == [10, 20, 40, 10]
    assert len(judge.calls) == 3
    assert "trying again in 20 s" in caplog.text


def test_a_version_deleted_meanwhile_is_no_failure(bare_model):
    class Deleting(Judge):
        def __call__(self, uri: str) -> str:
            if uri.endswith("/1"):
                self.model.client.delete_model_version(self.model.name, "2")
            if uri.endswith("/3"):
                self.model.client.delete_model_version(self.model.name, "3")
                raise DataError(value="gone", rule="it must be there", fix="register it")
            return super().__call__(uri)

    done = look(bare_model, Deleting(bare_model))
    assert [(one.version, one.state) for one in done.versions] == [("1", "judged"), ("2", "skipped"), ("3", "skipped")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lease_s": 0}, "watch.lease=0: it must be a number of seconds above 0"),
        ({"interval_s": -1}, "watch.interval=-1: "),
        ({"interval_s": 10, "max_interval_s": 5}, "watch.max_interval=5: .* and at least watch.interval=10"),
        ({"lease_s": float("nan")}, "watch.lease=nan"),
    ],
)
def test_times_that_make_no_sense_are_refused(bare_model, options, message):
    with pytest.raises(InvalidSpecError, match=message):
        look(bare_model, Judge(bare_model), **options)


def test_a_model_that_is_not_there_is_told(bare_model):  # noqa: ARG001, RUF100 - its store
    with pytest.raises(ModelNotFoundError, match="no-such-model"):
        watch("no-such-model", key=KEY, judge=str, once=False, lease_s=60)


_DIES = """
import sys, time, mlflow
from amici_eval.tracking.jobs.watching import watch
uri, name, key = sys.argv[1:]
mlflow.set_tracking_uri(uri)
def judge(model_uri):
    print("judging", flush=True)
    time.sleep(600)
watch(name, key=key, judge=judge, once=True, lease_s=4)
"""


def test_the_version_of_a_watcher_that_was_killed_is_taken_over(bare_model):
    command = [sys.executable, "-c", _DIES, bare_model.uri, bare_model.name, KEY]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "judging\n"
        judge = Judge(bare_model)
        assert [one.version for one in look(bare_model, judge).judged] == ["2", "3"]
        process.kill()
    until = time.monotonic() + 60
    while not (done := look(bare_model, judge)).judged and time.monotonic() < until:
        assert [one.version for one in done.skipped] == ["1"]
        time.sleep(0.2)
    assert [one.version for one in done.judged] == ["1"]
    assert bare_model.tags("1") == {VERDICT: "pass run1"}
