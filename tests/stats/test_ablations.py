from __future__ import annotations

from dataclasses import fields, replace
from unittest.mock import patch

import numpy as np
import pytest
import torch

from amici_eval.settings.evaluation import MODES
from amici_eval.stats.ablation import ablations, values
from amici_eval.stats.ablation.ablations import ablate, all_coalitions
from amici_eval.stats.ablation.values import coalition_sums
from amici_eval.stats.permutation.permutations import PermutationStream
from tests.oracles import coalitions as oracle
from tests.stats.test_coalitions import Case, draw, members, values_of

CLOSE = {"rtol": 1e-11, "atol": 1e-11}


def catalogue(case, modes=MODES, *, seed=0, cell_type="T", device="cpu", **constants):
    with patch.multiple(ablations, **{"N_RESAMPLES": ablations.N_RESAMPLES, **constants}):
        return ablate(case.cells, modes=modes, seed=seed, cell_type=cell_type, device=device)


def worth(case, *, frozen=False):
    return lambda heads: oracle.value(case.readout, case.z, case.targets, heads, frozen=frozen)


@pytest.mark.parametrize("n_cells", [2, 3, 19])
@pytest.mark.parametrize(("n_heads", "head_size"), [(1, 2), (3, 2), (4, 3)])
def test_every_ablation_equals_its_definition(n_cells, n_heads, head_size):
    case = draw(n_cells + n_heads, n_cells=n_cells, n_heads=n_heads, head_size=head_size)
    result = catalogue(case, N_RESAMPLES=3)
    value, frozen = worth(case), worth(case, frozen=True)
    heads = range(n_heads)
    everything = frozenset(heads)
    np.testing.assert_allclose(result.full, value(everything), **CLOSE)
    np.testing.assert_allclose(result.none, value(()), **CLOSE)
    np.testing.assert_allclose(result.frozen_none, frozen(()), **CLOSE)
    np.testing.assert_allclose(result.keep_one, [value({h}) for h in heads], **CLOSE)
    np.testing.assert_allclose(result.leave_one_out, [value(everything - {h}) for h in heads], **CLOSE)
    np.testing.assert_allclose(result.frozen_norm, [frozen({h}) for h in heads], **CLOSE)
    mean = [oracle.substituted(case.readout, case.z, case.targets, h, None) for h in heads]
    np.testing.assert_allclose(result.mean_z, mean, **CLOSE)
    permutations = PermutationStream(seed=0, cell_type="T", n_cells=n_cells, stratum="resampled_z").batch(0, 3)
    resampled = np.array(
        [[oracle.substituted(case.readout, case.z, case.targets, h, p) for p in permutations] for h in heads]
    )
    np.testing.assert_allclose(result.resampled_z, resampled.mean(axis=1), **CLOSE)
    error = resampled.std(axis=1, ddof=1) / np.sqrt(3)
    np.testing.assert_allclose(result.resampled_z_standard_error, error, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(result.shapley, oracle.shapley_by_orders(value, n_heads), **CLOSE)
    np.testing.assert_allclose(result.frozen_shapley, oracle.shapley_by_orders(frozen, n_heads), **CLOSE)
    assert (result.shapley_standard_error == 0).all()
    assert result.interaction_reason is None
    for found, game in ((result.interaction, value), (result.frozen_interaction, frozen)):
        assert np.isnan(np.diag(found)).all()
        for first in heads:
            for second in set(heads) - {first}:
                expected = oracle.interaction_by_sets(game, n_heads, first, second)
                np.testing.assert_allclose(found[first, second], expected, **CLOSE)


def test_the_values_of_an_example_differ_from_each_other():
    # so that a field filled with another's numbers cannot pass the test above
    result = catalogue(draw(22, n_cells=19))
    columns = np.concatenate([getattr(result, mode) for mode in MODES])
    assert len(np.unique(np.round(columns, 6))) == columns.size


def test_shares_sum_to_what_all_heads_add():
    result = catalogue(draw(1, n_cells=200, n_heads=6, head_size=4))
    np.testing.assert_allclose(result.shapley.sum(), result.full - result.none, rtol=1e-12)
    np.testing.assert_allclose(result.frozen_shapley.sum(), result.full - result.frozen_none, rtol=1e-12)


def test_a_silent_head_gets_nothing_and_equal_heads_get_equal_shares():
    case = draw(2, n_cells=40, n_heads=4, head_size=2)
    weights, gram, z = case.readout.weights.copy(), case.readout.gram.copy(), case.z.copy()
    # head 1 becomes a copy of head 0; head 3 brings nothing
    z[:, 2:4] = z[:, :2]
    z[:, 6:] = 0
    weights[:, 3:5] = weights[:, 1:3]
    gram[3:5] = gram[1:3]
    gram[:, 3:5] = gram[:, 1:3]
    result = catalogue(replace(case, z=z, readout=replace(case.readout, weights=weights, gram=gram)))
    for shares in (result.shapley, result.frozen_shapley):
        np.testing.assert_allclose(shares[0], shares[1], rtol=1e-11)
        np.testing.assert_allclose(shares[3], 0, atol=1e-13)
        assert abs(shares[0]) > 1e-3
    for kept in (result.leave_one_out, result.mean_z, result.resampled_z):
        np.testing.assert_allclose(kept[3], result.full, rtol=1e-12)
    for index in (result.interaction, result.frozen_interaction):
        np.testing.assert_allclose(index[3, :3], 0, atol=1e-13)
    # two copies say the same: less together than apart
    assert result.frozen_interaction[0, 1] < 0


@pytest.mark.parametrize("seed", range(5))
def test_sampled_shares_lie_about_the_exact_ones(seed):
    case = draw(3, n_cells=60, n_heads=6)
    exact = catalogue(case, ["shapley"])
    sampled = catalogue(case, ["shapley"], seed=seed, MAX_EXACT_HEADS=3, N_ORDERS=128)
    assert (sampled.shapley_standard_error > 0).all()
    assert (np.abs(sampled.shapley - exact.shapley) < 4 * sampled.shapley_standard_error).all()
    assert (sampled.shapley != exact.shapley).all()
    np.testing.assert_allclose(sampled.shapley.sum(), exact.full - exact.none, rtol=1e-11)
    assert np.isnan(sampled.interaction).all()
    assert sampled.interaction_reason == "6 heads; all coalitions are evaluated up to 3"
    again = catalogue(case, ["shapley"], seed=seed, MAX_EXACT_HEADS=3, N_ORDERS=128)
    np.testing.assert_array_equal(again.shapley, sampled.shapley)


def test_more_heads_than_all_coalitions_allow():
    case = draw(4, n_cells=30, n_heads=13, head_size=1)
    result = catalogue(case, N_ORDERS=40)
    assert "13 heads" in result.interaction_reason
    np.testing.assert_allclose(result.shapley.sum(), result.full - result.none, rtol=1e-11)
    np.testing.assert_allclose(result.frozen_shapley.sum(), result.full - result.frozen_none, rtol=1e-11)
    first, second = np.triu_indices(13, 1)
    assert np.isfinite(result.frozen_interaction[first, second]).all()


def numbers(result):
    return {
        f.name: np.asarray(getattr(result, f.name))
        for f in fields(result)
        if f.name not in ("modes", "interaction_reason")
    }


def assert_same(left, right, *, but=()):
    expected = numbers(right)
    for name, found in numbers(left).items():
        if name not in but:
            np.testing.assert_allclose(found, expected[name], rtol=0, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("chunk_cells", [1, 7, 23, 4096])
def test_chunks_change_nothing_but_rounding(chunk_cells, monkeypatch):
    case = draw(5, n_cells=23)
    whole = catalogue(case)
    monkeypatch.setattr(values, "CHUNK_CELLS", chunk_cells)
    assert_same(catalogue(case), whole)


@pytest.mark.parametrize(("n_cells", "n_heads", "head_size"), [(3, 1, 5), (40, 3, 2), (600, 4, 16)])
def test_the_compiled_kernel_and_torch_agree(n_cells, n_heads, head_size, monkeypatch):
    case = draw(12, n_cells=n_cells, n_heads=n_heads, head_size=head_size)
    compiled = catalogue(case)
    called = []
    monkeypatch.setattr(values, "cpu_substitution", called.append)
    assert_same(catalogue(case), compiled)
    assert called


@pytest.mark.parametrize("compiled", [True, False])
def test_threads_change_nothing_but_rounding(compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(values, "cpu_substitution", lambda _: None)
    case = draw(13, n_cells=1500, n_heads=4, head_size=8)
    results, before = [], torch.get_num_threads()
    try:
        for n_threads in (1, 2):
            torch.set_num_threads(n_threads)
            results.append(catalogue(case))
            assert torch.get_num_threads() == n_threads
    finally:
        torch.set_num_threads(before)
    assert_same(*results)


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))]


@pytest.mark.parametrize("device", DEVICES)
def test_the_device_changes_nothing_but_rounding(device):
    case = draw(14, n_cells=70)
    assert_same(catalogue(case, device=device), catalogue(case))


def test_the_device_asked_for_does_the_work():
    # a device without memory: whatever is computed there has no numbers to return
    for mode in ("keep_one", "resampled_z"):
        with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
            catalogue(draw(0), [mode], device="meta")


def test_only_what_is_asked_for_is_computed(monkeypatch):
    rows = []

    def counted(cells, coalitions, **options):
        rows.append(len(coalitions))
        return coalition_sums(cells, coalitions, **options)

    def refused(*arguments, **options):
        raise AssertionError

    monkeypatch.setattr(ablations, "coalition_sums", counted)
    monkeypatch.setattr(ablations, "substituted_values", refused)
    case = draw(15, n_heads=6)
    for mode in ("frozen_norm", "keep_one", "leave_one_out", "shapley"):
        catalogue(case, [mode])
    assert rows == [2, 8, 8, 64]
    with pytest.raises(AssertionError):
        catalogue(case, ["mean_z"])


def test_read_only_and_strided_inputs_will_do():
    cells = draw(17).cells
    wide = replace(cells, z=np.repeat(cells.z, 2, axis=1)[:, ::2])
    cells.z.flags.writeable = cells.projected.flags.writeable = False
    assert_same(*(ablate(own, modes=MODES, seed=0, cell_type="T") for own in (cells, wide)))


def test_the_order_of_cells_matters_to_permutations_alone():
    case = draw(6, n_cells=40)
    order = np.random.default_rng(1).permutation(40)
    shuffled = catalogue(Case(z=case.z[order], targets=case.targets[order], readout=case.readout))
    resampled = ("resampled_z", "resampled_z_standard_error")
    assert_same(shuffled, catalogue(case), but=resampled)
    assert (shuffled.resampled_z != catalogue(case).resampled_z).all()


def test_results_follow_the_heads_when_these_change_places():
    case = draw(7, n_cells=40, n_heads=4, head_size=2)
    order = np.array([2, 0, 3, 1])
    columns = (order[:, None] * 2 + np.arange(2)).reshape(-1)
    x = np.concatenate([[0], 1 + columns])
    readout = replace(case.readout, weights=case.readout.weights[:, x], gram=case.readout.gram[np.ix_(x, x)])
    moved = numbers(catalogue(Case(z=case.z[:, columns], targets=case.targets, readout=readout)))
    for name, expected in numbers(catalogue(case)).items():
        at = {0: (), 1: order, 2: np.ix_(order, order)}[expected.ndim]
        np.testing.assert_allclose(moved[name], expected[at], rtol=0, atol=1e-12, err_msg=name)


def test_seed_type_and_number_decide_the_permutations():
    case = draw(8, n_cells=30)

    def resampled(**options):
        return catalogue(case, ["resampled_z"], **{"N_RESAMPLES": 2, **options}).resampled_z

    np.testing.assert_array_equal(resampled(), resampled())
    for other in (resampled(seed=1), resampled(cell_type="U"), resampled(N_RESAMPLES=3)):
        assert (other != resampled()).all()
    assert np.isnan(catalogue(case, N_RESAMPLES=1).resampled_z_standard_error).all()


@pytest.mark.parametrize("mode", MODES)
def test_what_was_not_asked_for_is_nan(mode):
    case = draw(9)
    result, everything = catalogue(case, [mode]), catalogue(case)
    assert result.modes == (mode,)
    assert everything.modes == MODES
    belongs = {
        "shapley": ("shapley_standard_error", "interaction"),
        "frozen_shapley": ("frozen_interaction",),
        "resampled_z": ("resampled_z_standard_error",),
    }
    asked = (mode, *belongs.get(mode, ()), "full", "none", "frozen_none")
    for name, found in numbers(result).items():
        if name in asked:
            np.testing.assert_allclose(found, numbers(everything)[name], rtol=0, atol=1e-12)
            assert np.isfinite(found[~np.eye(3, dtype=bool)] if found.ndim == 2 else found).all()
        else:
            assert np.isnan(found).all(), name


def test_global_randomness_and_inputs_are_left_alone():
    cells = draw(10).cells
    before = np.random.get_state()[1].copy(), cells.z.copy(), cells.projected.copy()  # noqa: NPY002
    ablate(cells, modes=MODES, seed=0, cell_type="T")
    after = np.random.get_state()[1], cells.z, cells.projected  # noqa: NPY002
    for left, right in zip(before, after, strict=True):
        np.testing.assert_array_equal(left, right)


def test_full_agrees_with_the_values_of_coalitions():
    case = draw(11, n_cells=500, n_heads=8, head_size=8)
    values = values_of(case.cells, all_coalitions(8))
    result = catalogue(case, ["leave_one_out", "frozen_shapley"])
    np.testing.assert_allclose([result.none, result.full], values[[0, -1]], rtol=1e-12)
    assert [members(all_coalitions(8)[255 - (1 << h)]) for h in range(2)] == [
        [1, 2, 3, 4, 5, 6, 7],
        [0, 2, 3, 4, 5, 6, 7],
    ]
    np.testing.assert_allclose(result.leave_one_out, [values[255 - (1 << h)] for h in range(8)], rtol=1e-12)
