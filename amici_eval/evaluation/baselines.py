"""What predictors without heads explain from position, types or expression of the neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

from amici_eval.results.analyses import Baselines
from amici_eval.stats.explained_variance import MIN_CELLS_EXPLAINED_VARIANCE
from amici_eval.stats.ridge import (
    CosineBasis,
    RidgeSums,
    choose_penalty,
    fit_ridge,
    merge_moments,
    ridge_explained_variance,
)
from amici_eval.stats.spatial.tiles import square_tiles

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from jaxtyping import Bool, Float32, Float64, Int, Int64

    from amici_eval.evaluation.protocols import TissueAccess

DESIGNS = ("neighbour_types", "neighbour_expression", "position")
FITTED, SCORED, FOLD = 1, 2, 4
"""Roles of cells are added up: fitted, scored, and four times the number of the fold."""
_CHUNK_ROWS, _CHUNK_VALUES = 8192, 2**22
_CELLS_PER_TILE = 1024
_MOST_GENES, _PROJECTED = 1000, 512
"""With more genes than the first, mean expression of neighbours is projected to the second number of columns."""
_MOMENT_BYTES = 2**29
"""Memory for the moments of types that are gathered in one pass over the tissue."""


def sections_of(access: TissueAccess) -> Int64[np.ndarray, " all_cells"]:
    """Return the number of each cell's section."""
    everyone = np.arange(len(access.label_codes))
    samples = access.samples(everyone)
    if samples is None:
        return np.zeros(len(everyone), dtype=np.int64)
    return np.unique(samples, return_inverse=True)[1].astype(np.int64)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class _NeighbourExpression:
    """Expression of some cells, and the mean over the neighbours of each, shape (cells, genes)."""

    own: Float32[np.ndarray, "cells genes"]
    around: Float32[np.ndarray, "cells genes"]


class TypeDesigns:
    """One type: its cells, its functions of position, and the moments of the three designs.

    Over 1,000 genes, ``neighbour_expression`` takes 512 fixed random projections of the neighbours' mean expression,
    which keep distances between cells to about 6 % (Johnson & Lindenstrauss 1984), so that the normal equations stay
    512 x 512. Genes then count by how much they vary, and not all the same. With ``cross_fitted``, cells that are
    fitted and scored are predicted from the other folds.
    """

    def __init__(
        self,
        access: TissueAccess,
        cell_type: str,
        index: int,
        roles: Int64[np.ndarray, " all_cells"],
        sections: Int64[np.ndarray, " all_cells"],
        *,
        cross_fitted: bool,
    ) -> None:
        self.index = index
        self._cross_fitted = cross_fitted
        n_types = len(access.card.cell_types)
        self.code = access.card.cell_types.index(cell_type)
        self.rows = np.flatnonzero((access.label_codes == self.code) & (roles > 0))
        xy = access.coordinates(self.rows)[:, :2]
        self.cosines = CosineBasis(xy, sections[self.rows], fitted=(roles[self.rows] & FITTED) > 0)
        self.n_genes = len(access.card.genes)
        n_around = self.n_genes if self.n_genes <= _MOST_GENES else _PROJECTED
        self.n_columns = (n_types, n_around, self.cosines.n_columns)
        self.n_roles = len(np.unique(roles[self.rows]))
        self._sums: dict[int, tuple[RidgeSums, ...]] = {}

    @property
    def moment_bytes(self) -> int:
        """Memory of the moments in bytes."""
        return 8 * self.n_roles * sum(columns * (columns + self.n_genes) for columns in self.n_columns)

    def add(self, role: int, designs: Sequence[np.ndarray], targets: Float32[np.ndarray, "rows genes"]) -> None:
        """Add cells with the same role to the sums."""
        if role not in self._sums:
            self._sums[role] = tuple(RidgeSums(columns, self.n_genes) for columns in self.n_columns)
        for sums, design in zip(self._sums[role], designs, strict=True):
            sums.add(design, targets)

    def explained(self) -> list[float]:
        """Fit and score each design, then free the moments.

        One penalty and one level, found on all fitted cells, hold for all folds.
        """
        found = []
        for number in range(len(self.n_columns)):
            parts = {role: sums[number].moments() for role, sums in self._sums.items()}
            fitted = {role: part for role, part in parts.items() if role & FITTED}
            everyone = merge_moments(list(fitted.values()))
            penalty = choose_penalty(everyone).penalty
            fit_of_all = fit_ridge(everyone, penalty=penalty)
            fits, scored = [], []
            for role, part in parts.items():
                if role & SCORED:
                    # cells that are fitted and scored have one role per fold
                    others = [other for name, other in fitted.items() if name != role]
                    apart = self._cross_fitted and role in fitted
                    fits.append(
                        fit_ridge(merge_moments(others), penalty=penalty, level=everyone) if apart else fit_of_all
                    )
                    scored.append(part)
            found.append(ridge_explained_variance(fits, scored))
        self._sums.clear()
        return found


def those_that_fit(types: Sequence[TypeDesigns]) -> Iterator[list[TypeDesigns]]:
    """Yield batches of types whose moments fit in memory together."""
    batch: list[TypeDesigns] = []
    room = _MOMENT_BYTES
    for one in types:
        if batch and one.moment_bytes > room:
            yield batch
            batch, room = [], _MOMENT_BYTES
        batch.append(one)
        room -= one.moment_bytes
    if batch:
        yield batch


def gather(
    access: TissueAccess,
    types: Sequence[TypeDesigns],
    roles: Int64[np.ndarray, " all_cells"],
    sections: Int64[np.ndarray, " all_cells"],
    progress: Callable[[int], None] | None,
) -> None:
    """Add the cells of some types to their sums in one pass, tile by tile."""
    by_code = {one.code: one for one in types}
    n_genes, n_types = len(access.card.genes), len(access.card.cell_types)
    codes = access.label_codes
    rows = np.concatenate([one.rows for one in types])
    # receivers in a tile share their neighbours, so that each cell is read about once
    n_tiles = max(1, len(rows) // (_CELLS_PER_TILE * (int(sections.max()) + 1)))
    tiles = square_tiles(access.coordinates(rows), n_tiles=n_tiles, samples=sections[rows])
    rows = rows[np.lexsort((rows, tiles))]
    step = int(np.clip(_CHUNK_VALUES // n_genes, 256, _CHUNK_ROWS))
    projection = _projection(n_genes) if n_genes > _MOST_GENES else None
    for start in range(0, len(rows), step):
        chunk = rows[start : start + step]
        chunk = chunk[np.lexsort((roles[chunk], codes[chunk]))]
        neighbours = access.neighbour_rows[chunk]
        expression = _expression_around(access, chunk, neighbours)
        around = expression.around if projection is None else expression.around @ projection
        counts = _count_types(codes[neighbours], n_types)
        xy, here = access.coordinates(chunk)[:, :2], sections[chunk]
        kinds = codes[chunk] * (int(roles.max()) + 1) + roles[chunk]
        bounds = np.flatnonzero(np.diff(kinds, prepend=-1, append=-1))
        for first, last in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            part = slice(first, last)
            one = by_code[int(codes[chunk[first]])]
            designs = (counts[part], around[part], one.cosines.columns(xy[part], here[part]))
            one.add(int(roles[chunk[first]]), designs, expression.own[part])
        if progress is not None:
            progress(int(np.count_nonzero(roles[chunk] & SCORED)))


def _projection(n_genes: int) -> Float32[np.ndarray, "genes columns"]:
    """Return Gaussian projection weights that depend on the number of genes alone."""
    rng = np.random.Generator(np.random.Philox(key=0))
    return rng.standard_normal((n_genes, _PROJECTED), dtype=np.float32) / np.float32(np.sqrt(_PROJECTED))


def _count_types(codes: Int64[np.ndarray, "cells neighbours"], n_types: int) -> Float64[np.ndarray, "cells types"]:
    """Return how many of each cell's neighbours are of each type."""
    flat = codes + n_types * np.arange(len(codes))[:, None]
    counts = np.bincount(flat.ravel(), minlength=n_types * len(codes))
    return counts.reshape(len(codes), n_types).astype(np.float64)


def _expression_around(
    access: TissueAccess, rows: Int64[np.ndarray, " cells"], neighbours: Int[np.ndarray, "cells neighbours"]
) -> _NeighbourExpression:
    """Return the expression of some cells and the mean over their neighbours, reading each cell once."""
    n_cells, n_neighbours = neighbours.shape
    needed = np.zeros(len(access.label_codes), dtype=bool)
    needed[neighbours] = True
    needed[rows] = True
    readers = np.flatnonzero(needed)
    place = np.zeros(len(needed), dtype=np.int32)
    place[readers] = np.arange(len(readers), dtype=np.int32)
    weights = np.full(neighbours.size, 1.0 / n_neighbours, dtype=np.float32)
    starts = np.arange(0, neighbours.size + 1, n_neighbours, dtype=np.int32)
    mean_of = sparse.csr_matrix((weights, place[neighbours].ravel(), starts), shape=(n_cells, len(readers)))
    places = place[rows]
    own = np.empty((n_cells, len(access.card.genes)), dtype=np.float32)
    around = np.zeros_like(own)
    where = np.full(len(readers), -1, dtype=np.int64)
    for block in access.expression_blocks(readers):
        where[block.positions] = np.arange(len(block.positions))
        at = where[places]
        inside = at >= 0
        own[inside] = block.values[at[inside]]
        around += mean_of[:, block.positions] @ block.values
        where[block.positions] = -1
    return _NeighbourExpression(own=own, around=around)


MIN_CELLS_FIT = 10
"""Fewer fitted cells do not determine a penalty."""
N_FOLDS = 5


def evaluate_baselines(
    access: TissueAccess,
    receivers: Mapping[str, Int64[np.ndarray, " cells"]],
    *,
    expl_var: Float64[np.ndarray, "heads types"],
    expl_var_full: Float64[np.ndarray, " types"],
    fitted: Bool[np.ndarray, " all_cells"] | None,
    without_nearest: Float64[np.ndarray, "models types"] | None = None,
    n_folds: int = N_FOLDS,
    progress: Callable[[int], None] | None = None,
) -> Baselines:
    """Return what baselines explain without any head, and what heads explain more.

    Each is a ridge regression of all genes of a type, with one penalty by generalised cross-validation. ``position``
    takes cosines over the type's bounding box in a section, lowest frequencies first: one per ten fitted cells, at most
    64 a section and about 512 in all, and a level per section. A model without heads explains 0 and counts as a
    baseline. Folds are needed as a type has hundreds of weights: by chance a fit explained 19 % of the 225 macrophages
    it saw, under 1 % of others. Only cells held out from model and baseline give a fair gain.
    """
    types = tuple(receivers)
    if expl_var.shape[1:] != (len(types),) or expl_var_full.shape != (len(types),):
        msg = (
            f"expl_var has shape {expl_var.shape}, expl_var_full {expl_var_full.shape}; (heads, {len(types)}) and "
            f"({len(types)},) are needed, a column for each type of receivers"
        )
        raise ValueError(msg)
    if not 1 <= n_folds <= MIN_CELLS_FIT:
        msg = (
            f"n_folds={n_folds}: 1 to {MIN_CELLS_FIT} are possible, for a type is fitted from {MIN_CELLS_FIT} cells on"
        )
        raise ValueError(msg)
    codes, cell_types = access.label_codes, access.card.cell_types
    evaluated = np.isin(codes, [cell_types.index(cell_type) for cell_type in types])
    if fitted is not None and not fitted[evaluated].any():
        fitted = None
    roles = _roles(access, receivers, fitted, n_folds)
    found = np.full((len(DESIGNS), len(types)), np.nan)
    n_fitted = np.bincount(codes[(roles & FITTED) > 0], minlength=len(cell_types))
    usable = [
        index
        for index, (cell_type, rows) in enumerate(receivers.items())
        if n_fitted[cell_types.index(cell_type)] >= MIN_CELLS_FIT and len(rows) >= MIN_CELLS_EXPLAINED_VARIANCE
    ]
    if progress is not None:
        progress(sum(len(rows) for index, rows in enumerate(receivers.values()) if index not in usable))
    sections = sections_of(access)
    designs = [TypeDesigns(access, types[index], index, roles, sections, cross_fitted=n_folds > 1) for index in usable]
    for together in those_that_fit(designs):
        gather(access, together, roles, sections, progress)
        for one in together:
            found[:, one.index] = one.explained()
    defined = np.isfinite(found).any(axis=0)
    best = np.where(defined, np.maximum(np.where(np.isfinite(found), found, 0.0).max(axis=0), 0.0), np.nan)
    if without_nearest is None:
        without_nearest = np.full((len(expl_var) + 1, len(types)), np.nan)
    return Baselines(
        names=DESIGNS,
        fitted_on="all evaluated cells" if fitted is None else "training cells",
        expl_var=found,
        gain=expl_var - best,
        full_gain=expl_var_full - best,
        without_nearest=without_nearest[:-1],
        full_without_nearest=without_nearest[-1],
    )


def _roles(
    access: TissueAccess,
    receivers: Mapping[str, Int64[np.ndarray, " cells"]],
    fitted: Bool[np.ndarray, " all_cells"] | None,
    n_folds: int,
) -> Int64[np.ndarray, " all_cells"]:
    """Return the role of each cell: the sum of ``FITTED``, ``SCORED`` and, if both, ``FOLD`` times its fold."""
    codes, cell_types = access.label_codes, list(access.card.cell_types)
    roles = np.zeros(len(codes), dtype=np.int64)
    for cell_type, rows in receivers.items():
        of_type = codes == cell_types.index(cell_type)
        roles[rows] |= SCORED
        roles[rows if fitted is None else fitted & of_type] |= FITTED
        both = np.flatnonzero(of_type & (roles == (FITTED | SCORED)))
        # folds by rank of the names do not depend on the order of storage
        both = both[np.argsort(np.array(access.cell_names(both), dtype=object), kind="stable")]
        roles[both] += FOLD * (np.arange(len(both)) % n_folds)
    return roles
