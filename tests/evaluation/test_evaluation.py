from __future__ import annotations

import itertools
import logging

import numpy as np
import pandas as pd
import pytest

from amici_eval.evaluation.pipeline import evaluate_access
from amici_eval.settings.evaluation import AblationSpec, EvaluationSpec, PermutationSpec
from amici_eval.stats.permutation.permutations import PermutationStream
from amici_eval.stats.pvalues import p_values
from tests.fakes import make_access
from tests.oracles import reference

T_CELL, MICROGLIA, BETA = "CD8+_T_Cells", "Microglia/PVM", "β cell"


def spec(**permutation):
    test = PermutationSpec(**{"n_permutations": 199, **permutation})
    return EvaluationSpec(permutation=test, ablation=AblationSpec(engine="hooked"))


def reasons(evaluation):
    return {(item.cell_type, item.head, item.gene): item.reason for item in evaluation.undefined}


def of_type(evaluation, cell_type):
    return evaluation.cell_types.index(cell_type)


def assert_same_numbers(left, right):
    """All numbers of two evaluations are equal bit by bit, whatever the order of their types."""
    assert set(left.cell_types) == set(right.cell_types)
    order = [right.cell_types.index(label) for label in left.cell_types]
    for name in ("n_cells", "expl_var_full", "expl_var_none"):
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name)[order], err_msg=name)
    for name in ("expl_var_gene", "expl_var", "exceedances", "p_value", "p_value_adj", "p_ci_low", "p_ci_high"):
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name)[:, order], err_msg=name)
    assert left.n_permutations == right.n_permutations
    assert reasons(left) == reasons(right)


def test_the_planted_head_is_found_and_the_others_are_not():
    evaluation = evaluate_access(make_access(planted=((0, T_CELL), (2, BETA))), spec())
    assert evaluation.cell_types == (T_CELL, MICROGLIA, BETA)
    significant = {tuple(pair) for pair in np.argwhere(evaluation.p_value_adj <= 0.05).tolist()}
    assert significant == {(0, 0), (2, 2)}
    assert evaluation.n_significant == 2
    # half of the variance is the signal, and predicting noise of the same size makes things worse
    assert 0.35 < evaluation.expl_var[0, 0] < 0.65
    assert np.all(evaluation.expl_var[1:, 0] < 0)
    assert evaluation.best_head(T_CELL) == 0
    assert evaluation.best_head(BETA) == 2
    np.testing.assert_array_equal(evaluation.n_cells, [60, 45, 30])
    assert evaluation.undefined == ()


def test_every_number_equals_its_definition():
    access = make_access({T_CELL: 12, BETA: 9}, seed=3)
    evaluation = evaluate_access(access, spec(n_permutations=40, seed=5))
    for index, (label, rows) in enumerate(access.receivers().items()):
        stream = PermutationStream(seed=5, cell_type=label, n_cells=len(rows))
        permutations = stream.batch(0, 40).tolist()
        targets = access.targets[rows]
        for head in range(3):
            per_gene, aggregated = reference.explained_variance(access.heads[head][rows], targets)
            np.testing.assert_allclose(evaluation.expl_var_gene[head, index], per_gene, rtol=1e-10)
            assert evaluation.expl_var[head, index] == pytest.approx(aggregated, rel=1e-10)
            count = reference.permutation_count(access.heads[head][rows], targets, permutations)
            assert evaluation.exceedances[head, index] == count
        full, none = (reference.explained_variance(source[rows], targets)[1] for source in (access.full, access.none))
        assert evaluation.expl_var_full[index] == pytest.approx(full, rel=1e-10)
        assert evaluation.expl_var_none[index] == pytest.approx(none, rel=1e-10, abs=1e-10)
    expected = p_values(evaluation.exceedances, n_permutations=40)
    np.testing.assert_array_equal(evaluation.p_value, expected.p)
    np.testing.assert_array_equal(evaluation.p_ci_low, expected.ci_low)
    np.testing.assert_array_equal(evaluation.p_ci_high, expected.ci_high)
    adjusted = reference.benjamini_hochberg(evaluation.p_value.ravel().tolist())
    np.testing.assert_allclose(evaluation.p_value_adj.ravel(), adjusted, rtol=1e-12)


def test_each_head_alone_all_heads_and_no_head_are_asked_for_once_per_type():
    access = make_access()
    evaluate_access(access, spec(n_permutations=9))
    assert access.asked == [((0,), (1,), (2,), None, ())] * 3


def test_types_with_one_or_two_cells_say_what_is_undefined_and_why(caplog):
    with caplog.at_level(logging.WARNING, logger="amici_eval"):
        evaluation = evaluate_access(make_access({T_CELL: 40, MICROGLIA: 2, BETA: 1}), spec())
    assert reasons(evaluation) == {
        (MICROGLIA, None, None): "2 cells; a test needs at least 3",
        (BETA, None, None): "1 cell; explained variance needs at least 2",
    }
    two, one = of_type(evaluation, MICROGLIA), of_type(evaluation, BETA)
    assert np.isfinite(evaluation.expl_var_gene[:, two]).all()
    assert np.isfinite(evaluation.expl_var_full[two])
    assert np.isnan(evaluation.expl_var_gene[:, one]).all()
    assert np.isnan([evaluation.expl_var_full[one], evaluation.expl_var_none[one]]).all()
    for index in (one, two):
        assert evaluation.exceedances[:, index].tolist() == [-1, -1, -1]
        for values in (evaluation.p_value, evaluation.p_value_adj, evaluation.p_ci_low, evaluation.p_ci_high):
            assert np.isnan(values[:, index]).all()
    assert evaluation.n_tests == 3
    assert evaluation.n_undefined == 6
    assert [record.getMessage() for record in caplog.records] == [
        "undefined for Microglia/PVM, all heads: 2 cells; a test needs at least 3",
        "undefined for β cell, all heads: 1 cell; explained variance needs at least 2",
    ]


def test_a_constant_gene_is_undefined_in_its_type_only():
    access = make_access()
    access.targets[access.rows_of(BETA), 4] = 0.7
    evaluation = evaluate_access(access, spec())
    assert reasons(evaluation) == {(BETA, None, "g4"): "the gene has one value in all 30 cells of the type"}
    missing = np.argwhere(np.isnan(evaluation.expl_var_gene))
    assert missing.tolist() == [[head, of_type(evaluation, BETA), 4] for head in range(3)]
    assert np.isfinite(evaluation.p_value).all()


def test_a_type_whose_genes_are_all_constant_has_no_test():
    access = make_access()
    access.targets[access.rows_of(MICROGLIA)] = 0.3
    evaluation = evaluate_access(access, spec())
    index = of_type(evaluation, MICROGLIA)
    said = reasons(evaluation)
    assert said.pop((MICROGLIA, None, None)) == "no gene varies over the 45 cells"
    assert said == {
        (MICROGLIA, None, g): "the gene has one value in all 45 cells of the type" for g in access.card.genes
    }
    assert np.isnan(evaluation.expl_var_gene[:, index]).all()
    assert np.isnan(evaluation.expl_var[:, index]).all()
    assert np.isnan(evaluation.p_value[:, index]).all()
    assert evaluation.n_tests == 6


def test_a_dead_head_has_no_test():
    access = make_access()
    access.heads[1][access.rows_of(T_CELL)] = access.none[0]
    evaluation = evaluate_access(access, spec())
    index = of_type(evaluation, T_CELL)
    assert reasons(evaluation) == {(T_CELL, 1, None): "the head predicts the same for all cells (dead head)"}
    assert evaluation.exceedances[1, index] == -1
    assert np.isnan(evaluation.p_value[1, index])
    assert evaluation.expl_var[1, index] == pytest.approx(0.0, abs=1e-6)
    assert evaluation.n_tests == 8


def test_predictions_that_are_not_finite_give_no_p_value():
    access = make_access()
    access.heads[2][access.rows_of(BETA)[3], 1] = np.nan
    evaluation = evaluate_access(access, spec())
    index = of_type(evaluation, BETA)
    assert reasons(evaluation) == {(BETA, 2, None): "the head's predictions are not finite"}
    assert np.isnan(evaluation.expl_var[2, index])
    assert np.isnan(evaluation.p_value[2, index])
    assert evaluation.n_significant == 1


@pytest.mark.parametrize("sizes", [{T_CELL: 20}, {T_CELL: 20, BETA: 10}, {T_CELL: 20, BETA: 10, MICROGLIA: 1}])
def test_the_default_number_of_permutations_counts_the_types_that_are_present(sizes):
    # the model knows four types
    evaluation = evaluate_access(make_access(sizes), EvaluationSpec(permutation=PermutationSpec(alpha=0.2)))
    assert evaluation.n_permutations == 3 * len(sizes) * 5


def test_the_family_of_the_adjustment_is_the_defined_tests():
    access = make_access({T_CELL: 40, MICROGLIA: 2, BETA: 25}, planted=((0, T_CELL), (1, BETA)))
    access.heads[2][access.rows_of(BETA)] = 1.0
    evaluation = evaluate_access(access, spec())
    defined = ~np.isnan(evaluation.p_value)
    assert evaluation.n_tests == np.count_nonzero(defined) == 5
    expected = reference.benjamini_hochberg(evaluation.p_value[defined].tolist())
    np.testing.assert_allclose(evaluation.p_value_adj[defined], expected, rtol=1e-12)
    assert np.isnan(evaluation.p_value_adj[~defined]).all()


def test_the_reference_convention_divides_counts_by_permutations():
    ours = evaluate_access(make_access(), spec())
    theirs = evaluate_access(make_access(), spec(convention="reference"))
    np.testing.assert_array_equal(theirs.exceedances, ours.exceedances)
    np.testing.assert_array_equal(theirs.p_value, ours.exceedances / 199)
    np.testing.assert_array_equal(ours.p_value, (ours.exceedances + 1) / 200)
    assert theirs.p_value[0, 0] == 0.0
    assert theirs.spec.permutation.convention == "reference"


def test_the_seed_changes_the_counts_and_nothing_else():
    first, again, other = (evaluate_access(make_access(), spec(seed=seed)) for seed in (0, 0, 1))
    assert_same_numbers(first, again)
    assert not np.array_equal(first.exceedances, other.exceedances)
    np.testing.assert_array_equal(first.expl_var_gene, other.expl_var_gene)


def test_held_out_says_whether_receivers_were_trained_on():
    plain = make_access()
    assert evaluate_access(plain, spec(n_permutations=9)).held_out == (None, None, None)
    one_beta_cell = frozenset(plain.names[plain.rows_of(BETA)[:1]])
    all_t_cells = frozenset(plain.names[plain.rows_of(T_CELL)])
    access = make_access(training_cells=one_beta_cell | all_t_cells | {"a cell of another tissue"})
    assert evaluate_access(access, spec(n_permutations=9)).held_out == (False, True, False)
    assert evaluate_access(make_access(training_cells=frozenset()), spec(n_permutations=9)).held_out == (True,) * 3


def test_without_coordinates_training_cells_are_not_told_apart():
    access = make_access()
    found = evaluate_access(make_access(training_cells=frozenset(access.names[::2])), spec(n_permutations=9))
    assert found.parts is None
    assert found.held_out_frame().empty


def test_the_order_of_cells_changes_nothing():
    access = make_access()
    order = np.random.default_rng(8).permutation(len(access.names))
    assert_same_numbers(evaluate_access(access.reordered(order), spec()), evaluate_access(access, spec()))


def test_the_order_of_types_and_the_company_of_other_types_change_nothing():
    access = make_access()
    forward = evaluate_access(access, spec())
    access.last_type_first = True
    backward = evaluate_access(access, spec())
    assert backward.cell_types == forward.cell_types[::-1]
    assert_same_numbers(backward, forward)
    alone = access.reordered(access.rows_of(BETA))
    np.testing.assert_array_equal(
        evaluate_access(alone, spec()).exceedances[:, 0], forward.exceedances[:, of_type(forward, BETA)]
    )


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_the_batch_changes_nothing(batch_size):
    expected = evaluate_access(make_access(), spec())
    access = make_access()
    access.batch_size = batch_size
    assert_same_numbers(evaluate_access(access, spec()), expected)


@pytest.mark.parametrize("n_permutations", [1, 7, 199])
@pytest.mark.parametrize("batch_size", [1, 16])
def test_progress_ends_at_its_total(n_permutations, batch_size):
    # with a type for every branch: tested, two cells, one cell, all genes constant
    access = make_access({T_CELL: 23, MICROGLIA: 2, BETA: 1, "Stromal_&_T_Cell_Hybrid": 9})
    access.targets[access.rows_of("Stromal_&_T_Cell_Hybrid")] = 1.0
    access.batch_size = batch_size
    seen: list[tuple[int, int, str]] = []
    evaluate_access(access, spec(n_permutations=n_permutations), progress=lambda *step: seen.append(step))
    total = (23 + 2 + 1 + 9) * (2 * 3 + 2)
    assert {whole for _, whole, _ in seen} == {total}
    done = [step for step, _, _ in seen]
    assert all(earlier <= later for earlier, later in itertools.pairwise(done))
    assert done[-1] == total
    told = [what.split(":")[0] for _, _, what in seen]
    assert [name for name, _ in itertools.groupby(told)] == list(access.receivers())


def test_what_was_evaluated_is_kept_with_the_numbers():
    access = make_access()
    access.notes = ("coordinates look like pixels",)
    info = {"name": "m"}
    evaluation = evaluate_access(access, spec(), model_info=info, data_info={"digest": "d"})
    info["name"] = "changed later"
    assert evaluation.model == {"name": "m"}
    assert evaluation.data == {"digest": "d"}
    assert evaluation.notes == access.notes
    assert evaluation.spec == spec()
    assert evaluation.genes == access.card.genes


def test_an_evaluation_survives_its_json():
    access = make_access({T_CELL: 20, MICROGLIA: 2, BETA: 1})
    access.targets[access.rows_of(T_CELL), 0] = 2.0
    evaluation = evaluate_access(access, spec())
    again = type(evaluation).from_json(evaluation.to_json())
    assert_same_numbers(again, evaluation)
    assert again.undefined == evaluation.undefined
    pd.testing.assert_frame_equal(again.heads(), evaluation.heads())


def test_nothing_handed_in_changes():
    access = make_access()
    arrays = [getattr(access, name) for name in ("names", "labels", "targets", "heads", "full", "none")]
    before = [array.copy() for array in arrays]
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    evaluate_access(access, spec())
    for array, copy in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(array, copy)
    np.testing.assert_array_equal(np.random.get_state()[1], state)  # noqa: NPY002
