from __future__ import annotations

import numpy as np
import pytest
import torch

from amici_eval.stats.permutation import nulls
from amici_eval.stats.permutation.nulls import permutation_exceedances
from amici_eval.stats.permutation.permutations import PermutationStream
from tests.oracles import reference

FORMS = {"gram": np.inf, "gather": 0}
"""Up to how many cells per permutation form ``"gram"`` is taken."""


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    monkeypatch.setattr(nulls, "_GRAM_CELLS_PER_PERMUTATION", FORMS[request.param])
    return request.param


def stream(n_cells, seed=0):
    return PermutationStream(seed=seed, cell_type="T", n_cells=n_cells)


def draw(seed, *, n_heads=3, n_cells=12, n_genes=4, signal=0.3):
    rng = np.random.default_rng(seed)
    targets = rng.normal(size=(n_cells, n_genes)).astype(np.float32)
    predictions = (signal * targets + rng.normal(size=(n_heads, n_cells, n_genes))).astype(np.float32)
    return predictions, targets


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("n_cells", [3, 4, 5, 12])
def test_counts_equal_the_definition(n_cells):
    predictions, targets = draw(n_cells, n_cells=n_cells)
    permutations = stream(n_cells).batch(0, 60).tolist()
    counts = permutation_exceedances(predictions, targets, stream=stream(n_cells), n_permutations=60)
    expected = [reference.permutation_count(head, targets, permutations) for head in predictions]
    np.testing.assert_array_equal(counts.exceedances, expected)
    assert counts.exceedances.dtype == np.int64
    assert counts.n_permutations == 60
    assert not counts.dead.any()


def test_many_permutations_approach_the_exhaustive_p_value():
    predictions, targets = draw(2, n_cells=5)
    counts = permutation_exceedances(predictions, targets, stream=stream(5), n_permutations=20_000)
    exact = [reference.exhaustive_p(head, targets) for head in predictions]
    assert len(set(exact)) == 3
    np.testing.assert_allclose(counts.exceedances / 20_000, exact, atol=4 * 0.5 / np.sqrt(20_000))


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize(
    "tiny",
    [
        {"_STORED_INDICES": 1},
        {"_STORED_INDICES": 40 * 7},
        {"_CELL_BLOCK": 1},
        {"_CELL_BLOCK": 7, "_GATHERED_ENTRIES": 1},
        {"_GATHERED_ENTRIES": 50},
        {"_STORED_INDICES": 40 * 13, "_CELL_BLOCK": 3, "_GATHERED_ENTRIES": 9},
    ],
)
def test_form_and_blocks_change_no_count(tiny, monkeypatch):
    predictions, targets = draw(7, n_cells=40, signal=0.05)
    arguments = {"stream": stream(40), "n_permutations": 101}
    expected = permutation_exceedances(predictions, targets, **arguments).exceedances
    assert np.all((expected > 0) & (expected < 101))  # counts at the ends could agree by luck
    for name, value in tiny.items():
        monkeypatch.setattr(nulls, name, value)
    counts = permutation_exceedances(predictions, targets, **arguments)
    np.testing.assert_array_equal(counts.exceedances, expected)


def test_statistics_of_both_forms_are_the_direct_sums():
    predictions, targets = draw(4, n_cells=9)
    permutations = np.concatenate([np.arange(9)[None], stream(9).batch(0, 10)])
    p, y = (torch.from_numpy(values.astype(np.float64)) for values in (predictions[0], targets))
    direct = [float(np.sum(p.numpy()[row] * y.numpy())) for row in permutations]
    np.testing.assert_allclose(nulls._gram_statistics(p, y, permutations, 2**24), direct, rtol=1e-12)
    np.testing.assert_allclose(nulls._gather_statistics(p, y, permutations, 2**24), direct, rtol=1e-12)


@pytest.mark.usefixtures("form")
def test_permutations_that_fit_equally_well_count():
    # cells 0 to 2 have one expression and cells 3 to 5 another: whoever keeps the halves apart ties with the truth, but
    # sums the same products in another order
    rng = np.random.default_rng(0)
    targets = np.repeat(rng.normal(size=(2, 7)), 3, axis=0).astype(np.float32)
    predictions = rng.normal(size=(10, 6, 7)).astype(np.float32)
    permutations = stream(6).batch(0, 300)
    halves = np.sort(permutations[:, :3], axis=1)
    tied = np.all(halves == [0, 1, 2], axis=1)
    assert tied.sum() > 5
    counts = permutation_exceedances(predictions, targets, stream=stream(6), n_permutations=300)
    for head, count in zip(predictions.astype(np.float64), counts.exceedances, strict=True):
        better = [np.sum(head[row] * targets) > np.sum(head * targets) for row in permutations[~tied]]
        assert count == tied.sum() + sum(better)


@pytest.mark.usefixtures("form")
def test_ties_of_whole_numbers_are_counted_exactly():
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 3, size=(8, 2)).astype(np.float32)
    predictions = rng.integers(0, 3, size=(4, 8, 2)).astype(np.float32)
    permutations = stream(8).batch(0, 400)
    products = np.array([[np.sum(head[row] * targets) for row in permutations] for head in predictions], dtype=np.int64)
    observed = np.sum(predictions * targets, axis=(1, 2)).astype(np.int64)[:, None]
    assert np.all(np.count_nonzero(products == observed, axis=1) > 5)
    counts = permutation_exceedances(predictions, targets, stream=stream(8), n_permutations=400)
    np.testing.assert_array_equal(counts.exceedances, np.count_nonzero(products >= observed, axis=1))


def test_every_permutation_of_constant_expression_counts():
    predictions, _ = draw(1, n_cells=6)
    targets = np.full((6, 4), 0.3, dtype=np.float32)
    counts = permutation_exceedances(predictions, targets, stream=stream(6), n_permutations=30)
    np.testing.assert_array_equal(counts.exceedances, [30, 30, 30])


def test_a_head_that_predicts_the_same_for_all_cells_is_dead():
    predictions, targets = draw(3)
    rng = np.random.default_rng(0)
    profile = rng.uniform(1, 3, size=4)
    predictions[0] = profile
    # float32 passes of one model on one input differ by this much
    predictions[2] = profile * (1 + 1e-7 * rng.uniform(-1, 1, size=predictions[2].shape))
    assert np.ptp(predictions[2], axis=0).max() > 0
    counts = permutation_exceedances(predictions, targets, stream=stream(12), n_permutations=50)
    np.testing.assert_array_equal(counts.dead, [True, False, True])
    alone = permutation_exceedances(predictions[1:2], targets, stream=stream(12), n_permutations=50)
    assert counts.exceedances[1] == alone.exceedances[0]


def test_a_head_that_varies_a_little_is_alive():
    predictions, targets = draw(3)
    predictions[0] = 2.0 + 1e-4 * predictions[0]
    counts = permutation_exceedances(predictions, targets, stream=stream(12), n_permutations=50)
    assert not counts.dead.any()


def test_a_head_that_predicts_zero_is_dead():
    predictions, targets = draw(3)
    predictions[1] = 0.0
    counts = permutation_exceedances(predictions, targets, stream=stream(12), n_permutations=5)
    np.testing.assert_array_equal(counts.dead, [False, True, False])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_head_whose_prediction_is_not_finite_has_no_test(bad):
    predictions, targets = draw(3)
    predictions[1, 5, 2] = bad
    counts = permutation_exceedances(predictions, targets, stream=stream(12), n_permutations=19)
    np.testing.assert_array_equal(counts.dead, [False, True, False])


@pytest.mark.usefixtures("form")
def test_an_offset_and_a_scale_of_the_prediction_change_no_count():
    predictions, targets = draw(8, n_cells=25, signal=0.1)
    arguments = {"stream": stream(25), "n_permutations": 200}
    expected = permutation_exceedances(predictions, targets, **arguments).exceedances
    moved = permutation_exceedances(predictions * 8 + 2, targets * 4 + 16, **arguments).exceedances
    np.testing.assert_array_equal(moved, expected)


@pytest.mark.usefixtures("form")
def test_the_number_of_threads_changes_no_count():
    predictions, targets = draw(5, n_cells=300, n_genes=30, signal=0.01)
    counts = []
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            arguments = {"stream": stream(300), "n_permutations": 99}
            counts.append(permutation_exceedances(predictions, targets, **arguments).exceedances)
    finally:
        torch.set_num_threads(threads)
    np.testing.assert_array_equal(counts[1], counts[0])
    np.testing.assert_array_equal(counts[2], counts[0])


def test_heads_share_their_permutations_and_know_nothing_of_each_other():
    predictions, targets = draw(6)
    arguments = {"stream": stream(12), "n_permutations": 80}
    together = permutation_exceedances(predictions, targets, **arguments).exceedances
    reordered = permutation_exceedances(predictions[[2, 0, 1]], targets, **arguments).exceedances
    np.testing.assert_array_equal(reordered, together[[2, 0, 1]])


def test_more_permutations_add_to_the_counts_of_fewer():
    predictions, targets = draw(6)
    few = permutation_exceedances(predictions, targets, stream=stream(12), n_permutations=40).exceedances
    many = permutation_exceedances(predictions, targets, stream=stream(12), n_permutations=400).exceedances
    assert np.all(many >= few)
    assert np.all(many <= few + 360)
    assert many.sum() > few.sum()


@pytest.mark.parametrize("stored", [2**27, 12 * 17, 1])
def test_progress_adds_up_to_heads_times_permutations(stored, monkeypatch):
    monkeypatch.setattr(nulls, "_STORED_INDICES", stored)
    predictions, targets = draw(2)
    predictions[1] = 1.0  # a dead head is work done, too
    steps: list[int] = []
    permutation_exceedances(predictions, targets, stream=stream(12), n_permutations=100, progress=steps.append)
    assert sum(steps) == 3 * 100
    assert min(steps) > 0


def test_inputs_and_global_generators_are_left_alone():
    predictions, targets = draw(2)
    copies = predictions.copy(), targets.copy()
    predictions.flags.writeable = targets.flags.writeable = False
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    permutation_exceedances(predictions, targets, stream=stream(12), n_permutations=20)
    np.testing.assert_array_equal(predictions, copies[0])
    np.testing.assert_array_equal(targets, copies[1])
    assert torch.equal(torch.random.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("whole_numbers", [False, True])
def test_cuda_counts_what_the_cpu_counts(whole_numbers):
    predictions, targets = draw(11, n_heads=4, n_cells=500, n_genes=60, signal=0.005)
    if whole_numbers:
        predictions, targets = np.round(2 * predictions), np.round(2 * targets)
    arguments = {"stream": stream(500), "n_permutations": 500}
    here = permutation_exceedances(predictions, targets, **arguments)
    there = permutation_exceedances(predictions, targets, **arguments, device="cuda")
    np.testing.assert_array_equal(there.exceedances, here.exceedances)
    np.testing.assert_array_equal(there.dead, here.dead)
