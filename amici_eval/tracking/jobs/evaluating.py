"""The jobs behind ``evaluate`` and ``register``: check everything, start a run, compute, save, log."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amici_eval.common.errors import DataError, InvalidSpecError, TrackingError, first_line
from amici_eval.common.text import code_block
from amici_eval.settings.checks import check_alias
from amici_eval.settings.launch import LaunchSpec
from amici_eval.tracking.registry import (
    ResolvedModel,
    check_model_name,
    connect_to,
    find_dataset,
    known_model_id,
    resolve_model,
)
from amici_eval.tracking.runs.delivery import check_report, deliver, evaluation_metrics, evaluation_params, run_tags
from amici_eval.tracking.runs.local_results import RunRecord, checked_output, remove_local
from amici_eval.tracking.runs.tracked import NOTE_TAG, tracked_run, undisturbed
from amici_eval.tracking.runs.unfinished import FINGERPRINT_TAG, UnfinishedWork, fingerprint, resume_key
from amici_eval.tracking.store.errors import optional, patiently, store_errors

if TYPE_CHECKING:
    from collections.abc import Callable

    from amici_eval.evaluation.tasks import Launcher
    from amici_eval.results.evaluation import HeadEvaluation
    from amici_eval.settings.evaluation import EvaluationSpec, ReportSpec, TrackingSpec, TrainedOnSpec
    from amici_eval.tracking.dataset import AnnDataDataset

logger = logging.getLogger(__name__)


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


def evaluate_job(
    model_uri: str,
    *,
    data_uri: str | None,
    spec: EvaluationSpec,
    report: ReportSpec,
    tracking: TrackingSpec,
    config_yaml: str,
    progress: Callable[[int, int, str], None] | None = None,
    launch: LaunchSpec | None = None,
) -> EvaluationRun:
    """Evaluate a registered or logged model and log everything to a run."""
    from amici_eval.evaluation.launching import open_launcher
    from amici_eval.model.engines.opening import resolve_device
    from amici_eval.tracking.dataset import AnnDataSource, from_anndata
    from amici_eval.tracking.stored_model import open_stored_model

    launch = launch or LaunchSpec()
    launch.check_device(resolve_device(spec.ablation.device))
    checked_output(tracking.output_dir)
    tracking_uri = connect_to(tracking)
    model = resolve_model(model_uri)
    with open_launcher(launch) as launcher, open_stored_model(model.uri) as stored:
        location = find_dataset(model, stored, data_uri)
        name = source = None
        if location == stored.bundled_adata:
            # the fetched copy is temporary: the run must name the bundle in the store
            name = f"{model.name or 'model'} data"
            source = AnnDataSource(stored.bundle_uri(model.uri)) if model.uri.startswith("models:/") else None
        return _evaluate(
            model,
            stored,
            from_anndata(location, source, name=name, backed=spec.data.backed),
            spec=spec,
            report=report,
            tracking=tracking,
            tracking_uri=tracking_uri,
            config_yaml=config_yaml,
            progress=progress,
            launcher=launcher,
        )


def _evaluate(
    model: ResolvedModel,
    stored: Any,
    dataset: AnnDataDataset,
    *,
    spec: EvaluationSpec,
    report: ReportSpec,
    tracking: TrackingSpec,
    tracking_uri: str,
    config_yaml: str,
    progress: Callable[[int, int, str], None] | None,
    launcher: Launcher | None,
) -> EvaluationRun:
    from amici_eval.data.tissue import prepare
    from amici_eval.evaluation.pipeline import evaluate_access
    from amici_eval.model.engines.opening import open_access
    from amici_eval.report.evaluation_sentences import summary_lines
    from amici_eval.tracking.dataset import AnnDataSource

    model_id = known_model_id(model.model_id or stored.model_id)
    info = {**model.describe(), "model_id": model_id, "versions": dict(stored.trained.card.versions)}
    info["setup"] = stored.trained.setup
    tissue = prepare(dataset.adata, stored.trained.card, spec.data)
    source = dataset.to_dict()
    data_info = {
        "name": dataset.name,
        "digest": dataset.digest,
        "uri": dataset.source.to_dict()["uri"] if isinstance(dataset.source, AnnDataSource) else None,
        "n_cells": tissue.n_cells,
    }
    tags = run_tags(model_uri=model.asked, model_id=model_id, model_name=model.name, model_version=model.version)
    same = fingerprint(model=model_id or model.uri, digest=dataset.digest, spec=spec)
    tags[FINGERPRINT_TAG] = same
    title = f"evaluate {model.name} {model.version}" if model.name else "evaluate"
    # everything that can be refused is refused before the run starts
    with open_access(stored.trained, tissue, spec.ablation) as access:
        # a buffer drops cells, and with them perhaps types, once neighbours are known
        receivers = access.receivers()
        check_report(report, tuple(receivers))
        data_info["n_evaluated"] = sum(len(rows) for rows in receivers.values())
        work = UnfinishedWork(
            tracking,
            key=resume_key(
                same,
                files=stored.digest,
                device=access.statistics_device,
                launch="local" if launcher is None else "workers",
            ),
            tracking_uri=tracking_uri,
            n_types=len(receivers),
        )
        with work:
            with tracked_run(tracking, name=title, tags=tags, go_on=work.run_id, finished=work.finished) as run:
                run_id, experiment_id = run.info.run_id, run.info.experiment_id
                folder, parts = work.begin(run_id)
                evaluation = evaluate_access(
                    access,
                    spec,
                    progress=progress,
                    model_info=info,
                    data_info=data_info,
                    launcher=launcher,
                    parts=parts,
                )
                record = RunRecord(
                    tracking_uri=tracking_uri,
                    run_id=run_id,
                    params=evaluation_params(evaluation),
                    metrics=evaluation_metrics(evaluation),
                    tags={**tags, NOTE_TAG: code_block(summary_lines(evaluation))},
                    dataset={key: source[key] for key in ("name", "digest", "source", "source_type", "profile")},
                    model_id=model_id,
                    model_name=model.name,
                    model_version=model.version,
                )
                written = deliver(
                    evaluation, folder, record, report=report, config_yaml=config_yaml, retry_s=tracking.retry_s
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
        run_id=run_id,
        experiment_id=experiment_id,
        tracking_uri=tracking_uri,
        folder=kept,
    )


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
