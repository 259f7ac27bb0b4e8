"""An evaluation as data frames; HeadEvaluation offers each as a method."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from amici_eval.ablation_results import SHAPLEY_MODES

if TYPE_CHECKING:
    import pandas as pd
    from jaxtyping import Float64

    from amici_eval.results import HeadEvaluation

__all__ = [
    "ABLATION_COLUMNS",
    "GENE_COLUMNS",
    "HEAD_COLUMNS",
    "INTERACTION_COLUMNS",
    "ablations_frame",
    "baselines_frame",
    "genes_frame",
    "heads_frame",
    "interactions_frame",
]

GENE_COLUMNS = (
    "head",
    "ct_name",
    "gene",
    "expl_var_head_gene",
    "expl_var_head",
    "p_value_head",
    "p_value_adj_head",
    "p_value_gene",
    "p_value_adj_gene",
    "undefined_reason",
)
HEAD_COLUMNS = (
    "head",
    "ct_name",
    "n_cells",
    "expl_var_head",
    "ci_low",
    "ci_high",
    "best_gene",
    "expl_var_best_gene",
    "p_value_head",
    "p_value_adj_head",
    "p_ci_low",
    "p_ci_high",
    "p_value_spatial",
    "p_value_adj_spatial",
    "ess",
    "null",
    "method",
    "significant_free",
    "significant",
    "significant_by",
    "held_out",
    "undefined_reason",
)
ABLATION_COLUMNS = ("head", "ct_name", "mode", "expl_var", "delta_full")
INTERACTION_COLUMNS = ("head_a", "head_b", "ct_name", "interaction", "interaction_frozen_norm")

# in words of the method column: independent permutations are plain Monte Carlo
_METHODS = {"independent": "monte_carlo", "cyclic": "cyclic", "": None}


def genes_frame(evaluation: HeadEvaluation) -> pd.DataFrame:
    """Return a row per head x type x gene; see :meth:`HeadEvaluation.to_frame`."""
    import pandas as pd

    n_heads, n_types, n_genes = evaluation.n_heads, len(evaluation.cell_types), len(evaluation.genes)
    rows = n_heads * n_types * n_genes

    def per_head(values: Float64[np.ndarray, "heads types"]) -> np.ndarray:
        return np.repeat(values.ravel(), n_genes)

    whole = [u for u in evaluation.undefined if u.gene is None]
    by_type = {u.cell_type: u.reason for u in whole if u.head is None}
    by_head = {(u.head, u.cell_type): u.reason for u in whole if u.head is not None}
    by_gene = {(u.cell_type, u.gene): u.reason for u in evaluation.undefined if u.gene is not None}
    reasons = [
        "; ".join(filter(None, (by_gene.get((t, g)), by_type.get(t), by_head.get((h, t)))))
        for h in range(n_heads)
        for t in evaluation.cell_types
        for g in evaluation.genes
    ]
    return pd.DataFrame(
        {
            "head": np.repeat(np.arange(n_heads), n_types * n_genes),
            "ct_name": np.tile(np.repeat(np.array(evaluation.cell_types, dtype=object), n_genes), n_heads),
            "gene": np.tile(np.array(evaluation.genes, dtype=object), n_heads * n_types),
            "expl_var_head_gene": evaluation.expl_var_gene.ravel(),
            "expl_var_head": per_head(evaluation.expl_var),
            "p_value_head": per_head(evaluation.p_value),
            "p_value_adj_head": per_head(evaluation.p_value_adj),
            "p_value_gene": np.full(rows, np.nan),
            "p_value_adj_gene": np.full(rows, np.nan),
            "undefined_reason": reasons,
        },
        columns=list(GENE_COLUMNS),
    )


def heads_frame(evaluation: HeadEvaluation) -> pd.DataFrame:
    """Return a row per head x type; see :meth:`HeadEvaluation.heads`."""
    import pandas as pd

    reasons: dict[tuple[int, str], list[str]] = {}
    for item in evaluation.undefined:
        if item.gene is None:
            for head in range(evaluation.n_heads) if item.head is None else (item.head,):
                reasons.setdefault((head, item.cell_type), []).append(item.reason)
    settings = evaluation.spec.permutation
    rows: list[dict[str, Any]] = []
    for head in range(evaluation.n_heads):
        for index, cell_type in enumerate(evaluation.cell_types):
            genes = evaluation.expl_var_gene[head, index]
            best = None if np.all(np.isnan(genes)) else int(np.nanargmax(genes))
            adjusted = float(evaluation.p_value_adj[head, index])
            significant = None if math.isnan(adjusted) else adjusted <= settings.alpha
            rows.append(
                {
                    "head": head,
                    "ct_name": cell_type,
                    "n_cells": int(evaluation.n_cells[index]),
                    "expl_var_head": float(evaluation.expl_var[head, index]),
                    "best_gene": None if best is None else evaluation.genes[best],
                    "expl_var_best_gene": math.nan if best is None else float(genes[best]),
                    "p_value_head": float(evaluation.p_value[head, index]),
                    "p_value_adj_head": adjusted,
                    "p_ci_low": float(evaluation.p_ci_low[head, index]),
                    "p_ci_high": float(evaluation.p_ci_high[head, index]),
                    "null": settings.null,
                    "method": _METHODS[evaluation.sampling[index]] if evaluation.sampling else settings.method,
                    "significant_free": significant,
                    "significant": significant,
                    "significant_by": None if significant is None else settings.null,
                    "held_out": evaluation.held_out[index],
                    "undefined_reason": "; ".join(reasons.get((head, cell_type), [])),
                }
            )
    frame = pd.DataFrame(rows, columns=list(HEAD_COLUMNS))
    for name in ("significant_free", "significant", "held_out"):
        frame[name] = frame[name].astype("boolean")
    return frame


def baselines_frame(evaluation: HeadEvaluation) -> pd.DataFrame:
    """Return a row per type and baseline; see :meth:`HeadEvaluation.baselines`."""
    import pandas as pd

    rows = [
        {"ct_name": cell_type, "baseline": baseline, "expl_var": float(values[index])}
        for index, cell_type in enumerate(evaluation.cell_types)
        for baseline, values in (
            ("full_model", evaluation.expl_var_full),
            ("no_head", evaluation.expl_var_none),
        )
    ]
    return pd.DataFrame(rows, columns=["ct_name", "baseline", "expl_var"])


def ablations_frame(evaluation: HeadEvaluation) -> pd.DataFrame:
    """Return a row per head x type x mode; see :meth:`HeadEvaluation.ablations_frame`."""
    import pandas as pd

    found = evaluation.ablations
    modes = found.modes if found is not None else ()
    values = np.zeros((0, evaluation.n_heads, len(evaluation.cell_types))) if found is None else found.expl_var
    # a Shapley value is a share, not the explained variance of a model: there is nothing to take it from
    is_share = np.array([mode in SHAPLEY_MODES for mode in modes], dtype=bool)
    delta = np.where(is_share[:, None, None], np.nan, evaluation.expl_var_full - values)
    mode, head, index = (positions.transpose(1, 2, 0).ravel() for positions in np.indices(values.shape))
    return pd.DataFrame(
        {
            "head": head,
            "ct_name": np.array(evaluation.cell_types, dtype=object)[index],
            "mode": np.array(modes, dtype=object)[mode],
            "expl_var": values.transpose(1, 2, 0).ravel(),
            "delta_full": delta.transpose(1, 2, 0).ravel(),
        },
        columns=list(ABLATION_COLUMNS),
    )


def interactions_frame(evaluation: HeadEvaluation) -> pd.DataFrame:
    """Return a row per pair of heads and type; see :meth:`HeadEvaluation.interactions_frame`."""
    import pandas as pd

    found = evaluation.ablations
    n_heads = evaluation.n_heads if found is not None else 0
    n_types = len(evaluation.cell_types)
    first, second = np.triu_indices(n_heads, k=1)
    empty = np.zeros((n_types, n_heads, n_heads))
    real, frozen = (empty, empty) if found is None else (found.interaction, found.frozen_interaction)
    return pd.DataFrame(
        {
            "head_a": np.repeat(first, n_types),
            "head_b": np.repeat(second, n_types),
            "ct_name": np.tile(np.array(evaluation.cell_types, dtype=object), len(first)),
            "interaction": real[:, first, second].T.ravel(),
            "interaction_frozen_norm": frozen[:, first, second].T.ravel(),
        },
        columns=list(INTERACTION_COLUMNS),
    )
