"""Quadratic forms of cells with one head's part substituted, compiled: a pass over rows that lie far apart."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from amici_eval.common.compiling import compiled, numba_if_usable

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["compiled_substitution"]


@functools.cache
def compiled_substitution() -> Callable[..., None] | None:
    """Return :func:`_substitute` compiled, or ``None`` without numba or with its compiler switched off."""
    if numba_if_usable() is None:
        return None
    kernel: Callable[..., None] = compiled(_substitute, error_model="numpy", fastmath={"contract", "reassoc", "nsz"})
    return kernel


def _substitute(
    z: Any,
    means: Any,
    forms: Any,
    mean_forms: Any,
    permutations: Any,
    start: Any,
    images: Any,
    target: Any,
    epsilon: Any,
    weights: Any,
    common: Any,
    spread: Any,
    own: Any,
) -> None:
    """Write 1 / sigma of some cells under every substitution, and add up what follows from it.

    Parameters
    ----------
    z
        Shape (all cells, outputs).
    means
        Shape (outputs,): of z over all cells.
    forms, mean_forms
        Shapes (all cells, 2 * heads) and (2 * heads,): quadratic forms of each head's part alone, under ``gram`` and
        then under ``product``, of the cells and of the means.
    permutations
        Shape (permutations, all cells).
    start
        Position of the first of these cells among all.
    images, target
        Shapes (cells, 2 * columns) and (cells, columns): ``x @ matrix`` without each head's own block, and projected
        targets, of these cells.
    epsilon
        Of the layer norm.
    weights
        Written: 1 / sigma, shape (cells, substitutes, heads). Substitute 0 is the mean.
    common, spread
        Added to: sums of ``x @ target / sigma`` and ``x @ product @ x / sigma**2``, shape (substitutes, heads).
    own
        Added to: sum of the substituted parts over sigma, shape (substitutes, heads, d).
    """
    n_cells, n_substitutes, n_heads = weights.shape
    n_outputs = z.shape[1]
    n_columns, head_size = n_outputs + 1, n_outputs // n_heads
    # copies of one cell's rows, by head: plain loops over whole rows of such arrays become vector instructions
    rows = np.empty((4, n_outputs))
    image, dual = rows[0].reshape(n_heads, head_size), rows[1].reshape(n_heads, head_size)
    aim, part = rows[2].reshape(n_heads, head_size), rows[3].reshape(n_heads, head_size)
    rest = np.empty((3, n_heads))
    dots = np.empty((3, n_heads))
    for i in range(n_cells):
        under, over, wanted = images[i, 1:n_columns], images[i, n_columns + 1 :], target[i, 1:]
        row, here = z[start + i], forms[start + i]
        for c in range(n_outputs):
            rows[0, c], rows[1, c], rows[2, c], rows[3, c] = under[c], over[c], wanted[c], row[c]
        for h in range(n_heads):
            under_gram, under_product, along = 0.0, 0.0, 0.0
            for c in range(head_size):
                under_gram += part[h, c] * image[h, c]
                under_product += part[h, c] * dual[h, c]
                along += part[h, c] * aim[h, c]
            dots[0, h], dots[1, h], dots[2, h] = under_gram, under_product, along
        gram_all, product_all, along_all = images[i, 0], images[i, n_columns], np.float64(target[i, 0])
        for h in range(n_heads):
            gram_all += dots[0, h] + here[h]
            product_all += dots[1, h] + here[n_heads + h]
            along_all += dots[2, h]
        for h in range(n_heads):
            rest[0, h] = gram_all - 2.0 * dots[0, h] - here[h]
            rest[1, h] = product_all - 2.0 * dots[1, h] - here[n_heads + h]
            rest[2, h] = along_all - dots[2, h]
        for s in range(n_substitutes):
            if s == 0:
                for c in range(n_outputs):
                    rows[3, c] = means[c]
                alone = mean_forms
            else:
                moved = permutations[s - 1, start + i]
                row, alone = z[moved], forms[moved]
                for c in range(n_outputs):
                    rows[3, c] = row[c]
            for h in range(n_heads):
                under_gram, under_product, along = 0.0, 0.0, 0.0
                for c in range(head_size):
                    under_gram += part[h, c] * image[h, c]
                    under_product += part[h, c] * dual[h, c]
                    along += part[h, c] * aim[h, c]
                dots[0, h], dots[1, h], dots[2, h] = under_gram, under_product, along
            for h in range(n_heads):
                square = rest[0, h] + 2.0 * dots[0, h] + alone[h]
                weight = 1.0 / math.sqrt((square if square > 0.0 else 0.0) + epsilon)
                weights[i, s, h] = weight
                spread[s, h] += weight * weight * (rest[1, h] + 2.0 * dots[1, h] + alone[n_heads + h])
                common[s, h] += weight * (rest[2, h] + dots[2, h])
            for h in range(n_heads):
                weight = weights[i, s, h]
                for c in range(head_size):
                    own[s, h, c] += weight * part[h, c]
