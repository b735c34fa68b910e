"""Looking at a model leaves it as it was; a module that is judged by what it calls is judged as it is now."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from core_cases import Maps
from preset_cases import ACTIVATION_PRESETS, FEW, LRP_PRESETS, assert_same_map, maps, numbers, off, seeded
from torch import nn
from torch.ao import quantization
from torch.nn import functional as F

from crp.attribution import CondAttribution
from crp.composites import EpsilonPlus, UniformEpsilon

ALL = {**LRP_PRESETS, **ACTIVATION_PRESETS}
IMAGES = numbers(2, 3, 8, 8, seed=3)


class Counting(nn.Module):
    """Counts its calls in every way: a number, a list, a buffer, a dict, an attribute that appears."""

    def __init__(self):
        super().__init__()
        self.calls, self.log, self.seen = 0, [], {}
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.log.append(tuple(x.shape))
        self.seen["calls"] = self.seen.get("calls", 0) + 1
        self.total += 1
        self.last = x.detach()
        return x * torch.sigmoid(x)


class Stateless(Counting):
    """The same without a buffer: written out, elementwise, one tensor in and out."""

    def __init__(self):
        super().__init__()
        del self.total

    def forward(self, x):
        self.calls += 1
        self.log.append(tuple(x.shape))
        self.seen["calls"] = self.seen.get("calls", 0) + 1
        self.last = x.detach()
        return x * torch.sigmoid(x)


class Spiking(nn.Module):
    """Keeps a membrane potential between calls, without a parameter or buffer."""

    def __init__(self):
        super().__init__()
        self.potential = 0.0

    def forward(self, x):
        self.potential = 0.5 * self.potential + x
        return torch.tanh(self.potential) * 1.0


def net(act):
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), act, nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
    return seeded(nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 3)))


def state(module):
    """What a module knows, as plain data."""
    known = {key: value for key, value in vars(module).items() if not key.startswith("_") and key != "training"}
    return {
        key: value.tolist() if isinstance(value, torch.Tensor) else copy.deepcopy(value) for key, value in known.items()
    }


@pytest.mark.parametrize("preset", ALL)
@pytest.mark.parametrize("make", [Counting, Stateless, Spiking], ids=["counting", "stateless", "spiking"])
def test_one_attribution_is_one_call(make, preset):
    """Whatever else runs the model, to look for norms or positions, is taken back; DeepLIFT needs its reference."""
    model = net(make())
    plain = copy.deepcopy(model)
    model(IMAGES), plain(IMAGES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        maps(model, IMAGES, ALL[preset]())
    with torch.enable_grad():
        plain(IMAGES.clone().requires_grad_())
    if preset != "deeplift":
        found, wanted = state(model[3]), state(plain[3])
        assert found.keys() == wanted.keys()
        for key, value in found.items():  # (norms that are merged shift what is read by roundings)
            torch.testing.assert_close(value, wanted[key], rtol=1e-6, atol=1e-6)
        assert found.get("calls") == wanted.get("calls")
    assert off(model(IMAGES).detach(), plain(IMAGES).detach()) <= (1e-12 if preset != "deeplift" else 10)


class Quantised(nn.Module):
    def __init__(self):
        super().__init__()
        self.quant, self.dequant = quantization.QuantStub(), quantization.DeQuantStub()
        self.conv, self.norm, self.relu, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Linear(4, 3)

    def forward(self, x):
        h = self.relu(self.norm(self.conv(self.quant(x))))
        return self.dequant(self.fc(h.mean((2, 3))))


def prepared():
    """Quantisation-aware model whose observers still watch, in evaluation mode."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = Quantised().train()
        model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
        quantization.prepare_qat(model, inplace=True)
    model(torch.randn(4, 3, 8, 8))
    return model.eval()


@pytest.mark.parametrize("preset", LRP_PRESETS)
@pytest.mark.filterwarnings("ignore:.*no rule for:UserWarning", "ignore:torch.ao:DeprecationWarning")
def test_a_quantisation_aware_model_is_as_after_one_call(preset):
    model, data = prepared(), numbers(2, 3, 8, 8, seed=4).float()
    plain = copy.deepcopy(model)
    try:
        Maps(model)(data, [{"y": 1}], LRP_PRESETS[preset]())
    except RuntimeError as error:  # (a function that no rule can see)
        assert "no rule can see" in str(error), error
    plain(data)
    assert {k: v.tolist() for k, v in model.state_dict().items()} == {
        k: v.tolist() for k, v in plain.state_dict().items()
    }
    assert torch.equal(model(data), plain(data))


class Frames(nn.Module):
    """One convolution and its norm, called for each frame: (n, frames, 3, 8, 8) -> (n, 3)."""

    def __init__(self, how):
        super().__init__()
        self.conv, self.norm, self.head, self.how = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3), how

    def one(self, x):
        return F.relu(self.norm(self.conv(x))).mean((2, 3))

    def forward(self, x):
        if self.how == "loop":
            h = torch.stack([self.one(frame) for frame in x.unbind(1)], 1)
        elif self.how == "convolutions_first":
            maps = [self.conv(frame) for frame in x.unbind(1)]
            h = torch.stack([F.relu(self.norm(m)).mean((2, 3)) for m in maps], 1)
        else:
            h = self.one(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return self.head(h.mean(1))


class Twins(Frames):
    def forward(self, x):
        return self.head(self.one(x[:, 0]) - self.one(x[:, 1]))


@pytest.mark.parametrize("preset", LRP_PRESETS)
@pytest.mark.parametrize("how", ["loop", "convolutions_first"])
def test_a_norm_that_is_called_for_each_frame_is_merged(how, preset):
    model, flat = seeded(Frames(how)), seeded(Frames("flat"))
    settings = {"split": 1.0} if "cmp" in preset else {}  # (depths count calls)
    assert_same_map(model, flat, numbers(2, 3, 3, 8, 8), LRP_PRESETS[preset](**settings))


@pytest.mark.parametrize("preset", FEW)
def test_branches_of_a_twin_net_are_merged_like_copies(preset):
    class Copies(Twins):
        def __init__(self, twins):
            super().__init__("loop")
            self.double().load_state_dict(twins.state_dict())
            self.other = copy.deepcopy(nn.Sequential(self.conv, self.norm))

        def forward(self, x):
            return self.head(self.one(x[:, 0]) - F.relu(self.other(x[:, 1])).mean((2, 3)))

    twins = seeded(Twins("loop"))
    assert_same_map(twins, Copies(twins).eval(), numbers(2, 2, 3, 8, 8), LRP_PRESETS[preset]())


class Switch(nn.Module):
    """A module without parameters whose function changes."""

    def __init__(self):
        super().__init__()
        self.mode, self.context = "gelu", None

    def forward(self, x):
        if self.mode == "gelu":
            return 0.5 * x * (1 + torch.erf(x / 2**0.5))
        if self.mode == "shifted":
            return 2 * x + 1
        if self.mode == "normalised":
            return torch.tanh(x / x.norm(dim=1, keepdim=True))
        if self.mode == "by_value":
            return torch.tanh(x) * 2 if x.mean() > 0 else x - x.mean(1, keepdim=True)
        if self.mode == "by_size":
            return torch.tanh(x) * 2 if len(x) > 1 else torch.tanh(x.cumsum(1)) * 2
        return torch.tanh(x) + self.context


class Around(nn.Module):
    def __init__(self, inline=False):
        super().__init__()
        self.up, self.act, self.down, self.inline = nn.Linear(6, 8), Switch(), nn.Linear(8, 3), inline

    def forward(self, x):
        h = self.up(x)
        self.act.context = h.flip(1)
        y = Switch.forward(self.act, h) if self.inline else self.act(h)
        self.act.context = None
        return self.down(y)


def spelled(mode, inline=False):
    model = seeded(Around(inline))
    model.act.mode = mode
    return model


@pytest.mark.parametrize("mode", ["shifted", "normalised", "stash"])
def test_what_a_module_is_can_change(mode):
    """First an activation, then none; what was found the first time does not hold for the second."""
    model, data = spelled("gelu"), numbers(3, 6)
    maps(model, data, UniformEpsilon())
    model.act.mode = mode
    assert_same_map(model, spelled(mode, inline=True), data, UniformEpsilon())
    model.act.mode = "gelu"
    fresh = spelled("gelu")
    assert off(maps(model, data, UniformEpsilon()), maps(fresh, data, UniformEpsilon())) <= 1e-12


@pytest.mark.parametrize("mode", ["by_value", "by_size"])
def test_what_a_module_is_can_depend_on_the_data(mode):
    model, inline = spelled(mode), spelled(mode, inline=True)
    one, other = numbers(3, 6), numbers(1, 6)
    with torch.no_grad():
        model.up.bias += 1.0
        inline.up.bias += 1.0
    for data in (one, other, one - 3.0, one):
        elementwise = (len(data) > 1) if mode == "by_size" else bool(model.up(data).mean() > 0)
        found = Maps(model)(data, [{"y": 1}], UniformEpsilon(), record_layer=["up", "act"])
        if elementwise:
            assert off(found.relevances["up"], found.relevances["act"]) <= 1e-12
        else:
            assert off(found.heatmap, maps(inline, data, UniformEpsilon())) <= 1e-12


def test_a_stash_that_depends_on_the_input_makes_no_activation():
    """A module of one tensor that adds another one, which it was given aside."""
    assert_same_map(spelled("stash"), spelled("stash", inline=True), numbers(3, 6), EpsilonPlus())


@pytest.mark.parametrize("preset", FEW)
def test_random_numbers_are_drawn_as_without_looking(preset):
    """A module that draws random numbers gets those of the caller's generator."""

    class Noisy(nn.Module):
        def forward(self, x):
            return torch.tanh(x) * (1 + 0.1 * torch.rand(x.shape, dtype=x.dtype))

    model = net(Noisy())
    torch.manual_seed(3)
    wanted = model(IMAGES)
    torch.manual_seed(3)
    with pytest.warns(UserWarning, match="as by random numbers"):
        found = CondAttribution(model)(IMAGES, [{"y": 1}], FEW[preset]())
    assert off(found.prediction, wanted.detach()) <= 1e-12
