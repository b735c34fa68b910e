"""What a model reads beside itself is noticed when it changes, or it is computed each time."""

from __future__ import annotations

import sys
import warnings
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from crp.attribution import CondAttribution
from crp.composites import get
from crp.engine.kernel_calls import CallRecorder
from crp.engine.replayed import Replayed

SCALE = 2.0
SCALES = [2.0, 3.0]
SETTINGS = Namespace(scale=2.0, of={"scale": [2.0]})
FACTORS, TENSOR = np.array([2.0]), torch.tensor([2.0], dtype=torch.float64)
OTHER = nn.Linear(6, 6).double()
elsewhere = ModuleType("elsewhere")
elsewhere.scale = elsewhere.other = 2.0  # type: ignore[attr-defined]


def another() -> float:
    return elsewhere.other  # type: ignore[attr-defined, no-any-return]


class First:
    scale = 2.0

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.scale


class Second(First):
    scale = 1.5


class Settings:
    scale = 2.0


class Slots:
    __slots__ = ("deep", "scale")

    def __init__(self) -> None:
        self.scale, self.deep = 2.0, Namespace(of={"scale": [2.0]})


def helper(x: Tensor) -> Tensor:
    return x * SCALE


def another_helper(x: Tensor) -> Tensor:
    return x * 5


class Scaled(nn.Linear):
    """Takes its scale from somewhere."""

    scale = 2.0

    def __init__(self, read: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__(6, 4)
        self.factors, self.queue, self.settings = np.array([2.0]), deque([2.0]), Slots()
        self.hidden = [nn.Linear(6, 6)]

        class Own(Scaled):
            scale = 2.0

            def forward(self, x: Tensor) -> Tensor:
                return super(Scaled, self).forward(self.read(x))

            def read(self, x: Tensor) -> Tensor:
                return x

        Own.read = read  # type: ignore[method-assign]
        self.__class__ = Own


def replaying(read: Callable[[Any, Tensor], Tensor]) -> CondAttribution:
    torch.manual_seed(0)
    attribution = CondAttribution(Scaled(read).double().eval())
    attribution._replayed = Replayed(CallRecorder(2, cost=0))
    return attribution


def heatmaps(attribution: CondAttribution, data: Tensor) -> Iterator[bool]:
    """Whether each of a few heatmaps is what a fresh attribution gives."""
    for number in range(5):
        plain = CondAttribution(attribution.model)
        plain.replay = False
        found, exact = (each(data * (number + 1), [{"y": 1}], RULES).heatmap for each in (attribution, plain))
        yield torch.equal(found, exact)


def put(numbers: Any, value: float = 3.0) -> None:
    """Change the first of some numbers."""
    numbers[0] = value


RULES = get("epsilon")
READS: dict[str, tuple[Callable[[Any, Tensor], Tensor], Callable[[pytest.MonkeyPatch, Any], None]]] = {
    "a name": (lambda self, x: x * SCALE, lambda patch, net: patch.setitem(globals(), "SCALE", 3.0)),
    "a name in a function": (lambda self, x: helper(x), lambda patch, net: patch.setitem(globals(), "SCALE", 3.0)),
    "another function": (
        lambda self, x: helper(x),
        lambda patch, net: patch.setitem(globals(), "helper", lambda x: x * 3),
    ),
    "an entry of a list": (lambda self, x: x * SCALES[0], lambda patch, net: put(SCALES)),
    "an attribute": (lambda self, x: x * SETTINGS.scale, lambda patch, net: patch.setattr(SETTINGS, "scale", 3.0)),
    "an entry of an attribute": (
        lambda self, x: x * SETTINGS.of["scale"][0],
        lambda patch, net: put(SETTINGS.of["scale"]),
    ),
    "an attribute of a class": (
        lambda self, x: x * Settings.scale,
        lambda patch, net: patch.setattr(Settings, "scale", 3.0),
    ),
    "an attribute of the model's class": (
        lambda self, x: x * self.scale,
        lambda patch, net: patch.setattr(type(net), "scale", 3.0),
    ),
    "a method of the model's class": (
        lambda self, x: x * 2,
        lambda patch, net: patch.setattr(type(net), "read", lambda self, x: x * 3),
    ),
    "a name of a module": (
        lambda self, x: x * elsewhere.scale,
        lambda patch, net: patch.setattr(elsewhere, "scale", 3.0),
    ),
    "another name of a module": (
        lambda self, x: x * elsewhere.scale * another(),
        lambda patch, net: patch.setattr(elsewhere, "other", 3.0),
    ),
    "an attribute of a class that shares a method": (
        lambda self, x: First()(Second()(x)),
        lambda patch, net: patch.setattr(Second, "scale", 3.0),
    ),
    "an array": (lambda self, x: x * float(FACTORS[0]), lambda patch, net: put(FACTORS)),
    "an array of the model": (
        lambda self, x: x * float(self.factors[0]),
        lambda patch, net: put(net.factors),
    ),
    "a tensor": (lambda self, x: x * TENSOR, lambda patch, net: put(TENSOR)),
    "a queue of the model": (lambda self, x: x * self.queue[0], lambda patch, net: put(net.queue)),
    "a slot of an object of the model": (
        lambda self, x: x * self.settings.scale,
        lambda patch, net: setattr(net.settings, "scale", 3.0),
    ),
    "a setting deep in an object of the model": (
        lambda self, x: x * self.settings.deep.of["scale"][0],
        lambda patch, net: put(net.settings.deep.of["scale"]),
    ),
    "a weight that the model does not know": (
        lambda self, x: self.hidden[0](x.to(self.hidden[0].weight.dtype)).to(x.dtype),
        lambda patch, net: net.hidden[0].weight.data.mul_(3.0),
    ),
    "a weight by its data": (lambda self, x: x * 2, lambda patch, net: net.weight.data.mul_(3.0)),
}


@pytest.mark.parametrize("kind", READS)
def test_what_changes_is_noticed(vectors: Tensor, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    read, change = READS[kind]
    attribution = replaying(read)
    assert all(heatmaps(attribution, vectors)) and attribution._replayed.replays.replayed == 2
    change(monkeypatch, attribution.model)
    assert all(heatmaps(attribution, vectors)) and attribution._replayed.replays.replayed == 5
    monkeypatch.undo()
    for numbers in (SCALES, SETTINGS.of["scale"], FACTORS, TENSOR):
        put(numbers, 2.0)
    assert all(heatmaps(attribution, vectors))


def local(scale: float) -> Callable[[Any, Tensor], Tensor]:
    """A function that takes a number from around it, which nobody can change."""
    return lambda self, x: x * scale


def of_a_list(scales: list[float]) -> Callable[[Any, Tensor], Tensor]:
    return lambda self, x: x * scales[0]


def either(scale: Any) -> Callable[[Any, Tensor], Tensor]:
    """Functions that share their code."""
    return lambda self, x: x * (scale[0] if isinstance(scale, list) else scale)


NUMBERED, LISTED = either(2.0), either([2.0])


def warning(self: Any, x: Tensor) -> Tensor:
    warnings.warn("look here", stacklevel=1)
    return x


UNKNOWN: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "values of an array": lambda self, x: x * (2 if x.detach().numpy().sum() > 0 else 3),
    "values of a list": lambda self, x: x * (2 if sum(x.detach().sum(1).tolist()) > 0 else 3),
    "values as numpy asks for them": lambda self, x: x * float(np.asarray(x.detach()).shape[1]),
    "a tensor that is written to": lambda self, x: x * TENSOR.mul_(1.0),
    "a model beside it": lambda self, x: OTHER(x),
    "a list around it": of_a_list([2.0]),
    "a list around a function, and a number around another": lambda self, x: LISTED(self, NUMBERED(self, x)),
    "a warning": warning,
}


@pytest.mark.parametrize("kind", UNKNOWN)
@pytest.mark.filterwarnings("ignore:look here")
def test_what_cannot_be_known_is_computed_each_time(vectors: Tensor, kind: str) -> None:
    attribution = replaying(UNKNOWN[kind])
    assert all(heatmaps(attribution, vectors)) and attribution._replayed.replays.replayed == 0


def test_a_number_that_a_function_left_behind_stays(vectors: Tensor) -> None:
    attribution = replaying(local(2.0))
    assert all(heatmaps(attribution, vectors)) and attribution._replayed.replays.replayed == 2


def test_a_number_of_a_function_that_runs_may_change(vectors: Tensor) -> None:
    scale = 2.0
    attribution = replaying(lambda self, x: x * scale)
    assert all(heatmaps(attribution, vectors))
    scale = 3.0
    assert all(heatmaps(attribution, vectors)) and attribution._replayed.replays.replayed == 0


def test_a_function_of_a_function_that_runs_may_change(vectors: Tensor) -> None:
    way: Callable[[Tensor], Tensor] = helper
    attribution = replaying(lambda self, x: way(x))
    assert all(heatmaps(attribution, vectors))
    way = another_helper
    assert all(heatmaps(attribution, vectors)) and attribution._replayed.replays.replayed == 0


def test_a_variable_inside_of_what_is_recorded_is_no_obstacle(vectors: Tensor) -> None:
    def read(self: Any, x: Tensor) -> Tensor:
        halves = 0.5
        return torch.stack([x * halves for _ in range(2)]).sum(0)

    attribution = replaying(read)
    assert all(heatmaps(attribution, vectors)) and attribution._replayed.replays.replayed == 2


def test_under_a_profiler_nothing_is_recorded(vectors: Tensor) -> None:
    attribution, calls, before = replaying(lambda self, x: x * 2), [0], sys.getprofile()

    def profile(frame: Any, event: str, called: Any) -> None:
        calls[0] += 1

    sys.setprofile(profile)
    try:
        assert all(heatmaps(attribution, vectors)) and sys.getprofile() is profile
    finally:
        sys.setprofile(before)
    assert calls[0] and attribution._replayed.replays.replayed == 0
