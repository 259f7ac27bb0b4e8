"""The page of a comparison: which heads match, which are new or gone, and what got better or worse."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from amici_eval.common.text import printable
from amici_eval.report.comparison_sentences import comparison_sentences
from amici_eval.report.figures.comparison_figures import sender_changes_section
from amici_eval.report.figures.svg import inline_figure
from amici_eval.report.markup import cell, row, section, table, text
from amici_eval.report.page.frame import write_page
from amici_eval.report.sentences import effect, interval, made_folder, p_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from amici_eval.results.comparison import HeadComparison
    from amici_eval.results.matches import HeadDifferences, HeadMatches
    from amici_eval.results.senders import SenderDifferences

_MOST_GENES = 30
_HOW_TO_READ = (
    "Heads of a retrained model stand in another order. Two heads are the same if, kept alone, they contribute the "
    "same to the predictions of the same cells: similarity is the correlation of these contributions over cells and "
    "genes, within cell types, and the assignment with the largest sum is taken. Its p says how often matching makes "
    "unrelated heads so alike: with cells exchanged within types, and, as contributions are smooth in tissue, with the "
    "signs of whole blocks of tissue flipped; the second is the one to believe. Two untrained models of the same "
    "architecture are alike to some extent, because they read the same neighbourhoods (floor), and retrainings of one "
    "set-up are alike as far as training is stable: read a similarity beside both. A difference of explained variance "
    "is better or worse if its p (signs of tiles flipped, adjusted) and its interval (tiles drawn again) both say so, "
    "the same if it surely lies within the margin, else undecided."
)


def write_comparison_html(
    comparison: HeadComparison,
    directory: str | Path,
    *,
    figures: Mapping[str, Path] | None = None,
    first: str = "",
) -> Path:
    """Write ``directory/report.html``, one self-contained file, and return it."""
    what = "versions" if comparison.kind == "versions" else "data sets"
    title = f"Attention heads across {what}: {', '.join(map(printable, comparison.labels))}"
    lines = "".join(f"<li>{text(sentence)}</li>" for sentence in comparison_sentences(comparison))
    notes = "".join(f"<li>{text(printable(note))}</li>" for note in comparison.notes)
    body = "\n".join(
        [
            f"<h1>{text(title)}</h1>",
            first,
            section("summary", "Summary", f"<ul>{lines}</ul>{f'<h3>Notes</h3><ul>{notes}</ul>' if notes else ''}"),
            _versions(comparison),
            _matches(comparison),
            _lineages(comparison),
            _differences(comparison),
            _genes(comparison),
            sender_changes_section(comparison),
            _failed(comparison),
            _figures(comparison, figures or {}),
            section("read", "How to read this", f"<p>{text(_HOW_TO_READ)}</p>"),
        ]
    )
    return write_page(made_folder(directory) / "report.html", title=title, body=body)


def _versions(comparison: HeadComparison) -> str:
    header = ["Version", "Heads", "Cell types", "Cells", "Significant", "Median EV, all heads", "Run", "Evaluated"]
    rows = []
    for version in comparison.versions:
        known = version.full[~np.isnan(version.full)]
        significant = f"{version.n_significant} of {int(np.count_nonzero(~np.isnan(version.p_value_adj)))}"
        cells = [
            cell(version.n_heads),
            cell(len(version.cell_types)),
            cell(f"{int(version.n_cells.sum()):,}"),
            cell(f"{significant} ({version.decided_by} null)"),
            cell(effect(float(np.median(known))) if known.size else "undefined"),
            cell(version.run_id or "", words=True),
            cell("before" if version.reused else "for this comparison", words=True),
        ]
        rows.append(row(version.label, cells))
    caption = "What is compared. Significant: head x type pairs at the version's own level."
    return section(
        "versions", "Versions" if comparison.kind == "versions" else "Data sets", table(header, rows, caption)
    )


def _matches(comparison: HeadComparison) -> str:
    if not comparison.matches:
        return ""
    header = [
        "From",
        "Head",
        "To",
        "Head there",
        "Similarity",
        "p (tissue)",
        "p (cells)",
        "CKA",
        "Attention differs",
        "Genes",
    ]
    rows = []
    for entry in comparison.matches_frame().to_dict("records"):
        there = entry["status"] == "matched"
        after = "new" if entry["status"] == "new" else entry["head_after"] if there else "gone"
        cells = [
            cell("" if entry["status"] == "new" else int(entry["head_before"])),
            cell(entry["version_after"], words=True),
            cell(f"{int(entry['head_after'])} (new)" if after == "new" else int(after) if there else "gone"),
            cell(_two(entry["similarity"])),
            cell(_p(entry["p_value_spatial"])),
            cell(_p(entry["p_value"])),
            cell(_two(entry["cka"])),
            cell(_two(entry["attention_divergence"])),
            cell(_two(entry["profile_cosine"])),
        ]
        rows.append(row(entry["version_before"], cells))
    reasons = sorted({match.reason for match in comparison.matches if match.reason})
    caption = (
        "Heads of consecutive versions. p (tissue): that matching makes unrelated, smooth contributions so alike; p "
        "(cells): the same if cells were exchangeable. CKA: linear centred kernel alignment of what heads bring. "
        "Attention differs: mean Jensen-Shannon divergence, in bits, 0 (the same) to 1. Genes: cosine of explained "
        f"variance by gene. {' '.join(f'No p (tissue): {reason}.' for reason in reasons)}"
    )
    return section("matches", "Which head is which", table(header, rows, caption.strip()))


def _lineages(comparison: HeadComparison) -> str:
    if comparison.kind == "datasets":
        return ""
    header = ["Lineage", *comparison.labels, "Stability"]
    rows = [
        row(number, [*(cell("–" if head is None else head) for head in one.heads), cell(_two(one.stability))])
        for number, one in enumerate(comparison.lineages)
    ]
    caption = (
        "Heads through the versions. Stability: mean similarity over all pairs of versions, 0 for a pair where the "
        "head is missing."
    )
    return section("lineages", "Heads through the versions", table(header, rows, caption))


def _differences(comparison: HeadComparison) -> str:
    header = [
        "Type",
        "Head",
        "Head there",
        "From",
        "To",
        "EV before",
        "EV after",
        "Difference",
        "Interval",
        "Adjusted p",
        "Verdict",
    ]
    rows = []
    for entry in comparison.differences_frame().to_dict("records"):
        cells = [
            cell(entry["head_before"]),
            cell(entry["head_after"]),
            cell(entry["version_before"], words=True),
            cell(entry["version_after"], words=True),
            cell(effect(entry["expl_var_before"])),
            cell(effect(entry["expl_var_after"])),
            cell(effect(entry["difference"])),
            cell(interval(entry["ci_low"], entry["ci_high"])),
            cell(_p(entry["p_value_adj"])),
            cell(entry["verdict"], words=True),
        ]
        rows.append(row(entry["ct_name"], cells))
    caption = (
        "Explained variance of matched heads, kept alone, and of all heads together (full), by cell type. The verdict "
        f"takes p and interval together; same: within {comparison.margin:g} by two one-sided tests. Why values are "
        "missing: tables/head_differences.csv."
    )
    content = f"<details open><summary>{len(rows)} rows</summary>{table(header, rows, caption)}</details>"
    return section("differences", "What changed", content)


def _genes(comparison: HeadComparison) -> str:
    frame = comparison.gene_differences_frame()
    found = frame[frame["p_value_adj_gene"] <= comparison.alpha]
    if not len(frame):
        return ""
    order = found["difference_gene"].abs().sort_values(ascending=False).index[:_MOST_GENES]
    rows = [
        row(
            entry["gene"],
            [
                cell(entry["ct_name"], words=True),
                cell(entry["head_before"]),
                cell(entry["head_after"]),
                cell(entry["version_before"], words=True),
                cell(entry["version_after"], words=True),
                cell(effect(entry["difference_gene"])),
                cell(_p(entry["p_value_adj_gene"])),
            ],
        )
        for entry in found.loc[order].to_dict("records")
    ]
    if not rows:
        return section("genes", "Genes", "<p>No gene changed significantly.</p>")
    header = ["Gene", "Type", "Head", "Head there", "From", "To", "Difference", "Adjusted p"]
    caption = (
        f"The {len(rows)} largest of {len(found):,} significant changes of a single gene's explained variance "
        f"(adjusted p ≤ {comparison.alpha:g} over all matched heads x types x genes). All are in "
        "tables/gene_differences.parquet."
    )
    return section("genes", "Genes", table(header, rows, caption))


def _failed(comparison: HeadComparison) -> str:
    if not comparison.failed:
        return ""
    rows = [row(one.label, [cell(one.reason, words=True)]) for one in comparison.failed]
    return section(
        "failed", "Not evaluated", table(["Version", "Reason"], rows, "What could not be compared, and why.")
    )


def _figures(comparison: HeadComparison, figures: Mapping[str, Path]) -> str:
    parts = []
    for number, (name, path) in enumerate(figures.items()):
        says = _alternative(comparison, name)
        drawing = inline_figure(path, prefix=f"f{number}-", alt=says)
        parts.append(f"<figure>{drawing}<figcaption>{text(says)}</figcaption></figure>")
    return section("figures", "Figures", "".join(parts)) if parts else ""


def _alternative(comparison: HeadComparison, name: str) -> str:
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


def _two(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.2f}"


def _p(value: float) -> str:
    return "" if np.isnan(value) else p_text(value)
