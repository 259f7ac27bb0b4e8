"""Figures of heads kept alone, and all figures of an evaluation as files."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from functools import partial
from xml.etree import ElementTree

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.collections import PathCollection, QuadMesh
from matplotlib.figure import Figure

from amici_eval.common.errors import DataError, InvalidSpecError, OutputError
from amici_eval.common.text import slugify
from amici_eval.report.figures.ablation_figures import (
    plot_ablations,
    plot_interactions,
    plot_sender_graph,
    plot_senders,
)
from amici_eval.report.figures.evaluation_figures import (
    effects_size,
    has_effects,
    plot_barplot,
    plot_effects,
    plot_heatmap,
    save_figures,
    significance_note,
)
from amici_eval.settings.evaluation import MODES
from tests.builders import AWKWARD_TYPES, make_evaluation


def bars(axes):
    return {(round(p.get_x() + p.get_width() / 2, 6), round(p.get_height(), 12)) for c in axes.containers for p in c}


def marks(axes, gid):
    return [c for c in axes.collections if isinstance(c, PathCollection) and c.get_gid() == gid]


def texts(axes):
    return "\n".join(t.get_text() for t in axes.texts).replace("\n", " ")


def svg_texts(path):
    return ["".join(t.itertext()) for t in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")]


def test_bars_are_the_largest_gene_of_each_head_and_type(ax):
    evaluation = make_evaluation()
    plot_barplot(evaluation, ax=ax)
    heights = {
        round(float(np.nanmax(evaluation.expl_var_gene[h, c])), 12)
        for h in range(3)
        for c in range(len(evaluation.cell_types) - 1)
    }
    assert {height for _, height in bars(ax)} == heights
    assert len(bars(ax)) == 3 * (len(evaluation.cell_types) - 1)


def test_asterisks_stand_above_the_significant_bars_only(ax):
    evaluation = make_evaluation()
    plot_barplot(evaluation, ax=ax)
    assert np.any((evaluation.p_value <= 0.05) & (evaluation.p_value_adj > 0.05)), "else the test says less"
    (significant,) = marks(ax, "significant")
    assert len(significant.get_offsets()) == evaluation.n_significant > 0
    positions = dict(bars(ax))
    width = 0.86 / len(evaluation.cell_types)
    expected = sorted(
        h + (c - (len(evaluation.cell_types) - 1) / 2) * width for h, c in np.argwhere(evaluation.p_value_adj <= 0.05)
    )
    assert sorted(x for x, _ in significant.get_offsets()) == pytest.approx(expected)
    for x, y in significant.get_offsets():
        assert y > positions[min(positions, key=lambda bar: abs(bar - x))]
    assert "* adjusted p ≤ 0.05, in-sample; free null; anticonservative in spatially autocorrelated tissue" in texts(ax)


def test_asterisks_and_caption_follow_the_null_that_decides(ax):
    evaluation = make_evaluation(inferred="torus")
    assert evaluation.n_significant != evaluation.n_significant_free
    plot_barplot(evaluation, ax=ax)
    (significant,) = marks(ax, "significant")
    assert len(significant.get_offsets()) == evaluation.n_significant
    assert "* adjusted p ≤ 0.05, in-sample; torus null; made for sections that are filled rectangles" in texts(ax)
    held_out = make_evaluation(inferred="torus", held_out=(True,) * 7)
    assert significance_note(held_out).startswith("* adjusted p ≤ 0.05; torus null; ")
    assert "pale: no test (by the torus null: too few cells" in texts(ax)
    for index, name in enumerate(evaluation.cell_types[:-1]):
        axes = Figure(figsize=(8, 5)).add_subplot()
        plot_heatmap(evaluation, name, ax=axes)
        expected = [f"{h}*" if evaluation.spatial.p_value_adj[h, index] <= 0.05 else str(h) for h in range(3)]
        assert [t.get_text() for t in axes.get_xticklabels()] == expected
        assert "torus null" in texts(axes)


def test_undefined_bars_are_crosses_and_named(ax):
    plot_barplot(make_evaluation(), ax=ax)
    (undefined,) = marks(ax, "undefined")
    assert len(undefined.get_offsets()) == 3
    assert "× undefined, no bar: β cell" in texts(ax)
    other = Figure().add_subplot()
    plot_barplot(make_evaluation(with_undefined=False), ax=other)
    assert marks(other, "undefined") == []
    assert "undefined" not in texts(other)


def test_legend_names_all_types_sorted_and_literally(ax):
    plot_barplot(make_evaluation(), ax=ax)
    shown = [t.get_text().replace(r"\$", "$") for t in ax.get_legend().get_texts()]
    assert shown == sorted(AWKWARD_TYPES)


@pytest.mark.parametrize("n_types", [7, 19, 45])
@pytest.mark.parametrize("palette", ["tab10", "Set2", None, ["red", "blue"]])
def test_every_type_has_its_own_colour(ax, n_types, palette):
    evaluation = make_evaluation(2, [f"t{i:02d}" for i in range(n_types)])
    plot_barplot(evaluation, ax=ax, palette=palette)
    assert len({handle.get_facecolor() for handle in ax.get_legend().get_patches()}) == n_types


def test_a_subset_is_drawn_sorted_in_the_colours_of_the_whole():
    evaluation = make_evaluation()
    whole, part = Figure().add_subplot(), Figure().add_subplot()
    plot_barplot(evaluation, ax=whole)
    plot_barplot(evaluation, ax=part, cell_types=["_hidden", "CD8+_T_Cells"])
    colours = {}
    for axes in (whole, part):
        legend = axes.get_legend()
        names = [text.get_text() for text in legend.get_texts()]
        colours[axes] = dict(zip(names, [patch.get_facecolor() for patch in legend.get_patches()], strict=True))
    assert list(colours[part]) == ["CD8+_T_Cells", "_hidden"]
    assert colours[part].items() <= colours[whole].items()


def test_a_mapping_of_colours_is_used_as_it_is(ax):
    evaluation = make_evaluation(2, ["A", "B"])
    plot_barplot(evaluation, ax=ax, palette={"A": "#ff0000", "B": "#ff0000"})
    assert {handle.get_facecolor() for handle in ax.get_legend().get_patches()} == {(1.0, 0.0, 0.0, 1)}


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (
            {"cell_types": ["Martian"]},
            DataError,
            r"cell type 'Martian': the evaluation holds A, B; choose one of these",
        ),
        ({"cell_types": []}, InvalidSpecError, r"cell_types=\[\]: .* at least one type; leave cell_types out"),
        ({"palette": "no_such"}, InvalidSpecError, r"palette='no_such': .* name of a seaborn .*; set palette='tab10'"),
        (
            {"palette": {"A": "red"}},
            InvalidSpecError,
            r"palette without 'B': .* each of the evaluation's types; add them",
        ),
        ({"palette": ["red", "no_such"]}, InvalidSpecError, r"colour 'no_such' in palette: .*; use a name"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_words(ax, arguments, error, text):
    with pytest.raises(error, match=text):
        plot_barplot(make_evaluation(2, ["A", "B"]), ax=ax, **arguments)


def test_heatmap_shows_the_top_genes_by_mean_over_heads(ax):
    evaluation = make_evaluation(4, ["A", "B"], 40)
    plot_heatmap(evaluation, "A", ax=ax, n_top_genes=6)
    means = np.nan_to_num(evaluation.expl_var_gene[:, 0].mean(axis=0), nan=-np.inf)
    order = np.argsort(-means)[:6]
    assert [t.get_text().replace(r"\$", "$") for t in ax.get_yticklabels()] == [evaluation.genes[g] for g in order]
    (mesh,) = (c for c in ax.collections if isinstance(c, QuadMesh))
    np.testing.assert_array_equal(mesh.get_array(), evaluation.expl_var_gene[:, 0][:, order].T)
    low, high = mesh.get_clim()
    assert low == -high
    assert mesh.get_cmap().name == "RdBu_r"
    assert ax.figure.axes[1].get_ylabel() == "Explained variance (one head kept)"


def test_heatmap_stars_the_significant_heads(ax):
    evaluation = make_evaluation()
    plot_heatmap(evaluation, "CD8+_T_Cells", ax=ax)
    index = evaluation.cell_types.index("CD8+_T_Cells")
    expected = [f"{h}*" if evaluation.p_value_adj[h, index] <= 0.05 else str(h) for h in range(3)]
    assert [t.get_text() for t in ax.get_xticklabels()] == expected
    assert len(set("".join(expected))) == 4, "some stars, not all: else the test says little"


def test_one_bad_gene_does_not_take_all_the_contrast(ax):
    evaluation = make_evaluation(2, ["A", "B"])
    evaluation.expl_var_gene[0, 0, 2] = -80.0
    plot_heatmap(evaluation, "A", ax=ax)
    (mesh,) = (c for c in ax.collections if isinstance(c, QuadMesh))
    assert mesh.get_clim() == (-1.0, 1.0)


def test_a_type_without_values_gives_the_reason(ax):
    plot_heatmap(make_evaluation(), "β cell", ax=ax)
    assert texts(ax) == "Explained variance is undefined: 1 cell; at least 3 needed"
    assert not ax.axison


def test_heatmap_refuses_unknown_types_and_sizes(ax):
    with pytest.raises(DataError, match="cell type 'Martian'"):
        plot_heatmap(make_evaluation(), "Martian", ax=ax)
    with pytest.raises(InvalidSpecError, match="n_top_genes=0: it must be a whole number of at least 1; set"):
        plot_heatmap(make_evaluation(), "_hidden", ax=ax, n_top_genes=0)


def test_files_have_the_names_of_the_contract(tmp_path):
    evaluation = make_evaluation()
    calls = []
    files = save_figures(evaluation, tmp_path / "run" / "figures", progress=calls.append)
    stems = [
        "effects",
        "expl_variance_barplot_per_head",
        *(f"expl_variance_heatmap_{slugify(t)}" for t in evaluation.cell_types),
    ]
    assert [f.name for f in files] == [f"{stem}.{kind}" for stem in stems for kind in ("png", "svg")]
    assert sorted((tmp_path / "run" / "figures").iterdir()) == sorted(files)
    assert all(f.read_bytes().startswith(b"\x89PNG") for f in files if f.suffix == ".png")
    assert calls == [1] * len(stems)


def test_only_the_chosen_types_and_formats_are_written(tmp_path):
    files = save_figures(make_evaluation(), tmp_path, cell_types=["_hidden"], formats=["svg"])
    assert [f.name for f in files] == [
        "effects.svg",
        "expl_variance_barplot_per_head.svg",
        f"expl_variance_heatmap_{slugify('_hidden')}.svg",
    ]


def test_control_characters_and_scripts_the_font_lacks_do_no_harm(tmp_path):
    files = save_figures(make_evaluation(2, ["a\x00b\nc", "細胞", "z"]), tmp_path)
    drawn = svg_texts(files[3])
    assert "細胞" in drawn
    assert r"a\x00b\x0ac" in drawn


def test_global_state_is_as_before(tmp_path):
    with matplotlib.rc_context({"font.size": 20, "svg.hashsalt": "mine"}):
        before, fignums, backend = dict(matplotlib.rcParams), plt.get_fignums(), matplotlib.get_backend()
        save_figures(make_evaluation(), tmp_path)
        assert dict(matplotlib.rcParams) == before
        assert plt.get_fignums() == fignums
        assert matplotlib.get_backend() == backend
        with pytest.raises(InvalidSpecError):
            save_figures(make_evaluation(), tmp_path, palette="no_such")
        assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("formats", [["pdf"], [], "png"])
def test_unknown_formats_are_refused(tmp_path, formats):
    with pytest.raises(InvalidSpecError, match=r"formats=.*: it must list some of png, svg; set formats="):
        save_figures(make_evaluation(), tmp_path, formats=formats)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"folder .*file.* cannot be made .*; give another folder"):
        save_figures(make_evaluation(), tmp_path / "file" / "figures")


def test_tables_and_page_load_no_matplotlib():
    code = "import sys, amici_eval.report.page.evaluation_page as page; print('matplotlib' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"


def places(ax, gid):
    return np.concatenate([np.asarray(c.get_offsets()) for c in ax.collections if c.get_gid() == gid] or [[]])


def segments(ax, gid):
    return [np.asarray(s) for c in ax.collections if c.get_gid() == gid for s in c.get_segments()]


def to_effect(ax, everything):
    """Return the map from place to effect within the first panel, from two heads of it."""
    values = np.concatenate([[everything.expl_var_full[0]], everything.expl_var[:, 0]])
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


def test_points_are_effects_on_one_scale(ax, everything):
    plot_effects(everything, ax=ax)
    line, x, values = to_effect(ax, everything)
    np.testing.assert_allclose(np.polyval(line, x), values, atol=1e-9)


def test_heads_are_filled_where_the_null_that_decides_says_so(ax, everything):
    plot_effects(everything, ax=ax)
    assert everything.n_significant != everything.n_significant_free
    defined = np.isfinite(everything.expl_var)
    assert len(places(ax, "significant")) == everything.n_significant
    assert len(places(ax, "not_significant")) == everything.n_decided - everything.n_significant
    assert len(places(ax, "no_test")) == (defined & np.isnan(everything.adjusted)).sum() == 2
    assert len(places(ax, "whole_model")) == 6
    (filled,) = (c for c in ax.collections if c.get_gid() == "significant")
    (hollow,) = (c for c in ax.collections if c.get_gid() == "not_significant")
    assert filled.get_facecolor().tolist() == filled.get_edgecolor().tolist() == hollow.get_edgecolor().tolist()
    assert hollow.get_facecolor()[0].tolist() == [1.0, 1.0, 1.0, 1.0]
    assert "adjusted p ≤ 0.05, in-sample; lag null" in texts(ax).lower()


def test_intervals_run_from_bound_to_bound(ax, everything):
    plot_effects(everything, ax=ax, cell_types=["CD8+_T_Cells"])
    index = everything.cell_types.index("CD8+_T_Cells")
    drawn = sorted(segments(ax, "intervals"), key=lambda one: one[0, 1])
    assert len(drawn) == 1 + 3
    bounds = everything.intervals
    low = np.array([bounds.full_low[index], *bounds.low[:, index]])
    high = np.array([bounds.full_high[index], *bounds.high[:, index]])
    x = np.array([[one[0, 0], one[1, 0]] for one in drawn])
    line = np.polyfit(x.ravel(), np.column_stack([low, high]).ravel(), 1)
    np.testing.assert_allclose(np.polyval(line, x), np.column_stack([low, high]), atol=1e-9)


def test_a_tick_stands_at_the_best_predictor_without_heads(ax, everything):
    plot_effects(everything, ax=ax)
    line, _, _ = to_effect(ax, everything)
    ticks = segments(ax, "trivial")
    assert len(ticks) == 6, "the last type has none"
    np.testing.assert_allclose(np.polyval(line, ticks[0][0, 0]), everything.trivial.expl_var[:, 0].max(), atol=1e-9)


def test_without_intervals_and_baselines_there_are_points_alone(ax):
    plot_effects(make_evaluation(), ax=ax)
    assert segments(ax, "intervals") == segments(ax, "trivial") == []
    assert len(places(ax, "whole_model")) == 6
    assert "intervals" not in texts(ax)
    assert "free null; anticonservative" in texts(ax)
    assert [t.get_text() for t in ax.get_legend().get_texts()][-1] != "best without heads"


def test_a_bad_head_does_not_take_all_the_scale(ax, everything):
    values = everything.expl_var.copy()
    values[0, 1] = -80.0
    changed = dataclasses.replace(everything, expl_var=values, intervals=None)
    plot_effects(changed, ax=ax)
    assert len(places(ax, "beyond")) == 1
    assert "Arrows: beyond the scale." in texts(ax)
    np.testing.assert_allclose(np.ptp(places(ax, "whole_model")[:, 0]) > 1.0, True)


def test_a_type_without_effects_says_so(ax, everything):
    plot_effects(everything, ax=ax)
    assert [t.get_text() for t in ax.texts if t.get_gid() == "undefined"] == ["undefined"]


def test_nothing_to_draw_is_refused_in_words(ax, everything):
    assert not has_effects(everything, ["β cell"])
    with pytest.raises(DataError) as caught:
        plot_effects(everything, ax=ax, cell_types=["β cell"])
    assert caught.value.value == "no head has an explained variance"
    assert caught.value.fix == "choose types with more cells; heads() gives the reasons"
    with pytest.raises(DataError, match="cell type 'Martian'"):
        plot_effects(everything, ax=ax, cell_types=["Martian"])


@pytest.mark.parametrize(("n_heads", "n_types"), [(1, 1), (8, 19), (16, 60)])
def test_panels_of_any_number_fit(n_heads, n_types):
    evaluation = make_evaluation(n_heads, [f"t{i:02d}" for i in range(n_types)], inferred="lag", with_undefined=False)
    figure = Figure(figsize=effects_size(evaluation, n_types))
    drawn = plot_effects(evaluation, ax=figure.add_subplot())
    points = [place for kind in ("significant", "not_significant", "no_test") for place in places(drawn, kind)]
    assert len(points) == n_heads * n_types
    (left, right), (bottom, top) = drawn.get_xlim(), drawn.get_ylim()
    assert all(left < x < right and top < y < bottom for x, y in points)


@pytest.mark.parametrize(
    "plot",
    [
        *(plot_barplot, partial(plot_heatmap, cell_type="$x$_1"), plot_effects, plot_ablations, plot_interactions),
        *(plot_senders, plot_sender_graph),
    ],
)
def test_without_axes_pyplot_shows_the_figure(plot, everything):
    before = plt.get_fignums()
    figure = plot(everything).figure
    assert figure.number in plt.get_fignums()
    figure.canvas.draw()
    plt.close(figure)
    assert plt.get_fignums() == before


def test_labels_come_out_literally_in_svg(tmp_path, everything):
    files = {f.stem: f for f in save_figures(everything, tmp_path, formats=["svg"])}
    for stem in ("effects", "expl_variance_barplot_per_head", "ablations", "head_interactions", "sender_graph"):
        assert set(AWKWARD_TYPES) <= set(svg_texts(files[stem])), stem
    assert {"$x$_1", "CD8+_T_Cells", "β cell"} <= set(svg_texts(files["senders"])), "longer ones are cut"
    for index, name in enumerate(everything.cell_types):
        drawn = svg_texts(files[f"expl_variance_heatmap_{slugify(name)}"])
        assert any(text.startswith(f"{name} ({everything.n_cells[index]}") for text in drawn)
    assert {"$g$", "<b>"} <= set(svg_texts(files[f"expl_variance_heatmap_{slugify('$x$_1')}"]))
    assert not any("<script" in f.read_text(encoding="utf-8") for f in files.values())


def test_files_of_chosen_types_show_no_other(tmp_path, everything):
    chosen = {"_hidden", "$x$_1"}
    for path in save_figures(everything, tmp_path, formats=["svg"], cell_types=sorted(chosen)):
        if "heatmap" not in path.stem and "sender" not in path.stem:
            assert chosen == set(AWKWARD_TYPES) & set(svg_texts(path)), path.stem


def test_what_is_undefined_in_the_chosen_types_has_no_file(tmp_path, everything):
    names = [f.stem for f in save_figures(everything, tmp_path, cell_types=["β cell"], formats=["svg"])]
    assert not {"effects", "head_interactions", "senders", "sender_graph"} & set(names)
    names = [f.stem for f in save_figures(make_evaluation(), tmp_path, formats=["svg"])]
    assert not any("sender" in name for name in names)


def test_same_evaluation_same_bytes_whatever_the_style(tmp_path, everything):
    chosen = ["_hidden", "$x$_1"]
    first = save_figures(everything, tmp_path / "a", cell_types=chosen)
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "red", "svg.fonttype": "path", "text.usetex": True}):
        second = save_figures(everything, tmp_path / "b", cell_types=chosen)
    changed = make_evaluation(inferred="lag", modes=MODES, senders=AWKWARD_TYPES, seed=1)
    other = save_figures(changed, tmp_path / "c", cell_types=chosen)
    for one, two, three in zip(first, second, other, strict=True):
        assert one.read_bytes() == two.read_bytes() != three.read_bytes(), one.name
    assert not re.search(rb"<dc:date>", first[1].read_bytes())
