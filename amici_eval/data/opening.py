"""Open (see ``files``), describe and fingerprint an AnnData."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.spatial import cKDTree

from amici_eval.common.errors import DataError
from amici_eval.common.model_card import TrainingData
from amici_eval.data.files import check_is_filled, is_on_disk, missing, open_anndata, with_table
from amici_eval.data.matrices import (
    as_dense,
    check_rows_can_be_read,
    in_memory,
    lies_on_disk,
    lies_on_disk_by_columns,
    open_rows,
    spans,
    stored_values,
)

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData
    from jaxtyping import Float64

__all__ = [
    "check_is_filled",
    "content_digest",
    "coordinates_of",
    "describe_training_data",
    "digest_of_places",
    "expression_matrix",
    "is_integer_valued",
    "is_on_disk",
    "median_nn_distance",
    "open_anndata",
    "with_table",
    "write_plain",
]

_NN_SAMPLE = 5000


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


def median_nn_distance(coordinates: Float64[np.ndarray, "cells dimensions"]) -> float:
    """Return the median distance of a cell to the nearest other cell, over evenly spread cells."""
    if len(coordinates) < 2:
        return 0.0
    # evenly spread rows, no random numbers: the same cells each time
    step = max(1, len(coordinates) // _NN_SAMPLE)
    distance, _ = cKDTree(coordinates).query(coordinates[::step], k=2)
    return float(np.median(distance[:, 1]))


def describe_training_data(
    adata: AnnData, *, coord_obsm_key: str, layer: str | None, with_digest: bool = True
) -> TrainingData:
    """Return facts on the training data, by which data of another kind can be noticed later."""
    matrix = expression_matrix(adata, layer)
    reader = open_rows(matrix)
    integer_valued = reader.dtype.kind in "biu" or all(
        is_integer_valued(stored_values(block)) for _, block in spans(reader)
    )
    return TrainingData(
        n_cells=adata.n_obs,
        digest=content_digest(adata) if with_digest else None,
        places=digest_of_places(coordinates_of(adata, coord_obsm_key)),
        nn_distance=median_nn_distance(coordinates_of(adata, coord_obsm_key)),
        integer_valued=integer_valued,
    )


def digest_of_places(coordinates: Float64[np.ndarray, "cells dimensions"]) -> str:
    """Return a fingerprint of the cells' positions (as float32), independent of their order and names."""
    rounded = coordinates.astype(np.float32) + 0.0
    ordered = rounded[np.lexsort(rounded.T[::-1])]
    return hashlib.blake2b(np.ascontiguousarray(ordered, dtype="<f4").tobytes(), digest_size=16).hexdigest()


def content_digest(adata: AnnData) -> str:
    """Return a fingerprint of the content of an AnnData, 32 hexadecimal digits.

    It covers cell and gene names, ``X`` and layers (as float32), columns of ``obs`` and numeric entries of ``obsm``
    (not ragged ones); not names that begin with ``_``, which model set-up writes, nor ``uns``, ``varm``, ``obsp`` and
    ``raw``. It does not depend on sparse or dense storage, file format or block size. A layer on disk by genes (CSC) is
    read into memory, one at a time.
    """
    check_is_filled(adata)
    digest = hashlib.blake2b(digest_size=16)
    _hash_texts(digest, "obs_names", adata.obs_names)
    _hash_texts(digest, "var_names", adata.var_names)
    for name in sorted((key for key in adata.obs if not str(key).startswith("_")), key=str):
        column = adata.obs[name]
        if pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column):
            digest.update(f"obs/{name}".encode() + column.to_numpy(dtype="<f8", na_value=np.nan).tobytes())
        elif isinstance(column.dtype, pd.CategoricalDtype):
            # convert each category once; missing values have the code -1, which indexes the last entry
            texts = np.array([*map(str, column.cat.categories.astype(object)), "\0NA"], dtype=object)
            _hash_texts(digest, f"obs/{name}", texts[column.cat.codes.to_numpy()])
        else:
            _hash_texts(digest, f"obs/{name}", column.astype(object).where(column.notna(), "\0NA"))
    for name, values in _numeric_obsm(adata).items():
        if not name.startswith("_"):
            digest.update(f"obsm/{name}".encode() + np.ascontiguousarray(values, dtype="<f8").tobytes())
    matrices = {"X": adata.X, **{f"layers/{name}": adata.layers[name] for name in sorted(adata.layers)}}
    for name, matrix in matrices.items():
        digest.update(name.encode())
        if matrix is not None:
            if name != "X" and lies_on_disk_by_columns(matrix):
                # a layer that the settings may not use must not cause an error
                matrix = matrix.to_memory().tocsr()  # noqa: PLW2901, RUF100
            for _, block in spans(open_rows(matrix, name=f"adata.{name}")):
                # + 0 turns -0.0, which sparse storage drops, into 0.0
                values = np.add(as_dense(block), np.float32(0), dtype="<f4", casting="unsafe", order="C")
                digest.update(values.data)
    return digest.hexdigest()


def _hash_texts(digest: Any, name: str, values: Any) -> None:
    encoded = [str(value).encode("utf-8", "surrogatepass") for value in values]
    digest.update(name.encode() + np.array([len(text) for text in encoded], dtype="<u4").tobytes() + b"".join(encoded))


def _numeric_obsm(adata: AnnData) -> dict[str, np.ndarray]:
    """Return the numeric arrays of ``obsm`` by name, without ragged ones and those on a GPU."""
    found = {}
    for name in sorted(map(str, adata.obsm)):
        # ragged arrays (awkward) have no shape
        if hasattr(adata.obsm[name], "shape"):
            with suppress(TypeError, ValueError, RuntimeError):
                values = np.asarray(adata.obsm[name])
                if np.issubdtype(values.dtype, np.number):
                    found[name] = values
    return found


def write_plain(adata: AnnData, path: Path) -> None:
    """Write what an evaluation reads of an AnnData to a .h5ad for old versions of anndata; the digest is kept."""
    from anndata import AnnData

    def plain(matrix: Any, name: str) -> Any:
        return matrix if matrix is None or lies_on_disk(matrix) else in_memory(matrix, name)

    check_is_filled(adata)
    cells, genes = (pd.Index(names.astype(str).to_numpy(dtype=object)) for names in (adata.obs_names, adata.var_names))
    columns = {str(name): _plain_column(adata.obs[name]) for name in adata.obs if name != "_index"}
    AnnData(
        X=plain(adata.X, "adata.X"),
        obs=pd.DataFrame(columns, index=cells),
        var=pd.DataFrame(index=genes),
        layers={name: plain(matrix, f"adata.layers[{name!r}]") for name, matrix in adata.layers.items()},
        obsm=_numeric_obsm(adata),
    ).write_h5ad(path, convert_strings_to_categoricals=False)


def _plain_column(column: pd.Series) -> Any:
    """Return numbers as they are (nullable ones as float64), anything else as categories of text."""
    if isinstance(column.dtype, np.dtype) and column.dtype.kind in "biuf":
        return column.to_numpy()
    if pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column):
        return column.to_numpy(dtype=np.float64, na_value=np.nan)
    values = column.astype("category").cat
    codes, texts = pd.factorize(np.array([*map(str, values.categories)], dtype=object))
    codes = np.append(codes, -1)[values.codes.to_numpy()]
    return pd.Categorical.from_codes(codes, pd.Index(texts), ordered=bool(values.ordered))
