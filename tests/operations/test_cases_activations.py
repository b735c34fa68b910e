"""Activations that a module without parameters writes out are one activation; what is none of them is not."""

from __future__ import annotations

import math
import warnings

import core_cases
import pytest
import torch
import transformers.activations as hugging_face
from core_cases import Maps
from preset_cases import FEW, LRP_PRESETS, assert_closes, assert_same_map, maps, numbers, off, seeded
from torch import nn
from torch.nn import functional as F
from torchvision import transforms

from crp.composites import CPLRP, AttnLRP, DeepLift, RelP, UniformEpsilon
from crp.rules import Pass, Whole

DATA = numbers(3, 6, seed=3)
CDF = math.sqrt(2 / math.pi)


class Written(nn.Module):
    """A function as a module without parameters."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, input):
        return self.function(input)


class Quick(nn.Module):
    """As CLIP and timm write it."""

    def forward(self, x: torch.Tensor):
        return x * torch.sigmoid(1.702 * x)


def in_place(x):
    inner = x.pow(3).mul_(0.044715).add_(x).mul_(CDF)
    return torch.tanh(inner).add(1).mul_(x).mul_(0.5)


def out(x):
    gate = torch.empty_like(x.detach())
    gate.copy_(torch.sigmoid(1.702 * x))
    return x * gate


def hugging(name):
    return lambda: hugging_face.ACT2FN[name]


#: Each makes a module.
WRITTEN = {
    "gelu_new": hugging("gelu_new"),
    "gelu_fast": hugging("gelu_fast"),
    "gelu_accurate": hugging("gelu_accurate"),
    "gelu_python": hugging("gelu_python"),
    "gelu_python_tanh": hugging("gelu_python_tanh"),
    "quick_gelu": hugging("quick_gelu"),
    "laplace": hugging("laplace"),
    "relu2": hugging("relu2"),
    "gelu_10": hugging("gelu_10"),
    "quick": Quick,
    "erf": lambda: Written(lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))),
    "erf_from_the_right": lambda: Written(lambda x: (torch.special.erf(x * 0.5**0.5) + 1) * x / 2),
    "tanh_by_operators": lambda: Written(lambda x: x * 0.5 * (1 + (CDF * (x + 0.044715 * x**3)).tanh())),
    "tanh_by_squares": lambda: Written(lambda x: 0.5 * x * (1 + torch.tanh(CDF * x * (1 + 0.044715 * x.square())))),
    "tanh_in_place": lambda: Written(in_place),
    "words": lambda: Written(lambda x: torch.mul(input=x, other=torch.sigmoid(torch.mul(x, other=1.702)))),
    "copied": lambda: Written(out),
    "swish": lambda: Written(lambda x: x * F.sigmoid(x)),
    "swish_divided": lambda: Written(lambda x: x / (1 + torch.exp(-x))),
    "mish": lambda: Written(lambda x: x * torch.tanh(F.softplus(x))),
    "mish_by_log": lambda: Written(lambda x: x * torch.tanh(torch.log1p(torch.exp(x)))),
    "hard_swish": lambda: Written(lambda x: x * F.relu6(x + 3) / 6),
    "hard_swish_clamped": lambda: Written(lambda x: x * (x + 3).clamp(0, 6) / 6),
    "squared_relu": lambda: Written(lambda x: F.relu(x) ** 2),
    "elu_by_where": lambda: Written(lambda x: torch.where(x > 0, x, torch.expm1(x))),
    "snake": lambda: Written(lambda x: x + torch.sin(x) ** 2),
    "gaussian": lambda: Written(lambda x: torch.exp(-(x**2) / 2)),
    "nested": lambda: Written(Written(lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))))),
    "of_modules": lambda: Mixed(),
    "cast": lambda: Written(lambda x: (x.to(torch.float64) * torch.sigmoid(x.double())).to(x.dtype)),
}


class Mixed(nn.Module):
    """Calls modules for its parts."""

    def __init__(self):
        super().__init__()
        self.gate, self.drop = nn.Sigmoid(), nn.Dropout(0.1)

    def forward(self, x):
        return x * self.drop(self.gate(x))


class Net(nn.Module):
    """Dense layers around an activation: (n, 6) -> (n, 4)."""

    def __init__(self, act):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(6, 8), act, nn.Linear(8, 4)

    def forward(self, x):
        return self.down(self.act(self.up(x)))


@pytest.mark.covering(3)
@pytest.mark.parametrize("preset", LRP_PRESETS)
@pytest.mark.parametrize("name", WRITTEN)
def test_written_out_activations_hand_relevance_on_as_it_is(name, preset):
    model = seeded(Net(WRITTEN[name]()), seed=2)
    found = Maps(model)(DATA, [{"y": 1}], LRP_PRESETS[preset](), record_layer=["up", "act"]).relevances
    assert found["act"].abs().max() > 0
    alive = found["act"] != 0
    assert off(found["up"] * alive, found["act"]) <= 1e-12
    whole = Maps(model)(DATA, [{"y": 1}], LRP_PRESETS[preset](layer_map=[("act", Whole(Pass()))]))
    assert off(maps(model, DATA, LRP_PRESETS[preset]()), whole.heatmap) <= 1e-12


#: Activations that torch has, too.
TORCHS = {
    "gelu_new": nn.GELU("tanh"),
    "gelu_accurate": nn.GELU("tanh"),
    "gelu_python": nn.GELU(),
    "erf": nn.GELU(),
    "erf_from_the_right": nn.GELU(),
    "tanh_by_operators": nn.GELU("tanh"),
    "tanh_in_place": nn.GELU("tanh"),
    "swish": nn.SiLU(),
    "swish_divided": nn.SiLU(),
    "mish": nn.Mish(),
    "hard_swish": nn.Hardswish(),
    "hard_swish_clamped": nn.Hardswish(),
    "elu_by_where": nn.ELU(),
}


@pytest.mark.covering(3)
@pytest.mark.parametrize("preset", [*LRP_PRESETS, "deeplift"])
@pytest.mark.parametrize("name", TORCHS)
def test_written_out_activations_equal_those_of_torch(name, preset):
    model, plain = seeded(Net(WRITTEN[name]())), seeded(Net(TORCHS[name]))
    composite = DeepLift() if preset == "deeplift" else LRP_PRESETS[preset]()
    assert_same_map(model, plain, DATA, composite)


class Inside(Net):
    """The same, with the activation written out inside of the net itself, which is no activation."""

    def __init__(self, function):
        super().__init__(nn.Identity())
        self.function = function

    def forward(self, x):
        return self.down(self.act(self.function(self.up(x))))


#: Products of factors that are made of one tensor, and the activations that they are.
PRODUCTS = {
    "hard_swish": (lambda x: x * F.relu6(x + 3) / 6, nn.Hardswish()),
    "hard_swish_clamped": (lambda x: x * torch.clamp(x + 3, 0, 6) / 6, nn.Hardswish()),
    "hard_swish_divided_first": (lambda x: (F.hardtanh(x + 3, 0, 6) / 6) * x, nn.Hardswish()),
    "hard_swish_in_place": (lambda x: x.clone().mul_((x + 3).clamp_(0, 6).div_(6)), nn.Hardswish()),
    "hard_sigmoid": (lambda x: x * F.hardsigmoid(x), nn.Hardswish()),
    "erf": (lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))), nn.GELU()),
    "normal": (lambda x: x * torch.special.ndtr(x), nn.GELU()),
    "tanh": (lambda x: 0.5 * x * (1 + torch.tanh(CDF * (x + 0.044715 * x**3))), nn.GELU("tanh")),
    "one_over": (lambda x: x * (1 / (1 + torch.exp(-x))), nn.SiLU()),
    "sigmoid": (lambda x: 1 / (1 + torch.exp(-x)), nn.Sigmoid()),
    "softplus": (lambda x: (x.exp() + 1).log(), nn.Softplus()),
    "normal_distribution": (lambda x: 0.5 * (1 + torch.erf(x / math.sqrt(2))), Written(torch.special.ndtr)),
    "where": (lambda x: x * torch.where(x > 0, 1.0, 0.25), nn.LeakyReLU(0.25)),
    "step": (lambda x: x * (x > 0), nn.ReLU()),
}


@pytest.mark.parametrize("kind", [AttnLRP, RelP, CPLRP])
@pytest.mark.parametrize("name", PRODUCTS)
def test_an_activation_that_is_written_out_inside_of_a_net(name, kind):
    function, torchs = PRODUCTS[name]
    assert_same_map(seeded(Inside(function)), seeded(Net(torchs)), DATA, kind())


def overwritten_later(x):
    x = x.square() + 2
    y = 1 / x
    x += 1
    return x + y


@pytest.mark.parametrize("kind", [AttnLRP, RelP, CPLRP])
def test_what_one_over_something_has_read_may_be_overwritten(kind):
    """As torch keeps no more of it than the result."""
    plain = Inside(lambda x: (x.square() + 2) + 1 + 1 / (x.square() + 2))
    assert_same_map(seeded(Inside(overwritten_later)), seeded(plain), DATA, kind())


def test_concepts_between_two_activations_that_are_written_out_add_up():
    def twice(s, x):
        h = s.between(s.up(x) * F.hardsigmoid(s.up(x)))
        return s.down(h * F.hardsigmoid(h))

    layers = {"up": nn.Linear(6, 8), "between": nn.Identity(), "down": nn.Linear(8, 4)}
    model = seeded(core_cases.Net(twice, **layers))
    parts = Maps(model)(DATA, [{"between": [c], "y": 1} for c in range(8)], AttnLRP()).heatmap
    assert off(parts.unflatten(0, (len(DATA), 8)).sum(1), maps(model, DATA, AttnLRP())) <= 1e-12


@pytest.mark.parametrize("kind", [AttnLRP, RelP])
def test_relevance_flows_through_an_exponential_that_is_a_layer(kind):
    def wiring(s, x):
        return s.down(s.up(x) * (1 / (1 + s.exp(-s.gate(x)))))

    layers = {"up": nn.Linear(6, 8), "gate": nn.Linear(6, 8), "exp": Written(torch.exp), "down": nn.Linear(8, 4)}
    model = seeded(core_cases.Net(wiring, **layers))
    whole = Maps(model)(DATA, [{"y": 1}], kind(), record_layer=["exp", "gate"])
    parts = Maps(model)(DATA, [{"exp": [c], "y": 1} for c in range(8)], kind()).heatmap
    every = Maps(model)(DATA, [{"exp": list(range(8)), "y": 1}], kind()).heatmap
    assert off(whole.heatmap, maps(model, DATA, kind())) <= 1e-12
    assert off(whole.relevances["exp"], whole.relevances["gate"]) <= 1e-12
    assert every.abs().max() > 0 and off(parts.unflatten(0, (len(DATA), 8)).sum(1), every) <= 1e-12


@pytest.mark.parametrize("kind", [AttnLRP, RelP])
def test_what_activations_that_are_written_out_keep_is_accounted_for(kind):
    assert_closes(seeded(Inside(PRODUCTS["tanh"][0])), DATA, kind())


@pytest.mark.parametrize("preset", FEW)
def test_an_activation_at_the_input_and_one_that_is_called_twice(preset):
    def wiring(act):
        first, last = nn.Linear(6, 6), nn.Linear(6, 4)
        return nn.Sequential(act, first, act, last)

    assert_same_map(seeded(wiring(Quick())), seeded(wiring(Written(Quick().forward))), DATA, LRP_PRESETS[preset]())
    gelu = hugging_face.ACT2FN["gelu_python"]
    assert_same_map(seeded(wiring(gelu)), seeded(wiring(nn.GELU())), DATA, LRP_PRESETS[preset]())


class Constants(nn.Module):
    """Normalises by buffers."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.full((8,), 0.3, dtype=torch.float64))
        self.register_buffer("std", torch.linspace(0.5, 1.5, 8, dtype=torch.float64))

    def forward(self, x):
        return (x - self.mean) / self.std


class Pictures(nn.Module):
    def forward(self, x):
        return transforms.Normalize((0.3,), (0.5,))(x.reshape(len(x), 1, 2, -1)).reshape(x.shape)


#: Modules without parameters that are no activations, and the function that each is.
OTHERS = {
    "constants": (Constants, lambda x: (x - 0.3) / torch.linspace(0.5, 1.5, 8, dtype=torch.float64)),
    "pictures": (Pictures, lambda x: x.sub(0.3).div(0.5)),
    "affine": (lambda: Written(lambda x: 2 * x + 1), lambda x: 2 * x + 1),
    "affine_in_place": (lambda: Written(lambda x: x.mul_(2).add_(1)), lambda x: 2 * x + 1),
    "channel_gate": (
        lambda: Written(lambda x: x * torch.sigmoid(x.mean(1, keepdim=True))),
        lambda x: x * torch.sigmoid(x.mean(1, keepdim=True)),
    ),
    "neighbours": (
        lambda: Written(lambda x: x * torch.sigmoid(x.roll(1, 1))),
        lambda x: x * torch.sigmoid(x.roll(1, 1)),
    ),
    "halves": (lambda: Written(lambda x: F.glu(torch.cat([x, x.flip(1)], 1))), lambda x: x * x.flip(1).sigmoid()),
    "standardised": (
        lambda: Written(lambda x: (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)),
        lambda x: (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True),
    ),
    "cumulated": (lambda: Written(lambda x: torch.tanh(x).cumsum(1)), lambda x: torch.tanh(x).cumsum(1)),
    "sorted": (lambda: Written(lambda x: torch.sort(x, 1).values), lambda x: torch.sort(x, 1).values),
    "residual": (lambda: Written(lambda x: x + 1.5), lambda x: x + 1.5),
}


@pytest.mark.covering(3)
@pytest.mark.parametrize("preset", LRP_PRESETS)
@pytest.mark.parametrize("name", OTHERS)
def test_modules_that_are_no_activations_equal_their_functions(name, preset):
    make, function = OTHERS[name]

    class Inline(Net):
        def forward(self, x):
            return self.down(function(self.up(x)))

    model, plain = seeded(Net(make())), seeded(Inline(nn.Identity()))
    assert_same_map(model, plain, DATA, LRP_PRESETS[preset]())
    if name in ("constants", "affine", "residual") and preset == "lrp_0":
        found = Maps(model)(DATA, [{"y": 1}], LRP_PRESETS[preset](), record_layer=["up", "act"]).relevances
        assert off(found["up"], found["act"]) > 1e-2, "a constant keeps its share"


def test_two_tensors_are_no_activation():
    class Pair(nn.Module):
        def forward(self, a, b):
            return a * torch.sigmoid(b)

    class Gated(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.a, self.b, self.down, self.pair = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 4), module

        def forward(self, x):
            return self.down(self.pair(self.a(x), self.b(x)) if self.pair else self.a(x) * torch.sigmoid(self.b(x)))

    assert_same_map(seeded(Gated(Pair())), seeded(Gated(None)), DATA, UniformEpsilon())


def test_what_an_activation_calls_is_not_warned_of():
    """Also where the table has no rule for a function by itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = UniformEpsilon().report(seeded(Net(hugging_face.ACT2FN["gelu_python_tanh"])), DATA)
    assert "Pass()" in str(report)
