"""Ridge regression of all genes at once on some columns, from moments gathered block by block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Bool, Float, Float64, Int64

_FUNCTIONS, _FUNCTIONS_IN_ALL, _CELLS_PER_FUNCTION = 64, 512, 10


class CosineBasis:
    """Products of cosines over the bounding box of some cells in each section, lowest frequencies first.

    Functions of a type-II cosine transform, ``cos(pi a x) cos(pi b y)`` with x, y from 0 to 1 over the box, those with
    the longest waves in coordinate units; nothing is drawn. A function is 0 outside its own section; several sections
    have a level each besides. ``fitted``: cells there are to fit, one function for ten of them, at most 64 a section
    and about 512 in all.
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
            # cells on a line get no wave across it
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
        """Return the functions at some cells, the sections' levels first."""
        found = np.zeros((len(xy), self.n_columns))
        first = self._levels
        for number, section in enumerate(self._present):
            steps = self._steps[number]
            here = np.flatnonzero(sections == section)
            if self._levels:
                found[here, number] = 1.0
            if len(here) and len(steps):
                phase = np.pi * (xy[here] - self._low[number]) / self._extent[number]
                # compute the few cosines along each side once for all products
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


PENALTIES = np.logspace(-4.0, 5.0, 19)
"""Penalties to choose from, per cell, for columns of variance 1: from almost none to almost no weights left."""
_CONSTANT = 1e-9
"""A column or gene whose standard deviation is a smaller share of its mean varies by rounding alone."""
_RANK = 1e-10
"""Directions whose variance is a smaller share of the largest are rounding noise of dependent columns."""
_LARGEST_SHARE = 0.5
"""Most degrees of freedom per cell: cross-validation says nothing close to one parameter a cell."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class RidgeMoments:
    """Moments of some cells from which a ridge regression and its explained variance follow.

    ``design_m2``, ``cross`` and ``target_m2`` are centred sums of products; means are 0 without cells.
    """

    n_cells: int
    design_mean: Float64[np.ndarray, " columns"]
    target_mean: Float64[np.ndarray, " genes"]
    design_m2: Float64[np.ndarray, "columns columns"]
    cross: Float64[np.ndarray, "columns genes"]
    target_m2: Float64[np.ndarray, " genes"]


class RidgeSums:
    """Gathers :class:`RidgeMoments` block by block, never all cells at once.

    Products in float64 of deviations from the first block's means, so that large means cost no digits.
    """

    def __init__(self, n_columns: int, n_genes: int) -> None:
        self._n_cells = 0
        self._shift_x, self._shift_y = np.zeros(n_columns), np.zeros(n_genes)
        self._x, self._y = np.zeros(n_columns), np.zeros(n_genes)
        self._xx, self._xy = np.zeros((n_columns, n_columns)), np.zeros((n_columns, n_genes))
        self._yy = np.zeros(n_genes)

    def add(self, design: Float[np.ndarray, "rows columns"], targets: Float[np.ndarray, "rows genes"]) -> None:
        """Add some cells to the sums."""
        if not len(design):
            return
        if not self._n_cells:
            self._shift_x = design.mean(axis=0, dtype=np.float64)
            self._shift_y = targets.mean(axis=0, dtype=np.float64)
        x, y = np.subtract(design, self._shift_x), np.subtract(targets, self._shift_y)
        self._n_cells += len(x)
        self._x += x.sum(axis=0)
        self._y += y.sum(axis=0)
        self._xx += x.T @ x
        self._xy += x.T @ y
        self._yy += np.einsum("ij,ij->j", y, y)

    def moments(self) -> RidgeMoments:
        """Return the moments of the cells counted so far."""
        n = max(self._n_cells, 1)
        return RidgeMoments(
            n_cells=self._n_cells,
            design_mean=self._shift_x + self._x / n,
            target_mean=self._shift_y + self._y / n,
            design_m2=self._xx - np.outer(self._x, self._x / n),
            cross=self._xy - np.outer(self._x, self._y / n),
            target_m2=np.maximum(self._yy - self._y**2 / n, 0.0),
        )


def merge_moments(parts: Sequence[RidgeMoments]) -> RidgeMoments:
    """Return the moments of several groups of cells that share none (Chan, Golub & LeVeque 1983)."""
    counts = np.array([part.n_cells for part in parts], dtype=np.float64)
    share = counts / max(counts.sum(), 1.0)
    x_means, y_means = np.stack([p.design_mean for p in parts]), np.stack([p.target_mean for p in parts])
    x_mean, y_mean = share @ x_means, share @ y_means
    x, y = x_means - x_mean, y_means - y_mean
    weighted = counts[:, None] * x
    return RidgeMoments(
        n_cells=int(counts.sum()),
        design_mean=x_mean,
        target_mean=y_mean,
        design_m2=np.sum([p.design_m2 for p in parts], axis=0) + weighted.T @ x,
        cross=np.sum([p.cross for p in parts], axis=0) + weighted.T @ y,
        target_m2=np.sum([p.target_m2 for p in parts], axis=0) + counts @ y**2,
    )


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class PenaltyChoice:
    """The penalty under which a ridge regression of all genes predicts unseen cells best, and how that was found.

    ``penalty``: weight of the squared weights of standardised columns against the mean squared error;
    ``degrees_of_freedom`` include the intercept; ``gcv``: generalised cross-validation, summed over genes.
    """

    penalty: float
    degrees_of_freedom: float
    gcv: Float64[np.ndarray, " penalties"]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class RidgeFit:
    """A ridge regression of all genes under one penalty.

    ``weights``: of the columns as they are, not standardised, 0 for columns that do not vary; the intercept is not
    penalised.
    """

    weights: Float64[np.ndarray, "columns genes"]
    intercept: Float64[np.ndarray, " genes"]


def choose_penalty(moments: RidgeMoments, *, penalties: Float64[np.ndarray, " penalties"] = PENALTIES) -> PenaltyChoice:
    """Return the penalty of least generalised cross-validation over all genes together.

    ``GCV = (RSS / n) / (1 - df / n)**2`` with ``df = 1 + sum e / (e + penalty)`` over the eigenvalues e of the
    correlation matrix of the columns (Golub, Heath & Wahba 1979). Penalties with df above half of the cells are left
    out; if that leaves none, the largest penalty is chosen.
    """
    n, standard = moments.n_cells, _standardised(moments)
    values, vectors = np.linalg.eigh(standard.correlation)
    real = values > _RANK * values.max(initial=0.0)
    values, vectors = values[real], vectors[:, real]
    turned = vectors.T @ standard.cross
    shrinkage = values / (values + penalties[:, None])
    along = n * np.einsum("ij,ij->i", turned, turned) / values
    residual_ss = np.maximum(moments.target_m2.sum() - (2.0 * shrinkage - shrinkage**2) @ along, 0.0)
    degrees = 1.0 + shrinkage.sum(axis=1)
    # close to one degree of freedom per cell, rounding may make the denominator 0 or negative
    gcv = residual_ss / n / np.maximum(1.0 - degrees / n, np.finfo(np.float64).eps) ** 2
    allowed = degrees <= _LARGEST_SHARE * n
    best = int(np.where(allowed, gcv, np.inf).argmin()) if allowed.any() else int(penalties.argmax())
    return PenaltyChoice(penalty=float(penalties[best]), degrees_of_freedom=float(degrees[best]), gcv=gcv)


def fit_ridge(moments: RidgeMoments, *, penalty: float, level: RidgeMoments | None = None) -> RidgeFit:
    """Fit all genes under one penalty.

    ``penalty`` times the number of cells is the ``alpha`` of scikit-learn's ``Ridge`` on standardised columns; columns
    that are constant over the fitted cells are left out. ``level``: cells over which the mean prediction is the mean
    expression, None for the fitted ones; explained variance does not count the level, so one for each fold would only
    add noise.
    """
    standard = _standardised(moments)
    weights = np.zeros(moments.cross.shape)
    if len(standard.used):
        penalised = standard.correlation + penalty * np.eye(len(standard.used))
        weights[standard.used] = np.linalg.solve(penalised, standard.cross) / standard.deviation[:, None]
    level = moments if level is None else level
    return RidgeFit(weights=weights, intercept=level.target_mean - level.design_mean @ weights)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class _Standardised:
    """Columns that vary, in units of their standard deviation: correlations, and covariances with genes."""

    used: Int64[np.ndarray, " used"]
    deviation: Float64[np.ndarray, " used"]
    correlation: Float64[np.ndarray, "used used"]
    cross: Float64[np.ndarray, "used genes"]


def _standardised(moments: RidgeMoments) -> _Standardised:
    n = moments.n_cells
    if n < 2:
        msg = f"{n} cells to fit; a ridge regression needs at least 2"
        raise ValueError(msg)
    deviation = np.sqrt(np.maximum(np.diagonal(moments.design_m2), 0.0) / n)
    used = np.flatnonzero(deviation > _CONSTANT * np.abs(moments.design_mean))
    deviation = deviation[used]
    return _Standardised(
        used=used,
        deviation=deviation,
        correlation=moments.design_m2[np.ix_(used, used)] / np.outer(deviation, deviation) / n,
        cross=moments.cross[used] / deviation[:, None] / n,
    )


def ridge_explained_variance(fits: Sequence[RidgeFit], groups: Sequence[RidgeMoments]) -> float:
    """Return which share of the variance of expression is explained in some cells, all genes together.

    ``1 - sum_g var(P_g - Y_g) / sum_g var(Y_g)`` over all groups, each predicted by its own fit: under cross-fitting,
    one on the other groups. NaN if no gene varies or there are fewer than 2 cells. From ``var(P) = B' S_XX B`` and
    ``cov(P, Y) = B' S_XY`` within groups, and residual means between groups; no prediction is formed.
    """
    everyone = merge_moments(groups)
    spread = np.sqrt(everyone.target_m2 / max(everyone.n_cells, 1))
    total = float(everyone.target_m2[spread > _CONSTANT * np.abs(everyone.target_mean)].sum())
    if everyone.n_cells < 2 or not total > 0.0:
        return float("nan")
    explained, counts, means = 0.0, [], []
    for fit, group in zip(fits, groups, strict=True):
        predicted = float(np.vdot(fit.weights, group.design_m2 @ fit.weights))
        explained += 2.0 * float(np.vdot(fit.weights, group.cross)) - predicted
        counts.append(group.n_cells)
        means.append(group.design_mean @ fit.weights + fit.intercept - group.target_mean)
    # between groups: their differences are in the total, those of their residuals stay unexplained
    weight, residual = np.array(counts, dtype=np.float64), np.stack(means)
    between = float((weight @ (residual - weight @ residual / weight.sum()) ** 2).sum())
    own = float((weight @ (np.stack([g.target_mean for g in groups]) - everyone.target_mean) ** 2).sum())
    return (explained + own - between) / total
