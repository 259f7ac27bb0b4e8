"""Smooth functions of position: cosines over the window of each section."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Bool, Float64, Int64

__all__ = ["CosineBasis"]

_FUNCTIONS, _FUNCTIONS_IN_ALL, _CELLS_PER_FUNCTION = 64, 512, 10


class CosineBasis:
    """Products of cosines over the bounding box of some cells in each section, lowest frequencies first.

    Parameters
    ----------
    xy, sections
        Where cells lie, shape (cells, 2), and in which section, shape (cells,).
    fitted
        Which of them are there to fit: one function for ten of these, at most 64 a section, and no more than leave
        about 512 in all sections together.

    Notes
    -----
    The functions of a type-II cosine transform (``cos(pi a x) cos(pi b y)`` with x, y from 0 to 1 over the box), those
    with the longest waves in coordinate units; nothing is drawn. A function is 0 outside its own section; where there
    are several sections each has a level of its own besides.
    """

    def __init__(
        self,
        xy: Float64[np.ndarray, "cells two"],
        sections: Int64[np.ndarray, " cells"],
        *,
        fitted: Bool[np.ndarray, " cells"],
    ) -> None:
        self._present = np.unique(sections)
        most = min(_FUNCTIONS, max(1, _FUNCTIONS_IN_ALL // max(1, len(self._present))))
        self._low: list[np.ndarray] = []
        self._extent: list[np.ndarray] = []
        self._steps: list[np.ndarray] = []
        for section in self._present:
            here = sections == section
            low, extent = xy[here].min(axis=0), np.ptp(xy[here], axis=0)
            # cells on a line: no wave across it
            extent = np.maximum(extent, 1e-9 * (float(extent.max()) or 1.0))
            wanted = min(most, int(np.count_nonzero(fitted[here])) // _CELLS_PER_FUNCTION)
            self._low.append(low)
            self._extent.append(extent)
            self._steps.append(_longest_waves(extent, wanted))
        self._levels = len(self._present) if len(self._present) > 1 else 0
        self.n_columns = self._levels + sum(len(steps) for steps in self._steps)

    def columns(
        self, xy: Float64[np.ndarray, "rows two"], sections: Int64[np.ndarray, " rows"]
    ) -> Float64[np.ndarray, "rows columns"]:
        """Return the functions at some cells, shape (rows, columns): the sections' levels first.

        Parameters
        ----------
        xy, sections
            Where these cells lie.
        """
        found = np.zeros((len(xy), self.n_columns))
        first = self._levels
        for number, section in enumerate(self._present):
            steps = self._steps[number]
            here = np.flatnonzero(sections == section)
            if self._levels:
                found[here, number] = 1.0
            if len(here) and len(steps):
                phase = np.pi * (xy[here] - self._low[number]) / self._extent[number]
                # the few multiples along each side serve all products
                across, along = (np.cos(phase[:, [axis]] * np.arange(steps[:, axis].max() + 1)) for axis in (0, 1))
                found[here, first : first + len(steps)] = across[:, steps[:, 0]] * along[:, steps[:, 1]]
            first += len(steps)
        return found


def _longest_waves(extent: Float64[np.ndarray, " two"], wanted: int) -> Int64[np.ndarray, "functions two"]:
    """Return how many half waves fit along both sides of a box, for the longest waves but the constant."""
    counts = np.arange(wanted + 1, dtype=np.int64)
    steps = np.stack(np.meshgrid(counts, counts, indexing="ij"), axis=-1).reshape(-1, 2)
    relative = ((steps * (extent.max() / extent)) ** 2).sum(axis=1)
    # rounded, so that waves of one length come in the same order whatever the unit
    order = np.lexsort((steps[:, 1], steps[:, 0], np.round(relative, 6)))
    waves: Int64[np.ndarray, "functions two"] = steps[order[1 : wanted + 1]]
    return waves
