"""`amici-eval rollback` and `amici-eval watch` as a user calls them."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from amici_eval.tracking.jobs.promotion import promote
from tests import watch_process
from tests.cli.test_cli import call
from tests.test_imports import HEAVY, loaded_after

ROOT = Path(__file__).resolve().parents[2]
VERDICT = "amici_eval.verdict.0123456789ab"


def test_rollback_on_the_command_line(bare_model, capsys):
    promote(bare_model.name, "1", alias="champion", expected=None)
    promote(bare_model.name, "2", alias="champion", expected="1")
    arguments = ["rollback", f"model={bare_model.name}", f"tracking.uri={bare_model.uri}"]
    assert call(*arguments, "--dry-run") == 0
    said = capsys.readouterr().out
    assert said == f"{bare_model.name}: dry run: champion from version 2 to version 1 would be done\n"
    assert bare_model.aliases() == {"champion": "2"}
    assert call(*arguments) == 0
    assert capsys.readouterr().out == f"{bare_model.name}: champion from version 2 to version 1\n"
    assert bare_model.aliases() == {"champion": "1"}
    assert call(*arguments, "alias=best") == 2
    assert f"amici-eval: no promotion of {bare_model.name} to best is on record" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rollback"], "model is not set: it has no default; pass model=..."),
        (["watch", "--once"], "model is not set: it has no default; pass model=..."),
        (
            ["watch", "model=a", "watch.intervall=3"],
            "setting 'watch.intervall': watch has interval, max_interval, lease",
        ),
        (["rollback", "model=a", "versions=1"], "setting 'versions': rollback has model, alias, tracking"),
        (["rollback", "model=a", "--once"], "unrecognized arguments: --once"),
    ],
)
def test_settings_that_do_not_exist_are_refused(arguments, message, capsys):
    assert call(*arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["007", "1e5", "tumor & stroma", "a,b"])
def test_the_name_of_a_model_is_taken_as_it_is(bare_model, name, capsys):
    bare_model.client.create_registered_model(name)
    try:
        assert call("rollback", f"model={name}", f"tracking.uri={bare_model.uri}") == 2
        assert f"no promotion of {name} to champion is on record" in capsys.readouterr().err
    finally:
        bare_model.client.delete_registered_model(name)


def start_watch(model, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "tests.watch_process", f"model={model.name}", f"tracking.uri={model.uri}"),
            *("permutation.seed=1", *arguments),
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a job in the background of a shell ignores Ctrl-C, and its children with it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_watch_once_on_the_command_line(bare_model, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "amici_eval.tracking.jobs.gating", watch_process)
    monkeypatch.setattr("amici_eval.settings.comparison.gate_key", lambda **_: watch_process.KEY)
    arguments = ["watch", "--once", f"model={bare_model.name}", f"tracking.uri={bare_model.uri}"]
    assert call(*arguments, "data.uri=broken") == 2
    failed = f"models:/{bare_model.name}/2: failed: no data: there must be some; pass data.uri\n"
    assert failed in capsys.readouterr().out
    assert call(*arguments) == 0
    judged = [f"models:/{bare_model.name}/{version}: pass (run abc)" for version in "123"]
    watching = f"watching {bare_model.name} in {bare_model.uri}, configuration 0123456789ab"
    assert capsys.readouterr().out.splitlines() == [watching, *judged]
    assert bare_model.tags("3") == {VERDICT: "pass abc"}
    assert call(*arguments) == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["nothing to judge"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_watch_goes_on_until_it_is_interrupted(bare_model, number, code):
    with start_watch(bare_model, "watch.interval=3600", "watch.max_interval=3600") as process:
        while not process.stdout.readline().startswith(f"models:/{bare_model.name}/3: pass"):
            assert process.poll() is None
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    # a log message that the signal interrupts may be written between them
    assert [line for line in errors.splitlines() if line.startswith("amici-eval: ")] == [
        f"amici-eval: stopping ({'Ctrl-C' if number == signal.SIGINT else 'SIGTERM'})",
        "amici-eval: interrupted; the same command again takes up what is finished",
    ]
    assert [bare_model.tags(version) for version in "123"] == [{VERDICT: "pass abc"}] * 3


def test_watch_once_with_nothing_to_do_loads_no_model(bare_model):
    for version in "123":
        bare_model.client.delete_model_version(bare_model.name, version)
    arguments = ["--once", f"model={bare_model.name}", f"tracking.uri={bare_model.uri}"]
    code = f"from amici_eval.cli.commands import main; main(['watch', *{arguments!r}])"
    among = (*HEAVY, "hydra", "sqlalchemy")
    loaded = loaded_after(code, among=among)
    assert loaded >= {"mlflow", "hydra", "sqlalchemy"}, "it did not run"
    assert not loaded & {"torch", "amici", "scvi", "numba", "anndata", "matplotlib"}
