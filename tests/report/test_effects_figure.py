from __future__ import annotations

import dataclasses

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.figure import Figure

from amici_eval.common.errors import DataError
from amici_eval.report.figures.evaluation_figures import effects_size, has_effects, plot_effects, save_figures
from tests.builders import AWKWARD_TYPES, make_evaluation
from tests.report.test_figures import svg_texts, texts


@pytest.fixture
def ax():
    return Figure(figsize=(12, 6)).add_subplot()


@pytest.fixture(scope="module")
def evaluation():
    return make_evaluation(inferred="lag")


def places(ax, gid):
    return np.concatenate([np.asarray(c.get_offsets()) for c in ax.collections if c.get_gid() == gid] or [[]])


def segments(ax, gid):
    return [np.asarray(s) for c in ax.collections if c.get_gid() == gid for s in c.get_segments()]


def to_effect(ax, evaluation):
    """Return the map from place to effect within the first panel, from two heads of it."""
    values = np.concatenate([[evaluation.expl_var_full[0]], evaluation.expl_var[:, 0]])
    drawn = np.concatenate(
        [
            places(ax, kind)
            for kind in ("whole_model", "significant", "not_significant", "no_test")
            if len(places(ax, kind))
        ]
    )
    first = drawn[(drawn[:, 0] < 2.1) & (drawn[:, 1] < 1.0)]
    x = first[np.argsort(first[:, 1]), 0]
    return np.polyfit(x, values, 1), x, values


def test_points_are_effects_on_one_scale(ax, evaluation):
    plot_effects(evaluation, ax=ax)
    line, x, values = to_effect(ax, evaluation)
    np.testing.assert_allclose(np.polyval(line, x), values, atol=1e-9)


def test_heads_are_filled_where_the_null_that_decides_says_so(ax, evaluation):
    plot_effects(evaluation, ax=ax)
    assert evaluation.n_significant != evaluation.n_significant_free
    defined = np.isfinite(evaluation.expl_var)
    assert len(places(ax, "significant")) == evaluation.n_significant
    assert len(places(ax, "not_significant")) == evaluation.n_decided - evaluation.n_significant
    assert len(places(ax, "no_test")) == (defined & np.isnan(evaluation.adjusted)).sum() == 2
    assert len(places(ax, "whole_model")) == 6
    (filled,) = (c for c in ax.collections if c.get_gid() == "significant")
    (hollow,) = (c for c in ax.collections if c.get_gid() == "not_significant")
    assert filled.get_facecolor().tolist() == filled.get_edgecolor().tolist() == hollow.get_edgecolor().tolist()
    assert hollow.get_facecolor()[0].tolist() == [1.0, 1.0, 1.0, 1.0]
    assert "adjusted p ≤ 0.05, in-sample; lag null" in texts(ax).lower()


def test_intervals_run_from_bound_to_bound(ax, evaluation):
    plot_effects(evaluation, ax=ax, cell_types=["CD8+_T_Cells"])
    index = evaluation.cell_types.index("CD8+_T_Cells")
    drawn = sorted(segments(ax, "intervals"), key=lambda one: one[0, 1])
    assert len(drawn) == 1 + 3
    bounds = evaluation.intervals
    low = np.array([bounds.full_low[index], *bounds.low[:, index]])
    high = np.array([bounds.full_high[index], *bounds.high[:, index]])
    x = np.array([[one[0, 0], one[1, 0]] for one in drawn])
    line = np.polyfit(x.ravel(), np.column_stack([low, high]).ravel(), 1)
    np.testing.assert_allclose(np.polyval(line, x), np.column_stack([low, high]), atol=1e-9)


def test_a_tick_stands_at_the_best_predictor_without_heads(ax, evaluation):
    plot_effects(evaluation, ax=ax)
    line, _, _ = to_effect(ax, evaluation)
    ticks = segments(ax, "trivial")
    assert len(ticks) == 6, "the last type has none"
    np.testing.assert_allclose(np.polyval(line, ticks[0][0, 0]), evaluation.trivial.expl_var[:, 0].max(), atol=1e-9)


def test_without_intervals_and_baselines_there_are_points_alone(ax):
    plot_effects(make_evaluation(), ax=ax)
    assert segments(ax, "intervals") == segments(ax, "trivial") == []
    assert len(places(ax, "whole_model")) == 6
    assert "intervals" not in texts(ax)
    assert "free null; anticonservative" in texts(ax)
    assert [t.get_text() for t in ax.get_legend().get_texts()][-1] != "best without heads"


def test_a_bad_head_does_not_take_all_the_scale(ax, evaluation):
    values = evaluation.expl_var.copy()
    values[0, 1] = -80.0
    changed = dataclasses.replace(evaluation, expl_var=values, intervals=None)
    plot_effects(changed, ax=ax)
    assert len(places(ax, "beyond")) == 1
    assert "Arrows: beyond the scale." in texts(ax)
    np.testing.assert_allclose(np.ptp(places(ax, "whole_model")[:, 0]) > 1.0, True)


def test_a_type_without_effects_says_so(ax, evaluation):
    plot_effects(evaluation, ax=ax)
    assert [t.get_text() for t in ax.texts if t.get_gid() == "undefined"] == ["undefined"]


def test_nothing_to_draw_is_refused_in_words(ax, evaluation):
    assert not has_effects(evaluation, ["β cell"])
    with pytest.raises(DataError) as caught:
        plot_effects(evaluation, ax=ax, cell_types=["β cell"])
    assert caught.value.value == "no head has an explained variance"
    assert caught.value.fix == "choose types with more cells; heads() gives the reasons"
    with pytest.raises(DataError, match="cell type 'Martian'"):
        plot_effects(evaluation, ax=ax, cell_types=["Martian"])


def test_names_come_out_literally_and_the_file_is_left_out_where_empty(tmp_path, evaluation):
    files = {f.name: f for f in save_figures(evaluation, tmp_path / "all", formats=["svg"])}
    assert set(AWKWARD_TYPES) <= set(svg_texts(files["effects.svg"]))
    assert not any("<script" in f.read_text(encoding="utf-8") for f in files.values())
    names = [f.name for f in save_figures(evaluation, tmp_path / "none", cell_types=["β cell"], formats=["svg"])]
    assert "effects.svg" not in names


@pytest.mark.parametrize(("n_heads", "n_types"), [(1, 1), (8, 19), (16, 60)])
def test_panels_of_any_number_fit(n_heads, n_types):
    evaluation = make_evaluation(n_heads, [f"t{i:02d}" for i in range(n_types)], inferred="lag", with_undefined=False)
    figure = Figure(figsize=effects_size(evaluation, n_types))
    drawn = plot_effects(evaluation, ax=figure.add_subplot())
    points = [place for kind in ("significant", "not_significant", "no_test") for place in places(drawn, kind)]
    assert len(points) == n_heads * n_types
    (left, right), (bottom, top) = drawn.get_xlim(), drawn.get_ylim()
    assert all(left < x < right and top < y < bottom for x, y in points)


def test_without_axes_pyplot_shows_the_figure(evaluation):
    drawn = plot_effects(evaluation)
    assert drawn.figure.number in plt.get_fignums()
    plt.close(drawn.figure)
