"""Cells, types and genes that two evaluations share, and the heads' contributions to the cells in both sketches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from amici_eval.common.errors import DataError
from amici_eval.stats.matching import HeadContributions
from amici_eval.stats.readout import Readout
from amici_eval.stats.spatial.tiles import balanced_blocks

if TYPE_CHECKING:
    from jaxtyping import Float64, Int64

    from amici_eval.results.moments import Moments

_HALVINGS = 3
"""Three halvings give eight blocks of tissue: nearly independent, and enough for a p of 1/256."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Shared:
    """Cells, types and genes that two evaluations have in common.

    ``cell_types`` and ``genes`` are in the order of the first. Of each sketched cell that both have, ``types`` is its
    position in ``cell_types``, ``weights`` the number of evaluated cells that it stands for, ``places`` its position in
    the sketch of the first and of the second.
    """

    cell_types: tuple[str, ...]
    genes: tuple[str, ...]
    types: Int64[np.ndarray, " cells"]
    weights: Float64[np.ndarray, " cells"]
    places: Int64[np.ndarray, "two cells"]


def shared_by(first: Moments, second: Moments) -> Shared:
    """Return what two evaluations have in common."""
    cell_types = tuple(name for name in first.cell_types if name in set(second.cell_types))
    genes = tuple(name for name in first.genes if name in set(second.genes))
    there = {name: place for place, name in enumerate(second.sketch_names)}
    places, types = [], []
    code = {name: number for number, name in enumerate(cell_types)}
    for place, name in enumerate(first.sketch_names):
        other = there.get(name)
        label = first.cell_types[first.sketch_type[place]]
        if other is not None and label in code and second.cell_types[second.sketch_type[other]] == label:
            places.append((place, other))
            types.append(code[label])
    for what, found in (("cell type", cell_types), ("gene", genes), ("sketched cell", places)):
        if not found:
            raise DataError(
                value=f"the two evaluations have no {what} in common",
                rule="heads are compared on the same cells, types and genes",
                fix="evaluate both versions on the same data and cells",
            )
    of_cells = np.array(types, dtype=np.int64)
    cells_of_type = np.zeros(len(cell_types))
    np.add.at(
        cells_of_type,
        np.array([code.get(name, 0) for name in first.cell_types], dtype=np.int64)[first.row_type],
        np.where(np.array([name in code for name in first.cell_types])[first.row_type], first.n_cells, 0),
    )
    sketched = np.bincount(of_cells, minlength=len(cell_types))
    return Shared(
        cell_types=cell_types,
        genes=genes,
        types=of_cells,
        weights=(cells_of_type / np.maximum(sketched, 1))[of_cells],
        places=np.array(places, dtype=np.int64).T,
    )


def blocks_of(moments: Moments, shared: Shared) -> Int64[np.ndarray, " cells"]:
    """Return the block of tissue in which each shared cell lies, by the first evaluation's tiles; -1: not known."""
    n_tiles = len(moments.tile_center)
    weights = np.bincount(moments.row_tile, weights=moments.n_cells, minlength=n_tiles)
    blocks = balanced_blocks(moments.tile_center, weights, depth=_HALVINGS)
    tiles = moments.sketch_tile[shared.places[0]]
    return np.where(tiles >= 0, blocks[tiles], -1)


def contributions(
    moments: Moments, shared: Shared, side: int, blocks: Int64[np.ndarray, " cells"]
) -> HeadContributions:
    """Return the contribution of each head, kept alone, to the shared cells, as factors.

    A head with a factor that is not finite gets 0 in all cells, so that it contributes nothing and resembles no other
    head.
    """
    places = shared.places[side]
    position = {name: number for number, name in enumerate(moments.genes)}
    genes = np.array([position[name] for name in shared.genes], dtype=np.int64)
    types = np.array([moments.cell_types.index(name) for name in shared.cell_types], dtype=np.int64)
    n_heads = moments.n_heads
    size = moments.head_gram.shape[0] // n_heads
    outputs = moments.sketch_outputs[places].astype(np.float64)
    factors = np.empty((len(places), n_heads, size + 1))
    for code, cell_type in enumerate(types):
        of_type = shared.types == code
        readout = _readout(moments, int(cell_type))
        for head in range(n_heads):
            own = slice(head * size, (head + 1) * size)
            scale = readout.scale(outputs[of_type], [head])[:, None]
            factors[of_type, head] = np.hstack([np.ones((len(scale), 1)), outputs[of_type, own]]) / scale
    return HeadContributions(
        types=shared.types,
        blocks=blocks,
        weights=shared.weights,
        factors=np.where(np.isfinite(factors).all(axis=(0, 2))[None, :, None], factors, 0.0),
        query_weights=moments.query_weights[np.ix_(types, genes)].astype(np.float64),
        head_weights=moments.head_weights[genes]
        .reshape(len(genes), n_heads, size)
        .transpose(1, 0, 2)
        .astype(np.float64),
    )


def outputs_of(moments: Moments, shared: Shared, side: int) -> Float64[np.ndarray, "cells heads size"]:
    """Return the attention outputs of the shared cells by head; outputs that are not finite become 0."""
    outputs = moments.sketch_outputs[shared.places[side]].astype(np.float64)
    return np.where(np.isfinite(outputs), outputs, 0.0).reshape(len(outputs), moments.n_heads, -1)


def attention_of_both(
    first: Moments, second: Moments
) -> tuple[Float64[np.ndarray, "cells heads places"], Float64[np.ndarray, "cells others places"]] | None:
    """Return the attention that both evaluations kept of the same cells, to the same places; ``None`` without any.

    Places are the neighbours of the first, the second's neighbours that the first lacks, and the dummy; a neighbour
    that a model does not see has attention 0.
    """
    there = {second.sketch_names[place]: row for row, place in enumerate(second.attended)}
    rows = [
        (row, there[name]) for row, place in enumerate(first.attended) if (name := first.sketch_names[place]) in there
    ]
    if not rows:
        return None
    one, other = np.array(rows, dtype=np.int64).T
    ours, theirs = first.attended_neighbours[one], second.attended_neighbours[other]
    same = theirs[:, :, None] == ours[:, None, :]
    place = np.where(same.any(axis=2), same.argmax(axis=2), ours.shape[1] + np.arange(theirs.shape[1]))
    n_places = ours.shape[1] + theirs.shape[1] + 1
    padded = []
    for attention, to in (
        (first.attention[one], np.broadcast_to(np.arange(ours.shape[1]), ours.shape)),
        (second.attention[other], place),
    ):
        wide = np.zeros((*attention.shape[:2], n_places))
        np.put_along_axis(wide, to[:, None, :].repeat(attention.shape[1], axis=1), attention[:, :, :-1], axis=2)
        wide[:, :, -1] = attention[:, :, -1]
        padded.append(wide)
    return padded[0], padded[1]


def _readout(moments: Moments, cell_type: int) -> Readout:
    """Return how attention outputs become expression in a type."""
    gram = np.empty((1 + len(moments.head_gram),) * 2)
    gram[0] = gram[:, 0] = moments.query_gram[cell_type]
    gram[1:, 1:] = moments.head_gram
    return Readout(
        weights=np.hstack([moments.query_weights[cell_type][:, None], moments.head_weights]).astype(np.float64),
        gram=gram,
        offset=moments.readout_offset[cell_type],
        epsilon=float(moments.readout_epsilon[0]),
        n_heads=moments.n_heads,
        head_size=len(moments.head_gram) // moments.n_heads,
    )
