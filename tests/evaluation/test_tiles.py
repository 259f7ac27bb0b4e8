from __future__ import annotations

import numpy as np

from amici_eval.evaluation.tiles import sums_of_part
from amici_eval.stats.explained_variance import explained_variance
from amici_eval.stats.type_sums import sums_of_predictions


def test_what_is_predicted_of_genes_that_do_not_vary_is_an_error_too():
    rng = np.random.default_rng(0)
    targets, predictions = (rng.normal(size=shape).astype(np.float32) for shape in ((40, 5), (3, 40, 5)))
    targets[:, 2] = 1.0
    sums = sums_of_predictions(predictions[:2], predictions[2], targets, tiles=2 * (np.arange(40) % 3))
    np.testing.assert_allclose(sums_of_part(sums).explained_variance, sums.by_tile.explained_variance)
    whole = [explained_variance(one, targets).aggregated for one in predictions]
    np.testing.assert_allclose(sums_of_part(sums).explained_variance, whole)
