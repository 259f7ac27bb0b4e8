"""What an evaluation keeps of its pass over the cells: moments of all types by tile, and a sketch of the heads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from amici_eval.moments import Moments
from amici_eval.tiling import part_of, tile_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from jaxtyping import Float32, Int64

    from amici_eval.protocols import FactorAccess
    from amici_eval.tiling import Tiling
    from amici_eval.type_evaluation import TypeEvaluation

__all__ = ["kept_moments"]

_SKETCHED_CELLS = 256


def kept_moments(
    access: FactorAccess,
    receivers: Mapping[str, Int64[np.ndarray, " cells"]],
    usable: Mapping[str, Int64[np.ndarray, " cells"]],
    evaluated: Sequence[TypeEvaluation | None],
    outputs: Float32[np.ndarray, "cells outputs"],
    tiling: Tiling,
) -> Moments:
    """Return what is kept of an evaluation for later questions.

    Parameters
    ----------
    access
        The model on the tissue.
    receivers, usable
        Evaluated rows by type, all and those with cells enough.
    evaluated
        By type, in the order of ``receivers``.
    outputs, tiling
        Of the cells of ``usable``, type after type.
    """
    types = tuple(receivers)
    parts = [
        (index, item.moments) for index, item in enumerate(evaluated) if item is not None and item.moments is not None
    ]
    sketch_type, sketch_rows, sketch_places = [], [], []
    start = 0
    for cell_type, rows in usable.items():
        chosen = np.linspace(0, len(rows) - 1, min(len(rows), _SKETCHED_CELLS)).astype(np.int64)
        sketch_type.append(np.full(len(chosen), types.index(cell_type), dtype=np.int64))
        sketch_rows.append(rows[chosen])
        sketch_places.append(start + chosen)
        start += len(rows)
    readouts = [access.readout(cell_type) for cell_type in types]

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(part, name) for _, part in parts])

    n_rows = sum(len(part.tiles) for _, part in parts)
    return Moments(
        cell_types=types,
        genes=access.card.genes,
        n_heads=access.card.n_heads,
        row_type=np.concatenate([np.full(len(part.tiles), index, dtype=np.int64) for index, part in parts]),
        row_tile=tile_of(joined("tiles")),
        row_held_out=part_of(joined("tiles")) if access.card.training_cells is not None else np.full(n_rows, -1),
        n_cells=joined("n_cells"),
        target_mean=joined("target_mean").astype(np.float32),
        target_m2=joined("target_m2").astype(np.float32),
        residual_mean=joined("residual_mean").astype(np.float32),
        residual_m2=joined("residual_m2").astype(np.float32),
        full_mean=joined("full_mean").astype(np.float32),
        full_m2=joined("full_m2").astype(np.float32),
        sketch_type=np.concatenate(sketch_type),
        sketch_names=tuple(access.cell_names(np.concatenate(sketch_rows))),
        sketch_outputs=outputs[np.concatenate(sketch_places)],
        tile_center=tiling.centers,
        query_weights=np.stack([readout.weights[:, 0] for readout in readouts]).astype(np.float32),
        head_weights=readouts[0].weights[:, 1:].astype(np.float32),
        query_gram=np.stack([readout.gram[0] for readout in readouts]),
        head_gram=readouts[0].gram[1:, 1:],
        readout_offset=np.stack([readout.offset for readout in readouts]),
        readout_epsilon=np.array([readouts[0].epsilon]),
    )
