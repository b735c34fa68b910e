"""Backward hooks of a user's own on a model: they may read what goes back, and not change it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from trust_cases import images, net
from zennit.composites import EpsilonPlus as ZennitEpsilonPlus

from crp.attribution import CondAttribution
from crp.attributors import Gradient
from crp.composites import EpsilonPlus
from crp.errors import StateError

CHANGING = {
    "register_full_backward_hook": lambda module, inputs, outputs: (inputs[0] * 2,),
    "register_full_backward_pre_hook": lambda module, outputs: (outputs[0] * 2,),
}
CALLS: dict[str, Callable[[nn.Module], Any]] = {
    "ours": lambda model: CondAttribution(model)(images(), [{"y": 1}], EpsilonPlus()),
    "zennit's": lambda model: CondAttribution(model)(images(), [{"y": 1}], ZennitEpsilonPlus()),
    "none": lambda model: CondAttribution(model)(images(), [{"y": 1}, {"y": 2, "0": [0]}], None),
    "rows together": lambda model: CondAttribution(model)(images()[:1], [{"0": [i], "y": 1} for i in (0, 1, 2)]),
    "attributor": lambda model: Gradient(model)(images(), 1),
}


@pytest.mark.promise("Model", "A backward hook of a user's own that would change relevance is refused")
@pytest.mark.parametrize("kind", CHANGING)
@pytest.mark.parametrize("call", CALLS)
def test_hooks_that_change_what_goes_back_are_refused(
    kind: str, call: str, untouched: Callable[[nn.Module], Any]
) -> None:
    model = net()
    handle = getattr(model[3], kind)(CHANGING[kind])
    with untouched(model), pytest.raises(StateError, match=r"backward hook .* layer '3' \(Conv2d\) returns a tuple"):
        CALLS[call](model)
    handle.remove()
    CALLS[call](model)


@pytest.mark.parametrize("kind", CHANGING)
@pytest.mark.parametrize("call", CALLS)
def test_hooks_that_write_to_what_goes_back_are_refused(kind: str, call: str) -> None:
    def double(module: nn.Module, gradients: tuple[torch.Tensor, ...], *_: Any) -> None:
        gradients[0].mul_(2)

    model = net()
    getattr(model[3], kind)(double)
    with pytest.raises(StateError, match=r"backward hook .* layer '3' \(Conv2d\) writes to a gradient"):
        CALLS[call](model)


@pytest.mark.parametrize("kind", CHANGING)
@pytest.mark.parametrize("call", CALLS)
def test_hooks_that_read_what_goes_back_change_nothing(
    kind: str, call: str, untouched: Callable[[nn.Module], Any]
) -> None:
    model, seen = net(), list[Any]()
    expected = CALLS[call](copy.deepcopy(model))
    getattr(model[3], kind)(lambda module, gradients, *_: seen.append(gradients))
    with untouched(model):
        found = CALLS[call](model)
    assert seen
    assert torch.equal(getattr(found, "heatmap", found[0]), getattr(expected, "heatmap", expected[0]))


def test_a_hook_that_takes_itself_off_stays_off() -> None:
    model = net()
    handle = model[3].register_full_backward_hook(lambda *_: handle.remove())
    CALLS["ours"](model)
    assert not model[3]._backward_hooks
