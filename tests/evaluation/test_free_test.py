from __future__ import annotations

import numpy as np
import pytest

from amici_eval.evaluation.one_type import free_test
from amici_eval.settings.evaluation import PermutationSpec
from amici_eval.stats.permutation import nulls


def free(*, n_permutations, signal=0.0, progress=None, **settings):
    rng = np.random.default_rng(0)
    images = rng.normal(size=(60, 3, 4)).astype(np.float32)
    return free_test(
        signal * images + rng.normal(size=images.shape),
        images,
        test=PermutationSpec(**settings),
        sampling="independent",
        cell_type="T",
        n_permutations=n_permutations,
        dead=np.zeros(4, dtype=bool),
        device="cpu",
        progress=progress,
    )


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
