"""What evaluation in the midst of a training needs: the run, the model as it is now, and nothing disturbed by it."""

from __future__ import annotations

import logging
import os
import random
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from amici_eval.tracking.training.cells import Split

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from anndata import AnnData
    from mlflow.entities import Metric

__all__ = ["ModelInTraining", "OncePerMessage", "RunInTraining", "generators_untouched", "split_of"]

_METRICS_PER_BATCH = 1000
_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": 1, "MLFLOW_HTTP_REQUEST_TIMEOUT": 10}
"""Unless the user says otherwise: MLflow's own are 7 retries of 120 s, for which training would stand still."""


@dataclass(frozen=True, kw_only=True)
class RunInTraining:
    """The run that gets metrics while a model trains, and the store it is in."""

    tracking_uri: str
    run_id: str

    @classmethod
    def find(cls, run_id: str | None) -> RunInTraining | None:
        """Return the run of an id, or the active one, if there is one."""
        import mlflow

        active = mlflow.active_run() if run_id is None else None
        found = run_id if active is None else active.info.run_id
        return None if found is None else cls(tracking_uri=mlflow.get_tracking_uri(), run_id=found)

    def send(self, metrics: Sequence[Metric], tags: Mapping[str, str]) -> None:
        """Send metrics and tags at once, and give up soon if the server does not answer."""
        from mlflow import MlflowClient
        from mlflow.entities import RunTag

        with _impatient():
            client = MlflowClient(tracking_uri=self.tracking_uri)
            for start in range(0, len(metrics), _METRICS_PER_BATCH):
                client.log_batch(
                    self.run_id,
                    metrics=metrics[start : start + _METRICS_PER_BATCH],
                    tags=[RunTag(*tag) for tag in tags.items()] if start == 0 else [],
                    synchronous=True,
                )


@contextmanager
def _impatient() -> Iterator[None]:
    before = {name: os.environ.get(name) for name in _PATIENCE}
    try:
        for name, most in _PATIENCE.items():
            os.environ.setdefault(name, str(most))
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelInTraining:
    """What evaluation asks of a live AMICI, with the split of this training.

    Notes
    -----
    scvi-tools gives the model its split, and the mark that it is trained, when training ends: nothing is set before.
    """

    module: Any
    adata: AnnData
    registry_: Mapping[str, Any]
    n_neighbors: int
    train_indices_: Any
    validation_indices_: Any

    @classmethod
    def of(cls, model: Any, split: Split) -> ModelInTraining:
        """Return the model as it is now."""
        return cls(
            module=model.module,
            adata=model.adata,
            registry_=model.registry_,
            n_neighbors=model.n_neighbors,
            train_indices_=split.train,
            # all other cells: the rows of a training in progress are those of its own AnnData
            validation_indices_=np.setdiff1d(np.arange(model.adata.n_obs), [] if split.train is None else split.train),
        )


def split_of(trainer: Any) -> Split:
    """Return the split that a trainer trains on; parts are ``None`` where its data module does not tell."""
    names = {"train": "train_idx", "validation": "val_idx"}
    found = {part: getattr(trainer.datamodule, name, None) for part, name in names.items()}
    return Split(**{part: None if rows is None else np.asarray(rows, dtype=np.int64) for part, rows in found.items()})


@contextmanager
def generators_untouched(device: torch.device) -> Iterator[None]:
    """Restore Python's, NumPy's and torch's global random generators after the body."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the global state is what is kept
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


class OncePerMessage(logging.Filter):
    """Lets each message pass once: what is said of model and data is the same at each evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a message is new."""
        message = record.getMessage()
        new = message not in self._said
        self._said.add(message)
        return new

    @contextmanager
    def on(self, names: Sequence[str]) -> Iterator[None]:
        """Filter what some loggers say while the body runs."""
        with ExitStack() as stack:
            for name in names:
                found = logging.getLogger(name)
                found.addFilter(self)
                stack.callback(found.removeFilter, self)
            yield
