"""What evaluation sees of a model on a tissue: predictions of any set of heads, and expression."""

from __future__ import annotations

from contextlib import nullcontext
from copy import copy
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from amici_eval.common.errors import ModelFormatError
from amici_eval.data.shared_matrices import sent
from amici_eval.data.tissue import Tissue, check_sections, keep_away_from_training
from amici_eval.model.engines.inspection import is_amici_module
from amici_eval.model.engines.interventions import (
    ablations_side_by_side,
    faint_attention_is_zero,
    keep_heads,
)
from amici_eval.stats.shrinking import Shrinking

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from jaxtyping import Bool, Float32, Float64, Int64

    from amici_eval.common.model_card import ModelCard
    from amici_eval.data.tissue import ExpressionBlock

__all__ = ["HookedAccess", "ModelAccess", "neighbours"]


class ModelAccess(Protocol):
    """A model on a tissue, as evaluation needs it; anything that has these can be evaluated."""

    card: ModelCard
    statistics_device: str
    """A torch device that has float64."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks on model and data."""
        ...

    @property
    def fitted(self) -> Bool[np.ndarray, " all_cells"] | None:
        """Which cells of the tissue the model was fitted on; ``None`` if that is not known."""
        ...

    def receivers(self) -> dict[str, Int64[np.ndarray, " cells"]]:
        """Return the evaluated rows by cell type, in canonical order."""
        ...

    def cell_names(self, rows: Int64[np.ndarray, " cells"]) -> list[str]:
        """Return the names of some cells."""
        ...

    def expression(self, rows: Int64[np.ndarray, " cells"]) -> Float32[np.ndarray, "cells genes"]:
        """Return the measured expression of some cells."""
        ...

    def predict(
        self,
        rows: Int64[np.ndarray, " cells"],
        *,
        keeps: Sequence[Collection[int] | None],
        progress: Callable[[int], None] | None = None,
    ) -> Float32[np.ndarray, "keeps cells genes"]:
        """Return predicted expression under each ablation; ``None`` keeps all heads, ``()`` keeps none."""
        ...


def neighbours(
    tissue: Tissue, card: ModelCard
) -> tuple[Int64[np.ndarray, "cells neighbours"], Float64[np.ndarray, "cells neighbours"]]:
    """Return rows and distances of each cell's neighbours, as AMICI itself finds them (nearest of other types).

    Cells are sorted by name for it: between cells at equal distance AMICI decides by the order of rows.
    """
    import pandas as pd
    from amici import AMICI
    from anndata import AnnData

    index, order = pd.RangeIndex(tissue.n_cells).astype(str), tissue.order
    shell = AnnData(obs=pd.DataFrame({"label": tissue.labels[order].astype(str)}, index=index))
    shell.obsm["coordinates"] = tissue.coordinates[order]
    if tissue.radii is not None:
        shell.obs["radius"] = tissue.radii[order]
    AMICI._compute_nn(
        shell,
        coord_obsm_key="coordinates",
        index_key="index",
        dist_key="distance",
        n_neighbors=card.n_neighbors,
        labels_obs_key="label",
        cell_radius_key=None if tissue.radii is None else "radius",
    )
    place = np.argsort(order)
    return order[shell.obsm["index"][place]], np.asarray(shell.obsm["distance"], dtype=np.float64)[place]


class HookedAccess:
    """The literal engine: each ablation is a forward pass of the model with hooks on its attention pattern.

    Parameters
    ----------
    module, card, tissue
        The model on the tissue, which loses evaluated cells here if a buffer was asked for.
    device
        Torch device of the module.
    batch_size
        Receivers per forward pass.
    notes
        Remarks besides those of the tissue.
    """

    engine = "hooked"

    def __init__(
        self,
        module: Any,
        card: ModelCard,
        tissue: Tissue,
        *,
        device: str,
        batch_size: int,
        notes: tuple[str, ...] = (),
    ) -> None:
        self.card = card
        self.statistics_device = "cpu" if device == "mps" else device
        self.module = module
        self.device = device
        self._batch = Shrinking(batch_size, what="the model's forward pass", unit="receivers", device=device)
        self._notes = notes
        self.own_tensors: Callable[[Int64[np.ndarray, " cells"]], dict[str, torch.Tensor]] | None = None
        rows, distances = neighbours(tissue, card)
        self.neighbour_rows, self.distances = rows.astype(np.int32), distances.astype(np.float32)
        if tissue.sections is not None:
            check_sections(tissue.sections, rows, tissue.coordinates)
        self.tissue = keep_away_from_training(tissue, rows)

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks on model and data."""
        return (*self.tissue.notes, *self._notes)

    @property
    def fitted(self) -> Bool[np.ndarray, " all_cells"] | None:
        """Which cells of the tissue the model was fitted on; ``None`` if that is not known."""
        return self.tissue.fitted

    def receivers(self) -> dict[str, Int64[np.ndarray, " cells"]]:
        """Return the evaluated rows by cell type, in canonical order."""
        return self.tissue.receivers()

    def cell_names(self, rows: Int64[np.ndarray, " cells"]) -> list[str]:
        """Return the names of some cells."""
        return [str(name) for name in self.tissue.cell_names[rows]]

    def expression(self, rows: Int64[np.ndarray, " cells"]) -> Float32[np.ndarray, "cells genes"]:
        """Return the measured expression of some cells."""
        return self.tissue.expression(rows)

    def expression_blocks(self, rows: Int64[np.ndarray, " cells"]) -> Iterator[ExpressionBlock]:
        """Yield the measured expression of some cells, block by block, in the order of storage."""
        return self.tissue.expression_blocks(rows)

    def coordinates(self, rows: Int64[np.ndarray, " cells"]) -> Float64[np.ndarray, "cells dimensions"]:
        """Return where some cells lie."""
        return self.tissue.coordinates[rows]

    def samples(self, rows: Int64[np.ndarray, " cells"]) -> np.ndarray | None:
        """Return the section of some cells, if a sample column was named."""
        return None if self.tissue.samples is None else self.tissue.samples[rows]

    @property
    def label_codes(self) -> Int64[np.ndarray, " all_cells"]:
        """The model's code of each cell's type."""
        return self.tissue.label_codes

    def predict(
        self,
        rows: Int64[np.ndarray, " cells"],
        *,
        keeps: Sequence[Collection[int] | None],
        progress: Callable[[int], None] | None = None,
    ) -> Float32[np.ndarray, "keeps cells genes"]:
        """Return predicted expression under each ablation; ``None`` keeps all heads, ``()`` keeps none."""
        predictions = np.empty((len(keeps), len(rows), len(self.card.genes)), dtype=np.float32)
        start = 0
        while start < len(rows):
            tensors = self._batch.run(partial(self._tensors_from, rows, start))
            n_own = len(tensors["labels"])
            for row, heads in enumerate(keeps):
                done = 0
                while done < n_own:
                    # fewer of the batch at a time where memory ends in one of the passes
                    predicted = self._batch.run(partial(self._forward, tensors, heads, done))
                    predictions[row, start + done : start + done + len(predicted)] = predicted
                    done += len(predicted)
                if progress is not None:
                    progress(n_own)
            start += n_own
        return predictions

    def _forward(
        self, tensors: dict[str, torch.Tensor], heads: Collection[int] | None, start: int, size: int
    ) -> Float32[np.ndarray, "cells genes"]:
        part = {name: tensor[start : start + size] for name, tensor in tensors.items()}
        # other classes may do something else with their scores than a softmax
        cut = faint_attention_is_zero(self.module) if is_amici_module(self.module) else nullcontext()
        try:
            with cut, keep_heads(self.module, heads):
                _, outputs = self.module(part, compute_loss=False)
        except KeyError as error:
            raise ModelFormatError(
                value=f"the forward pass of {type(self.module).__qualname__} asks for {error}",
                rule=f"on other data than the model's own it is given {', '.join(part)}",
                fix="evaluate the live model on its own AnnData: amici_eval.evaluate(model, model.adata)",
            ) from error
        predicted = outputs["prediction"]
        if len(self.card.genes) == 1:
            # AMICI squeezes the profile of a lone gene to one dimension: column j has that of cell j
            predicted = predicted.diagonal()[:, None]
        found: Float32[np.ndarray, "cells genes"] = predicted.cpu().numpy()
        return found

    def predict_side_by_side(
        self, rows: Int64[np.ndarray, " cells"], *, keeps: Sequence[Collection[int] | None]
    ) -> Float32[np.ndarray, "keeps cells genes"]:
        """Return what :meth:`predict` does, from one forward pass for all ablations; for checks on a few cells."""
        predictions = np.empty((len(keeps), len(rows), len(self.card.genes)), dtype=np.float32)
        start = 0
        while start < len(rows):
            predicted = self._batch.run(partial(self._forward_side_by_side, rows, keeps, start))
            predictions[:, start : start + predicted.shape[1]] = predicted
            start += predicted.shape[1]
        return predictions

    def _forward_side_by_side(
        self, rows: Int64[np.ndarray, " cells"], keeps: Sequence[Collection[int] | None], start: int, size: int
    ) -> Float32[np.ndarray, "keeps cells genes"]:
        tensors = self._tensors(rows[start : start + size])
        with faint_attention_is_zero(self.module), ablations_side_by_side(self.module, keeps) as outputs:
            self.module(tensors, compute_loss=False)
        profile = self.module.ct_profiles[tensors["labels"].squeeze(-1)][:, None]
        predicted = profile + self.module.linear_head(outputs[0])
        found: Float32[np.ndarray, "keeps cells genes"] = predicted.transpose(0, 1).cpu().numpy()
        return found

    def to_send(self) -> HookedAccess:
        """Return the same without what only an AnnData has and without the names of training cells."""
        other = copy(self)
        other.card = replace(self.card, training_cells=None, fingerprints=None)
        other.tissue = replace(self.tissue, matrix=sent(self.tissue.matrix), adata=None)
        return other

    def _tensors_from(self, rows: Int64[np.ndarray, " cells"], start: int, size: int) -> dict[str, torch.Tensor]:
        return self._tensors(rows[start : start + size])

    def _tensors(self, rows: Int64[np.ndarray, " cells"]) -> dict[str, torch.Tensor]:
        """Return what AMICI's own loader would hand the module for these receivers."""
        if self.own_tensors is not None:
            return {name: tensor.to(self.device) for name, tensor in self.own_tensors(rows).items()}
        # neighbours of nearby receivers are the same cells: fetch each once
        cells, position = np.unique(self.neighbour_rows[rows], return_inverse=True)
        around = self.tissue.expression(cells)[position.reshape(len(rows), -1)]
        tensors = {
            "X": torch.from_numpy(self.tissue.expression(rows)),
            "labels": torch.from_numpy(self.tissue.label_codes[rows][:, None]),
            "nn_x": torch.from_numpy(around),
            "nn_dist": torch.from_numpy(self.distances[rows]),
        }
        return {name: tensor.to(self.device) for name, tensor in tensors.items()}
