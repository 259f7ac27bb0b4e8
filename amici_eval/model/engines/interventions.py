"""Interventions on attention heads: context managers that remove exactly the hooks they added."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from amici_eval.model.engines.attention import FAINT

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from jaxtyping import Float
    from torch import Tensor

__all__ = [
    "ablations_side_by_side",
    "added_hook",
    "eval_mode_on",
    "faint_attention_is_zero",
    "keep_heads",
    "plain_profiles",
]


@contextmanager
def added_hook(point: Any, hook: Callable[..., Any]) -> Iterator[None]:
    """Run a body with one more forward hook on a TransformerLens ``HookPoint``.

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
def ablations_side_by_side(module: Any, keeps: Sequence[Collection[int] | None]) -> Iterator[list[Tensor]]:
    """Compute several ablations in one forward pass while the body runs: each gets a query position of its own.

    Notes
    -----
    What lies before the attention pattern does not depend on the ablation, so it runs once.
    """
    kept = torch.zeros((module.n_heads, len(keeps)))
    for position, heads in enumerate(keeps):
        kept[list(range(module.n_heads)) if heads is None else list(heads), position] = 1.0
    outputs: list[Tensor] = []

    def spread(
        pattern: Float[Tensor, "cells heads query keys"],
        hook: object,  # noqa: ARG001, RUF100 - TransformerLens passes it by name
    ) -> Float[Tensor, "cells heads ablations keys"]:
        return pattern * kept.to(pattern.device)[None, :, :, None]

    def collect(
        output: Float[Tensor, "cells ablations embedding"],
        hook: object,  # noqa: ARG001, RUF100 - TransformerLens passes it by name
    ) -> Float[Tensor, "cells one embedding"]:
        outputs.append(output)
        return output[:, :1]

    with added_hook(module.attention_layer.hook_pattern, spread):
        with added_hook(module.attention_layer.hook_output, collect):
            yield outputs


@contextmanager
def faint_attention_is_zero(module: Any) -> Iterator[None]:
    """Give neighbours whose score lies far below the strongest no attention at all while the body runs.

    Notes
    -----
    Weights below ``exp(-80)`` would be denormal floats or close to it, with which processors compute 7 to 14 times
    slower (coordinates in pixels make nearly all weights so small). The processor's own flag that flushes them belongs
    to the whole process; this changes no flag, and no weight by more than 2e-35.
    """

    def cut(
        scores: Float[Tensor, "cells heads query keys"],
        hook: object,  # noqa: ARG001, RUF100 - TransformerLens passes it by name
    ) -> Float[Tensor, "cells heads query keys"]:
        strongest = scores.amax(dim=-1, keepdim=True)
        return scores.masked_fill(scores < strongest - FAINT, -torch.inf)

    with added_hook(module.attention_layer.hook_attn_scores, cut):
        yield


def plain_profiles(profiles: Tensor) -> Float[Tensor, "types genes"]:
    """Return mean profiles of cell types as float32, in the shape that dense expression gives them."""
    return profiles.reshape(len(profiles), -1).float()


@contextmanager
def eval_mode_on(module: torch.nn.Module, device: str) -> Iterator[None]:
    """Run a body with the module in eval mode on a device and without autograd; afterwards all is as before."""
    flags = [(part, part.training) for part in module.modules()]
    profiles = getattr(module, "ct_profiles", None)
    if profiles is not None:
        module.ct_profiles = plain_profiles(profiles)
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
        if profiles is not None:
            module.ct_profiles = profiles
        for part, flag in flags:
            part.training = flag
