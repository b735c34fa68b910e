"""Hooks of the engine: taps that keep what layers give, masks, and what arrives in a backward pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from crp.concepts import ChannelConcept
from crp.engine.backward import _keeping_first
from crp.engine.masks import apply_masks
from crp.engine.taps import Tap, tapped


def keep_first(grad: Tensor) -> Tensor:
    grad[:, 1:] = 0
    return grad


def double(grad: Tensor) -> Tensor:
    return grad * 2


def test_masks_are_applied_in_order_to_a_copy():
    grad = torch.ones(2, 3)
    found = apply_masks([keep_first, lambda g: g + 1], grad)
    assert found.tolist() == [[2, 1, 1]] * 2
    assert apply_masks([lambda g: g + 1, keep_first], grad).tolist() == [[2, 0, 0]] * 2
    assert grad.eq(1).all()
    assert apply_masks([], grad) is grad


def test_masks_of_an_expanded_gradient():
    """C12: all entries are one number in memory."""
    grad = torch.ones(1).expand(2, 3, 4)
    assert apply_masks([keep_first], grad).sum() == 8
    strided = torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last)
    assert apply_masks([ChannelConcept.mask_rf(1, {0: [5]})], strided)[1].nonzero().tolist() == [[0, 1, 1]]


@pytest.mark.parametrize(
    ("wrong", "got"), [(lambda g: None, "NoneType"), (lambda g: g[:1], r"\(1, 3\)"), (lambda g: 1, "int")]
)
def test_mask_that_gives_no_gradient(wrong, got):
    with pytest.raises(TypeError, match=rf"mask function .*lambda.* must return a gradient of \(2, 3\), not {got}"):
        apply_masks([keep_first, wrong], torch.ones(2, 3))


def test_what_arrives_first_is_kept_and_then_masked():
    arrived: dict[str, Tensor | None] = {}
    hook, first = _keeping_first(["a", "a#0"], [double], arrived), torch.ones(1, 2)
    assert hook(first).tolist() == [[2, 2]]
    assert hook(torch.zeros(1, 2)) is None
    assert set(arrived) == {"a", "a#0"} and all(gradient is first for gradient in arrived.values())
    assert _keeping_first(["a"], [], {})(first) is None


def test_tap_keeps_every_output_apart():
    layer, tap = nn.Linear(2, 2), Tap("name")
    handle = layer.register_forward_hook(tap, with_kwargs=True)
    x = torch.ones(1, 2, requires_grad=True)
    outputs = [layer(x), layer(input=2 * x)]
    handle.remove()
    assert len(tap.outputs) == 2
    for kept, output in zip(tap.outputs, outputs, strict=True):
        assert kept is not output
        assert torch.equal(kept, output)
    outputs[0].zero_()
    assert tap.outputs[0].any()
    (first, second) = torch.autograd.grad(outputs[1].sum(), tap.outputs, allow_unused=True)
    assert first is None
    assert second.tolist() == [[1, 1]]


@pytest.mark.parametrize("call", [lambda layer, x: layer(x), lambda layer, x: layer(input=x)])
def test_tap_of_a_layer_that_returns_its_input(call):
    layer, tap = nn.Identity(), Tap("name")
    layer.register_forward_hook(tap, with_kwargs=True)
    x = torch.ones(1, 2, requires_grad=True) * 1
    out = call(layer, x)
    (gradient,) = torch.autograd.grad((3 * out + 5 * x).sum(), tap.outputs)
    assert gradient.tolist() == [[3, 3]]


def test_taps_know_which_call_is_meant_and_go():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with tapped(model, {"0": "record", "0#1": "condition"}) as taps:
        assert taps["0"][1] is taps["0#1"][1]
        assert [number for number, _ in taps.values()] == [None, 1]
        for _ in range(3):
            model(torch.ones(1, 2))
    assert len(taps["0"][1].outputs) == 3
    assert taps["0#1"][1].call_meant(1, "condition") == 1
    assert not model[0]._forward_hooks
