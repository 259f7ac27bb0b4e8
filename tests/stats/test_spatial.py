from __future__ import annotations

import numpy as np
import pytest

from amici_eval.stats.spatial.tiles import default_widths, tiles_of_width
from tests.oracles import tiles as oracle


def scattered(n_cells=150):
    rng = np.random.default_rng(0)
    return rng.uniform([-50.0, 10.0], [350.0, 110.0], (n_cells, 2)), rng.choice(["s10", "s2", "s1"], n_cells)


@pytest.mark.parametrize("width", [7.0, 33.3, 1000.0])
@pytest.mark.parametrize("with_samples", [True, False])
def test_tiles_are_numbered_by_section_column_and_row(width, with_samples):
    xy, samples = scattered()
    expected = oracle.squares(xy, width, samples if with_samples else [""] * len(xy))
    labels = tiles_of_width(xy, width=width, samples=samples if with_samples else None)
    assert labels.dtype == np.int64
    assert labels.tolist() == expected
    assert set(labels) == set(range(labels.max() + 1))


def test_the_order_of_cells_does_not_change_their_tiles():
    xy, samples = scattered()
    order = np.random.default_rng(1).permutation(len(xy))
    labels = tiles_of_width(xy, width=20.0, samples=samples)
    np.testing.assert_array_equal(tiles_of_width(xy[order], width=20.0, samples=samples[order]), labels[order])


def test_cells_on_the_far_edge_share_the_last_tile():
    xy = np.array([[0.0, 0.0], [9.0, 0.0], [10.0, 0.0], [20.0, 0.0]])
    assert tiles_of_width(xy, width=10.0).tolist() == [0, 0, 1, 1]
    assert tiles_of_width(xy, width=20.0).tolist() == [0, 0, 0, 0]


def test_cells_in_one_place_or_none_at_all_have_tiles():
    assert tiles_of_width(np.ones((3, 2)), width=1.0).tolist() == [0, 0, 0]
    assert tiles_of_width(np.ones((0, 2)), width=1.0).tolist() == []


def test_further_dimensions_do_not_count():
    xy, _ = scattered()
    deep = np.column_stack([xy, np.arange(len(xy))])
    np.testing.assert_array_equal(tiles_of_width(deep, width=20.0), tiles_of_width(xy, width=20.0))


@pytest.mark.parametrize("width", [1e-300, 1e-9])
def test_a_tiny_width_puts_every_cell_into_its_own_tile(width):
    xy, _ = scattered(50)
    assert sorted(tiles_of_width(xy, width=width)) == list(range(50))


@pytest.mark.parametrize(
    ("correlation_length", "expected"),
    [(10.0, [5.0, 10.0, 20.0, 40.0]), (40.0, [20.0, 40.0, 50.0]), (100.0, [50.0]), (1e9, [50.0])],
)
def test_widths_grow_and_leave_at_least_two_tiles(correlation_length, expected):
    assert default_widths(correlation_length, 100.0).tolist() == expected


@pytest.mark.parametrize(
    ("name", "lengths"),
    [("correlation_length", (np.nan, 1.0)), ("correlation_length", (0.0, 1.0)), ("extent", (1.0, 0.0))],
)
def test_a_length_that_is_none_is_named(name, lengths):
    with pytest.raises(ValueError, match=f"{name} is .*; it must be a positive number"):
        default_widths(*lengths)
