"""Fold the state dict of an AMICI module into weights for which each sender is computed once.

The names of AMICI's weights are known here, but nothing of AMICI is imported.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from amici_eval.model.engines.encoder import Affine, Block, EncoderWeights, Norm

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

__all__ = ["fold_encoder"]


def fold_encoder(state: Mapping[str, Tensor], settings: Mapping[str, Any], *, device: str) -> EncoderWeights:
    """Return the folded weights of an AMICI module, from its state dict."""
    return _fold({name: tensor.detach().double().cpu() for name, tensor in state.items()}, settings, device)


def _fold(w: dict[str, Tensor], settings: Mapping[str, Any], device: str) -> EncoderWeights:
    epsilons = settings["epsilons"]
    n_heads = int(settings["n_heads"])
    head_size = w["attention_layer.W_V"].shape[0]
    types = w["ct_embed.weight"]
    n_types = types.shape[0]

    def put(tensor: Tensor) -> Tensor:
        # to float32 first, because Apple GPUs have no float64
        return tensor.float().contiguous().to(device)

    def affine(name: str) -> Affine:
        return Affine(put(w[f"{name}.weight"].T), put(w[f"{name}.bias"]))

    def norm(name: str) -> Norm | None:
        if f"{name}.weight" not in w:
            return None
        return Norm(put(w[f"{name}.weight"]), put(w[f"{name}.bias"]), epsilons[name])

    def block(name: str) -> Block:
        first_norm = norm(f"{name}.nn.1")
        assert first_norm is not None  # noqa: S101, RUF100 - the structure was checked
        return Block(
            first=affine(f"{name}.nn.0"),
            first_norm=first_norm,
            second=affine(f"{name}.nn.3"),
            second_norm=norm(f"{name}.nn.4"),
            project=affine(f"{name}.project_nn.0") if f"{name}.project_nn.0.weight" in w else None,
            project_norm=norm(f"{name}.project_nn.1"),
        )

    query = _queries(w, n_heads, epsilons)  # types x heads x head_size
    # the key-value projection and W_K, W_V are linear without anything between, so that they are one map
    project, project_bias = w.get("kv_embed.project_nn.0.weight"), w.get("kv_embed.project_nn.0.bias")
    width = w["kv_embed.nn.3.weight"].shape[0] if project is None else project.shape[0]
    if project is None or project_bias is None:
        project, project_bias = torch.eye(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
    spread = None
    gain, shift = torch.ones(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
    if "kv_embed.project_nn.1.weight" in w:
        project, project_bias = project - project.mean(dim=0), project_bias - project_bias.mean()
        gain, shift = w["kv_embed.project_nn.1.weight"], w["kv_embed.project_nn.1.bias"]
        # the norm of a map's value is that of its triangular factor R (QR): no cancellation, an eighth of the work
        triangle = torch.linalg.qr(torch.cat([project, project_bias[:, None]], dim=1), mode="r").R
        spread = Affine(put(triangle[:, :-1].T), put(triangle[:, -1]))

    def through(matrix: Tensor, bias: Tensor) -> tuple[Affine, Tensor]:
        """Compose a map of heads x rows x kv numbers with the projection; return its parts before and after the
        division.
        """
        rows = matrix.shape[1]
        per_head = (project * gain[:, None]).reshape(n_heads, -1, project.shape[1])
        weight = torch.einsum("hrk,hki->hri", matrix, per_head).reshape(n_heads * rows, -1)
        inner = torch.einsum("hrk,hk->hr", matrix, (project_bias * gain).reshape(n_heads, -1)).reshape(-1)
        outer = torch.einsum("hrk,hk->hr", matrix, shift.reshape(n_heads, -1)) + bias
        return Affine(put(weight.T), put(inner)), put(outer.reshape(-1))

    keys = w["attention_layer.W_K"].permute(1, 0, 2)  # heads x head_size x kv numbers
    values, value_constant = through(w["attention_layer.W_V"].permute(1, 0, 2), w["attention_layer.b_V"])
    scaled = query.permute(1, 0, 2) / math.sqrt(head_size)  # heads x types x head_size
    scores, score_constant = through(scaled @ keys, torch.einsum("htd,hd->ht", scaled, w["attention_layer.b_K"]))
    # heads last, so that the scores of a pair are contiguous
    by_type = torch.arange(n_heads * n_types).reshape(n_heads, n_types).T.reshape(-1)
    by_type = by_type.to(device)
    scores = Affine(scores.weight[:, by_type].contiguous(), scores.bias[by_type].contiguous())

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
