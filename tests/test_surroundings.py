"""What surrounds a command: folders that cannot be written to, spoilt caches, and a clock that jumps."""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest

from amici_eval.cli.commands import main
from amici_eval.cli.terminal import Reporter, check_temporary_folder
from amici_eval.evaluation.pipeline import evaluate_access
from amici_eval.settings.evaluation import EvaluationSpec, PermutationSpec
from tests.conftest import ROOT, run_python
from tests.fakes import make_access

if TYPE_CHECKING:
    import subprocess
    from pathlib import Path

NOWHERE = "/proc/none"
CACHES = ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME", "XDG_RUNTIME_DIR")


def evaluation(*options: str, **where) -> subprocess.CompletedProcess[str]:
    """Run an evaluation that compiles some functions, not all."""
    quick = ("model_uri=models:/tiny/1", "permutation.n_permutations=19", "permutation.n_bootstrap=0")
    quick += ("permutation.spatial_null=none", "ablation.modes=[keep_one]", "ablation.baselines=false")
    return run_python("-m", "amici_eval", "evaluate", *quick, *options, **where)


@pytest.fixture(scope="module")
def sealed_package(tmp_path_factory) -> Path:
    """A copy of the package into which nobody, root neither, can write what was compiled."""
    there = tmp_path_factory.mktemp("installed")
    for name in ("amici_eval", "configs"):
        shutil.copytree(ROOT / name, there / name, ignore=shutil.ignore_patterns("__pycache__"))
    there = there / "amici_eval"
    for folder in (there, *(path for path in there.rglob("*") if path.is_dir())):
        (folder / "__pycache__").write_text("")
    return there


def heard(result: subprocess.CompletedProcess[str]) -> str:
    """Return what the user sees on the second channel, if it is quiet as it should be."""
    assert "Traceback" not in result.stderr, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == len(set(lines)), result.stderr
    return result.stderr


@pytest.mark.slow
@pytest.mark.amici
def test_an_evaluation_needs_neither_a_home_nor_a_package_to_write_to(registry, tmp_path, sealed_package):
    nowhere = dict.fromkeys(CACHES, NOWHERE)
    there = {"cwd": tmp_path, "package": sealed_package.parent}
    result = evaluation(**there, HOME=NOWHERE, NUMBA_CACHE_DIR="", MPLCONFIGDIR="", TORCH_HOME="", **nowhere)
    assert result.returncode == 0, result.stderr
    said = heard(result)
    for noise in ("locator", "MPLCONFIGDIR", "matplotlib", "NumbaWarning", NOWHERE):
        assert noise not in said, said


def test_without_a_folder_for_temporary_files_the_message_names_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", NOWHERE)

    def none() -> list[str]:
        return [NOWHERE]

    # Python would go on to /tmp, and root can write there
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", none)
    with pytest.raises(SystemExit) as end:
        main(["evaluate", "model_uri=models:/tiny/1"])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert NOWHERE in said
    assert "set TMPDIR" in said


def test_another_folder_for_temporary_files_than_was_asked_for_is_told(monkeypatch, caplog, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", NOWHERE)
    with caplog.at_level(logging.WARNING):
        check_temporary_folder()
    assert f"TMPDIR={NOWHERE} cannot be written to" in caplog.text
    caplog.clear()
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    check_temporary_folder()
    assert not caplog.text


@pytest.mark.slow
@pytest.mark.amici
def test_spoilt_files_of_compiled_code_do_no_harm(registry, tmp_path):
    where = {"cwd": tmp_path, "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    assert evaluation("report.figures=false", **where).returncode == 0
    indices = sorted(path for path in (tmp_path / "cache").rglob("*.nbi") if "kernel" in path.name)
    # an index leads to its code: of every other function one is spoilt, of the rest the other
    codes = [path for index in indices[1::2] for path in index.parent.glob(f"{index.stem}.*.nbc")]
    assert len(indices) > 1
    assert codes
    for path in (*indices[::2], *codes):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    result = evaluation("report.figures=false", **where)
    assert result.returncode == 0, result.stderr
    heard(result)


@pytest.mark.parametrize("jump", [86_400.0, -86_400.0])
def test_a_clock_that_jumps_changes_nothing(monkeypatch, capsys, jump):
    spec = EvaluationSpec(permutation=PermutationSpec(n_permutations=19))
    whole = evaluate_access(make_access(), spec)
    real, calls = time.time, 0

    def jumping() -> float:
        nonlocal calls
        calls += 1
        return real() + jump * (calls % 2)

    monkeypatch.setattr(time, "time", jumping)
    monkeypatch.setattr("amici_eval.cli.terminal._LOG_SECONDS", 0.0)
    with Reporter() as report:
        found = evaluate_access(make_access(), spec, progress=report)
    assert found == whole or np.array_equal(found.p_value, whole.p_value, equal_nan=True)
    lines = [line for line in capsys.readouterr().err.splitlines() if " s left" in line]
    assert lines
    for line in lines:
        assert 0 <= int(line.split("about")[1].split()[0]) < 3600, line
