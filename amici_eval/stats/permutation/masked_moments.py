"""Moments by tile of a type's heads as they are, and of the same heads with a part of the neighbourhood masked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from amici_eval.stats.permutation.head_sums import HeadSums

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from jaxtyping import Bool, Float32, Float64, Int64

    from amici_eval.stats.permutation.moments import Block
    from amici_eval.stats.readout import Readout

__all__ = ["MaskedMoments", "masked_moments"]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class MaskedMoments:
    """Moments of one receiver type by tile: of expression, and of each head kept alone, whole and masked.

    Parameters
    ----------
    tiles, n_cells
        Numbers of the tiles that hold cells, and how many, shape (tiles,).
    target_mean, target_m2
        Mean and centred sum of squares of expression, shape (tiles, genes).
    residual_mean, residual_m2
        The same of prediction minus expression, shape (1 + masks, tiles, heads, genes): nothing masked, then each mask.
    varies
        Genes whose expression varies over the type, shape (genes,).
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
    """Run once over the cells of a type and return the moments of its heads under several masks.

    Parameters
    ----------
    outputs
        What attention brings to each cell: with nothing masked, then under each mask.
    readout
        How that becomes predicted expression.
    blocks
        Expression of all cells, in any order, each cell once.
    tiles
        Tile of each cell.
    device
        Torch device that has float64.

    Notes
    -----
    The same sums as :func:`~amici_eval.stats.permutation.moments.gather_moments`, for several models from one reading.
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
