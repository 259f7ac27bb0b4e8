"""Explained variance when one head brings its mean to every cell, or to a cell what belongs to another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from amici_eval.stats.coalitions import CHUNK_CELLS, cell_chunks

if TYPE_CHECKING:
    from jaxtyping import Float, Float64, Int

    from amici_eval.stats.readout import Readout

__all__ = ["SubstitutedValues", "substituted_values"]


@dataclass(frozen=True, kw_only=True, eq=False)
class SubstitutedValues:
    """Explained variance with one head's part substituted and all other heads as they are.

    Parameters
    ----------
    mean
        Shape (heads,): the head's part is its mean over the cells.
    permuted
        Shape (heads, permutations): cell i gets the head's part of cell ``permutation[i]``.
    """

    mean: Float64[np.ndarray, " heads"]
    permuted: Float64[np.ndarray, "heads permutations"]


def substituted_values(
    z: Float[np.ndarray, "cells outputs"],
    projected: Float[np.ndarray, "cells columns"],
    target_ss: float,
    readout: Readout,
    *,
    permutations: Int[np.ndarray, "permutations cells"],
    chunk_cells: int = CHUNK_CELLS,
) -> SubstitutedValues:
    """Return what an AMICI explains of one cell type if one head knows nothing of the cell it speaks to.

    Parameters
    ----------
    z, projected, target_ss, readout, chunk_cells
        As for :func:`amici_eval.stats.coalitions.coalition_values`, checked there.
    permutations
        Shape (permutations, cells), of positions; shared by all heads. None at all will do.

    Notes
    -----
    Exact up to rounding. The layer norm is the real one, of the substituted whole.
    """
    n_heads, head_size = readout.n_heads, readout.head_size
    gram, product = readout.gram, readout.weights.T @ readout.weights
    parts = [slice(1 + head * head_size, 1 + (head + 1) * head_size) for head in range(n_heads)]
    mean = np.concatenate([[1.0], z.mean(axis=0, dtype=np.float64)])
    # of each cell's parts with themselves: a permutation only moves them
    gram_own, product_own = np.empty((n_heads, len(z))), np.empty((n_heads, len(z)))
    for rows in cell_chunks(len(z), chunk_cells):
        x = _with_one(z[rows])
        for head, own in enumerate(parts):
            gram_own[head, rows] = _dots(x[:, own] @ gram[own, own], x[:, own])
            product_own[head, rows] = _dots(x[:, own] @ product[own, own], x[:, own])

    n_substitutes = 1 + len(permutations)
    common, spread = np.zeros((n_heads, n_substitutes)), np.zeros((n_heads, n_substitutes))
    total = np.zeros((n_heads, n_substitutes, readout.n_columns))
    for rows in cell_chunks(len(z), chunk_cells):
        x, target, moved = _with_one(z[rows]), projected[rows].astype(np.float64), permutations[:, rows]
        gram_image, product_image, agreement = x @ gram, x @ product, _dots(x, target)
        gram_all, product_all = _dots(x, gram_image), _dots(x, product_image)
        for head, own in enumerate(parts):
            old, new = x[:, own], np.empty((n_substitutes, len(x), head_size))
            new[0], new[1:] = mean[own], z[moved, own.start - 1 : own.stop - 1]
            square = gram_all + _change(old, new, gram_image[:, own], gram[own, own], gram_own[head], rows, moved)
            inverse = 1 / np.sqrt(np.maximum(square, 0) + readout.epsilon)
            square = product_all + _change(
                old, new, product_image[:, own], product[own, own], product_own[head], rows, moved
            )
            spread[head] += _dots(inverse**2, square)
            common[head] += _dots(inverse, agreement - _dots(old, target[:, own]) + _dots(new, target[:, own]))
            sums = inverse @ x
            sums[:, own] = np.einsum("rc,rcd->rd", inverse, new)
            total[head] += sums
    spread -= np.einsum("hrk,hrk->hr", total @ product, total) / len(z)
    values = (2 * common - spread) / target_ss
    return SubstitutedValues(mean=values[:, 0], permuted=values[:, 1:])


def _change(
    old: Float64[np.ndarray, "cells d"],
    new: Float64[np.ndarray, "substitutes cells d"],
    image: Float64[np.ndarray, "cells d"],
    matrix: Float64[np.ndarray, "d d"],
    squares: Float64[np.ndarray, " all_cells"],
    rows: slice,
    moved: Int[np.ndarray, "permutations cells"],
) -> Float64[np.ndarray, "substitutes cells"]:
    """Return by how much the quadratic form of a cell's x changes when one part of it becomes another.

    ``image`` is that part's share of ``x @ matrix`` over all of x, ``matrix`` the part's own block, ``squares`` the
    quadratic form of the part alone in every cell. The first substitute is the mean, the same for every cell.
    """
    others = image - old @ matrix
    change = 2 * (_dots(new, others) - _dots(old, others)) - squares[rows]
    change[0] += new[0, 0] @ matrix @ new[0, 0]
    change[1:] += squares[moved]
    return np.asarray(change)


def _with_one(z: Float[np.ndarray, "cells outputs"]) -> Float64[np.ndarray, "cells columns"]:
    x = np.ones((len(z), z.shape[1] + 1))
    x[:, 1:] = z
    return x


def _dots(left: Float64[np.ndarray, "... d"], right: Float64[np.ndarray, "... d"]) -> Float64[np.ndarray, ...]:
    """Return inner products over the last axis."""
    return np.asarray(np.einsum("...d,...d->...", left, right))
