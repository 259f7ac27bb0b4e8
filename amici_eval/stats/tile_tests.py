"""Intervals and tests over tiles of tissue: of explained variance, and of its changes between two models or masks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import t as student

from amici_eval.stats.permutation.permutations import PermutationStream
from amici_eval.stats.pvalues import p_values

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float64, Int64

    from amici_eval.stats.explained_variance import TileSums

MIN_TILES_INTERVAL = 5
"""Fewer tiles give no interval: their spread cannot be estimated."""

_BOOTSTRAP, _FLIPS = "\0bootstrap", "\0paired flips"
_LEAST_ERROR = 0.25
"""Floor of a resample's standard error, as a share of the true one: a resample may hold few different tiles."""
_ROUNDING = 1e-12
"""Values below this share of the numbers they are computed from are zeros up to float64 rounding."""
_TIED = 1e-9
_CONSTANT = "expression does not vary; there is nothing to explain"


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
    sums: TileSums, *, confidence: float = 0.95, n_resamples: int = 1000, seed: int, cell_type: str
) -> TileBootstrap:
    """Return intervals of explained variance over all genes, from tiles of tissue resampled with all their cells.

    Studentised on ``l = log(SS_residual / SS_target)``: ``l +- q s``, q the quantile of ``|l_r - l| / max(s_r, s / 4)``
    over resamples (Hall 1988), ``s^2 = sum_b (residual_b / SS_residual - target_b / SS_target)^2``; half-widths times
    :func:`_widening`. The floor s / 4 keeps intervals of five tiles finite; percentile and BCa intervals cover too
    little. Tiles count as independent: at least eight w wide, w the width of the Gaussian kernel
    ``exp(-d^2 / (2 w^2))`` of the fields.
    """
    n_models, n_tiles = sums.residual_mean.shape[1], len(sums.tiles)
    low, high = np.full(n_models, np.nan), np.full(n_models, np.nan)
    if n_tiles < MIN_TILES_INTERVAL:
        reason = f"cells in {n_tiles} tiles; at least {MIN_TILES_INTERVAL} are needed for an interval"
        return TileBootstrap(low=low, high=high, n_tiles=n_tiles, reason=reason)
    cells = sums.n_cells.astype(np.float64)
    counts = _with_truth(n_tiles, n_resamples, seed=seed, label=cell_type)
    target = _TileSquares.of(cells, sums.target_mean[:, sums.varies], sums.target_m2[:, sums.varies], counts)
    if not target.total[0] > 0.0:
        return TileBootstrap(low=low, high=high, n_tiles=n_tiles, reason=_CONSTANT)
    # a resample may be one tile of one cell again and again
    defined = target.total > _ROUNDING * target.total[0]
    if np.count_nonzero(defined) < 2:
        return TileBootstrap(low=low, high=high, n_tiles=n_tiles, reason=_no_resample(n_resamples, n_tiles))
    widened = _widening(cells)
    for model in range(n_models):
        # copies: the last bits of a product depend on what lies beside its numbers
        mean, m2 = sums.residual_mean[:, model].copy(), sums.residual_m2[:, model].copy()
        residual = _TileSquares.of(cells, mean, m2, counts)
        logs = np.log(np.maximum(residual.total[defined] / target.total[defined], _ROUNDING))
        influence = residual.shares[defined] - target.shares[defined]
        errors = np.sqrt((counts[defined] * np.square(influence)).sum(axis=1))
        # constant predictions have an error of 0 up to rounding
        least = max(_LEAST_ERROR * errors[0], _ROUNDING)
        off = np.abs(logs[1:] - logs[0]) / np.maximum(errors[1:], least)
        reach = float(np.quantile(off, confidence)) * errors[0] * widened
        with np.errstate(over="ignore"):
            low[model], high[model] = 1.0 - np.exp(logs[0] + reach), 1.0 - np.exp(logs[0] - reach)
    return TileBootstrap(low=low, high=high, n_tiles=n_tiles)


def _no_resample(n_resamples: int, n_tiles: int) -> str:
    return f"expression varies in none of {n_resamples} resamples of {n_tiles} tiles"


@dataclass(frozen=True, kw_only=True, eq=False)
class _TileSquares:
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
    ) -> _TileSquares:
        """Compute the sums from those of tiles, of which resample r holds tile b ``counts[r, b]`` times."""
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


def _widening(cells: Float64[np.ndarray, " tiles"]) -> float:
    """Return the factor of half-widths that corrects for tiles of unequal size.

    ``sqrt(k (n - 1) / ((k - 1) n))`` with n tiles, of which ``k = (sum cells)^2 / sum cells^2`` are effective (Kish).
    """
    n_tiles, effective = len(cells), cells.sum() ** 2 / np.square(cells).sum()
    return float(np.sqrt(effective / (effective - 1.0) * (n_tiles - 1) / n_tiles))


def _with_truth(n_tiles: int, n_resamples: int, *, seed: int, label: str) -> Float64[np.ndarray, "resamples tiles"]:
    """Return how often each resample holds each tile; row 0 is the truth, which holds each once.

    Resample r uses the generator's words from ``r * n_tiles`` on.
    """
    key = PermutationStream(seed=seed, cell_type=label, stratum=_BOOTSTRAP, n_cells=n_tiles).key()
    words = np.random.Philox(key=key).random_raw(n_resamples * n_tiles).reshape(n_resamples, n_tiles)
    half = np.uint64(32)
    drawn = (((words >> half) * np.uint64(n_tiles)) >> half).astype(np.int64)
    places = drawn + n_tiles * np.arange(n_resamples)[:, None]
    counts = np.bincount(places.ravel(), minlength=words.size).reshape(words.shape).astype(np.float64)
    return np.vstack([np.ones(n_tiles), counts])


@dataclass(frozen=True, kw_only=True)
class ChangeTest:
    """How changes over tiles are tested: by resamples of the tiles and by flips of their signs.

    ``margin``: largest change that still counts as none; ``label``: with ``seed``, determines what is drawn.
    """

    confidence: float = 0.95
    n_resamples: int = 1000
    n_flips: int = 9999
    margin: float = 0.01
    seed: int = 0
    label: str = ""


def _drawn(n_tiles: int, test: ChangeTest) -> Float64[np.ndarray, "resamples tiles"]:
    """Return the resamples of :func:`_with_truth`, or the truth alone if the tiles are too few."""
    if n_tiles < MIN_TILES_INTERVAL:
        return np.ones((1, n_tiles))
    return _with_truth(n_tiles, test.n_resamples, seed=test.seed, label=test.label)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class TileChanges:
    """Changes of explained variance, after minus before.

    ``p_value``: that both models are equally good in every tile, two-sided, signs of tiles flipped; ``p_equivalence``:
    that the change lies outside the margin; ``p_not_worse``: that the second model is worse by the margin or more. NaN
    stands where expression does not vary; there are no gene columns if they were not asked for. ``reason``: why there
    are no intervals and no p, None if there are.
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


def flipped_p(shares: Float64[np.ndarray, "pairs tiles genes"], test: ChangeTest) -> Float64[np.ndarray, "pairs genes"]:
    """Return the two-sided p of each sum over tiles under flips of the tiles' signs.

    Null: each tile's share is as likely as its negative; the flips are the same for all pairs and genes. Where there
    are at most ``n_flips`` patterns of signs, a pattern and its negative being one, all are used; random flips depend
    on seed, label and the number of tiles alone. Sums that are NaN get p NaN.
    """
    n_tiles = shares.shape[1]
    # the first tile keeps its sign: the negative of a pattern gives the same absolute sum
    every = 2.0 ** (n_tiles - 1) - 1 <= test.n_flips
    if every:
        patterns = np.arange(1, 2 ** (n_tiles - 1))
        signs = 1.0 - 2.0 * ((patterns[:, None] >> np.arange(n_tiles - 1)) & 1)
        signs = np.hstack([np.ones((len(signs), 1)), signs])
    else:
        key = PermutationStream(seed=test.seed, cell_type=test.label, stratum=_FLIPS, n_cells=n_tiles).key()
        words = np.random.Philox(key=key).random_raw(test.n_flips * n_tiles).reshape(test.n_flips, n_tiles)
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
class _Studentised:
    """Interval of a change, and p values against changes as large as a margin.

    ``p_below``: that the change is at or below minus the margin; ``p_above``: that it is at or above the margin.
    """

    low: float
    high: float
    p_below: float
    p_above: float


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class _Resampled:
    """Resamples of tiles, of which row 0 is the truth, each tile once.

    ``change`` and ``target_share``: what a tile drawn once adds to the change and to the squares of expression, about
    the means of the resample; ``target``: squares of expression of each resample.
    """

    cells: Float64[np.ndarray, " tiles"]
    counts: Float64[np.ndarray, "resamples tiles"]
    change: Float64[np.ndarray, "pairs resamples tiles"]
    target_share: Float64[np.ndarray, "resamples tiles"]
    target: Float64[np.ndarray, " resamples"]

    @classmethod
    def of(cls, pairs: Sequence[Pair], tiles: Int64[np.ndarray, " tiles"], test: ChangeTest) -> _Resampled:
        """Draw tiles and sum squares over cell types within each of them."""
        counts = _drawn(len(tiles), test)
        cells, target, target_share = np.zeros(len(tiles)), np.zeros(len(counts)), np.zeros(counts.shape)
        change = np.zeros((pairs[0][0].residual_mean.shape[1], *counts.shape))
        for before, after in pairs:
            own = np.searchsorted(tiles, before.tiles)
            weight, varies, drawn = before.n_cells.astype(np.float64), before.varies, counts[:, own]
            cells[own] += weight
            squares = _TileSquares.of(weight, before.target_mean[:, varies], before.target_m2[:, varies], drawn)
            target += squares.total
            target_share[:, own] += squares.about
            for pair in range(len(change)):
                was, became = (
                    _TileSquares.of(weight, sums.residual_mean[:, pair], sums.residual_m2[:, pair], drawn)
                    for sums in (before, after)
                )
                change[pair][:, own] += was.about - became.about
        return cls(cells=cells, counts=counts, change=change, target_share=target_share, target=target)

    def changes(self, test: ChangeTest) -> TileChanges:
        """Return the changes over all genes, without intervals and p where there is a reason for none."""
        n_pairs, _, n_tiles = self.change.shape
        # a resample may be one tile of one cell again and again
        defined = self.target > _ROUNDING * self.target[0]
        reason = None
        if n_tiles < MIN_TILES_INTERVAL:
            reason = f"cells in {n_tiles} tiles; at least {MIN_TILES_INTERVAL} are needed to tell differences"
        elif not self.target[0] > 0.0:
            reason = _CONSTANT
        elif np.count_nonzero(defined) < 2:
            reason = _no_resample(test.n_resamples, n_tiles)
        shares = self.change[:, 0] / (self.target[0] if self.target[0] > 0.0 else np.nan)
        nothing = np.full(n_pairs, np.nan)
        found = TileChanges(
            difference=shares.sum(axis=1),
            low=nothing,
            high=nothing,
            p_value=nothing,
            p_equivalence=nothing,
            p_not_worse=nothing,
            difference_gene=np.zeros((n_pairs, 0)),
            p_value_gene=np.zeros((n_pairs, 0)),
            n_tiles=n_tiles,
            reason=reason,
        )
        if reason is not None:
            return found
        told = [self._studentised(change[defined], defined, test) for change in self.change]
        below, above = (np.array([getattr(one, name) for one in told]) for name in ("p_below", "p_above"))
        return replace(
            found,
            low=np.array([one.low for one in told]),
            high=np.array([one.high for one in told]),
            p_value=flipped_p(shares[:, :, None], test)[:, 0],
            p_equivalence=np.maximum(below, above),
            p_not_worse=below,
        )

    def _studentised(
        self, change: Float64[np.ndarray, "defined tiles"], defined: np.ndarray, test: ChangeTest
    ) -> _Studentised:
        """Compare one pair; for the formulas see :func:`paired_differences`."""
        counts, target = self.counts[defined], self.target[defined]
        total = (counts * change).sum(axis=1) / target
        influence = change - total[:, None] * self.target_share[defined]
        errors = np.sqrt((counts * np.square(influence)).sum(axis=1)) / target
        # equal models have an error of 0 up to rounding
        least = max(_LEAST_ERROR * errors[0], _ROUNDING)
        off = np.abs(total[1:] - total[0]) / np.maximum(errors[1:], least)
        error = max(float(errors[0]) * _widening(self.cells), _ROUNDING)
        reach = float(np.quantile(off, test.confidence)) * error
        # distances of the change from both ends of the margin, in standard errors
        return _Studentised(
            low=float(total[0]) - reach,
            high=float(total[0]) + reach,
            p_below=_tail(off, (float(total[0]) + test.margin) / error),
            p_above=_tail(off, (test.margin - float(total[0])) / error),
        )


def _tail(off: Float64[np.ndarray, " resamples"], needed: float) -> float:
    """Return the one-sided p of a bound ``needed`` standard errors away, from absolute errors of the resamples."""
    if np.isnan(needed):
        return np.nan
    half = float(p_values(np.count_nonzero(off >= abs(needed), keepdims=True), n_permutations=len(off)).p[0]) / 2.0
    return half if needed > 0.0 else 1.0 - half


Pair = tuple["TileSums", "TileSums"]
"""One cell type before and after: the same tiles and expression, and as many models, each compared with its partner."""


def paired_differences(before: TileSums, after: TileSums, test: ChangeTest, *, by_gene: bool = True) -> TileChanges:
    """Return how much better the second model is than the first on one cell type, with intervals and p.

    A tile's share is ``D_b = (S1_b - S2_b) / S``: squared residuals about their means over all tiles, over squares of
    expression. Null: models are exchangeable in every tile, so signs of D_b flip; n tiles have no p below
    ``2^(1 - n)``. The interval is as in ``tile_bootstrap``, with ``s^2 = sum_b (D_b - difference * T_b / S)^2``, T_b
    the tile's squares of expression; equivalence: TOST (Schuirmann 1987). Tiles count as independent: at least eight w
    wide, w the width of the Gaussian kernel ``exp(-d^2 / (2 w^2))`` of the fields.
    """
    changes = _Resampled.of([(before, after)], before.tiles, test).changes(test)
    if not by_gene:
        return changes
    share, total = _gene_shares(before, after)
    nothing = np.full(share.shape[1:], np.nan)
    by_tile = (share / total).transpose(1, 0, 2)
    return replace(
        changes,
        difference_gene=share.sum(axis=0) / total,
        p_value_gene=flipped_p(by_tile, test) if changes.reason is None else nothing,
    )


def pooled_difference(pairs: Sequence[Pair], test: ChangeTest) -> TileChanges:
    """Return the differences over several cell types together, with squares summed over types within each tile."""
    return _Resampled.of(pairs, np.unique(np.concatenate([before.tiles for before, _ in pairs])), test).changes(test)


def share_changes(
    change: Float64[np.ndarray, "pairs tiles"],
    target: Float64[np.ndarray, " tiles"],
    n_cells: Float64[np.ndarray, " tiles"],
    test: ChangeTest,
) -> TileChanges:
    """Return intervals and p values of changes of which only each tile's share is known.

    As :func:`paired_differences`, with the same tiles drawn, but squares stay about the means over all tiles in every
    resample, because genes' means by tile are not known. The p is the same; the interval differs in second order only.
    ``change`` and ``target`` are sums of squares about the means over all tiles; every tile has cells.
    """
    counts = _drawn(len(target), test)
    resampled = _Resampled(
        cells=n_cells,
        counts=counts,
        change=np.broadcast_to(change[:, None], (len(change), *counts.shape)),
        target_share=np.broadcast_to(target, counts.shape),
        target=counts @ target,
    )
    found = resampled.changes(test)
    return found if resampled.target[0] > 0.0 else replace(found, reason=_CONSTANT)


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


def _gene_shares(
    before: TileSums, after: TileSums
) -> tuple[Float64[np.ndarray, "tiles pairs genes"], Float64[np.ndarray, " genes"]]:
    """Return how much less each tile leaves after than before, and the genes' squares of expression over all tiles."""
    total = np.where(before.varies, before.target_squares.sum(axis=0), np.nan)
    return before.residual_squares - after.residual_squares, total


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class GeneIntervals:
    """Ends of the intervals of differences of explained variance; NaN where there is none."""

    low: Float64[np.ndarray, "pairs genes"]
    high: Float64[np.ndarray, "pairs genes"]


def gene_intervals(before: TileSums, after: TileSums, *, confidence: float = 0.95) -> GeneIntervals:
    """Return the interval of each gene's difference of explained variance, second model minus first.

    ``difference +- t * s`` with ``s^2 = n / (n - 1) * sum_b (D_b - difference * T_b / S)^2``, the linearised error of a
    ratio from clusters (Cochran 1977, chapter 6), and n - 1 degrees of freedom; n is the effective number of tiles
    ``(sum_b cells_b)^2 / sum_b cells_b^2``, D_b, T_b and S as in :func:`paired_differences`. Tiles count as
    independent.
    """
    if len(before.tiles) < MIN_TILES_INTERVAL:
        nothing = np.full(before.residual_mean.shape[1:], np.nan)
        return GeneIntervals(low=nothing, high=nothing)
    cells = before.n_cells.astype(np.float64)
    effective = max(cells.sum() ** 2 / np.square(cells).sum(), 1.0 + 1e-9)
    share, total = _gene_shares(before, after)
    share = share / total
    difference = share.sum(axis=0)
    off = share - difference * (before.target_squares / total)[:, None]
    error = np.sqrt(effective / (effective - 1.0) * np.square(off).sum(axis=0))
    reach = float(student.ppf(0.5 + confidence / 2.0, effective - 1.0)) * error
    return GeneIntervals(low=difference - reach, high=difference + reach)
