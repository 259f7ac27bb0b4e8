"""The weights of an AMICI before its attention, folded for one pass over senders, and the layers they form.

Knows torch and nothing of AMICI, so that it runs wherever torch runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional

from amici_eval.model.engines.encoder_kernels import encoder_kernels
from amici_eval.stats.readout import Readout

if TYPE_CHECKING:
    from jaxtyping import Float64
    from torch import Tensor

__all__ = ["Affine", "Block", "EncoderWeights", "Norm"]


@dataclass(frozen=True, eq=False)
class Norm:
    """A layer norm: weight, bias, epsilon."""

    weight: Tensor
    bias: Tensor
    epsilon: float

    def __call__(self, x: Tensor, *, added: Tensor | None = None, relu: bool = False) -> Tensor:
        """Return ``x`` normed, plus something, cut at 0 if asked; ``x`` is used up."""
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
        """Return the image of ``x``."""
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
        """Return the block's value before the projection."""
        inner = self.first_norm(self.first(x), relu=True)
        return self.residual(x, self.second(inner))

    def residual(self, x: Tensor, inner: Tensor) -> Tensor:
        """Return the block's value before the projection from that of its inner layers, which is used up."""
        return inner.add_(x).relu_() if self.second_norm is None else self.second_norm(inner, added=x, relu=True)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the block's value."""
        x = self.hidden(x)
        if self.project is not None:
            x = self.project(x)
        return x if self.project_norm is None else self.project_norm(x)


@dataclass(frozen=True, eq=False)
class EncoderWeights:
    """An AMICI's weights, folded for one pass over senders; on one device.

    Parameters
    ----------
    n_heads, head_size, n_types, n_genes
        Sizes.
    dummy_score
        Attention score of the dummy neighbour, whose value is 0.
    gene_block
        Embeds expression.
    kv_block
        Residual part of the key and value embedding.
    kv_spread
        What the layer norm of the key and value embedding divides by, as the norm of one affine map (``None``: there
        is no layer norm).
    kv_epsilon, kv_width
        Epsilon of that layer norm, and how many numbers it averages over.
    base_scores, values
        Affine maps to attention scores (types x heads columns) and to values (heads x head_size columns), before the
        division by the spread; their constants come after it.
    base_constant, value_constant
        Added after the division.
    pair_sender, pair_type, pair_bias
        First layer of the distance coefficients, split into the part of the sender, the part of the receiver type and
        what its layer norm adds; all centred, so that its mean is 0.
    pair_gain
        Scale of that layer norm.
    pair_epsilon
        Its epsilon.
    pair_block
        What follows.
    type_embedding
        Shape (types, label dimensions).
    coefficient_offset, unit_scale
        Added before the softplus; distances are divided by ``unit_scale``.
    query_weights, query_gram, offsets
        What of a readout depends on the type: shape (types, genes), (types, 1 + outputs) and (types, genes).
    output_weights, output_gram, norm_epsilon
        What does not: shape (genes, outputs), (outputs, outputs), and the epsilon of the layer norm.
    """

    n_heads: int
    head_size: int
    n_types: int
    n_genes: int
    dummy_score: float
    gene_block: Block
    kv_block: Block
    kv_spread: Affine | None
    kv_epsilon: float
    kv_width: int
    base_scores: Affine
    values: Affine
    base_constant: Tensor
    value_constant: Tensor
    pair_sender: Tensor
    pair_type: Tensor
    pair_bias: Tensor
    pair_gain: Tensor
    pair_epsilon: float
    pair_block: Block
    type_embedding: Tensor
    coefficient_offset: float
    unit_scale: float
    query_weights: Float64[np.ndarray, "types genes"]
    query_gram: Float64[np.ndarray, "types columns"]
    offsets: Float64[np.ndarray, "types genes"]
    output_weights: Float64[np.ndarray, "genes outputs"]
    output_gram: Float64[np.ndarray, "outputs outputs"]
    norm_epsilon: float

    @property
    def n_outputs(self) -> int:
        """Numbers that attention brings to a receiver: heads x head_size."""
        return self.n_heads * self.head_size

    @property
    def is_usual(self) -> bool:
        """Whether the distance network has a second norm and a projection, as it has unless sizes coincide."""
        return self.pair_block.second_norm is not None and self.pair_block.project is not None

    @property
    def bytes_per_sender(self) -> int:
        """Memory of one sender in :class:`SenderTables`."""
        return 4 * (self.n_outputs + 2 * self.n_heads * self.n_types)

    @property
    def bytes_per_embedding(self) -> int:
        """Memory that one sender takes while it is embedded, about: inputs, hidden layers, a pair's layers."""
        widths = (
            3 * self.n_genes,
            2 * self.gene_block.first.bias.shape[0],
            6 * self.kv_block.first.weight.shape[0],
            4 * self.pair_bias.shape[0],
            self.n_outputs + 2 * self.n_heads * self.n_types,
        )
        return 4 * sum(widths)

    def readout(self, code: int) -> Readout:
        """Return how attention outputs become predicted expression in receivers of a type code."""
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
