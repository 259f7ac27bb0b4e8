"""The page of a comparison: the values of its sections; headings, captions and order are in the template."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from amici_eval.common.text import printable
from amici_eval.report.comparison_sentences import comparison_sentences, counted_changes, few_tiles
from amici_eval.report.numbers import interval
from amici_eval.report.page.rendering import write_page

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import pandas as pd

    from amici_eval.results.comparison import HeadComparison, HeadDifferences, HeadMatches, SenderDifferences

    Record = dict[str, Any]

_MOST_ROWS = 30


def write_comparison_html(
    comparison: HeadComparison,
    directory: str | Path,
    *,
    figures: Mapping[str, Path] | None = None,
    first: str = "",
) -> Path:
    """Write ``directory/report.html``, one self-contained file, and return it; ``first`` is a section as markup."""
    what = "versions" if comparison.kind == "versions" else "data sets"
    return write_page(
        directory,
        "comparison.html.jinja",
        title=f"Attention heads across {what}: {', '.join(map(printable, comparison.labels))}",
        comparison=comparison,
        first=first,
        sentences=comparison_sentences(comparison),
        versions=_versions(comparison),
        matches=_matches(comparison),
        no_p_because=sorted({match.reason for match in comparison.matches if match.reason}),
        lineages=_lineages(comparison),
        differences=_with_intervals(comparison.differences_frame()),
        genes=_genes(comparison),
        senders=_senders(comparison),
        figures=figures or {},
        figure_captions={name: _caption(comparison, name) for name in figures or {}},
    )


def _versions(comparison: HeadComparison) -> list[Record]:
    rows = []
    for version in comparison.versions:
        known = version.full[~np.isnan(version.full)]
        significant = f"{version.n_significant} of {int(np.count_nonzero(~np.isnan(version.p_value_adj)))}"
        rows.append(
            {
                "label": version.label,
                "n_heads": version.n_heads,
                "n_types": len(version.cell_types),
                "n_cells": int(version.n_cells.sum()),
                "significant": f"{significant} ({version.decided_by} null)",
                "median": float(np.median(known)) if known.size else np.nan,
                "run_id": version.run_id or "",
                "evaluated": "before" if version.reused else "for this comparison",
            }
        )
    return rows


def _matches(comparison: HeadComparison) -> list[Record]:
    """Return a row a head of the earlier version, and a row a new head of the later one."""
    if not comparison.matches:
        return []
    rows: list[Record] = comparison.matches_frame().to_dict("records")  # type: ignore[assignment]
    for row in rows:
        is_new, is_matched = row["status"] == "new", row["status"] == "matched"
        row["head"] = "" if is_new else str(int(row["head_before"]))
        row["head_there"] = str(int(row["head_after"])) if is_new or is_matched else "gone"
        row["head_there"] += " (new)" if is_new else ""
    return rows


def _lineages(comparison: HeadComparison) -> list[Record]:
    return [
        {"heads": ["–" if head is None else str(head) for head in one.heads], "stability": one.stability}
        for one in comparison.lineages
        if comparison.kind != "datasets"
    ]


def _with_intervals(frame: pd.DataFrame) -> list[Record]:
    rows: list[Record] = frame.to_dict("records")  # type: ignore[assignment]
    return [{**row, "interval": interval(row["ci_low"], row["ci_high"])} for row in rows]


def _genes(comparison: HeadComparison) -> Record | None:
    """Return the largest significant changes of single genes; nothing where genes were not compared."""
    frame = comparison.gene_differences_frame()
    if not len(frame):
        return None
    found = frame[frame["p_value_adj_gene"] <= comparison.alpha]
    order = found["difference_gene"].abs().sort_values(ascending=False).index[:_MOST_ROWS]
    return {"rows": found.loc[order].to_dict("records"), "n_significant": len(found)}


def _senders(comparison: HeadComparison) -> Record | None:
    """Return the changes of senders that are sure, the largest first; nothing if none were computed."""
    if not comparison.senders:
        return None
    frame = comparison.senders_frame()
    sure = frame[frame["verdict"].isin(["more", "less"])]
    order = sure["difference"].abs().sort_values(ascending=False, kind="stable").index[:_MOST_ROWS]
    return {
        "rows": _with_intervals(sure.loc[order]),
        "n_sure": len(sure),
        "counted": counted_changes(frame),
        "few_tiles": few_tiles(comparison),
    }


def _caption(comparison: HeadComparison, name: str) -> str:
    """Return what a figure shows, in words."""
    kind, _, number = name.partition("_")
    of_pairs: Mapping[str, Sequence[HeadMatches | HeadDifferences | SenderDifferences]] = {
        "similarity": comparison.matches,
        "differences": comparison.differences,
        "senders": comparison.senders,
    }
    if kind in of_pairs and number.isdigit() and 0 < int(number) <= len(of_pairs[kind]):
        pair = of_pairs[kind][int(number) - 1]
        before, after = printable(comparison.labels[pair.before]), printable(comparison.labels[pair.after])
        if kind == "similarity":
            return f"How alike the heads of {before} (rows) and {after} (columns) are; matched heads are framed."
        if kind == "senders":
            return f"Differences of what heads lose without a type of sender, {after} against {before}, with intervals."
        return f"Differences of explained variance, {after} against {before}, with intervals, the largest first."
    return {
        "lineage": "Which head became which, version after version.",
        "versions": "Explained variance of all heads together by version, a line a cell type.",
    }.get(name, name)
