"""Intervals of differences of single genes: do they hold the truth as often as they say."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from amici_eval.stats.tiles.paired import PairedRows, gene_intervals, paired_differences


def rows_of(expression, before, after, tiles):
    """Return moments by tile of expression and of the residuals of two predictions, each shape (cells, genes)."""
    numbers = np.unique(tiles)

    def moments(values):
        parts = [values[tiles == tile] for tile in numbers]
        return np.stack([p.mean(axis=0) for p in parts]), np.stack(
            [((p - p.mean(axis=0)) ** 2).sum(axis=0) for p in parts]
        )

    names = {"target": expression, "before": before - expression, "after": after - expression}
    arrays = {}
    for name, values in names.items():
        mean, m2 = moments(values)
        wide = name != "target"
        arrays |= {f"{name}_mean": mean[:, None] if wide else mean, f"{name}_m2": m2[:, None] if wide else m2}
    counts = np.array([(tiles == tile).sum() for tile in numbers])
    return PairedRows(tiles=numbers, n_cells=counts, varies=np.ptp(expression, axis=0) > 0, **arrays)


def drawn(seed, *, n_cells=300, n_genes=40, n_tiles=16, gain=0.0, spread=0.0):
    """Return two models with errors of one law; the second's are smaller by ``gain``; tiles share their errors."""
    rng = np.random.default_rng(seed)
    tiles = rng.integers(0, n_tiles, n_cells)
    expression = rng.normal(size=(n_cells, n_genes))

    def errors():
        own = rng.normal(size=(n_cells, n_genes)) * np.exp(spread * rng.normal(size=(n_tiles, n_genes)))[tiles]
        return own

    return rows_of(expression, expression + errors(), expression + np.sqrt(1.0 - gain) * errors(), tiles)


@pytest.mark.parametrize("spread", [0.0, 0.3])
@pytest.mark.parametrize("n_tiles", [9, 36])
def test_the_interval_holds_the_truth_as_often_as_it_says(n_tiles, spread):
    held, n = 0, 0
    for seed in range(60):
        found = gene_intervals(drawn(seed, n_cells=600, n_tiles=n_tiles, spread=spread))
        held += np.count_nonzero((found.low <= 0.0) & (found.high >= 0.0))
        n += found.low.size
    assert 0.93 <= held / n <= 0.98, f"the 95 % interval holds the truth in {held / n:.3f} of {n} genes"


def test_a_real_difference_is_found():
    found = gene_intervals(drawn(1, n_cells=2000, gain=0.4))
    assert (found.low > 0.0).mean() > 0.95
    assert ((found.low < 0.4) & (found.high > 0.4)).mean() > 0.85


def test_the_middle_is_the_difference_and_the_interval_that_of_a_ratio_estimator():
    rows = drawn(2)
    found = gene_intervals(rows, confidence=0.9)
    middle = (found.low + found.high) / 2
    np.testing.assert_allclose(middle, paired_differences(rows, n_resamples=5, n_flips=9).difference_gene, atol=1e-12)
    # gene 3 by hand, tile by tile
    n, gene = rows.n_cells.astype(float), 3

    def about(mean, m2):
        centre = sum(n * mean) / sum(n)
        return [m2[b] + n[b] * (mean[b] - centre) ** 2 for b in range(len(n))]

    target = about(rows.target_mean[:, gene], rows.target_m2[:, gene])
    before = about(rows.before_mean[:, 0, gene], rows.before_m2[:, 0, gene])
    after = about(rows.after_mean[:, 0, gene], rows.after_m2[:, 0, gene])
    total = sum(target)
    off = [(one - two - middle[0, gene] * three) / total for one, two, three in zip(before, after, target, strict=True)]
    effective = sum(n) ** 2 / sum(n**2)
    error = np.sqrt(effective / (effective - 1) * sum(x**2 for x in off))
    from scipy.stats import t

    assert found.high[0, gene] - middle[0, gene] == pytest.approx(t(effective - 1).ppf(0.95) * error)


def test_the_order_of_tiles_and_empty_tiles_change_nothing():
    rows = drawn(3)
    found = gene_intervals(rows)
    names = [one.name for one in dataclasses.fields(rows) if one.name != "varies"]
    turned = dataclasses.replace(rows, **{name: getattr(rows, name)[::-1] for name in names})
    np.testing.assert_allclose(gene_intervals(turned).low, found.low, atol=1e-12)
    padded = {name: np.concatenate([getattr(rows, name), getattr(rows, name)[:1]]) for name in names}
    padded["n_cells"][-1], padded["tiles"][-1] = 0, 99
    np.testing.assert_allclose(gene_intervals(dataclasses.replace(rows, **padded)).low, found.low, atol=1e-12)


def test_genes_that_do_not_vary_and_few_tiles_have_none():
    rows = drawn(4)
    varies = rows.varies.copy()
    varies[5] = False
    found = gene_intervals(dataclasses.replace(rows, varies=varies))
    assert np.isnan(found.low[0, 5])
    assert np.isfinite(np.delete(found.low, 5, axis=1)).all()
    assert np.isnan(gene_intervals(drawn(5, n_tiles=4)).high).all()


def test_a_level_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"confidence is 1\.0; it must lie between 0 and 1"):
        gene_intervals(drawn(6), confidence=1.0)
