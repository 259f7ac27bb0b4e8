"""Ridge regression from moments, against scikit-learn, explicit hat matrices and leaving cells out."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import Ridge

from amici_eval.stats.explained_variance import explained_variance
from amici_eval.stats.ridge import (
    PENALTIES,
    CosineBasis,
    RidgeSums,
    choose_penalty,
    fit_ridge,
    merge_moments,
    ridge_explained_variance,
)


def moments_of(design, targets, *, block=10**6):
    sums = RidgeSums(design.shape[1], targets.shape[1])
    for start in range(0, len(design), block):
        sums.add(design[start : start + block], targets[start : start + block])
    return sums.moments()


def fitted(moments):
    return fit_ridge(moments, penalty=choose_penalty(moments).penalty)


def explained(fit, moments):
    return ridge_explained_variance([fit], [moments])


def made(n_cells=80, n_columns=7, n_genes=5, *, seed=0, noise=1.0):
    rng = np.random.default_rng(seed)
    design = rng.normal(size=(n_cells, n_columns)) * rng.uniform(0.1, 50.0, n_columns) + 30.0
    weights = rng.normal(size=(n_columns, n_genes)) / design.std(axis=0)[:, None]
    targets = design @ weights + noise * rng.normal(size=(n_cells, n_genes)) + 4.0
    return design, targets.astype(np.float32)


def hat_matrix(design, penalty):
    """Return what turns expression into fitted values, the slow way."""
    n = len(design)
    x = (design - design.mean(axis=0)) / design.std(axis=0)
    return np.full((n, n), 1.0 / n) + x @ np.linalg.solve(x.T @ x + n * penalty * np.eye(x.shape[1]), x.T)


def test_weights_are_those_of_scikit_learn():
    design, targets = made()
    for penalty in (1e-3, 0.7, 40.0):
        fit = fit_ridge(moments_of(design, targets), penalty=penalty)
        deviation = design.std(axis=0)
        literal = Ridge(alpha=penalty * len(design)).fit(design / deviation, targets.astype(np.float64))
        np.testing.assert_allclose(fit.weights, literal.coef_.T / deviation[:, None], rtol=1e-8)
        np.testing.assert_allclose(fit.intercept, literal.intercept_, rtol=1e-8)


def test_generalised_cross_validation_is_that_of_the_hat_matrix():
    design, targets = made(noise=3.0)
    found = choose_penalty(moments_of(design, targets))
    n, by_hand, degrees = len(design), [], []
    for penalty in PENALTIES:
        hat = hat_matrix(design, penalty)
        residual = targets - hat @ targets
        degrees.append(np.trace(hat))
        by_hand.append((residual**2).sum() / n / (1.0 - degrees[-1] / n) ** 2)
    np.testing.assert_allclose(found.gcv, by_hand, rtol=1e-8)
    best = int(np.argmin(by_hand))
    assert 0 < best < len(PENALTIES) - 1
    assert found.penalty == PENALTIES[best]
    assert found.degrees_of_freedom == pytest.approx(degrees[best])


def test_generalised_cross_validation_is_leaving_one_cell_out_where_all_cells_have_the_same_leverage():
    n, penalty = 24, 0.2
    angle = 2.0 * np.pi * np.arange(n) / n
    design = np.stack([np.cos(angle), np.sin(angle), np.cos(5 * angle), np.sin(5 * angle)], axis=1)
    targets = np.random.default_rng(1).normal(size=(n, 3)) + design[:, :3]
    scale = design.std(axis=0)
    errors = []
    for left_out in range(n):
        # a ridge regression whose columns and penalty stay those of all cells, intercept not penalised
        others = np.arange(n) != left_out
        fitted = Ridge(alpha=n * penalty).fit(design[others] / scale, targets[others])
        errors.append(((fitted.predict(design[[left_out]] / scale) - targets[left_out]) ** 2).sum())
    found = choose_penalty(moments_of(design, targets), penalties=np.array([penalty]))
    assert found.gcv[0] == pytest.approx(np.mean(errors), rel=1e-8)


def test_explained_variance_of_cells_that_were_not_fitted_is_that_of_the_predictions():
    design, targets = made(120)
    fit = fitted(moments_of(design[:70], targets[:70]))
    predictions = design[70:] @ fit.weights + fit.intercept
    ours = explained(fit, moments_of(design[70:], targets[70:]))
    assert ours == pytest.approx(explained_variance(predictions, targets[70:]).aggregated, abs=1e-9)
    assert 0.3 < ours < 1.0


@pytest.mark.parametrize("block", [1, 7, 33])
def test_blocks_and_groups_of_cells_change_nothing(block):
    design, targets = made()
    whole, cut = moments_of(design, targets), moments_of(design, targets, block=block)
    order = np.random.default_rng(0).permutation(len(design))
    parts = [moments_of(design[rows], targets[rows], block=block) for rows in np.split(order, [11, 50])]
    nobody = moments_of(design[:0], targets[:0])
    for other in (cut, merge_moments([*parts, nobody])):
        assert other.n_cells == len(design)
        np.testing.assert_allclose(other.design_mean, whole.design_mean)
        np.testing.assert_allclose(other.target_mean, whole.target_mean)
        np.testing.assert_allclose(other.design_m2, whole.design_m2, atol=1e-9 * np.abs(whole.design_m2).max())
        np.testing.assert_allclose(other.cross, whole.cross, atol=1e-9 * np.abs(whole.cross).max())
        np.testing.assert_allclose(other.target_m2, whole.target_m2)
        assert explained(fitted(other), other) == pytest.approx(explained(fitted(whole), whole), abs=1e-9)


def test_a_large_mean_cancels_nothing_away():
    design, targets = made()
    here, far = moments_of(design, targets), moments_of(design + 1e7, targets.astype(np.float64) + 1e6, block=9)
    np.testing.assert_allclose(fitted(far).weights, fitted(here).weights, rtol=1e-5)


def test_constant_columns_and_columns_that_add_up_change_nothing():
    design, targets = made()
    plain = explained(fitted(moments_of(design, targets)), moments_of(design, targets))
    with_constant = np.column_stack([np.full(len(design), 1.0 / 3.0), design])
    fit = fitted(moments_of(with_constant, targets, block=13))
    assert not fit.weights[0].any()
    assert explained(fit, moments_of(with_constant, targets)) == pytest.approx(plain, abs=1e-9)
    # counts among k neighbours add up to k
    counts = np.random.default_rng(0).multinomial(9, [0.5, 0.3, 0.2], size=len(design)).astype(float)
    found = choose_penalty(moments_of(counts, targets))
    assert np.isfinite(fitted(moments_of(counts, targets)).weights).all()
    assert found.degrees_of_freedom <= 3.0 + 1e-9


def test_cross_fitted_explained_variance_is_that_of_all_predictions_together():
    design, targets = made(90)
    targets[:30] += 2.0  # what lies between groups counts, too
    groups = [slice(0, 30), slice(30, 55), slice(55, 90)]
    parts = [moments_of(design[rows], targets[rows]) for rows in groups]
    fits, predictions = [], []
    for number, rows in enumerate(groups):
        fits.append(fit_ridge(merge_moments([p for n, p in enumerate(parts) if n != number]), penalty=0.3))
        predictions.append(design[rows] @ fits[-1].weights + fits[-1].intercept)
    whole = explained_variance(np.concatenate(predictions), targets).aggregated
    assert ridge_explained_variance(fits, parts) == pytest.approx(whole, abs=1e-9)


def test_noise_explains_nothing_in_other_cells():
    rng = np.random.default_rng(3)
    values = []
    for _ in range(40):
        design, targets = rng.normal(size=(90, 12)), rng.normal(size=(90, 20))
        fit = fitted(moments_of(design[:60], targets[:60]))
        values.append(explained(fit, moments_of(design[60:], targets[60:])))
    assert -0.05 < np.mean(values) < 0.003


def test_more_columns_than_cells_do_not_interpolate():
    rng = np.random.default_rng(0)
    design, targets = rng.normal(size=(30, 100)), rng.normal(size=(30, 4))
    assert choose_penalty(moments_of(design, targets)).degrees_of_freedom <= 15.0
    # no penalty of these leaves half of the cells: the largest is taken
    assert choose_penalty(moments_of(design, targets), penalties=np.array([1e-3, 1e-9])).penalty == 1e-3


def test_what_is_undefined_is_said():
    design, targets = made(20)
    moments = moments_of(design, targets)
    fit = fitted(moments)
    flat = moments_of(design, np.full_like(targets, 0.1), block=3)
    assert np.isnan(explained(fit, flat))
    assert np.isnan(explained(fit, moments_of(design[:1], targets[:1])))
    assert explained(fitted(flat), moments) == pytest.approx(0.0, abs=1e-9)
    with pytest.raises(ValueError, match="1 cells to fit; a ridge regression needs at least 2"):
        fit_ridge(moments_of(design[:1], targets[:1]), penalty=1.0)


# --- functions of position


def test_cosines_are_uncorrelated_over_a_full_window_and_sorted_by_wavelength():
    side = (np.arange(40) + 0.5) / 40
    xy = np.stack(np.meshgrid(side * 200.0, side * 100.0), axis=-1).reshape(-1, 2)
    basis = CosineBasis(xy, np.zeros(len(xy), dtype=np.int64), fitted=np.ones(len(xy), dtype=bool))
    assert basis.n_columns == 64
    columns = basis.columns(xy, np.zeros(len(xy), dtype=np.int64))
    correlation = np.corrcoef(columns.T)
    assert np.abs(correlation - np.eye(64)).max() < 0.1
    # half a wave along the long side, half a wave across, a whole one along
    turns = (np.diff(np.sign(columns.reshape(40, 40, 64)), axis=1) != 0).sum(axis=1).max(axis=0)
    assert turns[:3].tolist() == [1, 0, 2]


def test_sections_have_waves_and_levels_of_their_own():
    rng = np.random.default_rng(0)
    xy, sections = rng.uniform(size=(300, 2)), np.repeat([0, 4, 7], [200, 95, 5])
    fitted = np.ones(300, dtype=bool)
    basis = CosineBasis(xy, sections, fitted=fitted)
    columns = basis.columns(xy, sections)
    assert columns.shape == (300, 3 + 20 + 9)
    np.testing.assert_array_equal(columns[:, :3], sections[:, None] == [0, 4, 7])
    assert not columns[200:, 3:23].any()
    assert not columns[:200, 23:].any()
    np.testing.assert_array_equal(basis.columns(xy[::-1], sections[::-1]), columns[::-1])
    moved = CosineBasis(5.0 * xy + 70.0, sections, fitted=fitted)
    np.testing.assert_allclose(moved.columns(5.0 * xy + 70.0, sections), columns, atol=1e-9)


def test_cells_on_a_line_get_waves_along_it():
    xy = np.column_stack([np.linspace(0.0, 10.0, 50), np.full(50, 3.0)])
    one = np.zeros(50, dtype=np.int64)
    columns = CosineBasis(xy, one, fitted=np.ones(50, dtype=bool)).columns(xy, one)
    assert columns.shape == (50, 5)
    assert (np.ptp(columns, axis=0) > 1.9).all()
    assert CosineBasis(xy, one, fitted=np.zeros(50, dtype=bool)).columns(xy, one).shape == (50, 0)
