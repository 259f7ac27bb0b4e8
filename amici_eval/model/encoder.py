"""The part of an AMICI before its attention, each thing computed once: tensors in, tensors out.

Sender cells are embedded once, whoever attends to them; what depends on the sender and the type of the receiver is
computed once per pair. Knows torch and nothing of AMICI, so that it runs wherever torch runs.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional

from amici_eval.model.encoder_kernels import encoder_kernels
from amici_eval.stats.readout import Readout

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jaxtyping import Float32, Float64, Int64
    from torch import Tensor

    from amici_eval.model.encoder_kernels import EncoderKernels

__all__ = ["EncoderWeights", "SenderTables", "embed_senders"]


@dataclass(frozen=True, eq=False)
class _Norm:
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
class _Affine:
    """``x @ weight + bias``; the weight is stored transposed."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


@dataclass(frozen=True, eq=False)
class _Block:
    """A residual block: ``relu(x + norm(second(relu(norm(first(x))))))``, and a projection with its norm, if any."""

    first: _Affine
    first_norm: _Norm
    second: _Affine
    second_norm: _Norm | None
    project: _Affine | None
    project_norm: _Norm | None

    def hidden(self, x: Tensor) -> Tensor:
        """Return the block's value before the projection."""
        inner = self.first_norm(self.first(x), relu=True)
        return self.residual(x, self.second(inner))

    def residual(self, x: Tensor, inner: Tensor) -> Tensor:
        return inner.add_(x).relu_() if self.second_norm is None else self.second_norm(inner, added=x, relu=True)

    def __call__(self, x: Tensor) -> Tensor:
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
    gene_block: _Block
    kv_block: _Block
    kv_spread: _Affine | None
    kv_epsilon: float
    kv_width: int
    base_scores: _Affine
    values: _Affine
    base_constant: Tensor
    value_constant: Tensor
    pair_sender: Tensor
    pair_type: Tensor
    pair_bias: Tensor
    pair_gain: Tensor
    pair_epsilon: float
    pair_block: _Block
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

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], settings: Mapping[str, Any], *, device: str) -> EncoderWeights:
        """Fold the state dict of an AMICI module.

        Parameters
        ----------
        state
            As ``module.state_dict()`` gives it.
        settings
            ``n_heads``, ``attention_dummy_score``, ``pos_coef_offset``, ``distance_kernel_unit_scale`` and the
            epsilons of the layer norms by name (``epsilons``).
        device
            Where the tensors go.

        Raises
        ------
        KeyError
            If the state lacks a weight.
        """
        return _fold({name: tensor.detach().double().cpu() for name, tensor in state.items()}, settings, device)


def _fold(w: dict[str, Tensor], settings: Mapping[str, Any], device: str) -> EncoderWeights:
    epsilons = settings["epsilons"]
    n_heads = int(settings["n_heads"])
    head_size = w["attention_layer.W_V"].shape[0]
    types = w["ct_embed.weight"]
    n_types = types.shape[0]

    def put(tensor: Tensor) -> Tensor:
        # first to float32: Apple GPUs have no float64
        return tensor.float().contiguous().to(device)

    def affine(name: str) -> _Affine:
        return _Affine(put(w[f"{name}.weight"].T), put(w[f"{name}.bias"]))

    def norm(name: str) -> _Norm | None:
        if f"{name}.weight" not in w:
            return None
        return _Norm(put(w[f"{name}.weight"]), put(w[f"{name}.bias"]), epsilons[name])

    def block(name: str) -> _Block:
        first_norm = norm(f"{name}.nn.1")
        assert first_norm is not None  # noqa: S101, RUF100 - the structure was checked
        return _Block(
            first=affine(f"{name}.nn.0"),
            first_norm=first_norm,
            second=affine(f"{name}.nn.3"),
            second_norm=norm(f"{name}.nn.4"),
            project=affine(f"{name}.project_nn.0") if f"{name}.project_nn.0.weight" in w else None,
            project_norm=norm(f"{name}.project_nn.1"),
        )

    query = _queries(w, n_heads, epsilons)  # types x heads x head_size
    # no nonlinearity stands between the projection of the key and value embedding and W_K, W_V: one map does both
    project, project_bias = w.get("kv_embed.project_nn.0.weight"), w.get("kv_embed.project_nn.0.bias")
    width = w["kv_embed.nn.3.weight"].shape[0] if project is None else project.shape[0]
    if project is None or project_bias is None:
        project, project_bias = torch.eye(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
    spread = None
    gain, shift = torch.ones(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
    if "kv_embed.project_nn.1.weight" in w:
        project, project_bias = project - project.mean(dim=0), project_bias - project_bias.mean()
        gain, shift = w["kv_embed.project_nn.1.weight"], w["kv_embed.project_nn.1.bias"]
        # the norm of a map to 2,000 numbers is that of its triangular factor: no cancellation, an eighth of the work
        triangle = torch.linalg.qr(torch.cat([project, project_bias[:, None]], dim=1), mode="r").R
        spread = _Affine(put(triangle[:, :-1].T), put(triangle[:, -1]))

    def through(matrix: Tensor, bias: Tensor) -> tuple[_Affine, Tensor]:
        """Compose a map of heads x rows x kv numbers with the projection: before the division, and after it."""
        rows = matrix.shape[1]
        per_head = (project * gain[:, None]).reshape(n_heads, -1, project.shape[1])
        weight = torch.einsum("hrk,hki->hri", matrix, per_head).reshape(n_heads * rows, -1)
        inner = torch.einsum("hrk,hk->hr", matrix, (project_bias * gain).reshape(n_heads, -1)).reshape(-1)
        outer = torch.einsum("hrk,hk->hr", matrix, shift.reshape(n_heads, -1)) + bias
        return _Affine(put(weight.T), put(inner)), put(outer.reshape(-1))

    keys = w["attention_layer.W_K"].permute(1, 0, 2)  # heads x head_size x kv numbers
    values, value_constant = through(w["attention_layer.W_V"].permute(1, 0, 2), w["attention_layer.b_V"])
    scaled = query.permute(1, 0, 2) / math.sqrt(head_size)  # heads x types x head_size
    scores, score_constant = through(scaled @ keys, torch.einsum("htd,hd->ht", scaled, w["attention_layer.b_K"]))
    # heads innermost: a pair's scores lie side by side
    by_type = torch.arange(n_heads * n_types).reshape(n_heads, n_types).T.reshape(-1)
    by_type = by_type.to(device)
    scores = _Affine(scores.weight[:, by_type].contiguous(), scores.bias[by_type].contiguous())

    first, first_bias = w["pos_coef_mlp.nn.0.weight"], w["pos_coef_mlp.nn.0.bias"]
    n_embed = first.shape[1] - types.shape[1]
    of_type = types @ first[:, n_embed:].T + first_bias
    pair_gain = w["pos_coef_mlp.nn.1.weight"]
    of_sender = first[:, :n_embed] - first[:, :n_embed].mean(dim=0)
    of_type = of_type - of_type.mean(dim=1, keepdim=True)
    return EncoderWeights(
        n_heads=n_heads,
        head_size=head_size,
        n_types=n_types,
        n_genes=w["linear_head.weight"].shape[0],
        dummy_score=float(settings["attention_dummy_score"]),
        gene_block=block("nn_embed"),
        kv_block=block("kv_embed"),
        kv_spread=spread,
        kv_epsilon=float(epsilons.get("kv_embed.project_nn.1", 0.0)),
        kv_width=width,
        base_scores=scores,
        values=values,
        base_constant=score_constant[by_type].contiguous(),
        value_constant=value_constant,
        pair_sender=put(of_sender.T),
        pair_type=put(of_type),
        pair_bias=put(w["pos_coef_mlp.nn.1.bias"]),
        pair_gain=put(pair_gain),
        pair_epsilon=float(epsilons["pos_coef_mlp.nn.1"]),
        pair_block=block("pos_coef_mlp"),
        type_embedding=put(types),
        coefficient_offset=float(settings["pos_coef_offset"]),
        unit_scale=float(settings["distance_kernel_unit_scale"]),
        **_readouts(w, query, epsilons),
    )


def _queries(w: dict[str, Tensor], n_heads: int, epsilons: Mapping[str, float]) -> Tensor:
    """Return the queries of every receiver type, in float64, shape (types, heads, head_size)."""

    def normed(x: Tensor, name: str) -> Tensor:
        if f"{name}.weight" not in w:
            return x
        return functional.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], epsilons[name])

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    x = w["ct_embed.weight"]
    inner = normed(linear(x, "query_embed.nn.0"), "query_embed.nn.1").relu()
    x = (x + normed(linear(inner, "query_embed.nn.3"), "query_embed.nn.4")).relu()
    if "query_embed.project_nn.0.weight" in w:
        x = normed(linear(x, "query_embed.project_nn.0"), "query_embed.project_nn.1")
    query = torch.einsum("thq,dhq->thd", x.reshape(x.shape[0], n_heads, -1), w["attention_layer.W_Q"])
    return query + w["attention_layer.b_Q"]


def _readouts(w: dict[str, Tensor], query: Tensor, epsilons: Mapping[str, float]) -> dict[str, Any]:
    output = w["attention_layer.W_O"]  # embedding x heads x head_size
    output = output.reshape(output.shape[0], -1)
    output, query = output - output.mean(dim=0), query.reshape(len(query), -1)
    query = query - query.mean(dim=1, keepdim=True)
    head = w["linear_head.weight"]
    scaled = head * w["attention_layer.norm_o.weight"]
    both = torch.cat([query.square().sum(dim=1, keepdim=True), query @ output], dim=1)
    return {
        "query_weights": (query @ scaled.T).numpy(),
        "query_gram": (both / output.shape[0]).numpy(),
        "offsets": (w["ct_profiles"] + head @ w["attention_layer.norm_o.bias"]).numpy(),
        "output_weights": (scaled @ output).numpy(),
        "output_gram": (output.T @ output / output.shape[0]).numpy(),
        "norm_epsilon": float(epsilons["attention_layer.norm_o"]),
    }


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
    """Embed some senders and write what receivers need of them into the tables.

    Parameters
    ----------
    weights
        The folded weights.
    expression
        Expression of the senders, on the weights' device.
    needed
        Shape (senders, types), bool: receiver types that attend to each sender.
    slots
        Rows of the tables that are theirs.
    tables
        Where to.
    """
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
