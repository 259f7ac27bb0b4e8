"""Forest plot: what each head explains, with its interval, beside what needs no head."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from amici_eval.common.errors import DataError
from amici_eval.report.figures.drawing import INK, MUTED, add_caption, chosen_types, drawn_label, literal, opened
from amici_eval.report.figures.head_figures import significance_note
from amici_eval.report.sentences import rounded

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from jaxtyping import Bool, Float64
    from matplotlib.axes import Axes

    from amici_eval.results.evaluation import HeadEvaluation

__all__ = ["EFFECTS_STEM", "effects_size", "has_effects", "plot_effects"]

EFFECTS_STEM = "effects"

_HEAD, _WHOLE, _TRIVIAL, _UNTESTED = "#1f5fa8", "#222222", "#d95f02", "#bbbbbb"
_ROW, _PANEL, _LABELS, _GAP_X, _GAP_Y = 0.15, 1.75, 0.28, 0.2, 0.46
_MOST_COLUMNS = 5
_LONGEST_TITLE = 26
_LOWEST = -0.5
"""Effects below have the place of this: explained variance has no lower bound, and one bad head would take all."""


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
    """Show what each head explains of each receiver type, how sure that is, and what explains as much without heads."""
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
    """What is drawn in all panels, one collection for each kind: a page holds hundreds of rows."""

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
        """Sort the rows of a panel, the whole model first, by how they are drawn."""
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
        """Note where something lies beyond the scale."""
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
