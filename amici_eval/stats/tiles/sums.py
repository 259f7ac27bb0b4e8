"""Sums per tile of the heads' predictions and of expression, from one pass over the cells of a type."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from jaxtyping import Bool, Float, Float32, Float64, Int64

    from amici_eval.stats.readout import Readout
    from amici_eval.stats.spatial.lag import CellPositions


@dataclass(frozen=True, kw_only=True, eq=False)
class Residuals:
    """Moments of residuals (prediction minus expression) of some models by tile, and of predictions over all cells."""

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
        """Return moments of residuals, given cells (tiles, 1), means and uncentred squares of expression by tile."""
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
class TypeMoments:
    """Moments of one receiver type: per tile, per head and per gene.

    Residuals are prediction minus expression, ``full`` of the whole model, the others of each head kept alone; ``m2``
    and ``ss`` are centred sums of squares. ``projected``: ``(Y - mean) @ weights``; ``scale``: divisor of the layer
    norm with one head kept; ``predicted_size``: uncentred squares of predictions. ``pixel_sums`` and ``kept_values``
    are empty unless asked for. ``masked_m2``: residuals without the nearest neighbours, of each head, then of the whole
    model; None if not asked for.
    """

    tiles: Int64[np.ndarray, " tiles"]
    n_cells: Int64[np.ndarray, " tiles"]
    target_mean: Float64[np.ndarray, "tiles genes"]
    target_m2: Float64[np.ndarray, "tiles genes"]
    residual_mean: Float64[np.ndarray, "tiles heads genes"]
    residual_m2: Float64[np.ndarray, "tiles heads genes"]
    full_mean: Float64[np.ndarray, "tiles genes"]
    full_m2: Float64[np.ndarray, "tiles genes"]
    predicted_ss_gene: Float64[np.ndarray, "heads genes"]
    pixel_sums: Float64[np.ndarray, "pixels genes"]
    kept_values: Float32[np.ndarray, "kept genes"]
    constant_genes: Bool[np.ndarray, " genes"]
    projected: Float32[np.ndarray, "cells columns"]
    scale: Float64[np.ndarray, "cells heads"]
    predicted_size: Float64[np.ndarray, " heads"]
    masked_m2: Float64[np.ndarray, " models"] | None = None

    def without_cells(self) -> TypeMoments:
        """Return the moments without the arrays kept per cell or pixel."""
        return replace(
            self,
            projected=self.projected[:0],
            scale=self.scale[:0],
            pixel_sums=self.pixel_sums[:0],
            kept_values=self.kept_values[:0],
        )

    @property
    def target_ss(self) -> float:
        """Centred sum of squares of expression over the type's cells and the genes that vary."""
        return float(self.target_ss_gene[~self.constant_genes].sum())

    @property
    def target_ss_gene(self) -> Float64[np.ndarray, " genes"]:
        """Centred sum of squares of expression over the type's cells."""
        return merge_tiles(self.n_cells, self.target_mean, self.target_m2)

    @property
    def predicted_ss(self) -> Float64[np.ndarray, " heads"]:
        """Centred sum of squares of each head's prediction over cells and genes."""
        predicted_ss: Float64[np.ndarray, " heads"] = self.predicted_ss_gene.sum(axis=1)
        return predicted_ss

    @property
    def common(self) -> Float64[np.ndarray, "heads genes"]:
        """Centred sums over cells of prediction times expression."""
        residual = merge_tiles(self.n_cells, self.residual_mean, self.residual_m2)
        common: Float64[np.ndarray, "heads genes"] = (self.predicted_ss_gene + self.target_ss_gene - residual) / 2.0
        return common

    def explained_variance(self) -> tuple[Float64[np.ndarray, "heads genes"], Float64[np.ndarray, " heads"]]:
        """Return explained variance per head and gene (NaN for constant genes), and per head over all genes."""
        target = merge_tiles(self.n_cells, self.target_mean, self.target_m2)
        residual = merge_tiles(self.n_cells, self.residual_mean, self.residual_m2)
        per_gene = np.full(residual.shape, np.nan)
        varies = ~self.constant_genes
        per_gene[:, varies] = 1.0 - residual[:, varies] / target[varies]
        total = float(target[varies].sum())
        overall = 1.0 - residual.sum(axis=1) / total if total > 0.0 else np.full(len(residual), np.nan)
        return per_gene, overall

    @property
    def explained_by_all(self) -> float:
        """Explained variance of the whole model over all genes; NaN if no gene varies."""
        total = self.target_ss
        residual = float(merge_tiles(self.n_cells, self.full_mean, self.full_m2).sum())
        return 1.0 - residual / total if total > 0.0 else float("nan")

    @property
    def explained_without_nearest(self) -> Float64[np.ndarray, " models"]:
        """Explained variance over all genes with the nearest neighbours masked out: of each head, then of all."""
        if self.masked_m2 is None:
            return np.full(self.residual_m2.shape[1] + 1, np.nan)
        total = self.target_ss
        explained: Float64[np.ndarray, " models"] = 1.0 - self.masked_m2 / (total if total > 0.0 else np.nan)
        return explained


def merge_tiles(
    n_cells: Int64[np.ndarray, " tiles"], mean: Float64[np.ndarray, "tiles ..."], m2: Float64[np.ndarray, "tiles ..."]
) -> Float64[np.ndarray, ...]:
    """Return the centred sum of squares over all tiles together (Chan, Golub & LeVeque 1983)."""
    weight = n_cells.astype(np.float64).reshape(-1, *(1,) * (mean.ndim - 1))
    overall = (weight * mean).sum(axis=0) / weight.sum()
    merged: Float64[np.ndarray, ...] = (m2 + weight * (mean - overall) ** 2).sum(axis=0)
    return merged


def gather_moments(
    outputs: Float32[np.ndarray, "cells outputs"],
    readout: Readout,
    blocks: Iterable[Block],
    *,
    tiles: Int64[np.ndarray, " cells"],
    place: CellPositions | None = None,
    without_nearest: Float32[np.ndarray, "cells outputs"] | None = None,
    device: str = "cpu",
) -> TypeMoments:
    """Return the moments of a cell type from one pass over its cells.

    With one head kept a prediction has rank head_size + 1: its variance and its covariance with expression follow from
    moments of the factors ``F = [1, z] / scale``, summed in float64; no prediction of cells x genes is formed. Blocks
    bring each cell once, in any order. ``place`` adds pixel sums and near cells for tests in tissue;
    ``without_nearest``, the outputs without each cell's nearest neighbour, adds ``masked_m2``.
    """
    n_cells, n_genes, n_heads = len(outputs), len(readout.offset), readout.n_heads
    present, local = np.unique(tiles, return_inverse=True)
    n_tiles = len(present)
    counts = np.bincount(local, minlength=n_tiles).astype(np.int64)
    keeps: list[list[Collection[int]]] = [[[head] for head in range(n_heads)], [range(n_heads)]]
    heads, whole = (HeadSums(readout, keep, n_tiles=n_tiles, device=device) for keep in keeps)
    masked = [] if without_nearest is None else [HeadSums(readout, keep, n_tiles=1, device=device) for keep in keeps]
    weights = torch.from_numpy(readout.weights).to(device)
    y_sum, yy = (torch.zeros(n_tiles, n_genes, dtype=torch.float64, device=device) for _ in range(2))
    in_place = _InPlace(place, n_cells, n_genes, device=device)
    lowest, highest = (np.full(n_genes, end, dtype=np.float32) for end in (np.inf, -np.inf))
    projected = np.empty((n_cells, readout.n_columns), dtype=np.float32)
    scale = np.empty((n_cells, n_heads))
    room: torch.Tensor | None = None

    for block in blocks:
        order = np.argsort(local[block.positions], kind="stable")
        positions, values = block.positions[order], block.values[order]
        np.minimum(lowest, values.min(axis=0), out=lowest)
        np.maximum(highest, values.max(axis=0), out=highest)
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
        ends = np.flatnonzero(np.diff(local[positions], append=n_tiles)) + 1
        start = 0
        for end in ends.tolist():
            tile, y = int(local[positions[start]]), wide[start:end]
            heads.add(tile, alone[start:end], y)
            whole.add(tile, together[start:end], y)
            y_sum[tile] += y.sum(dim=0)
            yy[tile] += y.square().sum(dim=0)
            start = end
    projected -= projected.mean(axis=0, dtype=np.float64).astype(np.float32)

    n = torch.from_numpy(counts.astype(np.float64)).to(device)[:, None]
    target_mean = y_sum / n
    of_heads, of_whole = (sums.residuals(n, target_mean, yy) for sums in (heads, whole))
    overall, squares = y_sum.sum(dim=0, keepdim=True) / n_cells, yy.sum(dim=0, keepdim=True)
    of_masked = [sums.residuals(n.sum(dim=0, keepdim=True), overall, squares).m2[0].sum(dim=1) for sums in masked]
    return TypeMoments(
        tiles=present,
        n_cells=counts,
        target_mean=target_mean.cpu().numpy(),
        target_m2=(yy - n * target_mean**2).clamp_(min=0.0).cpu().numpy(),
        residual_mean=of_heads.mean.cpu().numpy(),
        residual_m2=of_heads.m2.cpu().numpy(),
        full_mean=of_whole.mean[:, 0].cpu().numpy(),
        full_m2=of_whole.m2[:, 0].cpu().numpy(),
        predicted_ss_gene=of_heads.predicted_ss.cpu().numpy(),
        pixel_sums=in_place.pixel_sums.cpu().numpy(),
        kept_values=in_place.kept_values,
        constant_genes=lowest == highest,
        projected=projected,
        scale=scale,
        predicted_size=of_heads.predicted_size.cpu().numpy(),
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


def factors_of(
    outputs: Float32[np.ndarray, "cells outputs"], moments: TypeMoments, readout: Readout
) -> tuple[Float64[np.ndarray, "cells rank heads"], Float32[np.ndarray, "cells rank heads"]]:
    """Return each head's factors ``F = [1, z] / scale`` and images Z: ``<P_i, Y_j> = <F_i, Z_j>`` plus a constant."""
    n_heads, size = readout.n_heads, readout.head_size
    factors = np.empty((len(outputs), size + 1, n_heads))
    images = np.empty((len(outputs), size + 1, n_heads), dtype=np.float32)
    factors[:, 0] = 1.0 / moments.scale
    by_head = outputs.reshape(-1, n_heads, size).transpose(0, 2, 1)
    np.divide(by_head, moments.scale[:, None, :], out=factors[:, 1:])
    images[:, 0] = moments.projected[:, :1]
    images[:, 1:] = moments.projected[:, 1:].reshape(-1, n_heads, size).transpose(0, 2, 1)
    return factors, images


def _room(*shape: int, device: str) -> torch.Tensor:
    """Return an uninitialised float64 tensor; on the CPU from NumPy, whose large pages are mapped faster."""
    if torch.device(device).type == "cpu":
        return torch.from_numpy(np.empty(shape))
    return torch.empty(shape, dtype=torch.float64, device=device)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class MaskedMoments:
    """Moments of one receiver type by tile: of expression, and of each head kept alone, under several masks.

    Residuals are prediction minus expression; model 0 masks nothing, each further one is a mask. ``m2`` are centred
    sums of squares; ``varies``: genes whose expression varies over the type.
    """

    tiles: Int64[np.ndarray, " tiles"]
    n_cells: Int64[np.ndarray, " tiles"]
    target_mean: Float64[np.ndarray, "tiles genes"]
    target_m2: Float64[np.ndarray, "tiles genes"]
    residual_mean: Float64[np.ndarray, "models tiles heads genes"]
    residual_m2: Float64[np.ndarray, "models tiles heads genes"]
    varies: Bool[np.ndarray, " genes"]


def masked_moments(
    outputs: Sequence[Float32[np.ndarray, "cells outputs"]],
    readout: Readout,
    blocks: Iterable[Block],
    *,
    tiles: Int64[np.ndarray, " cells"],
    device: str = "cpu",
) -> MaskedMoments:
    """Return the moments of a type's heads under several masks from one pass over its cells.

    ``outputs``: with nothing masked, then under each mask. Blocks bring each cell once, in any order.
    """
    n_genes = len(readout.offset)
    present, local = np.unique(tiles, return_inverse=True)
    counts = np.bincount(local, minlength=len(present)).astype(np.int64)
    keeps = [[head] for head in range(readout.n_heads)]
    models = [HeadSums(readout, keeps, n_tiles=len(present), device=device) for _ in outputs]
    y_sum, yy = (torch.zeros(len(present), n_genes, dtype=torch.float64, device=device) for _ in range(2))
    lowest, highest = (np.full(n_genes, end, dtype=np.float32) for end in (np.inf, -np.inf))
    for block in blocks:
        order = np.argsort(local[block.positions], kind="stable")
        positions, values = block.positions[order], block.values[order]
        np.minimum(lowest, values.min(axis=0), out=lowest)
        np.maximum(highest, values.max(axis=0), out=highest)
        wide = torch.from_numpy(values).to(device).double()
        ends = (np.flatnonzero(np.diff(local[positions], append=len(present))) + 1).tolist()
        parts = [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
        for part in parts:
            tile = int(local[positions[part.start]])
            y_sum[tile] += wide[part].sum(dim=0)
            yy[tile] += wide[part].square().sum(dim=0)
        for model, brought in zip(models, outputs, strict=True):
            factors, _ = model.factors(torch.from_numpy(brought[positions]).to(device))
            for part in parts:
                model.add(int(local[positions[part.start]]), factors[part], wide[part])
    n = torch.from_numpy(counts.astype(np.float64)).to(device)[:, None]
    target_mean = y_sum / n
    found = [model.residuals(n, target_mean, yy) for model in models]
    return MaskedMoments(
        tiles=present,
        n_cells=counts,
        target_mean=target_mean.cpu().numpy(),
        target_m2=(yy - n * target_mean**2).clamp_(min=0.0).cpu().numpy(),
        residual_mean=np.stack([one.mean.cpu().numpy() for one in found]),
        residual_m2=np.stack([one.m2.cpu().numpy() for one in found]),
        varies=lowest < highest,
    )


_RANK_TOLERANCE = 1e-6
"""Singular values below this share of the largest are zeros up to float32 rounding."""


def moments_of_predictions(
    heads: Float[np.ndarray, "heads cells genes"],
    full: Float[np.ndarray, "cells genes"],
    targets: Float[np.ndarray, "cells genes"],
    *,
    tiles: Int64[np.ndarray, " cells"],
    place: CellPositions | None = None,
) -> TypeMoments:
    """Return the moments of :func:`gather_moments` from predictions; ``projected`` and ``scale`` are empty."""
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
    residual_mean, residual_m2 = np.empty((n_tiles, n_heads, n_genes)), np.empty((n_tiles, n_heads, n_genes))
    predicted_ss, predicted_size = np.empty((n_heads, n_genes)), np.empty(n_heads)
    for head, prediction in enumerate(heads):
        predicted = prediction.astype(np.float64)
        residual_mean[:, head], residual_m2[:, head] = by_tile(predicted - wide)
        predicted_ss[head] = ((predicted - predicted.mean(axis=0)) ** 2).sum(axis=0)
        predicted_size[head] = (predicted**2).sum()
    full_mean, full_m2 = by_tile(full.astype(np.float64) - wide)
    pixel_sums = np.zeros((0 if place is None else place.grid.n_pixels, n_genes))
    if place is not None:
        np.add.at(pixel_sums, place.grid.pixel, wide)
    return TypeMoments(
        tiles=present,
        n_cells=np.bincount(local, minlength=n_tiles).astype(np.int64),
        target_mean=target_mean,
        target_m2=target_m2,
        residual_mean=residual_mean,
        residual_m2=residual_m2,
        full_mean=full_mean,
        full_m2=full_m2,
        predicted_ss_gene=predicted_ss,
        pixel_sums=pixel_sums,
        kept_values=targets[:0] if place is None else targets[place.near.cells],
        constant_genes=targets.min(axis=0) == targets.max(axis=0),
        projected=np.zeros((0, 1 + n_heads), dtype=np.float32),
        scale=np.zeros((0, n_heads)),
        predicted_size=predicted_size,
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
