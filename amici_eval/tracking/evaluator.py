"""The evaluator that ``mlflow.models.evaluate(..., model_type="amici")`` calls."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from mlflow.models.evaluation import EvaluationResult, ModelEvaluator

from amici_eval.errors import DataError, InvalidSpecError, ModelFormatError
from amici_eval.specs import EvaluationSpec, ReportSpec, spec_from_mapping
from amici_eval.tracking.flavor import FLAVOR_NAME

__all__ = ["AMICIEvaluator", "settings_from_config"]

_SHORTHANDS = {
    "alpha": "permutation.alpha",
    "device": "ablation.device",
    "n_permutations": "permutation.n_permutations",
    "seed": "permutation.seed",
}


def settings_from_config(config: Mapping[str, Any] | None) -> tuple[EvaluationSpec, ReportSpec]:
    """Read the settings of ``evaluator_config``.

    Parameters
    ----------
    config
        Nested groups (``{"permutation": {"seed": 1}}``), dotted names (``{"permutation.seed": 1}``) or the shorthands
        ``alpha``, ``device``, ``n_permutations`` and ``seed``; groups are ``data``, ``ablation``, ``permutation`` and
        ``report``.

    Raises
    ------
    InvalidSpecError
        If a key is no setting or a value is not allowed.
    """
    nested: dict[str, Any] = {}
    for key, value in (config or {}).items():
        *groups, name = _SHORTHANDS.get(key, key).split(".")
        target = nested
        for group in groups:
            target = target.setdefault(group, {})
        if isinstance(value, Mapping):
            target.setdefault(name, {}).update(value)
        else:
            target[name] = value
    report = dict(nested.pop("report", {}))
    unknown = sorted(set(report) - set(ReportSpec.__dataclass_fields__))
    if unknown:
        raise InvalidSpecError(
            value=f"unknown setting report.{unknown[0]}",
            rule=f"known here are {', '.join(ReportSpec.__dataclass_fields__)}",
            fix="correct the name or drop it",
        )
    for name in ("formats", "cell_types"):
        if report.get(name) is not None:
            report[name] = tuple(report[name])
    return spec_from_mapping(nested), ReportSpec(**report)


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
        """Evaluate, log tables, figures and report to the run, and return metrics and artifacts.

        Raises
        ------
        AmiciEvalError
            If model, data or settings do not fit.
        """
        import mlflow

        from amici_eval.evaluation import evaluate
        from amici_eval.tracking.dataset import AnnDataEvaluationDataset
        from amici_eval.tracking.run_log import (
            ARTIFACTS,
            RunRecord,
            evaluation_metrics,
            evaluation_params,
            send,
            write_artifacts,
        )

        for name, value in (
            ("extra_metrics", extra_metrics),
            ("custom_artifacts", custom_artifacts),
            ("predictions", predictions),
        ):
            if value:
                raise InvalidSpecError(
                    value=f"{name} was given", rule="the amici evaluator computes its own metrics", fix=f"drop {name}"
                )
        spec, report = settings_from_config(evaluator_config)
        if not isinstance(dataset, AnnDataEvaluationDataset):
            raise DataError(
                value=f"data is a {type(dataset).__name__}",
                rule="the amici evaluator needs an AnnData dataset",
                fix="pass data=amici_eval.from_anndata(adata)",
            )
        trained = _native_model(model)
        metadata = getattr(model, "metadata", None)
        own_id = model_id or getattr(metadata, "model_id", None)
        evaluation = evaluate(
            trained,
            dataset.adata,
            spec,
            model_info={"model_id": own_id, "run_id": getattr(metadata, "run_id", None)},
            data_info={"name": dataset.name, "digest": dataset.digest, "n_cells": dataset.adata.n_obs},
        )
        metrics = evaluation_metrics(evaluation)
        record = RunRecord(
            tracking_uri=mlflow.get_tracking_uri(),
            run_id=run_id,
            params=evaluation_params(evaluation),
            # with a model_id MLflow logs the returned metrics itself; twice would make two points of each
            metrics={} if model_id is not None else metrics,
            tags={"amici_eval.kind": "evaluation", **({"amici_eval.model_id": own_id} if own_id else {})},
            model_id=own_id,
        )
        with tempfile.TemporaryDirectory(prefix="amici-eval-") as scratch:
            folder = Path(scratch)
            settings = {**spec.to_dict(), "report": {**vars(report)}}
            write_artifacts(
                evaluation,
                folder / ARTIFACTS,
                report=report,
                config_yaml=yaml.safe_dump(_plain(settings), sort_keys=False),
            )
            send(folder, record)
            return EvaluationResult(metrics=metrics, artifacts=_artifacts(folder / ARTIFACTS, run_id))


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
    import json

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
