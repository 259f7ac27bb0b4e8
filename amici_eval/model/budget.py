"""How much memory a computation may take."""

from __future__ import annotations

import torch

from amici_eval.files import available_memory

__all__ = ["memory_budget"]

_SHARE = 0.25
_LEAST = 64 * 2**20


def memory_budget(asked: int | None, device: str) -> int:
    """Return the bytes that tables and chunks may take: what was asked for, or a quarter of what is free.

    Parameters
    ----------
    asked
        ``ablation.memory_budget`` in bytes, or ``None``.
    device
        Torch device of the tables.
    """
    if asked is not None:
        return asked
    cuda = torch.device(device).type == "cuda"
    free = int(torch.cuda.mem_get_info(torch.device(device))[0]) if cuda else available_memory()
    return max(_LEAST, int(_SHARE * free))
