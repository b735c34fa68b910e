"""Which rule an operation gets, where nothing else would notice another one: containers, positions, made weights."""

from __future__ import annotations

import pytest
import torch
from core_cases import deviation, explained, inputs, net
from torch import nn
from torch.nn import functional as F
from transformer_families import built

from crp.attribution import CondAttribution
from crp.composites import LRP, AttnLRP, Composite, Depth, EpsilonPlus, First, Last
from crp.errors import UnseenError
from crp.rules import DotProductAttention, Epsilon, Pass, Whole, WSquare, ZPlus


class Twice(torch.autograd.Function):
    """A function that no mode sees."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


class Unseen(nn.Module):
    def forward(self, x):
        return Twice.apply(x)


def test_what_was_made_unseen_is_not_taken_for_the_input():
    """Nobody knows whether a sum of weighted inputs is in it."""
    model = net(lambda s, x: s.fc(s.front(x)), front=Unseen(), fc=nn.Linear(6, 2))
    m = torch.ones(3, 2, dtype=torch.float64)
    rest = [("front", None), (nn.Linear, Epsilon(1e-3))]
    found = explained(model, Composite(None, first_map=[(nn.Linear, WSquare())], layer_map=rest), m)
    assert deviation(found, explained(model, Composite(None, layer_map=rest), m)) <= 1e-12


@pytest.mark.parametrize("selector", ["block", nn.Sequential, "blo*"])
def test_rule_on_a_container_leaves_activations_to_the_preset(selector):
    model = net(lambda s, x: s.block(x), block=nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)))
    m = torch.ones(3, 2, dtype=torch.float64)
    found, wanted = (explained(model, LRP(layer_map=[(what, Epsilon(0.1))]), m) for what in (selector, nn.Linear))
    assert deviation(found, wanted) <= 1e-12


@pytest.mark.parametrize("maps", ["layer_map", "name_map"])
@pytest.mark.parametrize(("rule", "wanted"), [(Pass(), "WSquare"), (ZPlus(), "ZPlus"), (None, "ordinary chain rule")])
def test_rule_of_the_first_layer_gives_way_to_one_by_name_that_treats_the_layer(rule, wanted, maps):
    """A rule for activations in a named block took the first layer's rule away."""
    model = net(lambda s, x: s.c(s.block(x)), block=nn.Sequential(nn.Linear(6, 5), nn.Tanh()), c=nn.Linear(5, 2))
    entry = ("block" if maps == "layer_map" else ["block"], rule)
    report = LRP(first=WSquare(), dense=Epsilon(0.1), **{maps: [entry]}).report(model, inputs())
    assert [row.rule.partition("(")[0] for row in report.operations if row.layer == "block.0"] == [wanted]


@pytest.mark.parametrize("rule", [Epsilon(0.5), Pass()], ids=["epsilon", "pass"])
def test_none_around_a_module_comes_before_whole(rule):
    """The first entry that matches wins."""
    block = nn.Sequential(nn.Linear(6, 5), nn.Sequential(nn.Tanh()), nn.Linear(5, 4))
    model = net(lambda s, x: s.fc(s.block(x)), block=block, fc=nn.Linear(4, 2))
    m = torch.ones(3, 2, dtype=torch.float64)
    none, whole, fc = ("block", None), ("block.1", Whole(rule)), ("fc", Epsilon(0.1))
    found, wanted, other = (
        explained(model, LRP(layer_map=[*entries, fc]), m) for entries in ([none, whole], [none], [whole, none])
    )
    assert deviation(found, wanted) <= 1e-12
    assert deviation(other, wanted) > 1e-3


@pytest.mark.parametrize("front", [Unseen, nn.Identity, lambda: nn.Linear(6, 6)], ids=["unseen", "identity", "linear"])
def test_none_allows_what_is_unseen_inside_only(front):
    model = net(lambda s, x: s.fc(s.other(s.front(x))), front=front(), other=Unseen(), fc=nn.Linear(6, 2))
    m = torch.ones(3, 2, dtype=torch.float64)
    maps = [("front", None), (nn.Linear, Epsilon(1e-3))]
    with pytest.raises(UnseenError, match="Twice"):
        explained(model, Composite(None, layer_map=maps), m)
    assert explained(model, Composite(None, layer_map=[("other", None), *maps]), m).isfinite().all()


def test_layer_that_is_called_twice_has_one_position():
    model = net(lambda s, x: s.c(s.a(s.a(x).tanh())), a=nn.Linear(6, 6), c=nn.Linear(6, 2))
    m, rest = torch.ones(3, 2, dtype=torch.float64), (nn.Linear, Epsilon(1e-6))
    found, wanted = (
        explained(model, Composite(None, layer_map=[(what, Epsilon(1.0)), rest]), m) for what in (First(nn.Linear), "a")
    )
    assert deviation(found, wanted) <= 1e-12


def test_what_is_behind_a_layer_as_a_whole_is_not_first():
    model = net(lambda s, x: s.c(s.a(x)), a=nn.Linear(6, 6), c=nn.Linear(6, 2))
    m, rest = torch.ones(3, 2, dtype=torch.float64), [("a", Whole(Epsilon(1e-3))), (nn.Linear, Epsilon(1e-3))]
    found = explained(model, Composite(None, first_map=[(nn.Linear, WSquare())], layer_map=rest), m)
    assert deviation(found, explained(model, Composite(None, layer_map=rest), m)) <= 1e-12


def test_sum_of_weighted_inputs_that_cannot_be_taken_apart_has_no_rule():
    """The chain rule of a product of matrices is LRP-0, which is not the rule that was mapped."""
    left, right = torch.randn(2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    model = net(lambda s, x: torch.linalg.multi_dot([left[:3, :3], s.a(x).relu(), right]), a=nn.Linear(6, 6))
    with pytest.warns(UserWarning, match=r"no rule for linalg_multi_dot\(\)"):
        explained(model, LRP(layer_map=[(nn.Linear, ZPlus())]), torch.ones(3, 6, dtype=torch.float64))


def test_rule_of_linear_layers_is_not_for_products():
    """A product of two matrices that both depend on the input is no layer, though `torch.matmul` may be one."""

    def wiring(s, x):
        return (s.a(x).sigmoid()[:, None] @ s.b(x)[:, :, None]).flatten(1)

    model = net(wiring, a=nn.Linear(6, 4, bias=False), b=nn.Linear(6, 4, bias=False))
    composite = LRP(layer_map=[(nn.Linear, Epsilon(0.0))])
    found = explained(model, composite, torch.ones(3, 1, dtype=torch.float64))
    assert deviation(found.sum(1), model(inputs()).detach()[:, 0]) <= 1e-12


def test_positions_are_counted_again_for_a_model_that_has_changed():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)).double().eval()
    composite = LRP(layer_map=[(Last(nn.Linear), Epsilon(0.5)), (nn.Linear, ZPlus())])

    def rules():
        return [row.rule for row in composite.report(model, inputs()).operations if row.function == "linear"]

    last, other = repr(Epsilon(0.5)), repr(ZPlus())
    assert rules() == [other, last]
    model.extend([nn.ReLU(), nn.Linear(4, 2).double()])
    assert rules() == [other, other, last]


class Gelu(nn.Module):
    def forward(self, x):
        return 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.04 * x**3)))


def test_rule_of_a_function_comes_before_that_of_the_activation_which_calls_it():
    model = net(lambda s, x: s.b(s.act(s.a(x))), a=nn.Linear(6, 5), act=Gelu(), b=nn.Linear(5, 2))
    rules = {}
    for name, layer_map in (("preset", []), ("tanh", [(torch.tanh, Epsilon(0.25))])):
        report = EpsilonPlus(layer_map=layer_map).report(model, inputs())
        rules[name] = {row.function: row.rule for row in report.operations}
    assert rules["preset"]["Gelu"] == repr(Pass())
    assert "tanh" not in rules["preset"] and "Gelu" not in rules["tanh"]
    assert rules["tanh"]["tanh"] == repr(Epsilon(0.25))


class Standardised(nn.Linear):
    """A layer that computes its weight."""

    def forward(self, x):
        return F.linear(x, (self.weight - self.weight.mean(1, keepdim=True)) / self.weight.std(1, keepdim=True))


def rules_of(model, position=Depth(0, 0.5, nn.Linear)):  # noqa: B008 (it is frozen)
    """Rules of the calls of `F.linear`, where a position, such as the first half of the layers, has z⁺."""
    report = LRP(layer_map=[(position, ZPlus()), (nn.Linear, Epsilon(0.5))]).report(model, inputs())
    return ["z+" if row.rule == repr(ZPlus()) else "ε" for row in report.operations if row.function == "linear"]


def test_weights_that_one_module_computes_are_a_layer_each():
    def wiring(s, x):
        for layer in (s.a, s.b, s.c, s.d):
            x = F.linear(x, layer.weight * layer.weight.abs())
        return x

    assert rules_of(net(wiring, **{name: nn.Linear(6, 6) for name in "abcd"})) == ["z+", "z+", "ε", "ε"]
    assert rules_of(nn.Sequential(net(wiring, **{n: nn.Linear(6, 6) for n in "abcd"}))) == ["z+", "z+", "ε", "ε"]


def test_module_that_computes_its_weight_at_each_call_is_one_layer():
    model = net(lambda s, x: s.b(s.a(s.a(s.a(x)))), a=Standardised(6, 6), b=nn.Linear(6, 2))
    assert rules_of(model) == ["z+", "z+", "z+", "ε"]
    model = net(lambda s, x: s.c(s.b(s.a(x))), a=Standardised(6, 6), b=nn.Linear(6, 2), c=nn.Linear(2, 2))
    assert rules_of(model, First(nn.Linear, 2)) == ["z+", "z+", "ε"]


def test_weight_that_is_computed_for_each_sample_is_one_layer():
    def wiring(s, x):
        return torch.stack([F.linear(row, s.a.weight * s.b.weight) for row in x]) @ s.c.weight

    model = net(wiring, **{name: nn.Linear(6, 6) for name in "abc"})
    composite = LRP(layer_map=[(Depth(0, 0.5, nn.Linear), ZPlus()), (nn.Linear, Epsilon(0.5))])
    for data in (inputs(), inputs()[:1]):
        rules = [row.rule for row in composite.report(model, data).operations if row.function in ("linear", "matmul")]
        assert rules == [repr(ZPlus())] * len(data) + [repr(Epsilon(0.5))]


def test_rule_for_attention_on_a_container_is_for_nothing_inside():
    model, data = built("timm_vit")
    composite = AttnLRP(layer_map=[("blocks.0", DotProductAttention("constant"))])
    with pytest.raises(TypeError, match=r"DotProductAttention treats no operation that is called in 'blocks.0'"):
        CondAttribution(model)(data, [{"y": 1}], composite)
