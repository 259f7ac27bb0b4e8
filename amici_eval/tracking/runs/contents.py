"""What a run holds of an evaluation: metrics, params, tags and artifacts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from amici_eval.common.errors import DataError, InvalidSpecError, mask_secrets
from amici_eval.common.names import slugify

if TYPE_CHECKING:
    from pathlib import Path

    from amici_eval.results.evaluation import HeadEvaluation
    from amici_eval.settings.evaluation import ReportSpec

__all__ = [
    "check_report",
    "evaluation_metrics",
    "evaluation_params",
    "metric_intervals",
    "run_tags",
    "write_artifacts",
]

_LONGEST_PARAM = 6000


def evaluation_metrics(evaluation: HeadEvaluation) -> dict[str, float]:
    """Return the metrics of a run; undefined values are left out and counted."""
    metrics: dict[str, float] = {}
    ablations, spatial, bounds = evaluation.ablations, evaluation.spatial, evaluation.intervals
    parts, trivial = evaluation.parts, evaluation.trivial
    of_heads = {"ev": evaluation.expl_var, "p_adj": evaluation.p_value_adj}
    of_types = {"ev_full_model": evaluation.expl_var_full, "ev_no_head": evaluation.expl_var_none}
    if ablations is not None and "shapley" in ablations.modes:
        of_heads["shapley"] = ablations.of("shapley")
    if spatial is not None:
        of_heads |= {"p_adj_spatial": spatial.p_value_adj, "ess": spatial.ess}
    if bounds is not None:
        of_heads |= {"ev_ci_low": bounds.low, "ev_ci_high": bounds.high}
    if parts is not None:
        of_heads["ev_held_out"], of_types["ev_full_model_held_out"] = parts.expl_var[1], parts.full[1]
    if trivial is not None:
        of_heads["gain"] = trivial.gain
    for index, cell_type in enumerate(evaluation.cell_types):
        slug = slugify(cell_type, evaluation.cell_types)
        metrics |= {f"{name}/{slug}": float(values[index]) for name, values in of_types.items()}
        for head in range(evaluation.n_heads):
            metrics |= {f"{name}/{slug}/head_{head}": float(values[head, index]) for name, values in of_heads.items()}
    if evaluation.parity is not None:
        metrics["parity/max_abs_difference"] = float(evaluation.parity)
    finite = [float(value) for value in evaluation.expl_var.ravel() if math.isfinite(value)]
    metrics["summary/n_cells"] = float(evaluation.n_cells.sum())
    metrics["summary/n_tests"] = float(evaluation.n_decided)
    metrics["summary/n_tests_free"] = float(evaluation.n_tests)
    metrics["summary/n_significant"] = float(evaluation.n_significant)
    metrics["summary/n_significant_free"] = float(evaluation.n_significant_free)
    metrics["summary/n_undefined"] = float(evaluation.p_value.size - evaluation.n_decided)
    metrics["summary/n_permutations"] = float(evaluation.n_permutations)
    metrics["summary/max_ev"] = max(finite, default=math.nan)
    # MLflow would store NaN as 0 and infinity as a number
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def metric_intervals(evaluation: HeadEvaluation) -> dict[str, tuple[float, float]]:
    """Return the confidence interval of each metric that has one, NaN where it is not known.

    That of ``gain`` is the interval of what the head explains, moved: the predictor's own uncertainty is not in it.
    """
    bounds, parts, trivial = evaluation.intervals, evaluation.parts, evaluation.trivial
    found: dict[str, tuple[float, float]] = {}
    for index, cell_type in enumerate(evaluation.cell_types):
        slug, missing = slugify(cell_type, evaluation.cell_types), (math.nan, math.nan)
        found[f"ev_full_model/{slug}"] = (
            missing if bounds is None else (float(bounds.full_low[index]), float(bounds.full_high[index]))
        )
        for head in range(evaluation.n_heads):
            own = missing if bounds is None else (float(bounds.low[head, index]), float(bounds.high[head, index]))
            found[f"ev/{slug}/head_{head}"] = own
            if parts is not None:
                ends = float(parts.low[1, head, index]), float(parts.high[1, head, index])
                found[f"ev_held_out/{slug}/head_{head}"] = ends
            if trivial is not None:
                less = float(evaluation.expl_var[head, index]) - float(trivial.gain[head, index])
                found[f"gain/{slug}/head_{head}"] = own[0] - less, own[1] - less
    return found


def evaluation_params(evaluation: HeadEvaluation) -> dict[str, str]:
    """Return the settings that determined the numbers, as ``cfg/...`` params."""
    params = {f"cfg/{name}": mask_secrets(value)[:_LONGEST_PARAM] for name, value in _flat(evaluation.spec.to_dict())}
    # the number that was used, also where the setting left it to the default
    return {**params, "cfg/permutation.n_permutations": str(evaluation.n_permutations)}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{name}.")
        else:
            rows.append((f"{prefix}{name}", "" if value is None else str(value)))
    return rows


def run_tags(**model: str | None) -> dict[str, str]:
    """Return the tags by which a run of an evaluation names its model."""
    named = {f"amici_eval.{key}": mask_secrets(value) for key, value in model.items() if value is not None}
    return {"amici_eval.kind": "evaluation", **named}


def check_report(report: ReportSpec, cell_types: tuple[str, ...]) -> None:
    """Refuse what a run cannot hold, before anything is computed: unknown types or palettes, names that collide."""
    named: dict[str, str] = {}
    for cell_type in cell_types:
        # 32 bits of a hash keep names apart that are not made to collide
        name = slugify(cell_type, cell_types)
        other = named.setdefault(name.lower(), cell_type)
        if other != cell_type:
            raise DataError(
                value=f"cell types {other!r} and {cell_type!r} have the same name {name} for files",
                rule="each type needs files and metrics of its own",
                fix="rename one of them in the data",
            )
    for cell_type in report.cell_types or ():
        if cell_type not in cell_types:
            raise InvalidSpecError(
                value=f"report.cell_types names {cell_type!r}",
                rule=f"the evaluated cells are of type {', '.join(cell_types)}",
                fix="choose among these",
            )
    if report.figures and report.palette is not None:
        from amici_eval.report.figures.drawing import type_colours

        type_colours(cell_types, report.palette)


def write_artifacts(
    evaluation: HeadEvaluation,
    folder: Path,
    *,
    report: ReportSpec,
    config_yaml: str,
) -> None:
    """Write the tables, figures and report of an evaluation, as a run holds them, into a folder."""
    from amici_eval.report.page.html import write_html
    from amici_eval.report.significance import write_significance
    from amici_eval.report.tables import write_tables

    folder.mkdir(parents=True, exist_ok=True)
    evaluation.save(folder)
    write_tables(evaluation, folder)
    write_significance(evaluation, folder)
    (folder / "config").mkdir(exist_ok=True)
    (folder / "config" / "resolved.yaml").write_text(config_yaml, encoding="utf-8")
    figures: dict[str, Path] = {}
    if report.figures:
        from amici_eval.report.figures.saving import save_figures

        paths = save_figures(
            evaluation,
            folder / "figures",
            cell_types=report.cell_types,
            palette=report.palette,
            n_top_genes=report.n_top_genes,
            formats=report.formats,
        )
        figures = {path.stem: path for path in paths if path.suffix == ".svg"} or {
            path.stem: path for path in paths if path.suffix == ".png"
        }
    write_html(evaluation, folder, figures=figures)
