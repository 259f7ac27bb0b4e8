"""Bar plot and heatmaps of explained variance of heads kept alone."""

from __future__ import annotations

import math
import textwrap
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from amici_eval.common.errors import DataError, InvalidSpecError
from amici_eval.common.text import literal, slugify
from amici_eval.report.figures.drawing import (
    INK,
    MUTED,
    UNDEFINED,
    add_caption,
    add_legend,
    add_marks,
    chosen_types,
    drawn_label,
    new_axes,
    opened,
    type_colours,
)
from amici_eval.report.sentences import VALIDITY_SHORT, in_sample_text, rounded, type_reasons

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from jaxtyping import Bool, Float64, Int64
    from matplotlib.axes import Axes

    from amici_eval.report.figures.drawing import Palette
    from amici_eval.results.evaluation import HeadEvaluation

BARPLOT_STEM = "expl_variance_barplot_per_head"

_GROUP_WIDTH = 0.86
_ASTERISK = (6, 2, 0)


def heatmap_stem(evaluation: HeadEvaluation, cell_type: str) -> str:
    """Return the file name, without ending, of a type's heatmap."""
    return f"expl_variance_heatmap_{slugify(cell_type, evaluation.cell_types)}"


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
    canvas = opened(
        evaluation, ax=ax, cell_types=cell_types, size=lambda names: barplot_size(evaluation.n_heads, len(names))
    )
    ax, chosen = canvas.ax, canvas.names
    heights = _max_over_genes(evaluation)
    alpha = evaluation.spec.permutation.alpha
    tested = np.isfinite(evaluation.adjusted)
    width = _GROUP_WIDTH / max(1, len(chosen))
    heads = np.arange(evaluation.n_heads)
    shown = heights[:, canvas.rows]
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
    add_legend(ax, chosen, colours)
    empty = [name for name in chosen if not np.isfinite(heights[:, evaluation.type_index(name)]).any()]
    others = len(gaps) - evaluation.n_heads * len(empty)
    said = [drawn_label(name) for name in empty] + ([f"{others} single heads"] if others else [])
    untested = bool((np.isfinite(shown) & ~tested[:, canvas.rows]).any())
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
    ax = ax if ax is not None else new_axes(heatmap_size(evaluation.n_heads, len(top)))
    title = f"{drawn_label(cell_type)} ({_cells(evaluation.n_cells[index])})"
    ax.set_title(literal(title), loc="left", fontsize=12, y=1.0)
    if not len(top):
        ax.set_axis_off()
        reason = textwrap.fill(f"Explained variance is undefined: {type_reasons(evaluation, cell_type)}", 46)
        ax.text(0.5, 0.5, literal(reason), ha="center", va="center", color=MUTED, transform=ax.transAxes)
        return ax
    shown = values[top]
    limit = min(1.0, float(np.nanmax(np.abs(shown)))) or 1.0
    colours = matplotlib.colormaps["RdBu_r"].with_extremes(bad=UNDEFINED)
    mesh = ax.pcolormesh(shown, cmap=colours, vmin=-limit, vmax=limit, edgecolors="white", linewidth=0.6)
    beyond = "min" if np.nanmin(shown) < -limit else "neither"
    bar = ax.figure.colorbar(mesh, ax=ax, extend=beyond, fraction=0.06, pad=0.03, aspect=30)
    bar.set_label("Explained variance (one head kept)")
    bar.outline.set_visible(False)
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
    return float(np.clip(0.085 * n_heads * n_types + 2.0, 7.0, 40.0)), 5.0


def heatmap_size(n_heads: int, n_genes: int) -> tuple[float, float]:
    """Return width and height in inches of :func:`plot_heatmap`."""
    return float(np.clip(0.5 * n_heads + 2.6, 5.0, 40.0)), float(np.clip(0.22 * n_genes + 1.4, 3.2, 80.0))


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


def _cells(number: int) -> str:
    return f"{number:,} cell{'' if number == 1 else 's'}"


EFFECTS_STEM = "effects"

_HEAD, _WHOLE, _TRIVIAL, _UNTESTED = "#1f5fa8", "#222222", "#d95f02", "#bbbbbb"
_ROW, _PANEL, _LABELS, _GAP_X, _GAP_Y = 0.15, 1.75, 0.28, 0.2, 0.46
_MOST_COLUMNS = 5
_LONGEST_TITLE = 26
_LOWEST = -0.5
"""Smaller effects are drawn here: explained variance has no lower bound, and one bad head would take all of it."""


def effects_size(evaluation: HeadEvaluation, n_types: int) -> tuple[float, float]:
    """Return width and height in inches of :func:`plot_effects`."""
    columns = _grid_columns(n_types)
    width = columns * (_LABELS + _PANEL + _GAP_X) + 2.0
    height = math.ceil(n_types / columns) * _panel_height(evaluation) + 0.7
    return float(np.clip(width, 6.0, 60.0)), float(np.clip(height, 2.2, 80.0))


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
    canvas = opened(evaluation, ax=ax, cell_types=cell_types, size=lambda names: effects_size(evaluation, len(names)))
    ax, chosen, rows = canvas.ax, canvas.names, canvas.rows
    points, low, high = _estimates(evaluation, rows)
    trivial = _best_trivial(evaluation, rows)
    start, stop = _scale(points, low, high, trivial)
    columns = _grid_columns(len(chosen))
    step_x, step_y = _LABELS + _PANEL + _GAP_X, _panel_height(evaluation)
    found = _PanelMarks()
    for position, name in enumerate(chosen):
        row, column = divmod(position, columns)
        left, top = column * step_x + _LABELS, row * step_y + 0.25
        x = left + (np.clip([points[position], low[position], high[position]], start, stop) - start) * (
            _PANEL / (stop - start)
        )
        y = top + (np.arange(len(points[position])) + 0.5) * _ROW
        below = position + columns >= len(chosen)
        _add_panel(ax, left, top, len(y) * _ROW, scale=(start, stop), name=name, with_ticks=below)
        for label, height in zip(("all", *map(str, range(evaluation.n_heads))), y, strict=True):
            ax.text(left - 0.05, height, label, ha="right", va="center", fontsize=6.5, color=MUTED)
        found.add(x, y, evaluation.adjusted[:, rows[position]], alpha=evaluation.spec.permutation.alpha)
        found.add_beyond(points[position], low[position], high[position], y, left=left, scale=(start, stop))
        if not np.isfinite(points[position]).any():
            middle = left + _PANEL / 2, float(y.mean())
            ax.text(*middle, "undefined", ha="center", va="center", fontsize=7.5, color=MUTED, gid="undefined")
        if np.isfinite(trivial[position]):
            tick = left + (np.clip(trivial[position], start, stop) - start) * _PANEL / (stop - start)
            found.ticks.append((tick, top, top + len(y) * _ROW))
    found.draw(ax)
    ax.set_xlim(0, min(columns, len(chosen)) * step_x)
    ax.set_ylim(math.ceil(len(chosen) / columns) * step_y, 0)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)
    ax.set_xlabel("Explained variance over all genes", fontsize=9)
    ax.set_title("What each head explains alone, by receiver cell type", loc="left", fontsize=12, y=1.0, pad=4)
    _add_legend(ax, found, with_trivial=bool(np.isfinite(trivial).any()))
    bounds = evaluation.intervals
    add_caption(
        ax,
        ""
        if bounds is None
        else f"Lines: {100 * bounds.confidence:g} % intervals, from {bounds.n_resamples:,} resamples of tissue tiles "
        f"of width {rounded(bounds.tile_width)}; no line where a type lies in too few tiles.",
        "Rows: all heads together, then each head alone. Filled: significant. "
        f"{significance_note(evaluation).removeprefix('* ').capitalize()}.",
        "Arrows: beyond the scale." if found.beyond else "",
    )
    return ax


class _PanelMarks:
    """Marks of all panels, drawn as one collection of each kind, because a page holds hundreds of rows."""

    def __init__(self) -> None:
        self.points: dict[str, list[tuple[float, float]]] = {
            name: [] for name in ("whole_model", "significant", "not_significant", "no_test")
        }
        self.lines: list[tuple[float, float, float]] = []
        self.ticks: list[tuple[float, float, float]] = []
        self.beyond: dict[str, list[tuple[float, float]]] = {}

    def add(
        self,
        x: Float64[np.ndarray, "estimates rows"],
        y: Float64[np.ndarray, " rows"],
        adjusted: Float64[np.ndarray, " heads"],
        *,
        alpha: float,
    ) -> None:
        """Add the rows of a panel, the whole model first, to the marks of their kinds."""
        for row, height in enumerate(y):
            if np.isfinite(x[1:, row]).all():
                self.lines.append((float(height), float(x[1, row]), float(x[2, row])))
            if np.isfinite(x[0, row]):
                kind = "whole_model"
                if row:
                    p = adjusted[row - 1]
                    kind = "no_test" if np.isnan(p) else "significant" if p <= alpha else "not_significant"
                self.points[kind].append((float(x[0, row]), float(height)))

    def add_beyond(
        self,
        points: Float64[np.ndarray, " rows"],
        low: Float64[np.ndarray, " rows"],
        high: Float64[np.ndarray, " rows"],
        y: Float64[np.ndarray, " rows"],
        *,
        left: float,
        scale: tuple[float, float],
    ) -> None:
        """Add marks for points and interval ends beyond the scale."""
        outside: tuple[tuple[str, float, Bool[np.ndarray, " rows"]], ...] = (
            ("<", left, np.fmin(points, low) < scale[0]),
            (">", left + _PANEL, np.fmax(points, high) > scale[1]),
        )
        for marker, x, rows in outside:
            if rows.any():
                self.beyond.setdefault(marker, []).extend((x, float(y[row])) for row in np.flatnonzero(rows))

    def draw(self, ax: Axes) -> None:
        """Draw lines below points."""
        if self.lines:
            y, low, high = zip(*self.lines, strict=True)
            ax.hlines(y, low, high, color=MUTED, linewidth=0.9, zorder=2).set_gid("intervals")
        if self.ticks:
            x, top, bottom = zip(*self.ticks, strict=True)
            ax.vlines(x, top, bottom, color=_TRIVIAL, linewidth=1.3, zorder=1.5).set_gid("trivial")
        for kind, places in self.points.items():
            if places:
                x, y = zip(*places, strict=True)
                style = _style(kind)
                ax.scatter(
                    x,
                    y,
                    marker=style["marker"],
                    s=style["markersize"] ** 2,
                    facecolors=style["markerfacecolor"],
                    edgecolors=style["markeredgecolor"],
                    linewidths=0.9,
                    zorder=4,
                    gid=kind,
                )
        for marker, places in self.beyond.items():
            x, y = zip(*places, strict=True)
            ax.scatter(x, y, marker=marker, s=9, color=MUTED, linewidths=0, zorder=3, gid="beyond")


def _style(kind: str) -> dict[str, Any]:
    face = {"whole_model": _WHOLE, "significant": _HEAD, "not_significant": "white", "no_test": _UNTESTED}[kind]
    edge = {"whole_model": _WHOLE, "no_test": _UNTESTED}.get(kind, _HEAD)
    return {
        "marker": "D" if kind == "whole_model" else "o",
        "markersize": 3.4 if kind == "whole_model" else 4.0,
        "markerfacecolor": face,
        "markeredgecolor": edge,
    }


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


def _add_panel(
    ax: Axes, left: float, top: float, height: float, *, scale: tuple[float, float], name: str, with_ticks: bool
) -> None:
    start, stop = scale
    inches = _PANEL / (stop - start)
    ax.fill_between([left, left + _PANEL], top, top + height, color="#f6f6f6", linewidth=0, zorder=0)
    ax.text(left, top - 0.04, literal(drawn_label(name, longest=_LONGEST_TITLE)), va="bottom", fontsize=8, color=INK)
    for tick in MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]).tick_values(start, stop):
        if start <= tick <= stop:
            x = left + (tick - start) * inches
            is_zero = abs(tick) < 1e-9
            colour = "#888888" if is_zero else "#dddddd"
            ax.vlines(x, top, top + height, color=colour, linewidth=0.9 if is_zero else 0.6, zorder=1)
            if with_ticks:
                shown = f"{0.0 if is_zero else tick:g}"
                ax.text(x, top + height + 0.04, shown, ha="center", va="top", fontsize=7, color=MUTED)


def _add_legend(ax: Axes, found: _PanelMarks, *, with_trivial: bool) -> None:
    names = {
        "whole_model": "all heads (whole model)",
        "significant": "head, significant",
        "not_significant": "head, not significant",
        "no_test": "head, no test",
    }
    handles = [
        Line2D([], [], linestyle="none", label=names[kind], **_style(kind)) for kind in names if found.points[kind]
    ]
    if with_trivial:
        handles.append(Line2D([], [], linestyle="none", marker="|", markersize=9, color=_TRIVIAL, markeredgewidth=1.3))
        handles[-1].set_label("best without heads")
    ax.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(1.0, 1.0),
        frameon=False,
        fontsize=8,
        handlelength=1.0,
        labelspacing=0.5,
    )


def _panel_height(evaluation: HeadEvaluation) -> float:
    return (evaluation.n_heads + 1) * _ROW + _GAP_Y


def _grid_columns(n_types: int) -> int:
    return max(1, min(_MOST_COLUMNS, math.ceil(math.sqrt(1.3 * n_types))))
