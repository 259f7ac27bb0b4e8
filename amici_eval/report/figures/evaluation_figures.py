"""Figures of heads kept alone (bars, heat maps, effects with intervals), and all figures of an evaluation as files."""

from __future__ import annotations

import math
import textwrap
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from amici_eval.common.errors import DataError, InvalidSpecError
from amici_eval.common.text import literal, slugify
from amici_eval.report.evaluation_sentences import VALIDITY_SHORT, in_sample_text, type_reasons
from amici_eval.report.figures.ablation_figures import ablation_drawings
from amici_eval.report.figures.drawing import (
    FORMATS,
    INK,
    MUTED,
    Drawing,
    Estimate,
    Panels,
    PointStyle,
    add_caption,
    add_colorbar,
    add_legend,
    add_marks,
    chosen_types,
    colour_limit,
    draw_estimates,
    draw_heatmap,
    drawn_label,
    figure_size,
    new_axes,
    save_drawings,
    type_colours,
)
from amici_eval.report.numbers import counted, rounded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path
    from typing import Any

    from jaxtyping import Float64, Int64
    from matplotlib.axes import Axes

    from amici_eval.report.figures.drawing import Palette
    from amici_eval.results.evaluation import HeadEvaluation

_GROUP_WIDTH = 0.86
_ASTERISK = (6, 2, 0)


def save_figures(
    evaluation: HeadEvaluation,
    directory: str | Path,
    *,
    cell_types: Sequence[str] | None = None,
    palette: Palette | None = None,
    n_top_genes: int = 20,
    formats: Sequence[str] = FORMATS,
    progress: Callable[[int], None] | None = None,
) -> tuple[Path, ...]:
    """Write the forest plot of effects, the bar plot, a heatmap of every type, ablations, and the senders.

    The style is matplotlib's default whatever the caller has set, so the same evaluation gives the same files. No
    pyplot figure is made, and matplotlib's settings are restored.
    """
    chosen = chosen_types(evaluation, cell_types)
    check_n_top_genes(n_top_genes)
    drawings = _drawings(evaluation, chosen, palette=palette, n_top_genes=n_top_genes)
    return save_drawings(drawings, directory, formats=formats, progress=progress)


def _drawings(
    evaluation: HeadEvaluation, chosen: Sequence[str], *, palette: Palette | None, n_top_genes: int
) -> Iterator[Drawing]:
    """Yield the figures in the order of the files."""
    if chosen and has_effects(evaluation, chosen):
        size = effects_size(evaluation, len(chosen))
        yield Drawing("effects", size, partial(plot_effects, evaluation, cell_types=chosen))
    size = barplot_size(evaluation.n_heads, len(chosen))
    draw = partial(plot_barplot, evaluation, palette=palette, cell_types=chosen)
    yield Drawing("expl_variance_barplot_per_head", size, draw)
    for name in chosen:
        n_shown = len(top_genes(evaluation.expl_var_gene[:, evaluation.type_index(name)].T, n_top_genes))
        stem = f"expl_variance_heatmap_{slugify(name, evaluation.cell_types)}"
        draw = partial(plot_heatmap, evaluation, name, n_top_genes=n_top_genes)
        yield Drawing(stem, heatmap_size(evaluation.n_heads, n_shown), draw)
    yield from ablation_drawings(evaluation, chosen)


def plot_barplot(
    evaluation: HeadEvaluation,
    *,
    ax: Axes | None = None,
    palette: Palette | None = "tab10",
    cell_types: Sequence[str] | None = None,
) -> Axes:
    """Show how well each head, kept alone, explains its best gene in every receiver type.

    Parameters
    ----------
    evaluation
        What to show.
    ax
        Axes to draw into; ``None`` makes a new pyplot figure, which notebooks show.
    palette
        Name of a seaborn or matplotlib palette, a list of colours, or a mapping of cell type to colour. A palette with
        fewer colours than the evaluation has types is replaced by a larger one. A type has the same colour whichever
        types are shown.
    cell_types
        The types to show; ``None`` shows all. They are drawn in sorted order.

    Returns
    -------
    Axes
        Bars grouped by head, coloured by type. An asterisk marks an adjusted p-value of at most alpha by the null that
        decides, a grey cross stands where a bar is undefined. No interval: the best of many genes has none.

    Raises
    ------
    DataError
        If a type was not evaluated.
    InvalidSpecError
        If the palette is unknown, or lacks a type.
    """
    colours = type_colours(evaluation.cell_types, palette)
    chosen = chosen_types(evaluation, cell_types)
    rows = [evaluation.type_index(name) for name in chosen]
    ax = new_axes(barplot_size(evaluation.n_heads, len(chosen))) if ax is None else ax
    heights = _max_over_genes(evaluation)
    alpha = evaluation.spec.permutation.alpha
    tested = np.isfinite(evaluation.adjusted)
    width = _GROUP_WIDTH / max(1, len(chosen))
    heads = np.arange(evaluation.n_heads)
    shown = heights[:, rows]
    finite = shown[np.isfinite(shown)]
    low, high = min(0.0, finite.min(initial=0.0)), max(0.0, finite.max(initial=0.0))
    span = (high - low) or 1.0

    for head in heads[1::2]:
        ax.axvspan(head - 0.5, head + 0.5, color="#f4f4f4", zorder=0, linewidth=0)
    marks: list[tuple[float, float]] = []
    gaps: list[tuple[float, float]] = []
    for position, name in enumerate(chosen):
        index = evaluation.type_index(name)
        x = heads + (position - (len(chosen) - 1) / 2) * width
        defined = np.isfinite(heights[:, index])
        # bars without a test are pale: in a type of a few cells they can reach any height
        for shown_as, opacity in ((defined & tested[:, index], 1.0), (defined & ~tested[:, index], 0.2)):
            ax.bar(
                x[shown_as],
                heights[shown_as, index],
                width=width * 0.92,
                color=colours[name],
                linewidth=0,
                zorder=2,
                alpha=opacity,
            )
        significant = defined & (evaluation.adjusted[:, index] <= alpha)
        marks += [(x[h], max(0.0, heights[h, index]) + 0.025 * span) for h in np.flatnonzero(significant)]
        gaps += [(x[h], 0.015 * span) for h in np.flatnonzero(~defined)]
    size = min(6.0, 72 * ax.get_window_extent().width / ax.figure.dpi / max(1, shown.size) * 0.8)
    add_marks(ax, marks, marker=_ASTERISK, size=max(size, 4.0), color=INK, gid="significant")
    add_marks(ax, gaps, marker="x", size=max(size * 0.7, 3.0), color="#999999", gid="undefined")

    ax.axhline(0, color=INK, linewidth=0.8, zorder=3)
    ax.set_xlim(-0.5, evaluation.n_heads - 0.5)
    ax.set_ylim(low - (0.04 * span if low < 0 else 0), (high or 1.0) + 0.07 * span)
    ax.set_xticks(heads, [str(head) for head in heads])
    ax.tick_params(axis="x", length=0)
    ax.set_xlabel("Head")
    ax.set_ylabel("Explained variance of the best gene")
    # y, here and below: else matplotlib measures all labels at each drawing to find the title's place
    ax.set_title("Best gene of each head kept alone, by receiver cell type", loc="left", fontsize=12, y=1.0)
    ax.grid(axis="y", color="#e3e3e3", linewidth=0.6, zorder=0)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    _add_type_legend(ax, chosen, colours)
    empty = [name for name in chosen if not np.isfinite(heights[:, evaluation.type_index(name)]).any()]
    others = len(gaps) - evaluation.n_heads * len(empty)
    said = [drawn_label(name) for name in empty] + ([f"{others} single heads"] if others else [])
    untested = bool((np.isfinite(shown) & ~tested[:, rows]).any())
    few = "too few cells" if evaluation.spatial is None else f"by the {evaluation.decided_by} null: too few cells"
    faint = f"pale: no test ({few}, or a head that predicts the same for all)" if untested else ""
    add_caption(
        ax,
        f"{significance_note(evaluation)}; the test is of the head over all genes",
        faint,
        f"× undefined, no bar: {', '.join(said)}" if said else "",
    )
    return ax


def plot_heatmap(evaluation: HeadEvaluation, cell_type: str, *, ax: Axes | None = None, n_top_genes: int = 20) -> Axes:
    """Show which genes of one receiver type each head, kept alone, explains.

    Parameters
    ----------
    evaluation
        What to show.
    cell_type
        The receiver type.
    ax
        Axes to draw into; ``None`` makes a new pyplot figure, which notebooks show.
    n_top_genes
        Number of genes to show: those with the largest mean explained variance over heads, the largest on top.

    Returns
    -------
    Axes
        Genes x heads, white at 0; an asterisk at a head marks an adjusted p-value of at most alpha by the null that
        decides. A type without any defined value gets axes with the reason in words.

    Raises
    ------
    DataError
        If the type was not evaluated.
    InvalidSpecError
        If ``n_top_genes`` is no whole number of at least 1.

    Notes
    -----
    Values below -1 have the colour of -1: explained variance has no lower bound, and one bad gene would else take
    all the contrast.
    """
    index = evaluation.type_index(cell_type)
    check_n_top_genes(n_top_genes)
    values = evaluation.expl_var_gene[:, index].T
    top = top_genes(values, n_top_genes)
    ax = new_axes(heatmap_size(evaluation.n_heads, len(top))) if ax is None else ax
    title = f"{drawn_label(cell_type)} ({counted(evaluation.n_cells[index], 'cell')})"
    ax.set_title(literal(title), loc="left", fontsize=12, y=1.0)
    if not len(top):
        ax.set_axis_off()
        reason = textwrap.fill(f"Explained variance is undefined: {type_reasons(evaluation, cell_type)}", 46)
        ax.text(0.5, 0.5, literal(reason), ha="center", va="center", color=MUTED, transform=ax.transAxes)
        return ax
    shown = values[top]
    mesh = draw_heatmap(ax, shown, limit=colour_limit(shown))
    label = "Explained variance (one head kept)"
    add_colorbar(ax, mesh, label, shown=shown, fraction=0.06, pad=0.03, aspect=30)
    significant = evaluation.adjusted[:, index] <= evaluation.spec.permutation.alpha
    ax.set_xticks(
        np.arange(evaluation.n_heads) + 0.5, [f"{h}*" if yes else str(h) for h, yes in enumerate(significant)]
    )
    ax.set_yticks(np.arange(len(top)) + 0.5, [literal(drawn_label(evaluation.genes[g])) for g in top], fontsize=8)
    ax.tick_params(length=0)
    ax.set_ylim(len(top), 0)
    ax.set_xlabel("Head")
    ax.set_ylabel(f"Top {len(top)} genes by mean over heads" if len(top) < len(evaluation.genes) else "Gene")
    ax.spines[:].set_visible(False)
    add_caption(ax, significance_note(evaluation), "Grey: undefined" if np.isnan(shown).any() else "")
    return ax


def barplot_size(n_heads: int, n_types: int) -> tuple[float, float]:
    """Return width and height in inches of :func:`plot_barplot`."""
    return figure_size(0.085 * n_heads * n_types + 2.0, 5.0, least=(7.0, 5.0))


def heatmap_size(n_heads: int, n_genes: int) -> tuple[float, float]:
    """Return width and height in inches of :func:`plot_heatmap`."""
    return figure_size(0.5 * n_heads + 2.6, 0.22 * n_genes + 1.4, least=(5.0, 3.2))


def _max_over_genes(evaluation: HeadEvaluation) -> Float64[np.ndarray, "heads types"]:
    # fmax passes over NaN, and gives NaN without a warning where all genes are
    best: np.ndarray = np.fmax.reduce(evaluation.expl_var_gene, axis=2, initial=np.nan)
    return best


def top_genes(values: Float64[np.ndarray, "genes heads"], n_top: int) -> Int64[np.ndarray, " shown"]:
    """Return the positions of the genes with the largest mean over the heads that are defined, largest first."""
    defined = ~np.isnan(values)
    known = np.flatnonzero(defined.any(axis=1))
    means = np.where(defined, values, 0.0)[known].sum(axis=1) / defined[known].sum(axis=1)
    return known[np.argsort(-means, kind="stable")][:n_top]


def check_n_top_genes(n_top_genes: int) -> None:
    """Refuse a number of genes that is not a positive whole number."""
    if isinstance(n_top_genes, bool) or not isinstance(n_top_genes, int) or n_top_genes < 1:
        raise InvalidSpecError(
            value=f"n_top_genes={n_top_genes!r}",
            rule="it must be a whole number of at least 1",
            fix="set n_top_genes=20",
        )


def significance_note(evaluation: HeadEvaluation) -> str:
    """Return what a mark of significance means: the level, the null that decides, and how its assumption fails."""
    null = evaluation.decided_by
    level = f"* adjusted p ≤ {evaluation.spec.permutation.alpha:g}{in_sample_text(evaluation)}"
    return f"{level}; {VALIDITY_SHORT.get(null, null + ' null')}"


def _add_type_legend(ax: Axes, names: Sequence[str], colours: Mapping[str, Any]) -> None:
    # the texts are set afterwards because a legend drops labels that begin with an underscore
    handles = [Patch(color=colours[name], linewidth=0, label=str(number)) for number, name in enumerate(names)]
    look = {"handlelength": 1.0, "handleheight": 1.0, "labelspacing": 0.35, "title_fontsize": 9}
    legend = add_legend(ax, handles, title="Receiver cell type", alignment="left", ncols=-(-len(names) // 24), **look)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_text(literal(drawn_label(name)))


_HEAD, _TRIVIAL, _UNTESTED = "#1f5fa8", "#d95f02", "#bbbbbb"
_EFFECT_STYLES = {
    "whole_model": PointStyle("all heads (whole model)", INK, INK, marker="D", size=3.4),
    "significant": PointStyle("head, significant", _HEAD, _HEAD),
    "not_significant": PointStyle("head, not significant", "white", _HEAD),
    "no_test": PointStyle("head, no test", _UNTESTED, _UNTESTED),
}
_ROW, _PANEL, _LABELS, _TITLE, _GAP_X, _GAP_Y = 0.15, 1.75, 0.28, 0.25, 0.2, 0.46
"""Inches, and units of the axes: height of a row, width of a panel, room for its labels and title, and gaps."""
_MOST_COLUMNS = 5
_LONGEST_TITLE = 26
_LOWEST = -0.5
"""Smaller effects are drawn here: explained variance has no lower bound, and one bad head would take all of it."""


def effects_size(evaluation: HeadEvaluation, n_types: int) -> tuple[float, float]:
    """Return width and height in inches of :func:`plot_effects`."""
    panels = _effect_panels(evaluation, n_types)
    width = panels.n_columns * panels.step[0] + 2.0
    height = math.ceil(n_types / panels.n_columns) * panels.step[1] + 0.7
    return figure_size(width, height, least=(6.0, 2.2))


def _effect_panels(evaluation: HeadEvaluation, n_types: int) -> Panels:
    step = _LABELS + _PANEL + _GAP_X, (evaluation.n_heads + 1) * _ROW + _GAP_Y
    n_columns = max(1, min(_MOST_COLUMNS, math.ceil(math.sqrt(1.3 * n_types))))
    return Panels(n_panels=n_types, n_columns=n_columns, step=step, margin=(_LABELS, _TITLE))


def has_effects(evaluation: HeadEvaluation, cell_types: Sequence[str] | None = None) -> bool:
    """Return whether a head has a defined explained variance in one of the types."""
    rows = [evaluation.type_index(name) for name in chosen_types(evaluation, cell_types)]
    return bool(np.isfinite(evaluation.expl_var[:, rows]).any())


def plot_effects(
    evaluation: HeadEvaluation, *, ax: Axes | None = None, cell_types: Sequence[str] | None = None
) -> Axes:
    """Draw what each head explains of each receiver type, with its interval, beside predictors without heads."""
    if not has_effects(evaluation, cell_types):
        raise DataError(
            value="no head has an explained variance",
            rule="effects are drawn where they are defined",
            fix="choose types with more cells; heads() gives the reasons",
        )
    chosen = chosen_types(evaluation, cell_types)
    rows = [evaluation.type_index(name) for name in chosen]
    ax = new_axes(effects_size(evaluation, len(chosen))) if ax is None else ax
    points, low, high = _estimates(evaluation, rows)
    trivial = _best_trivial(evaluation, rows)
    scale = _scale(points, low, high, trivial)
    panels = _effect_panels(evaluation, len(chosen))
    height = points.shape[1] * _ROW
    labels = ["all", *map(str, range(evaluation.n_heads))]
    estimates: list[Estimate] = []
    beyond: dict[str, list[tuple[float, float]]] = {"<": [], ">": []}
    ticks: list[tuple[float, float, float]] = []
    for position, (left, top) in enumerate(panels.corners()):
        x_of = partial(_place_on_scale, left=left, scale=scale)
        y = top + (np.arange(len(labels)) + 0.5) * _ROW
        is_lowest = position + panels.n_columns >= len(chosen)
        _draw_panel(ax, left, top, height, scale=scale, name=chosen[position], with_ticks=is_lowest)
        kinds = ["whole_model", *_kinds(evaluation.adjusted[:, rows[position]], evaluation.spec.permutation.alpha)]
        for row, (label, kind) in enumerate(zip(labels, kinds, strict=True)):
            ax.text(left - 0.05, y[row], label, ha="right", va="center", fontsize=6.5, color=MUTED)
            value, lowest, highest = points[position, row], low[position, row], high[position, row]
            estimates.append(Estimate(kind, y[row], x_of(value), x_of(lowest), x_of(highest)))
            if np.fmin(value, lowest) < scale[0]:
                beyond["<"].append((left, y[row]))
            if np.fmax(value, highest) > scale[1]:
                beyond[">"].append((left + _PANEL, y[row]))
        if not np.isfinite(points[position]).any():
            middle = left + _PANEL / 2, top + height / 2
            ax.text(*middle, "undefined", ha="center", va="center", fontsize=7.5, color=MUTED, gid="undefined")
        if np.isfinite(trivial[position]):
            ticks.append((x_of(trivial[position]), top, top + height))
    handles = draw_estimates(ax, estimates, _EFFECT_STYLES)
    for marker, places in beyond.items():
        add_marks(ax, places, marker=marker, size=3.0, color=MUTED, gid="beyond")
    if ticks:
        x, start, stop = zip(*ticks, strict=True)
        ax.vlines(x, start, stop, color=_TRIVIAL, linewidth=1.3, zorder=1.5).set_gid("trivial")
        tick = Line2D([], [], linestyle="none", marker="|", markersize=9, color=_TRIVIAL, markeredgewidth=1.3)
        tick.set_label("best without heads")
        handles.append(tick)
    panels.set_limits(ax)
    ax.set_xlabel("Explained variance over all genes", fontsize=9)
    ax.set_title("What each head explains alone, by receiver cell type", loc="left", fontsize=12, y=1.0, pad=4)
    add_legend(ax, handles, handlelength=1.0, labelspacing=0.5)
    bounds = evaluation.intervals
    add_caption(
        ax,
        ""
        if bounds is None
        else f"Lines: {100 * bounds.confidence:g} % intervals, from {bounds.n_resamples:,} resamples of tissue tiles "
        f"of width {rounded(bounds.tile_width)}; no line where a type lies in too few tiles.",
        "Rows: all heads together, then each head alone. Filled: significant. "
        f"{significance_note(evaluation).removeprefix('* ').capitalize()}.",
        "Arrows: beyond the scale." if any(beyond.values()) else "",
    )
    return ax


def _kinds(adjusted: Float64[np.ndarray, " heads"], alpha: float) -> list[str]:
    return ["no_test" if np.isnan(p) else "significant" if p <= alpha else "not_significant" for p in adjusted]


def _place_on_scale(value: float, *, left: float, scale: tuple[float, float]) -> float:
    """Return where an effect stands in a panel; one beyond the scale stands at its end."""
    return left + (float(np.clip(value, *scale)) - scale[0]) * _PANEL / (scale[1] - scale[0])


def _estimates(
    evaluation: HeadEvaluation, rows: list[int]
) -> tuple[
    Float64[np.ndarray, "types rows"],
    Float64[np.ndarray, "types rows"],
    Float64[np.ndarray, "types rows"],
]:
    """Return effects and bounds with a row for the whole model above those of the heads."""
    bounds = evaluation.intervals
    points = np.vstack([evaluation.expl_var_full, evaluation.expl_var]).T[rows]
    if bounds is None:
        return points, np.full_like(points, np.nan), np.full_like(points, np.nan)
    return points, np.vstack([bounds.full_low, bounds.low]).T[rows], np.vstack([bounds.full_high, bounds.high]).T[rows]


def _best_trivial(evaluation: HeadEvaluation, rows: list[int]) -> Float64[np.ndarray, " types"]:
    found = evaluation.trivial
    if found is None:
        return np.full(len(rows), np.nan)
    # fmax passes over NaN, and gives NaN without a warning where all are
    best: np.ndarray = np.fmax.reduce(found.expl_var[:, rows], axis=0, initial=np.nan)
    return best


def _scale(*values: Float64[np.ndarray, ...]) -> tuple[float, float]:
    """Return the smallest and the largest effect that all panels show."""
    finite = np.concatenate([one[np.isfinite(one)] for one in values])
    stop = min(1.0, max(float(finite.max()), 0.02))
    start = max(_LOWEST, min(0.0, float(finite.min())))
    margin = 0.03 * (stop - start)
    return start - margin, stop + margin


def _draw_panel(
    ax: Axes, left: float, top: float, height: float, *, scale: tuple[float, float], name: str, with_ticks: bool
) -> None:
    ax.fill_between([left, left + _PANEL], top, top + height, color="#f6f6f6", linewidth=0, zorder=0)
    ax.text(left, top - 0.04, literal(drawn_label(name, longest=_LONGEST_TITLE)), va="bottom", fontsize=8, color=INK)
    for tick in MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]).tick_values(*scale):
        if scale[0] <= tick <= scale[1]:
            x = _place_on_scale(tick, left=left, scale=scale)
            is_zero = abs(tick) < 1e-9
            colour = "#888888" if is_zero else "#dddddd"
            ax.vlines(x, top, top + height, color=colour, linewidth=0.9 if is_zero else 0.6, zorder=1)
            if with_ticks:
                shown = f"{0.0 if is_zero else tick:g}"
                ax.text(x, top + height + 0.04, shown, ha="center", va="top", fontsize=7, color=MUTED)
