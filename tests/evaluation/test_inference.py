from __future__ import annotations

import numpy as np
import pytest

from amici_eval.evaluation.inference import rows_of
from amici_eval.stats.tiles.sums import moments_of_predictions


def test_what_is_predicted_of_genes_that_do_not_vary_is_an_error_too():
    rng = np.random.default_rng(0)
    targets, predictions = (rng.normal(size=shape).astype(np.float32) for shape in ((40, 5), (3, 40, 5)))
    targets[:, 2] = 1.0
    moments = moments_of_predictions(predictions[:2], predictions[2], targets, tiles=2 * (np.arange(40) % 3))
    found = rows_of(moments).explained_variance()
    np.testing.assert_allclose(found[:2], moments.explained_variance()[1])
    assert found[2] == pytest.approx(moments.explained_by_all)
