"""p-values from counts of exceedances, and their adjustment for many tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import beta, false_discovery_control

if TYPE_CHECKING:
    from jaxtyping import Bool, Float64, Int64


@dataclass(frozen=True)
class PValues:
    """p-values of a Monte Carlo test, with the uncertainty from drawing finitely many permutations.

    ci_low, ci_high: Clopper-Pearson 95 % interval of the p-value that infinitely many permutations would give; equal to
    ``p`` where nothing was drawn.
    """

    p: Float64[np.ndarray, ...]
    ci_low: Float64[np.ndarray, ...]
    ci_high: Float64[np.ndarray, ...]

    def without(self, undefined: Bool[np.ndarray, ...]) -> PValues:
        """Return the same with NaN where there is no test."""
        return PValues(*(np.where(undefined, np.nan, values) for values in (self.p, self.ci_low, self.ci_high)))


def exact(p: Float64[np.ndarray, ...]) -> PValues:
    """Return exact p-values, whose intervals are the p-values themselves."""
    return PValues(p=p, ci_low=p, ci_high=p)


def p_values(
    exceedances: Int64[np.ndarray, ...],
    *,
    n_permutations: int | Int64[np.ndarray, ...],
    convention: str = "add_one",
    confidence: float = 0.95,
) -> PValues:
    """Turn the number of permutations at least as extreme as the observation into p-values.

    The observation itself is not counted. ``"add_one"``: (b+1)/(m+1) (Phipson & Smyth 2010); ``"reference"``: b/m, as
    amici-st, which can be 0 and is then not a valid p-value.
    """
    counts = np.asarray(exceedances)
    if not np.issubdtype(counts.dtype, np.integer):
        msg = f"exceedances have dtype {counts.dtype}; counts are whole numbers"
        raise ValueError(msg)
    drawn = np.asarray(n_permutations)
    if np.any(drawn < 1) or np.any(counts < 0) or np.any(counts > drawn):
        msg = f"exceedances must lie in [0, n_permutations={n_permutations}]"
        raise ValueError(msg)
    b = counts.astype(np.float64)
    if convention == "add_one":
        p = (b + 1.0) / (drawn + 1.0)
    elif convention == "reference":
        p = b / drawn
    else:
        msg = f"convention {convention!r} is unknown; use 'add_one' or 'reference'"
        raise ValueError(msg)
    tail = (1.0 - confidence) / 2.0
    with np.errstate(invalid="ignore"):
        low = np.where(counts == 0, 0.0, beta.ppf(tail, b, drawn - b + 1.0))
        high = np.where(counts == drawn, 1.0, beta.ppf(1.0 - tail, b + 1.0, drawn - b))
    return PValues(p=p, ci_low=low, ci_high=high)


def sequential_p_values(
    exceedances: Int64[np.ndarray, ...],
    *,
    n_permutations: Int64[np.ndarray, ...],
    max_permutations: int,
    stop_at: int,
    confidence: float = 0.95,
) -> PValues:
    """Turn the counts of tests that stopped at ``stop_at`` exceedances into p-values (Besag & Clifford 1991).

    p is h/l of a test that stopped at its h-th exceedance in permutation l (from 1), else (b+1)/(m+1). Without stopping
    the interval is Clopper-Pearson's. With it, l is negative binomial: the interval holds the probabilities under which
    neither P(Bin(l) >= h) nor P(Bin(l - 1) < h) is below half of ``1 - confidence``. Outcomes are ordered by p, so both
    together are one exact interval of the truncated scheme.
    """
    counts, used = np.broadcast_arrays(np.asarray(exceedances), np.asarray(n_permutations))
    for name, values in (("exceedances", counts), ("n_permutations", used)):
        if not np.issubdtype(values.dtype, np.integer):
            msg = f"{name} have dtype {values.dtype}; counts are whole numbers"
            raise ValueError(msg)
    if not 1 <= stop_at <= max_permutations:
        msg = f"stop_at is {stop_at}; it must lie in [1, max_permutations={max_permutations}]"
        raise ValueError(msg)
    if np.any(counts < 0) or np.any(counts > stop_at):
        msg = f"exceedances must lie in [0, stop_at={stop_at}]"
        raise ValueError(msg)
    stopped = counts == stop_at
    if np.any(used < counts) or np.any(used > max_permutations) or np.any(~stopped & (used != max_permutations)):
        msg = f"a test ends with exceedance {stop_at} or permutation {max_permutations}, but some ended in between"
        raise ValueError(msg)
    whole = p_values(counts, n_permutations=used, confidence=confidence)
    upper = 1.0 - (1.0 - confidence) / 2.0
    after = np.where(stopped & (used > stop_at), used - float(stop_at), 1.0)
    high = np.where(used > stop_at, beta.ppf(upper, float(stop_at), after), 1.0)
    return PValues(
        p=np.where(stopped, stop_at / np.maximum(used, 1), whole.p),
        ci_low=whole.ci_low,
        ci_high=np.where(stopped, high, whole.ci_high),
    )


_CHUNK_ENTRIES = 2**20


def adjust_p_values(p: Float64[np.ndarray, ...], *, method: str = "bh") -> Float64[np.ndarray, ...]:
    """Adjust p-values to control errors among the tests that are defined.

    NaN is an undefined test, which does not belong to the family. ``"bh"``: false discovery rate of independent or
    positively dependent tests, Benjamini & Hochberg (1995); ``"by"``: under any dependence, Benjamini & Yekutieli
    (2001); ``"holm"``: family-wise error under any dependence, Holm (1979).
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
    """Return p-values adjusted for all heads and types together by the step-down maxT of Westfall & Young.

    It controls the family-wise error and keeps the dependence of heads that share a type's permutations (Westfall &
    Young 1993, algorithm 2.8); p is (b+1)/(m+1) of successive maxima, made monotone. Statistics are (T - mean) / sd
    over permutations; NaN is an undefined test, which does not belong to the family. A permutation is a joint one of
    all types, which are permuted independently. ``tolerance`` is in standard deviations, as T is only known up to
    rounding.
    """
    if permuted.shape[1:] != observed.shape or len(permuted) < 1:
        msg = f"observed {observed.shape} and permuted {permuted.shape} disagree; (permutations, *observed) is needed"
        raise ValueError(msg)
    adjusted = np.full(observed.shape, np.nan)
    values = observed.ravel()
    defined = np.flatnonzero(~np.isnan(values))
    if not defined.size:
        return adjusted
    # from the smallest on, so that the maximum of all that are not larger is a running maximum
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
