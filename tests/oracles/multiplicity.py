"""Adjustments for many tests, word for word."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def benjamini_yekutieli(p: Sequence[float]) -> list[float]:
    """Benjamini and Hochberg's value times 1 + 1/2 + ... + 1/m, at most 1."""
    m = len(p)
    ranked, harmonic = sorted(p), sum(1 / k for k in range(1, m + 1))
    return [min([1.0, *(harmonic * m * ranked[j] / (j + 1) for j in range(m) if ranked[j] >= value)]) for value in p]


def holm(p: Sequence[float]) -> list[float]:
    """The largest (m - rank) * p(rank), ranks from 0, over ranks up to one's own, at most 1."""
    m, ranked = len(p), sorted(p)
    return [min(1.0, max((m - j) * ranked[j] for j in range(m) if ranked[j] <= value)) for value in p]


def max_t(observed: Sequence[float], permuted: Sequence[Sequence[float]]) -> list[float]:
    """Step-down maxT: a test is compared with the maximum over itself and all tests that are not larger."""
    tests = [k for k, value in enumerate(observed) if not math.isnan(value)]
    adjusted = [math.nan] * len(observed)
    largest = 0.0
    for k in sorted(tests, key=lambda k: -observed[k]):
        remaining = [j for j in tests if observed[j] <= observed[k]]
        count = sum(max(row[j] for j in remaining) >= observed[k] for row in permuted)
        largest = max(largest, (count + 1) / (len(permuted) + 1))
        adjusted[k] = largest
    return adjusted


def max_t_single_step(observed: Sequence[float], permuted: Sequence[Sequence[float]]) -> list[float]:
    """Every test is compared with the maximum over all."""
    maxima = [max(row) for row in permuted]
    return [(sum(top >= value for top in maxima) + 1) / (len(maxima) + 1) for value in observed]
