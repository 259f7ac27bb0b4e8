"""Tests that hold in tissue, intervals, held-out cells and baselines, from a trained AMICI by either engine."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from amici_eval.common.errors import DataError, InvalidSpecError
from amici_eval.data.tissue import prepare
from amici_eval.evaluation.pipeline import evaluate, evaluate_access
from amici_eval.model.engines.opening import open_access
from amici_eval.results.codec import arrays_of
from amici_eval.results.evaluation import HeadEvaluation
from amici_eval.settings.evaluation import AblationSpec, DataSpec, EvaluationSpec, PermutationSpec, SubsetSpec
from amici_eval.stats.pvalues import adjust_p_values
from tests.same_numbers import FLOAT32, assert_rounded

pytestmark = pytest.mark.amici


def spec_of(*, engine="factored", baselines=False, data=None, **test):
    return EvaluationSpec(
        data=data or DataSpec(),
        ablation=AblationSpec(engine=engine, device="cpu", modes=("keep_one",), baselines=baselines),
        permutation=PermutationSpec(**{"n_permutations": 39, "n_bootstrap": 50, **test}),
    )


def same(one, other, *, rtol=1e-5, atol=1e-7):
    for name in arrays_of(type(one)):
        found, expected = getattr(one, name), getattr(other, name)
        if name == "statistic":  # standardized: rounding is relative to its spread, not to each value
            assert_rounded(found, expected, precision=max(rtol, FLOAT32), name=name)
        else:
            np.testing.assert_allclose(found, expected, rtol=rtol, atol=atol, err_msg=name)


def test_both_engines_infer_the_same(trained, adata):
    factored, hooked = (evaluate(trained, adata, spec_of(engine=engine)) for engine in ("factored", "hooked"))
    assert (factored.engine, hooked.engine) == ("factored", "hooked")
    assert np.isfinite(factored.spatial.p_value).any()
    same(factored.spatial, hooked.spatial, rtol=2e-3, atol=1e-6)
    same(factored.intervals, hooked.intervals, rtol=1e-3, atol=1e-5)
    same(factored.parts, hooked.parts, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("null", ["lag", "tile", "torus"])
def test_the_order_of_cells_threads_and_chunks_change_nothing(trained, adata, null):
    spec = spec_of(spatial_null=null, n_shifts=19, tile_width=40.0 if null == "tile" else None, baselines=True)
    expected = evaluate(trained, adata, spec)
    order = np.random.default_rng(0).permutation(adata.n_obs)
    found = [evaluate(trained, adata[order].copy(), spec)]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with open_access(trained, prepare(adata, trained.card, spec.data), spec.ablation) as access:
            access._tile, access._chunk, access._read_rows = 37, 5, 11
            found.append(evaluate_access(access, spec))
    finally:
        torch.set_num_threads(before)
    for one in found:
        for name in ("spatial", "intervals", "parts"):
            same(getattr(expected, name), getattr(one, name), rtol=1e-4, atol=1e-7)
        # baselines are fitted in folds by name; sums in another order differ in the last bits
        same(expected.trivial, one.trivial, rtol=1e-3, atol=1e-5)


def test_significance_follows_the_spatial_test_where_there_is_one(trained, adata):
    with_it, without = (evaluate(trained, adata, spec_of(spatial_null=null)) for null in ("lag", "none"))
    heads = with_it.heads()
    tested = heads["p_value_adj_spatial"].notna()
    assert tested.any()
    assert set(heads.loc[tested, "significant_by"]) == {"lag"}
    assert set(heads.loc[tested, "null"]) == {"lag"}
    expected = heads.loc[tested, "p_value_adj_spatial"] <= 0.05
    assert (heads.loc[tested, "significant"] == expected).all()
    free = without.heads()
    assert free["p_value_spatial"].isna().all()
    assert set(free["significant_by"].dropna()) == {"free"}
    # the free columns are the same either way
    for name in ("expl_var_head", "p_value_head", "p_value_adj_head", "significant_free"):
        assert heads[name].equals(free[name])
    assert without.spatial is None
    assert with_it.n_decided == int(tested.sum())


def test_genes_are_one_family_of_all_heads_and_types(trained, adata):
    found = evaluate(trained, adata, spec_of())
    frame = found.to_frame()
    p = frame["p_value_gene"].to_numpy()
    assert ((p > 0) & (p <= 1) | np.isnan(p)).all()
    assert np.isfinite(p).any()
    np.testing.assert_allclose(frame["p_value_adj_gene"], adjust_p_values(p))


@pytest.mark.parametrize(
    ("settings", "method"),
    [
        ({"spatial_null": "tile", "tile_width": 60.0}, "moments"),
        ({"spatial_null": "tile", "tile_width": 60.0, "spatial_method": "monte_carlo"}, "monte_carlo"),
        ({"spatial_null": "torus", "n_shifts": 39}, "monte_carlo"),
    ],
)
def test_other_nulls_say_how_p_came_about(trained, adata, settings, method):
    found = evaluate(trained, adata, spec_of(**settings))
    p = found.spatial.p_value
    assert set(found.spatial.method) == {method}
    assert np.isfinite(p).any()
    assert (p[np.isfinite(p)] > 0).all()
    if method == "monte_carlo":
        assert (found.spatial.p_ci_low <= p).all()
        assert (found.spatial.p_ci_high >= p).all()
    if settings["spatial_null"] == "tile":
        assert (found.spatial.reach == 60.0).all()


def test_moments_within_tiles_agree_with_permutations_within_tiles(trained, adata):
    exact, drawn = (
        evaluate(trained, adata, spec_of(spatial_null="tile", tile_width=80.0, spatial_method=how, n_permutations=1999))
        for how in ("moments", "monte_carlo")
    )
    p, q = exact.spatial.p_value, drawn.spatial.p_value
    assert (np.abs(p - q) < 0.01 + 4 * np.sqrt(p * (1 - p) / 1999)).all()


def test_p_against_scale_has_a_row_for_each_width(trained, adata):
    frame = evaluate(trained, adata, spec_of(tile_widths=(30.0, 120.0))).scales_frame()
    assert sorted(set(frame["tile_width"])) == [30.0, 120.0]
    assert frame["p_value"].notna().any()
    assert len(evaluate(trained, adata, spec_of()).scales_frame()) == 0


@pytest.mark.parametrize(
    ("settings", "sampling"),
    [
        ({"method": "moments"}, "moments"),
        ({"method": "sequential", "stop_at": 5, "n_permutations": 400}, "sequential"),
        ({"adjustment": "maxt", "n_permutations": 400}, "independent"),
        ({"adjustment": "by"}, "independent"),
    ],
)
@pytest.mark.parametrize("engine", ["factored", "hooked"])
def test_other_methods_of_the_free_null_agree_with_counting(trained, adata, settings, sampling, engine):
    counted = evaluate(trained, adata, spec_of(engine=engine, n_permutations=1999))
    found = evaluate(trained, adata, spec_of(engine=engine, **settings))
    assert set(found.sampling) == {sampling}
    p, q = found.p_value, counted.p_value
    assert (np.isnan(p) == np.isnan(q)).all()
    if sampling == "sequential":
        # a test that stopped early is as precise as its exceedances are many
        some = np.isfinite(p)
        assert (found.p_ci_low <= counted.p_ci_high)[some].all()
        assert (counted.p_ci_low <= found.p_ci_high)[some].all()
    else:
        m = found.n_permutations if sampling != "moments" else 10**9
        error = 4 * np.sqrt(q * (1 - q) * (1 / m + 1 / 1999)) + 2 / m + 2 / 1999
        assert (np.abs(p - q) <= error)[np.isfinite(p)].all()
    assert (found.p_value_adj >= p - 1e-12)[np.isfinite(p)].all()


def test_a_tail_gives_small_p_values_below_what_counts_can_reach(trained, adata):
    tissue = adata.copy()
    settings = {"n_permutations": 999, "spatial_null": "none"}
    counted, fitted = (evaluate(trained, tissue, spec_of(tail=tail, **settings)) for tail in ("none", "gpd"))
    np.testing.assert_array_equal(counted.exceedances, fitted.exceedances)
    assert "gpd" in fitted.sampling
    assert (fitted.p_value < 1 / 1000).any()
    many = counted.exceedances >= 10
    np.testing.assert_array_equal(counted.p_value[many], fitted.p_value[many])
    assert (fitted.p_value > 0).all()


@pytest.mark.parametrize(
    ("settings", "value"),
    [
        ({"adjustment": "maxt", "sampling": "cyclic"}, "permutation.adjustment=maxt with permutation.sampling=cyclic"),
        ({"tail": "gpd", "method": "moments"}, "permutation.tail=gpd with permutation.method=moments"),
        ({"method": "moments", "convention": "reference"}, "permutation.method=moments"),
        ({"reach": -1.0}, "permutation.reach=-1.0"),
        ({"tile_widths": (10.0, 0.0)}, "permutation.tile_widths=0.0"),
        ({"confidence": 1.0}, "permutation.confidence=1.0"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, value):
    with pytest.raises(InvalidSpecError) as caught:
        PermutationSpec(**settings)
    assert caught.value.value.startswith(value)


def test_shuffling_within_sections_needs_to_know_them(trained, adata):
    with pytest.raises(DataError) as caught:
        evaluate(trained, adata, spec_of(spatial_null="sample"))
    assert caught.value.value == "permutation.spatial_null=sample without data.sample_key"


def test_intervals_hold_the_effect_and_grow_with_the_confidence(trained, adata):
    wide, narrow = (evaluate(trained, adata, spec_of(confidence=level)) for level in (0.99, 0.5))
    some = np.isfinite(wide.intervals.low)
    assert some.any()
    for found in (wide, narrow):
        assert (found.intervals.low < found.expl_var)[some].all()
        assert (found.intervals.high > found.expl_var)[some].all()
        full = np.isfinite(found.intervals.full_low)
        assert (found.intervals.full_low < found.expl_var_full)[full].all()
    length = [(one.intervals.high - one.intervals.low)[some] for one in (narrow, wide)]
    assert (length[0] < length[1]).all()
    assert evaluate(trained, adata, spec_of(n_bootstrap=0)).intervals is None


def test_in_sample_and_held_out_are_what_separate_evaluations_give(trained, adata):
    side_by_side = evaluate(trained, adata, spec_of())
    parts = side_by_side.parts
    assert (parts.n_cells.sum(axis=0) == side_by_side.n_cells).all()
    for part, held_out in enumerate((False, True)):
        alone = evaluate(trained, adata, spec_of(data=DataSpec(subset=SubsetSpec(held_out=held_out))))
        for index, cell_type in enumerate(side_by_side.cell_types):
            if cell_type not in alone.cell_types or parts.n_cells[part, index] < 2:
                continue
            own = alone.type_index(cell_type)
            assert parts.n_cells[part, index] == alone.n_cells[own]
            np.testing.assert_allclose(parts.expl_var[part, :, index], alone.expl_var[:, own], atol=1e-6)
            np.testing.assert_allclose(parts.full[part, index], alone.expl_var_full[own], atol=1e-6)
    frame = side_by_side.held_out_frame()
    assert len(frame) == (side_by_side.n_heads + 1) * len(side_by_side.cell_types)


def test_a_model_that_does_not_know_its_cells_has_no_parts(trained, adata):
    unknown = replace(trained, card=replace(trained.card, training_cells=None))
    found = evaluate(unknown, adata, spec_of())
    assert found.parts is None
    assert len(found.held_out_frame()) == 0
    assert (found.moments.row_held_out == -1).all()


def test_baselines_of_a_tissue_without_training_cells_are_fitted_on_what_is_evaluated(trained, adata):
    elsewhere = replace(trained, card=replace(trained.card, training_cells=frozenset({"elsewhere"}), fingerprints=None))
    found = evaluate(elsewhere, adata, spec_of(baselines=True))
    assert found.trivial.fitted_on == "all evaluated cells"
    assert np.isfinite(found.trivial.gain).any()
    assert evaluate(trained, adata, spec_of(baselines=True)).trivial.fitted_on == "training cells"


def test_a_model_of_one_gene_gives_the_same_by_both_engines(make_amici, adata):
    one = adata[:, :1].copy()
    model = make_amici(one)
    factored, hooked = (evaluate(model, one, spec_of(engine=engine)) for engine in ("factored", "hooked"))
    assert (factored.engine, hooked.engine) == ("factored", "hooked")
    np.testing.assert_allclose(factored.expl_var, hooked.expl_var, atol=1e-4)


def test_moments_of_the_whole_model_give_what_it_explains(trained, adata):
    found = evaluate(trained, adata, spec_of())
    moments = found.moments
    for index in range(len(found.cell_types)):
        rows = moments.row_type == index
        n = moments.n_cells[rows].astype(float)[:, None]

        def spread(mean, m2, n=n):
            overall = (n * mean).sum(axis=0) / n.sum()
            return (m2 + n * (mean - overall) ** 2).sum()

        residual = spread(moments.full_mean[rows].astype(float), moments.full_m2[rows].astype(float))
        target = spread(moments.target_mean[rows].astype(float), moments.target_m2[rows].astype(float))
        assert 1 - residual / target == pytest.approx(found.expl_var_full[index], abs=1e-5)


def test_an_evaluation_with_everything_survives_its_json(trained, adata, tmp_path):
    found = evaluate(trained, adata, spec_of(baselines=True, tile_widths=(40.0,)))
    assert None not in (found.spatial, found.intervals, found.parts, found.trivial)
    again = HeadEvaluation.from_json(found.to_json())
    assert again.to_json() == found.to_json()
    found.save(tmp_path)
    read = HeadEvaluation.load(tmp_path)
    for frame in ("heads", "to_frame", "baselines", "held_out_frame", "scales_frame"):
        assert getattr(read, frame)().equals(getattr(found, frame)())


def test_baselines_are_scored_with_either_engine_and_the_nearest_is_masked_with_one(trained, adata):
    factored, hooked = (
        evaluate(trained, adata, spec_of(engine=engine, baselines=True)) for engine in ("factored", "hooked")
    )
    np.testing.assert_allclose(factored.trivial.expl_var, hooked.trivial.expl_var, rtol=1e-6)
    np.testing.assert_allclose(factored.trivial.gain, hooked.trivial.gain, atol=1e-5)
    assert np.isfinite(factored.trivial.without_nearest).all()
    assert np.isnan(hooked.trivial.without_nearest).all()


def test_held_out_cells_beside_cells_of_training_are_counted_in_a_note(trained, adata):
    def notes(**subset):
        spec = spec_of(data=DataSpec(subset=SubsetSpec(**subset)))
        return [note for note in evaluate(trained, adata, spec).notes if "among their neighbours, as" in note]

    with open_access(trained, prepare(adata, trained.card, DataSpec()), AblationSpec(device="cpu")) as access:
        fitted = np.isin(access.cell_names(np.arange(adata.n_obs)), list(trained.card.training_cells))
        near = fitted[access.neighbour_rows[~fitted]].any(axis=1)
    assert 0 < near.sum() < len(near)
    (note,) = notes()
    assert note.startswith(f"{near.sum()} of {len(near)} held-out cells have cells that the model was fitted on")
    assert notes(held_out=True) == [note]
    assert notes(held_out=True, buffer=True) == notes(held_out=False) == []


def test_a_type_without_an_interval_says_why(trained, adata):
    rows = np.flatnonzero((adata.obs["region"] == "rest").to_numpy())
    one_corner = rows[np.argsort(adata.obsm["spatial"][rows].sum(axis=1))[:60]]
    tissue = adata.copy()
    found = evaluate(trained, tissue, spec_of(data=DataSpec(subset=SubsetSpec(indices=tuple(one_corner.tolist())))))
    heads = found.heads()
    missing = heads["ci_low"].isna() & heads["expl_var_head"].notna()
    assert (heads.loc[missing, "undefined_reason"].str.contains("interval: ")).all()
    assert (heads["n_tiles"] == found.intervals.n_tiles[[found.type_index(name) for name in heads["ct_name"]]]).all()
    for name, reason in found.intervals.reasons:
        assert f"interval: {reason}" in heads.loc[heads["ct_name"] == name, "undefined_reason"].iloc[0]


def test_a_part_that_was_not_asked_for_is_no_shortcoming(trained, adata):
    found = evaluate(trained, adata, spec_of(data=DataSpec(subset=SubsetSpec(held_out=True)))).held_out_frame()
    defined = found["expl_var_held_out"].notna()
    assert defined.any()
    # a type in few tiles has no interval, which is another matter
    reasons = found.loc[defined, "undefined_reason"]
    assert reasons.isin(["", "no interval held-out: cells in too few tiles"]).all()


def test_drawing_shifts_can_be_interrupted(trained, adata):
    def stop(done, total, what):
        calls.append(done)
        if len(calls) > 200:
            raise KeyboardInterrupt

    calls: list[int] = []
    evaluate(trained, adata, spec_of(spatial_null="torus", n_shifts=1), progress=stop)
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        evaluate(trained, adata, spec_of(spatial_null="torus", n_shifts=500), progress=stop)


def on_a_grid(coordinates, step):
    return np.round(coordinates / step) * step


def with_placeholders(coordinates):
    moved = coordinates.copy()
    moved[::3] = 0.0
    return moved


def on_a_lattice(coordinates):
    return np.stack(np.divmod(np.argsort(np.argsort(coordinates[:, 0])), 25), axis=1) * 10.0


@pytest.mark.parametrize(
    ("move", "shared"),
    [(lambda xy: on_a_grid(xy, 25.0), True), (with_placeholders, True), (on_a_lattice, False)],
    ids=["rounded", "placeholders", "lattice"],
)
def test_ties_depend_on_no_order_and_say_nothing_of_the_nearest_neighbour(trained, adata, move, shared):
    adata.obsm["spatial"] = move(adata.obsm["spatial"])
    shuffled = adata[np.random.default_rng(0).permutation(adata.n_obs)].copy()
    one, other = (evaluate(trained, each, spec_of(baselines=True)) for each in (adata, shuffled))
    np.testing.assert_allclose(one.expl_var, other.expl_var, atol=1e-6, rtol=0)
    np.testing.assert_allclose(one.trivial.gain, other.trivial.gain, atol=1e-5, rtol=0)
    assert np.isnan(one.trivial.without_nearest).all()
    assert np.isnan(one.trivial.full_without_nearest).all()
    assert any("of 500 cells share a position" in note for note in one.notes) == shared
    (note,) = (note for note in one.notes if "several neighbours at the least distance" in note)
    assert f"with more than 5% of such cells ({', '.join(one.cell_types)})" in note
    assert one.notes == other.notes


def test_a_few_ties_are_counted_and_leave_all_neighbours_to_these_cells(trained, adata):
    spec, labels = spec_of(baselines=True), adata.obs["cell_type"].astype(str).to_numpy()
    # two cells of one type at one place are the nearest to some cells of other types
    of_type = np.flatnonzero(labels == labels[0])
    middle = np.linalg.norm(adata.obsm["spatial"] - adata.obsm["spatial"].mean(axis=0), axis=1)
    first, second = of_type[np.argsort(middle[of_type])][[0, -1]]
    adata.obsm["spatial"][second] = adata.obsm["spatial"][first]
    found = evaluate(trained, adata, spec)
    (note,) = (note for note in found.notes if "several neighbours at the least distance" in note)
    n_tied = int(note.split(" of ")[0])
    assert 0 < n_tied <= 12
    with open_access(trained, prepare(adata, trained.card, spec.data), spec.ablation) as access:
        rows = np.arange(adata.n_obs)
        tied = np.isnan(access.attend(rows, without_nearest=True).without_nearest).all(axis=1)
        nearest = np.sort(access.hooked.distances, axis=1)
    assert tied.sum() == n_tied
    np.testing.assert_array_equal(tied, nearest[:, 0] == nearest[:, 1])
    left_out = [tied[labels == cell_type].mean() > 0.05 for cell_type in found.cell_types]
    assert not all(left_out)
    np.testing.assert_array_equal(np.isnan(found.trivial.full_without_nearest), left_out)
    assert np.abs(found.trivial.full_without_nearest - found.expl_var_full)[~np.array(left_out)].max() > 1e-6


def test_planes_in_z_are_sections_for_the_tests_and_attention_crosses_them(trained, adata):
    planes = np.arange(adata.n_obs) % 3
    adata.obsm["spatial"] = np.column_stack([adata.obsm["spatial"], 4.0 * planes])
    adata.obs["slice"] = planes.astype(str)
    derived = evaluate(trained, adata, spec_of(spatial_null="sample"))
    assert any("lie in 3 planes of z" in note for note in derived.notes)
    named = evaluate(trained, adata, spec_of(spatial_null="sample", data=DataSpec(sample_key="slice")))
    same(derived.spatial, named.spatial)
    flat = adata.copy()
    flat.obsm["spatial"] = flat.obsm["spatial"][:, :2]
    with pytest.raises(DataError, match=r"sample without data\.sample_key"):
        evaluate(trained, flat, spec_of(spatial_null="sample"))
    with pytest.raises(DataError, match="neighbours in another section"):
        evaluate(trained, flat, spec_of(data=DataSpec(sample_key="slice")))
