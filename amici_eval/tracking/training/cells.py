"""Which cells are evaluated while a model trains: the same ones each time, by split and cell type."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from amici_eval.common.errors import DataError
from amici_eval.data.checks import chosen_cells, obs_column
from amici_eval.stats.permutation.permutations import PermutationStream

if TYPE_CHECKING:
    from anndata import AnnData
    from jaxtyping import Bool, Int64

    from amici_eval.settings.evaluation import SubsetSpec

__all__ = ["CELLS", "Split", "TrainingCells", "cells_to_evaluate"]

CELLS = ("validation", "train", "all")
_STRATUM = "train_heads"


@dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """Rows of a model's AnnData that are trained on and those that validate; ``None``: not known."""

    train: Int64[np.ndarray, " train"] | None = None
    validation: Int64[np.ndarray, " validation"] | None = None


@dataclass(frozen=True, kw_only=True)
class TrainingCells:
    """The cells that are evaluated again and again.

    Parameters
    ----------
    rows
        Rows of the evaluated AnnData, ascending.
    described
        How many of which cells they are.
    as_asked
        Whether they are of the part of the split that was asked for; else of all cells, which is in-sample.
    """

    rows: tuple[int, ...]
    described: str
    as_asked: bool


def cells_to_evaluate(
    adata: AnnData,
    *,
    part: Bool[np.ndarray, " cells"] | None,
    cells: str,
    subset: SubsetSpec,
    labels_key: str,
    n_cells: int,
    seed: int,
) -> TrainingCells:
    """Choose cells of a part (``None``: all, or not known): as many of each type as there are, up to an equal share.

    Notes
    -----
    Equal shares, not proportional ones: a curve is drawn for each type, and each needs cells enough.
    """
    names = np.asarray(adata.obs_names.astype(str), dtype=object)
    part = None if part is None or not part.any() else part
    members = np.ones(len(names), dtype=bool) if part is None else part
    kind = f"{cells} cells"
    if cells == "all":
        kind = "cells of both training and validation"
    elif part is None:
        kind = f"cells of both training and validation, for no {cells} cell is known or there"
    chosen = np.flatnonzero(members & chosen_cells(adata, subset))
    if not len(chosen):
        raise DataError(
            value=f"none of {int(members.sum())} {kind} is among the cells that spec.data.subset allows",
            rule="there must be cells to evaluate",
            fix="leave spec.data.subset out, or set cells='all'",
        )
    labels = obs_column(adata, labels_key, "cell types").astype(str).to_numpy(dtype=object)
    # by name, so that the order of rows does not matter
    chosen = chosen[np.argsort(names[chosen], kind="stable")]
    numbers, texts = pd.factorize(labels[chosen], sort=True)
    kept = []
    for number, quota in enumerate(_quotas(np.bincount(numbers), n_cells)):
        own = chosen[numbers == number]
        stream = PermutationStream(seed=seed, cell_type=str(texts[number]), stratum=_STRATUM, n_cells=len(own))
        kept.append(own[stream.batch(0, 1)[0][:quota]] if quota < len(own) else own)
    rows = np.sort(np.concatenate(kept))
    return TrainingCells(
        rows=tuple(rows.tolist()),
        described=f"{len(rows)} of {len(chosen)} {kind}",
        as_asked=cells == "all" or part is not None,
    )


def _quotas(counts: Int64[np.ndarray, " types"], n_cells: int) -> Int64[np.ndarray, " types"]:
    """Return how many cells of each type are kept: as equal as their counts allow."""
    quotas = np.zeros_like(counts)
    left = min(n_cells, int(counts.sum()))
    order = np.argsort(counts, kind="stable")
    for done, which in enumerate(order):
        quotas[which] = min(int(counts[which]), left // (len(order) - done))
        left -= int(quotas[which])
    return quotas
