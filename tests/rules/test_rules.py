"""Every rule against the paper's formula, written as a matrix product of relevances."""

import copy
import warnings

import pytest
import torch
import zennit.rules
from rule_cases import FORMS, LAYERS, attribute, by_hook, close, expected, pos, relevance, seeded
from torch import nn
from zennit.composites import LayerMapComposite
from zennit.core import Stabilizer

import crp.rules as rules
from crp.attribution import CondAttribution
from crp.composites import Composite, EpsilonPlusFlat
from crp.rules import Rule, lift
from crp.rules.layer import modified, positive


@pytest.fixture(params=["bias", "no_bias", "bias_nonnegative"])
def kind(request):
    return request.param


@pytest.fixture(params=list(LAYERS))
def case(request, kind):
    return seeded(request.param, "no_bias" not in kind, "nonnegative" in kind)


@pytest.fixture(params=["linear", "conv1d_same", "conv2d_reflect", "conv2d_depthwise", "conv3d", "transposed2d"])
def few(request, kind):
    return seeded(request.param, "no_bias" not in kind, "nonnegative" in kind)


@pytest.mark.covering(13)
@pytest.mark.parametrize("name", list(FORMS))
def test_rule_is_the_paper_s_formula_in_relevances(name, case):
    (rule, form), (layer, a) = FORMS[name], case
    r = torch.randn_like(layer(a)).detach()
    close(attribute(rule, layer, a, r), expected(form, layer, a, r))


@pytest.mark.covering(9)
@pytest.mark.parametrize("name", [name for name, (rule, _) in FORMS.items() if not rule.at_input])
def test_rule_is_the_paper_s_formula_in_multipliers(name, case):
    (rule, form), (layer, a) = FORMS[name], case
    y = layer(a).detach()
    m = torch.randn_like(y)
    close(attribute(rule, layer, a, m, True), expected(form, layer, a, m * y))


@pytest.mark.covering(4)
@pytest.mark.parametrize("name", [name for name, (rule, _) in FORMS.items() if rule.at_input])
def test_rule_at_the_input_hands_out_relevance_also_where_the_input_is_zero(name, case):
    (rule, form), (layer, a) = FORMS[name], case
    y = layer(a).detach()
    m = torch.randn_like(y)
    with Composite(None, layer_map=[(type(layer), rule)]).context(layer):
        data = a.clone().requires_grad_()
        (relevance,) = torch.autograd.grad(layer(data), data, m)
    close(relevance, expected(form, layer, a, m * y))


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


PAIRS = [
    (rules.Epsilon(0.1), zennit.rules.Epsilon(0.1)),
    (rules.Epsilon(0.1, "bias"), zennit.rules.Epsilon(0.1, zero_params=["bias"])),
    (rules.Epsilon(0.1, norm_scale=True), zennit.rules.Epsilon(Stabilizer(0.1, norm_scale=True))),
    (rules.Norm(0.1), zennit.rules.Norm(0.1)),
    (rules.ZPlus(), zennit.rules.ZPlus()),
    (rules.ZPlus(0.1, "bias"), zennit.rules.ZPlus(0.1, zero_params=["bias"])),
    (rules.ZPlus(0.1, norm_scale=True), zennit.rules.ZPlus(Stabilizer(0.1, norm_scale=True))),
    (rules.AlphaBeta(), zennit.rules.AlphaBeta()),
    (rules.AlphaBeta(3, 2, 0.1, "bias"), zennit.rules.AlphaBeta(3, 2, 0.1, zero_params=["bias"])),
    (rules.Gamma(0.5), zennit.rules.Gamma(0.5)),
    (rules.Gamma(0.5, 0.1, "bias"), zennit.rules.Gamma(0.5, 0.1, zero_params=["bias"])),
    (rules.WSquare(), zennit.rules.WSquare()),
    (rules.WSquare(zero_params="bias"), zennit.rules.WSquare(zero_params=["bias"])),
    (rules.Flat(), zennit.rules.Flat()),
    (rules.ZBox(-3, 3), zennit.rules.ZBox(-3, 3)),
]


@pytest.mark.covering(6)
@pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=lambda rule: repr(rule) if isinstance(rule, Rule) else "")
def test_rule_in_relevance_encoding_is_zennit_s(ours, theirs, few):
    layer, a = few
    r = torch.randn_like(layer(a)).detach()
    close(attribute(ours, layer, a, r), by_hook(theirs, layer, a, r))


HIDDEN = [pair for pair in PAIRS if not isinstance(pair[0], rules.WSquare | rules.Flat | rules.ZBox)]


@pytest.mark.parametrize(("ours", "theirs"), HIDDEN, ids=lambda rule: repr(rule) if isinstance(rule, Rule) else "")
def test_rule_between_activations_is_zennit_s(ours, theirs):
    """Also where a bias alone makes an output positive."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)).double()
    model[0].bias.data += 0.5
    a = torch.randn(8, 4, dtype=torch.float64)
    assert ((model[0](a) > 0) & (a @ model[0].weight.T < 0)).any()
    with LayerMapComposite([(nn.Linear, theirs), (nn.ReLU, zennit.rules.Pass())]).context(model) as explained:
        data = a.clone().requires_grad_()
        y = explained(data)
        (wanted,) = torch.autograd.grad(y, data, y.detach())
    close(relevance(ours, model, a, torch.ones_like(y)), wanted)


@pytest.mark.covering(6)
@pytest.mark.parametrize("hook", [hook for _, hook in PAIRS], ids=[repr(ours) for ours, _ in PAIRS])
def test_lifted_zennit_rule_gives_the_same_relevance(hook, few):
    layer, a = few
    y = layer(a).detach()
    m = torch.randn_like(y)
    with Composite(None, layer_map=[(type(layer), hook)]).context(layer):
        data = a.clone().requires_grad_()
        (relevance,) = torch.autograd.grad(layer(data), data, m)
    close(relevance, by_hook(hook, layer, a, m * y))


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
            # αβ adds up the layer's output from its positive and negative contributions
            tolerance = 1e-13 if rule.adds_up else 0.0
            torch.testing.assert_close(out, reference, rtol=0, atol=tolerance)
            (grad,) = torch.autograd.grad(out.sum(), data)
            assert torch.isfinite(grad).all()


class Turned(nn.Module):
    """1 - 2x, in place or not; it says so nowhere."""

    def __init__(self, overwrites):
        super().__init__()
        self.overwrites = overwrites

    def forward(self, x):
        return x.mul_(-2).add_(1) if self.overwrites else 1 - 2 * x


def test_a_module_as_a_whole_may_overwrite_its_input_in_a_composite_of_zennit():
    layer, x = nn.Linear(4, 5).double(), torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    composite, found = LayerMapComposite([(Turned, rules.Whole(rules.Epsilon(0.1)))]), []
    for overwrites in (False, True):
        with composite.context(nn.Sequential(layer, Turned(overwrites))) as model:
            found.append(torch.autograd.grad(model(x).sum(), x)[0])
    assert found[0].abs().sum() > 0
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=0)


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


def test_lift_refuses_hooks_with_a_backward_pass_of_their_own():
    with pytest.raises(TypeError, match="ReLUGuidedBackprop cannot be used in this composite"):
        lift(zennit.rules.ReLUGuidedBackprop())


@pytest.mark.parametrize("multipliers", [True, False], ids=["our composite", "zennit's"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda layer, a: None, "makes None the surrogate of linear"),
        (lambda layer, a: layer(a).sum(), r"makes a Tensor of shape \(\) the surrogate of .*, which returns \(2, 4\)"),
        (lambda layer, a: layer(a)[:, :1], r"makes a Tensor of shape \(2, 1\) the surrogate of linear"),
        (lambda layer, a: layer(a).detach(), r"makes a constant the surrogate of linear.*: it must be differentiable"),
    ],
    ids=["nothing", "scalar", "one output", "constant"],
)
def test_surrogates_that_relevance_cannot_pass_are_refused(make, message, multipliers):
    class Mistaken(Rule):
        surrogate = staticmethod(make)

    layer, a = nn.Linear(3, 4), torch.rand(2, 3)
    with pytest.raises(TypeError, match=f"Mistaken {message}"):
        attribute(Mistaken(), layer, a, torch.rand(2, 4), multipliers)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda layer, a: layer(a, positive, bias="no"), "bias must be a modifier, a tensor, or False .*; not 'no'"),
        (lambda layer, a: layer(a, positive, bias=0), "bias must be a modifier, a tensor, or False .*; not 0"),
        (lambda layer, a: layer(a, "positive"), "weight must be a modifier or a tensor, not 'positive'"),
    ],
)
def test_words_in_place_of_modifiers_are_refused(make, message):
    class Mistaken(Rule):
        surrogate = staticmethod(make)

    with pytest.raises(TypeError, match=message):
        attribute(Mistaken(), nn.Linear(3, 4), torch.rand(2, 3), torch.rand(2, 4), True)


class OfTokens(nn.Linear):
    """A dense layer that reads the tokens of all samples in one axis, as those of GPT-2 do."""

    def forward(self, x):
        return super().forward(x.reshape(-1, x.shape[-1])).unflatten(0, x.shape[:2])


@pytest.mark.parametrize(
    ("layers", "shape", "is_told"),
    [
        (lambda: [nn.Linear(6, 4)], (2, 6), True),
        (lambda: [nn.Flatten(), nn.Linear(16, 4)], (2, 1, 4, 4), True),
        (lambda: [nn.Linear(1, 4)], (2, 1), False),
        (lambda: [nn.Conv2d(1, 4, 3)], (2, 1, 4, 4), False),
        (lambda: [nn.Linear(6, 4)], (1, 3, 6), False),
        (lambda: [OfTokens(6, 4)], (1, 3, 6), False),
    ],
    ids=["features", "pixels", "one_feature", "convolution", "tokens", "tokens_in_one_axis"],
)
def test_flat_tells_where_all_that_a_sample_consists_of_gets_the_same(layers, shape, is_told):
    model = nn.Sequential(*layers(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3)).double().eval()
    data, other = torch.randn(shape, dtype=torch.float64), [((nn.Linear, nn.Conv2d), rules.Epsilon())]
    model(data)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        CondAttribution(model)(data, [{"y": 1}], EpsilonPlusFlat())
        CondAttribution(model)(data, [{"y": 1}], EpsilonPlusFlat(first_map=other))
    told = [str(w.message) for w in caught]
    assert len(told) == is_told
    assert not told or told[0].startswith(f"Flat gives all {data[0].numel()} inputs of linear() in")
