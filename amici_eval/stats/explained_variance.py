"""Explained variance of a prediction, per gene and over all genes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Float64

MIN_CELLS_EXPLAINED_VARIANCE = 2
"""A variance over cells needs two of them."""

_ROW_BLOCK = 4096


@dataclass(frozen=True)
class ExplainedVariance:
    """Explained variance of one prediction of one group of cells.

    ``per_gene`` is NaN for constant genes; ``aggregated`` is over all genes, NaN if none varies.
    """

    per_gene: Float64[np.ndarray, " genes"]
    aggregated: float
    constant_genes: Bool[np.ndarray, " genes"]


def explained_variance(
    predictions: Float[np.ndarray, "cells genes"], targets: Float[np.ndarray, "cells genes"]
) -> ExplainedVariance:
    """Return which share of the variance of expression a prediction explains, per gene and over all genes.

    ``1 - var(P_g - Y_g) / var(Y_g)`` per gene, ``1 - sum_g var(P_g - Y_g) / sum_g var(Y_g)`` over all. Where a gene
    does not vary this is NaN; amici-st's explained-variance module says 0. Sums are in float64, in two passes.
    """
    if predictions.shape != targets.shape or targets.ndim != 2:
        msg = f"predictions have shape {predictions.shape}, targets {targets.shape}; both must be (cells, genes)"
        raise ValueError(msg)
    n_cells = targets.shape[0]
    if n_cells < MIN_CELLS_EXPLAINED_VARIANCE:
        msg = f"{n_cells} cells; at least {MIN_CELLS_EXPLAINED_VARIANCE} are needed for a variance"
        raise ValueError(msg)
    # test for equality: the centred squares of equal values may not sum to exactly 0
    constant = np.asarray(np.all(targets == targets[:1], axis=0))
    residual_var = _sum_of_squares(predictions, targets) / (n_cells - 1)
    target_var = _sum_of_squares(targets, None) / (n_cells - 1)
    per_gene = np.full(targets.shape[1], np.nan)
    np.divide(residual_var, target_var, out=per_gene, where=~constant)
    total = float(target_var[~constant].sum())
    aggregated = 1.0 - float(residual_var.sum()) / total if total > 0.0 else float("nan")
    return ExplainedVariance(per_gene=1.0 - per_gene, aggregated=aggregated, constant_genes=constant)


def _sum_of_squares(
    left: Float[np.ndarray, "cells genes"], right: Float[np.ndarray, "cells genes"] | None
) -> Float64[np.ndarray, " genes"]:
    """Return the centred sum of squares of ``left - right`` per gene, in blocks of cells so that memory stays small."""

    def blocks() -> list[slice]:
        return [slice(start, start + _ROW_BLOCK) for start in range(0, left.shape[0], _ROW_BLOCK)]

    def difference(rows: slice) -> Float64[np.ndarray, "rows genes"]:
        block = left[rows].astype(np.float64)
        if right is not None:
            block -= right[rows]
        return block

    mean = np.zeros(left.shape[1])
    for rows in blocks():
        mean += difference(rows).sum(axis=0)
    mean /= left.shape[0]
    total = np.zeros(left.shape[1])
    for rows in blocks():
        centred = difference(rows) - mean
        total += np.einsum("ij,ij->j", centred, centred)
    return total
