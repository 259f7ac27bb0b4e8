"""An AnnData fitted to a model: checked, seen through the model's genes and labels, never changed."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from amici_eval.data import (
    check_is_filled,
    coordinates_of,
    digest_of_places,
    expression_matrix,
    median_nn_distance,
    row_blocks,
)
from amici_eval.errors import DataError

if TYPE_CHECKING:
    from anndata import AnnData
    from jaxtyping import Bool, Float32, Float64, Int64

    from amici_eval.specs import DataSpec, ModelCard, SubsetSpec

__all__ = ["Tissue", "check_sections", "prepare"]

logger = logging.getLogger(__name__)

_SCALE_RATIO = 3.0


@dataclass(frozen=True, eq=False)
class Tissue:
    """An AnnData that was checked against a model, seen through the model's genes and labels.

    Parameters
    ----------
    cell_names
        ``obs_names`` as text, shape (cells,).
    labels
        Cell type of each cell as text, shape (cells,).
    label_codes
        The model's code of each label, shape (cells,).
    coordinates
        Shape (cells, dimensions), in the unit of the AnnData.
    radii
        Cell radii, if the model was trained with them.
    samples
        Section of each cell, if a sample column was named.
    evaluated
        Which cells are receivers of the evaluation; all cells are neighbours.
    notes
        Remarks and warnings for the report.
    matrix
        The AnnData's own expression matrix; not a copy.
    gene_columns
        Columns of ``matrix`` in the model's gene order; ``None`` if they are in order already.
    renamed
        Whether these are the cells of training under other names.
    """

    cell_names: np.ndarray
    labels: np.ndarray
    label_codes: Int64[np.ndarray, " cells"]
    coordinates: Float64[np.ndarray, "cells dimensions"]
    radii: Float64[np.ndarray, " cells"] | None
    samples: np.ndarray | None
    evaluated: Bool[np.ndarray, " cells"]
    notes: tuple[str, ...]
    matrix: Any
    gene_columns: Int64[np.ndarray, " genes"] | None
    renamed: bool = False

    @property
    def n_cells(self) -> int:
        """Number of cells in the tissue, evaluated or not."""
        return len(self.cell_names)

    def expression(self, rows: Int64[np.ndarray, " rows"]) -> Float32[np.ndarray, "rows genes"]:
        """Return dense expression of some cells in the model's gene order, shape (len(rows), genes)."""
        block = self.matrix[rows]
        if sparse.issparse(block):
            block = block.toarray()
        block = np.asarray(block)
        if self.gene_columns is not None:
            block = block[:, self.gene_columns]
        return np.ascontiguousarray(block, dtype=np.float32)

    def receivers(self) -> dict[str, Int64[np.ndarray, " cells"]]:
        """Return the evaluated rows of each cell type, types sorted, cells in canonical order (by name)."""
        order = np.argsort(self.cell_names, kind="stable")
        order = order[self.evaluated[order]]
        labels = self.labels[order]
        return {str(label): order[labels == label] for label in sorted(set(labels.tolist()))}


def prepare(adata: AnnData, card: ModelCard, spec: DataSpec) -> Tissue:
    """Check that an AnnData can be evaluated with a model, and return it as the model sees it.

    Parameters
    ----------
    adata
        All cells of the tissue; never changed.
    card
        What the model expects.
    spec
        Columns, layer and cells that the user chose.

    Raises
    ------
    DataError
        For each thing that does not fit; the message names the value, the rule and the fix.
    """
    _check_type(adata)
    notes: list[str] = []
    names = np.asarray(adata.obs_names.astype(str), dtype=object)
    if not adata.obs_names.is_unique:
        twice = adata.obs_names[adata.obs_names.duplicated()][0]
        raise DataError(
            value=f"cell name {twice!r} occurs more than once",
            rule="obs_names must be unique: the order of permutations and training membership go by name",
            fix="call adata.obs_names_make_unique()",
        )
    columns = _align_genes(adata, card, notes)
    labels = _labels(adata, card, spec.labels_key or card.labels_key)
    coordinates = coordinates_of(adata, spec.coord_obsm_key or card.coord_obsm_key)
    matrix = expression_matrix(adata, card.layer if spec.layer is None else spec.layer)
    codes = pd.Index(card.cell_types).get_indexer(pd.Index(labels)).astype(np.int64)
    _check_neighbours(labels, card.n_neighbors)
    radii = None
    if card.cell_radius_key is not None:
        radii = _radii(adata, card.cell_radius_key)
    samples = None
    if spec.sample_key is not None:
        samples = _obs_column(adata, spec.sample_key, "samples").astype(str).to_numpy(dtype=object)
    integer_valued = _check_expression(matrix, columns, card.genes, names)
    _compare_with_training(card, coordinates, integer_valued, notes)
    renamed = _compare_names(card, names, coordinates, notes)
    for note in notes:
        logger.warning("%s", note)
    evaluated = _subset(adata, spec.subset)
    if not evaluated.all():
        notes.append(f"{int(evaluated.sum())} of {adata.n_obs} cells evaluated; all cells serve as neighbours")
    return Tissue(
        cell_names=names,
        labels=labels,
        label_codes=codes,
        coordinates=coordinates,
        radii=radii,
        samples=samples,
        evaluated=evaluated,
        notes=tuple(notes),
        matrix=matrix,
        gene_columns=columns,
        renamed=renamed,
    )


def _compare_names(card: ModelCard, names: np.ndarray, coordinates: np.ndarray, notes: list[str]) -> bool:
    """Return whether the cells are those of training under other names, so that held-out cells cannot be told."""
    if card.training_cells is None:
        return False
    known = len(card.training_cells.intersection(names.tolist()))
    if 0 < known < len(card.training_cells):
        notes.append(
            f"{known} of the {len(card.training_cells)} cells the model was fitted on are in the data: if it is a "
            "part of the training tissue, its cells have lost neighbours; give the whole tissue and choose receivers "
            "with data.subset"
        )
    training = card.training_data
    if known == 0 and training is not None and digest_of_places(coordinates) == training.places:
        notes.append(
            "cells lie where the training cells lay but have other names: which of them were held out is not known; "
            "give the tissue with its original obs_names"
        )
        return True
    return False


def _check_type(adata: object) -> None:
    from anndata import AnnData

    if not isinstance(adata, AnnData):
        raise DataError(
            value=f"data is a {type(adata).__name__}",
            rule="data must be an AnnData",
            fix="read the file with anndata.read_h5ad(...) or give its path as data.uri",
        )
    check_is_filled(adata)
    if adata.isbacked:
        raise DataError(
            value=f"the AnnData is backed by {adata.filename}",
            rule="its expression must be in memory",
            fix="pass adata.to_memory()",
        )


def _align_genes(adata: AnnData, card: ModelCard, notes: list[str]) -> Int64[np.ndarray, " genes"] | None:
    have = pd.Index(adata.var_names.astype(str))
    if not have.is_unique:
        twice = have[have.duplicated()][0]
        raise DataError(
            value=f"gene {twice!r} occurs more than once",
            rule="genes are matched by name, so var_names must be unique",
            fix="call adata.var_names_make_unique() or drop one of them",
        )
    columns = have.get_indexer(pd.Index(card.genes))
    missing = [gene for gene, column in zip(card.genes, columns, strict=True) if column < 0]
    if missing:
        some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise DataError(
            value=f"the model has {len(card.genes)} genes and the data lacks {len(missing)} of them ({some})",
            rule="every gene of the model must be among var_names",
            fix="take the AnnData before gene filtering, or train on the genes you have",
        )
    if len(have) == len(card.genes) and np.array_equal(columns, np.arange(len(columns))):
        return None
    if len(have) > len(card.genes):
        notes.append(f"{len(have) - len(card.genes)} of {len(have)} genes of the data are not in the model and ignored")
    if not np.all(np.diff(columns) > 0):
        notes.append("genes of the data are in another order than the model's; aligned by name")
    return columns.astype(np.int64)


def _obs_column(adata: AnnData, key: str, what: str) -> pd.Series:
    if key not in adata.obs:
        raise DataError(
            value=f"adata.obs has no column {key!r}",
            rule=f"it must hold the {what}; there are {', '.join(map(str, adata.obs.columns)) or 'no columns'}",
            fix="name the right column",
        )
    column = adata.obs[key]
    if column.isna().any():
        raise DataError(
            value=f"adata.obs[{key!r}] is missing in {int(column.isna().sum())} of {adata.n_obs} cells",
            rule=f"every cell needs a value for the {what}",
            fix="fill the values or drop these cells before training",
        )
    return column


def _labels(adata: AnnData, card: ModelCard, key: str) -> np.ndarray:
    labels = _obs_column(adata, key, "cell types (data.labels_key names another column)").astype(str)
    unseen = sorted(set(labels.unique()) - set(card.cell_types))
    if unseen:
        counts = labels.value_counts()
        some = ", ".join(f"{label!r} ({counts[label]} cells)" for label in unseen[:3])
        raise DataError(
            value=f"adata.obs[{key!r}] has {len(unseen)} labels the model has not seen: {some}",
            rule=f"the model knows {', '.join(card.cell_types)}",
            fix="rename the labels to the model's, or drop these cells",
        )
    return labels.to_numpy(dtype=object)


def _radii(adata: AnnData, key: str) -> Float64[np.ndarray, " cells"]:
    column = _obs_column(adata, key, "cell radii").astype(object)
    radii: Float64[np.ndarray, " cells"] = pd.to_numeric(column, errors="coerce").to_numpy(dtype=np.float64)
    bad = ~np.isfinite(radii)
    if bad.any():
        first = int(np.argmax(bad))
        raise DataError(
            value=f"adata.obs[{key!r}] is {column.iloc[first]!r} in cell {adata.obs_names[first]}",
            rule="cell radii must be finite numbers",
            fix="correct the column",
        )
    return radii


def _check_neighbours(labels: np.ndarray, n_neighbors: int) -> None:
    counts = pd.Series(labels).value_counts()
    others = len(labels) - counts
    few = others[others < n_neighbors]
    if len(few):
        label = few.index[0]
        raise DataError(
            value=f"cells of type {label!r} have {few.iloc[0]} cells of other types around them",
            rule=f"the model attends to {n_neighbors} neighbours, all of other types",
            fix="evaluate on the whole tissue and choose receivers with data.subset, which keeps all as neighbours",
        )


def _check_expression(matrix: Any, columns: np.ndarray | None, genes: tuple[str, ...], names: np.ndarray) -> bool:
    """Refuse values that are not finite; return whether all are whole numbers."""
    integer_valued = True
    start = 0
    for block in row_blocks(matrix):
        values = block if columns is None else block[:, columns]
        finite = np.isfinite(values)
        if not finite.all():
            row, column = np.argwhere(~finite)[0]
            raise DataError(
                value=f"expression of {genes[column]} in cell {names[start + row]} is {values[row, column]}",
                rule="expression must be finite",
                fix="drop or impute such values as it was done for training",
            )
        integer_valued = integer_valued and bool(np.all(values == np.round(values)))
        start += len(block)
    return integer_valued


def _compare_with_training(card: ModelCard, coordinates: np.ndarray, integer_valued: bool, notes: list[str]) -> None:  # noqa: FBT001
    training = card.training_data
    if training is None:
        return
    if integer_valued != training.integer_valued:
        here, there = ("counts", "transformed values") if integer_valued else ("transformed values", "counts")
        notes.append(
            f"expression looks like {here}, but the model was trained on {there}: scores will be meaningless unless "
            "both are on one scale; name the right layer as data.layer"
        )
    distance = median_nn_distance(coordinates)
    if training.nn_distance > 0 and distance > 0:
        ratio = distance / training.nn_distance
        if not 1 / _SCALE_RATIO <= ratio <= _SCALE_RATIO:
            notes.append(
                f"cells lie {distance:.4g} apart (median distance to the nearest cell), {ratio:.3g} times the "
                f"{training.nn_distance:.4g} of the training tissue: the unit of adata.obsm differs; the model's "
                "distance kernel needs coordinates in the unit of training"
            )


def _subset(adata: AnnData, subset: SubsetSpec) -> Bool[np.ndarray, " cells"]:
    if subset.indices is not None:
        if max(subset.indices) >= adata.n_obs:
            raise DataError(
                value=f"data.subset.indices names row {max(subset.indices)}",
                rule=f"the data has rows 0 to {adata.n_obs - 1}",
                fix="give row numbers of this AnnData",
            )
        chosen = np.zeros(adata.n_obs, dtype=bool)
        chosen[list(subset.indices)] = True
        return chosen
    if subset.key is None:
        return np.ones(adata.n_obs, dtype=bool)
    column = _obs_column(adata, subset.key, "subset (data.subset.key)").astype(str)
    chosen = (column == subset.value).to_numpy()
    if not chosen.any():
        values = sorted(column.unique())
        some = ", ".join(values[:8]) + (", ..." if len(values) > 8 else "")
        raise DataError(
            value=f"no cell has {subset.key} = {subset.value!r}",
            rule=f"its values are {some}",
            fix="choose one of these",
        )
    return chosen


def check_sections(
    samples: np.ndarray, neighbours: Int64[np.ndarray, "cells neighbours"], coordinates: np.ndarray
) -> None:
    """Refuse sections that lie so close in one coordinate frame that neighbours cross between them.

    Parameters
    ----------
    samples
        Section of each cell.
    neighbours
        Row numbers of each cell's neighbours, as the model takes them.
    coordinates
        Shape (cells, dimensions).

    Raises
    ------
    DataError
        If any cell has a neighbour in another section.
    """
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
