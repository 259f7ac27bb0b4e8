"""What a run of a comparison holds: files, params, metrics by version."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING

from amici_eval.common.names import slugify
from amici_eval.report.comparison_tables import write_comparison_tables
from amici_eval.report.page.comparison_page import write_comparison_html

if TYPE_CHECKING:
    from pathlib import Path

    from amici_eval.results.comparison import HeadComparison
    from amici_eval.settings.comparison import ComparisonSpec
    from amici_eval.settings.evaluation import ReportSpec

__all__ = ["comparison_params", "comparison_series", "write_comparison"]


def comparison_params(spec: ComparisonSpec) -> dict[str, str]:
    """Return the settings as ``cfg/compare...`` params."""
    return {f"cfg/compare.{name}": str(value) for name, value in asdict(spec).items() if name != "cells"}


def comparison_series(comparison: HeadComparison) -> dict[str, list[tuple[int, float]]]:
    """Return metrics by version, so that MLflow's chart shows their history; undefined values are left out."""
    numbers = [str(version.model.get("version") or "") for version in comparison.versions]
    names = {version.model.get("name") for version in comparison.versions}
    steps = list(range(len(numbers)))
    if len(names) == 1 and all(number.isdigit() for number in numbers) and comparison.kind == "versions":
        given = [int(number) for number in numbers]
        steps = given if given == sorted(set(given)) else steps
    series: dict[str, list[tuple[int, float]]] = {}

    def add(name: str, step: int, value: float) -> None:
        if math.isfinite(value):
            series.setdefault(name, []).append((step, float(value)))

    lineage = {
        (position, head): number
        for number, one in enumerate(comparison.lineages)
        for position, head in enumerate(one.heads)
        if head is not None
    }
    cell_types = {cell_type for version in comparison.versions for cell_type in version.cell_types}
    for position, (step, version) in enumerate(zip(steps, comparison.versions, strict=True)):
        add("summary/n_significant", step, version.n_significant)
        for at, cell_type in enumerate(version.cell_types):
            slug = slugify(cell_type, cell_types)
            add(f"ev_full_model/{slug}", step, version.full[at])
            for head in range(version.n_heads):
                if (position, head) in lineage:
                    add(f"ev/{slug}/lineage_{lineage[position, head]}", step, version.expl_var[head, at])
    for whole in comparison.overall:
        add("overall/difference", steps[whole.after], whole.difference)
    return series


def write_comparison(
    comparison: HeadComparison, folder: Path, *, report: ReportSpec, config_yaml: str, first: str = ""
) -> None:
    """Write the tables, figures and page of a comparison, as a run holds them, into a folder."""
    comparison.save(folder)
    write_comparison_tables(comparison, folder)
    (folder / "config").mkdir(exist_ok=True)
    (folder / "config" / "resolved.yaml").write_text(config_yaml, encoding="utf-8")
    figures: dict[str, Path] = {}
    if report.figures:
        from amici_eval.report.figures.comparison_figures import save_comparison_figures

        paths = save_comparison_figures(comparison, folder / "figures", formats=report.formats)
        figures = {path.stem: path for path in paths if path.suffix == ".svg"} or {path.stem: path for path in paths}
    write_comparison_html(comparison, folder, figures=figures, first=first)
