"""Every rule against the paper's formula, written as a matrix product of relevances."""

import copy
import pickle

import pytest
import torch
import zennit.rules
from torch import nn

import crp.rules as rules
from crp.composites import Composite
from crp.rules import Rule, lift
from crp.rules.layer import modified, positive

LAYERS = {
    "linear": lambda b: (nn.Linear(6, 5, bias=b), (6,)),
    "linear_tokens": lambda b: (nn.Linear(6, 5, bias=b), (3, 6)),
    "conv1d": lambda b: (nn.Conv1d(3, 4, 3, stride=2, padding=1, bias=b), (3, 7)),
    "conv2d": lambda b: (nn.Conv2d(2, 3, 3, padding=1, bias=b), (2, 5, 4)),
    "conv2d_grouped": lambda b: (nn.Conv2d(4, 6, 2, groups=2, dilation=2, bias=b), (4, 5, 5)),
    "conv2d_depthwise": lambda b: (nn.Conv2d(3, 3, 3, groups=3, bias=b), (3, 4, 4)),
    "conv2d_circular": lambda b: (nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular", bias=b), (2, 4, 4)),
    "conv3d": lambda b: (nn.Conv3d(2, 2, 2, bias=b), (2, 3, 3, 2)),
    "transposed1d": lambda b: (nn.ConvTranspose1d(3, 2, 3, stride=2, bias=b), (3, 4)),
    "transposed2d": lambda b: (nn.ConvTranspose2d(4, 4, 3, stride=2, output_padding=1, groups=2, bias=b), (4, 3, 3)),
    "transposed3d": lambda b: (nn.ConvTranspose3d(2, 2, 2, bias=b), (2, 2, 2, 2)),
}
STABILIZER = 1e-3  # large enough to be seen if it were in the wrong place


@pytest.fixture(params=[True, False], ids=["bias", "no_bias"])
def bias(request):
    return request.param


@pytest.fixture(params=["any_sign", "nonnegative"])
def sign(request):
    return request.param


@pytest.fixture(params=list(LAYERS))
def case(request, bias, sign):
    torch.manual_seed(list(LAYERS).index(request.param))
    layer, shape = LAYERS[request.param](bias)
    layer = layer.double()
    a = torch.randn(3, *shape, dtype=torch.float64)
    return layer, a.relu() if sign == "nonnegative" else a


def as_matrix(layer, a):
    """Weight (out, in) and bias (out,) of an affine layer for inputs of the shape of ``a``, from its jacobian."""
    zero = torch.zeros_like(a[:1])
    with torch.enable_grad():
        weight = torch.autograd.functional.jacobian(lambda x: layer(x).flatten(), zero).flatten(1)
        return weight, layer(zero).detach().flatten()


def stabilize(z, epsilon=STABILIZER):
    return z + epsilon * (1 - 2 * (z < 0).to(z))


def pos(t):
    return t.clamp(min=0)


def neg(t):
    return t.clamp(max=0)


def form_epsilon(a, w, b, r):
    return a * ((r / stabilize(a @ w.T + b)) @ w)


def form_zplus(a, w, b, r):
    z = pos(a) @ pos(w).T + neg(a) @ neg(w).T + pos(b)
    s = torch.where(z == 0, 0.0, r / stabilize(z))
    return pos(a) * (s @ pos(w)) + neg(a) * (s @ neg(w))


def form_alpha_beta(a, w, b, r, alpha, beta):
    below = pos(a) @ neg(w).T + neg(a) @ pos(w).T + neg(b)
    s = torch.where(below == 0, 0.0, r / stabilize(below))
    return alpha * form_zplus(a, w, b, r) - beta * (pos(a) * (s @ neg(w)) + neg(a) * (s @ pos(w)))


def form_gamma(a, w, b, r, gamma):
    up, down, y = w + gamma * pos(w), w + gamma * neg(w), a @ w.T + b
    above = pos(a) @ up.T + neg(a) @ down.T + b + gamma * pos(b)
    below = pos(a) @ down.T + neg(a) @ up.T + b + gamma * neg(b)
    s, t = (y > 0) * r / stabilize(above), (y < 0) * r / stabilize(below)
    return pos(a) * (s @ up + t @ down) + neg(a) * (s @ down + t @ up)


def form_wsquare(a, w, b, r):
    return (r / stabilize((w**2).sum(1) + b**2)) @ w**2


def form_flat(a, w, b, r):
    reach = (w != 0).double()
    return (r / stabilize(reach.sum(1))) @ reach


def form_zbox(a, w, b, r, low, high):
    contribution = lambda x, weight: x * weight  # noqa: E731
    parts = contribution(a[:, None], w) - low * pos(w) - high * neg(w)
    return ((r / stabilize(parts.sum(2) + (b - pos(b) - neg(b))))[:, :, None] * parts).sum(1)


FORMS = {
    "epsilon": (rules.Epsilon(STABILIZER), form_epsilon),
    "zplus": (rules.ZPlus(STABILIZER), form_zplus),
    "alpha2_beta1": (rules.AlphaBeta(2, 1, STABILIZER), lambda *t: form_alpha_beta(*t, 2, 1)),
    "alpha1.4_beta0.4": (rules.AlphaBeta(1.4, 0.4, STABILIZER), lambda *t: form_alpha_beta(*t, 1.4, 0.4)),
    "alpha1_beta0": (rules.AlphaBeta(1, 0, STABILIZER), form_zplus),
    "gamma": (rules.Gamma(0.25, STABILIZER), lambda *t: form_gamma(*t, 0.25)),
    "wsquare": (rules.WSquare(STABILIZER), form_wsquare),
    "flat": (rules.Flat(STABILIZER), form_flat),
    "zbox": (rules.ZBox(-3.0, 2.5, STABILIZER), lambda *t: form_zbox(*t, -3.0, 2.5)),
}


def expected(form, layer, a, r):
    w, b = as_matrix(layer, a)
    return form(a.flatten(1), w, b, r.flatten(1)).reshape(a.shape)


def attribute(rule, layer, a, start, multiplier):
    rule = rule.copy()
    rule.multiplier = multiplier
    handle = rule.register(layer)
    try:
        a = a.clone().requires_grad_()
        (grad,) = torch.autograd.grad(layer(a), a, start)
    finally:
        handle.remove()
    return a.detach() * grad if multiplier else grad


@pytest.mark.parametrize("name", list(FORMS))
def test_rule_is_the_paper_s_formula_in_relevances(name, case):
    (rule, form), (layer, a) = FORMS[name], case
    r = torch.randn_like(layer(a)).detach()
    torch.testing.assert_close(attribute(rule, layer, a, r, False), expected(form, layer, a, r), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", [name for name, (rule, _) in FORMS.items() if not rule.at_input])
def test_rule_is_the_paper_s_formula_in_multipliers(name, case):
    (rule, form), (layer, a) = FORMS[name], case
    y = layer(a).detach()
    m = torch.randn_like(y)
    torch.testing.assert_close(
        attribute(rule, layer, a, m, True), expected(form, layer, a, m * y), rtol=1e-10, atol=1e-11
    )


@pytest.mark.parametrize("name", [name for name, (rule, _) in FORMS.items() if rule.at_input])
def test_rule_at_the_input_hands_out_relevance_also_where_the_input_is_zero(name, case):
    (rule, form), (layer, a) = FORMS[name], case
    y = layer(a).detach()
    m = torch.randn_like(y)
    with Composite(None, layer_map=[(type(layer), rule)]).context(layer):
        data = a.clone().requires_grad_()
        (relevance,) = torch.autograd.grad(layer(data), data, m)
    torch.testing.assert_close(relevance, expected(form, layer, a, m * y), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", ["flat", "zbox"])
def test_rule_at_the_input_sees_through_a_normalisation_inside_the_model(name):
    class Normalized(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 5, dtype=torch.float64)

        def forward(self, x):
            return self.linear((x - 0.4) / 0.3)

    model, a = Normalized(), torch.rand(3, 6, dtype=torch.float64)
    rule, form = FORMS[name]
    m = torch.randn(3, 5, dtype=torch.float64)
    with Composite(None, layer_map=[(nn.Linear, rule)]).context(model):
        data = a.clone().requires_grad_()
        (relevance,) = torch.autograd.grad(model(data), data, m)
    inner = (a - 0.4) / 0.3
    r = m * model(a).detach()
    torch.testing.assert_close(relevance, expected(form, model.linear, inner, r), rtol=1e-10, atol=1e-11)


def test_rule_at_the_input_on_a_middle_layer_of_the_same_shape_goes_through_the_layers_below():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    a = torch.randn(3, 4, dtype=torch.float64)
    with Composite(None, name_map=[(["2"], rules.Flat(0.0)), (["0"], rules.LRP0())]).context(model):
        data = a.clone().requires_grad_()
        (relevance,) = torch.autograd.grad(model(data)[:, 0].sum(), data)
    hidden = model[:2](a).detach()
    r_hidden = (model[2](hidden)[:, :1] / 4).expand(3, 4)  # flat: all four get the same
    w, b = model[0].weight, model[0].bias
    z = a @ w.T + b
    through = a * (((r_hidden / hidden) * (1 - hidden**2) * z / z) @ w)  # tanh by the chain rule, then LRP-0
    torch.testing.assert_close(relevance, through.detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (rules.Epsilon(0.1), zennit.rules.Epsilon(0.1)),
        (rules.Epsilon(0.1, "bias"), zennit.rules.Epsilon(0.1, zero_params=["bias"])),
        (rules.ZPlus(), zennit.rules.ZPlus()),
        (rules.ZPlus(zero_params="bias"), zennit.rules.ZPlus(zero_params=["bias"])),
        (rules.AlphaBeta(), zennit.rules.AlphaBeta()),
        (rules.Gamma(0.5), zennit.rules.Gamma(0.5)),
        (rules.WSquare(zero_params="bias"), zennit.rules.WSquare(zero_params=["bias"])),
        (rules.Flat(), zennit.rules.Flat()),
        (rules.ZBox(-3, 3), zennit.rules.ZBox(-3, 3)),
    ],
    ids=lambda rule: repr(rule) if isinstance(rule, Rule) else "",
)
def test_rule_in_relevance_encoding_is_zennit_s(ours, theirs, case):
    layer, a = case
    r = torch.randn_like(layer(a)).detach()
    hook, data = theirs.copy(), a.clone().requires_grad_()
    handle = hook.register(layer)
    (reference,) = torch.autograd.grad(layer(data), data, r)
    handle.remove()
    torch.testing.assert_close(attribute(ours, layer, a, r, False), reference, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("hook", [zennit.rules.Gamma(0.3), zennit.rules.ZPlus(), zennit.rules.Epsilon(0.2)], ids=repr)
def test_lifted_zennit_rule_gives_the_same_relevance(hook, case):
    layer, a = case
    y = layer(a).detach()
    m = torch.randn_like(y)
    native, data = hook.copy(), a.clone().requires_grad_()
    handle = native.register(layer)
    (reference,) = torch.autograd.grad(layer(data), data, m * y)
    handle.remove()
    torch.testing.assert_close(attribute(lift(hook), layer, a, m, True), reference, rtol=1e-10, atol=1e-10)


def test_lrp0_drops_what_has_nothing_to_stand_on():
    layer = nn.Linear(2, 1, bias=False, dtype=torch.float64)
    nn.init.ones_(layer.weight)
    a = torch.tensor([[1.0, -1.0]], dtype=torch.float64)  # the contributions cancel
    assert torch.equal(attribute(rules.LRP0(), layer, a, torch.ones(1, 1).double(), False), torch.zeros(1, 2).double())


@pytest.mark.parametrize("multiplier", [True, False])
@pytest.mark.parametrize("inplace", [True, False])
def test_pass_hands_relevance_on(multiplier, inplace):
    layer = nn.SiLU(inplace=inplace)
    a = torch.randn(4, 5, dtype=torch.float64)
    m = torch.randn(4, 5, dtype=torch.float64)
    start, relevance = (m, m * torch.nn.functional.silu(a)) if multiplier else (m, m)
    rule = rules.Pass()
    rule.multiplier = multiplier
    handle = rule.register(layer)
    leaf = a.clone().requires_grad_()
    (grad,) = torch.autograd.grad(layer(leaf * 1), leaf, start)
    handle.remove()
    torch.testing.assert_close(a * grad if multiplier else grad, relevance, rtol=1e-12, atol=1e-13)


def test_norm_shares_by_contribution():
    layer, a = nn.AvgPool2d(2), torch.rand(2, 3, 4, 4, dtype=torch.float64)
    r = torch.rand(2, 3, 2, 2, dtype=torch.float64)
    shares = a / nn.functional.interpolate(layer(a) * 4, scale_factor=2)
    expected = shares * nn.functional.interpolate(r, scale_factor=2)
    torch.testing.assert_close(attribute(rules.Norm(0.0), layer, a, r, False), expected)


def test_module_used_twice_has_a_state_for_each_use():
    torch.manual_seed(0)
    shared = nn.Linear(4, 4, dtype=torch.float64)
    twice = nn.Sequential(shared, nn.ReLU(), shared)
    unrolled = nn.Sequential(shared, nn.ReLU(), copy.deepcopy(shared))
    a = torch.randn(3, 4, dtype=torch.float64)
    found = []
    for model in (twice, unrolled):
        with Composite(None, layer_map=[(nn.Linear, rules.ZPlus())]).context(model):
            data = a.clone().requires_grad_()
            found.append(torch.autograd.grad(model(data)[:, 1].sum(), data)[0])
    assert found[1].abs().sum() > 0
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=0)


def test_rule_keeps_the_forward_value_and_lets_the_next_layer_work_in_place():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True), nn.Conv2d(3, 2, 1)).double()
    x = torch.randn(2, 2, 6, 6, dtype=torch.float64)
    reference = model(x).detach()
    for rule in (rules.Epsilon(), rules.ZPlus(), rules.Gamma(), rules.AlphaBeta()):
        with Composite(None, layer_map=[(nn.Conv2d, rule)]).context(model):
            data = x.clone().requires_grad_()
            out = model(data)
            assert torch.equal(out, reference)
            (grad,) = torch.autograd.grad(out.sum(), data)
            assert torch.isfinite(grad).all()


def test_rules_can_be_batched_over_cotangents(case):
    layer, a = case
    for rule, _ in FORMS.values():
        hook = rule.copy()
        hook.multiplier = True
        handle = hook.register(layer)
        data = a.clone().requires_grad_()
        y = layer(data)
        starts = torch.randn(4, *y.shape, dtype=torch.float64)
        (batched,) = torch.autograd.grad(y, data, starts, is_grads_batched=True, retain_graph=True)
        single = torch.stack([torch.autograd.grad(y, data, s, retain_graph=True)[0] for s in starts])
        handle.remove()
        torch.testing.assert_close(batched, single, rtol=1e-12, atol=1e-13)


def test_modified_weights_are_cached_until_the_parameter_changes():
    parameter = nn.Parameter(torch.tensor([1.0, -1.0]))
    first = modified(parameter, positive)
    assert modified(parameter, positive) is first
    with torch.no_grad():
        parameter.mul_(-1)
    assert modified(parameter, positive).tolist() == [0.0, 1.0]


def test_custom_rule_is_one_method():
    class PositiveWeights(Rule):
        def surrogate(self, layer, a):
            return layer(a, positive, bias=False)

    layer, a = nn.Linear(3, 2, dtype=torch.float64), torch.rand(2, 3, dtype=torch.float64)
    r = torch.rand(2, 2, dtype=torch.float64)
    w = pos(layer.weight)
    z = a @ w.T
    torch.testing.assert_close(
        attribute(PositiveWeights(0.0), layer, a, r, False), torch.where(a == 0, 0.0, a * ((r / z) @ w)).detach()
    )


@pytest.mark.parametrize("rule", [rule for rule, _ in FORMS.values()], ids=repr)
def test_rule_is_rebuilt_by_its_repr_and_by_pickle(rule):
    rebuilt = eval(repr(rule), vars(rules))
    assert repr(rebuilt) == repr(rule) == repr(pickle.loads(pickle.dumps(rule)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rules.AlphaBeta(2, 0.5), r"alpha - beta must be 1; got 2 and 0\.5"),
        (lambda: rules.AlphaBeta(0.5, -0.5), "must not be negative"),
        (lambda: rules.Gamma(-0.1), r"gamma must not be negative, got -0\.1"),
        (lambda: rules.ZBox(1.0, 1.0), "low must be below high"),
        (lambda: rules.Epsilon(zero_params="biass"), "'weight' and 'bias', not 'biass'"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_rule_refuses_a_layer_it_cannot_treat():
    with pytest.raises(TypeError, match=r"MultiheadAttention has parameters \['in_proj_weight'"):
        rules.ZPlus().register(nn.MultiheadAttention(4, 2))


def test_lift_refuses_hooks_with_a_backward_pass_of_their_own():
    with pytest.raises(TypeError, match="ReLUGuidedBackprop cannot be used in this composite"):
        lift(zennit.rules.ReLUGuidedBackprop())
