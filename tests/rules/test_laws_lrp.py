"""Laws of the LRP rules, for layers and nets of any shape, stride, grouping, dilation, padding and sign."""

import hypothesis.strategies as st
import pytest
import torch
import zennit.composites
import zennit.rules
from hypothesis import given, settings
from rule_cases import attribute, by_hook, close
from torch import nn
from zennit.core import BasicHook
from zennit.rules import ClampMod
from zennit.types import Activation, AvgPool

import crp.rules as rules
from crp.composites import Composite

CONVS = [nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d]
few = settings(max_examples=20, deadline=None)


@st.composite
def layers(draw, bias=None):
    """Affine layer in float64 and a batch of two inputs of any or of no negative sign."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    bias = draw(st.booleans()) if bias is None else bias
    kind = draw(st.sampled_from([nn.Linear, *CONVS]))
    if kind is nn.Linear:
        n = draw(st.integers(1, 5))
        layer, shape = nn.Linear(n, draw(st.integers(1, 5)), bias), (*draw(st.sampled_from([(), (3,)])), n)
    else:
        groups, dims = draw(st.integers(1, 3)), int(kind.__name__[-2])
        kernel, dilation = draw(st.integers(1, 3)), draw(st.integers(1, 2))
        channels = [groups * draw(st.integers(1, 2)) for _ in range(2)]
        padding = draw(st.integers(0, min(2, dilation * (kernel - 1))))
        given = {"padding": padding, "dilation": dilation, "groups": groups, "bias": bias}
        if "Transpose" not in kind.__name__:
            given["padding_mode"] = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
        layer = kind(*channels, kernel, draw(st.integers(1, 2)), **given)
        shape = (channels[0], *(draw(st.integers(5, 6)) if dims < 3 else 5 for _ in range(dims)))
    a = torch.randn(2, *shape, dtype=torch.float64)
    return layer.double(), a.relu() if draw(st.booleans()) else a


def output_relevance(layer, a):
    """Relevance of outputs, none where no input contributes."""
    y = layer(a).detach()
    return torch.randn_like(y) * (y != 0)


CONSERVING = [
    rules.LRP0(),
    rules.Epsilon(0.0),
    rules.ZPlus(0.0, empty="epsilon"),
    rules.AlphaBeta(2, 1, 0.0, empty="epsilon"),
    rules.AlphaBeta(1.4, 0.4, 0.0, empty="epsilon"),
    rules.Gamma(0.25, 0.0),
    rules.Gamma(10, 0.0),
    rules.WSquare(0.0),
    rules.Flat(0.0),
    rules.ZBox(-5.0, 5.0, 0.0),
]
ALL = [
    rules.Epsilon(0.1),
    rules.Epsilon(0.1, "bias", norm_scale=True),
    rules.ZPlus(),
    rules.ZPlus(empty="epsilon"),
    rules.AlphaBeta(1.4, 0.4),
    rules.AlphaBeta(2, 1, 0.1, "bias", empty="epsilon", norm_scale=True),
    rules.Gamma(0.5),
    rules.Gamma(0.5, zero_params="bias"),
    rules.WSquare(),
    rules.Flat(),
    rules.ZBox(-5.0, 5.0),
]
any_rule = st.sampled_from(ALL)


@pytest.mark.parametrize("rule", CONSERVING, ids=repr)
@few
@given(case=layers(bias=False))
def test_relevance_is_conserved_without_bias(rule, case):
    layer, a = case
    r = output_relevance(layer, a)
    found = attribute(rule, layer, a, r)
    assert (found.sum() - r.sum()).abs() <= 1e-11 * (found.abs().sum() + r.abs().sum())


@settings(max_examples=30, deadline=None)
@given(case=layers(), rule=any_rule, factor=st.floats(-1e3, 1e3))
def test_relevance_is_linear_in_the_relevance_above(case, rule, factor):
    layer, a = case
    r, s = output_relevance(layer, a), output_relevance(layer, a)
    one, other = attribute(rule, layer, a, r), attribute(rule, layer, a, s)
    found = attribute(rule, layer, a, factor * r + s)
    assert (found - factor * one - other).abs().max() <= 1e-12 * (abs(factor) * one.abs().max() + other.abs().max())


@settings(max_examples=30, deadline=None)
@given(case=layers(), rule=any_rule)
def test_sample_does_not_depend_on_its_batch(case, rule):
    layer, a = case
    a = torch.cat([a, a.relu(), torch.zeros_like(a)])
    r = output_relevance(layer, a)
    alone = torch.cat([attribute(rule, layer, x[None], s[None]) for x, s in zip(a, r, strict=True)])
    close(attribute(rule, layer, a, r), alone, 1e-13)


@few
@given(case=layers(), empty=st.sampled_from(["drop", "epsilon"]))
def test_alpha1_beta0_is_zplus(case, empty):
    layer, a = case
    r = output_relevance(layer, a)
    wanted = attribute(rules.ZPlus(empty=empty), layer, a, r)
    assert torch.equal(attribute(rules.AlphaBeta(1, 0, empty=empty), layer, a, r), wanted)


@few
@given(case=layers(bias=False), alpha=st.floats(1, 4))
def test_alpha_beta_is_linear_in_alpha(case, alpha):
    layer, a = case
    r = output_relevance(layer, a)
    one, two = attribute(rules.AlphaBeta(1, 0), layer, a, r), attribute(rules.AlphaBeta(2, 1), layer, a, r)
    found = attribute(rules.AlphaBeta(alpha, alpha - 1), layer, a, r)
    assert (found - (2 - alpha) * one - (alpha - 1) * two).abs().max() <= 1e-12 * (
        alpha * (one.abs().max() + two.abs().max())
    )


@few
@given(case=layers())
def test_gamma_of_zero_is_lrp0(case):
    layer, a = case
    r = output_relevance(layer, a)
    close(attribute(rules.Gamma(0.0, 0.0), layer, a, r), attribute(rules.LRP0(), layer, a, r), 1e-13)


@few
@given(case=layers())
def test_large_gamma_is_zplus_for_positive_and_its_mirror_for_negative_outputs(case):
    layer, a = case
    y = layer(a).detach()
    r = output_relevance(layer, a) * (y.abs() > 1e-3)
    found = attribute(rules.Gamma(1e9, 0.0), layer, a, r)
    wanted = attribute(rules.ZPlus(0.0), layer, a, r * (y > 0))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.neg_()
    wanted += attribute(rules.ZPlus(0.0), layer, a, r * (y < 0))
    # Outputs that are positive through their bias alone hand on something for each finite γ.
    assert (found - wanted).abs().max() <= 1e-5 * r.abs().sum()


@few
@given(case=layers(bias=False), factor=st.floats(0.01, 100))
def test_rules_without_epsilon_do_not_depend_on_the_scale_of_inputs_and_weights(case, factor):
    layer, a = case
    r = output_relevance(layer, a)
    rule = rules.AlphaBeta(2, 1, 0.0)
    wanted = attribute(rule, layer, a, r)
    close(attribute(rule, layer, factor * a, r), wanted, 1e-12)
    with torch.no_grad():
        layer.weight.mul_(factor)
    close(attribute(rule, layer, a, r), wanted, 1e-12)


# --- whole nets -----------------------------------------------------------------------------------------------------


@st.composite
def nets(draw):
    """Convolutional net in float64 and a batch of images with some zeros."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    groups, bias = draw(st.integers(1, 2)), draw(st.booleans())
    mode = draw(st.sampled_from(["zeros", "reflect", "circular"]))
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, draw(st.integers(1, 2)), 1, padding_mode=mode, bias=bias),
        nn.ReLU(inplace=draw(st.booleans())),
        draw(st.sampled_from([nn.MaxPool2d(2), nn.AvgPool2d(2), nn.Identity()])),
        nn.Conv2d(4, 4, 2, dilation=draw(st.integers(1, 2)), groups=groups, bias=bias),
        nn.ReLU(),
        nn.Flatten(),
        nn.LazyLinear(3, bias=bias),
    ).double()
    x = torch.randn(2, 2, 12, 12, dtype=torch.float64)
    x = x * (torch.rand_like(x) > 0.1)
    model(x)
    return model, x


def relevance(composite, model, x, start):
    with composite.context(model) as modified:
        data = x.clone().requires_grad_()
        return torch.autograd.grad(modified(data), data, start)[0]


PLAN = [
    (rules.Flat(), rules.ZPlus(), rules.Epsilon(0.1)),
    (rules.WSquare(), rules.Gamma(0.3), rules.Epsilon(0.1, norm_scale=True)),
    (rules.ZBox(-5.0, 5.0), rules.AlphaBeta(1.4, 0.4), rules.Gamma(0.1, zero_params="bias")),
    (rules.Epsilon(0.1), rules.ZPlus(empty="epsilon"), rules.ZPlus()),
]


@pytest.mark.parametrize("plan", PLAN, ids=lambda plan: "-".join(type(rule).__name__ for rule in plan))
@few
@given(case=nets(), target=st.integers(0, 2))
def test_relevances_in_zennit_s_composite_are_those_of_multipliers_in_ours(plan, case, target):
    model, x = case
    first, conv, dense = plan
    names = [(["0"], first), (["3"], conv), (["6"], dense)]
    onehot = torch.eye(3, dtype=torch.float64)[[target, target]]
    ours = relevance(Composite(None, name_map=names), model, x, onehot)
    passing = [(Activation, rules.Pass()), (AvgPool, rules.Norm(0.0))]
    theirs = zennit.composites.MixedComposite(
        [zennit.composites.NameMapComposite(names), zennit.composites.LayerMapComposite(passing)]
    )
    close(ours, relevance(theirs, model, x, onehot * model(x).detach()))


class Twice(BasicHook):
    """Reads one tensor twice, so that the gradient of each is that of both."""

    def __init__(self):
        super().__init__(
            input_modifiers=[lambda a: a] * 2,
            param_modifiers=[ClampMod(min=0.0), ClampMod(max=0.0)],
            output_modifiers=[lambda y: y] * 2,
            gradient_mapper=lambda out_grad, outputs: [out_grad / (1 + sum(outputs).abs())] * 2,
            reducer=lambda inputs, gradients: inputs[0] * gradients[0] + 0.5 * inputs[1] * gradients[1],
        )


THEIRS = [
    (Twice(), Twice(), Twice()),
    (zennit.rules.Flat(), zennit.rules.ZPlus(), zennit.rules.Epsilon(0.1)),
    (zennit.rules.WSquare(), zennit.rules.Gamma(0.3), zennit.rules.Epsilon(0.1, zero_params="bias")),
    (zennit.rules.ZBox(-5.0, 5.0), zennit.rules.AlphaBeta(2, 1), zennit.rules.Gamma(0.1)),
]


@pytest.mark.parametrize("plan", THEIRS, ids=lambda plan: "-".join(type(rule).__name__ for rule in plan))
@few
@given(case=nets(), target=st.integers(0, 2))
def test_zennit_s_rules_in_our_composite_are_those_in_zennit_s(plan, case, target):
    model, x = case
    first, conv, dense = plan
    names = [(["0"], first), (["3"], conv), (["6"], dense)]
    types = [(Activation, zennit.rules.Pass()), (AvgPool, zennit.rules.Norm(1e-12))]
    onehot = torch.eye(3, dtype=torch.float64)[[target, target]]
    theirs = zennit.composites.MixedComposite(
        [zennit.composites.NameMapComposite(names), zennit.composites.LayerMapComposite(types)]
    )
    ours = relevance(Composite(None, name_map=names, layer_map=types), model, x, onehot)
    close(ours, relevance(theirs, model, x, onehot * model(x).detach()))


@few
@given(case=layers())
def test_rules_are_those_of_zennit(case):
    layer, a = case
    r = output_relevance(layer, a)
    for ours, theirs in [
        (rules.ZPlus(), zennit.rules.ZPlus()),
        (rules.AlphaBeta(), zennit.rules.AlphaBeta()),
        (rules.Gamma(), zennit.rules.Gamma()),
        (rules.Flat(), zennit.rules.Flat()),
        (rules.ZBox(-5, 5), zennit.rules.ZBox(-5, 5)),
    ]:
        close(attribute(ours, layer, a, r), by_hook(theirs, layer, a, r))
