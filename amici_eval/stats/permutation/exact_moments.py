"""The permutation null of a head's fit from its exact moments: p-values with no permutation drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import gammaln

from amici_eval.stats.permutation.moment_sums import stratum_sums
from amici_eval.stats.permutation.nulls import MIN_CELLS_TEST
from amici_eval.stats.permutation.pearson3 import pearson3_tail

if TYPE_CHECKING:
    from jaxtyping import Float, Float64, Int64

__all__ = [
    "DRAWN_FOR_FEW",
    "FEW_CELLS",
    "PermutationMoments",
    "pearson3_tail",
    "permutation_moments",
]

_ROUNDING = 1e-12
"""Numbers that vary by less than this share of their size are constants that float64 rounded."""
_VARIANCE_ROUNDING = 1e-13
"""A variance below this share of what it would be were F and Z aligned is what rounding leaves of 0."""
FEW_CELLS = 50
"""Of fewer, the law of T is not told by a few moments: callers draw permutations instead, which costs nothing."""
DRAWN_FOR_FEW = 100_000


@dataclass(frozen=True, kw_only=True, eq=False)
class PermutationMoments:
    """Where a head's fit stands among all permutations of cells: its value, and the null's first three moments.

    Parameters
    ----------
    statistic
        T = sum_i <F_i, Z_i> as observed, shape (heads,).
    excess
        ``statistic - mean``, summed from centred numbers: exact also where the mean is large, shape (heads,).
    mean, variance, skewness
        Of T over all permutations within strata, shape (heads,). A head that does not vary has variance 0 and skewness
        NaN; a head whose numbers are not finite has NaN in all.
    n_strata
        Strata with at least two cells: the others have nothing to permute.
    log_permutations
        Logarithm of the number of permutations, the product of the strata's factorials.
    """

    statistic: Float64[np.ndarray, " heads"]
    excess: Float64[np.ndarray, " heads"]
    mean: Float64[np.ndarray, " heads"]
    variance: Float64[np.ndarray, " heads"]
    skewness: Float64[np.ndarray, " heads"]
    n_strata: int
    log_permutations: float

    @property
    def standardised(self) -> Float64[np.ndarray, " heads"]:
        """``(statistic - mean) / sd``, shape (heads,); NaN where nothing varies."""
        varies = self.variance > 0.0
        deviation = np.sqrt(np.where(varies, self.variance, np.nan))
        return np.asarray(self.excess / deviation)

    def p_values(self) -> Float64[np.ndarray, " heads"]:
        """Return the share of permutations that fit at least as well as the truth, shape (heads,), in (0, 1] or NaN.

        Pearson III with the exact moments (see :func:`pearson3_tail`), and at least one permutation, the identity.
        """
        return _at_least_one(pearson3_tail(self.standardised, self.skewness), self.log_permutations)


def permutation_moments(
    factors: Float[np.ndarray, "cells rank heads"],
    images: Float[np.ndarray, "cells rank heads"],
    *,
    strata: Int64[np.ndarray, " cells"] | None = None,
    device: str = "cpu",
) -> PermutationMoments:
    """Return the exact moments of each head's fit over all permutations of cells within strata.

    Null: the rows of the head's prediction are shuffled among the cells of one stratum, in each stratum on its own.
    This is exchangeable when, within a stratum, a cell's expression is independent of its neighbourhood and cells are
    independent of each other; spatial autocorrelation at scales below a stratum breaks the second.

    Parameters
    ----------
    factors
        F, shape (cells, rank, heads): head h predicts ``constant + F[:, :, h] @ A_h.T``.
    images
        Z, same shape: expression as the head sees it, ``Y @ A_h``. Neither need be centred.
    strata
        Label of each cell's stratum, shape (cells,); all cells are one stratum if ``None``.
    device
        Torch device; ``"mps"``, which has no float64, is taken as ``"cpu"``.

    Raises
    ------
    ValueError
        If shapes disagree or there are fewer than three cells.

    Notes
    -----
    With rows f, z centred within a stratum of n cells and D = f z^T: E T = n <mean F, mean Z>, Var T = sum D^2 /
    (n - 1), third cumulant n / ((n - 1)(n - 2)) sum D^3, which add over strata (Hoeffding 1951; Mantel 1967). In large
    strata sum D^2 = tr(S_F S_Z) and sum D^3 = sum_abc M^F_abc M^Z_abc, with M_abc = sum_i f_ia f_ib f_ic.
    """
    n_cells = len(factors)
    labels = np.zeros(n_cells, dtype=np.int64) if strata is None else np.asarray(strata)
    if images.shape != factors.shape or labels.shape != (n_cells,):
        msg = f"factors {factors.shape}, images {images.shape} and strata {labels.shape} disagree"
        raise ValueError(msg)
    _check_cells(n_cells)

    sums = stratum_sums(factors, images, labels, device=device)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        constant = (sums.f_ss <= _ROUNDING**2 * sums.f_size) | (sums.z_ss <= _ROUNDING**2 * sums.z_size)
        variance = np.where(constant | (sums.variance <= _VARIANCE_ROUNDING * sums.aligned), 0.0, sums.variance)
        skewness = np.where(variance > 0.0, sums.cumulant / variance**1.5, np.nan)
        # what is not finite reached only its own head, all of whose numbers it makes unknown
        unknown = 0.0 * (sums.f_size + sums.z_size + sums.variance + sums.cumulant)
    return PermutationMoments(
        statistic=sums.mean + sums.excess + unknown,
        excess=sums.excess + unknown,
        mean=sums.mean + unknown,
        variance=variance + unknown,
        skewness=skewness + unknown,
        n_strata=int(np.count_nonzero(sums.n_cells > 1)),
        log_permutations=float(gammaln(sums.n_cells + 1.0).sum()),
    )


def _at_least_one(p: Float64[np.ndarray, ...], log_permutations: float) -> Float64[np.ndarray, ...]:
    return np.asarray(np.maximum(p, np.exp(-log_permutations)))


def _check_cells(n_cells: int) -> None:
    if n_cells < MIN_CELLS_TEST:
        msg = f"{n_cells} cells; at least {MIN_CELLS_TEST} are needed for a test"
        raise ValueError(msg)
