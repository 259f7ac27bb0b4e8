"""Two models on the same cells, tile by tile: what the interval and its p-values mean, a cell at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, kw_only=True)
class Cells:
    """The cells of one type, of one pair of models; all but ``tiles`` have shape (cells, genes)."""

    tiles: np.ndarray
    expression: np.ndarray
    before: np.ndarray
    after: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Interval:
    """What the tile bootstrap says of one pair."""

    low: float
    high: float
    p_equivalence: float
    p_not_worse: float


def _squares(values: np.ndarray, rows: list[int], members: list[int]) -> float:
    """Squares of some cells about the mean of all that were drawn."""
    centre = [math.fsum(values[row, gene] for row in rows) / len(rows) for gene in range(values.shape[1])]
    return math.fsum((values[row, gene] - centre[gene]) ** 2 for row in members for gene in range(values.shape[1]))


def changes(types: Sequence[Cells], chosen: Sequence[int]) -> tuple[list[float], list[float]]:
    """How much less is unexplained in each of the tiles chosen, and how much expression varies, over all types."""
    less, spread = [0.0] * len(chosen), [0.0] * len(chosen)
    for cells in types:
        members = [np.flatnonzero(cells.tiles == tile).tolist() for tile in chosen]
        rows = [row for own in members for row in own]
        for place, own in enumerate(members):
            if own:
                before, after, expression = (
                    _squares(values, rows, own) for values in (cells.before, cells.after, cells.expression)
                )
                less[place] += before - after
                spread[place] += expression
    return less, spread


def interval(types: Sequence[Cells], drawn: Sequence[Sequence[int]], *, confidence: float, margin: float) -> Interval:
    """Symmetric studentised interval of the difference; tiles drawn are places among the tiles with cells."""
    tiles = np.unique(np.concatenate([cells.tiles for cells in types]))

    def difference_and_error(chosen: Sequence[int]) -> tuple[float, float]:
        less, spread = changes(types, [int(tiles[place]) for place in chosen])
        whole = math.fsum(spread)
        difference = math.fsum(less) / whole
        return difference, math.sqrt(
            math.fsum((d - difference * t) ** 2 for d, t in zip(less, spread, strict=True))
        ) / whole

    difference, error = difference_and_error(range(len(tiles)))
    off = [abs(again - difference) / max(its, error / 4.0) for again, its in map(difference_and_error, drawn)]
    sizes = [sum(int(np.count_nonzero(cells.tiles == tile)) for cells in types) for tile in tiles]
    effective = sum(sizes) ** 2 / sum(size**2 for size in sizes)
    error *= math.sqrt(effective / (effective - 1.0) * (len(tiles) - 1) / len(tiles))
    reach = float(np.quantile(off, confidence)) * error

    def one_sided(inside: float) -> float:
        half = (1 + sum(its >= abs(inside) / error for its in off)) / (1 + len(off)) / 2.0
        return half if inside > 0.0 else 1.0 - half

    not_worse = one_sided(difference + margin)
    return Interval(
        low=difference - reach,
        high=difference + reach,
        p_equivalence=max(not_worse, one_sided(margin - difference)),
        p_not_worse=not_worse,
    )


def flipped_p(less: Sequence[float], signs: Sequence[Sequence[int]] | None = None) -> float:
    """Two-sided p of the sum over tiles: over all sign patterns, or over some with the observation added."""
    observed = abs(math.fsum(less))
    patterns = list(product([1, -1], repeat=len(less))) if signs is None else [[1] * len(less), *signs]
    sums = [abs(math.fsum(sign * d for sign, d in zip(pattern, less, strict=True))) for pattern in patterns]
    return sum(total >= observed - 1e-9 * math.fsum(map(abs, less)) for total in sums) / len(patterns)
