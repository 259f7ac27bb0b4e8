"""Judge a model version by rules, and against the version that it would replace."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import numpy as np

from amici_eval.common.text import meant_by
from amici_eval.results.verdict import RuleResult, Verdict, overall_outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import pandas as pd

    from amici_eval.results.comparison import HeadComparison
    from amici_eval.results.evaluation import HeadEvaluation
    from amici_eval.settings.comparison import GateSpec, Rule


@dataclass(frozen=True, kw_only=True)
class Element:
    """A value that is compared with bounds.

    ``value`` NaN or None: undefined. ``low``, ``high``: its confidence interval, None for what has none by nature, such
    as a count, NaN if it is missing. ``reason``: why it is undefined, if known.
    """

    name: str
    value: Any
    low: Any = None
    high: Any = None
    reason: str = ""


def reason_of(
    rule: Rule, elements: Sequence[Element], outcomes: Sequence[str], outcome: str, needed: int, shown: Element | None
) -> str:
    """Return why a rule has its outcome, with the numbers of the element that decided."""
    if shown is None:
        return f"nothing to judge: no cell type has {rule.min_cells} evaluated cells"
    counted = ""
    if len(elements) > 1:
        told = ", ".join(f"{outcomes.count(one)} {one}" for one in ("pass", "fail", "undecided") if one in outcomes)
        counted = f"of {len(elements)}: {told}, {needed} must pass; "
    value, low, high = (number_of(one) for one in (shown.value, shown.low, shown.high))
    if not math.isfinite(value):
        return f"{counted}{shown.name}: undefined{f', {shown.reason}' if shown.reason else ''}"
    if shown.low is not None and not (math.isfinite(low) and math.isfinite(high) and low <= value <= high):
        return (
            f"{counted}{shown.name}: {value:.4g} without a usable interval{f', {shown.reason}' if shown.reason else ''}"
        )
    between = "" if shown.low is None else f" ({low:.4g} to {high:.4g})"
    words = {"pass": "within bounds", "fail": "out of bounds", "undecided": "the interval reaches over the bound"}
    said = words[outcome]
    return f"{counted}{shown.name}: {value:.4g}{between}, {said}"


def threshold_of(rule: Rule, *, at_least: float | None, at_most: float | None, strict: bool) -> str:
    """Return a rule's threshold in words."""
    if rule.kind == "non_inferiority":
        return f"worse by less than {-(at_least or 0.0):g}"
    if rule.kind == "superiority":
        return f"better by more than {at_least:g}"
    bounds = (("at least", at_least), ("at most", at_most))
    return " and ".join(f"{word} {bound:g}" for word, bound in bounds if bound is not None)


def number_of(value: Any) -> float:
    """Return a value as a float, NaN for booleans and for anything that is not a number."""
    if value is None or isinstance(value, (bool, np.bool_)):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def listed(names: Sequence[str], most: int = 8) -> str:
    """Return names as text, the first ones if there are many."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


_MOST_DETAILS = 200
_NO_INTERVAL = "it has no interval (permutation.n_bootstrap=0, no coordinates, or too few tiles)"
_ENDS = {
    "expl_var_head": ("ci_low", "ci_high"),
    "expl_var_lost": ("ci_low", "ci_high"),
    "expl_var_in_sample": ("ci_low_in_sample", "ci_high_in_sample"),
    "expl_var_held_out": ("ci_low_held_out", "ci_high_held_out"),
}
"""Columns of the tables that hold the interval of another column."""


def decide(
    element: Element, *, at_least: float | None = None, at_most: float | None = None, strict: bool = False
) -> str:
    """Return ``pass``, ``fail`` or ``undecided`` for one element.

    It passes if the whole interval lies within the bounds, fails if the whole interval lies beyond one of them, and is
    undecided otherwise. An undefined value, or an interval with an end that is missing, infinite or on the wrong side
    of the value, is undecided.
    """
    value = number_of(element.value)
    if not math.isfinite(value):
        return "undecided"
    if element.low is None and element.high is None:
        low = high = value
    else:
        low, high = number_of(element.low), number_of(element.high)
        if not (math.isfinite(low) and math.isfinite(high) and low <= value <= high):
            return "undecided"
    bounds = [bound for bound in (at_least, at_most) if bound is not None]
    if not bounds or not all(math.isfinite(bound) for bound in bounds):
        return "undecided"
    above = at_least is None or (low > at_least if strict else low >= at_least)
    below = at_most is None or high <= at_most
    if above and below:
        return "pass"
    too_low = at_least is not None and (high <= at_least if strict else high < at_least)
    too_high = at_most is not None and low > at_most
    return "fail" if too_low or too_high else "undecided"


def judge(
    evaluation: HeadEvaluation,
    spec: GateSpec,
    *,
    comparison: HeadComparison | None = None,
    no_comparison: str | None = None,
    metrics: Mapping[str, float],
    tables: Callable[[str], pd.DataFrame],
    intervals: Mapping[str, tuple[float, float]] | None = None,
    missing_genes: Sequence[str] = (),
    model: Mapping[str, Any] | None = None,
    baseline: Mapping[str, Any] | None = None,
    cells: str = "all evaluated cells",
    in_sample: bool | None = None,
    key: str = "",
    notes: Sequence[str] = (),
) -> Verdict:
    """Judge a version.

    Parameters
    ----------
    evaluation
        Of the version.
    spec
        The rules.
    comparison
        With the baseline: two versions on the same cells, the baseline first. ``None``: there is none.
    no_comparison
        Why there is no comparison although there is a baseline: rules against it are undecided. ``None`` without a
        comparison: there is no baseline yet, and ``spec.bootstrap`` decides.
    metrics, tables
        What the run of the evaluation holds: metrics by name, and a table by its name without ending.
    intervals
        Confidence intervals of metrics that have one.
    missing_genes
        Genes of the baseline that the version lacks: a comparison says nothing about them, so that rules on explained
        variance against the baseline do not pass unless ``spec.allow_missing_genes`` is set.
    model, baseline, cells, in_sample, key, notes
        To be kept with the verdict. Unless ``spec.allow_in_sample`` is set, nothing is decided on cells that are not
        known to be held out.

    Raises
    ------
    ValueError
        If the comparison is not of two versions.

    Notes
    -----
    The arguments are public and many are only kept with the verdict: they stay apart.
    """
    if comparison is not None and (comparison.kind != "versions" or len(comparison.versions) != 2):
        msg = f"a verdict takes a comparison of two versions, not of {len(comparison.versions)} {comparison.kind}"
        raise ValueError(msg)
    results = []
    for rule in spec.rules:
        if not rule.against_baseline:
            results.append(_absolute(rule, evaluation, metrics, intervals or {}, tables))
        elif comparison is not None:
            found = _relative(rule, comparison, evaluation)
            results.append(found if spec.allow_missing_genes else _without(found, missing_genes))
        elif no_comparison is not None:
            results.append(_settled(rule, "undecided", no_comparison))
        else:
            results.append(_settled(rule, spec.bootstrap, f"there is no baseline, and gate.bootstrap={spec.bootstrap}"))
    if in_sample is not False and not spec.allow_in_sample:
        where = "it is not known which cells" if in_sample is None else "some of these cells are among those that"
        results.append(
            RuleResult(
                rule="held_out_cells",
                kind="cells",
                outcome="undecided",
                value=None,
                low=None,
                high=None,
                threshold="cells that no judged version was fitted on",
                reason=f"{where} the versions were fitted on ({cells}): what they explain there says little about new "
                "tissue; hold out a region or section, or set gate.allow_in_sample=true",
            )
        )
    return Verdict(
        outcome=overall_outcome(result.outcome for result in results),
        results=tuple(results),
        model=dict(model or {}),
        baseline=None if baseline is None else dict(baseline),
        cells=cells,
        in_sample=in_sample,
        key=key,
        notes=(*notes, *(f"the rule {name} is left out" for name in spec.left_out)),
    )


def _absolute(
    rule: Rule,
    evaluation: HeadEvaluation,
    metrics: Mapping[str, float],
    intervals: Mapping[str, tuple[float, float]],
    tables: Callable[[str], pd.DataFrame],
) -> RuleResult:
    if rule.kind in ("required_types", "required_genes"):
        return _required(rule, evaluation)
    if rule.kind == "metric":
        elements = [_metric(str(rule.metric), metrics, intervals)]
    elif rule.kind == "cell":
        elements = _cells(rule, tables)
    elif rule.kind == "significant_heads":
        elements = _significant(rule, evaluation)
    else:
        elements = _of_types(rule, evaluation)
    return _judged(rule, elements, at_least=rule.at_least, at_most=rule.at_most)


def _metric(name: str, metrics: Mapping[str, float], intervals: Mapping[str, tuple[float, float]]) -> Element:
    if name not in metrics:
        near = get_close_matches(name, list(metrics), n=3)
        hint = f"; near it: {', '.join(near)}" if near else ""
        return Element(name=name, value=None, reason=f"the evaluation has no metric {name}{hint}")
    low, high = intervals.get(name, (None, None))
    return Element(name=name, value=metrics[name], low=low, high=high, reason=_NO_INTERVAL)


def _cells(rule: Rule, tables: Callable[[str], pd.DataFrame]) -> list[Element]:
    """Return the elements of a table's column, with intervals where the table has them."""
    frame = tables(str(rule.table))
    for column in (str(rule.column), *rule.where):
        if column not in frame.columns:
            there = ", ".join(map(str, frame.columns))
            return [
                Element(name=column, value=None, reason=f"table {rule.table} has no column {column}: it has {there}")
            ]
    kept = np.ones(len(frame), dtype=bool)
    for column, value in rule.where.items():
        texts = frame[column].astype(str)
        kept &= texts.isin(meant_by(value, texts.unique())).to_numpy()
    chosen = frame[kept]
    asked = " and ".join(f"{column} = {value}" for column, value in rule.where.items()) or "at all"
    if not len(chosen):
        return [Element(name=str(rule.column), value=None, reason=f"table {rule.table} has no row with {asked}")]
    ends_of = [one for one in _ENDS.get(str(rule.column), ()) if one in frame.columns]
    names = [column for column in ("head", "ct_name", "sender", "gene", "baseline", "mode") if column in frame.columns]
    elements = []
    for entry in chosen.to_dict("records"):
        why = str(entry.get("undefined_reason") or "") or "the cell of the table is empty or no number"
        ends = dict(zip(("low", "high"), (entry[one] for one in ends_of), strict=False))
        label = " ".join(str(entry[column]) for column in names) or str(rule.column)
        held = entry[str(rule.column)]
        # booleans count as 1 and 0
        number = int(held) if isinstance(held, (bool, np.bool_)) else held
        elements.append(Element(name=label, value=number, reason=why, **ends))
    return elements


def _significant(rule: Rule, evaluation: HeadEvaluation) -> list[Element]:
    adjusted, alpha = evaluation.adjusted, evaluation.spec.permutation.alpha

    def counted(name: str, own: np.ndarray) -> Element:
        n_untested, value = int(np.count_nonzero(np.isnan(own))), int(np.count_nonzero(own <= alpha))
        if n_untested == own.size:
            return Element(name=name, value=None, reason="no head could be tested")
        if rule.at_most is None or not n_untested:
            return Element(name=name, value=value)
        # heads without a test may be significant
        return Element(name=name, value=value, low=value, high=value + n_untested)

    if rule.types is None:
        return [counted("all types", adjusted)]
    elements = []
    for name in rule.types:
        if name not in evaluation.cell_types:
            elements.append(Element(name=name, value=None, reason="no cell of this type was evaluated"))
            continue
        elements.append(counted(name, adjusted[:, evaluation.cell_types.index(name)]))
    return elements


def _of_types(rule: Rule, evaluation: HeadEvaluation) -> list[Element]:
    """Return the whole model's explained variance by type, or its gain over the best baseline."""
    found, trivial = evaluation.intervals, evaluation.trivial
    elements = []
    for name, at, why in _judged_types(rule, evaluation):
        if at is None:
            elements.append(Element(name=name, value=None, reason=why))
            continue
        value = float(evaluation.expl_var_full[at])
        low = math.nan if found is None else float(found.full_low[at])
        high = math.nan if found is None else float(found.full_high[at])
        if rule.kind == "gain":
            if trivial is None:
                elements.append(
                    Element(name=name, value=None, reason="baselines were not computed (ablation.baselines)")
                )
                continue
            # the predictor's uncertainty is not known and is ignored
            gain = float(trivial.full_gain[at])
            less = value - gain
            value, low, high = gain, low - less, high - less
        elements.append(Element(name=name, value=value, low=low, high=high, reason=_NO_INTERVAL))
    return elements


def _judged_types(rule: Rule, evaluation: HeadEvaluation) -> list[tuple[str, int | None, str]]:
    """Return name and index of the types that a rule judges; the index of a type that was not evaluated is None."""
    if rule.types is not None:
        return [
            (name, evaluation.cell_types.index(name), "")
            if name in evaluation.cell_types
            else (name, None, "no cell of this type was evaluated")
            for name in rule.types
        ]
    return [(name, at, "") for at, name in enumerate(evaluation.cell_types) if evaluation.n_cells[at] >= rule.min_cells]


def _required(rule: Rule, evaluation: HeadEvaluation) -> RuleResult:
    if rule.kind == "required_types":
        asked, what = rule.types or (), "cell types"
        known = dict(zip(evaluation.cell_types, np.isfinite(evaluation.expl_var_full).tolist(), strict=True))
    else:
        asked, what = rule.genes or (), "genes"
        # constant genes and too small types have no explained variance
        some = np.isfinite(evaluation.expl_var_gene).any(axis=(0, 1)).tolist()
        known = dict(zip(evaluation.genes, some, strict=True))
    missing = [name for name in asked if name not in known]
    undefined = [name for name in asked if known.get(name) is False]
    outcome = "fail" if missing else "undecided" if undefined else "pass"
    said = [f"{listed(missing)} not there"] * bool(missing)
    said += [f"{listed(undefined)} without explained variance"] * bool(undefined)
    return RuleResult(
        rule=rule.name,
        kind=rule.kind,
        outcome=outcome,
        value=len(asked) - len(missing) - len(undefined),
        low=None,
        high=None,
        threshold=f"{len(asked)} {what}: {listed(asked)}",
        reason="; ".join(said) or "all are there, with explained variance",
    )


def _relative(rule: Rule, comparison: HeadComparison, evaluation: HeadEvaluation) -> RuleResult:
    if rule.kind == "stability":
        match = comparison.matches[0]
        known = [0.0 if math.isnan(value) else value for value in match.matched.tolist()]
        kept = int(np.count_nonzero(match.partner >= 0))
        element = Element(
            name=f"{kept} of {len(known)} heads are there",
            value=sum(known) / len(known) if known else None,
            reason="the baseline has no head",
        )
        return _judged(rule, [element], at_least=rule.at_least)
    margin = 0.0 if rule.margin is None else rule.margin
    elements = _differences(rule, comparison, evaluation)
    if rule.kind == "superiority":
        return _judged(rule, elements, at_least=margin, strict=True)
    return _judged(rule, elements, at_least=-margin, strict=True)


def _differences(rule: Rule, comparison: HeadComparison, evaluation: HeadEvaluation) -> list[Element]:
    """Return differences of explained variance, the version's minus the baseline's."""
    if rule.of == "overall":
        whole = comparison.overall[0]
        why = f"no interval of the difference ({whole.n_tiles} tiles)"
        return [Element(name="all cells", value=whole.difference, low=whole.low, high=whole.high, reason=why)]
    found = comparison.differences[0]
    reasons = dict(found.reasons)
    rows = [len(found.head_before) - 1] if rule.of == "types" else list(range(len(found.head_before) - 1))
    elements = []
    for name, at, why in _judged_types(rule, evaluation):
        if at is None or name not in found.cell_types:
            missing = why or "the baseline does not know this type"
            elements.append(Element(name=name, value=None, reason=missing))
            continue
        column = found.cell_types.index(name)
        if rule.of == "heads":
            gone = np.flatnonzero(comparison.matches[0].partner < 0).tolist()
            why_gone = "it is gone: no head of the version is matched with it"
            elements += [Element(name=f"{name}, head {head}", value=None, reason=why_gone) for head in gone]
        for row in rows:
            head = f", head {found.head_before[row]} -> {found.head_after[row]}" if rule.of == "heads" else ""
            elements.append(
                Element(
                    name=f"{name}{head}",
                    value=found.difference[row, column],
                    low=found.low[row, column],
                    high=found.high[row, column],
                    reason=reasons.get(name, "the difference has no interval"),
                )
            )
    return elements


def _without(result: RuleResult, genes: Sequence[str]) -> RuleResult:
    """Return the result, undecided instead of passed if genes of the baseline were not compared."""
    if not genes or result.outcome != "pass" or result.kind == "stability":
        return result
    why = (
        f"{len(genes)} genes of the baseline are not in the version ({listed(genes)}), and were not compared; "
        f"gate.allow_missing_genes=true accepts that. On the others: {result.reason}"
    )
    return replace(result, outcome="undecided", reason=why)


def _judged(
    rule: Rule,
    elements: Sequence[Element],
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    strict: bool = False,
) -> RuleResult:
    """Return the result of a rule over all elements, with the one that decided."""
    outcomes = [decide(element, at_least=at_least, at_most=at_most, strict=strict) for element in elements]
    n_passed, n_open = outcomes.count("pass"), outcomes.count("undecided")
    needed = len(elements) if rule.need == "all" else 1 if rule.need == "any" else int(rule.need)
    if not elements:
        outcome = "undecided"
    elif n_passed >= needed:
        outcome = "pass"
    else:
        outcome = "fail" if n_passed + n_open < needed else "undecided"
    shown = _deciding(elements, outcomes, outcome, at_least)
    several = len(elements) > 1
    return RuleResult(
        rule=rule.name,
        kind=rule.kind,
        outcome=outcome,
        value=None if shown is None else number_of(shown.value),
        low=None if shown is None or shown.low is None else number_of(shown.low),
        high=None if shown is None or shown.high is None else number_of(shown.high),
        threshold=threshold_of(rule, at_least=at_least, at_most=at_most, strict=strict),
        reason=reason_of(rule, elements, outcomes, outcome, needed, shown),
        details=tuple(
            (element.name, number_of(element.value), number_of(element.low), number_of(element.high), said)
            for element, said in zip(elements[:_MOST_DETAILS], outcomes[:_MOST_DETAILS], strict=True)
        )
        if several
        else (),
    )


def _deciding(
    elements: Sequence[Element], outcomes: Sequence[str], outcome: str, at_least: float | None
) -> Element | None:
    """Return the element that decided: among those with the rule's outcome, the one nearest to another outcome."""
    chosen = [element for element, said in zip(elements, outcomes, strict=True) if said == outcome]
    chosen = chosen or list(elements)
    known = [element for element in chosen if math.isfinite(number_of(element.value))]
    if not known:
        return chosen[0] if chosen else None
    # the smallest value is nearest to a lower bound, the largest to an upper one
    return (min if at_least is not None else max)(known, key=lambda element: number_of(element.value))


def _settled(rule: Rule, outcome: str, reason: str) -> RuleResult:
    margin = 0.0 if rule.margin is None else rule.margin
    threshold = threshold_of(
        rule,
        at_least=rule.at_least if rule.kind == "stability" else margin if rule.kind == "superiority" else -margin,
        at_most=None,
        strict=True,
    )
    return RuleResult(
        rule=rule.name,
        kind=rule.kind,
        outcome=outcome,
        value=None,
        low=None,
        high=None,
        threshold=threshold,
        reason=reason,
    )
