"""What evaluating a type by factors asks of a model on a tissue, small enough to be sent to another process."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from amici_eval.data.matrices import expression_blocks, open_rows

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import numpy as np
    from jaxtyping import Int64

    from amici_eval.common.model_card import ModelCard
    from amici_eval.data.matrices import ExpressionBlock, RowReader
    from amici_eval.stats.readout import Readout

__all__ = ["SentFactors"]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class SentFactors:
    """Readouts and expression, without the model itself: whoever gets it need not import AMICI.

    Parameters
    ----------
    card
        What the evaluation needs to know of the model.
    readouts
        By cell type.
    matrix, gene_columns
        Expression, and its columns in the model's gene order.
    read_rows
        Most rows of a block of expression.
    statistics_device
        Torch device that has float64.
    """

    card: ModelCard
    readouts: Mapping[str, Readout]
    matrix: Any
    gene_columns: Int64[np.ndarray, " genes"] | None
    read_rows: int
    statistics_device: str

    def readout(self, cell_type: str) -> Readout:
        """Return how attention outputs become predicted expression in receivers of a type."""
        own = self.readouts[cell_type]
        # arrays that processes share cannot be written to, and torch warns of such
        return replace(own, weights=own.weights.copy(), gram=own.gram.copy(), offset=own.offset.copy())

    def expression_blocks(self, rows: Int64[np.ndarray, " cells"]) -> Iterator[ExpressionBlock]:
        """Yield the measured expression of some cells, block by block, in the order of storage."""
        return expression_blocks(self._reader, rows, self.gene_columns, max_rows=self.read_rows)

    @cached_property
    def _reader(self) -> RowReader:
        return open_rows(self.matrix)
