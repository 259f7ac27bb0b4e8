"""What is compared: which versions, runs or data sets, and on which cells."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from amici_eval.common.errors import AmiciEvalError, DataError, InvalidSpecError, ModelNotFoundError
from amici_eval.results.matches import FailedVersion
from amici_eval.settings.evaluation import EvaluationSpec, SubsetSpec
from amici_eval.tracking.models.registry import find_dataset, resolve_model
from amici_eval.tracking.models.stored_model import open_stored_model
from amici_eval.tracking.store.searching import version_numbers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from amici_eval.settings.comparison import ComparisonSpec
    from amici_eval.tracking.models.registry import ResolvedModel

__all__ = ["Column", "ComparedCells", "cells_of", "columns_of", "model_uris"]

MIN_HELD_OUT = 50
"""With fewer held-out cells in every type a comparison would say nothing."""
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
    """Which cells are compared."""

    spec: EvaluationSpec
    text: str
    notes: tuple[str, ...] = ()
    digest: str | None = None
    data_uri: str | None = None
    failed: tuple[FailedVersion, ...] = ()

    def of(self, column: Column) -> str | None:
        """Return where the data of a column lies: rows are numbers of one file, so that all read the same."""
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
                    # the fetched copy of a bundle goes away
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
