"""The evaluator that ``mlflow.models.evaluate(..., model_type="amici")`` calls."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from mlflow.models.evaluation import EvaluationResult, ModelEvaluator

from amici_eval.common.errors import DataError, InvalidSpecError, ModelFormatError
from amici_eval.common.threads import check_compiler
from amici_eval.settings.evaluation import EvaluationSpec, ReportSpec, spec_from_mapping, spec_of
from amici_eval.tracking.flavor import FLAVOR_NAME

_SHORTHANDS = {
    "alpha": "permutation.alpha",
    "device": "ablation.device",
    "n_permutations": "permutation.n_permutations",
    "seed": "permutation.seed",
}


def settings_from_config(config: Mapping[str, Any] | None) -> tuple[EvaluationSpec, ReportSpec]:
    """Read the settings of ``evaluator_config``."""
    nested: dict[str, Any] = {}
    for key, value in (config or {}).items():
        _merge(nested, _SHORTHANDS.get(key, key), value)
    report = spec_of(ReportSpec, nested.pop("report", {}), "report.")
    strange = sorted(set(nested) - {"data", "ablation", "permutation"})
    if strange:
        raise InvalidSpecError(
            value=f"unknown setting {strange[0]}",
            rule=f"known here are the groups data, ablation, permutation and report, and {', '.join(_SHORTHANDS)}",
            fix="correct the name, as permutation.alpha, or drop it",
        )
    return spec_from_mapping(nested), report


def _merge(target: dict[str, Any], key: str, value: Any) -> None:
    """Set a value, or each value of a group, at a dotted name in nested settings, which are changed in place."""
    *groups, name = key.split(".")
    for group in groups:
        target = target.setdefault(group, {})
        if not isinstance(target, dict):
            raise _no_group(group, target)
    if isinstance(value, Mapping):
        inner = target.setdefault(name, {})
        if not isinstance(inner, dict):
            raise _no_group(name, inner)
        for part, item in value.items():
            _merge(inner, str(part), item)
    else:
        target[name] = value


def _no_group(name: str, value: object) -> InvalidSpecError:
    return InvalidSpecError(
        value=f"{name}={value!r}", rule="it must be a group of settings", fix=f"write {{'{name}': {{...}}}}"
    )


class AMICIEvaluator(ModelEvaluator):
    """Evaluates the attention heads of a model of flavor ``amici`` on an AnnData dataset."""

    @classmethod
    def can_evaluate(cls, *, model_type: str, evaluator_config: Mapping[str, Any] | None = None, **kwargs: Any) -> bool:  # noqa: ARG003, RUF100 - MLflow's signature
        """Claim ``model_type="amici"`` and nothing else: MLflow asks every evaluator in the environment."""
        return model_type == FLAVOR_NAME

    def evaluate(
        self,
        *,
        model_type: str,  # noqa: ARG002, RUF100 - MLflow's signature
        dataset: Any,
        run_id: str,
        evaluator_config: Mapping[str, Any] | None,
        model: Any = None,
        extra_metrics: Any = None,
        custom_artifacts: Any = None,
        predictions: str | None = None,
        model_id: str | None = None,
        **kwargs: Any,  # noqa: ARG002, RUF100 - MLflow's signature
    ) -> EvaluationResult:
        """Evaluate, log tables, figures and report to the run, and return metrics and artifacts; MLflow's arguments."""
        import mlflow
        from mlflow.environment_variables import MLFLOW_ENABLE_ASYNC_LOGGING

        from amici_eval.data.tissue import prepare
        from amici_eval.evaluation.pipeline import evaluate_access
        from amici_eval.model.engines.opening import open_access, resolve_device
        from amici_eval.tracking.dataset import AnnDataEvaluationDataset
        from amici_eval.tracking.runs.delivery import (
            check_report,
            deliver,
            evaluation_metrics,
            evaluation_params,
            run_tags,
        )
        from amici_eval.tracking.runs.local_results import ARTIFACTS, RunRecord, remove_local

        _refuse(extra_metrics=extra_metrics, custom_artifacts=custom_artifacts, predictions=predictions)
        spec, report = settings_from_config(evaluator_config)
        if not isinstance(dataset, AnnDataEvaluationDataset):
            raise DataError(
                value=f"data is a {type(dataset).__name__}",
                rule="the amici evaluator needs an AnnData dataset",
                fix="pass data=amici_eval.from_anndata(adata)",
            )
        trained = _native_model(model)
        if mlflow.get_run(run_id).data.tags.get("amici_eval.kind") == "evaluation":
            raise InvalidSpecError(
                value=f"run {run_id} holds an evaluation already",
                rule="settings, tables and figures of two evaluations would mix",
                fix="start another run for each",
            )
        check_compiler()
        resolve_device(spec.ablation.device)
        tissue = prepare(dataset.adata, trained.card, spec.data)
        info = _model_info(getattr(model, "metadata", None), model_id)
        data_info = {"name": dataset.name, "digest": dataset.digest, "n_cells": dataset.adata.n_obs}
        with open_access(trained, tissue, spec.ablation) as access:
            check_report(report, tuple(access.receivers()))
            evaluation = evaluate_access(access, spec, model_info=info, data_info=data_info)
        metrics = evaluation_metrics(evaluation)
        version = {"model_id": info["model_id"], "model_name": info["name"], "model_version": info["version"]}
        record = RunRecord(
            tracking_uri=mlflow.get_tracking_uri(),
            run_id=run_id,
            params=evaluation_params(evaluation),
            metrics=metrics,
            tags=run_tags(**version),
            **version,
        )
        # not removed on failure: the error says that the results are there
        folder = Path(tempfile.mkdtemp(prefix="amici-eval-"))
        deliver(
            evaluation,
            folder,
            record,
            report=report,
            config_yaml=yaml.safe_dump(_plain({**spec.to_dict(), "report": vars(report)}), sort_keys=False),
            # with a model_id MLflow logs the returned metrics itself; where it does so in the background they can be
            # lost, so they are logged here too: two points of each are better than none
            log_metrics=model_id is None or MLFLOW_ENABLE_ASYNC_LOGGING.get(),
        )
        artifacts = _artifacts(folder / ARTIFACTS, run_id)
        remove_local(folder, with_parent=False)
        return EvaluationResult(metrics=metrics, artifacts=artifacts)


def _refuse(**options: Any) -> None:
    for name, value in options.items():
        if value:
            raise InvalidSpecError(
                value=f"{name} was given", rule="the amici evaluator computes its own metrics", fix=f"drop {name}"
            )


def _model_info(metadata: Any, model_id: str | None) -> dict[str, Any]:
    """Return what identifies a model: its id in the store, its newest registered version if it has any, its run."""
    from mlflow import MlflowClient

    from amici_eval.tracking.registry import known_model_id

    model_id = model_id or known_model_id(getattr(metadata, "model_id", None))
    tags = {} if model_id is None else MlflowClient().get_logged_model(model_id).tags
    newest = (json.loads(tags.get("mlflow.modelVersions", "[]")) or [{}])[-1]
    return {
        "name": newest.get("name"),
        "version": str(newest["version"]) if newest else None,
        "model_id": model_id,
        "run_id": getattr(metadata, "run_id", None),
    }


def _native_model(model: Any) -> Any:
    from amici_eval.model.checkpoint import TrainedAMICI

    fix = "log it with amici_eval.log_model, and leave env_manager='local'"
    try:
        raw = model.get_raw_model()
    except (AttributeError, NotImplementedError) as error:
        raise ModelFormatError(
            value=f"the model is a {type(model).__name__} without a native model",
            rule="the amici evaluator hooks into the model itself, so it must be loaded in this process",
            fix=fix,
        ) from error
    if not isinstance(raw, TrainedAMICI):
        raise ModelFormatError(
            value=f"the model is a {type(raw).__name__}", rule="it must have the flavor 'amici'", fix=fix
        )
    return raw


def _artifacts(folder: Path, run_id: str) -> dict[str, Any]:
    """Return the tables and the settings of the test as MLflow's artifacts, read into memory."""
    import mlflow
    import pandas as pd
    from mlflow.models.evaluation.artifacts import CsvEvaluationArtifact, JsonEvaluationArtifact

    root = mlflow.get_run(run_id).info.artifact_uri.rstrip("/")
    artifacts: dict[str, Any] = {
        path.stem: CsvEvaluationArtifact(uri=f"{root}/tables/{path.name}", content=pd.read_csv(path))
        for path in sorted((folder / "tables").glob("*.csv"))
    }
    significance = json.loads((folder / "significance.json").read_text(encoding="utf-8"))
    artifacts["significance"] = JsonEvaluationArtifact(uri=f"{root}/significance.json", content=significance)
    return artifacts


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
