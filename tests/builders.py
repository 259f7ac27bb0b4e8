"""Small results with every awkward corner, made in code."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from amici_eval.results import HeadEvaluation, Undefined
from amici_eval.specs import EvaluationSpec, PermutationSpec
from amici_eval.stats.multiplicity import adjust_p_values

if TYPE_CHECKING:
    from collections.abc import Sequence

AWKWARD_TYPES = (
    "$x$_1",
    "<script>alert(1)</script>",
    "CD8+_T_Cells",
    "Microglia/PVM",
    "Stromal_&_T_Cell_Hybrid",
    "_hidden",
    "β cell",
)


def make_evaluation(
    n_heads: int = 3,
    cell_types: Sequence[str] = AWKWARD_TYPES,
    n_genes: int = 5,
    seed: int = 0,
    *,
    genes: Sequence[str] | None = None,
    n_permutations: int = 999,
    alpha: float = 0.05,
    with_undefined: bool = True,
    held_out: Sequence[bool | None] | None = None,
    notes: Sequence[str] = ("coordinates look like pixels: median distance 812.",),
    model: dict | None = None,
    data: dict | None = None,
) -> HeadEvaluation:
    """Return an evaluation whose numbers are consistent with each other (means, best genes, BH) but made up.

    With ``with_undefined`` the last type has a single cell (nothing is defined), gene 1 of the first type is constant,
    and the last head has no test in the second type. With few types, the later ones of these are left
    out.
    """
    rng = np.random.default_rng(seed)
    types = tuple(sorted(cell_types))
    names = (
        tuple(genes)
        if genes is not None
        else tuple(["ACTA2", "HLA-DRA", "$g$", "<b>", "IL7R"][:n_genes]) + tuple(f"GENE{i}" for i in range(5, n_genes))
    )
    n_types = len(types)
    strength = rng.exponential(0.05, (n_heads, n_types, 1))
    per_gene = np.minimum(strength * rng.normal(1.0, 1.0, (n_heads, n_types, len(names))), 0.95)
    exceedances = np.where(strength[:, :, 0] > 0.05, 0, rng.integers(1, n_permutations, (n_heads, n_types)))
    if n_types > 1:
        exceedances[0, 0] = round(0.045 * (n_permutations + 1)) - 1  # below 0.05 before the adjustment, above it after
    n_cells = rng.integers(20, 900, n_types)
    undefined: list[Undefined] = []
    if with_undefined and n_types:
        n_cells[-1] = 1
        per_gene[:, -1] = np.nan
        exceedances[:, -1] = -1
        undefined.append(Undefined(cell_type=types[-1], reason="1 cell; at least 3 needed"))
        if n_types > 1 and len(names) > 1:
            per_gene[:, 0, 1] = np.nan
            undefined.append(Undefined(cell_type=types[0], gene=names[1], reason="expression is constant"))
        if n_types > 2:
            exceedances[-1, 1] = -1
            undefined.append(Undefined(cell_type=types[1], head=n_heads - 1, reason="predictions are constant"))
    defined = exceedances >= 0
    p = np.where(defined, (exceedances + 1) / (n_permutations + 1), np.nan)
    half = 1.96 * np.sqrt(p * (1 - p) / n_permutations)
    aggregate = np.full((n_heads, n_types), np.nan)
    some = ~np.isnan(per_gene).all(axis=2)
    aggregate[some] = np.nanmean(per_gene[some], axis=1)
    has_value = some.any(axis=0)
    return HeadEvaluation(
        n_heads=n_heads,
        cell_types=types,
        genes=names,
        n_cells=n_cells.astype(np.int64),
        expl_var_gene=per_gene,
        expl_var=aggregate,
        expl_var_full=np.where(has_value, np.nan_to_num(aggregate).sum(axis=0) + 0.05, np.nan),
        expl_var_none=np.where(has_value, 0.01, np.nan),
        exceedances=exceedances.astype(np.int64),
        n_permutations=n_permutations,
        p_value=p,
        p_value_adj=adjust_p_values(p),
        p_ci_low=np.clip(p - half, 0, 1),
        p_ci_high=np.clip(p + half, 0, 1),
        held_out=tuple(held_out) if held_out is not None else (False,) * n_types,
        spec=EvaluationSpec(permutation=PermutationSpec(n_permutations=n_permutations, alpha=alpha)),
        undefined=tuple(undefined),
        notes=tuple(notes),
        model=model if model is not None else {"name": "amici_test", "version": "3", "digest": "abc123"},
        data=data if data is not None else {"name": "tissue.h5ad", "digest": "def456", "n_cells": int(n_cells.sum())},
    )
