"""How the value of a set of heads is shared among its heads, and which heads help or hinder each other."""

from __future__ import annotations

from dataclasses import dataclass
from math import comb
from typing import TYPE_CHECKING

import numpy as np

from amici_eval.stats.permutation.permutations import PermutationStream

if TYPE_CHECKING:
    from jaxtyping import Bool, Float64, Int64

__all__ = [
    "MAX_EXACT_HEADS",
    "ShapleyValues",
    "all_coalitions",
    "antithetic_orders",
    "interaction_index",
    "order_coalitions",
    "sampled_shapley_values",
    "shapley_values",
]

MAX_EXACT_HEADS = 12
"""Up to 4,096 coalitions are all evaluated; above that, orders of the heads are sampled."""

_MIN_PAIRS_OF_ORDERS = 2


@dataclass(frozen=True, kw_only=True, eq=False)
class ShapleyValues:
    """Each head's share of ``v(all heads) - v(no head)``.

    Parameters
    ----------
    values
        Shape (heads,), in the unit of v; they sum to ``v(all heads) - v(no head)``, also if sampled.
    standard_error
        Shape (heads,); 0 if exact.
    """

    values: Float64[np.ndarray, " heads"]
    standard_error: Float64[np.ndarray, " heads"]


def all_coalitions(n_heads: int) -> Bool[np.ndarray, "coalitions heads"]:
    """Return all sets of heads, shape (2**heads, heads): row c keeps head h if bit h of c is set."""
    return np.asarray((np.arange(2**n_heads)[:, None] >> np.arange(n_heads)) & 1, dtype=bool)


def shapley_values(values: Float64[np.ndarray, " coalitions"]) -> ShapleyValues:
    """Return the exact Shapley values (Shapley 1953) from the values of all coalitions.

    Parameters
    ----------
    values
        Shape (2**heads,), in the order of :func:`all_coalitions`.

    Raises
    ------
    ValueError
        If the number of values is not 2, 4, 8, ...
    """
    n_heads = _n_heads(values)
    codes = np.arange(len(values))
    sizes = all_coalitions(n_heads).sum(axis=1)
    weights = np.array([1 / (n_heads * comb(n_heads - 1, size)) for size in range(n_heads)])
    shares = np.empty(n_heads)
    for head in range(n_heads):
        without = codes[codes >> head & 1 == 0]
        shares[head] = weights[sizes[without]] @ (values[without | 1 << head] - values[without])
    return ShapleyValues(values=shares, standard_error=np.zeros(n_heads))


def interaction_index(values: Float64[np.ndarray, " coalitions"]) -> Float64[np.ndarray, "heads heads"]:
    """Return by how much each pair of heads is worth more (or less) together than apart, from all coalitions.

    Parameters
    ----------
    values
        Shape (2**heads,), in the order of :func:`all_coalitions`.

    Returns
    -------
    numpy.ndarray
        Shape (heads, heads), symmetric, diagonal NaN, in the unit of the values: the Shapley interaction index
        (Grabisch & Roubens 1999), a mean over sets S of the other heads of ``v(S+h+k) - v(S+h) - v(S+k) + v(S)``.
        Below 0: the two heads say the same, or spoil each other.

    Raises
    ------
    ValueError
        If the number of values is not 2, 4, 8, ...
    """
    n_heads = _n_heads(values)
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
    """Return random orders of the heads, each followed by its reverse, shape (n_orders, heads).

    Parameters
    ----------
    n_heads
        How many are ordered.
    n_orders
        Even, at least 4.
    seed, cell_type
        Orders 2k and 2k + 1 depend on seed, cell type, k and the number of heads alone.

    Raises
    ------
    ValueError
        If ``n_orders`` is odd or below 4.
    """
    n_pairs, odd = divmod(n_orders, 2)
    if odd or n_pairs < _MIN_PAIRS_OF_ORDERS:
        msg = f"{n_orders} sampled orders of heads; an even number of at least {2 * _MIN_PAIRS_OF_ORDERS} is needed"
        raise ValueError(msg)
    stream = PermutationStream(seed=seed, cell_type=cell_type, n_cells=n_heads, stratum="orders of heads")
    forward = stream.batch(0, n_pairs)
    return np.asarray(np.stack([forward, forward[:, ::-1]], axis=1).reshape(n_orders, n_heads))


def order_coalitions(orders: Int64[np.ndarray, "orders heads"]) -> Bool[np.ndarray, "orders sizes heads"]:
    """Return the sets that the first 0, 1, ..., H heads of each order make, shape (orders, heads + 1, heads)."""
    ranks = np.argsort(orders, axis=1)
    return np.asarray(ranks[:, None, :] < np.arange(orders.shape[1] + 1)[:, None])


def sampled_shapley_values(
    values: Float64[np.ndarray, "orders sizes"], orders: Int64[np.ndarray, "orders heads"]
) -> ShapleyValues:
    """Return Shapley values estimated from sampled orders of the heads (Castro, Gomez & Tejada 2009).

    Parameters
    ----------
    values
        Shape (orders, heads + 1): the values of :func:`order_coalitions`.
    orders
        Shape (orders, heads), from :func:`antithetic_orders`.

    Notes
    -----
    What a head adds, averaged over orders. An order and its reverse are one draw (antithetic sampling, Mitchell et al.
    2022): the standard error is that of the mean over these pairs.
    """
    n_orders, n_heads = orders.shape
    added = np.empty((n_orders, n_heads))
    np.put_along_axis(added, orders, np.diff(values, axis=1), axis=1)
    pairs = added.reshape(n_orders // 2, 2, n_heads).mean(axis=1)
    return ShapleyValues(values=pairs.mean(axis=0), standard_error=pairs.std(axis=0, ddof=1) / np.sqrt(len(pairs)))


def _n_heads(values: Float64[np.ndarray, " coalitions"]) -> int:
    n_heads = len(values).bit_length() - 1
    if values.ndim != 1 or n_heads < 1 or len(values) != 2**n_heads:
        msg = f"values have shape {values.shape}; one value for each of the 2**heads sets of heads is needed"
        raise ValueError(msg)
    return n_heads
