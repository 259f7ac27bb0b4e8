"""The tables of a comparison."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from amici_eval.results.comparison import HeadComparison, HeadDifferences

MATCH_COLUMNS = (
    "version_before",
    "version_after",
    "head_before",
    "head_after",
    "similarity",
    "p_value",
    "p_value_spatial",
    "cka",
    "attention_divergence",
    "profile_cosine",
    "status",
    "lineage",
)
DIFFERENCE_COLUMNS = (
    "version_before",
    "version_after",
    "head_before",
    "head_after",
    "ct_name",
    "expl_var_before",
    "expl_var_after",
    "difference",
    "ci_low",
    "ci_high",
    "p_value",
    "p_value_adj",
    "p_value_equivalence",
    "p_value_not_worse",
    "verdict",
    "n_tiles",
    "undefined_reason",
)
GENE_COLUMNS = (
    "version_before",
    "version_after",
    "head_before",
    "head_after",
    "ct_name",
    "gene",
    "difference_gene",
    "p_value_gene",
    "p_value_adj_gene",
)
SENDER_DIFFERENCE_COLUMNS = (
    "version_before",
    "version_after",
    "head_before",
    "head_after",
    "ct_name",
    "sender",
    "attention_before",
    "attention_after",
    "expl_var_lost_before",
    "expl_var_lost_after",
    "difference",
    "ci_low",
    "ci_high",
    "p_value",
    "p_value_adj",
    "p_value_equivalence",
    "verdict",
    "distance_tenth_before",
    "distance_tenth_after",
    "undefined_reason",
)
VERSION_COLUMNS = (
    "version",
    "head",
    "ct_name",
    "n_cells",
    "expl_var",
    "ci_low",
    "ci_high",
    "p_value_adj",
    "significant",
    "held_out",
    "lineage",
    "stability",
    "run_id",
)


def matches_frame(comparison: HeadComparison) -> pd.DataFrame:
    """See :meth:`HeadComparison.matches_frame`."""
    rows: list[dict[str, Any]] = []
    lineage = _lineage_of(comparison)
    for match in comparison.matches:
        before, after = comparison.labels[match.before], comparison.labels[match.after]
        for head, partner in enumerate(match.partner.tolist()):
            found = partner >= 0
            rows.append(
                {
                    "version_before": before,
                    "version_after": after,
                    "head_before": head,
                    "head_after": partner if found else None,
                    "similarity": match.similarity[head, partner] if found else np.nan,
                    "p_value": match.p_value[head],
                    "p_value_spatial": match.p_value_spatial[head],
                    "cka": match.cka[head, partner] if found else np.nan,
                    "attention_divergence": match.divergence[head, partner] if found else np.nan,
                    "profile_cosine": match.profile_cosine[head, partner] if found else np.nan,
                    "status": "matched" if found else "gone",
                    "lineage": lineage.get((match.before, head)),
                }
            )
        rows += [
            {
                "version_before": before,
                "version_after": after,
                "head_after": head,
                "status": "new",
                "lineage": lineage.get((match.after, head)),
            }
            for head in match.new
        ]
    frame = pd.DataFrame(rows, columns=list(MATCH_COLUMNS))
    return frame.astype({"head_before": "Int64", "head_after": "Int64", "lineage": "Int64"})


def differences_frame(comparison: HeadComparison) -> pd.DataFrame:
    """See :meth:`HeadComparison.differences_frame`."""
    rows = []
    for found in comparison.differences:
        reasons = dict(found.reasons)
        for index in range(len(found.head_before)):
            for at, cell_type in enumerate(found.cell_types):
                rows.append(  # noqa: PERF401, RUF100 - a comprehension of three levels reads worse
                    {
                        **_named(comparison, found, index),
                        "ct_name": cell_type,
                        "expl_var_before": _value(comparison, found.before, found.head_before[index], cell_type),
                        "expl_var_after": _value(comparison, found.after, found.head_after[index], cell_type),
                        "difference": found.difference[index, at],
                        "ci_low": found.low[index, at],
                        "ci_high": found.high[index, at],
                        "p_value": found.p_value[index, at],
                        "p_value_adj": found.p_value_adj[index, at],
                        "p_value_equivalence": found.p_value_equivalence[index, at],
                        "p_value_not_worse": found.p_value_not_worse[index, at],
                        "verdict": found.verdict_of(index, at),
                        "n_tiles": int(found.n_tiles[at]),
                        "undefined_reason": reasons.get(cell_type, ""),
                    }
                )
    return pd.DataFrame(rows, columns=list(DIFFERENCE_COLUMNS))


def gene_differences_frame(comparison: HeadComparison) -> pd.DataFrame:
    """See :meth:`HeadComparison.gene_differences_frame`."""
    parts = []
    for found in comparison.differences:
        if found.difference_gene is None or found.p_value_gene is None or found.p_value_adj_gene is None:
            continue
        n_pairs, n_types, n_genes = found.difference_gene.shape
        names = pd.DataFrame([_named(comparison, found, index) for index in range(n_pairs)])
        part = names.loc[names.index.repeat(n_types * n_genes)].reset_index(drop=True)
        part["ct_name"] = np.tile(np.repeat(np.array(found.cell_types, dtype=object), n_genes), n_pairs)
        part["gene"] = np.tile(np.array(found.genes, dtype=object), n_pairs * n_types)
        for name in found.apart:
            part[name] = getattr(found, name).ravel()
        parts.append(part)
    if not parts:
        return pd.DataFrame(columns=list(GENE_COLUMNS))
    return pd.concat(parts, ignore_index=True)[list(GENE_COLUMNS)]


def sender_differences_frame(comparison: HeadComparison) -> pd.DataFrame:
    """See :meth:`HeadComparison.senders_frame`."""
    labels = comparison.labels
    parts = []
    for one in comparison.senders:
        head, receiver, sender = (places.ravel() for places in np.indices(one.difference.shape))
        reasons = np.array(
            [[one.reason(name, other) for other in one.senders] for name in one.cell_types], dtype=object
        ).reshape(len(one.cell_types), len(one.senders))
        missing = np.isnan(np.stack([one.difference, one.low, one.p_value])).any(axis=0).ravel()
        part = pd.DataFrame(
            {
                "version_before": labels[one.before],
                "version_after": labels[one.after],
                "head_before": one.head_before[head],
                "head_after": one.head_after[head],
                "ct_name": np.array(one.cell_types, dtype=object)[receiver],
                "sender": np.array(one.senders, dtype=object)[sender],
                "attention_before": one.attention_before.ravel(),
                "attention_after": one.attention_after.ravel(),
                "expl_var_lost_before": one.lost_before.ravel(),
                "expl_var_lost_after": one.lost_after.ravel(),
                "difference": one.difference.ravel(),
                "ci_low": one.low.ravel(),
                "ci_high": one.high.ravel(),
                "p_value": one.p_value.ravel(),
                "p_value_adj": one.p_value_adj.ravel(),
                "p_value_equivalence": one.p_value_equivalence.ravel(),
                "verdict": np.array(one.verdict, dtype=object),
                "distance_tenth_before": one.distance_before.ravel(),
                "distance_tenth_after": one.distance_after.ravel(),
                "undefined_reason": np.where(missing, reasons[receiver, sender], ""),
            },
            columns=list(SENDER_DIFFERENCE_COLUMNS),
        )
        parts.append(part)
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=list(SENDER_DIFFERENCE_COLUMNS))


def versions_frame(comparison: HeadComparison) -> pd.DataFrame:
    """See :meth:`HeadComparison.versions_frame`."""
    rows: list[dict[str, Any]] = []
    lineage = _lineage_of(comparison)
    for position, version in enumerate(comparison.versions):
        for at, cell_type in enumerate(version.cell_types):
            shared = {
                "version": version.label,
                "ct_name": cell_type,
                "n_cells": int(version.n_cells[at]),
                "held_out": version.held_out[at],
                "run_id": version.run_id,
            }
            for head in range(version.n_heads):
                own = lineage.get((position, head))
                rows.append(
                    {
                        **shared,
                        "head": str(head),
                        "expl_var": version.expl_var[head, at],
                        "ci_low": version.low[head, at],
                        "ci_high": version.high[head, at],
                        "p_value_adj": version.p_value_adj[head, at],
                        "significant": bool(version.p_value_adj[head, at] <= version.alpha),
                        "lineage": own,
                        "stability": np.nan if own is None else comparison.lineages[own].stability,
                    }
                )
            whole = {"expl_var": version.full[at], "ci_low": version.full_low[at], "ci_high": version.full_high[at]}
            rows.append({**shared, "head": "full", **whole})
    return pd.DataFrame(rows, columns=list(VERSION_COLUMNS)).astype({"lineage": "Int64", "significant": "boolean"})


def _lineage_of(comparison: HeadComparison) -> dict[tuple[int, int], int]:
    """Return the number of the lineage of each (version, head)."""
    return {
        (position, head): number
        for number, lineage in enumerate(comparison.lineages)
        for position, head in enumerate(lineage.heads)
        if head is not None
    }


def _named(comparison: HeadComparison, found: HeadDifferences, index: int) -> dict[str, Any]:
    def shown(head: int) -> str:
        return "full" if head < 0 else str(head)

    return {
        "version_before": comparison.labels[found.before],
        "version_after": comparison.labels[found.after],
        "head_before": shown(int(found.head_before[index])),
        "head_after": shown(int(found.head_after[index])),
    }


def _value(comparison: HeadComparison, position: int, head: int, cell_type: str) -> float:
    version = comparison.versions[position]
    at = version.cell_types.index(cell_type)
    return float(version.full[at] if head < 0 else version.expl_var[head, at])
