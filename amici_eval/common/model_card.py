"""What the evaluation needs to know of a trained model, and of the tissue it was trained on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from amici_eval.common.errors import ModelFormatError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jaxtyping import UInt32, UInt64
    from numpy import ndarray


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Fingerprints:
    """Names of some cells, and hashes of their places and expression, by which they are recognised in other data."""

    names: tuple[str, ...]
    places: UInt32[ndarray, " cells"]
    expression: UInt64[ndarray, " cells"]


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """Facts of the tissue a model was trained on, to notice data of another kind later.

    ``n_cells``: training, validation and test cells together; ``digest``: of the AnnData's content, ``None`` if it was
    not needed; ``places``: digest of the coordinates whatever the order and names of cells; ``nn_distance``: median
    distance to the nearest other cell, in the unit of the coordinates; ``integer_valued``: all expression was whole
    numbers (counts).
    """

    n_cells: int
    digest: str | None
    places: str
    nn_distance: float
    integer_valued: bool


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What the evaluation needs to know of a trained AMICI besides its weights.

    ``genes`` and ``cell_types`` are in the order of the model's inputs and of its label codes; the keys are those that
    the AnnData was registered with; ``training_cells`` names the cells that the model was fitted on. ``training_data``,
    ``training_cells`` and ``fingerprints`` are ``None`` if they were not recorded, as for models of older versions.
    """

    n_heads: int
    n_neighbors: int
    genes: tuple[str, ...]
    cell_types: tuple[str, ...]
    labels_key: str
    coord_obsm_key: str
    layer: str | None = None
    cell_radius_key: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    training_data: TrainingData | None = None
    training_cells: frozenset[str] | None = None
    fingerprints: Fingerprints | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if len(set(self.genes)) < len(self.genes):
            twice = next(gene for gene in self.genes if self.genes.count(gene) > 1)
            raise ModelFormatError(
                value=f"the model was trained with gene {twice!r} more than once",
                rule="genes are matched by name, so such a model cannot be evaluated on any data",
                fix="call adata.var_names_make_unique() before setup_anndata, and train again",
            )
