"""Train an AMICI model without changing the data, the process or the working folder."""

from __future__ import annotations

import logging
import random
import tempfile
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
import torch
from amici import AMICI
from amici.callbacks import AttentionPenaltyMonitor
from scvi.dataloaders import DataSplitter

from amici_eval.common.errors import DataError, InvalidSpecError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from jaxtyping import Int64


_CHATTY_LOGGERS = ("scvi", "lightning", "lightning.pytorch", "lightning.fabric", "pytorch_lightning")
_VALIDATION_SHARE = 0.1


@dataclass(frozen=True)
class AttentionPenalty:
    """Schedule of the penalty on the entropy of the attention during training.

    It is 0 before ``start_epoch``, rises linearly from ``start`` to ``end``, and stays at ``end`` from ``end_epoch``
    on.
    """

    start_epoch: int
    end_epoch: int
    start: float
    end: float


@dataclass(frozen=True)
class TrainingRecipe:
    """Settings of one training; ``train_amici(adata, seed=0, **recipe.kwargs())`` applies them."""

    n_neighbors: int
    max_epochs: int
    batch_size: int
    learning_rate: float = 1e-3
    attention_penalty: AttentionPenalty | None = None
    model_params: Mapping[str, Any] | None = field(default_factory=dict)

    def kwargs(self) -> dict[str, Any]:
        """Return the keyword arguments for `train_amici`."""
        return dict(vars(self))


def train_amici(
    adata: ad.AnnData,
    *,
    labels_key: str = "cell_type",
    coord_obsm_key: str = "spatial",
    seed: int,
    train_indices: Sequence[int] | Int64[np.ndarray, " train"] | None = None,
    accelerator: str = "cpu",
    **settings: Any,
) -> AMICI:
    """Train an AMICI model on the log-normalised expression in ``adata.X``; settings: :class:`TrainingRecipe`.

    AMICI takes the mean profile of each type from all cells, so validation cells do shape that mean; explained
    variance, which ignores constant shifts, is unaffected. scvi-tools would ignore ``batch_size`` and always load 128
    cells; here it is honoured.
    """
    recipe = TrainingRecipe(**settings)
    private = _private_copy(adata, labels_key=labels_key, coord_obsm_key=coord_obsm_key)
    _check_recipe(recipe, private.obs[labels_key])
    if not 0 <= seed < 2**32:
        value = f"seed={seed}"
        raise InvalidSpecError(value, rule="it must be between 0 and 2**32 - 1", fix="use a seed such as 0")
    split = _split(private.n_obs, train_indices, seed=seed)
    callbacks, penalty = [], recipe.attention_penalty
    if penalty is not None:
        callbacks.append(
            AttentionPenaltyMonitor(
                epoch_start=penalty.start_epoch,
                epoch_end=penalty.end_epoch,
                start_val=penalty.start,
                end_val=penalty.end,
                flavor="linear",
            )
        )
    with _undisturbed_process(), tempfile.TemporaryDirectory() as scratch:
        _seed_everything(seed)
        AMICI.setup_anndata(
            private, labels_key=labels_key, coord_obsm_key=coord_obsm_key, n_neighbors=recipe.n_neighbors
        )
        model = AMICI(private, **(recipe.model_params or {}))
        give_own_data_splitter(model, batch_size=recipe.batch_size)
        model.train(
            max_epochs=recipe.max_epochs,
            accelerator=accelerator,
            devices=1,
            batch_size=recipe.batch_size,
            external_indexing=split,
            plan_kwargs={"lr": recipe.learning_rate},
            callbacks=callbacks,
            enable_progress_bar=False,
            enable_checkpointing=False,
            default_root_dir=scratch,
            # scvi's default logger keeps the history in memory; per-step rows only cost time
            log_every_n_steps=recipe.max_epochs * private.n_obs,
        )
    # the trainer keeps the optimiser, the loaders and the removed scratch folder alive
    model.trainer = None
    return model


def _private_copy(adata: ad.AnnData, *, labels_key: str, coord_obsm_key: str) -> ad.AnnData:
    if labels_key not in adata.obs:
        value = f"the data has no obs column {labels_key!r}"
        raise DataError(value, rule="training needs a cell type per cell", fix="set labels_key to the right column")
    if coord_obsm_key not in adata.obsm:
        value = f"the data has no obsm entry {coord_obsm_key!r}"
        raise DataError(value, rule="training needs positions", fix="set coord_obsm_key to the right entry")
    labels = adata.obs[labels_key]
    if labels.isna().any():
        value = f"{int(labels.isna().sum())} cells have no {labels_key!r}"
        raise DataError(value, rule="every cell needs a cell type", fix="label these cells or drop them")
    # from strings, which drops categories without cells, whose mean would be NaN
    obs = pd.DataFrame({labels_key: pd.Categorical(labels.astype(str))}, index=adata.obs_names.copy())
    x: Any = adata.X
    return ad.AnnData(
        X=np.asarray(x.toarray() if hasattr(x, "toarray") else x, dtype=np.float32),
        obs=obs,
        var=pd.DataFrame(index=adata.var_names.copy()),
        obsm={coord_obsm_key: np.array(adata.obsm[coord_obsm_key], dtype=np.float64)},
    )


def _check_recipe(recipe: TrainingRecipe, labels: pd.Series) -> None:
    others = len(labels) - int(labels.value_counts().max())
    if not 1 <= recipe.n_neighbors <= others:
        value = f"n_neighbors={recipe.n_neighbors}"
        rule = f"it must be between 1 and {others}, the number of cells outside the largest cell type"
        raise InvalidSpecError(value, rule=rule, fix="use fewer neighbours, at least 1")
    for name in ("max_epochs", "batch_size"):
        if getattr(recipe, name) < 1:
            value = f"{name}={getattr(recipe, name)}"
            raise InvalidSpecError(value, rule="it must be at least 1", fix="use a positive number")
    if not recipe.learning_rate > 0:
        value = f"learning_rate={recipe.learning_rate}"
        raise InvalidSpecError(value, rule="it must be positive", fix="use a value such as 0.001")


def _split(
    n_cells: int, train_indices: Sequence[int] | Int64[np.ndarray, " train"] | None, *, seed: int
) -> list[np.ndarray]:
    if train_indices is None:
        # scvi would split by an unseeded generator unless its global seed is set
        order = np.random.default_rng(seed).permutation(n_cells)
        train = np.sort(order[int(_VALIDATION_SHARE * n_cells) :])
    else:
        train = np.asarray(train_indices)
        fix = "pass numpy.flatnonzero(mask) of the cells to train on"
        if train.ndim != 1 or train.size == 0 or not np.issubdtype(train.dtype, np.integer):
            value = f"train_indices has shape {train.shape} and dtype {train.dtype}"
            raise InvalidSpecError(value, rule="it must be a list of row numbers, not empty", fix=fix)
        if train.min() < 0 or train.max() >= n_cells or np.unique(train).size < train.size:
            value = f"train_indices has {np.unique(train).size} different numbers among {train.size}, "
            value += f"from {train.min()} to {train.max()}"
            raise InvalidSpecError(value, rule=f"all must differ and lie between 0 and {n_cells - 1}", fix=fix)
    validation = np.setdiff1d(np.arange(n_cells), train)
    # scvi takes training, validation and test rows as a list
    return [train, validation, np.array([], dtype=int)]


def _seed_everything(seed: int) -> None:
    # not Lightning's seed_everything, which also leaves an environment variable behind
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - third-party code draws from the global state
    torch.manual_seed(seed)


@contextmanager
def _undisturbed_process() -> Iterator[None]:
    """Restore global state that training changes: generators, loader class, backend flags, log levels."""
    benchmark = torch.backends.cudnn.benchmark
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    loggers = [logging.getLogger(name) for name in _CHATTY_LOGGERS]
    levels = [logger.level for logger in loggers]
    try:
        with data_loader_restored(), warnings.catch_warnings(), torch.random.fork_rng():
            # warnings on workers, small batches and deprecations, on which a caller cannot act
            warnings.simplefilter("ignore")
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        torch.backends.cudnn.benchmark = benchmark


@contextmanager
def data_loader_restored() -> Iterator[None]:
    """Restore scvi-tools' data loader after the body.

    ``AMICI.__init__`` sets ``DataSplitter.data_loader_cls`` for the whole process, so that any other scvi-tools model
    would then train with AMICI's loader.
    """
    before = DataSplitter.data_loader_cls
    try:
        yield
    finally:
        DataSplitter.data_loader_cls = before


def give_own_data_splitter(model: Any, *, batch_size: int | None = None) -> None:
    """Let one model train with AMICI's loader without touching the class that all scvi-tools models share."""

    class SpatialSplitter(DataSplitter):
        data_loader_cls = type(model)._data_loader_cls

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            # the base class drops batch_size from the loader's settings
            if batch_size is not None:
                self.data_loader_kwargs["batch_size"] = batch_size

    model._data_splitter_cls = SpatialSplitter


DEMO_TRAINING = TrainingRecipe(
    n_neighbors=14,
    max_epochs=100,
    batch_size=128,
    learning_rate=3e-3,
    model_params={
        "n_heads": 4,
        "n_head_size": 8,
        "n_query_dim": 64,
        "n_kv_dim": 64,
        "n_nn_embed": 64,
        "n_nn_embed_hidden": 64,
        "n_query_embed_hidden": 64,
        "n_pos_coef_mlp_hidden": 64,
        "distance_kernel_unit_scale": 10.0,
    },
)
"""A recipe with which AMICI learns `amici_eval.data.simulate.DEMO_TISSUE` in about a minute on one core."""
