"""Evaluate the attention heads of trained AMICI models that are registered in MLflow.

Importing this package loads no torch, scvi-tools, AMICI or MLflow: the names below are fetched when first used.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "AblationSpec": "amici_eval.settings.evaluation",
    "AmiciEvalError": "amici_eval.common.errors",
    "AnnDataDataset": "amici_eval.tracking.dataset",
    "ComparisonSpec": "amici_eval.settings.comparison",
    "DEMO_TISSUE": "amici_eval.data.simulate",
    "DataSpec": "amici_eval.settings.evaluation",
    "EvaluationSpec": "amici_eval.settings.evaluation",
    "GateSpec": "amici_eval.settings.comparison",
    "HeadAblations": "amici_eval.results.analyses",
    "HeadComparison": "amici_eval.results.comparison",
    "HeadEvaluation": "amici_eval.results.evaluation",
    "HeadEvaluationCallback": "amici_eval.tracking.training",
    "LaunchSpec": "amici_eval.settings.evaluation",
    "Moments": "amici_eval.results.moments",
    "PermutationSpec": "amici_eval.settings.evaluation",
    "PlantedEffect": "amici_eval.data.simulate",
    "Rule": "amici_eval.settings.comparison",
    "SubsetSpec": "amici_eval.settings.evaluation",
    "TissueSpec": "amici_eval.data.simulate",
    "TrainedAMICI": "amici_eval.model.checkpoint",
    "TrainedOnSpec": "amici_eval.settings.evaluation",
    "Undefined": "amici_eval.results.evaluation",
    "Verdict": "amici_eval.results.verdict",
    "compare": "amici_eval.comparison.pipeline",
    "evaluate": "amici_eval.evaluation.pipeline",
    "from_anndata": "amici_eval.tracking.dataset",
    "judge": "amici_eval.comparison.gate",
    "load_model": "amici_eval.tracking.flavor",
    "log_model": "amici_eval.tracking.flavor",
    "open_anndata": "amici_eval.data.files",
    "open_launcher": "amici_eval.evaluation.launching",
    "plot_ablations": "amici_eval.report.figures.ablation_figures",
    "plot_barplot": "amici_eval.report.figures.evaluation_figures",
    "plot_differences": "amici_eval.report.figures.comparison_figures",
    "plot_heatmap": "amici_eval.report.figures.evaluation_figures",
    "plot_interactions": "amici_eval.report.figures.ablation_figures",
    "plot_lineage": "amici_eval.report.figures.comparison_figures",
    "plot_sender_differences": "amici_eval.report.figures.comparison_figures",
    "plot_sender_graph": "amici_eval.report.figures.ablation_figures",
    "plot_senders": "amici_eval.report.figures.ablation_figures",
    "plot_similarity": "amici_eval.report.figures.comparison_figures",
    "plot_versions": "amici_eval.report.figures.comparison_figures",
    "save_model": "amici_eval.tracking.flavor",
    "simulate_tissue": "amici_eval.data.simulate",
}

__all__ = ["__version__", *sorted(_EXPORTS), "errors"]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        value = getattr(importlib.import_module(_EXPORTS[name]), name)
        globals()[name] = value
        return value
    if name == "errors":
        return importlib.import_module("amici_eval.common.errors")
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
