"""Sums over cells of the factors of models that each keep some heads, and what follows for their predictions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from amici_eval.stats.readout import Readout

__all__ = ["HeadSums", "Residuals"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Residuals:
    """Of some models: prediction minus expression by tile, and predictions over all cells."""

    mean: torch.Tensor
    m2: torch.Tensor
    predicted_ss: torch.Tensor
    predicted_size: torch.Tensor


class HeadSums:
    """Sums by tile over the factors of models that each keep as many heads: of single heads, or of the whole.

    Parameters
    ----------
    readout
        How attention outputs become predictions.
    keeps
        The heads that each model keeps.
    n_tiles, device
        Tiles, and a torch device that has float64.
    """

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
        # the outputs of the heads stand side by side, as the columns do after the first
        x[:, :, 1:] = outputs.view(len(outputs), n_models, rank - 1)
        turned = torch.bmm(x.transpose(0, 1), self._grams).transpose(0, 1)
        scale = turned.mul_(x).sum(dim=2).clamp_(min=0.0).add_(self._readout.epsilon).sqrt_()
        return x.div_(scale[:, :, None]), scale

    def add(self, tile: int, factors: torch.Tensor, expression: torch.Tensor) -> None:
        """Count some cells of a tile in."""
        by_model = factors.transpose(0, 1)
        self._f[tile] += factors.sum(dim=0)
        self._ff[tile].baddbmm_(by_model.transpose(1, 2), by_model)
        torch.mm(factors.reshape(len(factors), -1).T, expression, out=self._fy)
        self._py[tile] += self._fy.view(*self._by_rank.shape).mul_(self._by_rank).sum(dim=1)

    def residuals(self, n: torch.Tensor, target_mean: torch.Tensor, target_squares: torch.Tensor) -> Residuals:
        """Return what follows for predictions, given cells (tiles, 1), means and squares of expression by tile."""
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
