"""Open, describe and fingerprint an AnnData."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.spatial import cKDTree

from amici_eval.errors import DataError, first_line
from amici_eval.specs import TrainingData

if TYPE_CHECKING:
    from collections.abc import Iterator

    from anndata import AnnData
    from jaxtyping import Float64

__all__ = [
    "check_is_filled",
    "content_digest",
    "coordinates_of",
    "describe_training_data",
    "digest_of_places",
    "expression_matrix",
    "median_nn_distance",
    "open_anndata",
    "row_blocks",
]

_BLOCK_ROWS = 4096
_NN_SAMPLE = 5000


def open_anndata(path: str | Path) -> AnnData:
    """Read an AnnData from a local ``.h5ad`` file or ``.zarr`` folder.

    Parameters
    ----------
    path
        Local file or folder.

    Raises
    ------
    DataError
        If it is missing, of another format, damaged or empty.
    """
    import anndata

    location = Path(path)
    if not location.exists():
        raise DataError(
            value=f"{location} does not exist",
            rule="data must be a readable AnnData",
            fix="correct the path, or pass data.uri=...",
        )
    suffix = location.suffix.lower()
    if suffix not in (".h5ad", ".zarr"):
        raise DataError(
            value=f"{location} ends in {suffix or 'no suffix'}",
            rule="data must be an AnnData written as .h5ad or .zarr",
            fix="write it with adata.write_h5ad(...)",
        )
    if suffix == ".zarr":
        _refuse_pickled_arrays(location)
    try:
        adata = anndata.read_zarr(location) if suffix == ".zarr" else anndata.read_h5ad(location)
    except Exception as error:
        raise DataError(
            value=f"{location} cannot be read ({first_line(error)})",
            rule="data must be an AnnData written as .h5ad or .zarr",
            fix="write it again with adata.write_h5ad(...), or copy it again if it was cut off",
        ) from error
    check_is_filled(adata)
    return adata


def _refuse_pickled_arrays(location: Path) -> None:
    """Refuse a .zarr whose arrays are pickles: reading them would run code, unless numcodecs happens to forbid it."""

    def codecs_of(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            for key, item in value.items():
                if key in ("id", "name") and isinstance(item, str):
                    yield item
                yield from codecs_of(item)
        elif isinstance(value, list):
            for item in value:
                yield from codecs_of(item)

    for path in sorted([*location.rglob(".z*"), *location.rglob("zarr.json")]):
        if not path.is_file():
            continue
        try:
            names = list(codecs_of(json.loads(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(
                value=f"{path} cannot be read ({first_line(error)})",
                rule="a .zarr must have readable metadata",
                fix="write it again with adata.write_zarr(...)",
            ) from error
        if any("pickle" in name.lower() for name in names):
            raise DataError(
                value=f"{path} stores a pickle",
                rule="data must not run code when it is read",
                fix="write it again with adata.write_zarr(...)",
            )


def check_is_filled(adata: AnnData) -> None:
    """Refuse an AnnData without cells or genes."""
    if adata.n_obs == 0 or adata.n_vars == 0:
        raise DataError(
            value=f"the AnnData is empty ({adata.n_obs} cells x {adata.n_vars} genes)",
            rule="at least one cell and one gene are needed",
            fix="check how it was filtered",
        )


def coordinates_of(adata: AnnData, key: str) -> Float64[np.ndarray, "cells dimensions"]:
    """Return the coordinates of all cells, shape (cells, dimensions), or say what is wrong with them."""
    if key not in adata.obsm:
        raise DataError(
            value=f"adata.obsm has no {key!r}",
            rule=f"it must hold the coordinates; there are {', '.join(map(str, adata.obsm)) or 'no entries'}",
            fix="name the right entry as data.coord_obsm_key",
        )
    values = adata.obsm[key]
    try:
        coordinates = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
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
            raise DataError(
                value="adata.X is empty", rule="it must hold the expression", fix="name the layer as data.layer"
            )
        matrix = adata.X
    elif layer not in adata.layers:
        raise DataError(
            value=f"adata.layers has no {layer!r}",
            rule=f"it must hold the expression; there are {', '.join(adata.layers) or 'no layers'}",
            fix="name the right layer as data.layer, or data.layer=X for adata.X",
        )
    else:
        matrix = adata.layers[layer]
    return matrix.tocsr() if sparse.issparse(matrix) and matrix.format != "csr" else matrix


def row_blocks(matrix: Any) -> Iterator[np.ndarray]:
    """Yield dense blocks of rows."""
    for start in range(0, matrix.shape[0], _BLOCK_ROWS):
        block = matrix[start : start + _BLOCK_ROWS]
        yield np.asarray(block.toarray() if sparse.issparse(block) else block)


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
    """Return the facts by which data of another kind can be noticed later."""
    matrix = expression_matrix(adata, layer)
    integer_valued = all(bool(np.all(block == np.round(block))) for block in row_blocks(matrix))
    return TrainingData(
        n_cells=adata.n_obs,
        digest=content_digest(adata) if with_digest else None,
        places=digest_of_places(coordinates_of(adata, coord_obsm_key)),
        nn_distance=median_nn_distance(coordinates_of(adata, coord_obsm_key)),
        integer_valued=integer_valued,
    )


def digest_of_places(coordinates: Float64[np.ndarray, "cells dimensions"]) -> str:
    """Return a fingerprint of where cells lie (as float32), whatever their order and names."""
    rounded = coordinates.astype(np.float32) + 0.0
    ordered = rounded[np.lexsort(rounded.T[::-1])]
    return hashlib.blake2b(np.ascontiguousarray(ordered, dtype="<f4").tobytes(), digest_size=16).hexdigest()


def content_digest(adata: AnnData) -> str:
    """Return a fingerprint of what an AnnData contains, 32 hexadecimal digits.

    Notes
    -----
    Covers cell and gene names, ``X`` and layers (as float32, whatever the storage), columns of ``obs`` and numeric
    entries of ``obsm``. Names that begin with ``_`` are left out: model set-up writes such columns. ``uns``, ``varm``,
    ``obsp`` and ``raw`` are left out. It does not depend on sparse or dense storage, file format or block size.
    """
    digest = hashlib.blake2b(digest_size=16)
    _hash_texts(digest, "obs_names", adata.obs_names)
    _hash_texts(digest, "var_names", adata.var_names)
    for name in sorted(str(key) for key in adata.obs if not str(key).startswith("_")):
        column = adata.obs[name]
        if pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column):
            digest.update(f"obs/{name}".encode() + column.to_numpy(dtype="<f8").tobytes())
        else:
            _hash_texts(digest, f"obs/{name}", column.astype(object).where(column.notna(), "\0NA"))
    for name in sorted(str(key) for key in adata.obsm if not str(key).startswith("_")):
        values = np.asarray(adata.obsm[name])
        if np.issubdtype(values.dtype, np.number):
            digest.update(f"obsm/{name}".encode() + np.ascontiguousarray(values, dtype="<f8").tobytes())
    matrices = {"X": adata.X, **{f"layers/{name}": adata.layers[name] for name in sorted(adata.layers)}}
    for name, matrix in matrices.items():
        digest.update(name.encode())
        if matrix is not None:
            for block in row_blocks(matrix.tocsr() if sparse.issparse(matrix) else matrix):
                # + 0 makes a negative zero, which sparse storage drops, a plain one
                digest.update((np.ascontiguousarray(block, dtype="<f4") + np.float32(0)).tobytes())
    return digest.hexdigest()


def _hash_texts(digest: Any, name: str, values: Any) -> None:
    encoded = [str(value).encode("utf-8", "surrogatepass") for value in values]
    digest.update(name.encode() + np.array([len(text) for text in encoded], dtype="<u4").tobytes() + b"".join(encoded))
