"""The fast engine: embeds senders once, attends over tables, and derives all heads from one pass."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from amici_eval.common.memory import available_memory, free_bytes, memory_errors_explained, unless_memory_ends
from amici_eval.common.threads import run_on_single_threads
from amici_eval.data.matrices import sent
from amici_eval.model.engines.attention import (
    Receivers,
    SenderSums,
    SentFactors,
    attend,
    attention_weights,
    outputs_without_nearest,
    outputs_without_senders,
    sums_by_sender,
)
from amici_eval.model.engines.encoder import SenderTables, embed_senders
from amici_eval.model.engines.folding import fold_encoder
from amici_eval.model.engines.hooked import EngineAccess
from amici_eval.stats.spatial.tiles import morton_codes

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from jaxtyping import Bool, Float32, Int32, Int64

    from amici_eval.data.tissue import ExpressionBlock
    from amici_eval.model.engines.hooked import HookedAccess
    from amici_eval.stats.readout import Readout

logger = logging.getLogger(__name__)

_SHARE = 0.25
_LEAST = 64 * 2**20


def memory_budget(asked: int | None, device: str) -> int:
    """Return the bytes for tables and chunks: what was asked for, or a quarter of the free memory.

    Free memory is measured at each call, as other processes may have taken some. The result never exceeds it, apart
    from a minimum of 64 MiB.
    """
    free = _free(device)
    if asked is not None:
        return min(asked, max(_LEAST, free))
    return max(_LEAST, int(_SHARE * free))


def warn_of_budget(asked: int | None, device: str) -> None:
    """Warn if more memory was asked for than is free."""
    free = _free(device)
    if asked is not None and asked > free:
        logger.warning(
            "ablation.memory_budget asks for %.3g GB, but %.3g GB are free on %s: that bounds tables and chunks",
            asked / 1e9,
            free / 1e9,
            device,
        )


def _free(device: str) -> int:
    # Apple's GPUs share the machine's memory
    found = free_bytes(device) if torch.device(device).type == "cuda" else None
    return available_memory() if found is None else found


_SENDER_CHUNK = {"cpu": 2048, "cuda": 16384}
_LEAST_CHUNK = 64
_READ_ROWS = 8192
_LEAST_READ_ROWS = 64
_SHARE_OF_CHUNKS = 8
"""Chunks take an eighth of the memory budget, tables the rest."""
_LARGEST_TILE = 131_072
_LEAST_TILE = 256
_CELLS_AROUND = 1.5
"""Assumed senders per receiver of a tile, inside it and in a rim around it."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class HeadOutputs:
    """Attention outputs of some receivers (``whole``: z), and further outputs of the same pass over the senders.

    ``without_nearest``: attention to the nearest neighbour masked, so that the others and the dummy share it; NaN for
    receivers with several neighbours at the least distance. ``attention``: to each neighbour and, last, the dummy.
    ``without_senders``: the same with all neighbours of one type masked, by sender type. None: not asked for.
    """

    whole: Float32[np.ndarray, "cells outputs"]
    without_nearest: Float32[np.ndarray, "cells outputs"] | None = None
    attention: Float32[np.ndarray, "attended heads places"] | None = None
    without_senders: Float32[np.ndarray, "senders cells outputs"] | None = None
    by_sender: SenderSums | None = None


class FactoredAccess(EngineAccess):
    """A model on a tissue with the attention outputs of each receiver.

    ``memory_bytes`` bounds tables and chunks; None: a quarter of the device's free memory when attention begins.
    """

    engine = "factored"

    def __init__(self, hooked: HookedAccess, *, memory_bytes: int | None = None) -> None:
        super().__init__(hooked.card, hooked.tissue, device=hooked.device, notes=hooked.notes)
        self.hooked = hooked
        self._weights = fold_encoder(hooked.module, device=self.device)
        # cells close on the curve are close in the tissue, so that tiles have small rims and tables stay in cache
        self._curve = morton_codes(self.tissue.coordinates[:, :2])
        self._asked_memory = memory_bytes
        self._memory, self._chunk, self._tile = sys.maxsize, sys.maxsize, sys.maxsize
        self._n_threads = torch.get_num_threads() if torch.device(self.device).type == "cpu" else 1
        warn_of_budget(memory_bytes, self.device)
        self._plan()

    @property
    def neighbour_rows(self) -> Int32[np.ndarray, "all_cells neighbours"]:
        """Rows of the cells that each cell of the tissue attends to."""
        return self.hooked.neighbour_rows

    def expression_blocks(self, rows: Int64[np.ndarray, " cells"]) -> Iterator[ExpressionBlock]:
        """Yield the measured expression of some cells, block by block, in the order of storage."""
        return self.tissue.expression_blocks(rows, max_rows=self._read_rows)

    def readout(self, cell_type: str) -> Readout:
        """Return the map from attention outputs to predicted expression in receivers of a type."""
        return self._weights.readout(self.card.cell_types.index(cell_type))

    def predict(
        self,
        rows: Int64[np.ndarray, " cells"],
        *,
        keeps: Sequence[Collection[int] | None],
        progress: Callable[[int], None] | None = None,
    ) -> Float32[np.ndarray, "keeps cells genes"]:
        """Return predicted expression under each ablation; ``None`` keeps all heads, ``()`` keeps none."""
        z = self.head_outputs(rows)
        predictions = np.empty((len(keeps), len(rows), len(self.card.genes)), dtype=np.float32)
        codes = self.tissue.label_codes[rows]
        for position, heads in enumerate(keeps):
            for code in np.unique(codes):
                of_type = codes == code
                predictions[position, of_type] = self._weights.readout(int(code)).predict(z[of_type], heads)
            if progress is not None:
                progress(len(rows))
        return predictions

    def predict_literally(
        self, rows: Int64[np.ndarray, " cells"], *, keeps: Sequence[Collection[int] | None]
    ) -> Float32[np.ndarray, "keeps cells genes"]:
        """Return the same as :meth:`predict`, through the model's own forward pass with hooks; for checks."""
        return self.hooked.predict_side_by_side(rows, keeps=keeps)

    def head_outputs(
        self,
        rows: Int64[np.ndarray, " cells"],
        *,
        progress: Callable[[int], None] | None = None,
    ) -> Float32[np.ndarray, "cells outputs"]:
        """Return z, the attention outputs of some receivers, shape (cells, heads * head_size)."""
        return self.attend(rows, progress=progress).whole

    def attend(
        self,
        rows: Int64[np.ndarray, " cells"],
        *,
        without_nearest: bool = False,
        without_senders: Sequence[int] = (),
        attention_of: Int64[np.ndarray, " attended"] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> HeadOutputs:
        """Return the attention outputs of some receivers, and others as asked for, in one pass over the senders."""
        # free memory may have changed
        self._plan()
        width, n_places = self._weights.n_outputs, self.neighbour_rows.shape[1] + 1

        def empty(*shape: int) -> np.ndarray:
            return np.empty(shape, dtype=np.float32)

        outputs = HeadOutputs(
            whole=empty(len(rows), width),
            without_nearest=empty(len(rows), width) if without_nearest else None,
            attention=None if attention_of is None else empty(len(attention_of), self._weights.n_heads, n_places),
            without_senders=empty(len(without_senders), len(rows), width) if len(without_senders) else None,
            by_sender=SenderSums.zeros(self._weights.n_types, self._weights.n_heads) if len(without_senders) else None,
        )
        slot = np.full(len(rows), -1, dtype=np.int64)
        if attention_of is not None:
            slot[attention_of] = np.arange(len(attention_of))
        order = np.argsort(self._curve[rows], kind="stable")
        start = 0
        while start < len(order):
            part = order[start : start + self._tile]
            # scattered receivers have more senders than a tile of the tissue
            while len(part) > 1 and np.count_nonzero(self._are_senders(rows[part])) > self._most_senders:
                part = part[: len(part) // 2]
            asked = _TileRequest(
                attended=np.flatnonzero(slot[part] >= 0), nearest=without_nearest, senders=without_senders
            )
            found = self._attempt(rows[part], asked)
            if found is None:
                self._halve()
                continue
            for whole, tile, place in (
                (outputs.whole, found.whole, part),
                (outputs.without_nearest, found.without_nearest, part),
                (outputs.attention, found.attention, slot[part][asked.attended]),
                (outputs.without_senders, found.without_senders, (slice(None), part)),
            ):
                if whole is not None:
                    whole[place] = tile
            if outputs.by_sender is not None and found.by_sender is not None:
                outputs = replace(outputs, by_sender=outputs.by_sender.plus(found.by_sender))
            start += len(part)
            if progress is not None:
                progress(len(part))
        return outputs

    def sender_batches(self, n_receivers: int) -> list[tuple[int, ...]]:
        """Return the codes of the cell types in the tissue, in batches whose masked outputs fit in memory.

        Masked outputs of a sender type are as large as those of the whole model, and all of a receiver type are needed
        at once, as moments are taken in the order of storage and not of tiles. Senders are embedded again for each
        batch.
        """
        codes = np.unique(self.tissue.label_codes).tolist()
        room = memory_budget(self._asked_memory, "cpu")
        if torch.device(self.device).type == "cpu":
            room = min(room, self._memory)
        step = max(1, room // max(1, 4 * n_receivers * self._weights.n_outputs))
        return [tuple(codes[start : start + step]) for start in range(0, len(codes), step)]

    def to_send(self) -> SentFactors:
        """Return what the evaluation of a type needs after attention: readouts and expression."""
        return SentFactors(
            card=replace(self.card, training_cells=None, fingerprints=None),
            readouts={cell_type: self.readout(cell_type) for cell_type in self.card.cell_types},
            matrix=sent(self.tissue.matrix),
            gene_columns=self.tissue.gene_columns,
            read_rows=self._read_rows,
            statistics_device=self.statistics_device,
        )

    def _plan(self) -> None:
        """Choose sizes by the memory that is free now, never larger than before."""
        self._memory = memory = min(self._memory, memory_budget(self._asked_memory, self.device))
        for_chunks = memory // _SHARE_OF_CHUNKS
        largest = _SENDER_CHUNK.get(torch.device(self.device).type, 1024)
        chunk = int(np.clip(for_chunks // self._weights.bytes_per_embedding, _LEAST_CHUNK, largest))
        # bytes: float32 as read, float64 for moments, and the factors of all heads
        per_row = 12 * self._weights.n_genes + 24 * (self._weights.n_outputs + self._weights.n_heads)
        self._read_rows = int(np.clip(for_chunks // per_row, _LEAST_READ_ROWS, _READ_ROWS))
        self._most_senders = max(_LEAST_TILE, (memory - for_chunks) // self._weights.bytes_per_sender)
        tile = int(np.clip(self._most_senders / _CELLS_AROUND, _LEAST_TILE, _LARGEST_TILE))
        self._chunk, self._tile = min(chunk, self._chunk), min(tile, self._tile)

    def _are_senders(self, rows: Int64[np.ndarray, " cells"]) -> Bool[np.ndarray, " all_cells"]:
        """Return which cells of the tissue are neighbours of some receivers."""
        found = np.zeros(self.tissue.n_cells, dtype=bool)
        found[self.hooked.neighbour_rows[rows]] = True
        return found

    def _attempt(self, rows: Int64[np.ndarray, " cells"], asked: _TileRequest) -> HeadOutputs | None:
        """Return the outputs of a tile, or ``None`` if the device runs out of memory."""
        work = partial(self._tile_outputs, rows, asked)
        if self._chunk > _LEAST_CHUNK or self._tile > _LEAST_TILE:
            return unless_memory_ends(work, device=self.device)
        with memory_errors_explained(f"attention of {len(rows)} receivers at a time", self.device):
            return work()

    def _halve(self) -> None:
        self._chunk, self._tile = max(_LEAST_CHUNK, self._chunk // 2), max(_LEAST_TILE, self._tile // 2)
        logger.warning("out of memory on %s: going on with %d receivers at a time", self.device, self._tile)

    def _tile_outputs(self, rows: Int64[np.ndarray, " cells"], asked: _TileRequest) -> HeadOutputs:
        """Return the outputs of some receivers after embedding their senders."""
        weights, tissue = self._weights, self.tissue
        around = self.hooked.neighbour_rows[rows]
        senders = np.flatnonzero(self._are_senders(rows))
        senders = senders[np.argsort(self._curve[senders], kind="stable")]
        slot_of = np.empty(tissue.n_cells, dtype=np.int32)
        slot_of[senders] = np.arange(len(senders), dtype=np.int32)
        slots = slot_of[around]
        codes = tissue.label_codes[rows]
        needed = np.zeros((len(senders), weights.n_types), dtype=bool)
        needed[slots, codes[:, None]] = True
        with_senders = len(asked.senders) > 0
        # one more row, for masked neighbours
        tables = SenderTables.empty(weights, len(senders) + with_senders, device=self.device)
        if with_senders:
            tables.mask(len(senders))

        def embed(places: Int64[np.ndarray, " senders"], values: Float32[np.ndarray, "senders genes"]) -> None:
            embed_senders(
                weights,
                torch.from_numpy(values).to(self.device),
                torch.from_numpy(needed[places]).to(self.device),
                torch.from_numpy(places.astype(np.int64)).to(self.device),
                tables,
            )

        def chunks() -> Iterator[Callable[[], None]]:
            for block in tissue.expression_blocks(senders, max_rows=self._read_rows):
                # a number of parts that is a multiple of the threads
                n_parts = -(-len(block.positions) // (self._chunk * self._n_threads)) * self._n_threads
                step = max(1, -(-len(block.positions) // n_parts))
                for first in range(0, len(block.positions), step):
                    part = slice(first, first + step)
                    yield partial(embed, block.positions[part], block.values[part])

        run_on_single_threads(chunks(), n_threads=self._n_threads)
        receivers = Receivers(slots, self.hooked.distances[rows], codes)
        z = attend(tables, receivers)
        without_senders = by_sender = None
        if with_senders:
            types = tissue.label_codes[around]
            without_senders = outputs_without_senders(tables, receivers, types, z=z, senders=asked.senders)
            by_sender = sums_by_sender(tables, receivers, types, n_types=weights.n_types)
        return HeadOutputs(
            whole=z,
            without_nearest=outputs_without_nearest(tables, receivers) if asked.nearest else None,
            attention=attention_weights(tables, receivers[asked.attended]),
            without_senders=without_senders,
            by_sender=by_sender,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class _TileRequest:
    """Further outputs asked of a tile: attention of some cells, outputs with masked neighbours."""

    attended: Int64[np.ndarray, " attended"]
    nearest: bool
    senders: Sequence[int]
