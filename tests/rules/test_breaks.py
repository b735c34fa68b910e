"""What nothing else would notice if it broke: notes of tensors, order of arguments, tolerance and references."""

from __future__ import annotations

import pytest
import torch
from core_cases import deviation, explained, inputs, net
from rule_cases import relevance
from torch import nn
from torch.nn import functional as F
from zennit.composites import NameMapComposite

from crp.attribution import CondAttribution
from crp.composites import CPLRP, LRP, Composite, Kind, UniformLRP0
from crp.rules import AlphaBeta, Epsilon, Gamma, Pass, Whole, ZPlus


def changed_twice(s, x):
    """The base is changed after the view was made, and then another part of it."""
    h = s.a(x).abs()
    rest = h[:, 2:]
    h.sub_(0.5)
    h[:, :2].relu_()
    return s.b(rest)


def test_last_change_says_nothing_of_other_views():
    layers = {"a": nn.Linear(6, 6), "b": nn.Linear(4, 2)}
    model, plain = net(changed_twice, **layers), net(lambda s, x: s.b((s.a(x).abs() - 0.5)[:, 2:]), **layers)
    m = torch.ones(3, 2, dtype=torch.float64)
    assert ((plain.a(inputs()).abs() - 0.5)[:, 2:] < 0).any()
    assert deviation(relevance(ZPlus(), model, inputs(), m), relevance(ZPlus(), plain, inputs(), m)) <= 1e-12


def running(kind):
    if kind == "data":
        return None, None, True
    return inputs()[0], inputs()[1].square() + 0.5, False


@pytest.mark.parametrize("kind", ["data", "running"])
def test_functions_in_cpp_have_another_order_of_arguments(kind):
    """`torch.instance_norm` is `F.instance_norm` with weight and bias in front of the running statistics."""
    weight, bias = inputs()[1], inputs()[2]
    mean, var, is_data = running(kind)

    def ours(s, x):
        y = x[:, :, None] * torch.arange(1.0, 4, dtype=torch.float64).sin()
        return s.fc(F.instance_norm(y, mean, var, weight, bias, is_data, 0.1, 1e-2)[:, :, 0])

    def theirs(s, x):
        y = x[:, :, None] * torch.arange(1.0, 4, dtype=torch.float64).sin()
        return s.fc(torch.instance_norm(y, weight, bias, mean, var, is_data, 0.1, 1e-2, False)[:, :, 0])

    m = torch.ones(3, 2, dtype=torch.float64)
    wanted, found = (
        explained(net(function, fc=nn.Linear(6, 2)), LRP(layer_map=[(nn.Linear, Epsilon(1e-3))]), m)
        for function in (ours, theirs)
    )
    assert wanted.abs().max() > 0.01 and deviation(found, wanted) <= 1e-12


def test_sign_is_that_of_the_operand_and_not_of_what_is_added():
    """The first argument of `torch.addmm` is not negative; what the weight is for has both signs."""
    layers = {"a": nn.Linear(6, 4), "b": nn.Linear(6, 4, bias=False), "c": nn.Linear(4, 2)}
    model = net(lambda s, x: s.c(torch.addmm(s.a(x).relu(), x, s.b.weight.T)), **layers)
    plain = net(lambda s, x: s.c(s.a(x).relu() + s.b(x)), **layers)
    m = torch.ones(3, 2, dtype=torch.float64)
    assert deviation(relevance(ZPlus(), model, inputs(), m), relevance(ZPlus(), plain, inputs(), m)) <= 1e-12


def test_rule_that_waits_for_the_backward_pass_has_the_precision_of_the_forward_pass():
    """The second call of the layer is one that a ReLU was expected to read, so that its rule waits."""

    def wiring(s, x):
        return s.c(s.a(x).relu()) + s.c(s.again(x * 0.5))

    shared, apart = (net(wiring, a=nn.Linear(6, 4), again=nn.Linear(6, 4), c=nn.Linear(4, 2)).float() for _ in "12")
    apart.again.load_state_dict(apart.a.state_dict())
    shared.again = shared.a
    found = []
    for model in (shared, apart):
        with Composite(None, layer_map=[(nn.Linear, Gamma(0.25))]).context(model):
            leaf = inputs().float().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16):
                y = model(leaf)
            found.append(torch.autograd.grad(y.sum(), leaf)[0])
    assert y.dtype == torch.bfloat16
    assert torch.equal(*found)


def test_gamma_rule_is_for_the_input_that_the_layer_read():
    """What the layer read is changed in place before the ReLU reads the layer's output."""

    def wiring(s, x):
        h = s.a(x)
        y = s.b(h)
        h.add_(1.0)
        return s.c(y.relu())

    layers = {"a": nn.Linear(6, 5), "b": nn.Linear(5, 4), "c": nn.Linear(4, 2)}
    model, plain = net(wiring, **layers), net(lambda s, x: s.c(s.b(s.a(x)).relu()), **layers)
    m = torch.ones(3, 2, dtype=torch.float64)
    wanted = relevance(Gamma(0.25), plain, inputs(), m)
    for _ in range(2):  # (the second pass knows of the first)
        assert deviation(relevance(Gamma(0.25), model, inputs(), m), wanted) <= 1e-12


def test_padding_by_infinity_keeps_nothing():
    """A maximum takes nothing from it, so that its share is not 0 times infinity."""
    layers = {"conv": nn.Conv2d(3, 4, 3), "fc": nn.Linear(16, 2)}

    def wiring(s, x):
        return s.fc(F.max_pool2d(F.pad(s.conv(x), (1, 1, 1, 1), value=-torch.inf), 3).flatten(1))

    model, plain = net(wiring, **layers), net(lambda s, x: s.fc(F.max_pool2d(s.conv(x), 3, 3, 1).flatten(1)), **layers)
    data = torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    composite = LRP(layer_map=[((nn.Conv2d, nn.Linear), Epsilon(1e-6))])
    found, wanted = (CondAttribution(n).absorbed(data, [{"y": 1}], composite, init_rel=1.0) for n in (model, plain))
    assert found.rest.abs().max() <= 1e-10
    torch.testing.assert_close(found.total, wanted.total, rtol=1e-10, atol=1e-10)


def test_whole_in_a_composite_of_zennit_sees_the_input_as_it_was():
    x = inputs()
    found = []
    for in_place in (True, False):
        model = net(
            lambda s, x: s.c(s.block(s.a(x))),
            a=nn.Linear(6, 5),
            block=nn.Sequential(nn.SiLU(in_place), nn.Tanh()),
            c=nn.Linear(5, 2),
        )
        entries = [(["a", "c"], Epsilon(1e-6)), (["block"], Whole(Epsilon(1e-6)))]
        with NameMapComposite(entries).context(model):
            leaf = x.clone().requires_grad_()
            found.append(torch.autograd.grad(model(leaf).sum(), leaf)[0])
    assert deviation(*found) <= 1e-12


@pytest.mark.parametrize("entries", [[], [("norm", None)]], ids=["no_entry", "none"])
def test_bias_of_a_batch_norm_by_the_chain_rule_keeps_its_share(entries):
    model = net(lambda s, x: s.c(s.norm(s.a(x))), a=nn.Linear(6, 5), norm=nn.BatchNorm1d(5), c=nn.Linear(5, 2))
    composite = Composite(None, layer_map=[*entries, (nn.Linear, Epsilon(1e-6))])
    found = CondAttribution(model).absorbed(inputs(), [{"y": 1}], composite)
    assert found.rest.abs().max() <= 1e-10
    assert found.layers["norm"]["bias"].abs().min() > 1e-3


def test_a_constant_factor_makes_no_product():
    model = net(lambda s, x: s.c(s.a(x) * 2.0), a=nn.Linear(6, 5), c=nn.Linear(5, 2))
    m = torch.ones(3, 2, dtype=torch.float64)
    rest = [(nn.Linear, Epsilon(1e-3))]
    found = explained(model, Composite(None, layer_map=[(Kind("product"), Epsilon(1.0)), *rest]), m)
    assert deviation(found, explained(model, Composite(None, layer_map=rest), m)) <= 1e-12


@pytest.mark.parametrize("first", [True, False], ids=["gate_first", "signal_first"])
def test_a_number_minus_a_gate_is_one(first):
    """It is closed as far as another one is open."""

    def product(s, x):
        factor = 2 - s.b(x).sigmoid()
        return s.c(factor * s.a(x) if first else s.a(x) * factor)

    def held(s, x):
        return s.c((2 - s.b(x).sigmoid()).detach() * s.a(x))

    layers = {"a": nn.Linear(6, 4), "b": nn.Linear(6, 4), "c": nn.Linear(4, 2)}
    m = torch.ones(3, 2, dtype=torch.float64)
    found, wanted = (
        explained(net(f, **layers), LRP(layer_map=[(nn.Linear, Epsilon(1e-3))]), m) for f in (product, held)
    )
    assert deviation(found, wanted) <= 1e-12


@pytest.mark.parametrize("act", [F.silu, F.hardswish, F.elu])
def test_rule_that_overwrites_a_part_leaves_the_others(act):
    def in_place(s, x):
        h = s.a(x)
        act(h[:, :2], inplace=True)
        return s.c(h)

    layers = {"a": nn.Linear(6, 4), "c": nn.Linear(4, 2)}
    model = net(in_place, **layers)
    plain = net(lambda s, x: s.c(torch.cat([act(s.a(x)[:, :2]), s.a(x)[:, 2:]], 1)), **layers)
    m = torch.ones(3, 2, dtype=torch.float64)
    found, wanted = (explained(n, LRP(layer_map=[(nn.Linear, Epsilon(1e-3))]), m) for n in (model, plain))
    assert deviation(found, wanted) <= 1e-12


def test_bias_that_counts_as_zero_is_in_the_output_all_the_same():
    model = net(lambda s, x: s.a(x), a=nn.Linear(6, 2))
    rule = AlphaBeta(2, 1, zero_params="bias")
    with Composite(None, layer_map=[(nn.Linear, rule)]).context(model):
        found = model(inputs().requires_grad_()).detach()
    torch.testing.assert_close(found, model(inputs()).detach(), rtol=1e-12, atol=1e-12)


def test_product_of_two_that_may_be_weights():
    """What a softmax has made is held constant before what a sigmoid has made."""

    def wiring(s, x, hold=False):
        p = s.a(x).softmax(1)[:, :, None]
        return s.c(((p.detach() if hold else p) @ s.b(x).sigmoid()[:, None]).flatten(1))

    def make(hold):
        torch.manual_seed(0)
        parts = {"a": nn.Linear(6, 4), "b": nn.Linear(6, 4), "c": nn.Linear(16, 2)}
        return net(lambda s, x: wiring(s, x, hold), **parts)

    m, composite = torch.ones(3, 2, dtype=torch.float64), UniformLRP0()
    assert deviation(explained(make(False), composite, m), explained(make(True), composite, m)) <= 1e-12


def test_a_true_that_is_not_inplace_leaves_the_operand_as_it_is():
    """The fourth argument of `torch.rrelu` is `training`."""

    def wiring(s, x):
        h = s.a(x)
        return s.b(torch.rrelu(h, 0.2, 0.2, True) + h)

    model = net(wiring, a=nn.Linear(6, 6), b=nn.Linear(6, 2))
    wanted = model(inputs()).detach()
    with Composite(None, layer_map=[(torch.rrelu, Pass()), (nn.Linear, Epsilon())]).context(model):
        assert deviation(model(inputs().requires_grad_()).detach(), wanted) <= 1e-12


def test_zeros_do_not_depend_on_the_rest_of_the_batch():
    """An entry of exactly 0 takes the gradient of the positive part, beside negative ones too."""
    model = net(lambda s, x: s.c(x[:, :3] - x[:, 3:]), c=nn.Linear(3, 2))
    data = torch.tensor([[2.0, 3, 1, 2, 1, 0.5], [1.0, 2, 3, 2, 3, 4]], dtype=torch.float64)
    m = torch.ones(2, 2, dtype=torch.float64)
    alone = relevance(ZPlus(), model, data[:1], m[:1])
    assert alone[0, 0] != 0
    assert deviation(relevance(ZPlus(), model, data, m)[:1], alone) <= 1e-12


def test_account_closes_after_calls_that_were_not_accounted_for():
    """A layer that a ReLU has read before keeps its account all the same."""
    model = net(lambda s, x: s.b(s.a(x).relu()), a=nn.Linear(6, 5), b=nn.Linear(5, 2))
    attribution, composite = CondAttribution(model), LRP(layer_map=[(nn.Linear, Gamma())])
    attribution(inputs(), [{"y": 1}], composite)
    kept = attribution.absorbed(inputs(), [{"y": 1}], composite)
    assert kept.rest.abs().max() <= 1e-12
    assert set(kept.layers) >= {"a", "b"}


def test_a_product_of_probabilities_counts_as_such():
    """Values that it weights take all, as behind a mask that is made by a softmax."""

    def made(product):
        def forward(s, x):
            p = (s.a(x).softmax(-1) * s.b(x).softmax(-1))[:, None]
            return s.c(product(p, s.v(x)[:, :, None]).flatten(1))

        return forward

    layers = {name: nn.Linear(6, 4) for name in "abv"} | {"c": nn.Linear(1, 2)}
    m = torch.ones(3, 2, dtype=torch.float64)
    found, wanted = (
        explained(net(made(product), **layers), CPLRP(), m) for product in (torch.matmul, lambda p, v: p.detach() @ v)
    )
    assert deviation(found, wanted) <= 1e-12
