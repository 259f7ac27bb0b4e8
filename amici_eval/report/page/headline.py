"""Sentences on what an evaluation found: effects with intervals first, then p-values, the spatial ones first."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from amici_eval.common.text import printable
from amici_eval.report.sentences import (
    BASELINE_NAMES,
    VALIDITY,
    adjustment_text,
    effect,
    in_sample_text,
    interval,
    permutations_text,
    permutations_used,
    rounded,
    samplings,
    span,
)

if TYPE_CHECKING:
    import pandas as pd
    from jaxtyping import Bool, Float64

    from amici_eval.results.evaluation import HeadEvaluation
    from amici_eval.results.inference import SpatialTests


def best_heads(evaluation: HeadEvaluation) -> pd.DataFrame:
    """Return the rows of :meth:`HeadEvaluation.heads` with each type's best head; types without one are left out.

    Best by explained variance over all genes, which is what the test is about. ``HeadEvaluation.best_head`` is AMICI's
    choice instead: the head with the largest explained variance of any one gene.
    """
    heads = evaluation.heads()
    defined = heads[heads["expl_var_head"].notna()]
    chosen = defined.groupby("ct_name", sort=True)["expl_var_head"].idxmax()
    return heads.loc[chosen].reset_index(drop=True)


def effect_sentences(evaluation: HeadEvaluation) -> list[str]:
    """Return what was evaluated, the largest effect, and what heads add to predictors without them, a sentence each."""
    n_types, n_genes = len(evaluation.cell_types), len(evaluation.genes)
    sentences = [
        f"{evaluation.n_heads} attention heads x {n_types} cell types evaluated on {int(evaluation.n_cells.sum()):,} "
        f"cells and {n_genes:,} genes."
    ]
    bounds = evaluation.intervals
    if not np.all(np.isnan(evaluation.expl_var)):
        head, index = np.unravel_index(np.nanargmax(evaluation.expl_var), evaluation.expl_var.shape)
        between = "" if bounds is None else interval(bounds.low[head, index], bounds.high[head, index])
        sentences.append(
            f"Largest effect: head {head}, kept alone, explains {effect(evaluation.expl_var[head, index])}"
            f"{f' ({between})' if between else ''} of the expression variance of "
            f"{printable(evaluation.cell_types[index])}; the median over all pairs is {_median(evaluation.expl_var)}."
        )
    if not np.all(np.isnan(evaluation.expl_var_full)) and not np.all(np.isnan(evaluation.expl_var_none)):
        sentences.append(
            f"Median over types: {_median(evaluation.expl_var_full)} explained with all heads, "
            f"{_median(evaluation.expl_var_none)} without any."
        )
    if bounds is not None:
        sentences.append(
            f"Intervals: {100 * bounds.confidence:g} %, from {bounds.n_resamples:,} resamples of tissue tiles of width "
            f"{rounded(bounds.tile_width)} (in the unit of the coordinates)."
        )
    return sentences + _gain_sentences(evaluation)


def _gain_sentences(evaluation: HeadEvaluation) -> list[str]:
    found = evaluation.trivial
    if found is None:
        return []
    sentences = []
    gains, whole = _defined(found.gain), _defined(found.full_gain)
    if gains.size and whole.size:
        names = ", ".join(BASELINE_NAMES.get(name, printable(name)) for name in found.names)
        more = np.count_nonzero(gains > 0)
        sentences.append(
            f"Beside predictors that know no head ({names}; fitted on {found.fitted_on}), {more} of {gains.size} heads "
            f"kept alone explain more than the best of them (median gain {_median(gains)}), and "
            f"so does the whole model in {np.count_nonzero(whole > 0)} of {whole.size} types (median gain "
            f"{_median(whole)})."
            + (
                " Cells that the model was fitted on flatter the heads: no baseline is scored on a cell that it was "
                "fitted on."
                if not _all_held_out(evaluation)
                else ""
            )
        )
    both = (evaluation.expl_var > 0) & ~np.isnan(found.without_nearest)
    if both.any():
        before, after = evaluation.expl_var[both], found.without_nearest[both]
        sentences.append(
            f"With the nearest neighbour masked, the median of the {before.size} pairs that explain anything goes from "
            f"{_median(before)} to {_median(after)}, and {np.count_nonzero(after < before / 2)} of them lose more than "
            "half: these may read segmentation bleed."
        )
    return sentences


def held_out_sentences(evaluation: HeadEvaluation) -> list[str]:
    """Return which types were evaluated on cells that the model was not fitted on, and the effects there."""
    return [_held_out_sentence(evaluation), *_parts_sentences(evaluation)]


def _held_out_sentence(evaluation: HeadEvaluation) -> str:
    n_types = len(evaluation.held_out)
    held, in_sample = (sum(value is truth for value in evaluation.held_out) for truth in (True, False))
    if held == n_types:
        return "Held out: the model was fitted on none of the evaluated cells."
    if in_sample == n_types:
        return (
            "In-sample: the model was fitted on some or all of the evaluated cells of every type, so effects and "
            "p-values are optimistic: a head that has memorised its cells is significant, too."
        )
    if not held and not in_sample:
        return (
            "It is not known which cells the model was fitted on; read effects and p-values as in-sample, so "
            "optimistic."
        )
    numbers = {"held out": held, "in-sample": in_sample, "unknown": n_types - held - in_sample}
    counted = ", ".join(f"{number} {what}" for what, number in numbers.items() if number)
    return f"Of {n_types} types: {counted}. Effects and p-values of those that are not held out are optimistic."


def _parts_sentences(evaluation: HeadEvaluation) -> list[str]:
    found = evaluation.parts
    if found is None:
        return []
    both = ~np.isnan(found.expl_var).any(axis=0)
    if not both.any():
        return []
    whole = ~np.isnan(found.full).any(axis=0)
    return [
        f"On cells that the model was fitted on, heads kept alone explain {_median(found.expl_var[0][both])} of "
        f"expression variance, on the others {_median(found.expl_var[1][both])} (medians over "
        f"{np.count_nonzero(both)} pairs); the whole model {_median(found.full[0][whole])} and "
        f"{_median(found.full[1][whole])}."
    ]


def outcome_sentences(evaluation: HeadEvaluation) -> list[str]:
    """Return the outcome of the tests and what their nulls assume: the spatial null first, then the free one."""
    settings = evaluation.spec.permutation
    sentences = spatial_sentences(evaluation)
    outcome = (
        f"{evaluation.n_significant_free} of {evaluation.n_tests} tested head x type pairs are significant at adjusted "
        f"p <= {settings.alpha:g}{in_sample_text(evaluation)} ({settings.null} null, {permutations_text(evaluation)}, "
        f"{adjustment_text(evaluation, null=settings.null)} over all tests)."
    )
    if sentences:
        outcome = f"For comparison with amici-st, by the {settings.null} null, which is anticonservative: {outcome}"
    if evaluation.n_undefined:
        outcome += f" {evaluation.n_undefined} of {evaluation.p_value.size} pairs have no test."
    sentences.append(outcome)
    free = f"{settings.null} " if evaluation.spatial is not None else ""
    counted = set(samplings(evaluation)) <= {"independent", "cyclic", "sequential", "none"}
    if settings.convention == "reference":
        sentences.append(f"{free}p = b/m as in amici-st: 0 stands for fewer than one in m, and is no valid p-value.")
    elif counted:
        sentences += _out_of_reach(
            f"{free}p-value",
            n_drawn=_most_permutations(evaluation),
            what="permutations",
            n_tests=evaluation.n_tests,
            adjustment="" if settings.adjustment == "maxt" else settings.adjustment,
            alpha=settings.alpha,
        )
    if settings.null in VALIDITY:
        sentences.append(VALIDITY[settings.null])
    return sentences


def spatial_sentences(evaluation: HeadEvaluation) -> list[str]:
    """Return the outcome of the spatial test, what effects it could have found, and what its null assumes."""
    found = evaluation.spatial
    if found is None:
        return []
    settings = evaluation.spec.permutation
    untested = found.p_value.size - evaluation.n_decided
    sentences = [
        f"{evaluation.n_significant} of {evaluation.n_decided} tested head x type pairs are significant at adjusted "
        f"p <= {settings.alpha:g}{in_sample_text(evaluation)} ({found.null} null, "
        f"{adjustment_text(evaluation, null=found.null)} over all tests)."
        + (f" {untested} of {found.p_value.size} pairs have no test." if untested else "")
    ]
    if found.null == "torus":
        sentences += _out_of_reach(
            "torus p-value",
            n_drawn=settings.n_shifts,
            what="shifts (permutation.n_shifts)",
            n_tests=evaluation.n_decided,
            adjustment=adjustment_text(evaluation, null=found.null).lower(),
            alpha=settings.alpha,
        )
    tested = ~np.isnan(found.ess).all(axis=0)
    if tested.any():
        cells = evaluation.n_cells[tested]
        sentences.append(
            f"Effective sample size{'' if found.null == 'lag' else ' (by the lag null)'}: {span(found.ess)} (median "
            f"{rounded(float(np.nanmedian(found.ess)))}), from {span(cells)} cells."
        )
    if not np.all(np.isnan(found.detectable)):
        sentences.append(
            f"Smallest effect that the lag null would have found with 80 % power before any adjustment: explained "
            f"variance of "
            f"{effect(float(np.nanmin(found.detectable)))} to {effect(float(np.nanmax(found.detectable)))}, median "
            f"{_median(found.detectable)}."
        )
    if tested.any():
        sentences.append(_scale_sentence(found, tested))
    if found.null in VALIDITY:
        sentences.append(VALIDITY[found.null])
    return sentences


def _scale_sentence(found: SpatialTests, tested: Bool[np.ndarray, " types"]) -> str:
    lengths = found.correlation_length[tested]
    none = int(np.count_nonzero(np.isnan(lengths)))
    parts = [] if none == lengths.size else [span(lengths)]
    if none:
        parts.append("none found" + (f" in {none} of {lengths.size} types" if parts else ""))
    # other nulls have no reach: what is stored for them is the reach of the lag null
    if found.null in ("lag", "tile") and np.isfinite(found.reach).any():
        reach = span(found.reach)
        parts.append(f"tiles are {reach} wide" if found.null == "tile" else f"the null reaches {reach}")
    return f"Correlation length of expression, in the unit of the coordinates: {'; '.join(parts)}."


def _all_held_out(evaluation: HeadEvaluation) -> bool:
    return set(evaluation.held_out) <= {True}


def _out_of_reach(name: str, *, n_drawn: int, what: str, n_tests: int, adjustment: str, alpha: float) -> list[str]:
    """Return a sentence if too little was drawn for any test to become significant, however small its p."""
    least = 1 / (n_drawn + 1)
    factor = {"holm": float(n_tests), "by": float(np.sum(1 / np.arange(1, n_tests + 1)))}.get(adjustment, 1.0)
    if not n_tests or least * factor <= alpha:
        return []
    adjusted = f", nor below {min(least * factor, 1.0):.2g} once adjusted" if factor > 1 else ""
    return [
        f"With {n_drawn:,} {what} no {name} can be below {least:.2g}{adjusted}: nothing can be significant; draw more."
    ]


def _most_permutations(evaluation: HeadEvaluation) -> int:
    used = max(permutations_used(evaluation), default=0) or evaluation.n_permutations
    # heads that stopped early do not show how small a p could have been
    return max(used, evaluation.n_permutations) if "sequential" in samplings(evaluation) else used


def _defined(values: Float64[np.ndarray, ...]) -> Float64[np.ndarray, " defined"]:
    return values[~np.isnan(values)]


def _median(values: Float64[np.ndarray, ...]) -> str:
    return effect(float(np.nanmedian(values))) if not np.all(np.isnan(values)) else "undefined"
