"""Affine operations however they are written: the composite's rule, on the operands of the call."""

from __future__ import annotations

import operator

import pytest
import torch
from core_cases import Maps
from preset_cases import LRP_PRESETS, assert_same_map, numbers, off, seeded
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from crp.composites import UniformEpsilon, UniformZPlus

DATA = numbers(3, 6, seed=3)
TOKENS = numbers(2, 4, 6, seed=3)


class Spelled(nn.Module):
    """Two dense layers whose products are spelled by a function ``(a, weight of shape (in, out), bias)``."""

    def __init__(self, spelling):
        super().__init__()
        self.spelling = spelling
        self.w, self.b = nn.Parameter(torch.zeros(6, 8)), nn.Parameter(torch.zeros(8))
        self.v, self.c = nn.Parameter(torch.zeros(8, 4)), nn.Parameter(torch.zeros(4))

    def forward(self, x):
        h = self.spelling(x, self.w, self.b)
        return self.spelling(F.relu(h), self.v, self.c).flatten(1)


class Plain(Spelled):
    """The same net of `nn.Linear`, with the bias inside or added behind."""

    def __init__(self, added):
        super().__init__(None)
        self.added = added
        self.up, self.down = nn.Linear(6, 8, bias=not added), nn.Linear(8, 4, bias=not added)

    def fill(self, spelled):
        with torch.no_grad():
            for linear, w, b in ((self.up, spelled.w, spelled.b), (self.down, spelled.v, spelled.c)):
                linear.weight.copy_(w.T)
                if not self.added:
                    linear.bias.copy_(b)
            self.b.copy_(spelled.b)
            self.c.copy_(spelled.c)
        return self.eval()

    def forward(self, x):
        h = self.up(x) + self.b if self.added else self.up(x)
        h = F.relu(h)
        return (self.down(h) + self.c if self.added else self.down(h)).flatten(1)


def aside(function):
    """Spelling of a product without bias, which is added behind."""
    return lambda a, w, b: function(a, w) + b


#: Spellings that have the bias inside, as `nn.Linear` has it.
INSIDE = {
    "linear": lambda a, w, b: F.linear(a, w.T, b),
    "linear_in_words": lambda a, w, b: F.linear(input=a, weight=w.T, bias=b),
    "linear_of_nn": lambda a, w, b: torch._C._nn.linear(a, w.T, b),
    "aten_linear": lambda a, w, b: torch.ops.aten.linear(a, w.T, b),
    "conv1d_of_gpt2": lambda a, w, b: gpt2(a, w, b),
    "by_rows": lambda a, w, b: torch.addmm(b, a.reshape(-1, a.shape[-1]), w).reshape(*a.shape[:-1], -1),
    "functional_call": lambda a, w, b: torch.func.functional_call(
        nn.Linear(*w.shape).double(), {"weight": w.T, "bias": b}, (a,)
    ),
}
#: The same for data of two axes.
INSIDE_FLAT = {
    "addmm": lambda a, w, b: torch.addmm(b, a, w),
    "addmm_method": lambda a, w, b: b.addmm(a, w),
    "addmm_in_words": lambda a, w, b: torch.addmm(input=b, mat1=a, mat2=w),
    "addmm_scaled": lambda a, w, b: torch.addmm(2 * b, a, 4 * w, beta=0.5, alpha=0.25),
    "addmm_transposed": lambda a, w, b: torch.addmm(b[:, None], w.T, a.T).T,
    "aten_addmm": lambda a, w, b: torch.ops.aten.addmm(b, a, w),
    "addmv": lambda a, w, b: torch.stack([torch.addmv(b, w.T, row) for row in a]),
    "baddbmm": lambda a, w, b: torch.baddbmm(b.expand(len(a), 1, -1), a[:, None], w.expand(len(a), -1, -1))[:, 0],
    "addbmm": lambda a, w, b: torch.addbmm(b.expand(len(a), -1), a[None], w[None]),
}
#: Products, to which the bias is added behind.
BEHIND = {
    "operator": aside(lambda a, w: a @ w),
    "operator_function": aside(operator.matmul),
    "from_the_left": aside(lambda a, w: (w.T @ a.mT).mT),
    "matmul": aside(torch.matmul),
    "matmul_in_words": aside(lambda a, w: torch.matmul(input=a, other=w)),
    "matmul_method": aside(lambda a, w: a.matmul(w)),
    "aten_matmul": aside(torch.ops.aten.matmul),
    "einsum": aside(lambda a, w: torch.einsum("...i,io->...o", a, w)),
    "einsum_transposed": aside(lambda a, w: torch.einsum("oi,...i->...o", w.T, a)),
    "einsum_of_a_list": aside(lambda a, w: torch.einsum("...i,io->...o", [a, w])),
    "tensordot": aside(lambda a, w: torch.tensordot(a, w, 1)),
    "tensordot_of_axes": aside(lambda a, w: torch.tensordot(a, w, ([-1], [0]))),
    "inner": aside(lambda a, w: torch.inner(a, w.T)),
    "product_summed": aside(lambda a, w: (a[..., None, :] * w.T).sum(-1)),
    "product_summed_from_the_left": aside(lambda a, w: (w * a.unsqueeze(-1)).sum(dim=-2)),
    "product_summed_by_a_function": aside(lambda a, w: torch.sum(a[..., None, :] * w.T, -1, keepdim=True)[..., 0]),
    "product_summed_in_words": aside(lambda a, w: torch.sum(input=a.unsqueeze(-2).mul(w.mT), axis=-1)),
    "product_of_expanded": aside(lambda a, w: (a[..., None].expand(*a.shape, w.shape[1]) * w).sum((-2,))),
    "linear_without": aside(lambda a, w: F.linear(a, w.T)),
    "added_in_place": lambda a, w, b: (a @ w).add_(b),
    "added_before": lambda a, w, b: b + a @ w,
}
BEHIND_FLAT = {
    "mm": aside(torch.mm),
    "mm_method": aside(lambda a, w: a.mm(w)),
    "aten_mm": aside(torch.ops.aten.mm),
    "mv": aside(lambda a, w: torch.stack([torch.mv(w.T, row) for row in a])),
    "products_summed": aside(lambda a, w: torch.stack([(a * column).sum(1) for column in w.T], 1)),
    "bmm": aside(lambda a, w: torch.bmm(a[:, None], w.expand(len(a), -1, -1))[:, 0]),
    "multi_dot": aside(lambda a, w: torch.linalg.multi_dot([a, w])),
    "bilinear": aside(lambda a, w: F.bilinear(a, torch.ones(len(a), 1).to(a), w.T[..., None])),
}
CASES = {
    **{name: (spelling, False, TOKENS) for name, spelling in INSIDE.items()},
    **{name: (spelling, False, DATA) for name, spelling in INSIDE_FLAT.items()},
    **{name: (spelling, True, TOKENS) for name, spelling in BEHIND.items()},
    **{name: (spelling, True, DATA) for name, spelling in BEHIND_FLAT.items()},
}


def gpt2(a, w, b):
    layer = Conv1D(w.shape[1], w.shape[0]).double()
    layer.weight, layer.bias = nn.Parameter(w), nn.Parameter(b)
    return layer(a)


@pytest.mark.covering(3)
@pytest.mark.parametrize("preset", LRP_PRESETS)
@pytest.mark.parametrize("name", CASES)
def test_an_affine_operation_has_the_rule_of_dense_layers(name, preset):
    spelling, added, data = CASES[name]
    model = seeded(Spelled(spelling))
    assert_same_map(model, Plain(added).double().fill(model), data, LRP_PRESETS[preset]())


class Scaled(nn.Module):
    """Net whose features are scaled, by a function of them and one number for each."""

    def __init__(self, scale):
        super().__init__()
        self.scale, self.up, self.down = scale, nn.Linear(6, 8), nn.Linear(8, 3)
        self.scales = nn.Parameter(torch.zeros(8))

    def forward(self, x):
        return self.down(self.scale(F.relu(self.up(x)), self.scales))


#: Products entry by entry: each result is made of one entry, and nothing is summed up.
ENTRY_BY_ENTRY = {
    "named": lambda h, s: torch.einsum("bi,i->bi", h, s),
    "from_the_right": lambda h, s: torch.einsum("i,bi->bi", s, h),
    "ellipsis": lambda h, s: torch.einsum("...i,i->...i", [h, s]),
    "turned": lambda h, s: torch.einsum("bi,i->ib", h, s).T,
    "of_several": lambda h, s: torch.einsum("bi,i,b->bi", h, s, torch.ones(len(h)).double()),
    "weight_summed": lambda h, s: torch.einsum("bi,ij->bi", h, torch.stack([s / 4, 3 * s / 4], 1)),
}


@pytest.mark.covering(2)
@pytest.mark.parametrize("preset", LRP_PRESETS)
@pytest.mark.parametrize("name", ENTRY_BY_ENTRY)
def test_an_einsum_that_sums_up_nothing_is_no_dense_layer(name, preset):
    """α2β1 would give twice the relevance for a positive factor."""
    model, product = seeded(Scaled(ENTRY_BY_ENTRY[name])), seeded(Scaled(torch.mul))
    assert_same_map(model, product, DATA, LRP_PRESETS[preset]())


class GPT(nn.Module):
    """Feed-forward block of GPT-2, as a model."""

    def __init__(self, layer):
        super().__init__()
        self.up, self.down = layer(8, 6), layer(4, 8)

    def forward(self, x):
        return self.down(F.relu(self.up(x))).mean(1)


@pytest.mark.parametrize("preset", LRP_PRESETS)
def test_dense_layers_of_gpt2(preset):
    model = seeded(GPT(Conv1D))
    plain = GPT(lambda outputs, inputs: nn.Linear(inputs, outputs)).double().eval()
    with torch.no_grad():
        for name in ("up", "down"):
            plain.get_submodule(name).weight.copy_(model.get_submodule(name).weight.T)
            plain.get_submodule(name).bias.copy_(model.get_submodule(name).bias)
    assert_same_map(model, plain, TOKENS, LRP_PRESETS[preset]())


class Cosine(nn.Module):
    """Dense layer, ReLU, and a classifier by the cosine of features and weights, times 10."""

    def __init__(self, classifier):
        super().__init__()
        self.stem, self.act, self.w = nn.Linear(6, 8), nn.ReLU(), nn.Parameter(torch.zeros(3, 8))
        self.classifier = classifier

    def forward(self, x):
        return 10 * self.classifier(self.act(self.stem(x)), self.w)


class Normed(nn.Linear):
    def forward(self, x):
        return F.linear(F.normalize(x, dim=1), F.normalize(self.weight, dim=1))


def subclassed(h, w):
    layer = Normed(8, 3, bias=False).double()
    layer.weight = nn.Parameter(w)
    return layer(h)


def unit(t):
    return t / t.norm(dim=1, keepdim=True)


COSINES = {
    "normalize": lambda h, w: F.linear(F.normalize(h, dim=1), F.normalize(w, dim=1)),
    "subclass": subclassed,
    "divided": lambda h, w: unit(h) @ unit(w).T,
    "divided_behind": lambda h, w: h @ unit(w).T / h.norm(dim=1, keepdim=True),
    "clamped": lambda h, w: (h / h.norm(dim=1, keepdim=True).clamp(min=1e-12)).mm(unit(w).T),
    "vector_norm": lambda h, w: F.linear(h / torch.linalg.vector_norm(h, dim=1, keepdim=True), unit(w)),
    "root": lambda h, w: F.linear(h / h.square().sum(1, keepdim=True).sqrt(), unit(w)),
    "power": lambda h, w: F.linear(h / h.pow(2).sum(1, keepdim=True).pow(0.5), unit(w)),
    "rsqrt": lambda h, w: torch.einsum("bi,oi->bo", h * h.square().sum(1, keepdim=True).rsqrt(), unit(w)),
    "in_place": lambda h, w: F.linear(h.clone().div_(h.norm(dim=1, keepdim=True)), unit(w)),
}


@pytest.mark.parametrize("name", COSINES)
def test_cosine_classifier_holds_the_norm_of_the_data_constant(name):
    model = seeded(Cosine(COSINES[name]), seed=0)
    h = F.relu(model.stem(DATA)).detach()
    w = 10 * unit(model.w.detach())
    out = model(DATA).detach()
    for target in range(3):
        whole = w[target] / h.norm(dim=1, keepdim=True)
        excited = h * w[target].clamp(min=0)
        for composite, wanted in (
            (UniformEpsilon(epsilon=1e-13), h * whole),
            (UniformZPlus(stabilizer=1e-13), excited / excited.sum(1, keepdim=True) * out[:, target, None]),
        ):
            found = Maps(model)(DATA, [{"y": target}], composite, record_layer=["act"]).relevances["act"]
            assert off(found, wanted) <= 1e-9


@pytest.mark.covering(3)
@pytest.mark.parametrize("preset", LRP_PRESETS)
@pytest.mark.parametrize("name", sorted(COSINES.keys() - {"divided_behind"}))  # (ε is relative to another output there)
def test_cosine_classifiers_are_one_function(name, preset):
    model, plain = seeded(Cosine(COSINES[name])), seeded(Cosine(COSINES["normalize"]))
    assert_same_map(model, plain, DATA, LRP_PRESETS[preset]())
