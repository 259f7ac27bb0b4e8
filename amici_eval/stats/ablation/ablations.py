"""Explained variance of one cell type with heads removed or substituted, and Shapley values of heads."""

from __future__ import annotations

from dataclasses import dataclass
from math import comb
from typing import TYPE_CHECKING

import numpy as np

from amici_eval.settings.evaluation import MODES
from amici_eval.stats.ablation.values import coalition_sums, substituted_values
from amici_eval.stats.permutation.permutations import PermutationStream

if TYPE_CHECKING:
    from collections.abc import Collection

    from jaxtyping import Bool, Float64, Int32, Int64

    from amici_eval.stats.ablation.values import AblatedCells, CoalitionSums


@dataclass(frozen=True, kw_only=True, eq=False)
class ShapleyValues:
    """Each head's share of ``v(all heads) - v(no head)``.

    ``values`` are in the unit of v and sum to that difference, also if sampled; ``standard_error`` is 0 if exact.
    """

    values: Float64[np.ndarray, " heads"]
    standard_error: Float64[np.ndarray, " heads"]


def all_coalitions(n_heads: int) -> Bool[np.ndarray, "coalitions heads"]:
    """Return all sets of heads: row c keeps head h if bit h of c is set."""
    return np.asarray((np.arange(2**n_heads)[:, None] >> np.arange(n_heads)) & 1, dtype=bool)


def shapley_values(values: Float64[np.ndarray, " coalitions"]) -> ShapleyValues:
    """Return the exact Shapley values (Shapley 1953) from the values of :func:`all_coalitions`, in its order."""
    n_heads = len(values).bit_length() - 1
    codes = np.arange(len(values))
    sizes = all_coalitions(n_heads).sum(axis=1)
    weights = np.array([1 / (n_heads * comb(n_heads - 1, size)) for size in range(n_heads)])
    shares = np.empty(n_heads)
    for head in range(n_heads):
        without = codes[codes >> head & 1 == 0]
        shares[head] = weights[sizes[without]] @ (values[without | 1 << head] - values[without])
    return ShapleyValues(values=shares, standard_error=np.zeros(n_heads))


def interaction_index(values: Float64[np.ndarray, " coalitions"]) -> Float64[np.ndarray, "heads heads"]:
    """Return the Shapley interaction index of each pair of heads (Grabisch & Roubens 1999); the diagonal is NaN.

    ``values`` are those of :func:`all_coalitions`, in its order. The index is a mean over sets S of the other heads of
    ``v(S+h+k) - v(S+h) - v(S+k) + v(S)``; below 0, the two heads are redundant or harm each other.
    """
    n_heads = len(values).bit_length() - 1
    codes = np.arange(len(values))
    sizes = all_coalitions(n_heads).sum(axis=1)
    weights = np.array([1 / ((n_heads - 1) * comb(n_heads - 2, size)) for size in range(n_heads - 1)])
    index = np.full((n_heads, n_heads), np.nan)
    for first in range(n_heads):
        for second in range(first + 1, n_heads):
            one, other = 1 << first, 1 << second
            without = codes[codes & (one | other) == 0]
            gain = values[without | one | other] - values[without | one] - values[without | other] + values[without]
            index[first, second] = index[second, first] = weights[sizes[without]] @ gain
    return index


def antithetic_orders(n_heads: int, *, n_orders: int, seed: int, cell_type: str) -> Int64[np.ndarray, "orders heads"]:
    """Return random orders of the heads, each followed by its reverse; ``n_orders`` is even, at least 4.

    Orders 2k and 2k + 1 depend on seed, cell type, k and the number of heads alone.
    """
    n_pairs = n_orders // 2
    stream = PermutationStream(seed=seed, cell_type=cell_type, n_cells=n_heads, stratum="orders of heads")
    forward = stream.batch(0, n_pairs)
    return np.asarray(np.stack([forward, forward[:, ::-1]], axis=1).reshape(n_orders, n_heads))


def order_coalitions(orders: Int64[np.ndarray, "orders heads"]) -> Bool[np.ndarray, "orders sizes heads"]:
    """Return the sets that the first 0, 1, ..., H heads of each order make."""
    ranks = np.argsort(orders, axis=1)
    return np.asarray(ranks[:, None, :] < np.arange(orders.shape[1] + 1)[:, None])


def sampled_shapley_values(
    values: Float64[np.ndarray, "orders sizes"], orders: Int64[np.ndarray, "orders heads"]
) -> ShapleyValues:
    """Return Shapley values estimated from sampled orders of the heads (Castro, Gomez & Tejada 2009).

    ``values`` are those of :func:`order_coalitions`, ``orders`` from :func:`antithetic_orders`. An order and its
    reverse are one draw (Mitchell et al. 2022): the standard error is that of the mean over these pairs.
    """
    n_orders, n_heads = orders.shape
    added = np.empty((n_orders, n_heads))
    np.put_along_axis(added, orders, np.diff(values, axis=1), axis=1)
    pairs = added.reshape(n_orders // 2, 2, n_heads).mean(axis=1)
    return ShapleyValues(values=pairs.mean(axis=0), standard_error=pairs.std(axis=0, ddof=1) / np.sqrt(len(pairs)))


@dataclass(frozen=True, kw_only=True, eq=False)
class TypeAblations:
    """Explained variance over all genes of one cell type under each ablation; NaN for those not asked for.

    ``frozen`` values are divided by the whole model's layer norm. ``leave_one_out`` sets a head to 0, ``mean_z``
    replaces it by its mean over cells, ``resampled_z`` by that of other cells, a mean over permutations (standard error
    NaN for one). ``shapley`` sums to ``full - none``, ``frozen_shapley`` to ``full - frozen_none``. ``interaction``:
    see :func:`interaction_index`; ``interaction_reason``: why it is NaN though "shapley" was asked for, else None.
    """

    modes: tuple[str, ...]
    full: float
    none: float
    frozen_none: float
    keep_one: Float64[np.ndarray, " heads"]
    leave_one_out: Float64[np.ndarray, " heads"]
    mean_z: Float64[np.ndarray, " heads"]
    resampled_z: Float64[np.ndarray, " heads"]
    resampled_z_standard_error: Float64[np.ndarray, " heads"]
    frozen_norm: Float64[np.ndarray, " heads"]
    shapley: Float64[np.ndarray, " heads"]
    shapley_standard_error: Float64[np.ndarray, " heads"]
    frozen_shapley: Float64[np.ndarray, " heads"]
    interaction: Float64[np.ndarray, "heads heads"]
    frozen_interaction: Float64[np.ndarray, "heads heads"]
    interaction_reason: str | None = None


MAX_EXACT_HEADS = 12
"""Up to here all coalitions (4,096) are evaluated; above, orders of the heads are sampled."""
N_ORDERS = 512
"""Orders of the heads that Shapley values are estimated from above ``MAX_EXACT_HEADS``."""
N_RESAMPLES = 8
"""Permutations that "resampled_z" is averaged over."""


def ablate(
    cells: AblatedCells,
    *,
    modes: Collection[str],
    seed: int,
    cell_type: str,
    device: str = "cpu",
) -> TypeAblations:
    """Return the explained variance of one cell type under each ablation that is asked for.

    Cells come in canonical order (by name): the permutations of "resampled_z", shared by all heads, are of positions.
    Above ``MAX_EXACT_HEADS``, Shapley values come from sampled orders, without interactions. Under a frozen layer
    norm contributions add, so that whatever the number of heads a share is ``tr Cov(P_h, 2 Y - P_full - P_0) / V_Y``
    and an interaction ``-2 tr Cov(P_h, P_k) / V_Y``. ``device``, which must have float64, changes the last bits.
    """
    n_heads = cells.readout.n_heads
    nothing, no_pairs = np.full(n_heads, np.nan), np.full((n_heads, n_heads), np.nan)
    orders = None
    if "shapley" in modes and n_heads > MAX_EXACT_HEADS:
        orders = antithetic_orders(n_heads, n_orders=N_ORDERS, seed=seed, cell_type=cell_type)
    # in this order: whole model, no head, keep one, leave one out, coalitions for Shapley values
    single = np.eye(n_heads, dtype=bool)
    wanted = [np.ones((1, n_heads), dtype=bool), np.zeros((1, n_heads), dtype=bool)]
    wanted += [single if "keep_one" in modes else single[:0], ~single if "leave_one_out" in modes else single[:0]]
    if "shapley" in modes:
        every = all_coalitions(n_heads) if orders is None else order_coalitions(orders).reshape(-1, n_heads)
        wanted.append(every)
    distinct, where = np.unique(np.concatenate(wanted), axis=0, return_inverse=True)
    where = where.reshape(-1)
    substitutes = "mean_z" in modes or "resampled_z" in modes
    sums = coalition_sums(cells, distinct, device=device, keep_own_forms=substitutes)
    values = sums.values(cells.target_ss)[where]
    full, none, keep_one, leave_one_out, rest = np.split(values, np.cumsum([len(part) for part in wanted[:4]]))

    shapley, interaction, reason = ShapleyValues(values=nothing, standard_error=nothing), no_pairs, None
    if "shapley" in modes and orders is None:
        shapley, interaction = shapley_values(rest), interaction_index(rest)
    elif orders is not None:
        shapley = sampled_shapley_values(rest.reshape(len(orders), n_heads + 1), orders)
        reason = f"{n_heads} heads; all coalitions are evaluated up to {MAX_EXACT_HEADS}"

    mean_z, resampled_z, resampling_error = nothing, nothing, nothing
    if substitutes:
        n_resamples = N_RESAMPLES if "resampled_z" in modes else 0
        permutations = _permutations(seed, cell_type, len(cells.z), n_resamples)
        substituted = substituted_values(cells, permutations, sums, device=device)
        if "mean_z" in modes:
            mean_z = substituted.mean
        if n_resamples:
            resampled_z = substituted.permuted.mean(axis=1)
        if n_resamples > 1:
            resampling_error = substituted.permuted.std(axis=1, ddof=1) / np.sqrt(n_resamples)
    frozen = _frozen(sums, int(where[0]), cells.target_ss)
    return TypeAblations(
        modes=tuple(mode for mode in MODES if mode in modes),
        full=float(full[0]),
        none=float(none[0]),
        frozen_none=frozen.none,
        keep_one=keep_one if "keep_one" in modes else nothing,
        leave_one_out=leave_one_out if "leave_one_out" in modes else nothing,
        mean_z=mean_z,
        resampled_z=resampled_z,
        resampled_z_standard_error=resampling_error,
        frozen_norm=frozen.keep_one if "frozen_norm" in modes else nothing,
        shapley=shapley.values,
        shapley_standard_error=shapley.standard_error,
        frozen_shapley=frozen.shapley if "frozen_shapley" in modes else nothing,
        interaction=interaction,
        frozen_interaction=frozen.interaction if "frozen_shapley" in modes else no_pairs,
        interaction_reason=reason,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _FrozenNormValues:
    none: float
    keep_one: Float64[np.ndarray, " heads"]
    shapley: Float64[np.ndarray, " heads"]
    interaction: Float64[np.ndarray, "heads heads"]


def _frozen(sums: CoalitionSums, full: int, target_ss: float) -> _FrozenNormValues:
    """Return the ablations under the whole model's layer norm: a quadratic game of the blocks' covariances."""
    covariance = sums.block_covariances(full) / target_ss
    common = sums.cross[full] / target_ss
    floor, with_floor, own = covariance[0, 0], covariance[0, 1:], np.diag(covariance)[1:]
    interaction = -2 * covariance[1:, 1:]
    np.fill_diagonal(interaction, np.nan)
    return _FrozenNormValues(
        none=float(2 * common[0] - floor),
        keep_one=2 * (common[0] + common[1:]) - (floor + 2 * with_floor + own),
        shapley=2 * common[1:] - covariance[1:].sum(axis=1) - with_floor,
        interaction=interaction,
    )


def _permutations(seed: int, cell_type: str, n_cells: int, n_resamples: int) -> Int32[np.ndarray, "resamples cells"]:
    stream = PermutationStream(seed=seed, cell_type=cell_type, n_cells=n_cells, stratum="resampled_z")
    permutations = np.empty((n_resamples, n_cells), dtype=np.int32)
    for index in range(n_resamples):
        permutations[index] = stream.batch(index, index + 1)[0]
    return permutations
