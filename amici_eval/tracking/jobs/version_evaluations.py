"""Evaluations of several versions on the same cells: taken from where they are, or made as children of a run."""

from __future__ import annotations

import logging
import os
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from amici_eval.common.errors import AmiciEvalError, DataError
from amici_eval.results.evaluation import FILE_NAME
from amici_eval.results.matches import FailedVersion
from amici_eval.results.tile_sums import MOMENTS_FILE
from amici_eval.tracking.jobs.evaluating import evaluate_job
from amici_eval.tracking.models.registry import find_dataset, known_model_id
from amici_eval.tracking.models.stored_model import open_stored_model
from amici_eval.tracking.runs.reuse import download_evaluation, find_evaluation, fingerprint
from amici_eval.tracking.runs.tracked import PARENT_RUN_VARIABLE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from amici_eval.settings.evaluation import EvaluationSpec, ReportSpec, TrackingSpec
    from amici_eval.tracking.dataset import AnnDataDataset
    from amici_eval.tracking.jobs.compared_cells import Column, ComparedCells

__all__ = ["VersionEvaluations", "gather_evaluations"]

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class VersionEvaluations:
    """Evaluations that could be had, in order, and what could not.

    Parameters
    ----------
    folders
        Where each lies.
    columns, run_ids, reused
        What each is of, the run that holds it, and whether it was there already.
    failed
        What could not be evaluated, and why.
    """

    folders: list[Path] = field(default_factory=list)
    columns: list[Column] = field(default_factory=list)
    run_ids: list[str] = field(default_factory=list)
    reused: list[bool] = field(default_factory=list)
    failed: list[FailedVersion] = field(default_factory=list)


def gather_evaluations(
    columns: Sequence[Column],
    cells: ComparedCells,
    staging: Path,
    *,
    parent: tuple[str, str],
    need_moments: bool = True,
    report: ReportSpec,
    tracking: TrackingSpec,
    config_yaml: str,
    progress: Callable[[int, int, str], None] | None = None,
) -> VersionEvaluations:
    """Put the evaluation of each column into a folder; one that fails is named, and the others go on."""
    found = VersionEvaluations(failed=list(cells.failed))
    gone = {one.label for one in found.failed}
    with _children_of(*parent):
        for number, column in enumerate(columns):
            if column.label in gone:
                continue
            place = staging / str(number)
            try:
                own_run, was_there = _evaluation_in(
                    place,
                    column,
                    cells,
                    report=report,
                    tracking=tracking,
                    config_yaml=config_yaml,
                    progress=progress,
                )
                if need_moments and not (place / MOMENTS_FILE).is_file():
                    raise DataError(
                        value=f"run {own_run} holds no {MOMENTS_FILE}",
                        rule="heads are matched by what the factored engine keeps of its pass over the cells",
                        fix="evaluate it with ablation.engine=factored, on data with coordinates",
                    )
            except AmiciEvalError as error:
                logger.error("%s could not be evaluated and is left out: %s", column.label, error)
                found.failed.append(FailedVersion(label=column.label, reason=str(error)))
                continue
            found.folders.append(place)
            found.columns.append(column)
            found.run_ids.append(own_run)
            found.reused.append(was_there)
    return found


def _evaluation_in(
    place: Path,
    column: Column,
    cells: ComparedCells,
    *,
    report: ReportSpec,
    tracking: TrackingSpec,
    config_yaml: str,
    progress: Callable[[int, int, str], None] | None,
) -> tuple[str, bool]:
    """Put an evaluation into a folder; return its run and whether it was there already."""
    place.mkdir()
    if column.run_id is not None:
        download_evaluation(column.run_id, place)
        if not (place / FILE_NAME).is_file():
            raise DataError(
                value=f"run {column.run_id} holds no {FILE_NAME}",
                rule="it must be a run of amici-eval evaluate that ended well",
                fix="give the id of such a run",
            )
        return column.run_id, True
    model = column.model
    assert model is not None  # noqa: S101, RUF100 - for the type checker
    if tracking.reuse:
        digest = cells.digest if cells.digest is not None else _digest(column, cells.spec)
        key = fingerprint(model=known_model_id(model.model_id) or model.uri, digest=digest, spec=cells.spec)
        there = find_evaluation(key)
        if there is not None:
            download_evaluation(there, place)
            if (place / FILE_NAME).is_file():
                logger.info("%s: evaluated before, taken from run %s", column.label, there)
                return there, True
    result = evaluate_job(
        model.uri,
        data_uri=cells.of(column),
        spec=cells.spec,
        report=report,
        tracking=replace(tracking, run_name=None, keep_local=False),
        config_yaml=config_yaml,
        progress=progress,
    )
    result.evaluation.save(place)
    return result.run_id, False


def _digest(column: Column, spec: EvaluationSpec) -> str:
    from amici_eval.tracking.dataset import from_anndata

    assert column.model is not None  # noqa: S101, RUF100 - for the type checker
    with open_stored_model(column.model.uri) as stored:
        dataset: AnnDataDataset = from_anndata(
            find_dataset(column.model, stored, column.data_uri), backed=spec.data.backed
        )
        return dataset.digest


@contextmanager
def _children_of(run_id: str, experiment_id: str) -> Iterator[None]:
    """Let runs that are started meanwhile be children of a run, in its experiment."""
    values = {PARENT_RUN_VARIABLE: run_id, "MLFLOW_EXPERIMENT_ID": experiment_id}
    before: dict[str, Any] = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
