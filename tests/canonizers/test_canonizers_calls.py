"""Batch norms that are called several times, and those beside functions with stored weights."""

import copy

import numpy as np
import pytest
import torch
from canonizer_cases import Merged, check, layer_and_norms, random, ready
from core_cases import Maps
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from crp.attribution import CondAttribution
from crp.canonizers import MergeBatchNorm
from crp.composites import EpsilonPlus


class Wired(nn.Module):
    """Two convolutions, two batch norms and a dense layer, in the order of a function."""

    def __init__(self, wiring, **layers):
        super().__init__()
        self.wiring = wiring
        self.conv, self.other = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1, bias=False)
        self.norm, self.second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.wiring(self, x)


# --- several calls --------------------------------------------------------------------------------------------------


SEVERAL = {
    "frames": (lambda m, x: sum(m.norm(m.conv(part)).relu() for part in x.unbind(1)), {"norm": "conv"}),
    "twins": (lambda m, x: m.norm(m.conv(x[:, 0])) - m.norm(m.conv(x[:, 1])), {"norm": "conv"}),
    "in a row": (lambda m, x: m.norm(m.conv(m.norm(m.conv(x[:, 0])))), {"norm": "conv"}),
    "frames of the one after it": (
        lambda m, x: sum(m.conv(m.norm(part)).relu() for part in x.unbind(1)),
        {"norm": "conv"},
    ),
    "read twice by the norm": (lambda m, x: m.norm(y := m.conv(x[:, 0])) + m.norm(y).relu(), {"norm": "conv"}),
    "one on each side": (
        lambda m, x: sum(m.second(m.conv(m.norm(part))).relu() for part in x.unbind(1)),
        {"norm": "conv", "second": "conv"},
    ),
    "of two sizes": (
        lambda m, x: m.norm(m.conv(x[:, 0])).sum() + m.norm(m.conv(x[:, 1, :, :2])).sum().square(),
        {"norm": "conv"},
    ),
    "result that nothing reads": (
        lambda m, x: (m.conv(x[:, 1]), m.norm(m.conv(x[:, 0])))[1] + 0 * m.second(m.other(x[:, 0])),
        {"norm": "conv", "second": "other"},
    ),
}


@pytest.mark.parametrize(("wiring", "merged"), SEVERAL.values(), ids=SEVERAL)
def test_calls_of_one_norm_that_all_read_one_convolution(wiring, merged, untouched):
    model = ready(Wired(wiring))
    left = {"norm": "", "second": ""}.keys() - merged
    with untouched(model):
        check(model, random(2, 3, 3, 4, 4), merged, dict.fromkeys(left, "not called"))


NOT_SEVERAL = {
    "another convolution": (
        lambda m, x: m.norm(m.conv(x[:, 0])) + m.norm(m.other(x[:, 1])),
        "called 2 times, behind 'conv', 'other'; called 2 times: output is read by add",
    ),
    "a call without the norm": (
        lambda m, x: m.norm(m.conv(x[:, 0])) + m.norm(m.conv(x[:, 1])) + m.conv(x[:, 2]),
        "input comes from 'conv', which is called 3 times and whose output is also read by add",
    ),
    "another norm": (
        lambda m, x: m.norm(m.conv(x[:, 0])) + m.second(m.conv(x[:, 1])),
        "input comes from 'conv', which is called 2 times and whose output is also read by 'second'",
    ),
    "a function": (
        lambda m, x: m.norm(m.conv(x[:, 0])) + m.norm(m.conv(x[:, 1]).relu()),
        "called 2 times: input comes from relu",
    ),
    "one output is read beside": (
        lambda m, x: m.norm(m.conv(x[:, 0])) + m.norm(y := m.conv(x[:, 1])) + y.mean(),
        "input comes from 'conv', which is called 2 times and whose output is also read by mean",
    ),
    "one is read by another layer": (
        lambda m, x: m.conv(m.norm(x[:, 0])) + m.norm(x[:, 1]),
        "called 2 times: output is read by 'conv', add",
    ),
    "the convolution reads something else": (
        lambda m, x: m.conv(m.norm(x[:, 0])) + m.conv(x[:, 1]),
        "output is read by 'conv'",
    ),
    "weight is read beside": (
        lambda m, x: (m.norm(m.conv(x[:, 0])) + m.norm(m.conv(x[:, 1]))) * m.conv.weight.sum(),
        "weight of 'conv' is also read by sum",
    ),
}


@pytest.mark.parametrize(("wiring", "reason"), NOT_SEVERAL.values(), ids=NOT_SEVERAL)
def test_calls_that_do_not_all_fit_are_left(wiring, reason, untouched):
    model = ready(Wired(wiring))
    with untouched(model), Merged(model, random(2, 3, 3, 4, 4)) as run:
        assert run.canonizer.merged == {}
        assert reason in run.canonizer.left["norm"]


def test_the_axis_of_every_call_is_looked_at():
    model = ready(Wired(lambda m, x: m.norm(m.dense(x[:, 0])).sum() + m.norm(m.dense(x)).sum(), dense=nn.Linear(3, 3)))
    model.norm = ready(nn.BatchNorm1d(3))
    reason = "it normalizes another axis than the features of 'dense'"
    check(model, random(2, 3, 3), {}, {"norm": reason, "second": "not called"})


def test_a_hook_that_changes_one_of_several_calls_is_noticed():
    model = ready(Wired(SEVERAL["twins"][0]))
    calls = []

    def double_second(_module, _args, output):
        calls.append(output)
        return 2 * output if len(calls) % 2 == 0 else None

    model.conv.register_forward_hook(double_second)
    with Merged(model, random(2, 3, 3, 4, 4)) as run:
        assert "a hook changes what goes between it and 'conv'" in run.canonizer.left["norm"]


class Loop(nn.Module):
    """One net for every frame of a video; as one pass over all frames if told."""

    def __init__(self, at_once=False):
        super().__init__()
        self.conv, self.norm, self.dense = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)
        self.at_once = at_once

    def forward(self, x):
        if self.at_once:
            return self.one(x.flatten(0, 1)).view(*x.shape[:2], -1).mean(1)
        return torch.stack([self.one(frame) for frame in x.unbind(1)], 1).mean(1)

    def one(self, x):
        return self.dense(F.relu(self.norm(self.conv(x))).mean((2, 3)))


def test_relevance_of_a_loop_over_frames_is_that_of_one_pass():
    loop, data = ready(Loop()), random(2, 3, 1, 8, 8)
    at_once = copy.deepcopy(loop)
    at_once.at_once = True
    expected = Maps(at_once)(data, [{"y": 1}], EpsilonPlus()).heatmap
    found = Maps(loop)(data, [{"y": 1}], EpsilonPlus()).heatmap
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    unmerged = Maps(loop)(data, [{"y": 1}], EpsilonPlus([])).heatmap
    assert (unmerged - expected).abs().max() > 0.1 * expected.abs().max()


# --- functions ------------------------------------------------------------------------------------------------------


class Function(nn.Module):
    """What a layer does, by a function and parameters with names of its own."""

    def __init__(self, layer, bias=None):
        super().__init__()
        self.kernel = nn.Parameter(layer.weight.detach().clone())
        self.offset = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone())
        self.settings = {}
        if not isinstance(layer, nn.Linear):
            self.settings = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")}
        name = type(layer).__name__.lower().replace("convtranspose", "conv_transpose")
        self.function = getattr(F, name)

    def forward(self, x):
        return self.function(x, self.kernel, self.offset, **self.settings)


FUNCTIONS = {
    "linear": (lambda: nn.Linear(4, 4), nn.BatchNorm1d, (3, 4)),
    "conv1d": (lambda: nn.Conv1d(4, 4, 3, groups=2), nn.BatchNorm1d, (2, 4, 7)),
    "conv2d": (lambda: nn.Conv2d(4, 4, 3, stride=2), nn.BatchNorm2d, (2, 4, 7, 7)),
    "conv3d": (lambda: nn.Conv3d(4, 4, 2), nn.BatchNorm3d, (2, 4, 3, 3, 3)),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(4, 4, 1, groups=2), nn.BatchNorm1d, (2, 4, 5)),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(4, 4, 1), nn.BatchNorm2d, (2, 4, 3, 3)),
    "conv_transpose3d": (lambda: nn.ConvTranspose3d(4, 4, 1), nn.BatchNorm3d, (2, 4, 3, 3, 3)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_take_in_a_norm_on_each_side(name, untouched):
    make, norm, shape = FUNCTIONS[name]
    model = ready(nn.Sequential(norm(4), Function(make()), norm(4), nn.ReLU()))
    with untouched(model):
        into = f"{name} (1.kernel)"
        check(model, random(*shape), {"0": into, "2": into})


@st.composite
def nets(draw):
    """A function with batch norms around it, and an input; whether the first may be merged."""
    layer, (before, after), data, exact = layer_and_norms(draw, bias=True, mode="zeros")
    return ready(nn.Sequential(before, Function(layer), after)), data, exact


@given(nets(), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_any_function(net, seed):
    torch.manual_seed(seed)
    model, data, exact = net
    into = f"{model[1].function.__name__} (1.kernel)"
    left = {} if exact else {"0": f"its shift would not reach the borders of {into} as it does now"}
    check(model, data, ({"0": into} if exact else {}) | {"2": into}, left)


class Net(nn.Module):
    """A batch norm behind a function of its own parameters, buffers and inner layer."""

    def __init__(self, wiring, setup=lambda m: None):
        super().__init__()
        self.wiring = wiring
        self.weight, self.bias = nn.Parameter(torch.randn(3, 3, 1, 1)), nn.Parameter(torch.randn(3))
        self.more = nn.ParameterList([nn.Parameter(torch.randn(3, 3, 1, 1)), nn.Parameter(torch.randn(3))])
        self.inner, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.register_buffer("fixed", torch.randn(3, 3, 1, 1))
        setup(self)

    def forward(self, x):
        return self.wiring(self, x)


def without_shift(m):
    nn.init.zeros_(m.norm.running_mean)
    nn.init.zeros_(m.norm.bias)


def tie(m):
    m.inner.weight = m.weight


STORED = {
    "own parameters": (lambda m, x: m.norm(F.conv2d(x, m.weight, m.bias)), "conv2d (weight)"),
    "by keywords": (lambda m, x: m.norm(torch.conv2d(x, weight=m.weight, bias=m.bias, stride=2)), "conv2d (weight)"),
    "of an inner layer": (lambda m, x: m.norm(F.conv2d(x, m.inner.weight, m.inner.bias)), "conv2d (inner.weight)"),
    "of a list": (lambda m, x: m.norm(F.conv2d(x, *m.more)), "conv2d (more.0)"),
    "for each frame": (
        lambda m, x: sum(m.norm(F.conv2d(part, m.weight, m.bias)).relu() for part in (x, 2 * x)),
        "conv2d (weight)",
    ),
    "padded by hand": (lambda m, x: m.norm(F.conv2d(F.pad(x, (1, 0)), m.weight, m.bias)), "conv2d (weight)"),
    "weight is only looked at": (
        lambda m, x: m.norm(F.conv2d(x, m.weight, m.bias, padding=m.weight.shape[-1] // 2)),
        "conv2d (weight)",
    ),
}


@pytest.mark.parametrize(("wiring", "into"), STORED.values(), ids=STORED)
def test_functions_with_stored_parameters(wiring, into, untouched):
    model = ready(Net(wiring))
    with untouched(model):
        check(model, random(2, 3, 4, 4), {"norm": into})


def test_functions_without_a_bias_take_in_a_norm_without_a_shift(untouched):
    model = ready(Net(lambda m, x: m.norm(F.conv2d(x, m.weight))))
    without_shift(model)
    with untouched(model):
        check(model, random(2, 3, 4, 4), {"norm": "conv2d (weight)"})
    with torch.no_grad():
        model.norm.bias[1] = 1e-9
    check(model, random(2, 3, 4, 4), {}, {"norm": "conv2d (weight) is called without a stored bias"})


NOT_STORED = {
    "weight is computed": (
        lambda m, x: m.norm(F.conv2d(x, m.weight - m.weight.mean(), m.bias)),
        "the weight of conv2d in 'net' is computed, not stored as a parameter",
    ),
    "weight is a buffer": (
        lambda m, x: m.norm(F.conv2d(x, m.fixed, m.bias)),
        "the weight of conv2d in 'net' is computed, not stored as a parameter",
    ),
    "bias is computed": (
        lambda m, x: m.norm(F.conv2d(x, m.weight, 2 * m.bias)),
        "the bias of conv2d (net.weight) is computed, not stored as a parameter",
    ),
    "without a bias": (
        lambda m, x: m.norm(F.conv2d(x, m.weight)),
        "conv2d (net.weight) is called without a stored bias that could take up its shift",
    ),
    "weight is read beside": (
        lambda m, x: m.norm(F.conv2d(x, m.weight, m.bias)) + m.weight.sum(),
        "net.weight of conv2d (net.weight) is also read by sum in 'net'",
    ),
    "bias is read beside": (
        lambda m, x: m.norm(F.conv2d(x, m.weight, m.bias)) + F.conv2d(x, m.fixed, m.bias),
        "net.bias of conv2d (net.weight) is also read by conv2d in 'net'",
    ),
    "settings are no numbers": (
        lambda m, x: m.norm(F.conv2d(x, m.weight, m.bias, padding=np.int64(0))),
        "conv2d (net.weight) is called with settings that are no plain numbers",
    ),
    "output is read beside": (
        lambda m, x: m.norm(y := F.conv2d(x, m.weight, m.bias)) + y,
        "input comes from conv2d (net.weight), whose output is also read by add in 'net'",
    ),
    "once without the norm": (
        lambda m, x: m.norm(F.conv2d(x, m.weight, m.bias)) + F.conv2d(x + 1, m.weight, m.bias),
        "conv2d (net.weight), which is called 2 times and whose output is also read by add in 'net'",
    ),
    "calls differ": (
        lambda m, x: m.norm(F.conv2d(x, m.weight, m.bias)) + m.norm(F.conv2d(x, m.weight, m.bias, stride=(1, 1))),
        "the calls of conv2d (net.weight) differ in more than their input",
    ),
    "changed in place": (
        lambda m, x: m.norm(F.conv2d(x, m.weight, m.bias).add_(1)),
        "input comes from add in 'net'",
    ),
}


@pytest.mark.parametrize(("wiring", "reason"), NOT_STORED.values(), ids=NOT_STORED)
def test_functions_that_cannot_take_in_a_norm(wiring, reason, untouched):
    model = nn.Module()
    model.net = Net(wiring)
    model.forward = lambda x: model.net(x)
    ready(model)
    with untouched(model):
        check(model, random(2, 3, 4, 4), {}, {"net.norm": reason})


def test_a_parameter_that_two_modules_hold_is_left(untouched):
    model = ready(Net(lambda m, x: m.norm(F.conv2d(x, m.weight, m.bias)), tie))
    with untouched(model):
        check(model, random(2, 3, 4, 4), {}, {"norm": "the parameter 'weight' is also 'inner.weight'"})


def test_an_unbatched_function_is_left():
    model = ready(nn.Sequential(Function(nn.Conv1d(3, 4, 1)), nn.BatchNorm1d(4)))
    check(model, random(3, 4), {}, {"1": "another axis than the features of conv1d (0.kernel)"})


def test_a_function_that_a_norm_feeds_as_its_weight_is_left():
    model = ready(Net(lambda m, x: F.conv2d(x, m.norm(m.inner(x))[:3, :, :1, :1], m.bias)))
    check(model, random(3, 3, 4, 4), {"norm": "inner"})
    alone = ready(Net(lambda m, x: F.conv2d(m.fixed, m.norm(x), m.bias)))
    check(alone, random(3, 3, 1, 1), {}, {"norm": "is computed, not stored"})


def test_one_weight_in_two_forms():
    weight, bias = nn.Parameter(torch.randn(3, 3, 1, 1).double()), nn.Parameter(torch.randn(3).double())
    norm = ready(nn.BatchNorm2d(3))
    for function in (F.conv2d, F.conv_transpose2d, F.conv2d):
        model = ready(Net(lambda m, x, f=function: m.norm(f(x, m.weight, m.bias))))
        model.weight, model.bias, model.norm = weight, bias, norm
        check(model, random(2, 3, 4, 4), {"norm": f"{function.__name__} (weight)"})


def test_relevance_behind_a_function_is_that_of_the_layer():
    class Layers(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2))

        def forward(self, x):
            return self.body(x)

    layers, data = ready(Layers()), random(2, 2, 5, 5)
    functions = copy.deepcopy(layers)
    functions.body[0] = Function(layers.body[0]).double()
    (canonizer,) = MergeBatchNorm().apply(functions)
    functions(data)
    assert canonizer.merged == {"body.1": "conv2d (body.0.kernel)"}
    with Merged(layers, data):
        assert torch.equal(functions.body[0].kernel, layers.body[0].weight)
        assert torch.equal(functions.body[0].offset, layers.body[0].bias)
    canonizer.remove()


@pytest.mark.parametrize("where", ["hook", "forward"])
def test_who_waits_for_gradients_does_not_keep_norms_from_merging(where):
    """The pass that looks for places has no gradients."""
    seen = []

    class Waiting(nn.ReLU):
        def forward(self, x):
            x = super().forward(x)
            if where == "forward":
                x.register_hook(seen.append)
                x.retain_grad()
            return x

    model = ready(nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), Waiting(), nn.Flatten(), nn.Linear(36, 2)))
    if where == "hook":
        model[2].register_forward_hook(lambda module, args, output: output.register_hook(seen.append) and None)
    plain = copy.deepcopy(model)
    plain[2] = nn.ReLU().eval()
    data, composite = random(2, 2, 5, 5), EpsilonPlus()
    found, wanted = (CondAttribution(net)(data, [{"y": 1}], composite).heatmap for net in (model, plain))
    assert torch.equal(found, wanted) and len(seen) == 1
