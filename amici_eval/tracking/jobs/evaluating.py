"""The jobs behind ``evaluate``, ``register`` and ``upload``: check everything, start a run, compute, save, log."""

from __future__ import annotations

import logging
import os
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amici_eval.common.errors import DataError, InvalidSpecError, OutputError, TrackingError, first_line
from amici_eval.common.files import FolderLock
from amici_eval.common.text import code_block, mask_secrets
from amici_eval.common.threads import check_compiler
from amici_eval.settings.checks import check_alias
from amici_eval.tracking.registry import (
    ResolvedModel,
    check_model_name,
    connect,
    connect_to,
    known_model_id,
    resolve_model,
)
from amici_eval.tracking.runs.delivery import (
    check_report,
    deliver,
    evaluation_metrics,
    evaluation_params,
    run_tags,
    send,
)
from amici_eval.tracking.runs.local_results import RECORD_FILE, RunRecord, checked_output, remove_local
from amici_eval.tracking.runs.tracked import NOTE_TAG, PARTIAL_TAG, tracked_run, undisturbed
from amici_eval.tracking.runs.unfinished import (
    FINGERPRINT_TAG,
    RESUME_FILE,
    UnfinishedWork,
    download_evaluation,
    fingerprint,
    forget_parts,
    resume_key,
)
from amici_eval.tracking.store import asked_again, is_missing, optional, patiently, store_errors

if TYPE_CHECKING:
    from amici_eval.evaluation.launching import Launcher
    from amici_eval.results.evaluation import HeadEvaluation
    from amici_eval.settings.evaluation import EvaluationSpec, TrackingSpec, TrainedOnSpec
    from amici_eval.tracking.dataset import AnnDataDataset
    from amici_eval.tracking.flavor import StoredModel
    from amici_eval.tracking.jobs import JobOptions

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A model of the tracking store and the data to evaluate it on, both read; ``model_id`` if the store knows it."""

    model: ResolvedModel
    stored: StoredModel
    dataset: AnnDataDataset
    model_id: str | None

    @classmethod
    def of(cls, model: ResolvedModel, stored: StoredModel, dataset: AnnDataDataset) -> Opened:
        """Return a model and its data, with the id under which the store knows the model."""
        model_id = known_model_id(model.model_id or stored.model_id)
        return cls(model=model, stored=stored, dataset=dataset, model_id=model_id)

    def fingerprint(self, spec: EvaluationSpec) -> str:
        """Return what evaluations of this model on these data with the same numbers share."""
        return fingerprint(model=self.model_id or self.model.uri, digest=self.dataset.digest, spec=spec)


@dataclass(frozen=True, kw_only=True)
class EvaluationRun:
    """An evaluation and the run that holds it; ``folder`` is the local copy of its artifacts, if it was kept."""

    evaluation: HeadEvaluation
    run_id: str
    experiment_id: str
    tracking_uri: str
    folder: Path | None


@dataclass(frozen=True, kw_only=True)
class RegisteredVersion:
    """A registered version, the logged model behind it and the run that logged that model."""

    name: str
    version: str
    model_id: str
    run_id: str

    @property
    def uri(self) -> str:
        """URI of the version."""
        return f"models:/{self.name}/{self.version}"


def evaluate_job(model_uri: str, *, data_uri: str | None, options: JobOptions) -> EvaluationRun:
    """Evaluate a registered or logged model and log everything to a run."""
    from amici_eval.evaluation.launching import open_launcher
    from amici_eval.model.engines.opening import resolve_device
    from amici_eval.tracking.flavor import open_stored_model

    check_compiler()
    options.launch.check_device(resolve_device(options.spec.ablation.device))
    checked_output(options.tracking.output_dir)
    tracking_uri = connect_to(options.tracking)
    model = resolve_model(model_uri)
    with open_launcher(options.launch) as launcher, open_stored_model(model.uri) as stored:
        bundle = f"{model.name or 'model'} data"
        dataset = open_dataset(model, stored, data_uri, backed=options.spec.data.backed, bundle_name=bundle)
        return evaluate_opened(Opened.of(model, stored, dataset), options, tracking_uri=tracking_uri, launcher=launcher)


def open_dataset(
    model: ResolvedModel,
    stored: StoredModel,
    data_uri: str | None,
    *,
    backed: bool | None,
    bundle_name: str | None = None,
) -> AnnDataDataset:
    """Find and open the data of an evaluation; a bundle has a name of its own if one is given."""
    from amici_eval.tracking.dataset import AnnDataSource, from_anndata

    location = find_dataset(model, stored, data_uri)
    if location != stored.bundled_adata:
        return from_anndata(location, backed=backed)
    # the fetched copy is temporary: the run must name the bundle in the store
    return from_anndata(location, AnnDataSource(stored.bundle_uri(model.uri)), name=bundle_name, backed=backed)


def evaluate_opened(
    opened: Opened, options: JobOptions, *, tracking_uri: str, launcher: Launcher | None = None
) -> EvaluationRun:
    """Evaluate an opened model on its data, and log everything to a run of the store that is connected."""
    from amici_eval.data.tissue import prepare
    from amici_eval.evaluation.pipeline import evaluate_access
    from amici_eval.model.engines.opening import open_access
    from amici_eval.report.evaluation_sentences import summary_lines

    model, stored, dataset = opened.model, opened.stored, opened.dataset
    spec, tracking = options.spec, options.tracking
    tissue = prepare(dataset.adata, stored.trained.card, spec.data)
    tags = _tags_of(opened, spec)
    # everything that can be refused is refused before the run starts
    with open_access(stored.trained, tissue, spec.ablation) as access:
        # a buffer drops cells, and with them perhaps types, once neighbours are known
        receivers = access.receivers()
        check_report(options.report, tuple(receivers))
        work = UnfinishedWork(
            tracking,
            key=resume_key(
                tags[FINGERPRINT_TAG],
                files=stored.digest,
                device=access.statistics_device,
                launch="local" if launcher is None else "workers",
            ),
            tracking_uri=tracking_uri,
            n_types=len(receivers),
        )
        title = f"evaluate {model.name} {model.version}" if model.name else "evaluate"
        with work:
            with tracked_run(tracking, name=title, tags=tags, go_on=work.run_id, finished=work.finished) as run:
                folder, parts = work.begin(run.info.run_id)
                evaluation = evaluate_access(
                    access,
                    spec,
                    progress=options.progress,
                    model_info=_model_info(opened),
                    data_info={
                        **_data_info(dataset),
                        "n_cells": tissue.n_cells,
                        "n_evaluated": sum(len(rows) for rows in receivers.values()),
                    },
                    launcher=launcher,
                    parts=parts,
                )
                record = RunRecord(
                    tracking_uri=tracking_uri,
                    run_id=run.info.run_id,
                    params=evaluation_params(evaluation),
                    metrics=evaluation_metrics(evaluation),
                    tags={**tags, NOTE_TAG: code_block(summary_lines(evaluation))},
                    dataset=dataset.to_dict(),
                    model_id=opened.model_id,
                    model_name=model.name,
                    model_version=model.version,
                )
                written = deliver(
                    evaluation,
                    folder,
                    record,
                    report=options.report,
                    config_yaml=options.config_yaml,
                    retry_s=tracking.retry_s,
                )
            # clean up while the folder is locked, or another process could take up the finished run
            with undisturbed():
                kept = work.done()
    if written != folder:
        # the chosen folder was full, and the results went to a temporary one
        if not tracking.keep_local:
            remove_local(written, with_parent=False)
        kept = written if tracking.keep_local else None
    return EvaluationRun(
        evaluation=evaluation,
        run_id=run.info.run_id,
        experiment_id=run.info.experiment_id,
        tracking_uri=tracking_uri,
        folder=kept,
    )


def _tags_of(opened: Opened, spec: EvaluationSpec) -> dict[str, str]:
    model = opened.model
    named = run_tags(
        model_uri=model.asked, model_id=opened.model_id, model_name=model.name, model_version=model.version
    )
    return {**named, FINGERPRINT_TAG: opened.fingerprint(spec)}


def _model_info(opened: Opened) -> dict[str, Any]:
    trained = opened.stored.trained
    return {
        **opened.model.describe(),
        "model_id": opened.model_id,
        "versions": dict(trained.card.versions),
        "setup": trained.setup,
    }


def _data_info(dataset: AnnDataDataset) -> dict[str, Any]:
    from amici_eval.tracking.dataset import AnnDataSource

    uri = dataset.source.to_dict()["uri"] if isinstance(dataset.source, AnnDataSource) else None
    return {"name": dataset.name, "digest": dataset.digest, "uri": uri}


def find_dataset(model: ResolvedModel, stored: StoredModel, uri: str | None) -> str | Path:
    """Return where the data of an evaluation lies."""
    if uri is not None:
        return uri
    if stored.bundled_adata is not None:
        return stored.bundled_adata
    if stored.adata_uri is not None:
        return stored.adata_uri
    if model.run_id is not None:
        logged = _dataset_of_run(model.run_id)
        if logged is not None:
            logger.info("no data given: taking %s, which the model's own run logged", mask_secrets(str(logged)))
            return logged
    raise DataError(
        value=f"no data for {model.asked}",
        rule="an evaluation needs an AnnData: data.uri, one bundled with the model, or one logged by its training run",
        fix="pass data.uri=/path/to/tissue.h5ad",
    )


@asked_again("finding the data")
def _dataset_of_run(run_id: str) -> str | None:
    from mlflow import MlflowClient
    from mlflow.data import get_source
    from mlflow.exceptions import MlflowException

    from amici_eval.tracking.dataset import AnnDataSource

    try:
        inputs = MlflowClient().get_run(run_id).inputs
    except MlflowException as error:
        if not is_missing(error):
            raise
        return None
    for entry in reversed(inputs.dataset_inputs if inputs else []):
        source = get_source(entry.dataset) if entry.dataset.source_type == "anndata" else None
        if isinstance(source, AnnDataSource):
            return source.uri
    return None


def register_job(
    model_dir: str,
    *,
    name: str,
    data_uri: str | None,
    adata: str | None,
    trust: bool,
    alias: str | None,
    tracking: TrackingSpec,
    trained_on: TrainedOnSpec | None = None,
) -> RegisteredVersion:
    """Log and register what ``AMICI.save`` wrote."""
    import mlflow

    from amici_eval.model.checkpoint import read_amici_directory
    from amici_eval.model.unpickling import saved_files
    from amici_eval.tracking.dataset import AnnDataSource, from_anndata
    from amici_eval.tracking.flavor import log_model, refuse_credentials_in_uri

    check_model_name("name", name)
    check_model_name("name", name, kind="logged")
    if alias is not None:
        check_alias("register.alias", alias)
    connect_to(tracking)
    if adata is not None and adata != "bundle":
        if not AnnDataSource._can_resolve(adata):
            raise InvalidSpecError(
                value=f"register.adata={adata!r}",
                rule="it must be bundle, or the path or URI of a .h5ad or .zarr",
                fix="set register.adata=bundle",
            )
        refuse_credentials_in_uri(adata)
        adata = AnnDataSource(adata).uri
    folder = Path(model_dir).expanduser()
    location: str | Path | None = saved_files(folder).adata if data_uri is None else data_uri
    if location is None and adata == "bundle":
        raise DataError(
            value="register.adata=bundle without data",
            rule="there must be an AnnData to bundle",
            fix="pass data.uri=...",
        )
    dataset = None if location is None else from_anndata(location)
    trained = read_amici_directory(
        folder, adata=None if dataset is None else dataset.adata, trust=trust, trained_on=trained_on
    )
    if dataset is None:
        logger.warning(
            "no data given: the names of the training cells are not recorded, so held-out cells cannot be told later"
        )
    with tracked_run(tracking, name=f"register {name}", tags={"amici_eval.kind": "registration"}) as run:
        if dataset is not None:
            known = partial(mlflow.log_input, dataset, context="training")
            patiently(known, seconds=tracking.retry_s, what="naming the data")
        info = log_model(
            trained,
            name,
            registered_model_name=name,
            adata=adata,
            training_adata=None if dataset is None else dataset.adata,
        )
        version = str(info.registered_model_version)
        client = mlflow.MlflowClient()
        with optional(f"models:/{name}/{version} could not be tagged"):
            tag = partial(client.set_model_version_tag, name, version, "amici_eval.setup", trained.setup)
            patiently(tag, what="tagging the version")
        if alias is not None:
            try:
                patiently(partial(client.set_registered_model_alias, name, alias, version), what="setting the alias")
            except store_errors() as error:
                raise TrackingError(
                    value=f"models:/{name}/{version} is registered, but its alias {alias} could not be set "
                    f"({first_line(error)})",
                    rule="the registry must take the alias",
                    fix="set it by hand",
                ) from error
        return RegisteredVersion(name=name, version=version, model_id=info.model_id, run_id=run.info.run_id)


def upload(folder: Path, *, retry_s: float = 0.0) -> str:
    """Finish the run of an evaluation that could not be sent, and return its id; the folder stays."""
    from mlflow import MlflowClient

    if (folder / RESUME_FILE).is_file() and not (folder / RECORD_FILE).exists():
        raise OutputError(
            value=f"{folder} holds partial results",
            rule="only an evaluation that is through can be sent",
            fix="run the same command again: it goes on from there, and sends them",
        )
    record = RunRecord.load(folder)
    record.check_files(folder)
    masked = "***" in record.tracking_uri
    if masked and not os.environ.get("MLFLOW_TRACKING_URI"):
        raise OutputError(
            value=f"the store is {record.tracking_uri}",
            rule="its credentials are not kept in the folder",
            fix="set MLFLOW_TRACKING_URI to its whole address",
        )
    lock = FolderLock.take(folder)
    if lock is None and (folder / RESUME_FILE).is_file():
        raise OutputError(
            value=f"an evaluation is at work in {folder}", rule="it sends its results itself", fix="wait for its end"
        )
    try:
        record = replace(record, tracking_uri=connect(None if masked else record.tracking_uri))
        send(folder, record, retry_s=retry_s)
        client = MlflowClient(tracking_uri=record.tracking_uri)
        client.set_terminated(record.run_id, "FINISHED" if record.whole else "FAILED")
        if record.whole:
            forget_parts(folder)
        else:
            client.set_tag(record.run_id, PARTIAL_TAG, "not all artifacts could be written")
            logger.warning("not all artifacts could be written: run %s is FAILED and marked as partial", record.run_id)
    finally:
        if lock is not None:
            lock.release(remove=True)
    return record.run_id


def load_evaluation(run_id: str, *, tracking_uri: str | None = None) -> HeadEvaluation:
    """Return the evaluation that a run holds, with its moments if it holds them."""
    from amici_eval.results.evaluation import FILE_NAME, HeadEvaluation

    with tempfile.TemporaryDirectory(prefix="amici-eval-") as scratch:
        if not download_evaluation(run_id, Path(scratch), tracking_uri=tracking_uri):
            raise DataError(
                value=f"run {run_id} holds no {FILE_NAME}",
                rule="it must be a run that amici_eval wrote and completed",
                fix="give the id of such a run, or complete it with: amici-eval upload DIR",
            )
        return HeadEvaluation.load(scratch)
