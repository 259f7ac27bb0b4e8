from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binomtest, chisquare

from amici_eval.stats.permutation import nulls
from amici_eval.stats.permutation.nulls import (
    factor_draw,
    factor_exceedances,
    stratified_draw,
    stratified_exceedances,
)
from amici_eval.stats.permutation.permutations import PermutationStream
from amici_eval.stats.pvalues import p_values
from tests.builders import heads_of
from tests.oracles import permutations as oracle
from tests.stats.test_factor_nulls import use_torch

SETTINGS = {"seed": 0, "cell_type": "T", "where": "s"}


@pytest.fixture(params=["compiled", "torch"])
def engine(request, monkeypatch):
    if request.param == "torch":
        use_torch(monkeypatch)
    return request.param


def draw(seed, *, n_cells=30, n_columns=3, n_heads=3, signal=0.1):
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(n_cells, n_columns, n_heads)).astype(np.float32)
    return signal * images + rng.normal(size=images.shape), images


def expected_statistics(factors, images, strata, numbers):
    """T of each permutation (or of the identity, if there are no numbers), a stratum after the other."""
    total = np.zeros((len(numbers) if numbers is not None else 1, factors.shape[2]))
    for k in np.unique(strata):
        cells = np.flatnonzero(strata == k)
        f, z = oracle.rounded(factors[cells]), oracle.rounded(images[cells])
        own = PermutationStream(seed=0, cell_type="T", n_cells=cells.size, stratum=f"s {k}")
        orders = [range(cells.size)] if numbers is None else [own.batch(n, n + 1)[0].tolist() for n in numbers]
        total += [[oracle.statistic(f[..., h], z[..., h], o) for h in range(factors.shape[2])] for o in orders]
    return total


@pytest.mark.usefixtures("engine")
def test_statistics_are_sums_over_strata():
    factors, images = draw(0, n_cells=23, n_heads=5)
    factors[..., 2] *= 2.0**-20
    images[:9] *= np.float32(8.0)  # strata in other units than their neighbours
    strata = np.array([0] * 9 + [3] * 8 + [1] * 5 + [4])
    found = stratified_draw(heads_of(factors, images), strata=strata, **SETTINGS)(2, 12)
    # what is centred is rounded to float32 in units that are powers of two
    expected = expected_statistics(factors, images, strata, range(2, 12))
    np.testing.assert_allclose(found.statistics / found.sizes, expected / found.sizes, rtol=0, atol=1e-7)
    observed = expected_statistics(factors, images, strata, None)[0]
    np.testing.assert_allclose(found.observed / found.sizes, observed / found.sizes, rtol=0, atol=1e-7)
    assert not found.dead.any()


def test_all_permutations_within_strata_are_equally_likely_and_no_others():
    factors, images = draw(1, n_cells=6, n_columns=2, n_heads=1)
    blocks = [[0, 1, 2], [3, 4], [5]]
    strata = np.array([0, 0, 0, 1, 1, 2])
    every = [sum(orders, ()) for orders in itertools.product(*(itertools.permutations(block) for block in blocks))]
    values = np.array([np.sum(factors[list(order)] * images) for order in every])
    # less the constant that permutations within strata leave alone
    values -= np.mean(values)
    found = stratified_draw(heads_of(factors, images), strata=strata, **SETTINGS)(0, 6000)
    distance = np.abs(found.statistics - values)
    assert distance.min(axis=1).max() < 1e-6 * found.sizes[0]
    assert chisquare(np.bincount(distance.argmin(axis=1), minlength=12)).pvalue > 0.01
    assert found.observed[0] == pytest.approx(values[every.index(tuple(range(6)))], abs=1e-6 * found.sizes[0])
    counts = stratified_exceedances(heads_of(factors, images), strata=strata, **SETTINGS, n_permutations=6000)
    exact = np.mean(values >= values[every.index(tuple(range(6)))] - 1e-9)
    assert binomtest(int(counts.exceedances[0]), 6000, exact).pvalue > 0.01


@pytest.mark.usefixtures("engine")
def test_one_stratum_is_no_stratum():
    factors, images = draw(2, n_heads=17)
    stream = PermutationStream(seed=0, cell_type="T", n_cells=30, stratum="s 0")
    expected = factor_exceedances(heads_of(factors, images), stream=stream, n_permutations=200).exceedances
    arguments = {"strata": np.zeros(30, dtype=np.int64), **SETTINGS}
    found = stratified_exceedances(heads_of(factors, images), **arguments, n_permutations=200)
    np.testing.assert_array_equal(found.exceedances, expected)
    assert len(set(expected)) > 5


@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize("pieces", [{}, {"INLINE_PRODUCTS": 0}, {"INLINE_PRODUCTS": 0, "TASK_PRODUCTS": 1}])
def test_ranges_threads_and_pieces_change_nothing(n_threads, pieces, engine, monkeypatch):
    factors, images = draw(4)
    strata = np.repeat(np.arange(3), 10)
    arguments = {"strata": strata, **SETTINGS}
    whole = stratified_draw(heads_of(factors, images), **arguments)(0, 41)
    for name, value in pieces.items():
        monkeypatch.setattr(nulls, name, value)
    give = replace(stratified_draw(heads_of(factors, images), **arguments), n_threads=n_threads)
    parts = np.concatenate([give(*cut).statistics for cut in ((0, 1), (1, 17), (17, 17), (17, 41))])
    np.testing.assert_allclose(parts, whole.statistics, rtol=0, atol=1e-13 * whole.sizes.max())
    if engine == "compiled":
        np.testing.assert_array_equal(parts, whole.statistics)
    expected = np.count_nonzero(whole.reached, axis=0)
    monkeypatch.setattr(nulls, "_PERMUTATIONS_AT_ONCE", 7)
    counts = stratified_exceedances(heads_of(factors, images), **arguments, n_permutations=41)
    np.testing.assert_array_equal(counts.exceedances, expected)


@pytest.mark.usefixtures("engine")
def test_statistics_without_strata_are_the_direct_sums_in_their_units():
    factors, images = draw(5, n_cells=40, n_columns=4, n_heads=18)
    factors = (factors + 3.0) * np.logspace(-100, 100, 18)
    stream = PermutationStream(seed=0, cell_type="T", n_cells=40)
    found = factor_draw(heads_of(factors, images), stream=stream)(3, 30)
    f = factors - factors.mean(axis=0)
    z = images.astype(np.float64) - images.mean(axis=0, dtype=np.float64)
    expected = [np.sum(f[order] * z, axis=(0, 1)) for order in stream.batch(3, 30)]
    np.testing.assert_allclose(found.statistics / found.sizes, expected / found.sizes, rtol=0, atol=1e-7)
    np.testing.assert_allclose(found.observed / found.sizes, np.sum(f * z, axis=(0, 1)) / found.sizes, atol=1e-7)
    np.testing.assert_allclose(found.sizes, np.linalg.norm(f, axis=(0, 1)) * np.linalg.norm(z, axis=(0, 1)), rtol=1e-6)
    counts = factor_exceedances(heads_of(factors, images), stream=stream, n_permutations=300).exceedances
    everything = factor_draw(heads_of(factors, images), stream=stream)(0, 300)
    np.testing.assert_array_equal(np.count_nonzero(everything.reached, axis=0), counts)


@pytest.mark.usefixtures("engine")
def test_heads_without_a_test_are_undefined_and_change_nothing():
    factors, images = draw(6, n_heads=6)
    strata = np.array([0] * 14 + [1] * 15 + [2])
    arguments = {"strata": strata, **SETTINGS}
    alone = stratified_exceedances(heads_of(factors[..., 1:2], images[..., 1:2]), **arguments, n_permutations=50)
    factors[..., 0] = strata[:, None]  # varies, but in no stratum
    factors[29, 1, 2] = np.nan  # in a stratum of one cell
    images[3, 1, 3] = np.inf
    images[..., 5] = 1.0
    factors[:14, :, 5] = 2.0
    dead = np.array([False, False, False, False, True, False])
    found = stratified_draw(heads_of(factors, images, dead), **arguments)(0, 50)
    np.testing.assert_array_equal(found.dead, [True, False, True, True, True, False])
    assert np.isnan(found.statistics[:, found.dead]).all()
    assert np.isnan(found.observed[found.dead]).all()
    counts = stratified_exceedances(heads_of(factors, images, dead), **arguments, n_permutations=50)
    np.testing.assert_array_equal(counts.dead, found.dead)
    np.testing.assert_array_equal(counts.exceedances, [0, alone.exceedances[0], 0, 0, 0, 50])
    np.testing.assert_array_equal(dead, [False, False, False, False, True, False])


def test_where_every_stratum_has_one_cell_no_head_has_a_test():
    factors, images = draw(7, n_cells=4)
    found = stratified_draw(heads_of(factors, images), strata=np.arange(4), **SETTINGS)(0, 3)
    assert found.dead.all()
    assert not found.reached.any()


def rejections(n_data_sets, *, stratify):
    """How often data with a step between two samples, and nothing within them, are called significant."""
    rejected = 0
    strata = np.repeat([0, 1], 20) if stratify else np.zeros(40, dtype=np.int64)
    for number in range(n_data_sets):
        rng = np.random.default_rng([7, number])
        step = np.repeat([0.0, 1.0], 20)[:, None, None]
        factors, images = (rng.exponential(size=(40, 2, 1)) + step for _ in range(2))
        arguments = {"strata": strata, "where": "s", "seed": number, "cell_type": "T"}
        counts = stratified_exceedances(heads_of(factors, images), **arguments, n_permutations=99)
        rejected += int(p_values(counts.exceedances, n_permutations=99).p[0] <= 0.05)
    return rejected


def test_type_one_error_is_alpha_where_samples_differ_and_strata_are_samples():
    assert binomtest(rejections(600, stratify=True), 600, 0.05).pvalue > 0.01
    assert rejections(100, stratify=False) > 30


def test_progress_adds_up(monkeypatch):
    monkeypatch.setattr(nulls, "_PERMUTATIONS_AT_ONCE", 30)
    factors, images = draw(8)
    steps = []
    arguments = {"strata": np.repeat([0, 1], 15), **SETTINGS}
    stratified_exceedances(heads_of(factors, images), **arguments, n_permutations=100, progress=steps.append)
    assert steps == [90, 90, 90, 30]
