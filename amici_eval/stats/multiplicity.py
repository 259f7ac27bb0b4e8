"""Adjustment of p-values for the number of tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import false_discovery_control

from amici_eval.stats.pvalues import p_values

if TYPE_CHECKING:
    from jaxtyping import Float64

__all__ = ["adjust_p_values", "max_t_p_values"]

_CHUNK_ENTRIES = 2**20


def adjust_p_values(p: Float64[np.ndarray, ...], *, method: str = "bh") -> Float64[np.ndarray, ...]:
    """Adjust p-values to control errors among the tests that are defined.

    Parameters
    ----------
    p
        p-values of any shape; NaN marks an undefined test, which is no member of the family and stays NaN.
    method
        ``"bh"``: false discovery rate, Benjamini & Hochberg (1995), for tests that are independent or positively
        dependent. ``"by"``: the same under any dependence, Benjamini & Yekutieli (2001). ``"holm"``: probability of
        any false rejection, under any dependence, Holm (1979).

    Raises
    ------
    ValueError
        If a p-value lies outside [0, 1] or the method is unknown.
    """
    if method not in ("bh", "by", "holm"):
        msg = f"method {method!r} is unknown; use 'bh', 'by' or 'holm'"
        raise ValueError(msg)
    flat = np.asarray(p, dtype=np.float64)
    defined = ~np.isnan(flat)
    adjusted = np.full(flat.shape, np.nan)
    if defined.any():
        own = flat[defined]
        adjusted[defined] = _holm(own) if method == "holm" else false_discovery_control(own, method=method)
    return adjusted


def _holm(p: Float64[np.ndarray, " tests"]) -> Float64[np.ndarray, " tests"]:
    if np.any(p < 0.0) or np.any(p > 1.0):
        msg = f"p-values lie in [{p.min()}, {p.max()}]; they must lie between 0 and 1"
        raise ValueError(msg)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(p.size)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1)), 1.0)
    return adjusted


def max_t_p_values(
    observed: Float64[np.ndarray, "heads types"],
    permuted: Float64[np.ndarray, "permutations heads types"],
    *,
    tolerance: float = 1e-7,
) -> Float64[np.ndarray, "heads types"]:
    """Return p-values adjusted for all heads and types together, which keep what the tests have in common.

    The probability that any true null hypothesis has a value of at most a is at most a (family-wise error), by the
    step-down maxT of Westfall & Young: the largest observed statistic is compared with the permutations' largest of
    all tests, the second with their largest of all but the first, and so on. Null: as that of the permutations; heads
    that share a type share its permutations, so their dependence is kept.

    Parameters
    ----------
    observed
        Statistics less their mean over permutations, divided by their standard deviation (T / sd for T of
        ``FactorStatistics``), shape (heads, types). NaN marks an undefined test, which is no member of the family.
    permuted
        The same of the permutations, shape (permutations, heads, types): one joint permutation of all types each. Types
        are permuted independently, so it does not matter which of their permutations go together.
    tolerance
        A permutation that falls short of the observation by at most this counts, in standard deviations: T is only
        known up to rounding.

    Returns
    -------
    Float64[np.ndarray, "heads types"]
        (b+1)/(m+1) of the successive maxima, made monotone; NaN where undefined.

    Raises
    ------
    ValueError
        If shapes disagree, there is no permutation, or a permutation of a defined test is NaN.

    References
    ----------
    Westfall & Young (1993), Resampling-Based Multiple Testing, algorithm 2.8; Phipson & Smyth (2010) for the 1 that is
    added.
    """
    if permuted.shape[1:] != observed.shape or len(permuted) < 1:
        msg = f"observed {observed.shape} and permuted {permuted.shape} disagree; (permutations, *observed) is needed"
        raise ValueError(msg)
    adjusted = np.full(observed.shape, np.nan)
    values = observed.ravel()
    defined = np.flatnonzero(~np.isnan(values))
    if not defined.size:
        return adjusted
    # from the smallest on: the maximum of all that are not larger is then a running one
    upwards = defined[np.argsort(values[defined], kind="stable")]
    least = values[upwards] - tolerance
    counts = np.zeros(upwards.size, dtype=np.int64)
    step = max(1, _CHUNK_ENTRIES // upwards.size)
    for start in range(0, len(permuted), step):
        own = permuted[start : start + step]
        maxima = own.reshape(len(own), -1)[:, upwards].astype(np.float64, copy=False)
        if np.isnan(maxima).any():
            heads, types = np.unravel_index(upwards[np.isnan(maxima).any(axis=0)], observed.shape)
            msg = f"permutations of the defined test of head {heads[0]} and type {types[0]} are NaN"
            raise ValueError(msg)
        np.maximum.accumulate(maxima, axis=1, out=maxima)
        counts += np.count_nonzero(maxima >= least, axis=0)
    p = p_values(counts, n_permutations=len(permuted)).p
    adjusted.flat[upwards] = np.maximum.accumulate(p[::-1])[::-1]
    return adjusted
