"""Norms that a model writes out itself, and those of exported models: as torch's own, and without a warning."""

from __future__ import annotations

import pytest
import torch
from preset_cases import LRP_PRESETS, assert_same_map, numbers, seeded
from torch import nn
from torch.nn import functional as F

from crp.composites import AttnLRP, EpsilonAlpha2Beta1, EpsilonPlus, RelP

DATA, PICTURES, EPS = numbers(2, 5, 6, seed=4), numbers(2, 3, 10, 10, seed=4), 1e-5


class Normed(nn.Module):
    """A norm of the last of three axes between dense layers, scaled and shifted: (n, 5, 6) -> (n, 3)."""

    def __init__(self, norm):
        super().__init__()
        self.below, self.above, self.norm = nn.Linear(6, 6), nn.Linear(6, 3), norm
        self.weight, self.bias = nn.Parameter(torch.rand(6)), nn.Parameter(torch.randn(6))

    def forward(self, x):
        return self.above(self.norm(self.below(x)) * self.weight + self.bias).mean(1)


def centred(x):
    return x - x.mean(-1, keepdim=True)


def both(x):
    var, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    return (x - mean) * torch.rsqrt(var + EPS)


def deviation(x):
    std, mean = torch.std_mean(x, -1, False, True)
    return (x - mean) / (std**2 + EPS) ** 0.5


def grouped(x):
    parts = x.unflatten(-1, (2, 3))
    var, mean = torch.var_mean(parts, -1, unbiased=False, keepdim=True)
    return ((parts - mean) / torch.sqrt(var + EPS)).flatten(-2)


def of_groups(x):
    return F.group_norm(x.flatten(0, 1), 2).view_as(x)


def by_kernel(x):
    return torch.native_group_norm(x.flatten(0, 1), None, None, 10, 6, 1, 2, EPS)[0].view_as(x)


def layer_norm(x):
    return F.layer_norm(x, (6,))


def of_a_batch(x):
    return F.batch_norm(x.reshape(1, -1, 6), None, None, training=True).view_as(x)


def rms_norm(x):
    return F.rms_norm(x, (6,), eps=EPS)


def unit(x):
    return F.rms_norm(x, (6,), eps=0.0) / 6**0.5


#: Spellings, and the function of torch that each is.
NORMS = {
    "var": (lambda x: centred(x) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + EPS), layer_norm),
    "var times": (lambda x: centred(x) * torch.rsqrt(x.var(-1, correction=0, keepdim=True) + EPS), layer_norm),
    "var flat": (lambda x: centred(x) / (x.var(-1, unbiased=False)[..., None] + EPS).sqrt(), layer_norm),
    "squares": (lambda x: centred(x) / (centred(x).pow(2).mean(-1, keepdim=True) + EPS).sqrt(), layer_norm),
    "moments": (lambda x: centred(x) / ((x * x).mean(-1, True) - x.mean(-1, True) ** 2 + EPS).sqrt(), layer_norm),
    "var and mean": (both, layer_norm),
    "std and mean": (deviation, layer_norm),
    "kernel": (lambda x: torch.native_layer_norm(x, (6,), None, None, EPS)[0], layer_norm),
    "groups": (grouped, of_groups),
    "kernel of groups": (by_kernel, of_groups),
    "statistics of a batch": (of_a_batch, layer_norm),
    "root mean square": (lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS), rms_norm),
    "root of a product": (lambda x: x / ((x * x).mean(-1, True) + EPS) ** 0.5, rms_norm),
    "norm": (lambda x: x / x.norm(dim=-1, keepdim=True), unit),
    "norm of algebra": (lambda x: x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-12), unit),
    "normalize": (lambda x: F.normalize(x, dim=-1), unit),
}


@pytest.mark.covering(3)
@pytest.mark.parametrize("preset", [*LRP_PRESETS, "attn_lrp", "relp"])
@pytest.mark.parametrize("name", NORMS)
def test_a_norm_that_is_written_out_is_one(name, preset):
    composite = {"attn_lrp": AttnLRP, "relp": RelP, **LRP_PRESETS}[preset]()
    model, plain = (seeded(Normed(function)) for function in NORMS[name])
    assert_same_map(model, plain, DATA, composite)


@pytest.mark.parametrize("preset", LRP_PRESETS)
def test_a_variance_is_a_mean_of_squares(preset):
    models = [seeded(Normed(lambda x, f=f: f(x)[..., None].expand_as(x))) for f in (of_torch, of_squares)]
    assert_same_map(*models, DATA, LRP_PRESETS[preset]())


def of_torch(x):
    return x.var(-1, correction=0)


def of_squares(x):
    return centred(x).square().mean(-1)


class Mixed(nn.Module):
    """Every norm that torch exports as a kernel of its own, and attention."""

    def __init__(self):
        super().__init__()
        self.conv, self.batch, self.group = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GroupNorm(2, 8)
        self.layer, self.attend = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = F.max_pool2d(F.gelu(self.group(self.batch(self.conv(x)))), 2).flatten(2).transpose(1, 2)
        x = torch.cat([x[:, :1], x], 1)
        normed = self.layer(x)
        return self.head((x + self.attend(normed, normed, normed)[0]).mean(1))


@pytest.mark.parametrize("kind", [EpsilonPlus, EpsilonAlpha2Beta1, AttnLRP, RelP])
def test_an_exported_model_of_kernels_is_explained_as_the_model(kind):
    model = seeded(Mixed())
    exported = torch.export.export(model, (PICTURES,)).run_decompositions().module()
    # (it adds the bias of attention's projections by itself, where ε does not see it)
    assert_same_map(exported, model, PICTURES, kind(canonizers=None), 1e-3)
