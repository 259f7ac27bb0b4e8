"""What changed in who talks to whom, as a section of the page of a comparison and as a figure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from amici_eval.report.figures.drawing import add_caption, drawn_label, literal, new_axes
from amici_eval.report.figures.forest import ForestRow, draw_forest, forest_size, largest
from amici_eval.report.markup import cell, row, section, table
from amici_eval.report.sentences import effect, interval, p_text, rounded

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from amici_eval.results.comparison import HeadComparison

__all__ = [
    "counted_changes",
    "few_tiles",
    "plot_sender_differences",
    "sender_changes_section",
    "sender_differences_size",
]

_MOST_ROWS = 30


def sender_changes_section(comparison: HeadComparison) -> str:
    """Return the changes that are sure, the largest first; nothing if senders were not computed."""
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
