"""Parts that figures share: axes, panels, heat maps, estimates with intervals, colours of types, labels, and files."""

from __future__ import annotations

import math
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.colors import is_color_like, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from amici_eval.common.errors import InvalidSpecError
from amici_eval.common.text import literal, printable
from amici_eval.report.tables import made_folder, writing

if TYPE_CHECKING:
    from pathlib import Path

    from jaxtyping import Float64
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.legend import Legend

    from amici_eval.results.evaluation import HeadEvaluation

    Color = str | tuple[float, float, float]
    Palette = str | Sequence[Color] | Mapping[str, Color]

INK, MUTED, UNDEFINED = "#222222", "#666666", "#d9d9d9"
FORMATS = ("png", "svg")

_LONGEST_LABEL = 48
_WIDEST, _TALLEST = 60.0, 80.0
_DPI, _MARGIN_INCHES = 150, 0.12
# text is not drawn as paths, and the same evaluation gives the same bytes
_FILE_SETTINGS = {"svg.fonttype": "none", "svg.hashsalt": "amici_eval"}


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


def new_axes(size: tuple[float, float]) -> Axes:
    """Return the axes of a new pyplot figure of a size in inches."""
    # pyplot is imported only here: its figures are shown by notebooks and closed by the caller
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=size, layout="constrained")[1]


def figure_size(width: float, height: float, *, least: tuple[float, float]) -> tuple[float, float]:
    """Return width and height in inches, no smaller than needed for titles and no larger than a page can show."""
    return float(np.clip(width, least[0], _WIDEST)), float(np.clip(height, least[1], _TALLEST))


def without_frame(ax: Axes) -> None:
    """Remove ticks and frame."""
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)


@dataclass(frozen=True, kw_only=True)
class Panels:
    """Panels of equal size within one axes, row by row, whose y axis points down.

    ``step`` leads from one panel to the next, ``margin`` lies to the left of each panel and above it; both are (x, y)
    in units of the axes. ``gap`` is the part of a step that the last column does not need.
    """

    n_panels: int
    n_columns: int
    step: tuple[float, float]
    margin: tuple[float, float]
    gap: float = 0.0

    def corners(self) -> Iterator[tuple[float, float]]:
        """Yield the upper left corner of each panel."""
        for number in range(self.n_panels):
            row, column = divmod(number, self.n_columns)
            yield column * self.step[0] + self.margin[0], row * self.step[1] + self.margin[1]

    def set_limits(self, ax: Axes) -> None:
        """Make the axes as large as the panels, without ticks and frame."""
        ax.set_xlim(0, min(self.n_columns, self.n_panels) * self.step[0] - self.gap)
        ax.set_ylim(math.ceil(self.n_panels / self.n_columns) * self.step[1], 0)
        without_frame(ax)


def colour_limit(values: Float64[np.ndarray, ...], *, share: float = 1.0) -> float:
    """Return the effect of the deepest colour: the largest absolute value or its ``share`` quantile, at most 1.

    Explained variance has no lower bound, and one bad value would else take all the contrast. 0 without any value.
    """
    sizes = np.abs(values[np.isfinite(values)])
    return min(1.0, float(np.quantile(sizes, share, method="higher"))) if sizes.size else 0.0


def draw_heatmap(
    ax: Axes,
    values: Float64[np.ndarray, "rows columns"],
    *,
    limit: float,
    corner: tuple[float, float] = (0.0, 0.0),
    side: float = 1.0,
    gid: str | None = None,
) -> QuadMesh:
    """Draw cells right and below of a corner: white at 0, red above, blue below, grey where undefined."""
    mesh = ax.pcolormesh(
        corner[0] + side * np.arange(values.shape[1] + 1),
        corner[1] + side * np.arange(values.shape[0] + 1),
        values,
        cmap=matplotlib.colormaps["RdBu_r"].with_extremes(bad=UNDEFINED),
        vmin=-(limit or 1.0),
        vmax=limit or 1.0,
        edgecolors="white",
        linewidth=0.6,
    )
    mesh.set_gid(gid)
    return mesh


def write_numbers(
    ax: Axes,
    values: Float64[np.ndarray, "rows columns"],
    *,
    limit: float,
    corner: tuple[float, float] = (0.0, 0.0),
    with_diagonal: bool = True,
) -> None:
    """Write the defined values into the cells of a heat map."""
    for row, column in np.argwhere(np.isfinite(values)):
        if with_diagonal or row != column:
            value = values[row, column]
            place = corner[0] + column + 0.5, corner[1] + row + 0.5
            ax.text(*place, two_digits(value), ha="center", va="center", fontsize=7, color=readable_on(value, limit))


def two_digits(value: float) -> str:
    """Return a number as text; a dash for an undefined one."""
    # 0.0 is added because -0.00 would be read as below 0
    return "–" if np.isnan(value) else f"{round(float(value), 2) + 0.0:.2f}"


def readable_on(value: float, limit: float) -> str:
    """Return the colour of text that can be read on the colour of a value."""
    return "white" if abs(value) > 0.65 * limit else INK


def add_colorbar(ax: Axes, mesh: QuadMesh, label: str, *, shown: Float64[np.ndarray, ...], **layout: Any) -> None:
    """Add the scale of a heat map, with arrows where shown values lie beyond it."""
    low, high = mesh.get_clim()
    is_below, is_above = np.nanmin(shown, initial=0.0) < low, np.nanmax(shown, initial=0.0) > high
    beyond = ("both" if is_above else "min") if is_below else ("max" if is_above else "neither")
    bar = ax.figure.colorbar(mesh, ax=ax, extend=beyond, **layout)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_visible(False)


class PointStyle(NamedTuple):
    """How estimates of a kind look: name in the legend, colours of the point and of its interval, marker and size."""

    label: str
    face: str
    edge: str
    line: str = MUTED
    marker: str = "o"
    size: float = 4.0


class Estimate(NamedTuple):
    """An estimate with its interval, as places in the axes; NaN where unknown."""

    kind: str
    y: float
    x: float
    low: float
    high: float


def draw_estimates(ax: Axes, estimates: Sequence[Estimate], styles: Mapping[str, PointStyle]) -> list[Line2D]:
    """Draw estimates as points on their intervals and return what a legend shows of the kinds that occur.

    Those of a kind are one collection (``gid`` is the kind), because a figure may hold hundreds.
    """
    handles: dict[str, Line2D] = {}
    for kind, style in styles.items():
        y, x, low, high = np.array([one[1:] for one in estimates if one.kind == kind]).reshape(-1, 4).T
        known = np.isfinite(low) & np.isfinite(high)
        if known.any():
            lines = ax.hlines(y[known], low[known], high[known], color=style.line, linewidth=1.0, zorder=2)
            lines.set_gid("intervals")
        there = np.isfinite(x)
        if there.any():
            look: Any = {"facecolors": style.face, "edgecolors": style.edge, "linewidths": 0.9}
            ax.scatter(x[there], y[there], marker=style.marker, s=style.size**2, zorder=4, gid=kind, **look)
            handle = Line2D([], [], linestyle="none", marker=style.marker, markersize=style.size, label=style.label)
            handle.set(markerfacecolor=style.face, markeredgecolor=style.edge)
            handles.setdefault(style.label, handle)
    return list(handles.values())


def add_legend(ax: Axes, handles: Sequence[Any], **options: Any) -> Legend:
    """Put a legend outside the axes, to the right."""
    place = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)}
    return ax.legend(handles=handles, frameon=False, **{"fontsize": 8, **place, **options})


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


class Drawing(NamedTuple):
    """A figure to be saved: file name without ending, size in inches, and the function that draws into ``ax``."""

    stem: str
    size: tuple[float, float]
    draw: Callable[..., object]


def save_drawings(
    drawings: Iterable[Drawing],
    directory: str | Path,
    *,
    formats: Sequence[str] = FORMATS,
    progress: Callable[[int], None] | None = None,
) -> tuple[Path, ...]:
    """Write drawings as files in a folder, each in all formats.

    The style is matplotlib's default whatever the caller has set, so the same values give the same files. No pyplot
    figure is made, and matplotlib's settings are restored.
    """
    unknown = sorted(set(formats) - set(FORMATS))
    if unknown or not formats or isinstance(formats, str):
        raise InvalidSpecError(
            value=f"formats={formats!r}",
            rule=f"it must list some of {', '.join(FORMATS)}",
            fix=f"set formats={FORMATS!r}",
        )
    folder = made_folder(directory)
    written: list[Path] = []
    with matplotlib.rc_context(), warnings.catch_warnings():
        # a label in a script that the font lacks is drawn as boxes in PNG and right in SVG: no reason to warn 40 times
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_FILE_SETTINGS)  # type: ignore[arg-type]
        for drawing in drawings:
            figure = Figure(figsize=drawing.size, dpi=_DPI)
            drawing.draw(ax=figure.add_subplot())
            paths = [folder / f"{drawing.stem}.{kind}" for kind in formats]
            _write(figure, paths)
            written += paths
            if progress is not None:
                progress(1)
    return tuple(written)


def _write(figure: Figure, paths: Sequence[Path]) -> None:
    # what surrounds the labels is measured once for all formats: it costs as much as drawing
    figure.draw_without_rendering()
    box = figure.get_tightbbox().padded(_MARGIN_INCHES)
    for ax in figure.axes:
        for axis in (ax.xaxis, ax.yaxis):
            label = axis.label
            place = label.get_transform().transform(label.get_position())
            axis.set_label_coords(*ax.transAxes.inverted().transform(place))
    for path in paths:
        options: dict[str, Any] = (
            {"metadata": {"Date": None}} if path.suffix == ".svg" else {"pil_kwargs": {"compress_level": 3}}
        )
        with writing(path):
            figure.savefig(path, bbox_inches=box, dpi=_DPI, **options)
