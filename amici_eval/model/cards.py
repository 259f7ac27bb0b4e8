"""The card of any model that can be evaluated, a saved one or a live AMICI, and the cells it was trained on."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from amici_eval.common.errors import DataError, ModelFormatError
from amici_eval.common.model_card import Fingerprints, ModelCard
from amici_eval.data.checks import trained_on as trained_rows
from amici_eval.data.matrices import open_rows
from amici_eval.data.membership import describe_training_data, expression_prints, place_prints
from amici_eval.data.tissue import Tissue, prepare
from amici_eval.model.manifest import values_of
from amici_eval.settings.evaluation import DataSpec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from anndata import AnnData
    from jaxtyping import Int64
    from torch import Tensor

    from amici_eval.settings.evaluation import TrainedOnSpec


AMICI_SOURCES = "amici-st sources"
_PACKAGES = ("amici-st", "scvi-tools", "torch", "numpy", "transformer-lens", "amici-eval")
_ROWS = ("train_indices_", "validation_indices_", "test_indices_")
_PROFILE_TOLERANCE, _SAME_PROFILE = 1e-3, 1e-5
_MOST_PARTS = 100


def package_versions() -> dict[str, str]:
    """Return the installed versions of packages that a model depends on, and a digest of AMICI's sources.

    The digest is needed because AMICI's development branch has the version number of the release.
    """
    return {**{package: _version(package) for package in _PACKAGES}, AMICI_SOURCES: _amici_sources()}


@cache
def _amici_sources() -> str:
    digest = hashlib.sha256()
    spec = find_spec("amici")
    for folder in [] if spec is None else spec.submodule_search_locations or []:
        for path in sorted(Path(folder).rglob("*.py")):
            digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def card_of(model: Any, *, adata: AnnData, trained_on: TrainedOnSpec | None = None) -> ModelCard:
    """Return the card of a ``TrainedAMICI`` or of a live ``amici.AMICI`` (or a subclass).

    scvi-tools saves splits as row numbers, which are wrong once the model is bound to another AnnData: they count only
    if they are a split of exactly the cells at hand.
    """
    if isinstance(card := getattr(model, "card", None), ModelCard):
        return card
    registry = getattr(model, "registry_", None)
    if registry is None or not hasattr(getattr(model, "module", None), "attention_layer"):
        raise ModelFormatError(
            value=f"the model is a {type(model).__module__}.{type(model).__name__}",
            rule="it must be an amici.AMICI or what amici_eval.load_model returns",
            fix="load it with amici_eval.load_model(model_uri)",
        )
    setup, training = registry["setup_args"], None
    if model.adata is not adata:
        training = describe_training_data(
            model.adata, coord_obsm_key=setup["coord_obsm_key"], layer=setup["layer"], with_digest=False
        )
    card = card_from_registry(
        registry, n_heads=int(model.module.n_heads), n_neighbors=int(setup["n_neighbors"] or model.n_neighbors)
    )
    card = replace(card, training_data=training)
    source = adata if trained_on else model.adata
    part = trained_rows(adata, trained_on) if trained_on else None
    rows = np.arange(source.n_obs) if part is None else part
    split = getattr(model, "train_indices_", None)
    if split is None or not split_covers(model, len(rows)):
        return card
    if source is adata:
        fitted = source.obs_names.astype(str).to_numpy()[rows[np.asarray(split, dtype=np.int64)]]
        return replace(card, training_cells=frozenset(fitted.tolist()))
    prints = fingerprints_of(prepare(source, card, DataSpec()), rows, {"train": split}, card.genes)["train"]
    return replace(card, training_cells=frozenset(prints.names), fingerprints=prints)


def card_from_registry(registry: Mapping[str, Any], *, n_heads: int, n_neighbors: int) -> ModelCard:
    """Return what the registry of scvi-tools, live or as plain values, says of a model."""
    setup, fields = registry["setup_args"], registry["field_registries"]
    return ModelCard(
        n_heads=n_heads,
        n_neighbors=n_neighbors,
        genes=tuple(map(str, values_of(fields["X"]["state_registry"]["column_names"]))),
        cell_types=tuple(map(str, values_of(fields["labels"]["state_registry"]["categorical_mapping"]))),
        labels_key=setup["labels_key"],
        coord_obsm_key=setup["coord_obsm_key"],
        layer=setup["layer"],
        cell_radius_key=setup.get("cell_radius_key"),
        versions=package_versions(),
    )


def split_size(attributes: Mapping[str, Any]) -> int:
    """Return the number of cells in the recorded split; 0 if its rows are not 0, 1, ... without gaps."""
    rows = [attributes.get(name) for name in _ROWS]
    known = np.concatenate([np.asarray([] if one is None else one, dtype=np.int64) for one in rows])
    return len(known) if np.array_equal(np.sort(known), np.arange(len(known))) else 0


def split_covers(model: Any, n_cells: int) -> bool:
    """Return whether the split of a live model covers exactly this many cells."""
    return split_size({name: getattr(model, name, None) for name in _ROWS}) == n_cells


def fingerprints_of(
    tissue: Tissue, rows: Int64[np.ndarray, " trained"], splits: Mapping[str, Any], genes: tuple[str, ...]
) -> dict[str, Fingerprints]:
    """Return names and fingerprints of the cells of each split, given as positions in the rows of training."""
    places = place_prints(tissue.coordinates)
    expression = expression_prints(open_rows(tissue.matrix), tissue.gene_columns, genes)
    cells = {split: rows[np.asarray([] if own is None else own, dtype=np.int64)] for split, own in splits.items()}
    return {
        split: Fingerprints(
            names=tuple(map(str, tissue.cell_names[own])), places=places[own], expression=expression[own]
        )
        for split, own in cells.items()
    }


def check_training_tissue(
    adata: AnnData,
    card: ModelCard,
    profiles: Tensor,
    rows: Int64[np.ndarray, " trained"] | None,
    *,
    n_split: int,
    n_bound: int,
) -> Tissue:
    """Return the tissue of training; refuse another number of cells, other genes or mean profiles.

    Splits are row numbers in the training AnnData: with another one they would name the wrong cells. ``rows``: those
    that ``trained_on`` chooses, if it does; ``n_split`` and ``n_bound``: cells of the split (0: not known) and of the
    AnnData that the model was bound to, which may be another one.
    """
    n_cells, n_chosen = n_split or n_bound, adata.n_obs if rows is None else len(rows)

    def refusal(value: str, rule: str) -> DataError:
        hint = _a_part_of(adata, n_cells) if rows is None else ""
        fix = f"give the AnnData the model was trained on, cells in the same order{hint}"
        return DataError(value=value, rule=rule, fix=fix)

    if n_chosen not in (n_cells, n_bound):
        value = f"the data has {adata.n_obs} cells"
        value += "" if rows is None else f", of which trained_on chooses {n_chosen}"
        raise refusal(value, f"the model was trained on {n_cells}")
    # cells that are not as many as in the split may be of another AnnData that the model was bound to
    tolerance = _PROFILE_TOLERANCE if n_chosen == n_cells else _SAME_PROFILE
    expected = profiles.double().numpy()
    # fewer cells of other types than neighbours are no matter here
    tissue = prepare(adata, replace(card, n_neighbors=1), DataSpec())
    rows_of_training = np.arange(adata.n_obs) if rows is None else rows
    for code, label in enumerate(card.cell_types):
        own = rows_of_training[tissue.label_codes[rows_of_training] == code]
        if len(own) == 0:
            continue
        gap = np.abs(_mean_profile(tissue, own) - expected[code])
        if (gap > tolerance * np.maximum(1.0, np.abs(expected[code]))).any():
            value = f"mean expression of type {label!r} differs by up to {gap.max():.3g} from the profile in the model"
            raise refusal(value, "the model stores the mean profiles of its training data")
    return tissue


def _a_part_of(adata: AnnData, n_cells: int) -> str:
    """Return a hint on how to name the training part of a tissue, by a column with a value of this many cells."""
    if adata.n_obs <= n_cells:
        return ""
    key, value = "COLUMN", "VALUE"
    for name, column in adata.obs.items():
        if column.nunique() > _MOST_PARTS:
            continue
        counts = column.astype(str).value_counts()
        if (counts == n_cells).any():
            key, value = str(name), str(counts.index[counts == n_cells][0])
            break
    return (
        f"; if it was trained on a part of this tissue, say which: register.trained_on.key={key} "
        f"register.trained_on.value={value} (or register.trained_on.names=FILE with their names; in Python "
        f"trained_on=amici_eval.TrainedOnSpec(key={key!r}, value={value!r}))"
    )


def _mean_profile(tissue: Tissue, rows: np.ndarray) -> np.ndarray:
    total = np.zeros(tissue.expression(rows[:1]).shape[1])
    for start in range(0, len(rows), 4096):
        total += tissue.expression(rows[start : start + 4096]).astype(np.float64).sum(axis=0)
    return total / len(rows)
