"""Which rule an operation gets: the first entry that matches it, its function, or any module around it."""

from __future__ import annotations

import warnings

import pytest
import torch
import zennit.composites
import zennit.rules
import zennit.types
from core_cases import Maps
from preset_cases import LRP_PRESETS, maps, numbers, off, seeded
from torch import nn
from torch.nn import functional as F
from zennit.composites import LayerMapComposite, NameMapComposite

import crp.rules as rules
from crp.composites import LRP, Composite, EpsilonPlus, EpsilonPlusFlat, Kind, Last, UniformEpsilon
from crp.rules import Epsilon, Flat, Gamma, Pass, Whole, ZPlus

IMAGES = numbers(2, 3, 8, 8, seed=3)


class Block(nn.Module):
    """Two convolutions and a residual sum."""

    def __init__(self, channels):
        super().__init__()
        self.conv1, self.conv2 = (
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x):
        return F.relu(self.conv2(F.relu(self.conv1(x))) + x)


class Net(nn.Module):
    """Stem, two named stages, a list of layers, dense layers; some calls are functions: (n, 3, 8, 8) -> (n, 3)."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.layer3 = Block(4)
        self.layer4 = nn.Sequential(Block(4), Block(4))
        self.extra = nn.ModuleList([nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)])
        self.weight = nn.Parameter(torch.zeros(4, 4, 1, 1))
        self.fc, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        h = self.layer4(self.layer3(F.relu(self.stem(x))))
        for layer in self.extra:
            h = F.relu(layer(h))
        h = F.relu(F.conv2d(h, self.weight))
        return self.head(F.relu(self.fc(h.mean((2, 3)))))


def net():
    return seeded(Net())


#: Gamma for these; everything else as the preset has it.
MEANT = {
    "stage": ([("layer4", Gamma(2.0))], ["layer4.0.conv1", "layer4.0.conv2", "layer4.1.conv1", "layer4.1.conv2"]),
    "block": ([("layer4.1", Gamma(2.0))], ["layer4.1.conv1", "layer4.1.conv2"]),
    "type_of_block": (
        [(Block, Gamma(2.0))],
        [f"{block}.conv{i}" for block in ("layer3", "layer4.0", "layer4.1") for i in (1, 2)],
    ),
    "pattern": ([("*.conv1", Gamma(2.0))], ["layer3.conv1", "layer4.0.conv1", "layer4.1.conv1"]),
    "pattern_of_stages": (
        [("layer*", Gamma(2.0))],
        [f"{b}.conv{i}" for b in ("layer3", "layer4.0", "layer4.1") for i in (1, 2)],
    ),
    "list_that_is_never_called": ([("extra", Gamma(2.0))], ["extra.0", "extra.1"]),
    "dense_layer": ([("fc", Gamma(2.0))], ["fc"]),
    "type": ([(nn.Linear, Gamma(2.0))], ["fc", "head"]),
    "kind": ([(Kind("dense"), Gamma(2.0))], ["fc", "head"]),
    "function": ([(F.linear, Gamma(2.0))], ["fc", "head"]),
    "last": ([(Last(nn.Linear), Gamma(2.0))], ["head"]),
    "inner_before_outer": (
        [("layer4.0.conv1", ZPlus(1e-6)), ("layer4", Gamma(2.0))],
        ["layer4.0.conv2", "layer4.1.conv1", "layer4.1.conv2"],
    ),
    "outer_before_inner": (
        [("layer4", Gamma(2.0)), ("layer4.0.conv1", ZPlus(1e-6))],
        ["layer4.0.conv1", "layer4.0.conv2", "layer4.1.conv1", "layer4.1.conv2"],
    ),
    "twice": ([("fc", Gamma(2.0)), ("fc", ZPlus())], ["fc"]),
    "name_before_type": ([("head", Epsilon(1e-6)), (nn.Linear, Gamma(2.0))], ["fc"]),
    "type_before_name": ([(nn.Linear, Gamma(2.0)), ("head", Epsilon(1e-6))], ["fc", "head"]),
}


def by_name(changed):
    """EpsilonPlus by the name of every layer, but γ for some."""
    convolutions = ["stem", "extra.0", "extra.1"]
    convolutions += [f"{block}.conv{i}" for block in ("layer3", "layer4.0", "layer4.1") for i in (1, 2)]
    plain = {**{name: ZPlus(1e-6) for name in convolutions}, "fc": Epsilon(1e-6), "head": Epsilon(1e-6)}
    chosen = [([name], Gamma(2.0) if name in changed else rule) for name, rule in plain.items()]
    return LRP(name_map=chosen, layer_map=[(F.conv2d, ZPlus(1e-6))])


@pytest.mark.parametrize("name", MEANT)
def test_the_first_entry_that_matches_wins(name):
    entries, changed = MEANT[name]
    model, wanted = net(), by_name(changed)
    found = maps(model, IMAGES, EpsilonPlus(layer_map=entries))
    assert off(found, maps(model, IMAGES, wanted)) <= 1e-12
    assert off(found, maps(model, IMAGES, EpsilonPlus())) > 1e-3


def test_names_come_before_the_first_layer_and_that_before_the_layer_map():
    model = net()
    everything = [((nn.Conv2d, nn.Linear), Epsilon(1e-6))]
    first = LRP(first_map=[(nn.Conv2d, Flat(1e-6))], layer_map=[("stem", ZPlus()), *everything])
    assert (
        off(maps(model, IMAGES, first), maps(model, IMAGES, LRP(layer_map=[("stem", Flat(1e-6)), *everything])))
        <= 1e-12
    )
    names = LRP(name_map=[(["stem"], ZPlus(1e-6))], first_map=[(nn.Conv2d, Flat(1e-6))], layer_map=everything)
    assert (
        off(maps(model, IMAGES, names), maps(model, IMAGES, LRP(layer_map=[("stem", ZPlus(1e-6)), *everything])))
        <= 1e-12
    )


@pytest.mark.parametrize(
    "selector", [nn.Conv2d, zennit.types.Convolution, (nn.Conv2d, nn.Conv1d), Kind("convolution"), F.conv2d]
)
def test_types_and_kinds_reach_functions(selector):
    """The fixed convolution of the net is a call of `F.conv2d`."""
    model = net()
    types = (nn.Conv2d, nn.Linear)
    found = maps(model, IMAGES, Composite(layer_map=[(selector, Gamma(2.0)), (types, Epsilon(1e-6))]))
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    by_names = [*((name, Gamma(2.0)) for name in layers), (F.conv2d, Gamma(2.0)), (types, Epsilon(1e-6))]
    assert off(found, maps(model, IMAGES, Composite(layer_map=by_names))) <= 1e-12
    assert off(found, maps(model, IMAGES, Composite(layer_map=[*by_names[:-2], (types, Epsilon(1e-6))]))) > 1e-4


def test_types_that_are_no_convolution_do_not_reach_functions():
    class Mine(nn.Conv2d):
        pass

    model = net()
    model.stem = Mine(3, 4, 3)
    seeded(model)
    found = maps(model, IMAGES, EpsilonPlus(layer_map=[(Mine, Gamma(2.0))]))
    assert off(found, maps(model, IMAGES, EpsilonPlus(layer_map=[("stem", Gamma(2.0))]))) <= 1e-12


def by_hand(model, block):
    """LRP-0 outside of a block, the ordinary chain rule inside: gradient × input where there are no biases."""
    leaf = IMAGES.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(leaf)[:, 1].sum(), leaf)
    return gradient * IMAGES


@pytest.mark.parametrize("selector", ["layer4", "layer*", Block, "extra", Kind("convolution"), F.conv2d, nn.Conv2d, ""])
def test_none_is_the_chain_rule_for_all_inside(selector):
    """Where γ would act, and every bias is zero, the whole is gradient × input."""
    model = net()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    everywhere = [(Kind("convolution"), Gamma(2.0)), (Kind("dense"), Epsilon(0.0))]
    found = maps(model, IMAGES, LRP(layer_map=[(selector, None), *everywhere]))
    switched_off = {
        "layer4": ["layer4"], "layer*": ["layer3", "layer4"], Block: ["layer3", "layer4"],
        "extra": ["extra.0", "extra.1"],
    }.get(selector)  # fmt: skip
    if switched_off is None:
        assert off(found, by_hand(model, selector)) <= 1e-9
    else:
        zero = [(name, Epsilon(0.0)) for name in switched_off]
        assert off(found, maps(model, IMAGES, LRP(layer_map=[*zero, *everywhere]))) <= 1e-9
        assert off(found, maps(model, IMAGES, LRP(layer_map=everywhere))) > 1e-3


def test_none_also_holds_for_activations_inside():
    class Act(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.fc = nn.Sequential(nn.Linear(6, 6), nn.SiLU(), nn.Linear(6, 6)), nn.Linear(6, 3)

        def forward(self, x):
            return self.fc(self.inner(x))

    model, data = seeded(Act()), numbers(3, 6)
    leaf = data.clone().requires_grad_()
    h = model.inner(leaf)
    share = model.fc.weight.detach()[1].expand(3, 6)
    (m,) = torch.autograd.grad(h, leaf, share)
    assert off(maps(model, data, UniformEpsilon(epsilon=0.0, layer_map=[("inner", None)])), data * m) <= 1e-12


@pytest.mark.parametrize("rule", [ZPlus(), Gamma(), Flat(), rules.WSquare(), rules.AlphaBeta(), rules.ZBox(-3.0, 3.0)])
@pytest.mark.parametrize("selector", ["act", nn.SiLU, "pool", "a*"])
def test_a_rule_that_takes_weights_apart_needs_a_sum_of_weighted_inputs(selector, rule, untouched):
    class Weightless(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.act, self.pool, self.fc = nn.Conv2d(3, 4, 3), nn.SiLU(), nn.AvgPool2d(6), nn.Linear(4, 3)

        def forward(self, x):
            return self.fc(self.pool(self.act(self.conv(x))).flatten(1))

    model = seeded(Weightless())
    with untouched(model), pytest.raises(TypeError) as caught:
        maps(model, IMAGES, EpsilonPlus(layer_map=[(selector, rule)]))
    message = str(caught.value)
    assert type(rule).__name__ in message and "weighted inputs" in message, message
    assert repr(selector) in message or getattr(selector, "__name__", "?") in message, message


def test_an_entry_that_reaches_some_is_no_error():
    """One of the modules that it means sums up weighted inputs."""
    model = net()
    maps(model, IMAGES, EpsilonPlus(layer_map=[("*", Gamma(2.0))]))
    assert (
        off(maps(model, IMAGES, EpsilonPlus(layer_map=[("*", Gamma())])), maps(model, IMAGES, LRP_PRESETS["gamma"]()))
        <= 1e-12
    )


def test_whole_treats_a_block_as_one_function():
    """ε of a block as a whole is its gradient × input, and not that of its layers."""
    model = net()
    for name in ("layer3", "layer4"):
        composite = UniformEpsilon(layer_map=[(name, Whole(Epsilon(0.5)))])
        result = Maps(model)(IMAGES, [{"y": 1}], composite, record_layer=[name, "stem"])
        before = F.relu(result.activations["stem"]) if name == "layer3" else model.layer3(F.relu(model.stem(IMAGES)))
        leaf = before.detach().requires_grad_()
        y = model.get_submodule(name)(leaf)
        r = result.relevances[name]
        (grad,) = torch.autograd.grad(y, leaf, r / (y + 0.5 * torch.where(y < 0, -1, 1).to(y)).detach())
        if name == "layer3":
            assert off(result.relevances["stem"], leaf.detach() * grad) <= 1e-9
        layers = UniformEpsilon(layer_map=[(name, Epsilon(0.5))])
        assert off(result.heatmap, maps(model, IMAGES, layers)) > 1e-3


def test_whole_is_for_modules():
    with pytest.raises(TypeError, match="Whole"):
        maps(net(), IMAGES, UniformEpsilon(layer_map=[(F.relu, Whole(Pass()))]))
    with pytest.raises(TypeError, match="never called"):
        maps(net(), IMAGES, UniformEpsilon(layer_map=[("extra", Whole(Epsilon()))]))
    with pytest.raises(TypeError, match="Whole takes a rule"):
        Whole(nn.ReLU())


ZENNITS = {
    "epsilon": (lambda: Epsilon(1e-6), (nn.Linear, nn.Conv2d)),
    "zplus": (lambda: ZPlus(1e-6), nn.Conv2d),
    "gamma": (lambda: Gamma(0.5, 1e-6), nn.Conv2d),
    "alpha_beta": (lambda: rules.AlphaBeta(2, 1, 1e-6), nn.Conv2d),
}


def plain_net():
    """No joins: relevance itself and multipliers give the same there."""
    return seeded(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(80, 3))
    )


@pytest.mark.parametrize("name", ZENNITS)
def test_our_rules_inside_a_composite_of_zennit_equal_ours(name):
    make, types = ZENNITS[name]
    model = plain_net()
    others = (nn.Conv2d, nn.Linear)
    ours = Composite(None, layer_map=[(types, make()), (others, Epsilon(1e-6))])
    theirs = LayerMapComposite([(types, make()), (others, Epsilon(1e-6))])
    wanted = maps(model, IMAGES, ours)
    assert off(maps(model, IMAGES, theirs), wanted) <= 1e-9
    named = NameMapComposite([(("0", "2"), make()), (("5",), make() if types != nn.Conv2d else Epsilon(1e-6))])
    assert off(maps(model, IMAGES, named), wanted) <= 1e-9


def test_our_rules_inside_a_composite_of_zennit_see_computed_weights():
    class Binary(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(x, self.weight.sign(), self.bias)

    model = plain_net()
    binary = Binary(4, 5, 3).double()
    binary.load_state_dict(model[2].state_dict())
    computed = nn.Sequential(*model[:2], binary, *model[3:]).eval()
    with torch.no_grad():
        model[2].weight.copy_(model[2].weight.sign())
    theirs = [(nn.Conv2d, ZPlus(1e-6)), (nn.Linear, Epsilon(1e-6))]
    assert (
        off(maps(computed, IMAGES, LayerMapComposite(theirs)), maps(model, IMAGES, LayerMapComposite(theirs))) <= 1e-9
    )


LIFTED = {
    "epsilon": (lambda: zennit.rules.Epsilon(epsilon=1e-3), lambda: Epsilon(1e-3)),
    "zplus": (lambda: zennit.rules.ZPlus(stabilizer=1e-6), lambda: ZPlus(1e-6)),
    "gamma": (lambda: zennit.rules.Gamma(gamma=0.5, stabilizer=1e-6), lambda: Gamma(0.5, 1e-6)),
    "alpha_beta": (lambda: zennit.rules.AlphaBeta(2, 1, stabilizer=1e-6), lambda: rules.AlphaBeta(2, 1, 1e-6)),
    "flat": (lambda: zennit.rules.Flat(stabilizer=1e-6), lambda: Flat(1e-6)),
    "wsquare": (lambda: zennit.rules.WSquare(stabilizer=1e-6), lambda: rules.WSquare(1e-6)),
}


class Functional(nn.Module):
    """The same net, of functions only."""

    def __init__(self, plain):
        super().__init__()
        self.plain = [plain]  # (no submodules)
        self.parameters_of = nn.ParameterList([*plain.parameters()])

    def forward(self, x):
        w, b, v, c, u, d = self.parameters_of
        h = F.relu(F.conv2d(F.relu(F.conv2d(x, w, b)), v, c)).flatten(1)
        return torch.addmm(d, h, u.T)


@pytest.mark.parametrize("name", LIFTED)
def test_lifted_rules_of_zennit_act_on_functions(name):
    theirs, ours = LIFTED[name]
    plain = plain_net()
    model = Functional(plain).eval()
    first = name in ("flat", "wsquare")
    settings = {"first_map" if first else "layer_map": [(nn.Conv2d, theirs())]}
    others = [((nn.Conv2d, nn.Linear), Epsilon(1e-6))]
    composite = LRP(first_map=settings.get("first_map", ()), layer_map=[*settings.get("layer_map", ()), *others])
    wanted = maps(plain, IMAGES, composite)
    assert off(maps(model, IMAGES, composite), wanted) <= 1e-9
    mine = {key: [(nn.Conv2d, ours())] for key in settings}
    own = LRP(first_map=mine.get("first_map", ()), layer_map=[*mine.get("layer_map", ()), *others])
    if name not in ("zplus", "gamma"):  # (zennit has another z⁺ and γ where the bias or the output is negative)
        assert off(maps(model, IMAGES, own), wanted) <= 1e-6


def test_the_report_has_a_row_for_each_operation():
    model = net()
    report = EpsilonPlusFlat(layer_map=[("layer4", Gamma(2.0)), ("layer3.conv2", None)]).report(model, IMAGES)
    rows = [(row.layer, row.function) for row in report.operations]
    assert rows.count(("layer4.0.conv1", "conv2d")) == 1 and rows.count(("", "conv2d")) == 1
    found = {(row.layer, row.function): row for row in report.operations}
    assert found["stem", "conv2d"].rule.startswith("Flat(") and found["stem", "conv2d"].module == "Conv2d"
    assert found["layer4.1.conv2", "conv2d"].rule == "Gamma(gamma=2.0, stabilizer=1e-06)".replace("1e-06", "1e-06") or (
        found["layer4.1.conv2", "conv2d"].rule.startswith("Gamma(")
    )
    assert "layer4" in found["layer4.1.conv2", "conv2d"].why
    assert (
        found["layer3.conv2", "conv2d"].rule == "ordinary chain rule" and "None" in found["layer3.conv2", "conv2d"].why
    )
    assert found["", "conv2d"].rule.startswith("ZPlus(") and "convolution" in found["", "conv2d"].why
    assert found["fc", "linear"].rule.startswith("Epsilon(") and "dense" in found["fc", "linear"].why
    assert ("layer3", "add") in found and ("", "mean") in found and ("", "relu") in found
    assert {row.call for row in report.operations} == {0}
    assert [row.layer for row in report.operations if row.function in ("conv2d", "linear")] == [
        "stem", "layer3.conv1", "layer3.conv2", "layer4.0.conv1", "layer4.0.conv2", "layer4.1.conv1", "layer4.1.conv2",
        "extra.0", "extra.1", "", "fc", "head",
    ]  # fmt: skip
    merged = seeded(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)))
    report = EpsilonPlus().report(merged, IMAGES)
    assert {row.canonizer for row in report.operations if row.layer == "1"} <= {"merged into 0"}
    assert "merged into 0" in str(report)


def test_a_report_tells_of_what_is_written_out_and_whole():
    class Gelu(nn.Module):
        def forward(self, x):
            return 0.5 * x * (1 + torch.erf(x / 2**0.5))

    model = seeded(nn.Sequential(nn.Linear(6, 6), Gelu(), nn.Linear(6, 6), nn.SiLU(), nn.Linear(6, 3)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = UniformEpsilon(layer_map=[("2", Whole(Epsilon(0.5)))]).report(model, numbers(2, 6))
    rows = {(row.layer, row.function): row.rule for row in report.operations}
    assert rows["1", "Gelu"] == "Pass()" and rows["3", "silu"] == "Pass()"
    assert rows["2", "Linear"].startswith("Whole(")
