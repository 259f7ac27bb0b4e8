"""The one place that turns counts of exceedances into p-values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import beta

if TYPE_CHECKING:
    from jaxtyping import Bool, Float64, Int64

__all__ = ["PValues", "exact", "p_values", "sequential_p_values"]


@dataclass(frozen=True)
class PValues:
    """p-values of a Monte Carlo test with the uncertainty that comes from drawing finitely many permutations.

    Parameters
    ----------
    p
        Same shape as the counts.
    ci_low, ci_high
        Clopper-Pearson 95 % interval of the p-value that infinitely many permutations would give; equal to ``p`` where
        nothing was drawn.
    """

    p: Float64[np.ndarray, ...]
    ci_low: Float64[np.ndarray, ...]
    ci_high: Float64[np.ndarray, ...]

    def without(self, undefined: Bool[np.ndarray, ...]) -> PValues:
        """Return the same with NaN where there is no test."""
        return PValues(*(np.where(undefined, np.nan, values) for values in (self.p, self.ci_low, self.ci_high)))


def exact(p: Float64[np.ndarray, ...]) -> PValues:
    """Return p-values that no drawing made uncertain."""
    return PValues(p=p, ci_low=p, ci_high=p)


def p_values(
    exceedances: Int64[np.ndarray, ...],
    *,
    n_permutations: int | Int64[np.ndarray, ...],
    convention: str = "add_one",
    confidence: float = 0.95,
) -> PValues:
    """Turn the number of permutations at least as extreme as the observation into p-values.

    Parameters
    ----------
    exceedances
        Counts b, whole numbers in [0, n_permutations], any shape. The observation itself is not counted.
    n_permutations
        Number m of random permutations drawn: one for all tests, or an array that broadcasts against the counts.
    convention
        ``"add_one"``: (b+1)/(m+1). ``"reference"``: b/m, as amici-st; it can be 0 and is then not a valid p-value.
    confidence
        Level of the Clopper-Pearson interval.

    Raises
    ------
    ValueError
        If a count is out of range or not a whole number, or the convention is unknown.

    References
    ----------
    Phipson & Smyth (2010), Permutation p-values should never be zero, Stat Appl Genet Mol Biol 9:39.
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
    """Turn the counts of tests that stopped at a number of exceedances into p-values.

    Parameters
    ----------
    exceedances
        Counts b, whole numbers in [0, stop_at], any shape.
    n_permutations
        Number l of the permutation, counted from 1, that brought the last of ``stop_at`` exceedances; for a test that
        never had as many, ``max_permutations``. Broadcasts against the counts.
    max_permutations
        Number m of permutations after which every test ends.
    stop_at
        Number h of exceedances at which a test ends.
    confidence
        Level of the interval.

    Returns
    -------
    PValues
        h/l for a test that stopped, (b+1)/(m+1) for one that did not.

    Raises
    ------
    ValueError
        If counts are no whole numbers or contradict the rule by which a test ends.

    Notes
    -----
    Without stopping the interval is Clopper-Pearson's. With it, l follows the negative binomial distribution: the
    interval holds the probabilities under which neither a stop at l or before, P(Bin(l) >= h), nor a stop at l or
    later, P(Bin(l - 1) < h), has less than half of ``1 - confidence``. Outcomes are ordered by p, so that both together
    are one exact interval of the truncated scheme, whether a test stops or not.

    References
    ----------
    Besag & Clifford (1991), Sequential Monte Carlo p-values, Biometrika 78:301-304.
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
