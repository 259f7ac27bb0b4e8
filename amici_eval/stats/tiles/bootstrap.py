"""Bootstrap over tiles of tissue: intervals of explained variance of heads and types."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from amici_eval.stats.permutation.permutations import PermutationStream

if TYPE_CHECKING:
    from jaxtyping import Bool, Float64, Int64

__all__ = [
    "LEAST_ERROR",
    "MIN_TILES_INTERVAL",
    "TileBootstrap",
    "TileSquares",
    "tile_bootstrap",
    "tile_draws",
    "widening",
]

MIN_TILES_INTERVAL = 5
"""How much tiles differ cannot be told from fewer."""

_LABEL = "\0bootstrap"
LEAST_ERROR = 0.25
"""Share of the standard error below which that of a resample is not believed: it holds few different tiles."""
_ROUNDING = 1e-12
"""Numbers below this share of those that they are computed from are zeros that float64 rounded."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TileBootstrap:
    """Confidence intervals of the explained variance of some models of one cell type.

    Parameters
    ----------
    low, high
        Ends of the interval, shape (models,), dimensionless; NaN where there is none.
    n_tiles
        Tiles that hold cells of the type.
    reason
        Why there is no interval; ``None`` if there is one.
    """

    low: Float64[np.ndarray, " models"]
    high: Float64[np.ndarray, " models"]
    n_tiles: int
    reason: str | None = None


def tile_bootstrap(
    *,
    n_cells: Int64[np.ndarray, " tiles"],
    target_mean: Float64[np.ndarray, "tiles genes"],
    target_m2: Float64[np.ndarray, "tiles genes"],
    residual_mean: Float64[np.ndarray, "tiles models genes"],
    residual_m2: Float64[np.ndarray, "tiles models genes"],
    varies: Bool[np.ndarray, " genes"],
    confidence: float = 0.95,
    n_resamples: int = 1000,
    seed: int,
    cell_type: str,
) -> TileBootstrap:
    """Return how far explained variance over all genes could be off, if other tissue of this kind had been measured.

    Tiles of the tissue are drawn again, as many as there are, with all their cells. This is right when tiles are so
    wide that what happens in one says little about the next; a cell says much about its neighbour, so that intervals
    from cells drawn one by one are too narrow.

    Parameters
    ----------
    n_cells
        Cells of the type in each tile, shape (tiles,), tiles in ascending number; tiles without cells do not count.
    target_mean, target_m2
        Mean and centred sum of squares of expression in each tile, shape (tiles, genes).
    residual_mean, residual_m2
        The same of prediction minus expression, shape (tiles, models, genes).
    varies
        Genes whose expression varies over the type, shape (genes,).
    confidence
        Share of such intervals that hold the true value.
    n_resamples
        How many times tiles are drawn.
    seed, cell_type
        What the draws depend on, besides the number of tiles that hold cells.

    Returns
    -------
    TileBootstrap
        Its ends lie at or below 1; explained variance itself, ``1 - SS_residual / SS_target``, is between them.

    Raises
    ------
    ValueError
        If shapes disagree, counts are negative, or a setting is out of range.

    Notes
    -----
    The interval is symmetric and studentised, on the scale ``l = log(SS_residual / SS_target)``: ``l +- q s``, with q
    the quantile of ``|l_r - l| / max(s_r, s / 4)`` over resamples (Hall 1988). The standard error s is linearised:
    ``s^2 = sum_b (residual_b / SS_residual - target_b / SS_target)^2``, b's shares of both sums of squares about the
    mean of all tiles; s_r is the same of a resample. The floor keeps intervals of five tiles finite, where one resample
    in ten holds two different tiles at most. Types lie unevenly, so that few tiles may hold most cells: the half-width
    is multiplied by ``sqrt(k (n - 1) / ((k - 1) n))``, with n tiles and k = (sum cells)^2 / sum cells^2 (Kish).

    Measured coverage of 95 % intervals (500 simulated tissues each, 600 cells, smooth Gaussian fields with kernel
    ``exp(-d^2 / (2 w^2))``, w = .02 of the window), with 5, 9, 16, 25, 36 tiles: .98, .96, .97, .96, .96; skewed fields
    and cells in clusters: .98, .94, .95, .96, .95. With w = .04, so that tiles are not independent: .97, .98, .94, .94,
    .94, and .94, .93, .91, .90, .91. Percentile intervals: .83, .88, .90, .92, .92, and .79, .84, .86, .85, .87; BCa no
    better; expanded percentile intervals between. A tile should be at least eight such w wide.

    Sums of squares of a resample follow from sums over tiles, so that no cell is looked at again. Resamples in which
    expression does not vary are left out.

    References
    ----------
    Hall (1988), Theoretical comparison of bootstrap confidence intervals, Ann Stat 16:927. Lahiri (2003), Resampling
    methods for dependent data, Springer.
    """
    _check(n_cells, target_mean, target_m2, residual_mean, residual_m2, varies)
    if not 0.0 < confidence < 1.0:
        msg = f"confidence is {confidence}; it must lie between 0 and 1"
        raise ValueError(msg)
    if n_resamples < 1:
        msg = f"n_resamples is {n_resamples}; at least 1 is needed"
        raise ValueError(msg)

    n_models = residual_mean.shape[1]
    low, high = np.full(n_models, np.nan), np.full(n_models, np.nan)
    present = np.flatnonzero(n_cells)
    n_tiles = len(present)
    if n_tiles < MIN_TILES_INTERVAL:
        reason = f"cells in {n_tiles} tiles; at least {MIN_TILES_INTERVAL} are needed for an interval"
        return TileBootstrap(low=low, high=high, n_tiles=n_tiles, reason=reason)
    cells = n_cells[present].astype(np.float64)
    # the truth goes the same way as the resamples, as the first of them
    counts = np.vstack([np.ones(n_tiles), tile_draws(n_tiles, n_resamples, seed=seed, label=cell_type)])
    target = TileSquares.of(cells, target_mean[present][:, varies], target_m2[present][:, varies], counts)
    if not target.total[0] > 0.0:
        reason = "expression does not vary; there is nothing to explain"
        return TileBootstrap(low=low, high=high, n_tiles=n_tiles, reason=reason)
    # all tiles drawn may be one tile of one cell
    defined = target.total > _ROUNDING * target.total[0]
    if np.count_nonzero(defined) < 2:
        reason = f"expression varies in none of {n_resamples} resamples of {n_tiles} tiles"
        return TileBootstrap(low=low, high=high, n_tiles=n_tiles, reason=reason)
    widened = widening(cells)
    for model in range(n_models):
        residual = TileSquares.of(cells, residual_mean[present, model], residual_m2[present, model], counts)
        logs = np.log(np.maximum(residual.total[defined] / target.total[defined], _ROUNDING))
        influence = residual.shares[defined] - target.shares[defined]
        errors = np.sqrt((counts[defined] * np.square(influence)).sum(axis=1))
        # constant predictions leave all of expression unexplained, without error but that of rounding
        least = max(LEAST_ERROR * errors[0], _ROUNDING)
        off = np.abs(logs[1:] - logs[0]) / np.maximum(errors[1:], least)
        reach = float(np.quantile(off, confidence)) * errors[0] * widened
        with np.errstate(over="ignore"):
            low[model], high[model] = 1.0 - np.exp(logs[0] + reach), 1.0 - np.exp(logs[0] - reach)
    return TileBootstrap(low=low, high=high, n_tiles=n_tiles)


@dataclass(frozen=True, kw_only=True, eq=False)
class TileSquares:
    """Sums of squares about each resample's own mean, over all genes.

    Parameters
    ----------
    total
        Shape (resamples,).
    about
        Of a tile drawn once, shape (resamples, tiles): ``total`` is what these add up to as often as they were drawn.
    """

    total: Float64[np.ndarray, " resamples"]
    about: Float64[np.ndarray, "resamples tiles"]

    @property
    def shares(self) -> Float64[np.ndarray, "resamples tiles"]:
        """Which share of the total each tile has, drawn once."""
        total = self.total[:, None]
        return np.divide(self.about, total, out=np.zeros_like(self.about), where=total != 0.0)

    @classmethod
    def of(
        cls,
        n_cells: Float64[np.ndarray, " tiles"],
        mean: Float64[np.ndarray, "tiles genes"],
        m2: Float64[np.ndarray, "tiles genes"],
        counts: Float64[np.ndarray, "resamples tiles"],
    ) -> TileSquares:
        """Compute them from what is known of tiles, of which resample r holds tile b ``counts[r, b]`` times."""
        # far from its mean, expression would leave a small difference of two large sums
        centred = mean - n_cells @ mean / n_cells.sum()
        linear = n_cells[:, None] * centred
        squares = (m2 + linear * centred).sum(axis=1)
        if linear.shape[1] > len(linear):
            # only products of tiles count, and a smaller matrix has the same
            linear = np.asarray(np.linalg.qr(linear.T, mode="r")).T
        # of several types together, a resample may hold no cell of one
        drawn = (counts @ n_cells)[:, None]
        means = np.divide(counts @ linear, drawn, out=np.zeros((len(counts), linear.shape[1])), where=drawn > 0.0)
        about = squares - 2.0 * means @ linear.T + np.square(means).sum(axis=1)[:, None] * n_cells
        return cls(total=(counts * about).sum(axis=1), about=about)


def widening(cells: Float64[np.ndarray, " tiles"]) -> float:
    """Return what half-widths are multiplied by, for few tiles may hold most cells; see :func:`tile_bootstrap`."""
    n_tiles, effective = len(cells), cells.sum() ** 2 / np.square(cells).sum()
    return float(np.sqrt(effective / (effective - 1.0) * (n_tiles - 1) / n_tiles))


def tile_draws(n_tiles: int, n_resamples: int, *, seed: int, label: str) -> Float64[np.ndarray, "resamples tiles"]:
    """Return how often each tile is drawn: resample r is made of words ``r * n_tiles`` onwards of the generator."""
    key = PermutationStream(seed=seed, cell_type=label, stratum=_LABEL, n_cells=n_tiles).key()
    words = np.random.Philox(key=key).random_raw(n_resamples * n_tiles).reshape(n_resamples, n_tiles)
    half = np.uint64(32)
    drawn = (((words >> half) * np.uint64(n_tiles)) >> half).astype(np.int64)
    places = drawn + n_tiles * np.arange(n_resamples)[:, None]
    return np.bincount(places.ravel(), minlength=words.size).reshape(words.shape).astype(np.float64)


def _check(
    n_cells: np.ndarray,
    target_mean: np.ndarray,
    target_m2: np.ndarray,
    residual_mean: np.ndarray,
    residual_m2: np.ndarray,
    varies: np.ndarray,
) -> None:
    n_tiles, _, n_genes = residual_mean.shape
    for name, values, shape in (
        ("n_cells", n_cells, (n_tiles,)),
        ("target_mean", target_mean, (n_tiles, n_genes)),
        ("target_m2", target_m2, (n_tiles, n_genes)),
        ("residual_m2", residual_m2, residual_mean.shape),
        ("varies", varies, (n_genes,)),
    ):
        if values.shape != shape:
            msg = f"{name} has shape {values.shape}; residual_mean {residual_mean.shape} asks for {shape}"
            raise ValueError(msg)
    if np.any(n_cells < 0):
        msg = f"n_cells holds {int(n_cells.min())}; a tile has at least 0 cells"
        raise ValueError(msg)
