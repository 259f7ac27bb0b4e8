"""Covariances by distance from all pairs of cells, one bin of distance after another."""

from __future__ import annotations

import numpy as np


def mean_products(fields, coordinates, samples, edges):
    """Return pairs (bins,) and mean outer products (bins, columns, columns) of pairs of different cells by distance.

    Bin 0 holds distances up to the first edge, bin k those above edge k - 1 and up to edge k.
    """
    distance = np.linalg.norm(coordinates[:, None] - coordinates[None], axis=2)
    number = np.searchsorted(edges, distance, side="left")
    number[samples[:, None] != samples[None]] = -1
    np.fill_diagonal(number, -1)
    pairs, products = [], []
    for k in range(len(edges)):
        mask = (number == k).astype(float)
        pairs.append(mask.sum())
        products.append(fields.T @ mask @ fields / max(mask.sum(), 1.0))
    return np.array(pairs), np.array(products)


def variance_of_fit(f, z, coordinates, samples, edges):
    """Return Var(sum_i <f_i, z_i>) under independence: cells with themselves, then pairs at each distance."""
    pairs, left = mean_products(f, coordinates, samples, edges)
    _, right = mean_products(z, coordinates, samples, edges)
    own = np.trace(f.T @ f @ z.T @ z) / len(f)
    return own + (pairs * np.einsum("kab,kba->k", left, right)).sum()
