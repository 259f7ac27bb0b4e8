"""The templates of docs/ci: their steps run as they stand, as a runner of GitHub, a cron daemon or GitLab runs them."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import mlflow
import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[1]
TEMPLATES = REPOSITORY / "docs" / "ci"
MODEL = "breast"
WATCHED = {"MODEL_NAME": MODEL, "MLFLOW_TRACKING_URI": "sqlite:///none.db"}
NOT_RUN = {"Install"}
EXPRESSION = re.compile(r"\$\{\{\s*([\w.-]+)\s*\}\}")
QUIET = ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK", "WANDB_MODE")


def template(name: str) -> dict[Any, Any]:
    return yaml.safe_load((TEMPLATES / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def bin_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PATH with this interpreter as `python` and this repository as `amici-eval`."""
    folder = tmp_path_factory.mktemp("bin")
    for name, call in (("python", ""), ("amici-eval", "-m amici_eval")):
        script = folder / name
        script.write_text(f'#!/bin/sh\nPYTHONPATH="{REPOSITORY}" exec "{sys.executable}" {call} "$@"\n')
        script.chmod(0o755)
    return folder


def environment(bin_folder: Path, **values: str) -> dict[str, str]:
    """Return what a fresh machine has, with one thread."""
    return {"PATH": f"{bin_folder}:{os.environ['PATH']}", "HOME": str(bin_folder), "OMP_NUM_THREADS": "1", **values}


@dataclass
class Round:
    """What one run of the workflow did."""

    workspace: Path
    outputs: dict[str, dict[str, str]] = field(default_factory=dict)
    codes: dict[str, int] = field(default_factory=dict)
    said: str = ""
    summary: str = ""

    @property
    def failed(self) -> dict[str, int]:
        return {name: code for name, code in self.codes.items() if code}


class Runner:
    """As much of a runner of GitHub as the template needs: expressions, env, outputs, the summary, and bash."""

    def __init__(self, workflow: dict[Any, Any], contexts: dict[str, dict[str, str]], machine: dict[str, str]) -> None:
        self.workflow, self.contexts, self.machine = workflow, contexts, machine
        (self.job,) = workflow["jobs"].values()

    def run(
        self, workspace: Path, *, only: str | None = None, outputs: dict[str, dict[str, str]] | None = None
    ) -> Round:
        done = Round(workspace, outputs=outputs or {})
        summary = workspace / "summary.md"
        for step in self.job["steps"]:
            name = step.get("name", "")
            if "run" not in step or name in NOT_RUN or (only is not None and name != only):
                continue
            assert step["shell"] == "bash"
            output = workspace / "outputs"
            output.write_text("")
            values = {
                **self.machine,
                **self.env(self.workflow["env"], done),
                **self.env(step.get("env", {}), done),
                "GITHUB_OUTPUT": str(output),
                "GITHUB_STEP_SUMMARY": str(summary),
            }
            # an expression in a script would put whatever it holds into the script
            assert "${{" not in step["run"]
            bash = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
            ended = subprocess.run(bash, cwd=workspace, env=values, check=False, capture_output=True, text=True)
            done.said += ended.stdout + ended.stderr
            done.codes[name] = ended.returncode
            if "id" in step:
                done.outputs[step["id"]] = dict(line.split("=", 1) for line in output.read_text().splitlines())
            if ended.returncode:
                break
        done.summary = summary.read_text(encoding="utf-8") if summary.exists() else ""
        return done

    def env(self, values: dict[str, str], done: Round) -> dict[str, str]:
        def value(match: re.Match[str]) -> str:
            context, *path = match[1].split(".")
            if context == "steps":
                step, kind, name = path
                assert kind == "outputs"
                return done.outputs[step][name]
            # what is not set is empty
            return self.contexts[context].get(path[0], "")

        return {name: EXPRESSION.sub(value, text) for name, text in values.items()}

    def kept(self, done: Round) -> set[str]:
        """Return the files of a round that the upload step finds."""
        (step,) = [one for one in self.job["steps"] if "upload-artifact" in one.get("uses", "")]
        found = [path for pattern in step["with"]["path"].split() for path in done.workspace.glob(pattern)]
        return {path.name for path in found}


@pytest.fixture(scope="module")
def tissue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from amici_eval.data.simulate import DEMO_TISSUE, simulate_tissue

    path = tmp_path_factory.mktemp("data") / "tissue.h5ad"
    simulate_tissue(replace(DEMO_TISSUE, region_fraction=0.3)).adata.write_h5ad(path)
    return path


def judged(folder: Path) -> dict[str, str]:
    """Return the outcome of each rule in the verdict.xml below a folder."""
    (path,) = folder.glob("gate/*/artifacts/verdict.xml")
    words = {"failure": "fail", "error": "undecided", "system-out": "pass"}
    return {case.attrib["name"]: words[case[0].tag] for case in ElementTree.parse(path).iter("testcase")}


@pytest.mark.slow
@pytest.mark.amici
def test_the_workflow_promotes_and_refuses_and_cron_goes_on_after_a_rollback(tissue, bin_folder, tmp_path, monkeypatch):
    """30 epochs learn one of three receivers, 55 all, 2 none; each difference is five standard errors or more."""
    # a new store has its artifacts in the folder of who asks first
    monkeypatch.chdir(tmp_path)
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    workflow = template("github-actions.yml")
    # what a user sets in the file
    workflow["env"].update(DATA=str(tissue), HELD_OUT="region=left_strip", GATE_OPTIONS="report.figures=false")
    contexts = {"vars": {"MODEL_NAME": MODEL}, "secrets": {"MLFLOW_TRACKING_URI": store}}
    runner = Runner(workflow, contexts, environment(bin_folder))
    client = mlflow.MlflowClient(tracking_uri=store)

    def train_and_gate(name: str, *, epochs: int) -> Round:
        workflow["env"]["EPOCHS"] = str(epochs)
        checkout = tmp_path / name
        checkout.mkdir()
        shutil.copy(TEMPLATES / "train.py", checkout)
        return runner.run(checkout)

    def amici_eval(*arguments: str) -> subprocess.CompletedProcess[str]:
        call = [str(bin_folder / "amici-eval"), *arguments]
        machine = environment(bin_folder, MLFLOW_TRACKING_URI=store)
        return subprocess.run(call, cwd=tmp_path, env=machine, check=False, capture_output=True, text=True)

    def champion() -> str:
        return str(client.get_registered_model(MODEL).aliases["champion"])

    first = train_and_gate("first", epochs=30)
    assert first.failed == {}, first.said
    assert list(first.codes) == ["Train", "Register", "Gate and promote"]
    assert "on 1402 of 2000 cells" in first.said
    assert first.outputs["register"]["model_uri"] == "models:/breast/1"
    assert "## breast 1: pass" in first.summary
    assert "Judged on 598 cells that no compared version was fitted on" in first.summary
    assert champion() == "1"
    assert runner.kept(first) == {"verdict.xml", "verdict.json", "report.html"}

    worse = train_and_gate("worse", epochs=2)
    assert worse.failed == {"Gate and promote": 3}, worse.said
    assert "::error::models:/breast/2 is refused" in worse.said
    # the first has learnt little itself: whether this one explains less is open, but no head of it carries signal
    assert "breast 2, judged against breast 1, is refused: some\\_signal." in worse.summary
    assert {rule for rule, outcome in judged(worse.workspace).items() if outcome == "fail"} == {"some_signal"}
    assert client.get_model_version(MODEL, "2").tags["amici_eval.verdict"] == "fail"
    assert champion() == "1"
    # a refusal is what one wants to read about
    assert runner.kept(worse) == {"verdict.xml", "verdict.json", "report.html"}

    better = train_and_gate("better", epochs=55)
    assert better.failed == {}, better.said
    assert set(judged(better.workspace).values()) == {"pass"}
    assert "breast 3, judged against breast 1, passes." in better.summary
    assert champion() == "3"

    back = amici_eval("rollback", f"model={MODEL}", "alias=champion")
    assert back.returncode == 0, back.stderr
    assert champion() == "1"

    # cron with the workflow's settings: all versions have a verdict
    settings = {name: workflow["env"][name] for name in ("DATA", "GATE", "ALIAS", "GATE_OPTIONS")}
    machine = environment(bin_folder, MODEL_NAME=MODEL, MLFLOW_TRACKING_URI=store, STATE=str(tmp_path / "cron"))
    idle = cron({**machine, **settings})
    assert (idle.returncode, idle.stdout, idle.stderr) == (0, "", "")
    log = tmp_path / "cron" / f"{MODEL}.log"
    assert "nothing to judge" in log.read_text()
    assert champion() == "1"

    # the good model comes again, by somebody who only registers: cron judges it, and no other
    again = amici_eval("register", "model_dir=better/model", f"name={MODEL}", f"data.uri={tissue}")
    assert again.returncode == 0, again.stderr
    busy = cron({**machine, **settings})
    assert (busy.returncode, busy.stdout, busy.stderr) == (0, "", ""), log.read_text()
    assert champion() == "4"
    assert re.findall(r"^models:/breast/(\d+): (\w+) \(run", log.read_text(), flags=re.M) == [("4", "pass")]


def cron(values: dict[str, str]) -> subprocess.CompletedProcess[str]:
    script = [str(TEMPLATES / "cron.sh")]
    return subprocess.run(script, cwd="/", env=values, check=False, capture_output=True, text=True)


@pytest.fixture
def stub(tmp_path) -> Path:
    """A folder for PATH with an `amici-eval` that notes its arguments and exits with $CODE."""
    folder = tmp_path / "stub"
    folder.mkdir()
    script = folder / "amici-eval"
    note = f'echo called >&2\nprintf "%s\\n" "$@" >"{tmp_path / "arguments"}"\n'
    script.write_text(f'#!/bin/bash\n{note}[ -z "${{HANGS:-}}" ] || exec sleep 60\nexit "$CODE"\n')
    script.chmod(0o755)
    return folder


@pytest.mark.parametrize(
    ("code", "on_undecided", "ends", "said"),
    [
        (0, "fail", 0, "::notice::models:/a b/7 passed"),
        (1, "warn", 1, "::error::models:/a b/7 could not be judged, exit code 1"),
        (2, "warn", 2, "::error::models:/a b/7 could not be judged, exit code 2"),
        (3, "warn", 3, "::error::models:/a b/7 is refused"),
        (4, "fail", 4, "::warning::models:/a b/7 is undecided"),
        (4, "warn", 0, "::warning::models:/a b/7 is undecided"),
    ],
)
def test_the_exit_code_of_the_gate_is_that_of_its_step(stub, tmp_path, code, on_undecided, ends, said):
    workflow = template("github-actions.yml")
    workflow["env"].update(ON_UNDECIDED=on_undecided, DATA="my data/tissue.h5ad", GATE_OPTIONS="--config-dir ci a=1")
    runner = Runner(workflow, {"vars": {}, "secrets": {}}, environment(stub, CODE=str(code)))
    outputs = {"register": {"model_uri": "models:/a b/7"}}
    done = runner.run(tmp_path, only="Gate and promote", outputs=outputs)
    assert done.codes == {"Gate and promote": ends}
    assert said in done.said
    arguments = (tmp_path / "arguments").read_text().splitlines()
    assert arguments[:3] == ["gate", "model_uri=models:/a b/7", "data.uri=my data/tissue.h5ad"]
    assert arguments[-3:] == ["--config-dir", "ci", "a=1"]


def test_the_workflow_keeps_expressions_out_of_scripts_and_does_not_phone_home():
    workflow = template("github-actions.yml")
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    assert {step["name"] for step in steps if "run" in step} == {"Install", "Train", "Register", "Gate and promote"}
    assert not [step for step in steps if "${{" in step.get("run", "")]
    assert workflow["permissions"] == {"contents": "read"}
    assert "vars.MODEL_NAME" in workflow["concurrency"]["group"]
    assert workflow["concurrency"]["cancel-in-progress"] is False
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    at_home = {name: re.search(rf"^export {name} := (\S+)$", makefile, flags=re.M)[1] for name in QUIET}
    for variables in (workflow["env"], template("gitlab-ci.yml")["variables"]):
        assert {name: variables[name] for name in QUIET} == at_home
    exported = " ".join(f"{name}={value}" for name, value in at_home.items())
    assert f"export {exported}\n" in (TEMPLATES / "cron.sh").read_text(encoding="utf-8")


def commands(script: str) -> list[str]:
    """Return the calls of train.py and amici-eval in a script, one a line."""
    lines = [" ".join(line.split()) for line in script.replace("\\\n", " ").splitlines()]
    return [line.removesuffix(" || code=$?") for line in lines if line.startswith(("python train.py", "amici-eval "))]


def test_gitlab_runs_the_same_commands():
    workflow, pipeline = template("github-actions.yml"), template("gitlab-ci.yml")
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    on_github = commands("\n".join(step.get("run", "") for step in steps))
    jobs = {name: value for name, value in pipeline.items() if isinstance(value, dict) and "script" in value}
    on_gitlab = [line for stage in pipeline["stages"] for line in commands("\n".join(jobs[stage]["script"]))]
    assert len(on_github) == 3
    # the model's URI comes by a dotenv report, under the name that register gives it
    assert [line.replace("$MODEL_URI", "$model_uri") for line in on_github] == on_gitlab
    outputs = jobs["train"]["variables"]["GITHUB_OUTPUT"]
    assert jobs["train"]["artifacts"]["reports"]["dotenv"] == outputs
    assert jobs["gate"]["needs"] == ["train"]
    assert jobs["gate"]["allow_failure"] == {"exit_codes": [4]}
    assert jobs["gate"]["artifacts"]["when"] == "always"
    (upload,) = [step for step in steps if "upload-artifact" in step.get("uses", "")]
    kept = {*jobs["gate"]["artifacts"]["paths"], jobs["gate"]["artifacts"]["reports"]["junit"]}
    assert kept == set(upload["with"]["path"].split())
    shared = workflow["env"].keys() & pipeline["variables"].keys()
    assert {"DATA", "HELD_OUT", "EPOCHS", "SEED", "GATE", "GATE_OPTIONS", "ALIAS"} <= shared
    assert {name: workflow["env"][name] for name in shared} == {name: pipeline["variables"][name] for name in shared}


@pytest.mark.parametrize(
    ("code", "said"), [(0, ""), (2, "could not be judged"), (1, "exit code 1"), (143, "exit code 143")]
)
def test_cron_says_something_only_if_something_is_wrong(stub, tmp_path, code, said):
    values = {**WATCHED, "STATE": str(tmp_path / "a b")}
    done = cron(environment(stub, CODE=str(code), **values))
    assert done.returncode == code
    assert done.stdout == ""
    assert said in done.stderr
    assert bool(done.stderr) == bool(code)
    # the end of its own round, not of an earlier one
    cron(environment(stub, CODE=str(code), **values))
    assert cron(environment(stub, CODE=str(code), **values)).stderr.count("called") == bool(code)
    assert (tmp_path / "a b" / f"{MODEL}.log").read_text().count("called") == 3
    expected = ["watch", "--once", f"model={MODEL}", "baseline=@champion", "gate=better", "gate.promote=champion"]
    assert (tmp_path / "arguments").read_text().splitlines() == expected


def test_cron_leaves_a_round_out_while_the_one_before_is_at_work(stub, tmp_path):
    values = {**WATCHED, "STATE": str(tmp_path)}
    with (tmp_path / f"{MODEL}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = cron(environment(stub, CODE="1", **values))
    assert (done.returncode, done.stderr) == (0, "")
    assert not (tmp_path / "arguments").exists()
    assert cron(environment(stub, CODE="1", **values)).returncode == 1


def test_cron_ends_a_round_that_hangs_and_bounds_its_log(stub, tmp_path):
    values = {**WATCHED, "STATE": str(tmp_path)}
    log = tmp_path / f"{MODEL}.log"
    log.write_text("old\n" * 1_300_000)
    done = cron(environment(stub, CODE="0", HANGS="1", LIMIT="0.5", **values))
    assert done.returncode == 124
    assert "not done after 0.5" in done.stderr
    assert "old" not in log.read_text() + done.stderr
    assert (tmp_path / f"{MODEL}.log.1").stat().st_size > 5_000_000


@pytest.mark.parametrize("missing", ["MODEL_NAME", "MLFLOW_TRACKING_URI"])
def test_cron_asks_for_what_it_needs(stub, tmp_path, missing):
    values = {**WATCHED, "STATE": str(tmp_path)}
    del values[missing]
    done = cron(environment(stub, CODE="0", **values))
    assert done.returncode != 0
    assert missing in done.stderr


@pytest.mark.amici
@pytest.mark.parametrize(
    ("held_out", "message"),
    [
        ("regio=a", "the data has no obs column 'regio'; it has"),
        ("region=nowhere", "0 of 2000 cells have region=nowhere"),
    ],
)
def test_the_training_refuses_to_hold_out_what_is_not_there(tissue, bin_folder, tmp_path, held_out, message):
    arguments = ["--data", str(tissue), "--output", "model", "--epochs", "1", "--held-out", held_out]
    done = subprocess.run(
        [str(bin_folder / "python"), str(TEMPLATES / "train.py"), *arguments],
        cwd=tmp_path,
        env=environment(bin_folder),
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "model").exists()
