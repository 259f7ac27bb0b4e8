from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

import amici_eval
from amici_eval.cli.commands import main
from amici_eval.cli.config import gate_spec, hydra_override, project_overrides
from amici_eval.cli.help import reference
from amici_eval.common.errors import InvalidSpecError
from amici_eval.settings.commands import COMMANDS, settings_of


def value_of(override: str):
    """Return the value that Hydra reads in an override."""
    return OverridesParser.create().parse_override(override).value()


def call(*arguments: str) -> int:
    """Run the command line in this process and return its exit code."""
    handler = signal.getsignal(signal.SIGTERM)
    environment = dict(os.environ)
    try:
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
    finally:
        signal.signal(signal.SIGTERM, handler)
        os.environ.clear()
        os.environ.update(environment)
    return int(ended.value.code or 0)


def test_help_and_version(capsys):
    assert call("--help") == 0
    assert "amici-eval COMMAND" in capsys.readouterr().out
    assert call("evaluate", "--help") == 0
    assert call("--version") == 0
    assert call() == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_tells_each_setting_that_it_reads(command, capsys):
    assert call(command, "--help") == 0
    told = capsys.readouterr().out
    assert call(command, "--cfg", "job") == 0
    settings = yaml.safe_load(capsys.readouterr().out)
    reads = {one.name: one.reads for one in settings_of(COMMANDS[command])}
    for name, value in settings.items():
        for one in value if isinstance(value, dict) else ["="]:
            shown = re.search(rf"^  {name}{'' if one == '=' else '.' + one}[=. :]", told, re.MULTILINE) is not None
            assert shown == (reads[name] is None or one in reads[name]), (name, one)
    assert max(map(len, told.splitlines())) <= 120
    assert not re.search(r"^  [\w.]+=\S*\n(?!    )", told, re.MULTILINE), "a setting without meaning"


def test_help_that_is_cut_off_is_no_error():
    with subprocess.Popen(
        [sys.executable, "-m", "amici_eval", "evaluate", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_the_page_of_settings_says_what_the_settings_say():
    page = Path(amici_eval.__file__).parents[1] / "docs" / "settings.md"
    if not page.is_file():
        pytest.skip("docs/ is there in a checkout only")
    assert page.read_text(encoding="utf-8") == f"{reference()}\n", "python -m amici_eval.cli.help > docs/settings.md"


def test_unknown_command(capsys):
    assert call("evalute") == 2
    known = "evaluate, compare, gate, watch, rollback, register, demo, upload"
    assert f"unknown command 'evalute': commands are {known}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("model_uri=models:/amici@champion", "model_uri='models:/amici@champion'"),
        ("data.subset.value=Stromal_&_T_Cell_Hybrid", "data.subset.value='Stromal_&_T_Cell_Hybrid'"),
        ("data.subset.value=007", "data.subset.value='007'"),
        ("data.subset.value=1e10", "data.subset.value='1e10'"),
        ("data.subset.value=β cell", "data.subset.value='β cell'"),
        ("data.subset.value=it's", r"data.subset.value='it\'s'"),
        ("data.subset.value='quoted'", "data.subset.value='quoted'"),
        ("data.uri=/tmp/my tissue (1),x.h5ad", "data.uri='/tmp/my tissue (1),x.h5ad'"),
        ("data.uri=null", "data.uri=null"),
        ("permutation.seed=3", "permutation.seed=3"),
        ("report.cell_types=[A,B]", "report.cell_types=['A','B']"),
        ("report.cell_types=[β cell]", "report.cell_types=['β cell']"),
        ("report.cell_types=[A,Stromal_&_T_Cell_Hybrid]", "report.cell_types=['A','Stromal_&_T_Cell_Hybrid']"),
        ("permutation=reference", "permutation=reference"),
        ("permutation.tile_widths=30,120", "permutation.tile_widths=[30,120]"),
    ],
)
def test_overrides_are_quoted_where_hydra_would_misread_them(given, expected):
    quoted = hydra_override(given)
    assert quoted == expected
    value = value_of(quoted)
    if given.startswith("data.subset.value="):
        assert str(getattr(value, "text", value)) == given.partition("=")[2].strip("'")


def test_a_sweep_keeps_its_commas():
    assert hydra_override("model_uri=models:/a/1,models:/a/2", sweep=True) == "model_uri='models:/a/1','models:/a/2'"
    assert hydra_override("data.subset.value=CD8+,A_&_B", sweep=True) == "data.subset.value='CD8+','A_&_B'"


def test_what_is_no_override_is_told():
    with pytest.raises(InvalidSpecError, match="settings are written key=value"):
        hydra_override("models:/a/1")


TEXTS = ["10_1", "1E1", "1e10", "007", "0x10", "1_000", "true", "False", "yes", "off", "nan", "inf", "1.0", "-0", "+1"]
TEXTS += ["12345678901234567890", "2026-11-30", "1:30", "it's", "CD8+ (a)", "L2/3 IT", "a\\", "β"]
"""Names that Hydra or YAML would take for something else."""


def jobs(override: str) -> list:
    """Return the values that Hydra gives to the jobs of a sweep."""
    parser = OverridesParser.create()
    parsed = parser.parse_override(override)
    return [parser.parse_override(f"a={value}").value() for value in parsed.sweep_string_iterator()]


@pytest.mark.parametrize(
    ("command", "key"),
    [
        *[("evaluate", key) for key in ("data.subset.value", "tracking.experiment", "model_uri", "++tracking.tags.a")],
        *[("gate", key) for key in ("gate.promote", "++gate.rules.mine.metric", "++gate.rules.mine.where.section")],
        *[("watch", "model"), ("rollback", "alias"), ("register", "name"), ("evaluate", "+data.subset.key")],
    ],
)
def test_text_stays_text(command, key):
    for text in TEXTS:
        assert value_of(hydra_override(f"{key}={text}", command=command)) == text
    for values in (",".join(TEXTS), f"choice({','.join(TEXTS)})"):
        assert jobs(hydra_override(f"{key}={values}", command=command, sweep=True)) == TEXTS


@pytest.mark.parametrize(
    ("command", "key"),
    [
        ("evaluate", "report.cell_types"),
        *[("compare", key) for key in ("model", "versions", "runs", "datasets")],
        *[("gate", key) for key in ("++gate.rules.mine.types", "++gate.rules.mine.genes")],
    ],
)
def test_text_stays_text_in_lists(command, key):
    names = [*TEXTS, "null"]
    for values in (",".join(names), f"[{','.join(names)}]", f"[ {' , '.join(names)} ]"):
        assert value_of(hydra_override(f"{key}={values}", command=command)) == names
    assert jobs(hydra_override(f"{key}=[10_1,'b,c'],007", command=command, sweep=True)) == [["10_1", "b,c"], ["007"]]


def test_text_stays_text_in_mappings():
    where = "{ct_name: 10_1, b: null}"
    rule = f"{{kind: cell, table: heads, column: 1_0, where: {where}, need: 2, at_least: 1e-3, types: null}}"
    assert value_of(hydra_override(f"gate.rules.mine={rule}", command="gate")) == {
        "kind": "cell",
        "table": "heads",
        "column": "1_0",
        "where": {"ct_name": "10_1", "b": "null"},
        "need": "2",
        "at_least": 1e-3,
        "types": None,
    }
    assert hydra_override("tracking.tags={a: 007}") == "tracking.tags={a:'007'}"
    assert hydra_override("data.subset={key: on, value: 1_0}") == "data.subset={key:'on',value:'1_0'}"


def test_what_is_no_text_is_left_to_hydra():
    assert hydra_override("data.layer=null,007", sweep=True) == "data.layer=null,'007'"
    assert hydra_override("data.subset.value='1_0',\"2 3\"", sweep=True) == "data.subset.value='1_0',\"2 3\""
    assert hydra_override("data.uri=${oc.env:HOME}/x") == "data.uri=${oc.env:HOME}/x"
    assert jobs(hydra_override("data.subset.value=range(1,4)", sweep=True)) == [1, 2, 3]
    assert jobs(hydra_override("permutation.seed=sort(3,1)", sweep=True)) == [1, 3]
    assert hydra_override("permutation.tile_widths=[1,2],[3]", sweep=True) == "permutation.tile_widths=[1,2],[3]"
    with pytest.raises(InvalidSpecError, match=r"sort\(10_1,2\): Hydra would read numbers in text here"):
        hydra_override("data.subset.value=sort(10_1,2)", sweep=True)


def test_text_stays_text_in_files_of_settings(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "10_1.yaml").write_text("uri: 1E1\n")
    (tmp_path / "mine" / "one.yaml").write_text(
        "# @package _global_\n"
        "data: {subset: {key: on, value: 10_1, held_out: no}}\n"
        "report: {cell_types: [10_1, 1E1, 007, yes, 1.0, 2026-11-30], figures: off}\n"
        "permutation: {n_permutations: 1_000, alpha: 1e-2, tile_widths: [10, 2.5e1]}\n"
        "tracking: {experiment: 12345678901234567890, tags: {a: 1_0, b: true}}\n"
    )
    arguments = ["--config-dir", str(tmp_path), "+mine=one", "data=10_1", "model_uri=1E1", "--cfg", "job"]
    assert call("evaluate", *arguments) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["model_uri"] == shown["data"]["uri"] == "1E1"
    assert [shown["data"]["subset"][name] for name in ("key", "value", "held_out")] == ["on", "10_1", False]
    assert shown["report"]["cell_types"] == ["10_1", "1E1", "007", "yes", "1.0", "2026-11-30"]
    assert shown["report"]["figures"] is False
    assert [shown["permutation"][name] for name in ("n_permutations", "alpha", "tile_widths")] == [1000, 0.01, [10, 25]]
    assert shown["tracking"]["experiment"] == "12345678901234567890"
    assert shown["tracking"]["tags"] == {"a": "1_0", "b": "true"}


def test_a_sweep_in_a_file_of_settings_keeps_text(tmp_path, capsys):
    (tmp_path / "many.yaml").write_text(
        "defaults: [evaluate, _self_]\n"
        "hydra: {sweeper: {params: {data.subset.value: '10_1,1E1', model_uri: 1_0, permutation.seed: '1,2'}}}\n"
    )
    assert call("evaluate", "--config-dir", str(tmp_path), "--config-name", "many", "--cfg", "hydra") == 0
    shown = yaml.safe_load(capsys.readouterr().out)["hydra"]["sweeper"]["params"]
    assert shown == {"data.subset.value": "'10_1','1E1'", "model_uri": "'1_0'", "permutation.seed": "1,2"}


def test_numbers_of_rules_in_files_are_numbers(tmp_path):
    (tmp_path / "gate").mkdir()
    rule = "{kind: explained_variance, at_least: 1e-3, min_cells: 1_0, types: [0, 1_0]}"
    (tmp_path / "gate" / "mine.yaml").write_text(f"rules: {{mine: {rule}}}\n")
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("amici_eval.cli.commands._TASKS", {"gate": lambda config, **_: seen.append(gate_spec(config))})
        assert call("gate", "--config-dir", str(tmp_path), "gate=mine", "model_uri=models:/a/1") == 0
    (found,) = seen[0].rules
    assert (found.at_least, found.min_cells, found.types) == (0.001, 10, ("0", "1_0"))


def test_project_parameters_become_overrides():
    arguments = ["--model_uri", "models:/a/1", "--data", "", "--device", "cpu", "--seed", "3", "--overrides"]
    arguments += ["report.figures=false 'data.subset.value=a b'", "--permutation.alpha", "0.1"]
    assert project_overrides(arguments, "evaluate") == [
        "model_uri=models:/a/1",
        "ablation.device=cpu",
        "permutation.seed=3",
        "report.figures=false",
        "data.subset.value=a b",
        "permutation.alpha=0.1",
    ]
    assert project_overrides(["--seed", "3"], "demo") == ["seed=3"]
    with pytest.raises(InvalidSpecError, match="--data: it needs a value"):
        project_overrides(["--data"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["permutation.n_perm=3"], "amici-eval: setting 'permutation.n_perm': permutation has n_permutations, alpha, "),
        (["permutation.n_perm=3"], "; write permutation.n_permutations"),
        (["data.subset.held=true"], "; write data.subset.held_out"),
        (["trained_on.key=in_test"], "; write data.trained_on.key\n"),
        (["tags.a=3"], "; write tracking.tags.a\n"),
        (["data.subset.indices=[1,b]"], "data.subset.indices=[1,b]: Value 'b' of type 'str' could not be converted"),
        (["tracking.zzz=3"], "; choose one of these; amici-eval evaluate --help shows all settings"),
        (["permutation.alpha=big"], "could not be converted to Float"),
        (["permutation.n_permutations=1.5"], "could not be converted to Integer"),
        (["report.figures=perhaps"], "it must be true"),
        (["data.subset.held_out=maybe"], "it must be true"),
        (["permutaton.seed=3"], "; write permutation.seed"),
        (
            ["permutation=cyclical"],
            "permutation=cyclical: permutation is a group of settings, ready-made as free, refer",
        ),
        (
            ["-m", "ablation=hooked,slow"],
            "ablation=slow: ablation is a group of settings, ready-made as factored, hook",
        ),
    ],
)
def test_typos_and_wrong_types_are_refused(arguments, message, capsys):
    assert call("evaluate", "model_uri=models:/a/1", *arguments) == 2
    assert message in capsys.readouterr().err


def test_configs_of_ones_own_are_no_typos(tmp_path, capsys):
    (tmp_path / "permutation").mkdir()
    (tmp_path / "permutation" / "strict.yaml").write_text("alpha: 0.001\nseed: 11\n")
    arguments = ["--config-dir", str(tmp_path), "permutation=strict", "--cfg", "job"]
    assert call("evaluate", "model_uri=models:/a/1", *arguments) == 0
    shown = capsys.readouterr().out
    assert "alpha: 0.001" in shown
    assert "seed: 11" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "model_uri is not set: it has no default; pass model_uri=..."),
        (
            ["model_uri=x", "permutation.alpha=2"],
            "permutation.alpha=2.0: a significance level lies strictly between 0 and 1",
        ),
        (["model_uri=x", "permutation.n_permutations=0"], "it must be a whole number of at least 1"),
        (["model_uri=x", "ablation.device=gpu"], "ablation.device='gpu': it must be auto, cpu, cuda, cuda:N or mps"),
        (["model_uri=x", "ablation.engine=fast"], "ablation.engine='fast': it must be one of factored, hooked"),
        (["model_uri=x", "data.subset.key=region"], "a subset by column needs both"),
        (["model_uri=x", "report.formats=[gif]"], "report.formats='gif'"),
    ],
)
def test_bad_settings_name_value_rule_and_fix(arguments, message, capsys):
    assert call("evaluate", *arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.amici
def test_evaluate_from_the_command_line(registry, capsys):
    settings = ["data.subset.key=region", "data.subset.value=left_strip", "permutation=reference", "seed=5"]
    settings += ["permutation.n_permutations=19", "report.figures=false", "tracking.experiment=cli"]
    settings += ["tracking.tags.study=A 1", "tracking.keep_local=true"]
    assert call("evaluate", "model_uri=models:/tiny@champion", *settings) == 0
    out = capsys.readouterr().out
    run_id = next(line.split()[1] for line in out.splitlines() if line.startswith("run "))
    logged = mlflow.get_run(run_id)
    assert logged.info.status == "FINISHED"
    assert mlflow.get_experiment(logged.info.experiment_id).name == "cli"
    assert logged.data.params["cfg/permutation.convention"] == "reference"
    assert logged.data.params["cfg/permutation.seed"] == "5"
    assert logged.data.tags["study"] == "A 1"
    assert logged.data.params["cfg/data.subset.value"] == "left_strip"
    folder = Path("amici-eval-results") / run_id / "artifacts"
    assert "value: left_strip" in (folder / "config" / "resolved.yaml").read_text()
    assert "Held out" in out


@pytest.mark.amici
def test_held_out_cells_away_from_training_are_evaluated_from_the_command_line(registry, capsys):
    options = ["permutation.n_permutations=19", "report.figures=false"]
    held_out = ["data.subset.held_out=true", "data.subset.buffer=true"]
    assert call("evaluate", "model_uri=models:/tiny@champion", *options, *held_out) == 0
    out = capsys.readouterr().out
    assert "Held out: the model was fitted on none of the evaluated cells." in out
    assert "data.subset.buffer=true drops" in out
    run_id = next(line.split()[1] for line in out.splitlines() if line.startswith("run "))
    params = mlflow.get_run(run_id).data.params
    assert params["cfg/data.subset.held_out"] == params["cfg/data.subset.buffer"] == "True"


@pytest.mark.amici
def test_a_buffer_around_training_cells_exits_2_with_its_message(registry, capsys):
    options = ["data.subset.held_out=false", "data.subset.buffer=true"]
    assert call("evaluate", "model_uri=models:/tiny@champion", *options) == 2
    assert "data.subset.buffer=true leaves none of" in capsys.readouterr().err


@pytest.mark.amici
def test_register_and_sweep(registry, amici_dir, capsys, tmp_path, monkeypatch):
    outputs = tmp_path / "outputs"
    outputs.write_text("earlier=1\n")
    monkeypatch.setenv("GITHUB_OUTPUT", str(outputs))
    register = [f"model_dir={amici_dir}", "name=swept", f"data.uri={registry.data}", "register.alias=champion"]
    assert call("register", *register) == 0
    assert "registered models:/swept/1" in capsys.readouterr().out
    run_id = mlflow.MlflowClient().get_model_version("swept", "1").run_id
    assert outputs.read_text() == f"earlier=1\nversion=1\nmodel_uri=models:/swept/1\nrun_id={run_id}\n"
    options = ["permutation.n_permutations=19", "report.figures=false", "tracking.experiment=sweep"]
    assert call("evaluate", "-m", "model_uri=models:/swept/1,models:/swept@champion", *options) == 0
    experiment = mlflow.get_experiment_by_name("sweep").experiment_id
    runs = mlflow.search_runs([experiment], output_format="list")
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in runs if run is not parent]
    assert parent.info.status == "FINISHED"
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    assert {run.data.tags["amici_eval.model_uri"] for run in children} == {"models:/swept/1", "models:/swept@champion"}
    assert {run.info.status for run in children} == {"FINISHED"}
    # Hydra's own record of a sweep, with the whole configuration, does not lie about
    assert not list(Path.cwd().rglob("multirun.yaml"))


@pytest.mark.amici
def test_a_failed_job_of_a_sweep_fails_the_parent(registry, capsys):
    options = ["permutation.n_permutations=19", "report.figures=false", "tracking.experiment=half"]
    assert call("evaluate", "-m", "model_uri=models:/tiny/9,models:/tiny/1", *options) == 2
    runs = mlflow.search_runs([mlflow.get_experiment_by_name("half").experiment_id], output_format="list")
    by_kind = {run.data.tags["amici_eval.kind"]: run.info.status for run in runs}
    assert by_kind == {"sweep": "FAILED", "evaluation": "FINISHED"}


@pytest.mark.amici
def test_hydras_full_errors_close_the_parent_too(registry, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    assert call("evaluate", "-m", "model_uri=models:/tiny/8,models:/tiny/9", "tracking.experiment=full") == 2
    (parent,) = mlflow.search_runs([mlflow.get_experiment_by_name("full").experiment_id], output_format="list")
    assert parent.info.status == "FAILED"


@pytest.mark.amici
def test_bad_input_exits_2_with_its_message(registry, capsys):
    assert call("evaluate", "model_uri=models:/tiny/9") == 2
    assert "model 'tiny' has no version '9'" in capsys.readouterr().err
    assert call("evaluate", "model_uri=models:/tiny/3") == 2
    assert "pass data.uri=/path/to/tissue.h5ad" in capsys.readouterr().err


def start(*arguments: str, cwd: Path, script: str | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script] if script else [sys.executable, "-m", "amici_eval"]
    return subprocess.Popen(
        [*command, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a job in the background of a shell ignores Ctrl-C, and its children with it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.amici
@pytest.mark.parametrize(
    ("sign", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_an_interrupted_command_leaves_the_run_killed(registry, tmp_path, sign, code):
    name = f"interrupted {sign.name}"
    # so many permutations that it is still at work when the signal comes
    options = ["permutation.n_permutations=5000000", f"tracking.run_name={name}"]
    process = start("evaluate", "model_uri=models:/tiny/1", *options, cwd=tmp_path)
    try:
        runs = wait_for_run(name, process)
        assert runs[0].info.status == "RUNNING"
        process.send_signal(sign)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == code, errors
    assert mlflow.get_run(runs[0].info.run_id).info.status == "KILLED"


def wait_for_run(name: str, process: subprocess.Popen[str]) -> list:
    deadline = time.monotonic() + 90
    runs: list = []
    while not runs and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.5)
        runs = mlflow.search_runs(
            filter_string=f"attributes.run_name = '{name}'", search_all_experiments=True, output_format="list"
        )
    assert runs, process.poll()
    return runs


@pytest.mark.slow
@pytest.mark.amici
def test_mlflow_run_evaluates(registry, tmp_path, monkeypatch):
    """`mlflow run .` in the environment at hand: parameters, further overrides, exit code, the run it opened itself."""
    repository = Path(__file__).resolve().parents[2]
    # the project's command says `python`, as for anybody whose environment is activated
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    run = mlflow.projects.run(
        str(repository),
        env_manager="local",
        experiment_name="project",
        parameters={
            "model_uri": "models:/tiny/1",
            "n_permutations": "19",
            "report.figures": "false",
            "overrides": f"data.subset.key=region data.subset.value=left_strip tracking.output_dir={tmp_path}/out",
        },
    )
    logged = mlflow.get_run(run.run_id)
    assert logged.info.status == "FINISHED"
    assert logged.data.params["cfg/permutation.n_permutations"] == "19"
    assert logged.data.params["cfg/data.subset.value"] == "left_strip"
    assert "ev/Tumor/head_0" in logged.data.metrics
    assert {entry.path for entry in mlflow.MlflowClient().list_artifacts(run.run_id)} >= {"tables", "report.html"}


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("gate.rules.not_worse.margin=much", "gate.rules.not_worse.margin='much': it must be a finite number"),
        ("gate.rules.not_wors.margin=0.1", "gate.rules.not_wors has no kind"),
        ("gate.rules.not_worse=0.1", "gate.rules.not_worse=0.1: a rule is a mapping"),
        ("gate.rules.not_worse.margins=0.1", "; write gate.rules.not_worse.margin"),
        ("gate.rule.not_worse.margin=0.1", "; write gate.rules.not_worse.margin"),
        ("gate.rules.mine={kind: superiority, need: most}", "gate.rules.mine.need='most': it must be all, any, or"),
        ("gate.rules.mine.kind=odd", "gate.rules.mine.kind='odd': it must be one of metric"),
        ("gate=lax", "gate is a group of settings, ready-made as better, default, strict"),
    ],
)
def test_rules_are_checked_as_other_settings_are(argument, message, capsys):
    assert call("gate", "model_uri=models:/a/1", argument, "tracking.uri=sqlite:///no.db") == 2
    assert message in capsys.readouterr().err


def test_rules_can_be_changed_added_and_left_out(capsys):
    changes = ["gate=strict", "gate.rules.not_worse.margin=0.003", "gate.rules.some_signal=null"]
    changes += ["gate.rules.mine={kind: metric, metric: summary/max_ev, at_least: 0.1}"]
    assert call("gate", "model_uri=models:/a/1", *changes, "--cfg", "job") == 0
    told = capsys.readouterr().out
    for said in ("margin: 0.003", "some_signal: null", "metric: summary/max_ev", "heads_are_there:", "margin: 0.02"):
        assert said in told
