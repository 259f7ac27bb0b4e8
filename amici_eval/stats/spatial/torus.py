"""A null for tissue: the predictions of a section are shifted as a whole, which keeps them smooth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.spatial import cKDTree

from amici_eval.stats.permutation.permutations import PermutationStream
from amici_eval.stats.permutation.statistics import ROUNDING

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float, Float64, Int64

_LABEL = "\0torus"
_BLOCK_ENTRIES = 2**17


@dataclass(frozen=True, kw_only=True, eq=False)
class TorusStatistics:
    """Correlation of a head's prediction with expression, as observed and after each shift.

    inf: a shift that leaves nothing to compare; NaN in both fields: a head without a test, whose factors or images do
    not vary within any section or are not finite.
    """

    statistics: Float64[np.ndarray, "shifts heads"]
    observed: Float64[np.ndarray, " heads"]


def torus_statistics(
    factors: Float[np.ndarray, "cells rank heads"],
    images: Float[np.ndarray, "cells rank heads"],
    coordinates: Float[np.ndarray, "cells dimensions"],
    *,
    samples: np.ndarray | None = None,
    n_shifts: int,
    seed: int,
    cell_type: str,
    progress: Callable[[int], None] | None = None,
) -> TorusStatistics:
    """Return the correlation of predictions with expression in place and after random shifts of each section.

    Null: the predictions of a section are shifted as a whole on the torus of its bounding rectangle, expression stays.
    Right if, given the type, expression is independent of the neighbourhoods and one of both is a stationary field
    (Lotwick & Silverman 1982; Mrkvicka et al. 2021). A cell takes F of the cell nearest to its new place, which changes
    ||F||: hence a correlation; inf where nothing is left to compare, as 0 would make p small. Of smooth pairs, .036 to
    .060 were rejected at .05; long correlation lengths leave few independent shifts.
    """
    n_cells, _, n_heads = factors.shape
    xy = np.asarray(coordinates[:, :2], dtype=np.float64)
    groups = np.zeros(n_cells, dtype=np.int64)
    labels = [""]
    if samples is not None:
        names, groups = np.unique(samples, return_inverse=True)
        labels = [str(name) for name in names]
    # cells of a section are contiguous
    order = np.argsort(groups, kind="stable")
    ends = np.cumsum(np.bincount(groups, minlength=len(labels)))
    sections = [
        _Section(xy[order[start:end]], start=int(start), seed=seed, cell_type=cell_type, label=label)
        for label, start, end in zip(labels, [0, *ends[:-1]], ends, strict=True)
    ]
    fit = _Fit(factors[order], images[order], [section.cells for section in sections])
    observed = fit.of(np.arange(n_cells))
    statistics = np.empty((n_shifts, n_heads))
    for index in range(n_shifts):
        statistics[index] = fit.of(np.concatenate([section.shifted(index) for section in sections]))
        if progress is not None:
            progress(1)
    return TorusStatistics(statistics=statistics, observed=observed)


class _Section:
    """Cells of one section on a torus, with a search for the cell nearest to a shifted position."""

    def __init__(
        self, xy: Float64[np.ndarray, "cells 2"], *, start: int, seed: int, cell_type: str, label: str
    ) -> None:
        self.cells = slice(start, start + len(xy))
        self._xy = xy - xy.min(axis=0)
        sides = self._xy.max(axis=0)
        # opposite edges meet on a torus: add a mean spacing, so that cells there are as far apart as neighbours
        spacing = max(float(np.sqrt(sides.prod() / len(xy))), float(sides.max()) / len(xy))
        self._box = sides + (spacing if spacing > 0.0 else 1.0)
        self._tree = cKDTree(self._xy, boxsize=self._box)
        self._key = PermutationStream(seed=seed, cell_type=cell_type, stratum=label + _LABEL, n_cells=len(xy)).key()

    def shifted(self, index: int) -> Int64[np.ndarray, " cells"]:
        """Return for each cell the cell nearest to its position after shift ``index``."""
        words = np.random.Philox(key=self._key, counter=[0, index, 0, 0]).random_raw(2)
        share = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
        moved = np.mod(self._xy + share * self._box, self._box)
        nearest: Int64[np.ndarray, " cells"] = self._tree.query(moved)[1] + self.cells.start
        return nearest


class _Fit:
    """The correlation of expression with the predictions of given cells, centred within sections."""

    def __init__(
        self,
        factors: Float[np.ndarray, "cells rank heads"],
        images: Float[np.ndarray, "cells rank heads"],
        sections: list[slice],
    ) -> None:
        self._sections = sections
        self._step = max(1, _BLOCK_ENTRIES // factors.shape[1])
        with np.errstate(invalid="ignore"):
            sizes = np.sqrt(np.square(factors, dtype=np.float64).sum(axis=(0, 1)))
            self._f, self._z = self._centred(factors), self._centred(images)
            f_norms, self._z_norms = (np.sqrt(np.square(v).sum(axis=(1, 2))) for v in (self._f, self._z))
            self._dead = ~((f_norms > ROUNDING * sizes) & (self._z_norms > 0.0) & np.isfinite(f_norms + self._z_norms))

    def _centred(self, values: Float[np.ndarray, "cells rank heads"]) -> Float64[np.ndarray, "heads cells rank"]:
        """Return a copy, centred within sections, in which the numbers of a head are contiguous."""
        centred = np.array(values.transpose(2, 0, 1), dtype=np.float64, order="C")
        for cells in self._sections:
            centred[:, cells] -= centred[:, cells].mean(axis=1, keepdims=True)
        return centred

    def of(self, taken: Int64[np.ndarray, " cells"]) -> Float64[np.ndarray, " heads"]:
        """Return the correlation per head if cell i has the prediction of cell ``taken[i]``."""
        products, squares, of_means = np.zeros((3, len(self._f)))
        for head in np.flatnonzero(~self._dead):
            f, z = self._f[head], self._z[head]
            for cells in self._sections:
                total = np.zeros(f.shape[1])
                for first in range(cells.start, cells.stop, self._step):
                    rows = slice(first, min(first + self._step, cells.stop))
                    there = f[taken[rows]]
                    products[head] += np.vdot(there, z[rows])
                    squares[head] += np.vdot(there, there)
                    total += there.sum(axis=0)
                # z is centred within the section, so the mean of ``there`` affects only its norm
                of_means[head] += total @ total / (cells.stop - cells.start)
        norms = np.sqrt(np.maximum(squares - of_means, 0.0))
        # inf where all cells take the prediction of one: there is nothing to compare, hence no evidence of a fit; a
        # difference of squares is rounding noise below a share of the squares, not of their roots
        varied = squares - of_means > ROUNDING * squares
        unknown = np.full_like(norms, np.inf)
        correlation = np.divide(products, norms * self._z_norms, out=unknown, where=varied & ~self._dead)
        return np.where(self._dead, np.nan, correlation)
