"""Fold the weights of an AMICI module so that each sender is computed once.

The names of AMICI's weights are known here, but nothing of AMICI is imported.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from amici_eval.model.engines.encoder import Affine, Block, DistanceNetwork, EncoderWeights, KeyValues, Norm

if TYPE_CHECKING:
    from torch import Tensor


def fold_encoder(module: Any, *, device: str) -> EncoderWeights:
    """Return the folded weights of an AMICI module."""
    folding = _Folding(module, device)
    w, queries = folding.w, folding.queries()
    return EncoderWeights(
        n_heads=folding.n_heads,
        head_size=folding.head_size,
        n_types=w["ct_embed.weight"].shape[0],
        n_genes=w["linear_head.weight"].shape[0],
        dummy_score=float(module.attention_layer.dummy_attn_score),
        gene_block=folding.block("nn_embed"),
        key_values=folding.key_values(queries),
        distance=folding.distance_network(
            offset=float(module.pos_coef_offset), unit_scale=float(module.distance_kernel_unit_scale)
        ),
        **folding.readouts(queries),
    )


class _Folding:
    """The weights of a module in float64 (``w``), and the parts of :class:`EncoderWeights` that come of them."""

    def __init__(self, module: Any, device: str) -> None:
        self.w = {name: tensor.detach().double().cpu() for name, tensor in module.state_dict().items()}
        self.epsilons = {
            name: part.eps for name, part in module.named_modules() if isinstance(part, torch.nn.LayerNorm)
        }
        self.n_heads = int(module.n_heads)
        self.head_size = self.w["attention_layer.W_V"].shape[0]
        self.device = device

    def put(self, tensor: Tensor) -> Tensor:
        # to float32 first, because Apple GPUs have no float64
        return tensor.float().contiguous().to(self.device)

    def affine(self, name: str) -> Affine:
        return Affine(self.put(self.w[f"{name}.weight"].T), self.put(self.w[f"{name}.bias"]))

    def norm(self, name: str) -> Norm | None:
        if f"{name}.weight" not in self.w:
            return None
        return Norm(self.put(self.w[f"{name}.weight"]), self.put(self.w[f"{name}.bias"]), self.epsilons[name])

    def block(self, name: str) -> Block:
        first_norm = self.norm(f"{name}.nn.1")
        assert first_norm is not None  # the structure was checked
        return Block(
            first=self.affine(f"{name}.nn.0"),
            first_norm=first_norm,
            second=self.affine(f"{name}.nn.3"),
            second_norm=self.norm(f"{name}.nn.4"),
            project=self.affine(f"{name}.project_nn.0") if f"{name}.project_nn.0.weight" in self.w else None,
            project_norm=self.norm(f"{name}.project_nn.1"),
        )

    def queries(self) -> Tensor:
        """Return the queries of every receiver type, in float64, shape (types, heads, head_size)."""
        w = self.w

        def normed(x: Tensor, name: str) -> Tensor:
            if f"{name}.weight" not in w:
                return x
            return functional.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], self.epsilons[name])

        def linear(x: Tensor, name: str) -> Tensor:
            return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

        x = w["ct_embed.weight"]
        inner = normed(linear(x, "query_embed.nn.0"), "query_embed.nn.1").relu()
        x = (x + normed(linear(inner, "query_embed.nn.3"), "query_embed.nn.4")).relu()
        if "query_embed.project_nn.0.weight" in w:
            x = normed(linear(x, "query_embed.project_nn.0"), "query_embed.project_nn.1")
        query = torch.einsum("thq,dhq->thd", x.reshape(x.shape[0], self.n_heads, -1), w["attention_layer.W_Q"])
        return query + w["attention_layer.b_Q"]

    def key_values(self, queries: Tensor) -> KeyValues:
        """Return keys, values and their projection as one map: they are linear without anything between."""
        w, n_heads, name = self.w, self.n_heads, "kv_embed.project_nn"
        if f"{name}.0.weight" in w:
            project, project_bias = w[f"{name}.0.weight"], w[f"{name}.0.bias"]
        else:
            width = w["kv_embed.nn.3.weight"].shape[0]
            project, project_bias = torch.eye(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
        spread = None
        gain, shift = torch.ones_like(project_bias), torch.zeros_like(project_bias)
        if f"{name}.1.weight" in w:
            project, project_bias = project - project.mean(dim=0), project_bias - project_bias.mean()
            gain, shift = w[f"{name}.1.weight"], w[f"{name}.1.bias"]
            # the norm of a map's value is that of its triangular factor R (QR): no cancellation, an eighth of the work
            triangle = torch.linalg.qr(torch.cat([project, project_bias[:, None]], dim=1), mode="r").R
            spread = Affine(self.put(triangle[:, :-1].T), self.put(triangle[:, -1]))

        def through(matrix: Tensor, bias: Tensor) -> tuple[Affine, Tensor]:
            """Compose a map of heads x rows x kv numbers with the projection; return what comes before and after the
            division.
            """
            per_head = (project * gain[:, None]).reshape(n_heads, -1, project.shape[1])
            weight = torch.einsum("hrk,hki->hri", matrix, per_head).reshape(n_heads * matrix.shape[1], -1)
            inner = torch.einsum("hrk,hk->hr", matrix, (project_bias * gain).reshape(n_heads, -1)).reshape(-1)
            outer = torch.einsum("hrk,hk->hr", matrix, shift.reshape(n_heads, -1)) + bias
            return Affine(self.put(weight.T), self.put(inner)), self.put(outer.reshape(-1))

        keys = w["attention_layer.W_K"].permute(1, 0, 2)  # heads x head_size x kv numbers
        values, value_constant = through(w["attention_layer.W_V"].permute(1, 0, 2), w["attention_layer.b_V"])
        scaled = queries.permute(1, 0, 2) / math.sqrt(self.head_size)  # heads x types x head_size
        scores, score_constant = through(scaled @ keys, torch.einsum("htd,hd->ht", scaled, w["attention_layer.b_K"]))
        # heads last, so that the scores of a pair are contiguous
        by_type = torch.arange(len(score_constant)).reshape(n_heads, -1).T.reshape(-1).to(self.device)
        return KeyValues(
            block=self.block("kv_embed"),
            spread=spread,
            epsilon=float(self.epsilons.get(f"{name}.1", 0.0)),
            width=project.shape[0],
            scores=Affine(scores.weight[:, by_type].contiguous(), scores.bias[by_type].contiguous()),
            score_constant=score_constant[by_type].contiguous(),
            values=values,
            value_constant=value_constant,
        )

    def distance_network(self, *, offset: float, unit_scale: float) -> DistanceNetwork:
        w, name = self.w, "pos_coef_mlp"
        types, first = w["ct_embed.weight"], w[f"{name}.nn.0.weight"]
        n_embed = first.shape[1] - types.shape[1]
        of_type = types @ first[:, n_embed:].T + w[f"{name}.nn.0.bias"]
        of_sender = first[:, :n_embed] - first[:, :n_embed].mean(dim=0)
        return DistanceNetwork(
            of_sender=self.put(of_sender.T),
            of_type=self.put(of_type - of_type.mean(dim=1, keepdim=True)),
            bias=self.put(w[f"{name}.nn.1.bias"]),
            gain=self.put(w[f"{name}.nn.1.weight"]),
            epsilon=float(self.epsilons[f"{name}.nn.1"]),
            block=self.block(name),
            type_embedding=self.put(types),
            offset=offset,
            unit_scale=unit_scale,
        )

    def readouts(self, queries: Tensor) -> dict[str, Any]:
        w = self.w
        output = w["attention_layer.W_O"]  # embedding x heads x head_size
        output = output.reshape(output.shape[0], -1)
        output, query = output - output.mean(dim=0), queries.reshape(len(queries), -1)
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
            "norm_epsilon": float(self.epsilons["attention_layer.norm_o"]),
        }
