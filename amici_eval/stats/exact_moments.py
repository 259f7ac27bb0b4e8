"""The permutation null of a head's fit from its exact moments: p-values with no permutation drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.special import gammaln

from amici_eval.stats.moment_sums import stratum_sums, third_moments
from amici_eval.stats.nulls import MIN_CELLS_TEST
from amici_eval.stats.pearson1 import pearson_tail
from amici_eval.stats.pearson3 import pearson3_tail

if TYPE_CHECKING:
    from jaxtyping import Float, Float64, Int64

__all__ = [
    "DRAWN_FOR_FEW",
    "FEW_CELLS",
    "PermutationMoments",
    "gene_moments",
    "pearson3_tail",
    "permutation_moments",
    "predicted_third_moments",
    "third_moments",
]

_ROUNDING = 1e-12
"""Numbers that vary by less than this share of their size are constants that float64 rounded."""
_VARIANCE_ROUNDING = 1e-13
"""A variance below this share of what it would be were F and Z aligned is what rounding leaves of 0."""
_GENES = 4096
_MOST_CELLS_KURTOSIS = 2048
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
    kurtosis
        Excess kurtosis of T, shape (heads,), of one stratum of 4 to 2,048 cells; NaN otherwise: sums over many cells or
        strata are as good as without it.
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
    kurtosis: Float64[np.ndarray, " heads"]
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

        The Pearson law with the exact moments (see :func:`amici_eval.stats.pearson1.pearson_tail`), and at least one
        permutation, the identity.
        """
        return _at_least_one(pearson_tail(self.standardised, self.skewness, self.kurtosis), self.log_permutations)


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
    The fourth moment of few cells follows from sum D^4, the sums of squares of D's rows and columns, and the trace of
    D D^T D D^T in the same way: rows and columns of D add up to 0, so that only sums without single indices remain.
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
        missing = np.full(variance.shape, np.nan)
        unknown = 0.0 * (sums.f_size + sums.z_size + sums.variance + sums.cumulant)
    return PermutationMoments(
        statistic=sums.mean + sums.excess + unknown,
        excess=sums.excess + unknown,
        mean=sums.mean + unknown,
        variance=variance + unknown,
        skewness=skewness + unknown,
        kurtosis=_kurtosis(factors, images, variance, device=device) + unknown if sums.n_cells.size == 1 else missing,
        n_strata=int(np.count_nonzero(sums.n_cells > 1)),
        log_permutations=float(gammaln(sums.n_cells + 1.0).sum()),
    )


def _kurtosis(
    factors: Float[np.ndarray, "cells rank heads"],
    images: Float[np.ndarray, "cells rank heads"],
    variance: Float64[np.ndarray, " heads"],
    *,
    device: str,
) -> Float64[np.ndarray, " heads"]:
    """Return the excess kurtosis of T over all permutations of all cells; NaN for fewer than 4 or too many cells."""
    n, n_heads = len(factors), factors.shape[2]
    found = np.full(n_heads, np.nan)
    if not 4 <= n <= _MOST_CELLS_KURTOSIS:
        return found
    device = "cpu" if torch.device(device).type == "mps" else device
    for head in np.flatnonzero(variance > 0.0):
        f, z = (
            torch.from_numpy(np.ascontiguousarray(values[:, :, head], dtype=np.float64)).to(device)
            for values in (factors, images)
        )
        f, z = f - f.mean(dim=0), z - z.mean(dim=0)
        f_own, z_own = f.T @ f, z.T @ z
        squared = (f @ z.T).square_()
        fourth = float(squared.square().sum())
        rows, columns = (float(squared.sum(dim=axis).square().sum()) for axis in (1, 0))
        both = float(squared.sum()) ** 2
        turned = f_own @ z_own
        trace = float((turned @ turned).trace())
        pair, triple = n * (n - 1.0), n * (n - 1.0) * (n - 2.0)
        moment = fourth / n + 4.0 * fourth / pair
        moment += 3.0 * (both - rows - columns + fourth) / pair
        moment += 6.0 * (both - 2.0 * rows - 2.0 * columns + 4.0 * fourth) / triple
        distinct = 36.0 * fourth - 18.0 * (rows + columns) + 3.0 * both + 6.0 * trace
        moment += distinct / (triple * (n - 3.0))
        found[head] = moment / variance[head] ** 2 - 3.0
    return found


def predicted_third_moments(
    tensor: Float64[np.ndarray, "rank rank rank"], weights: Float64[np.ndarray, "genes rank"]
) -> Float64[np.ndarray, " genes"]:
    """Return each gene's centred third moment ``sum_i P_ig^3`` of the prediction ``P = F @ weights.T``, shape (genes,).

    Parameters
    ----------
    tensor
        Third moments of F, one head of :func:`third_moments`.
    weights
        Shape (genes, rank).
    """
    rank = len(tensor)
    found = np.empty(len(weights))
    for first in range(0, len(weights), _GENES):
        rows = weights[first : first + _GENES]
        turned = (rows @ tensor.reshape(rank, rank * rank)).reshape(-1, rank, rank)
        found[first : first + _GENES] = np.einsum("ga,ga->g", np.einsum("gab,gb->ga", turned, rows), rows)
    return found


def gene_moments(
    *,
    predicted_ss: Float64[np.ndarray, "heads genes"],
    predicted_m3: Float64[np.ndarray, "heads genes"],
    target_ss: Float64[np.ndarray, " genes"],
    target_m3: Float64[np.ndarray, " genes"],
    cross: Float64[np.ndarray, "heads genes"],
    n_cells: int,
) -> Float64[np.ndarray, "heads genes"]:
    """Return the p-value of each head's fit to each gene over all permutations of cells, shape (heads, genes).

    Null: as :func:`permutation_moments` with one stratum, one gene at a time: T = sum_i P_i Y_i.

    Parameters
    ----------
    predicted_ss, predicted_m3
        ``sum_i (P_i - mean)^2`` and the same cubed, shape (heads, genes).
    target_ss, target_m3
        The same of expression, shape (genes,).
    cross
        ``sum_i (P_i - mean)(Y_i - mean)``, shape (heads, genes).
    n_cells
        Cells of the type.

    Returns
    -------
    numpy.ndarray
        In (0, 1]; NaN where the prediction or the gene does not vary (sum of squares 0) or a number is not finite.

    Raises
    ------
    ValueError
        If there are fewer than three cells.
    """
    _check_cells(n_cells)
    with np.errstate(invalid="ignore", divide="ignore"):
        p_root = np.sqrt(np.where(predicted_ss > 0.0, predicted_ss, np.nan))
        y_root = np.sqrt(np.where(target_ss > 0.0, target_ss, np.nan))
        standardised = np.sqrt(n_cells - 1.0) * (cross / p_root / y_root)
        skewness = n_cells * np.sqrt(n_cells - 1.0) / (n_cells - 2.0) * (predicted_m3 / p_root**3)
        skewness = skewness * (target_m3 / y_root**3)
    return _at_least_one(pearson3_tail(standardised, skewness), float(gammaln(n_cells + 1.0)))


def _at_least_one(p: Float64[np.ndarray, ...], log_permutations: float) -> Float64[np.ndarray, ...]:
    return np.asarray(np.maximum(p, np.exp(-log_permutations)))


def _check_cells(n_cells: int) -> None:
    if n_cells < MIN_CELLS_TEST:
        msg = f"{n_cells} cells; at least {MIN_CELLS_TEST} are needed for a test"
        raise ValueError(msg)
