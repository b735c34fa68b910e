"""Settings of rules: ε relative to the scale, empty parts, bounds, and what is refused."""

import gc
import math
import pickle
import weakref

import numpy as np
import pytest
import torch
from core_cases import conv_net, heatmap, net, within
from rule_cases import FORMS, as_matrices, attribute, close, form_alpha_beta, form_epsilon, form_zplus, neg, pos, seeded
from torch import nn
from torch.nn import functional as F
from zennit.core import Stabilizer

import crp.rules as rules
from crp.composites import Composite
from crp.rules.layer import KEPT, modified, positive
from crp.rules.stabilizer import Relative, quotient, stabilizing

F64 = torch.float64


def linear(weight, bias=None):
    layer = nn.Linear(len(weight[0]), len(weight), bias=bias is not None, dtype=F64)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight))
        if bias is not None:
            layer.bias.copy_(torch.tensor(bias))
    return layer


# --- ε relative to the scale ----------------------------------------------------------------------------------------


def test_relative_epsilon_by_hand():
    layer = linear([[3.0, 1.0], [-2.0, -1.0]])
    a, r = torch.ones(1, 2, dtype=F64), torch.ones(1, 2, dtype=F64)
    rms = math.sqrt((4**2 + 3**2) / 2)
    z = [4 + 0.1 * rms, -3 - 0.1 * rms]
    wanted = torch.tensor([[3 / z[0] - 2 / z[1], 1 / z[0] - 1 / z[1]]], dtype=F64)
    close(attribute(rules.Epsilon(0.1, norm_scale=True), layer, a, r), wanted, 1e-14)


@pytest.mark.parametrize("shape", [(3,), (3, 4), (3, 2, 5, 4)])
def test_relative_stabilizer_is_zennit_s(shape):
    z = torch.randn(shape, dtype=F64)
    z.view(-1)[0] = 0
    reference = Stabilizer(0.3, norm_scale=True)(z) if z.ndim > 1 else 1.3 * z
    close(Relative(0.3)(z), reference, 1e-15)


def test_relative_stabilizer_has_room_for_squares_in_half_precision():
    z = torch.full((1, 60000), 300.0, dtype=torch.float16)
    assert Relative(0.5)(z).unique().tolist() == pytest.approx([450.0], rel=1e-3)


def test_relative_stabilizer_of_zeros_has_a_gradient():
    z = torch.zeros(2, 3, dtype=F64, requires_grad=True)
    assert torch.isfinite(torch.autograd.grad(Relative(0.1)(z).sum(), z)[0]).all()


SCALED = [
    rules.Epsilon(0.3, norm_scale=True),
    rules.ZPlus(0.3, norm_scale=True),
    rules.AlphaBeta(2, 1, 0.3, norm_scale=True),
    rules.Gamma(0.25, 0.3, norm_scale=True),
    rules.Norm(0.3, norm_scale=True),
    rules.WSquare(0.3, norm_scale=True),
    rules.Flat(0.3, norm_scale=True),
    rules.ZBox(-4, 4, 0.3, norm_scale=True),
]


@pytest.mark.parametrize("rule", SCALED, ids=repr)
def test_relative_epsilon_does_not_depend_on_the_scale_of_the_weights_or_on_the_batch(rule):
    layer, a = seeded("conv2d", False, False)
    r = torch.randn_like(layer(a)).detach()
    whole = attribute(rule, layer, a, r)
    close(torch.cat([attribute(rule, layer, a[i : i + 1], r[i : i + 1]) for i in range(3)]), whole, 1e-13)
    with torch.no_grad():
        layer.weight.mul_(1e3)
    close(attribute(rule, layer, a, r), whole, 1e-12)


# --- empty parts ----------------------------------------------------------------------------------------------------


def test_output_without_positive_contributions_by_hand():
    layer = linear([[-1.0, -2.0], [2.0, -1.0]], [5.0, 0.5])
    a, r = torch.ones(1, 2, dtype=F64), torch.tensor([[8.0, 6.0]], dtype=F64)
    # Output 0 is 2 = -1 - 2 + 5 through its bias; output 1 has the positive part 2 + 0.5.
    drop, itself = rules.ZPlus(0.0), rules.ZPlus(0.0, empty="epsilon")
    close(attribute(drop, layer, a, r), torch.tensor([[2 * 6 / 2.5, 0.0]], dtype=F64), 1e-14)
    close(attribute(itself, layer, a, r), torch.tensor([[2 * 6 / 2.5 - 8 / 2, -2 * 8 / 2]], dtype=F64), 1e-14)
    free = rules.ZPlus(0.0, "bias", empty="epsilon")
    close(attribute(free, layer, a, r), torch.tensor([[6 + 8 / 3, 16 / 3]], dtype=F64), 1e-14)


def parts(a, w):
    return pos(a) @ pos(w).T + neg(a) @ neg(w).T, pos(a) @ neg(w).T + neg(a) @ pos(w).T


EMPTY = {
    "zplus": (rules.ZPlus(1e-3, empty="epsilon"), form_zplus, False),
    "alpha2_beta1": (
        rules.AlphaBeta(2, 1, 1e-3, empty="epsilon"),
        lambda *given: form_alpha_beta(*given, 2, 1),
        True,
    ),
    "alpha1_beta0": (rules.AlphaBeta(1, 0, 1e-3, empty="epsilon"), form_zplus, False),
}


@pytest.mark.parametrize("multiplier", [True, False], ids=["multiplier", "relevance"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("name", list(EMPTY))
def test_empty_parts_share_by_epsilon(name, bias, multiplier):
    rule, form, both = EMPTY[name]
    layer, a = seeded("conv2d_depthwise", bias, True)
    with torch.no_grad():
        layer.weight[0].abs_()
        layer.weight[1].abs_().neg_()
    _, w, b = as_matrices(layer, a)
    y = layer(a).detach()
    m = torch.randn_like(y)
    r = (m * y).flatten(1)
    p, n = parts(a.flatten(1), w)
    empty = (p == 0) | (n == 0) if both else p == 0
    assert 0 < empty.sum() < empty.numel()
    flat = a.flatten(1)
    wanted = form(flat, w, b, r * ~empty) + form_epsilon(flat, w, b, r * empty)
    close(attribute(rule, layer, a, m if multiplier else m * y, multiplier), wanted.reshape(a.shape))


def test_more_is_conserved_where_empty_parts_share_by_epsilon():
    layer, a = seeded("conv2d_depthwise", False, True)
    with torch.no_grad():
        layer.weight[1].abs_().neg_()
    r = torch.rand_like(layer(a)).detach()
    lost, kept = (
        1 - attribute(rules.ZPlus(0.0, empty=empty), layer, a, r).sum() / r.sum() for empty in ("drop", "epsilon")
    )
    assert lost > 0.3
    assert abs(kept) < 1e-13


# --- bounds ---------------------------------------------------------------------------------------------------------


def zbox_by_pixel(layer, a, r, low, high):
    _, w, _ = as_matrices(layer, a)
    low, high, a = (t.expand(a.shape).flatten(1)[:, None] for t in (low, high, a))
    parts = a * w - low * pos(w) - high * neg(w)
    return ((r.flatten(1) / (parts.sum(2) + 1e-6))[:, :, None] * parts).sum(1)


LOW = torch.tensor([-2.0, -3.0], dtype=F64).reshape(1, 2, 1, 1)


@pytest.mark.parametrize("shape", [(1, 2, 1, 1), (2, 1, 1), (2, 5, 4), (3, 2, 5, 4), (7, 2, 5, 4)])
def test_bounds_of_any_shape_that_broadcasts(shape):
    layer, a = seeded("conv2d", True, False)
    low = LOW.reshape(2, 1, 1).expand(shape[-3:]).expand(shape)
    r = torch.randn_like(layer(a)).detach()
    found = attribute(rules.ZBox(low, low + 6), layer, a, r)
    close(found, zbox_by_pixel(layer, a, r, LOW, LOW + 6).reshape(a.shape))


def test_bounds_may_differ_by_sample():
    layer, a = seeded("conv2d", True, False)
    low = -torch.arange(3.0, 6.0, dtype=F64).reshape(3, 1, 1, 1)
    r = torch.randn_like(layer(a)).detach()
    close(
        attribute(rules.ZBox(low, 4.0), layer, a, r),
        zbox_by_pixel(layer, a, r, low, torch.tensor(4.0, dtype=F64)).reshape(a.shape),
    )


def test_bounds_from_a_normalization():
    from torchvision.transforms import Normalize

    mean, std = (0.485, 0.456), (0.229, 0.224)
    rule = rules.ZBox.from_normalization(mean, std, stabilizer=1e-6)
    layer, _ = seeded("conv2d", True, False)
    a = Normalize(mean, std)(torch.rand(3, 2, 5, 4, dtype=F64))
    low, high = (Normalize(mean, std)(torch.full((2, 1, 1), bound, dtype=F64)) for bound in (0, 1))
    r = torch.randn_like(layer(a)).detach()
    close(attribute(rule, layer, a, r), zbox_by_pixel(layer, a, r, low, high).reshape(a.shape), 1e-13)
    assert rule.low.shape == rule.high.shape == (1, 2, 1, 1)
    assert (rule.low < 0).all()


def test_bounds_from_a_normalization_with_one_value_and_other_pixels():
    rule = rules.ZBox.from_normalization(0.5, 0.25, low=-1, high=2, zero_params="bias", norm_scale=True)
    assert rule.low.tolist() == [[[[-6.0]]]]
    assert rule.high.tolist() == [[[[6.0]]]]
    assert (rule.zero_params, rule.norm_scale) == (("bias",), True)


def test_bounds_are_given_as_lists_or_as_other_dtypes():
    layer, a = seeded("conv2d", True, False)
    r = torch.randn_like(layer(a)).detach()
    low = [[[-2.1]], [[-3.3]]]
    wanted = attribute(rules.ZBox(torch.tensor(low, dtype=F64), 4.0), layer, a, r)
    close(attribute(rules.ZBox(low, [[[4.0]]]), layer, a, r), wanted, 1e-15)
    close(attribute(rules.ZBox(low, torch.tensor(4)), layer, a, r), wanted, 1e-15)
    close(attribute(rules.ZBox(torch.tensor(low), 4.0), layer, a, r), wanted, 1e-6)


@pytest.mark.parametrize("shape", [(3, 1, 1), (2,), (4, 1, 1, 1), (1, 1, 2, 5, 4)])
def test_bounds_that_do_not_fit_the_input_are_refused(shape):
    layer, a = seeded("conv2d", True, False)
    low = -1 - torch.rand(shape, dtype=F64)
    with pytest.raises(ValueError, match=r"ZBox: low has the shape .* input of shape \(3, 2, 5, 4\); .*\(channels, 1"):
        attribute(rules.ZBox(low, 1.0), layer, a, torch.zeros_like(layer(a)))


def test_bounds_of_pixels_for_what_is_normalised_are_told_once():
    layer, _ = seeded("conv2d", True, False)
    pixels = torch.rand(3, 2, 5, 4, dtype=F64)
    r = torch.randn_like(layer(pixels)).detach()
    rule = rules.ZBox(0.0, 1.0)
    with pytest.warns(UserWarning, match=r"ZBox: 7\S+\s% of the input .* this one has -1\S* to 1\S*\. "):
        attribute(rule, layer, pixels * 4 - 2, r)
    attribute(rule, layer, pixels * 4 - 2, r)  # (warnings are errors)
    mixed = pixels.clone()
    mixed.view(-1)[:12] = -1.0  # (a tenth, such as of noise)
    attribute(rules.ZBox(0.0, 1.0), layer, mixed, r)
    rounded = torch.where(pixels < 0.8, -1e-3, 1 + 1e-3)  # (black and white, of few bits)
    attribute(rules.ZBox(0.0, 1.0), layer, rounded.double(), r)


# --- representation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [*(rule for rule, _ in FORMS.values()), *SCALED, EMPTY["alpha2_beta1"][0]], ids=repr)
def test_rule_is_rebuilt_by_its_repr_and_by_pickle(rule):
    rebuilt = eval(repr(rule), vars(rules))
    assert repr(rebuilt) == repr(rule) == repr(pickle.loads(pickle.dumps(rule)))


@pytest.mark.parametrize("rule", [SCALED[1], EMPTY["zplus"][0], EMPTY["alpha2_beta1"][0]], ids=repr)
def test_rebuilt_rule_gives_the_same_relevance(rule):
    layer, a = seeded("conv2d_depthwise", True, True)
    r = torch.randn_like(layer(a)).detach()
    wanted = attribute(rule, layer, a, r)
    for rebuilt in (eval(repr(rule), vars(rules)), pickle.loads(pickle.dumps(rule))):
        assert torch.equal(attribute(rebuilt, layer, a, r), wanted)


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rules.AlphaBeta(2, 0.5), r"alpha - beta must be 1; got 2 and 0\.5"),
        (lambda: rules.AlphaBeta(0.5, -0.5), "must not be negative"),
        (lambda: rules.AlphaBeta(math.nan, 1), "alpha must be a finite number, not nan"),
        (lambda: rules.AlphaBeta(1, -math.inf), "beta must be a finite number, not -inf"),
        (lambda: rules.Gamma(-0.1), r"gamma must be a number of at least 0, not -0\.1"),
        (lambda: rules.Gamma(math.inf), "gamma must be a number of at least 0, not inf"),
        (lambda: rules.Epsilon(-0.1), r"epsilon must be finite and not negative, got -0\.1"),
        (lambda: rules.Epsilon(math.nan), "epsilon must be finite and not negative, got nan"),
        (lambda: rules.Epsilon(math.inf, norm_scale=True), "epsilon must be finite and not negative, got inf"),
        (lambda: rules.Epsilon(zero_params="biass"), "'weight' and 'bias', not 'biass'"),
        (lambda: rules.Epsilon(zero_params=False), "'weight' and 'bias', not False"),
        (lambda: rules.Epsilon(zero_params=[True]), "'weight' and 'bias', not True"),
        (lambda: rules.ZPlus(-1e-6), "stabilizer must be finite and not negative, got -1e-06"),
        (lambda: rules.ZPlus(empty="zero"), "empty must be one of 'drop', 'epsilon', not 'zero'"),
        (lambda: rules.AlphaBeta(empty=True), "empty must be one of 'drop', 'epsilon', not True"),
        (lambda: rules.Flat(math.nan), "stabilizer must be finite"),
        (lambda: rules.ZBox(1.0, 1.0), r"low must be below high everywhere, and both finite; got low=1\.0 and high=1"),
        (lambda: rules.ZBox(-math.inf, 1.0), "both finite; got low=-inf"),
        (lambda: rules.ZBox(math.nan, 1.0), "both finite; got low=nan"),
        (lambda: rules.ZBox([0.0, 1.0], [1.0, 1.0]), "low must be below high everywhere"),
        (lambda: rules.ZBox(torch.zeros(3, 1, 1), torch.ones(2, 1, 1)), r"each other: \(3, 1, 1\) and \(2, 1, 1\)"),
        (lambda: rules.ZBox.from_normalization([0.5], [0.0]), r"std must be positive, got \[0\.0\]"),
        (lambda: rules.ZBox.from_normalization([0.5] * 3, [0.2] * 2), "one value per channel each, got 3 and 2"),
        (lambda: rules.ZBox.from_normalization(0.5, 0.2, low=1, high=0), "low must be below high"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rules.ZBox(torch.tensor(-1j), 1.0), "low must be a number, a tensor or a nested list of numbers"),
        (lambda: rules.Epsilon("small"), "epsilon must be a number or a function of the denominator, not 'small'"),
        (lambda: rules.ZPlus(None), "stabilizer must be a number or a function of the denominator, not None"),
        (lambda: rules.Epsilon(torch.relu, norm_scale=True), "norm_scale scales a number; epsilon is the function"),
    ],
)
def test_stabilizers_of_other_types_are_refused(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_numbers_of_numpy_and_functions_are_stabilizers():
    layer, a = seeded("linear", True, False)
    r = torch.randn_like(layer(a)).detach()
    wanted = attribute(rules.Epsilon(0.5), layer, a, r)
    for epsilon in (np.float32(0.5), Stabilizer(0.5), lambda z: z + 0.5 * torch.where(z < 0, -1, 1)):
        close(attribute(rules.Epsilon(epsilon), layer, a, r), wanted, 1e-15)


WEIGHTED = [
    rules.ZPlus(),
    rules.AlphaBeta(),
    rules.Gamma(),
    rules.WSquare(),
    rules.Flat(),
    rules.ZBox(-1.0, 1.0),
    rules.Excitation(),
    rules.ContrastiveExcitation(),
]
#: Modules that sum up no weighted inputs, with the shape of an input.
OTHERS = {
    "ReLU": (nn.ReLU(), (2, 3)),
    "PReLU": (nn.PReLU(), (2, 3)),
    "AvgPool2d": (nn.AvgPool2d(2), (2, 3, 4, 4)),
    "BatchNorm2d": (nn.BatchNorm2d(3), (2, 3, 4, 4)),
    "InstanceNorm1d": (nn.InstanceNorm1d(3), (2, 3, 4)),
    "LayerNorm": (nn.LayerNorm((3, 4)), (2, 3, 4)),
    "GroupNorm": (nn.GroupNorm(1, 3), (2, 3, 4)),
    "Bilinear": (nn.Bilinear(2, 2, 2), (2, 2)),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("rule", WEIGHTED, ids=lambda rule: type(rule).__name__)
def test_rule_that_takes_weights_apart_refuses_what_has_none_to_sum_with(rule, name, untouched):
    module, shape = OTHERS[name]
    module = module.double().eval()
    number = {"Bilinear": 2}.get(name, 1)
    model = net(lambda s, a: s.layer(*[a] * number), layer=module)
    data = torch.randn(shape, dtype=F64, requires_grad=True)
    kind = type(rule).__name__
    message = rf"\({name}, {kind}\(.*: {kind} treats sums of weighted inputs .*, and no such operation .* in 'layer'"
    with untouched(model), pytest.raises(TypeError, match=message):
        within(model, Composite(None, layer_map=[(type(module), rule)]), data)
    handle = rule.copy().register(module)  # as zennit's composites do
    with pytest.raises(TypeError, match=rf"{kind}\(.*\) has no operation to act on in {name}"):
        model(data)
    handle.remove()
    model(data)


@pytest.mark.parametrize("rule", WEIGHTED, ids=lambda rule: type(rule).__name__)
def test_rule_that_takes_weights_apart_refuses_functions_without_them(rule):
    model = conv_net(lambda s, h: F.avg_pool2d(h, 2))
    message = rf"{type(rule).__name__} treats sums of weighted inputs, which avg_pool2d\(\) is not"
    with pytest.raises(TypeError, match=message):
        heatmap(model, Composite(None, layer_map=[(F.avg_pool2d, rule)]))


@pytest.mark.parametrize("module", [nn.BatchNorm2d(3), nn.AvgPool2d(2), nn.LayerNorm(4)], ids=repr)
def test_epsilon_treats_any_layer(module):
    module = module.double().eval()
    a = torch.randn(2, 3, 4, 4, dtype=F64)
    r = torch.randn_like(module(a)).detach()
    data = a.clone().requires_grad_()
    y = module(data)
    (grad,) = torch.autograd.grad(y, data, r / y.detach())
    close(attribute(rules.LRP0(), module, a, r), a * grad)


def test_modified_weights_do_not_pile_up():
    """A function made anew at each call, such as a lambda inside `surrogate`, has one copy each, up to a bound."""
    weight = torch.nn.Parameter(torch.randn(2, 2))
    kept = [weakref.ref(modified(weight, lambda w, k=k: w * k)) for k in range(20)]
    gc.collect()
    assert sum(ref() is not None for ref in kept) == KEPT
    assert modified(weight, positive) is modified(weight, positive)


@pytest.mark.parametrize("epsilon", [0.0, 1e-6, 0.3])
@pytest.mark.parametrize("sign", [-1, 0, 1])
@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("alone", [False, True])
def test_the_quotient_in_place_is_the_one_that_can_be_differentiated(epsilon, sign, live, alone):
    below = torch.tensor([-2.0, -0.5, 0.0, 0.5, 3.0], dtype=torch.float64)
    below = below if sign == 0 else sign * below.abs()
    above = below if alone else torch.tensor([1.0, -2.0, 3.0, 4.0, 0.0], dtype=torch.float64)
    given = above.clone(), below.clone()
    stabilized = below + epsilon * below.sign()
    wanted = torch.where(below == 0, 0.0, above / torch.where(below == 0, 1.0, stabilized))
    found = quotient(above, below.requires_grad_(live), stabilizing(epsilon), sign)
    close(found.detach(), wanted, 1e-15)
    assert found.requires_grad == live
    assert torch.equal(above, given[0])
    assert torch.equal(below, given[1])


@pytest.mark.parametrize(
    ("rule", "name", "changed"),
    [
        (rules.Epsilon(), "epsilon", rules.Epsilon(0.5)),
        (rules.ZPlus(), "stabilizer", rules.ZPlus(0.5)),
        (rules.Gamma(), "stabilizer", rules.Gamma(stabilizer=0.5)),
        (rules.WSquare(), "stabilizer", rules.WSquare(0.5)),
        (rules.Epsilon(0.5), "norm_scale", rules.Epsilon(0.5, norm_scale=True)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, rules.Rule) else value,
)
def test_settings_that_are_changed_count_from_then_on(rule, name, changed):
    """What a rule is shown with is what it does."""
    torch.manual_seed(0)
    layer, a, m = nn.Linear(4, 3).double(), torch.randn(2, 4, dtype=F64), torch.ones(2, 3, dtype=F64)
    before = attribute(rule, layer, a, m, True)
    setattr(rule, name, getattr(changed, name))
    assert repr(rule) == repr(changed)
    found = attribute(rule, layer, a, m, True)
    assert torch.equal(found, attribute(changed, layer, a, m, True))
    assert not torch.allclose(found, before)
