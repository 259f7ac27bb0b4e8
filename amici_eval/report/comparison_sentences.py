"""What a comparison found, in sentences: for the page, the run's description and the console."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from amici_eval.common.text import printable
from amici_eval.report.numbers import effect, interval, p_text, span, two_decimals

if TYPE_CHECKING:
    import pandas as pd

    from amici_eval.results.comparison import HeadComparison

VERDICTS = ("better", "worse", "same", "undecided")


def comparison_sentences(comparison: HeadComparison) -> list[str]:
    """Return what the comparison found, a sentence each, the most important first."""
    labels = comparison.labels
    sentences = []
    if comparison.kind == "datasets":
        sentences.append(
            f"One model on {len(labels)} data sets: {', '.join(map(printable, labels))}. Cells differ, so differences "
            "are those of independent intervals."
        )
    for whole in comparison.overall:
        if comparison.kind == "datasets":
            break
        what = {
            "better": "explains more than",
            "worse": "explains less than",
            "same": "explains as much as",
            "undecided": "may explain more or less than",
        }[whole.verdict]
        between = interval(whole.low, whole.high)
        sentences.append(
            f"{printable(labels[whole.after])} {what} {printable(labels[whole.before])} "
            f"({whole.verdict}): explained variance of all cells differs by {effect(whole.difference)}"
            f"{f' ({between})' if between else ''}, margin {comparison.margin:g}."
        )
    for match in comparison.matches:
        n_matched = int(np.count_nonzero(match.partner >= 0))
        gone = len(match.partner) - n_matched
        sentences.append(
            f"{n_matched} of {len(match.partner)} heads of {printable(labels[match.before])} are heads of "
            f"{printable(labels[match.after])}"
            f"{f' (similarity {_range(match.matched)})' if n_matched else ''}; {gone} gone, {len(match.new)} new."
        )
    for found in comparison.differences:
        counted = ", ".join(f"{found.verdict.count(one)} {one}" for one in VERDICTS if one in found.verdict)
        sentences.append(
            f"{printable(labels[found.after])} against {printable(labels[found.before])}, matched heads and all heads "
            f"by cell type: {counted}."
        )
    if comparison.senders:
        sentences.append(f"Who talks to whom, matched heads: {counted_changes(comparison.senders_frame())}.")
    if few := few_tiles(comparison):
        sentences.append(few)
    if comparison.floor is not None and np.isfinite(comparison.floor).any():
        sentences.append(
            f"Two untrained models of the architecture have heads of similarity {_range(comparison.floor)} if matched."
        )
    if comparison.reseeded.size and np.isfinite(comparison.reseeded).any():
        if len(comparison.versions) == 2:
            told = "Both versions were trained by one set-up: their similarities are what a retraining alone changes."
        else:
            similar = _range(comparison.reseeded)
            told = (
                f"Versions trained by one set-up have heads of similarity {similar} if matched: so much a retraining "
            )
            told += "alone changes."
        sentences.append(told)
    where = {
        True: " Some version was fitted on some of these cells: what it explains there is optimistic (in-sample).",
        None: " It is not known for all versions which cells they were fitted on: read this as in-sample.",
        False: "",
    }[comparison.in_sample]
    sentences.append(f"Compared on {comparison.cells}.{where}")
    sentences += [f"{printable(one.label)} is left out: {printable(one.reason)}." for one in comparison.failed]
    return sentences


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


def _range(values: np.ndarray) -> str:
    return span(values, as_text=two_decimals)
