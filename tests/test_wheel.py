"""The wheel, installed outside the repository, has all it needs."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT, run_python
from tests.test_surroundings import evaluation


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's content as pip would install it; everything else comes from this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    built = run_python("-m", "hatchling", "build", "-t", "wheel", "-d", str(folder), cwd=ROOT)
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_it_carries_configs_types_and_entry_points(site):
    names = {str(path.relative_to(site)) for path in site.rglob("*") if path.is_file()}
    assert {"amici_eval/py.typed", "amici_eval/configs/evaluate.yaml"} <= names
    assert {"amici_eval/report/assets/page.css", "amici_eval/report/assets/page.js"} <= names
    assert "amici_eval/report/page/templates/base.html.jinja" in names
    entry_points = next(site.glob("*.dist-info/entry_points.txt")).read_text()
    for group in ("mlflow.model_evaluator", "mlflow.dataset_constructor", "mlflow.dataset_source", "console_scripts"):
        assert f"[{group}]" in entry_points
    assert not any(name.startswith(("tests", "configs/")) for name in names)


@pytest.mark.slow
@pytest.mark.amici
def test_it_evaluates_and_offers_the_evaluator(site, registry, tmp_path):
    done = evaluation("report.formats=[png]", "tracking.experiment=wheel", package=site, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "attention heads x" in done.stdout
    script = (
        "import json, amici_eval, mlflow, mlflow.data; "
        "print(json.dumps([amici_eval.__file__, mlflow.models.list_evaluators(), mlflow.data.from_anndata.__module__]))"
    )
    done = run_python("-c", script, package=site, cwd=tmp_path)
    location, evaluators, module = json.loads(done.stdout.splitlines()[-1])
    assert Path(location).is_relative_to(site)
    assert "amici" in evaluators
    assert module == "amici_eval.tracking.dataset"
