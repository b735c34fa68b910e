from __future__ import annotations

import copy
import functools
import hashlib
import importlib
import linecache
import subprocess
import sys
import types
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torchvision.transforms import Compose, Normalize, Resize
from zennit.canonizers import CompositeCanonizer, NamedMergeBatchNorm, SequentialMergeBatchNorm
from zennit.composites import (
    EpsilonGammaBox,
    EpsilonPlus,
    EpsilonPlusFlat,
    MixedComposite,
    NameLayerMapComposite,
    NameMapComposite,
)
from zennit.core import BasicHook, Composite, Stabilizer
from zennit.rules import AlphaBeta, Epsilon, Gamma, ZBox, ZPlus

from crp import composites as ours
from crp.concepts import ChannelConcept
from crp.visualization.table import fingerprint as fingerprints
from crp.visualization.table.fingerprint import (
    fingerprint,
    fingerprint_composite,
    fingerprint_dataset,
    fingerprint_model,
)
from crp.visualization.table.source import syntax_of


class Doubled(BasicHook):
    def __init__(self, factor: float = 2.0) -> None:
        super().__init__(input_modifiers=[lambda a: factor * a], stabilizer=1e-6)
        self.factor = factor


def by_name(rule: object) -> NameMapComposite:
    return NameMapComposite([(["conv"], rule)])


COMPOSITES: dict[str, Callable[[], Composite | None]] = {
    "none": lambda: None,
    "epsilon": lambda: by_name(Epsilon()),
    "larger epsilon": lambda: by_name(Epsilon(1e-3)),
    "epsilon by a function": lambda: by_name(Epsilon(Stabilizer(1e-6, clip=True))),
    "epsilon without bias": lambda: by_name(Epsilon(zero_params="bias")),
    "z+": lambda: by_name(ZPlus()),
    "alpha beta": lambda: by_name(AlphaBeta()),
    "other alpha beta": lambda: by_name(AlphaBeta(3.0, 2.0)),
    "gamma": lambda: by_name(Gamma()),
    "other gamma": lambda: by_name(Gamma(0.5)),
    "custom": lambda: by_name(Doubled()),
    "other custom": lambda: by_name(Doubled(3.0)),
    "box": lambda: by_name(ZBox(torch.zeros(1), torch.ones(1))),
    "larger box": lambda: by_name(ZBox(torch.zeros(1), 2 * torch.ones(1))),
    "other layer": lambda: NameMapComposite([(["conv2"], Epsilon())]),
    "two rules": lambda: NameMapComposite([(["a"], Epsilon()), (["b"], ZPlus())]),
    "two rules, swapped": lambda: NameMapComposite([(["a"], ZPlus()), (["b"], Epsilon())]),
    "plus": EpsilonPlus,
    "plus flat": EpsilonPlusFlat,
    "plus flat, canonizer": lambda: EpsilonPlusFlat(canonizers=[SequentialMergeBatchNorm()]),
    "plus flat, named canonizer": lambda: EpsilonPlusFlat(canonizers=[NamedMergeBatchNorm([(["a"], "b")])]),
    "plus flat, other name": lambda: EpsilonPlusFlat(canonizers=[NamedMergeBatchNorm([(["a"], "c")])]),
    "plus flat, nested": lambda: EpsilonPlusFlat(canonizers=[CompositeCanonizer([SequentialMergeBatchNorm()])]),
    "gamma box": lambda: EpsilonGammaBox(torch.zeros(1), torch.ones(1)),
    "mixed": lambda: MixedComposite([by_name(Epsilon()), EpsilonPlus()]),
    "mixed, other order": lambda: MixedComposite([EpsilonPlus(), by_name(Epsilon())]),
    "by name and type": lambda: NameLayerMapComposite([(["a"], Epsilon())], [(nn.Conv2d, ZPlus())]),
    "by name and other type": lambda: NameLayerMapComposite([(["a"], Epsilon())], [(nn.Linear, ZPlus())]),
    "our plus": lambda: ours.EpsilonPlus(),
    "our plus, no canonizer": lambda: ours.EpsilonPlus([]),
    "our plus, epsilon": lambda: ours.EpsilonPlus(epsilon=1e-3),
    "our plus flat": lambda: ours.EpsilonPlusFlat(),
    "our plus, canonizer": lambda: ours.EpsilonPlus([SequentialMergeBatchNorm()]),
    "our plus, rules": lambda: ours.EpsilonPlus(layer_map=[(nn.Linear, Gamma())]),
    "our plus, other rules": lambda: ours.EpsilonPlus(layer_map=[(nn.Linear, Gamma(0.5))]),
}


def test_composites_have_one_fingerprint_each() -> None:
    prints = {name: fingerprint_composite(make()) for name, make in COMPOSITES.items()}
    again = {name: fingerprint_composite(make()) for name, make in COMPOSITES.items()}
    assert prints == again
    same = [(a, b) for a in prints for b in prints if a < b and prints[a] == prints[b]]
    assert same == []
    assert all(len(value) == 64 and int(value, 16) for value in prints.values())


@pytest.mark.parametrize("name", ["plus flat, canonizer", "custom", "our plus", "our plus, rules"])
def test_using_a_composite_does_not_change_it(name: str) -> None:
    composite = COMPOSITES[name]()
    before = fingerprint_composite(composite)
    net = nn.Sequential()
    net.add_module("conv", nn.Conv2d(1, 2, 3))
    net.add_module("bn", nn.BatchNorm2d(2))
    with composite.context(net.eval()) as model:
        model(torch.ones(1, 1, 5, 5, requires_grad=True)).sum().backward()
        assert fingerprint_composite(composite) == before
    assert fingerprint_composite(composite) == before


def test_fingerprints_are_the_same_in_another_process() -> None:
    names = ["epsilon", "plus flat, canonizer", "custom", "our plus, rules", "mixed"]
    code = (
        "import test_fingerprint as t; t.torch.manual_seed(0)\n"
        f"print([t.fingerprint_composite(t.COMPOSITES[n]()) for n in {names}] + [t.fingerprint_model(t.net())])"
    )
    folder = str(__import__("pathlib").Path(__file__).parent)
    run = [sys.executable, "-c", f"import sys; sys.path.insert(0, {folder!r}); {code}"]
    found = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    assert found.strip() == str([fingerprint_composite(COMPOSITES[n]()) for n in names] + [fingerprint_model(net())])


# --- models ---------------------------------------------------------------------------------------


def net(slope: float = 0.1, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.LeakyReLU(slope), nn.Flatten(), nn.Linear(18, 3))
    model.register_buffer("scale", torch.ones(1), persistent=False)
    return model.to(dtype)


def change(model: nn.Module, index: int, value: float) -> nn.Module:
    with torch.no_grad():
        list(model.state_dict().values())[index].view(-1)[0] += value
    return model


def test_models() -> None:
    reference = fingerprint_model(net())
    assert fingerprint_model(copy.deepcopy(net())) == reference
    assert fingerprint_model(net().eval().requires_grad_(False)) == reference
    assert fingerprint_model(nn.DataParallel(net())) == reference
    assert fingerprint_model(torch.compile(net())) == reference
    assert fingerprint_model(net().to(memory_format=torch.channels_last)) == reference
    others = [net(0.2), net(dtype=torch.float64), nn.Sequential(*net())]
    others += [change(net(), i, 1) for i in range(len(net().state_dict()))]
    unsaved = net()
    unsaved.scale += 1
    renamed = nn.Sequential()
    for i, module in enumerate(net()):
        renamed.add_module(f"layer{i}", module)
    scaled = net()
    scaled.temperature = 2.0
    prints = [fingerprint_model(model) for model in [*others, unsaved, renamed, scaled]]
    assert reference not in prints
    assert len(set(prints)) == len(prints)


class Acting(nn.Module):
    def __init__(self, act: Any) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: Any) -> Any:
        return self.act(x)


def doubled(self: Any, x: Any) -> Any:
    return 2 * x


def with_forward(forward: Any) -> nn.Module:
    model = nn.Sequential(nn.Identity())
    model[0].forward = types.MethodType(forward, model[0])  # type: ignore[method-assign]
    return model


def test_functions_that_a_module_holds_count() -> None:
    acts = [F.relu, torch.relu, torch.tanh, F.gelu, lambda x: x, lambda x: -x, nn.ReLU]
    acts += [functools.partial(F.leaky_relu, negative_slope=slope) for slope in (0.1, 0.2)]
    models = [Acting(act) for act in acts]
    models += [nn.Sequential(nn.Identity()), with_forward(doubled), with_forward(Acting.forward)]
    prints = [fingerprint_model(model) for model in models]
    assert len(set(prints)) == len(prints)
    assert prints[0] == fingerprint_model(Acting(F.relu)) and prints[-2] == fingerprint_model(with_forward(doubled))


@pytest.mark.parametrize("piece", [1, 12, 1 << 30])
def test_how_tensors_are_read_does_not_count(monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    reference, layout = fingerprint_model(net()), torch.channels_last
    monkeypatch.setattr(fingerprints, "_PIECE", piece)
    assert fingerprint_model(net()) == fingerprint_model(net().to(memory_format=layout)) == reference
    tensor = torch.arange(7.0)
    parts = [b"tensor", (18).to_bytes(8, "little"), b"torch.float32 (7,)", (28).to_bytes(8, "little")]
    assert fingerprint(tensor) == hashlib.sha256(b"".join([*parts, tensor.numpy().tobytes()])).hexdigest()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.complex64, torch.int8, torch.bool])
def test_tensors_of_any_kind(dtype: torch.dtype) -> None:
    tensor = torch.tensor([[0, 1, 1], [1, 1, 0]]).to(dtype)
    assert fingerprint(tensor) == fingerprint(tensor.t().contiguous().t())
    assert fingerprint(tensor) != fingerprint(tensor.t())
    assert fingerprint(tensor[0, 0]) != fingerprint(tensor[0, 1])
    assert fingerprint(tensor[:0]) == fingerprint(tensor[:0].clone())
    with pytest.raises(ValueError, match="meta device"):
        fingerprint(tensor.to("meta"))


# --- datasets -------------------------------------------------------------------------------------


class Data:
    def __init__(self, n: int = 20, seed: int = 0) -> None:
        self.images = torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
        self.labels = torch.arange(n) % 3
        self.broken: set[int] = set()
        self.noise = False
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.read.append(index)
        if index in self.broken:
            raise OSError("broken")
        return self.images[index] + torch.rand(1) * self.noise, int(self.labels[index])


def test_datasets() -> None:
    data = Data()
    reference = fingerprint_dataset(data)
    assert len(set(data.read)) == 8
    assert {0, 19} <= set(data.read)
    assert fingerprint_dataset(Data()) == reference
    image, label = Data(), Data()
    image.images[19, 0, 0, 0] += 1
    label.labels[0] += 1
    others = [Data(19), Data(seed=1), image, label, torch.utils.data.Subset(Data(), range(20))]
    prints = [fingerprint_dataset(other) for other in others]
    assert reference not in prints
    assert len(set(prints)) == len(prints)


def test_random_and_broken_samples_do_not_change_a_dataset() -> None:
    data, noisy = Data(), Data()
    noisy.noise = True
    assert fingerprint_dataset(noisy) == fingerprint_dataset(noisy)
    data.broken = {0}
    assert fingerprint_dataset(data) == fingerprint_dataset(data)
    assert fingerprint_dataset([]) == fingerprint_dataset([])


# --- functions ------------------------------------------------------------------------------------

FACTOR = 2.0


def scale(x: float, by: float = 1.0, *, shift: float = 0.0) -> float:
    return x * by + shift


def uses_global(x: float) -> float:
    return helper(x) * FACTOR


def helper(x: float) -> float:
    return x + 1


def closure(value: Any) -> Callable[[Any], Any]:
    return lambda x: x + value


def recursive(n: int) -> int:
    return 0 if n == 0 else recursive(n - 1)


class Plot:
    def __init__(self, alpha: float = 0.3) -> None:
        self.alpha = alpha

    def __call__(self, x: Any) -> Any:
        return x * self.alpha

    def method(self, x: Any) -> Any:
        return x - self.alpha


class Loop:
    def __init__(self) -> None:
        self.me = self
        self.lock = __import__("threading").Lock()


VALUES: dict[str, Callable[[], Any]] = {
    "function": lambda: scale,
    "other function": lambda: helper,
    "partial": lambda: functools.partial(scale, by=2.0),
    "other partial": lambda: functools.partial(scale, by=3.0),
    "positional partial": lambda: functools.partial(scale, 2.0),
    "other positional partial": lambda: functools.partial(scale, 3.0),
    "nested partial": lambda: functools.partial(functools.partial(scale, by=2.0), shift=1.0),
    "lambda": lambda: lambda x: x + 1,
    "other lambda": lambda: lambda x: x + 2,
    "other operation": lambda: lambda x: x - 1,
    "other attribute": lambda: lambda x: x.real,
    "closure": lambda: closure(1),
    "other closure": lambda: closure(2),
    "closure over a tensor": lambda: closure(torch.ones(2)),
    "closure over another": lambda: closure(torch.zeros(2)),
    "default": lambda: lambda x, y=1: x,
    "other default": lambda: lambda x, y=2: x,
    "keyword default": lambda: lambda x, *, y=1: x,
    "nested function": lambda: lambda x: (lambda y: y + 1)(x),
    "other nested function": lambda: lambda x: (lambda y: y + 2)(x),
    "global": lambda: uses_global,
    "recursive": lambda: recursive,
    "object": Plot,
    "other object": lambda: Plot(0.5),
    "method": lambda: Plot().method,
    "method of another": lambda: Plot(0.5).method,
    "class": lambda: Plot,
    "loop": Loop,
    "built in": lambda: max,
    "other built in": lambda: min,
    "torch": lambda: torch.relu,
    "module": nn.ReLU,
    "transform": lambda: Normalize([0.5], [1.0]),
    "other transform": lambda: Normalize([0.4], [1.0]),
    "transforms": lambda: Compose([Resize(4), Normalize([0.5], [1.0])]),
    "transforms, other size": lambda: Compose([Resize(5), Normalize([0.5], [1.0])]),
    "transforms, swapped": lambda: Compose([Normalize([0.5], [1.0]), Resize(4)]),
    "concept": ChannelConcept,
    "none": lambda: None,
    "true": lambda: True,
    "one": lambda: 1,
    "one as float": lambda: 1.0,
    "one as text": lambda: "1",
    "array": lambda: np.arange(3),
    "array of another type": lambda: np.arange(3.0),
    "objects": lambda: np.array([{}, 1], dtype=object),
    "image": lambda: Image.new("L", (2, 3)),
    "other image": lambda: Image.new("L", (3, 2)),
    "list": lambda: [1, 2],
    "tuple": lambda: (1, 2),
    "nested": lambda: [[1], 2],
    "nested otherwise": lambda: [1, [2]],
    "dict": lambda: {"a": 1, "b": 2},
    "other dict": lambda: {"a": 2, "b": 1},
    "set": lambda: {"a", "b", "c"},
    "namespace": lambda: SimpleNamespace(a=1),
    "dtype": lambda: torch.float32,
}


def test_values_have_one_fingerprint_each() -> None:
    prints = {name: fingerprint(make()) for name, make in VALUES.items()}
    assert prints == {name: fingerprint(make()) for name, make in VALUES.items()}
    same = [(a, b) for a in prints for b in prints if a < b and prints[a] == prints[b]]
    assert same == []


def test_what_does_not_count() -> None:
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint(Plot()) == fingerprint(copy.deepcopy(Plot()))
    shared = [1]
    assert fingerprint([shared, shared]) == fingerprint([[1], [1]])


def test_globals_that_a_function_reads_count(monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint(uses_global)
    monkeypatch.setitem(globals(), "FACTOR", 3.0)
    changed = fingerprint(uses_global)
    monkeypatch.setitem(globals(), "helper", recursive)
    assert len({before, changed, fingerprint(uses_global)}) == 3


def test_the_code_of_own_classes_counts() -> None:
    def build(source: str) -> Any:
        space: dict[str, Any] = {"__name__": "__main__"}
        exec(source, space)
        return space["Rule"]()

    first = "class Rule:\n    def go(self, x):\n        return x + 1"
    assert fingerprint(build(first)) == fingerprint(build(first))
    assert fingerprint(build(first)) != fingerprint(build(first.replace("1", "2")))


OWN_SCALE = """
from torch import nn

SCALE = {scale}

def change(x):
    return x * {scale}

class Change:
    table = {{"by": [{scale}]}}

    def __call__(self, x):
        return x * self.table["by"][0]

class Net(nn.Module):
    @property
    def factor(self):
        return {scale}

    def forward(self, x):
        return x * self.factor
"""
OWN_READER = """
import own_scale
from own_scale import Change

def by_function(x):
    return own_scale.change(x)

def by_number(x):
    return own_scale.SCALE * x

def by_class(x):
    return Change()(x)

def by_attribute(x):
    return by_attribute.scale * x
by_attribute.scale = own_scale.SCALE
"""


@pytest.mark.parametrize("name", ["by_function", "by_number", "by_class", "by_attribute", "Change", "Net"])
def test_what_is_read_in_modules_and_classes_of_ones_own_counts(
    name: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_reader.py").write_text(OWN_READER)

    def of_scale(scale: int) -> str:
        (tmp_path / "own_scale.py").write_text(OWN_SCALE.format(scale=scale))
        for module in ("own_scale", "own_reader"):
            monkeypatch.delitem(sys.modules, module, raising=False)
        linecache.checkcache()
        importlib.invalidate_caches()
        value = getattr(importlib.import_module("own_reader"), name, None)
        value = getattr(importlib.import_module("own_scale"), name)() if name in ("Change", "Net") else value
        return fingerprint(value)

    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    assert of_scale(2) == of_scale(2) != of_scale(3)


# --- the source of functions ------------------------------------------------------------------------------------------

SOURCE = '''
from __future__ import annotations
import functools

def kept(function):
    return function

FACTOR = 3

@kept
def scaled(values, by: float = 2.0, *, shift=None):
    """Values, scaled."""
    found = [value * by for value in values if value]  # as it is
    if shift is not None:
        found += [f"{shift!r}" for _ in range(1)]
    return found, FACTOR

plain = lambda x: x + 1
pair = (lambda x: x + 1), (lambda x: x + 2)

class Own:
    async def later(self):
        return await self.other(b"\\x00", 1.5, ...)
'''


def loaded_from(path: Any, text: str) -> dict[str, Any]:
    path.write_text(text)
    linecache.checkcache(str(path))
    names: dict[str, Any] = {"__name__": "own_source"}
    exec(compile(text, str(path), "exec", dont_inherit=True), names)
    return names


@pytest.mark.parametrize(
    ("name", "expected"), [("scaled", "0ce1230701725413"), ("plain", "3b2182361be909f5"), ("later", "5a2fb3abee199a1d")]
)
def test_a_function_has_the_same_fingerprint_under_every_version_of_python(
    tmp_path: Any, name: str, expected: str
) -> None:
    names = loaded_from(tmp_path / "own_source.py", SOURCE)
    function = names["Own"].later if name == "later" else names[name]
    assert hashlib.sha256((syntax_of(function.__code__) or "").encode()).hexdigest()[:16] == expected


def test_layout_and_comments_do_not_count_and_all_else_does(tmp_path: Any) -> None:
    first = loaded_from(tmp_path / "own_source.py", SOURCE)
    moved = (
        SOURCE.replace("# as it is", "# as it was")
        .replace("FACTOR = 3", "\n\nFACTOR = 3")
        .replace("by: float", "by:float")
    )
    other = loaded_from(tmp_path / "moved.py", moved)
    changed = loaded_from(tmp_path / "changed.py", SOURCE.replace("value * by", "value + by"))
    assert fingerprint(first["scaled"]) == fingerprint(other["scaled"]) != fingerprint(changed["scaled"])
    globals_count = loaded_from(tmp_path / "globals.py", SOURCE.replace("FACTOR = 3", "FACTOR = 4"))
    assert fingerprint(globals_count["scaled"]) != fingerprint(first["scaled"])


def test_what_has_no_source_of_its_own_counts_by_its_bytecode(tmp_path: Any) -> None:
    names = loaded_from(tmp_path / "own_source.py", SOURCE)
    assert [syntax_of(one.__code__) for one in names["pair"]] == [None, None], "two on a line"
    assert fingerprint(names["pair"][0]) != fingerprint(names["pair"][1])
    (tmp_path / "own_source.py").write_text(SOURCE.replace("value * by", "value - by"))
    linecache.checkcache(str(tmp_path / "own_source.py"))
    assert syntax_of(names["scaled"].__code__) is None, "the file has changed since it was loaded"
    assert syntax_of(names["plain"].__code__) is not None, "but not this function"
    interactive: dict[str, Any] = {}
    exec("def typed(x): return x", interactive)
    assert syntax_of(interactive["typed"].__code__) is None and fingerprint(interactive["typed"])
