"""Attention of receivers with some of the senders around them left out, and attention summed by type of sender."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from amici_eval.model.engines.attention import GATHERED_ENTRIES, attend, softmax_weights

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float32, Float64, Int32, Int64

    from amici_eval.model.engines.encoder import SenderTables

__all__ = ["SenderSums", "outputs_without_nearest", "outputs_without_senders", "sums_by_sender"]

_TIE = np.float32(1e-5)
"""Distances that differ by a smaller share are equal: they are rounded to float32."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class SenderSums:
    """Attention of some receivers, summed by type of receiver, type of sender and head.

    Parameters
    ----------
    attention
        Attention weights summed over receivers and their neighbours, shape (types, types, heads): receiver, sender.
    coefficient
        The same of weight times the coefficient of the distance (in 1 / coordinate units): how fast the attention to a
        sender falls where the sender lies farther away.
    n_receivers
        Receivers with at least one such neighbour, shape (types, types).
    """

    attention: Float64[np.ndarray, "types types heads"]
    coefficient: Float64[np.ndarray, "types types heads"]
    n_receivers: Int64[np.ndarray, "types types"]

    @classmethod
    def zeros(cls, n_types: int, n_heads: int) -> SenderSums:
        """Return the sums over no receivers."""
        return cls(
            attention=np.zeros((n_types, n_types, n_heads)),
            coefficient=np.zeros((n_types, n_types, n_heads)),
            n_receivers=np.zeros((n_types, n_types), dtype=np.int64),
        )

    def plus(self, other: SenderSums) -> SenderSums:
        """Return the sums over the receivers of both."""
        return SenderSums(
            attention=self.attention + other.attention,
            coefficient=self.coefficient + other.coefficient,
            n_receivers=self.n_receivers + other.n_receivers,
        )


def outputs_without_nearest(
    tables: SenderTables,
    slots: Int32[np.ndarray, "receivers neighbours"],
    distances: Float32[np.ndarray, "receivers neighbours"],
    types: Int64[np.ndarray, " receivers"],
    *,
    dummy_score: float,
) -> Float32[np.ndarray, "receivers outputs"]:
    """Return what attention brings to each receiver where its nearest neighbour, the first of several, is left out."""
    if slots.shape[1] < 2:
        # with one neighbour all attention goes to the dummy, whose value is 0
        return np.zeros((len(slots), tables.values.shape[1]), dtype=np.float32)
    kept = np.ones(distances.shape, dtype=bool)
    # with radii, distances between outlines need not rise from column to column
    kept[np.arange(len(kept)), distances.argmin(axis=1)] = False
    far = slots[kept].reshape(len(slots), -1), distances[kept].reshape(len(slots), -1)
    outputs = attend(tables, *far, types, dummy_score=dummy_score)
    least, second = np.partition(distances, 1, axis=1)[:, :2].T
    outputs[second - least <= _TIE * second] = np.nan
    return outputs


def outputs_without_senders(
    tables: SenderTables,
    slots: Int32[np.ndarray, "receivers neighbours"],
    distances: Float32[np.ndarray, "receivers neighbours"],
    types: Int64[np.ndarray, " receivers"],
    sender_types: Int64[np.ndarray, "receivers neighbours"],
    *,
    whole: Float32[np.ndarray, "receivers outputs"],
    senders: Sequence[int],
    dummy_score: float,
) -> Float32[np.ndarray, "senders receivers outputs"]:
    """Return what attention brings to each receiver where all neighbours of one type are left out, type by type."""
    nobody = len(tables.values) - 1
    outputs = np.empty((len(senders), *whole.shape), dtype=np.float32)
    for position, sender in enumerate(senders):
        masked = sender_types == sender
        rows = np.flatnonzero(masked.any(axis=1))
        outputs[position] = whole
        if len(rows):
            others = np.where(masked[rows], np.int32(nobody), slots[rows])
            outputs[position, rows] = attend(tables, others, distances[rows], types[rows], dummy_score=dummy_score)
    return outputs


def sums_by_sender(
    tables: SenderTables,
    slots: Int32[np.ndarray, "receivers neighbours"],
    distances: Float32[np.ndarray, "receivers neighbours"],
    types: Int64[np.ndarray, " receivers"],
    sender_types: Int64[np.ndarray, "receivers neighbours"],
    *,
    n_types: int,
    dummy_score: float,
) -> SenderSums:
    """Return attention, and how fast it falls with distance, summed by type of receiver and of sender."""
    device, n_heads, n_neighbours = tables.values.device, tables.pairs.shape[3], slots.shape[1]
    sums = SenderSums.zeros(n_types, n_heads)
    step = max(1, GATHERED_ENTRIES // (2 * n_neighbours * n_heads))
    for start in range(0, len(slots), step):
        rows = slice(start, start + step)
        index = torch.from_numpy(slots[rows].astype(np.int64)).to(device)
        codes = torch.from_numpy(types[rows]).to(device)
        distance = torch.from_numpy(np.ascontiguousarray(distances[rows])).to(device)
        weights = softmax_weights(tables, index, distance, codes, dummy_score)
        falling = weights * tables.pairs[index, codes[:, None]][:, :, 1]
        pair = (types[rows, None] * n_types + sender_types[rows]).ravel()
        for head in range(n_heads):
            for total, values in ((sums.attention, weights), (sums.coefficient, falling)):
                own = values[:, :, head].cpu().numpy().ravel()
                total[:, :, head] += np.bincount(pair, weights=own, minlength=n_types**2).reshape(n_types, n_types)
        for sender in range(n_types):
            near = types[rows][(sender_types[rows] == sender).any(axis=1)]
            sums.n_receivers[:, sender] += np.bincount(near, minlength=n_types)
    return sums
