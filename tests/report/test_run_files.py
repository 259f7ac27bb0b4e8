"""What a run holds of an evaluation: metrics and files, written without a tracking store."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from amici_eval.moments import Moments
from amici_eval.names import slugify
from amici_eval.results import HeadEvaluation
from amici_eval.specs import MODES, ReportSpec
from amici_eval.tracking.run_log import evaluation_metrics, write_artifacts
from tests.builders import make_evaluation, make_moments

NO_FIGURES = ReportSpec(figures=False)


def test_shapley_values_and_parity_are_metrics():
    evaluation = make_evaluation(modes=MODES, engine="factored", parity=3e-7, parity_cells=64)
    metrics = evaluation_metrics(evaluation)
    shares = {name: value for name, value in metrics.items() if name.startswith("shapley/")}
    assert len(shares) == 3 * 6, "the last type is undefined"
    for index, name in enumerate(evaluation.cell_types[:-1]):
        for head in range(3):
            assert shares[f"shapley/{slugify(name)}/head_{head}"] == evaluation.ablations.of("shapley")[head, index]
    assert metrics["parity/max_abs_difference"] == 3e-7
    plain = evaluation_metrics(make_evaluation())
    assert plain == {n: v for n, v in metrics.items() if not n.startswith(("shapley/", "parity/"))}


@pytest.mark.parametrize("parity", [None, math.nan, math.inf])
def test_what_was_not_compared_is_no_metric(parity):
    metrics = evaluation_metrics(make_evaluation(modes=("keep_one",), parity=parity, parity_cells=1))
    assert not [name for name in metrics if name.startswith(("parity/", "shapley/"))]


def test_moments_are_written_after_the_numbers_and_come_back(tmp_path, monkeypatch):
    there = []
    moments = make_moments()
    literal = Moments.save

    def save(self, path):
        there.extend(sorted(p.name for p in tmp_path.iterdir()))
        return literal(self, path)

    monkeypatch.setattr(Moments, "save", save)
    evaluation = replace(make_evaluation(modes=MODES), moments=moments)
    write_artifacts(evaluation, tmp_path, report=NO_FIGURES, config_yaml="a: 1\n")
    assert there == ["evaluation.json"]
    loaded = HeadEvaluation.load(tmp_path)
    assert loaded.ablations.modes == MODES
    np.testing.assert_array_equal(loaded.moments.residual_m2, moments.residual_m2)
    assert (tmp_path / "tables" / "ablations.csv").is_file()


def test_without_moments_there_is_no_such_file(tmp_path):
    write_artifacts(make_evaluation(), tmp_path, report=NO_FIGURES, config_yaml="")
    assert not (tmp_path / "moments.npz").exists()
    assert not (tmp_path / "figures").exists()


def test_figures_of_ablations_are_in_folder_and_page(tmp_path):
    evaluation = make_evaluation(2, ["A", "B"], modes=MODES)
    write_artifacts(evaluation, tmp_path, report=ReportSpec(formats=("svg",)), config_yaml="")
    assert (tmp_path / "figures" / "ablations.svg").is_file()
    assert (tmp_path / "figures" / "head_interactions.svg").is_file()
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Interaction of heads per receiver type" in page
