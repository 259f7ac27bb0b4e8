from __future__ import annotations

import re
import subprocess
import sys
from xml.etree import ElementTree

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.collections import PathCollection, QuadMesh
from matplotlib.figure import Figure

from amici_eval.common.errors import DataError, InvalidSpecError, OutputError
from amici_eval.common.text import slugify
from amici_eval.report.figures.evaluation_figures import plot_barplot, plot_heatmap, save_figures, significance_note
from tests.builders import AWKWARD_TYPES, make_evaluation


@pytest.fixture
def ax():
    return Figure(figsize=(8, 5)).add_subplot()


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


def test_without_undefined_nothing_is_said_of_it(ax):
    plot_barplot(make_evaluation(with_undefined=False), ax=ax)
    assert marks(ax, "undefined") == []
    assert "undefined" not in texts(ax)


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


def test_without_axes_pyplot_shows_the_figure():
    before = plt.get_fignums()
    for axes in (plot_barplot(make_evaluation()), plot_heatmap(make_evaluation(), "$x$_1")):
        assert axes.figure.number in plt.get_fignums()
        axes.figure.canvas.draw()
        plt.close(axes.figure)
    assert plt.get_fignums() == before


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


def test_labels_come_out_literally_in_svg(tmp_path):
    evaluation = make_evaluation()
    files = {f.stem: f for f in save_figures(evaluation, tmp_path, formats=["svg"])}
    assert set(AWKWARD_TYPES) <= set(svg_texts(files["expl_variance_barplot_per_head"]))
    for index, name in enumerate(evaluation.cell_types):
        drawn = svg_texts(files[f"expl_variance_heatmap_{slugify(name)}"])
        assert any(text.startswith(f"{name} ({evaluation.n_cells[index]}") for text in drawn)
    assert {"$g$", "<b>"} <= set(svg_texts(files[f"expl_variance_heatmap_{slugify('$x$_1')}"]))
    assert not any("<script" in f.read_text(encoding="utf-8") for f in files.values())


def test_control_characters_and_scripts_the_font_lacks_do_no_harm(tmp_path):
    files = save_figures(make_evaluation(2, ["a\x00b\nc", "細胞", "z"]), tmp_path)
    drawn = svg_texts(files[3])
    assert "細胞" in drawn
    assert r"a\x00b\x0ac" in drawn


def test_same_evaluation_same_bytes_whatever_the_style(tmp_path):
    first = save_figures(make_evaluation(), tmp_path / "a")
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "red", "svg.fonttype": "path", "text.usetex": True}):
        second = save_figures(make_evaluation(), tmp_path / "b")
    other = save_figures(make_evaluation(seed=1), tmp_path / "c")
    for one, two, three in zip(first, second, other, strict=True):
        assert one.read_bytes() == two.read_bytes(), one.name
        if "cell-" not in one.name:
            assert one.read_bytes() != three.read_bytes(), one.name
    assert not re.search(rb"<dc:date>", first[1].read_bytes())


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
