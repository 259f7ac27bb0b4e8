"""Small results with every awkward corner, made in code."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from amici_eval.ablation_results import HeadAblations
from amici_eval.moments import Moments
from amici_eval.results import HeadEvaluation, Undefined
from amici_eval.specs import MODES, EvaluationSpec, PermutationSpec
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
    modes: Sequence[str] | None = None,
    engine: str = "hooked",
    parity: float | None = None,
    parity_cells: int = 0,
    sampling: Sequence[str] = (),
) -> HeadEvaluation:
    """Return an evaluation whose numbers are consistent with each other (means, best genes, BH) but made up.

    With ``with_undefined`` the last type has a single cell (nothing is defined), gene 1 of the first type is constant,
    and the last head has no test in the second type. With few types, the later ones of these are left
    out. ``modes`` adds these ablations; a type without explained variance has none of their numbers either.
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
    full = np.where(has_value, np.nan_to_num(aggregate).sum(axis=0) + 0.05, np.nan)
    none = np.where(has_value, 0.01, np.nan)
    return HeadEvaluation(
        n_heads=n_heads,
        cell_types=types,
        genes=names,
        n_cells=n_cells.astype(np.int64),
        expl_var_gene=per_gene,
        expl_var=aggregate,
        expl_var_full=full,
        expl_var_none=none,
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
        engine=engine,
        parity=parity,
        parity_cells=parity_cells,
        n_permutations_by_type=_by_type(sampling, n_cells, n_permutations),
        sampling=tuple(sampling),
        ablations=None if modes is None else make_ablations(modes, aggregate, full, none, seed=seed),
    )


def _by_type(sampling: Sequence[str], n_cells: np.ndarray, n_permutations: int) -> np.ndarray | None:
    if not sampling:
        return None
    drawn = {"cyclic": n_cells - 1, "independent": np.full_like(n_cells, n_permutations), "": np.zeros_like(n_cells)}
    return np.array([drawn[name][index] for index, name in enumerate(sampling)], dtype=np.int64)


def make_ablations(
    modes: Sequence[str], keep_one: np.ndarray, full: np.ndarray, none: np.ndarray, *, seed: int = 0
) -> HeadAblations:
    """Return made-up ablations around the explained variance (H, C) of single heads, (C,) of all heads and of none.

    Shapley values add up to ``full - none``; without one of the Shapley modes its interactions are NaN.
    """
    rng = np.random.default_rng(seed + 1)
    n_heads, n_types = keep_one.shape
    share = np.where(np.isfinite(full), keep_one - keep_one.mean(axis=0) + (full - none) / n_heads, np.nan)
    drawn = {mode: full - share * rng.normal(1.0, 0.2, keep_one.shape) for mode in MODES[:5]}
    drawn |= {"keep_one": keep_one, "frozen_norm": none + share, "shapley": share, "frozen_shapley": share[::-1]}

    def interactions(mode: str) -> np.ndarray:
        pairs = rng.normal(-0.01, 0.02, (n_types, n_heads, n_heads))
        pairs += pairs.transpose(0, 2, 1)
        pairs[:, range(n_heads), range(n_heads)] = 0.0
        return np.where(np.isfinite(full)[:, None, None] & (mode in modes), pairs, np.nan)

    return HeadAblations(
        modes=tuple(modes),
        expl_var=np.array([drawn[mode] for mode in modes]).reshape(len(modes), n_heads, n_types),
        standard_error=np.where(np.isfinite(share) & ("shapley" in modes), 0.0, np.nan),
        interaction=interactions("shapley"),
        frozen_interaction=interactions("frozen_shapley"),
    )


def make_moments(n_heads: int = 2, n_types: int = 3, n_genes: int = 4, n_tiles: int = 5, seed: int = 0) -> Moments:
    """Return moments of made-up cells: residuals and targets of every type in every tile but one."""
    rng = np.random.default_rng(seed)
    rows = [(t, tile) for t in range(n_types) for tile in range(n_tiles) if (t, tile) != (0, 1)]
    n_rows, columns = len(rows), 1 + 2 * n_heads

    def positive(*shape: int) -> np.ndarray:
        return rng.exponential(size=shape).astype(np.float32)

    return Moments(
        cell_types=tuple(f"type {t}" for t in range(n_types)),
        genes=tuple(f"g{g}" for g in range(n_genes)),
        n_heads=n_heads,
        row_type=np.array([t for t, _ in rows]),
        row_tile=np.array([tile for _, tile in rows]),
        n_cells=rng.integers(2, 30, n_rows),
        target_mean=positive(n_rows, n_genes),
        target_m2=10 * positive(n_rows, n_genes),
        residual_mean=positive(n_rows, n_heads, n_genes),
        residual_m2=8 * positive(n_rows, n_heads, n_genes),
        sketch_type=np.repeat(np.arange(n_types), 2),
        sketch_names=tuple(f"cell β{i}" for i in range(2 * n_types)),
        sketch_outputs=positive(2 * n_types, columns - 1),
        tile_center=rng.normal(size=(n_tiles, 2)),
        query_weights=positive(n_types, n_genes),
        head_weights=positive(n_genes, columns - 1),
        query_gram=rng.normal(size=(n_types, columns)),
        head_gram=rng.normal(size=(columns - 1, columns - 1)),
        readout_offset=rng.normal(size=(n_types, n_genes)),
        readout_epsilon=np.array([1e-5]),
    )
