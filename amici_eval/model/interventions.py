"""Interventions on attention heads: context managers that remove exactly the hooks they added."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from jaxtyping import Float
    from torch import Tensor

__all__ = ["added_hook", "eval_mode_on", "keep_heads"]


@contextmanager
def added_hook(point: Any, hook: Callable[..., Any]) -> Iterator[None]:
    """Run a body with one more forward hook on a TransformerLens ``HookPoint``.

    Parameters
    ----------
    point
        The hook point. Hooks that are on it already stay and run before the new one.
    hook
        Called as ``hook(activation, hook=point)``; what it returns replaces the activation.

    Notes
    -----
    ``HookedRootModule.hooks`` and ``run_with_hooks`` clear the hooks of the caller as well; this removes its own only,
    also when the body raises.
    """
    point.add_hook(hook)
    handle = point.fwd_hooks[-1]
    try:
        yield
    finally:
        handle.hook.remove()
        point.fwd_hooks = [other for other in point.fwd_hooks if other is not handle]


@contextmanager
def keep_heads(module: Any, heads: Collection[int] | None) -> Iterator[None]:
    """Zero the attention pattern of all heads but some while the body runs.

    Parameters
    ----------
    module
        An ``amici.AMICIModule``.
    heads
        The heads that stay; ``()`` ablates all, ``None`` changes nothing.

    Notes
    -----
    Zero attention to every neighbour and to the dummy token is the same state as full attention to the dummy token,
    whose value is 0. The layer norm behind the heads rescales, so one head kept alone is off the training distribution.
    """
    if heads is None:
        yield
        return
    ablated = sorted(set(range(module.n_heads)) - set(heads))

    def zero_ablated(
        pattern: Float[Tensor, "cells heads query keys"],
        hook: object,  # noqa: ARG001, RUF100 - TransformerLens passes it by name
    ) -> Float[Tensor, "cells heads query keys"]:
        pattern = pattern.clone()
        pattern[:, ablated] = 0.0
        return pattern

    with added_hook(module.attention_layer.hook_pattern, zero_ablated):
        yield


@contextmanager
def eval_mode_on(module: torch.nn.Module, device: str) -> Iterator[None]:
    """Run a body with the module in eval mode on a device and without autograd; afterwards all is as before.

    Parameters
    ----------
    module
        Any torch module; the training flag of each submodule is restored one by one.
    device
        Torch device name.
    """
    flags = [(part, part.training) for part in module.modules()]
    home = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    try:
        module.eval()
        if torch.device(device) != home:
            module.to(device)
        with torch.no_grad():
            yield
    finally:
        if torch.device(device) != home:
            module.to(home)
        for part, flag in flags:
            part.training = flag
