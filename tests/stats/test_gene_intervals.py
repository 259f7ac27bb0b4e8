"""Intervals of differences of single genes: do they hold the truth as often as they say."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from amici_eval.stats.tile_tests import gene_intervals
from tests.stats.test_paired import compare, pair_of


def drawn(seed, *, n_cells=300, n_genes=40, n_tiles=16, gain=0.0, spread=0.0):
    """Return two models with errors of one law; the second's are smaller by ``gain``; tiles share their errors."""
    rng = np.random.default_rng(seed)
    tiles = rng.integers(0, n_tiles, n_cells)
    expression = rng.normal(size=(n_cells, n_genes))

    def errors():
        own = rng.normal(size=(n_cells, n_genes)) * np.exp(spread * rng.normal(size=(n_tiles, n_genes)))[tiles]
        return own

    return pair_of(tiles, expression, errors()[:, None], np.sqrt(1.0 - gain) * errors()[:, None])


@pytest.mark.parametrize("spread", [0.0, 0.3])
@pytest.mark.parametrize("n_tiles", [9, 36])
def test_the_interval_holds_the_truth_as_often_as_it_says(n_tiles, spread):
    held, n = 0, 0
    for seed in range(60):
        found = gene_intervals(*drawn(seed, n_cells=600, n_tiles=n_tiles, spread=spread))
        held += np.count_nonzero((found.low <= 0.0) & (found.high >= 0.0))
        n += found.low.size
    assert 0.93 <= held / n <= 0.98, f"the 95 % interval holds the truth in {held / n:.3f} of {n} genes"


def test_a_real_difference_is_found():
    found = gene_intervals(*drawn(1, n_cells=2000, gain=0.4))
    assert (found.low > 0.0).mean() > 0.95
    assert ((found.low < 0.4) & (found.high > 0.4)).mean() > 0.85


def test_the_middle_is_the_difference_and_the_interval_that_of_a_ratio_estimator():
    was, became = drawn(2)
    found = gene_intervals(was, became, confidence=0.9)
    middle = (found.low + found.high) / 2
    np.testing.assert_allclose(middle, compare((was, became), n_resamples=5, n_flips=9).difference_gene, atol=1e-12)
    # gene 3 by hand, tile by tile
    n, gene = was.n_cells.astype(float), 3

    def about(mean, m2):
        centre = sum(n * mean) / sum(n)
        return [m2[b] + n[b] * (mean[b] - centre) ** 2 for b in range(len(n))]

    target = about(was.target_mean[:, gene], was.target_m2[:, gene])
    before = about(was.residual_mean[:, 0, gene], was.residual_m2[:, 0, gene])
    after = about(became.residual_mean[:, 0, gene], became.residual_m2[:, 0, gene])
    total = sum(target)
    off = [(one - two - middle[0, gene] * three) / total for one, two, three in zip(before, after, target, strict=True)]
    effective = sum(n) ** 2 / sum(n**2)
    error = np.sqrt(effective / (effective - 1) * sum(x**2 for x in off))
    from scipy.stats import t

    assert found.high[0, gene] - middle[0, gene] == pytest.approx(t(effective - 1).ppf(0.95) * error)


def test_genes_that_do_not_vary_and_few_tiles_have_none():
    before, after = drawn(4)
    varies = before.varies.copy()
    varies[5] = False
    found = gene_intervals(dataclasses.replace(before, varies=varies), after)
    assert np.isnan(found.low[0, 5])
    assert np.isfinite(np.delete(found.low, 5, axis=1)).all()
    assert np.isnan(gene_intervals(*drawn(5, n_tiles=4)).high).all()
