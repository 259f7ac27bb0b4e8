"""Who talks to whom as data frames; HeadEvaluation offers each as a method."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd
    from jaxtyping import Bool, Float64

    from amici_eval.results.evaluation import HeadEvaluation
    from amici_eval.results.senders import Senders

__all__ = ["SENDER_COLUMNS", "SENDER_GENE_COLUMNS", "sender_genes_frame", "senders_frame"]

SENDER_COLUMNS = (
    "head",
    "ct_name",
    "sender",
    "attention",
    "expl_var_lost",
    "ci_low",
    "ci_high",
    "p_value",
    "p_value_adj",
    "best_gene",
    "expl_var_lost_best_gene",
    "distance_tenth",
    "n_receivers",
    "undefined_reason",
)
SENDER_GENE_COLUMNS = (
    "head",
    "ct_name",
    "sender",
    "gene",
    "expl_var_lost",
    "ci_low",
    "ci_high",
    "p_value",
    "p_value_adj",
)


def senders_frame(evaluation: HeadEvaluation) -> pd.DataFrame:
    """Return a row per head x receiver type x sender type; see :meth:`HeadEvaluation.senders_frame`."""
    import pandas as pd

    found = evaluation.senders
    if found is None:
        return pd.DataFrame(columns=list(SENDER_COLUMNS))
    head, receiver, sender = (places.ravel() for places in np.indices(found.effect.shape))
    types, senders = (np.array(names, dtype=object) for names in (evaluation.cell_types, found.senders))
    genes = np.array([*evaluation.genes, None], dtype=object)
    of_pairs = [[found.reason(one, other) for other in found.senders] for one in evaluation.cell_types]
    reasons = np.array(of_pairs, dtype=object).reshape(found.n_receivers.shape)
    return pd.DataFrame(
        {
            "head": head,
            "ct_name": types[receiver],
            "sender": senders[sender],
            "attention": found.attention.ravel(),
            "expl_var_lost": found.effect.ravel(),
            "ci_low": found.low.ravel(),
            "ci_high": found.high.ravel(),
            "p_value": found.p_value.ravel(),
            "p_value_adj": found.p_value_adj.ravel(),
            # -1 is the last one: none
            "best_gene": genes[found.best_gene.ravel()],
            "expl_var_lost_best_gene": found.effect_best_gene.ravel(),
            "distance_tenth": found.distance.ravel(),
            "n_receivers": found.n_receivers[receiver, sender],
            "undefined_reason": _of_missing(found, reasons[receiver, sender]),
        },
        columns=list(SENDER_COLUMNS),
    )


def sender_genes_frame(evaluation: HeadEvaluation) -> pd.DataFrame:
    """Return a row per head x receiver type x sender type x gene; see :meth:`HeadEvaluation.sender_genes_frame`.

    Notes
    -----
    Pairs of types without any value, such as senders that no receiver has as a neighbour, have no rows.
    """
    import pandas as pd

    found = evaluation.senders
    if found is None or found.effect_gene is None:
        kinds = {name: "object" if name in ("ct_name", "sender", "gene") else "float64" for name in SENDER_GENE_COLUMNS}
        return pd.DataFrame({name: pd.Series(dtype=kind) for name, kind in kinds.items()}).astype({"head": "int64"})
    some: Bool[np.ndarray, "heads types senders"] = ~np.isnan(found.effect_gene).all(axis=3)
    head, receiver, sender = np.nonzero(some)
    n_genes = len(evaluation.genes)

    def of(values: Float64[np.ndarray, "heads types senders genes"] | None) -> np.ndarray:
        return np.full(len(head) * n_genes, np.nan) if values is None else values[some].ravel()

    return pd.DataFrame(
        {
            "head": np.repeat(head, n_genes),
            "ct_name": np.repeat(np.array(evaluation.cell_types, dtype=object)[receiver], n_genes),
            "sender": np.repeat(np.array(found.senders, dtype=object)[sender], n_genes),
            "gene": np.tile(np.array(evaluation.genes, dtype=object), len(head)),
            "expl_var_lost": of(found.effect_gene),
            "ci_low": of(found.low_gene),
            "ci_high": of(found.high_gene),
            "p_value": of(found.p_value_gene),
            "p_value_adj": of(found.p_value_adj_gene),
        },
        columns=list(SENDER_GENE_COLUMNS),
    )


def _of_missing(found: Senders, reasons: np.ndarray) -> np.ndarray:
    """Return the reasons of rows in which something is missing."""
    missing = np.isnan(np.stack([found.effect, found.low, found.p_value])).any(axis=0).ravel()
    return np.where(missing, reasons, "")
