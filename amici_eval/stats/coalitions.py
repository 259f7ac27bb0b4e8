"""Explained variance of any set of heads that are kept, without forming a prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jaxtyping import Bool, Float, Float64, Int, Int64

    from amici_eval.stats.readout import Readout

__all__ = [
    "CHUNK_CELLS",
    "CoalitionMoments",
    "cell_chunks",
    "check_inputs",
    "coalition_moments",
    "coalition_values",
    "pair_mask",
    "pair_terms",
]

CHUNK_CELLS = 1024
"""Cells that are worked on at a time: about 25 MB of working memory at 8 heads of 32 numbers."""

_COALITION_BLOCK = 512
"""Coalitions that are worked on at a time within a chunk of cells."""


def coalition_values(
    z: Float[np.ndarray, "cells outputs"],
    projected: Float[np.ndarray, "cells columns"],
    target_ss: float,
    readout: Readout,
    *,
    coalitions: Bool[np.ndarray, "coalitions heads"] | Int[np.ndarray, "coalitions heads"],
    chunk_cells: int = CHUNK_CELLS,
) -> Float64[np.ndarray, " coalitions"]:
    """Return what an AMICI explains of one cell type if only some of its heads are kept, for many sets of heads.

    Parameters
    ----------
    z
        What each head brings to each cell, shape (cells, heads * head_size), at least two cells.
    projected
        Shape (cells, 1 + heads * head_size): expression, centred over the cells, times ``readout.weights``.
    target_ss
        Sum over genes of the centred sum of squares of expression, over 0.
    readout
        From z to predicted expression.
    coalitions
        Shape (coalitions, heads), true (1) where a head is kept; the others are set to 0 before the layer norm.
    chunk_cells
        Cells worked on at a time; changes memory and the last bits.

    Returns
    -------
    numpy.ndarray
        Shape (coalitions,): ``1 - sum_g var(P_g - Y_g) / sum_g var(Y_g)``, dimensionless, at most 1. Every coalition is
        divided by its own layer norm.

    Raises
    ------
    ValueError
        If shapes do not fit, coalitions hold other entries than 0 and 1, or no gene varies.

    Notes
    -----
    Exact up to rounding: ``P = offset + weights @ x_S / sigma_S``, so traces of covariances need only, per cell, the
    products of pairs of heads under ``gram`` and ``weights.T @ weights``, and per coalition the mean of
    ``x_S / sigma_S``.
    """
    check_inputs(z, projected, target_ss, readout)
    moments = coalition_moments(z, projected, readout, coalitions=coalitions, chunk_cells=chunk_cells)
    return moments.values(target_ss)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class CoalitionMoments:
    """Sums over cells under the layer norm of each coalition, from which explained variance follows.

    Block 0 is the query residual, block 1 + h is head h. All blocks are summed, whether or not the coalition keeps
    them: that is what a frozen layer norm asks for.

    Parameters
    ----------
    kept
        Shape (coalitions, heads): whose layer norm.
    mean
        Shape (coalitions, 1 + heads * head_size): mean over cells of ``x / sigma``.
    pairs
        Shape (coalitions, pairs of blocks): sum over cells of ``x_a @ K_ab @ x_b / sigma**2``, with
        ``K = weights.T @ weights``; pairs of different blocks are counted twice.
    cross
        Shape (coalitions, 1 + heads): sum over cells of ``x_a @ projected_a / sigma``.
    product
        ``K``.
    n_cells
        How many cells were summed over.
    """

    kept: Bool[np.ndarray, "coalitions heads"]
    mean: Float64[np.ndarray, "coalitions columns"]
    pairs: Float64[np.ndarray, "coalitions pairs"]
    cross: Float64[np.ndarray, "coalitions blocks"]
    product: Float64[np.ndarray, "columns columns"]
    n_cells: int

    def values(self, target_ss: float) -> Float64[np.ndarray, " coalitions"]:
        """Return the explained variance of each coalition under its own layer norm, shape (coalitions,)."""
        n_heads = self.kept.shape[1]
        blocks = np.concatenate([np.ones((len(self.kept), 1), dtype=bool), self.kept], axis=1)
        head_size = (self.mean.shape[1] - 1) // n_heads
        mean = self.mean * np.concatenate([blocks[:, :1], np.repeat(self.kept, head_size, axis=1)], axis=1)
        spread = np.einsum("cp,cp->c", pair_mask(self.kept), self.pairs)
        spread -= self.n_cells * np.einsum("ck,ck->c", mean @ self.product, mean)
        common = np.einsum("cb,cb->c", blocks, self.cross)
        return np.asarray((2 * common - spread) / target_ss)

    def block_covariances(self, coalition: int) -> Float64[np.ndarray, "blocks blocks"]:
        """Return ``(cells - 1) tr Cov(P_a, P_b)`` of all blocks under one coalition's layer norm, symmetric."""
        left, right = _pairs(self.kept.shape[1])
        mean = self.mean[coalition]
        head_size = (len(mean) - 1) // self.kept.shape[1]
        starts = np.concatenate([[0], np.arange(1, len(mean), head_size)])
        outer = np.add.reduceat(np.add.reduceat(mean[:, None] * self.product * mean, starts, axis=0), starts, axis=1)
        covariance = np.empty_like(outer)
        covariance[left, right] = self.pairs[coalition] * np.where(left == right, 1.0, 0.5)
        covariance[right, left] = covariance[left, right]
        return np.asarray(covariance - self.n_cells * (outer + outer.T) / 2)


def coalition_moments(
    z: Float[np.ndarray, "cells outputs"],
    projected: Float[np.ndarray, "cells columns"],
    readout: Readout,
    *,
    coalitions: Bool[np.ndarray, "coalitions heads"] | Int[np.ndarray, "coalitions heads"],
    chunk_cells: int = CHUNK_CELLS,
) -> CoalitionMoments:
    """Return the sums over cells that :func:`coalition_values` rests on; parameters and errors as there."""
    kept = _as_bool(coalitions, readout.n_heads)
    mask = pair_mask(kept)
    product = readout.weights.T @ readout.weights
    n_blocks, n_outputs = readout.n_heads + 1, z.shape[1]
    linear = np.zeros((len(kept), n_outputs + 1 + n_blocks))
    pairs = np.zeros((len(kept), mask.shape[1]))
    width = min(chunk_cells, len(z))
    # written in place for every chunk: fresh memory of this size costs as much as the arithmetic
    sigma = np.empty((min(_COALITION_BLOCK, len(kept)), width))
    features = np.empty((width, linear.shape[1]))
    for rows in cell_chunks(len(z), chunk_cells):
        chunk = features[: rows.stop - rows.start]
        chunk[:, :n_outputs] = z[rows]
        chunk[:, n_outputs] = 1.0
        heads = chunk[:, :n_outputs]
        chunk[:, n_outputs + 1 :] = _block_dots(heads, projected[rows], readout.n_heads)
        spread_terms = pair_terms(heads, readout.gram, readout.n_heads).T
        product_terms = pair_terms(heads, product, readout.n_heads)
        for start in range(0, len(kept), _COALITION_BLOCK):
            block = slice(start, start + _COALITION_BLOCK)
            inverse = np.matmul(mask[block], spread_terms, out=sigma[: len(kept[block]), : len(chunk)])
            np.maximum(inverse, 0.0, out=inverse)
            inverse += readout.epsilon
            np.reciprocal(inverse, out=inverse)
            pairs[block] += inverse @ product_terms
            np.sqrt(inverse, out=inverse)
            linear[block] += inverse @ chunk
    mean = np.concatenate([linear[:, n_outputs : n_outputs + 1], linear[:, :n_outputs]], axis=1) / len(z)
    return CoalitionMoments(
        kept=kept, mean=mean, pairs=pairs, cross=linear[:, n_outputs + 1 :], product=product, n_cells=len(z)
    )


def cell_chunks(n_cells: int, chunk_cells: int) -> Iterator[slice]:
    """Yield consecutive slices of at most ``chunk_cells`` cells that cover all cells."""
    for start in range(0, n_cells, chunk_cells):
        yield slice(start, min(start + chunk_cells, n_cells))


def pair_terms(
    heads: Float64[np.ndarray, "cells outputs"], matrix: Float64[np.ndarray, "columns columns"], n_heads: int
) -> Float64[np.ndarray, "cells pairs"]:
    """Return ``x_a @ matrix_ab @ x_b`` per cell and pair of blocks a <= b, twice that where a < b.

    Shape (cells, (heads + 1) * (heads + 2) / 2), in the order of ``numpy.triu_indices(heads + 1)``. The sum over the
    pairs of kept blocks is the quadratic form ``x_S @ matrix @ x_S``.
    """
    n_cells, head_size = len(heads), heads.shape[1] // n_heads
    terms = np.empty((n_cells, (n_heads + 1) * (n_heads + 2) // 2))
    by_head = heads.reshape(n_cells, n_heads, head_size)
    terms[:, 0] = matrix[0, 0]
    np.einsum("chd,hd->ch", by_head, 2 * matrix[0, 1:].reshape(n_heads, head_size), out=terms[:, 1 : n_heads + 1])
    at = n_heads + 1
    for head in range(n_heads):
        own = slice(head * head_size, (head + 1) * head_size)
        weights = matrix[1:, 1:][own, own.start :].copy()
        weights[:, head_size:] *= 2
        images = (heads[:, own] @ weights).reshape(n_cells, n_heads - head, head_size)
        np.einsum("chd,chd->ch", images, by_head[:, head:], out=terms[:, at : at + n_heads - head])
        at += n_heads - head
    return terms


def _block_dots(
    heads: Float64[np.ndarray, "cells outputs"], projected: Float[np.ndarray, "cells columns"], n_heads: int
) -> Float64[np.ndarray, "cells blocks"]:
    """Return ``x_a @ projected_a`` per cell and block a."""
    dots = np.empty((len(heads), n_heads + 1))
    dots[:, 0] = projected[:, 0]
    shape = (len(heads), n_heads, heads.shape[1] // n_heads)
    np.einsum("chd,chd->ch", heads.reshape(shape), projected[:, 1:].astype(np.float64).reshape(shape), out=dots[:, 1:])
    return dots


def _pairs(n_heads: int) -> tuple[Int64[np.ndarray, " pairs"], Int64[np.ndarray, " pairs"]]:
    """Return the blocks a <= b of all pairs."""
    return np.triu_indices(n_heads + 1)


def pair_mask(kept: Bool[np.ndarray, "coalitions heads"]) -> Float64[np.ndarray, "coalitions pairs"]:
    """Return 1 for the pairs of blocks (see :func:`pair_terms`) of which a coalition keeps both, 0 for others."""
    left, right = _pairs(kept.shape[1])
    blocks = np.concatenate([np.ones((len(kept), 1), dtype=bool), kept], axis=1)
    return np.asarray(blocks[:, left] & blocks[:, right], dtype=np.float64)


def _as_bool(
    coalitions: Bool[np.ndarray, "coalitions heads"] | Int[np.ndarray, "coalitions heads"], n_heads: int
) -> Bool[np.ndarray, "coalitions heads"]:
    coalitions = np.asarray(coalitions)
    if coalitions.ndim != 2 or coalitions.shape[1] != n_heads:
        msg = f"coalitions have shape {coalitions.shape}; they must be (coalitions, {n_heads}), a column a head"
        raise ValueError(msg)
    if not np.isin(coalitions, (0, 1)).all():
        msg = f"coalitions hold {coalitions[~np.isin(coalitions, (0, 1))][0]}; 1 keeps a head, 0 removes it"
        raise ValueError(msg)
    return coalitions.astype(bool)


def check_inputs(
    z: Float[np.ndarray, "cells outputs"],
    projected: Float[np.ndarray, "cells columns"],
    target_ss: float,
    readout: Readout,
) -> None:
    """Raise ``ValueError`` if shapes do not fit the readout or no gene varies."""
    n_outputs = readout.n_columns - 1
    if z.ndim != 2 or z.shape[1] != n_outputs or projected.shape != (len(z), readout.n_columns):
        msg = (
            f"z has shape {z.shape}, projected {projected.shape}; a readout of {readout.n_heads} heads of "
            f"{readout.head_size} takes (cells, {n_outputs}) and (cells, {readout.n_columns})"
        )
        raise ValueError(msg)
    if not target_ss > 0:
        msg = f"target_ss is {target_ss}; explained variance is undefined unless expression varies (target_ss > 0)"
        raise ValueError(msg)
