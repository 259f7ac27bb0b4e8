"""The tail of the Pearson law with a given mean, variance, skewness and kurtosis: a beta law where one fits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import beta

from amici_eval.stats.pearson3 import pearson3_tail

if TYPE_CHECKING:
    from jaxtyping import Float64

__all__ = ["pearson_tail"]

_TRUSTED_SHARE = 0.8
"""Of the way to the end of the support: beyond, the logarithm of p goes on along its tangent."""
_LARGEST_SUM = 1e6
"""Of the exponents: a beta law this near to Pearson III differs from it by nothing that matters."""
_LEAST = float(np.finfo(np.float64).tiny)


def pearson_tail(
    standardised: Float64[np.ndarray, " tests"],
    skewness: Float64[np.ndarray, " tests"],
    kurtosis: Float64[np.ndarray, " tests"],
) -> Float64[np.ndarray, " tests"]:
    """Return ``P(X >= standardised)`` of the Pearson law of mean 0, variance 1 and these further moments, never 0.

    Parameters
    ----------
    standardised, skewness
        Shape (tests,).
    kurtosis
        Excess kurtosis, shape (tests,). NaN: not known.

    Returns
    -------
    numpy.ndarray
        In (0, 1]; NaN where ``standardised`` or ``skewness`` is not finite.

    Notes
    -----
    Lighter tails than those of Pearson III (kurtosis below 1.5 skewness^2), which sums over finitely many permutations
    mostly have, are a beta law (Pearson type I) with all four moments; otherwise, and where the kurtosis is not known,
    Pearson III takes over (:func:`amici_eval.stats.pearson3.pearson3_tail`). Beyond eight tenths of the way to the end
    of its support, which no permutation knows of, log p goes on along its tangent, so that p is never 0.
    """
    t, skew, excess = np.broadcast_arrays(
        *(np.asarray(x, dtype=np.float64) for x in (standardised, skewness, kurtosis))
    )
    p = pearson3_tail(t, skew)
    squared = skew**2
    with np.errstate(divide="ignore", invalid="ignore"):
        total = 6.0 * (excess + 2.0 - squared) / (3.0 * squared - 2.0 * excess)
        half = total / 2.0 * (total + 2.0) * np.sqrt(squared / ((total + 2.0) ** 2 * squared + 16.0 * (total + 1.0)))
    first = total / 2.0 - np.sign(skew) * half
    second = total - first
    # exponents below 1 put a peak at an end of the support, which a sum over permutations does not have
    usable = np.isfinite(t) & np.isfinite(total) & (total > 0.0) & (total < _LARGEST_SUM)
    usable &= np.where(usable, np.minimum(first, second), 0.0) > 1.0
    if usable.any():
        p[usable] = _beta_tail(t[usable], first[usable], second[usable])
    return p


def _beta_tail(
    t: Float64[np.ndarray, " n"], first: Float64[np.ndarray, " n"], second: Float64[np.ndarray, " n"]
) -> Float64[np.ndarray, " n"]:
    total = first + second
    mean = first / total
    deviation = np.sqrt(mean * (second / total) / (total + 1.0))
    x = mean + t * deviation
    trusted = np.clip(x, 0.0, mean + _TRUSTED_SHARE * (1.0 - mean))
    tail = np.maximum(beta.sf(trusted, first, second), _LEAST)
    beyond = x > trusted
    log_hazard = beta.logpdf(trusted, first, second) - np.log(tail)
    tail = np.where(beyond, tail * np.exp(-np.exp(log_hazard) * np.maximum(x - trusted, 0.0)), tail)
    return np.asarray(np.clip(tail, _LEAST, 1.0))
