"""What an AnnData holds for a model (genes, labels, coordinates, expression), checked, and the cells chosen of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from amici_eval.common.errors import DataError, first_line
from amici_eval.common.text import meant_by
from amici_eval.data.files import check_is_filled, missing
from amici_eval.data.matrices import (
    as_dense,
    check_rows_can_be_read,
    in_memory,
    lies_on_disk,
    spans,
    stored_values,
)

if TYPE_CHECKING:
    from anndata import AnnData
    from jaxtyping import Bool, Float64, Int64

    from amici_eval.common.model_card import ModelCard
    from amici_eval.data.matrices import RowReader
    from amici_eval.settings.evaluation import SubsetSpec, TrainedOnSpec

_SCALE_RATIO = 3.0
# micrometres; cells of a section lie about 5 to 20 apart
_CELL_SPACING = (1.0, 50.0)


def check_is_anndata(adata: object) -> None:
    """Refuse anything but an AnnData, and an empty one."""
    from anndata import AnnData

    if not isinstance(adata, AnnData):
        raise DataError(
            value=f"data is a {type(adata).__name__}",
            rule="data must be an AnnData",
            fix="read the file with anndata.read_h5ad(...) or give its path as data.uri",
        )
    check_is_filled(adata)


def check_cell_names(adata: AnnData) -> None:
    """Refuse cells that share a name."""
    if not adata.obs_names.is_unique:
        twice = adata.obs_names[adata.obs_names.duplicated()][0]
        raise DataError(
            value=f"cell name {twice!r} occurs more than once",
            rule="obs_names must be unique: the order of permutations and training membership go by name",
            fix="call adata.obs_names_make_unique()",
        )


def align_genes(adata: AnnData, card: ModelCard, notes: list[str]) -> Int64[np.ndarray, " genes"] | None:
    """Return the columns of the model's genes, ``None`` if the data has just these in order; refuse missing ones."""
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


def obs_column(adata: AnnData, key: str, what: str) -> pd.Series:
    """Return a column of ``obs``; refuse a missing one and one with missing values."""
    if key not in adata.obs:
        raise missing(
            adata,
            "obs",
            key,
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


def labels_of(adata: AnnData, card: ModelCard, key: str) -> np.ndarray:
    """Return the cell types as the model writes them, shape (cells,); refuse those it has not seen."""
    labels = obs_column(adata, key, "cell types (data.labels_key names another column)").astype(str)
    found = {label: meant_by(label, card.cell_types) for label in labels.unique()}
    labels = labels.map({label: names[0] if len(names) == 1 else label for label, names in found.items()})
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


def radii_of(adata: AnnData, key: str) -> Float64[np.ndarray, " cells"]:
    """Return the cell radii, shape (cells,); refuse what is no finite number."""
    column = obs_column(adata, key, "cell radii").astype(object)
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


def check_neighbours(labels: np.ndarray, n_neighbors: int) -> None:
    """Refuse a tissue with fewer cells of other types than the model attends to."""
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


def check_expression(reader: RowReader, columns: np.ndarray | None, genes: tuple[str, ...], names: np.ndarray) -> bool:
    """Refuse values that are not finite; return whether all are whole numbers."""
    if reader.dtype.kind in "biu":
        return True
    integer_valued = True
    for start, block in spans(reader):
        values = stored_values(block)
        if not np.isfinite(values).all() or (integer_valued and not is_integer_valued(values)):
            # only the model's genes count
            values = as_dense(block)
            values = values if columns is None else values[:, columns]
            finite = np.isfinite(values)
            if not finite.all():
                row, column = np.argwhere(~finite)[0]
                raise DataError(
                    value=f"expression of {genes[column]} in cell {names[start + row]} is {values[row, column]}",
                    rule="expression must be finite",
                    fix="drop or impute such values as it was done for training",
                )
            integer_valued = integer_valued and is_integer_valued(values)
    return integer_valued


def compare_with_training(card: ModelCard, integer_valued: bool, notes: list[str]) -> None:  # noqa: FBT001
    """Note counts where the model was trained on transformed values, and vice versa."""
    training = card.training_data
    if training is not None and integer_valued != training.integer_valued:
        here, there = ("counts", "transformed values") if integer_valued else ("transformed values", "counts")
        notes.append(
            f"expression looks like {here}, but the model was trained on {there}: scores will be meaningless unless "
            "both are on one scale; name the right layer as data.layer"
        )


def check_scale(card: ModelCard, distance: float, notes: list[str]) -> None:
    """Note coordinates in another unit than those of training or, where these are not known, than micrometres."""
    trained = 0.0 if card.training_data is None else card.training_data.nn_distance
    apart = f"cells lie {distance:.4g} apart (median distance to the nearest cell)"
    if distance > 0 and trained > 0:
        ratio = distance / trained
        if not 1 / _SCALE_RATIO <= ratio <= _SCALE_RATIO:
            notes.append(
                f"{apart}, {ratio:.3g} times the {trained:.4g} of the training tissue: the unit of adata.obsm differs; "
                "the model's distance kernel needs coordinates in the unit of training"
            )
    elif distance > 0 and card.training_data is None and not _CELL_SPACING[0] <= distance <= _CELL_SPACING[1]:
        notes.append(
            f"{apart}, which is unusual in micrometres: AMICI's distance kernel works on raw values; the same tissue "
            "in pixels instead of micrometres trains 7 to 14 times slower and learns nothing, so check the unit in "
            "which the model was trained"
        )


def chosen_cells(adata: AnnData, subset: SubsetSpec) -> Bool[np.ndarray, " cells"]:
    """Return which cells the user chose by column or by index, shape (cells,)."""
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
    if subset.key is None or subset.value is None:
        return np.ones(adata.n_obs, dtype=bool)
    return cells_with(adata, subset.key, subset.value, "subset (data.subset.key)")


def cells_with(adata: AnnData, key: str, value: str, what: str) -> Bool[np.ndarray, " cells"]:
    """Return which cells have a value, written as text, in a column of ``obs``; refuse a value without cells."""
    column = obs_column(adata, key, what).astype(str)
    values = sorted(column.unique())
    names = meant_by(value, values)
    if len(names) != 1:
        some = ", ".join(values[:8]) + (", ..." if len(values) > 8 else "")
        raise DataError(
            value=f"{'it is not clear which' if names else 'no'} cell has {key} = {value!r}",
            rule=f"its values are {some}",
            fix="choose one of these",
        )
    return (column == names[0]).to_numpy()


def trained_on(adata: AnnData, spec: TrainedOnSpec) -> Int64[np.ndarray, " trained"] | None:
    """Return the rows of the cells that the model was trained on, in order; ``None`` if no setting names them."""
    if spec.key is not None and spec.value is not None:
        return np.flatnonzero(cells_with(adata, spec.key, spec.value, "training cells (trained_on.key)"))
    if spec.names is None:
        return None
    try:
        listed = Path(spec.names).expanduser().read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            value=f"trained_on.names={spec.names} cannot be read ({first_line(error)})",
            rule="it must be a text file with the name of a cell in each line",
            fix="write it with pathlib.Path(FILE).write_text('\\n'.join(adata_train.obs_names))",
        ) from error
    check_cell_names(adata)
    names = list(dict.fromkeys(name for name in listed if name))
    rows: Int64[np.ndarray, " trained"] = adata.obs_names.astype(str).get_indexer(pd.Index(names, dtype=object))
    if (missing := int((rows < 0).sum())) or not names:
        raise DataError(
            value=f"{missing} of the {len(names)} names in {spec.names} are no cells of the data",
            rule="trained_on.names must list obs_names of this tissue, one in each line",
            fix="write the file from the same AnnData, or name the cells by a column: trained_on.key, trained_on.value",
        )
    return rows


def check_known(fitted: Bool[np.ndarray, " cells"] | None, subset: SubsetSpec) -> None:
    """Refuse settings that need the fitted cells if these are not known."""
    asked = [] if subset.held_out is None else [f"data.subset.held_out={str(subset.held_out).lower()}"]
    if subset.buffer:
        asked.append("data.subset.buffer=true")
    if asked and fitted is None:
        raise DataError(
            value=" and ".join(asked),
            rule="it must be known which cells the model was fitted on, and the model does not tell",
            fix="say which cells it was trained on: data.trained_on.key=COLUMN data.trained_on.value=VALUE, or "
            "data.trained_on.names=FILE; or choose the cells by a column: data.subset.key=... data.subset.value=...",
        )


def split_cells(
    chosen: Bool[np.ndarray, " cells"],
    fitted: Bool[np.ndarray, " cells"],
    labels: np.ndarray,
    *,
    held_out: bool,
    notes: list[str],
) -> Bool[np.ndarray, " cells"]:
    """Return the chosen cells that the model was not fitted on, or those that it was, shape (cells,); refuse none."""
    kept = chosen & (fitted != held_out)
    setting = f"data.subset.held_out={str(held_out).lower()}"
    if not kept.any():
        others = "choose other cells, or " if (fitted != held_out).any() else ""
        raise DataError(
            value=f"{setting} leaves none of {int(chosen.sum())} chosen cells",
            rule=f"the model was fitted on {'all' if held_out else 'none'} of them; of the {len(fitted)} cells of the "
            f"data it was fitted on {int(fitted.sum())}",
            fix=f"{others}leave data.subset.held_out out",
        )
    notes.append(
        f"{setting} keeps {int(kept.sum())} of {int(chosen.sum())} chosen cells, of {n_types(labels[kept])} of "
        f"{n_types(labels[chosen])} cell types: the model was {'not ' if held_out else ''}fitted on them"
        f"{'' if fitted.any() else '; none of the cells that it was fitted on is in the data'}"
    )
    return kept


def n_types(labels: np.ndarray) -> int:
    """Return how many cell types occur."""
    return len(pd.unique(labels))


def coordinates_of(adata: AnnData, key: str) -> Float64[np.ndarray, "cells dimensions"]:
    """Return the coordinates of all cells, shape (cells, dimensions); refuse unusable ones."""
    if key not in adata.obsm:
        raise missing(
            adata,
            "obsm",
            key,
            rule=f"it must hold the coordinates; there are {', '.join(map(str, adata.obsm)) or 'no entries'}",
            fix="name the right entry as data.coord_obsm_key",
        )
    values = adata.obsm[key]
    try:
        coordinates = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        if not sparse.issparse(values) and getattr(values, "dtype", None) in (np.float32, np.float64):
            # raises, with a fix, for an array on a GPU
            in_memory(values, f"adata.obsm[{key!r}]")
        raise DataError(
            value=f"adata.obsm[{key!r}] holds {getattr(values, 'dtype', type(values).__name__)}",
            rule="coordinates must be numbers",
            fix="convert them to float",
        ) from error
    if coordinates.ndim != 2 or coordinates.shape[1] < 2:
        raise DataError(
            value=f"adata.obsm[{key!r}] has shape {coordinates.shape}",
            rule="coordinates must have at least two columns",
            fix="store x and y",
        )
    bad = ~np.isfinite(coordinates).all(axis=1)
    if bad.any():
        raise DataError(
            value=f"adata.obsm[{key!r}] is not finite for {int(bad.sum())} of {len(bad)} cells (first: "
            f"{adata.obs_names[int(np.argmax(bad))]})",
            rule="every cell needs finite coordinates",
            fix="drop these cells before training and evaluation",
        )
    return coordinates


def expression_matrix(adata: AnnData, layer: str | None) -> Any:
    """Return the expression of a layer (``None`` and ``"X"``: ``adata.X``), dense or CSR; no copy where possible."""
    if layer is None or layer == "X":
        if adata.X is None:
            raise missing(adata, "X", None, rule="it must hold the expression", fix="name the layer as data.layer")
        matrix, name = adata.X, "adata.X"
    elif layer not in adata.layers:
        raise missing(
            adata,
            "layers",
            layer,
            rule=f"it must hold the expression; there are {', '.join(adata.layers) or 'no layers'}",
            fix="name the right layer as data.layer, or data.layer=X for adata.X",
        )
    else:
        matrix, name = adata.layers[layer], f"adata.layers[{layer!r}]"
    check_rows_can_be_read(matrix, name)
    return matrix if lies_on_disk(matrix) else in_memory(matrix, name)


def is_integer_valued(values: np.ndarray) -> bool:
    """Return whether all values are whole numbers."""
    return values.dtype.kind in "biu" or bool(np.all(values == np.rint(values)))
