"""Rules on operations keep the call's arguments, the modified weights, the graph and the number, call after call."""

import copy
import gc
import weakref

import pytest
import torch
from affine_cases import WRITINGS, Function
from core_cases import deviation, net
from rule_cases import FORMS, as_matrices, expected, in_matrices, mapped, relevance, seeded
from second_derivatives import check_derivative
from spelling_cases import Written
from test_affine_spellings import FEW, SPELLINGS, Between
from torch import nn
from torch.nn import functional as F

import crp.rules as rules
from crp.composites import Composite
from crp.rules import Rule


def normal(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("output_size", [[8, 8], [7, 8], (8, 7), [3, 2, 8, 8]], ids=str)
def test_output_size_of_a_transposed_convolution_is_kept(output_size):
    model = net(lambda s, x: s.up(x, output_size=output_size), up=nn.ConvTranspose2d(3, 2, 3, 2, 1))
    more = [size - 7 for size in output_size[-2:]]
    plain = nn.ConvTranspose2d(3, 2, 3, 2, 1, output_padding=more).double()
    plain.load_state_dict(model.up.state_dict())
    a = normal(3, 3, 4, 4)
    m = normal(3, 2, *output_size[-2:], seed=1)
    assert torch.equal(model(a), plain(a))
    for rule, form in FORMS.values():
        assert deviation(relevance(rule, model, a, m), expected(form, plain, a, m * plain(a)).detach()) <= 1e-10


#: Arguments of a call that a module's attributes do not show.
ARGUMENTS = {
    "stride": lambda s, x: F.conv2d(x[:, :2], s.conv.weight, s.conv.bias, stride=2),
    "padding": lambda s, x: F.conv2d(x[:, :2], s.conv.weight, s.conv.bias, padding=(2, 1)),
    "same": lambda s, x: F.conv2d(x[:, :2], s.conv.weight, s.conv.bias, padding="same"),
    "dilation": lambda s, x: F.conv2d(x[:, :2], s.conv.weight, dilation=2),
    "groups": lambda s, x: F.conv2d(x, s.conv.weight, s.conv.bias, 1, 0, 1, 2),
    "transposed": lambda s, x: F.conv_transpose2d(x, s.conv.weight, None, 2, 1, 1),
    "module": lambda s, x: s.conv._conv_forward(x[:, :2], s.conv.weight * 2, None),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_of_a_call_are_kept(name):
    model, a = net(ARGUMENTS[name], conv=nn.Conv2d(2, 4, 3)), normal(2, 4, 6, 5)
    m = normal(*model(a).shape, seed=1)
    matrices = as_matrices(model, a)
    for rule, form in FORMS.values():
        wanted = in_matrices(form, matrices, a, m * model(a)).detach()
        assert deviation(relevance(rule, model, a, m), wanted) <= 1e-10


class Counted:
    """Positive part, that counts."""

    def __init__(self):
        self.n, self.made = 0, []

    def __call__(self, parameter):
        self.n += 1
        result = parameter.clamp(min=0)
        self.made.append(weakref.ref(result))
        return result


class Own(Rule):
    """A rule of one's own with a modifier that counts its calls."""

    settings = ("modifier",)

    def __init__(self, modifier):
        super().__init__(1e-3)
        self.modifier = modifier

    def surrogate(self, layer, a):
        return layer(a, self.modifier, bias=False)


@pytest.mark.parametrize("attribute", ["weight", "kernel"], ids=["module", "function"])
def test_modified_weights_are_kept_until_the_weight_changes(attribute):
    layer, a = seeded("conv2d", True, False)
    model, modifier = layer if attribute == "weight" else Function(layer), Counted()
    m = torch.randn_like(model(a))
    for n in range(1, 4):
        first, second = (relevance(Own(modifier), model, a, m) for _ in range(2))
        assert torch.equal(first, second)
        assert modifier.n == n
        with torch.no_grad():
            getattr(model, attribute).mul_(-1.5)
    setattr(model, attribute, nn.Parameter(-getattr(model, attribute)))
    assert deviation(relevance(Own(modifier), model, a, m), relevance(Own(Counted()), model, a, m)) == 0
    assert modifier.n == 4
    del model, layer
    gc.collect()
    assert not any(made() is not None for made in modifier.made)


@pytest.mark.parametrize("writing", WRITINGS)
def test_changed_weights_are_noticed_whatever_computes_them(writing):
    layer, a = seeded("conv2d", True, False)
    model, changed = (WRITINGS[writing](copy.deepcopy(layer), a)[0] for _ in range(2))
    old, m = copy.deepcopy(model.state_dict()), normal(3, 3, 5, 4)
    changed.load_state_dict(old)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.add_(0.3)
    for rule, _ in FORMS.values():
        before, after, found = relevance(rule, model, a, m), relevance(rule, changed, a, m), []
        with mapped(rule).context(model):
            for state in (old, changed.state_dict(), old):
                model.load_state_dict(state)
                model(a)  # (the old spectral norm keeps the weight of its last call)
                leaf = a.clone().requires_grad_()
                found.append(torch.autograd.grad(model(leaf), leaf, m)[0])
        assert torch.equal(found[0], before)
        assert torch.equal(found[1], after)
        assert torch.equal(found[2], before)
        assert not torch.equal(before, after)


def test_computed_weights_are_told_apart_and_let_go():
    """A new tensor may have the identity and the memory of one that is gone."""
    model, modifier = Written(lambda s, x: x @ (s.W * s.factor)), Counted()
    x, m = normal(3, 6), normal(3, 5, seed=1)
    for factor in range(-10, 10):
        model.factor = factor + 0.5
        fresh = Written(lambda s, x, factor=factor: F.linear(x, s.W.T * (factor + 0.5)))
        found, wanted = relevance(Own(modifier), model, x, m), relevance(rules.ZPlus(1e-3), fresh, x.abs(), m)
        assert deviation(relevance(Own(modifier), model, x.abs(), m), wanted) <= 1e-12
        assert found.isfinite().all()
    del found, wanted
    gc.collect()
    assert sum(made() is not None for made in modifier.made) <= 1


def small_net(inplace=True, functional=False):
    """Convolutions and ReLUs, as modules or as functions."""
    torch.manual_seed(3)
    layers = {"a": nn.Conv2d(3, 6, 3, padding=1), "b": nn.Conv2d(6, 6, 3, padding=1), "fc": nn.Linear(6, 3)}

    def modules(s, x):
        relu = nn.ReLU(inplace)
        return s.fc(relu(s.b(relu(s.a(x)))).mean((2, 3)))

    def functions(s, x):
        h = F.relu(F.conv2d(x, s.a.weight, s.a.bias, padding=1), inplace=inplace)
        h = F.conv2d(h, s.b.weight, s.b.bias, padding=1)
        return (h.relu() + 0.5 * h).mean((2, 3)) @ s.fc.weight.T + s.fc.bias

    return net(functions if functional else modules, **layers)


EVERY = [rules.Epsilon(0.1), rules.ZPlus(), rules.AlphaBeta(), rules.Gamma(), rules.Gamma(100), rules.LRP0()]


@pytest.mark.parametrize("precision", ["float64", "float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("functional", [False, True], ids=["modules", "functions"])
@pytest.mark.parametrize("rule", EVERY, ids=repr)
def test_first_call_is_as_later_ones_to_the_last_bit(rule, functional, precision):
    dtype = {"autocast": "float32"}.get(precision, precision)
    model = small_net(functional=functional).to(getattr(torch, dtype))
    x = normal(2, 3, 6, 6).to(getattr(torch, dtype))
    found = []

    def call():
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            out = model(leaf)
        found.append(torch.autograd.grad(out[:, 1].sum(), leaf)[0])

    for _ in range(2):
        with mapped(rule).context(model):
            call()
            call()
    assert found[0].isfinite().all()
    assert found[0].any()
    assert all(torch.equal(one, found[0]) for one in found)


class Both(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        y = self.layer(x)
        return y.relu() + y


@pytest.mark.parametrize("rule", [rules.Gamma(0.25, 1e-3), rules.Gamma(10, 1e-3)], ids=repr)
def test_what_reads_a_layer_in_one_model_changes_nothing_in_another(rule):
    """A weight that a ReLU stood behind is used without one, and the other way round."""
    shared, x, m = nn.Linear(6, 5).double(), normal(3, 6), normal(3, 5, seed=1)
    models = {"relu": lambda layer: nn.Sequential(layer, nn.ReLU()), "none": nn.Sequential, "both": Both}
    alone = {name: relevance(rule, make(copy.deepcopy(shared)), x, m) for name, make in models.items()}
    for first in models:
        for second in models:
            for name in (first, second):
                assert torch.equal(relevance(rule, models[name](shared), x, m), alone[name])


def nodes(out):
    """Names of all nodes of a graph, sorted."""
    seen, stack = set(), [out.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack += [parent for parent, _ in node.next_functions]
    return sorted(node.name() for node in seen)


@pytest.mark.parametrize("rule", [rules.LRP0(), rules.Epsilon(0), rules.Epsilon(0.0), None], ids=repr)
@pytest.mark.parametrize("functional", [False, True], ids=["modules", "functions"])
def test_lrp0_puts_nothing_into_the_graph(rule, functional):
    """Beside the place where relevance leaves the model."""
    model = small_net(functional=functional)
    model.requires_grad_(False)
    x = normal(2, 3, 6, 6)

    def graph(composite):
        with composite.context(model):
            return nodes(model(x.clone().requires_grad_()))

    assert graph(mapped(rule)) == graph(Composite(None))
    plain = nodes(model(x.clone().requires_grad_()))
    assert len(graph(mapped(rule))) <= len(plain) + 1
    if rule is not None:
        assert graph(mapped(rules.Epsilon(0.1))) != graph(Composite(None))


SMOOTH = [rules.ZPlus(0.01), rules.Gamma(0.25, 0.01), rules.AlphaBeta(2, 1, 0.01), rules.Epsilon(0.1)]


@pytest.mark.covering(2)
@pytest.mark.parametrize("rule", SMOOTH, ids=repr)
@pytest.mark.parametrize("name", FEW)
def test_second_derivatives(name, rule):
    check_derivative(Between(Written(SPELLINGS[name][0]), nn.SiLU()), mapped(rule), normal(3, 6))


@pytest.mark.parametrize("rule", [rules.ZPlus(0.01), rules.Gamma(0.25, 0.01), rules.Flat(0.01)], ids=repr)
@pytest.mark.parametrize("writing", WRITINGS)
def test_second_derivatives_with_a_computed_weight(writing, rule):
    layer, a = seeded("conv1d", True, False)
    part = WRITINGS[writing](layer, a)[0]
    check_derivative(
        net(lambda s, x: s.fc(F.silu(part(x)).mean(2)), fc=nn.Linear(4, 3)), mapped(rule), a, step=3e-6
    )  # (some outputs are nearly 0)
