"""Who talks to whom on figures and on the page."""

from __future__ import annotations

import dataclasses

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.collections import QuadMesh
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from amici_eval.common.errors import DataError
from amici_eval.report.evaluation_sentences import sure_links
from amici_eval.report.figures.ablation_figures import plot_sender_graph, plot_senders, senders_size
from amici_eval.report.figures.evaluation_figures import save_figures
from amici_eval.report.page.evaluation_page import write_html
from tests.builders import AWKWARD_TYPES, make_evaluation
from tests.report.test_figures import svg_texts, texts
from tests.report.test_html import section


@pytest.fixture
def ax():
    return Figure(figsize=(12, 6)).add_subplot()


@pytest.fixture(scope="module")
def evaluation():
    return make_evaluation(inferred="lag", senders=AWKWARD_TYPES)


def arrows(ax):
    return {p.get_gid(): p for p in ax.patches if str(p.get_gid()).startswith("link-")}


def test_a_panel_of_each_head_holds_what_is_lost(ax, evaluation):
    plot_senders(evaluation, ax=ax)
    panels = [c for c in ax.collections if isinstance(c, QuadMesh)]
    assert [p.get_gid() for p in panels] == ["head-0", "head-1", "head-2"]
    for panel, lost in zip(panels, evaluation.senders.effect, strict=True):
        np.testing.assert_array_equal(np.ma.filled(panel.get_array(), np.nan).reshape(7, 7), lost)
    assert len({panel.get_clim() for panel in panels}) == 1
    low, high = panels[0].get_clim()
    assert low == -high == -np.nanmax(np.abs(evaluation.senders.effect))


def test_dots_stand_where_the_interval_lies_above_0_and_the_head_explains_something(ax, evaluation):
    useless = evaluation.expl_var.copy()
    useless[1] = -0.01
    evaluation = dataclasses.replace(evaluation, expl_var=useless)
    plot_senders(evaluation, ax=ax)
    expected = (evaluation.senders.low > 0) & (evaluation.expl_var > 0)[:, :, None]
    assert 0 < expected.sum() < (evaluation.senders.low > 0).sum()
    dots = [c.get_offsets() for c in ax.collections if c.get_gid() == "sure"]
    assert sum(map(len, dots)) == expected.sum()
    # the first panel's dots, in cells from its corner
    corner = ax.collections[0].get_coordinates()[0, 0]
    size = ax.collections[0].get_coordinates()[1, 1] - corner
    found = np.floor((np.asarray(dots[0]) - corner) / size).astype(int)
    assert {(row, column) for column, row in found} == set(zip(*np.nonzero(expected[0]), strict=True))


def test_arrows_run_from_sender_to_receiver_the_widest_first(ax, evaluation):
    plot_sender_graph(evaluation, ax=ax)
    links = sure_links(evaluation, range(7))
    drawn = arrows(ax)
    assert list(drawn) == [f"link-{head}-{receiver}-{sender}" for head, receiver, sender in links[:30].tolist()]
    widths = [arrow.get_linewidth() for arrow in drawn.values()]
    assert widths == sorted(widths, reverse=True)
    lost = [evaluation.senders.effect[tuple(link)] for link in links]
    assert lost == sorted(lost, reverse=True)
    (dots,) = (np.asarray(c.get_offsets()) for c in ax.collections if c.get_gid() == "types")
    place = dict(zip(evaluation.senders.senders, dots, strict=True))
    for (head, receiver, sender), arrow in zip(links.tolist(), drawn.values(), strict=False):
        start, stop = arrow._posA_posB
        np.testing.assert_allclose(start, place[evaluation.senders.senders[sender]])
        np.testing.assert_allclose(stop, place[evaluation.cell_types[receiver]])
        of_head = [a for gid, a in drawn.items() if gid.startswith(f"link-{head}-")]
        assert {to_rgba(a.get_edgecolor()) for a in of_head} == {to_rgba(arrow.get_edgecolor())}
    assert len({to_rgba(a.get_edgecolor()) for a in drawn.values()}) == len({link[0] for link in links.tolist()})


def test_at_most_thirty_arrows_are_drawn_and_the_caption_counts_the_others(ax, evaluation):
    many = dataclasses.replace(
        evaluation,
        expl_var=np.where(np.isnan(evaluation.expl_var), np.nan, 0.1),
        senders=dataclasses.replace(evaluation.senders, low=np.abs(evaluation.senders.effect)),
    )
    plot_sender_graph(many, ax=ax)
    n_links = len(sure_links(many, range(7)))
    assert n_links > 30
    assert len(arrows(ax)) == 30
    assert f"The 30 largest of {n_links} losses" in texts(ax)


def test_without_a_sure_link_the_graph_says_so(ax, evaluation):
    none = dataclasses.replace(evaluation, expl_var=-np.abs(evaluation.expl_var))
    plot_sender_graph(none, ax=ax)
    assert not arrows(ax)
    assert "no interval lies above 0" in texts(ax)
    assert "No sender stands out: of " in section(none, "senders")


@pytest.mark.parametrize("plot", [plot_senders, plot_sender_graph])
def test_what_was_not_computed_is_refused_in_words(plot, ax, evaluation):
    with pytest.raises(DataError) as caught:
        plot(make_evaluation(), ax=ax)
    assert caught.value.value == "it was not computed who talks to whom"
    with pytest.raises(DataError, match="not computed"):
        plot(evaluation, ax=ax, cell_types=["β cell"])
    with pytest.raises(DataError, match="cell type 'Martian'"):
        plot(evaluation, ax=ax, cell_types=["Martian"])


@pytest.mark.parametrize("plot", [plot_senders, plot_sender_graph])
def test_without_axes_pyplot_shows_the_figure(plot, evaluation):
    drawn = plot(evaluation)
    assert drawn.figure.number in plt.get_fignums()
    plt.close(drawn.figure)


def test_files_hold_all_names_literally_and_are_left_out_where_not_computed(tmp_path, evaluation):
    files = {f.name: f for f in save_figures(evaluation, tmp_path / "all", formats=["svg", "png"])}
    assert {"senders.svg", "senders.png", "sender_graph.svg", "sender_graph.png"} <= set(files)
    for name in ("senders.svg", "sender_graph.svg"):
        assert {"$x$_1", "CD8+_T_Cells", "β cell"} <= set(svg_texts(files[name]))
        assert "<script" not in files[name].read_text(encoding="utf-8")
    names = [f.name for f in save_figures(make_evaluation(), tmp_path / "none", formats=["svg"])]
    assert not any("sender" in name for name in names)


@pytest.mark.parametrize(("n_heads", "n_types"), [(1, 2), (9, 20)])
def test_panels_of_any_number_fit(n_heads, n_types):
    names = [f"t{i:02d}" for i in range(n_types)]
    evaluation = make_evaluation(n_heads, names, inferred="lag", senders=names, with_undefined=False)
    drawn = plot_senders(evaluation, ax=Figure(figsize=senders_size(evaluation, n_types)).add_subplot())
    (left, right), (bottom, top) = drawn.get_xlim(), drawn.get_ylim()
    for panel in (c for c in drawn.collections if isinstance(c, QuadMesh)):
        corners = panel.get_coordinates().reshape(-1, 2)
        assert ((corners >= [left, top]) & (corners <= [right, bottom])).all()


def test_the_page_lists_links_and_describes_both_figures(tmp_path, evaluation):
    figures = {f.stem: f for f in save_figures(evaluation, tmp_path / "figures", formats=["svg"])}
    page = write_html(evaluation, tmp_path, figures=figures).read_text(encoding="utf-8")
    assert '<section id="senders">' in page
    assert "<script>alert(1)" not in page
    links = sure_links(evaluation, range(7))
    shown = section(evaluation, "senders")
    assert shown.count("<tr>") == 1 + min(30, len(links))
    head, receiver, sender = links[0].tolist()
    assert f"{evaluation.senders.effect[head, receiver, sender]:.3f}" in shown
    assert page.count("Who talks to whom: ") >= 2, "captions, which are read out as well"
    assert section(make_evaluation(), "senders") == ""
