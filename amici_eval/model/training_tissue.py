"""Whether an AnnData is the one that a model was trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from amici_eval.errors import DataError
from amici_eval.model.plain import values_of
from amici_eval.model_card import ModelCard
from amici_eval.specs import DataSpec
from amici_eval.tissue import Tissue, prepare

if TYPE_CHECKING:
    from collections.abc import Mapping

    from anndata import AnnData
    from torch import Tensor

__all__ = ["check_is_training_data"]

_PROFILE_TOLERANCE = 1e-3


def check_is_training_data(
    adata: AnnData, registry: Mapping[str, Any], genes: list[str], weights: Mapping[str, Tensor]
) -> None:
    """Refuse an AnnData whose size, genes or mean profiles are not those the model was trained on.

    Splits are row numbers in the training AnnData: with another one they would name the wrong cells.
    """
    fix = "give the AnnData the model was trained on, cells in the same order"
    setup = registry["setup_args"]
    n_cells = registry["field_registries"]["X"]["summary_stats"]["n_cells"]
    if adata.n_obs != n_cells:
        raise DataError(value=f"the data has {adata.n_obs} cells", rule=f"the model was trained on {n_cells}", fix=fix)
    profiles = weights["ct_profiles"].detach().cpu().double().numpy()
    labels = [
        str(label)
        for label in values_of(registry["field_registries"]["labels"]["state_registry"]["categorical_mapping"])
    ]
    card = ModelCard(
        n_heads=1,
        n_neighbors=1,
        genes=tuple(genes),
        cell_types=tuple(labels),
        labels_key=setup["labels_key"],
        coord_obsm_key=setup["coord_obsm_key"],
        layer=setup["layer"],
        cell_radius_key=setup.get("cell_radius_key"),
    )
    tissue = prepare(adata, card, DataSpec())
    for code, label in enumerate(labels):
        rows = np.flatnonzero(tissue.label_codes == code)
        if len(rows) == 0:
            continue
        gap = float(np.abs(_mean_profile(tissue, rows) - profiles[code]).max())
        if gap > _PROFILE_TOLERANCE * max(1.0, float(np.abs(profiles[code]).max())):
            raise DataError(
                value=f"mean expression of type {label!r} differs by up to {gap:.3g} from the profile in the model",
                rule="the model stores the mean profiles of its training data",
                fix=fix,
            )


def _mean_profile(tissue: Tissue, rows: np.ndarray) -> np.ndarray:
    total = np.zeros(tissue.expression(rows[:1]).shape[1])
    for start in range(0, len(rows), 4096):
        total += tissue.expression(rows[start : start + 4096]).astype(np.float64).sum(axis=0)
    return total / len(rows)
