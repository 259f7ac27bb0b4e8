from __future__ import annotations

import importlib
import itertools
import random

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from amici_eval.stats.permutation.permutations import PermutationStream, compiled_kernels
from tests.oracles.permutations import fisher_yates

FROZEN = [[2, 4, 0, 5, 7, 6, 3, 1], [6, 3, 1, 5, 4, 7, 0, 2], [4, 0, 6, 7, 3, 5, 2, 1]]
FROZEN_OTHER = [[2, 3, 0, 1, 4], [1, 2, 4, 0, 3]]


def stream(**changes):
    return PermutationStream(**{"seed": 0, "cell_type": "B cell", "n_cells": 8, **changes})


def words_of(chosen, index, n_words):
    return np.random.Philox(key=chosen.key(), counter=[0, index, 0, 0]).random_raw(n_words)


def chi_square(observed, n_possible):
    """p-value of equally probable outcomes; the outcomes are numbered 0 to n_possible - 1."""
    return chisquare(np.bincount(observed, minlength=n_possible)).pvalue


def pair_codes(permutations, first, second):
    """Number the ordered pairs of distinct values that stand at two positions."""
    n_cells = permutations.shape[1]
    pairs = {pair: code for code, pair in enumerate(itertools.permutations(range(n_cells), 2))}
    return [pairs[pair] for pair in zip(permutations[:, first].tolist(), permutations[:, second].tolist(), strict=True)]


def test_first_permutations_are_frozen():
    # other values here mean that every published p-value changes: a numerical change of its own
    np.testing.assert_array_equal(stream().batch(0, 3), FROZEN)
    other = stream(seed=7, cell_type="β cell", stratum="slide 2", n_cells=5)
    np.testing.assert_array_equal(other.batch(40, 42), FROZEN_OTHER)


@pytest.mark.parametrize("index", [0, 1, 5, 2**40, 2**63 - 1])
@pytest.mark.parametrize("n_cells", [1, 2, 3, 4, 5, 6, 9, 250])
def test_a_permutation_is_a_fisher_yates_shuffle_by_the_words_of_its_number(n_cells, index):
    chosen = stream(n_cells=n_cells, seed=3)
    expected = fisher_yates(words_of(chosen, index, n_cells), n_cells)
    assert chosen.batch(index, index + 1)[0].tolist() == expected


@pytest.mark.parametrize("index", [0, 1, 2**32, 2**62 + 12345])
def test_compiled_words_are_those_of_numpy(index):
    for seed in range(5):
        chosen = stream(seed=seed)
        words = [compiled_kernels()._philox(np.uint64(block), np.uint64(index), chosen.key()) for block in range(1, 6)]
        np.testing.assert_array_equal(np.ravel(words), words_of(chosen, index, 20))


@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_narrow_batches_hold_the_same_permutations(n_threads):
    expected = stream(n_cells=97).batch(5, 42)
    found = stream(n_cells=97).narrow_batch(5, 42, n_threads=n_threads)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, expected)
    assert stream().narrow_batch(3, 3, n_threads=n_threads).shape == (0, 8)


def test_columns_of_permutations_are_the_rows():
    orders = np.full((41, 37), 99, dtype=np.uint32)
    compiled_kernels().shuffle_columns(stream().key(), 5, 16, 37, 39, orders)
    np.testing.assert_array_equal(orders[:39, 16:].T, stream(n_cells=39).batch(21, 42))
    assert np.all(orders[:, :16] == 99)
    assert np.all(orders[39:] == 99)


def test_kernels_compile_where_nothing_can_be_cached(monkeypatch):
    numba = importlib.import_module("numba")
    plain = numba.njit
    tried = []

    def njit(*, cache=False, **options):
        tried.append(cache)
        if cache:
            msg = "cannot cache function: no locator available"
            raise RuntimeError(msg)
        return plain(**options)

    monkeypatch.setattr(numba, "njit", njit)
    assert compiled_kernels()._compiled(lambda x: x + 1)(2) == 3
    assert tried == [True, False]


def test_the_same_labels_give_the_same_permutations_and_any_other_label_others():
    first = stream().batch(0, 20)
    np.testing.assert_array_equal(stream().batch(0, 20), first)
    for changes in (
        {"seed": 1},
        {"cell_type": "B cel"},
        {"stratum": "slide 1"},
        {"cell_type": "", "stratum": "B cell"},
    ):
        assert not np.array_equal(stream(**changes).batch(0, 20), first), changes
    # labels that read the same when put one behind the other are still different labels
    left, right = stream(cell_type="AB", stratum="C"), stream(cell_type="A", stratum="BC")
    assert not np.array_equal(left.batch(0, 20), right.batch(0, 20))
    assert not np.array_equal(first[0], first[1])


@pytest.mark.parametrize("cuts", [(0, 50), (0, 1, 50), (0, 7, 8, 31, 50), tuple(range(51))])
def test_batches_can_be_cut_anywhere(cuts):
    whole = stream(n_cells=13).batch(0, 50)
    parts = [stream(n_cells=13).batch(start, stop) for start, stop in itertools.pairwise(cuts)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_a_late_batch_needs_no_early_one():
    np.testing.assert_array_equal(stream().batch(10**6, 10**6 + 2), stream().batch(10**6 - 3, 10**6 + 2)[3:])


@pytest.mark.parametrize("n_cells", [1, 2, 3, 100, 5000])
def test_each_row_is_a_permutation(n_cells):
    rows = stream(n_cells=n_cells).batch(0, 20)
    assert rows.shape == (20, n_cells)
    assert np.issubdtype(rows.dtype, np.integer)
    np.testing.assert_array_equal(np.sort(rows, axis=1), np.tile(np.arange(n_cells), (20, 1)))


def test_an_empty_batch_is_empty():
    assert stream().batch(5, 5).shape == (0, 8)


def test_every_order_of_four_cells_is_equally_probable():
    orders = {order: code for code, order in enumerate(itertools.permutations(range(4)))}
    drawn = [orders[tuple(row)] for row in stream(n_cells=4).batch(0, 4800).tolist()]
    assert chi_square(drawn, 24) > 0.001


@pytest.mark.parametrize("position", [0, 1, 15, 29])
def test_every_cell_is_equally_probable_at_a_position(position):
    assert chi_square(stream(n_cells=30).batch(0, 6000)[:, position], 30) > 0.001


@pytest.mark.parametrize(("first", "second"), [(0, 1), (0, 6), (2, 4), (5, 6)])
def test_every_pair_of_cells_is_equally_probable_at_two_positions(first, second):
    assert chi_square(pair_codes(stream(n_cells=7).batch(0, 8400), first, second), 42) > 0.001


@pytest.mark.parametrize(("first", "second"), [(0, 1), (3, 49), (24, 25), (48, 49)])
def test_every_pair_of_fifty_cells_is_equally_probable_at_two_positions(first, second):
    rows = stream(n_cells=50).batch(0, 30_000)
    left, right = rows[:, first], rows[:, second]
    assert chi_square(left * 49 + right - (right > left), 50 * 49) > 0.001


def test_the_check_of_pairs_can_fail():
    shifts = np.random.default_rng(0).integers(0, 7, 8400)
    cyclic = (np.arange(7) + shifts[:, None]) % 7
    assert chi_square(cyclic[:, 0], 7) > 0.001
    assert chi_square(pair_codes(cyclic, 0, 1), 42) < 1e-9


def test_neighbouring_numbers_and_types_are_unrelated():
    rows = stream(n_cells=6).batch(0, 7201)
    assert chi_square(rows[:-1, 0] * 6 + rows[1:, 0], 36) > 0.001
    other = stream(n_cells=6, cell_type="T cell").batch(0, 7201)
    assert chi_square(rows[:, 0] * 6 + other[:, 0], 36) > 0.001
    reseeded = stream(n_cells=6, seed=1).batch(0, 7201)
    assert chi_square(rows[:, 0] * 6 + reseeded[:, 0], 36) > 0.001


def test_no_global_generator_is_read_or_changed():
    first = stream().batch(0, 3)
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    torch.manual_seed(5)
    before = random.getstate(), np.random.get_state(), torch.random.get_rng_state()  # noqa: NPY002
    np.testing.assert_array_equal(stream().batch(0, 3), first)
    assert random.getstate() == before[0]
    after = np.random.get_state()  # noqa: NPY002
    assert after[2:] == before[1][2:]
    np.testing.assert_array_equal(after[1], before[1][1])
    assert torch.equal(torch.random.get_rng_state(), before[2])
