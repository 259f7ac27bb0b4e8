"""Open a model on a tissue, by the engine and on the device of the settings."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from amici_eval.common.errors import DeviceError
from amici_eval.common.memory import memory_errors_explained
from amici_eval.model.cards import AMICI_SOURCES, card_of, package_versions
from amici_eval.model.engines.factored import FactoredAccess
from amici_eval.model.engines.hooked import HookedAccess, eval_mode_on, is_amici_module, why_not_factored

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from jaxtyping import Int64

    from amici_eval.common.model_card import ModelCard
    from amici_eval.data.tissue import Tissue
    from amici_eval.settings.evaluation import AblationSpec

logger = logging.getLogger(__name__)


def resolve_device(device: str) -> str:
    """Return the torch device for a setting; refuse one that is not available."""
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


def _other_sources(card: ModelCard) -> tuple[str, ...]:
    """Return a note if AMICI's sources differ from those with which the model was saved."""
    then, now = card.versions.get(AMICI_SOURCES), package_versions()[AMICI_SOURCES]
    if then in (None, now):
        return ()
    return (
        f"the sources of amici-st here (digest {now}) are not those with which the model was registered ({then}, "
        f"version {card.versions.get('amici-st')}): install those to be sure that the model computes what it did",
    )


def _own_tensors(model: Any, rows: Int64[np.ndarray, " cells"]) -> dict[str, torch.Tensor]:
    """Return the tensors of a live model's own loader, for classes that need more than AMICI's."""
    from amici_eval.model.training import data_loader_restored

    with data_loader_restored():
        loader = model._make_data_loader(adata=model.adata, indices=rows, batch_size=len(rows))
        (tensors,) = loader
    return dict(tensors)


@contextmanager
def open_access(model: Any, tissue: Tissue, spec: AblationSpec) -> Iterator[HookedAccess | FactoredAccess]:
    """Yield access to a model on a tissue by the engine of the settings, and restore the model's state.

    A model that the factored engine cannot follow (parts or hooks of its own) is opened by the hooked one, with a note.
    """
    device = resolve_device(spec.device)
    card = card_of(model, adata=getattr(model, "adata", None))
    module = model.build_module() if hasattr(model, "build_module") else model.module
    reason = why_not_factored(module) if spec.engine == "factored" else None
    notes: tuple[str, ...] = ()
    if reason is not None:
        notes = (f"evaluated by the hooked engine, through the model's own forward pass: {reason}",)
    notes += _other_sources(card)
    if tissue.fitted is None and getattr(model, "train_indices_", None) is not None:
        notes += (
            "which cells the model was fitted on is not known: it is bound to other cells than those of its split; say "
            "which it was trained on, by data.trained_on or DataSpec(trained_on=TrainedOnSpec(key=..., value=...))",
        )
    for note in notes:
        logger.warning("%s", note)
    with memory_errors_explained("the evaluation", device), eval_mode_on(module, device):
        hooked = HookedAccess(module, card, tissue, device=device, batch_size=spec.batch_size, notes=notes)
        if not is_amici_module(module) and tissue.adata is not None and tissue.adata is getattr(model, "adata", None):
            hooked.own_tensors = partial(_own_tensors, model)
        if spec.engine == "hooked" or reason is not None:
            yield hooked
        else:
            yield FactoredAccess(hooked, memory_bytes=spec.memory_bytes)
