"""Which head of one model is which head of another: how alike they are, their assignment, p values of similarity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import linear_sum_assignment

from amici_eval.stats.permutation.permutations import PermutationStream
from amici_eval.stats.pvalues import p_values

if TYPE_CHECKING:
    from jaxtyping import Float, Float64, Int64, UInt64


def _product_scale(
    size: Float64[np.ndarray, " heads"], other: Float64[np.ndarray, " others"]
) -> Float64[np.ndarray, "h o"]:
    """Return ``sqrt(size * other)``, which turns sums of products into correlations; NaN where it is 0."""
    scale = np.sqrt(np.outer(size, other))
    return np.where(scale > 0.0, scale, np.nan)


def linear_cka(
    one: Float[np.ndarray, "cells heads size"],
    other: Float[np.ndarray, "cells others size"],
    types: Int64[np.ndarray, " cells"],
    weights: Float64[np.ndarray, " cells"],
) -> Float64[np.ndarray, "heads others"]:
    """Return linear centred kernel alignment of head outputs: 1 if one is a rotated and scaled copy of the other.

    Outputs are centred within types. Kornblith et al. (2019), ICML; the RV coefficient of Robert & Escoufier (1976).
    """
    centred = []
    for outputs in (one, other):
        wide = outputs.astype(np.float64)
        for code in np.unique(types):
            wide[types == code] -= wide[types == code].mean(axis=0)
        centred.append(wide * np.sqrt(weights)[:, None, None])
    between, within, beside = (
        np.square(np.tensordot(left, right, axes=(0, 0))).sum(axis=(1, 3))
        for left, right in ((centred[0], centred[1]), (centred[0], centred[0]), (centred[1], centred[1]))
    )
    alike: Float64[np.ndarray, "heads others"] = between / _product_scale(np.diag(within), np.diag(beside))
    return alike


def attention_divergence(
    one: Float[np.ndarray, "cells heads places"], other: Float[np.ndarray, "cells others places"]
) -> Float64[np.ndarray, "heads others"]:
    """Return the mean Jensen-Shannon divergence between the heads' attention, in bits, 0 to 1.

    Places are the same for both models, the dummy among them.
    """
    first, second = one.astype(np.float64), other.astype(np.float64)
    found = np.empty((first.shape[1], second.shape[1]))
    for head in range(first.shape[1]):
        for partner in range(second.shape[1]):
            p, q = first[:, head], second[:, partner]
            middle = (p + q) / 2.0
            found[head, partner] = np.mean((_relative(p, middle) + _relative(q, middle)) / 2.0)
    return found


def _relative(p: Float64[np.ndarray, "cells places"], q: Float64[np.ndarray, "cells places"]) -> np.ndarray:
    ratio = np.divide(p, q, out=np.ones_like(p), where=p > 0.0)
    return np.asarray((p * np.log2(ratio)).sum(axis=1))


def profile_cosine(
    one: Float64[np.ndarray, "heads genes"], other: Float64[np.ndarray, "others genes"]
) -> Float64[np.ndarray, "heads others"]:
    """Return the cosine between gene profiles of explained variance; genes undefined in either are left out."""
    found = np.full((len(one), len(other)), np.nan)
    for head, ours in enumerate(one):
        for partner, theirs in enumerate(other):
            both = ~np.isnan(ours) & ~np.isnan(theirs)
            length = np.linalg.norm(ours[both]) * np.linalg.norm(theirs[both])
            if length > 0.0:
                found[head, partner] = ours[both] @ theirs[both] / length
    return found


_CONSTANT = 1e-12
"""Factors that vary by less, relative to their size, vary by rounding alone."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class HeadContributions:
    """Contributions of a model's heads, each kept alone, to the prediction of some cells, as factors.

    The prediction of cell i of type c with head h alone is ``factors[i, h] @ [query_weights[c], head_weights[h]]`` plus
    an offset of the type; ``factors`` are ``[1, z] / scale``. ``blocks``: block of tissue of each cell, -1 if not
    known; ``weights``: how many cells of the tissue each stands for, one number within a type, so that its cells can
    change places.
    """

    types: Int64[np.ndarray, " cells"]
    blocks: Int64[np.ndarray, " cells"]
    weights: Float64[np.ndarray, " cells"]
    factors: Float64[np.ndarray, "cells heads rank"]
    query_weights: Float64[np.ndarray, "types genes"]
    head_weights: Float64[np.ndarray, "heads genes size"]

    def centred(self, code: int) -> tuple[Float64[np.ndarray, "cells heads rank"], float]:
        """Return the factors of one type as deviations from their mean, and the weight of each of its cells."""
        of_type = self.types == code
        own = self.factors[of_type]
        deviations = own - own.mean(axis=0)
        # clip rounding noise of constants to 0: it would make heads without contribution alike
        constant = np.ptp(own, axis=0) <= _CONSTANT * np.abs(own).max(axis=0)
        return np.where(constant, 0.0, deviations), float(self.weights[of_type][0])

    def gram(
        self, other: HeadContributions, code: int, inner: Float64[np.ndarray, "heads size others size"]
    ) -> Float64[np.ndarray, "heads rank others rank"]:
        """Return products over genes of what unit factors contribute; ``inner``: those of the heads' own weights."""
        n_heads, rank = self.factors.shape[1:]
        n_others, others_rank = other.factors.shape[1:]
        ours, theirs = self.query_weights[code], other.query_weights[code]
        gram = np.empty((n_heads, rank, n_others, others_rank))
        gram[:, 0, :, 0] = ours @ theirs
        gram[:, 0, :, 1:] = np.einsum("g,kgs->ks", ours, other.head_weights)[None]
        gram[:, 1:, :, 0] = np.einsum("hgs,g->hs", self.head_weights, theirs)[:, :, None]
        gram[:, 1:, :, 1:] = inner
        return gram

    def inner(self, other: HeadContributions) -> Float64[np.ndarray, "heads size others size"]:
        """Return products over genes of the heads' own weights."""
        n_heads, n_genes, size = self.head_weights.shape
        n_others, _, others_size = other.head_weights.shape
        ours = self.head_weights.transpose(0, 2, 1).reshape(n_heads * size, n_genes)
        theirs = other.head_weights.transpose(1, 0, 2).reshape(n_genes, n_others * others_size)
        inner: Float64[np.ndarray, "heads size others size"] = (ours @ theirs).reshape(
            n_heads, size, n_others, others_size
        )
        return inner


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class HeadProducts:
    """Products of the contributions of the heads of two models, centred within types.

    ``products``: summed over genes and weighted; ``size``, ``size_other``: weighted squares of contributions by type.
    """

    products: Float64[np.ndarray, "cells heads others"]
    size: Float64[np.ndarray, "types heads"]
    size_other: Float64[np.ndarray, "types others"]
    types: Int64[np.ndarray, " cells"]

    @property
    def scale(self) -> Float64[np.ndarray, "heads others"]:
        """Divisor that turns sums of products into similarities; NaN for heads without contribution."""
        return _product_scale(self.size.sum(axis=0), self.size_other.sum(axis=0))

    @property
    def similarity(self) -> Float64[np.ndarray, "heads others"]:
        """Correlation of contributions over all cells and genes."""
        similarity: Float64[np.ndarray, "heads others"] = self.products.sum(axis=0) / self.scale
        return similarity

    @property
    def similarity_by_type(self) -> Float64[np.ndarray, "types heads others"]:
        """Correlation of contributions within each type."""
        sums = np.zeros((len(self.size), *self.products.shape[1:]))
        np.add.at(sums, self.types, self.products)
        scales = [_product_scale(one, other) for one, other in zip(self.size, self.size_other, strict=True)]
        similarity: Float64[np.ndarray, "types heads others"] = sums / np.stack(scales)
        return similarity


def head_products(one: HeadContributions, other: HeadContributions) -> HeadProducts:
    """Return the products of the contributions of two models' heads, cell by cell.

    Both are on the same cells in the same order, and the same genes; heads and their sizes may differ.
    """
    n_types = len(one.query_weights)
    products = np.zeros((len(one.types), one.factors.shape[1], other.factors.shape[1]))
    size, size_other = (np.zeros((n_types, each.factors.shape[1])) for each in (one, other))
    inner = one.inner(other)
    for code in np.unique(one.types):
        (ours, weight), (theirs, _) = one.centred(code), other.centred(code)
        products[one.types == code] = weight * _contracted(ours, one.gram(other, code, inner), theirs)
        for each, factors, into in ((one, ours, size), (other, theirs, size_other)):
            into[code] = weight * _squares(each, factors, code)
    return HeadProducts(products=products, size=size, size_other=size_other, types=one.types)


def _contracted(
    ours: np.ndarray, gram: Float64[np.ndarray, "heads rank others rank"], theirs: np.ndarray
) -> np.ndarray:
    """Return ``sum_pq ours[i, h, p] gram[h, p, k, q] theirs[i, k, q]`` of cell i, head h and other head k."""
    n_heads, rank, n_others, others_rank = gram.shape
    found = np.empty((len(ours), n_heads, n_others), dtype=np.result_type(ours, theirs))
    for head in range(n_heads):
        turned = (ours[:, head] @ gram[head].reshape(rank, -1)).reshape(len(ours), n_others, others_rank)
        found[:, head] = (turned * theirs).sum(axis=2)
    return found


def _squares(
    of: HeadContributions, factors: Float64[np.ndarray, "cells heads rank"], code: int
) -> Float64[np.ndarray, " heads"]:
    found = np.empty(factors.shape[1])
    for head, own in enumerate(of.head_weights):
        weights = np.hstack([of.query_weights[code][:, None], own])
        found[head] = np.einsum("ip,pq,iq->", factors[:, head], weights.T @ weights, factors[:, head], optimize=True)
    return np.maximum(found, 0.0)


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
        turned = _contracted(ours.conj(), one.gram(other, code, inner), theirs)
        by_shift = weight * np.fft.irfft(turned, n=n_cells, axis=0)
        total += by_shift[(_words(n_permutations, seed, label, _SHIFTS) % np.uint64(n_cells)).astype(np.int64)]
    return total


def _signs(n_permutations: int, n_blocks: int, seed: int) -> Float64[np.ndarray, "permutations blocks"]:
    bits = _words(n_permutations * n_blocks, seed, "", _FLIPS) >> np.uint64(63)
    return 1.0 - 2.0 * bits.reshape(n_permutations, n_blocks).astype(np.float64)


def _words(number: int, seed: int, label: str, what: str) -> UInt64[np.ndarray, " words"]:
    key = PermutationStream(seed=seed, cell_type=label, stratum=what, n_cells=1).key()
    return np.random.Philox(key=key).random_raw(number)
