"""Figures of a comparison: matched heads, their lineage over versions, changes, and explained variance by version."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.patches import Rectangle

from amici_eval.common.text import literal
from amici_eval.report.figures.drawing import (
    FORMATS,
    INK,
    MUTED,
    Drawing,
    Estimate,
    PointStyle,
    add_caption,
    add_colorbar,
    add_legend,
    draw_estimates,
    draw_heatmap,
    drawn_label,
    new_axes,
    save_drawings,
    write_numbers,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from jaxtyping import Float64
    from matplotlib.axes import Axes

    from amici_eval.results.comparison import HeadComparison, HeadDifferences, SenderDifferences


_MOST_PAIRS_SHOWN = 20
_MOST_CHANGES_SHOWN = 60
_VERDICT_COLOURS = {
    "better": "#1a7f37",
    "more": "#1a7f37",
    "worse": "#b42318",
    "less": "#b42318",
    "same": "#4a5568",
    "undecided": "#a8b0bb",
}
_WHOLE_MODEL = ", whole model"
_CHANGE_STYLES = {
    f"{verdict}{what}": PointStyle(verdict, colour, colour, line=colour, marker=marker)
    for what, marker in (("", "o"), (_WHOLE_MODEL, "D"))
    for verdict, colour in _VERDICT_COLOURS.items()
}


def plot_similarity(comparison: HeadComparison, pair: int = 0, *, ax: Axes | None = None) -> Axes:
    """Draw how alike the heads of two consecutive versions are; matched heads are framed.

    Parameters
    ----------
    comparison
        What to show.
    pair
        Which of ``comparison.matches``.
    ax
        Axes to draw into; ``None`` makes a new pyplot figure.

    Returns
    -------
    Axes
        Rows are heads of the earlier version, columns those of the later one.
    """
    match = comparison.matches[pair]
    n_before, n_after = match.similarity.shape
    ax = new_axes(_similarity_size(comparison, pair)) if ax is None else ax
    # cells are centred on the numbers of their heads
    corner = (-0.5, -0.5)
    mesh = draw_heatmap(ax, match.similarity, limit=1.0, corner=corner, gid="similarity")
    write_numbers(ax, match.similarity, limit=1.0, corner=corner)
    for head, partner in enumerate(match.partner.tolist()):
        if partner >= 0:
            frame = Rectangle((partner - 0.5, head - 0.5), 1, 1, fill=False, edgecolor=INK, linewidth=1.8, gid="match")
            ax.add_patch(frame)
    ax.set_xticks(range(n_after), [str(head) for head in range(n_after)])
    ax.set_yticks(range(n_before), [str(head) for head in range(n_before)])
    ax.set_xlabel(literal(f"Head of {drawn_label(comparison.labels[match.after])}"), fontsize=9)
    ax.set_ylabel(literal(f"Head of {drawn_label(comparison.labels[match.before])}"), fontsize=9)
    ax.set_xlim(-0.5, n_after - 0.5)
    ax.set_ylim(n_before - 0.5, -0.5)
    ax.set_title("How alike heads are", loc="left", fontsize=12)
    add_colorbar(ax, mesh, "Similarity", shown=match.similarity, shrink=0.8)
    add_caption(
        ax,
        "Similarity: correlation of what heads, kept alone, contribute to predictions, over cells and genes. "
        f"Framed: matched, which takes more than {comparison.unmatched:g}.",
        "Grey: undefined." if np.isnan(match.similarity).any() else "",
        "" if comparison.floor is None else f"Two untrained models: at most {_largest(comparison.floor)} if matched.",
    )
    return ax


def plot_lineage(comparison: HeadComparison, *, ax: Axes | None = None) -> Axes:
    """Draw which head became which, version after version.

    Parameters
    ----------
    comparison, ax
        As in :func:`plot_similarity`.

    Returns
    -------
    Axes
        A column a version, a dot a head, a line a match, as thick as heads are alike.
    """
    ax = new_axes(_lineage_size(comparison)) if ax is None else ax
    most = max(version.n_heads for version in comparison.versions)
    lines, widths, colours = [], [], []
    for number, lineage in enumerate(comparison.lineages):
        colour = f"C{number % 10}"
        there = [(at, head) for at, head in enumerate(lineage.heads) if head is not None]
        for (at, head), (then, other) in pairwise(there):
            alike = 1.0 if comparison.kind == "datasets" else float(comparison.similarity[at, then][head, other])
            lines.append([(at, head), (then, other)])
            widths.append(0.6 + 4.0 * max(alike, 0.0))
            colours.append(colour)
        x, y = zip(*there, strict=True)
        ax.scatter(x, y, s=150, color=colour, zorder=3, linewidths=0, gid=f"lineage-{number}")
        for at, head in there:
            ax.text(at, head, str(head), ha="center", va="center", fontsize=8, color="white", zorder=4)
    ax.add_collection(LineCollection(lines, linewidths=widths, colors=colours, alpha=0.7, zorder=2, gid="matches"))
    ax.set_xlim(-0.5, len(comparison.versions) - 0.5)
    ax.set_ylim(most - 0.5, -0.5)
    labels = [literal(drawn_label(label, longest=24)) for label in comparison.labels]
    ax.set_xticks(range(len(labels)), labels, rotation=0 if len(labels) < 6 else 45, ha="center", fontsize=8)
    ax.set_yticks([])
    ax.spines[:].set_visible(False)
    ax.set_ylabel("Heads", fontsize=9)
    ax.set_title("Which head became which", loc="left", fontsize=12)
    add_caption(ax, "Lines: matched heads, thicker the more alike. A dot without a line to the left is a new head.")
    return ax


def plot_differences(comparison: HeadComparison, pair: int = 0, *, ax: Axes | None = None) -> Axes:
    """Draw what changed from one version to the next as a forest plot, the largest changes first.

    Parameters
    ----------
    comparison, pair, ax
        As in :func:`plot_similarity`; ``pair`` is one of ``comparison.differences``.

    Returns
    -------
    Axes
        A row a matched head and cell type, the whole model marked by a diamond, coloured by verdict.
    """
    found = comparison.differences[pair]
    rows = []
    for index, at in _largest_changes(found.difference):
        is_whole = int(found.head_before[index]) < 0
        who = "all heads" if is_whole else f"head {found.head_before[index]} → {found.head_after[index]}"
        name = f"{drawn_label(found.cell_types[at], longest=30)}, {who}"
        rows.append(((index, at), name, found.verdict_of(index, at) + (_WHOLE_MODEL if is_whole else "")))
    return _plot_changes(
        comparison,
        found,
        rows,
        ax=ax,
        label="Difference of explained variance",
        title="{after} against {before}",
        caption="{lines}, too small to matter.",
    )


def plot_sender_differences(comparison: HeadComparison, pair: int = 0, *, ax: Axes | None = None) -> Axes:
    """Draw what changed in who talks to whom as a forest plot, the largest changes first.

    Parameters
    ----------
    comparison, pair, ax
        As in :func:`plot_similarity`; ``pair`` is one of ``comparison.senders``.

    Returns
    -------
    Axes
        A row a matched head, type of sender and type of receiver, coloured by verdict.
    """
    found = comparison.senders[pair]
    verdicts = np.array(found.verdict, dtype=object).reshape(found.difference.shape)
    rows = []
    for place in _largest_changes(found.difference):
        head, receiver, sender = place
        names = (drawn_label(name, longest=22) for name in (found.senders[sender], found.cell_types[receiver]))
        name = f"{' → '.join(names)}, head {found.head_before[head]} → {found.head_after[head]}"
        rows.append((place, name, str(verdicts[place])))
    return _plot_changes(
        comparison,
        found,
        rows,
        ax=ax,
        label="Difference of explained variance lost",
        title="Who talks to whom: {after} against {before}",
        caption="What heads explain less without a type of sender. {lines}.",
    )


def _largest_changes(values: Float64[np.ndarray, ...]) -> list[tuple[int, ...]]:
    """Return the positions of the largest absolute values that are shown, largest first, without undefined ones."""
    size = np.nan_to_num(np.abs(values), nan=-1.0)
    order = np.argsort(-size, axis=None, kind="stable")[:_MOST_CHANGES_SHOWN]
    places = [tuple(int(at) for at in np.unravel_index(place, size.shape)) for place in order]
    return [place for place in places if size[place] >= 0.0]


def _plot_changes(
    comparison: HeadComparison,
    found: HeadDifferences | SenderDifferences,
    rows: Sequence[tuple[tuple[int, ...], str, str]],
    *,
    ax: Axes | None,
    label: str,
    title: str,
    caption: str,
) -> Axes:
    """Draw changes (place, name, kind of ``_CHANGE_STYLES``) from the top, with a band for those within the margin."""
    ax = new_axes(_changes_size(found)) if ax is None else ax
    ax.axvspan(-comparison.margin, comparison.margin, color="#eef1f5", linewidth=0, zorder=0, gid="margin")
    ax.axvline(0.0, color=MUTED, linewidth=0.8, zorder=1)
    estimates = [
        Estimate(kind, y, float(found.difference[place]), float(found.low[place]), float(found.high[place]))
        for y, (place, _, kind) in enumerate(rows)
    ]
    add_legend(ax, draw_estimates(ax, estimates, _CHANGE_STYLES))
    ax.set_yticks(range(len(rows)), [literal(name) for _, name, _ in rows], fontsize=7)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_xlabel(label, fontsize=9)
    before, after = (drawn_label(comparison.labels[at], longest=24) for at in (found.before, found.after))
    ax.set_title(literal(title.format(before=before, after=after)), loc="left", fontsize=12)
    lines = (
        f"Lines: {100 * comparison.confidence:g} % intervals over tiles of tissue. Shaded: within the margin of "
        f"{comparison.margin:g}"
    )
    n_all = int(np.count_nonzero(~np.isnan(found.difference)))
    counted = f"The {len(rows)} largest of {n_all:,} differences." if len(rows) < n_all else ""
    add_caption(ax, caption.format(lines=lines), counted)
    return ax


def _changes_size(found: HeadDifferences | SenderDifferences) -> tuple[float, float]:
    return 6.4, 1.5 + 0.24 * max(len(_largest_changes(found.difference)), 1)


def plot_versions(comparison: HeadComparison, *, ax: Axes | None = None) -> Axes:
    """Draw explained variance of the whole model by version, a line a cell type.

    Parameters
    ----------
    comparison, ax
        As in :func:`plot_similarity`.

    Returns
    -------
    Axes
        With intervals.
    """
    ax = new_axes(_versions_size(comparison)) if ax is None else ax
    types, lines = comparison.cell_types, []
    for number, cell_type in enumerate(types):
        points = []
        for at, version in enumerate(comparison.versions):
            if cell_type in version.cell_types:
                place = version.cell_types.index(cell_type)
                points.append((at, version.full[place], version.full_low[place], version.full_high[place]))
        x, y, low, high = (np.array(values, dtype=np.float64) for values in zip(*points, strict=True))
        colour = f"C{number % 10}"
        style = ("-", "--", ":", "-.")[number // 10 % 4]
        shift = 0.012 * (number - len(types) / 2)
        ax.vlines(x + shift, low, high, color=colour, linewidth=0.8, alpha=0.6)
        name = literal(drawn_label(cell_type, longest=30))
        line = ax.plot(x + shift, y, style, marker="o", markersize=3.5, color=colour, linewidth=1.2)[0]
        line.set_label(f" {name}")
        line.set_gid(f"type-{number}")
        lines.append(line)
    ax.axhline(0.0, color=MUTED, linewidth=0.8)
    labels = [literal(drawn_label(label, longest=24)) for label in comparison.labels]
    ax.set_xticks(range(len(labels)), labels, rotation=0 if len(labels) < 6 else 45, fontsize=8)
    ax.set_xlim(-0.4, len(labels) - 0.6)
    ax.set_ylabel("Explained variance, all heads", fontsize=9)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_title("Explained variance by version", loc="left", fontsize=12)
    add_legend(ax, lines, fontsize=7, ncols=math.ceil(len(types) / 24))
    add_caption(ax, f"Lines up and down: {100 * comparison.confidence:g} % intervals over tiles of tissue.")
    return ax


def save_comparison_figures(
    comparison: HeadComparison, directory: str | Path, *, formats: Sequence[str] = FORMATS
) -> tuple[Path, ...]:
    """Write all figures of a comparison into a folder and return the files."""
    return save_drawings(_drawings(comparison), directory, formats=formats)


def _drawings(comparison: HeadComparison) -> Iterator[Drawing]:
    yield Drawing("versions", _versions_size(comparison), partial(plot_versions, comparison))
    if comparison.kind == "versions":
        yield Drawing("lineage", _lineage_size(comparison), partial(plot_lineage, comparison))
    for pair in range(min(len(comparison.matches), _MOST_PAIRS_SHOWN)):
        draw = partial(plot_similarity, comparison, pair)
        yield Drawing(f"similarity_{pair + 1}", _similarity_size(comparison, pair), draw)
    for pair, found in enumerate(comparison.differences[:_MOST_PAIRS_SHOWN]):
        if not np.isnan(found.difference).all():
            draw = partial(plot_differences, comparison, pair)
            yield Drawing(f"differences_{pair + 1}", _changes_size(found), draw)
    for pair, changes in enumerate(comparison.senders[:_MOST_PAIRS_SHOWN]):
        draw = partial(plot_sender_differences, comparison, pair)
        yield Drawing(f"senders_{pair + 1}", _changes_size(changes), draw)


def _similarity_size(comparison: HeadComparison, pair: int) -> tuple[float, float]:
    n_before, n_after = comparison.matches[pair].similarity.shape
    return 2.2 + 0.45 * n_after, 1.6 + 0.4 * n_before


def _lineage_size(comparison: HeadComparison) -> tuple[float, float]:
    most = max(version.n_heads for version in comparison.versions)
    return 1.2 + 1.5 * len(comparison.versions), 1.4 + 0.36 * most


def _versions_size(comparison: HeadComparison) -> tuple[float, float]:
    return 2.4 + 1.1 * len(comparison.versions), 4.0


def _largest(values: np.ndarray) -> str:
    known = values[np.isfinite(values)]
    return f"{known.max():.2f}" if known.size else "undefined"
