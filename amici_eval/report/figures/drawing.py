"""Parts that figures share: colours of types, legend, marks, captions, and labels that are drawn literally."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.colors import is_color_like, to_rgb
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from amici_eval.common.errors import InvalidSpecError
from amici_eval.common.text import literal, printable

if TYPE_CHECKING:
    from collections.abc import Iterable

    from jaxtyping import Float64
    from matplotlib.axes import Axes

    from amici_eval.results.evaluation import HeadEvaluation

    Color = str | tuple[float, float, float]
    Palette = str | Sequence[Color] | Mapping[str, Color]

INK, MUTED, UNDEFINED = "#222222", "#666666", "#d9d9d9"
_LONGEST_LABEL = 48


def type_colours(types: Sequence[str], palette: Palette | None) -> dict[str, tuple[float, float, float]]:
    """Return a colour for each type, all different unless a mapping says otherwise."""
    import seaborn  # here because it takes a second to load

    if isinstance(palette, Mapping):
        missing = [name for name in types if name not in palette]
        if missing:
            raise InvalidSpecError(
                value=f"palette without {', '.join(map(repr, missing))}",
                rule="a mapping needs a colour for each of the evaluation's types",
                fix="add them or name a palette, for example 'tab10'",
            )
        colours: Sequence[Any] = [palette[name] for name in types]
    elif palette is None or isinstance(palette, str):
        try:
            colours = seaborn.color_palette(palette or "tab10", len(types))
        except ValueError:
            raise InvalidSpecError(
                value=f"palette={palette!r}",
                rule="it must be the name of a seaborn or matplotlib palette",
                fix="set palette='tab10', 'colorblind' or 'husl'",
            ) from None
    else:
        colours = list(palette)
    wrong = [colour for colour in colours if not is_color_like(colour)]
    if wrong:
        raise InvalidSpecError(
            value=f"colour {wrong[0]!r} in palette", rule="matplotlib must know it", fix="use a name or '#rrggbb'"
        )
    if not isinstance(palette, Mapping) and len({to_rgb(colour) for colour in colours}) < len(types):
        # neighbours in the legend stay apart: tab20's dark colours before its light ones, every third hue of husl
        larger = seaborn.color_palette("tab20", 20) if len(types) <= 20 else seaborn.husl_palette(len(types), s=0.8)
        step = 2 if len(types) <= 20 else 3
        colours = [colour for start in range(step) for colour in larger[start::step]]
    return {name: to_rgb(colour) for name, colour in zip(types, colours, strict=False)}


def add_legend(ax: Axes, names: Sequence[str], colours: Mapping[str, Any]) -> None:
    """Name the types outside the axes, to the right."""
    handles = [Patch(color=colours[name], linewidth=0) for name in names]
    columns = max(1, -(-len(names) // 24))
    # the texts are set afterwards because a legend drops labels that begin with an underscore
    legend = ax.legend(
        handles,
        [str(number) for number in range(len(names))],
        title="Receiver cell type",
        alignment="left",
        loc="upper left",
        bbox_to_anchor=(1.0, 1.02),
        frameon=False,
        fontsize=8,
        title_fontsize=9,
        ncols=columns,
        handlelength=1.0,
        handleheight=1.0,
        labelspacing=0.35,
    )
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_text(literal(drawn_label(name)))


def add_marks(ax: Axes, points: list[tuple[float, float]], *, marker: Any, size: float, color: str, gid: str) -> None:
    """Put a mark at each of the points; ``gid`` names them in an SVG."""
    if points:
        x, y = zip(*points, strict=True)
        ax.scatter(x, y, marker=marker, s=size**2, color=color, linewidths=0.7, zorder=4, gid=gid)


def add_caption(ax: Axes, *sentences: str) -> None:
    """Write sentences in small print below the axes, each on its own line."""
    axes_width = ax.get_window_extent().width / ax.figure.dpi
    lines = [line for text in sentences if text for line in textwrap.wrap(text, max(40, int(axes_width * 18.5)))]
    # placed relative to the axis label
    ax.annotate(
        literal("\n".join(lines)),
        xy=(0, 0),
        xycoords=("axes fraction", ax.xaxis.label),
        xytext=(0, -6),
        textcoords="offset points",
        va="top",
        fontsize=8,
        color=MUTED,
        annotation_clip=False,
    )


def drawn_label(name: str, *, longest: int = _LONGEST_LABEL) -> str:
    """Return a label without control characters, cut if it would push the drawing aside."""
    return printable(name, longest=longest)


def new_axes(size: tuple[float, float]) -> Axes:
    """Return the axes of a new pyplot figure of a size in inches."""
    # pyplot is imported only here: its figures are shown by notebooks and closed by the caller
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=size, layout="constrained")[1]


@dataclass(frozen=True, kw_only=True, eq=False)
class Canvas:
    """Axes to draw into, the types in sorted order, and their positions in the evaluation."""

    ax: Axes
    names: tuple[str, ...]
    rows: list[int]


def opened(
    evaluation: HeadEvaluation,
    *,
    ax: Axes | None,
    cell_types: Sequence[str] | None,
    size: Callable[[tuple[str, ...]], tuple[float, float]],
) -> Canvas:
    """Return the axes to draw into, new ones of the ``size`` that the types need if none is given, and the types."""
    names = chosen_types(evaluation, cell_types)
    return Canvas(
        ax=ax if ax is not None else new_axes(size(names)),
        names=names,
        rows=[evaluation.type_index(name) for name in names],
    )


def chosen_types(evaluation: HeadEvaluation, cell_types: Sequence[str] | None) -> tuple[str, ...]:
    """Return the types to show, in sorted order."""
    if cell_types is None:
        return evaluation.cell_types
    wanted = {cell_types} if isinstance(cell_types, str) else set(cell_types)
    if not wanted:
        raise InvalidSpecError(
            value="cell_types=[]", rule="a figure needs at least one type", fix="leave cell_types out"
        )
    return tuple(evaluation.cell_types[i] for i in sorted(evaluation.type_index(name) for name in wanted))


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
    """A difference to draw: name, value, interval (NaN where unknown), verdict in a word and marker of matplotlib."""

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
    """Return the positions of the ``MOST_ROWS`` largest absolute values, largest first, without undefined ones."""
    size = np.nan_to_num(np.abs(values), nan=-1.0)
    order = np.argsort(-size, axis=None, kind="stable")[:MOST_ROWS]
    places = [tuple(int(at) for at in np.unravel_index(place, size.shape)) for place in order]
    return [place for place in places if size[place] >= 0.0]


def forest_size(n_rows: int) -> tuple[float, float]:
    """Return width and height in inches."""
    return 3.2 + _WIDTH, 1.5 + _ROW * max(n_rows, 1)
