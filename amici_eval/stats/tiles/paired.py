"""Changes between two models or two masks on the same tiles: intervals and sign-flip tests."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import t as student

from amici_eval.stats.permutation.permutations import PermutationStream
from amici_eval.stats.pvalues import p_values
from amici_eval.stats.tiles.bootstrap import LEAST_ERROR, MIN_TILES_INTERVAL, TileSquares, tile_draws, widening

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Bool, Float64, Int64

ROUNDING = 1e-12
"""Share of a total below which a difference counts as rounding error."""
_FLIPS = "\0paired flips"
_TIED = 1e-9


def squares_about(
    n_cells: Float64[np.ndarray, " tiles"],
    mean: Float64[np.ndarray, "tiles ..."],
    m2: Float64[np.ndarray, "tiles ..."],
) -> Float64[np.ndarray, "tiles ..."]:
    """Return each tile's sum of squares about the mean over all tiles."""
    weight = n_cells.reshape(-1, *(1,) * (mean.ndim - 1))
    about: Float64[np.ndarray, "tiles ..."] = m2 + weight * (mean - (weight * mean).sum(axis=0) / n_cells.sum()) ** 2
    return about


def flipped_p(
    shares: Float64[np.ndarray, "pairs tiles genes"], n_flips: int, *, seed: int, label: str
) -> Float64[np.ndarray, "pairs genes"]:
    """Return the two-sided p of each sum over tiles under flips of the tiles' signs.

    Null: each tile's share is as likely as its negative; the flips are the same for all pairs and genes. Where there
    are at most ``n_flips`` patterns of signs, a pattern and its negative being one, all are used; random flips depend
    on seed, label and the number of tiles alone. Sums that are NaN get p NaN.
    """
    n_tiles = shares.shape[1]
    # the first tile keeps its sign: the negative of a pattern gives the same absolute sum
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
    """Interval of a change, and p values against changes as large as a margin.

    ``p_below``: that the change is at or below minus the margin; ``p_above``: that it is at or above the margin.
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
    """Return the interval of a change and its p values against the margin, from resampled tiles.

    Row 0 is the truth, each tile once. ``change`` and ``target_share`` are what a tile drawn once adds to the change
    and to the squares of expression, about the means of the resample; ``target`` is the squares of expression of each
    resample; ``widened`` multiplies half-widths. For the formulas see :func:`paired_differences`.
    """
    total = (counts * change).sum(axis=1) / target
    influence = change - total[:, None] * target_share
    errors = np.sqrt((counts * np.square(influence)).sum(axis=1)) / target
    # equal models have an error of 0 up to rounding
    least = max(LEAST_ERROR * errors[0], ROUNDING)
    off = np.abs(total[1:] - total[0]) / np.maximum(errors[1:], least)
    error = max(float(errors[0]) * widened, ROUNDING)
    reach = float(np.quantile(off, confidence)) * error
    # distances of the change from both ends of the margin, in standard errors
    return Studentised(
        low=float(total[0]) - reach,
        high=float(total[0]) + reach,
        p_below=_tail(off, (float(total[0]) + margin) / error),
        p_above=_tail(off, (margin - float(total[0])) / error),
    )


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ShareChanges:
    """Changes of sums over tiles, with intervals and p values.

    ``p_value``: two-sided, signs of tiles flipped; ``p_equivalence``: that the change lies outside the margin;
    ``reason``: why there are no intervals and no p, None if there are.
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
    """Return intervals and p values of changes of which only each tile's share is known.

    As :func:`paired_differences`, with the same tiles drawn, but squares stay about the means over all tiles in every
    resample, because genes' means by tile are not known. The p is the same; the interval differs in second order only.
    ``change`` and ``target`` are sums of squares about the means over all tiles; every tile has cells.
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
    """Return the one-sided p of a bound ``needed`` standard errors away, from absolute errors of the resamples."""
    if np.isnan(needed):
        return np.nan
    half = float(p_values(np.count_nonzero(off >= abs(needed), keepdims=True), n_permutations=len(off)).p[0]) / 2.0
    return half if needed > 0.0 else 1.0 - half


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class PairedRows:
    """Moments of one cell type by tile: of expression, and of the residuals of two models.

    Residuals are prediction minus expression, of the model before and the model after; ``m2`` are centred sums of
    squares. A pair is a head of one model and its partner in the other, or both whole models. ``varies``: genes whose
    expression varies over the type.
    """

    tiles: Int64[np.ndarray, " tiles"]
    n_cells: Int64[np.ndarray, " tiles"]
    target_mean: Float64[np.ndarray, "tiles genes"]
    target_m2: Float64[np.ndarray, "tiles genes"]
    before_mean: Float64[np.ndarray, "tiles pairs genes"]
    before_m2: Float64[np.ndarray, "tiles pairs genes"]
    after_mean: Float64[np.ndarray, "tiles pairs genes"]
    after_m2: Float64[np.ndarray, "tiles pairs genes"]
    varies: Bool[np.ndarray, " genes"]

    def __post_init__(self) -> None:
        n_tiles, n_pairs, n_genes = self.before_mean.shape
        for name, shape in (
            ("tiles", (n_tiles,)),
            ("n_cells", (n_tiles,)),
            ("target_mean", (n_tiles, n_genes)),
            ("target_m2", (n_tiles, n_genes)),
            ("before_m2", (n_tiles, n_pairs, n_genes)),
            ("after_mean", (n_tiles, n_pairs, n_genes)),
            ("after_m2", (n_tiles, n_pairs, n_genes)),
            ("varies", (n_genes,)),
        ):
            if getattr(self, name).shape != shape:
                found = getattr(self, name).shape
                msg = f"{name} has shape {found}; before_mean {self.before_mean.shape} asks for {shape}"
                raise ValueError(msg)
        if np.any(self.n_cells < 0):
            msg = f"n_cells holds {int(self.n_cells.min())}; a tile has at least 0 cells"
            raise ValueError(msg)
        present, times = np.unique(self.tiles, return_counts=True)
        if np.any(times > 1):
            msg = f"tile {int(present[np.argmax(times)])} occurs {int(times.max())} times; a tile has one row"
            raise ValueError(msg)

    @property
    def with_cells(self) -> PairedRows:
        """The same without tiles that hold no cell, whose means are undefined."""
        kept = self.n_cells > 0
        names = ("tiles", "n_cells", "target_mean", "target_m2", "before_mean", "before_m2", "after_mean", "after_m2")
        return self if kept.all() else replace(self, **{name: getattr(self, name)[kept] for name in names})


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class PairedDifferences:
    """Differences of explained variance, second model minus first.

    ``p_value``: that both models are equally good in every tile, two-sided; ``p_equivalence``: that the difference lies
    outside the margin; ``p_not_worse``: that the second model is worse by the margin or more. NaN stands where
    expression does not vary; there are no gene columns if they were not asked for. ``reason``: why there are no
    intervals and no p, None if there are.
    """

    difference: Float64[np.ndarray, " pairs"]
    low: Float64[np.ndarray, " pairs"]
    high: Float64[np.ndarray, " pairs"]
    p_value: Float64[np.ndarray, " pairs"]
    p_equivalence: Float64[np.ndarray, " pairs"]
    p_not_worse: Float64[np.ndarray, " pairs"]
    difference_gene: Float64[np.ndarray, "pairs genes"]
    p_value_gene: Float64[np.ndarray, "pairs genes"]
    n_tiles: int
    reason: str | None = None


def paired_differences(
    rows: PairedRows,
    *,
    confidence: float = 0.95,
    n_resamples: int = 1000,
    n_flips: int = 9999,
    margin: float = 0.01,
    by_gene: bool = True,
    seed: int = 0,
    label: str = "",
) -> PairedDifferences:
    """Return how much better the second model is than the first on one cell type, with intervals and p.

    A tile's share is ``D_b = (S1_b - S2_b) / S``: squared residuals about their means over all tiles, over squares of
    expression. Null: models are exchangeable in every tile, so signs of D_b flip; n tiles have no p below
    ``2^(1 - n)``. The interval is as in ``tile_bootstrap``, with ``s^2 = sum_b (D_b - difference * T_b / S)^2``, T_b
    the tile's squares of expression; equivalence: TOST (Schuirmann 1987). Tiles count as independent: at least eight w
    wide, w the width of the Gaussian kernel ``exp(-d^2 / (2 w^2))`` of the fields.
    """
    return _differences([rows], confidence, n_resamples, n_flips, margin, seed, label, by_gene=by_gene)


def pooled_difference(
    parts: Sequence[PairedRows],
    *,
    confidence: float = 0.95,
    n_resamples: int = 1000,
    n_flips: int = 9999,
    margin: float = 0.01,
    seed: int = 0,
    label: str = "",
) -> PairedDifferences:
    """Return the differences over several cell types together, with squares summed over types within each tile."""
    n_pairs = [part.before_mean.shape[1] for part in parts]
    if len(set(n_pairs)) > 1:
        msg = f"types have {sorted(set(n_pairs))} pairs; the same pairs are summed over all types"
        raise ValueError(msg)
    return _differences(list(parts), confidence, n_resamples, n_flips, margin, seed, label, by_gene=False)


def _differences(
    parts: list[PairedRows],
    confidence: float,
    n_resamples: int,
    n_flips: int,
    margin: float,
    seed: int,
    label: str,
    *,
    by_gene: bool,
) -> PairedDifferences:
    _check(confidence, n_resamples, n_flips, margin)
    parts = [part.with_cells for part in parts]
    n_pairs, n_genes = parts[0].before_mean.shape[1:] if parts else (0, 0)
    tiles = np.unique(np.concatenate([part.tiles for part in parts])) if parts else np.zeros(0, dtype=np.int64)
    n_tiles = len(tiles)
    few = n_tiles < MIN_TILES_INTERVAL
    reason = f"cells in {n_tiles} tiles; at least {MIN_TILES_INTERVAL} are needed to tell differences" if few else None
    cells = np.zeros(n_tiles)
    # row 0 is the truth: each tile once
    counts = np.ones((1, n_tiles))
    if not few:
        counts = np.vstack([counts, tile_draws(n_tiles, n_resamples, seed=seed, label=label)])
    target, target_share = np.zeros(len(counts)), np.zeros((len(counts), n_tiles))
    change = np.zeros((n_pairs, len(counts), n_tiles))
    gene_share, gene_target = np.zeros((n_pairs, n_tiles, n_genes if by_gene else 0)), np.zeros(n_genes)
    for part in parts:
        own = np.searchsorted(tiles, part.tiles)
        weight = part.n_cells.astype(np.float64)
        cells[own] += weight
        drawn = counts[:, own]
        squares = TileSquares.of(weight, part.target_mean[:, part.varies], part.target_m2[:, part.varies], drawn)
        target += squares.total
        target_share[:, own] += squares.about
        for pair in range(n_pairs):
            before = TileSquares.of(weight, part.before_mean[:, pair], part.before_m2[:, pair], drawn)
            after = TileSquares.of(weight, part.after_mean[:, pair], part.after_m2[:, pair], drawn)
            change[pair][:, own] += before.about - after.about
        if by_gene:
            gene_target = squares_about(weight, part.target_mean, part.target_m2).sum(axis=0)
            gene_target[~part.varies] = np.nan
            gene_share[:, own] += squares_about(weight, part.before_mean, part.before_m2).transpose(1, 0, 2)
            gene_share[:, own] -= squares_about(weight, part.after_mean, part.after_m2).transpose(1, 0, 2)
    undefined = np.full(n_pairs, np.nan)
    if not n_tiles or not target[0] > 0.0:
        none = np.full((n_pairs, n_genes if by_gene else 0), np.nan)
        return PairedDifferences(
            difference=undefined,
            low=undefined,
            high=undefined,
            p_value=undefined,
            p_equivalence=undefined,
            p_not_worse=undefined,
            difference_gene=none,
            p_value_gene=none,
            n_tiles=n_tiles,
            reason=reason or "expression does not vary; there is nothing to explain",
        )
    shares = change[:, 0] / target[0]
    difference = shares.sum(axis=1)
    difference_gene = gene_share.sum(axis=1) / gene_target if by_gene else np.zeros((n_pairs, 0))
    # a resample may be one tile of one cell again and again
    defined = target > ROUNDING * target[0]
    if not few and np.count_nonzero(defined) < 2:
        reason = f"expression varies in none of {n_resamples} resamples of {n_tiles} tiles"
    if reason is not None:
        return PairedDifferences(
            difference=difference,
            low=undefined,
            high=undefined,
            p_value=undefined,
            p_equivalence=undefined,
            p_not_worse=undefined,
            difference_gene=difference_gene,
            p_value_gene=np.full(difference_gene.shape, np.nan),
            n_tiles=n_tiles,
            reason=reason,
        )
    low, high, above, below = (np.full(n_pairs, np.nan) for _ in range(4))
    for pair in range(n_pairs):
        found = studentised(
            counts[defined],
            change[pair][defined],
            target_share[defined],
            target[defined],
            widened=widening(cells),
            confidence=confidence,
            margin=margin,
        )
        low[pair], high[pair], below[pair], above[pair] = found.low, found.high, found.p_below, found.p_above
    return PairedDifferences(
        difference=difference,
        low=low,
        high=high,
        p_value=flipped_p(shares[:, :, None], n_flips, seed=seed, label=label)[:, 0],
        p_equivalence=np.maximum(below, above),
        p_not_worse=below,
        difference_gene=difference_gene,
        p_value_gene=flipped_p(gene_share / gene_target, n_flips, seed=seed, label=label)
        if by_gene
        else np.zeros((n_pairs, 0)),
        n_tiles=n_tiles,
    )


def verdict_of(
    *,
    low: Float64[np.ndarray, ...],
    high: Float64[np.ndarray, ...],
    p_adjusted: Float64[np.ndarray, ...],
    p_equivalence: Float64[np.ndarray, ...],
    alpha: float,
) -> np.ndarray:
    """Return ``better``, ``worse``, ``same`` or ``undecided`` for each difference.

    ``better`` and ``worse`` need both a significant p and an interval without 0, because with few tiles the two can
    disagree. A difference inside the margin is ``same`` even where it is surely not 0. Undefined ones are
    ``undecided``.
    """
    with np.errstate(invalid="ignore"):
        return np.select(
            [p_equivalence <= alpha, (p_adjusted <= alpha) & (low > 0), (p_adjusted <= alpha) & (high < 0)],
            ["same", "better", "worse"],
            "undecided",
        )


def _check(confidence: float, n_resamples: int, n_flips: int, margin: float) -> None:
    if not 0.0 < confidence < 1.0:
        msg = f"confidence is {confidence}; it must lie between 0 and 1"
        raise ValueError(msg)
    for name, number in (("n_resamples", n_resamples), ("n_flips", n_flips)):
        if number < 1:
            msg = f"{name} is {number}; at least 1 is needed"
            raise ValueError(msg)
    if not margin > 0.0:
        msg = f"margin is {margin}; it must be above 0"
        raise ValueError(msg)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class GeneIntervals:
    """Ends of the intervals of differences of explained variance; NaN where there is none."""

    low: Float64[np.ndarray, "pairs genes"]
    high: Float64[np.ndarray, "pairs genes"]


def gene_intervals(rows: PairedRows, *, confidence: float = 0.95) -> GeneIntervals:
    """Return the interval of each gene's difference of explained variance, second model minus first.

    ``difference +- t * s`` with ``s^2 = n / (n - 1) * sum_b (D_b - difference * T_b / S)^2``, the linearised error of a
    ratio from clusters (Cochran 1977, chapter 6), and n - 1 degrees of freedom; n is the effective number of tiles
    ``(sum_b cells_b)^2 / sum_b cells_b^2``, D_b, T_b and S as in :func:`paired_differences`. Tiles count as
    independent.
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
    target = squares_about(cells, rows.target_mean, rows.target_m2)
    total = np.where(rows.varies, target.sum(axis=0), np.nan)
    share = (
        squares_about(cells, rows.before_mean, rows.before_m2) - squares_about(cells, rows.after_mean, rows.after_m2)
    ) / total
    difference = share.sum(axis=0)
    off = share - difference * (target / total)[:, None]
    error = np.sqrt(effective / (effective - 1.0) * np.square(off).sum(axis=0))
    reach = float(student.ppf(0.5 + confidence / 2.0, effective - 1.0)) * error
    return GeneIntervals(low=difference - reach, high=difference + reach)
