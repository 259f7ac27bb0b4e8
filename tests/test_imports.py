"""What is imported when: the package and its help are there at once, and each package loads only what it names."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from pkgutil import walk_packages

import pytest

import amici_eval
from amici_eval import __version__
from tests.conftest import run_python

HEAVY = ("amici", "scvi", "mlflow", "torch", "numba", "anndata", "pandas", "hydra", "matplotlib")
# what all modules of a package together may load; others load what they like
LOADS = {
    "settings": set(),
    "common": {"torch"},
    "stats": {"torch"},
    "results": {"pandas"},
    "data": {"anndata", "pandas"},
}
# compiled code: nothing but ``compiled_kernels()`` imports it
COMPILED = "amici_eval.stats.permutation.kernels"


def modules_of(package: str) -> list[str]:
    folder, prefix = Path(amici_eval.__file__).parent / package, f"amici_eval.{package}."
    return [one.name for one in walk_packages([str(folder)], prefix) if not one.ispkg]


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


@pytest.mark.parametrize("package", LOADS)
def test_the_lower_packages_load_little(package):
    modules = [name for name in modules_of(package) if name != COMPILED]
    assert len(modules) > 3
    # old versions of anndata load torch by themselves
    theirs = loaded_after("import anndata") if "anndata" in LOADS[package] else set()
    assert loaded_after("import " + ", ".join(modules)) <= LOADS[package] | theirs


def test_results_and_errors_load_nothing_heavy():
    light = (
        "common.errors",
        "common.model_card",
        "common.text",
        "results.evaluation",
        "results.codec",
        "results.frames",
    )
    assert loaded_after("import " + ", ".join(f"amici_eval.{name}" for name in light)) == set()


def test_the_check_of_imports_can_fail():
    assert loaded_after("import pandas") >= {"pandas"}
    assert loaded_after("import amici_eval.data.files") >= {"pandas"}
    assert COMPILED in modules_of("stats")
    if find_spec("numba"):
        assert loaded_after(f"import {COMPILED}") == {"numba"}
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
    assert done.stderr == ""


def test_no_command_prints_help_and_fails():
    done = run_python("-m", "amici_eval")
    assert done.returncode == 2
    assert "usage: amici-eval COMMAND" in done.stdout


def test_version_is_printed():
    done = run_python("-m", "amici_eval", "--version")
    assert (done.returncode, done.stdout.strip()) == (0, __version__)


def test_every_exported_name_is_listed_and_an_unknown_one_is_refused():
    assert issubclass(amici_eval.errors.DataError, amici_eval.AmiciEvalError)
    assert set(amici_eval.__all__) <= set(dir(amici_eval))
    with pytest.raises(AttributeError, match=r"^module 'amici_eval' has no attribute 'evaluat'$"):
        _ = amici_eval.evaluat
