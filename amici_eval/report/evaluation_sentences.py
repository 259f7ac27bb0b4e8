"""What an evaluation found, in sentences: for the page, figures, the run's description and the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from amici_eval.common.text import printable
from amici_eval.report.numbers import counted, effect, interval, p_text, rounded, span

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from jaxtyping import Bool, Float64, Int64

    from amici_eval.results.analyses import SpatialTests
    from amici_eval.results.evaluation import HeadEvaluation, Undefined

VALIDITY = {
    "free": (
        "The free null shuffles the cells of a type freely, as if they were exchangeable. In spatially autocorrelated "
        "tissue neighbouring cells resemble each other, so its p-values are too small (anticonservative): a "
        "significant pair is a lead to follow, not a proof."
    ),
    "lag": (
        "The lag null shuffles nothing: prediction and expression keep the smoothness they have, and p says how often "
        "unrelated ones would fit as well; it takes both to have the same mean and the same correlation all over a "
        "section, so that a trend across it, or a type that lives in a few patches, can make p too small."
    ),
    "tile": (
        "The tile null shuffles cells within squares of tissue, which holds only where squares are narrower than "
        "expression is smooth: in wider ones p is too small (anticonservative), in narrow ones little can be found."
    ),
    "sample": (
        "The sample null shuffles the cells of a type freely within each section: differences between sections no "
        "longer count, but wherever neighbouring cells resemble each other its p-values are too small "
        "(anticonservative), as those of the free null are."
    ),
    "torus": (
        "The torus null slides the predictions of a section as a whole over its edges, which keeps them as smooth as "
        "they are; it is made for sections that are filled rectangles without a trend, and holes, odd outlines and "
        "trends make its p-values wrong."
    ),
}
"""What each null assumes, and how that fails, in one sentence or two."""
VALIDITY_SHORT = {
    "free": "free null; anticonservative in spatially autocorrelated tissue",
    "lag": "lag null; can be too lenient for a type in a few patches or with a trend",
    "tile": "tile null; anticonservative where tiles are wider than expression is smooth",
    "sample": "sample null; anticonservative where neighbouring cells resemble each other",
    "torus": "torus null; made for sections that are filled rectangles without a trend",
}
WHY_THIS_ORDER = (
    "Effects come first, p-values second: with thousands of cells p alone says little, because it falls below any "
    "threshold for effects too small to matter. What a head is worth shows in its explained variance with the "
    "interval, in what it adds to predictors without any head, and in what remains on cells that the model was not "
    "fitted on and without the nearest neighbour. p says only whether there is anything at all."
)
BASELINE_NAMES = {
    "full_model": "all heads (whole model)",
    "no_head": "no head",
    "neighbour_types": "types of neighbours",
    "neighbour_expression": "expression of neighbours",
    "position": "position",
    "full_model_without_nearest": "all heads, nearest neighbour masked",
}
BASELINE_MEANINGS = {
    "neighbour_types": "Types of neighbours: ridge regression on how many of a cell's neighbours are of each type.",
    "neighbour_expression": "Expression of neighbours: ridge regression on their mean expression.",
    "position": "Position: a smooth function of where in the section a cell lies.",
}

_MOST_TYPES_NAMED = 8
_DRAWN = {
    "independent": "",
    "cyclic": " as cyclic shifts of one random order",
    "sequential": " at most, stopped once enough exceeded,",
    "gpd": " with a fitted tail",
    "moments": "exact moments of all permutations",
}


def adjustment_text(evaluation: HeadEvaluation, *, null: str) -> str:
    """Return what the p-values of a null are adjusted by."""
    adjustment = evaluation.spec.permutation.adjustment
    if adjustment == "maxt":
        return "step-down maxT" if null == evaluation.spec.permutation.null else "Holm"
    return adjustment.upper()


def in_sample_text(evaluation: HeadEvaluation) -> str:
    """Return a caveat for counts or marks of significant heads; empty unless cells are in-sample."""
    if False not in evaluation.held_out:
        return ""
    return ", in-sample" if set(evaluation.held_out) == {False} else ", in part in-sample"


def samplings(evaluation: HeadEvaluation) -> list[str]:
    """Return how the free p-values of each type came about, as ``HeadEvaluation.sampling``; ``none`` without a test."""
    given = evaluation.sampling or ("independent",) * len(evaluation.cell_types)
    tested = (~np.isnan(evaluation.p_value)).any(axis=0)
    return [name if name and has_test else "none" for name, has_test in zip(given, tested, strict=True)]


def permutations_used(evaluation: HeadEvaluation) -> list[int]:
    """Return the number of permutations of each type, 0 without a test."""
    given = evaluation.n_permutations_by_type
    numbers = [evaluation.n_permutations] * len(evaluation.cell_types) if given is None else given.tolist()
    return [0 if name == "none" else int(number) for name, number in zip(samplings(evaluation), numbers, strict=True)]


def permutations_text(evaluation: HeadEvaluation) -> str:
    """Return how many permutations were used and how they were drawn."""
    parts = []
    only_one = set(samplings(evaluation)) <= {"independent", "none"}
    for sampling, how in _DRAWN.items():
        used = [
            number
            for number, name in zip(permutations_used(evaluation), samplings(evaluation), strict=True)
            if name == sampling
        ]
        if used:
            low, high = min(used), max(used)
            types = "" if only_one else f" in {counted(len(used), 'type')}"
            number = f"{low:,}{f' to {high:,}' if high > low else ''} permutations"
            parts.append(f"{how if sampling == 'moments' else number + how}{types}")
    return " and ".join(parts) or f"{evaluation.n_permutations:,} permutations"


def engine_sentence(evaluation: HeadEvaluation) -> str:
    """Return what computed the predictions, and how far the two engines were apart where they were compared."""
    computed = f"Predictions by the {evaluation.engine} engine"
    if evaluation.parity is None:
        return f"{computed}."
    cells = counted(evaluation.parity_cells, "cell")
    if not np.isfinite(evaluation.parity):
        return f"{computed}; on {cells} the factored and the hooked engine differ by no finite number."
    return (
        f"{computed}; on {cells} the factored and the hooked engine differ by at most {evaluation.parity:.2g} in any "
        "predicted value."
    )


def type_reasons(evaluation: HeadEvaluation, cell_type: str) -> str:
    """Return why a type has no explained variance at all, in the words of the evaluation."""
    reasons = [u.reason for u in evaluation.undefined if u.cell_type == cell_type and u.gene is None]
    return "; ".join(dict.fromkeys(reasons)) or "no gene has a defined explained variance"


def undefined_sentences(evaluation: HeadEvaluation) -> list[str]:
    """Return a line per type and reason that says what is undefined: whole types and heads first, then genes."""
    groups: dict[tuple[bool, str, str], list[Undefined]] = {}
    for item in evaluation.undefined:
        groups.setdefault((item.gene is not None, item.cell_type, item.reason), []).append(item)
    lines = []
    for (about_genes, cell_type, reason), items in sorted(groups.items(), key=lambda pair: pair[0][0]):
        if about_genes:
            genes = list(dict.fromkeys(str(u.gene) for u in items))
            more = f" and {len(genes) - 5} more" if len(genes) > 5 else ""
            what = f"{counted(len(genes), 'gene')} ({', '.join(printable(g) for g in genes[:5])}{more})"
        elif any(u.head is None for u in items):
            what = "all heads"
        else:
            heads = sorted({u.head for u in items if u.head is not None})
            what = f"head{'s' if len(heads) > 1 else ''} {', '.join(map(str, heads))}"
        lines.append(f"{printable(cell_type)}, {what}: {printable(reason)}")
    return lines


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
    gains, whole = (values[~np.isnan(values)] for values in (found.gain, found.full_gain))
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
                if not set(evaluation.held_out) <= {True}
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


def _median(values: Float64[np.ndarray, ...]) -> str:
    return effect(float(np.nanmedian(values))) if not np.all(np.isnan(values)) else "undefined"


def significance_sentence(evaluation: HeadEvaluation) -> str:
    """Return how many heads are significant, by which test, and how many pairs beat predictors without heads."""
    significant = evaluation.adjusted <= evaluation.spec.permutation.alpha
    if not evaluation.n_decided:
        return f"No head could be tested ({evaluation.decided_by} null); why is said below."
    heads = np.flatnonzero(significant.any(axis=1))
    test = (
        f"{evaluation.n_significant} of {evaluation.n_decided} tested head x type pairs at adjusted p ≤ "
        f"{evaluation.spec.permutation.alpha:g}, {evaluation.decided_by} null{in_sample_text(evaluation)}"
    )
    if not heads.size:
        return f"Verdict: no head is significant in any cell type ({test})."
    n_heads = evaluation.n_heads
    who = f"{heads.size} of {n_heads} heads {'is' if heads.size == 1 else 'are'} significant in at least one cell type"
    verdict = f"Verdict: {who} ({test})."
    found = evaluation.trivial
    if found is not None:
        more = np.count_nonzero(significant & (found.gain > 0))
        also = "explains" if more == 1 else "explain"
        verdict += f" Of these pairs, {more} also {also} more than the best predictor without heads."
    return verdict


def head_sentences(evaluation: HeadEvaluation, head: int, entries: list[dict[str, Any]]) -> str:
    """Return where a head is significant, explains most and adds something; ``entries`` begin with its best type."""
    tested = int(np.count_nonzero(~np.isnan(evaluation.adjusted[head])))
    where = [printable(entry["ct_name"], longest=40) for entry in entries if entry["significant"] == "yes"]
    test = (
        f"adjusted p ≤ {evaluation.spec.permutation.alpha:g}, {evaluation.decided_by} null{in_sample_text(evaluation)}"
    )
    listed = ", ".join(where[:_MOST_TYPES_NAMED])
    more = f" and {len(where) - _MOST_TYPES_NAMED} more" if len(where) > _MOST_TYPES_NAMED else ""
    said = [
        f"Significant in {len(where) or 'none'} of {tested} tested types ({test}){': ' if where else ''}{listed}{more}."
    ]
    best = entries[0] if entries else {}
    if best and not np.isnan(best["expl_var_head"]):
        between = interval(best["ci_low"], best["ci_high"])
        said.append(
            f"Kept alone it explains most in {printable(best['ct_name'])}: {effect(best['expl_var_head'])}"
            f"{f' ({between})' if between else ''}."
        )
    found, spatial = evaluation.trivial, evaluation.spatial
    if found is not None and not np.isnan(found.gain[head]).all():
        gains = found.gain[head][~np.isnan(found.gain[head])]
        said.append(
            f"It explains more than the best predictor without heads in {np.count_nonzero(gains > 0)} of {gains.size} "
            "types."
        )
    if spatial is not None and not np.isnan(spatial.ess[head]).all():
        said.append(f"Effective sample size (lag null): {span(spatial.ess[head])}.")
    return " ".join(said)


def summary_lines(evaluation: HeadEvaluation) -> list[str]:
    """Return an evaluation in a few plain sentences and a small text table, for logs and terminals."""
    lines = [*effect_sentences(evaluation), *held_out_sentences(evaluation), WHY_THIS_ORDER]
    lines += [*outcome_sentences(evaluation), engine_sentence(evaluation)]
    lines += [f"Note: {printable(note)}" for note in evaluation.notes]
    lines += _best_head_table(evaluation)
    return lines + [f"Undefined: {line}." for line in undefined_sentences(evaluation)]


def _best_head_table(evaluation: HeadEvaluation) -> list[str]:
    best = best_heads(evaluation)
    if best.empty:
        return []
    alpha, spatial = evaluation.spec.permutation.alpha, evaluation.spatial is not None
    decisive = "p_value_adj_spatial" if spatial else "p_value_adj_head"
    remaining = np.full((evaluation.n_heads, len(evaluation.cell_types)), np.nan)
    if evaluation.parts is not None:
        remaining = evaluation.parts.expl_var[1]
    columns: dict[str, list[str]] = {"cell type": [], "cells": [], "best head": [], "EV all genes": []}
    if evaluation.intervals is not None:
        columns["interval"] = []
    if evaluation.trivial is not None:
        columns["gain"] = []
    if evaluation.parts is not None:
        columns["held out"] = []
    columns |= {"best gene": [], "EV gene": []} | ({"ESS": []} if spatial else {}) | {"p adj": []}
    for row in best.to_dict("records"):
        texts = {
            "cell type": printable(row["ct_name"], longest=28 if len(columns) < 8 else 20),
            "cells": f"{row['n_cells']:,}",
            "best head": str(row["head"]),
            "EV all genes": effect(row["expl_var_head"]),
            "interval": interval(row["ci_low"], row["ci_high"]) or "undefined",
            "gain": effect(row["gain"]),
            "held out": effect(float(remaining[row["head"], evaluation.type_index(row["ct_name"])])),
            "best gene": printable(row["best_gene"], longest=16 if len(columns) < 8 else 12),
            "EV gene": effect(row["expl_var_best_gene"]),
            "ESS": "undefined" if np.isnan(row["ess"]) else f"{row['ess']:,.0f}",
            "p adj": p_text(row[decisive]) + (" *" if row[decisive] <= alpha else "  "),
        }
        for name, cells in columns.items():
            cells.append(texts[name])
    lines = []
    for number in range(-1, len(best)):
        cells = []
        for name, texts_of in columns.items():
            width = max(len(name), *map(len, texts_of))
            shown = name if number < 0 else texts_of[number]
            cells.append(shown.ljust(width) if name in ("cell type", "best gene") else shown.rjust(width))
        lines.append("  ".join(cells).rstrip())
    return [
        f"Best head per type (largest explained variance, EV, over all genes; * adjusted p <= {alpha:g}, "
        f"{evaluation.decided_by} null{in_sample_text(evaluation)}):",
        *lines,
    ]


def sure_links(evaluation: HeadEvaluation, rows: Sequence[int]) -> Int64[np.ndarray, "links three"]:
    """Return (head, receiver, sender) of losses with an interval above 0, the largest losses first.

    Only of heads that explain something when kept alone: the model was not trained with senders masked out, and a head
    that explains nothing may become worse by the masking itself.
    """
    found = evaluation.senders
    if found is None:
        return np.zeros((0, 3), dtype=np.int64)
    shown = np.zeros(found.effect.shape, dtype=bool)
    shown[:, list(rows)] = True
    places = np.argwhere((found.low > 0.0) & shown & (evaluation.expl_var > 0.0)[:, :, None])
    order = np.argsort(-found.effect[tuple(places.T)], kind="stable")
    links: Int64[np.ndarray, "links three"] = places[order]
    return links
