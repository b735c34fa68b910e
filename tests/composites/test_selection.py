"""Which operations a rule reaches: by type, name, pattern, position and function; what is refused."""

import operator

import pytest
import torch
from core_cases import conv_net, deviation, exact, heatmap, images, net, rules
from torch import nn
from torch.nn import functional as F

from crp.composites import LRP, LRPCMP, Composite, Depth, EpsilonPlus, EpsilonPlusFlat, First, Functions, Kind, Last
from crp.composites.origins import Origins
from crp.layers import LayerNotFoundError
from crp.rules import Epsilon, Flat, Gamma, GuidedReLU, Rule, Whole, WSquare, ZPlus


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


def by_layer(*layer_map, model=None, **keywords):
    """Name of the rule that reaches the operation of each layer of `stack`."""
    return {layer: rule for layer, _, rule in rules(model or stack(), Composite(layer_map=layer_map, **keywords))}


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
    rule_of = by_layer((selector, Gamma()))
    assert {layer: rule for layer, rule in rule_of.items() if rule != "chain"} == dict.fromkeys(reached, "Gamma")
    assert len(rule_of) == 7


@pytest.mark.parametrize(("split", "n_lower"), [(0, 0), (0.5, 2), (1, 3)])
def test_lower_and_upper_convolutions(split, n_lower):
    rule_of = {layer: rule for layer, _, rule in rules(stack(), LRPCMP(split=split, first="none"))}
    assert [rule_of[layer] for layer in CONVOLUTIONS] == ["AlphaBeta"] * n_lower + ["Gamma"] * (3 - n_lower)


def test_first_match_wins():
    rule_of = by_layer(
        ("features.0", Epsilon()),
        (First(nn.Conv2d), Flat()),
        ("features.*", None),
        (nn.Conv2d, Gamma()),
        (nn.Linear, ZPlus()),
        (nn.Linear, Gamma()),
    )
    assert rule_of == dict.fromkeys(rule_of, "chain") | {"features.0": "Epsilon", "fc": "ZPlus"}


def test_names_come_before_the_first_layer_before_the_layer_map():
    maps = {
        "first_map": [((nn.Conv2d,), Flat())],
        "name_map": [(["features.0"], Epsilon()), (["f*"], None), (["features.2"], ZPlus())],
    }
    rule_of = by_layer((nn.Conv2d, Gamma()), **maps)
    assert rule_of == dict.fromkeys(rule_of, "chain") | {"features.0": "Epsilon"}  # the pattern came before features.2
    rule_of = by_layer((nn.Conv2d, Gamma()), first_map=maps["first_map"])
    assert [rule_of[layer] for layer in CONVOLUTIONS] == ["Flat", "Gamma", "Gamma"]


@pytest.mark.parametrize("maps", [{"layer_map": [("feature.2", Gamma())]}, {"name_map": [(["feature.2"], Gamma())]}])
@pytest.mark.parametrize("error", [KeyError, ValueError])
def test_unknown_names_are_errors_that_name_the_nearest(maps, error):
    with pytest.raises(error, match=r"<(layer|name)_map> 'feature.2' not found in model; nearest: 'features.2'"):
        heatmap(stack(), Composite(**maps))
    with pytest.raises(LayerNotFoundError, match=r"'layer\*'"):
        by_layer(("layer*", Gamma()))


@pytest.mark.parametrize(
    ("selector", "layers"), [("1.*", "'1.0', '1.1'"), ("1.0", "'1.0'"), (nn.ReLU, "'1.0'"), (nn.Flatten, "'2'")]
)
def test_layers_without_what_the_rule_treats(selector, layers, untouched):
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)), nn.Flatten()).double().eval()
    message = rf"Gamma\(.*\)\): Gamma treats sums of weighted inputs .*, and no such operation is called in {layers}"
    for run in (heatmap, rules):
        with untouched(model), pytest.raises(TypeError, match=message):
            run(model, Composite(layer_map=[(selector, Gamma())]))


def test_rule_of_a_module_that_only_moves_entries_is_not_refused():
    assert by_layer((nn.Flatten, GuidedReLU()), (nn.Conv2d, Gamma()))["flat"] == "chain"


def test_rule_that_treats_nothing_in_a_module_is_refused(untouched):
    mix = net(lambda s, x: s.part(x).softmax(-1), part=nn.Identity())
    model = net(lambda s, x: s.fc(s.mix(x).mean(1)), mix=mix, fc=nn.Linear(4, 3))
    composite = Composite(layer_map=[("mix", Epsilon()), (nn.Linear, Epsilon())])
    with untouched(model), pytest.raises(TypeError, match=r"\('mix', Epsilon\(.*\)\): "):
        heatmap(model, composite, torch.randn(2, 3, 4, dtype=torch.float64))


def test_a_forward_of_the_user_is_inside_of_its_layer():
    model = stack()
    first, own = model.features[0], model.features[0].forward
    first.forward = lambda x: F.silu(own(x))
    found = rules(model, LRP(layer_map=[(nn.Conv2d, None), (nn.Linear, Epsilon())]))
    assert [rule for layer, _, rule in found if layer == "features.0"] == ["chain", "chain"]


def test_what_is_in_lists_and_what_is_there_twice_has_the_rule_of_the_container():
    act = nn.Tanh()
    inner = nn.Sequential(nn.Linear(108, 4), act, nn.Linear(4, 4), act)
    model = net(lambda s, x: s.layers[0][0](x.flatten(1)), layers=nn.ModuleList([nn.ModuleList([inner])]))
    found = rules(model, LRP(layer_map=[("layers", Gamma()), (nn.Linear, Epsilon())]))
    assert [rule for _, function, rule in found if function == "linear"] == ["Gamma", "Gamma"]


def test_a_list_of_layers_that_is_never_called_is_no_operation():
    model = net(lambda s, x: s.layers[0](x.flatten(1)), layers=nn.ModuleList([nn.Linear(108, 3)]))
    with pytest.raises(TypeError, match=r"'layers' is never called, so that it cannot be one operation"):
        heatmap(model, Composite(layer_map=[("layers", Whole(Epsilon()))]))


@pytest.mark.parametrize("composite", [EpsilonPlus(), Composite(layer_map=[(nn.Conv2d, Gamma())])])
def test_composite_that_reaches_no_operation_is_an_error(composite, untouched):
    model = nn.Sequential(nn.Flatten(), nn.ReLU()).eval()
    with (
        untouched(model),
        pytest.raises(ValueError, match="no rule for any layer of the model, which consists of Flatten, ReLU, Seq"),
    ):
        heatmap(model, composite)


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


@pytest.mark.parametrize("selector", [F.relu, torch.relu, torch.Tensor.relu, torch.relu_, Functions(("relu",))])
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


@pytest.mark.parametrize(
    ("functions", "chosen"),
    [((F.silu, F.gelu), "silu"), ((F.gelu, F.silu), "silu"), (operator.mul, "mul"), (torch.Tensor.__rmul__, "mul")],
)
def test_tuples_of_functions_and_operators(functions, chosen):
    model = conv_net(lambda s, h: F.silu(h) * torch.sigmoid(h))
    wanted = {"silu": "Pass", "sigmoid": "Pass", "mul": "Gate"} | {chosen: "chain"}
    composite = LRP(layer_map=[((nn.Conv2d, nn.Linear), Epsilon()), (functions, None)])
    rule_of = {function: rule for _, function, rule in rules(model, composite) if function in wanted}
    assert rule_of == wanted


class Gated(nn.Conv2d):
    """A user's convolution, which calls more than one function."""

    def forward(self, x):
        return super().forward(x) * torch.sigmoid(x.mean())


@pytest.mark.parametrize(
    ("rule", "reached"),
    [
        (WSquare(), ["WSquare", "chain", "Pass", "Gate"]),  # what it does not treat has the rules of others
        (None, ["chain"] * 4),
        (Whole(Epsilon()), ["Whole"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("selector", ["0", Gated])
def test_rule_of_a_module_is_for_what_it_treats_in_it(selector, rule, reached):
    model = nn.Sequential(Gated(3, 2, 1), nn.SiLU(), nn.Flatten(), nn.Linear(72, 3)).double().eval()
    operations = rules(model, LRP(layer_map=[(selector, rule), (nn.Linear, Epsilon())]))
    assert [name for layer, _, name in operations if layer == "0"] == reached
    assert operations[len(reached) :] == [("1", "silu", "Pass"), ("2", "flatten", "chain"), ("3", "linear", "Epsilon")]


@pytest.mark.parametrize("first", ["container", "type"])
def test_container_without_a_rule_covers_what_no_entry_before_means(first):
    inner = nn.Sequential(nn.Conv2d(3, 4, 1), nn.SiLU())
    model = nn.Sequential(inner, nn.SiLU(), nn.Flatten(), nn.Linear(144, 3)).double().eval()
    entries = [("0", None), (nn.Conv2d, ZPlus())]
    layer_map = [*(entries if first == "container" else reversed(entries)), (nn.Linear, Epsilon())]
    assert rules(model, LRP(layer_map=layer_map)) == [
        ("0.0", "conv2d", "chain" if first == "container" else "ZPlus"),
        ("0.1", "silu", "chain"),
        ("1", "silu", "Pass"),
        ("2", "flatten", "chain"),
        ("3", "linear", "Epsilon"),
    ]


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
)
def test_selectors_of_another_kind_are_refused(selector):
    with pytest.raises(TypeError, match=r"a rule is mapped by module types, a layer name or pattern, .*; not by"):
        Composite(layer_map=[(selector, Epsilon())])


class Uninitialised(Rule):
    def __init__(self):
        self.cap = 1.0


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
        (lambda: Composite(layer_map={nn.Linear: Epsilon()}), r"layer_map is a list of pairs \(what, rule\), such as"),
        (lambda: Composite(layer_map=[nn.Linear]), r"layer_map is a list .*; <class 'torch.*Linear'> is no pair"),
        (lambda: Composite(layer_map=[(nn.Linear, Epsilon(), "fc")]), r"layer_map is a list .*, 'fc'\) is no pair"),
        (
            lambda: EpsilonPlusFlat(layer_map={"fc": Epsilon()}),
            "layer_map is a list of pairs .*; {'fc': .*} is no pair$",
        ),
        (lambda: EpsilonPlusFlat(layer_map=("fc", Epsilon())), "layer_map is a list of pairs .*; 'fc' is no pair$"),
        (lambda: Composite(layer_map=[(nn.Linear, "epsilon")]), r"such as Epsilon\(\), or None; not 'epsilon'"),
        (
            lambda: Composite(layer_map=[(nn.Linear, Epsilon)]),
            "; not <class 'crp.rules.lrp.Epsilon'>",
        ),
        (lambda: Composite(layer_map=[(nn.Linear, 0)]), "an instance of one, .*; not 0"),
        (
            lambda: Composite(layer_map=[(nn.Linear, EpsilonPlusFlat())]),
            r"not EpsilonPlusFlat\(\)",
        ),
        (
            lambda: Composite(layer_map=[(nn.Linear, Uninitialised())]),
            r"__init__ does not call super\(\)",
        ),
    ],
)
def test_maps_of_another_kind_are_refused(make, message):
    with pytest.raises(TypeError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: First(nn.Linear, 0), "n must be a whole number of at least 1, not 0"),
        (lambda: First(nn.Linear, True), "n must be a whole number of at least 1, not True"),
        (lambda: Last(nn.Linear, 1.5), "n must be a whole number of at least 1, not 1.5"),
        (lambda: Depth(0.5, 0.5, nn.Linear), "depths must be 0 <= low < high <= 1"),
        (lambda: Depth(0, 2, nn.Linear), "depths must be 0 <= low < high <= 1"),
        (lambda: Depth("0", 1, nn.Linear), "low must be a finite number, not '0'"),
        (lambda: Depth(0, True, nn.Linear), "high must be a finite number, not True"),
        (lambda: Kind("conv"), "there is no kind 'conv' of operations; there are .*'convolution'"),
    ],
)
def test_positions_that_mean_no_layer_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("tanh", "rellu"), "there is no function 'rellu' of torch; nearest: 'relu'"),
        (("relu_",), "there is no function 'relu_' of torch; nearest: 'relu'"),
        (("xyzxyz",), "there is no function 'xyzxyz' of torch$"),
    ],
)
def test_names_of_no_function_are_refused(names, message):
    with pytest.raises(ValueError, match=message):
        Functions(names)


@torch.library.custom_op("crp_tests::thrice", mutates_args=())
def thrice(x: torch.Tensor) -> torch.Tensor:
    return 3 * x


thrice.register_autograd(lambda ctx, gradient: 3 * gradient)


class Stop(Rule):
    """Hands on nothing."""

    def operate(self, layer):
        return layer.output.detach() + 0 * layer.inputs[0]


@pytest.mark.parametrize("name", ["logcumsumexp", "clip", "getitem", "thrice"])
def test_functions_without_properties_and_operators_of_others_have_names(name):
    assert Functions((name,)).names == (name,)


def test_an_operator_of_others_has_a_rule_by_its_name():
    model = conv_net(lambda s, h: torch.ops.crp_tests.thrice(h))
    assert heatmap(model, Composite(None)).any()
    assert not heatmap(model, Composite(None, layer_map=[(Functions(("thrice",)), Stop())])).any()


def test_presets_conserve_what_their_functions_share():
    model = conv_net(lambda s, h: F.silu(h) * torch.sigmoid(h))
    total = heatmap(model, exact()).flatten(1).sum(1)
    torch.testing.assert_close(total, model(images())[:, 0].detach(), rtol=1e-9, atol=1e-12)


class Unrolled(nn.Module):
    """As many dense layers as a text has tokens, or as are asked for."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.cells, self.out, self.n = nn.ModuleList(nn.Linear(4, 4) for _ in range(6)), nn.Linear(4, 2), None
        self.double().eval()

    def forward(self, x):
        h = x.mean(1)
        for cell in self.cells[: self.n or x.shape[1]]:
            h = torch.relu(cell(h))
        return self.out(h)


@pytest.mark.parametrize("position", [First(nn.Linear, 2), Last(nn.Linear, 2), Depth(0, 0.5, nn.Linear)], ids=repr)
def test_positions_are_counted_for_each_length(position):
    """Where a model does more for longer inputs, the last of four layers is another than the last of six."""
    model, composite = Unrolled(), Composite(layer_map=[(position, Epsilon(0.3)), (nn.Linear, Gamma(1.0))])
    for length in (4, 2, 6, 4):
        data = torch.randn(2, length, 4, dtype=torch.float64)
        names = [f"cells.{i}" for i in range(length)] + ["out"]
        chosen = [name for k, name in enumerate(names) if position.chooses(k, len(names))]
        by_name = Composite(layer_map=[*((name, Epsilon(0.3)) for name in chosen), (nn.Linear, Gamma(1.0))])
        torch.testing.assert_close(heatmap(model, composite, data), heatmap(model, by_name, data))


def test_positions_are_counted_anew_after_another_path():
    model, data = Unrolled(), torch.randn(2, 3, 4, dtype=torch.float64)
    composite = Composite(layer_map=[(Last(nn.Linear, 2), Epsilon(0.3)), (nn.Linear, Gamma(1.0))])
    heatmap(model, composite, data)
    model.n = 5
    with pytest.raises(RuntimeError, match=r"the model ran 6 such layers, and 4 when .* was changed, call it again"):
        heatmap(model, composite, data)
    other = Unrolled()
    other.n = 5
    torch.testing.assert_close(heatmap(model, composite, data), heatmap(other, composite, data))


def test_counting_for_positions_leaves_no_trace():
    class Counting(nn.Sequential):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x) * self.calls

    def found(selector):
        torch.manual_seed(0)
        model = Counting(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).double().eval()
        return heatmap(model, Composite(layer_map=[(selector, Epsilon())]), torch.ones(1, 4).double()), model.calls

    of_position, of_type = found(First(nn.Linear, 2)), found(nn.Linear)
    assert of_position[1] == of_type[1]
    torch.testing.assert_close(of_position[0], of_type[0])


def test_weights_that_are_computed_apart_are_layers_of_their_own():
    """Also where one is gone before the next is made, which may then have its place in memory."""
    origins = Origins(nn.Linear(2, 2))
    found = [origins.of(torch.ones(3)) for _ in range(50)]
    assert len({*found}) == 50
    kept = torch.ones(3)
    assert origins.of(kept) == origins.of(kept) not in found


def test_report_says_which_entry_an_operation_matched():
    composite = LRP(layer_map=[("features.*", None), (nn.Linear, ZPlus())])
    reasons = {row.layer: row.why for row in composite.report(stack(), images()).operations}
    assert reasons["features.0"] == reasons["features.1"] == "('features.*', None)"
    assert reasons["fc"].startswith("(Linear, ZPlus(") and reasons["flat"] == "the ordinary chain rule is the method"
