"""One affine operation, spelled in every way: the rule is the one that `nn.Linear` gets."""

import warnings
from contextlib import suppress

import pytest
import torch
import zennit.rules
from core_cases import deviation
from rule_cases import affine, mapped, relevance
from spelling_cases import ADDED, OF_SEVERAL, RARE, WITH_BIAS, WITHOUT_BIAS, Written
from torch import nn
from zennit.composites import LayerMapComposite

import crp.rules as rules
from crp.attribution import CondAttribution
from crp.composites import LRP
from crp.errors import CRPError

RULES = {
    "epsilon": rules.Epsilon(0.1),
    "zplus": rules.ZPlus(1e-3),
    "gamma": rules.Gamma(0.25, 1e-3),
    "alpha_beta": rules.AlphaBeta(2, 1, 1e-3),
    "flat": rules.Flat(1e-3),
    "wsquare": rules.WSquare(1e-3),
    "zbox": rules.ZBox(-3.0, 2.5, 1e-3),
}
SPELLINGS = {
    **{f"{name}-no_bias": (wiring, lambda s, x: s.dense(x)) for name, wiring in WITHOUT_BIAS.items()},
    **{f"{name}-bias": (wiring, lambda s, x: s.fc(x)) for name, wiring in WITH_BIAS.items()},
    **{f"{name}-added": (wiring, lambda s, x: s.dense(x) + s.b) for name, wiring in ADDED.items()},
    **{name: (wiring, lambda s, x, layer=layer: getattr(s, layer)(x)) for name, (wiring, layer) in OF_SEVERAL.items()},
}

X = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


#: Spellings of every kind.
FEW = [
    *["operator-no_bias", "operator_left-no_bias", "bmm-no_bias", "mv-no_bias", "einsum_left-no_bias", "dot-no_bias"],
    *[
        "tensordot-no_bias",
        "computed_weight-no_bias",
        "converted_weight-no_bias",
        "addmm_factors-bias",
        "addmm_in_place-bias",
        "addbmm-bias",
    ],
    *["conv1d-bias", "conv_transpose1d-bias", "convolution-bias", "operator-added", "in_place-added"],
    *["einsum_three", "bilinear"],
]


class Between(nn.Module):
    """A dense layer and an activation before, a ReLU and a dense layer behind."""

    def __init__(self, part, act):
        super().__init__()
        torch.manual_seed(1)
        self.part, self.act = part, act
        self.before, self.behind = nn.Linear(6, 6).double(), nn.Linear(5, 4).double()

    def forward(self, x):
        return self.behind(self.part(self.act(self.before(x))).relu())


def deviations(names, found, wanted, x, m):
    """Rules of which the relevance differs, with the largest deviation over the largest value."""
    every = {
        name: deviation(relevance(RULES[name], found, x, m), relevance(RULES[name], wanted, x, m)) for name in names
    }
    return {name: value for name, value in every.items() if not value <= 1e-12}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling_does_not_matter(name):
    found, wanted = map(Written, SPELLINGS[name])
    x, m = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    torch.testing.assert_close(found(x), wanted(x), rtol=1e-12, atol=1e-12)
    assert not deviations(RULES, found, wanted, x, m)


def test_conv1d_of_gpt2_is_a_dense_layer():
    layer, wanted = (
        pytest.importorskip("transformers.pytorch_utils").Conv1D(5, 6).double(),
        Written(lambda s, x: s.fc(x)),
    )
    layer.weight.data, layer.bias.data = wanted.W.data, wanted.b.data
    x, m = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    assert not deviations(RULES, layer, wanted, x, m)


def test_parameters_that_are_none_of_the_model_s():
    """They require gradients, and yet do not depend on the input."""
    other, m = Written(lambda s, x: x), torch.randn(3, 5, dtype=torch.float64)
    found, wanted = Written(lambda s, x: torch.addmm(other.b, x, other.W)), Written(lambda s, x: s.fc(x))
    assert not deviations(RULES, found, wanted, X, m)


@pytest.mark.parametrize(
    "convert",
    [
        lambda w, x: w.to(x),
        lambda w, x: w.type_as(x),
        lambda w, x: w.view_as(torch.zeros(6, 5)),
        lambda w, x: w.flatten().view_as(x[:, :5].repeat(2, 1)),
        lambda w, x: w.reshape_as(x[:, :5].repeat(2, 1)),
        lambda w, x: w.expand_as(x[:, :5].repeat(2, 1)),
    ],
    ids=["to", "type_as", "view_as_constant", "view_as", "reshape_as", "expand_as"],
)
def test_what_gives_a_weight_its_shape_or_type_is_no_operand(convert):
    weight, m = nn.Parameter(Written(lambda s, x: x).W.detach().clone()), torch.randn(3, 5, dtype=torch.float64)
    found, wanted = Written(lambda s, x: x @ convert(weight, x)), Written(lambda s, x: s.dense(x))
    assert not deviations(RULES, found, wanted, X, m)


@pytest.mark.parametrize("rule", ["zplus", "flat"])
@pytest.mark.parametrize("name", RARE)
def test_rare_spelling_does_not_matter_or_is_told(name, rule):
    wiring, layer = RARE[name]
    found, wanted = Written(wiring), Written(lambda s, x: getattr(s, layer)(x))
    composite, m, results = LRP(None, layer_map=affine(RULES[rule])), torch.randn(3, 5, dtype=torch.float64), []
    torch.testing.assert_close(found(X), wanted(X), rtol=1e-12, atol=1e-12)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for model in (found, wanted):
            with composite.context(model), suppress(CRPError):
                leaf = X.clone().requires_grad_()
                # (a dense layer before, so that a rule acts in any case)
                results.append(torch.autograd.grad(model(leaf @ torch.eye(6, dtype=leaf.dtype)), leaf, m)[0])
    if not any(
        f"no rule for {word}" in str(w.message) for w in told for word in ("linalg", "conv", "ein", "emb", "spa")
    ):
        assert len(results) < 2 or deviation(*results) <= 1e-12


@pytest.mark.parametrize("act", [nn.Tanh(), nn.ReLU()], ids=["signed", "nonnegative"])
@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling_between_layers_does_not_matter(name, act):
    found, wanted = (Between(Written(wiring), act) for wiring in SPELLINGS[name])
    x, m = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    assert not deviations(["epsilon", "zplus", "gamma", "alpha_beta"], found, wanted, x, m)


@pytest.mark.parametrize("name", SPELLINGS)
def test_account_closes_whatever_the_spelling(name):
    composite = LRP(None, layer_map=affine(rules.ZPlus(1e-3)))
    models = (Between(Written(wiring), nn.Tanh()).eval() for wiring in SPELLINGS[name])
    found, wanted = (CondAttribution(model).absorbed(X, [{"y": 1}], composite) for model in models)
    torch.testing.assert_close(found.rest, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.total, wanted.total, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["operator_left-no_bias", "addmm_left-bias", "operator_left_rows-no_bias"])
def test_account_is_not_told_by_the_wrong_axis(name):
    """As many samples as outputs: the rows of an operation could be either."""
    model = Between(Written(SPELLINGS[name][0]), nn.Tanh()).eval()
    composite, x = LRP(None, layer_map=affine(rules.ZPlus(1e-3))), torch.randn(5, 6, dtype=torch.float64)
    found = CondAttribution(model).absorbed(x, [{"y": 1}], composite)
    torch.testing.assert_close(found.rest, torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", FEW)
def test_spelling_can_be_batched_over_cotangents(name):
    model = Between(Written(SPELLINGS[name][0]), nn.Tanh())
    starts = torch.randn(4, 3, 4, dtype=torch.float64)
    with mapped(rules.AlphaBeta(2, 1, 1e-3)).context(model):
        data = X.clone().requires_grad_()
        y = model(data)
        (batched,) = torch.autograd.grad(y, data, starts, is_grads_batched=True, retain_graph=True)
        single = torch.stack([torch.autograd.grad(y, data, start, retain_graph=True)[0] for start in starts])
    torch.testing.assert_close(batched, single, rtol=1e-12, atol=1e-13)


HOOKS = [
    zennit.rules.Epsilon(0.1),
    zennit.rules.ZPlus(1e-3),
    zennit.rules.Gamma(0.25, 1e-3),
    zennit.rules.AlphaBeta(2, 1, 1e-3),
    zennit.rules.Flat(1e-3),
    zennit.rules.WSquare(1e-3),
    zennit.rules.ZBox(-3.0, 2.5, 1e-3),
]


@pytest.mark.parametrize("name", FEW)
def test_lifted_zennit_rule_is_the_same_whatever_the_spelling(name):
    model, m = Written(SPELLINGS[name][0]), torch.randn(3, 5, dtype=torch.float64)
    for hook, rule in zip(HOOKS, RULES.values(), strict=True):
        assert deviation(relevance(hook, model, X, m), relevance(rule, model, X, m)) <= 1e-10, rule


@pytest.mark.parametrize("name", FEW)
def test_rule_in_a_composite_of_zennit_is_the_same_whatever_the_spelling(name):
    found, wanted = map(Written, SPELLINGS[name])
    m = torch.randn(3, 5, dtype=torch.float64)
    for rule in RULES.values():
        results = []
        for model in (found, wanted):
            with LayerMapComposite([(Written, rule)]).context(model):
                leaf = X.clone().requires_grad_()
                results.append(torch.autograd.grad(model(leaf), leaf, m)[0])
        assert deviation(*results) <= 1e-12, rule
