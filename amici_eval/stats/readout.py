"""The last steps of an AMICI model for one receiver cell type: from attention outputs to predicted expression."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Collection

    from jaxtyping import Float, Float64, Int64


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Readout:
    """How the heads' attention outputs become predicted expression, for receivers of one cell type.

    With ``x = [1, z_0, ..., z_{H-1}]`` of a receiver (``z_h``: ``head_size`` outputs of head h) and heads outside a set
    S set to 0, the prediction is ``offset + weights @ x_S / sqrt(x_S @ gram @ x_S + epsilon)``, exactly: output
    projection, query residual (column 0), layer norm and linear layer in one. gram gives the variance over the
    embedding by which the layer norm divides; offset: mean profile of the type plus the layer norm's bias through the
    linear layer; epsilon: of the layer norm.
    """

    weights: Float64[np.ndarray, "genes columns"]
    gram: Float64[np.ndarray, "columns columns"]
    offset: Float64[np.ndarray, " genes"]
    epsilon: float
    n_heads: int
    head_size: int

    @property
    def n_columns(self) -> int:
        """Return the length of ``x``: 1 + heads x head_size."""
        return 1 + self.n_heads * self.head_size

    def columns(self, heads: Collection[int]) -> Int64[np.ndarray, " kept"]:
        """Return the entries of ``x`` that are not zeroed if only some heads are kept: 0 and those of the heads."""
        own = [np.arange(1 + h * self.head_size, 1 + (h + 1) * self.head_size) for h in sorted(set(heads))]
        columns: Int64[np.ndarray, " kept"] = np.concatenate([np.zeros(1, dtype=np.int64), *own])
        return columns

    def scale(
        self, z: Float[np.ndarray, "cells outputs"], heads: Collection[int] | None = None
    ) -> Float64[np.ndarray, " cells"]:
        """Return the divisor of the layer norm per cell, with some heads kept (``None``: all)."""
        columns = self.columns(range(self.n_heads) if heads is None else heads)
        x = _with_one(z)[:, columns]
        variance: Float64[np.ndarray, " cells"] = np.einsum("ij,ij->i", x @ self.gram[np.ix_(columns, columns)], x)
        scale: Float64[np.ndarray, " cells"] = np.sqrt(np.maximum(variance, 0.0) + self.epsilon)
        return scale

    def predict(
        self, z: Float[np.ndarray, "cells outputs"], heads: Collection[int] | None = None
    ) -> Float64[np.ndarray, "cells genes"]:
        """Return predicted expression with some heads kept (``None``: all, ``()``: none)."""
        columns = self.columns(range(self.n_heads) if heads is None else heads)
        x = _with_one(z)[:, columns] / self.scale(z, heads)[:, None]
        predicted: Float64[np.ndarray, "cells genes"] = self.offset + x @ self.weights[:, columns].T
        return predicted


def _with_one(z: Float[np.ndarray, "cells outputs"]) -> Float64[np.ndarray, "cells columns"]:
    x = np.empty((z.shape[0], z.shape[1] + 1))
    x[:, 0] = 1.0
    x[:, 1:] = z
    return x
