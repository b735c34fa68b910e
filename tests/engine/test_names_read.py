"""What a model reads beside itself is noticed when it changes, or it is computed each time."""

from __future__ import annotations

import gc
import random
import sys
import threading
import warnings
import weakref
from argparse import Namespace
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from decimal import Decimal
from functools import lru_cache, partial
from types import MappingProxyType, ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import rnn

from crp.attribution import CondAttribution
from crp.composites import get
from crp.engine.kernel_calls import CallRecorder
from crp.engine.names_read import NamesRead
from crp.engine.recordings import NotReplayableError
from crp.engine.replayed import Replayed

SCALE = 2.0
SCALES = [2.0, 3.0]
SETTINGS = Namespace(scale=2.0, of={"scale": [2.0]})
FACTORS, TENSOR = np.array([2.0]), torch.tensor([2.0], dtype=torch.float64)
OTHER = nn.Linear(6, 6).double()
elsewhere = ModuleType("elsewhere")
elsewhere.scale = elsewhere.other = 2.0  # type: ignore[attr-defined]
elsewhere.itself = elsewhere  # type: ignore[attr-defined]


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

    @classmethod
    def read(cls) -> float:
        return cls.scale


class Slots:
    __slots__ = ("deep", "scale")

    def __init__(self) -> None:
        self.scale, self.deep = 2.0, Namespace(of={"scale": [2.0]})


class Hidden:
    """Has its scale behind a property."""

    def __init__(self) -> None:
        self._scale = 2.0

    @property
    def scale(self) -> float:
        return self._scale

    def scaled(self, x: Tensor) -> Tensor:
        return x * self._scale


class Extended(dict[str, Any]):
    """A dict with attributes."""


def helper(x: Tensor) -> Tensor:
    return x * SCALE


def another_helper(x: Tensor) -> Tensor:
    return x * 5


def default(self: Any, x: Tensor, scale: float = 2.0) -> Tensor:
    return x * scale


def first_default(self: Any, x: Tensor, scales: list[float] = [2.0]) -> Tensor:  # noqa: B006 (what is tested)
    return x * scales[0]


def tagged(x: Tensor) -> Tensor:
    return x * tagged.scale  # type: ignore[attr-defined, no-any-return]


def double(x: Tensor) -> Tensor:
    return x * 2


@lru_cache
def cached() -> Hidden:
    return Hidden()


def local(scale: float) -> tuple[Callable[[Any, Tensor], Tensor], Callable[[float], None]]:
    """A function that takes a number from around it, and another one that changes it."""

    def put_scale(value: float) -> None:
        nonlocal scale
        scale = value

    return lambda self, x: x * scale, put_scale


def with_class(self: Any, x: Tensor) -> Tensor:
    class Inner:
        scale = SCALE

    return x * Inner.scale


def imported(self: Any, x: Tensor) -> Tensor:
    import elsewhere  # type: ignore[import-not-found]

    return x * elsewhere.scale  # type: ignore[no-any-return]


tagged.scale = 2.0  # type: ignore[attr-defined]
sys.modules["elsewhere"] = elsewhere
ITERATOR, LONG = iter([2.0] * 1000), list(range(20_000))
LOCAL, put_local = local(2.0)
OBJECT, CONTEXT = Hidden(), ContextVar("CONTEXT", default=2.0)
BOUND, PARTIAL = OBJECT.scaled, partial(Hidden.scaled, OBJECT)
WITHOUT_ATTRIBUTES = First()


class Scaled(nn.Linear):
    """Takes its scale from somewhere."""

    scale = of_base = 2.0

    def __init__(self, read: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__(6, 4)
        self.factors, self.queue, self.settings = np.array([2.0]), deque([2.0]), Slots()
        self.hidden = [nn.Linear(6, 6)]
        self.objects = ({"entry": [Namespace(inner=Hidden(), of_class=First())]}, array("d", [2.0]))
        self.numbers = {"one": 1.0, "decimal": Decimal("2.0"), "lists": [[2.0], [3.0]], "proxy": MappingProxyType({})}
        self.numbers["list"] = self.numbers["lists"][0]
        self.extended, self.bound, self.early = Extended(), OBJECT.scaled, None
        self.around, self.put = local(2.0)
        self.kinds, self.content = {"once"}, bytearray(b"\2")
        self.extended.scale = 2.0  # type: ignore[attr-defined]
        self.twice = nn.Sequential(nn.Tanh(), nn.ReLU(), nn.Tanh())
        vars(self)["unknown"] = nn.LeakyReLU(0.1)

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


def rename(entries: dict[str, Any], names: str) -> None:
    """Give entries other names, in the same order."""
    values = [*entries.values()]
    entries.clear()
    entries.update(zip(names, values, strict=True))


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
        lambda self, x: Second()(First()(x)),
        lambda patch, net: patch.setattr(Second, "scale", 3.0),
    ),
    "an attribute of a class that its own method reads": (
        lambda self, x: x * Settings.read(),
        lambda patch, net: patch.setattr(Settings, "scale", 3.0),
    ),
    "a method that nobody names": (
        lambda self, x: WITHOUT_ATTRIBUTES(x),
        lambda patch, net: patch.setattr(First, "__call__", lambda self, x: x * 3),
    ),
    "a name in a class that is made": (with_class, lambda patch, net: patch.setitem(globals(), "SCALE", 3.0)),
    "a name of a module that names itself": (
        lambda self, x: x * elsewhere.itself.scale,
        lambda patch, net: patch.setattr(elsewhere, "scale", 3.0),
    ),
    "a number around a function of the model": (
        lambda self, x: self.around(self, x),
        lambda patch, net: net.put(3.0),
    ),
    "an array": (lambda self, x: x * float(FACTORS[0]), lambda patch, net: put(FACTORS)),
    "an array of the model": (
        lambda self, x: x * float(self.factors[0]),
        lambda patch, net: put(net.factors),
    ),
    "a tensor": (lambda self, x: x * TENSOR, lambda patch, net: put(TENSOR)),
    "a set of the model": (
        lambda self, x: x * (3 if "twice" in self.kinds else 2),
        lambda patch, net: net.kinds.add("twice"),
    ),
    "bytes of the model": (lambda self, x: x * self.content[0], lambda patch, net: put(net.content, 3)),
    "a view of bytes of the model": (
        lambda self, x: x * memoryview(self.content)[0],
        lambda patch, net: put(net.content, 3),
    ),
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
    "a number deep in a tuple": (
        lambda self, x: x * self.objects[0]["entry"][0].inner.scale,
        lambda patch, net: setattr(net.objects[0]["entry"][0].inner, "_scale", 3.0),
    ),
    "a number of an object's class": (
        lambda self, x: x * self.objects[0]["entry"][0].of_class.scale,
        lambda patch, net: patch.setattr(First, "scale", 3.0),
    ),
    "a number of the class of an object beside the model": (
        lambda self, x: x * WITHOUT_ATTRIBUTES.scale,
        lambda patch, net: patch.setattr(First, "scale", 3.0),
    ),
    "a number behind a property": (
        lambda self, x: x * OBJECT.scale,
        lambda patch, net: patch.setattr(OBJECT, "_scale", 3.0),
    ),
    "an object by its method": (lambda self, x: BOUND(x), lambda patch, net: patch.setattr(OBJECT, "_scale", 3.0)),
    "an object by its method, of the model": (
        lambda self, x: self.bound(x),
        lambda patch, net: patch.setattr(OBJECT, "_scale", 3.0),
    ),
    "an object of a partial": (lambda self, x: PARTIAL(x), lambda patch, net: patch.setattr(OBJECT, "_scale", 3.0)),
    "an object that a function keeps": (
        lambda self, x: x * cached().scale,
        lambda patch, net: patch.setattr(cached(), "_scale", 3.0),
    ),
    "an array without numpy": (lambda self, x: x * self.objects[1][0], lambda patch, net: put(net.objects[1])),
    "an immutable number of an object": (
        lambda self, x: x * float(self.numbers["decimal"]),
        lambda patch, net: (net.numbers.pop("decimal"), net.numbers.update(decimal=Decimal("3.0"))),
    ),
    "which of two lists": (
        lambda self, x: x * self.numbers["list"][0],
        lambda patch, net: net.numbers.update(list=net.numbers["lists"][1]),
    ),
    "the kind of a number": (
        lambda self, x: x * (2 if isinstance(self.numbers["one"], float) else 3),
        lambda patch, net: net.numbers.update(one=1),
    ),
    "an attribute of a dict": (
        lambda self, x: x * self.extended.scale,
        lambda patch, net: setattr(net.extended, "scale", 3.0),
    ),
    "the name of an attribute": (
        lambda self, x: x * (2 if hasattr(self, "early") else 3),
        lambda patch, net: (delattr(net, "early"), setattr(net, "late", None)),
    ),
    "a module in two places": (
        lambda self, x: self.twice(x),
        lambda patch, net: net.twice.__setitem__(2, net.twice[1]),
    ),
    "names of modules": (
        lambda self, x: self.twice.get_submodule("0")(x),
        lambda patch, net: rename(net.twice._modules, "102"),
    ),
    "a module that the model does not know": (
        lambda self, x: self.unknown(x),
        lambda patch, net: setattr(net.unknown, "negative_slope", 0.9),
    ),
    "another class with the same way forward": (
        lambda self, x: x * 2,
        lambda patch, net: setattr(net, "__class__", type("Other", (type(net),), {"read": lambda self, x: x * 3})),
    ),
    "an attribute of the model's class that its base had": (
        lambda self, x: x * self.of_base,
        lambda patch, net: patch.setattr(type(net), "of_base", 3.0, raising=False),
    ),
    "an attribute of a class by its name": (
        lambda self, x: x * getattr(Settings, "scale", 1.0),
        lambda patch, net: patch.setattr(Settings, "scale", 3.0),
    ),
    "a function of Python's own": (
        lambda self, x: x * abs(-2.0),
        lambda patch, net: patch.setitem(globals(), "abs", lambda x: 3.0),
    ),
    "a default": (default, lambda patch, net: patch.setattr(default, "__defaults__", (3.0,))),
    "an entry of a default": (first_default, lambda patch, net: put(first_default.__defaults__[0])),  # type: ignore
    "an attribute of a function": (lambda self, x: tagged(x), lambda patch, net: patch.setattr(tagged, "scale", 3.0)),
    "what a function does": (
        lambda self, x: double(x),
        lambda patch, net: patch.setattr(double, "__code__", another_helper.__code__),
    ),
    "a number around a function that has ended": (LOCAL, lambda patch, net: put_local(3.0)),
    "a number of a context": (lambda self, x: x * CONTEXT.get(), lambda patch, net: (CONTEXT.set(3.0), None)[1]),
    "a name of a module that is imported": (imported, lambda patch, net: patch.setattr(elsewhere, "scale", 3.0)),
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
    for numbers in (SCALES, SETTINGS.of["scale"], FACTORS, TENSOR, first_default.__defaults__[0]):  # type: ignore
        put(numbers, 2.0)
    put_local(2.0)
    CONTEXT.set(2.0)
    assert all(heatmaps(attribution, vectors))


def of_a_list(scales: list[float]) -> Callable[[Any, Tensor], Tensor]:
    return lambda self, x: x * scales[0]


def either(scale: Any) -> Callable[[Any, Tensor], Tensor]:
    """Functions that share their code."""
    return lambda self, x: x * (scale[0] if isinstance(scale, list) else scale)


NUMBERED, LISTED, KEPT = either(2.0), [either([2.0])], either(2.0)
WEAK: Any = weakref.ref(KEPT)


def warning(self: Any, x: Tensor) -> Tensor:
    warnings.warn("look here", stacklevel=1)
    return x


def counted(self: Any, x: Tensor) -> Tensor:
    COUNTED[0] += 1.0
    return x * (2 + 0 * COUNTED[0])  # (the same in the call that it is compared with)


def drawn(self: Any, x: Tensor) -> Tensor:
    return x * (2 if random.random() < 2 else 3)


def in_a_thread(self: Any, x: Tensor) -> Tensor:
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(float(x.detach().sum()) > 0))
    thread.start()
    thread.join()
    return x * (2 if found[0] else 3)


def in_a_pool(self: Any, x: Tensor) -> Tensor:
    future = POOL.submit(lambda: x.detach().abs() + 1)
    while not future.done():
        pass
    return x * future.result()


def packed(self: Any, x: Tensor) -> Tensor:
    return x + 0 * rnn.pack_padded_sequence(x.detach()[..., None], LENGTHS, batch_first=True).data.sum()


def padded(self: Any, x: Tensor) -> Tensor:
    sequence = rnn.PackedSequence(x.detach()[:, :1], LENGTHS[:1] * 0 + len(x))
    return x + 0 * rnn.pad_packed_sequence(sequence)[0].sum()


def warning_explicitly(self: Any, x: Tensor) -> Tensor:
    warnings.warn_explicit("look here", UserWarning, __file__, 1)
    return x


COUNTED, POOL, LENGTHS = [0.0], ThreadPoolExecutor(1), torch.tensor([6, 6, 6, 6])
UNKNOWN: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "values of an array": lambda self, x: x * (2 if x.detach().numpy().sum() > 0 else 3),
    "values of a list": lambda self, x: x * (2 if sum(x.detach().sum(1).tolist()) > 0 else 3),
    "values as numpy asks for them": lambda self, x: x * float(np.asarray(x.detach()).shape[1]),
    "values by another package": lambda self, x: x * float(np.from_dlpack(x.detach()).shape[1]),
    "a function of Python for each value": lambda self, x: x + x.detach().clone().apply_(lambda value: value),
    "a function of two values": lambda self, x: x + x.detach().clone().map_(x.detach(), lambda value, other: value),
    "a function of three values": lambda self, x: (
        x + x.detach().clone().map2_(x.detach(), x.detach(), lambda value, *others: value)  # type: ignore[attr-defined]
    ),
    "lengths of sequences that are packed": packed,
    "lengths of sequences that are unpacked": padded,
    "places as values": lambda self, x: x * len(torch.tensor_split(x.detach(), (x.detach()[:2, 0] > 0).long())),
    "another thread": in_a_thread,
    "a thread of a pool that nobody waits for": in_a_pool,
    "a thread of a pool": lambda self, x: x * POOL.submit(lambda: x.detach().abs() + 1).result(),
    "random numbers": drawn,
    "a number that changes": counted,
    "an iterator": lambda self, x: x * next(ITERATOR),
    "too much": lambda self, x: x * len(LONG),
    "a function that nobody can find": lambda self, x: WEAK()(self, x),
    "a tensor that is written to": lambda self, x: x * TENSOR.mul_(1.0),
    "a model beside it": lambda self, x: OTHER(x),
    "a warning": warning,
    "a warning by its place": warning_explicitly,
}


@pytest.mark.parametrize("kind", UNKNOWN)
@pytest.mark.filterwarnings("ignore:look here")
def test_what_cannot_be_known_is_computed_each_time(vectors: Tensor, kind: str) -> None:
    attribution = replaying(UNKNOWN[kind])
    assert all(heatmaps(attribution, vectors)) and attribution._replayed.replays.replayed == 0


def test_what_is_around_functions_with_the_same_code_is_known(vectors: Tensor) -> None:
    scales = [2.0]
    attribution = replaying(of_a_list(scales))
    assert all(heatmaps(attribution, vectors)) and attribution._replayed.replays.replayed == 2
    scales[0] = 3.0
    attribution = replaying(lambda self, x: LISTED[0](self, NUMBERED(self, x)))
    assert all(heatmaps(attribution, vectors)) and attribution._replayed.replays.replayed == 2


def test_a_number_of_a_function_that_runs_may_change(vectors: Tensor) -> None:
    scale = 2.0
    attribution = replaying(lambda self, x: x * scale)
    assert all(heatmaps(attribution, vectors)) and attribution._replayed.replays.replayed == 2
    scale = 3.0
    assert all(heatmaps(attribution, vectors)) and attribution._replayed.replays.replayed == 5


def test_a_function_of_a_function_that_runs_may_change(vectors: Tensor) -> None:
    way: Callable[[Tensor], Tensor] = helper
    attribution = replaying(lambda self, x: way(x))
    assert all(heatmaps(attribution, vectors)) and attribution._replayed.replays.replayed == 2
    way = another_helper
    assert all(heatmaps(attribution, vectors)) and attribution._replayed.replays.replayed == 5


def test_a_variable_inside_of_what_is_recorded_is_no_obstacle(vectors: Tensor) -> None:
    def read(self: Any, x: Tensor) -> Tensor:
        halves = 0.5
        return torch.stack([x * halves for _ in range(2)]).sum(0)

    attribution = replaying(read)
    assert all(heatmaps(attribution, vectors)) and attribution._replayed.replays.replayed == 2


def test_a_variable_around_a_function_may_be_missing(vectors: Tensor) -> None:
    def read(self: Any, x: Tensor) -> Tensor:
        return x * 2 if self is not None else later

    attribution = replaying(read)
    assert all(heatmaps(attribution, vectors)) and attribution._replayed.replays.replayed == 2
    later = vectors


@pytest.mark.parametrize("collects", [True, False])
def test_no_garbage_is_collected_meanwhile(collects: bool) -> None:
    before = gc.isenabled()
    (gc.enable if collects else gc.disable)()
    try:
        with NamesRead():
            meanwhile = gc.isenabled()
        assert not meanwhile and gc.isenabled() == collects
    finally:
        (gc.enable if before else gc.disable)()


@pytest.mark.filterwarnings("ignore:look here")
def test_an_error_is_that_of_the_computation(vectors: Tensor) -> None:
    with pytest.raises(NotReplayableError, match="calls warn"), NamesRead():
        warning(None, vectors)
    with pytest.raises(ZeroDivisionError), NamesRead():
        warning(None, vectors / (1 // 0))
    assert sys.getprofile() is None


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


def test_what_is_given_up_stays_so_when_a_name_changes(vectors: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    attribution = replaying(lambda self, x: x * SCALE)
    assert all(heatmaps(attribution, vectors))
    (entry,) = attribution._replayed.replays._entries.values()
    entry.drop(for_good=True)
    monkeypatch.setitem(globals(), "SCALE", 3.0)
    assert all(heatmaps(attribution, vectors)) and attribution._replayed.replays.replayed == 2
