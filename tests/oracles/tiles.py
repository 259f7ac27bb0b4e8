"""Squares of a section and what resampling them means, a cell at a time."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from amici_eval.stats.permutation.permutations import PermutationStream
from tests.oracles.reference import explained_variance

if TYPE_CHECKING:
    from collections.abc import Sequence


def squares(xy: np.ndarray, width: float, samples: Sequence[str]) -> list[int]:
    """Number of the square of each cell: squares with cells are counted by section, column and row."""
    places = []
    for (x, y), sample in zip(xy, samples, strict=True):
        own = [other for other, label in zip(xy, samples, strict=True) if label == sample]
        left, bottom = min(x for x, _ in own), min(y for _, y in own)
        places.append((sample, math.floor((x - left) / width), math.floor((y - bottom) / width)))
    ranks = {place: rank for rank, place in enumerate(sorted(set(places)))}
    return [ranks[place] for place in places]


def drawn_tiles(words: Sequence[int], n_tiles: int) -> list[list[int]]:
    """Tiles of each resample: a word of 64 bits for each, by its upper half."""
    drawn = [(int(word) >> 32) * n_tiles >> 32 for word in words]
    return [drawn[start : start + n_tiles] for start in range(0, len(drawn), n_tiles)]


def words(stratum: str, *, seed: int, label: str, n: int) -> list[int]:
    """Words of the generator of one stream."""
    key = PermutationStream(seed=seed, cell_type=label, stratum=stratum, n_cells=0).key()
    return np.random.Philox(key=key).random_raw(n).tolist()


def seed_of_one_tile(label: str) -> int:
    """First seed under which a resample of five tiles holds one of them five times."""
    drawn = ((seed, drawn_tiles(words("\0bootstrap", seed=seed, label=label, n=5), 5)[0]) for seed in range(10**5))
    return next(seed for seed, tiles in drawn if len(set(tiles)) == 1)


def interval(
    predictions: np.ndarray, targets: np.ndarray, tiles: np.ndarray, drawn: Sequence[Sequence[int]], confidence: float
) -> tuple[float, float]:
    """Symmetric studentised interval of explained variance: the cells of tiles are put together anew for each resample.

    The logarithm of the unexplained share is studentised by its linearised standard error between tiles.
    """
    members = [np.flatnonzero(tiles == tile) for tile in np.unique(tiles)]

    def log_and_error(chosen: Sequence[int]) -> tuple[float, float]:
        rows = np.concatenate([members[tile] for tile in chosen])
        log = math.log(1.0 - explained_variance(predictions[rows], targets[rows])[1])
        shares = []
        for values in (predictions - targets, targets):
            deviations = (values - values[rows].mean(axis=0)) ** 2
            shares.append([deviations[members[tile]].sum() / deviations[rows].sum() for tile in chosen])
        return log, math.sqrt(math.fsum((residual - target) ** 2 for residual, target in zip(*shares, strict=True)))

    log, error = log_and_error(range(len(members)))
    off = [abs(again - log) / max(its, error / 4.0) for again, its in map(log_and_error, drawn)]
    n_tiles, sizes = len(members), [len(rows) for rows in members]
    effective = sum(sizes) ** 2 / sum(size**2 for size in sizes)
    widened = math.sqrt(effective / (effective - 1.0) * (n_tiles - 1) / n_tiles)
    reach = float(np.quantile(off, confidence)) * error * widened
    return 1.0 - math.exp(log + reach), 1.0 - math.exp(log - reach)


def slid(xy: np.ndarray, shares: Sequence[float], samples: Sequence[str]) -> list[int]:
    """The cell nearest, on the torus of its section, to where each cell comes to lie; ``shares`` of each section."""
    taken = [-1] * len(xy)
    for label, (share_x, share_y) in zip(sorted(set(samples)), shares, strict=True):
        own = [cell for cell, sample in enumerate(samples) if sample == label]
        low = xy[own].min(axis=0)
        sides = xy[own].max(axis=0) - low
        gap = max(math.sqrt(sides[0] * sides[1] / len(own)), max(sides) / len(own)) or 1.0
        box = sides + gap
        for cell in own:
            x, y = xy[cell] - low + np.array([share_x, share_y]) * box
            distances = []
            for other in own:
                across = [abs(x - (xy[other] - low)[0]) % box[0], abs(y - (xy[other] - low)[1]) % box[1]]
                distances.append(math.hypot(*(min(d, side - d) for d, side in zip(across, box, strict=True))))
            taken[cell] = own[int(np.argmin(distances))]
    return taken


def correlation(f: np.ndarray, z: np.ndarray, taken: Sequence[int], samples: Sequence[str]) -> float:
    """Correlation, about the means of sections, of the taken rows of one head's factors with its images."""
    there = f[list(taken)].astype(np.float64)
    here = z.astype(np.float64)
    for label in set(samples):
        own = [cell for cell, sample in enumerate(samples) if sample == label]
        there[own] -= there[own].mean(axis=0)
        here[own] -= here[own].mean(axis=0)
    return float((there * here).sum() / math.sqrt((there**2).sum() * (here**2).sum()))
