"""Small results with every awkward corner, made in code."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from amici_eval.results.analyses import Baselines, HeadAblations, HeldOutParts, Intervals, Senders, SpatialTests
from amici_eval.results.evaluation import HeadEvaluation, Undefined
from amici_eval.results.moments import Moments
from amici_eval.settings.evaluation import MODES, EvaluationSpec, PermutationSpec
from amici_eval.stats.explained_variance import TileSums
from amici_eval.stats.permutation.statistics import HeadFactors
from amici_eval.stats.pvalues import adjust_p_values

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
    inferred: str | None = None,
    n_widths: int = 0,
    senders: Sequence[str] | None = None,
) -> HeadEvaluation:
    """Return an evaluation whose numbers are consistent with each other (means, best genes, BH) but made up.

    With ``with_undefined`` the last type has a single cell (nothing is defined), gene 1 of the first type is constant,
    and the last head has no test in the second type. With few types, the later ones of these are left
    out. ``modes`` adds these ablations; a type without explained variance has none of their numbers either.
    ``inferred`` names a spatial null and adds its tests (with ``n_widths`` tile widths, fewer in the first type),
    intervals, held-out cells and baselines; the last head has no spatial test in the third type. ``senders`` names the
    sender types and adds what they say (:func:`make_senders`).
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
    spec = EvaluationSpec(permutation=PermutationSpec(n_permutations=n_permutations, alpha=alpha))
    inference = {}
    if inferred is not None:
        inference = make_inference(inferred, types, n_cells, per_gene, aggregate, full, p, n_widths=n_widths, seed=seed)
    if senders is not None:
        inference["senders"] = make_senders(types, senders, per_gene, seed=seed)
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
        spec=spec,
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
        **inference,
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


def make_inference(
    null: str,
    types: Sequence[str],
    n_cells: np.ndarray,
    per_gene: np.ndarray,
    expl_var: np.ndarray,
    full: np.ndarray,
    p: np.ndarray,
    *,
    n_widths: int = 0,
    seed: int = 0,
) -> dict[str, SpatialTests | Intervals | HeldOutParts | Baselines]:
    """Return made-up parts of an evaluation around the effects and free p-values of its heads.

    Spatial p-values are larger than free ones, that of head 0 in the second type much larger; intervals hold the
    effect, held-out effects are smaller than in-sample ones, gains are over the best baseline or 0. The first type lies
    in too few tiles and has few cells held out.
    """
    rng = np.random.default_rng(seed + 2)
    n_heads, n_types = expl_var.shape
    p_spatial = np.clip(2.0 * p, 0.0, 1.0)
    p_spatial[:1, 1:2] = np.where(np.isnan(p_spatial[:1, 1:2]), np.nan, 0.6)
    reasons: tuple[tuple[int, str, str], ...] = ()
    if n_types > 2 and n_heads > 1:
        p_spatial[-1, 2] = np.nan
        reasons = ((n_heads - 1, types[2], f"effective sample size 3.1 of {n_cells[2]} cells; at least 5 needed"),)
    tested = ~np.isnan(p_spatial)
    drawn = 2.0 ** -rng.integers(1, 30, per_gene.shape).astype(float)
    p_gene = np.where(np.isnan(per_gene) | ~tested[:, :, None], np.nan, drawn)
    usable = ~np.isnan(full)
    widths = np.where(usable, np.arange(1.0, n_widths + 1)[:, None] * 12.5 * np.arange(1, n_types + 1), np.nan)
    widths[n_widths // 2 :, :1] = np.nan
    half = np.abs(expl_var) * 0.5 + 0.02
    few = np.arange(n_types) < 1
    parts = np.stack([expl_var * 1.1, expl_var * 0.6])
    parts[1, :, :1] = np.nan
    names = ("neighbour_types", "neighbour_expression", "position")
    trivial = np.where(usable, rng.uniform(-0.02, 0.08, (3, n_types)), np.nan)
    best = np.maximum(trivial.max(axis=0, initial=0.0), 0.0)
    return {
        "spatial": SpatialTests(
            null=null,
            method=tuple({"lag": "lag_t"}.get(null, "monte_carlo") if any(one) else "" for one in tested.T),
            p_value=p_spatial,
            p_value_adj=adjust_p_values(p_spatial),
            p_ci_low=p_spatial,
            p_ci_high=p_spatial,
            statistic=np.where(tested, rng.normal(3.0, 1.0, expl_var.shape), np.nan),
            ess=np.where(usable, n_cells / rng.uniform(2.0, 20.0, expl_var.shape), np.nan),
            detectable=np.where(usable, rng.uniform(0.01, 0.1, expl_var.shape), np.nan),
            correlation_length=np.where(usable, rng.uniform(40.0, 90.0, n_types), np.nan),
            reach=np.where(usable, 400.0 + np.arange(n_types), np.nan),
            p_value_gene=p_gene,
            p_value_adj_gene=adjust_p_values(p_gene),
            widths=widths,
            p_by_width=np.where(np.isnan(widths)[:, None] | ~tested, np.nan, p_spatial / 2.0),
            reasons=reasons,
        ),
        "intervals": Intervals(
            confidence=0.95,
            n_resamples=1000,
            tile_width=75.0,
            n_tiles=np.where(few, 2, 12).astype(np.int64),
            low=np.where(few, np.nan, expl_var - half),
            high=np.where(few, np.nan, expl_var + half),
            full_low=np.where(few, np.nan, full - 0.1),
            full_high=np.where(few, np.nan, full + 0.1),
        ),
        "parts": HeldOutParts(
            n_cells=np.stack([n_cells - n_cells // 3, n_cells // 3]).astype(np.int64),
            expl_var=parts,
            full=np.stack([full * 1.1, np.where(few, np.nan, full * 0.6)]),
            low=parts - 0.05,
            high=parts + 0.05,
        ),
        "trivial": Baselines(
            names=names,
            fitted_on="training cells",
            expl_var=trivial,
            gain=expl_var - best,
            full_gain=full - best,
            without_nearest=expl_var * rng.uniform(0.3, 1.0, expl_var.shape),
            full_without_nearest=full * 0.9,
        ),
    }


def make_senders(types: Sequence[str], senders: Sequence[str], per_gene: np.ndarray, *, seed: int = 0) -> Senders:
    """Return made-up links: none from a type to itself or into a type without explained variance.

    The first type lies in too few tiles for intervals and p-values.
    """
    rng = np.random.default_rng(seed + 3)
    n_heads, n_types, n_genes = per_gene.shape
    shape = n_heads, n_types, len(senders)
    some = np.array([[one != other for other in senders] for one in types], dtype=bool).reshape(shape[1:])
    some = some & ~np.isnan(per_gene).all(axis=2)[..., None]
    certain = some & (np.arange(n_types) > 0)[:, None]
    genes = np.where(some[..., None], rng.normal(0.02, 0.03, (*shape, n_genes)), np.nan)
    lost = genes.mean(axis=3)
    p, p_gene = (np.where(np.isnan(one), np.nan, rng.uniform(1e-4, 0.3, one.shape)) for one in (lost, genes))
    p, p_gene = np.where(certain, p, np.nan), np.where(certain[..., None], p_gene, np.nan)
    return Senders(
        senders=tuple(senders),
        confidence=0.95,
        n_resamples=1000,
        n_receivers=np.where(some.any(axis=0), rng.integers(1, 20, shape[1:]), 0).astype(np.int64),
        attention=np.where(some, rng.dirichlet(np.ones(len(senders) + 1), shape[:2])[:, :, : len(senders)], 0.0),
        effect=lost,
        low=np.where(certain, lost - 0.015, np.nan),
        high=np.where(certain, lost + 0.015, np.nan),
        p_value=p,
        p_value_adj=adjust_p_values(p),
        distance=np.where(some, rng.uniform(10.0, 90.0, shape), np.nan),
        best_gene=np.where(some, np.nan_to_num(genes, nan=-np.inf).argmax(axis=3), -1).astype(np.int64),
        effect_best_gene=np.where(some, np.nan_to_num(genes, nan=-np.inf).max(axis=3), np.nan),
        effect_gene=genes,
        low_gene=np.where(certain[..., None], genes - 0.02, np.nan),
        high_gene=np.where(certain[..., None], genes + 0.02, np.nan),
        p_value_gene=p_gene,
        p_value_adj_gene=adjust_p_values(p_gene),
        reasons=tuple(
            (one, other, "no evaluated cell of the type has such a neighbour")
            for at, one in enumerate(types)
            for place, other in enumerate(senders)
            if not some[:, at, place].any()
        )
        + tuple((one, "", "cells in 3 tiles; at least 5 are needed to tell differences") for one in types[:1]),
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
        row_held_out=np.full(n_rows, -1),
        n_cells=rng.integers(2, 30, n_rows),
        target_mean=positive(n_rows, n_genes),
        target_m2=10 * positive(n_rows, n_genes),
        residual_mean=positive(n_rows, n_heads, n_genes),
        residual_m2=8 * positive(n_rows, n_heads, n_genes),
        full_mean=positive(n_rows, n_genes),
        full_m2=8 * positive(n_rows, n_genes),
        sketch_type=np.repeat(np.arange(n_types), 2),
        sketch_names=tuple(f"cell β{i}" for i in range(2 * n_types)),
        sketch_outputs=positive(2 * n_types, columns - 1),
        sketch_tile=np.arange(2 * n_types) % n_tiles,
        attended=np.arange(0, 2 * n_types, 2),
        attention=rng.dirichlet(np.ones(4), size=(n_types, n_heads)).astype(np.float32),
        attended_neighbours=rng.integers(0, 2**32, (n_types, 3)),
        tile_center=rng.normal(size=(n_tiles, 2)),
        senders=("type 0", "β"),
        lost_squares=positive(n_heads, n_types, 2, n_tiles),
        query_weights=positive(n_types, n_genes),
        head_weights=positive(n_genes, columns - 1),
        query_gram=rng.normal(size=(n_types, columns)),
        head_gram=rng.normal(size=(columns - 1, columns - 1)),
        readout_offset=rng.normal(size=(n_types, n_genes)),
        readout_epsilon=np.array([1e-5]),
    )


def make_comparison(
    n_versions: int = 3, n_heads: int = 3, seed: int = 0, *, kind: str = "versions", with_genes: bool = True
):
    """Return a comparison of made-up numbers: in each step one head is gone and one new; the last type has no tests."""
    from amici_eval.results.comparison import (
        WHOLE_MODEL,
        ComparedVersion,
        FailedVersion,
        HeadComparison,
        HeadDifferences,
        HeadMatches,
        Lineage,
        Overall,
        SenderDifferences,
    )

    rng = np.random.default_rng(seed)
    types, genes = AWKWARD_TYPES[:4], ("ACTA2", "<b>", "$g$")
    n_types, n_genes = len(types), len(genes)

    def values(*shape: int) -> np.ndarray:
        found = rng.normal(0.02, 0.02, shape)
        found[..., -1] = np.nan
        return found

    versions, matches, differences, overall, senders = [], [], [], [], []
    for position in range(n_versions):
        effect, whole = values(n_heads, n_types), values(n_types)
        versions.append(
            ComparedVersion(
                label=f"m<i> {position + 1}" if kind == "versions" else f"data $x$ {position + 1}",
                model={"name": "m<i>", "version": str(position + 1)},
                data={"name": "tissue", "digest": "d"},
                run_id=f"run{position}",
                reused=position == 0,
                setup="s",
                n_heads=n_heads,
                cell_types=types,
                held_out=(False, True, None, True),
                n_cells=rng.integers(5, 500, n_types),
                expl_var=effect,
                low=effect - 0.01,
                high=effect + 0.01,
                p_value_adj=np.where(np.isnan(effect), np.nan, rng.uniform(0, 0.2, effect.shape)),
                full=whole,
                full_low=whole - 0.01,
                full_high=whole + 0.01,
                alpha=0.05,
                decided_by="lag",
            )
        )
        if not position:
            continue
        between = {"before": position - 1, "after": position}
        heads = np.append(np.arange(1, n_heads), WHOLE_MODEL)
        if kind == "versions":
            similarity = rng.uniform(-0.2, 0.9, (n_heads, n_heads))
            matches.append(
                HeadMatches(
                    **between,
                    cell_types=types,
                    n_genes=n_genes,
                    n_cells=100,
                    similarity=similarity,
                    similarity_by_type=np.stack([similarity] * n_types),
                    partner=np.array([-1, *range(1, n_heads)]),
                    n_permutations=99,
                    p_value=rng.uniform(size=n_heads),
                    p_value_spatial=np.full(n_heads, np.nan),
                    cka=similarity,
                    divergence=np.full((n_heads, n_heads), np.nan),
                    profile_cosine=similarity,
                    reseeded=True,
                    reason="cells in 3 blocks of tissue; at least 6 are needed to flip their signs",
                )
            )
        changed = values(n_heads, n_types)
        by_gene = rng.normal(0, 0.01, (n_heads, n_types, n_genes))
        differences.append(
            HeadDifferences(
                **between,
                cell_types=types,
                genes=genes,
                head_before=heads,
                head_after=heads,
                difference=changed,
                low=changed - 0.01,
                high=changed + 0.01,
                p_value=np.where(np.isnan(changed), np.nan, 0.01),
                p_value_adj=np.where(np.isnan(changed), np.nan, 0.02),
                p_value_equivalence=np.where(np.isnan(changed), np.nan, 0.5),
                p_value_not_worse=np.where(np.isnan(changed), np.nan, 0.5),
                n_tiles=np.array([9, 9, 9, 2]),
                verdict=tuple(rng.choice(["better", "worse", "same"], n_heads * n_types).tolist()),
                reasons=((types[-1], "cells in 2 tiles; at least 5 are needed to tell differences"),),
                difference_gene=by_gene if with_genes else None,
                p_value_gene=np.full(by_gene.shape, 0.001) if with_genes else None,
                p_value_adj_gene=np.where(by_gene > 0, 0.01, 0.5) if with_genes else None,
            )
        )
        overall.append(
            Overall(
                **between,
                difference=0.012,
                low=0.004,
                high=0.02,
                p_value=0.01,
                p_value_equivalence=0.6,
                p_value_not_worse=0.01,
                n_tiles=9,
                verdict="better",
            )
        )
        named = [name for name in types if name != types[0]]
        taken = {name: rng.uniform(0, 0.1, (n_heads - 1, n_types, len(named))) for name in ("before", "after")}
        more = taken["after"] - taken["before"]
        more[:, -1] = np.nan
        sure = np.where(
            np.isnan(more), "undecided", np.where(more > 0.02, "more", np.where(more < -0.02, "less", "same"))
        )
        senders.append(
            SenderDifferences(
                **between,
                cell_types=types,
                senders=tuple(named),
                head_before=heads[:-1],
                head_after=heads[:-1],
                **{f"{what}_{when}": values for what in ("lost", "attention") for when, values in taken.items()},
                distance_before=np.full(more.shape, 31.5),
                distance_after=np.full(more.shape, np.nan),
                difference=more,
                low=more - 0.01,
                high=more + 0.01,
                p_value=np.where(np.isnan(more), np.nan, 0.01),
                p_value_adj=np.where(np.isnan(more), np.nan, 0.02),
                p_value_equivalence=np.where(np.isnan(more), np.nan, 0.5),
                verdict=tuple(sure.ravel().tolist()),
                reasons=((types[-1], "", "cells in 2 tiles; at least 5 are needed to tell differences"),),
            )
        )
    same = [Lineage(heads=(head,) * n_versions, stability=0.5) for head in range(1, n_heads)]
    alone = [
        Lineage(heads=tuple(0 if at == position else None for at in range(n_versions)), stability=0.0)
        for position in range(n_versions)
    ]
    return HeadComparison(
        kind=kind,
        versions=tuple(versions),
        failed=(FailedVersion(label="m<i> 9", reason="it <broke>: mend it"),),
        matches=tuple(matches),
        differences=tuple(differences),
        overall=tuple(overall),
        senders=tuple(senders),
        lineages=(*same, *alone) if kind == "versions" else tuple(same),
        similarity={
            (one, other): rng.uniform(0.2, 0.9, (n_heads, n_heads))
            for one in range(n_versions)
            for other in range(one + 1, n_versions)
        }
        if kind == "versions"
        else {},
        floor=np.array([0.15, 0.1, np.nan]),
        reseeded=np.array([0.7, 0.4]),
        in_sample=True,
        notes=("1 genes of <a> left out",),
    )


def make_tile_sums(tiles, expression, residuals) -> TileSums:
    """Return the sums by tile of some cells; residuals have shape (cells, models, genes)."""
    present, place, counts = np.unique(tiles, return_inverse=True, return_counts=True)
    member = (place == np.arange(len(present))[:, None]).astype(np.float64)

    def sums(values):
        flat = values.reshape(len(values), -1)
        mean = member @ flat / counts[:, None]
        shape = (len(present), *values.shape[1:])
        return mean.reshape(shape), (member @ np.square(flat - mean[place])).reshape(shape)

    target, residual = sums(expression), sums(residuals)
    return TileSums(
        tiles=present,
        n_cells=counts,
        target_mean=target[0],
        target_m2=target[1],
        residual_mean=residual[0],
        residual_m2=residual[1],
        varies=np.ptp(expression, axis=0) > 0.0,
    )


def heads_of(factors, images, dead=None) -> HeadFactors:
    """Return heads of which none is dead, unless told."""
    dead = np.zeros(factors.shape[2], dtype=bool) if dead is None else dead
    return HeadFactors(factors=factors, images=images, dead=dead)


def job_options(spec, *, report=None, launch=None, config_yaml="a: 1\n", **tracking):
    """Return the options of a job, without figures unless a report is given."""
    from amici_eval.settings.evaluation import LaunchSpec, ReportSpec, TrackingSpec
    from amici_eval.tracking.jobs import JobOptions

    return JobOptions(
        spec=spec,
        report=report or ReportSpec(figures=False),
        tracking=TrackingSpec(**tracking),
        config_yaml=config_yaml,
        launch=launch or LaunchSpec(),
    )
