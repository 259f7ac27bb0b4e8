from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amici_eval.stats import explained_variance as module
from amici_eval.stats.explained_variance import explained_variance
from tests.oracles import reference

seeded = settings(max_examples=60, deadline=None, derandomize=True)


def draw(seed, n_cells, n_genes, dtype=np.float64):
    rng = np.random.default_rng(seed)
    targets = rng.gamma(2.0, size=(n_cells, n_genes))
    predictions = targets * rng.uniform(-1, 1.5, n_genes) + rng.normal(size=targets.shape)
    return predictions.astype(dtype), targets.astype(dtype)


@pytest.mark.parametrize("n_cells", [2, 3, 50])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_equals_the_definition(n_cells, dtype):
    predictions, targets = draw(n_cells, n_cells, 7, dtype)
    per_gene, aggregated = reference.explained_variance(predictions, targets)
    fit = explained_variance(predictions, targets)
    np.testing.assert_allclose(fit.per_gene, per_gene, rtol=1e-12, atol=1e-12)
    assert fit.aggregated == pytest.approx(aggregated, rel=1e-12)
    assert not fit.constant_genes.any()


def test_hand_computed_values():
    targets = np.array([[0.0, 0.0], [2.0, 2.0], [4.0, 10.0]])
    predictions = np.array([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]])
    fit = explained_variance(predictions, targets)
    # residuals of gene 0: 1, 0, -1 (variance 1) of 0, 2, 4 (variance 4); gene 1 is predicted by a constant
    np.testing.assert_allclose(fit.per_gene, [0.75, 0.0], atol=1e-15)
    assert fit.aggregated == pytest.approx(1 - (1 + 28) / (4 + 28), rel=1e-14)


def test_a_shifted_prediction_is_as_good():
    _, targets = draw(3, 30, 4)
    fit, shifted = (explained_variance(p, targets) for p in (targets, targets + 5.0))
    np.testing.assert_allclose(fit.per_gene, 1.0, atol=1e-15)
    np.testing.assert_allclose(shifted.per_gene, 1.0, atol=1e-12)


def test_constant_genes_are_undefined_and_not_zero():
    predictions, targets = draw(5, 20, 4)
    targets[:, 1], targets[:, 3] = 0.1, 0.0  # twenty times 0.1 does not sum to 2 exactly
    fit = explained_variance(predictions, targets)
    np.testing.assert_array_equal(fit.constant_genes, [False, True, False, True])
    np.testing.assert_array_equal(np.isnan(fit.per_gene), [False, True, False, True])
    per_gene, aggregated = reference.explained_variance(predictions, targets)
    np.testing.assert_allclose(fit.per_gene, per_gene, rtol=1e-12)
    # what is predicted for a constant gene still counts as error
    assert fit.aggregated == pytest.approx(aggregated, rel=1e-12)


def test_nothing_is_defined_where_no_gene_varies():
    fit = explained_variance(np.random.default_rng(0).normal(size=(5, 3)), np.full((5, 3), 0.3))
    assert np.isnan(fit.per_gene).all()
    assert math.isnan(fit.aggregated)
    assert fit.constant_genes.all()


def test_large_offset_in_float32_costs_no_digits():
    rng = np.random.default_rng(0)
    targets = (1e5 + rng.integers(-512, 512, size=(9000, 2)) / 64).astype(np.float32)
    predictions = (targets - rng.integers(-128, 128, size=targets.shape) / 64).astype(np.float32)
    per_gene, aggregated = reference.explained_variance(predictions, targets)
    fit = explained_variance(predictions, targets)
    np.testing.assert_allclose(fit.per_gene, per_gene, rtol=1e-12)
    assert fit.aggregated == pytest.approx(aggregated, rel=1e-12)


def test_blocks_of_cells_change_nothing(monkeypatch):
    predictions, targets = draw(9, 100, 3)
    whole = explained_variance(predictions, targets)
    monkeypatch.setattr(module, "_ROW_BLOCK", 7)
    blocked = explained_variance(predictions, targets)
    np.testing.assert_allclose(blocked.per_gene, whole.per_gene, rtol=1e-13)
    assert blocked.aggregated == pytest.approx(whole.aggregated, rel=1e-13)


def test_inputs_are_only_read():
    predictions, targets = draw(1, 10, 3)
    predictions.flags.writeable = targets.flags.writeable = False
    explained_variance(predictions, targets)


@seeded
@given(seed=st.integers(0, 2**31), n_cells=st.integers(2, 30), n_genes=st.integers(1, 6), scale=st.floats(1e-3, 1e3))
def test_is_at_most_one_and_knows_no_order(seed, n_cells, n_genes, scale):
    predictions, targets = draw(seed, n_cells, n_genes)
    predictions, targets = predictions * scale, targets * scale
    fit = explained_variance(predictions, targets)
    assert np.all(fit.per_gene <= 1.0)
    assert fit.aggregated <= 1.0
    rng = np.random.default_rng(seed)
    cells, genes = rng.permutation(n_cells), rng.permutation(n_genes)
    moved = explained_variance(predictions[cells][:, genes], targets[cells][:, genes])
    np.testing.assert_allclose(moved.per_gene, fit.per_gene[genes], rtol=1e-9, atol=1e-9)
    assert moved.aggregated == pytest.approx(fit.aggregated, rel=1e-9, abs=1e-9)
