"""What stands between the products of the encoder, fused and compiled: one pass over memory for each."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from amici_eval.common.compiling import compiled, numba_if_usable

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["EncoderKernels", "encoder_kernels"]

_LINEAR_FROM = np.float32(20.0)
"""From here on softplus is its argument, as in torch."""


class EncoderKernels(NamedTuple):
    """Compiled kernels.

    Parameters
    ----------
    first_layer
        ``(sender, rows, type_term, bias, deviation, out)``: ``relu(sender[rows] + type_term + bias * deviation)``.
    norm
        ``(values, gain, shift, epsilon, source, n_added, with_relu)``: norms rows in place, adds the first ``n_added``
        columns of the source, and cuts at 0 if asked.
    last_layers
        ``(inner, rows, deviation, bias, gain, shift, epsilon, embedded, type_embedding, project, project_bias, offset,
        unit_scale, out)``: divides by the deviation, adds the bias, norms, adds what went in, and projects to a
        coefficient of each head.
    """

    first_layer: Callable[..., None]
    norm: Callable[..., None]
    last_layers: Callable[..., None]


@functools.cache
def encoder_kernels() -> EncoderKernels | None:
    """Return the kernels, or ``None`` without numba."""
    if numba_if_usable() is None:
        return None
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


def _last_layers(
    inner: Any,
    rows: Any,
    deviation: Any,
    bias: Any,
    gain: Any,
    shift: Any,
    epsilon: Any,
    embedded: Any,
    type_embedding: Any,
    project: Any,
    project_bias: Any,
    offset: Any,
    unit_scale: Any,
    out: Any,
) -> None:
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
