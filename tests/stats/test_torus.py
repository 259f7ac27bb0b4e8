from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from amici_eval.stats.permutation.permutations import PermutationStream
from amici_eval.stats.pvalues import p_values
from amici_eval.stats.spatial.torus import torus_statistics
from tests.oracles import tiles as oracle

N_TISSUES, N_CELLS, N_SHIFTS, N_HEADS = 60, 150, 59, 4


def smooth(rng, xy, n_fields, *, length=0.1):
    """Independent Gaussian fields by random Fourier features, shape (cells, fields)."""
    waves = rng.normal(size=(2, 100 * n_fields)) / length
    return np.cos(xy @ waves + rng.uniform(0.0, 2.0 * np.pi, 100 * n_fields)).reshape(len(xy), n_fields, 100).sum(2)


def tissue(number, *, signal=0.0, shape="square", n_columns=2):
    """Factors and images that are smooth, and independent but for ``signal``."""
    rng = np.random.default_rng([3, number])
    xy = rng.uniform(size=(4 * N_CELLS, 2))
    if shape == "L":
        xy = xy[(xy < 0.5).any(axis=1)]
    xy = xy[:N_CELLS]
    factors = smooth(rng, xy, n_columns * N_HEADS).reshape(N_CELLS, n_columns, N_HEADS)
    images = signal * factors + smooth(rng, xy, n_columns * N_HEADS).reshape(factors.shape)
    return factors, images.astype(np.float32), xy


def p_of(statistics, observed):
    return p_values(np.count_nonzero(statistics >= observed - 1e-10, axis=0), n_permutations=len(statistics)).p


def p_torus(number, **changes):
    found = torus_statistics(*tissue(number, **changes), n_shifts=N_SHIFTS, seed=number, cell_type="T")
    return p_of(found.statistics, found.observed)


@pytest.mark.parametrize("shape", ["square", "L"])
def test_independent_smooth_fields_are_rejected_as_often_as_alpha_says(shape):
    p = np.concatenate([p_torus(number, shape=shape) for number in range(N_TISSUES)])
    for alpha in (0.05, 0.1):
        assert binomtest(int(np.count_nonzero(p <= alpha)), p.size, alpha, alternative="greater").pvalue > 0.01
    # and not so rarely that the test would be of no use
    assert np.mean(p <= 0.2) > 0.1


def test_the_same_fields_are_rejected_too_often_if_cells_are_permuted_freely():
    p = []
    for number in range(N_TISSUES // 2):
        factors, images, _ = tissue(number)
        images = images - images.mean(axis=0)
        orders = PermutationStream(seed=number, cell_type="T", n_cells=N_CELLS).batch(0, N_SHIFTS)
        statistics = np.array([np.einsum("irh,irh->h", factors[order], images) for order in orders])
        p.append(p_of(statistics, np.einsum("irh,irh->h", factors, images)))
    p = np.concatenate(p)
    assert binomtest(int(np.count_nonzero(p <= 0.05)), p.size, 0.05, alternative="greater").pvalue < 0.01


def test_a_planted_effect_is_found():
    p = np.concatenate([p_torus(number, signal=1.0) for number in range(10)])
    assert np.mean(p <= 0.05) > 0.9


def draw(seed=0, *, n_cells=30, n_columns=3, n_heads=2):
    rng = np.random.default_rng(seed)
    factors = rng.normal(size=(n_cells, n_columns, n_heads)) + 5.0
    images = (factors + rng.normal(size=factors.shape)).astype(np.float32)
    return factors, images, rng.uniform([10.0, -3.0], [40.0, 7.0], (n_cells, 2)), rng.choice(["a", "b"], n_cells)


def statistics(factors, images, xy, **changes):
    return torus_statistics(factors, images, xy, **{"n_shifts": 20, "seed": 0, "cell_type": "T", **changes})


def shares(label, index, seed=0):
    key = PermutationStream(seed=seed, cell_type="T", stratum=label + "\0torus", n_cells=0).key()
    return [int(w >> np.uint64(11)) / 2**53 for w in np.random.Philox(key=key, counter=[0, index, 0, 0]).random_raw(2)]


@pytest.mark.parametrize("with_samples", [True, False])
def test_statistics_equal_the_definition(with_samples):
    factors, images, xy, samples = draw()
    labels = samples.tolist() if with_samples else [""] * len(xy)
    found = statistics(factors, images, xy, samples=samples if with_samples else None, n_shifts=6)
    rows = [range(len(xy))]
    rows += [oracle.slid(xy, [shares(label, index) for label in sorted(set(labels))], labels) for index in range(6)]
    expected = [
        [oracle.correlation(factors[:, :, head], images[:, :, head], taken, labels) for head in range(2)]
        for taken in rows
    ]
    np.testing.assert_allclose(np.vstack([found.observed, found.statistics]), expected, rtol=0, atol=1e-12)


def test_with_one_column_the_statistic_is_pearsons_correlation():
    factors, images, xy, _ = draw(n_columns=1)
    expected = [np.corrcoef(factors[:, 0, head], images[:, 0, head])[0, 1] for head in range(2)]
    np.testing.assert_allclose(statistics(factors, images, xy).observed, expected, atol=1e-12)


def test_order_of_cells_place_unit_and_size_of_the_numbers_do_not_matter():
    factors, images, xy, samples = draw()
    plain = statistics(factors, images, xy, samples=samples)
    order = np.random.default_rng(1).permutation(len(xy))
    for other in (
        statistics(factors[order], images[order], xy[order], samples=samples[order]),
        statistics(factors, images, 8.0 * xy + 512.0, samples=samples),
        statistics(7.0 * factors - 1.0, 3.0 * images, xy, samples=samples),
    ):
        np.testing.assert_allclose(other.statistics, plain.statistics, rtol=0, atol=1e-6)
        np.testing.assert_allclose(other.observed, plain.observed, rtol=0, atol=1e-6)


def test_a_shift_depends_on_its_number_seed_and_type_and_on_nothing_else():
    factors, images, xy, samples = draw()
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    plain = statistics(factors, images, xy, samples=samples).statistics
    np.testing.assert_array_equal(np.random.get_state()[1], state)  # noqa: NPY002
    np.testing.assert_array_equal(statistics(factors, images, xy, samples=samples, n_shifts=7).statistics, plain[:7])
    for changes in ({"seed": 1}, {"cell_type": "U"}, {"samples": np.where(samples == "a", "c", "b")}):
        assert not np.isclose(
            statistics(factors, images, xy, **{"samples": samples, **changes}).statistics, plain
        ).all()


def test_differences_between_samples_are_no_fit():
    factors, images, xy, samples = draw()
    apart = np.where(samples == "a", 100.0, 0.0)[:, None, None]
    plain = statistics(factors, images, xy, samples=samples)
    moved = statistics(factors + apart, images + apart.astype(np.float32), xy, samples=samples)
    np.testing.assert_allclose(moved.statistics, plain.statistics, atol=1e-4)
    np.testing.assert_allclose(moved.observed, plain.observed, atol=1e-4)


def test_heads_that_say_the_same_of_all_cells_or_nothing_finite_have_no_statistic():
    factors, images, xy, _ = draw(n_heads=3)
    plain = statistics(factors, images, xy)
    factors[:, :, 0] = 1.0 / 3.0
    factors[4, 1, 1] = np.inf
    found = statistics(factors, images, xy)
    assert np.isnan(found.observed).tolist() == [True, True, False]
    assert np.isnan(found.statistics[:, :2]).all()
    np.testing.assert_array_equal(found.statistics[:, 2], plain.statistics[:, 2])


def test_cells_on_a_line_have_statistics():
    factors, images, _, _ = draw(n_cells=6)
    found = statistics(factors, images, np.column_stack([np.arange(6.0), np.zeros(6)])).statistics
    assert np.isfinite(found).all()
    assert np.abs(found).max() <= 1.0 + 1e-12


def test_shifts_that_leave_nothing_to_compare_are_no_evidence():
    factors, images, _, _ = draw(n_cells=6)
    found = statistics(factors, images, np.zeros((6, 2)))
    assert np.isfinite(found.observed).all()
    # all cells of one place take the prediction of one of them
    np.testing.assert_array_equal(found.statistics, np.inf)
    assert p_of(found.statistics, found.observed).tolist() == [1.0, 1.0]


def test_samples_of_one_cell_keep_their_own():
    factors, images, xy, _ = draw(n_cells=6)
    found = statistics(factors, images, xy, samples=np.array(["a", "b", "c", "d", "e", "e"]))
    assert np.isfinite(found.observed).all()
    # "e" has two cells: either each takes that of the other or its own, or both take one
    assert set(np.abs(np.round(found.statistics / found.observed, 9)).ravel().tolist()) == {1.0, np.inf}


def test_progress_adds_up_to_the_number_of_shifts():
    factors, images, xy, _ = draw()
    counted = []
    statistics(factors, images, xy, progress=counted.append)
    assert sum(counted) == 20


def test_nothing_handed_in_is_changed():
    handed = draw()
    before = [values.copy() for values in handed]
    statistics(*handed[:3], samples=handed[3])
    for values, copy in zip(handed, before, strict=True):
        np.testing.assert_array_equal(values, copy)
