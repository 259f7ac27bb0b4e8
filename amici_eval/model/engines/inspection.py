"""Whether a module is an AMICI as it was written, so that the factored engine computes what it does."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["is_amici_module", "why_not_factored"]


def is_amici_module(module: Any) -> bool:
    """Return whether a module is of AMICI's own class, and not of a subclass or a variant."""
    from amici import AMICIModule

    return type(module) is AMICIModule


def why_not_factored(module: Any) -> str | None:
    """Say why a module needs its own forward pass, or ``None`` if its parts are AMICI's own and free of hooks."""
    from amici import AMICIModule
    from amici._components import AttentionBlock, ResNetMLP
    from torch import nn
    from transformer_lens.hook_points import HookPoint

    if not is_amici_module(module):
        return f"the module is a {type(module).__qualname__}, which may compute something else than AMICIModule"
    known = (
        AMICIModule, AttentionBlock, ResNetMLP, HookPoint, nn.Linear, nn.LayerNorm, nn.ReLU, nn.Sequential, nn.Dropout,
        nn.Embedding, nn.Identity,
    )  # fmt: skip
    for name, part in module.named_modules():
        if type(part) not in known:
            return f"its part {name} is a {type(part).__qualname__}, which AMICI itself does not use there"
        if any(method in vars(part) for method in ("forward", "inference", "generative")):
            return f"the forward pass of its part {name or 'module'} was replaced"
        if part._forward_hooks or part._forward_pre_hooks or getattr(part, "fwd_hooks", None):
            return f"it carries hooks of its own on {name or 'the module'}"
        if isinstance(part, nn.Sequential) and len(part) not in (2, 5):
            return f"its part {name} has {len(part)} layers"
    if any(parameter.dtype != torch.float32 for parameter in module.parameters()):
        return "its weights are not float32"
    return None
