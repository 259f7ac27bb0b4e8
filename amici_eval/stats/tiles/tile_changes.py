"""How sure a change is that adds up over tiles of tissue: signs of tiles flipped, and tiles drawn again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from amici_eval.stats.permutation.permutations import PermutationStream
from amici_eval.stats.pvalues import p_values
from amici_eval.stats.tiles.bootstrap import LEAST_ERROR, MIN_TILES_INTERVAL, tile_draws, widening

if TYPE_CHECKING:
    from jaxtyping import Float64

__all__ = ["ROUNDING", "ShareChanges", "Studentised", "flipped_p", "share_changes", "squares_about", "studentised"]

ROUNDING = 1e-12
"""Share of a total below which a difference is what floating point leaves."""
_FLIPS = "\0paired flips"
_TIED = 1e-9


def squares_about(
    n_cells: Float64[np.ndarray, " tiles"],
    mean: Float64[np.ndarray, "tiles ..."],
    m2: Float64[np.ndarray, "tiles ..."],
) -> Float64[np.ndarray, "tiles ..."]:
    """Return each tile's squares about the mean of all tiles."""
    weight = n_cells.reshape(-1, *(1,) * (mean.ndim - 1))
    about: Float64[np.ndarray, "tiles ..."] = m2 + weight * (mean - (weight * mean).sum(axis=0) / n_cells.sum()) ** 2
    return about


def flipped_p(
    shares: Float64[np.ndarray, "pairs tiles genes"], n_flips: int, *, seed: int, label: str
) -> Float64[np.ndarray, "pairs genes"]:
    """Return two-sided p of sums over tiles whose signs are flipped.

    Parameters
    ----------
    shares
        What each tile adds.
    n_flips
        Random flips; where tiles have fewer sign patterns than that, all of them.
    seed, label
        What random flips depend on, besides the number of tiles.
    """
    n_tiles = shares.shape[1]
    # the first tile keeps its sign: the other half of the patterns says the same of the absolute value
    every = 2.0 ** (n_tiles - 1) - 1 <= n_flips
    if every:
        patterns = np.arange(1, 2 ** (n_tiles - 1))
        signs = 1.0 - 2.0 * ((patterns[:, None] >> np.arange(n_tiles - 1)) & 1)
        signs = np.hstack([np.ones((len(signs), 1)), signs])
    else:
        key = PermutationStream(seed=seed, cell_type=label, stratum=_FLIPS, n_cells=n_tiles).key()
        words = np.random.Philox(key=key).random_raw(n_flips * n_tiles).reshape(n_flips, n_tiles)
        signs = 1.0 - 2.0 * (words >> np.uint64(63)).astype(np.float64)
    found = np.full((shares.shape[0], shares.shape[2]), np.nan)
    for pair, own in enumerate(shares):
        truth = np.abs(own.sum(axis=0))
        tied = truth - _TIED * np.abs(own).sum(axis=0)
        counts = np.zeros(own.shape[1], dtype=np.int64)
        step = max(1, 2**22 // max(1, own.shape[1]))
        for first in range(0, len(signs), step):
            counts += np.count_nonzero(np.abs(signs[first : first + step] @ own) >= tied, axis=0)
        found[pair] = np.where(np.isnan(truth), np.nan, p_values(counts, n_permutations=len(signs)).p)
    return found


@dataclass(frozen=True, kw_only=True)
class Studentised:
    """Interval of a change, and how sure it is that it lies inside a margin.

    Parameters
    ----------
    low, high
        Ends of the interval.
    p_below, p_above
        That the change is at or below minus the margin, and at or above the margin.
    """

    low: float
    high: float
    p_below: float
    p_above: float


def studentised(
    counts: Float64[np.ndarray, "resamples tiles"],
    change: Float64[np.ndarray, "resamples tiles"],
    target_share: Float64[np.ndarray, "resamples tiles"],
    target: Float64[np.ndarray, " resamples"],
    *,
    widened: float,
    confidence: float,
    margin: float,
) -> Studentised:
    """Learn how sure a change is from tiles drawn again; the first row is the truth, each tile once.

    Parameters
    ----------
    counts
        How often each resample holds each tile.
    change, target_share
        What each tile adds to the change and to the squares of expression, about the means of the resample.
    target
        Squares of expression of each resample.
    widened
        What half-widths are multiplied by (:func:`~amici_eval.stats.tiles.bootstrap.widening`).
    confidence, margin
        Of the interval, and what is too small to matter.

    Notes
    -----
    See :func:`~amici_eval.stats.tiles.paired.paired_differences`.
    """
    total = (counts * change).sum(axis=1) / target
    influence = change - total[:, None] * target_share
    errors = np.sqrt((counts * np.square(influence)).sum(axis=1)) / target
    # two models that are the same leave no error but that of rounding
    least = max(LEAST_ERROR * errors[0], ROUNDING)
    off = np.abs(total[1:] - total[0]) / np.maximum(errors[1:], least)
    error = max(float(errors[0]) * widened, ROUNDING)
    reach = float(np.quantile(off, confidence)) * error
    # the change would have to be off by as much as it lies inside the margin
    return Studentised(
        low=float(total[0]) - reach,
        high=float(total[0]) + reach,
        p_below=_tail(off, (float(total[0]) + margin) / error),
        p_above=_tail(off, (margin - float(total[0])) / error),
    )


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ShareChanges:
    """Changes of what adds up over tiles.

    Parameters
    ----------
    change, low, high
        With their intervals, shape (pairs,).
    p_value
        Two-sided, signs of tiles flipped, shape (pairs,).
    p_equivalence
        That the change lies outside the margin, shape (pairs,).
    n_tiles
        Tiles with cells.
    reason
        Why there are no intervals and no p; ``None`` if there are.
    """

    change: Float64[np.ndarray, " pairs"]
    low: Float64[np.ndarray, " pairs"]
    high: Float64[np.ndarray, " pairs"]
    p_value: Float64[np.ndarray, " pairs"]
    p_equivalence: Float64[np.ndarray, " pairs"]
    n_tiles: int
    reason: str | None = None


def share_changes(
    change: Float64[np.ndarray, "pairs tiles"],
    target: Float64[np.ndarray, " tiles"],
    n_cells: Float64[np.ndarray, " tiles"],
    *,
    confidence: float = 0.95,
    n_resamples: int = 1000,
    n_flips: int = 9999,
    margin: float = 0.01,
    seed: int = 0,
    label: str = "",
) -> ShareChanges:
    """Learn how sure changes are of which only each tile's share is known.

    Parameters
    ----------
    change
        What each tile adds to each change of summed squares, about the means over all tiles.
    target
        Squares of expression in each tile, about the means over all tiles.
    n_cells
        Of each tile, all above 0.
    confidence, n_resamples, n_flips, margin, seed, label
        As in :func:`~amici_eval.stats.tiles.paired.paired_differences`.

    Raises
    ------
    ValueError
        If shapes disagree.

    Notes
    -----
    As ``paired.paired_differences``, with the same tiles drawn, but squares stay about the means
    over all tiles when tiles are drawn again: genes' means by tile would be needed for more. The p is the same; the
    interval differs in second order only.
    """
    n_pairs, n_tiles = change.shape
    if target.shape != (n_tiles,) or n_cells.shape != (n_tiles,):
        msg = f"target {target.shape} and n_cells {n_cells.shape} must have the {n_tiles} tiles of change"
        raise ValueError(msg)
    total = float(target.sum())
    undefined = np.full(n_pairs, np.nan)
    if not total > 0.0:
        reason: str | None = "expression does not vary; there is nothing to explain"
        return ShareChanges(
            change=undefined,
            low=undefined,
            high=undefined,
            p_value=undefined,
            p_equivalence=undefined,
            n_tiles=n_tiles,
            reason=reason,
        )
    few = n_tiles < MIN_TILES_INTERVAL
    reason = f"cells in {n_tiles} tiles; at least {MIN_TILES_INTERVAL} are needed to tell differences" if few else None
    low, high, inside = (np.full(n_pairs, np.nan) for _ in range(3))
    if not few:
        counts = np.vstack([np.ones((1, n_tiles)), tile_draws(n_tiles, n_resamples, seed=seed, label=label)])
        drawn = counts @ target
        defined = drawn > ROUNDING * total
        counts, drawn, widened = counts[defined], drawn[defined], widening(n_cells)
        shares = np.broadcast_to(target, counts.shape)
        for pair in np.flatnonzero(np.isfinite(change).all(axis=1)):
            found = studentised(
                counts,
                np.broadcast_to(change[pair], shares.shape),
                shares,
                drawn,
                widened=widened,
                confidence=confidence,
                margin=margin,
            )
            low[pair], high[pair], inside[pair] = found.low, found.high, max(found.p_below, found.p_above)
    return ShareChanges(
        change=change.sum(axis=1) / total,
        low=low,
        high=high,
        p_value=undefined if few else flipped_p(change[:, :, None] / total, n_flips, seed=seed, label=label)[:, 0],
        p_equivalence=inside,
        n_tiles=n_tiles,
        reason=reason,
    )


def _tail(off: Float64[np.ndarray, " resamples"], needed: float) -> float:
    """Return the one-sided p of lying ``needed`` standard errors inside a bound, by the symmetric resamples."""
    if np.isnan(needed):
        return np.nan
    half = float(p_values(np.count_nonzero(off >= abs(needed), keepdims=True), n_permutations=len(off)).p[0]) / 2.0
    return half if needed > 0.0 else 1.0 - half
