"""Definitions of the ablation catalogue as explicit loops over cells, sets and orders of heads."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import numpy as np

from tests.oracles.reference import explained_variance

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from amici_eval.stats.readout import Readout


def predict(readout: Readout, z: np.ndarray, heads: Collection[int], *, frozen: bool = False) -> np.ndarray:
    """Predicted expression, a cell at a time, with some heads kept; ``frozen``: by the layer norm of all heads."""
    rows = []
    for cell in z.astype(np.float64):
        everything = np.concatenate([[1.0], cell])
        x = everything.copy()
        for head in set(range(readout.n_heads)) - set(heads):
            x[1 + head * readout.head_size : 1 + (head + 1) * readout.head_size] = 0.0
        normed = everything if frozen else x
        sigma = math.sqrt(normed @ readout.gram @ normed + readout.epsilon)
        rows.append(readout.offset + readout.weights @ x / sigma)
    return np.array(rows)


def value(
    readout: Readout, z: np.ndarray, targets: np.ndarray, heads: Collection[int], *, frozen: bool = False
) -> float:
    """Explained variance, over all genes, with some heads kept."""
    return explained_variance(predict(readout, z, heads, frozen=frozen), targets)[1]


def substituted(
    readout: Readout, z: np.ndarray, targets: np.ndarray, head: int, permutation: Sequence[int] | None
) -> float:
    """Explained variance with one head's part taken from another cell; ``None``: the mean of all cells."""
    own = slice(head * readout.head_size, (head + 1) * readout.head_size)
    changed = z.astype(np.float64)
    for cell in range(len(z)):
        changed[cell, own] = (
            z[:, own].astype(np.float64).mean(axis=0) if permutation is None else z[permutation[cell], own]
        )
    return value(readout, changed, targets, range(readout.n_heads))


def shapley_by_orders(worth: Callable[[frozenset[int]], float], n_players: int) -> list[float]:
    """What a player adds to those before it, averaged over all orders of the players."""
    added = [0.0] * n_players
    for order in itertools.permutations(range(n_players)):
        for position, player in enumerate(order):
            before = frozenset(order[:position])
            added[player] += worth(before | {player}) - worth(before)
    return [total / math.factorial(n_players) for total in added]


def interaction_by_sets(worth: Callable[[frozenset[int]], float], n_players: int, first: int, second: int) -> float:
    """Shapley interaction index of two players by its definition over sets of the others."""
    others = [player for player in range(n_players) if player not in (first, second)]
    total = 0.0
    for size in range(len(others) + 1):
        weight = math.factorial(n_players - size - 2) * math.factorial(size) / math.factorial(n_players - 1)
        for chosen in itertools.combinations(others, size):
            s = frozenset(chosen)
            total += weight * (worth(s | {first, second}) - worth(s | {first}) - worth(s | {second}) + worth(s))
    return total
