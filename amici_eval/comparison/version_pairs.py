"""Matches and changes of heads between two versions, or of one model on two data sets."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from amici_eval.evaluation.tiles import kept_sums
from amici_eval.results.comparison import WHOLE_MODEL, HeadDifferences, HeadMatches, Overall
from amici_eval.results.head_sample import attention_of_both, blocks_of, contributions, outputs_of, shared_by
from amici_eval.stats.matching import (
    attention_divergence,
    head_products,
    linear_cka,
    match_heads,
    profile_cosine,
)
from amici_eval.stats.pvalues import adjust_p_values
from amici_eval.stats.tile_tests import (
    ChangeTest,
    Pair,
    TileChanges,
    paired_differences,
    pooled_difference,
    verdict_of,
)

if TYPE_CHECKING:
    from jaxtyping import Float64

    from amici_eval.results.comparison import ComparedVersion
    from amici_eval.results.evaluation import HeadEvaluation
    from amici_eval.results.head_sample import Shared
    from amici_eval.results.moments import Moments
    from amici_eval.settings.comparison import ComparisonSpec


def similarity_of(before: Moments, after: Moments) -> Float64[np.ndarray, "before after"]:
    """Return the similarity of heads of two evaluations of the same cells, shape (heads, heads)."""
    shared = shared_by(before, after)
    blocks = blocks_of(before, shared)
    return head_products(contributions(before, shared, 0, blocks), contributions(after, shared, 1, blocks)).similarity


def matches_between(
    before: HeadEvaluation, after: HeadEvaluation, pair: tuple[int, int], spec: ComparisonSpec, *, reseeded: bool
) -> HeadMatches:
    """Return the matches of heads of two versions; both need moments of the same cells."""
    one, other = before.moments, after.moments
    assert one is not None  # noqa: S101, RUF100 - for the type checker
    assert other is not None  # noqa: S101, RUF100 - for the type checker
    shared = shared_by(one, other)
    blocks = blocks_of(one, shared)
    found = match_heads(
        contributions(one, shared, 0, blocks),
        contributions(other, shared, 1, blocks),
        unmatched=spec.unmatched,
        n_permutations=spec.n_permutations,
        seed=spec.seed,
    )
    attention = attention_of_both(one, other)
    return HeadMatches(
        before=pair[0],
        after=pair[1],
        cell_types=shared.cell_types,
        n_genes=len(shared.genes),
        n_cells=len(shared.types),
        similarity=found.similarity,
        similarity_by_type=found.similarity_by_type,
        partner=found.partner,
        n_permutations=spec.n_permutations,
        p_value=found.p_value,
        p_value_spatial=found.p_value_spatial,
        cka=linear_cka(outputs_of(one, shared, 0), outputs_of(other, shared, 1), shared.types, shared.weights),
        divergence=np.full(found.similarity.shape, np.nan) if attention is None else attention_divergence(*attention),
        profile_cosine=profile_cosine(_profiles(before, shared), _profiles(after, shared)),
        reseeded=reseeded,
        reason=found.reason,
    )


def _profiles(evaluation: HeadEvaluation, shared: Shared) -> Float64[np.ndarray, "heads genes"]:
    """Return explained variance by gene, averaged over the cells of the shared types where it is defined."""
    types = [evaluation.cell_types.index(name) for name in shared.cell_types]
    genes = [evaluation.genes.index(name) for name in shared.genes]
    values = evaluation.expl_var_gene[:, types][:, :, genes]
    weight = evaluation.n_cells[types].astype(np.float64)[None, :, None] * ~np.isnan(values)
    total = weight.sum(axis=1)
    return np.divide(
        (weight * np.nan_to_num(values)).sum(axis=1), total, out=np.full(total.shape, np.nan), where=total > 0
    )


def differences_between(
    before: HeadEvaluation, after: HeadEvaluation, match: HeadMatches, spec: ComparisonSpec
) -> tuple[HeadDifferences, Overall]:
    """Return the changes in matched heads and in the whole model; both need moments of the same cells and tiles."""
    one, other = before.moments, after.moments
    assert one is not None  # noqa: S101, RUF100 - for the type checker
    assert other is not None  # noqa: S101, RUF100 - for the type checker
    shared = shared_by(one, other)
    kept = np.flatnonzero(match.partner >= 0)
    heads = np.append(kept, WHOLE_MODEL), np.append(match.partner[kept], WHOLE_MODEL)
    test = ChangeTest(
        confidence=spec.confidence,
        n_resamples=spec.n_bootstrap,
        n_flips=spec.n_flips,
        margin=spec.margin,
        seed=spec.seed,
    )
    parts: list[Pair] = []
    found: list[TileChanges] = []
    reasons: list[tuple[str, str]] = []
    for cell_type in shared.cell_types:
        rows = [kept_sums(moments, cell_type, shared.genes) for moments in (one, other)]
        pair = rows[0].of_models(heads[0]), rows[1].of_models(heads[1])
        # the last pair: the whole models
        parts.append((pair[0].of_models([-1]), pair[1].of_models([-1])))
        found.append(paired_differences(*pair, replace(test, label=cell_type), by_gene=spec.genes))
        if found[-1].reason is not None:
            reasons.append((cell_type, found[-1].reason))

    def stacked(name: str) -> np.ndarray:
        return np.stack([getattr(item, name) for item in found], axis=1)

    p = adjust_p_values(stacked("p_value"), method=spec.adjustment)
    p_gene = stacked("p_value_gene") if spec.genes else None
    return (
        HeadDifferences(
            before=match.before,
            after=match.after,
            cell_types=shared.cell_types,
            genes=shared.genes,
            head_before=heads[0],
            head_after=heads[1],
            difference=stacked("difference"),
            low=stacked("low"),
            high=stacked("high"),
            p_value=stacked("p_value"),
            p_value_adj=p,
            p_value_equivalence=stacked("p_equivalence"),
            p_value_not_worse=stacked("p_not_worse"),
            n_tiles=np.array([item.n_tiles for item in found], dtype=np.int64),
            verdict=tuple(
                verdict_of(
                    low=stacked("low"),
                    high=stacked("high"),
                    p_adjusted=p,
                    p_equivalence=stacked("p_equivalence"),
                    alpha=spec.alpha,
                )
                .ravel()
                .tolist()
            ),
            reasons=tuple(reasons),
            difference_gene=stacked("difference_gene") if spec.genes else None,
            p_value_gene=p_gene,
            p_value_adj_gene=None if p_gene is None else adjust_p_values(p_gene, method=spec.adjustment),
        ),
        _overall(match, pooled_difference(parts, test), spec),
    )


def _overall(match: HeadMatches, whole: TileChanges, spec: ComparisonSpec) -> Overall:
    """Return the change of the whole model over all types."""
    verdict = verdict_of(
        low=whole.low,
        high=whole.high,
        p_adjusted=whole.p_value,
        p_equivalence=whole.p_equivalence,
        alpha=spec.alpha,
    )
    return Overall(
        before=match.before,
        after=match.after,
        difference=float(whole.difference[0]),
        low=float(whole.low[0]),
        high=float(whole.high[0]),
        p_value=float(whole.p_value[0]),
        p_value_equivalence=float(whole.p_equivalence[0]),
        p_value_not_worse=float(whole.p_not_worse[0]),
        n_tiles=whole.n_tiles,
        verdict=str(verdict[0]),
    )


def unpaired_differences(
    before: ComparedVersion, after: ComparedVersion, position: int, spec: ComparisonSpec
) -> tuple[HeadDifferences, Overall]:
    """Compare one model on two data sets, whose intervals are independent (Zou & Donner 2008)."""
    cell_types = tuple(name for name in before.cell_types if name in set(after.cell_types))
    places = [[version.cell_types.index(name) for name in cell_types] for version in (before, after)]
    values, low, high = (
        [
            np.vstack([getattr(version, head)[:, place], getattr(version, whole)[place]])
            for version, place in zip((before, after), places, strict=True)
        ]
        for head, whole in (("expl_var", "full"), ("low", "full_low"), ("high", "full_high"))
    )
    difference = values[1] - values[0]
    below = difference - np.hypot(values[1] - low[1], high[0] - values[0])
    above = difference + np.hypot(high[1] - values[1], values[0] - low[0])
    with np.errstate(invalid="ignore"):
        verdict = np.select(
            [np.isnan(below), (below > -spec.margin) & (above < spec.margin), below > 0, above < 0],
            ["undecided", "same", "better", "worse"],
            "undecided",
        )
    heads = np.append(np.arange(before.n_heads), WHOLE_MODEL)
    nothing = np.full(difference.shape, np.nan)
    missing = float("nan")
    return (
        HeadDifferences(
            before=position - 1,
            after=position,
            cell_types=cell_types,
            genes=(),
            head_before=heads,
            head_after=heads,
            difference=difference,
            low=below,
            high=above,
            p_value=nothing,
            p_value_adj=nothing,
            p_value_equivalence=nothing,
            p_value_not_worse=nothing,
            n_tiles=np.zeros(len(cell_types), dtype=np.int64),
            verdict=tuple(verdict.ravel().tolist()),
        ),
        Overall(
            before=position - 1,
            after=position,
            difference=missing,
            low=missing,
            high=missing,
            p_value=missing,
            p_value_equivalence=missing,
            p_value_not_worse=missing,
            n_tiles=0,
            verdict="undecided",
        ),
    )
