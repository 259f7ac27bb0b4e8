from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom, binomtest

from amici_eval.stats.permutation.nulls import FactorStatistics, factor_draw
from amici_eval.stats.permutation.permutations import PermutationStream
from amici_eval.stats.pvalues import p_values, sequential_exceedances, sequential_p_values
from tests.builders import heads_of


def give(reached, dead=None):
    """What draws permutations of which it is known whether they reach the truth; remembers what was asked for."""
    n_heads = reached.shape[1]
    asked = []

    def draw(start, stop):
        asked.append((start, stop))
        return FactorStatistics(
            statistics=reached[start:stop].astype(np.float64),
            observed=np.ones(n_heads),
            sizes=np.ones(n_heads),
            dead=np.zeros(n_heads, dtype=bool) if dead is None else dead,
        )

    return draw, asked


def null(n_heads, *, n_permutations=199, seed=0):
    """Heads whose truth is one of the exchangeable draws."""
    values = np.random.default_rng(seed).random((n_permutations + 1, n_heads))
    return values[1:] >= values[0]


def by_hand(reached, stop_at):
    count = 0
    for number, one in enumerate(reached.tolist(), start=1):
        count += one
        if count == stop_at:
            return stop_at / number, number, True
    return (count + 1) / (len(reached) + 1), len(reached), False


@pytest.mark.parametrize("batch", [1, 2, 7, 64, 199, 500])
def test_each_head_stops_at_its_own_exceedance_whatever_the_batch(batch):
    reached = np.hstack([null(30), np.zeros((199, 1), dtype=bool), np.ones((199, 1), dtype=bool)])
    found = sequential_exceedances(give(reached)[0], max_permutations=199, stop_at=8, batch=batch)
    expected = [by_hand(column, 8) for column in reached.T]
    np.testing.assert_array_equal(found.p, [p for p, _, _ in expected])
    np.testing.assert_array_equal(found.n_permutations, [number for _, number, _ in expected])
    np.testing.assert_array_equal(found.stopped, [stopped for _, _, stopped in expected])
    np.testing.assert_array_equal(
        found.exceedances,
        [column[:number].sum() for column, number in zip(reached.T, found.n_permutations, strict=True)],
    )
    assert 0 < found.stopped.sum() < 32


def test_work_ends_with_the_last_head():
    draw, asked = give(np.ones((10_000, 3), dtype=bool))
    steps = []
    found = sequential_exceedances(draw, max_permutations=10_000, stop_at=20, batch=8, progress=steps.append)
    assert asked == [(0, 8), (8, 24)]
    np.testing.assert_array_equal(found.n_permutations, 20)
    np.testing.assert_array_equal(found.p, 1.0)
    assert sum(steps) == 30_000


def test_a_head_that_is_never_reached_sees_all_permutations():
    draw, asked = give(np.zeros((9_000, 1), dtype=bool))
    found = sequential_exceedances(draw, max_permutations=9_000)
    assert [start for start, _ in asked[1:]] == [stop for _, stop in asked[:-1]]
    assert asked[-1][1] == 9_000
    assert max(stop - start for start, stop in asked) == 4096
    np.testing.assert_array_equal(found.p, 1 / 9_001)


def test_p_is_valid_at_every_level():
    found = sequential_exceedances(give(null(4000))[0], max_permutations=199, stop_at=10)
    # the levels that p can take: exactly there P(p <= a) = a
    for level in (1 / 200, 4 / 200, 10 / 199, 10 / 100, 10 / 50, 10 / 20):
        assert binomtest(int(np.count_nonzero(found.p <= level + 1e-12)), 4000, level).pvalue > 0.001
    grid = np.linspace(0.001, 1.0, 500)
    share = np.mean(found.p[:, None] <= grid, axis=0)
    assert np.all(share <= grid + 4.0 * np.sqrt(grid * (1.0 - grid) / 4000) + 1e-12)


def test_p_agrees_with_that_of_all_permutations():
    rng = np.random.default_rng(3)
    chances = np.repeat([0.004, 0.02, 0.1, 0.4], 300)
    reached = rng.random((999, chances.size)) < chances
    found = sequential_exceedances(give(reached)[0], max_permutations=999, stop_at=20)
    fixed = p_values(reached.sum(axis=0), n_permutations=999).p
    for chance in np.unique(chances):
        own = chances == chance
        assert np.mean(found.p[own]) == pytest.approx(np.mean(fixed[own]), rel=0.08)
    np.testing.assert_array_equal(found.p[~found.stopped], fixed[~found.stopped])
    assert found.n_permutations[chances == 0.4].mean() < 60


def test_factors_are_tested_as_without_stopping():
    rng = np.random.default_rng(4)
    images = rng.normal(size=(40, 3, 4)).astype(np.float32)
    factors = rng.normal(size=images.shape) + images * np.array([0.0, 0.0, 0.1, 1.0])
    factors[..., 1] = 1.0
    draw = factor_draw(heads_of(factors, images), stream=PermutationStream(seed=0, cell_type="T", n_cells=40))
    found = sequential_exceedances(draw, max_permutations=499, stop_at=10, batch=16)
    reached = draw(0, 499).reached
    for head in (0, 2, 3):
        assert (found.p[head], found.n_permutations[head], found.stopped[head]) == by_hand(reached[:, head], 10)
    assert found.p[3] == 1 / 500
    np.testing.assert_array_equal(found.dead, [False, True, False, False])
    assert np.isnan([found.p[1], found.ci_low[1], found.ci_high[1]]).all()
    assert (found.exceedances[1], found.n_permutations[1], found.stopped[1]) == (0, 0, False)


def test_without_a_living_head_nothing_goes_on():
    dead = np.ones(2, dtype=bool)
    draw, asked = give(np.zeros((1000, 2), dtype=bool), dead)
    assert np.isnan(sequential_exceedances(draw, max_permutations=1000).p).all()
    assert asked == [(0, 64)]


def test_limits_of_the_interval_are_those_where_an_outcome_becomes_unlikely():
    used = np.array([10, 11, 25, 300, 500])
    found = sequential_p_values(np.full(5, 10), n_permutations=used, stop_at=10)
    np.testing.assert_allclose(binom.sf(9, used, found.ci_low), 0.025)
    np.testing.assert_allclose(binom.cdf(9, used[1:] - 1, found.ci_high[1:]), 0.025)
    assert found.ci_high[0] == 1.0
    np.testing.assert_array_equal(found.p, 10 / used)
    assert np.all((found.ci_low < found.p) & (found.p <= found.ci_high))
    # one more permutation, or one fewer exceedance, is less: the order of outcomes is that of p
    rest = sequential_p_values(np.arange(10), n_permutations=np.full(10, 500), stop_at=10)
    for limits in ("p", "ci_low", "ci_high"):
        assert np.all(np.diff([*getattr(rest, limits), *getattr(found, limits)[::-1]]) >= 0.0)


def test_interval_covers_the_truth():
    rng = np.random.default_rng(5)
    for chance in (0.02, 0.05, 0.3):
        reached = rng.random((300, 1500)) < chance
        found = sequential_exceedances(give(reached)[0], max_permutations=300, stop_at=10)
        covered = int(np.count_nonzero((found.ci_low <= chance) & (chance <= found.ci_high)))
        assert binomtest(covered, 1500, 0.95, alternative="less").pvalue > 0.01
        assert covered < 1500
