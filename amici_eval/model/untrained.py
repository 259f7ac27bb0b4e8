"""A model as it was before training: what two models have in common without having learned anything."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from amici_eval.model.checkpoint import TrainedAMICI

__all__ = ["untrained_like"]


def untrained_like(trained: TrainedAMICI, *, seed: int) -> TrainedAMICI:
    """Return a model of the same architecture with weights as before training, drawn anew."""
    import torch

    module = trained.build_module()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for part in module.modules():
            reset = getattr(part, "reset_parameters", None)
            if reset is not None:
                reset()
    weights = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    return replace(trained, weights=weights, history={})
