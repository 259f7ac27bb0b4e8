from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from amici_eval.stats.tile_tests import tile_bootstrap
from tests.builders import make_tile_sums
from tests.oracles import tiles as oracle
from tests.oracles.reference import explained_variance


def kept_of(predictions, targets, tiles):
    """What is kept of each tile; predictions have shape (models, cells, genes)."""
    return make_tile_sums(tiles, targets, (predictions - targets).transpose(1, 0, 2))


def draw(seed=0, *, sizes=(4, 1, 7, 5, 1, 9, 3), n_genes=3, n_models=2):
    """Expression and predictions that differ between tiles; two tiles have one cell."""
    rng = np.random.default_rng(seed)
    tiles = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    shared = rng.normal(size=(len(sizes), n_genes))[tiles]
    targets = shared + rng.normal(size=shared.shape)
    predictions = 0.5 * targets + 0.5 * rng.normal(size=(n_models, *targets.shape))
    return predictions, targets, tiles


def bootstrap(kept, **changes):
    return tile_bootstrap(kept, **{"n_resamples": 50, "seed": 0, "cell_type": "T", **changes})


def covered(number, *, n_tiles, independent_cells=False):
    """Whether the interval holds the truth; expression and its prediction errors have a part that a tile shares."""
    rng = np.random.default_rng([5, n_tiles, number])
    tiles = np.sort(rng.integers(0, n_tiles, 20 * n_tiles))
    part, error = rng.normal(size=(2, n_tiles, 2))[:, tiles] + rng.normal(size=(2, len(tiles), 2))
    targets = part + error
    if independent_cells:
        tiles = np.arange(len(tiles))
    tiles = np.unique(tiles, return_inverse=True)[1]
    found = bootstrap(kept_of(part[None], targets, tiles), n_resamples=199, seed=number)
    return bool(found.low[0] <= 0.5 <= found.high[0])


@pytest.mark.parametrize("n_tiles", [9, 25])
def test_intervals_hold_the_truth_as_often_as_they_say(n_tiles):
    hits = sum(covered(number, n_tiles=n_tiles) for number in range(300))
    assert binomtest(hits, 300, 0.95).pvalue > 0.001


def test_intervals_from_cells_drawn_one_by_one_are_too_narrow():
    hits = sum(covered(number, n_tiles=9, independent_cells=True) for number in range(60))
    assert hits < 50


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_ends_equal_those_of_cells_put_together_anew(confidence):
    predictions, targets, tiles = draw()
    targets[:, 2] = 4.0
    found = bootstrap(kept_of(predictions, targets, tiles), confidence=confidence, seed=3)
    drawn = oracle.drawn_tiles(oracle.words("\0bootstrap", seed=3, label="T", n=50 * 7), 7)
    for model in range(2):
        low, high = oracle.interval(predictions[model], targets, tiles, drawn, confidence)
        assert found.low[model] == pytest.approx(low, abs=1e-12)
        assert found.high[model] == pytest.approx(high, abs=1e-12)
    assert found.n_tiles == 7
    assert found.reason is None


@pytest.mark.parametrize("n_genes", [3, 40])
def test_explained_variance_lies_between_the_ends_and_more_confidence_widens_them(n_genes):
    predictions, targets, tiles = draw(n_genes=n_genes)
    kept = kept_of(predictions, targets, tiles)
    narrow, wide = bootstrap(kept, confidence=0.5), bootstrap(kept, confidence=0.95)
    here = np.array([explained_variance(own, targets)[1] for own in predictions])
    assert np.all((wide.low < narrow.low) & (narrow.low < here) & (here < narrow.high) & (narrow.high < wide.high))
    assert np.all(wide.high <= 1.0)


def test_more_genes_than_tiles_make_no_difference():
    predictions, targets, tiles = draw(n_genes=3)
    few = bootstrap(kept_of(predictions, targets, tiles))
    many = bootstrap(kept_of(np.tile(predictions, 10), np.tile(targets, 10), tiles))
    np.testing.assert_allclose([many.low, many.high], [few.low, few.high], atol=1e-10)


def test_models_beside_a_model_and_the_level_of_expression_do_not_matter():
    predictions, targets, tiles = draw()
    kept = kept_of(predictions, targets, tiles)
    plain, alone = bootstrap(kept), bootstrap(kept.of_models([1]))
    moved = bootstrap(kept_of(predictions + 3e5, targets + 1e6, tiles))
    np.testing.assert_array_equal([alone.low[0], alone.high[0]], [plain.low[1], plain.high[1]])
    np.testing.assert_allclose([moved.low, moved.high], [plain.low, plain.high], atol=1e-6)


def test_draws_depend_on_seed_and_type_and_on_no_global_state():
    kept = kept_of(*draw())
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    plain = bootstrap(kept)
    np.testing.assert_array_equal(np.random.get_state()[1], state)  # noqa: NPY002
    np.testing.assert_array_equal(bootstrap(kept).low, plain.low)
    assert bootstrap(kept, seed=1).low[0] != plain.low[0]
    assert bootstrap(kept, cell_type="U").low[0] != plain.low[0]


def test_five_tiles_of_one_cell_have_an_interval():
    predictions, targets, _ = draw(sizes=(1,) * 5)
    # far more resamples than the 3125 there are: some hold one cell five times
    found = bootstrap(kept_of(predictions, targets, np.arange(5)), n_resamples=20000)
    assert np.isfinite([found.low, found.high]).all()


def test_resamples_of_one_cell_alone_give_a_reason():
    predictions, targets, _ = draw(sizes=(1,) * 5)
    kept = kept_of(predictions, targets, np.arange(5))
    found = bootstrap(kept, n_resamples=1, seed=oracle.seed_of_one_tile("T"))
    assert np.isnan([found.low, found.high]).all()
    assert found.reason == "expression varies in none of 1 resamples of 5 tiles"


def test_predictions_that_are_constant_or_perfect_have_an_interval_of_one_point():
    _, targets, tiles = draw()
    found = bootstrap(kept_of(np.stack([np.full_like(targets, 1.0 / 3.0), targets]), targets, tiles))
    np.testing.assert_allclose(found.low, [0.0, 1.0], atol=1e-9)
    np.testing.assert_allclose(found.high, [0.0, 1.0], atol=1e-9)


def test_a_model_whose_numbers_are_not_finite_has_no_interval_and_the_others_keep_theirs():
    predictions, targets, tiles = draw()
    plain = bootstrap(kept_of(predictions, targets, tiles))
    predictions[0] = np.nan
    found = bootstrap(kept_of(predictions, targets, tiles))
    assert np.isnan([found.low[0], found.high[0]]).all()
    assert [found.low[1], found.high[1]] == [plain.low[1], plain.high[1]]


@pytest.mark.parametrize("sizes", [(3, 3, 3, 3), (3,)])
def test_few_tiles_give_a_reason_in_place_of_an_interval(sizes):
    found = bootstrap(kept_of(*draw(sizes=sizes)))
    assert np.isnan([found.low, found.high]).all()
    assert found.n_tiles == len(sizes)
    assert found.reason == f"cells in {len(sizes)} tiles; at least 5 are needed for an interval"


def test_expression_that_does_not_vary_gives_a_reason():
    predictions, targets, tiles = draw()
    found = bootstrap(kept_of(predictions, np.ones_like(targets), tiles))
    assert np.isnan([found.low, found.high]).all()
    assert found.reason == "expression does not vary; there is nothing to explain"
