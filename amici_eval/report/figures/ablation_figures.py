"""Figures of what is lost without heads, pairs of heads, or senders: heat maps, and who talks to whom as a graph."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch

from amici_eval.common.errors import DataError
from amici_eval.common.text import literal, slugify
from amici_eval.report.evaluation_sentences import in_sample_text, sure_links
from amici_eval.report.figures.drawing import (
    INK,
    MUTED,
    Drawing,
    Panels,
    add_caption,
    add_colorbar,
    add_legend,
    add_marks,
    chosen_types,
    colour_limit,
    draw_heatmap,
    drawn_label,
    figure_size,
    new_axes,
    readable_on,
    two_digits,
    without_frame,
    write_numbers,
)
from amici_eval.report.numbers import effect

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from jaxtyping import Float64
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh

    from amici_eval.results.analyses import Senders
    from amici_eval.results.evaluation import HeadAblations, HeadEvaluation

    Link = tuple[int, int, int]

_ABLATIONS, _INTERACTIONS = "ablations", "head interactions"
# in the order of reading: what a head can do, what is missed without it, what it is worth
_PANELS = {
    "keep_one": "Alone",
    "frozen_norm": "Alone,\nnorm frozen",
    "leave_one_out": "Lost\nwithout it",
    "mean_z": "Lost with\nits mean",
    "resampled_z": "Lost with\nother cells'",
    "shapley": "Fair share",
    "frozen_shapley": "Fair share,\nnorm frozen",
}
_LOST = ("leave_one_out", "mean_z", "resampled_z")
_EXPLAINED = {
    "keep_one": "Alone: explained variance with this head only.",
    "frozen_norm": "Norm frozen: divided by the whole model's scale, so that the heads' outputs add up (their "
    "explained variances do not).",
    "leave_one_out": "Lost without it: explained variance of all heads minus that of all others.",
    "mean_z": "Lost with its mean / with other cells': the same, with the head's output replaced by its mean over the "
    "type / by that of other cells of the type.",
    "shapley": "Fair share: Shapley value; the shares of a type add up to all heads minus none, with the norm frozen "
    "about so.",
}
_TITLE_INCHES = 1.0
_CELL_INCHES, _ROW_INCHES, _GAP_INCHES, _NUMBER_INCHES = 0.2, 0.24, 0.2, 0.36
_MOST_NUMBERS = 120
_SHARE_IN_SCALE = 0.99
_LONGEST_TITLE = 36


def ablation_drawings(evaluation: HeadEvaluation, chosen: Sequence[str]) -> Iterator[Drawing]:
    """Yield the figures of this module that the evaluation has numbers for, in the order of the files."""
    if not chosen:
        return
    if evaluation.ablations is not None and evaluation.ablations.modes:
        size = ablations_size(evaluation, len(chosen))
        yield Drawing("ablations", size, partial(plot_ablations, evaluation, cell_types=chosen))
    if has_interactions(evaluation, chosen):
        size = interactions_size(evaluation, chosen)
        yield Drawing("head_interactions", size, partial(plot_interactions, evaluation, cell_types=chosen))
    if has_senders(evaluation, chosen):
        size = senders_size(evaluation, len(chosen))
        yield Drawing("senders", size, partial(plot_senders, evaluation, cell_types=chosen))
        draw = partial(plot_sender_graph, evaluation, cell_types=chosen)
        yield Drawing("sender_graph", graph_size(evaluation), draw)


def ablations_size(evaluation: HeadEvaluation, n_types: int) -> tuple[float, float]:
    """Return width and height in inches of :func:`plot_ablations`."""
    n_modes = 0 if evaluation.ablations is None else len(evaluation.ablations.modes)
    panel = evaluation.n_heads * _column_inches(evaluation.n_heads) + _GAP_INCHES
    return figure_size(2.6 + n_modes * panel, _ROW_INCHES * n_types + 1.3, least=(2.6, 2.0))


def plot_ablations(
    evaluation: HeadEvaluation, *, ax: Axes | None = None, cell_types: Sequence[str] | None = None
) -> Axes:
    """Show what each head can do alone, what is missed without it, and what it is worth, type by type.

    Parameters
    ----------
    evaluation
        What to show.
    ax
        Axes to draw into; ``None`` makes a new pyplot figure, which notebooks show.
    cell_types
        The types to show; ``None`` shows all. They are drawn in sorted order.

    Returns
    -------
    Axes
        Types x heads, a block of columns for each mode that was computed (with the mode as ``gid``), after the
        explained variance of the whole model and of the model without heads as numbers (``gid`` ``baselines``). White
        is 0; a dot marks the largest head of a row in its block, where it is above 0.

    Raises
    ------
    DataError
        If a type was not evaluated, or ablations were not computed.

    Notes
    -----
    The modes in which the head is taken from the whole model show what that loses (``delta_full`` of
    ``ablations_frame()``), so that in all blocks more is more. The largest value has the deepest colour; values as
    far below 0 or farther share the deepest blue.
    """
    ablations = _ablations(evaluation)
    chosen = chosen_types(evaluation, cell_types)
    rows = [evaluation.type_index(name) for name in chosen]
    ax = new_axes(ablations_size(evaluation, len(chosen))) if ax is None else ax
    blocks = {}
    for mode in (mode for mode in _PANELS if mode in ablations.modes):
        values = ablations.of(mode)
        blocks[mode] = (evaluation.expl_var_full - values if mode in _LOST else values).T[rows]
    everything = np.concatenate(list(blocks.values()), axis=1)
    limit = colour_limit(everything[everything > 0], share=_SHARE_IN_SCALE) or colour_limit(everything)
    with_numbers = everything.size <= _MOST_NUMBERS

    # positions are in columns of a block
    wide = _NUMBER_INCHES / _column_inches(evaluation.n_heads)
    ticks, labels = [0.5 * wide, 1.5 * wide], ["all", "none"]
    _add_block_title(ax, wide, "Model")
    for row, index in enumerate(rows):
        for tick, value in zip(ticks, (evaluation.expl_var_full[index], evaluation.expl_var_none[index]), strict=True):
            text = ax.text(tick, row + 0.5, two_digits(value), ha="center", va="center", fontsize=7, color=INK)
            text.set_gid("baselines")
    largest: dict[str, list[tuple[float, float]]] = {"white": [], INK: []}
    gap = _GAP_INCHES / _column_inches(evaluation.n_heads)
    left = 2 * wide + gap
    for mode, values in blocks.items():
        mesh = draw_heatmap(ax, values, limit=limit, corner=(left, 0.0), gid=mode)
        _add_block_title(ax, left + evaluation.n_heads / 2, _PANELS[mode])
        ticks += [left + head + 0.5 for head in range(evaluation.n_heads)]
        labels += [str(head) for head in range(evaluation.n_heads)]
        best = np.where(np.isnan(values), -np.inf, values)
        for row in np.flatnonzero(best.max(axis=1, initial=-np.inf) > 0):
            head = best[row].argmax()
            place = (left + head + 0.85, row + 0.18) if with_numbers else (left + head + 0.5, row + 0.5)
            largest[readable_on(best[row, head], limit)].append(place)
        if with_numbers:
            write_numbers(ax, values, limit=limit, corner=(left, 0.0))
        left += evaluation.n_heads + gap
    for colour, places in largest.items():
        add_marks(ax, places, marker="o", size=2.6, color=colour, gid="largest")
    ax.set_xlim(0, left - gap)
    ax.set_ylim(len(chosen), 0)
    ax.set_xticks(ticks, labels, fontsize=7)
    ax.set_yticks(np.arange(len(chosen)) + 0.5, [literal(drawn_label(name)) for name in chosen], fontsize=8)
    ax.tick_params(length=0)
    ax.set_xlabel("Head")
    ax.spines[:].set_visible(False)
    # y keeps matplotlib from measuring all labels for the title's place
    ax.set_title("What each head explains, by receiver cell type", loc="left", fontsize=12, y=1.0, pad=34)
    _add_short_colorbar(ax, mesh, "Explained variance", shown=everything)
    add_caption(
        ax,
        "Red explains, blue harms; a dot marks the largest head of a row in its block. "
        + " ".join(text for mode, text in _EXPLAINED.items() if mode in ablations.modes),
        "A head that explains much alone but is not missed without it is redundant: others say the same."
        if {"keep_one", "leave_one_out"} <= set(ablations.modes)
        else "",
        "Grey: undefined" if np.isnan(everything).any() else "",
    )
    return ax


def has_interactions(evaluation: HeadEvaluation, cell_types: Sequence[str] | None = None) -> bool:
    """Return whether an interaction of two heads is defined in one of the types."""
    if evaluation.ablations is None or evaluation.n_heads < 2:
        return False
    rows = [evaluation.type_index(name) for name in chosen_types(evaluation, cell_types)]
    return any(np.isfinite(_pairs(values[rows])).any() for values in _kinds(evaluation.ablations).values())


def interactions_size(evaluation: HeadEvaluation, chosen: Sequence[str]) -> tuple[float, float]:
    """Return width and height in inches of :func:`plot_interactions`."""
    panels = _interaction_panels(evaluation.n_heads, chosen)
    heads_per_inch = evaluation.n_heads / _panel_inches(evaluation.n_heads)
    width = panels.n_columns * panels.step[0] / heads_per_inch + 1.0
    height = math.ceil(len(chosen) / panels.n_columns) * panels.step[1] / heads_per_inch + 0.9
    return figure_size(width, height, least=(4.2, 2.6))


def _interaction_panels(n_heads: int, chosen: Sequence[str]) -> Panels:
    """Return a square for each type, in units of heads; the gap between them leaves room for their titles."""
    inches = _panel_inches(n_heads)
    heads_per_inch = n_heads / inches
    longest = max((min(len(name), _LONGEST_TITLE) for name in chosen), default=0)
    gap, title = max(0.2, 0.085 * longest + 0.1 - inches) * heads_per_inch, 0.3 * heads_per_inch
    return Panels(
        n_panels=len(chosen),
        n_columns=_grid_columns(len(chosen)),
        step=(n_heads + gap, n_heads + title),
        margin=(0.0, title),
        gap=gap,
    )


def plot_interactions(
    evaluation: HeadEvaluation, *, ax: Axes | None = None, cell_types: Sequence[str] | None = None
) -> Axes:
    """Show which heads say the same and which need each other, type by type.

    Parameters
    ----------
    evaluation
        What to show.
    ax
        Axes to draw into; ``None`` makes a new pyplot figure, which notebooks show.
    cell_types
        The types to show; ``None`` shows all. They are drawn in sorted order.

    Returns
    -------
    Axes
        A heads x heads block per type, in a grid (with the type's slug as ``gid``), white at 0, head numbers on the
        diagonal. If both were computed, the model as it is stands above the diagonal and the model with frozen layer
        norm below; else one of them on both sides.

    Raises
    ------
    DataError
        If a type was not evaluated, or interactions were not computed.
    """
    kinds = _kinds(_ablations(evaluation))
    if not has_interactions(evaluation):
        raise _missing(_INTERACTIONS)
    chosen = chosen_types(evaluation, cell_types)
    rows = [evaluation.type_index(name) for name in chosen]
    ax = new_axes(interactions_size(evaluation, chosen)) if ax is None else ax
    n_heads = evaluation.n_heads
    names = tuple(kinds)
    above = np.triu(np.ones((n_heads, n_heads), dtype=bool))
    values = np.where(above, kinds[names[0]], kinds[names[-1]])[rows]
    limit = colour_limit(_pairs(values))
    panels = _interaction_panels(n_heads, chosen)
    heads_per_inch = n_heads / _panel_inches(n_heads)
    size = float(np.clip(0.45 * 72 / heads_per_inch, 4.0, 8.0))
    for name, shown, (left, top) in zip(chosen, values, panels.corners(), strict=True):
        mesh = draw_heatmap(ax, shown, limit=limit, corner=(left, top), gid=slugify(name))
        title = literal(drawn_label(name, longest=_LONGEST_TITLE))
        ax.text(left, top - 0.06 * heads_per_inch, title, va="bottom", fontsize=8)
        for head in range(n_heads):
            ax.text(left + head + 0.5, top + head + 0.5, str(head), ha="center", va="center", fontsize=size, color=INK)
        if n_heads <= 4 and len(chosen) <= 4:
            write_numbers(ax, shown, limit=limit, corner=(left, top), with_diagonal=False)
    panels.set_limits(ax)
    ax.set_aspect("equal", anchor="NW")
    ax.apply_aspect()
    ax.set_title("Interaction of heads", loc="left", fontsize=12, y=1.0, pad=6)
    _add_short_colorbar(ax, mesh, "Interaction (explained variance)", shown=_pairs(values))
    ax.apply_aspect()
    add_caption(
        ax,
        "Red: two heads explain more together than the sum of what each adds: they need each other. Blue: less; they "
        "explain partly the same (redundant). Head numbers on the diagonal.",
        f"Above the diagonal: {names[0]}; below: {names[1]}." if len(names) > 1 else f"Of {names[0]}.",
        "Grey: undefined" if np.isnan(_pairs(values)).any() else "",
    )
    return ax


def _ablations(evaluation: HeadEvaluation) -> HeadAblations:
    if evaluation.ablations is None or not evaluation.ablations.modes:
        raise _missing(_ABLATIONS)
    return evaluation.ablations


def _missing(what: str) -> DataError:
    return DataError(
        value=f"the evaluation holds no {what}",
        rule="they are drawn from numbers that were computed",
        fix="evaluate again with ablation.modes",
    )


def _kinds(ablations: HeadAblations) -> dict[str, Float64[np.ndarray, "types heads heads"]]:
    kinds = {
        "the model as it is": ablations.interaction,
        "the model with its layer norm frozen": ablations.frozen_interaction,
    }
    return {name: values for name, values in kinds.items() if np.isfinite(_pairs(values)).any()}


def _pairs(values: Float64[np.ndarray, "types heads heads"]) -> Float64[np.ndarray, "types pairs"]:
    other = ~np.eye(values.shape[-1], dtype=bool)
    return values[:, other]


def _add_short_colorbar(ax: Axes, mesh: QuadMesh, label: str, *, shown: Float64[np.ndarray, ...]) -> None:
    """Add a scale no taller than needed to read it, nor than the drawing where its aspect is fixed."""
    box = ax.get_window_extent()
    width, height = box.width / ax.figure.dpi, box.height / ax.figure.dpi
    whole = ax.get_position(original=True).height * ax.figure.bbox.height / ax.figure.dpi
    tall = min(height, 2.5)
    layout = {"fraction": min(0.15, 0.4 / width), "pad": min(0.1, 0.15 / width), "anchor": (0.0, 1.0)}
    add_colorbar(ax, mesh, label, shown=shown, shrink=tall / whole, aspect=tall / 0.12, **layout)


def _column_inches(n_heads: int) -> float:
    return max(_CELL_INCHES, _TITLE_INCHES / max(1, n_heads))


def _add_block_title(ax: Axes, middle: float, title: str) -> None:
    ax.annotate(title, (middle, 0), (0, 4), textcoords="offset points", ha="center", va="bottom", fontsize=8)


def _grid_columns(n_types: int) -> int:
    fewest = max(1, math.ceil(math.sqrt(n_types)))
    # the one that leaves the fewest places empty
    return min(range(fewest, min(n_types, max(fewest, 6)) + 1), key=lambda columns: -n_types % columns, default=1)


def _panel_inches(n_heads: int) -> float:
    return float(np.clip(0.2 * n_heads, 1.4, 3.0))


MOST_ARROWS = 30

_LONGEST_SENDER = 18
_MOST_COLUMNS = 4
_CELL, _LABELS, _HEADING = 0.24, 1.75, 1.6
"""Inches: side of a cell of the heat map, room for the names of receivers, room for those of senders and the head."""


def has_senders(evaluation: HeadEvaluation, cell_types: Sequence[str] | None = None) -> bool:
    """Return whether what a head loses without a sender is defined for one of the receiver types."""
    found = evaluation.senders
    rows = [evaluation.type_index(name) for name in chosen_types(evaluation, cell_types)]
    return found is not None and bool(np.isfinite(found.effect[:, rows]).any())


def senders_size(evaluation: HeadEvaluation, n_types: int) -> tuple[float, float]:
    """Return width and height in inches of :func:`plot_senders`."""
    panels = _sender_panels(evaluation, n_types)
    width = panels.n_columns * panels.step[0] + 1.6
    height = math.ceil(evaluation.n_heads / panels.n_columns) * panels.step[1] + 0.9
    return figure_size(width, height, least=(6.0, 3.0))


def _sender_panels(evaluation: HeadEvaluation, n_types: int) -> Panels:
    n_senders = 0 if evaluation.senders is None else len(evaluation.senders.senders)
    return Panels(
        n_panels=evaluation.n_heads,
        n_columns=min(_MOST_COLUMNS, evaluation.n_heads),
        step=(_LABELS + n_senders * _CELL, _HEADING + n_types * _CELL),
        margin=(_LABELS, _HEADING),
    )


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
    limit = colour_limit(shown)
    panels = _sender_panels(evaluation, len(names))
    links = sure_links(evaluation, rows).tolist()
    for head, (left, top) in enumerate(panels.corners()):
        mesh = draw_heatmap(ax, shown[head], limit=limit, corner=(left, top), side=_CELL, gid=f"head-{head}")
        _add_names(ax, left, top, senders=found.senders, receivers=names)
        ax.text(left - _LABELS + 0.1, top - _HEADING + 0.25, f"Head {head}", fontsize=9, color=INK, weight="bold")
        sure = [(rows.index(receiver), sender) for one, receiver, sender in links if one == head]
        if sure:
            y, x = _CELL * (np.array(sure).T + 0.5)
            ax.scatter(left + x, top + y, s=13, color=INK, edgecolors="white", linewidths=0.6, zorder=3, gid="sure")
    panels.set_limits(ax)
    add_colorbar(ax, mesh, "Explained variance lost without the sender", shown=shown, shrink=0.6, pad=0.02, aspect=25)
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
    receivers = [evaluation.type_index(name) for name in names]
    links: list[Link] = [tuple(link) for link in sure_links(evaluation, receivers).tolist()]
    drawn = links[:MOST_ARROWS]
    heads = sorted({head for head, _, _ in drawn})
    colour_of = {head: f"C{number % 10}" for number, head in enumerate(heads)}
    place_of = _on_a_circle(found.senders)
    largest_loss = float(found.effect[drawn[0]]) if drawn else 1.0
    for link, bend in zip(drawn, _bends(drawn), strict=True):
        head, receiver, sender = link
        arrow = _arrow(
            place_of[found.senders[sender]],
            place_of[evaluation.cell_types[receiver]],
            bend=bend,
            strength=float(found.effect[link]) / largest_loss,
            colour=colour_of[head],
        )
        arrow.set_gid(f"link-{head}-{receiver}-{sender}")
        ax.add_patch(arrow)
    linked = {found.senders[sender] for _, _, sender in drawn} | {evaluation.cell_types[row] for _, row, _ in drawn}
    _draw_types(ax, place_of, linked)
    if not drawn:
        ax.text(0, 0, "no interval lies above 0", ha="center", va="center", fontsize=9, color=MUTED, gid="none")
    ax.set_xlim(-1.75, 1.75)
    ax.set_ylim(-1.3, 1.3)
    without_frame(ax)
    ax.set_title("Who talks to whom", loc="left", fontsize=12, y=1.0)
    if heads:
        add_legend(ax, [Line2D([], [], color=colour_of[head], linewidth=2.5, label=f"head {head}") for head in heads])
    counted = f"The {len(drawn)} largest of {len(links)}" if len(links) > len(drawn) else f"All {len(links)}"
    add_caption(
        ax,
        f"Arrows: from sender to receiver, coloured by head, wider the more explained variance the head loses without "
        f"the sender (at most {effect(largest_loss)}). {counted} losses with a {_level(found)} interval above 0, of "
        f"heads that explain something in the receiver{in_sample_text(evaluation)}."
        if drawn
        else f"No head loses explained variance without any sender with a {_level(found)} interval above 0.",
    )
    return ax


def _on_a_circle(types: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Return the place of each type on the unit circle, clockwise from the top."""
    angles = np.pi / 2 - 2 * np.pi * np.arange(len(types)) / max(1, len(types))
    return {name: (float(np.cos(angle)), float(np.sin(angle))) for name, angle in zip(types, angles, strict=True)}


def _bends(links: Sequence[Link]) -> list[float]:
    """Return how far each arrow bends, so that those of several heads between two types lie beside each other."""
    n_before: dict[tuple[int, int], int] = {}
    bends = []
    for _, receiver, sender in links:
        number = n_before.get((receiver, sender), 0)
        n_before[receiver, sender] = number + 1
        bends.append(0.12 + 0.11 * number)
    return bends


def _arrow(
    start: tuple[float, float], end: tuple[float, float], *, bend: float, strength: float, colour: str
) -> FancyArrowPatch:
    """Return an arrow, the wider the stronger; ``strength`` is 1 for the strongest link."""
    return FancyArrowPatch(
        start,
        end,
        connectionstyle=f"arc3,rad={bend:.3f}",
        arrowstyle="-|>",
        mutation_scale=8 + 8 * strength,
        shrinkA=9,
        shrinkB=9,
        linewidth=0.6 + 4.4 * strength,
        color=colour,
        alpha=0.8,
        zorder=2,
    )


def _draw_types(ax: Axes, place_of: dict[str, tuple[float, float]], linked: set[str]) -> None:
    """Draw a dot and a name for each type; those without a drawn link are pale."""
    colours = [INK if name in linked else "#bbbbbb" for name in place_of]
    places = np.array(list(place_of.values()))
    ax.scatter(places[:, 0], places[:, 1], s=70, color=colours, zorder=3, gid="types")
    for name, (x, y) in place_of.items():
        side = "center" if abs(x) < 0.2 else "left" if x > 0 else "right"
        shown, colour = literal(drawn_label(name, longest=2 * _LONGEST_SENDER)), INK if name in linked else MUTED
        ax.text(1.1 * x, 1.13 * y, shown, ha=side, va="center", fontsize=8.5, color=colour)


def _found(evaluation: HeadEvaluation, cell_types: Sequence[str] | None) -> tuple[Senders, tuple[str, ...]]:
    names, found = chosen_types(evaluation, cell_types), evaluation.senders
    if found is None or not has_senders(evaluation, cell_types):
        raise DataError(
            value="it was not computed who talks to whom",
            rule="ablation.senders=true asks for it, with the factored engine",
            fix="evaluate again with it, or choose types with more cells; senders_frame() gives the reasons",
        )
    return found, names


def _add_names(ax: Axes, left: float, top: float, *, senders: Sequence[str], receivers: Sequence[str]) -> None:
    """Write the names of senders above a heat map and those of receivers beside it."""
    style: dict[str, Any] = {"fontsize": 7, "color": MUTED}
    for number, name in enumerate(senders):
        shown = literal(drawn_label(name, longest=_LONGEST_SENDER))
        x = left + _CELL * (number + 0.5)
        ax.text(x, top - 0.05, shown, rotation=90, ha="center", va="bottom", **style)
    for number, name in enumerate(receivers):
        shown = literal(drawn_label(name, longest=_LONGEST_SENDER))
        ax.text(left - 0.05, top + _CELL * (number + 0.5), shown, ha="right", va="center", **style)


def _level(found: Senders) -> str:
    return f"{100 * found.confidence:g} %"
