"""Small AMICI models made in a moment, for set-ups that the trained one does not have; one thread for all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from amici_eval.data.tissue import prepare
from amici_eval.model.cards import card_of
from amici_eval.model.engines.opening import open_access
from amici_eval.settings.evaluation import AblationSpec, DataSpec, EvaluationSpec, PermutationSpec
from tests.conftest import small_sizes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from anndata import AnnData


def opened(model: Any, adata: AnnData, **settings: Any) -> Any:
    """Return access to a model on a tissue."""
    tissue = prepare(adata, card_of(model, adata=adata), DataSpec())
    return open_access(model, tissue, AblationSpec(device="cpu", **settings))


def on_cpu(n_permutations: int, **settings: Any) -> EvaluationSpec:
    """Return the settings of an evaluation on the CPU."""
    return EvaluationSpec(
        permutation=PermutationSpec(n_permutations=n_permutations, **settings), ablation=AblationSpec(device="cpu")
    )


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Small matrices gain nothing from threads, and on a busy machine waiting for them takes ten times as long."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_amici() -> Callable[..., Any]:
    """Return a function that makes a live AMICI with random weights that says it was trained."""
    import torch
    from amici import AMICI

    from amici_eval.model.training import data_loader_restored

    def make(adata: AnnData, *, cls: type = AMICI, trained: bool = True, **setup: Any) -> Any:
        keys = {"labels_key": "cell_type", "coord_obsm_key": "spatial", "n_neighbors": 6, **setup}
        with data_loader_restored(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            cls.setup_anndata(adata, **keys)
            model = cls(adata, **small_sizes(8))
        model.module.eval()
        model.is_trained_ = trained
        model.history_ = {}
        model.train_indices_ = np.arange(0, adata.n_obs, 2)
        model.validation_indices_ = np.arange(1, adata.n_obs, 2)
        return model

    return make
