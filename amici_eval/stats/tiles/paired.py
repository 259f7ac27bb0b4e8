"""What changed between two models on the same cells: explained variance, tile of tissue by tile of tissue."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from amici_eval.stats.tiles.bootstrap import MIN_TILES_INTERVAL, TileSquares, tile_draws, widening
from amici_eval.stats.tiles.tile_changes import ROUNDING, flipped_p, squares_about, studentised

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Bool, Float64, Int64

__all__ = ["PairedDifferences", "PairedRows", "paired_differences", "pooled_difference", "verdict_of"]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class PairedRows:
    """Moments of one cell type by tile, and of the residuals of two models there.

    Parameters
    ----------
    tiles
        Numbers of the tiles, shape (tiles,).
    n_cells
        Shape (tiles,); tiles without cells do not count.
    target_mean, target_m2
        Mean and centred sum of squares of expression, shape (tiles, genes).
    before_mean, before_m2, after_mean, after_m2
        The same of prediction minus expression of the first and of the second model, shape (tiles, pairs, genes): a
        pair is a head of one and its partner in the other, or both whole models.
    varies
        Genes whose expression varies over the type, shape (genes,).

    Raises
    ------
    ValueError
        If shapes disagree, a tile occurs twice, or counts are negative.
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

    Parameters
    ----------
    difference
        Over all genes, shape (pairs,); NaN where expression does not vary.
    low, high
        Ends of the interval, shape (pairs,).
    p_value
        Two-sided: that a difference as large arises where both models are as good in every tile, shape (pairs,).
    p_equivalence
        That the difference lies outside the margin, shape (pairs,).
    p_not_worse
        That the second is worse by the margin or more, shape (pairs,).
    difference_gene, p_value_gene
        Per gene, shape (pairs, genes); NaN for genes that do not vary; no columns if they were not asked for.
    n_tiles
        Tiles with cells.
    reason
        Why there are no intervals and no p; ``None`` if there are.
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
    """Learn how much better the second model is than the first on the cells of one type, and how sure that is.

    Parameters
    ----------
    rows
        The type.
    confidence, n_resamples
        Of the intervals, by resampling tiles.
    n_flips
        Random flips; where tiles have fewer sign patterns than that, all of them.
    margin
        Differences below it are too small to matter.
    by_gene
        Whether single genes are tested, too.
    seed, label
        What resamples and flips depend on, besides the number of tiles.

    Raises
    ------
    ValueError
        If a setting is out of range.

    Notes
    -----
    Cells are no replicates, for neighbours resemble each other: tiles of tissue are. A tile's share of the difference
    is ``D_b = (S1_b - S2_b) / S``, with S1_b and S2_b the squared residuals of both models in it about their means over
    all tiles, and S that of expression; they add up to the difference of explained variance. If the models are
    exchangeable in every tile, each D_b is as likely as its negative: signs are flipped, the same for all pairs and
    genes.

    The interval is symmetric and studentised, as that of explained variance itself (``bootstrap.tile_bootstrap``),
    with the linearised standard error ``s^2 = sum_b (D_b - difference * T_b / S)^2``, T_b the squares
    of expression in the tile. Equivalence takes both one-sided tests from the same resamples (TOST, Schuirmann 1987).

    Both take tiles to be about independent. n tiles have no p below ``2^(1 - n)``: five cannot reach .05.

    Measured (1500 pairs of models with errors of one law, 600 cells, Gaussian kernel ``exp(-d^2 / (2 w^2))``, w = .02,
    .03, .04, .08 of the window): p at most .05 in .055, .054, .061, .079 of them with 3 x 3 tiles and .057, .067, .076,
    .129 with 6 x 6; the 95 % interval holds 0 in .95, .96, .95, .93 and .94, .93, .92, .87. Tiles should be at least
    eight w wide. Errors as large, but of another law in the second model (500 pairs): p at most .05 in .04 to .06.
    Models apart by the margin (500 pairs, w = .02): ``p_not_worse`` at most .05 in .05 and .07, ``p_equivalence`` in
    .03 and .03 to .05; with w = .04, ``p_not_worse`` in .05 to .07 and .08.

    References
    ----------
    Schuirmann (1987), A comparison of the two one-sided tests procedure, J Pharmacokinet Biopharm 15:657. Hall (1988),
    Theoretical comparison of bootstrap confidence intervals, Ann Stat 16:927.
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
    """Learn the same over several cell types together: squares are summed over types, tiles are those of the tissue.

    Parameters
    ----------
    parts
        Of each type, with the same pairs; a tile of one number is one tile.
    confidence, n_resamples, n_flips, margin, seed, label
        As in :func:`paired_differences`.

    Raises
    ------
    ValueError
        If types have different numbers of pairs, or a setting is out of range.
    """
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
    # the truth goes the same way as the resamples, as the first of them
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
    # all tiles drawn may be one tile of one cell
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

    Parameters
    ----------
    low, high, p_adjusted, p_equivalence
        Of one shape.
    alpha
        Level.

    Notes
    -----
    ``better`` and ``worse`` take both a significant p and an interval without 0: with few tiles one may say what the
    other does not. A difference inside the margin is ``same`` even where it is surely not 0: it is too small to matter.
    What is neither, and what is undefined, is ``undecided``.
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
