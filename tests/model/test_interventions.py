from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from amici_eval.model.engines.hooked import added_hook, eval_mode_on, keep_heads

pytestmark = pytest.mark.amici


@pytest.fixture
def module(trained):
    return trained.build_module()


@pytest.fixture
def tensors(trained):
    """Twenty receivers with random neighbours."""
    card = trained.card
    generator = torch.Generator().manual_seed(0)
    return {
        "X": torch.rand(20, len(card.genes), generator=generator),
        "labels": torch.randint(len(card.cell_types), (20, 1), generator=generator),
        "nn_x": torch.rand(20, card.n_neighbors, len(card.genes), generator=generator),
        "nn_dist": 20 * torch.rand(20, card.n_neighbors, generator=generator),
    }


def predict(module, tensors):
    with torch.no_grad():
        return module(tensors, compute_loss=False)[1]["prediction"]


class Counter:
    """A hook that counts its calls and changes nothing."""

    def __init__(self):
        self.calls = 0

    def __call__(self, activation, hook):
        self.calls += 1


@pytest.mark.parametrize("raises", [False, True])
def test_only_its_own_hook_is_removed(module, tensors, raises):
    point = module.attention_layer.hook_pattern
    normal, permanent, own, meanwhile = Counter(), Counter(), Counter(), Counter()
    point.add_hook(normal)
    point.add_perma_hook(permanent)
    handles = list(point.fwd_hooks)

    def body():
        with added_hook(point, own):
            assert len(point.fwd_hooks) == 3
            predict(module, tensors)
            point.add_hook(meanwhile)
            if raises:
                raise ZeroDivisionError("the body failed")

    with pytest.raises(ZeroDivisionError, match="the body failed") if raises else nullcontext():
        body()
    assert point.fwd_hooks[:2] == handles
    assert len(point.fwd_hooks) == len(point._forward_hooks) == 3
    predict(module, tensors)
    assert (normal.calls, permanent.calls, own.calls, meanwhile.calls) == (2, 2, 1, 1)


def test_nested_hooks_leave_in_any_order(module, tensors):
    point = module.attention_layer.hook_pattern
    outer, inner = Counter(), Counter()
    first, second = added_hook(point, outer), added_hook(point, inner)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    predict(module, tensors)
    second.__exit__(None, None, None)
    predict(module, tensors)
    assert (outer.calls, inner.calls) == (0, 1)
    assert not point.fwd_hooks
    assert not point._forward_hooks


def test_a_body_that_clears_all_hooks_does_no_harm(module):
    point = module.attention_layer.hook_pattern
    with added_hook(point, Counter()):
        module.reset_hooks()
    assert not point.fwd_hooks
    assert not point._forward_hooks


def test_callers_hook_works_on_the_pattern_before_the_ablation(module, tensors):
    seen = []
    module.attention_layer.hook_pattern.add_hook(lambda pattern, hook: seen.append(pattern.clone()))
    full = predict(module, tensors)
    with keep_heads(module, (0,)):
        ablated = predict(module, tensors)
    assert torch.equal(seen[0], seen[1])
    assert not torch.allclose(full, ablated)
    assert torch.equal(predict(module, tensors), full)


def test_no_head_is_the_same_as_a_pattern_of_zeros(module, tensors):
    def zeros(pattern, hook):
        return torch.zeros_like(pattern)

    def to_dummy(pattern, hook):
        pattern = torch.zeros_like(pattern)
        pattern[..., -1] = 1.0
        return pattern

    with keep_heads(module, ()):
        none = predict(module, tensors)
    point = "attention_layer.hook_pattern"
    with torch.no_grad():
        by_hand = module.run_with_hooks(tensors, compute_loss=False, fwd_hooks=[(point, zeros)])[1]["prediction"]
        dummy = module.run_with_hooks(tensors, compute_loss=False, fwd_hooks=[(point, to_dummy)])[1]["prediction"]
    assert torch.equal(none, by_hand)
    assert torch.allclose(none, dummy, atol=1e-6)
    # what is left of a cell is its type: the neighbourhood plays no part any more
    for label in tensors["labels"].unique():
        rows = none[tensors["labels"][:, 0] == label]
        assert torch.allclose(rows, rows[:1].expand_as(rows), atol=1e-6)


def test_all_heads_by_none_or_by_name(module, tensors):
    full = predict(module, tensors)
    with keep_heads(module, None):
        assert not module.attention_layer.hook_pattern.fwd_hooks
        assert torch.equal(predict(module, tensors), full)
    with keep_heads(module, range(module.n_heads)):
        assert torch.equal(predict(module, tensors), full)


def test_kept_head_keeps_its_pattern_and_the_others_are_zero(module, tensors):
    cache = {}

    def look(values, hook):
        cache[hook.name] = values.clone()

    before = {}
    module.attention_layer.hook_pattern.add_hook(lambda pattern, hook: before.update(pattern=pattern.clone()))
    module.attention_layer.hook_z.add_hook(look)
    with keep_heads(module, [1]):
        predict(module, tensors)
    z = cache["attention_layer.hook_z"]
    head_axis = z.shape.index(module.n_heads, 1)
    assert torch.count_nonzero(z.select(head_axis, 0)) == 0
    assert torch.count_nonzero(z.select(head_axis, 1)) > 0
    assert torch.count_nonzero(before["pattern"][:, 0]) > 0


@pytest.mark.parametrize("raises", [False, True])
def test_training_flags_are_restored_one_by_one(module, raises):
    module.train()
    module.nn_embed.eval()
    module.attention_layer.hook_pattern.training = False
    flags = {name: part.training for name, part in module.named_modules()}
    assert set(flags.values()) == {True, False}

    def body():
        with eval_mode_on(module, "cpu"):
            assert not any(part.training for part in module.modules())
            if raises:
                raise ZeroDivisionError("the body failed")

    with pytest.raises(ZeroDivisionError, match="the body failed") if raises else nullcontext():
        body()
    assert {name: part.training for name, part in module.named_modules()} == flags


def test_no_autograd_graph_is_built(module, tensors):
    assert module(tensors, compute_loss=False)[1]["prediction"].requires_grad
    with eval_mode_on(module, "cpu"):
        assert not module(tensors, compute_loss=False)[1]["prediction"].requires_grad
    assert torch.is_grad_enabled()
    assert all(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_module_returns_to_its_device(module):
    with eval_mode_on(module, "cuda"):
        assert {parameter.device.type for parameter in module.parameters()} == {"cuda"}
    assert {parameter.device.type for parameter in module.parameters()} == {"cpu"}
