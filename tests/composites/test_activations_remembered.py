"""What a module was found to be is remembered for as long as nothing changes that it may depend on."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch
from preset_cases import maps, numbers, off, seeded
from torch import nn

from crp.composites import AttnLRP, UniformEpsilon, activations
from crp.composites.activations import _one_activation

DATA = numbers(3, 6)
OUTSIDE = torch.ones(6, dtype=torch.float64)


class Written(nn.Module):
    """An activation that is written out, or something else by an attribute."""

    scale = 1.0

    def __init__(self, shift=0, inner=torch.tanh):
        super().__init__()
        self.shift, self.inner = shift, inner

    def forward(self, x):
        return self.inner(x.roll(self.shift, 1) if self.shift else x) * 2.0 * self.scale


class ByValue(Written):
    def forward(self, x):
        return torch.tanh(x) * 2.0 if x.detach().mean() > 0 else torch.tanh(x.cumsum(1)) * 2.0


class ByItem(Written):
    def forward(self, x):
        return torch.tanh(x) * x[0, 0].item()


class WithoutGradients(Written):
    def forward(self, x):
        with torch.no_grad():
            largest = x.max()
        return torch.tanh(x) * largest


class OfOthers(Written):
    def forward(self, x):
        return torch.tanh(x) * OUTSIDE


class OfNonzero(Written):
    def forward(self, x):
        return torch.tanh(x) * (2.0 if x[:1, 0].is_nonzero() else 3.0)


@pytest.fixture
def runs(monkeypatch):
    """Modules that were run once more to find out what they are."""
    seen, probed = [], activations._probed
    monkeypatch.setattr(activations, "_probed", lambda module, *rest: seen.append(module) or probed(module, *rest))
    return seen


def ask(module, data=DATA):
    return _one_activation(module, (data,), {}) is not None


def test_a_module_is_run_once_more_only_once(runs):
    module = Written()
    assert [ask(module) for _ in range(3)] == [True] * 3 and runs == [module]
    assert not ask(Written(1)) and ask(module) and len(runs) == 2
    shifted = Written(1)
    assert [ask(shifted) for _ in range(3)] == [False] * 3 and len(runs) == 3, "also if it is none"


def forward_of_instance(module):
    module.forward = lambda x: torch.tanh(x.roll(1, 1)) * 2.0


def forward_of_class(module):
    def forward(self, x):
        return torch.tanh(x.roll(1, 1)) * 2.0

    type(module).forward = forward


def rolled(x):
    return torch.tanh(x.roll(1, 1))


CHANGES = {
    "number": lambda module: setattr(module, "shift", 1),
    "function": lambda module: setattr(module, "inner", rolled),
    "object": lambda module: setattr(module, "inner", nn.Identity.forward.__get__(nn.Identity())),
    "instance": forward_of_instance,
    "class": forward_of_class,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_attribute_is_noticed(change, runs):
    module = type("Own", (Written,), {"forward": Written.forward})()
    assert ask(module)
    CHANGES[change](module)
    assert not ask(module) and len(runs) == 2


def test_attributes_of_the_class_and_whether_it_trains(runs):
    kind = type("Own", (Written,), {})
    module = kind()
    assert ask(module)
    kind.scale = 2.0
    assert ask(module) and len(runs) == 2
    assert ask(module.eval()) and len(runs) == 3
    assert ask(module.train()) and len(runs) == 3
    kind.scale = 2
    assert ask(module) and len(runs) == 4, "2 is not 2.0"


def test_variables_of_a_function_are_not_remembered(runs):
    shift = 0

    class Enclosed(Written):
        def forward(self, x):
            return torch.tanh(x.roll(shift, 1) if shift else x) * 2.0

    module = Enclosed()
    assert ask(module)
    shift = 1
    assert not ask(module)


@pytest.mark.parametrize("data", [numbers(2, 6), numbers(3, 5), DATA.float()], ids=["fewer", "narrower", "float32"])
def test_other_shapes_and_types_are_looked_at_anew(data, runs):
    module = Written()
    assert ask(module) and ask(module, data) and len(runs) == 2
    assert ask(module) and ask(module, data) and len(runs) == 2


@pytest.mark.parametrize("kind", [ByValue, ByItem, WithoutGradients, OfOthers, OfNonzero])
def test_what_may_depend_on_values_is_not_remembered(kind, runs):
    module = kind()
    ask(module), ask(module)
    assert len(runs) == 2


@pytest.mark.parametrize("owner", ["module", "class"])
def test_an_attribute_that_may_hold_anything_is_not_remembered(owner, runs):
    kind = type("Own", (Written,), {})
    module = kind()
    (module if owner == "module" else kind).extra = {"a": 1}
    assert ask(module) and ask(module) and len(runs) == 2


def test_parameters_that_come_later_end_it(runs):
    module = Written()
    assert ask(module)
    module.register_buffer("late", torch.ones(1))
    assert not ask(module) and len(runs) == 1


def test_what_is_remembered_is_bounded_and_goes_with_the_module():
    module = Written()
    for size in range(1, 2 + activations._MOST_ANSWERS):
        ask(module, DATA[:, :1].repeat(1, size))
    assert len(activations._answers[module]) == 1
    found = weakref.ref(module)
    del module
    gc.collect()
    assert found() is None


def test_relevance_is_that_of_a_fresh_model():
    def net():
        return seeded(nn.Sequential(nn.Linear(6, 8), Written(), nn.Linear(8, 4)))

    model, changed = net(), net()
    changed[1].shift = 1
    for composite in (UniformEpsilon, AttnLRP):
        first = maps(model, DATA, composite())
        assert off(first, maps(model, DATA, composite())) == 0
        model[1].shift = 1
        assert off(maps(model, DATA, composite()), maps(changed, DATA, composite())) == 0
        model[1].shift = 0
    assert math.isfinite(first.abs().max())
