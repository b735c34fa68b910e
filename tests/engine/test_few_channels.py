"""Below a mask, a convolution is computed for the channels that are left; see `crp.engine.few_channels`."""

import pytest
import torch
from architectures import Family
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from zennit.composites import EpsilonPlus as ZennitEpsilonPlus

from crp.attribution import CondAttribution
from crp.composites import EpsilonAlpha2Beta1, EpsilonGammaBox, EpsilonPlus, EpsilonPlusFlat, Gradient
from crp.engine import backward, few_channels

WHOLE = few_channels.below_convolution


@pytest.fixture
def ways(monkeypatch):
    """Whether each flow went on below a convolution; even the smallest may."""
    taken = []

    def noting(root, cotangent, goals):
        roots, cotangents = WHOLE(root, cotangent, goals)
        taken.append(roots[0] is not root)
        return roots, cotangents

    monkeypatch.setattr(few_channels, "_WORTH", 1)
    monkeypatch.setattr(backward, "below_convolution", noting)
    return taken


def explained(monkeypatch, run, whole):
    with monkeypatch.context() as patch:
        if whole:
            patch.setattr(backward, "below_convolution", lambda root, cotangent, goals: ([root], [cotangent]))
        return run()


def net(convolution, n_dims, signed=False):
    """Three convolutions, of which the second is the one that is asked for; its inputs have both signs perhaps."""
    torch.manual_seed(0)
    convolution.reset_parameters()
    first, last = ([nn.Conv1d, nn.Conv2d, nn.Conv3d][n_dims - 1] for _ in range(2))
    between = nn.Identity() if signed else nn.ReLU()
    layers = [first(2, 6, 3), between, convolution, nn.ReLU(), last(40, 3, 1), nn.Flatten(2)]
    nn.init.uniform_(layers[4].weight)  # (so that all channels are relevant by every rule)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten()).double().eval()


SHAPES = {
    "1d": (nn.Conv1d(6, 40, 5, padding=2), 1),
    "2d": (nn.Conv2d(6, 40, 3, padding=1), 2),
    "pointwise": (nn.Conv2d(6, 40, 1), 2),
    "strided": (nn.Conv2d(6, 40, 3, stride=2, padding=(1, 0)), 2),
    "dilated": (nn.Conv2d(6, 40, (3, 1), dilation=2, padding="same", bias=False), 2),
    "3d": (nn.Conv3d(6, 40, 3), 3),
}
SIZES = {1: (60,), 2: (9, 8), 3: (9, 8, 7)}
CONDITIONS = [{"y": 0, "2": [3]}, {"y": 2, "2": [39, 0, 7]}, {"y": 1, "2": [20]}]


@pytest.mark.parametrize("signed", [False, True], ids=["rectified", "signed"])
@pytest.mark.parametrize(
    "composite",
    [EpsilonPlus(), EpsilonAlpha2Beta1(), EpsilonGammaBox(low=-3.0, high=3.0)],
    ids=lambda composite: type(composite).__name__,
)
@pytest.mark.parametrize("shape", SHAPES)
def test_as_by_the_whole_convolution(monkeypatch, ways, shape, composite, signed):
    convolution, n_dims = SHAPES[shape]
    model = net(convolution, n_dims, signed)
    data = torch.randn(2, 2, *SIZES[n_dims], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    attribution = CondAttribution(model)

    def run():  # several rows of a sample, and one row of each of two
        many = attribution(data[:1], CONDITIONS, composite, record_layer=["0", "2"])
        one = attribution(data, CONDITIONS[1:2], composite)
        return many.heatmap, one.heatmap, *many.relevances.values()

    for short, whole in zip(run(), explained(monkeypatch, run, whole=True), strict=True):
        assert short.abs().max() > 0
        torch.testing.assert_close(short, whole, rtol=1e-10, atol=1e-14)
    assert any(ways)


def test_next_layer_of_a_condition_is_reached(monkeypatch, ways):
    model = net(SHAPES["2d"][0], 2)
    conditions = [{"y": 1, "2": [5], "0": [2]}, {"y": 1, "2": [11], "2.input": [5]}, {"y": 1, "2": [5], "2#0": [5, 6]}]
    data = torch.randn(1, 2, 9, 8, dtype=torch.float64)

    def run():
        return CondAttribution(model)(data, conditions, EpsilonPlus()).heatmap

    torch.testing.assert_close(run(), explained(monkeypatch, run, whole=True), rtol=1e-10, atol=1e-14)
    assert any(ways)


@pytest.mark.parametrize(
    ("composite", "channels"),
    [(EpsilonPlus(), range(30)), (Gradient(), [3]), (ZennitEpsilonPlus(), [3])],
    ids=["many channels", "no rule", "zennit's rule"],
)
def test_other_flows_go_by_the_whole_convolution(ways, composite, channels):
    model = net(SHAPES["2d"][0], 2, signed=True).requires_grad_(False)
    CondAttribution(model)(torch.randn(1, 2, 9, 8, dtype=torch.float64), [{"y": 1, "2": [*channels]}], composite)
    assert ways and not any(ways)


class Turned(torch.autograd.Function):
    """Rows as columns, by a function of a user's own."""

    @staticmethod
    def forward(ctx, x):
        return x.mT.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.mT


def test_a_function_behind_a_convolution_may_do_more_than_scale(monkeypatch, ways):
    """Only rules say that what arrives goes on value by value."""

    class TurnedConvolution(nn.Conv2d):
        def forward(self, x):
            return Turned.apply(super().forward(x))

    model = net(TurnedConvolution(6, 40, 3, padding=1), 2)
    data = torch.randn(1, 2, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def run():
        return CondAttribution(model)(data, CONDITIONS[:1], None).heatmap

    found = run()
    assert torch.equal(found, explained(monkeypatch, run, whole=True)) and found.any()
    assert ways and not any(ways)


def test_first_layer_and_what_is_kept_elsewhere(monkeypatch, ways):
    model = nn.Sequential(nn.Conv2d(2, 40, 3), nn.ReLU(), nn.Flatten(), nn.Linear(40 * 7 * 6, 3)).double().eval()
    attribution, data = CondAttribution(model), torch.randn(1, 2, 9, 8, dtype=torch.float64)
    conditions = [{"y": 1, "0": [5]}, {"y": 2, "0": [6, 30]}]

    def run():
        return attribution(data, conditions, EpsilonPlus()).heatmap

    whole = explained(monkeypatch, run, whole=True)
    torch.testing.assert_close(run(), whole, rtol=1e-10, atol=1e-14)
    with torch.autograd.graph.saved_tensors_hooks(lambda kept: kept.detach().clone(), lambda kept: kept):
        torch.testing.assert_close(run(), whole, rtol=1e-10, atol=1e-14)
    assert any(ways)


def test_hooks_of_others_see_what_arrives_at_a_convolution_without_a_rule(ways):
    model = net(SHAPES["2d"][0], 2)
    seen = []
    model[2].register_full_backward_hook(lambda module, inputs, outputs: seen.append(inputs[0].abs().sum()))
    CondAttribution(model)(torch.randn(1, 2, 9, 8, dtype=torch.float64), [{"y": 1, "2": [3]}], Gradient())
    assert len(seen) == 1 and seen[0] > 0


def test_what_it_costs_is_that_of_the_convolutions_below(monkeypatch):
    model = Family("vgg16_bn", 64, "").build().float().requires_grad_(False)
    data = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    attribution = CondAttribution(model)

    def operations(n, whole):
        conditions = [{"y": 3, "features.17": [channel]} for channel in range(n)]
        run = lambda: attribution(data, conditions, EpsilonPlusFlat())  # noqa: E731
        explained(monkeypatch, run, whole)  # what is kept for the model is kept now
        with FlopCounterMode(display=False) as counter:
            explained(monkeypatch, run, whole)
        return counter.get_total_flops()

    # (a fifth of the multiplications below the layer are its own)
    short, whole = (operations(65, way) - operations(1, way) for way in (False, True))
    assert short < 0.82 * whole
