"""How sure differences of explained variance are, gene by gene: there are too many genes to resample tiles for each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import t as student

from amici_eval.stats.tiles.bootstrap import MIN_TILES_INTERVAL

if TYPE_CHECKING:
    from jaxtyping import Float64

    from amici_eval.stats.tiles.paired import PairedRows

__all__ = ["GeneIntervals", "gene_intervals"]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class GeneIntervals:
    """Ends of the intervals of differences of explained variance, shape (pairs, genes); NaN where there is none."""

    low: Float64[np.ndarray, "pairs genes"]
    high: Float64[np.ndarray, "pairs genes"]


def gene_intervals(rows: PairedRows, *, confidence: float = 0.95) -> GeneIntervals:
    """Learn between which bounds the difference of explained variance of each gene lies, second model minus first.

    Parameters
    ----------
    rows
        One cell type by tile.
    confidence
        Level.

    Raises
    ------
    ValueError
        If the level is none.

    Notes
    -----
    A tile's share of the difference is ``D_b / S``, as in ``paired.paired_differences``; its
    linearised standard error is ``s^2 = n / (n - 1) * sum_b (D_b - difference * T_b)^2 / S^2`` with T_b the squares of
    expression in the tile and S their sum, which is that of a ratio estimated from clusters (Cochran 1977, chapter 6).
    The interval is the difference plus and minus ``t * s``, with n - 1 degrees of freedom, n the effective number of
    tiles ``(sum_b cells_b)^2 / sum_b cells_b^2``. Tiles are taken to be about independent.

    References
    ----------
    Cochran (1977), Sampling Techniques, 3rd edition.
    """
    if not 0.0 < confidence < 1.0:
        msg = f"confidence is {confidence}; it must lie between 0 and 1"
        raise ValueError(msg)
    rows = rows.with_cells
    n_pairs, n_genes = rows.before_mean.shape[1:]
    if len(rows.tiles) < MIN_TILES_INTERVAL:
        nothing = np.full((n_pairs, n_genes), np.nan)
        return GeneIntervals(low=nothing, high=nothing)
    cells = rows.n_cells.astype(np.float64)
    effective = max(cells.sum() ** 2 / np.square(cells).sum(), 1.0 + 1e-9)
    target = _about(cells, rows.target_mean, rows.target_m2)
    total = np.where(rows.varies, target.sum(axis=0), np.nan)
    share = (_about(cells, rows.before_mean, rows.before_m2) - _about(cells, rows.after_mean, rows.after_m2)) / total
    difference = share.sum(axis=0)
    off = share - difference * (target / total)[:, None]
    error = np.sqrt(effective / (effective - 1.0) * np.square(off).sum(axis=0))
    reach = float(student.ppf(0.5 + confidence / 2.0, effective - 1.0)) * error
    return GeneIntervals(low=difference - reach, high=difference + reach)


def _about(
    cells: Float64[np.ndarray, " tiles"],
    mean: Float64[np.ndarray, "tiles ..."],
    m2: Float64[np.ndarray, "tiles ..."],
) -> Float64[np.ndarray, "tiles ..."]:
    """Return each tile's squares about the mean of all tiles."""
    weight = cells.reshape(-1, *(1,) * (mean.ndim - 1))
    about: Float64[np.ndarray, "tiles ..."] = m2 + weight * (mean - (weight * mean).sum(axis=0) / cells.sum()) ** 2
    return about
