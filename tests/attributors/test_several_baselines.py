"""Several baselines, of which results are the mean; expected gradients, which draw them; and paths of a layer."""

from __future__ import annotations

import pytest
import torch
import zennit.composites
from torch import Tensor, nn

import crp
from crp import composites
from crp.attributors import IntegratedGradients, Occlusion, ShapleySampling

CLOSE = {"rtol": 1e-9, "atol": 1e-12}
METHODS = {"intgrad": {"steps": 30, "quadrature": "gauss_legendre"}, "shapley_sampling": {"samples": 2}, "deeplift": {}}


def close(found: Tensor, expected: Tensor, **tolerance: float) -> None:
    torch.testing.assert_close(found, expected, **{**CLOSE, **tolerance})


@pytest.fixture
def net() -> nn.Module:
    """Smooth, so that Gauss-Legendre quadrature is exact to rounding."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Sigmoid(), nn.Linear(5, 3)).double().eval()


@pytest.fixture
def data() -> Tensor:
    return torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def background() -> Tensor:
    """Five baselines, each of which is for all samples."""
    return torch.randn(5, 1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


# --- several baselines ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [None, 2])
@pytest.mark.parametrize("method", METHODS)
def test_the_result_is_the_mean_over_baselines_and_complete(net, data, background, method, batch_size):
    options = {**METHODS[method], "batch_size": batch_size}
    found = crp.explain(method, net, data, 1, baseline=background, **options)
    close(found, torch.stack([crp.explain(method, net, data, 1, baseline=b, **options) for b in background]).mean(0))
    close(found.sum(1), net(data)[:, 1] - net(background)[..., 1].mean())
    for_each = background + torch.arange(3.0)[:, None]  # (others of each sample)
    close(
        crp.explain(method, net, data, 1, baseline=for_each, **options)[1:2],
        crp.explain(method, net, data[1:2], 1, baseline=for_each[:, 1:2], **options),
    )


class Meeting(nn.Module):
    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return left * right


@pytest.mark.filterwarnings("ignore:outside DeepLIFT's rules")
@pytest.mark.parametrize("method", METHODS)
def test_baselines_of_several_inputs_are_taken_together(method):
    """Of a product, the mean over pairs is not that over all combinations."""
    left, right = torch.tensor([[3.0]]).double(), torch.tensor([[5.0]]).double()
    pairs = torch.tensor([[[1.0]], [[2.0]]]).double(), torch.tensor([[[4.0]], [[7.0]]]).double()
    options = {**METHODS[method], **({"samples": 40} if method == "shapley_sampling" else {})}
    each = crp.explain(method, Meeting().eval(), (left, right), 0, baseline=pairs, **options)
    close(sum(each), torch.tensor([[15.0 - (1 * 4 + 2 * 7) / 2]]).double())
    for found in (
        crp.explain(method, Meeting().eval(), (left, right), 0, baseline=(pairs[0], 4.0), **options),
        crp.explain(method, Meeting().eval(), (left, right), 0, baseline=(pairs[0], pairs[1][:1]), **options),
    ):
        close(sum(found), torch.tensor([[15.0 - (1 * 4 + 2 * 4) / 2]]).double())


def test_ids_may_be_several_baselines():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 2)).double().eval()
    ids, others = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[[7, 8, 0]], [[3, 3, 3]]])
    found = crp.explain("intgrad", net, ids, 1, baseline=others, steps=1)
    weight, table = net[2].weight[1].view(3, 4), net[0].weight
    close(found, torch.stack([((table[ids] - table[b]) * weight).sum(-1) for b in others]).mean(0))
    close(found, torch.stack([crp.explain("intgrad", net, ids, 1, baseline=b, steps=1) for b in others]).mean(0))


# --- expected gradients -----------------------------------------------------------------------------------------------


def test_each_draw_takes_one_of_the_baselines():
    """Of a linear model the result is w (x - mean of those drawn), and tells how often each was."""
    net, x = nn.Linear(4, 1, bias=False).double().eval(), torch.rand(2, 4).double()
    options = {"baseline": torch.eye(4).double()[:, None], "steps": 50, "quadrature": "random"}
    drawn = []
    for seed in range(4):
        found = crp.explain("intgrad", net, x, 0, seed=seed, **options)
        counts = 50 * (x - found / net.weight.detach())
        close(counts, counts.round(), atol=1e-9)
        assert (counts[0].round() == counts[1].round()).all() and counts[0].sum().round() == 50  # (samples share draws)
        assert counts.min() > 2 and torch.equal(crp.explain("intgrad", net, x, 0, seed=seed, **options), found)
        drawn.append(tuple(counts[0].round().tolist()))
    assert len({*drawn}) == 4
    torch.manual_seed(3)
    first, second = (crp.explain("intgrad", net, x, 0, seed=None, **options) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(crp.explain("intgrad", net, x, 0, seed=None, **options), first)
    assert not torch.equal(first, second)


def test_draws_are_right_in_the_mean(net, data, background):
    """The mean of draws is that over baselines and paths, within its standard error; also in parts."""
    exact = crp.explain("intgrad", net, data, 1, baseline=background, steps=30, quadrature="gauss_legendre")
    options = {"baseline": background, "steps": 100, "quadrature": "random", "batch_size": 300}
    draws = torch.stack([crp.explain("intgrad", net, data, 1, seed=seed, **options) for seed in range(40)])
    assert ((draws.mean(0) - exact).abs() < 5 * draws.std(0) / 40**0.5).all() and (draws.std(0) > 0).all()
    parts = crp.explain("intgrad", net, data, 1, seed=7, **{**options, "batch_size": 7})
    close(parts, draws[7])


# --- paths of a layer -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [None, 5])
def test_at_a_layer_before_a_function_of_each_unit(net, data, background, batch_size):
    """Of v·s(h), each unit gets v (s(h) - s(h0)), whatever the path."""
    options = {**METHODS["intgrad"], "layer": "2", "baseline": background, "batch_size": batch_size}
    found = crp.explain("intgrad", net, data, 1, **options)
    each = [net[4].weight[1] * (net[:4](data) - net[:4](start)) for start in background]
    close(found, torch.stack(each).mean(0), atol=1e-9)


MAKE = {
    "gradient": lambda: None,
    "plus": lambda: composites.EpsilonPlus(None),
    "gamma": lambda: composites.UniformGamma(),
    "zennit": lambda: zennit.composites.EpsilonPlus(),
}


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
@pytest.mark.parametrize("condition", [{}, {"4": [1, 2]}], ids=["whole", "concepts"])
def test_at_a_layer_as_at_the_input_of_what_follows(make, condition):
    """As integrated gradients of the layers behind, whose input is what the layer gives; also in place."""
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.Flatten()
    net = nn.Sequential(*layers, nn.Linear(12, 3)).double().eval()
    x, x0 = torch.rand(2, 1, 8, 8).double(), torch.rand(2, 1, 8, 8).double() - 0.5
    behind = nn.Sequential(*net[2:]).eval()
    at = {str(int(name) - 2): ids for name, ids in condition.items()}
    expected = IntegratedGradients(behind, make(), steps=4, quadrature="middle", baseline=net[:2](x0), condition=at)
    net[3].inplace = net[1].inplace = True
    found = IntegratedGradients(
        net, make(), steps=4, quadrature="middle", baseline=x0, layer="1", condition=condition
    )  # fmt: skip
    close(found(x, [1, 2])[1], expected(net[:2](x), [1, 2])[1])
    named = IntegratedGradients(net, make(), steps=4, quadrature="middle", baseline=x0, layer="2.input")
    if not condition:
        close(named(x, [1, 2])[1], found(x, [1, 2])[1])


class Passing(nn.Module):
    """What passes the layer by is read, too; with batch norm behind it, which composites merge."""

    def __init__(self):
        super().__init__()
        self.inner, self.norm, self.head = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(9, 2)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return self.head(torch.cat([self.norm(self.inner(x)).tanh() * other, x * x], 1))


@pytest.mark.parametrize("composite", [None, composites.GradientTimesInput("auto")], ids=["gradient", "merged"])
def test_what_passes_a_layer_by_has_the_values_of_the_data(composite):
    torch.manual_seed(0)
    net, x, other = Passing().double(), torch.randn(6, 4).double(), torch.randn(6, 1).double()
    net(x, other)
    x0 = torch.randn(1, 4).double()
    found = crp.explain(
        "intgrad", net.eval(), (x, other), 1, explain=0, layer="inner", baseline=x0, composite=composite,
        **METHODS["intgrad"],
    )  # fmt: skip
    mixed = torch.cat([net.norm(net.inner(x0)).tanh() * other, x * x], 1)
    assert found.shape == (6, 5)
    close(found.sum(1), (net(x, other) - net.head(mixed))[:, 1], atol=1e-8)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attn(x, x, x)[0].mean(1))


@pytest.mark.parametrize("layer", ["attn.out_proj.input", "attn.out_proj"])
def test_heads_of_attention_are_such_a_layer(layer):
    """What follows is linear, so that the difference of heads times the weights is exact."""
    torch.manual_seed(0)
    net, x, x0 = Attending().double().eval(), torch.randn(2, 3, 4).double(), torch.randn(1, 3, 4).double()
    found = crp.explain("intgrad", net, x, 1, layer=layer, baseline=x0, steps=2)
    assert found.shape == (2, 3, 4)
    close(found.sum((1, 2)), (net(x) - net(x0))[:, 1])
    out = net.attn(x, x, x)[0] - net.attn(x0, x0, x0)[0]
    if layer == "attn.out_proj":
        close(found, out * net.head.weight[1] / 3)


class Again(nn.Module):
    def __init__(self):
        super().__init__()
        self.shared, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.shared(self.shared(x).sigmoid())


def test_calls_of_a_layer_are_told_apart(data):
    net = Again().double().eval()
    found = crp.explain("intgrad", net, data, 1, layer="shared#0", **METHODS["intgrad"])
    weight, start = net.shared.weight[1], net.shared(torch.zeros_like(data)).sigmoid()
    close(found, weight * (net.shared(data).sigmoid() - start), atol=1e-9)
    close(crp.explain("intgrad", net, data, 1, layer="shared#1").sum(1), (net(data) - net(0 * data))[:, 1])
    with pytest.raises(ValueError, match="name one: shared#0, shared#1"):
        crp.explain("intgrad", net, data, 1, layer="shared")
    with pytest.raises(ValueError, match="'unused', named as layer, is not called"):
        crp.explain("intgrad", net, data, 1, layer="unused")
    with pytest.raises(KeyError, match="'nope' not found"):
        crp.explain("intgrad", net, data, 1, layer="nope")
    windows = nn.Sequential(nn.Unflatten(1, (2, 2)), nn.Flatten(0, 1), nn.Unflatten(0, (-1, 2)), nn.Flatten()).eval()
    with pytest.raises(ValueError, match=r"layer '1' has shape \(6, 2\); its first axis must be that of 3 samples"):
        crp.explain("intgrad", windows, data, 1, layer="1")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


# --- errors -----------------------------------------------------------------------------------------------------------

ERRORS = {
    "one only": (
        lambda m, x: Occlusion(m, baseline=x[:, None])(x, 0),
        "3 baselines are given, and this method has one",
    ),
    "a shape": (
        lambda m, x: IntegratedGradients(m, baseline=x[:2])(x, 0),
        r"\(2, 4\) for data of shape \(3, 4\); .* one for each as \(3, 4\), or n to average over as \(n, 1, 4\)$",
    ),
    "none": (lambda m, x: IntegratedGradients(m, baseline=x[:0, None])(x, 0), r"shape \(0, 1, 4\)"),
    "not finite": (lambda m, x: ShapleySampling(m, baseline=x[:, None] / 0)(x, 0), "NaN or infinite"),
    "numbers": (
        lambda m, x: IntegratedGradients(Meeting().eval(), baseline=(x[:, None], x[:2, None]))((x, x), 0),
        r"inputs have \[3, 2\] baselines; give as many for each",
    ),
    "a seed": (lambda m, x: IntegratedGradients(m, quadrature="random", seed="a"), "seed must be a whole number"),
}


@pytest.mark.parametrize(("call", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(net, data, call, message):
    with pytest.raises(ValueError, match=message):
        call(net, data)
