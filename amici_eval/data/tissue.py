"""An AnnData checked against a model and read through the model's genes and labels, never changed."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from amici_eval.common.errors import DataError
from amici_eval.common.memory import memory_errors_explained
from amici_eval.data.checks import (
    align_genes,
    check_cell_names,
    check_expression,
    check_is_anndata,
    check_known,
    check_neighbours,
    check_scale,
    chosen_cells,
    compare_with_training,
    coordinates_of,
    expression_matrix,
    labels_of,
    n_types,
    obs_column,
    radii_of,
    split_cells,
    trained_on,
)
from amici_eval.data.geometry import Geometry
from amici_eval.data.matrices import ExpressionBlock, expression_blocks, open_rows, take_expression
from amici_eval.data.membership import expression_prints, fitted_cells

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from anndata import AnnData
    from jaxtyping import Bool, Float32, Float64, Int64, UInt64

    from amici_eval.common.model_card import ModelCard
    from amici_eval.data.matrices import RowReader
    from amici_eval.settings.evaluation import DataSpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Tissue:
    """An AnnData that was checked against a model, with the model's genes and labels.

    ``coordinates`` are in the unit of the AnnData; ``samples`` are strata for statistics, ``sections`` must not be left
    by neighbours (:class:`~amici_eval.data.geometry.Geometry`). All cells are neighbours, ``evaluated`` ones also
    receivers. ``matrix`` is no copy; ``gene_columns`` None: in order. ``buffer``: no evaluated cell may have a fitted
    neighbour, which :func:`keep_away_from_training` applies. ``adata`` keeps a fetched file alive.
    """

    cell_names: np.ndarray
    labels: np.ndarray
    label_codes: Int64[np.ndarray, " cells"]
    coordinates: Float64[np.ndarray, "cells dimensions"]
    radii: Float64[np.ndarray, " cells"] | None
    samples: np.ndarray | None
    sections: np.ndarray | None
    evaluated: Bool[np.ndarray, " cells"]
    notes: tuple[str, ...]
    matrix: Any
    gene_columns: Int64[np.ndarray, " genes"] | None
    fitted: Bool[np.ndarray, " cells"] | None = None
    buffer: bool = False
    adata: AnnData | None = field(default=None, repr=False)

    @property
    def n_cells(self) -> int:
        """Number of cells in the tissue, evaluated or not."""
        return len(self.cell_names)

    def expression(self, rows: Int64[np.ndarray, " rows"]) -> Float32[np.ndarray, "rows genes"]:
        """Return dense expression of some cells in the model's gene order, shape (len(rows), genes)."""
        return take_expression(self._reader, rows, self.gene_columns)

    def expression_blocks(self, rows: Int64[np.ndarray, " rows"], *, max_rows: int = 4096) -> Iterator[ExpressionBlock]:
        """Yield the expression of some cells by block, in the order in which the AnnData stores them."""
        return expression_blocks(self._reader, rows, self.gene_columns, max_rows=max_rows)

    def receivers(self) -> dict[str, Int64[np.ndarray, " cells"]]:
        """Return the evaluated rows of each cell type, types sorted, cells in canonical order (by name)."""
        return {label: rows.copy() for label, rows in self._receivers.items()}

    @cached_property
    def _reader(self) -> RowReader:
        return open_rows(self.matrix)

    @cached_property
    def order(self) -> Int64[np.ndarray, " cells"]:
        """All rows in canonical order: by name, independent of the order of storage."""
        return np.argsort(self.cell_names, kind="stable")

    @cached_property
    def _receivers(self) -> dict[str, Int64[np.ndarray, " cells"]]:
        order = self.order[self.evaluated[self.order]]
        numbers, texts = pd.factorize(self.labels)
        ordered = numbers[order]
        found = {str(text): order[ordered == number] for number, text in enumerate(texts)}
        return {label: found[label] for label in sorted(found) if len(found[label])}


@memory_errors_explained("preparing the tissue", "cpu")
def prepare(adata: AnnData, card: ModelCard, spec: DataSpec) -> Tissue:
    """Check that an AnnData can be evaluated with a model, and return it as the model sees it."""
    check_is_anndata(adata)
    notes: list[str] = []
    names = np.asarray(adata.obs_names.astype(str), dtype=object)
    check_cell_names(adata)
    columns = align_genes(adata, card, notes)
    labels = labels_of(adata, card, spec.labels_key or card.labels_key)
    coordinates = coordinates_of(adata, spec.coord_obsm_key or card.coord_obsm_key)
    matrix = expression_matrix(adata, card.layer if spec.layer is None else spec.layer)
    codes = pd.Index(card.cell_types).get_indexer(pd.Index(labels)).astype(np.int64)
    check_neighbours(labels, card.n_neighbors)
    radii = None
    if card.cell_radius_key is not None:
        radii = radii_of(adata, card.cell_radius_key)
    named = None if spec.sample_key is None else obs_column(adata, spec.sample_key, "samples")
    reader = open_rows(matrix)
    integer_valued = check_expression(reader, columns, card.genes, names)
    compare_with_training(card, integer_valued, notes)
    prints = cache(lambda: expression_prints(reader, columns, card.genes))
    geometry = Geometry.of(adata, coordinates, named=named, expression=prints)
    check_scale(card, geometry.nn_distance, notes)
    notes += geometry.notes
    fitted = _fitted(adata, card, spec, prints, coordinates, notes)
    check_known(fitted, spec.subset)
    for note in notes:
        logger.warning("%s", note)
    evaluated = chosen_cells(adata, spec.subset)
    if fitted is not None and spec.subset.held_out is not None:
        evaluated = split_cells(evaluated, fitted, labels, held_out=spec.subset.held_out, notes=notes)
    if not evaluated.all():
        # a buffer drops some of the chosen cells once neighbours are known
        what = "chosen" if spec.subset.buffer else "evaluated"
        notes.append(f"{int(evaluated.sum())} of {adata.n_obs} cells {what}; all cells serve as neighbours")
    return Tissue(
        cell_names=names,
        labels=labels,
        label_codes=codes,
        coordinates=coordinates,
        radii=radii,
        samples=geometry.samples,
        sections=geometry.sections,
        evaluated=evaluated,
        notes=tuple(notes),
        matrix=matrix,
        gene_columns=columns,
        fitted=fitted,
        buffer=spec.subset.buffer,
        adata=adata,
    )


def _fitted(
    adata: AnnData,
    card: ModelCard,
    spec: DataSpec,
    expression: Callable[[], UInt64[np.ndarray, " cells"]],
    coordinates: Float64[np.ndarray, "cells dimensions"],
    notes: list[str],
) -> Bool[np.ndarray, " cells"] | None:
    """Return which cells the model was fitted on, by the settings or else by the model's record."""
    names = np.asarray(adata.obs_names.astype(str), dtype=object)
    rows = trained_on(adata, spec.trained_on)
    if rows is None:
        return fitted_cells(card, names, coordinates, expression, notes)
    said = np.zeros(len(names), dtype=bool)
    said[rows] = True
    own: list[str] = []
    try:
        split = fitted_cells(card, names, coordinates, expression, own)
    except DataError:
        return said
    # use the model's split if it lies within these cells, else all of them
    if split is None or not split.any() or (split & ~said).any():
        return said
    notes += own
    return split


def cells_found(card: ModelCard, tissue: Tissue) -> Bool[np.ndarray, " cells"] | None:
    """Return which cells of a tissue are the training cells of a card; ``None`` if not known."""
    prints = partial(expression_prints, open_rows(tissue.matrix), tissue.gene_columns, card.genes)
    return fitted_cells(card, tissue.cell_names, tissue.coordinates, prints, [])


def check_sections(
    samples: np.ndarray, neighbours: Int64[np.ndarray, "cells neighbours"], coordinates: np.ndarray
) -> None:
    """Refuse sections that lie so close in one coordinate frame that neighbours cross between them."""
    crossing = samples[neighbours] != samples[:, None]
    if not crossing.any():
        return
    cell, rank = np.argwhere(crossing)[0]
    extent = float(np.ptp(coordinates, axis=0).max())
    raise DataError(
        value=f"{int(crossing.any(axis=1).sum())} of {len(samples)} cells have neighbours in another section (first: a "
        f"cell of {samples[cell]} beside one of {samples[neighbours[cell, rank]]})",
        rule="sections must lie apart in one coordinate frame, or the model attends across slides",
        fix=f"shift each section before training and evaluation, e.g. add {extent * 2:.4g} times its number to the x "
        "coordinate; a section with fewer cells of other types than neighbours must be dropped",
    )


def keep_away_from_training(tissue: Tissue, neighbours: Int64[np.ndarray, "cells neighbours"]) -> Tissue:
    """Return the tissue without the evaluated cells that have a cell of training among their neighbours."""
    if tissue.fitted is None or not tissue.buffer:
        return tissue
    kept = tissue.evaluated & ~tissue.fitted[neighbours].any(axis=1)
    before, after, n_neighbours = int(tissue.evaluated.sum()), int(kept.sum()), neighbours.shape[1]
    if not after:
        raise DataError(
            value=f"data.subset.buffer=true leaves none of {before} cells",
            rule=f"each has a cell that the model was fitted on among its {n_neighbours} neighbours: a buffer needs a "
            "model for which a whole region or section was held out; a random split leaves training cells everywhere",
            fix="leave data.subset.buffer out, or fit the model without a region and evaluate that region",
        )
    note = (
        f"data.subset.buffer=true drops {before - after} of {before} cells, for a cell that the model was fitted on is "
        f"among their {n_neighbours} neighbours; {after} cells of {n_types(tissue.labels[kept])} cell types are "
        "evaluated"
    )
    return replace(tissue, evaluated=kept, notes=(*tissue.notes, note))
