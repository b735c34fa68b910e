"""Backward hooks of a user's own, on modules, tensors or the graph: they may read what goes back, and not change it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.graph import register_multi_grad_hook
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle
from trust_cases import images, net
from zennit.composites import EpsilonPlus as ZennitEpsilonPlus
from zennit.core import BasicHook
from zennit.rules import Epsilon

from crp.attribution import CondAttribution
from crp.attributors import Gradient
from crp.composites import EpsilonPlus
from crp.errors import StateError
from crp.hooks import MaskHook

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


# --- hooks that are put on while the model runs ---------------------------------------------------------------------


def twice(*gradients: Any) -> Any:
    given = gradients[0]
    return tuple(None if each is None else 2 * each for each in given) if isinstance(given, tuple) else 2 * given


def double(gradients: Any) -> None:
    for gradient in gradients:
        gradient.mul_(2)


def on_input(hook: Callable[..., Any]) -> Callable[[nn.Module, torch.Tensor], Any]:
    return lambda module, y: y.grad_fn.next_functions[0][0].register_hook(hook)


#: Each puts a hook on, given a module and its output.
IN_FORWARD: dict[str, Callable[[nn.Module, torch.Tensor], Any]] = {
    "tensor": lambda module, y: y.register_hook(twice),
    "tensor, written to": lambda module, y: y.register_hook(double),
    "node": lambda module, y: y.grad_fn.register_hook(twice),
    "node, before it": lambda module, y: y.grad_fn.register_prehook(twice),
    "node, written to": lambda module, y: y.grad_fn.register_prehook(lambda gradients: double(gradients)),
    "node below": on_input(twice),
    "several tensors": lambda module, y: register_multi_grad_hook([y], double),
    "any of several tensors": lambda module, y: register_multi_grad_hook([y], double, mode="any"),
}


class Putting(nn.Module):
    """Puts a hook on its output, where anybody asks for a gradient."""

    def __init__(self, put: Callable[[nn.Module, torch.Tensor], Any]) -> None:
        super().__init__()
        self.put = put

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * 1
        if y.requires_grad:
            self.put(self, y)
        return y


def putting(put: Callable[[nn.Module, torch.Tensor], Any]) -> nn.Module:
    model = net()
    model[4] = Putting(put).eval()
    return model


@pytest.mark.promise(
    "Model", "A hook on a tensor inside a model, or on its graph, that would change relevance is refused"
)
@pytest.mark.parametrize("kind", IN_FORWARD)
@pytest.mark.parametrize("call", CALLS)
def test_hooks_of_the_forward_pass_that_change_what_goes_back_are_refused(
    kind: str, call: str, untouched: Callable[[nn.Module], Any]
) -> None:
    model = putting(IN_FORWARD[kind])
    does = "writes to a gradient" if "several" in kind or "written" in kind else "returns a (tuple|Tensor)"
    with untouched(model), pytest.raises(StateError, match=rf"backward hook on layer '4' \(Putting\) {does}.*training"):
        CALLS[call](model)


@pytest.mark.parametrize("call", CALLS)
def test_a_hook_that_a_call_puts_on_a_parameter_beside_the_model_goes_on_in_training(call: str) -> None:
    """On the node that adds its gradient up, which no relevance goes through."""
    parameter = nn.Parameter(torch.ones(()))
    node = parameter.expand_as(parameter).grad_fn.next_functions[0][0]
    put = list[Any]()
    model = putting(lambda module, y: put or put.append(node.register_prehook(twice)))
    CALLS[call](model)
    assert put
    (3 * parameter).backward()
    assert parameter.grad == 6


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("returned", ["none", "the gradient itself"])
def test_hooks_of_the_forward_pass_that_read_change_nothing(call: str, returned: str) -> None:
    seen = list[Any]()

    def read(*gradients: Any) -> Any:
        seen.append(gradients)
        return None if returned == "none" else gradients[0]

    def put(module: nn.Module, y: torch.Tensor) -> None:
        y.retain_grad()
        y.register_hook(read)
        y.grad_fn.register_hook(read)
        y.grad_fn.register_prehook(read)
        register_multi_grad_hook([y], lambda gradients: seen.append(gradients))
        y.register_hook(twice).remove()

    expected, found = CALLS[call](putting(lambda module, y: None)), CALLS[call](putting(put))
    assert len(seen) % 4 == 0
    assert seen
    assert torch.equal(getattr(found, "heatmap", found[0]), getattr(expected, "heatmap", expected[0]))


@pytest.mark.parametrize("call", CALLS)
def test_hooks_that_a_forward_hook_puts_on_are_refused(call: str) -> None:
    model = net()
    handle = model[3].register_forward_hook(
        lambda module, args, output: output.register_hook(twice) and None if output.requires_grad else None
    )
    with pytest.raises(StateError, match=r"backward hook on layer '3' \(Conv2d\) returns a Tensor"):
        CALLS[call](model)
    handle.remove()
    CALLS[call](model)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", CHANGING)
def test_backward_hooks_that_a_model_puts_on_its_modules_are_refused(call: str, kind: str) -> None:
    model = net()
    model[4] = Putting(lambda module, y: getattr(model[5], kind)(CHANGING[kind])).eval()
    with pytest.raises(StateError, match=r"backward hook on layer '5' \(Flatten\) returns a tuple"):
        CALLS[call](model)


@pytest.mark.parametrize("composite", [EpsilonPlus(), None], ids=["ours", "none"])
def test_hooks_between_checkpoints_are_refused(composite: Any) -> None:
    class Checkpointed(nn.Sequential):
        def forward(self, x: torch.Tensor) -> Any:
            return checkpoint(super().forward, x, use_reentrant=False)

    attribution = CondAttribution(Checkpointed(*putting(IN_FORWARD["tensor"])).eval())
    with pytest.raises(StateError, match=r"backward hook on layer '4' \(Putting\) returns a Tensor"):
        attribution(images(), [{"y": 1}], composite)


def test_hooks_by_hand_act_as_ever_without_a_call() -> None:
    """As masks do that users of zennit put on tensors by hand; also after a call on the same model."""
    model, data = putting(IN_FORWARD["tensor"]), images().requires_grad_()
    for composite in (ZennitEpsilonPlus(), EpsilonPlus()):
        with pytest.raises(StateError, match="backward hook"):
            CondAttribution(model)(data.detach(), [{"y": 1}], composite)
        relevances = []
        for one in (model, putting(lambda module, y: None)):
            with composite.context(one) as modified:
                relevances.append(torch.autograd.grad(modified(data)[:, 1].sum(), data)[0])
        assert torch.equal(relevances[0], 2 * relevances[1])


def test_a_hook_on_what_is_beside_the_model_acts_as_ever_afterwards() -> None:
    beside = torch.ones(1, requires_grad=True, dtype=torch.float64)
    CondAttribution(putting(lambda module, y: beside.register_hook(twice)))(images(), [{"y": 1}], EpsilonPlus())
    assert torch.autograd.grad(3 * beside, beside)[0] > 3


def test_rules_and_masks_in_zennits_protocol_act() -> None:
    class Twice(BasicHook):
        """A rule of a user's own, which hooks the graph as those of zennit do."""

        def backward(self, module: nn.Module, grad_input: Any, grad_output: Any) -> Any:
            return tuple(2 * each for each in grad_input)

    model, data = net(), images()
    plain = CondAttribution(model)(data, [{"y": 1}]).heatmap
    for hook in (Twice(), MaskHook([lambda gradient: 2 * gradient])):
        handles = hook.register(model[3])
        assert torch.equal(CondAttribution(model)(data, [{"y": 1}]).heatmap, 2 * plain)
        handles.remove()
    assert torch.equal(CondAttribution(model)(data, [{"y": 1}]).heatmap, plain)
    assert not torch.equal(CondAttribution(model)(data, [{"y": 1}], ZennitEpsilonPlus()).heatmap, plain)
    handles = Epsilon().register(model[3])
    CondAttribution(model)(data, [{"y": 1}])
    handles.remove()
