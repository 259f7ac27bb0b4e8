"""The card of any model that can be evaluated: a saved one, or a live AMICI as scvi-tools describes it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from amici_eval.common.errors import ModelFormatError
from amici_eval.common.model_card import ModelCard
from amici_eval.data.checks import trained_on as trained_rows
from amici_eval.data.opening import describe_training_data
from amici_eval.data.tissue import prepare
from amici_eval.model.saved_amici import split_covers
from amici_eval.model.training_tissue import TrainingTissue
from amici_eval.model.versions import package_versions
from amici_eval.settings.evaluation import DataSpec

if TYPE_CHECKING:
    from anndata import AnnData

    from amici_eval.settings.evaluation import TrainedOnSpec

__all__ = ["card_of"]


def card_of(model: Any, *, adata: AnnData, trained_on: TrainedOnSpec | None = None) -> ModelCard:
    """Return the card of a ``TrainedAMICI`` or of a live ``amici.AMICI`` (or a subclass).

    Notes
    -----
    scvi-tools saves splits as row numbers, which mean nothing once the model is bound to another AnnData: they count
    only if they are a split of exactly the cells at hand.
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
