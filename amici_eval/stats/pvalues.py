"""The one place that turns counts of exceedances into p-values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import beta

if TYPE_CHECKING:
    from jaxtyping import Float64, Int64

__all__ = ["PValues", "p_values"]


@dataclass(frozen=True)
class PValues:
    """p-values of a Monte Carlo test with the uncertainty that comes from drawing finitely many permutations.

    Parameters
    ----------
    p
        Same shape as the counts.
    ci_low, ci_high
        Clopper-Pearson 95 % interval of the p-value that infinitely many permutations would give.
    """

    p: Float64[np.ndarray, ...]
    ci_low: Float64[np.ndarray, ...]
    ci_high: Float64[np.ndarray, ...]


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
