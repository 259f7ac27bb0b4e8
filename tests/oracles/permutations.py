"""Permutations and their statistic, word for word."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


def fisher_yates(words: Sequence[int], n_cells: int) -> list[int]:
    """Shuffle with whole numbers of any length: word k chooses what entry ``n_cells - 1 - k`` is swapped with."""
    order = list(range(n_cells))
    for k in range(n_cells - 1):
        i = n_cells - 1 - k
        j = int(words[k]) * (i + 1) // 2**64
        order[i], order[j] = order[j], order[i]
    return order


def rounded(values: np.ndarray) -> np.ndarray:
    """Center over cells, then round to float32."""
    wide = values.astype(np.float64)
    return (wide - wide.mean(axis=0)).astype(np.float32)


def statistic(f: np.ndarray, z: np.ndarray, order: Sequence[int]) -> float:
    """Sum of F[order[i], a] * Z[i, a] of one head, without rounding."""
    n_cells, n_columns = f.shape
    return math.fsum(float(f[order[i], a]) * float(z[i, a]) for i in range(n_cells) for a in range(n_columns))


def exceedances(factors: np.ndarray, images: np.ndarray, orders: Iterable[Sequence[int]]) -> list[int]:
    """Per head, how many of some permutations fit at least as well as the identity."""
    f, z = rounded(factors), rounded(images)
    orders = list(orders)
    counts = []
    for head in range(f.shape[2]):
        own, image = f[:, :, head], z[:, :, head]
        tiny = 1e-10 * np.linalg.norm(own.astype(np.float64)) * np.linalg.norm(image.astype(np.float64))
        least = statistic(own, image, range(len(own))) - tiny
        counts.append(sum(statistic(own, image, order) >= least for order in orders))
    return counts


def shifts(order: Sequence[int]) -> list[list[int]]:
    """All permutations that give the place of the k-th cell of an order to the (k + s)-th, s = 0 first."""
    n_cells = len(order)
    every = []
    for s in range(n_cells):
        row = [0] * n_cells
        for k in range(n_cells):
            row[order[k]] = int(order[(k + s) % n_cells])
        every.append(row)
    return every
