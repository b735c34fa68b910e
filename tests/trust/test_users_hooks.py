"""Backward hooks of a user's own, on a model or on all modules: they may read what goes back, and not change it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
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
Register = Callable[[nn.Module, str, Callable[..., Any]], RemovableHandle]


@pytest.fixture(params=["of a layer", "of all modules"])
def register(request: pytest.FixtureRequest) -> Iterator[Register]:
    """Puts a hook on a module, or on all; taken off after the test."""
    handles = []

    def put(layer: nn.Module, kind: str, hook: Callable[..., Any]) -> RemovableHandle:
        if request.param == "of a layer":
            handles.append(getattr(layer, kind)(hook))
        else:
            on_all = getattr(nn.modules.module, kind.replace("register_", "register_module_"))
            handles.append(on_all(lambda module, *args: hook(module, *args) if module is layer else None))
        return handles[-1]

    yield put
    for handle in handles:
        handle.remove()


@pytest.mark.promise("Model", "A backward hook of a user's own that would change relevance is refused")
@pytest.mark.parametrize("kind", CHANGING)
@pytest.mark.parametrize("call", CALLS)
def test_hooks_that_change_what_goes_back_are_refused(
    kind: str, call: str, register: Register, untouched: Callable[[nn.Module], Any]
) -> None:
    model = net()
    handle = register(model[3], kind, CHANGING[kind])
    with untouched(model), pytest.raises(StateError, match=r"backward hook .* layer '3' \(Conv2d\) returns a tuple"):
        CALLS[call](model)
    handle.remove()
    CALLS[call](model)


@pytest.mark.parametrize("kind", CHANGING)
@pytest.mark.parametrize("call", CALLS)
def test_hooks_that_write_to_what_goes_back_are_refused(kind: str, call: str, register: Register) -> None:
    def double(module: nn.Module, gradients: tuple[torch.Tensor, ...], *_: Any) -> None:
        gradients[0].mul_(2)

    model = net()
    register(model[3], kind, double)
    with pytest.raises(StateError, match=r"backward hook .* layer '3' \(Conv2d\) writes to a gradient"):
        CALLS[call](model)


@pytest.mark.parametrize("kind", CHANGING)
@pytest.mark.parametrize("call", CALLS)
def test_hooks_that_read_what_goes_back_change_nothing(
    kind: str, call: str, register: Register, untouched: Callable[[nn.Module], Any]
) -> None:
    model, seen = net(), list[Any]()
    expected = CALLS[call](copy.deepcopy(model))
    register(model[3], kind, lambda module, gradients, *_: seen.append(gradients))
    with untouched(model):
        found = CALLS[call](model)
    assert seen
    assert torch.equal(getattr(found, "heatmap", found[0]), getattr(expected, "heatmap", expected[0]))


def test_a_hook_that_takes_itself_off_stays_off(register: Register) -> None:
    model, calls = net(), list[nn.Module]()
    hooks = model[3]._backward_hooks, nn.modules.module._global_backward_hooks

    def once(module: nn.Module, *_: Any) -> None:
        calls.append(module)
        handle.remove()

    handle = register(model[3], "register_full_backward_hook", once)
    assert any(hooks)
    CALLS["ours"](model)
    assert len(calls) == 1
    assert not any(hooks)


def test_hooks_on_all_modules_change_gradients_of_other_models_as_ever() -> None:
    """Such as those of a model that another thread trains meanwhile."""
    explained, other, seen = net(), net(), list[torch.Tensor]()
    data = images().requires_grad_()

    def gradient() -> torch.Tensor:
        with torch.enable_grad():
            return torch.autograd.grad(other(data).sum(), data)[0]

    def double(module: nn.Module, gradients: tuple[torch.Tensor, ...], *_: Any) -> Any:
        if module is explained[3]:
            seen.append(gradient())
        return (gradients[0] * 2,) if module is other[3] else None

    expected = 2 * gradient()
    handle = nn.modules.module.register_module_full_backward_hook(double)
    try:
        CALLS["ours"](explained)
    finally:
        handle.remove()
    assert [torch.equal(each, expected) for each in seen] == [True]
