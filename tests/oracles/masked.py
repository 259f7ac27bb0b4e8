"""The model's own forward pass with the neighbours of some types masked out: slow, and literal."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from amici_eval.model.engines.hooked import added_hook

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence


def masking(masked: np.ndarray) -> Callable[..., torch.Tensor]:
    """Return a hook on attention scores that takes away those of some neighbours, shape (cells, neighbours)."""

    def hook(scores: torch.Tensor, hook: object) -> torch.Tensor:
        scores = scores.clone()
        # the dummy comes last and stays
        gone = torch.from_numpy(np.hstack([masked, np.zeros((len(masked), 1), dtype=bool)]))
        return scores.masked_fill(gone[:, None, None, :], -torch.inf)

    return hook


def predictions_without(
    access, rows: np.ndarray, sender: int, *, keeps: Sequence[Collection[int] | None]
) -> np.ndarray:
    """Return predictions of the hooked engine where nobody attends to neighbours of one type; batches must hold all."""
    masked = access.label_codes[access.neighbour_rows[rows]] == sender
    with added_hook(access.hooked.module.attention_layer.hook_attn_scores, masking(masked)):
        return access.hooked.predict(rows, keeps=keeps)
