"""How alike heads are: in what they bring, in where they look, in which genes they explain."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float, Float64, Int64

__all__ = ["attention_divergence", "linear_cka", "product_scale", "profile_cosine"]


def product_scale(
    size: Float64[np.ndarray, " heads"], other: Float64[np.ndarray, " others"]
) -> Float64[np.ndarray, "h o"]:
    """Return the roots of products of sizes, which sums of products are divided by; NaN where one is 0."""
    scale = np.sqrt(np.outer(size, other))
    return np.where(scale > 0.0, scale, np.nan)


def linear_cka(
    one: Float[np.ndarray, "cells heads size"],
    other: Float[np.ndarray, "cells others size"],
    types: Int64[np.ndarray, " cells"],
    weights: Float64[np.ndarray, " cells"],
) -> Float64[np.ndarray, "heads others"]:
    """Return linear centred kernel alignment of what heads bring: 1 if one is a rotated and scaled copy of the other.

    Parameters
    ----------
    one, other
        Attention outputs of the same cells, shape (cells, heads, head_size); sizes may differ.
    types, weights
        Of the cells: outputs are centred within types.

    References
    ----------
    Kornblith et al. (2019), Similarity of neural network representations revisited, ICML; the RV coefficient of Robert
    & Escoufier (1976).
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
    alike: Float64[np.ndarray, "heads others"] = between / product_scale(np.diag(within), np.diag(beside))
    return alike


def attention_divergence(
    one: Float[np.ndarray, "cells heads places"], other: Float[np.ndarray, "cells others places"]
) -> Float64[np.ndarray, "heads others"]:
    """Return how differently heads share their attention out: the mean Jensen-Shannon divergence in bits, 0 to 1.

    Parameters
    ----------
    one, other
        Attention of the same cells to the same places, the dummy among them.
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
