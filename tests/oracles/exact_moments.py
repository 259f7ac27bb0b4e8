"""Moments of a head's fit over all permutations within strata, by going through all of them."""

from __future__ import annotations

from itertools import permutations, product
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator


def orders(strata: np.ndarray) -> Iterator[np.ndarray]:
    """Every order of the cells in which each takes the place of one of its own stratum."""
    groups = [np.flatnonzero(strata == label) for label in np.unique(strata)]
    for chosen in product(*(permutations(group) for group in groups)):
        order = np.empty(len(strata), dtype=np.int64)
        for group, cells in zip(groups, chosen, strict=True):
            order[group] = cells
        yield order


def all_statistics(factors: np.ndarray, images: np.ndarray, strata: np.ndarray) -> np.ndarray:
    """T of every permutation, shape (permutations, heads); the identity comes first."""
    wide = factors.astype(np.float64), images.astype(np.float64)
    return np.array([np.einsum("iah,iah->h", wide[0][order], wide[1]) for order in orders(strata)])
