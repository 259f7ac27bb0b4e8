"""Checks of the tissue that a model was trained on, and fingerprints of its cells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from amici_eval.common.errors import DataError
from amici_eval.common.model_card import Fingerprints, ModelCard
from amici_eval.data.matrices import open_rows
from amici_eval.data.membership import expression_prints, place_prints
from amici_eval.data.tissue import Tissue, prepare
from amici_eval.model.allow_list import values_of
from amici_eval.settings.evaluation import DataSpec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from anndata import AnnData
    from jaxtyping import Int64
    from torch import Tensor

__all__ = ["TrainingTissue", "training_tissue"]

_PROFILE_TOLERANCE, _SAME_PROFILE = 1e-3, 1e-5
_MOST_PARTS = 100


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingTissue:
    """A tissue that holds the training cells, and their ``rows`` in the order of training."""

    tissue: Tissue
    rows: Int64[np.ndarray, " trained"]

    def fingerprints(self, splits: Mapping[str, Any], genes: tuple[str, ...]) -> dict[str, Fingerprints]:
        """Return names and fingerprints of the cells of each split, given as positions in ``rows``."""
        tissue = self.tissue
        places = place_prints(tissue.coordinates)
        expression = expression_prints(open_rows(tissue.matrix), tissue.gene_columns, genes)
        cells = {
            split: self.rows[np.asarray([] if rows is None else rows, dtype=np.int64)] for split, rows in splits.items()
        }
        return {
            split: Fingerprints(
                names=tuple(map(str, tissue.cell_names[own])), places=places[own], expression=expression[own]
            )
            for split, own in cells.items()
        }


def training_tissue(
    adata: AnnData,
    registry: Mapping[str, Any],
    genes: list[str],
    weights: Mapping[str, Tensor],
    part: Int64[np.ndarray, " trained"] | None,
    n_split: int,
) -> TrainingTissue:
    """Return the tissue and cells of training; refuse another number, other genes or mean profiles.

    Splits are row numbers in the training AnnData: with another one they would name the wrong cells.
    """
    setup = registry["setup_args"]
    # a live model that was bound to another AnnData records that one's number of cells
    n_bound = registry["field_registries"]["X"]["summary_stats"]["n_cells"]
    rows = np.arange(adata.n_obs) if part is None else part
    n_cells = n_split or n_bound
    fix = "give the AnnData the model was trained on, cells in the same order"
    if len(rows) not in (n_cells, n_bound):
        chosen = "" if part is None else ", of which trained_on chooses " + str(len(rows))
        raise DataError(
            value=f"the data has {adata.n_obs} cells{chosen}",
            rule=f"the model was trained on {n_cells}",
            fix=fix + ("" if part is not None else _a_part_of(adata, n_cells)),
        )
    # cells that are not as many as in the split may be of another AnnData that the model was bound to
    tolerance = _PROFILE_TOLERANCE if len(rows) == n_cells else _SAME_PROFILE
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
        own = rows[tissue.label_codes[rows] == code]
        if len(own) == 0:
            continue
        gap = np.abs(_mean_profile(tissue, own) - profiles[code])
        if (gap > tolerance * np.maximum(1.0, np.abs(profiles[code]))).any():
            raise DataError(
                value=f"mean expression of type {label!r} differs by up to {gap.max():.3g} from the profile in "
                "the model",
                rule="the model stores the mean profiles of its training data",
                fix=fix + ("" if part is not None else _a_part_of(adata, n_cells)),
            )
    return TrainingTissue(tissue=tissue, rows=rows)


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
