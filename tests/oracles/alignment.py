"""Heads matched the slow way: predictions gene by gene, rows that move, and every assignment tried."""

from __future__ import annotations

from itertools import permutations
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

    from jaxtyping import Float64, Int64

    from amici_eval.stats.matching import HeadContributions


def deviations(of: HeadContributions) -> Float64[np.ndarray, "heads cells genes"]:
    """Return what each head alone adds to the prediction, less its mean over the cells of the type."""
    made = np.empty((of.factors.shape[1], len(of.types), of.query_weights.shape[1]))
    for head in range(len(made)):
        for cell, code in enumerate(of.types):
            weights = np.column_stack([of.query_weights[code], of.head_weights[head]])
            made[head, cell] = weights @ of.factors[cell, head]
        for code in np.unique(of.types):
            own = of.types == code
            made[head, own] = made[head, own] - made[head, own].mean(axis=0)
    return made


def similarity(
    ours: Float64[np.ndarray, "heads cells genes"],
    theirs: Float64[np.ndarray, "others cells genes"],
    weights: Float64[np.ndarray, " cells"],
    signs: Float64[np.ndarray, " cells"],
) -> Float64[np.ndarray, "heads others"]:
    """Return correlations of contributions, the products of each cell multiplied by its sign; 0 leaves a cell out."""
    found = np.empty((len(ours), len(theirs)))
    for head, a in enumerate(ours):
        for other, b in enumerate(theirs):
            products = (a * b).sum(axis=1)
            size = (weights * (a * a).sum(axis=1)).sum() * (weights * (b * b).sum(axis=1)).sum()
            found[head, other] = (signs * weights * products).sum() / np.sqrt(size)
    return found


def matched(alike: Float64[np.ndarray, "heads others"]) -> Float64[np.ndarray, " heads"]:
    """Return the similarity of each head to its partner; heads that are left over take their largest."""
    n_heads, n_others = alike.shape
    n_pairs = min(n_heads, n_others)
    tried = (
        (heads, others)
        for heads in permutations(range(n_heads), n_pairs)
        for others in ([range(n_others)] if n_others == n_pairs else permutations(range(n_others), n_pairs))
    )
    heads, others = max(tried, key=lambda pair: sum(alike[h, k] for h, k in zip(*pair, strict=True)))
    best = alike.max(axis=1)
    for head, other in zip(heads, others, strict=True):
        best[head] = alike[head, other]
    return best


def p_of(
    truth: Float64[np.ndarray, "heads others"], null: Iterable[Float64[np.ndarray, "heads others"]]
) -> Float64[np.ndarray, " heads"]:
    """Return the share of similarities, the true ones among them, by which a head is as alike to its partner."""
    observed = matched(truth)
    exceeds = [matched(alike) >= observed - 1e-9 for alike in null]
    return (1 + np.sum(exceeds, axis=0)) / (1 + len(exceeds))


def shifted_rows(
    types: Int64[np.ndarray, " cells"], orders: dict[int, Int64[np.ndarray, " own"]], shifts: dict[int, int]
) -> Int64[np.ndarray, " cells"]:
    """Return which row comes to stand in each, if the cells of a type move on by some places in their order."""
    moved = np.arange(len(types))
    for code, order in orders.items():
        rows = np.flatnonzero(types == code)[order]
        for place, row in enumerate(rows):
            moved[row] = rows[(place + shifts[code]) % len(rows)]
    return moved
