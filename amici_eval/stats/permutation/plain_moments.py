"""The same moments as from factors, from predictions of cells x genes: for engines that know no factors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from amici_eval.stats.permutation.moments import TypeMoments

if TYPE_CHECKING:
    from jaxtyping import Float, Float64, Int64

    from amici_eval.stats.spatial.positions import CellPositions

__all__ = ["moments_of_predictions", "principal_factors"]

_RANK_TOLERANCE = 1e-6
"""Singular values below this share of the largest are what float32 made of 0."""


def moments_of_predictions(
    heads: Float[np.ndarray, "heads cells genes"],
    full: Float[np.ndarray, "cells genes"],
    targets: Float[np.ndarray, "cells genes"],
    *,
    tiles: Int64[np.ndarray, " cells"],
    place: CellPositions | None = None,
) -> TypeMoments:
    """Return the moments of one cell type from its predictions; see ``moments.gather_moments``.

    Parameters
    ----------
    heads, full
        Predictions with one head kept, and of the whole model.
    targets
        Expression.
    tiles, place
        As there.
    """
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

    Parameters
    ----------
    predictions
        Of each head kept alone; cells that are not finite count as the mean.
    """
    parts = []
    for prediction in predictions:
        wide = np.nan_to_num(prediction.astype(np.float64))
        centred = wide - wide.mean(axis=0)
        gram = centred.T @ centred
        values, vectors = np.linalg.eigh(gram)
        # rounding is relative to the predictions, not to how much they vary
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
