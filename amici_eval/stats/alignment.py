"""Assignment of one model's heads to another's, with p values of their similarity."""

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


MIN_BLOCKS = 6
"""Signs of fewer blocks have too few patterns to reach a small p."""

_ORDER, _SHIFTS, _FLIPS = "\0alignment order", "\0alignment shifts", "\0alignment flips"
_ROUNDING = 1e-9
"""Similarities closer than this are tied."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class HeadMatching:
    """Which head of one model is which head of another.

    ``partner``: the other model's head, -1 if none. ``p_value``: null in which cells of a type change places in the
    other model; ``p_value_spatial``: null in which signs of whole blocks of tissue flip, from cells whose block is
    known. p are NaN for heads without contribution; ``reason``: why there is no spatial p, None if there is.
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

    Heads that are no more alike than ``unmatched`` stay alone; NaN never matches.
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
    """Match the heads of two models, and return p values of similarity that account for the search of partners.

    Heads are matched again in each permutation, without ``unmatched``; p compares a head's similarity to its partner,
    or its largest where the other model has fewer heads. ``p_value``: cells of each type, in one random order, shift by
    a random number of places (a product of cyclic groups); exact if cells of a type are exchangeable, which in tissue
    they are not. ``p_value_spatial``: blocks of tissue change sign, all heads together (Canay, Romano & Shaikh 2017);
    right where blocks are about independent and centred contributions are as likely as their negatives.
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
        # cells without a block are in no flip, so the truth leaves them out too
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
    """Return each head's similarity to its partner in the best matching, or its largest one without a partner."""
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
    """Return sums of products with the other model's cells shifted, each type by its own numbers of places."""
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
