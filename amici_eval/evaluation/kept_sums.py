"""What an evaluation keeps of its pass over the cells: moments of all types by tile, and a sketch of the heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from zlib import crc32

import numpy as np

from amici_eval.evaluation.tiling import part_of, tile_of
from amici_eval.results.tile_sums import Moments

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from jaxtyping import Int64

    from amici_eval.evaluation.one_type import TypeEvaluation
    from amici_eval.evaluation.protocols import FactorAccess
    from amici_eval.evaluation.tiling import Tiling
    from amici_eval.model.engines.factored import HeadOutputs
    from amici_eval.results.senders import Senders

__all__ = ["Sketch", "kept_moments"]

_SKETCHED_CELLS = 256
_EVERY_ATTENDED = 4
"""Attention takes much room, so it is kept of every fourth sketched cell."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Sketch:
    """Which cells are sketched: the same ones in every evaluation of the same cells.

    Parameters
    ----------
    types
        Of each, by name.
    places
        Among all evaluated cells, type after type, shape (sketched cells,).
    attended
        Those whose attention is kept, as places in the sketch.
    """

    types: tuple[str, ...]
    places: Int64[np.ndarray, " sketched"]
    attended: Int64[np.ndarray, " attended"]

    @classmethod
    def of(cls, usable: Mapping[str, Int64[np.ndarray, " cells"]]) -> Sketch:
        """Choose cells of each type, evenly through the canonical order."""
        start, types, places = 0, [], [np.zeros(0, dtype=np.int64)]
        for cell_type, rows in usable.items():
            chosen = np.linspace(0, len(rows) - 1, min(len(rows), _SKETCHED_CELLS)).astype(np.int64)
            types += [cell_type] * len(chosen)
            places.append(start + chosen)
            start += len(rows)
        return cls(
            types=tuple(types), places=np.concatenate(places), attended=np.arange(0, len(types), _EVERY_ATTENDED)
        )


def kept_moments(
    access: FactorAccess,
    receivers: Mapping[str, Int64[np.ndarray, " cells"]],
    everyone: Int64[np.ndarray, " all_evaluated"],
    evaluated: Sequence[TypeEvaluation | None],
    outputs: HeadOutputs,
    sketch: Sketch,
    tiling: Tiling,
    senders: Senders | None = None,
) -> Moments:
    """Return what is kept of an evaluation for later questions."""
    types = tuple(receivers)
    parts = [
        (index, item.moments) for index, item in enumerate(evaluated) if item is not None and item.moments is not None
    ]
    rows = everyone[sketch.places]
    neighbours = access.neighbour_rows[rows[sketch.attended]]
    names = access.cell_names(neighbours.ravel().astype(np.int64))
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
        row_held_out=part_of(joined("tiles")) if access.fitted is not None else np.full(n_rows, -1),
        n_cells=joined("n_cells"),
        target_mean=joined("target_mean").astype(np.float32),
        target_m2=joined("target_m2").astype(np.float32),
        residual_mean=joined("residual_mean").astype(np.float32),
        residual_m2=joined("residual_m2").astype(np.float32),
        full_mean=joined("full_mean").astype(np.float32),
        full_m2=joined("full_m2").astype(np.float32),
        sketch_type=np.array([types.index(name) for name in sketch.types], dtype=np.int64),
        sketch_names=tuple(access.cell_names(rows)),
        sketch_outputs=outputs.whole[sketch.places],
        sketch_tile=tile_of(tiling.keys[sketch.places]),
        attended=sketch.attended,
        attention=outputs.attention
        if outputs.attention is not None
        else np.zeros((len(sketch.attended), access.card.n_heads, neighbours.shape[1] + 1), dtype=np.float32),
        attended_neighbours=np.fromiter(
            (crc32(name.encode()) for name in names), dtype=np.int64, count=len(names)
        ).reshape(neighbours.shape),
        tile_center=tiling.centers,
        senders=() if senders is None else senders.senders,
        lost_squares=np.zeros((access.card.n_heads, len(types), 0, len(tiling.centers)), dtype=np.float32)
        if senders is None or senders.lost_squares is None
        else senders.lost_squares.astype(np.float32),
        query_weights=np.stack([readout.weights[:, 0] for readout in readouts]).astype(np.float32),
        head_weights=readouts[0].weights[:, 1:].astype(np.float32),
        query_gram=np.stack([readout.gram[0] for readout in readouts]),
        head_gram=readouts[0].gram[1:, 1:],
        readout_offset=np.stack([readout.offset for readout in readouts]),
        readout_epsilon=np.array([readouts[0].epsilon]),
    )
