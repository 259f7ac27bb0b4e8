"""Tests of each head, and of each head and gene, that hold where neighbouring cells resemble each other."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.stats import t as student_t

from amici_eval.common.memory import Shrinking

if TYPE_CHECKING:
    from jaxtyping import Float, Float64
    from torch import Tensor

    from amici_eval.stats.spatial.lag import CellPositions, LagGrid, NearPairs

MIN_EFFECTIVE_CELLS = 5.0
"""With fewer there is no p: the estimated variance is too uncertain for any reference distribution."""
POWER = 0.8
_LEAST_PAIRS = 200
_ROUNDING = 1e-10
_SAME = 1e-12
"""Numbers that vary by less than this share of their size are constants up to float64 rounding."""
_UNSTRUCTURED = 0.01
"""Correlation of expression between near cells below which no correlation length is given."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class GeneSums:
    """Sums over the cells of a type that per-gene tests use.

    ``weights``: A, by which head h predicts ``constant + F_h @ A_h.T``; ``near``: expression of the cells of the near
    pairs; ``target_ss``, ``predicted_ss``, ``common``: centred sums of squares of expression and of predictions, and of
    their products.
    """

    weights: Float64[np.ndarray, "heads genes rank"]
    pixel_sums: Float64[np.ndarray, "pixels genes"]
    near: Float[np.ndarray, "sampled genes"]
    target_ss: Float64[np.ndarray, " genes"]
    predicted_ss: Float64[np.ndarray, "heads genes"]
    common: Float64[np.ndarray, "heads genes"]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class LagTest:
    """Result of the lag test of one cell type.

    ``statistic``: standardised fit; ``ess``: effective sample size; p are NaN where ``ess`` is below
    :data:`MIN_EFFECTIVE_CELLS` or a head does not vary. ``detectable``: smallest explained variance that a head of this
    smoothness would have shown with 80 % power. ``correlation_length``: distance at which the spatially structured part
    of expression has fallen to 1/e of that between the nearest cells, NaN without such a part; ``reach``: largest
    distance of pairs that count; both in coordinate units.
    """

    statistic: Float64[np.ndarray, " heads"]
    ess: Float64[np.ndarray, " heads"]
    p: Float64[np.ndarray, " heads"]
    detectable: Float64[np.ndarray, " heads"]
    p_gene: Float64[np.ndarray, "heads genes"]
    correlation_length: float
    reach: float


def lag_test(
    factors: Float[np.ndarray, "cells rank heads"],
    images: Float[np.ndarray, "cells rank heads"],
    *,
    place: CellPositions,
    genes: GeneSums,
    alpha: float = 0.05,
    reach: float | None = None,
    device: str = "cpu",
) -> LagTest:
    """Test whether heads fit expression better than an independent field of the same smoothness would.

    Null: prediction and expression are independent; each may be correlated in space, with one mean per section and
    covariances of distance alone (Clifford, Richardson & Hemon 1989; Dutilleul 1993). T, the sum of products centred
    within sections, has ``Var(T) = tr(S_F S_Z) / n + sum_k N_k tr(C_F(k) C_Z(k))``, at least the first term; C(k) are
    mean outer products at distance k. The effective sample size is ``1 + tr(S_F S_Z) / Var(T)``. Head h predicts
    ``constant + F_h @ A_h.T`` and Z is Y times A, uncentred. ``reach`` None: up to the window's longer side.
    """
    room = Shrinking(factors.shape[2], what="the test in tissue", unit="heads", device=device)
    return room.run(
        lambda some: _lag_test(
            factors,
            images,
            place=place,
            genes=genes,
            alpha=alpha,
            reach=reach,
            device=device,
            n_heads=some,
        )
    )


def _lag_test(
    factors: Float[np.ndarray, "cells rank heads"],
    images: Float[np.ndarray, "cells rank heads"],
    *,
    place: CellPositions,
    genes: GeneSums,
    alpha: float,
    reach: float | None,
    device: str,
    n_heads: int,
) -> LagTest:
    """Run :func:`lag_test` with sums over pairs for ``n_heads`` heads, and as large a share of the genes, at a time."""
    grid, near = place.grid, place.near
    n_genes = max(1, len(genes.target_ss) * n_heads // factors.shape[2])
    # a cell alone in its section equals the section's mean and does not count
    n_cells = int(grid.section_counts[grid.section_counts > 1].sum())
    f, z = (_by_head(values, device) for values in (factors, images))
    sizes = [values.square().sum(dim=(1, 2)) for values in (f, z)]
    f_means, z_means = (_section_means(values, grid) for values in (f, z))
    section = torch.from_numpy(grid.section).to(device)
    f, z = f - f_means[:, section], z - z_means[:, section]
    f_own, z_own = f.transpose(1, 2) @ f, z.transpose(1, 2) @ z
    f_lags, z_lags = (_lag_products(values, grid, near, n_heads) for values in (f, z))
    distances = np.concatenate([near.distances, grid.distances])
    every_pair = np.concatenate([near.pairs, grid.pairs])
    # near pairs count whatever the reach: without them the null would have no covariances
    used = distances <= (np.inf if reach is None else max(reach, float(near.distances[-1])))
    pairs = np.where(used, every_pair, 0.0)
    own_products = (f_own * z_own).sum(dim=(1, 2)) / max(n_cells, 1)
    for own, size in zip((f_own, z_own), sizes, strict=True):
        # fields that do not vary within sections are 0 up to rounding
        own_products[own.diagonal(dim1=1, dim2=2).sum(dim=1) <= _SAME**2 * size] = 0.0
    free = own_products.cpu().numpy()
    left_out = 0.0 if reach is None else _of_pairs_left_out(grid, float(pairs.sum()))
    at_lags = pairs @ (f_lags * z_lags).sum(dim=(2, 3)).cpu().numpy() + left_out * free

    a = torch.from_numpy(genes.weights).to(device)
    within = _about_section_means(genes, grid, f_means, a)
    predicted_lags = torch.stack([_quadratic(a[head], f_lags[:, head]) for head in range(len(a))], dim=1)
    target_lags = _lag_squares(genes, grid, near, device, n_genes)
    free_gene = within.predicted_ss * within.target_ss / max(n_cells, 1)
    at_lags_gene = np.einsum("k,khg,kg->hg", pairs, predicted_lags.cpu().numpy(), target_lags)
    at_lags_gene += left_out * free_gene

    # upper bound of the sum of products, so that their ratio is a correlation
    scale = np.sqrt(within.predicted_ss.sum(axis=1) * within.target_ss.sum())
    fit = (f * z).sum(dim=(1, 2)).cpu().numpy()
    heads = _student(fit, free, at_lags, scale, n_cells=n_cells)
    scale_gene = np.sqrt(within.predicted_ss * within.target_ss)
    by_gene = _student(within.common, free_gene, at_lags_gene, scale_gene, n_cells=n_cells)
    degrees = np.maximum(heads.ess - 2.0, 1.0)
    needed = student_t.isf(alpha, degrees) + student_t.isf(1.0 - POWER, degrees)
    with np.errstate(divide="ignore", invalid="ignore"):
        detectable = np.minimum((needed * heads.deviation / scale) ** 2, 1.0)
    correlation = target_lags.sum(axis=1) * n_cells / max(within.target_ss.sum(), np.finfo(float).tiny)
    return LagTest(
        statistic=heads.statistic,
        ess=heads.ess,
        p=heads.p,
        detectable=np.where(np.isfinite(heads.p), detectable, np.nan),
        p_gene=by_gene.p,
        correlation_length=_correlation_length(distances, every_pair, correlation),
        reach=float(distances[used & (every_pair > 0)].max(initial=0.0)),
    )


def _of_pairs_left_out(grid: LagGrid, n_used: float) -> float:
    """Return what pairs beyond the reach add to the variance, as a share of that of independent cells.

    Centring makes any two of a section's n cells covary by ``-1 / (n - 1)`` of their variance, in both fields: all
    pairs together add ``1 / (n - 1)``, a third in a section of four cells.
    """
    counts = grid.section_counts[grid.section_counts > 1].astype(np.float64)
    n_pairs = float((counts * (counts - 1.0)).sum())
    if not n_pairs:
        return 0.0
    return max(1.0 - n_used / n_pairs, 0.0) * float((counts / (counts - 1.0)).sum() / counts.sum())


@dataclass(frozen=True)
class _Outcome:
    statistic: Float64[np.ndarray, ...]
    deviation: Float64[np.ndarray, ...]
    ess: Float64[np.ndarray, ...]
    p: Float64[np.ndarray, ...]


def _student(
    fit: Float64[np.ndarray, ...],
    free: Float64[np.ndarray, ...],
    at_lags: Float64[np.ndarray, ...],
    scale: Float64[np.ndarray, ...],
    *,
    n_cells: int,
) -> _Outcome:
    """Compare sums of products with Student's t, as Dutilleul (1993) does with a correlation."""
    variance = np.maximum(free, free + at_lags)
    with np.errstate(divide="ignore", invalid="ignore"):
        ess = np.minimum(1.0 + n_cells * free / variance, float(n_cells))
        statistic = fit / np.sqrt(variance)
        unexplained = np.maximum(1.0 - (fit / scale) ** 2, np.finfo(float).eps)
        t = statistic * np.sqrt((ess - 2.0) / ((ess - 1.0) * unexplained))
        p = np.maximum(student_t.sf(t, ess - 2.0), np.finfo(float).tiny)
    usable = (free > 0.0) & (ess >= MIN_EFFECTIVE_CELLS)
    return _Outcome(
        statistic=np.where(free > 0.0, statistic, np.nan),
        deviation=np.sqrt(variance),
        ess=np.where(free > 0.0, ess, np.nan),
        p=np.where(usable, p, np.nan),
    )


def _by_head(values: Float[np.ndarray, "cells rank heads"], device: str) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1), dtype=np.float64)).to(device)


def _section_means(values: Tensor, grid: LagGrid) -> Tensor:
    """Return means over the cells of each section, shape (heads, sections, rank)."""
    section = torch.from_numpy(grid.section).to(values.device)
    sums = values.new_zeros(len(values), grid.n_sections, values.shape[2]).index_add_(1, section, values)
    return sums / torch.from_numpy(grid.section_counts).to(values.device)[:, None]


def _lag_products(values: Tensor, grid: LagGrid, near: NearPairs, n_heads: int) -> Tensor:
    """Return mean outer products by distance, for ``n_heads`` heads at a time."""
    found = []
    for some in values.split(n_heads):
        image = grid.sums(some.transpose(0, 1).contiguous()).transpose(0, 1).contiguous()
        found.append(torch.cat([near.products(some), grid.products(image)]))
    return torch.cat(found, dim=1)


def _lag_squares(
    genes: GeneSums, grid: LagGrid, near: NearPairs, device: str, n_genes: int
) -> Float64[np.ndarray, "bins genes"]:
    """Return mean products by distance, for ``n_genes`` genes at a time."""
    sums = torch.from_numpy(genes.pixel_sums).to(device)
    counts = torch.from_numpy(np.maximum(grid.section_counts, 1).astype(np.float64)).to(device)
    means = sums.view(grid.n_sections, -1, sums.shape[1]).sum(dim=1) / counts[:, None]
    own = torch.from_numpy(genes.near).to(device).double()
    own = own - means[torch.from_numpy(grid.section[near.cells]).to(device)]
    centred = grid.centred(sums).T

    return np.concatenate(
        [
            torch.cat([near.squares(own[:, start : start + n_genes]), grid.squares(some.contiguous())]).cpu().numpy()
            for start, some in zip(range(0, len(centred), n_genes), centred.split(n_genes), strict=True)
        ],
        axis=1,
    )


def _quadratic(weights: Tensor, products: Tensor) -> Tensor:
    """Return the diagonal of ``weights @ products @ weights.T``: (..., rank, rank) becomes (..., genes)."""
    return ((weights @ products) * weights).sum(dim=-1)


def _about_section_means(genes: GeneSums, grid: LagGrid, f_means: Tensor, weights: Tensor) -> GeneSums:
    """Return the sums of genes about the means of each section, given those about the means of all cells."""
    if grid.n_sections == 1:
        return genes
    counts = grid.section_counts.astype(np.float64)
    share = counts / counts.sum()
    y = genes.pixel_sums.reshape(grid.n_sections, -1, genes.pixel_sums.shape[1]).sum(axis=1) / counts[:, None]
    p = (f_means @ weights.transpose(1, 2)).cpu().numpy()
    y, p = y - share @ y, p - np.einsum("s,hsg->hg", share, p)[:, None]
    return replace(
        genes,
        target_ss=_without_between(genes.target_ss, counts @ y**2),
        predicted_ss=_without_between(genes.predicted_ss, np.einsum("s,hsg->hg", counts, p**2)),
        common=genes.common - np.einsum("s,hsg,sg->hg", counts, p, y),
    )


def _without_between(total: Float64[np.ndarray, ...], between: Float64[np.ndarray, ...]) -> Float64[np.ndarray, ...]:
    """Return a sum of squares without the part between sections, with rounding noise clipped to 0."""
    return np.where(total - between > _ROUNDING * total, total - between, 0.0)


def _correlation_length(
    distances: Float64[np.ndarray, " bins"],
    pairs: Float64[np.ndarray, " bins"],
    correlation: Float64[np.ndarray, " bins"],
) -> float:
    usable = np.flatnonzero(pairs >= _LEAST_PAIRS)
    if not len(usable) or correlation[usable[0]] < _UNSTRUCTURED:
        return float("nan")
    below = usable[correlation[usable] < correlation[usable[0]] / np.e]
    if not len(below):
        return float(distances[usable[-1]])
    last = usable[np.searchsorted(usable, below[0]) - 1]
    steps = (correlation[last] - correlation[usable[0]] / np.e) / (correlation[last] - correlation[below[0]])
    return float(distances[last] + steps * (distances[below[0]] - distances[last]))
