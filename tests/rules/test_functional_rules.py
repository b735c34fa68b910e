"""Rules for functions of torch against closed forms: what each function hands on, and what constants keep."""

from __future__ import annotations

import re
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.ops import FrozenBatchNorm2d, SqueezeExcitation, StochasticDepth

from crp.attribution import CondAttribution
from crp.composites import (
    CPLRP,
    LRP,
    AttnLRP,
    DeepTaylor,
    EpsilonPlus,
    ExcitationBackprop,
    RelP,
    UniformEpsilon,
    UniformLRP0,
)
from crp.rules import LRP0


class Net(nn.Module):
    """A function as a model; one layer that is never called has a rule."""

    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)
        self.unused = nn.Linear(1, 1)

    def forward(self, x):
        return self.function(x, **{k: m for k, m in self.named_children() if k != "unused"})


def lrp(**keywords):
    return LRP(layer_map=[((nn.Linear, nn.Conv2d), LRP0())], **keywords)


def numbers(*shape, seed=7):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def explain(function, x, r, composite=None, **modules):
    """Relevance of ``x`` for that of the output, ``r``, and what is kept; nothing may be missing."""
    net, composite = Net(function, **modules).double().eval(), composite or lrp()
    with composite.context(net):
        leaf = x.clone().requires_grad_()
        y = net(leaf.clone())
        (found,) = torch.autograd.grad(y, leaf, torch.where(y == 0, 0.0, r / y).detach())
    torch.testing.assert_close(y.detach(), net(x.clone()).detach(), rtol=1e-13, atol=1e-13)
    kept = CondAttribution(net).absorbed(x, [{}], composite, init_rel=torch.where(y == 0, 0.0, r).detach())
    assert kept.rest.abs().max() <= 1e-11 * (r.abs().sum() + found.abs().sum()), f"missing: {kept.rest}"
    torch.testing.assert_close(kept.input, found.flatten(1).sum(1), rtol=1e-9, atol=1e-10)
    return found, kept.total


def close(found, expected, tolerance=1e-11):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * max(1.0, float(expected.abs().max())))


def jacobian(function, x):
    """(outputs, inputs) of one sample."""
    return torch.autograd.functional.jacobian(lambda t: function(t[None]).flatten(), x[0]).flatten(1)


def lrp_0(matrix, x, y, r):
    """Relevance by proportional contributions: ``x_i W_ji r_j / y_j``, for one sample."""
    shares = torch.where(y == 0, 0.0, r / y).flatten()
    return (x.flatten() * (matrix.T @ shares)).reshape(x.shape)


PASSED_ON = {
    "silu": F.silu,
    "silu_in_place": lambda x: F.silu(x, inplace=True),
    "silu_flag": lambda x: F.silu(x, True),
    "silu_module": nn.SiLU(),
    "silu_module_in_place": nn.SiLU(inplace=True),
    "silu_by_hand": lambda x: x * x.sigmoid(),
    "gelu": F.gelu,
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "hardswish": F.hardswish,
    "hardswish_in_place": nn.Hardswish(inplace=True),
    "sigmoid": torch.sigmoid,
    "sigmoid_method": lambda x: x.sigmoid(),
    "sigmoid_in_place": lambda x: x.sigmoid_(),
    "sigmoid_module": nn.Sigmoid(),
    "hardsigmoid": F.hardsigmoid,
    "hardsigmoid_in_place": nn.Hardsigmoid(inplace=True),
    "tanh": torch.tanh,
    "softplus": F.softplus,
    "logaddexp": lambda x: torch.logaddexp(x, torch.zeros_like(x)),
    "mish": F.mish,
    "elu": F.elu,
    "selu": F.selu,
    "celu": nn.CELU(),
    "logsigmoid": F.logsigmoid,
    "exp": torch.exp,
    "power": lambda x: x**3,
    "square": torch.square,
    "product_with_itself": lambda x: x * x,
    "power_of_a_constant": lambda x: 2.0**x,
    "reciprocal": lambda x: 2 / x,
    "constant_over": lambda x: numbers(3, 4, 4) / x,
    "constant_over_in_words": lambda x: torch.div(input=numbers(3, 4, 4), other=x),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.1),
    "prelu": nn.PReLU(3),
    "dropout": nn.Dropout(0.5),
    "dropout_function": lambda x: F.dropout(x, 0.5, training=False),
    "stochastic_depth": StochasticDepth(0.5, "row"),
    "layer_scale": lambda x: x * numbers(3, 1, 1),
    "layer_scale_in_place": lambda x: x.mul_(numbers(3, 1, 1)),
    "divided": lambda x: x / numbers(3, 1, 1),
    "divided_in_place": lambda x: x.div_(3.0),
    "divided_in_words": lambda x: torch.div(input=x, other=3.0),
    "batch_norm": lambda x: F.batch_norm(x, numbers(3), numbers(3).square(), numbers(3), numbers(3)),
    "batch_norm_module": nn.BatchNorm2d(3),
    "local_response_norm": lambda x: F.local_response_norm(x, 2),
    "local_response_norm_module": nn.LocalResponseNorm(2),
    "normalized": lambda x: F.normalize(x, dim=1),
    "normalized_by_hand": lambda x: x / x.norm(dim=1, keepdim=True),
    "standardized_by_hand": lambda x: x / x.std(dim=1, keepdim=True),
    "rms_by_hand": lambda x: x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6),
    "negative": lambda x: -x,
    "abs": torch.abs,
    "doubled": lambda x: x + x,
    "to_and_fro": lambda x: x.permute(0, 2, 3, 1).flatten(1).reshape(-1, 4, 4, 3).permute(0, 3, 1, 2),
}


@pytest.mark.parametrize("name", PASSED_ON)
def test_elementwise_functions_hand_relevance_on_as_it_is(name):
    x, r = numbers(2, 3, 4, 4), numbers(2, 3, 4, 4, seed=8)
    function = PASSED_ON[name]
    if isinstance(function, nn.Module):
        function = (lambda module: lambda x, layer: layer(x))(function)
        found, kept = explain(function, x, r, layer=PASSED_ON[name])
    else:
        found, kept = explain(function, x, r)
    close(found, r)
    close(kept, torch.zeros(2, dtype=torch.float64), 1e-9)


@pytest.mark.parametrize(
    ("function", "low", "high"),
    [(F.relu, 0, None), (lambda x: F.relu(x, True), 0, None), (nn.ReLU(inplace=True), 0, None), (F.relu6, 0, 6)]
    + [(lambda x: x.clamp(0, 1), 0, 1), (F.hardtanh, -1, 1), (nn.ReLU6(inplace=True), 0, 6)],
    ids=["relu", "relu_in_place", "relu_module", "relu6", "clamp", "hardtanh", "relu6_module"],
)
def test_rectified_inputs_get_what_their_outputs_have(function, low, high):
    x, r = 4 * numbers(2, 3, 4, 4), numbers(2, 3, 4, 4, seed=8)
    found, _ = explain(lambda x: function(x), x, r)
    close(found, torch.where(x.clamp(low, high) == 0, 0.0, r))


LINEAR = {
    "avg_pool": lambda x: F.avg_pool2d(x, 3, 2, 1),
    "adaptive_avg_pool": lambda x: F.adaptive_avg_pool2d(x, 2),
    "mean": lambda x: x.mean((2, 3)),
    "sum": lambda x: x.sum(1),
    "interpolate_nearest": lambda x: F.interpolate(x, scale_factor=2),
    "interpolate_bilinear": lambda x: F.interpolate(x, (7, 5), mode="bilinear", align_corners=False),
    "upsample_module": nn.Upsample(scale_factor=2, mode="bilinear"),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x, 2),
    "pixel_unshuffle": nn.PixelUnshuffle(2),
    "pad": lambda x: F.pad(x, (1, 2, 0, 1)),
    "pad_reflect": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "pad_module": nn.ZeroPad2d(1),
    "cat": lambda x: torch.cat([x, 2 * x[:, :2]], 1),
    "stack": lambda x: torch.stack([x, -x], 1),
    "split": lambda x: torch.cat(x.split(2, 1)[::-1], 1),
    "slice": lambda x: x[:, :, ::2, 1:],
    # (nn.ChannelShuffle has no derivative before torch 2.6)
    "shuffle": nn.ChannelShuffle(2) if hasattr(torch.compiler, "set_stance") else lambda x: x[:, [0, 2, 1, 3]],
    "unfold": lambda x: F.unfold(x, 2),
    "fold": lambda x: F.fold(F.unfold(x, 2), (4, 4), 2),
    "add": lambda x: x[:, :2] + x[:, 2:],
    "add_in_place": lambda x: x.clone().add_(x.flip(1)),
    "augmented": lambda x: _augmented(x),
    "matrix": lambda x: x @ numbers(4, 3),
    "matrix_from_the_left": lambda x: numbers(3, 4) @ x,
    "einsum_with_a_constant": lambda x: torch.einsum("bchw,ck->bkhw", x, numbers(4, 3)),
}


def _augmented(x):
    out = x.flip(2).clone()
    out += x
    out -= 0.5 * x.flip(3)
    return out


@pytest.mark.parametrize("name", LINEAR)
def test_linear_functions_share_in_proportion_to_contributions(name):
    x = numbers(1, 4, 4, 4)
    y = LINEAR[name](x.clone())
    r = numbers(*y.shape, seed=8)
    r = torch.where(y == 0, 0.0, r)
    found, kept = explain(lambda x: LINEAR[name](x), x, r)
    close(found, lrp_0(jacobian(LINEAR[name], x), x, y, r), 1e-10)
    close(kept, torch.zeros(1, dtype=torch.float64), 1e-9)


@pytest.mark.parametrize("pool", [F.max_pool2d, nn.MaxPool2d(2), lambda x, _=2: F.adaptive_max_pool2d(x, 2)])
def test_winner_of_a_window_takes_all(pool):
    x, r = numbers(2, 3, 4, 4), numbers(2, 3, 2, 2, seed=8)
    found, _ = explain(lambda x: pool(x, 2) if pool is F.max_pool2d else pool(x), x, r)
    _, where = F.max_pool2d(x, 2, return_indices=True)
    close(found, F.max_unpool2d(r, where, 2))


def centring(n):
    return torch.eye(n, dtype=torch.float64) - 1 / n


#: Function of (x, weight, bias), matrix over (features, positions) of one sample if the statistics are constant.
WEIGHT, BIAS = numbers(6, seed=1), numbers(6, seed=2)


def norm_cases():
    x = numbers(1, 6, 4, seed=3)
    flat = x.flatten()
    by_position = torch.eye(4, dtype=torch.float64)

    def layer(t):
        return F.layer_norm(t.mT, (6,), WEIGHT, BIAS, 1e-3).mT

    sigma = (x.var(1, unbiased=False) + 1e-3).sqrt()[0]
    matrix = torch.einsum("ij,pq,q->ipjq", WEIGHT.diag() @ centring(6), by_position, 1 / sigma).reshape(24, 24)
    yield "layer_norm", layer, x, matrix
    yield "layer_norm_in_words", lambda t: F.layer_norm(input=t.mT, normalized_shape=(6,), weight=WEIGHT, bias=BIAS,
                                                        eps=1e-3).mT, x, matrix  # fmt: skip

    sigma = (flat.var(unbiased=False) + 1e-3).sqrt()
    weight, bias = (each[:, None].expand(6, 4) for each in (WEIGHT, BIAS))
    whole = WEIGHT.repeat_interleave(4).diag() @ centring(24) / sigma
    yield "layer_norm_of_two_axes", lambda t: F.layer_norm(t, (6, 4), weight, bias, 1e-3), x, whole

    def rms(t):
        return F.rms_norm(t.mT, (6,), WEIGHT, 1e-3).mT

    root = (x.square().mean(1) + 1e-3).sqrt()[0]
    yield "rms_norm", rms, x, torch.einsum("ij,pq,q->ipjq", WEIGHT.diag(), by_position, 1 / root).reshape(24, 24)

    def group(t, groups):
        return F.group_norm(t, groups, WEIGHT, BIAS, 1e-3)

    for name, groups in (("group_norm", 2), ("instance_norm", 6)):
        blocks = flat.reshape(groups, -1)
        sigma = (blocks.var(1, unbiased=False) + 1e-3).sqrt()
        inner = torch.block_diag(*(centring(24 // groups) / s for s in sigma))
        outer = WEIGHT.repeat_interleave(4).diag()
        if name == "group_norm":
            yield name, lambda t: group(t, 2), x, outer @ inner
        else:
            yield name, lambda t: F.instance_norm(t, None, None, WEIGHT, BIAS, True, 0.1, 1e-3), x, outer @ inner
    running = numbers(6, seed=4), numbers(6, seed=5).square() + 0.5
    diagonal = (WEIGHT / (running[1] + 1e-3).sqrt()).repeat_interleave(4).diag()
    yield "instance_norm_running", lambda t: F.instance_norm(t, *running, WEIGHT, BIAS, False, 0.1, 1e-3), x, diagonal


NORMS = {name: case for name, *case in norm_cases()}


@pytest.mark.parametrize("name", NORMS)
def test_normalizations_are_linear_with_their_statistics_held_constant(name):
    function, x, matrix = NORMS[name]
    y = function(x)
    r = numbers(*y.shape, seed=8)
    constant = y.flatten() - matrix @ x.flatten()
    expected = lrp_0(matrix, x, y, r)
    found, kept = explain(lambda x: function(x), x, r)
    close(found, expected, 1e-10)
    close(kept, (constant * (r / y).flatten()).sum()[None], 1e-10)


@pytest.mark.parametrize("name", NORMS)
def test_biases_of_normalizations_that_count_as_zero_go_to_the_input_at_their_place(name):
    function, x, matrix = NORMS[name]
    y = function(x)
    r = numbers(*x.shape, seed=8)
    constant = y - (matrix @ x.flatten()).reshape(x.shape)
    found, kept = explain(lambda x: function(x), x, r, lrp(zero_params="bias"))
    close(found, lrp_0(matrix, x, y, r) + constant * r / y, 1e-10)
    close(kept, torch.zeros(1, dtype=torch.float64), 1e-10)


class Modules(nn.Module):
    def __init__(self):
        super().__init__()
        self.norms = nn.Sequential(nn.GroupNorm(2, 6), nn.InstanceNorm1d(6, affine=True), nn.BatchNorm1d(6))

    def forward(self, x):
        return self.norms(x)


def test_modules_of_normalizations_conserve():
    x, r = numbers(2, 6, 5), numbers(2, 6, 5, seed=8)
    found, kept = explain(lambda x, norms: norms(x), x, r, lrp(zero_params="bias"), norms=Modules().norms)
    close(found.sum((1, 2)) + kept, r.sum((1, 2)), 1e-9)


#: Products of a signal, the first half of the channels, and a gate made of the second half.
GATED = {
    "times": lambda s, g: s * g,
    "the_other_way_round": lambda s, g: g * s,
    "in_place": lambda s, g: s.mul_(g),
    "augmented": lambda s, g: _times(s, g),
    "in_words": lambda s, g: torch.mul(input=s, other=g),
    "multiply": torch.multiply,
    "expanded": lambda s, g: s * g.expand_as(s) if g.shape != s.shape else s * g.clone(),
}
GATES = {
    "broadcast": lambda g: g.mean((2, 3), keepdim=True),
    "spatial": lambda g: g.mean(1, keepdim=True),
    "squeezed": lambda g: torch.sigmoid(g.mean((2, 3), keepdim=True)),
    "sigmoid": torch.sigmoid,
    "sigmoid_in_place": lambda g: g.clone().sigmoid_(),
    "hardsigmoid_in_place": lambda g: F.hardsigmoid(g.clone(), inplace=True),
    "sigmoid_transposed": lambda g: g.mT.sigmoid().mT,
}


def _times(s, g):
    s = s.clone()
    s *= g
    return s


@pytest.mark.parametrize("product", GATED)
@pytest.mark.parametrize("gate", GATES)
def test_signal_takes_all_or_each_half(product, gate):
    x, r = numbers(2, 6, 4, 4), numbers(2, 3, 4, 4, seed=8)

    def function(x):
        signal, below = x.chunk(2, 1)
        return GATED[product](signal.clone(), GATES[gate](below))

    found, _ = explain(function, x, r)
    close(found, torch.cat([r, torch.zeros_like(r)], 1))
    halves, _ = explain(function, x, r, lrp(gates="split"))
    close(halves[:, :3], r / 2)
    close(halves[:, 3:].sum((1, 2, 3)), r.sum((1, 2, 3)) / 2, 1e-9)


def test_factors_of_which_none_is_a_gate_share():
    x, r = numbers(2, 6, 4, 4), numbers(2, 3, 4, 4, seed=8)
    for gates in ("signal", "split"):
        found, _ = explain(lambda x: x[:, :3] * x[:, 3:], x, r, lrp(gates=gates))
        close(found, torch.cat([r, r], 1) / 2)
    two = explain(lambda x: x[:, :3].sigmoid() * x[:, 3:].sigmoid(), x, r)[0]  # each looks like a gate
    close(two, torch.cat([r, r], 1) / 2)
    outer, _ = explain(lambda x: x[:, :3, :1] * x[:, 3:, :, :1], x, r)
    close(outer.sum((1, 2, 3)), r.sum((1, 2, 3)), 1e-9)
    close(outer[:, :3, 0], r.sum(2) / 2)


def test_products_of_three():
    x, r = numbers(2, 9, 4, 4), numbers(2, 3, 4, 4, seed=8)
    zero = torch.zeros_like(r)

    def function(x):
        s, g, h = x.chunk(3, 1)
        return s * g.sigmoid() * h.mean((2, 3), keepdim=True)

    close(explain(function, x, r)[0], torch.cat([r, zero, zero], 1))
    halves = explain(function, x, r, lrp(gates="split"))[0]
    close(halves[:, :6], torch.cat([r / 4, r / 4], 1))
    close(halves.sum((1, 2, 3)), r.sum((1, 2, 3)), 1e-9)


@pytest.mark.parametrize("gates", ["signal", "split"])
def test_all_factors_of_a_product_along_an_axis_share_alike(gates):
    x, r = numbers(2, 3, 5), numbers(2, 5, seed=8)
    thirds = (r / 3)[:, None].expand(-1, 3, -1)
    close(explain(lambda x: x.prod(1), x, r, lrp(gates=gates))[0], thirds)
    close(explain(lambda x: torch.prod(x, dim=-2, keepdim=True)[:, 0], x, r, lrp(gates=gates))[0], thirds)
    whole = explain(lambda x: x[:1].prod()[None, None], x[:1], r[:1, :1], lrp(gates=gates))[0]
    close(whole, (r[:1, :1] / 15)[..., None].expand(-1, 3, 5))


def test_recorded_gate_is_still_a_gate():
    model = Net(lambda x, gate: x[:, :3] * gate(x[:, 3:]), gate=nn.Sigmoid())
    x = numbers(2, 6, 4, 4)
    attribution = CondAttribution(model.double().eval())
    alone = attribution(x, [{}], lrp(), init_rel=1)
    recorded = attribution(x, [{}], lrp(), init_rel=1, record_layer=["gate"])
    assert torch.equal(alone.heatmap, recorded.heatmap)
    assert not recorded.relevances["gate"].any()


def test_quotients_hold_the_divisor_constant():
    x, r = numbers(2, 6, 4, 4), numbers(2, 3, 4, 4, seed=8)
    zero = torch.zeros_like(r)
    for function in (
        lambda x: x[:, :3] / x[:, 3:],
        lambda x: torch.div(x[:, :3], other=x[:, 3:]),
        lambda x: torch.true_divide(x[:, :3], x[:, 3:]),
        lambda x: x[:, :3].clone().div_(x[:, 3:]),
        lambda x: x[:, :3] / x[:, 3:].flatten(1).norm(dim=1)[:, None, None, None],
    ):
        close(explain(function, x, r)[0], torch.cat([r, zero], 1))


@pytest.mark.parametrize("function", [F.glu, lambda x, dim: nn.GLU(dim)(x), lambda x, dim: F.glu(input=x, dim=dim)])
def test_gated_linear_units(function):
    x, r = numbers(2, 6, 4, 4), numbers(2, 3, 4, 4, seed=8)
    close(explain(lambda x: function(x, dim=1), x, r)[0], torch.cat([r, torch.zeros_like(r)], 1))
    close(explain(lambda x: function(x, dim=1), x, r, lrp(gates="split"))[0], torch.cat([r, r], 1) / 2)


def test_squeeze_and_excitation():
    x, r = numbers(2, 6, 4, 4), numbers(2, 6, 4, 4, seed=8)
    block = SqueezeExcitation(6, 3)
    found, kept = explain(lambda x, block: block(x), x, r, block=block)
    close(found, r)
    close(kept, torch.zeros(2, dtype=torch.float64), 1e-9)
    halves, kept = explain(lambda x, block: block(x), x, r, lrp(gates="split"), block=block)
    close(halves.sum((1, 2, 3)) + kept, r.sum((1, 2, 3)), 1e-9)
    assert not torch.allclose(halves, r / 2)  # the other half came by the gate


#: Models with constants inside, and what these add.
CONSTANTS = {
    "table": (lambda x: x + numbers(3, 4, 4), lambda x: numbers(3, 4, 4).expand_as(x)),
    "number": (lambda x: 1 - x, torch.ones_like),
    "mean": (lambda x: x - numbers(3, 1, 1), lambda x: -numbers(3, 1, 1).expand_as(x)),
    "normalized": (lambda x: (x - 0.4) / 0.2, lambda x: torch.full_like(x, -2)),
    "doubly": (lambda x: x.add(other=numbers(3, 4, 4), alpha=2), lambda x: 2 * numbers(3, 4, 4).expand_as(x)),
    "padding": (lambda x: F.pad(x, (1, 1), value=2.0), lambda x: F.pad(torch.zeros_like(x), (1, 1), value=2.0)),
    "token": (
        lambda x: torch.cat([numbers(1, 1, 4, 4).expand(len(x), 1, 4, 4), x], 1),
        lambda x: F.pad(numbers(1, 1, 4, 4).expand(len(x), 1, 4, 4), (0,) * 5 + (3,)),
    ),
    "stacked": (
        lambda x: torch.stack([x, numbers(3, 4, 4).expand_as(x)], 1).sum(1),
        lambda x: numbers(3, 4, 4).expand_as(x),
    ),
    "filled": (
        lambda x: x.masked_fill(numbers(3, 4, 4) > 0, 3.0),
        lambda x: torch.zeros_like(x).masked_fill(numbers(3, 4, 4) > 0, 3.0),
    ),
    "filled_in_place": (
        lambda x: x.masked_fill_(numbers(3, 4, 4) > 0, 3.0),
        lambda x: torch.zeros_like(x).masked_fill(numbers(3, 4, 4) > 0, 3.0),
    ),
    "where": (
        lambda x: torch.where(numbers(3, 4, 4) > 0, x, 5.0),
        lambda x: torch.where(numbers(3, 4, 4) > 0, torch.zeros_like(x), 5.0),
    ),
    "maximum": (
        lambda x: torch.maximum(x, numbers(3, 4, 4, seed=9)),
        lambda x: torch.where(x > numbers(3, 4, 4, seed=9), 0.0, numbers(3, 4, 4, seed=9)),
    ),
    "frozen_batch_norm": (lambda x, norm: norm(x), lambda x: torch.full_like(x, 0.5)),
    "addmm": (
        lambda x: torch.addmm(numbers(48), x.flatten(1), numbers(48, 48, seed=9)).reshape(x.shape),
        lambda x: numbers(48).expand(2, 48).reshape(x.shape),
    ),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_keep_their_share(name):
    x = numbers(2, 3, 4, 4)
    function, constant = CONSTANTS[name]
    norm = FrozenBatchNorm2d(3, eps=0.0)
    norm.bias.fill_(0.5)
    modules = {"norm": norm} if "batch_norm" in name else {}
    y = function(x.clone(), **modules)
    r = numbers(*y.shape, seed=8)
    found, kept = explain(function, x, r, lrp(canonizers=None), **modules)
    close(kept, (constant(x) * r / y).flatten(1).sum(1), 1e-9)
    close(found.flatten(1).sum(1) + kept, r.flatten(1).sum(1), 1e-9)


#: Distances to four points.
DISTANCES = {
    "pairwise_distance": lambda x, points: F.pairwise_distance(x[:, None], points[None], eps=0.0),
    "module": lambda x, points: nn.PairwiseDistance(eps=0.0)(x[:, None], points),
    "cdist": torch.cdist,
}


@pytest.mark.parametrize("name", DISTANCES)
def test_distances_are_norms_of_differences(name):
    x, points, r = numbers(3, 6), numbers(4, 6, seed=2), numbers(3, 4, seed=1)
    found, _ = explain(lambda x: DISTANCES[name](x, points), x, r)
    wanted, _ = explain(lambda x: (x[:, None] - points).norm(dim=-1), x, r)
    close(found, wanted)


def test_what_has_no_rule_is_named_once_with_its_module():
    class Inner(nn.Module):
        def forward(self, x):
            return torch.atan2(x, x).logcumsumexp(1)[:, -1]

    model = Net(lambda x, inner: inner(x), inner=Inner())
    x = numbers(2, 6)
    wanted = re.escape("LRP has no rule for atan2() in 'inner', logcumsumexp() in 'inner'; the ordinary")
    with pytest.warns(UserWarning, match=wanted) as caught:
        CondAttribution(model.double().eval())(x[:, :, None], [{}], lrp(), init_rel=1)
    assert len(caught) == 1


#: Products of matrices, and how many operands there are whose parts are alike.
PRODUCTS = {
    "matmul": (lambda x: x @ x.mT, 2),
    "bmm": (lambda x: torch.bmm(x, x.mT), 2),
    "einsum": (lambda x: torch.einsum("bij,bkj->bik", x, x), 2),
    "einsum_of_three": (lambda x: torch.einsum("bij,bkj,bkl->bil", x, x, x), 3),
    "einsum_of_a_list": (lambda x: torch.einsum("bij,bkj->bik", [x, x]), 2),
    "baddbmm": (lambda x: torch.baddbmm(numbers(1, 3, 3), x, x.mT), 2),
    "addmm": (lambda x: torch.addmm(numbers(3, 3), x[0], mat2=x[0], beta=2, alpha=3)[None], 2),
    "bilinear": (lambda x: F.bilinear(x, x, numbers(2, 3, 3), numbers(2)), 2),
    "outer": (lambda x: torch.outer(x[0, 0], x[0, 1])[None], 2),
    "ger": (lambda x: torch.ger(x[0, 0], x[0, 1])[None], 2),
    "ger_of_a_constant": (lambda x: torch.ger(numbers(3), x[0, 1])[None], 1),
    "kron": (lambda x: torch.kron(x, x), 2),
    "kron_of_a_constant": (lambda x: torch.kron(x, numbers(1, 2, 1)), 1),
    "addr": (lambda x: torch.addr(numbers(3, 3), x[0, 0], x[0, 1])[None], 2),
    "chain": (lambda x: torch.linalg.multi_dot([x[0], x[0].mT, x[0]])[None], 3),
    "weights_of_the_input": (lambda x: F.linear(x, x[0], numbers(3)), 2),
}


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("attention", ["constant", "split"])
def test_operands_of_a_product_share_alike_and_what_is_added_keeps(name, attention):
    function, n = PRODUCTS[name]
    x = numbers(1, 3, 3)
    y = function(x)
    r = numbers(*y.shape, seed=8)
    found, kept = explain(function, x, r, lrp(attention=attention))
    matrix = jacobian(function, x)
    close(found, lrp_0(matrix, x, y, r) / n, 1e-10)
    constant = y.flatten() - matrix @ x.flatten() / n
    close(kept, (constant * (r / y).flatten()).sum()[None], 1e-9)


@pytest.mark.parametrize("preset", [DeepTaylor, ExcitationBackprop])
@pytest.mark.parametrize("name", ["matmul", "einsum", "baddbmm", "bilinear", "outer"])
def test_methods_without_a_rule_for_products_refuse_them_by_name(name, preset, untouched):
    function = PRODUCTS[name][0]

    class Inner(nn.Module):
        def forward(self, x):
            return function(self.dense(x))

        def __init__(self):
            super().__init__()
            self.dense = nn.Linear(3, 3)

    model = Net(lambda x, inner: inner(x), inner=Inner()).double().eval()
    message = re.escape(f"{preset.__name__} has no rule for {name}() in 'inner'; give one in layer_map, or None")
    with untouched(model), pytest.raises(NotImplementedError, match=message):
        CondAttribution(model)(numbers(1, 3, 3), [{}], preset(), init_rel=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        named = preset(layer_map=[(getattr(torch, name, getattr(F, name, None)), None)])
        assert CondAttribution(model)(numbers(1, 3, 3), [{}], named, init_rel=1).heatmap.isfinite().all()


def test_two_operands_of_an_elementwise_function_are_refused(untouched):
    model = Net(lambda x: torch.pow(x[:, :3], x[:, 3:])).double().eval()
    with untouched(model), pytest.raises(NotImplementedError, match="Pass treats functions of one input; pow"):
        CondAttribution(model)(numbers(1, 6, 2).abs(), [{}], lrp(), init_rel=1)


CONDITIONAL = {
    "layer_norm": lambda x, w: F.layer_norm(x, (6,), w[0]),
    "rms_norm": lambda x, w: F.rms_norm(x, (6,), w[0]),
    "group_norm": lambda x, w: F.group_norm(x, 2, w[0]),
    "instance_norm": lambda x, w: F.instance_norm(x[..., None].expand(-1, -1, 4), weight=w[0]),
    "prelu": lambda x, w: F.prelu(x, w[0]),
}


@pytest.mark.parametrize("name", CONDITIONAL)
def test_parameters_that_are_made_of_the_input_are_refused_by_name(name, untouched):
    """As a conditional norm would have them; written as a product of its own, such a parameter is a gate."""
    model = Net(lambda x, made: CONDITIONAL[name](x, made(x)), made=nn.Linear(6, 6)).double().eval()
    with untouched(model), pytest.raises(NotImplementedError, match=rf"\w+ (treats|has no rule for).*{name}\(\)"):
        CondAttribution(model)(numbers(1, 6), [{}], lrp(), init_rel=1)


@pytest.mark.parametrize("preset", [LRP, AttnLRP, DeepTaylor, ExcitationBackprop])
def test_a_grid_that_is_made_of_the_input_is_held_constant(preset):
    """As an index is: the picture that is sampled takes all, as in a spatial transformer."""
    composite = preset(layer_map=[(nn.Linear, LRP0())])

    def warped(x, made):
        theta = made(x.flatten(1).detach() if made.is_apart else x.flatten(1))
        grid = theta.reshape(-1, 4, 4, 2).tanh()
        return (
            F.grid_sample(x, grid, align_corners=False)
            if made.is_by_place
            else F.grid_sample(input=x, grid=grid, align_corners=False)
        )

    torch.manual_seed(0)
    for is_by_place in (True, False):
        found = {}
        for is_apart in (True, False):
            made = nn.Linear(48, 32)
            nn.init.normal_(made.weight, generator=torch.Generator().manual_seed(2))
            nn.init.zeros_(made.bias)
            made.is_apart, made.is_by_place = is_apart, is_by_place
            found[is_apart], kept = explain(
                warped, numbers(2, 3, 4, 4), numbers(2, 3, 4, 4, seed=8), composite, made=made
            )
            assert kept.abs().max() <= 1e-11
        close(found[False], found[True])


def test_of_a_constant_picture_all_relevance_of_samples_is_kept():
    picture = numbers(1, 3, 4, 4)
    found, kept = explain(
        lambda x: F.grid_sample(picture, x.tanh(), align_corners=False),
        numbers(1, 4, 4, 2),
        numbers(1, 3, 4, 4, seed=8),
    )
    assert not found.any()
    close(kept, numbers(1, 3, 4, 4, seed=8).sum()[None])


SOLVERS = {
    "solve": torch.linalg.solve,
    "solve_by_name": lambda a, b: torch.linalg.solve(A=a, B=b),
    "lower": lambda a, b: torch.linalg.solve_triangular(a.tril(), b, upper=False),
}


@pytest.mark.parametrize("solve", SOLVERS.values(), ids=SOLVERS)
def test_the_matrix_of_equations_is_held_constant(solve):
    x, r = numbers(2, 3, 3) + 3 * torch.eye(3), numbers(2, 3, 2, seed=8)
    made = nn.Linear(3, 2, bias=False)
    right = made.double().weight.detach().T
    found, kept = explain(lambda x, made: solve(x, made(x)), x, r, made=made)
    held = x if solve is not SOLVERS["lower"] else x.tril()
    y = torch.linalg.solve(held, x @ right)
    close(found, x * (torch.linalg.inv(held).mT @ (r / y) @ right.T))
    assert kept.abs().max() <= 1e-11
    found, kept = explain(lambda x: solve(x, right.expand(2, 3, 2)), x, r)
    y = torch.linalg.solve(held, right)
    close(found, held * (torch.linalg.inv(held).mT @ (r / y) @ y.mT))
    close(found.sum((1, 2)), r.sum((1, 2)))
    assert kept.abs().max() <= 1e-11
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        explain(lambda x: solve(torch.eye(3, dtype=x.dtype) * 2, x), x, numbers(2, 3, 3, seed=8))


@pytest.mark.parametrize("zero_params", [None, "bias"])
@pytest.mark.parametrize("kind", [UniformLRP0, partial(UniformEpsilon, epsilon=0.0), AttnLRP, CPLRP, RelP])
def test_by_lrp_0_batch_norm_that_is_not_merged_is_affine(kind, zero_params):
    """One picture, whose gradient arrives as that of tokens does: torch's own kernel then gives a wrong one."""
    norm = nn.BatchNorm2d(3, affine=True)
    for seed, values in enumerate((norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var)):
        values.copy_(numbers(3, seed=seed).abs() + 0.2)
    x, r = numbers(1, 3, 4, 4), numbers(1, 16, 3, seed=8)
    found, _ = explain(
        lambda x, norm: norm(x.relu()).relu().flatten(2).transpose(1, 2), x, r, kind(zero_params=zero_params), norm=norm
    )
    scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).double().view(3, 1, 1).detach()
    shift = (norm.bias - norm.running_mean * scale.flatten()).double().view(3, 1, 1).detach()
    a = x.relu()
    y = a * scale + shift
    arrives = torch.where(y > 0, r.transpose(1, 2).reshape(x.shape), 0.0)
    close(found, arrives * (a * scale / y if zero_params is None else (a > 0)))


def test_steps_hand_nothing_on():
    x, r = numbers(2, 3, 4, 4), numbers(2, 3, 4, 4, seed=8)
    found, _ = explain(lambda x: x - (x.round() - x.floor()) + (x.round() - x.floor()), x, r)
    close(found, r)


def test_gates_of_other_kinds_are_refused():
    for make in (lambda: LRP(gates="both"), lambda: EpsilonPlus(gates="none")):
        with pytest.raises(ValueError, match="gates are held constant"):
            make()
    for make in (lambda: LRP(attention="signal"), lambda: EpsilonPlus(attention=None)):
        with pytest.raises(ValueError, match="attention is held constant"):
            make()
