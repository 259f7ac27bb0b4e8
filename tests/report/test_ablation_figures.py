from __future__ import annotations

import dataclasses

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.collections import PathCollection, QuadMesh
from matplotlib.figure import Figure

from amici_eval.common.errors import DataError, InvalidSpecError
from amici_eval.common.text import slugify
from amici_eval.report.figures.ablation_figures import plot_ablations, plot_interactions
from amici_eval.report.figures.evaluation_figures import save_figures
from amici_eval.settings.evaluation import MODES
from tests.builders import AWKWARD_TYPES, make_evaluation
from tests.report.test_figures import svg_texts, texts

LOST = ("leave_one_out", "mean_z", "resampled_z")


@pytest.fixture
def ax():
    return Figure(figsize=(16, 6)).add_subplot()


def blocks(axes):
    return {c.get_gid(): c for c in axes.collections if isinstance(c, QuadMesh)}


def values_of(mesh):
    return np.ma.filled(mesh.get_array(), np.nan)


def corner(mesh):
    return mesh.get_coordinates()[0, 0]


def change(evaluation, **arrays):
    return dataclasses.replace(evaluation, ablations=dataclasses.replace(evaluation.ablations, **arrays))


def test_each_mode_has_its_block_of_what_a_head_explains_or_what_is_lost_without_it(ax):
    evaluation = make_evaluation(modes=MODES)
    plot_ablations(evaluation, ax=ax)
    shown = blocks(ax)
    assert set(shown) == set(MODES)
    for mode in MODES:
        values = evaluation.ablations.of(mode)
        expected = evaluation.expl_var_full - values if mode in LOST else values
        np.testing.assert_array_equal(values_of(shown[mode]), expected.T)
        low, high = shown[mode].get_clim()
        assert low == -high
    lost = evaluation.ablations_frame().query("mode == 'mean_z'")["delta_full"].to_numpy().reshape(3, 7)
    np.testing.assert_array_equal(values_of(shown["mean_z"]), lost.T)
    assert len({mesh.get_clim() for mesh in shown.values()}) == 1
    left = [corner(shown[mode])[0] for mode in MODES]
    assert len(set(left)) == len(left)


def test_only_computed_modes_are_drawn_and_explained(ax):
    plot_ablations(make_evaluation(modes=("leave_one_out",)), ax=ax)
    assert set(blocks(ax)) == {"leave_one_out"}
    assert "Lost without it" in texts(ax)
    assert "Shapley" not in texts(ax)
    assert "redundant" not in texts(ax)


def test_dots_mark_the_largest_head_of_a_row_if_it_is_above_zero(ax):
    evaluation = make_evaluation(8, [f"t{i:02d}" for i in range(19)], modes=("shapley",))
    values = evaluation.ablations.expl_var.copy()
    values[0, :, 3] = -0.1
    evaluation = change(evaluation, expl_var=values)
    plot_ablations(evaluation, ax=ax)
    (mesh,) = blocks(ax).values()
    dots = [c for c in ax.collections if isinstance(c, PathCollection) and c.get_gid() == "largest"]
    places = {tuple(place) for c in dots for place in (c.get_offsets() - corner(mesh))}
    expected = {(values[0, :, row].argmax() + 0.5, row + 0.5) for row in range(18) if row != 3}
    assert {tuple(np.round(place, 9)) for place in places} == expected


def test_small_ablations_have_numbers_and_the_model_has_them_always(ax):
    evaluation = make_evaluation(2, ["A", "B"], modes=("keep_one",), with_undefined=False)
    plot_ablations(evaluation, ax=ax)
    numbers = {t.get_text() for t in ax.texts}
    assert {f"{value:.2f}" for value in evaluation.ablations.of("keep_one").ravel()} <= numbers
    large = Figure(figsize=(9, 9)).add_subplot()
    plot_ablations(make_evaluation(8, [f"t{i:02d}" for i in range(19)], modes=("keep_one",)), ax=large)
    model = [t.get_text() for t in large.texts if t.get_gid() == "baselines"]
    assert len(model) == 2 * 19
    assert model[-2:] == ["–", "–"], "the last type is undefined"
    assert model[1::2][:-1] == ["0.01"] * 18


def test_one_bad_ablation_does_not_take_all_the_contrast(ax):
    evaluation = make_evaluation(modes=("keep_one",))
    values = evaluation.ablations.expl_var.copy()
    values[0, 0, 0] = -80.0
    plot_ablations(change(evaluation, expl_var=values), ax=ax)
    assert blocks(ax)["keep_one"].get_clim()[1] == np.nanmax(values)


def test_without_any_value_there_are_grey_blocks(ax):
    evaluation = make_evaluation(2, ["only"], modes=MODES)
    plot_ablations(evaluation, ax=ax)
    assert np.isnan(values_of(blocks(ax)["shapley"])).all()
    assert "Grey: undefined" in texts(ax)


def test_interactions_are_above_and_frozen_ones_below_the_diagonal(ax):
    evaluation = make_evaluation(4, modes=MODES)
    plot_interactions(evaluation, ax=ax)
    shown = blocks(ax)
    assert list(shown) == [slugify(name) for name in evaluation.cell_types]
    for index, name in enumerate(evaluation.cell_types[:-1]):
        drawn = values_of(shown[slugify(name)])
        for first in range(4):
            for second in range(first + 1, 4):
                assert drawn[first, second] == evaluation.ablations.interaction[index, first, second]
                assert drawn[second, first] == evaluation.ablations.frozen_interaction[index, first, second]
        low, high = shown[slugify(name)].get_clim()
        assert low == -high
    assert "Above the diagonal: the model as it is; below: the model with its layer norm frozen" in texts(ax)
    assert len({tuple(corner(mesh)) for mesh in shown.values()}) == len(shown)


@pytest.mark.parametrize(
    ("mode", "name", "words"),
    [("shapley", "interaction", "as it is"), ("frozen_shapley", "frozen_interaction", "with its layer norm frozen")],
)
def test_one_kind_of_interaction_fills_both_sides(ax, mode, name, words):
    evaluation = make_evaluation(3, ["A", "B"], modes=(mode,), with_undefined=False)
    plot_interactions(evaluation, ax=ax)
    np.testing.assert_array_equal(values_of(blocks(ax)["B"]), getattr(evaluation.ablations, name)[1])
    assert f"Of the model {words}." in texts(ax)


def test_red_pairs_need_each_other(ax):
    # the sign of the definition: v(both) - v(a) - v(b) + v(none) above 0 means more together than apart
    evaluation = make_evaluation(2, ["A"], modes=("shapley",), with_undefined=False)
    pairs = np.zeros((1, 2, 2))
    pairs[0, 0, 1] = pairs[0, 1, 0] = 0.2
    plot_interactions(change(evaluation, interaction=pairs), ax=ax)
    mesh = blocks(ax)["A"]
    red, _, blue, _ = mesh.get_cmap()(mesh.norm(0.2))
    assert red > blue
    assert "Red: two heads explain more together than the sum of what each adds" in texts(ax)


def test_a_subset_is_drawn_sorted(ax):
    evaluation = make_evaluation(modes=MODES)
    plot_interactions(evaluation, ax=ax, cell_types=["_hidden", "CD8+_T_Cells"])
    assert list(blocks(ax)) == [slugify("CD8+_T_Cells"), "_hidden"]
    other = Figure(figsize=(9, 5)).add_subplot()
    plot_ablations(evaluation, ax=other, cell_types=["_hidden", "CD8+_T_Cells"])
    assert [t.get_text() for t in other.get_yticklabels()] == ["CD8+_T_Cells", "_hidden"]
    index = evaluation.type_index("_hidden")
    np.testing.assert_array_equal(values_of(blocks(other)["shapley"])[1], evaluation.ablations.of("shapley")[:, index])


@pytest.mark.parametrize("plot", [plot_ablations, plot_interactions])
def test_what_cannot_be_drawn_is_refused_in_words(ax, plot):
    with pytest.raises(DataError, match=r"the evaluation holds no .*; evaluate again with ablation.modes"):
        plot(make_evaluation(), ax=ax)
    with pytest.raises(DataError, match="cell type 'Martian'"):
        plot(make_evaluation(modes=MODES), ax=ax, cell_types=["Martian"])
    with pytest.raises(InvalidSpecError, match=r"cell_types=\[\]"):
        plot(make_evaluation(modes=MODES), ax=ax, cell_types=[])
    with pytest.raises(DataError, match="holds no head interactions"):
        plot_interactions(make_evaluation(modes=("keep_one",)), ax=ax)


def test_without_axes_pyplot_shows_the_figure():
    before = plt.get_fignums()
    for axes in (plot_ablations(make_evaluation(modes=MODES)), plot_interactions(make_evaluation(modes=MODES))):
        assert axes.figure.number in plt.get_fignums()
        axes.figure.canvas.draw()
        plt.close(axes.figure)
    assert plt.get_fignums() == before


@pytest.mark.parametrize(
    ("evaluation", "stems"),
    [
        (make_evaluation(2, ["A", "B"]), []),
        (make_evaluation(2, ["A", "B"], modes=("keep_one",)), ["ablations"]),
        (make_evaluation(2, ["A", "B"], modes=("frozen_shapley",)), ["ablations", "head_interactions"]),
        (make_evaluation(1, ["A", "B"], modes=MODES), ["ablations"]),
        (make_evaluation(2, ["B"], modes=MODES), ["ablations"]),
        (make_evaluation(2, ["A", "B"], modes=()), []),
    ],
    ids=["not computed", "no interaction", "both", "one head", "all undefined", "no mode"],
)
def test_files_are_written_where_there_is_something_to_show(tmp_path, evaluation, stems):
    before = plt.get_fignums()
    files = save_figures(evaluation, tmp_path)
    new = [f.name for f in files if not f.name.startswith(("expl_variance", "effects"))]
    assert new == [f"{stem}.{kind}" for stem in stems for kind in ("png", "svg")]
    assert sorted(tmp_path.iterdir()) == sorted(files)
    assert plt.get_fignums() == before


def test_chosen_types_only_and_labels_literally_in_svg(tmp_path):
    evaluation = make_evaluation(modes=MODES)
    files = {f.stem: f for f in save_figures(evaluation, tmp_path / "all", formats=["svg"])}
    for stem in ("ablations", "head_interactions"):
        assert set(AWKWARD_TYPES) <= set(svg_texts(files[stem])), stem
        assert "<script" not in files[stem].read_text(encoding="utf-8")
    some = save_figures(evaluation, tmp_path / "some", formats=["svg"], cell_types=["_hidden", "$x$_1"])
    for path in some[-2:]:
        assert {"_hidden", "$x$_1"} == set(AWKWARD_TYPES) & set(svg_texts(path))


def test_same_evaluation_same_bytes(tmp_path):
    pages = [save_figures(make_evaluation(modes=MODES), tmp_path / name)[-4:] for name in "ab"]
    for one, two in zip(*pages, strict=True):
        assert one.read_bytes() == two.read_bytes(), one.name
