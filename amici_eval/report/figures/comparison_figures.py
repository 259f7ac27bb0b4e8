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
    INK,
    MUTED,
    ForestRow,
    add_caption,
    draw_forest,
    drawn_label,
    forest_size,
    largest,
    new_axes,
)
from amici_eval.report.figures.saving import FORMATS, save_drawings
from amici_eval.report.markup import cell, row, section, table
from amici_eval.report.sentences import effect, interval, p_text, rounded

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import pandas as pd
    from matplotlib.axes import Axes

    from amici_eval.report.figures.saving import Drawing
    from amici_eval.results.comparison import HeadComparison

_MOST_ROWS = 30


def sender_changes_section(comparison: HeadComparison) -> str:
    """Return the section with changes of senders that are sure, the largest first; nothing if none were computed."""
    if not comparison.senders:
        return ""
    frame = comparison.senders_frame()
    said = counted_changes(frame)
    sure = frame[frame["verdict"].isin(["more", "less"])]
    if not len(sure):
        few = few_tiles(comparison)
        told = f"No head is sure to take more or less from a type of sender than before: {said or 'nothing is known'}."
        return section("senders", "Who talks to whom", f"<p>{told}{f' {few}' if few else ''}</p>")
    order = sure["difference"].abs().sort_values(ascending=False, kind="stable").index[:_MOST_ROWS]
    header = ["Receiver type", "Sender type", "Head", "Head there", "From", "To", "Attention before", "Attention after"]
    header += ["EV lost before", "EV lost after", "Difference", "Interval", "Adjusted p", "Verdict"]
    header += ["Distance to a tenth before", "Distance to a tenth after"]
    rows = [
        row(
            entry["ct_name"],
            [
                cell(entry["sender"], words=True),
                cell(entry["head_before"]),
                cell(entry["head_after"]),
                cell(entry["version_before"], words=True),
                cell(entry["version_after"], words=True),
                cell(effect(entry["attention_before"])),
                cell(effect(entry["attention_after"])),
                cell(effect(entry["expl_var_lost_before"])),
                cell(effect(entry["expl_var_lost_after"])),
                cell(effect(entry["difference"])),
                cell(interval(entry["ci_low"], entry["ci_high"])),
                cell("" if np.isnan(entry["p_value_adj"]) else p_text(entry["p_value_adj"])),
                cell(entry["verdict"], words=True),
                cell(_distance(entry["distance_tenth_before"])),
                cell(_distance(entry["distance_tenth_after"])),
            ],
        )
        for entry in sure.loc[order].to_dict("records")
    ]
    some = f"The {len(rows)} largest of {len(sure):,}" if len(sure) > len(rows) else f"All {len(rows)}"
    caption = (
        f"{some} sure changes of what matched heads take from a type of sender; of all: {said}. EV lost: what the "
        "head, kept alone, explains less without these neighbours, over all genes. More, less: "
        f"{_sure(comparison)}, and the change is not within the margin of {comparison.margin:g}. All are in "
        "tables/sender_differences.csv."
    )
    return section("senders", "Who talks to whom", table(header, rows, caption))


def plot_sender_differences(comparison: HeadComparison, pair: int = 0, *, ax: Axes | None = None) -> Axes:
    """Draw what changed in who talks to whom as a forest plot, the largest changes first.

    Parameters
    ----------
    comparison
        What to show.
    pair
        Which of ``comparison.senders``.
    ax
        Axes to draw into; ``None`` makes a new pyplot figure.

    Returns
    -------
    Axes
        A row a matched head, type of sender and type of receiver, coloured by verdict.
    """
    found = comparison.senders[pair]
    places = largest(found.difference)
    ax = new_axes(forest_size(len(places))) if ax is None else ax
    verdicts = np.array(found.verdict, dtype=object).reshape(found.difference.shape)
    rows = [
        ForestRow(
            name=f"{drawn_label(found.senders[place[2]], longest=22)} → "
            f"{drawn_label(found.cell_types[place[1]], longest=22)}, "
            f"head {found.head_before[place[0]]} → {found.head_after[place[0]]}",
            value=float(found.difference[place]),
            low=float(found.low[place]),
            high=float(found.high[place]),
            verdict=str(verdicts[place]),
        )
        for place in places
    ]
    draw_forest(
        rows, ax, margin=comparison.margin, label="Difference of explained variance lost", verdicts=found.verdict
    )
    before, after = (drawn_label(comparison.labels[at], longest=24) for at in (found.before, found.after))
    ax.set_title(literal(f"Who talks to whom: {after} against {before}"), loc="left", fontsize=12)
    n_all = int(np.count_nonzero(~np.isnan(found.difference)))
    add_caption(
        ax,
        f"What heads explain less without a type of sender. Lines: {100 * comparison.confidence:g} % intervals over "
        f"tiles of tissue. Shaded: within the margin of {comparison.margin:g}.",
        f"The {len(rows)} largest of {n_all:,} differences." if len(rows) < n_all else "",
    )
    return ax


def sender_differences_size(comparison: HeadComparison, pair: int) -> tuple[float, float]:
    """Return width and height of the figure in inches."""
    return forest_size(len(largest(comparison.senders[pair].difference)))


def counted_changes(frame: pd.DataFrame) -> str:
    """Return how many changes came out how; pairs of types without a value are counted apart."""
    known = frame[frame["difference"].notna()]
    counted = known["verdict"].value_counts()
    words = [f"{counted[word]:,} {word}" for word in ("more", "less", "same", "undecided") if word in counted]
    n_none = len(frame) - len(known)
    return ", ".join([*words, *([f"{n_none:,} without such neighbours or a value"] if n_none else [])])


def few_tiles(comparison: HeadComparison) -> str:
    """Return a warning if so few tiles of tissue are compared that hardly any change can be significant."""
    if comparison.kind == "datasets":
        return ""
    n_tiles = max((int(one.n_tiles.max(initial=0)) for one in comparison.differences), default=0)
    tests = [one.p_value for one in comparison.differences] + [one.p_value for one in comparison.senders]
    n_tests = max((int(np.count_nonzero(~np.isnan(p))) for p in tests), default=0)
    least = 2.0 ** (1 - n_tiles)
    if not n_tests or least * n_tests <= comparison.alpha:
        return ""
    return (
        f"Cells lie in at most {n_tiles} tiles of tissue, so that no p is below {p_text(least)}, and over {n_tests:,} "
        "tests a single change can hardly be significant: read the intervals."
    )


def _sure(comparison: HeadComparison) -> str:
    if comparison.kind == "datasets":
        return "the interval of the difference of two independent intervals says so"
    return "p (signs of tiles flipped, adjusted over all matched heads x receivers x senders) and interval both say so"


def _distance(value: float) -> str:
    return "–" if np.isnan(value) else rounded(value)


_MOST_VERSIONS_SHOWN = 20


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
    image = ax.imshow(match.similarity, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
    image.set_gid("similarity")
    for head in range(n_before):
        for other in range(n_after):
            value = match.similarity[head, other]
            shown = "–" if np.isnan(value) else f"{value:.2f}"
            colour = "white" if abs(value) > 0.6 else INK
            ax.text(other, head, shown, ha="center", va="center", fontsize=7, color=colour)
    for head, partner in enumerate(match.partner.tolist()):
        if partner >= 0:
            frame = Rectangle((partner - 0.5, head - 0.5), 1, 1, fill=False, edgecolor=INK, linewidth=1.8, gid="match")
            ax.add_patch(frame)
    ax.set_xticks(range(n_after), [str(head) for head in range(n_after)])
    ax.set_yticks(range(n_before), [str(head) for head in range(n_before)])
    ax.set_xlabel(literal(f"Head of {drawn_label(comparison.labels[match.after])}"), fontsize=9)
    ax.set_ylabel(literal(f"Head of {drawn_label(comparison.labels[match.before])}"), fontsize=9)
    ax.set_title("How alike heads are", loc="left", fontsize=12)
    ax.figure.colorbar(image, ax=ax, label="Similarity", shrink=0.8)
    add_caption(
        ax,
        "Similarity: correlation of what heads, kept alone, contribute to predictions, over cells and genes. "
        f"Framed: matched, which takes more than {comparison.unmatched:g}.",
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
    places = largest(found.difference)
    ax = new_axes(forest_size(len(places))) if ax is None else ax
    rows = []
    for index, at in places:
        whole = int(found.head_before[index]) < 0
        who = "all heads" if whole else f"head {found.head_before[index]} → {found.head_after[index]}"
        rows.append(
            ForestRow(
                name=f"{drawn_label(found.cell_types[at], longest=30)}, {who}",
                value=float(found.difference[index, at]),
                low=float(found.low[index, at]),
                high=float(found.high[index, at]),
                verdict=found.verdict_of(index, at),
                marker="D" if whole else "o",
            )
        )
    draw_forest(rows, ax, margin=comparison.margin, label="Difference of explained variance", verdicts=found.verdict)
    before, after = (drawn_label(comparison.labels[at], longest=24) for at in (found.before, found.after))
    ax.set_title(literal(f"{after} against {before}"), loc="left", fontsize=12)
    n_all = int(np.count_nonzero(~np.isnan(found.difference)))
    add_caption(
        ax,
        f"Lines: {100 * comparison.confidence:g} % intervals over tiles of tissue. Shaded: within the margin of "
        f"{comparison.margin:g}, too small to matter.",
        f"The {len(rows)} largest of {n_all} differences." if len(rows) < n_all else "",
    )
    return ax


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
    types = comparison.cell_types
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
    ax.axhline(0.0, color=MUTED, linewidth=0.8)
    labels = [literal(drawn_label(label, longest=24)) for label in comparison.labels]
    ax.set_xticks(range(len(labels)), labels, rotation=0 if len(labels) < 6 else 45, fontsize=8)
    ax.set_xlim(-0.4, len(labels) - 0.6)
    ax.set_ylabel("Explained variance, all heads", fontsize=9)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_title("Explained variance by version", loc="left", fontsize=12)
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=7, ncols=math.ceil(len(types) / 24))
    add_caption(ax, f"Lines up and down: {100 * comparison.confidence:g} % intervals over tiles of tissue.")
    return ax


def save_comparison_figures(
    comparison: HeadComparison, directory: str | Path, *, formats: Sequence[str] = FORMATS
) -> tuple[Path, ...]:
    """Write all figures of a comparison into a folder and return the files."""
    return save_drawings(_drawings(comparison), directory, formats=formats)


def _drawings(comparison: HeadComparison) -> Iterator[Drawing]:
    yield "versions", _versions_size(comparison), lambda ax: plot_versions(comparison, ax=ax)
    if comparison.kind == "versions":
        yield "lineage", _lineage_size(comparison), lambda ax: plot_lineage(comparison, ax=ax)
    for pair in range(min(len(comparison.matches), _MOST_VERSIONS_SHOWN)):
        draw = partial(_draw_similarity, comparison, pair)
        yield f"similarity_{pair + 1}", _similarity_size(comparison, pair), draw
    for pair in range(min(len(comparison.differences), _MOST_VERSIONS_SHOWN)):
        n_rows = len(largest(comparison.differences[pair].difference))
        if n_rows:
            draw = partial(_draw_differences, comparison, pair)
            yield f"differences_{pair + 1}", forest_size(n_rows), draw
    for pair in range(min(len(comparison.senders), _MOST_VERSIONS_SHOWN)):
        draw = partial(_draw_sender_differences, comparison, pair)
        yield f"senders_{pair + 1}", sender_differences_size(comparison, pair), draw


def _draw_similarity(comparison: HeadComparison, pair: int, ax: Axes) -> Axes:
    return plot_similarity(comparison, pair, ax=ax)


def _draw_differences(comparison: HeadComparison, pair: int, ax: Axes) -> Axes:
    return plot_differences(comparison, pair, ax=ax)


def _draw_sender_differences(comparison: HeadComparison, pair: int, ax: Axes) -> Axes:
    return plot_sender_differences(comparison, pair, ax=ax)


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
