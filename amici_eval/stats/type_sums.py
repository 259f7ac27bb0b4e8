"""Sums of one cell type for each tile, head and gene, gathered in one pass over its cells; factors of its heads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from amici_eval.stats.explained_variance import TileSums

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from jaxtyping import Float, Float32, Float64, Int64

    from amici_eval.stats.readout import Readout
    from amici_eval.stats.spatial.lag import CellPositions


@dataclass(frozen=True, kw_only=True, eq=False)
class Residuals:
    """Sums of residuals (prediction minus expression) of some models by tile, and of predictions over all cells."""

    mean: torch.Tensor
    m2: torch.Tensor
    predicted_ss: torch.Tensor
    predicted_size: torch.Tensor


class HeadSums:
    """Sums by tile over the factors of several models that keep the same number of heads each."""

    def __init__(self, readout: Readout, keeps: Sequence[Collection[int]], *, n_tiles: int, device: str) -> None:
        columns = np.stack([readout.columns(heads) for heads in keeps])
        self._readout, self._columns = readout, torch.from_numpy(columns).to(device)
        grams = np.stack([readout.gram[np.ix_(own, own)] for own in columns])
        self._grams = torch.from_numpy(grams).to(device)
        n_models, rank = columns.shape
        weights = torch.from_numpy(readout.weights).to(device)
        self._weights = weights[:, self._columns].permute(1, 0, 2).contiguous()  # models x genes x rank
        self._by_rank = self._weights.transpose(1, 2).contiguous()

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        n_genes = len(readout.offset)
        self._f, self._ff = zeros(n_tiles, n_models, rank), zeros(n_tiles, n_models, rank, rank)
        self._py, self._fy = zeros(n_tiles, n_models, n_genes), zeros(n_models * rank, n_genes)

    def factors(self, outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ``[1, z] / scale``, shape (cells, models, rank), and the scale, shape (cells, models), in float64."""
        n_models, rank = self._columns.shape
        x = outputs.new_empty((len(outputs), n_models, rank), dtype=torch.float64)
        x[:, :, 0] = 1.0
        # outputs are laid out head by head, like the columns after the first
        x[:, :, 1:] = outputs.view(len(outputs), n_models, rank - 1)
        turned = torch.bmm(x.transpose(0, 1), self._grams).transpose(0, 1)
        scale = turned.mul_(x).sum(dim=2).clamp_(min=0.0).add_(self._readout.epsilon).sqrt_()
        return x.div_(scale[:, :, None]), scale

    def add(self, tile: int, factors: torch.Tensor, expression: torch.Tensor) -> None:
        """Add some cells of a tile to the sums."""
        by_model = factors.transpose(0, 1)
        self._f[tile] += factors.sum(dim=0)
        self._ff[tile].baddbmm_(by_model.transpose(1, 2), by_model)
        torch.mm(factors.reshape(len(factors), -1).T, expression, out=self._fy)
        self._py[tile] += self._fy.view(*self._by_rank.shape).mul_(self._by_rank).sum(dim=1)

    def residuals(self, n: torch.Tensor, target_mean: torch.Tensor, target_squares: torch.Tensor) -> Residuals:
        """Return sums of residuals, given cells (tiles, 1), means and uncentred squares of expression by tile."""
        offset = torch.from_numpy(self._readout.offset).to(n.device)
        mean, m2 = torch.empty_like(self._py), torch.empty_like(self._py)
        predicted_ss, sizes = torch.empty_like(self._py[0]), self._py.new_empty(self._py.shape[1])
        for model, (weights, by_rank) in enumerate(zip(self._weights, self._by_rank, strict=True)):
            p_mean = (self._f[:, model] @ by_rank) / n
            squares = (weights @ self._ff[:, model]).mul_(weights).sum(dim=2)
            mean[:, model] = p_mean + offset - target_mean
            raw = torch.add(squares, self._py[:, model], alpha=-2.0).add_(target_squares)
            m2[:, model] = raw.sub_(n * (p_mean - target_mean) ** 2).clamp_(min=0.0)
            overall, n_cells = (n * p_mean).sum(dim=0) / n.sum(), n.sum()
            predicted_ss[model] = (squares.sum(dim=0) - n_cells * overall**2).clamp_(min=0.0)
            sizes[model] = (squares.sum(dim=0) + n_cells * (2.0 * overall * offset + offset**2)).sum()
        return Residuals(mean=mean, m2=m2, predicted_ss=predicted_ss, predicted_size=sizes)


class Block(Protocol):
    """Expression of some of the cells."""

    @property
    def positions(self) -> Int64[np.ndarray, " rows"]:
        """Which of the cells."""
        ...

    @property
    def values(self) -> Float32[np.ndarray, "rows genes"]:
        """Their expression."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class TypeSums:
    """Sums of one receiver type: per tile, per head and per gene.

    ``by_tile``: of each head kept alone, then of the whole model. ``ss`` are centred sums of squares of predictions,
    ``predicted_size`` uncentred ones. ``projected``: ``(Y - mean) @ weights``; ``scale``: divisor of the layer norm
    with one head kept. ``pixel_sums`` and ``kept_values`` are empty unless asked for. ``masked_m2``: residuals without
    the nearest neighbours, of each head, then of the whole model; None if not asked for.
    """

    by_tile: TileSums
    predicted_ss_gene: Float64[np.ndarray, "heads genes"]
    predicted_size: Float64[np.ndarray, " heads"]
    projected: Float32[np.ndarray, "cells columns"]
    scale: Float64[np.ndarray, "cells heads"]
    pixel_sums: Float64[np.ndarray, "pixels genes"]
    kept_values: Float32[np.ndarray, "kept genes"]
    masked_m2: Float64[np.ndarray, " models"] | None = None

    def without_cells(self) -> TypeSums:
        """Return the sums without the arrays kept per cell or pixel."""
        return replace(
            self,
            projected=self.projected[:0],
            scale=self.scale[:0],
            pixel_sums=self.pixel_sums[:0],
            kept_values=self.kept_values[:0],
        )

    @property
    def target_ss_gene(self) -> Float64[np.ndarray, " genes"]:
        """Centred sum of squares of expression over the type's cells."""
        target_ss: Float64[np.ndarray, " genes"] = self.by_tile.target_squares.sum(axis=0)
        return target_ss

    @property
    def predicted_ss(self) -> Float64[np.ndarray, " heads"]:
        """Centred sum of squares of each head's prediction over cells and genes."""
        predicted_ss: Float64[np.ndarray, " heads"] = self.predicted_ss_gene.sum(axis=1)
        return predicted_ss

    @property
    def common(self) -> Float64[np.ndarray, "heads genes"]:
        """Centred sums over cells of prediction times expression."""
        residual = self.by_tile.residual_squares[:, :-1].sum(axis=0)
        common: Float64[np.ndarray, "heads genes"] = (self.predicted_ss_gene + self.target_ss_gene - residual) / 2.0
        return common

    @property
    def explained_without_nearest(self) -> Float64[np.ndarray, " models"]:
        """Explained variance over all genes with the nearest neighbours masked out: of each head, then of all."""
        if self.masked_m2 is None:
            return np.full(self.by_tile.residual_m2.shape[1], np.nan)
        total = self.by_tile.target_ss
        explained: Float64[np.ndarray, " models"] = 1.0 - self.masked_m2 / (total if total > 0.0 else np.nan)
        return explained


class _Expression:
    """Sums of expression by tile, gathered block by block, and the sums of residuals that follow from them."""

    def __init__(self, tiles: Int64[np.ndarray, " cells"], n_genes: int, *, device: str) -> None:
        self.tiles, self._tile = np.unique(tiles, return_inverse=True)
        self._n_cells = np.bincount(self._tile, minlength=len(self.tiles)).astype(np.int64)
        shape = len(self.tiles), n_genes
        self._sum, self._squares = (torch.zeros(shape, dtype=torch.float64, device=device) for _ in range(2))
        self._lowest, self._highest = (np.full(n_genes, end, dtype=np.float32) for end in (np.inf, -np.inf))

    def sorted(self, block: Block) -> tuple[Int64[np.ndarray, " rows"], Float32[np.ndarray, "rows genes"]]:
        """Return positions and expression of a block's cells, tile by tile."""
        order = np.argsort(self._tile[block.positions], kind="stable")
        positions, values = block.positions[order], block.values[order]
        np.minimum(self._lowest, values.min(axis=0), out=self._lowest)
        np.maximum(self._highest, values.max(axis=0), out=self._highest)
        return positions, values

    def add(self, positions: Int64[np.ndarray, " rows"], wide: torch.Tensor) -> list[tuple[int, slice]]:
        """Add sorted cells, whose expression is in float64, and return each of their tiles with its rows."""
        local = self._tile[positions]
        ends = (np.flatnonzero(np.diff(local, append=len(self.tiles))) + 1).tolist()
        parts = [(int(local[start]), slice(start, end)) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
        for tile, rows in parts:
            self._sum[tile] += wide[rows].sum(dim=0)
            self._squares[tile] += wide[rows].square().sum(dim=0)
        return parts

    def residuals(self, sums: HeadSums, *, tiles_together: bool = False) -> Residuals:
        """Return the sums of a model's residuals, by tile or over all tiles together."""
        n = self._n
        if not tiles_together:
            return sums.residuals(n, self._sum / n, self._squares)
        total = n.sum(dim=0, keepdim=True)
        overall, squares = (values.sum(dim=0, keepdim=True) for values in (self._sum, self._squares))
        return sums.residuals(total, overall / total, squares)

    def tile_sums(self, residuals: Sequence[Residuals]) -> TileSums:
        """Return the sums of expression and of the residuals of some models, one after the other."""
        mean = self._sum / self._n
        return TileSums(
            tiles=self.tiles,
            n_cells=self._n_cells,
            target_mean=mean.cpu().numpy(),
            target_m2=(self._squares - self._n * mean**2).clamp_(min=0.0).cpu().numpy(),
            residual_mean=torch.cat([one.mean for one in residuals], dim=1).cpu().numpy(),
            residual_m2=torch.cat([one.m2 for one in residuals], dim=1).cpu().numpy(),
            varies=self._lowest < self._highest,
        )

    @property
    def _n(self) -> torch.Tensor:
        return torch.from_numpy(self._n_cells.astype(np.float64)).to(self._sum.device)[:, None]


def gather_sums(
    outputs: Float32[np.ndarray, "cells outputs"],
    readout: Readout,
    blocks: Iterable[Block],
    *,
    tiles: Int64[np.ndarray, " cells"],
    place: CellPositions | None = None,
    without_nearest: Float32[np.ndarray, "cells outputs"] | None = None,
    device: str = "cpu",
) -> TypeSums:
    """Return the sums of a cell type from one pass over its cells.

    With one head kept a prediction has rank head_size + 1: its variance and its covariance with expression follow from
    sums of products of the factors ``F = [1, z] / scale`` in float64; no prediction of cells x genes is formed. Blocks
    bring each cell once, in any order. ``place`` adds pixel sums and near cells for tests in tissue;
    ``without_nearest``, the outputs without each cell's nearest neighbour, adds ``masked_m2``.
    """
    n_cells, n_genes, n_heads = len(outputs), len(readout.offset), readout.n_heads
    expression = _Expression(tiles, n_genes, device=device)
    n_tiles = len(expression.tiles)
    keeps: list[list[Collection[int]]] = [[[head] for head in range(n_heads)], [range(n_heads)]]
    heads, whole = (HeadSums(readout, keep, n_tiles=n_tiles, device=device) for keep in keeps)
    masked = [] if without_nearest is None else [HeadSums(readout, keep, n_tiles=1, device=device) for keep in keeps]
    weights = torch.from_numpy(readout.weights).to(device)
    in_place = _InPlace(place, n_cells, n_genes, device=device)
    projected = np.empty((n_cells, readout.n_columns), dtype=np.float32)
    scale = np.empty((n_cells, n_heads))
    room: torch.Tensor | None = None

    for block in blocks:
        positions, values = expression.sorted(block)
        # one buffer for all blocks: allocating memory of this size costs as much as the arithmetic
        if room is None or len(room) < len(values):
            room = _room(len(values), n_genes, device=device)
        wide = room[: len(values)].copy_(torch.from_numpy(values))
        # in float64, then rounded: cells with the same expression get the same bits wherever they are in a block
        projected[positions] = (wide @ weights).float().cpu().numpy()
        z = torch.from_numpy(outputs[positions]).to(device)
        alone, deviation = heads.factors(z)
        together, _ = whole.factors(z)
        scale[positions] = deviation.cpu().numpy()
        in_place.add(positions, values, wide)
        if without_nearest is not None:
            z = torch.from_numpy(without_nearest[positions]).to(device)
            for sums in masked:
                sums.add(0, sums.factors(z)[0], wide)
        for tile, rows in expression.add(positions, wide):
            heads.add(tile, alone[rows], wide[rows])
            whole.add(tile, together[rows], wide[rows])
    projected -= projected.mean(axis=0, dtype=np.float64).astype(np.float32)

    of_heads, of_whole = (expression.residuals(sums) for sums in (heads, whole))
    of_masked = [expression.residuals(sums, tiles_together=True).m2[0].sum(dim=1) for sums in masked]
    return TypeSums(
        by_tile=expression.tile_sums([of_heads, of_whole]),
        predicted_ss_gene=of_heads.predicted_ss.cpu().numpy(),
        predicted_size=of_heads.predicted_size.cpu().numpy(),
        projected=projected,
        scale=scale,
        pixel_sums=in_place.pixel_sums.cpu().numpy(),
        kept_values=in_place.kept_values,
        masked_m2=torch.cat(of_masked).cpu().numpy() if of_masked else None,
    )


class _InPlace:
    """Expression for tests in tissue: sums over pixels, and the values of the cells of near pairs."""

    def __init__(self, place: CellPositions | None, n_cells: int, n_genes: int, *, device: str) -> None:
        self._pixel = None if place is None else place.grid.pixel
        kept = np.zeros(0, dtype=np.int64) if place is None else place.near.cells
        self._slot = np.full(n_cells, -1, dtype=np.int64)
        self._slot[kept] = np.arange(len(kept))
        n_pixels = 0 if place is None else place.grid.n_pixels
        self.pixel_sums = torch.zeros((n_pixels, n_genes), dtype=torch.float64, device=device)
        self.kept_values = np.empty((len(kept), n_genes), dtype=np.float32)

    def add(self, positions: Int64[np.ndarray, " rows"], values: np.ndarray, wide: torch.Tensor) -> None:
        """Add some cells: ``values`` as they were read, ``wide`` the same in float64 on the device."""
        if self._pixel is None:
            return
        slots = self._slot[positions]
        self.kept_values[slots[slots >= 0]] = values[slots >= 0]
        self.pixel_sums.index_add_(0, torch.from_numpy(self._pixel[positions]).to(wide.device), wide)


def _room(*shape: int, device: str) -> torch.Tensor:
    """Return an uninitialised float64 tensor; on the CPU from NumPy, whose large pages are mapped faster."""
    if torch.device(device).type == "cpu":
        return torch.from_numpy(np.empty(shape))
    return torch.empty(shape, dtype=torch.float64, device=device)


def masked_sums(
    outputs: Sequence[Float32[np.ndarray, "cells outputs"]],
    readout: Readout,
    blocks: Iterable[Block],
    *,
    tiles: Int64[np.ndarray, " cells"],
    device: str = "cpu",
) -> list[TileSums]:
    """Return the sums of a type's heads, each kept alone, under several masks from one pass over its cells.

    ``outputs``: with nothing masked, then under each mask. Blocks bring each cell once, in any order.
    """
    expression = _Expression(tiles, len(readout.offset), device=device)
    keeps = [[head] for head in range(readout.n_heads)]
    models = [HeadSums(readout, keeps, n_tiles=len(expression.tiles), device=device) for _ in outputs]
    for block in blocks:
        positions, values = expression.sorted(block)
        wide = torch.from_numpy(values).to(device).double()
        parts = expression.add(positions, wide)
        for model, brought in zip(models, outputs, strict=True):
            factors, _ = model.factors(torch.from_numpy(brought[positions]).to(device))
            for tile, rows in parts:
                model.add(tile, factors[rows], wide[rows])
    return [expression.tile_sums([expression.residuals(model)]) for model in models]


def factors_of(
    outputs: Float32[np.ndarray, "cells outputs"], sums: TypeSums, readout: Readout
) -> tuple[Float64[np.ndarray, "cells rank heads"], Float32[np.ndarray, "cells rank heads"]]:
    """Return each head's factors ``F = [1, z] / scale`` and images Z: ``<P_i, Y_j> = <F_i, Z_j>`` plus a constant."""
    n_heads, size = readout.n_heads, readout.head_size
    factors = np.empty((len(outputs), size + 1, n_heads))
    images = np.empty((len(outputs), size + 1, n_heads), dtype=np.float32)
    factors[:, 0] = 1.0 / sums.scale
    by_head = outputs.reshape(-1, n_heads, size).transpose(0, 2, 1)
    np.divide(by_head, sums.scale[:, None, :], out=factors[:, 1:])
    images[:, 0] = sums.projected[:, :1]
    images[:, 1:] = sums.projected[:, 1:].reshape(-1, n_heads, size).transpose(0, 2, 1)
    return factors, images


_RANK_TOLERANCE = 1e-6
"""Singular values below this share of the largest are zeros up to float32 rounding."""


def sums_of_predictions(
    heads: Float[np.ndarray, "heads cells genes"],
    full: Float[np.ndarray, "cells genes"],
    targets: Float[np.ndarray, "cells genes"],
    *,
    tiles: Int64[np.ndarray, " cells"],
    place: CellPositions | None = None,
) -> TypeSums:
    """Return the sums of :func:`gather_sums` from predictions; ``projected`` and ``scale`` are empty."""
    present, local = np.unique(tiles, return_inverse=True)
    n_tiles, n_heads, n_genes = len(present), len(heads), targets.shape[1]
    wide = targets.astype(np.float64)

    def by_tile(values: Float64[np.ndarray, "cells genes"]) -> tuple[np.ndarray, np.ndarray]:
        mean, m2 = np.empty((n_tiles, n_genes)), np.empty((n_tiles, n_genes))
        for tile in range(n_tiles):
            own = values[local == tile]
            mean[tile] = own.mean(axis=0)
            m2[tile] = ((own - mean[tile]) ** 2).sum(axis=0)
        return mean, m2

    target_mean, target_m2 = by_tile(wide)
    residual_mean, residual_m2 = (np.empty((n_tiles, n_heads + 1, n_genes)) for _ in range(2))
    predicted_ss, predicted_size = np.empty((n_heads, n_genes)), np.empty(n_heads)
    for model, prediction in enumerate([*heads, full]):
        predicted = prediction.astype(np.float64)
        residual_mean[:, model], residual_m2[:, model] = by_tile(predicted - wide)
        if model < n_heads:
            predicted_ss[model] = ((predicted - predicted.mean(axis=0)) ** 2).sum(axis=0)
            predicted_size[model] = (predicted**2).sum()
    pixel_sums = np.zeros((0 if place is None else place.grid.n_pixels, n_genes))
    if place is not None:
        np.add.at(pixel_sums, place.grid.pixel, wide)
    return TypeSums(
        by_tile=TileSums(
            tiles=present,
            n_cells=np.bincount(local, minlength=n_tiles).astype(np.int64),
            target_mean=target_mean,
            target_m2=target_m2,
            residual_mean=residual_mean,
            residual_m2=residual_m2,
            varies=targets.min(axis=0) < targets.max(axis=0),
        ),
        predicted_ss_gene=predicted_ss,
        predicted_size=predicted_size,
        projected=np.zeros((0, 1 + n_heads), dtype=np.float32),
        scale=np.zeros((0, n_heads)),
        pixel_sums=pixel_sums,
        kept_values=targets[:0] if place is None else targets[place.near.cells],
    )


def principal_factors(
    predictions: Float[np.ndarray, "heads cells genes"],
) -> tuple[Float64[np.ndarray, "cells rank heads"], Float64[np.ndarray, "heads genes rank"]]:
    """Return factors F and weights A of each head: its prediction is ``constant + F @ A.T``, A orthonormal.

    Predictions that are NaN count as 0; heads of smaller rank are padded with zeros.
    """
    parts = []
    for prediction in predictions:
        wide = np.nan_to_num(prediction.astype(np.float64))
        centred = wide - wide.mean(axis=0)
        gram = centred.T @ centred
        values, vectors = np.linalg.eigh(gram)
        # rounding errors scale with the predictions, not with their variance
        size = float((wide**2).sum())
        kept = values > max(_RANK_TOLERANCE**2 * values[-1], np.finfo(np.float32).eps ** 2 * size)
        kept[-1] = True
        parts.append((centred @ vectors[:, kept], vectors[:, kept]))
    rank = max(weights.shape[1] for _, weights in parts)
    n_cells, n_genes = predictions.shape[1:]
    factors, weights = np.zeros((n_cells, rank, len(parts))), np.zeros((len(parts), n_genes, rank))
    for head, (own, columns) in enumerate(parts):
        factors[:, : own.shape[1], head], weights[head, :, : columns.shape[1]] = own, columns
    return factors, weights
