"""Attention of receivers to their senders by tables, as a compiled kernel or in plain torch."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from amici_eval.common.threads import compiled
from amici_eval.data.matrices import expression_blocks, open_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from jaxtyping import Float32, Float64, Int32, Int64
    from torch import Tensor

    from amici_eval.common.model_card import ModelCard
    from amici_eval.data.matrices import ExpressionBlock, RowReader
    from amici_eval.model.engines.encoder import SenderTables
    from amici_eval.stats.readout import Readout

FAINT = 80.0
"""A neighbour with a score this far below the strongest has weight 0: exp(-80) is 2e-35. Without it far neighbours have
denormal weights, with which processors compute many times slower."""

# constants of the compiled kernel, in float32
FAINTEST, ZERO, HALF, ONE = np.float32(-FAINT), np.float32(0.0), np.float32(0.5), np.float32(1.0)
LOG2_E, LN_2_HIGH, LN_2_LOW = np.float32(1.4426950408889634), np.float32(0.693359375), np.float32(-2.12194440e-4)
EXP_5, EXP_4, EXP_3 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
EXP_2, EXP_1 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1)

_ROWS_PER_TASK = 4096
GATHERED_ENTRIES = 2**24
"""Number of values that plain torch gathers at a time."""


@dataclass(frozen=True, eq=False)
class Receivers:
    """Some receivers: slots of their neighbours in the sender tables, distances to these, codes of their own types."""

    slots: Int32[np.ndarray, "receivers neighbours"]
    distances: Float32[np.ndarray, "receivers neighbours"]
    types: Int64[np.ndarray, " receivers"]

    def __len__(self) -> int:
        return len(self.slots)

    def __getitem__(self, rows: slice | np.ndarray) -> Receivers:
        return Receivers(self.slots[rows], self.distances[rows], self.types[rows])

    def chunks(self, values_per_receiver: int) -> Iterator[slice]:
        """Yield ranges of receivers for which plain torch gathers a bounded number of values."""
        step = max(1, GATHERED_ENTRIES // values_per_receiver)
        for start in range(0, len(self), step):
            yield slice(start, start + step)


def attend(tables: SenderTables, receivers: Receivers) -> Float32[np.ndarray, "receivers outputs"]:
    """Return z, the attention outputs of each receiver, before the output projection.

    Softmax over neighbours and dummy of ``score - coefficient * distance``. Weights below ``exp(-80)`` of the strongest
    are 0.
    """
    kernel = compiled_attention() if tables.values.device.type == "cpu" else None
    if kernel is None:
        return attend_by_torch(tables, receivers)
    n_heads, dummy_score = tables.pairs.shape[3], np.float32(tables.dummy_score)
    z = np.empty((len(receivers), tables.values.shape[1]), dtype=np.float32)
    values, pairs = tables.values.numpy(), tables.pairs.numpy()

    def task(start: int) -> None:
        rows = slice(start, start + _ROWS_PER_TASK)
        part = receivers[rows]
        kernel(values, pairs, part.slots, part.distances, part.types, dummy_score, n_heads, z[rows])

    starts = range(0, len(receivers), _ROWS_PER_TASK)
    n_threads = min(torch.get_num_threads(), len(starts))
    if n_threads <= 1:
        for start in starts:
            task(start)
    else:
        with ThreadPoolExecutor(n_threads) as pool:
            list(pool.map(task, starts))
    return z


def attend_by_torch(tables: SenderTables, receivers: Receivers) -> Float32[np.ndarray, "receivers outputs"]:
    """Return the same as :func:`attend` on any device, without the compiled kernel."""
    n_neighbours, n_outputs, n_heads = receivers.slots.shape[1], tables.values.shape[1], tables.pairs.shape[3]
    z = np.empty((len(receivers), n_outputs), dtype=np.float32)
    for rows in receivers.chunks(n_neighbours * n_outputs):
        # only these two, so that the memory of the pairs is free
        weights, slots = _softmax(tables, receivers[rows])[:2]
        values = tables.values[slots].view(len(slots), n_neighbours, n_heads, -1)
        z[rows] = torch.einsum("rkh,rkhd->rhd", weights, values).reshape(len(slots), n_outputs).cpu().numpy()
    return z


def attention_weights(tables: SenderTables, receivers: Receivers) -> Float32[np.ndarray, "receivers heads places"]:
    """Return each head's attention to the neighbours and, last, to the dummy."""
    weights = _softmax(tables, receivers)[0]
    shared: Float32[np.ndarray, "receivers heads places"] = (
        torch.cat([weights, 1.0 - weights.sum(dim=1, keepdim=True)], dim=1).clamp(min=0.0).transpose(1, 2).cpu().numpy()
    )
    return shared


def _softmax(tables: SenderTables, receivers: Receivers) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weights of neighbours, their slots, and the coefficients of their distances.

    Weights and coefficients are of shape (receivers, neighbours, heads); the dummy has the rest of the weights to 1.
    """
    device = tables.values.device
    slots = torch.from_numpy(receivers.slots.astype(np.int64)).to(device)
    distances = torch.from_numpy(np.ascontiguousarray(receivers.distances)).to(device)
    pairs = tables.pairs[slots, torch.from_numpy(receivers.types).to(device)[:, None]]
    coefficients = pairs[:, :, 1]
    scores = pairs[:, :, 0] - coefficients * distances[:, :, None]
    strongest = scores.amax(dim=1).clamp(min=tables.dummy_score)[:, None]
    weights = torch.where(scores < strongest - FAINT, 0.0, torch.exp(scores - strongest))
    weights = weights / (weights.sum(dim=1, keepdim=True) + torch.exp(tables.dummy_score - strongest))
    return weights, slots, coefficients


@functools.cache
def compiled_attention() -> Callable[..., Any]:
    """Return the compiled kernel."""

    def kernel(
        values: np.ndarray,
        pairs: np.ndarray,
        slots: np.ndarray,
        distances: np.ndarray,
        types: np.ndarray,
        dummy_score: np.float32,
        n_heads: int,
        out: np.ndarray,
    ) -> None:
        n_neighbours = slots.shape[1]
        head_size = values.shape[1] // n_heads
        n_scores = n_neighbours * n_heads
        scores = np.empty(n_scores, dtype=np.float32)
        # powers of two are set through the exponent bits of floats
        exponents = np.empty(n_scores, dtype=np.int32)
        powers = exponents.view(np.float32)
        strongest = np.empty(n_heads, dtype=np.float32)
        total = np.empty(n_heads, dtype=np.float32)
        for i in range(slots.shape[0]):
            strongest[:] = dummy_score
            for k in range(n_neighbours):
                pair = pairs[slots[i, k], types[i]]
                distance = distances[i, k]
                for h in range(n_heads):
                    score = pair[0, h] - pair[1, h] * distance
                    scores[k * n_heads + h] = score
                    strongest[h] = max(strongest[h], score)
            for k in range(n_neighbours):
                for h in range(n_heads):
                    scores[k * n_heads + h] -= strongest[h]
            # exp as 2^n * polynomial (the coefficients of Cephes' expf), a loop without calls so that it is vectorised
            for j in range(n_scores):
                x = max(scores[j], FAINTEST)
                whole = np.floor(x * LOG2_E + HALF)
                x = x - whole * LN_2_HIGH - whole * LN_2_LOW
                p = EXP_5
                p = p * x + EXP_4
                p = p * x + EXP_3
                p = p * x + EXP_2
                p = p * x + EXP_1
                p = p * x + HALF
                exponents[j] = (np.int32(whole) + np.int32(127)) << np.int32(23)
                scores[j] = p * x * x + x + ONE if scores[j] > FAINTEST else ZERO
            for h in range(n_heads):
                total[h] = np.exp(dummy_score - strongest[h]) if dummy_score - strongest[h] > FAINTEST else ZERO
            for j in range(n_scores):
                scores[j] *= powers[j]
            for k in range(n_neighbours):
                for h in range(n_heads):
                    total[h] += scores[k * n_heads + h]
            row_out = out[i]
            row_out[:] = ZERO
            for k in range(n_neighbours):
                row = values[slots[i, k]]
                for h in range(n_heads):
                    weight = scores[k * n_heads + h]
                    if weight != ZERO:
                        first = h * head_size
                        for c in range(head_size):
                            row_out[first + c] += weight * row[first + c]
            for h in range(n_heads):
                inverse = ONE / total[h]
                for c in range(h * head_size, (h + 1) * head_size):
                    row_out[c] *= inverse

    return compiled(kernel, fastmath={"contract", "reassoc", "nsz"})


_TIE = np.float32(1e-5)
"""Relative difference up to which distances, rounded to float32, are ties."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class SenderSums:
    """Attention of some receivers, summed by type of receiver, type of sender and head.

    ``coefficient``: sum of weight times coefficient of the distance (1 / coordinate units), which is how fast attention
    falls with distance. ``n_receivers``: receivers with at least one such neighbour. The receiver's type is the first
    axis.
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


def outputs_without_nearest(tables: SenderTables, receivers: Receivers) -> Float32[np.ndarray, "receivers outputs"]:
    """Return z with each receiver's nearest neighbour masked; NaN for ties."""
    n_receivers, distances = len(receivers), receivers.distances
    if distances.shape[1] < 2:
        # with one neighbour all attention goes to the dummy, whose value is 0
        return np.zeros((n_receivers, tables.values.shape[1]), dtype=np.float32)
    kept = np.ones(distances.shape, dtype=bool)
    # not the first column: with cell radii, distances between outlines need not be sorted
    kept[np.arange(n_receivers), distances.argmin(axis=1)] = False
    slots, far = (part[kept].reshape(n_receivers, -1) for part in (receivers.slots, distances))
    z = attend(tables, Receivers(slots, far, receivers.types))
    least, second = np.partition(distances, 1, axis=1)[:, :2].T
    z[second - least <= _TIE * second] = np.nan
    return z


def outputs_without_senders(
    tables: SenderTables,
    receivers: Receivers,
    sender_types: Int64[np.ndarray, "receivers neighbours"],
    *,
    z: Float32[np.ndarray, "receivers outputs"],
    senders: Sequence[int],
) -> Float32[np.ndarray, "senders receivers outputs"]:
    """Return z with all neighbours of a type masked, for one type after the other."""
    nobody = len(tables.values) - 1
    outputs = np.empty((len(senders), *z.shape), dtype=np.float32)
    for position, sender in enumerate(senders):
        masked = sender_types == sender
        rows = np.flatnonzero(masked.any(axis=1))
        outputs[position] = z
        if len(rows):
            own = receivers[rows]
            others = np.where(masked[rows], np.int32(nobody), own.slots)
            outputs[position, rows] = attend(tables, replace(own, slots=others))
    return outputs


def sums_by_sender(
    tables: SenderTables,
    receivers: Receivers,
    sender_types: Int64[np.ndarray, "receivers neighbours"],
    *,
    n_types: int,
) -> SenderSums:
    """Return attention and its fall with distance, summed by type of receiver and of sender."""
    n_heads = tables.pairs.shape[3]
    sums = SenderSums.zeros(n_types, n_heads)
    for rows in receivers.chunks(2 * sender_types.shape[1] * n_heads):
        types, senders = receivers.types[rows], sender_types[rows]
        weights, _, coefficients = _softmax(tables, receivers[rows])
        pair = (types[:, None] * n_types + senders).ravel()
        for total, values in ((sums.attention, weights), (sums.coefficient, weights * coefficients)):
            for head in range(n_heads):
                own = values[:, :, head].cpu().numpy().ravel()
                total[:, :, head] += np.bincount(pair, weights=own, minlength=n_types**2).reshape(n_types, n_types)
        for sender in range(n_types):
            near = types[(senders == sender).any(axis=1)]
            sums.n_receivers[:, sender] += np.bincount(near, minlength=n_types)
    return sums


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class SentFactors:
    """Readouts and expression without the model itself, so that workers need not import AMICI.

    ``matrix`` and ``gene_columns`` give expression in the model's gene order; ``statistics_device`` has float64.
    """

    card: ModelCard
    readouts: Mapping[str, Readout]
    matrix: Any
    gene_columns: Int64[np.ndarray, " genes"] | None
    read_rows: int
    statistics_device: str

    def readout(self, cell_type: str) -> Readout:
        """Return the map from attention outputs to predicted expression in receivers of a type."""
        own = self.readouts[cell_type]
        # copies, because shared arrays are read-only, of which torch warns
        return replace(own, weights=own.weights.copy(), gram=own.gram.copy(), offset=own.offset.copy())

    def expression_blocks(self, rows: Int64[np.ndarray, " cells"]) -> Iterator[ExpressionBlock]:
        """Yield the measured expression of some cells, block by block, in the order of storage."""
        return expression_blocks(self._reader, rows, self.gene_columns, max_rows=self.read_rows)

    @cached_property
    def _reader(self) -> RowReader:
        return open_rows(self.matrix)
