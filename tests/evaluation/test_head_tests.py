from __future__ import annotations

import numpy as np
import pytest

from amici_eval.evaluation import head_tests
from amici_eval.evaluation.head_tests import HeadsUnderTest, TypeFactors, free_test, spatial_test
from amici_eval.settings.evaluation import PermutationSpec
from amici_eval.stats.permutation import nulls
from amici_eval.stats.spatial.lag import CellPositions
from amici_eval.stats.type_sums import sums_of_predictions

SAME = "predicts the same for all cells of each section"


def free(*, n_permutations, signal=0.0, progress=None, **settings):
    rng = np.random.default_rng(0)
    images = rng.normal(size=(60, 3, 4)).astype(np.float32)
    asked = HeadsUnderTest(
        cell_type="T",
        heads=TypeFactors(factors=signal * images + rng.normal(size=images.shape), images=images, weights=None),
        dead=np.zeros(4, dtype=bool),
        test=PermutationSpec(**settings),
        n_permutations=n_permutations,
        progress=progress,
    )
    return free_test(asked)


def test_fewer_permutations_than_exceedances_to_stop_at_are_all_drawn():
    found = free(method="sequential", stop_at=20, n_permutations=9, signal=2.0)
    assert found.n_permutations == 9
    np.testing.assert_array_equal(found.p, 0.1)


@pytest.mark.parametrize("settings", [{"method": "sequential"}, {"tail": "gpd"}, {"adjustment": "maxt"}])
def test_factors_are_packed_once_and_progress_ends_at_its_total(settings, monkeypatch):
    packed, done, pack = [], [], nulls.pack

    def counted(*args, **more):
        packed.append(1)
        return pack(*args, **more)

    monkeypatch.setattr(nulls, "pack", counted)
    free(**settings, n_permutations=999, signal=0.5, progress=done.append)
    assert len(packed) == 1
    assert sum(done) == 4 * 999


def spatial_by(null, *, n_cells=90, **settings):
    """Test a head that fits, one that differs between sections alone, and a dead one."""
    rng = np.random.default_rng(0)
    samples = np.repeat(["a", "b", "c"], n_cells // 3).astype(object)
    targets = rng.normal(size=(n_cells, 6)).astype(np.float32)
    heads = np.stack([targets + rng.normal(size=targets.shape), targets, targets]).astype(np.float32)
    heads[1] = np.repeat(rng.normal(size=(3, 6)), n_cells // 3, axis=0)
    heads[2] = 1.0
    place = CellPositions.of(rng.uniform(0.0, 100.0, (n_cells, 2)), samples=samples, n_genes=6)
    moments = sums_of_predictions(heads, heads[0], targets, tiles=np.zeros(n_cells, dtype=np.int64), place=place)
    asked = HeadsUnderTest(
        cell_type="T",
        heads=TypeFactors.from_principal_components(heads, targets),
        dead=np.array([False, False, True]),
        test=PermutationSpec(spatial_null=null, n_shifts=19, **settings),
        n_permutations=99,
    )
    return spatial_test(asked, moments, place)


@pytest.mark.parametrize(
    ("null", "settings", "reason"),
    [
        ("lag", {}, SAME),
        ("torus", {}, SAME),
        ("sample", {}, "varies in no section"),
        ("sample", {"spatial_method": "monte_carlo"}, "varies in no section"),
        ("tile", {"tile_width": 50.0}, "varies in no tile"),
    ],
)
def test_a_head_that_differs_between_sections_alone_has_no_test_and_a_reason(null, settings, reason):
    found = spatial_by(null, **settings)
    for values in (found.p, found.p_low, found.p_high, found.statistic):
        assert np.isnan(values[1:]).all()
    assert 0.0 < found.p[0] <= 0.05
    assert found.reasons == {1: reason}


def test_shifts_that_leave_nothing_to_compare_stay_out_of_the_spread():
    found = spatial_by("torus", n_cells=6)
    assert np.isfinite(found.statistic[0])


def test_at_one_width_there_is_one_p():
    found = spatial_by("tile", tile_width=30.0, tile_widths=(30.0, 60.0))
    np.testing.assert_array_equal(found.p_by_width[0], found.p)
    assert not np.array_equal(found.p_by_width[1], found.p)
    beside = spatial_by("lag", tile_widths=(30.0,))
    np.testing.assert_array_equal(beside.p_by_width[0], found.p)


@pytest.mark.parametrize(("method", "n_drawn"), [("moments", 100_000), ("monte_carlo", 99)])
def test_few_cells_that_change_places_are_counted_and_what_was_asked_for_is_drawn(method, n_drawn):
    # 90 cells, but hardly any shares its tile
    found = spatial_by("tile", tile_width=4.0, spatial_method=method)
    assert found.method == "monte_carlo"
    counted = found.p[0] * (n_drawn + 1)
    assert counted == pytest.approx(round(counted), abs=1e-6)
    large = spatial_by("tile", tile_width=60.0, spatial_method=method)
    assert large.method == method


def test_default_widths_span_a_section_and_not_what_lies_between():
    rng = np.random.default_rng(3)
    xy = rng.uniform(0.0, 100.0, (400, 2))
    samples = np.repeat(["a", "b"], 200)
    apart = xy + np.where(samples == "a", 0.0, 1000.0)[:, None]
    test = PermutationSpec(spatial_null="tile")
    one, other = (
        head_tests._widths(test, CellPositions.of(where, samples=samples, n_genes=2), 22.0) for where in (xy, apart)
    )
    assert one == other
    assert max(one) <= 51.0
