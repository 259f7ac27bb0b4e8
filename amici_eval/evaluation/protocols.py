"""Protocols for what evaluation needs of a model on a tissue, and its progress meters."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from amici_eval.model.engines.hooked import ModelAccess

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence
    from typing import Any

    import numpy as np
    from jaxtyping import Float32, Float64, Int, Int64

    from amici_eval.data.tissue import ExpressionBlock
    from amici_eval.model.engines.factored import HeadOutputs
    from amici_eval.stats.readout import Readout

__all__ = ["FactorAccess", "LocatedAccess", "Meter", "ModelAccess", "Progress", "SendableAccess", "TissueAccess"]

Progress = Callable[[int, int, str], None]
"""Called with (work done, total work, description); the unit of work is one cell's forward pass."""


class Meter:
    """Adds up finished work and reports it to ``progress``, if any."""

    def __init__(self, progress: Progress | None, *, total: float) -> None:
        self._progress, self._total, self._done = progress, max(1, round(total)), 0.0

    def add(self, work: float, what: str) -> None:
        """Count finished work."""
        self._done += work
        if self._progress is not None:
            self._progress(min(self._total, round(self._done)), self._total, what)

    def cells(self, what: str, n_cells: int) -> Callable[[int], None]:
        """Return a callback that counts finished cells."""
        finished = 0

        def advance(more: int) -> None:
            nonlocal finished
            finished += more
            self.add(more, f"{what}: {finished:,} of {n_cells:,} cells")

        return advance

    def permutations(self, cell_type: str, *, work: float, pieces: int) -> PermutationMeter:
        """Return what counts finished (head, permutation) pairs, which together are ``work``."""
        return PermutationMeter(self, cell_type, work=work, pieces=pieces)


class PermutationMeter:
    """Counts the (head, permutation) pairs of one type; see :meth:`Meter.permutations`."""

    def __init__(self, meter: Meter, cell_type: str, *, work: float, pieces: int) -> None:
        self._meter, self._cell_type, self._work, self._pieces = meter, cell_type, work, pieces
        self._finished = 0

    def __call__(self, more: int) -> None:
        """Count finished pairs."""
        before = self._finished
        self._finished = min(self._pieces, before + more)
        share = 100 * self._finished // self._pieces
        work = self._work * (self._finished - before) / self._pieces
        self._meter.add(work, f"{self._cell_type}: {share} % of permutations")

    def finish(self) -> None:
        """Count the remaining pairs: a test may end early or draw no permutations."""
        self._meter.add(self._work * (self._pieces - self._finished) / self._pieces, self._cell_type)
        self._finished = self._pieces


@runtime_checkable
class LocatedAccess(ModelAccess, Protocol):
    """A model on a tissue with known positions of the cells."""

    def coordinates(self, rows: Int64[np.ndarray, " cells"]) -> Float64[np.ndarray, "cells dimensions"]:
        """Return the coordinates of some cells."""
        ...

    def samples(self, rows: Int64[np.ndarray, " cells"]) -> np.ndarray | None:
        """Return the section of some cells, if a sample column was named."""
        ...


@runtime_checkable
class TissueAccess(LocatedAccess, Protocol):
    """A model on a tissue with known neighbours of the cells."""

    @property
    def neighbour_rows(self) -> Int[np.ndarray, "all_cells neighbours"]:
        """Rows of the cells that each cell of the tissue attends to."""
        ...

    @property
    def label_codes(self) -> Int64[np.ndarray, " all_cells"]:
        """Place of each cell's type in ``card.cell_types``."""
        ...

    def expression_blocks(self, rows: Int64[np.ndarray, " cells"]) -> Iterator[ExpressionBlock]:
        """Yield the measured expression of some cells, block by block, in the order of storage."""
        ...


@runtime_checkable
class FactorAccess(TissueAccess, Protocol):
    """A model on a tissue that also gives the attention outputs of each receiver."""

    hooked: ModelAccess

    def head_outputs(
        self, rows: Int64[np.ndarray, " cells"], *, progress: Callable[[int], None] | None = None
    ) -> Float32[np.ndarray, "cells outputs"]:
        """Return the attention outputs of some receivers, shape (cells, heads * head_size)."""
        ...

    def attend(
        self,
        rows: Int64[np.ndarray, " cells"],
        *,
        without_nearest: bool = False,
        without_senders: Sequence[int] = (),
        attention_of: Int64[np.ndarray, " attended"] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> HeadOutputs:
        """Return the attention outputs of some receivers, and further outputs as asked for."""
        ...

    def sender_batches(self, n_receivers: int) -> list[tuple[int, ...]]:
        """Return the codes of the cell types in the tissue, in batches whose masked outputs fit in memory."""
        ...

    def predict_literally(
        self, rows: Int64[np.ndarray, " cells"], *, keeps: Sequence[Collection[int] | None]
    ) -> Float32[np.ndarray, "keeps cells genes"]:
        """Return the same as ``predict``, through the model's own forward pass with hooks; for checks."""
        ...

    def readout(self, cell_type: str) -> Readout:
        """Return how attention outputs become predicted expression in receivers of a type."""
        ...


@runtime_checkable
class SendableAccess(Protocol):
    """A model on a tissue that can be sent to another process."""

    def to_send(self) -> Any:
        """Return a picklable access that suffices to evaluate a type, without names of training cells."""
        ...
