"""Which head of one model is which head of another: assignment, and how alike chance would make them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import linear_sum_assignment

from amici_eval.stats.head_products import contracted, head_products
from amici_eval.stats.permutation.permutations import PermutationStream
from amici_eval.stats.pvalues import p_values

if TYPE_CHECKING:
    from jaxtyping import Float64, Int64, UInt64

    from amici_eval.stats.head_products import HeadContributions


__all__ = [
    "MIN_BLOCKS",
    "HeadMatching",
    "assign_heads",
    "match_heads",
]

MIN_BLOCKS = 6
"""Signs of fewer blocks have too few patterns to reach a small p."""

_ORDER, _SHIFTS, _FLIPS = "\0alignment order", "\0alignment shifts", "\0alignment flips"
_ROUNDING = 1e-9
"""Similarities closer than this are tied."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class HeadMatching:
    """Which head of one model is which head of another.

    Parameters
    ----------
    similarity, similarity_by_type
        As :class:`~amici_eval.stats.head_products.HeadProducts` gives them.
    partner
        The other model's head that each head is, shape (heads,); -1: none.
    p_value
        How often cells of a type that change places in the other model give a head a partner as similar as its own,
        matching included, shape (heads,); NaN for heads without contribution.
    p_value_spatial
        The same for contributions that are smooth in space, by flipping signs of whole blocks of tissue, told from the
        cells whose block is known; NaN without blocks enough.
    n_blocks
        Blocks that hold cells.
    reason
        Why there is no spatial p; ``None`` if there is.
    """

    similarity: Float64[np.ndarray, "heads others"]
    similarity_by_type: Float64[np.ndarray, "types heads others"]
    partner: Int64[np.ndarray, " heads"]
    p_value: Float64[np.ndarray, " heads"]
    p_value_spatial: Float64[np.ndarray, " heads"]
    n_blocks: int
    reason: str | None = None


def assign_heads(
    similarity: Float64[np.ndarray, "heads others"], *, unmatched: float = 0.0
) -> Int64[np.ndarray, " heads"]:
    """Return the partner of each head, -1 without one, so that similarities above ``unmatched`` sum to the most.

    Parameters
    ----------
    similarity
        Shape (heads, others); NaN never matches.
    unmatched
        Heads that are no more alike than this stay alone.
    """
    worth = np.nan_to_num(np.maximum(similarity - unmatched, 0.0))
    partner = np.full(len(similarity), -1, dtype=np.int64)
    rows, columns = linear_sum_assignment(worth, maximize=True)
    alike = worth[rows, columns] > 0.0
    partner[rows[alike]] = columns[alike]
    return partner


def match_heads(
    one: HeadContributions,
    other: HeadContributions,
    *,
    unmatched: float = 0.2,
    n_permutations: int = 999,
    seed: int = 0,
) -> HeadMatching:
    """Learn which head of one model is which head of the other, and how alike heads become by chance and matching.

    Parameters
    ----------
    one, other
        On the same cells in the same order, and the same genes; heads and their sizes may differ.
    unmatched
        Heads that are no more alike than this stay alone.
    n_permutations
        Permutations of cells, and flips of blocks.
    seed
        What these depend on.

    Raises
    ------
    ValueError
        If cells or genes differ, or there is no permutation.

    Notes
    -----
    Looking for the best partner makes any two sets of heads alike to some extent, so the assignment is found again for
    each permutation, without the threshold ``unmatched``; p compares a head's similarity to its partner there with that
    to its partner in the truth. A head that gets no partner because the other model has fewer is compared by its
    largest similarity.

    ``p_value``: the cells of each type stand in one random order, and a permutation shifts them by a random number of
    places: an element of a product of cyclic groups, so that the test is exact where cells of a type are exchangeable.
    All shifts come from one Fourier transform. In tissue they are not exchangeable.

    ``p_value_spatial``: products of the contributions are summed over blocks of tissue, and blocks change sign at
    random, all heads together (Canay, Romano & Shaikh 2017). This is right where blocks are so wide that what happens
    in one says little about the next, and one model's contributions, as deviations from their mean, are as likely as
    their negatives. Measured share of p at most .05 for unrelated smooth contributions (400 pairs,
    Gaussian kernel of width .04, .06 and .1 of the window): .06, .06 and .08 with 8 blocks, .07 and .08 (widths .04 and
    .06) with 36; permuting cells: .11, .15 and .27.

    References
    ----------
    Canay, Romano & Shaikh (2017), Randomization tests under an approximate symmetry assumption, Econometrica 85:1013.
    """
    if n_permutations < 1:
        msg = f"n_permutations is {n_permutations}; at least 1 is needed"
        raise ValueError(msg)
    found = head_products(one, other)
    similarity, scale = found.similarity, found.scale
    truth = _best(similarity)
    dead = np.isnan(similarity).all(axis=1)
    shifted = _shifted(one, other, n_permutations, seed) / scale
    p = _p(truth, shifted, n_permutations)
    blocks = np.unique(one.blocks[one.blocks >= 0])
    p_spatial, reason = np.full(len(truth), np.nan), None
    if len(blocks) < MIN_BLOCKS:
        reason = (
            "it is not known where the cells lie"
            if not len(blocks)
            else f"cells in {len(blocks)} blocks of tissue; at least {MIN_BLOCKS} are needed to flip their signs"
        )
    else:
        sums = np.zeros((len(blocks), *similarity.shape))
        known = one.blocks >= 0
        np.add.at(sums, np.searchsorted(blocks, one.blocks[known]), found.products[known])
        signs = _signs(n_permutations, len(blocks), seed)
        flipped = (signs @ sums.reshape(len(blocks), -1)).reshape(n_permutations, *similarity.shape) / scale
        # flips say nothing of cells without a block: the truth they are compared with leaves them out too
        p_spatial = _p(_best(sums.sum(axis=0) / scale), flipped, n_permutations)
    return HeadMatching(
        similarity=similarity,
        similarity_by_type=found.similarity_by_type,
        partner=assign_heads(similarity, unmatched=unmatched),
        p_value=np.where(dead, np.nan, p),
        p_value_spatial=np.where(dead, np.nan, p_spatial),
        n_blocks=len(blocks),
        reason=reason,
    )


def _best(similarity: Float64[np.ndarray, "heads others"]) -> Float64[np.ndarray, " heads"]:
    """Return how alike each head is to its partner, all heads being matched that can be."""
    known = np.nan_to_num(similarity)
    best: Float64[np.ndarray, " heads"] = known.max(axis=1)
    rows, columns = linear_sum_assignment(known, maximize=True)
    best[rows] = known[rows, columns]
    return best


def _p(
    truth: Float64[np.ndarray, " heads"], null: Float64[np.ndarray, "permutations heads others"], n_permutations: int
) -> Float64[np.ndarray, " heads"]:
    counts = np.zeros(len(truth), dtype=np.int64)
    for similarity in null:
        counts += _best(similarity) >= truth - _ROUNDING
    return p_values(counts, n_permutations=n_permutations).p


def _shifted(
    one: HeadContributions, other: HeadContributions, n_permutations: int, seed: int
) -> Float64[np.ndarray, "permutations heads others"]:
    """Return sums of products with the other model's cells shifted, types by numbers of places of their own."""
    total = np.zeros((n_permutations, one.factors.shape[1], other.factors.shape[1]))
    inner = one.inner(other)
    for code in np.unique(one.types):
        (ours, weight), (theirs, _) = one.centred(code), other.centred(code)
        n_cells = len(ours)
        label = str(code)
        order = PermutationStream(seed=seed, cell_type=label, stratum=_ORDER, n_cells=n_cells).batch(0, 1)[0]
        ours, theirs = (np.fft.rfft(factors[order], axis=0) for factors in (ours, theirs))
        turned = contracted(ours.conj(), one.gram(other, code, inner), theirs)
        by_shift = weight * np.fft.irfft(turned, n=n_cells, axis=0)
        total += by_shift[(_words(n_permutations, seed, label, _SHIFTS) % np.uint64(n_cells)).astype(np.int64)]
    return total


def _signs(n_permutations: int, n_blocks: int, seed: int) -> Float64[np.ndarray, "permutations blocks"]:
    bits = _words(n_permutations * n_blocks, seed, "", _FLIPS) >> np.uint64(63)
    return 1.0 - 2.0 * bits.reshape(n_permutations, n_blocks).astype(np.float64)


def _words(number: int, seed: int, label: str, what: str) -> UInt64[np.ndarray, " words"]:
    key = PermutationStream(seed=seed, cell_type=label, stratum=what, n_cells=1).key()
    return np.random.Philox(key=key).random_raw(number)
