"""Heatmaps of what is lost without each head and explained by it alone, and of interactions of heads."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import matplotlib
import numpy as np

from amici_eval.common.errors import DataError
from amici_eval.common.text import literal, slugify
from amici_eval.report.figures.drawing import INK, UNDEFINED, add_caption, add_marks, chosen_types, drawn_label, opened

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float64
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh

    from amici_eval.results.evaluation import HeadAblations, HeadEvaluation

ABLATIONS_STEM = "ablations"
INTERACTIONS_STEM = "head_interactions"

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


def ablations_size(evaluation: HeadEvaluation, n_types: int) -> tuple[float, float]:
    """Return width and height in inches of :func:`plot_ablations`."""
    n_modes = 0 if evaluation.ablations is None else len(evaluation.ablations.modes)
    panel = evaluation.n_heads * _column_inches(evaluation.n_heads) + _GAP_INCHES
    return min(2.6 + n_modes * panel, 60.0), float(np.clip(_ROW_INCHES * n_types + 1.3, 2.0, 80.0))


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
    canvas = opened(evaluation, ax=ax, cell_types=cell_types, size=lambda names: ablations_size(evaluation, len(names)))
    ax, chosen, rows = canvas.ax, canvas.names, canvas.rows
    blocks = {}
    for mode in (mode for mode in _PANELS if mode in ablations.modes):
        values = ablations.of(mode)
        blocks[mode] = (evaluation.expl_var_full - values if mode in _LOST else values).T[rows]
    everything = np.concatenate(list(blocks.values()), axis=1)
    limit = _limit(everything[everything > 0], share=_SHARE_IN_SCALE) or _limit(everything)
    with_numbers = everything.size <= _MOST_NUMBERS

    # positions are in columns of a block
    wide = _NUMBER_INCHES / _column_inches(evaluation.n_heads)
    ticks, labels = [0.5 * wide, 1.5 * wide], ["all", "none"]
    _add_block_title(ax, wide, "Model")
    for row, index in enumerate(rows):
        for tick, value in zip(ticks, (evaluation.expl_var_full[index], evaluation.expl_var_none[index]), strict=True):
            text = ax.text(tick, row + 0.5, _number(value), ha="center", va="center", fontsize=7, color=INK)
            text.set_gid("baselines")
    largest: dict[str, list[tuple[float, float]]] = {"white": [], INK: []}
    gap = _GAP_INCHES / _column_inches(evaluation.n_heads)
    left = 2 * wide + gap
    for mode, values in blocks.items():
        mesh = _heatmap(ax, values, left=left, top=0.0, limit=limit, gid=mode)
        _add_block_title(ax, left + evaluation.n_heads / 2, _PANELS[mode])
        ticks += [left + head + 0.5 for head in range(evaluation.n_heads)]
        labels += [str(head) for head in range(evaluation.n_heads)]
        best = np.where(np.isnan(values), -np.inf, values)
        for row in np.flatnonzero(best.max(axis=1, initial=-np.inf) > 0):
            head = best[row].argmax()
            place = (left + head + 0.85, row + 0.18) if with_numbers else (left + head + 0.5, row + 0.5)
            largest[_readable_on(best[row, head], limit)].append(place)
        if with_numbers:
            _add_numbers(ax, values, left=left, limit=limit)
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
    low, high = np.nanmin(everything, initial=0.0) < -limit, np.nanmax(everything, initial=0.0) > limit
    beyond = {(True, True): "both", (True, False): "min", (False, True): "max"}.get((bool(low), bool(high)), "neither")
    _add_colorbar(ax, mesh, "Explained variance", beyond=beyond)
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
    columns, panel = _grid_columns(len(chosen)), _panel_inches(evaluation.n_heads)
    width = columns * (panel + _gap_inches(chosen, panel)) + 1.0
    height = math.ceil(len(chosen) / columns) * (panel + 0.3) + 0.9
    return float(np.clip(width, 4.2, 60.0)), float(np.clip(height, 2.6, 80.0))


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
        raise _missing(INTERACTIONS_STEM)
    canvas = opened(evaluation, ax=ax, cell_types=cell_types, size=lambda names: interactions_size(evaluation, names))
    ax, chosen = canvas.ax, canvas.names
    n_heads, columns = evaluation.n_heads, _grid_columns(len(chosen))
    names = tuple(kinds)
    above = np.triu(np.ones((n_heads, n_heads), dtype=bool))
    values = np.where(above, kinds[names[0]], kinds[names[-1]])[canvas.rows]
    limit = _limit(_pairs(values))
    # lengths in units of heads: the gap between panels, and the room above each for its title
    panel = _panel_inches(n_heads)
    scale = n_heads / panel
    gap = _gap_inches(chosen, panel) * scale
    step_x, step_y = n_heads + gap, n_heads + 0.3 * scale
    size = float(np.clip(0.45 * 72 / scale, 4.0, 8.0))
    for position, name in enumerate(chosen):
        row, column = divmod(position, columns)
        left, top = column * step_x, row * step_y
        mesh = _heatmap(ax, values[position], left=left, top=top, limit=limit, gid=slugify(name))
        ax.text(left, top - 0.06 * scale, literal(drawn_label(name, longest=_LONGEST_TITLE)), va="bottom", fontsize=8)
        for head in range(n_heads):
            ax.text(left + head + 0.5, top + head + 0.5, str(head), ha="center", va="center", fontsize=size, color=INK)
        if n_heads <= 4 and len(chosen) <= 4:
            _add_numbers(ax, values[position], left=left, top=top, limit=limit, diagonal=True)
    ax.set_xlim(0, columns * step_x - gap)
    ax.set_ylim(math.ceil(len(chosen) / columns) * step_y - 0.3 * scale, -0.3 * scale)
    ax.set_aspect("equal", anchor="NW")
    ax.apply_aspect()
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)
    ax.set_title("Interaction of heads", loc="left", fontsize=12, y=1.0, pad=6)
    _add_colorbar(ax, mesh, "Interaction (explained variance)", beyond="neither")
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
        raise _missing(ABLATIONS_STEM)
    return evaluation.ablations


def _missing(what: str) -> DataError:
    return DataError(
        value=f"the evaluation holds no {what.replace('_', ' ')}",
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


def _limit(values: Float64[np.ndarray, ...], *, share: float = 1.0) -> float:
    """Return the largest absolute value, or its ``share`` quantile, lest one value take all the contrast; at most 1."""
    sizes = np.abs(values[np.isfinite(values)])
    if not sizes.size:
        return 0.0
    return min(1.0, float(np.quantile(sizes, share, method="higher")))


def _heatmap(
    ax: Axes,
    values: Float64[np.ndarray, "rows columns"],
    *,
    left: float,
    top: float,
    limit: float,
    gid: str,
) -> QuadMesh:
    colours = matplotlib.colormaps["RdBu_r"].with_extremes(bad=UNDEFINED)
    mesh = ax.pcolormesh(
        left + np.arange(values.shape[1] + 1),
        top + np.arange(values.shape[0] + 1),
        values,
        cmap=colours,
        vmin=-(limit or 1.0),
        vmax=limit or 1.0,
        edgecolors="white",
        linewidth=0.5,
    )
    mesh.set_gid(gid)
    return mesh


def _add_numbers(
    ax: Axes, values: np.ndarray, *, left: float, limit: float, top: float = 0.0, diagonal: bool = False
) -> None:
    for row, column in np.argwhere(np.isfinite(values)):
        if diagonal and row == column:
            continue
        value = values[row, column]
        colour = _readable_on(value, limit)
        place = left + column + 0.5, top + row + 0.5
        ax.text(*place, _number(value), ha="center", va="center", fontsize=7, color=colour)


def _add_colorbar(ax: Axes, mesh: QuadMesh, label: str, *, beyond: str) -> None:
    box = ax.get_window_extent()
    width, height = box.width / ax.figure.dpi, box.height / ax.figure.dpi
    whole = ax.get_position(original=True).height * ax.figure.bbox.height / ax.figure.dpi
    # no taller than needed to read it, nor than the drawing where its aspect is fixed
    tall = min(height, 2.5)
    bar = ax.figure.colorbar(
        mesh,
        ax=ax,
        extend=beyond,
        fraction=min(0.15, 0.4 / width),
        pad=min(0.1, 0.15 / width),
        shrink=tall / whole,
        aspect=tall / 0.12,
        anchor=(0.0, 1.0),
    )
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_visible(False)


def _column_inches(n_heads: int) -> float:
    return max(_CELL_INCHES, _TITLE_INCHES / max(1, n_heads))


def _readable_on(value: float, limit: float) -> str:
    return "white" if abs(value) > 0.65 * limit else INK


def _number(value: float) -> str:
    # 0.0 is added because -0.00 would be read as below 0
    return "–" if np.isnan(value) else f"{round(float(value), 2) + 0.0:.2f}"


def _add_block_title(ax: Axes, middle: float, title: str) -> None:
    ax.annotate(title, (middle, 0), (0, 4), textcoords="offset points", ha="center", va="bottom", fontsize=8)


def _grid_columns(n_types: int) -> int:
    fewest = max(1, math.ceil(math.sqrt(n_types)))
    # the one that leaves the fewest places empty
    return min(range(fewest, min(n_types, max(fewest, 6)) + 1), key=lambda columns: -n_types % columns, default=1)


def _panel_inches(n_heads: int) -> float:
    return float(np.clip(0.2 * n_heads, 1.4, 3.0))


def _gap_inches(names: Sequence[str], panel: float) -> float:
    """Return the space between panels that leaves room for their titles."""
    longest = max((min(len(name), _LONGEST_TITLE) for name in names), default=0)
    return max(0.2, 0.085 * longest + 0.1 - panel)
