"""Gradient-type methods: what ReLU sends back, in matrices, in zennit and captum, and under conditions."""

import hypothesis.strategies as st
import pytest
import torch
import zennit.composites
from core_cases import Maps
from hypothesis import given, settings
from rule_cases import close
from torch import nn
from torch.nn import functional as F

import crp.composites as composites
from crp.attribution import CondAttribution
from crp.composites import BetaSmooth, Composite, DeconvNet, Gradient, GradientTimesInput, GuidedBackprop
from crp.rules import DeconvReLU, GuidedReLU, SmoothReLU

few = settings(max_examples=20, deadline=None)
#: What a ReLU of input a sends back of m.
FORMS = {
    "gradient": lambda m, a: m * (a > 0),
    "guided_backprop": lambda m, a: m.clamp(min=0) * (a > 0),
    "deconvnet": lambda m, a: m.clamp(min=0),
    "beta_smooth": lambda m, a: m * torch.sigmoid(10 * a),
}
LINEAR = ["gradient", "gradient_x_input", "beta_smooth"]
EVERY = [*LINEAR, "guided_backprop", "deconvnet"]
THEIRS = {
    "guided_backprop": zennit.composites.GuidedBackprop,
    "deconvnet": zennit.composites.DeconvNet,
    "beta_smooth": zennit.composites.BetaSmooth,
}


class Net(nn.Module):
    """Strided, grouped, with a shortcut, batch norm and both poolings; ReLU is whatever is given."""

    def __init__(self, relu=None, bias=True):
        super().__init__()
        torch.manual_seed(3)
        self.conv1 = nn.Conv2d(3, 6, 3, 2, 1, bias=bias)
        self.bn = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 6, 3, 1, 1, groups=3, bias=bias)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.avg = nn.AvgPool2d(2)
        self.fc1 = nn.Linear(6, 7, bias=bias)
        self.fc2 = nn.Linear(7, 4, bias=bias)
        self.relus = nn.ModuleList(nn.ReLU() for _ in range(3))
        self.relu = relu
        self.double().eval()
        nn.init.normal_(self.bn.bias)

    def forward(self, x):
        first, second, third = (lambda v: self.relu(v),) * 3 if self.relu else self.relus
        x = first(self.bn(self.conv1(x)))
        x = self.avg(self.pool(second(x + self.conv2(x))))
        return self.fc2(third(self.fc1(x.flatten(1))))


def images(n=2):
    return torch.randn(n, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def flow(model, data, composite, start):
    with composite.context(model):
        leaf = data.clone().requires_grad_()
        return torch.autograd.grad(model(leaf), leaf, start)[0]


def weights(mlp):
    return [(layer.weight.detach(), layer.bias.detach()) for layer in mlp if isinstance(layer, nn.Linear)]


def in_matrices(mlp, x, m, form):
    """Multiplier of the inputs of an MLP, from those of its outputs."""
    layers, inputs = weights(mlp), []
    for w, b in layers:
        inputs.append(x)
        x = (x @ w.T + b).relu()
    for number, (w, _) in reversed(list(enumerate(layers))):
        m = m @ w
        if number:
            before, bias = layers[number - 1]
            m = form(m, inputs[number - 1] @ before.T + bias)
    return m


# --- what the methods are ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMS)
def test_result_is_the_formula_in_matrices(name, mlp, vectors):
    found = Maps(mlp)(vectors, [{"y": 2}], composites.get(name)).heatmap
    start = F.one_hot(torch.tensor([2] * 4), 4).double()
    close(found, in_matrices(mlp, vectors, start, FORMS[name]), 1e-12)


def test_gradient_is_that_of_autograd_and_starts_at_one():
    model, data = Net(), images()
    leaf = data.clone().requires_grad_()
    output = model(leaf)
    (gradient,) = torch.autograd.grad(output[:, 1].sum(), leaf)
    found = CondAttribution(model)(data, [{"y": 1}], Gradient(), record_layer=["conv2"])
    close(found.heatmap, gradient.sum(1), 1e-12)
    found = CondAttribution(model)(data, [{"y": 1}], GradientTimesInput())
    close(found.heatmap, (data * gradient).sum(1), 1e-12)
    found = CondAttribution(model)(data, [{"y": 1}], Gradient(), init_rel=torch.full_like(output, -2.0).detach())
    close(found.heatmap, -2 * gradient.sum(1), 1e-12)  # what starts is the multiplier, whatever the output is


def test_large_beta_is_the_gradient_and_small_beta_halves_it(mlp, vectors):
    start = torch.ones(4, 4, dtype=torch.float64)
    gradient = flow(mlp, vectors, Gradient(), start)
    close(flow(mlp, vectors, BetaSmooth(beta=1e6), start), gradient, 1e-12)
    assert torch.allclose(flow(mlp, vectors, BetaSmooth(beta=1e-9), start), in_matrices(
        mlp, vectors, start, lambda m, a: m / 2))  # fmt: skip


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", THEIRS)
def test_result_is_that_of_zennit(name, bias):
    model, data = Net(bias=bias), images()
    start = torch.randn(2, 4, dtype=torch.float64)
    close(flow(model, data, composites.get(name), start), flow(model, data, THEIRS[name](), start), 1e-12)


@pytest.mark.parametrize("name", THEIRS)
def test_result_is_that_of_zennit_on_plain_nets(name, vgg_bn):
    for module in vgg_bn.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False  # zennit's β-smooth reads the input when it is overwritten
    data, start = torch.randn(2, 3, 16, 16).double(), torch.randn(2, 5).double()
    close(flow(vgg_bn, data, composites.get(name), start), flow(vgg_bn, data, THEIRS[name](), start), 1e-12)


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "theirs"), [("guided_backprop", "GuidedBackprop"), ("deconvnet", "Deconvolution")])
def test_result_is_that_of_captum(name, theirs):
    captum = pytest.importorskip("captum.attr")
    model, data = Net(), images()
    expected = getattr(captum, theirs)(model).attribute(data.clone().requires_grad_(), target=1)
    close(CondAttribution(model)(data, [{"y": 1}], composites.get(name)).heatmap, expected.sum(1), 1e-12)


# --- which functions they reach ---------------------------------------------------------------------------------------

WAYS = {
    "F.relu": F.relu,
    "F.relu in place": lambda v: F.relu(v.clone(), inplace=True),
    "relu_": lambda v: v.clone().relu_(),
    "Tensor.relu": lambda v: v.relu(),
    "module in place": nn.ReLU(inplace=True),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FORMS)
def test_functions_are_as_modules(name, way):
    start = torch.randn(2, 4, dtype=torch.float64)
    found = flow(Net(WAYS[way]), images(), composites.get(name), start)
    close(found, flow(Net(), images(), composites.get(name), start), 1e-14)


@pytest.mark.parametrize("relu", [nn.ReLU6(), torch.tanh, F.gelu, F.softplus, F.leaky_relu])
@pytest.mark.parametrize("name", ["guided_backprop", "deconvnet", "beta_smooth"])
def test_model_without_relu_is_refused(name, relu, untouched):
    model = Net(relu)
    with untouched(model), pytest.raises(ValueError, match="changes the backward pass of ReLU, and Net calls none"):
        flow(model, images(), composites.get(name, layer_map=ignored(relu)), None)


def ignored(relu):
    """Map by which the ordinary chain rule holds for a function, so that nothing is warned of."""
    return [(F.hardtanh if isinstance(relu, nn.ReLU6) else relu, None)]


def test_model_without_relu_runs_without_gradients(mlp, vectors):
    model = nn.Sequential(nn.Linear(6, 3).double())
    with GuidedBackprop().context(model), torch.no_grad():
        assert model(vectors).shape == (4, 3)


def test_modules_with_the_rule_count_as_relu():
    composite = GuidedBackprop(layer_map=[(nn.ReLU, GuidedReLU())])
    start = torch.ones(2, 4, dtype=torch.float64)
    close(flow(Net(), images(), composite, start), flow(Net(), images(), GuidedBackprop(), start), 1e-14)


def test_other_activations_are_warned_of():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.SiLU(), nn.Linear(4, 2)).double().eval()
    with pytest.warns(UserWarning, match=r"GuidedBackprop has no rule for silu\(\) in '3'; the ordinary chain rule"):
        CondAttribution(model)(torch.randn(1, 6).double(), [{"y": 0}], GuidedBackprop())


class Inside(nn.Module):
    """A function between two layers, behind a ReLU."""

    def __init__(self, function):
        super().__init__()
        self.first, self.last, self.function = nn.Linear(6, 5).double(), nn.Linear(5, 2).double(), function

    def forward(self, x):
        return self.last(self.function(self.first(x.relu())))


def put(h):
    h = h.clone()
    h[h < 0] = 0
    return h


#: ReLU and its like by other functions, and that which is named.
WRITTEN = {
    "mask": (lambda h: h * (h > 0), "mul"),
    "where": (lambda h: torch.where(h > 0, h, 0.0), "where"),
    "where leaky": (lambda h: torch.where(h > 0, h, 0.1 * h), "where"),
    "fill": (lambda h: h.masked_fill(h < 0, 0), "masked_fill"),
    "put": (put, "masked_fill"),
    "absolute": (lambda h: (h + h.abs()) / 2, "add"),
    "stacked": (lambda h: torch.stack([h, torch.zeros_like(h)]).amax(0), "amax"),
    "softsign": (lambda h: h / (1 + h.abs()), "div"),
}


@pytest.mark.parametrize("method", [GuidedBackprop, DeconvNet, BetaSmooth])
@pytest.mark.parametrize("name", WRITTEN)
def test_activations_that_are_written_out_are_warned_of(name, method):
    """They had the plain gradient without a word."""
    function, named = WRITTEN[name]
    with pytest.warns(
        UserWarning, match=rf"{method.__name__} has no rule for .*\b{named}\(\).*; the ordinary chain rule"
    ):
        CondAttribution(Inside(function).eval())(torch.randn(1, 6).double(), [{"y": 0}], method())


@pytest.mark.parametrize(
    "function",
    [
        torch.abs,
        lambda h: 2 * h + 1,
        lambda h: h * h.sign(),
        lambda h: h * torch.eye(5)[0].double(),
        lambda h: 2 * h.relu(),
        lambda h: -(h.relu() + 1),
        lambda h: torch.stack([h.relu(), 0.5 * h.relu()]).sum(0) / 3,
        lambda h: (h.relu() + 1) * 2 + h,
    ],
)
def test_functions_that_are_no_activations_are_not_warned_of(function):
    model, data = Inside(function).eval(), torch.randn(1, 6).double()
    for method in (GuidedBackprop, DeconvNet, BetaSmooth, Gradient, GradientTimesInput):
        CondAttribution(model)(data, [{"y": 0}], method())
    for name in WRITTEN:
        CondAttribution(Inside(WRITTEN[name][0]).eval())(data, [{"y": 0}], Gradient())


def test_rule_can_be_given_for_another_activation():
    model, data = nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 2)).double(), torch.randn(3, 6).double()
    (w1, b1), (w2, _) = weights(model)
    start = torch.randn(3, 2, dtype=torch.float64)
    a = (data @ w1.T + b1).requires_grad_()
    (slope,) = torch.autograd.grad(F.gelu(a).sum(), a)
    composite = GuidedBackprop(layer_map=[(F.gelu, GuidedReLU())])
    close(flow(model, data, composite, start), ((start @ w2).clamp(min=0) * slope) @ w1, 1e-12)


@pytest.mark.parametrize("rule", [GuidedReLU(), DeconvReLU(), SmoothReLU(3.0)])
def test_rule_inside_a_composite_of_zennit(rule):
    theirs = zennit.composites.LayerMapComposite([(nn.ReLU, rule)])
    ours = Composite(None, layer_map=[(F.relu, rule)])
    start = torch.ones(2, 4, dtype=torch.float64)
    with ours.context(Net()) as model:
        leaf = images().requires_grad_()
        (expected,) = torch.autograd.grad(model(leaf), leaf, start)
    close(images() * flow(Net(), images(), theirs, start), expected, 1e-12)  # the plain composite reads out relevance


def test_bad_settings_are_refused():
    for beta in (0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=r"beta must be (positive|a finite number), (got|not)"):
            BetaSmooth(beta=beta)


def test_rules_for_activations_refuse_modules_without_any():
    composite = Composite(layer_map=[(nn.Linear, GuidedReLU())])
    with pytest.raises(TypeError, match=r"GuidedReLU treats activations such as ReLU, not .*'fc1'"):
        flow(Net(), images(), composite, torch.ones(2, 4, dtype=torch.float64))


# --- conditions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LINEAR)
def test_concepts_of_a_layer_add_up_to_the_whole(name):
    attribution, data = CondAttribution(Net()), images()
    whole = attribution(data, [{"y": 1}], composites.get(name)).heatmap
    parts = [attribution(data, [{"y": 1, "conv1": c}], composites.get(name)).heatmap for c in range(6)]
    close(sum(parts), whole, 1e-12)


@pytest.mark.parametrize("name", ["guided_backprop", "deconvnet"])
def test_condition_masks_what_flows(name, mlp, vectors):
    """Channels of layer 2 that are not named send nothing back; the result is not additive."""
    (w1, b1), (w2, b2), (w3, _) = weights(mlp)
    a1 = vectors @ w1.T + b1
    a2 = a1.clamp(min=0) @ w2.T + b2
    keep = torch.zeros(8, dtype=torch.float64)
    keep[[1, 4, 6]] = 1

    def expected(keep):
        m = FORMS[name](w3[3].expand(4, -1), a2) * keep
        return FORMS[name](m @ w2, a1) @ w1

    found = Maps(mlp)(vectors, [{"y": 3, "2": [1, 4, 6]}], composites.get(name)).heatmap
    close(found, expected(keep), 1e-12)
    parts = sum(expected(row) for row in torch.eye(8, dtype=torch.float64))
    assert not torch.allclose(parts, expected(torch.ones(8, dtype=torch.float64)), rtol=1e-2)


@pytest.mark.parametrize("name", EVERY)
def test_recorded_layers_hold_multipliers(name):
    model, data = Net(), images()
    found = CondAttribution(model)(data, [{"y": 1}], composites.get(name), record_layer=["fc1", "conv2"])
    form = FORMS.get(name, FORMS["gradient"])
    with torch.no_grad():
        expected = form(model.fc2.weight[1].expand(2, -1), found.activations["fc1"])
    if name == "gradient_x_input":
        expected = expected * found.activations["fc1"]
    close(found.relevances["fc1"], expected, 1e-12)
    assert found.relevances["conv2"].abs().sum() > 0


@pytest.mark.parametrize("name", FORMS)
def test_start_layer_explains_a_unit(name, mlp, vectors):
    (w1, b1), (w2, _), _ = weights(mlp)
    found = Maps(mlp)(vectors, [{"2": 3}], composites.get(name), start_layer="2").heatmap
    close(found, FORMS[name](w2[3].expand(4, -1), vectors @ w1.T + b1) @ w1, 1e-12)


def test_deconvnet_projects_one_feature_map():
    """As first used: all ones of one map of a convolution, sent back."""
    model, data = Net(), images()
    attribution = CondAttribution(model)
    found = attribution(data, [{"conv2": 4}], DeconvNet(), start_layer="conv2").heatmap
    ones = torch.zeros(2, 6, 4, 4, dtype=torch.float64)
    ones[:, 4] = 1
    head = nn.Sequential(model.conv1, model.bn, model.relus[0], model.conv2)
    close(found, flow(head, data, DeconvNet(), ones).sum(1), 1e-12)


# --- laws -------------------------------------------------------------------------------------------------------------


@few
@given(st.sampled_from(EVERY), st.floats(0.01, 100), st.integers(0, 2**31))
def test_result_scales_with_a_positive_start(name, factor, seed):
    start = torch.randn(2, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    model, data = Net(), images()
    once, scaled = (flow(model, data, composites.get(name), s) for s in (start, factor * start))
    close(scaled, factor * once, 1e-12)


@few
@given(st.sampled_from(LINEAR), st.integers(0, 2**31))
def test_linear_methods_add_up_over_starts(name, seed):
    one, other = torch.randn(2, 2, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    model, data = Net(), images()
    parts = [flow(model, data, composites.get(name), s) for s in (one, other)]
    close(flow(model, data, composites.get(name), one + other), sum(parts), 1e-12)


@pytest.mark.parametrize("name", EVERY)
def test_samples_do_not_depend_on_each_other(name):
    model, data, start = Net(), images(3), torch.randn(3, 4, dtype=torch.float64)
    together = flow(model, data, composites.get(name), start)
    alone = [flow(model, data[[i]], composites.get(name), start[[i]]) for i in range(3)]
    close(together, torch.cat(alone), 1e-12)


def test_result_can_be_differentiated(mlp, vectors):
    """Of the result, which is piecewise constant for the other methods; in the second step, ReLU is what it is."""
    start, composite = torch.ones(4, 4, dtype=torch.float64), BetaSmooth()
    with composite.context(mlp):
        leaf = vectors.clone().requires_grad_()
        (found,) = torch.autograd.grad(mlp(leaf), leaf, start, create_graph=True)
        with composite.inactive():
            (second,) = torch.autograd.grad(found.square().sum(), leaf)
    leaf = vectors.clone().requires_grad_()
    expected = in_matrices(mlp, leaf, start, FORMS["beta_smooth"])
    close(found, expected.detach(), 1e-12)
    close(second, torch.autograd.grad(expected.square().sum(), leaf)[0], 1e-12)


@pytest.mark.parametrize("name", ["guided_backprop", "deconvnet"])
def test_rules_can_be_made_inactive(name, mlp, vectors):
    start, composite = torch.ones(4, 4, dtype=torch.float64), composites.get(name)
    with composite.context(mlp), composite.inactive():
        leaf = vectors.clone().requires_grad_()
        (found,) = torch.autograd.grad(mlp(leaf), leaf, start)
    close(found, in_matrices(mlp, vectors, start, FORMS["gradient"]), 1e-12)


@pytest.mark.parametrize("name", EVERY)
def test_many_conditions_are_as_each_alone(name):
    attribution, data = CondAttribution(Net()), images(1)
    conditions = [{"y": 1, "conv2": c} for c in range(4)]
    together = attribution(data, conditions, composites.get(name)).heatmap
    alone = [attribution(data, [c], composites.get(name)).heatmap for c in conditions]
    close(together, torch.cat(alone), 1e-12)
