"""Figures of what is lost without heads, pairs of heads, or senders, and the section on senders."""

from __future__ import annotations

import dataclasses

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.collections import PathCollection, QuadMesh
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from amici_eval.common.errors import DataError, InvalidSpecError
from amici_eval.common.text import slugify
from amici_eval.report.evaluation_sentences import sure_links
from amici_eval.report.figures.ablation_figures import (
    plot_ablations,
    plot_interactions,
    plot_sender_graph,
    plot_senders,
    senders_size,
)
from amici_eval.report.figures.evaluation_figures import save_figures
from amici_eval.report.page.evaluation_page import write_html
from amici_eval.settings.evaluation import MODES
from tests.builders import make_evaluation
from tests.report.test_evaluation_figures import texts
from tests.report.test_evaluation_page import section

LOST = ("leave_one_out", "mean_z", "resampled_z")


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


def arrows(ax):
    return {p.get_gid(): p for p in ax.patches if str(p.get_gid()).startswith("link-")}


def test_a_panel_of_each_head_holds_what_is_lost(ax, everything):
    plot_senders(everything, ax=ax)
    panels = [c for c in ax.collections if isinstance(c, QuadMesh)]
    assert [p.get_gid() for p in panels] == ["head-0", "head-1", "head-2"]
    for panel, lost in zip(panels, everything.senders.effect, strict=True):
        np.testing.assert_array_equal(np.ma.filled(panel.get_array(), np.nan).reshape(7, 7), lost)
    assert len({panel.get_clim() for panel in panels}) == 1
    low, high = panels[0].get_clim()
    assert low == -high == -np.nanmax(np.abs(everything.senders.effect))


def test_dots_stand_where_the_interval_lies_above_0_and_the_head_explains_something(ax, everything):
    useless = everything.expl_var.copy()
    useless[1] = -0.01
    everything = dataclasses.replace(everything, expl_var=useless)
    plot_senders(everything, ax=ax)
    expected = (everything.senders.low > 0) & (everything.expl_var > 0)[:, :, None]
    assert 0 < expected.sum() < (everything.senders.low > 0).sum()
    dots = [c.get_offsets() for c in ax.collections if c.get_gid() == "sure"]
    assert sum(map(len, dots)) == expected.sum()
    # the first panel's dots, in cells from its corner
    corner = ax.collections[0].get_coordinates()[0, 0]
    size = ax.collections[0].get_coordinates()[1, 1] - corner
    found = np.floor((np.asarray(dots[0]) - corner) / size).astype(int)
    assert {(row, column) for column, row in found} == set(zip(*np.nonzero(expected[0]), strict=True))


def test_arrows_run_from_sender_to_receiver_the_widest_first(ax, everything):
    plot_sender_graph(everything, ax=ax)
    links = sure_links(everything, range(7))
    drawn = arrows(ax)
    assert list(drawn) == [f"link-{head}-{receiver}-{sender}" for head, receiver, sender in links[:30].tolist()]
    widths = [arrow.get_linewidth() for arrow in drawn.values()]
    assert widths == sorted(widths, reverse=True)
    lost = [everything.senders.effect[tuple(link)] for link in links]
    assert lost == sorted(lost, reverse=True)
    (dots,) = (np.asarray(c.get_offsets()) for c in ax.collections if c.get_gid() == "types")
    place = dict(zip(everything.senders.senders, dots, strict=True))
    for (head, receiver, sender), arrow in zip(links.tolist(), drawn.values(), strict=False):
        start, stop = arrow._posA_posB
        np.testing.assert_allclose(start, place[everything.senders.senders[sender]])
        np.testing.assert_allclose(stop, place[everything.cell_types[receiver]])
        of_head = [a for gid, a in drawn.items() if gid.startswith(f"link-{head}-")]
        assert {to_rgba(a.get_edgecolor()) for a in of_head} == {to_rgba(arrow.get_edgecolor())}
    assert len({to_rgba(a.get_edgecolor()) for a in drawn.values()}) == len({link[0] for link in links.tolist()})


def test_at_most_thirty_arrows_are_drawn_and_the_caption_counts_the_others(ax, everything):
    many = dataclasses.replace(
        everything,
        expl_var=np.where(np.isnan(everything.expl_var), np.nan, 0.1),
        senders=dataclasses.replace(everything.senders, low=np.abs(everything.senders.effect)),
    )
    plot_sender_graph(many, ax=ax)
    n_links = len(sure_links(many, range(7)))
    assert n_links > 30
    assert len(arrows(ax)) == 30
    assert f"The 30 largest of {n_links} losses" in texts(ax)


def test_without_a_sure_link_the_graph_says_so(ax, everything):
    none = dataclasses.replace(everything, expl_var=-np.abs(everything.expl_var))
    plot_sender_graph(none, ax=ax)
    assert not arrows(ax)
    assert "no interval lies above 0" in texts(ax)
    assert "No sender stands out: of " in section(none, "senders")


@pytest.mark.parametrize("plot", [plot_senders, plot_sender_graph])
def test_what_was_not_computed_is_refused_in_words(plot, ax, everything):
    with pytest.raises(DataError) as caught:
        plot(make_evaluation(), ax=ax)
    assert caught.value.value == "it was not computed who talks to whom"
    with pytest.raises(DataError, match="not computed"):
        plot(everything, ax=ax, cell_types=["β cell"])
    with pytest.raises(DataError, match="cell type 'Martian'"):
        plot(everything, ax=ax, cell_types=["Martian"])


@pytest.mark.parametrize(("n_heads", "n_types"), [(1, 2), (9, 20)])
def test_panels_of_any_number_fit(n_heads, n_types):
    names = [f"t{i:02d}" for i in range(n_types)]
    everything = make_evaluation(n_heads, names, inferred="lag", senders=names, with_undefined=False)
    drawn = plot_senders(everything, ax=Figure(figsize=senders_size(everything, n_types)).add_subplot())
    (left, right), (bottom, top) = drawn.get_xlim(), drawn.get_ylim()
    for panel in (c for c in drawn.collections if isinstance(c, QuadMesh)):
        corners = panel.get_coordinates().reshape(-1, 2)
        assert ((corners >= [left, top]) & (corners <= [right, bottom])).all()


def test_the_page_lists_links_and_describes_both_figures(tmp_path, everything):
    figures = {f.stem: f for f in save_figures(everything, tmp_path / "figures", formats=["svg"])}
    page = write_html(everything, tmp_path, figures=figures).read_text(encoding="utf-8")
    assert '<section id="senders">' in page
    assert "<script>alert(1)" not in page
    links = sure_links(everything, range(7))
    shown = section(everything, "senders")
    assert shown.count("<tr>") == 1 + min(30, len(links))
    head, receiver, sender = links[0].tolist()
    assert f"{everything.senders.effect[head, receiver, sender]:.3f}" in shown
    assert page.count("Who talks to whom: ") >= 2, "captions, which are read out as well"
    assert section(make_evaluation(), "senders") == ""
