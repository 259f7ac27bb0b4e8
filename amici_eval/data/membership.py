"""Which cells of a tissue a model was fitted on, and the facts and fingerprints of training data that tell it.

The name of a cell counts only if its place or its expression agrees with that of training.
"""

from __future__ import annotations

import hashlib
from base64 import b64decode, b64encode
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import sparse

from amici_eval.common.errors import DataError
from amici_eval.common.model_card import Fingerprints, TrainingData
from amici_eval.data.checks import coordinates_of, expression_matrix, is_integer_valued
from amici_eval.data.files import content_digest
from amici_eval.data.geometry import median_nn_distance
from amici_eval.data.matrices import open_rows, spans, stored_values

if TYPE_CHECKING:
    from collections.abc import Callable

    from anndata import AnnData
    from jaxtyping import Bool, Float64, Int64, UInt32, UInt64

    from amici_eval.common.model_card import ModelCard
    from amici_eval.data.matrices import RowReader

_DENSE_VALUES = 2**21
_STORED = np.dtype([("place", "<u4"), ("expression", "<u8")])
_ROUNDED_BITS = 12
_LATTICE = 4
"""With more cells than this per distinct value of x or y, positions count as a lattice."""
_FEW = 0.05
"""Largest accepted share of training cells whose names belong to other cells here."""


@dataclass(frozen=True)
class _CellKeys:
    """Values that identify cells, of the training cells and of the data."""

    trained: np.ndarray
    here: np.ndarray

    def matches(
        self, trained: Bool[np.ndarray, " trained"], here: Bool[np.ndarray, " cells"], *, share: float
    ) -> tuple[Bool[np.ndarray, " trained"], Bool[np.ndarray, " cells"]]:
        """Return which of the given cells on each side have a value that occurs on the other side.

        With a ``share``, only values that are unique on each side count, and none do if they are fewer than that share
        of the smaller side.
        """
        theirs, ours = pd.Series(self.trained[trained]), pd.Series(self.here[here])
        common = np.intersect1d(theirs.to_numpy(), ours.to_numpy())
        if share:
            common = common[~np.isin(common, theirs[theirs.duplicated()]) & ~np.isin(common, ours[ours.duplicated()])]
        if len(common) < share * min(len(theirs), len(ours)):
            common = common[:0]
        return trained & np.isin(self.trained, common), here & np.isin(self.here, common)


def fitted_cells(
    card: ModelCard,
    names: np.ndarray,
    coordinates: Float64[np.ndarray, "cells dimensions"],
    expression: Callable[[], UInt64[np.ndarray, " cells"]],
    notes: list[str],
) -> Bool[np.ndarray, " cells"] | None:
    """Return which cells a model was fitted on; ``None`` if that is not known.

    Cells without the name of a training cell are training cells if place and expression agree. One of both suffices for
    values that no two cells share, if these find nearly all of the cells (by expression: half). Places alone do not
    count on a lattice, such as spots or bins, which other sections share.
    """
    if card.training_cells is None:
        return None
    prints = card.fingerprints
    if not card.training_cells:
        return np.zeros(len(names), dtype=bool)
    if prints is None:
        fitted = np.array([name in card.training_cells for name in names.tolist()], dtype=bool)
        moved = card.training_data is not None and digest_of_places(coordinates) != card.training_data.places
        if moved and fitted.any():
            notes.append(
                "the model was registered by a version that remembers training cells by name only, and the cells of "
                "this tissue lie elsewhere: register it again if names may belong to other cells here"
            )
        return _said(fitted, len(card.training_cells), notes)
    row = pd.Index(prints.names).get_indexer(pd.Index(names))
    named = row >= 0
    places = _CellKeys(prints.places, place_prints(coordinates))
    fitted = named & (places.here == places.trained[row])
    if lattice := min(len(np.unique(axis)) for axis in coordinates[:, :2].T) < len(names) / _LATTICE:
        fitted &= expression() == prints.expression[row]
    found = np.zeros(len(prints.names), dtype=bool)
    found[row[fitted]] = True
    if not found.all() or not fitted[named].all():
        values = _CellKeys(prints.expression, expression())
        fitted |= named & (values.here == values.trained[row])
        found[row[fitted]] = True
        by_name = fitted.copy()
        both = _CellKeys(_mixed(values.trained ^ places.trained), _mixed(values.here ^ places.here))
        for key, share in ((both, 0.0), (values, 0.5), *(() if lattice else ((places, 0.9),))):
            there, here = key.matches(~found, ~fitted, share=share)
            found, fitted = found | there, fitted | here
        if renamed := int((fitted & ~by_name).sum()):
            notes.append(f"{renamed} cells of training have other names here: told by place, expression or both")
        others = named & ~by_name
        lost = int((~found[row[others]]).sum())
        if lost > _FEW * named.sum():
            raise DataError(
                value=f"{lost} cells have the name of a cell the model was fitted on, but neither its place nor its "
                f"expression (first: {names[others][0]})",
                rule="held-out cells are told by names, so a name must belong to the cell it had in training",
                fix="if these are other cells, give them other names (adata.obs_names = 'new_' + adata.obs_names); if "
                "they are the training cells, give place or expression as in training, or say which cells the model "
                "was trained on: data.trained_on.key=COLUMN data.trained_on.value=VALUE",
            )
        if strangers := int((others & ~fitted).sum()):
            notes.append(
                f"{strangers} cells have the name of a cell the model was fitted on, but neither its place nor "
                "its expression: they are not counted as training cells"
            )
    return _said(fitted, len(prints.names), notes)


def _said(fitted: Bool[np.ndarray, " cells"], n_trained: int, notes: list[str]) -> Bool[np.ndarray, " cells"]:
    if 0 < (known := int(fitted.sum())) < n_trained:
        notes.append(
            f"{known} of the {n_trained} cells the model was fitted on are in the data: if it is a part of the "
            "training tissue, its cells have lost neighbours; give all of it and choose receivers with data.subset"
        )
    return fitted


def text_of(prints: Fingerprints) -> str:
    """Return fingerprints, without the names, as text for JSON: 12 bytes a cell in base64."""
    joined = np.empty(len(prints.names), dtype=_STORED)
    joined["place"], joined["expression"] = prints.places, prints.expression
    return b64encode(joined.tobytes()).decode("ascii")


def prints_from(text: str, names: tuple[str, ...]) -> Fingerprints:
    """Return the fingerprints from :func:`text_of`; raise ``ValueError`` if they are not of this many cells."""
    joined = np.frombuffer(b64decode(text, validate=True), dtype=_STORED)
    if len(joined) != len(names):
        msg = f"there are fingerprints of {len(joined)} cells for {len(names)} names"
        raise ValueError(msg)
    return Fingerprints(
        names=names, places=joined["place"].astype(np.uint32), expression=joined["expression"].astype(np.uint64)
    )


def place_prints(coordinates: Float64[np.ndarray, "cells dimensions"]) -> UInt32[np.ndarray, " cells"]:
    """Return a fingerprint of each cell's position, as float32."""
    bits = (coordinates.astype(np.float32) + np.float32(0)).view(np.uint32).astype(np.uint64)
    found = np.zeros(len(bits), dtype=np.uint64)
    for column in bits.T:
        found = _mixed(found ^ column)
    return found.astype(np.uint32)


def expression_prints(
    reader: RowReader, columns: Int64[np.ndarray, " genes"] | None, genes: tuple[str, ...]
) -> UInt64[np.ndarray, " cells"]:
    """Return a fingerprint of each cell's expression: the same for sparse, dense, float and whole numbers.

    Values are rounded to three to four significant digits, so that rounding errors seldom change them; the order of
    genes and genes that the model does not know do not matter.
    """
    salts = np.zeros(reader.shape[1], dtype=np.uint64)
    digests = [hashlib.blake2b(gene.encode("utf-8", "surrogatepass"), digest_size=8).digest() for gene in genes]
    own = np.arange(len(genes)) if columns is None else columns
    salts[own] = np.frombuffer(b"".join(digests), dtype="<u8") | np.uint64(1)
    found = np.zeros(reader.shape[0], dtype=np.uint64)
    for start, block in spans(reader):
        if sparse.issparse(block):
            if not block.has_canonical_format:
                block = block.copy()  # the matrix of the AnnData stays as it is
                block.sum_duplicates()
            ends = np.concatenate([[np.uint64(0)], np.cumsum(_salted(block.data, salts[block.indices]))])
            found[start : start + block.shape[0]] = ends[block.indptr[1:]] - ends[block.indptr[:-1]]
            continue
        step = max(1, _DENSE_VALUES // max(1, len(own)))
        for first in range(0, len(block), step):
            values = np.asarray(block[first : first + step])[:, own]
            found[start + first : start + first + len(values)] = _salted(values, salts[own]).sum(
                axis=1, dtype=np.uint64
            )
    return found


def _salted(values: np.ndarray, salts: UInt64[np.ndarray, " *values"]) -> UInt64[np.ndarray, " *values"]:
    """Return a hash of each value and its gene; 0 for a value of 0 and for a gene without a salt."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + np.uint64(1 << (_ROUNDED_BITS - 1))) >> np.uint64(_ROUNDED_BITS)
    return np.where((values != 0) & (salts != 0), _mixed(rounded ^ salts), np.uint64(0))


def _mixed(values: UInt64[np.ndarray, " values"]) -> UInt64[np.ndarray, " values"]:
    """Return the finaliser of splitmix64 (Steele, Lea & Flood 2014), elementwise."""
    values = values.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


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
