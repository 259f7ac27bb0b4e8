"""Numbers as text, the same on pages, in tables, in figures and in sentences."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt


def effect(value: float) -> str:
    """Return an explained variance as text with three decimals, or <0.001 or >-0.001 if it would round to zero."""
    if np.isnan(value):
        return "undefined"
    if value != 0 and abs(value) < 5e-4:
        return "<0.001" if value > 0 else ">-0.001"
    return f"{value:.3f}"


def p_text(value: float) -> str:
    """Return a p-value as text: three decimals, or scientific where that says too little."""
    if np.isnan(value):
        return "undefined"
    if value == 0:
        return "0"
    return f"{value:.1e}" if value < 1e-3 else f"{value:.3f}"


def interval(low: float, high: float) -> str:
    """Return a confidence interval of an explained variance as text, empty where there is none."""
    return "" if np.isnan(low) or np.isnan(high) else f"{effect(low)} to {effect(high)}"


def rounded(value: float) -> str:
    """Return a length or a count as text with three digits, never in scientific notation above 1."""
    if np.isnan(value):
        return "undefined"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def span(values: npt.ArrayLike, *, as_text: Callable[[float], str] = rounded) -> str:
    """Return the smallest and the largest of numbers that are defined, as text, or ``undefined``."""
    numbers = np.asarray(values, dtype=np.float64)
    numbers = numbers[np.isfinite(numbers)]
    if not numbers.size:
        return "undefined"
    low, high = (as_text(float(value)) for value in (numbers.min(), numbers.max()))
    return low if low == high else f"{low} to {high}"


def two_decimals(value: float) -> str:
    """Return a similarity as text, or ``undefined``."""
    return "undefined" if np.isnan(value) else f"{value:.2f}"


def dash(text: str) -> str:
    """Return a dash for an undefined number, which tables show where many are."""
    return "–" if text == "undefined" else text


def blank(text: str) -> str:
    """Return nothing for an undefined number."""
    return "" if text == "undefined" else text


def counted(number: int, noun: str) -> str:
    """Return a number of things."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
