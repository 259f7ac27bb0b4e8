"""Explained variance with heads removed, or substituted by their mean or other cells', without forming predictions."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from amici_eval.common.threads import compiled
from amici_eval.stats.cell_chunks import CHUNK_CELLS, in_chunks, one_thread, over_cells, to_float64, to_tensor

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Bool, Float, Float64, Int, Int64

    from amici_eval.stats.readout import Readout

_COALITION_BLOCK = 512
"""Coalitions that are worked on at a time within a chunk of cells."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class AblatedCells:
    """The cells of one type, as ablations read them.

    ``z``: what attention brought to them; ``projected``: their expression, centred over the cells, times
    ``readout.weights``; ``target_ss``: centred sum of squares of expression over the genes that vary, above 0.
    """

    z: Float[np.ndarray, "cells outputs"]
    projected: Float[np.ndarray, "cells columns"]
    target_ss: float
    readout: Readout


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class CoalitionSums:
    """Sums over cells under the layer norm of each coalition, from which explained variance follows.

    Block 0 is the query residual, block 1 + h is head h; all are summed, kept or not, for the frozen layer norm. With K
    (``product``) ``= weights.T @ weights``: ``mean`` is the mean of ``x / sigma``, ``pairs`` the sum of
    ``x_a @ K_ab @ x_b / sigma**2``, twice that for different blocks, ``cross`` the sum of
    ``x_a @ projected_a / sigma``. ``own_forms`` (cells, 2 * heads), None if not asked for: ``z_h @ matrix_hh @ z_h``
    under ``gram``, then under K.
    """

    kept: Bool[np.ndarray, "coalitions heads"]
    mean: Float64[np.ndarray, "coalitions columns"]
    pairs: Float64[np.ndarray, "coalitions pairs"]
    cross: Float64[np.ndarray, "coalitions blocks"]
    product: Float64[np.ndarray, "columns columns"]
    n_cells: int
    own_forms: torch.Tensor | None = None

    def values(self, target_ss: float) -> Float64[np.ndarray, " coalitions"]:
        """Return the explained variance of each coalition under its own layer norm."""
        n_heads = self.kept.shape[1]
        blocks = _with_query(self.kept)
        head_size = (self.mean.shape[1] - 1) // n_heads
        mean = self.mean.copy()
        mean[:, 1:] *= np.repeat(self.kept, head_size, axis=1)
        with one_thread():
            image = torch.from_numpy(mean) @ torch.from_numpy(self.product)
        spread = np.einsum("cp,cp->c", _pair_mask(self.kept), self.pairs)
        spread -= self.n_cells * np.einsum("ck,ck->c", image.numpy(), mean)
        common = np.einsum("cb,cb->c", blocks, self.cross)
        # without heads the prediction is constant: clip rounding noise to 0
        return np.where(self.kept.any(axis=1), (2 * common - spread) / target_ss, 0.0)

    def block_covariances(self, coalition: int) -> Float64[np.ndarray, "blocks blocks"]:
        """Return ``(cells - 1) tr Cov(P_a, P_b)`` of all blocks under one coalition's layer norm, symmetric."""
        left, right = _pairs(self.kept.shape[1])
        mean = self.mean[coalition]
        head_size = (len(mean) - 1) // self.kept.shape[1]
        starts = np.concatenate([[0], np.arange(1, len(mean), head_size)])
        outer = np.add.reduceat(np.add.reduceat(mean[:, None] * self.product * mean, starts, axis=0), starts, axis=1)
        covariance = np.empty_like(outer)
        covariance[left, right] = self.pairs[coalition] * np.where(left == right, 1.0, 0.5)
        covariance[right, left] = covariance[left, right]
        return np.asarray(covariance - self.n_cells * (outer + outer.T) / 2)


def coalition_sums(
    cells: AblatedCells,
    coalitions: Bool[np.ndarray, "coalitions heads"],
    *,
    device: str = "cpu",
    keep_own_forms: bool = False,
) -> CoalitionSums:
    """Return the sums over cells under the layer norm of each coalition, with heads' own forms if asked for.

    Heads that a coalition does not keep are set to 0 before the layer norm. Exact up to rounding:
    ``P = offset + weights @ x_S / sigma_S``, so traces of covariances need only, per cell, the products of pairs of
    heads under ``gram`` and ``weights.T @ weights``, and per coalition the mean of ``x_S / sigma_S``.
    """
    return in_chunks(
        lambda n_cells: _coalition_sums(cells, coalitions, n_cells, device, keep_own_forms=keep_own_forms),
        CHUNK_CELLS,
        what="ablations",
        device=device,
    )


def _coalition_sums(
    cells: AblatedCells,
    kept: Bool[np.ndarray, "coalitions heads"],
    chunk_cells: int,
    device: str,
    *,
    keep_own_forms: bool,
) -> CoalitionSums:
    z, projected, readout = cells.z, cells.projected, cells.readout
    product = readout.weights.T @ readout.weights
    forms = _PairForms.of(readout, product, device)
    n_heads, head_size, n_outputs = readout.n_heads, readout.head_size, z.shape[1]
    mask = to_float64(_pair_mask(kept), device)
    n_pairs, n_features = mask.shape[1], n_outputs + 2 + n_heads
    own_forms = mask.new_empty(len(z), 2 * n_heads) if keep_own_forms else None
    left, right = _pairs(n_heads)
    with_itself = torch.from_numpy(np.flatnonzero((left == right) & (left > 0))).to(device)

    def gather(chunks: list[slice]) -> tuple[torch.Tensor, torch.Tensor]:
        linear, pairs = mask.new_zeros(len(kept), n_features), mask.new_zeros(len(kept), n_pairs)
        # cells are the last axis, so that sums over a head's numbers are vectorised over cells; buffers serve all
        # chunks, because allocating memory of this size costs as much as the arithmetic
        width = max(rows.stop - rows.start for rows in chunks)
        feature_room, target_room = mask.new_empty(n_features * width), mask.new_empty((n_outputs + 1) * width)
        term_room, image_room = mask.new_empty(2 * n_pairs * width), mask.new_empty(2 * n_outputs * width)
        sigma_room = mask.new_empty(min(_COALITION_BLOCK, len(kept)) * width)
        for rows in chunks:
            size = rows.stop - rows.start
            features, target = _shaped(feature_room, n_features, size), _shaped(target_room, n_outputs + 1, size)
            heads = features[:n_outputs]
            heads.copy_(to_tensor(z[rows], device).T)
            features[n_outputs] = 1.0
            target.copy_(to_tensor(projected[rows], device).T)
            features[n_outputs + 1] = target[0]
            agreement = target[1:].mul_(heads).view(n_heads, head_size, size)
            torch.sum(agreement, 1, out=features[n_outputs + 2 :])
            terms = _shaped(term_room, 2, n_pairs, size)
            forms.write_terms(heads, images=image_room, terms=terms)
            if own_forms is not None:
                own_forms[rows] = terms[:, with_itself].view(2 * n_heads, size).T
            for start in range(0, len(kept), _COALITION_BLOCK):
                block = slice(start, start + _COALITION_BLOCK)
                inverse = _shaped(sigma_room, len(kept[block]), size)
                torch.mm(mask[block], terms[0], out=inverse)
                inverse.clamp_(min=readout.epsilon).reciprocal_()
                pairs[block].addmm_(inverse, terms[1].T)
                linear[block].addmm_(inverse.sqrt_(), features.T)
        return linear, pairs

    shares = over_cells(gather, len(z), chunk_cells=chunk_cells, device=device)
    sums = torch.stack([linear for linear, _ in shares]).sum(dim=0).cpu().numpy()
    return CoalitionSums(
        kept=kept,
        mean=np.concatenate([sums[:, n_outputs : n_outputs + 1], sums[:, :n_outputs]], axis=1) / len(z),
        pairs=torch.stack([pairs for _, pairs in shares]).sum(dim=0).cpu().numpy(),
        cross=sums[:, n_outputs + 1 :],
        product=product,
        n_cells=len(z),
        own_forms=own_forms,
    )


def _shaped(room: torch.Tensor, *shape: int) -> torch.Tensor:
    """Return the first entries of a flat tensor in a shape."""
    return room[: math.prod(shape)].view(shape)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class _PairForms:
    """The quadratic forms under ``gram`` and ``product``, by pairs of blocks.

    ``constant``: query residual with itself (2, 1), the layer norm's epsilon added under ``gram``; ``query``: with each
    head, doubled (2 * heads, outputs); ``later``: each head with itself and, doubled, with those after it (2 * outputs
    of these, head_size).
    """

    constant: torch.Tensor
    query: torch.Tensor
    later: tuple[torch.Tensor, ...]

    @classmethod
    def of(cls, readout: Readout, product: Float64[np.ndarray, "columns columns"], device: str) -> _PairForms:
        matrices = np.stack([readout.gram, product])
        n_heads, head_size = readout.n_heads, readout.head_size
        query = np.zeros((2, n_heads, n_heads, head_size))
        every = np.arange(n_heads)
        query[:, every, every] = 2 * matrices[:, 0, 1:].reshape(2, n_heads, head_size)
        later = []
        for start in range(1, readout.n_columns, head_size):
            # columns: this head; rows: this head and those after it
            block = matrices[:, start:, start : start + head_size].copy()
            block[:, head_size:] *= 2
            later.append(to_float64(block.reshape(-1, head_size), device))
        constant = matrices[:, 0, :1] + [[readout.epsilon], [0.0]]
        return cls(
            constant=to_float64(constant, device),
            query=to_float64(query.reshape(2 * n_heads, -1), device),
            later=tuple(later),
        )

    def write_terms(self, heads: torch.Tensor, *, images: torch.Tensor, terms: torch.Tensor) -> None:
        """Write ``x_a @ matrix_ab @ x_b`` per pair of blocks a <= b and cell into ``terms``, twice that where a < b.

        ``terms`` is (2, pairs, cells), pairs in the order of ``numpy.triu_indices(heads + 1)``; its sum over the pairs
        of kept blocks is ``x_S @ matrix @ x_S``, with epsilon added under ``gram``. ``heads`` is (outputs, cells);
        ``images`` is a buffer of 2 * outputs * cells numbers.
        """
        n_cells, n_heads = heads.shape[1], len(self.later)
        head_size = len(heads) // n_heads
        terms[:, 0] = self.constant
        terms[:, 1 : n_heads + 1] = (self.query @ heads).view(2, n_heads, n_cells)
        at = n_heads + 1
        for head, matrix in enumerate(self.later):
            n_later, start = n_heads - head, head * head_size
            image = _shaped(images, len(matrix), n_cells)
            torch.mm(matrix, heads[start : start + head_size], out=image)
            image.view(2, -1, n_cells).mul_(heads[start:])
            torch.sum(image.view(2, n_later, head_size, n_cells), 2, out=terms[:, at : at + n_later])
            at += n_later


def _pairs(n_heads: int) -> tuple[Int64[np.ndarray, " pairs"], Int64[np.ndarray, " pairs"]]:
    """Return the blocks a <= b of all pairs."""
    return np.triu_indices(n_heads + 1)


def _pair_mask(kept: Bool[np.ndarray, "coalitions heads"]) -> Float64[np.ndarray, "coalitions pairs"]:
    """Return 1 for pairs of blocks that a coalition keeps both, else 0, ordered as ``triu_indices(heads + 1)``."""
    left, right = _pairs(kept.shape[1])
    blocks = _with_query(kept)
    return np.asarray(blocks[:, left] & blocks[:, right], dtype=np.float64)


def _with_query(kept: Bool[np.ndarray, "coalitions heads"]) -> Bool[np.ndarray, "coalitions blocks"]:
    return np.concatenate([np.ones((len(kept), 1), dtype=bool), kept], axis=1)


@functools.cache
def _compiled_substitution() -> Callable[..., None]:
    kernel: Callable[..., None] = compiled(_substitute, error_model="numpy", fastmath={"contract", "reassoc", "nsz"})
    return kernel


def cpu_substitution(device: str) -> Callable[..., None] | None:
    """Return :func:`_substitute` compiled for the CPU, None for a device on which torch computes."""
    return _compiled_substitution() if torch.device(device).type == "cpu" else None


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

    The many arguments are arrays because numba compiles no dataclasses.

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
    cells: AblatedCells,
    permutations: Int[np.ndarray, "permutations cells"],
    coalitions: CoalitionSums,
    *,
    device: str = "cpu",
) -> SubstitutedValues:
    """Return the explained variance of one cell type with each head's part replaced by its mean or another cell's.

    Exact up to rounding; the layer norm is that of the substituted whole. Permutations are of positions, shared by all
    heads, and may be none. ``coalitions`` are any of these cells, with the heads' own forms. On the CPU a compiled
    kernel does what is not a matrix product.
    """
    return in_chunks(
        lambda n_cells: _substituted_values(cells, permutations, coalitions, device=device, chunk_cells=n_cells),
        CHUNK_CELLS,
        what="substituted heads",
        device=device,
    )


def _substituted_values(
    cells: AblatedCells,
    permutations: Int[np.ndarray, "permutations cells"],
    coalitions: CoalitionSums,
    *,
    chunk_cells: int,
    device: str,
) -> SubstitutedValues:
    z, projected, readout, own_forms = cells.z, cells.projected, cells.readout, coalitions.own_forms
    assert own_forms is not None  # noqa: S101, RUF100 - for the type checker
    n_heads, head_size, n_columns = readout.n_heads, readout.head_size, readout.n_columns
    matrices, own = np.stack([readout.gram, coalitions.product]), np.arange(n_columns - 1).reshape(n_heads, -1) + 1
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
    kernel = cpu_substitution(device)

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
        image = total @ to_float64(coalitions.product, device)
    spread = sums.spread.view(-1) - image.mul_(total).sum(dim=1) / len(z)
    values = ((2 * sums.common.view(-1) - spread) / cells.target_ss).view(n_substitutes, n_heads).T.cpu().numpy()
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
