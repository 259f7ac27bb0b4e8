"""The job behind ``compare``: evaluate what is not evaluated yet, compare, keep, send."""

from __future__ import annotations

import logging
import os
import re
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from amici_eval.comparison import compare, matched_similarity, similarity_of
from amici_eval.comparison_results import FailedVersion
from amici_eval.errors import AmiciEvalError, DataError, InvalidSpecError, ModelNotFoundError, first_line
from amici_eval.report.comparison_page import comparison_sentences
from amici_eval.results import FILE_NAME
from amici_eval.specs import AblationSpec, EvaluationSpec, PermutationSpec, SubsetSpec
from amici_eval.tracking.comparison_contents import comparison_params, comparison_series, write_comparison
from amici_eval.tracking.jobs import evaluate_job
from amici_eval.tracking.registry import connect, find_dataset, known_model_id, resolve_model
from amici_eval.tracking.reuse import download_evaluation, find_evaluation, fingerprint
from amici_eval.tracking.run_log import ARTIFACTS, RunRecord, check_writable, remove_local, send
from amici_eval.tracking.stored_model import open_stored_model
from amici_eval.tracking.tracked_run import PARENT_RUN_VARIABLE, tracked_run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from jaxtyping import Float64

    from amici_eval.comparison_results import HeadComparison
    from amici_eval.comparison_spec import ComparisonSpec
    from amici_eval.specs import ReportSpec, TrackingSpec
    from amici_eval.tracking.dataset import AnnDataDataset
    from amici_eval.tracking.registry import ResolvedModel

__all__ = ["ComparisonRun", "compare_job", "model_uris"]

logger = logging.getLogger(__name__)

MIN_HELD_OUT = 50
"""With fewer held-out cells in every type a comparison would say nothing."""
_LATEST = re.compile(r"latest(?::(\d+))?")
_FLOOR_SEEDS = (1, 2)


@dataclass(frozen=True, kw_only=True)
class ComparisonRun:
    """A comparison and where it was logged.

    Parameters
    ----------
    comparison
        The result.
    run_id, tracking_uri
        The run.
    folder
        Local copy of its artifacts, if it was kept.
    """

    comparison: HeadComparison
    run_id: str
    tracking_uri: str
    folder: Path | None


@dataclass(frozen=True, kw_only=True)
class _Column:
    """One evaluation to compare: a run that holds it, or a model and perhaps data of its own."""

    label: str
    model: ResolvedModel | None = None
    data_uri: str | None = None
    run_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class _Cells:
    """Which cells are compared."""

    spec: EvaluationSpec
    text: str
    notes: tuple[str, ...] = ()
    digest: str | None = None
    failed: tuple[FailedVersion, ...] = ()


def model_uris(models: Sequence[str], versions: Sequence[str]) -> list[str]:
    """Return the URIs of registered versions.

    Parameters
    ----------
    models
        Names of registered models, or URIs (``models:/...``, ``runs:/...``, a folder), which stand for themselves.
    versions
        Of every name: numbers, ``@alias``, ``latest:N`` (the newest N), or ``all``.

    Raises
    ------
    ModelNotFoundError, InvalidSpecError
        If there is no such model or version, or a version cannot be read.
    """
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
                numbers = sorted(
                    int(entry.version) for entry in MlflowClient().search_model_versions(f"name='{model}'")
                )
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


def compare_job(
    *,
    models: Sequence[str] = (),
    versions: Sequence[str] = (),
    runs: Sequence[str] = (),
    datasets: Sequence[str] = (),
    data_uri: str | None,
    spec: EvaluationSpec,
    comparison: ComparisonSpec,
    report: ReportSpec,
    tracking: TrackingSpec,
    config_yaml: str,
    progress: Callable[[int, int, str], None] | None = None,
) -> ComparisonRun:
    """Compare versions of models on the same cells, or one version on several data sets, and log that to a run.

    Parameters
    ----------
    models, versions
        As for :func:`model_uris`.
    runs
        Ids of runs that hold evaluations, to be compared as they are; they come first.
    datasets
        Where several data sets lie, for one version.
    data_uri
        The tissue; ``None``: what the first model brings.
    spec, comparison, report, tracking
        Settings. Evaluations that the store holds already are taken from there (``tracking.reuse``); the others become
        children of the run.
    config_yaml
        The resolved configuration, kept with the run.
    progress
        Told how far the work is.

    Raises
    ------
    AmiciEvalError
        If there is nothing to compare, or fewer than two versions could be evaluated.
    """
    tracking_uri = connect(tracking.uri)
    output = Path(tracking.output_dir).absolute()
    made_output = not output.exists()
    check_writable(output)
    columns = _columns(model_uris(models, versions), runs, datasets, data_uri)
    cells = _cells([column for column in columns if column.model is not None], spec, comparison, data_uri, datasets)
    tags = {"amici_eval.kind": "comparison"}
    with tracked_run(tracking, name="compare", tags=tags) as run:
        run_id, experiment_id = run.info.run_id, run.info.experiment_id
        folder = output / run_id
        check_writable(folder)
        found: list[Path] = []
        kept: list[_Column] = []
        run_ids: list[str] = []
        reused: list[bool] = []
        failed = list(cells.failed)
        gone = {one.label for one in failed}
        with (
            tempfile.TemporaryDirectory(prefix="evaluations-", dir=folder) as staging,
            _children_of(run_id, experiment_id),
        ):
            for number, column in enumerate(columns):
                if column.label in gone:
                    continue
                place = Path(staging) / str(number)
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
                except AmiciEvalError as error:
                    logger.error("%s could not be evaluated and is left out: %s", column.label, error)
                    failed.append(FailedVersion(label=column.label, reason=str(error)))
                    continue
                found.append(place)
                kept.append(column)
                run_ids.append(own_run)
                reused.append(was_there)
            if len(found) < 2:
                reasons = "; ".join(f"{one.label}: {one.reason}" for one in failed)
                raise DataError(
                    value=f"{len(found)} of {len(columns)} evaluations are there ({reasons})",
                    rule="a comparison needs at least two",
                    fix="mend what failed, or compare other versions",
                )
            result = compare(
                found,
                comparison,
                labels=[column.label for column in kept],
                run_ids=run_ids,
                reused=reused,
                failed=failed,
                floor=_floor(kept, cells, data_uri) if comparison.floor and not datasets else None,
                cells=cells.text,
                notes=cells.notes,
                progress=progress,
            )
        record = RunRecord(
            tracking_uri=tracking_uri,
            run_id=run_id,
            params={"cfg/compare.cells": result.cells, **comparison_params(comparison)},
            tags={**tags, "mlflow.note.content": "\n".join(f"- {one}" for one in comparison_sentences(result))},
            series=comparison_series(result),
        )
        write_comparison(result, folder / ARTIFACTS, report=report, config_yaml=config_yaml)
        record.save(folder)
        send(folder, record)
        _tag_versions([column.model for column in kept if column.model is not None], run_id)
    if not tracking.keep_local:
        remove_local(folder, with_parent=made_output)
    return ComparisonRun(
        comparison=result, run_id=run_id, tracking_uri=tracking_uri, folder=folder if tracking.keep_local else None
    )


def _columns(uris: Sequence[str], runs: Sequence[str], datasets: Sequence[str], data_uri: str | None) -> list[_Column]:
    if datasets and (len(uris) != 1 or runs):
        raise InvalidSpecError(
            value=f"datasets with {len(uris)} versions" + (" and runs" if runs else ""),
            rule="several data sets are compared for one version",
            fix="name one version, or give one data set as data.uri",
        )
    columns = [_Column(label=f"run {run_id[:8]}", run_id=run_id) for run_id in runs]
    for uri in uris:
        model = resolve_model(uri)
        name = f"{model.name} {model.version}" if model.name else model.model_id or uri
        if datasets:
            columns += [_Column(label=Path(one).stem or one, model=model, data_uri=one) for one in datasets]
        else:
            columns.append(_Column(label=name, model=model, data_uri=data_uri))
    # two names of one version are one version
    columns = list({(one.label, one.run_id, one.data_uri): one for one in columns}.values())
    if len(columns) < 2:
        raise InvalidSpecError(
            value=f"{len(columns)} version{'s' * (len(columns) != 1)} to compare",
            rule="a comparison needs at least two versions, runs or data sets",
            fix="name more: versions=[1,2], versions=all, runs=[ID,ID] or datasets=[A.h5ad,B.h5ad]",
        )
    return columns


def _cells(
    columns: Sequence[_Column],
    spec: EvaluationSpec,
    comparison: ComparisonSpec,
    data_uri: str | None,
    datasets: Sequence[str],
) -> _Cells:
    """Choose the cells that no compared version was fitted on, if there are enough of them."""
    from amici_eval.checks import chosen_cells, obs_column
    from amici_eval.tracking.dataset import from_anndata

    if datasets or not columns:
        return _Cells(spec=spec, text="all evaluated cells")
    fitted: set[str] = set()
    known, digest, failed = True, None, []
    names = chosen = labels = None
    for column in columns:
        assert column.model is not None  # noqa: S101, RUF100 - for the type checker
        try:
            with open_stored_model(column.model.uri) as stored:
                card = stored.trained.card
                if names is None:
                    location = find_dataset(column.model, stored, data_uri)
                    dataset = from_anndata(location, backed=spec.data.backed)
                    digest = dataset.digest
                    names = dataset.adata.obs_names.astype(str).to_numpy()
                    chosen = chosen_cells(dataset.adata, spec.data.subset)
                    key = spec.data.labels_key or card.labels_key
                    labels = obs_column(dataset.adata, key, "cell types").astype(str).to_numpy()
                if card.training_cells is None:
                    known = False
                else:
                    fitted |= card.training_cells
        except AmiciEvalError as error:
            if names is None and isinstance(error, DataError):
                raise
            failed.append(FailedVersion(label=column.label, reason=str(error)))
    if names is None or chosen is None or labels is None:
        raise ModelNotFoundError(
            value=f"none of {len(columns)} versions can be read ({failed[0].reason})",
            rule="each must be a model that amici_eval registered",
            fix="register them again",
        )
    subset = spec.data.subset
    if comparison.cells == "all" or subset.held_out is not None or subset.buffer:
        return _Cells(spec=spec, text="all evaluated cells", digest=digest, failed=tuple(failed))
    if not known:
        if comparison.cells == "held_out":
            raise DataError(
                value="compare.cells=held_out",
                rule="for some version it is not known which cells it was fitted on",
                fix="register it again together with its data, or set compare.cells=all",
            )
        return _Cells(
            spec=spec,
            text="all evaluated cells; it is not known which of them the versions were fitted on",
            notes=("it is not known for all versions which cells they were fitted on: read everything as in-sample",),
            digest=digest,
            failed=tuple(failed),
        )
    new = chosen & ~np.fromiter((name in fitted for name in names), dtype=bool, count=len(names))
    most = max(np.unique(labels[new], return_counts=True)[1], default=0)
    if most >= (1 if comparison.cells == "held_out" else MIN_HELD_OUT):
        rows = tuple(np.flatnonzero(new).tolist())
        held_out = replace(spec, data=replace(spec.data, subset=SubsetSpec(indices=rows)))
        return _Cells(
            spec=held_out,
            text=f"{len(rows):,} cells that no compared version was fitted on",
            digest=digest,
            failed=tuple(failed),
        )
    if comparison.cells == "held_out":
        raise DataError(
            value="compare.cells=held_out",
            rule="each cell was used to fit some compared version",
            fix="set compare.cells=all; everything is then in-sample",
        )
    return _Cells(
        spec=spec,
        text="all evaluated cells, in-sample",
        notes=(
            f"only {int(new.sum())} of {int(chosen.sum())} cells were used to fit none of the versions, at most {most} "
            f"of a cell type, and {MIN_HELD_OUT} of some type are needed: all cells are compared, in-sample, where "
            "each version is flattered by the cells that it was fitted on",
        ),
        digest=digest,
        failed=tuple(failed),
    )


def _evaluation_in(
    place: Path,
    column: _Column,
    cells: _Cells,
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
        data_uri=column.data_uri,
        spec=cells.spec,
        report=report,
        tracking=replace(tracking, run_name=None, keep_local=False, output_dir=str(place / "run")),
        config_yaml=config_yaml,
        progress=progress,
    )
    result.evaluation.save(place)
    return result.run_id, False


def _digest(column: _Column, spec: EvaluationSpec) -> str:
    from amici_eval.tracking.dataset import from_anndata

    assert column.model is not None  # noqa: S101, RUF100 - for the type checker
    with open_stored_model(column.model.uri) as stored:
        dataset: AnnDataDataset = from_anndata(
            find_dataset(column.model, stored, column.data_uri), backed=spec.data.backed
        )
        return dataset.digest


def _floor(columns: Sequence[_Column], cells: _Cells, data_uri: str | None) -> Float64[np.ndarray, " heads"] | None:
    """Return how alike the heads of two untrained models of the last version's architecture are."""
    from amici_eval.evaluation import evaluate
    from amici_eval.model.untrained import untrained_like
    from amici_eval.tracking.dataset import from_anndata

    last = next((column for column in reversed(columns) if column.model is not None), None)
    if last is None or last.model is None:
        return None
    quick = EvaluationSpec(
        data=cells.spec.data,
        ablation=AblationSpec(
            device=cells.spec.ablation.device,
            memory_budget=cells.spec.ablation.memory_budget,
            modes=("keep_one",),
            baselines=False,
        ),
        permutation=PermutationSpec(n_permutations=1, method="moments", spatial_null="none", n_bootstrap=0),
    )
    try:
        with open_stored_model(last.model.uri) as stored:
            adata = from_anndata(find_dataset(last.model, stored, data_uri), backed=cells.spec.data.backed).adata
            untrained = [
                evaluate(untrained_like(stored.trained, seed=seed), adata, quick).moments for seed in _FLOOR_SEEDS
            ]
    except AmiciEvalError as error:
        logger.warning("untrained models could not be compared: %s", first_line(error))
        return None
    if untrained[0] is None or untrained[1] is None:
        return None
    return matched_similarity(similarity_of(untrained[0], untrained[1]))


def _tag_versions(models: Sequence[ResolvedModel], run_id: str) -> None:
    """Let each version point to its newest comparison."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    client = MlflowClient()
    for model in models:
        if model.name is None or model.version is None:
            continue
        try:
            client.set_model_version_tag(model.name, model.version, "amici_eval.comparison_run_id", run_id)
        except MlflowException as error:
            # a user may read a model and not write to it; the run itself is complete
            logger.warning("version %s could not be tagged with its comparison: %s", model.version, first_line(error))


@contextmanager
def _children_of(run_id: str, experiment_id: str) -> Iterator[None]:
    """Let runs that are started meanwhile be children of a run, in its experiment."""
    values = {PARENT_RUN_VARIABLE: run_id, "MLFLOW_EXPERIMENT_ID": experiment_id}
    before: dict[str, Any] = {name: os.environ.get(name) for name in (*values, "MLFLOW_RUN_ID")}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
