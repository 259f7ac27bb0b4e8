"""What evaluation sees of a model on a tissue: predictions of any set of heads, and expression."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from amici_eval.errors import DeviceError
from amici_eval.model.checkpoint import TrainedAMICI, card_of
from amici_eval.model.interventions import eval_mode_on, keep_heads
from amici_eval.tissue import Tissue, check_sections

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from jaxtyping import Float32, Float64, Int64

    from amici_eval.specs import AblationSpec, ModelCard

__all__ = ["ModelAccess", "neighbours", "open_access", "resolve_device"]


class ModelAccess(Protocol):
    """A model on a tissue, as evaluation needs it; anything that has these can be evaluated."""

    card: ModelCard
    statistics_device: str
    """A torch device that has float64."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks on model and data."""
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


def resolve_device(device: str) -> str:
    """Return the torch device for a setting, or say why it cannot be had.

    Parameters
    ----------
    device
        ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.

    Raises
    ------
    DeviceError
        If the device is not there.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda"):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        number = int(device.partition(":")[2] or 0)
        if number >= count:
            raise DeviceError(
                value=f"ablation.device={device}",
                rule=f"PyTorch {torch.__version__} finds {count} CUDA devices here",
                fix="set ablation.device=auto or cpu, or install a PyTorch build for your CUDA",
            )
    if device == "mps" and not torch.backends.mps.is_available():
        raise DeviceError(
            value="ablation.device=mps", rule="PyTorch finds no Apple GPU here", fix="set ablation.device=auto or cpu"
        )
    return device


def neighbours(
    tissue: Tissue, card: ModelCard
) -> tuple[Int64[np.ndarray, "cells neighbours"], Float64[np.ndarray, "cells neighbours"]]:
    """Return rows and distances of each cell's neighbours, as AMICI itself finds them (nearest of other types)."""
    import pandas as pd
    from amici import AMICI
    from anndata import AnnData

    index = pd.RangeIndex(tissue.n_cells).astype(str)
    shell = AnnData(obs=pd.DataFrame({"label": tissue.labels.astype(str)}, index=index))
    shell.obsm["coordinates"] = tissue.coordinates
    if tissue.radii is not None:
        shell.obs["radius"] = tissue.radii
    AMICI._compute_nn(
        shell,
        coord_obsm_key="coordinates",
        index_key="index",
        dist_key="distance",
        n_neighbors=card.n_neighbors,
        labels_obs_key="label",
        cell_radius_key=None if tissue.radii is None else "radius",
    )
    return np.asarray(shell.obsm["index"], dtype=np.int64), np.asarray(shell.obsm["distance"], dtype=np.float64)


class HookedAccess:
    """The literal engine: each ablation is a forward pass of the model with hooks on its attention pattern."""

    def __init__(self, module: Any, card: ModelCard, tissue: Tissue, *, device: str, batch_size: int) -> None:
        self.card = card
        self.statistics_device = "cpu" if device == "mps" else device
        self._module = module
        self._tissue = tissue
        self._device = device
        self._batch_size = batch_size
        self._neighbours, self._distances = neighbours(tissue, card)
        if tissue.samples is not None:
            check_sections(tissue.samples, self._neighbours, tissue.coordinates)

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks on model and data."""
        return self._tissue.notes

    def receivers(self) -> dict[str, Int64[np.ndarray, " cells"]]:
        """Return the evaluated rows by cell type, in canonical order."""
        return self._tissue.receivers()

    def cell_names(self, rows: Int64[np.ndarray, " cells"]) -> list[str]:
        """Return the names of some cells."""
        return [str(name) for name in self._tissue.cell_names[rows]]

    def expression(self, rows: Int64[np.ndarray, " cells"]) -> Float32[np.ndarray, "cells genes"]:
        """Return the measured expression of some cells."""
        return self._tissue.expression(rows)

    def predict(
        self,
        rows: Int64[np.ndarray, " cells"],
        *,
        keeps: Sequence[Collection[int] | None],
        progress: Callable[[int], None] | None = None,
    ) -> Float32[np.ndarray, "keeps cells genes"]:
        """Return predicted expression under each ablation; ``None`` keeps all heads, ``()`` keeps none."""
        predictions = np.empty((len(keeps), len(rows), len(self.card.genes)), dtype=np.float32)
        for start in range(0, len(rows), self._batch_size):
            batch = rows[start : start + self._batch_size]
            tensors = self._tensors(batch)
            for row, heads in enumerate(keeps):
                with keep_heads(self._module, heads):
                    _, outputs = self._module(tensors, compute_loss=False)
                predictions[row, start : start + len(batch)] = outputs["prediction"].cpu().numpy()
                if progress is not None:
                    progress(len(batch))
        return predictions

    def _tensors(self, rows: Int64[np.ndarray, " cells"]) -> dict[str, torch.Tensor]:
        """Return what AMICI's own loader would hand the module for these receivers."""
        # neighbours of nearby receivers are the same cells: fetch each once
        cells, position = np.unique(self._neighbours[rows], return_inverse=True)
        around = self._tissue.expression(cells)[position.reshape(len(rows), -1)]
        tensors = {
            "X": torch.from_numpy(self._tissue.expression(rows)),
            "labels": torch.from_numpy(self._tissue.label_codes[rows][:, None]),
            "nn_x": torch.from_numpy(around),
            "nn_dist": torch.from_numpy(self._distances[rows].astype(np.float32)),
        }
        return {name: tensor.to(self._device) for name, tensor in tensors.items()}


@contextmanager
def open_access(model: Any, tissue: Tissue, spec: AblationSpec) -> Iterator[HookedAccess]:
    """Give access to a model on a tissue; the model leaves as it came.

    Parameters
    ----------
    model
        A :class:`~amici_eval.model.checkpoint.TrainedAMICI`, or a live ``amici.AMICI`` or subclass, whose training
        flags, device and hooks are restored when the body ends.
    tissue
        The checked tissue.
    spec
        Engine, device and batch size.

    Raises
    ------
    DeviceError
        If the device is not there.
    DataError
        If neighbours cross sections.
    """
    device = resolve_device(spec.device)
    if isinstance(model, TrainedAMICI):
        module, card = model.build_module(), model.card
    else:
        module, card = model.module, card_of(model, adata=model.adata)
    if tissue.renamed:
        # membership goes by name
        card = replace(card, training_cells=None)
    with eval_mode_on(module, device):
        yield HookedAccess(module, card, tissue, device=device, batch_size=spec.batch_size)
