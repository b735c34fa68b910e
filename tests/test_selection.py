"""Which layers and functions a rule reaches: by type, name, pattern, position and function; what is refused."""

import operator

import pytest
import torch
from core_cases import conv_net, deviation, exact, heatmap, images
from torch import nn
from torch.nn import functional as F

from crp.composites import LRP, Composite, Depth, EpsilonPlus, First, Functions, Last
from crp.layers import LayerNotFoundError
from crp.rules import Epsilon, Flat, Gamma, GuidedReLU, WSquare, ZPlus


def stack():
    """``features.0`` to ``.4``: convolution, ReLU, convolution, ReLU, convolution; ``fc``."""
    features = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 2)
    )
    model = nn.Sequential()
    model.add_module("features", features)
    model.add_module("flat", nn.Flatten())
    model.add_module("fc", nn.Linear(18, 3))
    return model.double().eval()


def rules(*layer_map, model=None, **keywords):
    """Names of the rules that a composite's plan has for each layer, by name."""
    found = Composite(layer_map=layer_map, **keywords).plan(model or stack())
    return {name: type(rule).__name__ for name, rule in found.items()}


CONVOLUTIONS = ["features.0", "features.2", "features.4"]


@pytest.mark.parametrize(
    ("selector", "reached"),
    [
        (nn.Conv2d, CONVOLUTIONS),
        ((nn.Conv2d, nn.Linear), [*CONVOLUTIONS, "fc"]),
        ("features.2", ["features.2"]),
        ("features.*", CONVOLUTIONS),  # ReLU is no layer for γ
        ("*.[02]", ["features.0", "features.2"]),
        ("*", [*CONVOLUTIONS, "fc"]),
        (First(nn.Conv2d), ["features.0"]),
        (First((nn.Conv2d, nn.Linear), 2), ["features.0", "features.2"]),
        (Last(nn.Conv2d, 2), ["features.2", "features.4"]),
        (Last(nn.Conv2d, 9), CONVOLUTIONS),
        (Depth(0, 0.5, (nn.Conv2d, nn.Linear)), ["features.0", "features.2"]),  # at 0, 1/4, 1/2, 3/4
        (Depth(0.5, 1, (nn.Conv2d, nn.Linear)), ["features.4", "fc"]),
        (Depth(0.25, 0.75, (nn.Conv2d, nn.Linear)), ["features.2", "features.4"]),
    ],
    ids=str,
)
def test_layers_that_a_selector_means(selector, reached):
    assert rules((selector, Gamma())) == dict.fromkeys(reached, "Gamma")


def test_first_match_wins():
    found = rules(
        ("features.0", Epsilon()),
        (First(nn.Conv2d), Flat()),
        ("features.*", None),
        (nn.Conv2d, Gamma()),
        (nn.Linear, ZPlus()),
        (nn.Linear, Gamma()),
    )
    assert {name: rule for name, rule in found.items() if not name.endswith(("1", "3"))} == {
        "features.0": "Epsilon",
        "features.2": "NoneType",
        "features.4": "NoneType",
        "fc": "ZPlus",
    }


def test_names_come_before_the_first_layer_before_the_layer_map():
    found = rules(
        (nn.Conv2d, Gamma()),
        first_map=[((nn.Conv2d,), Flat())],
        name_map=[(["features.0"], Epsilon()), (["f*"], None), (["features.2"], ZPlus())],
    )
    assert found["features.0"] == "Epsilon"
    assert found["features.2"] == found["fc"] == "NoneType"  # the pattern came first
    assert "Flat" not in found.values()


@pytest.mark.parametrize("maps", [{"layer_map": [("feature.2", Gamma())]}, {"name_map": [(["feature.2"], Gamma())]}])
@pytest.mark.parametrize("error", [KeyError, ValueError])
def test_unknown_names_are_errors_that_name_the_nearest(maps, error):
    with pytest.raises(error, match=r"<(layer|name)_map> 'feature.2' not found in model; nearest names: 'features.2'"):
        Composite(**maps).plan(stack())
    with pytest.raises(LayerNotFoundError, match=r"'layer\*'"):
        rules(("layer*", Gamma()))


def test_pattern_of_layers_that_the_rule_cannot_treat():
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)))
    with pytest.raises(TypeError, match=r"no layer of '1.\*' can have its rule: Gamma treats layers that sum up"):
        rules(("1.*", Gamma()), model=model)
    with (
        pytest.raises(TypeError, match=r"layer '1\.0': Gamma treats layers"),
        Composite(layer_map=[("1.0", Gamma())]).context(model),
    ):  # one that is named must have it
        pass


@pytest.mark.parametrize("composite", [EpsilonPlus(), Composite(layer_map=[(nn.Conv2d, Gamma())])])
def test_composite_that_reaches_no_layer_is_an_error_before_the_model_runs(composite):
    calls = []
    model = nn.Sequential(nn.Flatten(), nn.ReLU()).eval()
    model.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match="no rule for any layer of the model, which consists of Flatten, ReLU, Seq"):
        heatmap(model, composite)
    assert not calls


def test_rules_for_functions_that_no_one_calls(untouched):
    model = conv_net(lambda s, h: h.tanh())
    composite = Composite(layer_map=[(F.relu, GuidedReLU()), (F.gelu, None)])
    with (
        untouched(model),
        pytest.raises(ValueError, match=r"Composite has rules for functions only \(relu\), and Net calls none of them"),
    ):
        heatmap(model, composite)
    with torch.no_grad(), composite.context(model):
        model(images())  # nothing is explained
    assert heatmap(conv_net(lambda s, h: h.relu()), composite).any()


class Scaled(nn.Module):
    """A user's activation."""

    def forward(self, x):
        return 2 * torch.relu(x)


@pytest.mark.parametrize(
    "selector", [F.relu, torch.relu, torch.Tensor.relu, torch.relu_, Functions(("relu",))], ids=str
)
@pytest.mark.parametrize(
    "act",
    [
        lambda h: F.relu(h),
        lambda h: h.relu(),
        lambda h: h.clone().relu_(),
        lambda h: F.relu(h.clone(), inplace=True),
        nn.ReLU(),
        nn.ReLU(inplace=True),
        lambda h: Scaled()(h) / 2,
    ],
)
def test_function_is_the_same_by_all_its_names(selector, act):
    composite = LRP(layer_map=[(nn.Conv2d, ZPlus()), (nn.Linear, Epsilon()), (selector, GuidedReLU())])
    wanted = heatmap(conv_net(lambda s, h: h.relu()), composite)
    assert deviation(heatmap(conv_net(lambda s, h: act(h)), composite), wanted) < 1e-12
    plain = LRP(layer_map=[(nn.Conv2d, ZPlus()), (nn.Linear, Epsilon())])
    assert deviation(heatmap(conv_net(lambda s, h: act(h)), plain), wanted) > 0.1


def test_tuple_of_functions_and_operators():
    composite = LRP(layer_map=[((nn.Conv2d, nn.Linear), Epsilon()), ((F.silu, F.gelu), None), (operator.mul, None)])
    assert set(composite.function_map()) >= {"silu", "gelu", "mul"}
    assert [composite.function_map()[name] for name in ("silu", "gelu", "mul")] == [None] * 3


@pytest.mark.parametrize("rule", [None, WSquare])
def test_rule_of_a_module_covers_the_functions_in_it(rule):
    class Gated(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) * torch.sigmoid(x.mean())

    model = nn.Sequential(Gated(3, 2, 1), nn.SiLU(), nn.Flatten(), nn.Linear(72, 3)).double().eval()
    composite = LRP(layer_map=[("0", rule and rule()), (nn.Linear, Epsilon())])
    with composite.context(model), composite.watching() as seen:
        model(images().requires_grad_())
    assert [(s.layer, s.operation) for s in seen] == [("1", "silu"), ("2", "flatten")]


def test_container_without_a_rule_covers_its_functions_but_not_its_layers():
    inner = nn.Sequential(nn.Conv2d(3, 4, 1), nn.SiLU())
    model = nn.Sequential(inner, nn.SiLU(), nn.Flatten(), nn.Linear(144, 3)).double().eval()
    composite = LRP(layer_map=[("0", None), (nn.Conv2d, ZPlus()), (nn.Linear, Epsilon())])
    with composite.context(model), composite.watching() as seen:
        model(images().requires_grad_())
        assert {hook.layer for hook in composite.hook_refs} == {"0.0", "3"}
    assert [(s.layer, s.operation) for s in seen] == [("1", "silu"), ("2", "flatten")]


@pytest.mark.parametrize(
    "selector",
    [
        3,
        None,
        (),
        (nn.ReLU, "fc"),
        (nn.ReLU, F.relu),
        nn.ReLU(),
        lambda x: x,
        conv_net,
        ["features.0"],
    ],
    ids=str,
)
def test_selectors_of_another_kind_are_refused(selector):
    with pytest.raises(TypeError, match=r"a rule is mapped by module types, a layer name or pattern, .*; not by"):
        Composite(layer_map=[(selector, Epsilon())])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Functions("relu"), "Functions takes a tuple of plain names"),
        (lambda: Functions(()), "Functions takes a tuple of plain names"),
        (lambda: First("conv"), "First chooses among layers of types, such as nn.Linear or"),
        (lambda: Last(()), "Last chooses among layers of types"),
        (lambda: Depth(0, 1, F.relu), "Depth chooses among layers of types"),
        (lambda: Composite(first_map=[("conv", Epsilon())]), "first_map maps module types, .*, not 'conv'"),
        (lambda: Composite(name_map=[("fc", Epsilon())]), r"name_map maps lists of layer names, .*, not 'fc'"),
        (lambda: Composite(layer_map={nn.Linear: Epsilon()}), r"layer_map is a list of pairs \(what, rule\), not"),
        (lambda: Composite(layer_map=[nn.Linear]), r"layer_map is a list of pairs \(what, rule\), not"),
        (lambda: Composite(layer_map=[(nn.Linear, "epsilon")]), "str cannot be used in this composite"),
        (lambda: Composite(layer_map=[(nn.Linear, Epsilon)]), "cannot be used in this composite"),
    ],
)
def test_maps_of_another_kind_are_refused(make, message):
    with pytest.raises(TypeError, match=message):
        make()


@pytest.mark.parametrize(
    "make", [lambda: First(nn.Linear, 0), lambda: Depth(0.5, 0.5, nn.Linear), lambda: Depth(0, 2, nn.Linear)]
)
def test_positions_that_mean_no_layer_are_refused(make):
    with pytest.raises(ValueError, match=r"n must be at least 1|depths must be 0 <= low < high <= 1"):
        make()


def test_presets_conserve_what_their_functions_share():
    model = conv_net(lambda s, h: F.silu(h) * torch.sigmoid(h))
    total = heatmap(model, exact()).flatten(1).sum(1)
    torch.testing.assert_close(total, model(images())[:, 0].detach(), rtol=1e-9, atol=1e-12)
