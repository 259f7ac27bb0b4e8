"""How much memory a computation may take."""

from __future__ import annotations

import logging

import torch

from amici_eval.common.free_memory import available_memory, free_bytes

__all__ = ["memory_budget", "warn_of_budget"]

logger = logging.getLogger(__name__)

_SHARE = 0.25
_LEAST = 64 * 2**20


def memory_budget(asked: int | None, device: str) -> int:
    """Return the bytes that tables and chunks may take: what was asked for, or a quarter of what is free.

    Notes
    -----
    Of what is free at this moment: whoever computes beside has taken his share by then. More than is free is never
    returned, whatever was asked for, but for the 64 MiB without which there would be no work.
    """
    free = _free(device)
    if asked is not None:
        return min(asked, max(_LEAST, free))
    return max(_LEAST, int(_SHARE * free))


def warn_of_budget(asked: int | None, device: str) -> None:
    """Say so if more memory was asked for than is free."""
    free = _free(device)
    if asked is not None and asked > free:
        logger.warning(
            "ablation.memory_budget asks for %.3g GB, but %.3g GB are free on %s: that bounds tables and chunks",
            asked / 1e9,
            free / 1e9,
            device,
        )


def _free(device: str) -> int:
    # Apple's GPUs have the machine's memory
    found = free_bytes(device) if torch.device(device).type == "cuda" else None
    return available_memory() if found is None else found
