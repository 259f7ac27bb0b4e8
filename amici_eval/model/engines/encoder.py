"""The part of an AMICI before its attention, each thing computed once: tensors in, tensors out.

Sender cells are embedded once, whoever attends to them; what depends on the sender and the type of the receiver is
computed once per pair. Knows torch and nothing of AMICI, so that it runs wherever torch runs.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional

from amici_eval.model.engines.encoder_kernels import encoder_kernels

if TYPE_CHECKING:
    from jaxtyping import Float32, Int64
    from torch import Tensor

    from amici_eval.model.engines.encoder_kernels import EncoderKernels
    from amici_eval.model.engines.encoder_weights import EncoderWeights

__all__ = ["SenderTables", "embed_senders"]

_NO_SCORE = -1e30
"""Below any score by more than attention counts; not infinite, so that differences of scores stay numbers."""


@dataclass(frozen=True, eq=False)
class SenderTables:
    """What receivers need of the senders around them.

    Parameters
    ----------
    values
        Shape (senders, heads * head_size).
    pairs
        Shape (senders, types, 2, heads): attention score without distance, and the coefficient of the distance (in
        coordinate units); 0 where the pair was not needed.
    """

    values: Float32[Tensor, "senders outputs"]
    pairs: Float32[Tensor, "senders types two heads"]

    @classmethod
    def empty(cls, weights: EncoderWeights, n_senders: int, *, device: str) -> SenderTables:
        """Return tables of a number of senders, to be filled by :func:`embed_senders`."""
        return cls(
            values=_empty((n_senders, weights.n_outputs), device=device),
            pairs=_empty((n_senders, weights.n_types, 2, weights.n_heads), device=device).zero_(),
        )

    def mask(self, slot: int) -> None:
        """Make a row one that nobody attends to: neighbours that are to be left out are sent there."""
        self.values[slot] = 0.0
        self.pairs[slot, :, 0] = _NO_SCORE
        self.pairs[slot, :, 1] = 0.0


def _empty(shape: tuple[int, ...], *, device: str) -> Tensor:
    """Return room for float32 numbers; on the CPU from NumPy, which asks for large pages: far fewer to be mapped."""
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
    """Embed some senders and write what receivers need of them into the tables."""
    embedded = weights.gene_block(expression)
    hidden = weights.kv_block.hidden(embedded)
    scale = None
    if weights.kv_spread is not None:
        spread = weights.kv_spread(hidden)
        scale = torch.rsqrt(spread.square_().sum(dim=1) / weights.kv_width + weights.kv_epsilon)[:, None]
    values, scores = weights.values(hidden), weights.base_scores(hidden)
    if scale is not None:
        values, scores = values.mul_(scale), scores.mul_(scale)
    tables.values[slots] = values.add_(weights.value_constant)
    scores = scores.add_(weights.base_constant).view(-1, weights.n_types, weights.n_heads)

    # layer norm of sender part + type part: both are centred, so the mean is 0 and the variance three products
    first = embedded @ weights.pair_sender
    width = first.shape[1]
    variance = torch.addmm(weights.pair_type.square().sum(dim=1), first, weights.pair_type.T, alpha=2.0)
    variance = variance.add_(first.square().sum(dim=1, keepdim=True)).div_(width).add_(weights.pair_epsilon)
    deviation = variance.clamp_(min=weights.pair_epsilon).sqrt_()
    first.mul_(weights.pair_gain)
    kernels = encoder_kernels() if expression.device.type == "cpu" and weights.is_usual else None
    for code in range(weights.n_types):
        rows = needed[:, code].nonzero().squeeze(1)
        if len(rows) == 0:
            continue
        compute = _coefficients if kernels is None else functools.partial(_coefficients_compiled, kernels)
        coefficients = compute(weights, code, rows, first, deviation, embedded)
        places = slots[rows]
        tables.pairs[places, code, 0] = scores[rows, code]
        tables.pairs[places, code, 1] = coefficients


def _coefficients(
    weights: EncoderWeights, code: int, rows: Tensor, first: Tensor, deviation: Tensor, embedded: Tensor
) -> Tensor:
    """Return the distance coefficients of some senders for one receiver type, shape (rows, heads)."""
    block, n_embed, std = weights.pair_block, embedded.shape[1], deviation[rows, code]
    # relu(norm) = relu(sender + type + bias * std) / std, the division after the next product, which is narrower
    columns = torch.stack([std, torch.ones_like(std)], dim=1)
    terms = torch.stack([weights.pair_bias, weights.pair_type[code] * weights.pair_gain])
    inner = torch.addmm(first[rows], columns, terms).relu_()
    inner = (inner @ block.second.weight).div_(std[:, None]).add_(block.second.bias)
    residual = inner if block.second_norm is None else block.second_norm(inner)
    residual[:, :n_embed] += embedded[rows]
    residual[:, n_embed:] += weights.type_embedding[code]
    residual.relu_()
    coefficients = residual if block.project is None else block.project(residual)
    return functional.softplus(coefficients + weights.coefficient_offset) / weights.unit_scale


def _coefficients_compiled(
    kernels: EncoderKernels,
    weights: EncoderWeights,
    code: int,
    rows: Tensor,
    first: Tensor,
    deviation: Tensor,
    embedded: Tensor,
) -> Tensor:
    """Return the same as :func:`_coefficients`, with what stands between the products fused."""
    block, width = weights.pair_block, first.shape[1]
    assert block.second_norm is not None  # noqa: S101, RUF100 - is_usual
    assert block.project is not None  # noqa: S101, RUF100 - is_usual
    std, taken = deviation[rows, code].numpy(), rows.numpy()
    inner = torch.empty((len(rows), width), dtype=torch.float32)
    type_term = (weights.pair_type[code] * weights.pair_gain).numpy()
    kernels.first_layer(first.numpy(), taken, type_term, weights.pair_bias.numpy(), std, inner.numpy())
    coefficients = torch.empty((len(rows), weights.n_heads), dtype=torch.float32)
    kernels.last_layers(
        (inner @ block.second.weight).numpy(),
        taken,
        std,
        block.second.bias.numpy(),
        block.second_norm.weight.numpy(),
        block.second_norm.bias.numpy(),
        np.float32(block.second_norm.epsilon),
        embedded.numpy(),
        weights.type_embedding[code].numpy(),
        block.project.weight.T.contiguous().numpy(),
        block.project.bias.numpy(),
        np.float32(weights.coefficient_offset),
        np.float32(weights.unit_scale),
        coefficients.numpy(),
    )
    return coefficients
