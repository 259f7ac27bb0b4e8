from __future__ import annotations

import numpy as np
import pytest

from amici_eval.evaluation import spatial_evaluation
from amici_eval.evaluation.spatial_evaluation import spatial_test
from amici_eval.settings.evaluation import PermutationSpec
from amici_eval.stats.spatial.lag import CellPositions
from amici_eval.stats.type_sums import principal_factors, sums_of_predictions

SAME = "predicts the same for all cells of each section"


def spatial_by(null, *, n_cells=90, **settings):
    """Test a head that fits, one that differs between sections alone, and a dead one."""
    rng = np.random.default_rng(0)
    samples = np.repeat(["a", "b", "c"], n_cells // 3).astype(object)
    targets = rng.normal(size=(n_cells, 6)).astype(np.float32)
    heads = np.stack([targets + rng.normal(size=targets.shape), targets, targets]).astype(np.float32)
    heads[1] = np.repeat(rng.normal(size=(3, 6)), n_cells // 3, axis=0)
    heads[2] = 1.0
    place = CellPositions.of(rng.uniform(0.0, 100.0, (n_cells, 2)), samples=samples, n_genes=6)
    moments = sums_of_predictions(
        heads,
        heads[0],
        targets,
        tiles=np.zeros(n_cells, dtype=np.int64),
        place=place,
    )
    factors, weights = principal_factors(heads)
    return spatial_test(
        factors,
        np.einsum("ng,hgr->nrh", targets - targets.mean(axis=0, dtype=np.float64), weights),
        moments,
        weights=weights,
        place=place,
        test=PermutationSpec(spatial_null=null, n_shifts=19, **settings),
        cell_type="T",
        n_permutations=99,
        dead=np.array([False, False, True]),
    )


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
        spatial_evaluation._widths(test, CellPositions.of(where, samples=samples, n_genes=2), 22.0)
        for where in (xy, apart)
    )
    assert one == other
    assert max(one) <= 51.0
