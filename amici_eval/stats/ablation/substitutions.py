"""Explained variance with one head's output replaced by its mean or by its output in other cells."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from amici_eval.common.threads import compiled, numba_if_usable
from amici_eval.stats.cell_chunks import CHUNK_CELLS, in_chunks, one_thread, over_cells, to_float64, to_tensor

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float, Float64, Int

    from amici_eval.stats.ablation.coalitions import CoalitionMoments
    from amici_eval.stats.readout import Readout


@functools.cache
def compiled_substitution() -> Callable[..., None] | None:
    """Return :func:`_substitute` compiled, or ``None`` without numba or with its compiler switched off."""
    if numba_if_usable() is None:
        return None
    kernel: Callable[..., None] = compiled(_substitute, error_model="numpy", fastmath={"contract", "reassoc", "nsz"})
    return kernel


def _substitute(
    z: Any,
    means: Any,
    forms: Any,
    mean_forms: Any,
    permutations: Any,
    start: Any,
    images: Any,
    target: Any,
    epsilon: Any,
    weights: Any,
    common: Any,
    spread: Any,
    own: Any,
) -> None:
    """Write 1 / sigma of some cells under every substitution, substitute 0 being the mean, and add up the sums.

    All cells: ``z`` (cells, outputs), ``means`` (outputs,), ``forms`` (cells, 2 * heads), ``mean_forms`` (2 * heads,),
    ``permutations`` (permutations, cells). Cells from ``start``: ``images`` (cells, 2 * columns), ``x @ matrix``
    without each head's own block, ``target`` (cells, columns). Forms and images are under ``gram``, then under
    ``product``. Written: ``weights`` (cells, substitutes, heads). Added to: ``x @ target / sigma`` (``common``) and
    ``x @ product @ x / sigma**2`` (``spread``), (substitutes, heads); part / sigma (``own``), (substitutes, heads, d).
    """
    n_cells, n_substitutes, n_heads = weights.shape
    n_outputs = z.shape[1]
    n_columns, head_size = n_outputs + 1, n_outputs // n_heads
    # copies of one cell's rows, by head: plain loops over such rows compile to vector instructions
    rows = np.empty((4, n_outputs))
    image, dual = rows[0].reshape(n_heads, head_size), rows[1].reshape(n_heads, head_size)
    aim, part = rows[2].reshape(n_heads, head_size), rows[3].reshape(n_heads, head_size)
    rest = np.empty((3, n_heads))
    dots = np.empty((3, n_heads))
    for i in range(n_cells):
        under, over, wanted = images[i, 1:n_columns], images[i, n_columns + 1 :], target[i, 1:]
        row, here = z[start + i], forms[start + i]
        for c in range(n_outputs):
            rows[0, c], rows[1, c], rows[2, c], rows[3, c] = under[c], over[c], wanted[c], row[c]
        for h in range(n_heads):
            under_gram, under_product, along = 0.0, 0.0, 0.0
            for c in range(head_size):
                under_gram += part[h, c] * image[h, c]
                under_product += part[h, c] * dual[h, c]
                along += part[h, c] * aim[h, c]
            dots[0, h], dots[1, h], dots[2, h] = under_gram, under_product, along
        gram_all, product_all, along_all = images[i, 0], images[i, n_columns], np.float64(target[i, 0])
        for h in range(n_heads):
            gram_all += dots[0, h] + here[h]
            product_all += dots[1, h] + here[n_heads + h]
            along_all += dots[2, h]
        for h in range(n_heads):
            rest[0, h] = gram_all - 2.0 * dots[0, h] - here[h]
            rest[1, h] = product_all - 2.0 * dots[1, h] - here[n_heads + h]
            rest[2, h] = along_all - dots[2, h]
        for s in range(n_substitutes):
            if s == 0:
                for c in range(n_outputs):
                    rows[3, c] = means[c]
                alone = mean_forms
            else:
                moved = permutations[s - 1, start + i]
                row, alone = z[moved], forms[moved]
                for c in range(n_outputs):
                    rows[3, c] = row[c]
            for h in range(n_heads):
                under_gram, under_product, along = 0.0, 0.0, 0.0
                for c in range(head_size):
                    under_gram += part[h, c] * image[h, c]
                    under_product += part[h, c] * dual[h, c]
                    along += part[h, c] * aim[h, c]
                dots[0, h], dots[1, h], dots[2, h] = under_gram, under_product, along
            for h in range(n_heads):
                square = rest[0, h] + 2.0 * dots[0, h] + alone[h]
                weight = 1.0 / math.sqrt((square if square > 0.0 else 0.0) + epsilon)
                weights[i, s, h] = weight
                spread[s, h] += weight * weight * (rest[1, h] + 2.0 * dots[1, h] + alone[n_heads + h])
                common[s, h] += weight * (rest[2, h] + dots[2, h])
            for h in range(n_heads):
                weight = weights[i, s, h]
                for c in range(head_size):
                    own[s, h, c] += weight * part[h, c]


@dataclass(frozen=True, kw_only=True, eq=False)
class SubstitutedValues:
    """Explained variance with one head's part substituted and all other heads as they are.

    ``mean``: the part is its mean over the cells; ``permuted``: cell i gets that of cell ``permutation[i]``.
    """

    mean: Float64[np.ndarray, " heads"]
    permuted: Float64[np.ndarray, "heads permutations"]


def substituted_values(
    z: Float[np.ndarray, "cells outputs"],
    projected: Float[np.ndarray, "cells columns"],
    target_ss: float,
    readout: Readout,
    *,
    permutations: Int[np.ndarray, "permutations cells"],
    moments: CoalitionMoments,
    chunk_cells: int = CHUNK_CELLS,
    device: str = "cpu",
) -> SubstitutedValues:
    """Return the explained variance of one cell type with each head's part replaced by its mean or another cell's.

    Exact up to rounding; the layer norm is that of the substituted whole. Permutations are of positions, shared by all
    heads, and may be none. ``moments`` are of any coalitions of these cells, with the heads' own forms; the caller
    checks inputs (``check_inputs``). On the CPU a compiled kernel does what is not a matrix product; without numba,
    torch does.
    """
    own_forms = moments.own_forms
    if own_forms is None:
        msg = "moments lack the heads' own forms; gather them with keep_own_forms=True"
        raise ValueError(msg)
    return in_chunks(
        lambda n_cells: _substituted_values(
            z,
            projected,
            target_ss,
            readout,
            permutations=permutations,
            moments=moments,
            own_forms=own_forms,
            chunk_cells=n_cells,
            device=device,
        ),
        chunk_cells,
        what="substituted heads",
        device=device,
    )


def _substituted_values(
    z: Float[np.ndarray, "cells outputs"],
    projected: Float[np.ndarray, "cells columns"],
    target_ss: float,
    readout: Readout,
    *,
    permutations: Int[np.ndarray, "permutations cells"],
    moments: CoalitionMoments,
    own_forms: torch.Tensor,
    chunk_cells: int,
    device: str,
) -> SubstitutedValues:
    n_heads, head_size, n_columns = readout.n_heads, readout.head_size, readout.n_columns
    matrices, own = np.stack([readout.gram, moments.product]), np.arange(n_columns - 1).reshape(n_heads, -1) + 1
    own_blocks = matrices[:, own[:, :, None], own[:, None, :]]
    mean = z.mean(axis=0, dtype=np.float64)
    by_head = mean.reshape(n_heads, head_size)
    parts = _HeadForms(
        z=to_tensor(z, device),
        forms=own_forms,
        means=to_float64(mean, device),
        mean_forms=to_float64(np.einsum("hc,mhce,he->mh", by_head, own_blocks, by_head).reshape(-1), device),
        permutations=to_tensor(permutations, device),
        epsilon=readout.epsilon,
    )
    matrices[:, own[:, :, None], own[:, None, :]] = 0.0
    others, means = to_float64(np.concatenate(list(matrices), axis=1), device), parts.means

    n_substitutes = 1 + len(permutations)
    kernel = compiled_substitution() if torch.device(device).type == "cpu" else None

    def gather(chunks: list[slice]) -> _Sums:
        width = max(rows.stop - rows.start for rows in chunks)
        x_room, image_room = means.new_ones(width, n_columns), means.new_empty(width, 2 * n_columns)
        weight_room = means.new_empty(width, n_substitutes, n_heads)
        sums = _Sums(
            common=means.new_zeros(n_substitutes, n_heads),
            spread=means.new_zeros(n_substitutes, n_heads),
            own=means.new_zeros(n_substitutes, n_heads, head_size),
            x=means.new_zeros(n_substitutes * n_heads, n_columns),
        )
        for rows in chunks:
            size = rows.stop - rows.start
            x, target = x_room[:size], to_tensor(projected[rows], device)
            chunk = _Chunk(rows=rows, x=x, images=image_room[:size], target=target, weights=weight_room[:size])
            x[:, 1:] = parts.z[rows]
            torch.mm(x, others, out=chunk.images)
            if kernel is None:
                _substitute_in_torch(parts, chunk, sums)
            else:
                _substitute_compiled(kernel, parts, chunk, sums)
            sums.x.addmm_(chunk.weights.view(size, -1).T, x)
        return sums

    shares = over_cells(gather, len(z), chunk_cells=chunk_cells, device=device)
    sums, total = shares[0], shares[0].x
    for share in shares[1:]:
        sums.common.add_(share.common)
        sums.spread.add_(share.spread)
        sums.own.add_(share.own)
        sums.x.add_(share.x)
    for head, columns in enumerate(own):
        total.view(n_substitutes, n_heads, n_columns)[:, head, columns[0] : columns[-1] + 1] = sums.own[:, head]
    with one_thread():
        image = total @ to_float64(moments.product, device)
    spread = sums.spread.view(-1) - image.mul_(total).sum(dim=1) / len(z)
    values = ((2 * sums.common.view(-1) - spread) / target_ss).view(n_substitutes, n_heads).T.cpu().numpy()
    return SubstitutedValues(mean=values[:, 0], permuted=values[:, 1:])


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class _HeadForms:
    """Outputs of the heads in all cells, their mean, and the quadratic forms of each head's part alone.

    Forms are under ``gram``, then under ``product``: (cells, 2 * heads) and (2 * heads,); a permutation only moves
    them.
    """

    z: torch.Tensor
    forms: torch.Tensor
    means: torch.Tensor
    mean_forms: torch.Tensor
    permutations: torch.Tensor
    epsilon: float


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class _Chunk:
    """Some cells, and the weights to be written for them.

    ``images``: ``x @ matrix`` under both matrices without each head's own block (cells, 2 * columns); ``weights``: 1 /
    sigma (cells, substitutes, heads), substitute 0 being the mean.
    """

    rows: slice
    x: torch.Tensor
    images: torch.Tensor
    target: torch.Tensor
    weights: torch.Tensor


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class _Sums:
    """Sums over cells under every substitution.

    ``common``: ``x @ target / sigma``, ``spread``: ``x @ product @ x / sigma**2``, both (substitutes, heads); ``own``:
    the substituted part over sigma (substitutes, heads, d); ``x``: ``x / sigma`` before the substitution (substitutes *
    heads, columns).
    """

    common: torch.Tensor
    spread: torch.Tensor
    own: torch.Tensor
    x: torch.Tensor


def _substitute_compiled(kernel: Callable[..., None], parts: _HeadForms, chunk: _Chunk, sums: _Sums) -> None:
    """Write the weights of some cells and add to the sums, with the compiled kernel."""
    everywhere = (parts.z, parts.means, parts.forms, parts.mean_forms, parts.permutations)
    kernel(
        *(tensor.numpy() for tensor in everywhere),
        chunk.rows.start,
        chunk.images.numpy(),
        chunk.target.numpy(),
        parts.epsilon,
        chunk.weights.numpy(),
        sums.common.numpy(),
        sums.spread.numpy(),
        sums.own.numpy(),
    )


def _substitute_in_torch(parts: _HeadForms, chunk: _Chunk, sums: _Sums) -> None:
    """Do what :func:`_substitute` does, on any device."""
    n_cells, n_substitutes, n_heads = chunk.weights.shape
    under_gram, under_product = (image[:, 1:] for image in chunk.images.chunk(2, dim=1))
    along = chunk.target.double()

    def dots(part: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        return (part * image).view(n_cells, n_heads, -1).sum(dim=2)

    def rest(constant: torch.Tensor, dot: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """Return the forms without each head, whose products with other heads are in the dots of all heads."""
        return (constant + (dot + own).sum(dim=1))[:, None] - 2 * dot - own

    here, forms = chunk.x[:, 1:], parts.forms[chunk.rows]
    gram_own, product_own = forms.chunk(2, dim=1)
    gram_rest = rest(chunk.images[:, 0], dots(here, under_gram), gram_own)
    product_rest = rest(chunk.images[:, 1 + here.shape[1]], dots(here, under_product), product_own)
    agreement = dots(here, along[:, 1:])
    target_rest = (along[:, 0] + agreement.sum(dim=1))[:, None] - agreement
    for substitute in range(n_substitutes):
        part, alone = parts.means[None], parts.mean_forms[None]
        if substitute > 0:
            moved = parts.permutations[substitute - 1, chunk.rows].long()
            part, alone = parts.z[moved].double(), parts.forms[moved]
        gram_alone, product_alone = alone.chunk(2, dim=1)
        square = gram_rest + 2 * dots(part, under_gram) + gram_alone
        weight = (square.clamp_(min=0.0) + parts.epsilon).rsqrt()
        square = product_rest + 2 * dots(part, under_product) + product_alone
        chunk.weights[:, substitute] = weight
        sums.spread[substitute] += (weight.square() * square).sum(dim=0)
        sums.common[substitute] += (weight * (target_rest + dots(part, along[:, 1:]))).sum(dim=0)
        weighted = part.reshape(len(part), n_heads, -1) * weight[:, :, None]
        sums.own[substitute] += weighted.sum(dim=0)
