"""What the gate holds against bounds, and how it tells what it saw."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from amici_eval.settings.gate import Rule

__all__ = ["Element", "listed", "number_of", "reason_of", "threshold_of"]


@dataclass(frozen=True, kw_only=True)
class Element:
    """Something that is held against bounds.

    Parameters
    ----------
    name
        In words.
    value
        NaN or ``None``: undefined.
    low, high
        Its confidence interval; ``None`` for what has none by nature, such as a count; NaN for one that is missing.
    reason
        Why it is undefined, if known.
    """

    name: str
    value: Any
    low: Any = None
    high: Any = None
    reason: str = ""


def reason_of(
    rule: Rule, elements: Sequence[Element], outcomes: Sequence[str], outcome: str, needed: int, shown: Element | None
) -> str:
    """Return why a rule came out as it did, with the numbers of the element that decided."""
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
    """Return what a rule asks for."""
    if rule.kind == "non_inferiority":
        return f"worse by less than {-(at_least or 0.0):g}"
    if rule.kind == "superiority":
        return f"better by more than {at_least:g}"
    bounds = (("at least", at_least), ("at most", at_most))
    return " and ".join(f"{word} {bound:g}" for word, bound in bounds if bound is not None)


def number_of(value: Any) -> float:
    """Return a number, NaN for what is none."""
    if value is None or isinstance(value, (bool, np.bool_)):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def listed(names: Sequence[str], most: int = 8) -> str:
    """Return names, the first of many."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
