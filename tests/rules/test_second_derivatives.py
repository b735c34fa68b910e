"""Derivatives of relevance: ``create_graph=True`` inside a composite, and the second pass with it inactive.

Against central finite differences of the relevance itself, in float64.
"""

import warnings

import pytest
import torch
from core_cases import conv_net, exhibit, images, net
from second_derivatives import QUIET, check_derivative, relevance
from torch import nn
from torch.nn import functional as F

import crp.composites as composites
import crp.rules as rules
from crp.composites import LRP, AttnLRP, EpsilonPlus, EpsilonPlusFlat
from crp.rules import Epsilon, Flat, Norm, Pass, WSquare, ZBox, ZPlus

PRESETS = {name: {} for name in composites.names()} | {
    "alpha_beta": {"alpha": 1.4, "beta": 0.4},
    "beta_smooth": {"beta": 2.0},
    "deep_taylor": {"low": -5.0, "high": 5.0, "maxpool": "avg"},
    "deeplift": {"reference": 0.1},
    "epsilon": {"epsilon": 0.1, "norm_scale": True},
    "epsilon_gamma_box": {"low": -5.0, "high": 5.0},
    "epsilon_plus": {"epsilon": 0.1, "stabilizer": 0.01, "empty": "epsilon", "gates": "split"},
    "lrp_cmp": {"low": -5.0, "high": 5.0, "first": "box"},
    "zplus": {"zero_params": "bias"},
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name, untouched):
    model, composite = exhibit(), composites.get(name, **PRESETS[name])
    refuses = name == "deeplift"  # through what is outside the method
    with untouched(model):
        if refuses:
            model = conv_net(lambda s, h: F.max_pool2d(s.act(h), 2).tanh(), act=nn.SiLU(inplace=True))
            data = images()
        else:
            data = images(2, 8)
        check_derivative(model, composite, data)


RULES = [
    rules.Epsilon(0.1),
    rules.Epsilon(0.1, norm_scale=True),
    rules.Epsilon(0.1, "bias"),
    rules.LRP0(),
    rules.ZPlus(0.01),
    rules.ZPlus(0.01, "bias", empty="epsilon"),
    rules.AlphaBeta(1.4, 0.4, 0.01),
    rules.AlphaBeta(2, 1, 0.01, empty="epsilon"),
    rules.Gamma(0.25, 0.01),
    rules.Gamma(10, 0.01, norm_scale=True),
    rules.Excitation(),
    rules.Excitation("shift"),
]
FIRST = [Flat(0.01), WSquare(0.01), ZBox(-5.0, 5.0, 0.01), ZPlus(0.01)]


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_rules_above_activations_in_place_and_smooth_ones(rule):
    def wiring(s, x):
        h = s.relu(s.a(x))
        h = F.silu(s.b(h), inplace=True)
        return s.fc(s.b(h).flatten(2).mean(2))

    model = net(wiring, a=nn.Conv2d(3, 4, 3, padding=1), b=nn.Conv2d(4, 4, 3, padding=1, groups=2),
                relu=nn.ReLU(inplace=True), fc=nn.Linear(4, 3))  # fmt: skip
    check_derivative(model, LRP(layer_map=[((nn.Conv2d, nn.Linear), rule)]), images())


@pytest.mark.parametrize("rule", FIRST, ids=repr)
@pytest.mark.parametrize("prepare", [lambda x: x, lambda x: (x - 0.3) / 2, lambda x: x.clone().sub_(0.3)])
def test_first_layers(rule, prepare):
    model = net(lambda s, x: s.fc(F.gelu(s.conv(prepare(x))).mean((2, 3))), conv=nn.Conv2d(3, 4, 3), fc=nn.Linear(4, 3))
    check_derivative(model, LRP(first_map=[(nn.Conv2d, rule)], layer_map=[(nn.Linear, Epsilon(0.1))]), images())


OPERATIONS = {
    "sigmoid": lambda s, h: h.sigmoid(),
    "sigmoid_overwritten": lambda s, h: h.sigmoid().add_(1),
    "tanh_": lambda s, h: h.tanh_(),
    "gate": lambda s, h: h * torch.sigmoid(h.mean((2, 3), keepdim=True)),
    "product": lambda s, h: h * F.softplus(h),
    "square": lambda s, h: h * h,
    "glu": lambda s, h: F.glu(torch.cat([h, h * 2], 1), 1),
    "quotient": lambda s, h: h / (1 + h.square().mean(1, keepdim=True)),
    "reciprocal": lambda s, h: 1 / (2 + h.square()),
    "layer_norm": lambda s, h: F.layer_norm(h, (6,), torch.arange(6.0).double(), torch.ones(6).double()),
    "group_norm": lambda s, h: F.group_norm(h, 2, None, torch.ones(4).double()),
    "residual": lambda s, h: h + F.silu(s.conv2(h)),
    "iadd": lambda s, h: s.conv2(h).add_(F.silu(h)),
    "twice": lambda s, h: s.conv2(F.silu(s.conv2(F.silu(h)))),
    "max_pool": lambda s, h: F.max_pool2d(F.elu(h), 2),
    "batch_norm": lambda s, h: s.norm(h),
    "sum_of_products": lambda s, h: (h[:, None] * s.conv2.weight[:, :, :1, :1]).sum(2),
    "sigmoid_in_other_words": lambda s, h: 1 / (1 + torch.exp(-h)),
    "tanh_in_other_words": lambda s, h: 2 * h.sigmoid() - 1,
    "variance": lambda s, h: h / (h.var(1, keepdim=True) + 0.5).sqrt() + h.var(1, keepdim=True),
    "softmax_of_powers": lambda s, h: 2**h / (2**h).sum(1, keepdim=True),
    "softmax_in_other_words": lambda s, h: F.log_softmax(h, 1).exp(),
}


@pytest.mark.parametrize(
    "composite",
    [EpsilonPlus(epsilon=0.1, stabilizer=0.01), EpsilonPlusFlat(None, epsilon=0.1, stabilizer=0.01)],
    ids=["merged", "unmerged"],
)
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(name, composite):
    layers = {"conv2": nn.Conv2d(4, 4, 3, padding=1), "norm": nn.BatchNorm2d(4)}
    check_derivative(conv_net(OPERATIONS[name], **layers), composite, images())


def test_an_activation_that_is_written_out_as_a_product():
    check_derivative(conv_net(lambda s, h: h * F.relu6(h + 3) / 6), AttnLRP(epsilon=0.1), images())


@pytest.mark.parametrize("rule", [Norm(0.1), Pass(), Epsilon(0.3)], ids=repr)
@pytest.mark.parametrize("act", [nn.Sigmoid(), nn.Tanh(), nn.SiLU(inplace=True), nn.ELU(inplace=True)])
@pytest.mark.parametrize("after", [lambda h: h, lambda h: h.mul_(2).add_(1)])
def test_rules_on_activations_whose_output_is_overwritten(rule, act, after):
    """The gradient of a sigmoid needs its output."""
    model = conv_net(lambda s, h: after(s.act(h)), act=act)
    check_derivative(model, LRP(layer_map=[(type(act), rule), ((nn.Conv2d, nn.Linear), Epsilon(0.1))]), images())


def test_input_of_a_layer_that_was_overwritten_is_a_clear_error():
    def wiring(s, x):
        h = F.silu(s.a(x))
        out = s.b(h)
        h.add_(1)
        return s.fc((out + h).mean((2, 3)))

    model = net(wiring, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 4, 1), fc=nn.Linear(4, 3))
    composite = EpsilonPlus()
    with composite.context(model):
        leaf = images().requires_grad_()
        with pytest.raises(
            RuntimeError, match=r"second derivatives need the input of conv2d\(\)( in 'b')?, which was changed in place"
        ):
            relevance(model, leaf, create_graph=True)


def test_second_pass_after_the_context_is_as_inside():
    """Rules know the parameters that they were used with, though batch norm is merged no more."""
    model, composite, found = exhibit(), EpsilonPlus(epsilon=0.1, stabilizer=0.01), []
    for inside in (True, False):
        leaf = images(2, 8).requires_grad_()
        with composite.context(model):
            out = model(leaf)[:, 0].sum()
            if inside:
                found.append(_second(out, leaf, composite))
        if not inside:
            found.append(_second(out, leaf, composite))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)


def _second(out, leaf, composite):
    (first,) = torch.autograd.grad(out, leaf, create_graph=True)
    with composite.inactive():
        return torch.autograd.grad(first.square().sum(), leaf)[0]


def test_inactive_is_the_plain_gradient_and_ends():
    model = exhibit()
    leaf = images(2, 8).requires_grad_()
    (plain,) = torch.autograd.grad(model(leaf)[:, 0].sum(), leaf)
    for name in PRESETS:
        composite = composites.get(name, **PRESETS[name])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=QUIET)
            with composite.context(model):
                out = model(leaf)[:, 0].sum()
                (active,) = torch.autograd.grad(out, leaf, retain_graph=True)
                with composite.inactive():
                    with composite.inactive():
                        pass
                    (inactive,) = torch.autograd.grad(out, leaf, retain_graph=True)
                (again,) = torch.autograd.grad(out, leaf)
        torch.testing.assert_close(inactive, plain, rtol=1e-9, atol=1e-12, msg=name)
        assert torch.equal(active, again)
        assert (name == "gradient") == bool(((active - plain).abs() < 1e-9).all())


def test_training_for_relevance_moves_the_input_as_it_should():
    """A few steps on the data lower the relevance of its left half."""
    model, composite = exhibit(), EpsilonPlus(epsilon=0.1, stabilizer=0.01)
    data, values = images(1, 8), []
    for _ in range(5):
        with composite.context(model):
            leaf = data.clone().requires_grad_()
            loss = relevance(model, leaf, create_graph=True)[..., :4].square().sum()
            with composite.inactive():
                (gradient,) = torch.autograd.grad(loss, leaf)
        data = data - 0.05 * gradient / gradient.norm()
        values.append(loss.item())
    assert values == sorted(values, reverse=True)
