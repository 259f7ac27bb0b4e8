"""A null for tissue: predictions slide across a section as a whole, so that they stay as smooth as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.spatial import cKDTree

from amici_eval.stats.permutation.nulls import MIN_CELLS_TEST
from amici_eval.stats.permutation.permutations import PermutationStream

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float, Float64, Int64

__all__ = ["TorusStatistics", "torus_statistics"]

_LABEL = "\0torus"
_ROUNDING = 1e-12
"""Numbers that vary by less than this share of their size are constants that float64 rounded."""
_BLOCK_ENTRIES = 2**17


@dataclass(frozen=True, kw_only=True, eq=False)
class TorusStatistics:
    """How well a head's prediction fits expression in place, and after sliding.

    Parameters
    ----------
    statistics
        Correlation of prediction and expression after each shift, shape (shifts, heads), dimensionless; ``inf`` for a
        shift that leaves nothing to compare.
    observed
        The same in truth, shape (heads,); NaN, as is the head's column, where a head predicts the same for all cells
        of a section, or numbers that are not finite: there is nothing to test.
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
    """Return how well predictions fit expression elsewhere in the tissue, where only chance can make them fit.

    Null: the predictions of a section slide as a whole, over the edges of its bounding rectangle and in again on the
    other side, while expression stays. This is right when, given the type, expression is independent of the
    neighbourhoods and one of both is a stationary field: cells may resemble their neighbours in either.

    Parameters
    ----------
    factors
        F, shape (cells, rank, heads), all cells of one type: head h predicts ``constant + F[:, :, h] @ A_h.T``.
    images
        Z, same shape: expression as the head sees it, ``Y @ A_h``. Neither need be centred.
    coordinates
        Positions, shape (cells, dimensions); the first two columns count.
    samples
        Section of each cell, shape (cells,); nothing slides from one to another, and each slides by its own shift.
    n_shifts
        How many shifts to draw.
    seed, cell_type
        What the shifts depend on, besides their number and the section's label; the order of the cells and of the
        types does not matter.
    progress
        Called with the number of shifts finished since the last call.

    Returns
    -------
    TorusStatistics
        With b statistics of at least ``observed - 1e-10`` among m, ``(b + 1) / (m + 1)`` is the p-value.

    Raises
    ------
    ValueError
        If shapes disagree, there are fewer than three cells, a position is not finite or ``n_shifts`` is negative.

    Notes
    -----
    After a shift a cell takes the F of the cell that lies nearest, on the torus, to where it comes to lie. Some cells
    are then taken more than once and others not at all, which changes ||F||. So the statistic, of the shifts and of the
    truth, is the correlation ``sum_i <F_s(i), Z_i> / (||F_s|| ||Z||)``, with F_s and Z centred within sections; a shift
    under which all cells of each section take the F of one cell has no correlation and counts as ``inf``: such a shift
    shows nothing against chance, and counted as 0 it would make p small where cells are few or lie in a heap. A
    rectangle is as much longer than its cells reach as two neighbours are apart.

    Where opposite edges meet, a shifted field is not smooth, so that shifts vary a little too little. Rejected at .05
    of 900 independent smooth pairs (kernel ``exp(-d^2 / (2 l^2))``, 400 cells, 199 shifts) with l = .05 and .1 of the
    window: .038 and .056 in a square, .036 and .056 in a disc, .047 and .060 in an L, .058 and .048 of cells in
    clusters. The longer l is, the fewer independent places the window holds, and the less the test is to be trusted.

    References
    ----------
    Lotwick & Silverman (1982), Methods for analysing spatial processes of several types of points, J R Stat Soc B
    44:406. Mrkvicka, Dvorak, Gonzalez & Mateu (2021), Revisiting the random shift approach for testing in spatial
    statistics, Spat Stat 42:100430.
    """
    n_cells, _, n_heads = factors.shape
    if images.shape != factors.shape or len(coordinates) != n_cells:
        msg = f"factors {factors.shape}, images {images.shape} and {len(coordinates)} positions disagree"
        raise ValueError(msg)
    if samples is not None and len(samples) != n_cells:
        msg = f"{len(samples)} sample labels and {n_cells} cells disagree"
        raise ValueError(msg)
    if n_cells < MIN_CELLS_TEST:
        msg = f"{n_cells} cells; at least {MIN_CELLS_TEST} are needed for a test"
        raise ValueError(msg)
    if n_shifts < 0:
        msg = f"n_shifts is {n_shifts}; a number of shifts is at least 0"
        raise ValueError(msg)
    xy = np.asarray(coordinates[:, :2], dtype=np.float64)
    if not np.isfinite(xy).all():
        msg = (
            f"{np.count_nonzero(~np.isfinite(xy).all(axis=1))} cells have no finite position; a shift needs one of each"
        )
        raise ValueError(msg)

    groups = np.zeros(n_cells, dtype=np.int64)
    labels = [""]
    if samples is not None:
        names, groups = np.unique(samples, return_inverse=True)
        labels = [str(name) for name in names]
    # cells of a section side by side
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
    """Cells of one section, and which of them lies nearest to where each comes to lie."""

    def __init__(
        self, xy: Float64[np.ndarray, "cells 2"], *, start: int, seed: int, cell_type: str, label: str
    ) -> None:
        self.cells = slice(start, start + len(xy))
        self._xy = xy - xy.min(axis=0)
        sides = self._xy.max(axis=0)
        # opposite edges meet on a torus: a mean spacing keeps cells on them as far apart as neighbours are
        spacing = max(float(np.sqrt(sides.prod() / len(xy))), float(sides.max()) / len(xy))
        self._box = sides + (spacing if spacing > 0.0 else 1.0)
        self._tree = cKDTree(self._xy, boxsize=self._box)
        self._key = PermutationStream(seed=seed, cell_type=cell_type, stratum=label + _LABEL, n_cells=len(xy)).key()

    def shifted(self, index: int) -> Int64[np.ndarray, " cells"]:
        """Return the cell nearest to where shift ``index`` puts each cell."""
        words = np.random.Philox(key=self._key, counter=[0, index, 0, 0]).random_raw(2)
        share = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
        moved = np.mod(self._xy + share * self._box, self._box)
        nearest: Int64[np.ndarray, " cells"] = self._tree.query(moved)[1] + self.cells.start
        return nearest


class _Fit:
    """The correlation of predictions, taken from some cells, with expression, centred within sections."""

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
            self._dead = ~((f_norms > _ROUNDING * sizes) & (self._z_norms > 0.0) & np.isfinite(f_norms + self._z_norms))

    def _centred(self, values: Float[np.ndarray, "cells rank heads"]) -> Float64[np.ndarray, "heads cells rank"]:
        """Return a copy in which the numbers of a head lie together."""
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
                # z is centred within the section, so that the mean of ``there`` matters to its own size alone
                of_means[head] += total @ total / (cells.stop - cells.start)
        norms = np.sqrt(np.maximum(squares - of_means, 0.0))
        # where all cells take the prediction of one nothing can be compared, which is no evidence for a fit; what is
        # left of a difference of squares is rounding below a share of the squares, not of their roots
        varied = squares - of_means > _ROUNDING * squares
        unknown = np.full_like(norms, np.inf)
        correlation = np.divide(products, norms * self._z_norms, out=unknown, where=varied & ~self._dead)
        return np.where(self._dead, np.nan, correlation)
