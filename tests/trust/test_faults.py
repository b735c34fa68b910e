"""Whatever goes wrong during a call, at any entry point: 0 differences in the model, in torch, and in this package."""

from __future__ import annotations

import gc
import signal
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from trust_cases import CONDITIONS, ENTRIES, Stop, differences, images, net, state, stop, zennit_merged

from crp.attribution import CondAttribution
from crp.canonizers import MergeBatchNorm
from crp.composites import Composite, EpsilonPlus, EpsilonPlusFlat
from crp.rules import Rule


class Boom(Exception):
    """What goes wrong in these tests."""


class Raises(nn.Module):
    """Identity that raises an error in its forward or backward pass."""

    def __init__(self, error: Callable[[], None], backward: bool = False) -> None:
        super().__init__()
        self.error, self.backward = error, backward
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        if not self.backward:
            self.error()
            return x
        y = x * 1
        if y.requires_grad:
            y.register_hook(lambda _: self.error())
        return y


def boom() -> None:
    raise Boom


def out_of_memory() -> None:
    raise torch.OutOfMemoryError("out of memory")


def cpu_memory() -> None:
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory")


def signalled() -> None:
    signal.raise_signal(signal.SIGALRM)


def at_call(number: int, name: str) -> Callable[[], AbstractContextManager[Any]]:
    """Interrupt at the n-th call of a method of `nn.Module` by which things are put on it."""

    def made() -> AbstractContextManager[Any]:
        plain, calls = getattr(nn.Module, name), [0]

        def counted(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] == number:
                signalled()
            return plain(*args, **kwargs)

        return mock.patch.object(nn.Module, name, counted)

    return made


def at_removal(number: int) -> AbstractContextManager[Any]:
    """Interrupt at the n-th removal of a hook."""
    handle = torch.utils.hooks.RemovableHandle
    plain, calls = handle.remove, [0]

    def counted(self: Any) -> None:
        calls[0] += 1
        if calls[0] == number:
            signalled()
        plain(self)

    return mock.patch.object(handle, "remove", counted)


def with_layer(layer: nn.Module) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        model[4] = layer  # in place of a ReLU

    return change


def infinite(model: nn.Module) -> None:
    with torch.no_grad():
        model[3].weight[0, 0, 0, 0] = torch.inf


def few_outputs(model: nn.Module) -> None:
    model[6] = nn.Linear(48, 1).double().eval()


#: Of each fault: what it changes on the model, on the data, and around the call.
FAULTS: dict[str, tuple[Callable[[nn.Module], Any], Callable[[Tensor], Any], Callable[[], Any]]] = {
    "exception in forward": (with_layer(Raises(boom)), Tensor.clone, nullcontext),
    "exception in backward": (with_layer(Raises(boom, True)), Tensor.clone, nullcontext),
    "interrupt in forward": (with_layer(Raises(signalled)), Tensor.clone, nullcontext),
    "interrupt in backward": (with_layer(Raises(signalled, True)), Tensor.clone, nullcontext),
    "interrupt on entering": (nn.Module.eval, Tensor.clone, at_call(1, "register_forward_hook")),
    "interrupt on entering, later": (nn.Module.eval, Tensor.clone, at_call(2, "register_forward_hook")),
    "interrupt on entering, before": (nn.Module.eval, Tensor.clone, at_call(1, "register_forward_pre_hook")),
    "interrupt on leaving": (nn.Module.eval, Tensor.clone, lambda: at_removal(1)),
    "interrupt on leaving, later": (nn.Module.eval, Tensor.clone, lambda: at_removal(3)),
    "no memory on a GPU": (with_layer(Raises(out_of_memory)), Tensor.clone, nullcontext),
    "no memory": (with_layer(Raises(cpu_memory, True)), Tensor.clone, nullcontext),
    "nan in the data": (nn.Module.eval, lambda x: x * torch.nan, nullcontext),
    "infinite weight": (infinite, Tensor.clone, nullcontext),
    "wrong channels": (nn.Module.eval, lambda x: x[:, :1], nullcontext),
    "wrong size": (nn.Module.eval, lambda x: x[..., :5], nullcontext),
    "wrong type": (nn.Module.eval, Tensor.float, nullcontext),
    "no samples": (nn.Module.eval, lambda x: x[:0], nullcontext),
    "no_grad": (nn.Module.eval, Tensor.clone, torch.no_grad),
    "inference mode": (nn.Module.eval, Tensor.clone, torch.inference_mode),
    "training mode": (nn.Module.train, Tensor.clone, nullcontext),
    "frozen parameters": (lambda model: model.requires_grad_(False), Tensor.clone, nullcontext),
    "too few outputs": (few_outputs, Tensor.clone, nullcontext),
}


def test_there_are_22_faults():
    assert len(FAULTS) >= 22


@pytest.mark.promise(
    "Model",
    "After a call, and after an exception in whatever part of it, the model is what it was, bit for bit: values, "
    "flags, hooks, attributes. So are torch's global state, warnings and handlers of signals",
)
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("entry", ENTRIES)
def test_nothing_differs_after_a_fault(entry, fault):
    change_model, change_data, around = FAULTS[fault]
    if (entry, fault) == ("by hand", "training mode"):
        pytest.skip("a plain call in training mode is the user's own")
    model = net()
    change_model(model)
    data = change_data(images())
    previous = signal.signal(signal.SIGALRM, stop)
    try:
        before = state(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with suppress(Exception, Stop), ExitStack() as stack:
                stack.enter_context(around())
                ENTRIES[entry](model, data)
        gc.collect()
        assert differences(before | {"random": None}, state(model) | {"random": None}) == []
    finally:
        signal.signal(signal.SIGALRM, previous)


# --- faults of what is given ----------------------------------------------------------------------------------------


class RuleBoom(Rule):
    def check(self, module):
        """Accept every module."""

    def surrogate(self, layer, a):
        raise Boom


class NeverRegistered(RuleBoom):
    def attach(self, attachment):
        raise Boom


class CanonizerBoom(MergeBatchNorm):
    def register(self, root_module):
        super().register(root_module)
        raise Boom


def mask_boom(*_: Any) -> Any:
    return lambda gradient: boom()


GIVEN: dict[str, Callable[[], dict[str, Any]]] = {
    "mask": lambda: {"composite": EpsilonPlus(), "mask_map": mask_boom},
    "mask of zennit": lambda: {"composite": zennit_merged(), "mask_map": mask_boom},
    "rule": lambda: {"composite": Composite(name_map=[(["3"], RuleBoom())])},
    "registering": lambda: {"composite": Composite(name_map=[(["3"], NeverRegistered())])},
    "canonizer": lambda: {"composite": EpsilonPlus([CanonizerBoom()])},
    "wrong layer": lambda: {"composite": EpsilonPlus(), "record_layer": ["absent"]},
    "wrong start": lambda: {"composite": zennit_merged(), "start_layer": "absent"},
    "wrong device": lambda: {"composite": EpsilonPlus(), "on_device": "absent"},
    "wrong init_rel": lambda: {"composite": EpsilonPlus(), "init_rel": torch.ones(7)},
    "init_rel raises": lambda: {"composite": EpsilonPlus(), "init_rel": lambda output: boom()},
}


@pytest.mark.promise(
    "Model",
    "A mistake in what is given, such as a wrong layer or a mask that raises, leaves nothing on the model",
)
@pytest.mark.filterwarnings("ignore:'y' has no effect")
@pytest.mark.parametrize("case", GIVEN)
@pytest.mark.parametrize("exclude_parallel", [True, False])
def test_faults_of_what_is_given(case, exclude_parallel):
    model = net()
    before = state(model)
    attribution = CondAttribution(model)
    for _ in range(2):
        with pytest.raises((Boom, ValueError, KeyError, TypeError)):
            attribution(images(), CONDITIONS, exclude_parallel=exclude_parallel, **GIVEN[case]())
        with pytest.raises((Boom, ValueError, KeyError, TypeError)):
            parts = attribution.generate(
                images(), CONDITIONS, exclude_parallel=exclude_parallel, batch_size=2, verbose=False, **GIVEN[case]()
            )
            list(parts)
        assert differences(before, state(model)) == []


@pytest.mark.promise("Model", "A generator that is closed, abandoned or waits leaves nothing on the model")
@pytest.mark.parametrize("make", [EpsilonPlusFlat, zennit_merged, lambda: None], ids=["ours", "zennit", "none"])
@pytest.mark.parametrize("end", ["close", "throw", "abandon", "wait"])
def test_generators_that_are_not_used_up(make, end):
    model = net()
    before = state(model)
    parts = CondAttribution(model).generate(images(), CONDITIONS, make(), batch_size=2, verbose=False)
    next(parts)
    if end == "close":
        parts.close()
    elif end == "throw":
        with pytest.raises(Boom):
            parts.throw(Boom())
    elif end == "abandon":
        del parts
        gc.collect()
    assert differences(before, state(model)) == []
