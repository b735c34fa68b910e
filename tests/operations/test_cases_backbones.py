"""Scripted and traced backbones, models that differentiate inside, checkpoints."""

from __future__ import annotations

import pytest
import torch
from core_cases import Maps
from preset_cases import ACTIVATION_PRESETS, LRP_PRESETS, assert_same_map, maps, numbers, off, seeded
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from crp.composites import EpsilonPlus, Gradient, GradientTimesInput, UniformEpsilon
from crp.errors import UnseenError
from crp.rules import Epsilon, Gamma, Whole, ZPlus

ALL = {**LRP_PRESETS, **ACTIVATION_PRESETS}
IMAGES = numbers(2, 3, 8, 8, seed=3)
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:.torch.jit:{kind}") for kind in ("FutureWarning", "DeprecationWarning")
]


def backbone():
    return seeded(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU(), nn.Flatten()), seed=1)


def head():
    return seeded(nn.Linear(80, 3), seed=2)


def loaded(model, path):
    torch.jit.save(torch.jit.script(model), path)
    return torch.jit.load(path)


class Between(nn.Module):
    """A scripted part in the middle."""

    def __init__(self, part):
        super().__init__()
        net = backbone()
        self.front, self.part, self.back = (
            nn.Sequential(*net[:2]),
            part(nn.Sequential(*net[2:4])),
            nn.Sequential(nn.Flatten(), head()),
        )

    def forward(self, x):
        return self.back(self.part(self.front(x)))


#: Model with a part that is scripted or traced, and the name of that part.
COMPILED = {
    "scripted_backbone": (lambda path: nn.Sequential(torch.jit.script(backbone()), head()), "0"),
    "traced_backbone": (lambda path: nn.Sequential(torch.jit.trace(backbone(), IMAGES), head()), "0"),
    "frozen_backbone": (lambda path: nn.Sequential(torch.jit.freeze(torch.jit.script(backbone())), head()), "0"),
    "loaded_backbone": (lambda path: nn.Sequential(loaded(backbone(), path), head()), "0"),
    "scripted_between": (lambda path: Between(torch.jit.script), "part"),
    "traced_between": (lambda path: Between(lambda part: torch.jit.trace(part, numbers(1, 4, 6, 6))), "part"),
}


@pytest.mark.covering(3)
@pytest.mark.parametrize("preset", ALL)
@pytest.mark.parametrize("name", COMPILED)
def test_a_compiled_part_is_refused_by_name(name, preset, tmp_path, untouched):
    make, part = COMPILED[name]
    model = make(tmp_path / "model.pt").eval()
    with pytest.raises(UnseenError) as caught:
        maps(model, IMAGES, ALL[preset]())
    message = str(caught.value)
    assert repr(part) in message or "'1'" in message or "'back.0'" in message, message
    assert "script" in message or "trace" in message or "jit" in message, message
    assert "Whole(" in message and "None" in message, message
    plain = nn.Sequential(backbone(), head()).eval() if part == "0" else Between(lambda part: part).eval()
    assert off(maps(model, IMAGES, Gradient()), maps(plain, IMAGES, Gradient())) <= 1e-12


@pytest.mark.parametrize(
    "make", [torch.jit.script, lambda model: torch.jit.trace(model, IMAGES)], ids=["script", "trace"]
)
@pytest.mark.parametrize("preset", LRP_PRESETS)
def test_a_model_that_is_compiled_as_a_whole_is_refused(preset, make):
    model = make(nn.Sequential(backbone(), head()).eval())
    with pytest.raises((TypeError, UnseenError), match="script"):
        maps(model, IMAGES, LRP_PRESETS[preset]())


@pytest.mark.parametrize("name", COMPILED)
def test_reports_tell_of_a_compiled_part(name, tmp_path):
    make, part = COMPILED[name]
    model = make(tmp_path / "model.pt").eval()
    rows = EpsilonPlus().report(model, IMAGES).operations
    assert any("where no rule can see it: refused" in row.why for row in rows)
    assert part in str(EpsilonPlus(layer_map=[(part, None)]).report(model, IMAGES))


@pytest.mark.parametrize("name", COMPILED)
def test_a_compiled_part_as_one_operation(name, tmp_path, untouched):
    """By ε it is a gradient × input of that part; by None the chain rule."""
    make, part = COMPILED[name]
    model = make(tmp_path / "model.pt").eval()
    plain = nn.Sequential(backbone(), head()).eval() if part == "0" else Between(lambda part: part).eval()
    model(IMAGES)  # (a scripted part keeps its forward in itself at the first call)
    for rule in (None, Whole(Epsilon(0.1))):
        composite = UniformEpsilon(layer_map=[(part, rule)])
        with untouched(model):
            found = maps(model, IMAGES, composite)
        assert off(found, maps(plain, IMAGES, composite)) <= 1e-9


def test_whole_of_a_block_is_its_gradient_times_input():
    model = nn.Sequential(backbone(), head()).eval()
    features = model[0](IMAGES).detach()
    leaf = IMAGES.clone().requires_grad_()
    share = model[1].weight.detach()[1] * features / (features + 0.1)
    (wanted,) = torch.autograd.grad(model[0](leaf), leaf, share)
    composite = UniformEpsilon(epsilon=0.0, layer_map=[("0", Whole(Epsilon(0.1)))])
    assert off(maps(model, IMAGES, composite), wanted * IMAGES) <= 1e-9


@pytest.mark.parametrize("rule", [ZPlus(), Gamma()])
def test_rules_that_take_weights_apart_are_none_of_a_whole(rule):
    with pytest.raises((TypeError, ValueError), match=type(rule).__name__):
        maps(nn.Sequential(backbone(), head()).eval(), IMAGES, UniformEpsilon(layer_map=[("0", Whole(rule))]))


class Energy(nn.Module):
    """Model that differentiates an energy of its features."""

    def __init__(self, how):
        super().__init__()
        self.up, self.down, self.how = nn.Linear(6, 6), nn.Linear(6, 3), how

    def energy(self, h):
        return F.softplus(self.up(h)).square().sum()

    def forward(self, x):
        with torch.enable_grad():
            h = F.relu(self.up(x))
            if self.how == "grad":
                (force,) = torch.autograd.grad(self.energy(h), h, create_graph=True)
            elif self.how == "grad_of_input":
                (force,) = torch.autograd.grad(self.energy(x), x, create_graph=True)
            elif self.how == "backward":
                h.retain_grad()
                self.energy(h).backward(create_graph=True, inputs=[h])
                force = h.grad
            elif self.how == "func":
                force = torch.func.grad(self.energy)(h)
            elif self.how == "jacobian":
                force = torch.autograd.functional.jacobian(self.energy, h, create_graph=True)
            else:
                force = torch.func.vjp(self.energy, h)[1](torch.tensor(1.0, dtype=h.dtype))[0]
        return self.down(h - 0.1 * force)


@pytest.mark.covering(3)
@pytest.mark.parametrize("preset", LRP_PRESETS)
@pytest.mark.parametrize("how", ["grad", "grad_of_input", "backward", "func", "jacobian", "vjp"])
@pytest.mark.filterwarnings("ignore:Using backward")
def test_a_model_that_differentiates_inside_is_refused(how, preset, untouched):
    """It would predict otherwise, since its own derivative would follow the rules."""
    model = seeded(Energy(how))
    with untouched(model), pytest.raises(UnseenError, match=r"grad|backward|vjp|func"):
        maps(model, numbers(2, 6).requires_grad_(), LRP_PRESETS[preset]())


class Guided(Energy):
    """The derivative is a constant to autograd, as where a sampler is guided."""

    def __init__(self, force=None):
        super().__init__("constant")
        self.force = force

    def forward(self, x):
        h = F.relu(self.up(x))
        with torch.enable_grad():
            leaf = h.detach().requires_grad_()
            force = torch.autograd.grad(self.energy(leaf), leaf)[0] if self.force is None else self.force
        self.last = force.detach()
        return self.down(h - 0.1 * force)


@pytest.mark.parametrize("preset", LRP_PRESETS)
def test_a_derivative_that_is_constant_is_right_or_refused(preset):
    model, data = seeded(Guided()), numbers(2, 6)
    model(data)
    plain = seeded(Guided(model.last))
    try:
        found = maps(model, data, LRP_PRESETS[preset]())
    except UnseenError as error:
        assert "grad" in str(error)
    else:
        assert off(found, maps(plain, data, LRP_PRESETS[preset]())) <= 1e-12


class Checkpointed(nn.Module):
    def __init__(self, run):
        super().__init__()
        self.net, self.run = seeded(nn.Sequential(*backbone(), head())), run

    def forward(self, x):
        return self.run(self.net, x)


def plainly(net, x):
    return net(x)


CHECKPOINTS = {
    "whole": lambda net, x: checkpoint(net, x, use_reentrant=False),
    "front": lambda net, x: net[3:](checkpoint(net[:3], x, use_reentrant=False)),
    "back": lambda net, x: checkpoint(net[2:], net[:2](x), use_reentrant=False),
    "function": lambda net, x: net[1:](
        checkpoint(lambda y: F.conv2d(y, net[0].weight, net[0].bias), x, use_reentrant=False)
    ),
    "segments": lambda net, x: checkpoint_sequential(net, 3, x, use_reentrant=False),
    "nested": lambda net, x: checkpoint(
        lambda y: net[2:](checkpoint(net[:2], y, use_reentrant=False)), x, use_reentrant=False
    ),
    "reentrant": lambda net, x: net[3:](checkpoint(net[:3], x, use_reentrant=True)),
    "saved_on_cpu": lambda net, x: saved(net, x),
}


def saved(net, x):
    with torch.autograd.graph.save_on_cpu():
        return net(x)


@pytest.mark.covering(3)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # (predictions, which torch warns of)
@pytest.mark.parametrize("preset", {**ALL, "gradient": Gradient, "gradient_x_input": GradientTimesInput})
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints_change_nothing(name, preset):
    composite = {**ALL, "gradient": Gradient, "gradient_x_input": GradientTimesInput}[preset]
    model, plain = Checkpointed(CHECKPOINTS[name]).eval(), Checkpointed(plainly).eval()
    assert_same_map(model, plain, IMAGES, composite(), 1e-12)


def test_checkpoints_and_conditions():
    """Several backward passes recompute what the checkpoint has not kept."""
    conditions = [{"y": 1, "net.2": [c]} for c in range(5)] + [{"y": [0, 2]}]
    found, wanted = (
        Maps(Checkpointed(run).eval())(IMAGES, conditions, EpsilonPlus(), record_layer=["net.0"])
        for run in (CHECKPOINTS["back"], plainly)
    )
    assert off(found.heatmap, wanted.heatmap) <= 1e-12
    assert off(found.relevances["net.0"], wanted.relevances["net.0"]) <= 1e-12
