"""Small p-values from few permutations: the tail of the null distribution, fitted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import minimize_scalar

from amici_eval.stats.pvalues import p_values

if TYPE_CHECKING:
    from jaxtyping import Float64

MIN_PERMUTATIONS = 500
"""With fewer permutations no tail is fitted."""
MAX_EXCEEDANCES = 10
"""From this many exceedances on, counting is as good as a fit."""
_EXCESSES = 250
_SHARE = 12
"""At most one statistic in this many belongs to the tail: with more, p of normal statistics was too small."""
_FEWEST_EXCESSES = 30
_FEWER = 10
_LEAST_SHAPE, _LARGEST_SHAPE = -0.5, 1.0
_SHAPE_SD = 0.2
"""Standard deviation of the shape around 0 in the penalty: tails of sums lie between normal and gamma."""
_LARGEST_RATE = 20.0
_NO_RATE = 1e-9
"""Below this absolute rate, per mean excess, the fit is an exponential distribution."""
_LEAST_ROOM = 0.01
_TABLE_SHAPES = np.linspace(-0.5, 0.5, 11)
_CRITICAL = np.array([1.321, 1.221, 1.140, 1.074, 1.020, 0.974, 0.935, 0.903, 0.874, 0.852, 0.830])
"""5 % critical values of A^2 per estimated shape: Choulakian & Stephens (2001), Technometrics 43:478-484.

Simulations of the fit without its penalty gave the same within a tenth.
"""


@dataclass(frozen=True, kw_only=True)
class TailFit:
    """A p-value from the generalised Pareto distribution fitted to the largest statistics of the permutations.

    shape, scale: of the excesses over the threshold, a negative shape bounds the support; n_excesses: how many were
    fitted. Without a fit (``fits`` is False) p is (b+1)/(m+1), these are NaN or 0, and reason says why; else it is
    empty.
    """

    p: float
    shape: float
    scale: float
    threshold: float
    n_excesses: int
    fits: bool
    reason: str


def tail_p_values(
    observed: float, permuted: Float64[np.ndarray, " permutations"], *, tolerance: float = 0.0
) -> TailFit:
    """Estimate a p-value smaller than the permutations can count, from a fit of their tail: neither exact nor a bound.

    Penalised maximum likelihood (Grimshaw 1993) of the 250 largest statistics, at most a twelfth of all, and 10 fewer
    while the Anderson-Darling test rejects at 5 % (Knijnenburg et al. 2009). Unlike there, the support reaches beyond
    the observation, so that p > 0, as in permApprox; below shape -1/2 the likelihood is not regular. Measured at p =
    1e-4 with 2,000 permutations: median .7 to 1.6 times the truth (normal, exponential, gamma, beta(5, 5)), t5 .4,
    beta(2, 2) 7 times; one in twenty of the exponential under .01 times.
    """
    values = np.asarray(permuted, dtype=np.float64)
    m = values.size
    if not m or not np.isfinite(values).all() or not np.isfinite(observed):
        msg = f"observed {observed} and {m} permuted statistics; at least one, and all finite, are needed"
        raise ValueError(msg)
    exceedances = int(np.count_nonzero(values >= observed - tolerance))
    if exceedances >= MAX_EXCEEDANCES:
        return _counted(exceedances, m, f"{exceedances} exceedances: counting is as good")
    if m < MIN_PERMUTATIONS:
        return _counted(exceedances, m, f"{m} permutations; at least {MIN_PERMUTATIONS} are needed to fit a tail")
    largest = np.sort(values)[::-1]
    for n_excesses in range(min(_EXCESSES, m // _SHARE), _FEWEST_EXCESSES - 1, -_FEWER):
        threshold = float(largest[n_excesses - 1] + largest[n_excesses]) / 2.0
        excesses = largest[:n_excesses] - threshold
        reach = observed - threshold
        # statistics tied at the threshold cannot be fitted
        if not excesses[-1] > 0.0 or not reach > 0.0:
            continue
        unit = float(excesses.mean())
        rate = _rate(excesses / unit, reach / unit)
        shape = _shape(excesses / unit, rate)
        if _anderson_darling(excesses / unit, rate, shape) <= np.interp(shape, _TABLE_SHAPES, _CRITICAL):
            beyond = n_excesses / m * np.exp(_log_survival(reach / unit, rate, shape))
            return TailFit(
                p=float(max(beyond, np.finfo(np.float64).tiny)),
                shape=shape,
                scale=unit * _scale(rate, shape),
                threshold=threshold,
                n_excesses=n_excesses,
                fits=True,
                reason="",
            )
    return _counted(exceedances, m, f"no generalised Pareto tail fits the largest of {m} statistics")


def _counted(exceedances: int, m: int, reason: str) -> TailFit:
    return TailFit(
        p=float(p_values(np.array(exceedances), n_permutations=m).p),
        shape=np.nan,
        scale=np.nan,
        threshold=np.nan,
        n_excesses=0,
        fits=False,
        reason=reason,
    )


def _rate(excesses: Float64[np.ndarray, " excesses"], reach: float) -> float:
    """Return shape / scale of the likeliest fit whose support reaches beyond the observation."""
    # the edge lies beyond the observation by the gap from the largest to the MAX_EXCEEDANCES-th statistic: gaps grow
    # with the distance of the edge
    room = max(float(excesses[0] - excesses[MAX_EXCEEDANCES - 1]), _LEAST_ROOM * reach)
    lowest = -1.0 / (max(float(excesses[0]), reach) + room)
    # the likelihood may have a second, lower peak: search a grid first
    rates = np.concatenate([np.linspace(lowest, 0.0, 30), np.geomspace(1e-3, _LARGEST_RATE, 20)])
    losses = _losses(rates, excesses)
    best = int(np.argmin(losses))
    around = rates[max(0, best - 1)], rates[min(rates.size - 1, best + 1)]
    found = minimize_scalar(
        lambda rate: float(_losses(np.array([rate]), excesses)[0]),
        bounds=around,
        method="bounded",
        options={"xatol": 1e-6},
    )
    return float(found.x if found.fun < losses[best] else rates[best])


def _shape(excesses: Float64[np.ndarray, " excesses"], rate: float) -> float:
    """Return the likeliest shape at a given rate; the shape has the sign of the rate."""
    return float(_shapes(_mean_logs(np.array([rate]), excesses), excesses.size)[0])


def _shapes(mean_logs: Float64[np.ndarray, " rates"], n_excesses: int) -> Float64[np.ndarray, " rates"]:
    """Return the roots of shape + shape^3 / weight = mean of logarithms (loss minimum), by Newton's method."""
    weight = _SHAPE_SD**2 * n_excesses
    target = np.clip(mean_logs, -5.0, 5.0)
    shapes = np.clip(target, _LEAST_SHAPE, _LARGEST_SHAPE)
    for _ in range(4):
        shapes = shapes - (shapes + shapes**3 / weight - target) / (1.0 + 3.0 * shapes**2 / weight)
    return np.clip(shapes, _LEAST_SHAPE, _LARGEST_SHAPE)


def _mean_logs(
    rates: Float64[np.ndarray, " rates"], excesses: Float64[np.ndarray, " excesses"]
) -> Float64[np.ndarray, " rates"]:
    # at the edge of the support the logarithm is minus infinity, and so is the likelihood
    with np.errstate(divide="ignore"):
        means: Float64[np.ndarray, " rates"] = np.log1p(rates[:, None] * excesses).mean(axis=1)
    return means


def _losses(
    rates: Float64[np.ndarray, " rates"], excesses: Float64[np.ndarray, " excesses"]
) -> Float64[np.ndarray, " rates"]:
    """Return the negative logarithm of the penalised likelihood, per excess, at the likeliest shape for each rate."""
    mean_logs = _mean_logs(rates, excesses)
    shapes = _shapes(mean_logs, excesses.size)
    exponential = np.abs(rates) < _NO_RATE
    with np.errstate(invalid="ignore", divide="ignore"):
        losses = np.log(shapes / rates) + mean_logs * (1.0 + 1.0 / shapes)
    penalty = shapes**2 / (2.0 * _SHAPE_SD**2 * excesses.size)
    return np.where(exponential, excesses.mean(), losses + penalty)


def _scale(rate: float, shape: float) -> float:
    return 1.0 if abs(rate) < _NO_RATE else shape / rate


def _log_survival(
    excess: Float64[np.ndarray, " excesses"] | float, rate: float, shape: float
) -> Float64[np.ndarray, " excesses"]:
    if abs(rate) < _NO_RATE:
        return -np.asarray(excess, dtype=np.float64)
    survival: Float64[np.ndarray, " excesses"] = -np.log1p(rate * np.asarray(excess)) / shape
    return survival


def _anderson_darling(excesses: Float64[np.ndarray, " excesses"], rate: float, shape: float) -> float:
    """Return the Anderson-Darling A^2 of excesses sorted from the largest to the smallest."""
    n = excesses.size
    above = _log_survival(excesses, rate, shape)
    below = np.log(-np.expm1(above[::-1]))
    return float(-n - np.mean(np.arange(1, 2 * n, 2) * (below + above)))
