"""Parameters that hooks and parametrizations compute, arguments of the call, and weights that change between calls."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from preset_cases import FEW, LRP_PRESETS, assert_same_map, ended, maps, numbers, off, seeded
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

from crp.composites import EpsilonPlus, UniformGamma

IMAGES = numbers(2, 3, 8, 8, seed=3)


def old_weight_norm(layer):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        return nn.utils.weight_norm(layer)


def pruned_globally(layer):
    prune.global_unstructured([(layer, "weight")], prune.L1Unstructured, amount=0.3)
    return layer


def pruned_twice(layer):
    return prune.ln_structured(prune.l1_unstructured(layer, "weight", 0.3), "weight", 1, n=2, dim=0)


def hooked(layer):
    """Weight that a hook of one's own computes before each call."""
    layer.raw = nn.Parameter(layer.weight.detach())
    del layer.weight
    layer.register_forward_pre_hook(lambda module, args: setattr(module, "weight", module.raw.abs() - 0.1))
    return layer


class Positive(nn.Module):
    def forward(self, w):
        return w.exp() - 0.8


def exponential(layer):
    parametrize.register_parametrization(layer, "weight", Positive())
    return layer


def both_parametrized(layer):
    parametrize.register_parametrization(layer, "bias", Positive())
    return exponential(parametrizations.weight_norm(layer))


WRAPPED = {
    "weight_norm": old_weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "l1_unstructured": lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
    "random_bias": lambda layer: prune.random_unstructured(layer, "bias", 2),
    "pruned_globally": pruned_globally,
    "pruned_twice": pruned_twice,
    "hooked": hooked,
    "new_weight_norm": parametrizations.weight_norm,
    "new_spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "exponential": exponential,
    "both_parametrized": both_parametrized,
}
WRAPPED_LAYERS = {
    "linear": (lambda: nn.Linear(6, 6), (2, 6)),
    "conv": (lambda: nn.Conv2d(3, 6, 3, padding=1), (2, 3, 5, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 6, 3, 2), (2, 3, 3, 2)),
}


@pytest.mark.covering(12)
@pytest.mark.parametrize("preset", FEW)
@pytest.mark.parametrize("layer", WRAPPED_LAYERS)
@pytest.mark.parametrize("wrap", WRAPPED)
def test_weights_that_hooks_and_parametrizations_compute(wrap, layer, preset, untouched):
    make, shape = WRAPPED_LAYERS[layer]
    data = numbers(*shape)
    plain = seeded(ended(make(), data))
    model = copy.deepcopy(plain)
    model[0] = WRAPPED[wrap](model[0]).eval()
    model(data)
    with torch.no_grad():
        for name in ("weight", "bias"):
            getattr(plain[0], name).copy_(getattr(model[0], name))
    with untouched(model):
        assert_same_map(model, plain, data, LRP_PRESETS[preset]())


@pytest.mark.filterwarnings("ignore:batch norm is not merged into")
@pytest.mark.parametrize("preset", FEW)
def test_batch_norm_behind_a_computed_weight_is_the_same_function(preset):
    """Whether it is merged or not, the model predicts as before and explains as a plain one does."""

    def net(wrap):
        conv = wrap(nn.Conv2d(3, 4, 3, bias=False))
        return nn.Sequential(conv, nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))

    model = seeded(net(parametrizations.weight_norm))
    plain = net(lambda conv: conv).double().eval()
    with torch.no_grad():
        plain[0].weight.copy_(model[0].weight)
    for i in (1, 4):
        plain[i].load_state_dict(model[i].state_dict())
    composite = LRP_PRESETS[preset]
    with composite().context(model):
        assert off(model(IMAGES).detach(), plain(IMAGES).detach()) <= 1e-12
    assert_same_map(model, plain, IMAGES, composite(canonizers=None))


class Decoder(nn.Module):
    """U-shaped net: (n, 3, 8, 8) -> (n, 2)."""

    def __init__(self, sizes):
        super().__init__()
        self.down = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(4, 2, 3, stride=2, padding=1)
        self.sizes = sizes

    def forward(self, x):
        h = F.relu(self.down(x))
        return sum(self.up(h, *args, **kwargs).mean((2, 3)) for args, kwargs in self.sizes)


OUTPUT_SIZES = {
    "list": [((), {"output_size": [8, 8]})],
    "size": [((), {"output_size": torch.Size([8, 8])})],
    "positional": [(([8, 8],), {})],
    "with_channels": [((), {"output_size": [2, 2, 8, 8]})],
    "odd": [((), {"output_size": [7, 7]})],
    "two_calls": [((), {"output_size": [8, 7]}), ((), {"output_size": [7, 8]}), ((), {})],
}


@pytest.mark.covering(3)
@pytest.mark.parametrize("preset", LRP_PRESETS)
@pytest.mark.parametrize("sizes", OUTPUT_SIZES)
def test_transposed_convolution_keeps_its_output_size(sizes, preset):
    model = seeded(Decoder(OUTPUT_SIZES[sizes]))
    plain = copy.deepcopy(model)
    paddings = [[n % 7 for n in (*args, *kwargs.values(), [7, 7])[0][-2:]] for args, kwargs in OUTPUT_SIZES[sizes]]

    def forward(x):
        h, up = F.relu(plain.down(x)), plain.up
        ends = (F.conv_transpose2d(h, up.weight, up.bias, 2, 1, output_padding=p) for p in paddings)
        return sum(end.mean((2, 3)) for end in ends)

    plain.forward = forward
    assert_same_map(model, plain, IMAGES, LRP_PRESETS[preset]())


@pytest.mark.parametrize("change", ["in_place", "assigned", "replaced"])
def test_a_weight_that_changes_between_calls_is_not_remembered(change):
    model = seeded(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)))
    for composite in (EpsilonPlus(), UniformGamma()):
        before = maps(model, IMAGES, composite)
        new = numbers(4, 3, 3, 3, seed=11)
        with torch.no_grad():
            if change == "in_place":
                model[0].weight.copy_(new)
            elif change == "assigned":
                model[0].weight.data = new
            else:
                model[0].weight = nn.Parameter(new)
        plain = copy.deepcopy(model)
        assert off(maps(model, IMAGES, composite), maps(plain, IMAGES, type(composite)())) <= 1e-12
        assert off(maps(model, IMAGES, composite), before) > 1e-3
        model = seeded(model)
