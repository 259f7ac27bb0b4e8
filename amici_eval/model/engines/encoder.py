"""The part of an AMICI before its attention: senders are embedded once, pairs of sender and type computed once.

It imports torch and nothing of AMICI, so that it runs on all devices of torch.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional

from amici_eval.common.threads import compiled
from amici_eval.stats.readout import Readout

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float32, Float64, Int64
    from torch import Tensor

_LINEAR_FROM = np.float32(20.0)
"""Argument above which softplus equals its argument, as in torch."""


class EncoderKernels(NamedTuple):
    """Compiled kernels.

    ``first_layer``: ``relu(sender[rows] + type_term + bias * deviation)``. ``norm``: norms rows in place, adds the
    first ``n_added`` columns of the source, and applies relu if asked. ``last_layers``: divides by the deviation, adds
    the bias, norms, adds the input, and projects to a coefficient per head.
    """

    first_layer: Callable[..., None]
    norm: Callable[..., None]
    last_layers: Callable[..., None]


@functools.cache
def encoder_kernels() -> EncoderKernels:
    """Return the compiled kernels."""
    options: dict[str, Any] = {"error_model": "numpy", "fastmath": {"contract", "reassoc", "nsz"}}
    return EncoderKernels(
        compiled(_first_layer, **options), compiled(_norm, **options), compiled(_last_layers, **options)
    )


def _norm(values: Any, gain: Any, shift: Any, epsilon: Any, source: Any, n_added: Any, with_relu: Any) -> None:
    zero, one = np.float32(0.0), np.float32(1.0)
    width = values.shape[1]
    for i in range(values.shape[0]):
        row = values[i]
        mean = zero
        for c in range(width):
            mean += row[c]
        mean /= np.float32(width)
        variance = zero
        for c in range(width):
            row[c] -= mean
            variance += row[c] * row[c]
        scale = one / np.sqrt(variance / np.float32(width) + epsilon)
        for c in range(width):
            row[c] = row[c] * scale * gain[c] + shift[c]
        if n_added > 0:
            added = source[i]
            for c in range(n_added):
                row[c] += added[c]
        if with_relu:
            for c in range(width):
                row[c] = max(row[c], zero)


def _first_layer(sender: Any, rows: Any, type_term: Any, bias: Any, deviation: Any, out: Any) -> None:
    zero = np.float32(0.0)
    for i in range(rows.shape[0]):
        row, target, scale = sender[rows[i]], out[i], deviation[i]
        for c in range(row.shape[0]):
            target[c] = max(row[c] + type_term[c] + bias[c] * scale, zero)


class LastLayers(NamedTuple):
    """Weights after the second product of the distance network, for one receiver type, as arrays and float32.

    ``bias`` to ``epsilon``: of the product and of its norm; ``project`` and ``project_bias``: to a number per head,
    which ``offset``, softplus and ``unit_scale`` turn into a coefficient.
    """

    bias: np.ndarray
    gain: np.ndarray
    shift: np.ndarray
    epsilon: np.float32
    type_embedding: np.ndarray
    project: np.ndarray
    project_bias: np.ndarray
    offset: np.float32
    unit_scale: np.float32


def _last_layers(inner: Any, rows: Any, deviation: Any, embedded: Any, layers: Any, out: Any) -> None:
    bias, gain, shift, epsilon, type_embedding, project, project_bias, offset, unit_scale = layers
    zero, one = np.float32(0.0), np.float32(1.0)
    width, n_embed, n_heads = inner.shape[1], embedded.shape[1], project.shape[0]
    for i in range(rows.shape[0]):
        values, source = inner[i], embedded[rows[i]]
        inverse = one / deviation[i]
        mean = zero
        for c in range(width):
            values[c] = values[c] * inverse + bias[c]
            mean += values[c]
        mean /= np.float32(width)
        variance = zero
        for c in range(width):
            values[c] -= mean
            variance += values[c] * values[c]
        scale = one / np.sqrt(variance / np.float32(width) + epsilon)
        for c in range(n_embed):
            values[c] = max(values[c] * scale * gain[c] + shift[c] + source[c], zero)
        for c in range(n_embed, width):
            values[c] = max(values[c] * scale * gain[c] + shift[c] + type_embedding[c - n_embed], zero)
        for h in range(n_heads):
            row = project[h]
            x = project_bias[h] + offset
            for c in range(width):
                x += values[c] * row[c]
            out[i, h] = (x if x > _LINEAR_FROM else np.log1p(np.exp(x))) / unit_scale


@dataclass(frozen=True, eq=False)
class Norm:
    """A layer norm: weight, bias, epsilon."""

    weight: Tensor
    bias: Tensor
    epsilon: float

    def __call__(self, x: Tensor, *, added: Tensor | None = None, relu: bool = False) -> Tensor:
        """Return ``x`` normed, plus ``added``, with relu if asked; ``x`` may be overwritten."""
        kernels = encoder_kernels() if x.device.type == "cpu" else None
        if kernels is None:
            x = functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.epsilon)
            x = x if added is None else x.add_(added)
            return x.relu_() if relu else x
        values = x.numpy()
        source = values if added is None else added.numpy()
        n_added = 0 if added is None else added.shape[1]
        kernels.norm(values, self.weight.numpy(), self.bias.numpy(), np.float32(self.epsilon), source, n_added, relu)
        return x


@dataclass(frozen=True, eq=False)
class Affine:
    """``x @ weight + bias``; the weight is stored transposed."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Return ``x @ weight + bias``."""
        return torch.addmm(self.bias, x, self.weight)


@dataclass(frozen=True, eq=False)
class Block:
    """A residual block: ``relu(x + norm(second(relu(norm(first(x))))))``, and a projection with its norm, if any."""

    first: Affine
    first_norm: Norm
    second: Affine
    second_norm: Norm | None
    project: Affine | None
    project_norm: Norm | None

    def hidden(self, x: Tensor) -> Tensor:
        """Return the output of the block before the projection."""
        inner = self.second(self.first_norm(self.first(x), relu=True))
        return inner.add_(x).relu_() if self.second_norm is None else self.second_norm(inner, added=x, relu=True)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the output of the block."""
        x = self.hidden(x)
        if self.project is not None:
            x = self.project(x)
        return x if self.project_norm is None else self.project_norm(x)


@dataclass(frozen=True, kw_only=True, eq=False)
class KeyValues:
    """From a sender's embedding to its values, and to its attention scores with each receiver type.

    ``spread`` (None without it): affine map whose norm is the divisor of the key-value layer norm, with ``epsilon`` and
    ``width``; ``scores`` (types x heads columns) and ``values`` apply before that division, their constants after it.
    """

    block: Block
    spread: Affine | None
    epsilon: float
    width: int
    scores: Affine
    score_constant: Tensor
    values: Affine
    value_constant: Tensor

    def __call__(self, embedded: Tensor) -> tuple[Tensor, Tensor]:
        """Return values and scores of some senders."""
        hidden = self.block.hidden(embedded)
        scale = None
        if self.spread is not None:
            spread = self.spread(hidden)
            scale = torch.rsqrt(spread.square_().sum(dim=1) / self.width + self.epsilon)[:, None]
        values, scores = self.values(hidden), self.scores(hidden)
        if scale is not None:
            values, scores = values.mul_(scale), scores.mul_(scale)
        return values.add_(self.value_constant), scores.add_(self.score_constant)


@dataclass(frozen=True, kw_only=True, eq=False)
class DistanceNetwork:
    """From a sender's embedding and a receiver's type to the coefficient of the distance per head.

    ``of_sender``, ``of_type``, ``bias`` split the first layer into sender, receiver type and norm, all centred, with
    the norm's ``gain`` and ``epsilon``. ``offset`` comes before the softplus; distances are divided by ``unit_scale``.
    """

    of_sender: Tensor
    of_type: Tensor
    bias: Tensor
    gain: Tensor
    epsilon: float
    block: Block
    type_embedding: Tensor
    offset: float
    unit_scale: float

    @property
    def is_usual(self) -> bool:
        """Whether it has a second norm and a projection, as it has unless layer sizes coincide."""
        return self.block.second_norm is not None and self.block.project is not None

    def first_layer(self, embedded: Tensor) -> tuple[Tensor, Tensor]:
        """Return the senders' part of the first layer, times the gain, and the norm's divisor for each type."""
        # layer norm of (sender + type): both are centred, so the mean is 0 and the variance the sum of three products
        first = embedded @ self.of_sender
        variance = torch.addmm(self.of_type.square().sum(dim=1), first, self.of_type.T, alpha=2.0)
        variance = variance.add_(first.square().sum(dim=1, keepdim=True)).div_(first.shape[1]).add_(self.epsilon)
        return first.mul_(self.gain), variance.clamp_(min=self.epsilon).sqrt_()


@dataclass(frozen=True, kw_only=True, eq=False)
class EncoderWeights:
    """An AMICI's weights on one device, folded for one pass over senders; the dummy has value 0.

    ``query_weights`` to ``norm_epsilon`` make the :class:`~amici_eval.stats.readout.Readout` of each receiver type.
    """

    n_heads: int
    head_size: int
    n_types: int
    n_genes: int
    dummy_score: float
    gene_block: Block
    key_values: KeyValues
    distance: DistanceNetwork
    query_weights: Float64[np.ndarray, "types genes"]
    query_gram: Float64[np.ndarray, "types columns"]
    offsets: Float64[np.ndarray, "types genes"]
    output_weights: Float64[np.ndarray, "genes outputs"]
    output_gram: Float64[np.ndarray, "outputs outputs"]
    norm_epsilon: float

    @property
    def n_outputs(self) -> int:
        """Attention outputs of a receiver: heads x head_size."""
        return self.n_heads * self.head_size

    @property
    def bytes_per_sender(self) -> int:
        """Memory of one sender in :class:`SenderTables`, in bytes."""
        return 4 * (self.n_outputs + 2 * self.n_heads * self.n_types)

    @property
    def bytes_per_embedding(self) -> int:
        """Approximate bytes to embed one sender: inputs, hidden layers, a pair's layers."""
        widths = (
            3 * self.n_genes,
            2 * self.gene_block.first.bias.shape[0],
            6 * self.key_values.block.first.weight.shape[0],
            4 * self.distance.bias.shape[0],
        )
        return 4 * sum(widths) + self.bytes_per_sender

    def readout(self, code: int) -> Readout:
        """Return the map from attention outputs to predicted expression in receivers of a type code."""
        gram = np.empty((1 + self.n_outputs, 1 + self.n_outputs))
        gram[0], gram[:, 0] = self.query_gram[code], self.query_gram[code]
        gram[1:, 1:] = self.output_gram
        return Readout(
            weights=np.concatenate([self.query_weights[code][:, None], self.output_weights], axis=1),
            gram=gram,
            offset=self.offsets[code],
            epsilon=self.norm_epsilon,
            n_heads=self.n_heads,
            head_size=self.head_size,
        )


_NO_SCORE = -1e30
"""Score without attention; finite, so that differences of scores are not NaN."""


@dataclass(frozen=True, eq=False)
class SenderTables:
    """The tables of senders from which receivers compute attention.

    ``pairs`` holds, by receiver type, the attention score without distance and the coefficient of the distance (1 /
    coordinate units); 0 where a pair was not needed. ``dummy_score`` is the attention score of the dummy.
    """

    values: Float32[Tensor, "senders outputs"]
    pairs: Float32[Tensor, "senders types two heads"]
    dummy_score: float

    @classmethod
    def empty(cls, weights: EncoderWeights, n_senders: int, *, device: str) -> SenderTables:
        """Return tables for a number of senders, to be filled by :func:`embed_senders`."""
        return cls(
            values=_empty((n_senders, weights.n_outputs), device=device),
            pairs=_empty((n_senders, weights.n_types, 2, weights.n_heads), device=device).zero_(),
            dummy_score=weights.dummy_score,
        )

    def mask(self, slot: int) -> None:
        """Give a row no attention from any receiver; slots of masked neighbours point to it."""
        self.values[slot] = 0.0
        self.pairs[slot, :, 0] = _NO_SCORE
        self.pairs[slot, :, 1] = 0.0


def _empty(shape: tuple[int, ...], *, device: str) -> Tensor:
    """Return an uninitialised float32 tensor; on the CPU from NumPy, whose large pages are faster to map."""
    if torch.device(device).type == "cpu":
        return torch.from_numpy(np.empty(shape, dtype=np.float32))
    return torch.empty(shape, dtype=torch.float32, device=device)


def embed_senders(
    weights: EncoderWeights,
    expression: Float32[Tensor, "senders genes"],
    needed: Tensor,
    slots: Int64[Tensor, " senders"],
    tables: SenderTables,
) -> None:
    """Embed some senders and write their values and pairs into the tables."""
    embedded = weights.gene_block(expression)
    values, scores = weights.key_values(embedded)
    tables.values[slots] = values
    scores = scores.view(-1, weights.n_types, weights.n_heads)
    first, deviation = weights.distance.first_layer(embedded)
    kernels = encoder_kernels() if expression.device.type == "cpu" and weights.distance.is_usual else None
    for code in range(weights.n_types):
        rows = needed[:, code].nonzero().squeeze(1)
        if len(rows) == 0:
            continue
        compute = _coefficients if kernels is None else functools.partial(_coefficients_compiled, kernels)
        places = slots[rows]
        tables.pairs[places, code, 0] = scores[rows, code]
        tables.pairs[places, code, 1] = compute(weights.distance, code, rows, first, deviation[rows, code], embedded)


def _coefficients(
    network: DistanceNetwork, code: int, rows: Tensor, first: Tensor, deviation: Tensor, embedded: Tensor
) -> Tensor:
    """Return the distance coefficients of some senders for one receiver type, shape (rows, heads)."""
    block, n_embed = network.block, embedded.shape[1]
    # relu(norm) = relu(sender + type + bias * std) / std; divide after the next product, which has fewer columns
    columns = torch.stack([deviation, torch.ones_like(deviation)], dim=1)
    terms = torch.stack([network.bias, network.of_type[code] * network.gain])
    inner = torch.addmm(first[rows], columns, terms).relu_()
    inner = (inner @ block.second.weight).div_(deviation[:, None]).add_(block.second.bias)
    residual = inner if block.second_norm is None else block.second_norm(inner)
    residual[:, :n_embed] += embedded[rows]
    residual[:, n_embed:] += network.type_embedding[code]
    residual.relu_()
    coefficients = residual if block.project is None else block.project(residual)
    return functional.softplus(coefficients + network.offset) / network.unit_scale


def _coefficients_compiled(
    kernels: EncoderKernels,
    network: DistanceNetwork,
    code: int,
    rows: Tensor,
    first: Tensor,
    deviation: Tensor,
    embedded: Tensor,
) -> Tensor:
    """Return the same as :func:`_coefficients`, by kernels that fuse the steps between matrix products."""
    block, norm, project = network.block, network.block.second_norm, network.block.project
    assert norm is not None  # is_usual
    assert project is not None  # is_usual
    std, taken = deviation.numpy(), rows.numpy()
    inner = torch.empty((len(rows), first.shape[1]), dtype=torch.float32)
    type_term = (network.of_type[code] * network.gain).numpy()
    kernels.first_layer(first.numpy(), taken, type_term, network.bias.numpy(), std, inner.numpy())
    layers = LastLayers(
        bias=block.second.bias.numpy(),
        gain=norm.weight.numpy(),
        shift=norm.bias.numpy(),
        epsilon=np.float32(norm.epsilon),
        type_embedding=network.type_embedding[code].numpy(),
        project=project.weight.T.contiguous().numpy(),
        project_bias=project.bias.numpy(),
        offset=np.float32(network.offset),
        unit_scale=np.float32(network.unit_scale),
    )
    coefficients = torch.empty((len(rows), project.bias.shape[0]), dtype=torch.float32)
    kernels.last_layers(
        (inner @ block.second.weight).numpy(), taken, std, embedded.numpy(), layers, coefficients.numpy()
    )
    return coefficients
