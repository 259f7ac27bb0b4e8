"""The card of any model that can be evaluated: a saved one, or a live AMICI as scvi-tools describes it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from amici_eval.data import describe_training_data
from amici_eval.errors import ModelFormatError
from amici_eval.model.checkpoint import TrainedAMICI, package_versions
from amici_eval.model_card import ModelCard

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["card_of"]


def card_of(model: Any, *, adata: AnnData) -> ModelCard:
    """Return the card of a :class:`TrainedAMICI` or of a live ``amici.AMICI`` (or a subclass).

    Parameters
    ----------
    model
        The model.
    adata
        The tissue it will be evaluated on; the live model's training tissue is described only if it is another.
    """
    if isinstance(model, TrainedAMICI):
        return model.card
    registry = getattr(model, "registry_", None)
    if registry is None or not hasattr(getattr(model, "module", None), "attention_layer"):
        raise ModelFormatError(
            value=f"the model is a {type(model).__module__}.{type(model).__name__}",
            rule="it must be an amici.AMICI or what amici_eval.load_model returns",
            fix="load it with amici_eval.load_model(model_uri)",
        )
    setup, fields = registry["setup_args"], registry["field_registries"]
    training = None
    if model.adata is not adata:
        training = describe_training_data(
            model.adata, coord_obsm_key=setup["coord_obsm_key"], layer=setup["layer"], with_digest=False
        )
    rows = getattr(model, "train_indices_", None)
    names = model.adata.obs_names.astype(str).to_numpy()
    return ModelCard(
        n_heads=int(model.module.n_heads),
        n_neighbors=int(setup["n_neighbors"] or model.n_neighbors),
        genes=tuple(str(gene) for gene in fields["X"]["state_registry"]["column_names"]),
        cell_types=tuple(str(label) for label in fields["labels"]["state_registry"]["categorical_mapping"]),
        labels_key=setup["labels_key"],
        coord_obsm_key=setup["coord_obsm_key"],
        layer=setup["layer"],
        cell_radius_key=setup.get("cell_radius_key"),
        versions=package_versions(),
        training_data=training,
        training_cells=None if rows is None else frozenset(names[np.asarray(rows)].tolist()),
    )
