"""Definitions of head evaluation as explicit loops."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


def variance(values: Sequence[float]) -> float:
    """Unbiased variance, by definition, with sums that do not round."""
    mean = math.fsum(values) / len(values)
    return math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)


def explained_variance(predictions: np.ndarray, targets: np.ndarray) -> tuple[list[float], float]:
    """Per gene, NaN where the target is constant, and aggregated over genes."""
    per_gene, residuals, totals = [], [], []
    for gene in range(targets.shape[1]):
        y = [float(value) for value in targets[:, gene]]
        difference = [float(p) - t for p, t in zip(predictions[:, gene], y, strict=True)]
        varies = len(set(y)) > 1
        residuals.append(variance(difference))
        totals.append(variance(y) if varies else 0.0)
        per_gene.append(1.0 - residuals[-1] / totals[-1] if varies else math.nan)
    total = math.fsum(totals)
    return per_gene, 1.0 - math.fsum(residuals) / total if total > 0.0 else math.nan


def mse(predictions: np.ndarray, targets: np.ndarray, permutation: Sequence[int]) -> float:
    """Mean squared error when cell i gets the prediction of cell ``permutation[i]``."""
    squares = []
    for cell, other in enumerate(permutation):
        for gene in range(targets.shape[1]):
            squares.append((float(predictions[other, gene]) - float(targets[cell, gene])) ** 2)
    return math.fsum(squares) / len(squares)


def permutation_count(predictions: np.ndarray, targets: np.ndarray, permutations: Iterable[Sequence[int]]) -> int:
    """How many permutations fit at least as well as the identity; equal up to rounding counts."""
    observed = mse(predictions, targets, range(len(targets)))
    tiny = 1e-9 * (observed + float(np.mean(targets.astype(np.float64) ** 2)))
    return sum(mse(predictions, targets, permutation) <= observed + tiny for permutation in permutations)


def exhaustive_p(predictions: np.ndarray, targets: np.ndarray) -> float:
    """The p-value over all n! permutations (n <= 6), the identity among them."""
    n_cells = len(targets)
    assert n_cells <= 6
    every = list(itertools.permutations(range(n_cells)))
    return permutation_count(predictions, targets, every) / len(every)


def benjamini_hochberg(p: Sequence[float]) -> list[float]:
    """Adjusted p-value of i: the least m * p(j) / j over ranks j from the rank of i on, at most 1."""
    m = len(p)
    ranked = sorted(p)
    return [min([1.0, *(m * ranked[j] / (j + 1) for j in range(m) if ranked[j] >= value)]) for value in p]
