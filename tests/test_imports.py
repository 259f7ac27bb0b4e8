"""What is imported when: the package and its help are there at once, and each room loads only what it names."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import amici_eval
from amici_eval import __version__

HEAVY = ("amici", "scvi", "mlflow", "torch", "numba", "anndata", "pandas", "hydra", "matplotlib")
PACKAGE = Path(amici_eval.__file__).parent
STATISTICS = {path.stem for path in (PACKAGE / "stats").glob("*.py")} - {"__init__"}
# compiled code: nothing but ``compiled.kernels()`` imports it
COMPILED = {"kernels"}
WITH_TORCH = {
    "ablations",
    "cell_chunks",
    "coalitions",
    "compiled_statistics",
    "cyclic_statistics",
    "exact_moments",
    "factor_draws",
    "factor_nulls",
    "factor_statistics",
    "head_sums",
    "lag",
    "lag_test",
    "masked_moments",
    "memory",
    "moment_sums",
    "moments",
    "near_pairs",
    "nulls",
    "packing",
    "place",
    "plain_moments",
    "stratified",
    "substitutions",
    "torch_statistics",
    "torus",
}
LIGHT = sorted(
    {
        "errors",
        "specs",
        "spec_checks",
        "permutation_spec",
        "launch_spec",
        "model_card",
        "names",
        "moments",
        "ablation_results",
        "inference_results",
        "sender_results",
    }
    | {path.stem for pattern in ("results.py", "result_*.py") for path in PACKAGE.glob(pattern)}
)


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120, check=False)


def loaded_after(code: str, *, among: tuple[str, ...] = HEAVY) -> set[str]:
    """Return which of some packages a fresh interpreter has loaded after it ran ``code``."""
    report = f"import sys, json; sys.stderr.write('\\n' + json.dumps([n for n in {among!r} if n in sys.modules]))"
    # SystemExit is how a command ends; what it loaded is of interest nonetheless
    program = f"try:\n    {code}\nexcept SystemExit:\n    pass\n{report}\n"
    done = run_python("-c", program)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stderr.rsplit("\n", 1)[1]))


def test_the_package_loads_nothing_heavy():
    assert loaded_after("import amici_eval") == set()


def test_names_of_the_package_are_fetched_when_used():
    assert loaded_after("import amici_eval; amici_eval.EvaluationSpec()") == set()
    assert loaded_after("from amici_eval import HeadEvaluation, PermutationSpec, AmiciEvalError") == set()


def test_statistics_know_no_model_no_anndata_and_no_tracker():
    assert len(STATISTICS) > 15
    assert STATISTICS >= COMPILED | WITH_TORCH, "a room that is gone"
    for rooms, allowed in ((STATISTICS - COMPILED - WITH_TORCH, set()), (WITH_TORCH, {"torch"})):
        code = "import " + ", ".join(f"amici_eval.stats.{room}" for room in sorted(rooms))
        assert loaded_after(code) <= allowed


@pytest.mark.parametrize("room", LIGHT)
def test_the_lowest_rooms_load_nothing_heavy(room):
    assert loaded_after(f"import amici_eval.{room}") == set()


def test_the_check_of_imports_can_fail():
    assert loaded_after("import pandas") >= {"pandas"}
    assert loaded_after("import amici_eval.data.opening") >= {"pandas"}
    assert {"results", "result_frames", "result_json"} <= set(LIGHT)
    if find_spec("numba"):
        assert loaded_after("import amici_eval.stats.kernels") == {"numba"}
    with pytest.raises(AssertionError, match=r"No module named 'amici_eval\.none'"):
        loaded_after("import amici_eval.none")


@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_help_and_version_load_nothing_heavy(argument):
    assert loaded_after(f"from amici_eval.cli.commands import main; main([{argument!r}])") == set()


def test_help_is_printed():
    done = run_python("-m", "amici_eval", "--help")
    assert done.returncode == 0
    assert "usage: amici-eval COMMAND" in done.stdout
    for command in ("evaluate", "register", "upload", "demo"):
        assert f"\n  {command} " in done.stdout
    for setting in (
        "data.backed",
        "ablation.engine",
        "ablation.modes",
        "ablation.memory_budget",
        "permutation.sampling",
    ):
        lines = [line for line in done.stdout.splitlines() if line.startswith(f"  {setting}=")]
        assert len(lines) == 1
        assert lines[0][60] == " " != lines[0][61], "aligned with the others"
    assert done.stderr == ""


def test_no_command_prints_help_and_fails():
    done = run_python("-m", "amici_eval")
    assert done.returncode == 2
    assert "usage: amici-eval COMMAND" in done.stdout


def test_version_is_printed():
    done = run_python("-m", "amici_eval", "--version")
    assert (done.returncode, done.stdout.strip()) == (0, __version__)


def test_every_exported_name_is_listed_and_an_unknown_one_is_refused():
    assert set(amici_eval.__all__) <= set(dir(amici_eval))
    with pytest.raises(AttributeError, match=r"^module 'amici_eval' has no attribute 'evaluat'$"):
        _ = amici_eval.evaluat
