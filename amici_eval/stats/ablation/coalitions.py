"""Explained variance of any set of heads that are kept, without forming a prediction."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from amici_eval.stats.cell_chunks import CHUNK_CELLS, in_chunks, one_thread, over_cells, to_float64, to_tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Float64, Int, Int64

    from amici_eval.stats.readout import Readout

_COALITION_BLOCK = 512
"""Coalitions that are worked on at a time within a chunk of cells."""


def coalition_values(
    z: Float[np.ndarray, "cells outputs"],
    projected: Float[np.ndarray, "cells columns"],
    target_ss: float,
    readout: Readout,
    *,
    coalitions: Bool[np.ndarray, "coalitions heads"] | Int[np.ndarray, "coalitions heads"],
    chunk_cells: int = CHUNK_CELLS,
    device: str = "cpu",
) -> Float64[np.ndarray, " coalitions"]:
    """Return the explained variance of one cell type over all genes for many sets of heads that are kept.

    Other heads are set to 0 before the layer norm, and every coalition is divided by its own layer norm. Exact up to
    rounding: ``P = offset + weights @ x_S / sigma_S``, so traces of covariances need only, per cell, the products of
    pairs of heads under ``gram`` and ``weights.T @ weights``, and per coalition the mean of ``x_S / sigma_S``.
    ``projected``: expression, centred over the cells, times ``readout.weights``; ``chunk_cells`` changes the last bits.
    """
    check_inputs(z, projected, target_ss, readout)
    moments = coalition_moments(z, projected, readout, coalitions=coalitions, chunk_cells=chunk_cells, device=device)
    return moments.values(target_ss)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class CoalitionMoments:
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
        spread = np.einsum("cp,cp->c", pair_mask(self.kept), self.pairs)
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


def coalition_moments(
    z: Float[np.ndarray, "cells outputs"],
    projected: Float[np.ndarray, "cells columns"],
    readout: Readout,
    *,
    coalitions: Bool[np.ndarray, "coalitions heads"] | Int[np.ndarray, "coalitions heads"],
    chunk_cells: int = CHUNK_CELLS,
    device: str = "cpu",
    keep_own_forms: bool = False,
) -> CoalitionMoments:
    """Return the sums over cells that :func:`coalition_values` uses, with heads' own forms if asked for."""
    kept = _as_bool(coalitions, readout.n_heads)
    return in_chunks(
        lambda n_cells: _coalition_moments(z, projected, readout, kept, n_cells, device, keep_own_forms=keep_own_forms),
        chunk_cells,
        what="ablations",
        device=device,
    )


def _coalition_moments(
    z: Float[np.ndarray, "cells outputs"],
    projected: Float[np.ndarray, "cells columns"],
    readout: Readout,
    kept: Bool[np.ndarray, "coalitions heads"],
    chunk_cells: int,
    device: str,
    *,
    keep_own_forms: bool,
) -> CoalitionMoments:
    product = readout.weights.T @ readout.weights
    forms = _PairForms.of(readout, product, device)
    n_heads, head_size, n_outputs = readout.n_heads, readout.head_size, z.shape[1]
    mask = to_float64(pair_mask(kept), device)
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
    return CoalitionMoments(
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


def pair_mask(kept: Bool[np.ndarray, "coalitions heads"]) -> Float64[np.ndarray, "coalitions pairs"]:
    """Return 1 for pairs of blocks that a coalition keeps both, else 0, ordered as ``triu_indices(heads + 1)``."""
    left, right = _pairs(kept.shape[1])
    blocks = _with_query(kept)
    return np.asarray(blocks[:, left] & blocks[:, right], dtype=np.float64)


def _with_query(kept: Bool[np.ndarray, "coalitions heads"]) -> Bool[np.ndarray, "coalitions blocks"]:
    return np.concatenate([np.ones((len(kept), 1), dtype=bool), kept], axis=1)


def _as_bool(
    coalitions: Bool[np.ndarray, "coalitions heads"] | Int[np.ndarray, "coalitions heads"], n_heads: int
) -> Bool[np.ndarray, "coalitions heads"]:
    coalitions = np.asarray(coalitions)
    if coalitions.ndim != 2 or coalitions.shape[1] != n_heads:
        msg = f"coalitions have shape {coalitions.shape}; they must be (coalitions, {n_heads}), a column a head"
        raise ValueError(msg)
    if not np.isin(coalitions, (0, 1)).all():
        msg = f"coalitions hold {coalitions[~np.isin(coalitions, (0, 1))][0]}; 1 keeps a head, 0 removes it"
        raise ValueError(msg)
    return coalitions.astype(bool)


def check_inputs(
    z: Float[np.ndarray, "cells outputs"],
    projected: Float[np.ndarray, "cells columns"],
    target_ss: float,
    readout: Readout,
) -> None:
    """Raise ``ValueError`` if shapes do not fit the readout or no gene varies."""
    n_outputs = readout.n_columns - 1
    if z.ndim != 2 or z.shape[1] != n_outputs or projected.shape != (len(z), readout.n_columns):
        msg = (
            f"z has shape {z.shape}, projected {projected.shape}; a readout of {readout.n_heads} heads of "
            f"{readout.head_size} takes (cells, {n_outputs}) and (cells, {readout.n_columns})"
        )
        raise ValueError(msg)
    if not target_ss > 0:
        msg = f"target_ss is {target_ss}; explained variance is undefined unless expression varies (target_ss > 0)"
        raise ValueError(msg)
