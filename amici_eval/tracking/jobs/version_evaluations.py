"""Evaluations of several versions on the same cells: existing ones are reused, others are made as child runs."""

from __future__ import annotations

import logging
import os
import re
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from amici_eval.common.errors import AmiciEvalError, DataError, InvalidSpecError, ModelNotFoundError
from amici_eval.results.evaluation import FILE_NAME
from amici_eval.results.matches import FailedVersion
from amici_eval.results.tile_sums import MOMENTS_FILE
from amici_eval.settings.evaluation import EvaluationSpec, SubsetSpec
from amici_eval.tracking.jobs.evaluating import evaluate_job
from amici_eval.tracking.registry import find_dataset, known_model_id, resolve_model
from amici_eval.tracking.runs.tracked import PARENT_RUN_VARIABLE
from amici_eval.tracking.runs.unfinished import download_evaluation, find_evaluation, fingerprint
from amici_eval.tracking.store.searching import version_numbers
from amici_eval.tracking.stored_model import open_stored_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from amici_eval.settings.comparison import ComparisonSpec
    from amici_eval.settings.evaluation import ReportSpec, TrackingSpec
    from amici_eval.tracking.dataset import AnnDataDataset
    from amici_eval.tracking.registry import ResolvedModel

MIN_HELD_OUT = 50
"""Least number of held-out cells that some type must have, or all cells are compared."""
_LATEST = re.compile(r"latest(?::(\d+))?")


@dataclass(frozen=True, kw_only=True)
class Column:
    """One evaluation to compare: a run that holds it, or a model and perhaps data of its own."""

    label: str
    model: ResolvedModel | None = None
    data_uri: str | None = None
    run_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class ComparedCells:
    """The cells that are compared, as settings and in words."""

    spec: EvaluationSpec
    text: str
    notes: tuple[str, ...] = ()
    digest: str | None = None
    data_uri: str | None = None
    failed: tuple[FailedVersion, ...] = ()

    def of(self, column: Column) -> str | None:
        """Return where the data of a column lies: its own URI, else the one that all columns share."""
        return column.data_uri if column.data_uri is not None else self.data_uri


def model_uris(models: Sequence[str], versions: Sequence[str]) -> list[str]:
    """Return the URIs of registered versions."""
    from mlflow import MlflowClient

    uris: list[str] = []
    for model in models:
        if ":" in model or "/" in model:
            uris.append(model)
            continue
        for version in versions:
            name = version.strip()
            if name.startswith("@") or name.isdigit():
                uris.append(f"models:/{model}{name}" if name.startswith("@") else f"models:/{model}/{name}")
            elif name == "all" or _LATEST.fullmatch(name):
                numbers = version_numbers(MlflowClient(), model)
                if not numbers:
                    resolve_model(f"models:/{model}/1")  # says what there is instead
                match = _LATEST.fullmatch(name)
                uris += [f"models:/{model}/{number}" for number in numbers[-int(match[1] or 1) if match else 0 :]]
            else:
                raise InvalidSpecError(
                    value=f"versions names {version!r}",
                    rule="a version is a number, @alias, latest:N or all",
                    fix="write versions=[1,2], versions=[1,@champion], versions=latest:5 or versions=all",
                )
    return list(dict.fromkeys(uris))


def columns_of(uris: Sequence[str], runs: Sequence[str], datasets: Sequence[str], data_uri: str | None) -> list[Column]:
    """Return what is to be compared, in order."""
    if datasets and (len(uris) != 1 or runs):
        raise InvalidSpecError(
            value=f"datasets with {len(uris)} versions" + (" and runs" if runs else ""),
            rule="several data sets are compared for one version",
            fix="name one version, or give one data set as data.uri",
        )
    columns = [Column(label=f"run {run_id[:8]}", run_id=run_id) for run_id in runs]
    for uri in uris:
        model = resolve_model(uri)
        name = f"{model.name} {model.version}" if model.name else model.model_id or uri
        if datasets:
            columns += [Column(label=Path(one).stem or one, model=model, data_uri=one) for one in datasets]
        else:
            columns.append(Column(label=name, model=model, data_uri=data_uri))
    # two names of one version are one version
    columns = list({(one.label, one.run_id, one.data_uri): one for one in columns}.values())
    if len(columns) < 2:
        raise InvalidSpecError(
            value=f"{len(columns)} version{'s' * (len(columns) != 1)} to compare",
            rule="a comparison needs at least two versions, runs or data sets",
            fix="name more: versions=[1,2], versions=all, runs=[ID,ID] or datasets=[A.h5ad,B.h5ad]",
        )
    return columns


def cells_of(
    columns: Sequence[Column],
    spec: EvaluationSpec,
    comparison: ComparisonSpec,
    data_uri: str | None,
    datasets: Sequence[str],
) -> ComparedCells:
    """Choose the cells that no compared version was fitted on, if there are enough of them."""
    from amici_eval.data.checks import chosen_cells, obs_column
    from amici_eval.data.tissue import prepare
    from amici_eval.tracking.dataset import from_anndata

    if datasets or not columns:
        return ComparedCells(spec=spec, text="all evaluated cells")
    known, digest, where, failed = True, None, data_uri, []
    dataset = fitted = chosen = labels = None
    subset = spec.data.subset
    wanted = comparison.cells != "all" and subset.held_out is None and not subset.buffer
    for column in columns:
        assert column.model is not None  # noqa: S101, RUF100 - for the type checker
        try:
            with open_stored_model(column.model.uri) as stored:
                card = stored.trained.card
                if dataset is None:
                    location = find_dataset(column.model, stored, data_uri)
                    # the fetched copy of a bundle is temporary
                    bundled = location == stored.bundled_adata
                    where = stored.bundle_uri(column.model.uri) if bundled else str(location)
                    dataset = from_anndata(location, backed=spec.data.backed)
                    digest = dataset.digest
                    fitted = np.zeros(dataset.adata.n_obs, dtype=bool)
                    chosen = chosen_cells(dataset.adata, subset)
                    key = spec.data.labels_key or card.labels_key
                    labels = obs_column(dataset.adata, key, "cell types").astype(str).to_numpy()
                own = prepare(dataset.adata, card, spec.data).fitted if wanted else None
                known = known and own is not None
                if own is not None:
                    fitted = fitted | own
        except AmiciEvalError as error:
            if dataset is None and isinstance(error, DataError):
                raise
            failed.append(FailedVersion(label=column.label, reason=str(error)))
    if fitted is None or chosen is None or labels is None:
        raise ModelNotFoundError(
            value=f"none of {len(columns)} versions can be read ({failed[0].reason})",
            rule="each must be a model that amici_eval registered",
            fix="register them again",
        )
    if not wanted:
        return ComparedCells(spec=spec, text="all evaluated cells", digest=digest, data_uri=where, failed=tuple(failed))
    if not known:
        if comparison.cells == "held_out":
            raise DataError(
                value="compare.cells=held_out",
                rule="for some version it is not known which cells it was fitted on",
                fix="register it again together with its data, or set compare.cells=all",
            )
        return ComparedCells(
            spec=spec,
            text="all evaluated cells; it is not known which of them the versions were fitted on",
            notes=("it is not known for all versions which cells they were fitted on: read everything as in-sample",),
            digest=digest,
            data_uri=where,
            failed=tuple(failed),
        )
    new = chosen & ~fitted
    most = max(np.unique(labels[new], return_counts=True)[1], default=0)
    if most >= (1 if comparison.cells == "held_out" else MIN_HELD_OUT):
        rows = tuple(np.flatnonzero(new).tolist())
        held_out = replace(spec, data=replace(spec.data, subset=SubsetSpec(indices=rows)))
        return ComparedCells(
            spec=held_out,
            text=f"{len(rows):,} cells that no compared version was fitted on",
            digest=digest,
            data_uri=where,
            failed=tuple(failed),
        )
    if comparison.cells == "held_out":
        raise DataError(
            value="compare.cells=held_out",
            rule="each cell was used to fit some compared version",
            fix="set compare.cells=all; everything is then in-sample",
        )
    return ComparedCells(
        spec=spec,
        text="all evaluated cells, in-sample",
        notes=(
            f"only {int(new.sum())} of {int(chosen.sum())} cells were used to fit none of the versions, at most {most} "
            f"of a cell type, and {MIN_HELD_OUT} of some type are needed: all cells are compared, in-sample, where "
            "each version is flattered by the cells that it was fitted on",
        ),
        digest=digest,
        data_uri=where,
        failed=tuple(failed),
    )


logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class VersionEvaluations:
    """Evaluations in the order of their columns, whether each existed before (``reused``), and what failed and why."""

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
    """Put the evaluation of each column into a folder; one that fails is recorded, and the others go on."""
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
    """Put an evaluation into a folder; return its run and whether the evaluation existed before."""
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
    """Make runs that the body starts children of a run, in its experiment."""
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
