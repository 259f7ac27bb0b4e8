from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, kstest, norm

from amici_eval.stats.permutation import exact_moments
from amici_eval.stats.permutation.exact_moments import pearson3_tail, permutation_moments
from tests.oracles import exact_moments as oracle


def draw(seed, *, n_cells=12, rank=3, n_heads=3, signal=0.3):
    """Skewed factors and images that share a signal, none of them centred."""
    rng = np.random.default_rng(seed)
    images = rng.exponential(size=(n_cells, rank, n_heads)).astype(np.float32)
    return signal * images + rng.exponential(size=images.shape) + 0.5, images


def third_cumulant(moments):
    return moments.skewness * moments.variance**1.5


def assert_same(found, expected, *, rtol=1e-10):
    for name in ("excess", "variance"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=rtol, atol=1e-10, err_msg=name)
    np.testing.assert_allclose(found.skewness, expected.skewness, rtol=rtol, atol=rtol)
    np.testing.assert_allclose(found.p_values(), expected.p_values(), rtol=1e-6)


@pytest.fixture(params=["products", "products in blocks", "tensors", "tensors by head"])
def form(request, monkeypatch):
    """Sums from D = f z^T, and from the third moments of F and of Z wherever there are three cells."""
    largest = 2 if request.param.startswith("tensors") else 10**9
    monkeypatch.setattr(exact_moments, "_largest_batched", lambda rank: largest)
    if request.param in ("products in blocks", "tensors by head"):
        monkeypatch.setattr(exact_moments, "_MOST_BYTES", 150)
    return request.param


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize(
    "labels", ["aaa", "aaaaaa", "aaaaaaa", "aaabbb", "aabbbc", "bababbc", "aabbccc", "aabb", "abcdeff"], ids=str
)
def test_moments_are_those_of_all_permutations(labels):
    strata = np.array([ord(label) for label in labels])
    factors, images = draw(len(labels), n_cells=len(labels), rank=2)
    every = oracle.all_statistics(factors, images, strata)
    found = permutation_moments(factors, images, strata=strata)
    np.testing.assert_allclose(found.excess, every[0] - every.mean(axis=0), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(found.variance, every.var(axis=0), rtol=1e-10)
    third = ((every - every.mean(axis=0)) ** 3).mean(axis=0)
    np.testing.assert_allclose(third_cumulant(found), third, rtol=1e-10, atol=1e-10 * every.std() ** 3)
    assert math.exp(found.log_permutations) == pytest.approx(len(every))


def test_p_is_the_share_of_drawn_permutations_that_fit_as_well():
    factors, images = draw(5, n_cells=60, n_heads=1, signal=0.0)
    f, z = factors[..., 0] - factors[..., 0].mean(axis=0), images[..., 0].astype(np.float64)
    products, rng = f @ z.T, np.random.default_rng(0)
    drawn = [
        products[rng.permuted(np.tile(np.arange(60), (20_000, 1)), axis=1), np.arange(60)].sum(axis=1)
        for _ in range(10)
    ]
    drawn = np.concatenate(drawn)
    found = permutation_moments(f[..., None], images)
    for share in (0.9, 0.5, 0.1, 0.01, 0.001):
        threshold = np.quantile(drawn, 1.0 - share)
        standardised = threshold / np.sqrt(found.variance)
        error = 4.0 * math.sqrt(share * (1.0 - share) / drawn.size)
        # three moments leave a few hundredths of p open in the tail
        assert abs(pearson3_tail(standardised, found.skewness)[0] - share) < error + 0.05 * min(share, 1.0 - share)
    assert norm.sf(standardised)[0] < 0.7 * share


def test_p_is_not_below_the_truth_where_the_law_of_three_moments_has_ended():
    rng = np.random.default_rng(1)
    f, z = rng.exponential(size=(60, 3)) ** 2, -(rng.exponential(size=(60, 3)) ** 2)
    found = permutation_moments(f[..., None], z[..., None])
    products, orders = (f - f.mean(axis=0)) @ z.T, rng.permuted(np.tile(np.arange(60), (50_000, 1)), axis=1)
    drawn = np.sort(products[orders, np.arange(60)].sum(axis=1)) / np.sqrt(found.variance)
    end = -2.0 / found.skewness[0]
    beyond = np.flatnonzero(drawn > end)
    assert beyond.size > 100
    p = pearson3_tail(drawn[beyond[:-10]], found.skewness)
    assert np.all(p > 1.0 - beyond[:-10] / drawn.size)


@pytest.mark.parametrize("n_strata", [1, 4])
def test_p_is_uniform_under_the_null_and_small_where_an_effect_is_planted(n_strata):
    strata, levels = np.arange(40) % n_strata, np.arange(40)[:, None, None] % n_strata
    factors, images = draw(11, n_cells=40, n_heads=3000, signal=0.0)
    # levels that strata share are no evidence: permuted freely, all of these would look significant
    p = permutation_moments(factors + levels, images + levels, strata=strata).p_values()
    assert kstest(p, "uniform").pvalue > 0.01
    for alpha in (0.01, 0.05, 0.1):
        assert binomtest(int(np.count_nonzero(p <= alpha)), p.size, alpha).pvalue > 0.01
    factors, images = draw(12, n_cells=40, n_heads=200, signal=1.0)
    assert np.mean(permutation_moments(factors, images, strata=strata).p_values() <= 0.01) > 0.95


@pytest.mark.usefixtures("form")
def test_moments_add_over_strata():
    factors, images = draw(3, n_cells=60)
    strata = np.random.default_rng(3).integers(0, 4, size=60)
    whole = permutation_moments(factors, images, strata=strata)
    parts = [permutation_moments(factors[strata == b], images[strata == b]) for b in range(4)]
    for name in ("excess", "variance", "log_permutations"):
        np.testing.assert_allclose(getattr(whole, name), sum(getattr(part, name) for part in parts), rtol=1e-12)
    np.testing.assert_allclose(third_cumulant(whole), sum(third_cumulant(part) for part in parts), rtol=1e-11)


@pytest.mark.usefixtures("form")
def test_order_of_cells_and_names_of_strata_do_not_matter():
    factors, images = draw(4, n_cells=90)
    strata = np.random.default_rng(4).integers(0, 12, size=90)
    expected = permutation_moments(factors, images, strata=strata)
    order = np.random.default_rng(5).permutation(90)
    names = np.random.default_rng(6).permutation(12) * 1000 - 5000
    assert_same(permutation_moments(factors[order], images[order], strata=names[strata][order]), expected)


@pytest.mark.parametrize("entries", [1, 500, 20_000])
def test_form_and_pieces_do_not_matter(entries, monkeypatch):
    factors, images = draw(6, n_cells=400, rank=5, n_heads=4)
    strata = np.minimum(np.random.default_rng(6).geometric(0.06, size=400), 40)
    for labels in (None, strata):
        expected = permutation_moments(factors, images, strata=labels)
        with monkeypatch.context() as patch:
            patch.setattr(exact_moments, "_ENTRIES", entries)
            for largest in (2, 20, 10**9):
                patch.setattr(exact_moments, "_largest_batched", lambda rank, largest=largest: largest)
                assert_same(permutation_moments(factors, images, strata=labels), expected)


@pytest.mark.parametrize("largest", [2, 10**9])
def test_no_array_is_larger_than_there_is_room_for(largest, monkeypatch):
    factors, images = draw(16, n_cells=120, rank=5, n_heads=4)
    strata = (np.arange(120) > 30).astype(np.int64)
    expected = permutation_moments(factors, images, strata=strata)
    sizes, bmm, baddbmm = [], torch.bmm, torch.Tensor.baddbmm_
    square = torch.Tensor.square
    monkeypatch.setattr(exact_moments, "_largest_batched", lambda rank: largest)
    monkeypatch.setattr(exact_moments, "_MOST_BYTES", 12_000)
    monkeypatch.setattr(torch, "bmm", lambda *args: sizes.append(bmm(*args).nbytes) or bmm(*args))
    monkeypatch.setattr(torch.Tensor, "square", lambda x: sizes.append(x.nbytes) or square(x))
    monkeypatch.setattr(torch.Tensor, "baddbmm_", lambda x, *args: sizes.append(2 * x.nbytes) or baddbmm(x, *args))
    assert_same(permutation_moments(factors, images, strata=strata), expected)
    # centred factors are there in any case
    assert 0 < max(sizes) <= max(12_000, factors.nbytes)


@pytest.mark.usefixtures("form")
def test_a_large_mean_takes_no_digits_from_the_excess():
    factors, images = draw(7, n_cells=50)
    images = images.astype(np.float64)
    found = permutation_moments(factors + 1e4, images - 1e6)
    np.testing.assert_allclose(found.standardised, permutation_moments(factors, images).standardised, rtol=1e-7)


@pytest.mark.usefixtures("form")
def test_a_head_that_has_nothing_to_permute_has_no_p():
    strata = np.repeat(np.arange(6), 7)
    factors, images = draw(8, n_cells=42, n_heads=6)
    rng = np.random.default_rng(8)
    # what float64 leaves of these when their mean is taken away is not 0
    factors[:, :, 0] = rng.normal(size=3)
    factors[:, :, 1] = rng.normal(size=(6, 3))[strata]  # varies between strata alone
    images[:, :, 2] = rng.normal(size=3)
    # F varies along a line of which Z has nothing
    factors[:, :, 3] = np.outer(factors[:, 0, 3], [1.0, 2.0, -3.0]) / 7.0
    images[:, :, 3] = np.outer(images[:, 0, 3], [1.0, 1.0, 1.0]) / 3.0
    factors[5, 1, 4] = np.inf
    found = permutation_moments(factors, images, strata=strata)
    np.testing.assert_array_equal(found.variance[:4], 0.0)
    assert np.isnan(found.skewness[:5]).all()
    assert np.isnan(found.standardised[:5]).all()
    assert np.isnan(found.p_values()[:5]).all()
    assert np.isnan([found.excess[4], found.variance[4]]).all()
    alone = permutation_moments(factors[:, :, 5:], images[:, :, 5:], strata=strata)
    np.testing.assert_allclose(found.p_values()[5:], alone.p_values(), rtol=1e-9)


def test_p_counts_the_truth_among_the_permutations():
    # of 3! orders the best one is a sixth, whatever a smooth law says of its tail
    line = np.array([0.0, 1.0, 3.0]).reshape(3, 1, 1)
    assert permutation_moments(line, line).p_values()[0] == pytest.approx(1.0 / 6.0)


@pytest.mark.usefixtures("form")
def test_what_is_handed_in_may_be_read_only_and_laid_out_in_any_way():
    factors, images = draw(13, n_cells=30)
    strata = np.arange(30) % 3
    expected = permutation_moments(factors, images, strata=strata)
    copies = factors.copy(), images.copy(), strata.copy()
    for array in (factors, images, strata):
        array.flags.writeable = False
    assert_same(permutation_moments(factors, images, strata=strata), expected)
    turned = (np.asfortranarray(factors), images.transpose(2, 0, 1).copy().transpose(1, 2, 0))
    assert_same(permutation_moments(*turned, strata=strata), expected)
    for array, copy in zip((factors, images, strata), copies, strict=True):
        np.testing.assert_array_equal(array, copy)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.usefixtures("form")
def test_cuda_finds_what_the_cpu_finds():
    factors, images = draw(14, n_cells=500, rank=6)
    strata = np.arange(500) % 7
    here = permutation_moments(factors, images, strata=strata)
    assert_same(permutation_moments(factors, images, strata=strata, device="cuda"), here)


def test_the_device_without_float64_is_taken_as_the_cpu():
    factors, images = draw(15)
    assert_same(permutation_moments(factors, images, device="mps"), permutation_moments(factors, images))
