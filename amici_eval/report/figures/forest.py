"""A forest plot: differences with their intervals, one below the other, coloured by verdict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.lines import Line2D

from amici_eval.report.figures.drawing import MUTED, literal

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from jaxtyping import Float64
    from matplotlib.axes import Axes

__all__ = ["MOST_ROWS", "ForestRow", "draw_forest", "forest_size", "largest"]

MOST_ROWS = 60
_COLOURS = {
    "better": "#1a7f37",
    "more": "#1a7f37",
    "worse": "#b42318",
    "less": "#b42318",
    "same": "#4a5568",
    "undecided": "#a8b0bb",
}
_ROW, _WIDTH = 0.24, 3.2


@dataclass(frozen=True, kw_only=True)
class ForestRow:
    """A difference.

    Parameters
    ----------
    name
        What differs, ready to be drawn.
    value, low, high
        The difference and its interval; NaN for ends that are not known.
    verdict
        In a word.
    marker
        Of matplotlib.
    """

    name: str
    value: float
    low: float
    high: float
    verdict: str
    marker: str = "o"


def draw_forest(rows: Sequence[ForestRow], ax: Axes, *, margin: float, label: str, verdicts: Iterable[str]) -> None:
    """Draw rows from the top, with a legend of the verdicts that occur."""
    ax.axvspan(-margin, margin, color="#eef1f5", linewidth=0, zorder=0, gid="margin")
    ax.axvline(0.0, color=MUTED, linewidth=0.8, zorder=1)
    for height, row in enumerate(rows):
        colour = _COLOURS[row.verdict]
        if np.isfinite(row.low):
            ax.hlines(height, row.low, row.high, color=colour, linewidth=1.2, zorder=2)
        ax.scatter([row.value], [height], marker=row.marker, s=22, color=colour, zorder=3, linewidths=0)
    ax.set_yticks(range(len(rows)), [literal(row.name) for row in rows], fontsize=7)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_xlabel(label, fontsize=9)
    there = set(verdicts)
    handles = [
        Line2D([], [], linestyle="none", marker="o", color=colour, label=verdict)
        for verdict, colour in _COLOURS.items()
        if verdict in there
    ]
    ax.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8)


def largest(values: Float64[np.ndarray, ...]) -> list[tuple[int, ...]]:
    """Return the places of the largest values, whatever their sign, the largest first; none that are undefined."""
    size = np.nan_to_num(np.abs(values), nan=-1.0)
    order = np.argsort(-size, axis=None, kind="stable")[:MOST_ROWS]
    places = [tuple(int(at) for at in np.unravel_index(place, size.shape)) for place in order]
    return [place for place in places if size[place] >= 0.0]


def forest_size(n_rows: int) -> tuple[float, float]:
    """Return width and height in inches."""
    return 3.2 + _WIDTH, 1.5 + _ROW * max(n_rows, 1)
