"""Head metrics in an MLflow run while AMICI trains, by a Lightning callback that does not change training."""

from __future__ import annotations

import logging
import os
import random
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from lightning.pytorch.callbacks import Callback

from amici_eval.common.errors import DataError, InvalidSpecError, ModelFormatError, first_line
from amici_eval.data.checks import check_is_anndata, chosen_cells, obs_column
from amici_eval.data.tissue import cells_found, prepare
from amici_eval.evaluation.pipeline import evaluate
from amici_eval.model.cards import card_of
from amici_eval.settings.checks import require_int, require_one_of
from amici_eval.settings.evaluation import AblationSpec, EvaluationSpec, PermutationSpec, SubsetSpec, TrainedOnSpec
from amici_eval.stats.permutation.permutations import PermutationStream
from amici_eval.tracking.runs.delivery import evaluation_metrics
from amici_eval.tracking.runs.tracked import environment
from amici_eval.tracking.store import log_batches

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from anndata import AnnData
    from jaxtyping import Bool, Int64
    from mlflow.entities import Metric

logger = logging.getLogger(__name__)

PREFIX = "train_heads"
CELLS_TAG = "amici_eval.train_heads.cells"
_LOGGED = ("ev/", "ev_full_model/", "p_adj/", "p_adj_spatial/", "summary/n_significant", "summary/n_tests")
_FAILURES = 3
"""After so many failures in a row no more evaluations are tried."""
_REPEATING = (
    "amici_eval.evaluation.pipeline",
    "amici_eval.data.tissue",
    "amici_eval.model.engines.opening",
    "amici_eval.model.engines.factored",
)
_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
"""Used unless the user sets them: with MLflow's own, 7 retries of 120 s, training would stand still."""
CELLS = ("validation", "train", "all")
_STRATUM = "train_heads"


@dataclass(frozen=True, kw_only=True)
class TrainingCells:
    """The cells that each evaluation uses: ascending rows of the AnnData, and how many of which cells they are.

    ``as_asked``: they are of the part of the split that was asked for; else of all cells, which is in-sample.
    """

    rows: tuple[int, ...]
    described: str
    as_asked: bool


def cells_to_evaluate(
    adata: AnnData,
    *,
    part: Bool[np.ndarray, " cells"] | None,
    cells: str,
    subset: SubsetSpec,
    labels_key: str,
    n_cells: int,
    seed: int,
) -> TrainingCells:
    """Choose up to ``n_cells`` cells of a part of the split (``None`` or empty: all), in equal shares of types.

    ``cells`` is the name of the part. Shares are equal, not proportional: a curve is drawn for each type, and each
    needs enough cells.
    """
    names = np.asarray(adata.obs_names.astype(str), dtype=object)
    part = None if part is None or not part.any() else part
    members = np.ones(len(names), dtype=bool) if part is None else part
    kind = f"{cells} cells"
    if cells == "all":
        kind = "cells of both training and validation"
    elif part is None:
        kind = f"cells of both training and validation, for no {cells} cell is known or there"
    chosen = np.flatnonzero(members & chosen_cells(adata, subset))
    if not len(chosen):
        raise DataError(
            value=f"none of {int(members.sum())} {kind} is among the cells that spec.data.subset allows",
            rule="there must be cells to evaluate",
            fix="leave spec.data.subset out, or set cells='all'",
        )
    labels = obs_column(adata, labels_key, "cell types").astype(str).to_numpy(dtype=object)
    # by name, so that the order of rows does not matter
    chosen = chosen[np.argsort(names[chosen], kind="stable")]
    numbers, texts = pd.factorize(labels[chosen], sort=True)
    kept = []
    for number, quota in enumerate(_quotas(np.bincount(numbers), n_cells)):
        own = chosen[numbers == number]
        stream = PermutationStream(seed=seed, cell_type=str(texts[number]), stratum=_STRATUM, n_cells=len(own))
        kept.append(own[stream.batch(0, 1)[0][:quota]] if quota < len(own) else own)
    rows = np.sort(np.concatenate(kept))
    return TrainingCells(
        rows=tuple(rows.tolist()),
        described=f"{len(rows)} of {len(chosen)} {kind}",
        as_asked=cells == "all" or part is not None,
    )


def _quotas(counts: Int64[np.ndarray, " types"], n_cells: int) -> Int64[np.ndarray, " types"]:
    """Return how many cells of each type are kept: as equal as their counts allow."""
    quotas = np.zeros_like(counts)
    left = min(n_cells, int(counts.sum()))
    order = np.argsort(counts, kind="stable")
    for done, which in enumerate(order):
        quotas[which] = min(int(counts[which]), left // (len(order) - done))
        left -= int(quotas[which])
    return quotas


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

        with environment({name: most for name, most in _PATIENCE.items() if name not in os.environ}):
            client = MlflowClient(tracking_uri=self.tracking_uri)
            log_batches(client, self.run_id, tags=[RunTag(*tag) for tag in tags.items()], metrics=metrics)


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelInTraining:
    """What evaluation asks of a live AMICI, with the split of this training.

    scvi-tools gives the model its split, and the mark that it is trained, only when training ends.
    """

    module: Any
    adata: AnnData
    registry_: Mapping[str, Any]
    n_neighbors: int
    train_indices_: Any
    validation_indices_: Any

    @classmethod
    def of(cls, model: Any, train: Int64[np.ndarray, " train"] | None) -> ModelInTraining:
        """Return the model as it is now, and the rows of its AnnData that it is fitted on, if they are known."""
        return cls(
            module=model.module,
            adata=model.adata,
            registry_=model.registry_,
            n_neighbors=model.n_neighbors,
            train_indices_=train,
            # all cells that are not trained on; rows of the split are those of the model's own AnnData
            validation_indices_=np.setdiff1d(np.arange(model.adata.n_obs), [] if train is None else train),
        )


def rows_of(trainer: Any, part: str) -> Int64[np.ndarray, " part"] | None:
    """Return the rows of a part of the split that a trainer trains on; ``None``: all, or its data do not tell."""
    name = {"train": "train_idx", "validation": "val_idx"}.get(part, "")
    rows = getattr(trainer.datamodule, name, None)
    return None if rows is None else np.asarray(rows, dtype=np.int64)


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
    """Lets each log message pass once, because every evaluation repeats those on model and data."""

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


def _cheap() -> EvaluationSpec:
    return EvaluationSpec(
        ablation=AblationSpec(modes=("keep_one",), baselines=False, without_nearest=False),
        permutation=PermutationSpec(n_bootstrap=0),
    )


class HeadEvaluationCallback(Callback):
    """Learn while AMICI trains which heads come to explain which cell types, as curves in an MLflow run.

    Parameters
    ----------
    model
        The ``amici.AMICI`` (or a subclass) that is trained.
    every_n_epochs
        Heads are evaluated after each so many epochs, and after the last one.
    adata
        The tissue to evaluate; ``None``: the model's own. All its cells stay neighbours.
    cells
        ``"validation"``: cells that the model is not fitted on; if there are none, or none is known, all cells.
        ``"train"``: those that it is fitted on. ``"all"``.
    n_cells
        At most so many are evaluated, the same ones each time, with equal shares for all cell types.
    spec
        Settings. ``None``: each head alone, the free and the lag test, without baselines, senders, intervals and other
        ablations. Its device does not matter (the model is evaluated where it trains), and its subset is drawn from.
    run_id
        The run that gets the metrics; ``None``: the one that is active when training begins. If there is none, nothing
        is done.
    max_share
        Evaluations are skipped while those so far took more than this share of the time spent on training itself;
        that after the last epoch is not skipped. ``math.inf`` skips none.

    Raises
    ------
    InvalidSpecError
        If an option is outside what it may be.
    ModelFormatError
        If the model is not a live AMICI.
    DataError
        If ``adata`` is not an AnnData.

    Notes
    -----
    Metrics, with the epoch as step, counted from 0 as Lightning does: ``train_heads/ev/<type>/head_<h>``,
    ``train_heads/ev_full_model/<type>``, ``train_heads/p_adj/...`` (free null) and ``train_heads/p_adj_spatial/...``,
    ``train_heads/summary/n_significant``, ``train_heads/seconds``. Undefined values are left out. The tag
    ``amici_eval.train_heads.cells`` says which cells they are of.

    Numbers of ``cells="train"``, and of all cells, are in-sample. Validation cells enter neither gradients nor weights,
    but after a random split most of their neighbours are training cells, AMICI takes the mean profile of a type from
    all cells, and early stopping looks at them.

    Nothing that goes wrong here ends training: it is logged as a warning, and after three failures in a row no more is
    tried. Weights come out as without the callback, bit for bit: no generator, gradient, training flag or hook changes.

    Examples
    --------
    >>> with mlflow.start_run():
    ...     model.train(max_epochs=100, callbacks=[HeadEvaluationCallback(model, every_n_epochs=5)])
    """

    def __init__(
        self,
        model: Any,
        *,
        every_n_epochs: int = 5,
        adata: AnnData | None = None,
        cells: str = "validation",
        n_cells: int = 2000,
        spec: EvaluationSpec | None = None,
        run_id: str | None = None,
        max_share: float = 0.2,
    ) -> None:
        require_int("every_n_epochs", every_n_epochs, 1)
        require_int("n_cells", n_cells, 2)
        require_one_of("cells", cells, CELLS)
        if isinstance(max_share, bool) or not isinstance(max_share, (int, float)) or not max_share > 0:
            raise InvalidSpecError(
                value=f"max_share={max_share!r}",
                rule="it must be a number above 0: time for evaluation per time for training",
                fix="set max_share=0.2, or math.inf to skip no evaluation",
            )
        if spec is not None and not isinstance(spec, EvaluationSpec):
            raise InvalidSpecError(
                value=f"spec is a {type(spec).__name__}",
                rule="it must be an EvaluationSpec",
                fix="build one with amici_eval.EvaluationSpec(...), or leave it out",
            )
        if run_id is not None and (not isinstance(run_id, str) or not run_id):
            raise InvalidSpecError(
                value=f"run_id={run_id!r}",
                rule="it must be the id of an MLflow run",
                fix="give run.info.run_id, or leave it out for the active run",
            )
        if not hasattr(model, "registry_") or not hasattr(getattr(model, "module", None), "attention_layer"):
            raise ModelFormatError(
                value=f"the model is a {type(model).__module__}.{type(model).__name__}",
                rule="it must be the live amici.AMICI that is trained",
                fix="pass the object whose train() gets this callback",
            )
        if adata is not None:
            check_is_anndata(adata)
        self.every_n_epochs, self.max_share = every_n_epochs, max_share
        self.n_cells, self.cells = n_cells, cells
        self.spec = _cheap() if spec is None else spec
        self._model, self._adata, self._run_id = model, adata, run_id
        self._begin()

    def _begin(self) -> None:
        self._run: RunInTraining | None = None
        self._chosen: TrainingCells | None = None
        self._epoch: int | None = None
        self._evaluated: int | None = None
        self._unsent: list[Metric] = []
        self._tags: dict[str, str] = {}
        self._failures, self._kinds = 0, set[type]()
        self._began, self._spent, self._told_of_skipping = perf_counter(), 0.0, False
        self._once = OncePerMessage()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Find the run."""
        self._begin()
        if not trainer.is_global_zero:
            return
        try:
            self._check_trained(pl_module)
            self._run = RunInTraining.find(self._run_id)
        except Exception as error:  # noqa: BLE001 - training must go on
            logger.warning("heads are not evaluated while the model trains: %s", first_line(error))
            return
        if self._run is None:
            logger.warning("no MLflow run is active: heads are not evaluated while the model trains")

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Evaluate if it is time."""
        self._epoch = epoch = int(trainer.current_epoch)
        if self._run is None or (epoch + 1) % self.every_n_epochs:
            return
        trained = perf_counter() - self._began - self._spent
        if self._spent > self.max_share * trained:
            if not self._told_of_skipping:
                self._told_of_skipping = True
                logger.warning(
                    "epoch %d: heads are not evaluated, for that took %.3g s of %.3g s of training (max_share=%g); "
                    "further epochs are skipped without a word until it is less",
                    epoch, self._spent, trained, self.max_share,
                )  # fmt: skip
            return
        self._attempt(trainer, self._run, epoch)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Evaluate the last epoch if that was not done."""
        if self._run is not None and self._epoch is not None and self._evaluated != self._epoch:
            self._attempt(trainer, self._run, self._epoch)

    def _check_trained(self, pl_module: Any) -> None:
        own = {id(parameter) for parameter in self._model.module.parameters()}
        if own.isdisjoint(id(parameter) for parameter in pl_module.parameters()):
            raise ModelFormatError(
                value="the callback was given another model than the one that is trained",
                rule="it evaluates the model that it was given",
                fix="pass the object whose train() gets this callback",
            )

    def _attempt(self, trainer: Any, run: RunInTraining, epoch: int) -> None:
        """Evaluate and send; whatever fails, training goes on."""
        began = perf_counter()
        self._evaluated = epoch
        try:
            with generators_untouched(self._home), self._once.on(_REPEATING):
                self._evaluate(trainer, run, epoch)
            self._failures = 0
        except Exception as error:
            # training must go on
            self._failures += 1
            if type(error) not in self._kinds:
                self._kinds.add(type(error))
                logger.warning("epoch %s: no metrics of heads: %s", epoch, first_line(error))
            logger.debug("epoch %s", epoch, exc_info=True)
            if self._failures == _FAILURES:
                self._run = None
                logger.warning("that failed %d times in a row: heads are evaluated no more in this training", _FAILURES)
        finally:
            self._spent += perf_counter() - began

    def _evaluate(self, trainer: Any, run: RunInTraining, epoch: int) -> None:
        from mlflow.entities import Metric

        began = perf_counter()
        model = self._model
        adata = model.adata if self._adata is None else self._adata
        if self._chosen is None:
            self._chosen = cells_to_evaluate(
                adata,
                part=self._part(adata, rows_of(trainer, self.cells)),
                cells=self.cells,
                subset=self.spec.data.subset,
                labels_key=self.spec.data.labels_key or model.registry_["setup_args"]["labels_key"],
                n_cells=self.n_cells,
                seed=self.spec.permutation.seed,
            )
            self._tags = {CELLS_TAG: self._chosen.described}
            level = logging.INFO if self._chosen.as_asked else logging.WARNING
            logger.log(level, "heads are evaluated on %s", self._chosen.described)
        evaluation = evaluate(ModelInTraining.of(model, rows_of(trainer, "train")), adata, self._settings(self._chosen))
        seconds = perf_counter() - began
        logger.info("epoch %d: heads evaluated in %.3g s", epoch, seconds)
        metrics = {name: value for name, value in evaluation_metrics(evaluation).items() if name.startswith(_LOGGED)}
        metrics["seconds"] = seconds
        now = int(time.time() * 1000)
        self._unsent += [Metric(f"{PREFIX}/{name}", value, now, epoch) for name, value in metrics.items()]
        # includes metrics that a failed attempt could not send
        run.send(self._unsent, self._tags)
        self._unsent, self._tags = [], {}

    def _part(self, adata: AnnData, rows: Int64[np.ndarray, " part"] | None) -> Bool[np.ndarray, " cells"] | None:
        """Return which cells are those of some rows of the model's own AnnData; ``None``: not known."""
        if rows is None:
            return None
        if adata is self._model.adata:
            return np.isin(np.arange(adata.n_obs), rows)
        trained_on = self.spec.data.trained_on
        card = card_of(ModelInTraining.of(self._model, rows), adata=adata, trained_on=trained_on)
        unknown = replace(card, training_cells=None, fingerprints=None)
        data = replace(self.spec.data, subset=SubsetSpec(), trained_on=TrainedOnSpec())
        return cells_found(card, prepare(adata, unknown, data))

    def _settings(self, chosen: TrainingCells) -> EvaluationSpec:
        subset = replace(self.spec.data.subset, key=None, value=None, indices=chosen.rows)
        home = self._home
        return replace(
            self.spec,
            data=replace(self.spec.data, subset=subset),
            # the model's own device: moving a module would move its gradients, too
            ablation=replace(self.spec.ablation, device=home.type if home.type == "mps" else str(home)),
        )

    @property
    def _home(self) -> torch.device:
        """Where the model is now."""
        device: torch.device = next(self._model.module.parameters()).device
        return device
