"""The data frames of an evaluation; HeadEvaluation offers each as a method."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from amici_eval.results.analyses import SHAPLEY_MODES

if TYPE_CHECKING:
    import pandas as pd
    from jaxtyping import Bool, Float64

    from amici_eval.results.analyses import Senders
    from amici_eval.results.evaluation import HeadEvaluation

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
    "statistic_spatial",
    "detectable_expl_var",
    "correlation_length",
    "reach",
    "gain",
    "expl_var_without_nearest",
    "n_tiles",
)
HELD_OUT_COLUMNS = (
    "head",
    "ct_name",
    "n_cells_in_sample",
    "expl_var_in_sample",
    "ci_low_in_sample",
    "ci_high_in_sample",
    "n_cells_held_out",
    "expl_var_held_out",
    "ci_low_held_out",
    "ci_high_held_out",
    "undefined_reason",
)
SCALE_COLUMNS = ("head", "ct_name", "tile_width", "p_value")
ABLATION_COLUMNS = ("head", "ct_name", "mode", "expl_var", "delta_full")
INTERACTION_COLUMNS = ("head_a", "head_b", "ct_name", "interaction", "interaction_frozen_norm")

# values of the method column: independent permutations are plain Monte Carlo
_METHODS = {"independent": "monte_carlo", "": None}
_NO_GENE_TEST = "no p of the gene: effective sample size below 5 under the lag null, or the prediction does not vary"


def genes_frame(evaluation: HeadEvaluation) -> pd.DataFrame:
    """Return a row per head x type x gene; see :meth:`HeadEvaluation.to_frame`."""
    import pandas as pd

    n_heads, n_types, n_genes = evaluation.n_heads, len(evaluation.cell_types), len(evaluation.genes)
    rows, found = n_heads * n_types * n_genes, evaluation.spatial
    nothing = np.full(rows, np.nan)

    def per_head(values: Float64[np.ndarray, "heads types"]) -> np.ndarray:
        return np.repeat(values.ravel(), n_genes)

    whole = [u for u in evaluation.undefined if u.gene is None]
    by_type = {u.cell_type: u.reason for u in whole if u.head is None}
    by_head = {(u.head, u.cell_type): u.reason for u in whole if u.head is not None}
    by_gene = {(u.cell_type, u.gene): u.reason for u in evaluation.undefined if u.gene is not None}
    untested = np.zeros(evaluation.expl_var_gene.shape, dtype=bool) if found is None else np.isnan(found.p_value_gene)
    reasons = [
        "; ".join(filter(None, (by_gene.get((t, g)), by_type.get(t), by_head.get((h, t)))))
        or (_NO_GENE_TEST if untested[h, c, i] else "")
        for h in range(n_heads)
        for c, t in enumerate(evaluation.cell_types)
        for i, g in enumerate(evaluation.genes)
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
            "p_value_gene": nothing if found is None else found.p_value_gene.ravel(),
            "p_value_adj_gene": nothing if found is None else found.p_value_adj_gene.ravel(),
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
    spatial, trivial, bounds = evaluation.spatial, evaluation.trivial, evaluation.intervals
    for head, cell_type, reason in () if spatial is None else spatial.reasons:
        for one in range(evaluation.n_heads) if head < 0 else (head,):
            reasons.setdefault((one, cell_type), []).append(f"{spatial.null} null: {reason}" if spatial else reason)
    for cell_type, reason in () if bounds is None else bounds.reasons:
        for head in range(evaluation.n_heads):
            reasons.setdefault((head, cell_type), []).append(f"interval: {reason}")
    settings = evaluation.spec.permutation
    rows: list[dict[str, Any]] = []
    for head in range(evaluation.n_heads):
        for index, cell_type in enumerate(evaluation.cell_types):
            at = (head, index)
            genes = evaluation.expl_var_gene[at]
            best = None if np.all(np.isnan(genes)) else int(np.nanargmax(genes))
            by_free, decided = float(evaluation.p_value_adj[at]), float(evaluation.adjusted[at])
            significant = None if math.isnan(decided) else decided <= settings.alpha
            drawn = evaluation.sampling[index] if evaluation.sampling else settings.method
            row = {
                "head": head,
                "ct_name": cell_type,
                "n_cells": int(evaluation.n_cells[index]),
                "expl_var_head": float(evaluation.expl_var[at]),
                "best_gene": None if best is None else evaluation.genes[best],
                "expl_var_best_gene": math.nan if best is None else float(genes[best]),
                "p_value_head": float(evaluation.p_value[at]),
                "p_value_adj_head": by_free,
                "p_ci_low": float(evaluation.p_ci_low[at]),
                "p_ci_high": float(evaluation.p_ci_high[at]),
                "null": evaluation.decided_by,
                "method": (spatial.method[index] or None) if spatial is not None else _METHODS.get(drawn, drawn),
                "significant_free": None if math.isnan(by_free) else by_free <= settings.alpha,
                "significant": significant,
                "significant_by": None if significant is None else evaluation.decided_by,
                "held_out": evaluation.held_out[index],
                "undefined_reason": "; ".join(reasons.get((head, cell_type), [])),
            }
            if bounds is not None:
                row |= {"ci_low": float(bounds.low[at]), "ci_high": float(bounds.high[at])}
                row["n_tiles"] = int(bounds.n_tiles[index])
            if spatial is not None:
                row |= {
                    "p_value_spatial": float(spatial.p_value[at]),
                    "p_value_adj_spatial": float(spatial.p_value_adj[at]),
                    "ess": float(spatial.ess[at]),
                    "statistic_spatial": float(spatial.statistic[at]),
                    "detectable_expl_var": float(spatial.detectable[at]),
                    "correlation_length": float(spatial.correlation_length[index]),
                    "reach": float(spatial.reach[index]),
                }
            if trivial is not None:
                row |= {
                    "gain": float(trivial.gain[at]),
                    "expl_var_without_nearest": float(trivial.without_nearest[at]),
                }
            rows.append(row)
    frame = pd.DataFrame(rows, columns=list(HEAD_COLUMNS))
    for name in ("significant_free", "significant", "held_out"):
        frame[name] = frame[name].astype("boolean")
    return frame


def baselines_frame(evaluation: HeadEvaluation) -> pd.DataFrame:
    """Return a row per type and baseline; see :meth:`HeadEvaluation.baselines`."""
    import pandas as pd

    found = evaluation.trivial
    values = {"full_model": evaluation.expl_var_full, "no_head": evaluation.expl_var_none}
    if found is not None:
        values |= dict(zip(found.names, found.expl_var, strict=True))
        values["full_model_without_nearest"] = found.full_without_nearest
    rows = [
        {"ct_name": cell_type, "baseline": baseline, "expl_var": float(of_types[index])}
        for index, cell_type in enumerate(evaluation.cell_types)
        for baseline, of_types in values.items()
    ]
    return pd.DataFrame(rows, columns=["ct_name", "baseline", "expl_var"])


def held_out_frame(evaluation: HeadEvaluation) -> pd.DataFrame:
    """Return a row per head x type; see :meth:`HeadEvaluation.held_out_frame`."""
    import pandas as pd

    found = evaluation.parts
    rows: list[dict[str, Any]] = []
    for head in (*range(evaluation.n_heads), "full") if found is not None else ():
        for index, cell_type in enumerate(evaluation.cell_types):
            row: dict[str, Any] = {"head": head, "ct_name": cell_type}
            reasons = []
            for part, name in enumerate(("in_sample", "held_out")):
                assert found is not None  # noqa: S101, RUF100 - there would be no rows
                value = found.full[part, index] if head == "full" else found.expl_var[part, head, index]
                row |= {f"n_cells_{name}": int(found.n_cells[part, index]), f"expl_var_{name}": float(value)}
                if head != "full":
                    row[f"ci_low_{name}"] = float(found.low[part, head, index])
                    row[f"ci_high_{name}"] = float(found.high[part, head, index])
                # a part without cells of any type was not asked for and needs no reason
                if math.isnan(value) and found.n_cells[part].any():
                    n_cells, where = int(found.n_cells[part, index]), name.replace("_", "-")
                    whole = evaluation.expl_var_full[index] if head == "full" else evaluation.expl_var[head, index]
                    if n_cells < 2:
                        reasons.append(f"{n_cells} cells {where}")
                    elif math.isnan(whole) and not math.isnan(evaluation.expl_var_none[index]):
                        reasons.append(f"predictions are not finite {where}")
                    else:
                        reasons.append(f"no gene varies {where}")
                elif head != "full" and found.n_cells[part].any() and math.isnan(found.low[part, head, index]):
                    reasons.append(f"no interval {name.replace('_', '-')}: cells in too few tiles")
            rows.append({**row, "undefined_reason": "; ".join(reasons)})
    return pd.DataFrame(rows, columns=list(HELD_OUT_COLUMNS))


def scales_frame(evaluation: HeadEvaluation) -> pd.DataFrame:
    """Return a row per head x type x tile width; see :meth:`HeadEvaluation.scales_frame`."""
    import pandas as pd

    found = evaluation.spatial
    rows = [
        {"head": head, "ct_name": cell_type, "tile_width": float(width), "p_value": float(p)}
        for head in range(evaluation.n_heads)
        for index, cell_type in enumerate(evaluation.cell_types)
        for width, p in (
            () if found is None else zip(found.widths[:, index], found.p_by_width[:, head, index], strict=True)
        )
        if not math.isnan(width)
    ]
    return pd.DataFrame(rows, columns=list(SCALE_COLUMNS))


def ablations_frame(evaluation: HeadEvaluation) -> pd.DataFrame:
    """Return a row per head x type x mode; see :meth:`HeadEvaluation.ablations_frame`."""
    import pandas as pd

    found = evaluation.ablations
    modes = found.modes if found is not None else ()
    values = np.zeros((0, evaluation.n_heads, len(evaluation.cell_types))) if found is None else found.expl_var
    # a Shapley value is a share, not the explained variance of a model, so delta_full is undefined
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
            # -1 indexes the last entry, which stands for no gene
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
