"""Who talks to whom: a heat map of sender and receiver types per head, and the strongest links as a graph."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch

from amici_eval.common.errors import DataError
from amici_eval.common.text import literal
from amici_eval.report.figures.drawing import INK, MUTED, UNDEFINED, add_caption, chosen_types, drawn_label, new_axes
from amici_eval.report.senders_section import sure_links
from amici_eval.report.sentences import effect, in_sample_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float64, Int64
    from matplotlib.axes import Axes

    from amici_eval.results.evaluation import HeadEvaluation
    from amici_eval.results.senders import Senders

SENDERS_STEM, SENDER_GRAPH_STEM = "senders", "sender_graph"
MOST_ARROWS = 30

_LONGEST = 18
_MOST_COLUMNS = 4
_CELL, _LABELS, _HEADING = 0.24, 1.75, 1.6
"""Inches: side of a cell of the heat map, room for the names of receivers, room for those of senders and the head."""
_LARGEST = 1.0
"""Larger losses have this colour: explained variance has no lower bound, and one bad head would take all of it."""


def has_senders(evaluation: HeadEvaluation, cell_types: Sequence[str] | None = None) -> bool:
    """Return whether what a head loses without a sender is defined for one of the receiver types."""
    found = evaluation.senders
    rows = [evaluation.type_index(name) for name in chosen_types(evaluation, cell_types)]
    return found is not None and bool(np.isfinite(found.effect[:, rows]).any())


def senders_size(evaluation: HeadEvaluation, n_types: int) -> tuple[float, float]:
    """Return width and height in inches of :func:`plot_senders`."""
    n_senders = 0 if evaluation.senders is None else len(evaluation.senders.senders)
    columns = min(_MOST_COLUMNS, evaluation.n_heads)
    width = columns * (_LABELS + n_senders * _CELL) + 1.6
    height = math.ceil(evaluation.n_heads / columns) * (_HEADING + n_types * _CELL) + 0.9
    return float(np.clip(width, 6.0, 60.0)), float(np.clip(height, 3.0, 80.0))


def graph_size(evaluation: HeadEvaluation) -> tuple[float, float]:
    """Return width and height in inches of :func:`plot_sender_graph`."""
    n_senders = 0 if evaluation.senders is None else len(evaluation.senders.senders)
    side = float(np.clip(4.5 + 0.15 * n_senders, 5.0, 12.0))
    return side + 2.2, side


def plot_senders(
    evaluation: HeadEvaluation, *, ax: Axes | None = None, cell_types: Sequence[str] | None = None
) -> Axes:
    """Show what each head explains less of each receiver type without each type of sender.

    Parameters
    ----------
    evaluation
        What to show.
    ax
        Axes to draw into; ``None`` makes a new pyplot figure, which notebooks show.
    cell_types
        The receiver types to show; ``None`` shows all. Senders are always all types of the model.

    Returns
    -------
    Axes
        A panel per head, receivers x senders (``gid`` ``head-<h>``), white at 0, all on one scale; a dot (``sure``)
        where the interval of what is lost lies above 0 and the head explains something; grey where it is undefined.

    Raises
    ------
    DataError
        If a type was not evaluated, or senders were not computed for any of them.
    """
    found, names = _found(evaluation, cell_types)
    ax = new_axes(senders_size(evaluation, len(names))) if ax is None else ax
    rows = [evaluation.type_index(name) for name in names]
    shown = found.effect[:, rows]
    limit = min(_LARGEST, float(np.nanmax(np.abs(shown)))) or 1.0
    colours = matplotlib.colormaps["RdBu_r"].with_extremes(bad=UNDEFINED)
    columns, n_senders = min(_MOST_COLUMNS, evaluation.n_heads), len(found.senders)
    step_x, step_y = _LABELS + n_senders * _CELL, _HEADING + len(names) * _CELL
    links = sure_links(evaluation, rows).tolist()
    mesh: Any = None
    for head in range(evaluation.n_heads):
        row, column = divmod(head, columns)
        left, top = column * step_x + _LABELS, row * step_y + _HEADING
        x, y = left + _CELL * np.arange(n_senders + 1), top + _CELL * np.arange(len(names) + 1)
        mesh = ax.pcolormesh(
            x, y, shown[head], cmap=colours, vmin=-limit, vmax=limit, edgecolors="white", linewidth=0.6
        )
        mesh.set_gid(f"head-{head}")
        _add_names(ax, x, y, found.senders, names)
        ax.text(left - _LABELS + 0.1, top - _HEADING + 0.25, f"Head {head}", fontsize=9, color=INK, weight="bold")
        sure = [(rows.index(at), sender) for one, at, sender in links if one == head]
        if sure:
            places = left + _CELL * (np.array(sure)[:, 1] + 0.5), top + _CELL * (np.array(sure)[:, 0] + 0.5)
            ax.scatter(*places, s=13, color=INK, edgecolors="white", linewidths=0.6, zorder=3, gid="sure")
    ax.set_xlim(0, columns * step_x)
    ax.set_ylim(math.ceil(evaluation.n_heads / columns) * step_y, 0)
    _without_frame(ax)
    beyond = np.nanmax(np.abs(shown)) > limit
    bar = ax.figure.colorbar(mesh, ax=ax, extend="both" if beyond else "neither", shrink=0.6, pad=0.02, aspect=25)
    bar.set_label("Explained variance lost without the sender", fontsize=8)
    bar.outline.set_visible(False)
    ax.set_title("Who talks to whom, by head", loc="left", fontsize=12, y=1.0)
    add_caption(
        ax,
        "Rows: receivers. Columns: senders. Explained variance of the head kept alone minus the same with all "
        f"neighbours of the sender type masked out{in_sample_text(evaluation)}.",
        f"Dot: {_level(found)} interval above 0, of a head that explains something there." if links else "",
        "Grey: undefined (no such neighbour, or too few cells).",
    )
    return ax


def plot_sender_graph(
    evaluation: HeadEvaluation, *, ax: Axes | None = None, cell_types: Sequence[str] | None = None
) -> Axes:
    """Show the strongest links from senders to receivers, head by head.

    Parameters
    ----------
    evaluation
        What to show.
    ax
        Axes to draw into; ``None`` makes a new pyplot figure, which notebooks show.
    cell_types
        The receiver types whose links are shown; ``None`` shows all.

    Returns
    -------
    Axes
        The model's types on a circle, arrows from sender to receiver (``gid`` ``link-<head>-<receiver>-<sender>``, by
        position in the evaluation), coloured by head, the wider the more explained variance is lost without the sender:
        the 30 largest losses with an interval above 0, of heads that explain something. Without any, the axes say so.

    Raises
    ------
    DataError
        If a type was not evaluated, or senders were not computed for any of them.
    """
    found, names = _found(evaluation, cell_types)
    ax = new_axes(graph_size(evaluation)) if ax is None else ax
    links = sure_links(evaluation, [evaluation.type_index(name) for name in names])
    drawn = links[:MOST_ARROWS]
    angles = np.pi / 2 - 2 * np.pi * np.arange(len(found.senders)) / max(1, len(found.senders))
    places = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    at = dict(zip(found.senders, places, strict=True))
    largest = float(found.effect[tuple(drawn[0])]) if len(drawn) else 1.0
    heads = {head: f"C{number % 10}" for number, head in enumerate(sorted(set(drawn[:, 0].tolist())))}
    for bend, (head, receiver, sender) in zip(_bends(drawn), drawn.tolist(), strict=True):
        share = float(found.effect[head, receiver, sender]) / largest
        arrow = FancyArrowPatch(
            tuple(at[found.senders[sender]]),
            tuple(at[evaluation.cell_types[receiver]]),
            connectionstyle=f"arc3,rad={bend:.3f}",
            arrowstyle="-|>",
            mutation_scale=8 + 8 * share,
            shrinkA=9,
            shrinkB=9,
            linewidth=0.6 + 4.4 * share,
            color=heads[head],
            alpha=0.8,
            zorder=2,
        )
        arrow.set_gid(f"link-{head}-{receiver}-{sender}")
        ax.add_patch(arrow)
    involved = {found.senders[sender] for sender in drawn[:, 2]} | {evaluation.cell_types[row] for row in drawn[:, 1]}
    colours = [INK if name in involved else "#bbbbbb" for name in found.senders]
    ax.scatter(places[:, 0], places[:, 1], s=70, color=colours, zorder=3, gid="types")
    for name, (x, y) in at.items():
        side = "center" if abs(x) < 0.2 else "left" if x > 0 else "right"
        shown = literal(drawn_label(name, longest=2 * _LONGEST))
        ax.text(1.1 * x, 1.13 * y, shown, ha=side, va="center", fontsize=8.5, color=INK if name in involved else MUTED)
    if not len(drawn):
        ax.text(0, 0, "no interval lies above 0", ha="center", va="center", fontsize=9, color=MUTED, gid="none")
    ax.set_xlim(-1.75, 1.75)
    ax.set_ylim(-1.3, 1.3)
    _without_frame(ax)
    ax.set_title("Who talks to whom", loc="left", fontsize=12, y=1.0)
    _add_legend(ax, heads)
    said = f"The {len(drawn)} largest of {len(links)} losses" if len(links) > len(drawn) else f"All {len(links)} losses"
    add_caption(
        ax,
        f"Arrows: from sender to receiver, coloured by head, wider the more explained variance the head loses without "
        f"the sender (at most {effect(largest)}). {said} with a {_level(found)} interval above 0, of heads "
        f"that explain something in the receiver{in_sample_text(evaluation)}."
        if len(drawn)
        else f"No head loses explained variance without any sender with a {_level(found)} interval above 0.",
    )
    return ax


def _found(evaluation: HeadEvaluation, cell_types: Sequence[str] | None) -> tuple[Senders, tuple[str, ...]]:
    names, found = chosen_types(evaluation, cell_types), evaluation.senders
    if found is None or not has_senders(evaluation, cell_types):
        raise DataError(
            value="it was not computed who talks to whom",
            rule="ablation.senders=true asks for it, with the factored engine",
            fix="evaluate again with it, or choose types with more cells; senders_frame() gives the reasons",
        )
    return found, names


def _add_names(
    ax: Axes,
    x: Float64[np.ndarray, " edges"],
    y: Float64[np.ndarray, " edges"],
    senders: Sequence[str],
    receivers: Sequence[str],
) -> None:
    for place, name in zip(x[:-1] + _CELL / 2, senders, strict=True):
        shown = literal(drawn_label(name, longest=_LONGEST))
        ax.text(place, y[0] - 0.05, shown, rotation=90, ha="center", va="bottom", fontsize=7, color=MUTED)
    for place, name in zip(y[:-1] + _CELL / 2, receivers, strict=True):
        shown = literal(drawn_label(name, longest=_LONGEST))
        ax.text(x[0] - 0.05, place, shown, ha="right", va="center", fontsize=7, color=MUTED)


def _bends(links: Int64[np.ndarray, "links three"]) -> list[float]:
    """Return how far each arrow bends, so that those of several heads between two types lie beside each other."""
    seen: dict[tuple[int, int], int] = {}
    bends = []
    for _, receiver, sender in links.tolist():
        number = seen.get((receiver, sender), 0)
        seen[receiver, sender] = number + 1
        bends.append(0.12 + 0.11 * number)
    return bends


def _add_legend(ax: Axes, heads: dict[int, str]) -> None:
    if heads:
        handles = [Line2D([], [], color=colour, linewidth=2.5, label=f"head {head}") for head, colour in heads.items()]
        ax.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8)


def _without_frame(ax: Axes) -> None:
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)


def _level(found: Senders) -> str:
    return f"{100 * found.confidence:g} %"
