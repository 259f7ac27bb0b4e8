"""Positions of cells: distances, shared positions, groups of cells laid over each other, planes in z."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy.spatial import cKDTree

if TYPE_CHECKING:
    from collections.abc import Callable

    from anndata import AnnData
    from jaxtyping import Float64, Int64, UInt64

_SECTION_WORDS = frozenset(
    "animal batch bregma chip core dataset donor experiment field fov image individual library mouse orig patient "
    "plane puck rep replicate roi run sample section slice slide specimen subject tile well z".split()
)
_FURTHER_WORDS = frozenset("brain id ident index key label name nr num number numeric of stack tissue view".split())
_MOST_GROUPS, _CELLS_PER_GROUP = 1000, 10
_NN_SAMPLE = 5000
_MOST_QUERIES = 100_000
"""Number of evenly spread cells whose nearest other cell is looked up."""
_OVERLAID, _CELLS_FOR_SHARE = 0.4, 50
"""Share of a group's cells with their nearest cell in another group; about .64 / sqrt(m) for tiles of m cells."""
_MIXED = 0.6
"""Share of all cells with their nearest cell in another group, relative to that of random groups."""
_FEW_LEVELS, _APART_IN_Z = 10, 0.9


@dataclass(frozen=True, kw_only=True, eq=False)
class Geometry:
    """Results of the checks of positions that other checks and statistics need.

    ``samples`` are the strata of tests, tiles and intervals: named sections, planes in z, or both. ``sections`` are the
    named ones that neighbours must not leave: ``None`` where these are stacked in z.
    """

    nn_distance: float
    samples: np.ndarray | None
    sections: np.ndarray | None
    notes: tuple[str, ...]

    @classmethod
    def of(
        cls,
        adata: AnnData,
        coordinates: Float64[np.ndarray, "cells dimensions"],
        *,
        named: pd.Series | None,
        expression: Callable[[], UInt64[np.ndarray, " cells"]],
    ) -> Geometry:
        """Return the geometry; ``named`` is the column of sections, ``expression`` returns fingerprints."""
        notes: list[str] = []
        order = np.lexsort(coordinates.T)
        starts = np.flatnonzero(np.append(True, np.diff(coordinates[order], axis=0).any(axis=1)))
        sizes = np.diff(starts, append=len(order))
        if len(starts) < len(order):
            notes.append(_shared_positions(coordinates[order], np.repeat(sizes, sizes), expression()[order]))
        rows, nearest, distance = _nearest(coordinates, order, starts, sizes)
        z = coordinates[:, 2] if coordinates.shape[1] > 2 else np.zeros(len(coordinates))
        overlaid, stacked = {}, []
        for name, codes in _section_columns(adata):
            if _apart(codes, z):
                stacked.append(name)
            elif named is None or name != named.name:
                crossing = _crossing(codes[rows], codes[nearest])
                if crossing:
                    overlaid[name] = (len(np.unique(codes)), crossing)
        if overlaid:
            notes.append(_laid_over(overlaid, len(rows), float(np.ptp(coordinates, axis=0).max())))
        samples = sections = None
        if named is not None:
            samples = sections = named.astype(str).to_numpy(dtype=object)
            if _apart(pd.factorize(samples)[0], z):
                sections = None
        planes = _planes(z, float(np.median(distance)))
        if planes is not None:
            labels = np.array([f"plane {number}" for number in range(int(planes.max()) + 1)], dtype=object)
            samples = labels[planes] if samples is None else samples + ", " + labels[planes]
            each = "plane" if named is None else "plane of a section"
            notes.append(
                f"coordinates lie in {len(labels)} planes of z: tests, tiles and intervals go by x and y within each "
                f"{each} and take planes as independent, so that p-values are too small and intervals too short where "
                "planes lie closer than expression is correlated; attention crosses planes as the model does"
            )
        elif np.ptp(z) > 0:
            way = f"; data.sample_key={stacked[0]} keeps its groups apart" if stacked and named is None else ""
            notes.append(
                "coordinates have a third dimension without distinct planes: attention goes by x, y and z, but tests, "
                "tiles and intervals go by x and y alone, which is right where the tissue is thinner than expression "
                f"is correlated{way}"
            )
        return cls(nn_distance=float(np.median(distance)), samples=samples, sections=sections, notes=tuple(notes))


def _shared_positions(
    ordered: Float64[np.ndarray, "cells dimensions"],
    sizes: Int64[np.ndarray, " cells"],
    expression: UInt64[np.ndarray, " cells"],
) -> str:
    """Return a note on the cells that share a position, and on those with the same expression too."""
    shared = pd.DataFrame(ordered[sizes > 1]).assign(expression=expression[sizes > 1])
    at = ", ".join(f"{value:g}" for value in ordered[sizes.argmax()])
    return (
        f"{len(shared)} of {len(ordered)} cells share a position with another cell, {sizes.max()} of them at ({at}); "
        f"{shared.duplicated(keep=False).sum()} have the same expression as one there. Which of them are nearest "
        "neighbours is arbitrary: AMICI goes by the order of rows, here sorted by cell name. Give each cell its own "
        "position (not that of its spot, bin or field), and drop copies of cells and cells without a position before "
        "training"
    )


def _nearest(
    coordinates: Float64[np.ndarray, "cells dimensions"], order: np.ndarray, starts: np.ndarray, sizes: np.ndarray
) -> tuple[Int64[np.ndarray, " rows"], Int64[np.ndarray, " rows"], Float64[np.ndarray, " rows"]]:
    """Return evenly spread cells, the nearest other cell of each (the next at the same position) and its distance."""
    following = np.roll(order, -1)
    following[starts + sizes - 1] = order[starts]
    nearest = np.empty_like(order)
    nearest[order] = following
    rows = np.arange(0, len(order), max(1, len(order) // _MOST_QUERIES))
    distance, alone = np.zeros(len(rows)), np.flatnonzero(nearest[rows] == rows)
    if len(starts) > 1:
        # one cell per position: many at one position would slow the search
        found, place = cKDTree(coordinates[order[starts]]).query(coordinates[rows[alone]], k=2)
        distance[alone] = found[:, 1]
        nearest[rows[alone]] = order[starts[place[:, 1]]]
    return rows, nearest[rows], distance


def _section_columns(adata: AnnData) -> list[tuple[str, Int64[np.ndarray, " cells"]]]:
    """Return the columns of obs with the name of a section, sample or field of view, as group numbers."""
    found = []
    for name in adata.obs:
        words = {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", str(name))}
        words = {"fov" if word == "fovs" else word.removesuffix("id") or "id" for word in words}
        if not words & _SECTION_WORDS or words - _SECTION_WORDS - _FURTHER_WORDS:
            continue
        codes, groups = pd.factorize(adata.obs[name], use_na_sentinel=False)
        if 1 < len(groups) <= min(_MOST_GROUPS, adata.n_obs // _CELLS_PER_GROUP):
            found.append((str(name), codes.astype(np.int64)))
    return found


def _apart(codes: Int64[np.ndarray, " cells"], z: Float64[np.ndarray, " cells"]) -> bool:
    """Return whether nearly all of the variance of z lies between groups, so that these are stacked in z."""
    means = np.bincount(codes, z) / np.bincount(codes)
    return bool(np.var(z) > 0 and np.var(means[codes]) >= _APART_IN_Z * np.var(z))


def _crossing(own: Int64[np.ndarray, " rows"], nearest: Int64[np.ndarray, " rows"]) -> int:
    """Return how many cells have their nearest cell in another group; 0 where groups lie beside each other."""
    crosses = own != nearest
    size = np.bincount(own)
    share = np.bincount(own, crosses) / np.maximum(size, 1)
    by_chance = 1.0 - np.square(size / len(own)).sum()
    overlaid = share[size >= _CELLS_FOR_SHARE] >= _OVERLAID
    return int(crosses.sum()) if overlaid.any() or crosses.mean() >= _MIXED * by_chance else 0


def _laid_over(overlaid: dict[str, tuple[int, int]], n_cells: int, extent: float) -> str:
    """Return a note on columns with groups laid over each other, with a fix."""
    name = max(overlaid, key=lambda key: overlaid[key])
    columns = " and ".join(f"{key} ({n_groups} groups)" for key, (n_groups, _) in overlaid.items())
    return (
        f"groups of adata.obs column {columns} lie over each other: {overlaid[name][1]} of {n_cells} cells have their "
        f"nearest cell in another group of {name}, so that neighbours belong to other groups. If coordinates are local "
        f"to a group (field of view, section), make them global, e.g. add {2 * extent:.4g} times its number to the x "
        f"coordinate of each {name}, train on these, and set data.sample_key={name}; planes of one block need z as "
        "third coordinate"
    )


def _planes(z: Float64[np.ndarray, " cells"], nn_distance: float) -> Int64[np.ndarray, " cells"] | None:
    """Return the plane of each cell, by few values of z or wide gaps between them; ``None`` without planes."""
    levels, level = np.unique(z, return_inverse=True)
    gap = 0.0 if len(levels) <= _FEW_LEVELS else nn_distance / 2.0
    planes: Int64[np.ndarray, " cells"] = np.append(0, np.cumsum(np.diff(levels) > gap))[level]
    # a plane needs several cells, so that outliers make none
    return planes if np.count_nonzero(np.bincount(planes) >= _CELLS_PER_GROUP) > 1 else None


def median_nn_distance(coordinates: Float64[np.ndarray, "cells dimensions"]) -> float:
    """Return the median distance of a cell to the nearest other cell, over evenly spread cells."""
    if len(coordinates) < 2:
        return 0.0
    # evenly spread rows, no random numbers: the same cells each time
    step = max(1, len(coordinates) // _NN_SAMPLE)
    distance, _ = cKDTree(coordinates).query(coordinates[::step], k=2)
    return float(np.median(distance[:, 1]))
