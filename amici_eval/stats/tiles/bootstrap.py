"""Bootstrap over tiles of tissue: intervals of explained variance of heads and types."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from amici_eval.stats.permutation.permutations import PermutationStream

if TYPE_CHECKING:
    from jaxtyping import Bool, Float64, Int64

MIN_TILES_INTERVAL = 5
"""Fewer tiles give no interval: their spread cannot be estimated."""

_LABEL = "\0bootstrap"
LEAST_ERROR = 0.25
"""Floor of a resample's standard error, as a share of the true one: a resample may hold few different tiles."""
_ROUNDING = 1e-12
"""Values below this share of the numbers they are computed from are zeros up to float64 rounding."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TileBootstrap:
    """Confidence intervals of the explained variance of some models of one cell type.

    ``low`` and ``high`` are NaN where there is no interval; ``n_tiles`` counts tiles that hold cells of the type;
    ``reason``: why there is no interval, None if there is one.
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
    """Return intervals of explained variance over all genes, from tiles of tissue resampled with all their cells.

    Studentised on ``l = log(SS_residual / SS_target)``: ``l +- q s``, q the quantile of ``|l_r - l| / max(s_r, s / 4)``
    over resamples (Hall 1988), ``s^2 = sum_b (residual_b / SS_residual - target_b / SS_target)^2``; half-widths times
    :func:`widening`. The floor s / 4 keeps intervals of five tiles finite; percentile and BCa intervals cover too
    little. Tiles count as independent: at least eight w wide, w the width of the Gaussian kernel
    ``exp(-d^2 / (2 w^2))`` of the fields. Tiles come in ascending number; those without cells do not count.
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
    # row 0 is the truth: each tile once
    counts = np.vstack([np.ones(n_tiles), tile_draws(n_tiles, n_resamples, seed=seed, label=cell_type)])
    target = TileSquares.of(cells, target_mean[present][:, varies], target_m2[present][:, varies], counts)
    if not target.total[0] > 0.0:
        reason = "expression does not vary; there is nothing to explain"
        return TileBootstrap(low=low, high=high, n_tiles=n_tiles, reason=reason)
    # a resample may be one tile of one cell again and again
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
        # constant predictions have an error of 0 up to rounding
        least = max(LEAST_ERROR * errors[0], _ROUNDING)
        off = np.abs(logs[1:] - logs[0]) / np.maximum(errors[1:], least)
        reach = float(np.quantile(off, confidence)) * errors[0] * widened
        with np.errstate(over="ignore"):
            low[model], high[model] = 1.0 - np.exp(logs[0] + reach), 1.0 - np.exp(logs[0] - reach)
    return TileBootstrap(low=low, high=high, n_tiles=n_tiles)


@dataclass(frozen=True, kw_only=True, eq=False)
class TileSquares:
    """Sums of squares about each resample's own mean, over all genes.

    ``about`` is of a tile drawn once: ``total`` adds it as often as the tile was drawn.
    """

    total: Float64[np.ndarray, " resamples"]
    about: Float64[np.ndarray, "resamples tiles"]

    @property
    def shares(self) -> Float64[np.ndarray, "resamples tiles"]:
        """Share of the total that each tile has, drawn once."""
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
        """Compute the sums from moments of tiles, of which resample r holds tile b ``counts[r, b]`` times."""
        # centred first: a small difference of two large sums would lose digits
        centred = mean - n_cells @ mean / n_cells.sum()
        linear = n_cells[:, None] * centred
        squares = (m2 + linear * centred).sum(axis=1)
        if linear.shape[1] > len(linear):
            # only products between tiles are used, and the smaller triangular factor has the same
            linear = np.asarray(np.linalg.qr(linear.T, mode="r")).T
        # with several types, a resample may hold no cell of one of them
        drawn = (counts @ n_cells)[:, None]
        means = np.divide(counts @ linear, drawn, out=np.zeros((len(counts), linear.shape[1])), where=drawn > 0.0)
        about = squares - 2.0 * means @ linear.T + np.square(means).sum(axis=1)[:, None] * n_cells
        return cls(total=(counts * about).sum(axis=1), about=about)


def widening(cells: Float64[np.ndarray, " tiles"]) -> float:
    """Return the factor of half-widths that corrects for tiles of unequal size.

    ``sqrt(k (n - 1) / ((k - 1) n))`` with n tiles, of which ``k = (sum cells)^2 / sum cells^2`` are effective (Kish).
    """
    n_tiles, effective = len(cells), cells.sum() ** 2 / np.square(cells).sum()
    return float(np.sqrt(effective / (effective - 1.0) * (n_tiles - 1) / n_tiles))


def tile_draws(n_tiles: int, n_resamples: int, *, seed: int, label: str) -> Float64[np.ndarray, "resamples tiles"]:
    """Return how often each resample holds each tile; resample r uses the generator's words from ``r * n_tiles`` on."""
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
