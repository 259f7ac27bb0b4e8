"""The card of any model that can be evaluated: a saved one or a live AMICI."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from amici_eval.common.errors import ModelFormatError
from amici_eval.common.model_card import ModelCard
from amici_eval.data.checks import trained_on as trained_rows
from amici_eval.data.opening import describe_training_data
from amici_eval.data.tissue import prepare
from amici_eval.model.saved_amici import split_covers
from amici_eval.model.training_tissue import TrainingTissue
from amici_eval.settings.evaluation import DataSpec

if TYPE_CHECKING:
    from anndata import AnnData

    from amici_eval.settings.evaluation import TrainedOnSpec

__all__ = ["AMICI_SOURCES", "card_of", "package_versions"]

AMICI_SOURCES = "amici-st sources"
_PACKAGES = ("amici-st", "scvi-tools", "torch", "numpy", "transformer-lens", "amici-eval")


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
    setup, fields = registry["setup_args"], registry["field_registries"]
    genes = tuple(str(gene) for gene in fields["X"]["state_registry"]["column_names"])
    training = None
    if model.adata is not adata:
        training = describe_training_data(
            model.adata, coord_obsm_key=setup["coord_obsm_key"], layer=setup["layer"], with_digest=False
        )
    card = ModelCard(
        n_heads=int(model.module.n_heads),
        n_neighbors=int(setup["n_neighbors"] or model.n_neighbors),
        genes=genes,
        cell_types=tuple(str(label) for label in fields["labels"]["state_registry"]["categorical_mapping"]),
        labels_key=setup["labels_key"],
        coord_obsm_key=setup["coord_obsm_key"],
        layer=setup["layer"],
        cell_radius_key=setup.get("cell_radius_key"),
        versions=package_versions(),
        training_data=training,
    )
    source = adata if trained_on else model.adata
    part = trained_rows(adata, trained_on) if trained_on else None
    rows = np.arange(source.n_obs) if part is None else part
    split = getattr(model, "train_indices_", None)
    if split is None or not split_covers(model, len(rows)):
        return card
    if source is adata:
        fitted = source.obs_names.astype(str).to_numpy()[rows[np.asarray(split, dtype=np.int64)]]
        return replace(card, training_cells=frozenset(fitted.tolist()))
    trained = TrainingTissue(tissue=prepare(source, card, DataSpec()), rows=rows)
    prints = trained.fingerprints({"train": split}, genes)["train"]
    return replace(card, training_cells=frozenset(prints.names), fingerprints=prints)
