"""Gates are found wherever a model writes them: a gate held constant is a gate taken out of the graph."""

from __future__ import annotations

import core_cases
import numpy as np
import pytest
import torch
from preset_cases import assert_same_map, numbers, off, seeded
from test_attention import explain, lrp
from torch import nn
from torch.nn import functional as F

from crp.attribution import CondAttribution
from crp.composites import CPLRP, AttnLRP, EpsilonPlus, RelP


class Sigmoid(nn.Module):
    def forward(self, x):
        return x.sigmoid()


class Sharp(nn.Module):
    def forward(self, x):
        return torch.sigmoid(2 * x)


class Squeezed(nn.Module):
    """A module that gates by the squeezed signal alone."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, z, x):
        return self.module(z)


#: Functions of the squeezed signal and of the signal.
GATES = {
    "function": lambda z, x: z.sigmoid(),
    "module of one function": Squeezed(Sigmoid()),
    "module of two functions": Squeezed(Sharp()),
    "softmax": lambda z, x: z.softmax(1),
    "closed by another": lambda z, x: 1 - z.sigmoid(),
    "expand_as": lambda z, x: z.sigmoid().expand_as(x),
    "view_as": lambda z, x: z.sigmoid().flatten(1).view_as(x),
    "reshape_as": lambda z, x: z.sigmoid().flatten(1).reshape_as(x),
    "type_as": lambda z, x: z.sigmoid().type_as(x),
}


class Gated(nn.Module):
    """Squeeze and excitation of maps of one pixel, which gates by their shape cannot be told from."""

    def __init__(self, gate, held):
        super().__init__()
        self.conv1, self.conv2, self.squeeze = nn.Conv2d(3, 6, 2), nn.Conv2d(6, 2, 1), nn.Conv2d(6, 6, 1)
        self.gate, self.held = gate, held

    def forward(self, x):
        x = self.conv1(x)
        gate = self.gate(self.squeeze(x.mean((2, 3), keepdim=True)), x)
        return self.conv2(x * (gate.detach() if self.held else gate)).flatten(1)


@pytest.mark.filterwarnings("ignore:.*has no rule for softmax:UserWarning")
@pytest.mark.parametrize("name", GATES)
def test_gate_is_held_constant(name):
    net = Gated(GATES[name], held=False).double().eval()
    held = Gated(GATES[name], held=True).double().eval()
    held.load_state_dict(net.state_dict())
    data = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    found, expected = (CondAttribution(m)(data, [{"y": 1}], EpsilonPlus()).heatmap for m in (net, held))
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


#: Of activations, and of what else makes one of another.
ACTIVATED = {
    "silu": F.silu,
    "squared relu": lambda z: F.relu(z).square(),
    "power of relu": lambda z: F.relu(z) ** 2,
    "root of softplus": lambda z: F.softplus(z).sqrt(),
    "absolute tanh": lambda z: z.tanh().abs(),
    "shares": lambda z: F.softplus(z) / F.softplus(z).sum(1, keepdim=True),
    "scaled": lambda z: 2.0 * F.gelu(z),
}


@pytest.mark.parametrize("name", ACTIVATED)
def test_of_two_factors_the_one_that_an_activation_has_made_is_the_gate(name):
    z, x, r = numbers(2, 5), numbers(2, 5, seed=1), numbers(2, 5, seed=2)
    (of_z, of_x), kept = explain(lambda z, x: ACTIVATED[name](z) * x, (z, x), r, lrp("constant"))
    assert not of_z.any() and kept.abs().max() <= 1e-12
    assert off(of_x, torch.where(ACTIVATED[name](z) == 0, 0.0, r)) <= 1e-12


ONE, TWO = torch.ones(1, dtype=torch.float64), torch.full((1,), 2.0, dtype=torch.float64)
#: One over the root mean square.
DIVISORS = {
    "number over": lambda s: 1 / s.sqrt(),
    "constant over": lambda s: ONE / s.sqrt(),
    "method": lambda s: ONE.div(s.sqrt()),
    "keywords": lambda s: torch.div(input=ONE, other=s.sqrt()),
    "reciprocal": lambda s: s.sqrt().reciprocal(),
    "rsqrt": lambda s: s.rsqrt(),
    "power": lambda s: s**-0.5,
    "power of numpy": lambda s: s ** np.float32(-0.5),
    "exponential": lambda s: torch.exp(-torch.log(s) / 2),
    "one over an exponential": lambda s: 1 / torch.exp(torch.log(s) * 0.5),
}
#: Statistics that are divided by something, and are none of these.
DIVIDED = {
    "number": lambda s: s.sqrt() / 2,
    "constant": lambda s: s.sqrt() / TWO,
    "keywords": lambda s: torch.div(input=s.sqrt(), other=TWO),
    "power": lambda s: s**0.5,
}


@pytest.mark.parametrize("gates", ["signal", "split"])
@pytest.mark.parametrize("name", DIVISORS)
def test_a_broadcast_divisor_is_constant_whatever_becomes_of_gates(name, gates):
    """As in a norm that is written out: the signal takes all relevance of x / sqrt(mean x²)."""

    def norm(x):
        return x * DIVISORS[name](x.square().mean(-1, keepdim=True) + 1e-2)

    x, r = numbers(3, 4), numbers(3, 4, seed=1)
    (found,), kept = explain(norm, (x,), r, lrp("split", gates=gates))
    assert off(found, r) <= 1e-12 and kept.abs().max() <= 1e-12


@pytest.mark.parametrize("name", DIVIDED)
def test_a_statistic_that_is_divided_is_a_factor_like_others(name):
    """Half of x * sqrt(mean x²) is the signal's; the other half is what each entry has of the sum of squares."""

    def product(x):
        return x * DIVIDED[name](x.square().mean(-1, keepdim=True))

    x, r = numbers(3, 4), numbers(3, 4, seed=1)
    (found,), _ = explain(product, (x,), r, lrp("split", gates="split"))
    shares = x.square() / x.square().sum(-1, keepdim=True)
    assert off(found, r / 2 + shares * r.sum(-1, keepdim=True) / 2) <= 1e-12


ZERO = torch.zeros(1, dtype=torch.float64)
#: Activations, and how else they are written.
ACTIVATIONS = {
    F.relu: {
        "mask": lambda z: z * (z > 0),
        "mask_of_numbers": lambda z: z * (z > 0).to(z),
        "rest_of_a_mask": lambda z: z * (1 - (z <= 0).double()),
        "two_masks": lambda z: z * ((z > 0) * (z > -1)),
        "sign": lambda z: z * (1 + z.sign()) / 2,
        "where": lambda z: torch.where(z > 0, z, ZERO),
        "masked": lambda z: z.masked_fill(z < 0, 0),
        "step": lambda z: z * torch.heaviside(z, z.new_zeros(())),
        "mask_of_integers": lambda z: z * (z > 0).int(),
        "stack": lambda z: torch.stack([z, torch.zeros_like(z)]).amax(0),
        "largest_of_a_stack": lambda z: torch.stack([torch.zeros_like(z), z], -1).max(-1).values,
        "root": lambda z: (z + (z * z).sqrt()) / 2,
    },
    torch.abs: {
        "maximum": lambda z: torch.maximum(z, -z),
        "two_relus": lambda z: F.relu(z) + F.relu(-z),
        "where": lambda z: torch.where(z > 0, z, -z),
    },
    F.leaky_relu: {
        "maximum": lambda z: torch.maximum(z, 0.01 * z),
        "two_relus": lambda z: F.relu(z) - 0.01 * F.relu(-z),
        "clamp": lambda z: z.clamp(min=0) + 0.01 * z.clamp(max=0),
        "where": lambda z: torch.where(z > 0, z, 0.01 * z),
    },
    F.elu: {
        "where": lambda z: torch.where(z > 0, z, torch.exp(z) - 1),
        "two_parts": lambda z: F.relu(z) + torch.expm1(z.clamp(max=0)),
    },
    F.gelu: {"two_halves": lambda z: z / 2 + z / 2 * torch.erf(z / 2**0.5)},
    F.silu: {"rest": lambda z: z - z * torch.sigmoid(-z)},
    F.tanhshrink: {"difference": lambda z: z - z.tanh()},
    F.softplus: {"log": lambda z: torch.log(1 + z.exp()), "two": lambda z: F.relu(z) + torch.log1p((-z.abs()).exp())},
    torch.square: {"product_of_copies": lambda z: z * z.clone()},
}
#: Products of features h of shape (n, 4, 3) and squeezed z of shape (n, 4); and the same by ``*``.
WRITTEN_PRODUCTS = {
    "einsum": (lambda h, z: torch.einsum("ncx,nc->ncx", h, z.sigmoid()), lambda h, z: h * z.sigmoid()[..., None]),
    "einsum_turned": (
        lambda h, z: torch.einsum("nc,ncx->xnc", F.gelu(z), h).permute(1, 2, 0),
        lambda h, z: F.gelu(z)[..., None] * h,
    ),
    "einsum_of_a_list": (
        lambda h, z: torch.einsum("nc, nxc -> nxc", [z.sigmoid(), h.mT]).mT,
        lambda h, z: h * z.sigmoid()[..., None],
    ),
    "silu": (
        lambda h, z: h.mean(2) * (z * z.sigmoid()),
        lambda h, z: h.mean(2) * F.silu(z),
    ),
    "gelu": (
        lambda h, z: (0.5 * z * (1 + torch.erf(z / 2**0.5))) * h.mean(2),
        lambda h, z: F.gelu(z) * h.mean(2),
    ),
    "by_a_divisor": (
        lambda h, z: h.mean(2) / (1 + torch.exp(-z)),
        lambda h, z: h.mean(2) * z.sigmoid(),
    ),
    "by_an_exponential": (
        lambda h, z: h.mean(2) / torch.exp(z / 2),
        lambda h, z: h.mean(2) * torch.exp(-z / 2),
    ),
    "divided": (
        lambda h, z: z / (1 + torch.exp(-z)) * h.mean(2),
        lambda h, z: F.silu(z) * h.mean(2),
    ),
}


WRITTEN_PRODUCTS |= {
    f"{plain.__name__}_{name}": tuple(lambda h, z, f=f: h.mean(2) * f(z) for f in (other, plain))
    for plain, others in ACTIVATIONS.items()
    for name, other in others.items()
}


@pytest.mark.parametrize("kind", [EpsilonPlus, CPLRP, RelP, AttnLRP])
@pytest.mark.parametrize("name", WRITTEN_PRODUCTS)
def test_gates_of_products_that_are_written_in_other_ways(name, kind):
    def between(function):
        def wiring(s, x):
            h = F.relu(s.up(x)).unflatten(1, (4, 3))
            return s.down(function(h, s.squeeze(h.mean(2))).unflatten(1, (2, -1)).flatten(2).mean(1))

        size = function(torch.ones(1, 4, 3), torch.ones(1, 4)).numel() // 2
        return seeded(core_cases.Net(wiring, up=nn.Linear(6, 12), squeeze=nn.Linear(4, 4), down=nn.Linear(size, 3)))

    assert_same_map(*map(between, WRITTEN_PRODUCTS[name]), numbers(2, 6), kind())


def test_a_gate_on_the_diagonal_of_a_matrix():
    x, z = numbers(2, 4, 3), numbers(2, 4, seed=2)
    r = numbers(2, 4, 3, seed=1)
    found, wanted = (
        explain(function, [x, z], r, lrp("constant"))[0]
        for function in (lambda x, z: torch.diag_embed(z.sigmoid()) @ x, lambda x, z: z.sigmoid()[..., None] * x)
    )
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def resized(mode):
    return lambda g: F.interpolate(g[..., ::2, ::2], size=(4, 4), mode=mode)


EYE = torch.eye(2, 3, dtype=torch.float64)[None].expand(2, -1, -1)
#: What models do with a gate before they multiply by it.
STILL_GATES = {
    "nearest": resized("nearest"),
    "bilinear": resized("bilinear"),
    "bicubic": resized("bicubic"),
    "upsample": lambda g: nn.Upsample(scale_factor=2)(g[..., ::2, ::2]),
    "sampled": lambda g: F.grid_sample(g, F.affine_grid(EYE, g.shape, align_corners=False), align_corners=False),
    "average_pool": lambda g: F.avg_pool2d(g, 3, 1, 1),
    "max_pool": lambda g: F.max_pool2d(g, 3, 1, 1),
    "mean": lambda g: torch.stack([g, g.flip(1)]).mean(0),
    "cut_off": lambda g: g.clamp(1e-3, 1 - 1e-3),
    "at_least": lambda g: torch.clamp_min(g, 0.1),
    "at_most": lambda g: torch.minimum(g, torch.full_like(g, 0.9)),
    "larger": lambda g: torch.maximum(g, g.flip(1)),
    "power": lambda g: g**2,
    "root": lambda g: g.sqrt(),
    "plus": lambda g: 0.5 + g,
    "less_than": lambda g: 1.5 - g,
    "contrast": lambda g: (g - 0.5) * 1.2 + 0.5,
    "sum": lambda g: 0.3 * g + 0.7 * g.flip(1),
    "lerp": lambda g: torch.lerp(g, g.flip(1), 0.3),
    "normalized": lambda g: F.normalize(g, p=1, dim=1),
    "transmitted": lambda g: (1 - g).cumprod(-1),
    "of_one_norm": lambda g: (g - g.amin((2, 3), keepdim=True)) / (g.amax((2, 3), keepdim=True) - g.amin((2, 3), True)),
}


class Multiplied(nn.Module):
    def __init__(self, function, act, held):
        super().__init__()
        self.signal, self.gate, self.head = nn.Conv2d(2, 4, 3, 1, 1), nn.Conv2d(2, 4, 3, 1, 1), nn.Linear(4, 3)
        self.function, self.act, self.held = function, act, held

    def forward(self, x):
        gate = self.function(self.gate(x).sigmoid())
        return self.head((self.act(self.signal(x)) * (gate.detach() if self.held else gate)).mean((2, 3)))


@pytest.mark.filterwarnings("ignore:CPLRP has no rule for cumprod")
@pytest.mark.parametrize("act", [F.relu, nn.Identity()], ids=["relu", "linear"])
@pytest.mark.parametrize("name", STILL_GATES)
def test_what_becomes_of_a_gate_is_one(name, act):
    """Behind a ReLU, the signal counted as the gate, and all relevance went to the gate."""
    net, held = (seeded(Multiplied(STILL_GATES[name], act, is_held)) for is_held in (False, True))
    assert_same_map(net, held, numbers(2, 2, 4, 4, seed=4), CPLRP())


@pytest.mark.parametrize("kind", [CPLRP, RelP, AttnLRP])
@pytest.mark.parametrize(
    "gate", [lambda z: 1 / (1 + torch.exp(-z)), lambda z: (1 + torch.exp(-z)) ** -1], ids=["over", "power"]
)
def test_a_broadcast_gate_that_is_one_over_something_is_a_gate(gate, kind):
    def net(function):
        def wiring(s, x):
            h = F.relu(s.up(x)).unflatten(1, (4, 3))
            return s.down((h * function(s.squeeze(h.mean(2)))[..., None]).flatten(1))

        return seeded(core_cases.Net(wiring, up=nn.Linear(6, 12), squeeze=nn.Linear(4, 4), down=nn.Linear(12, 3)))

    assert_same_map(net(gate), net(torch.sigmoid), numbers(2, 6), kind())


#: Quotients as products.
DIVIDING = {
    "number over": (lambda a, b: a * (1 / b), lambda a, b: a / b),
    "exponential": (
        lambda a, b: a / torch.exp(torch.log(b.square().mean(1, keepdim=True)) / 2),
        lambda a, b: a / b.square().mean(1, keepdim=True).sqrt(),
    ),
    "glu": (lambda a, b: F.glu(1 / torch.cat([b, a], 1), 1), lambda a, b: (1 / a).sigmoid() / b),
    "power": (lambda a, b: b**-1 * a, lambda a, b: a / b),
    "rsqrt": (lambda a, b: a * (b * b + 1).rsqrt(), lambda a, b: a / (b * b + 1).sqrt()),
    "repeated": (
        lambda a, b: a * b.square().mean(1, keepdim=True).rsqrt().repeat(1, 6),
        lambda a, b: a / b.square().mean(1, keepdim=True).sqrt(),
    ),
    "with_a_weight": (
        lambda a, b: a * (b.square().mean(1, keepdim=True).rsqrt() * torch.arange(1.0, 7, dtype=torch.float64)),
        lambda a, b: a / b.square().mean(1, keepdim=True).sqrt() * torch.arange(1.0, 7, dtype=torch.float64),
    ),
    "an inverse that is normalized": (
        lambda a, b: 1 / (a * a + 2) * (1 / (a * a + 2)).square().mean(1, keepdim=True).rsqrt(),
        lambda a, b: 1 / (a * a + 2) / (1 / (a * a + 2)).square().mean(1, keepdim=True).sqrt(),
    ),
}


@pytest.mark.parametrize("kind", [CPLRP, RelP, AttnLRP])
@pytest.mark.parametrize("name", DIVIDING)
def test_a_factor_that_is_one_over_something_is_a_divisor(name, kind):
    def net(function):
        return seeded(core_cases.Net(lambda s, x: s.down(function(s.a(x), s.b(x))), **layers()))

    def layers():
        return {"a": nn.Linear(6, 6), "b": nn.Linear(6, 6), "down": nn.Linear(6, 3)}

    assert_same_map(*map(net, DIVIDING[name]), numbers(3, 6, seed=3), kind())


def test_a_gate_of_an_arc_tangent():
    nets = [seeded(Multiplied(lambda g: 0.5 + torch.atan(g - 0.5) / 3.2, F.relu, is_held)) for is_held in (False, True)]
    assert_same_map(*nets, numbers(2, 2, 4, 4, seed=4), CPLRP())


@pytest.mark.parametrize("kind", [CPLRP, RelP, AttnLRP])
def test_linear_attention_in_one_einsum(kind):
    def net(function):
        def wiring(s, x):
            q, k = F.elu(s.q(x)) + 1, F.elu(s.k(x)) + 1
            return s.down(function(q, k.mT @ s.v(x), q @ k.sum(1)[..., None])).mean(1)

        return seeded(core_cases.Net(wiring, **{name: nn.Linear(6, 6) for name in "qkv"}, down=nn.Linear(6, 3)))

    at_once = net(lambda q, kv, sums: torch.einsum("bid,bdj,bi->bij", q, kv, 1 / sums[..., 0]))
    assert_same_map(at_once, net(lambda q, kv, sums: (q @ kv) / sums), numbers(2, 5, 6), kind())


class Logistic(nn.Module):
    """A sigmoid that a model writes out."""

    def forward(self, z):
        return 1 / (1 + torch.exp(-z))


#: What is made of exponentials, and what it is; beside a ReLU it is the gate if it is bounded.
OF_EXPONENTIALS = {
    "of_a_logarithm": (torch.sigmoid, lambda z: torch.exp(F.logsigmoid(z))),
    "of_a_softplus": (torch.sigmoid, lambda z: torch.exp(-F.softplus(-z))),
    "module": (torch.sigmoid, Logistic()),
    "tanh": (torch.tanh, lambda z: (torch.exp(2 * z) - 1) / (torch.exp(2 * z) + 1)),
    "tanh_by_expm1": (torch.tanh, lambda z: torch.expm1(2 * z) / (torch.expm1(2 * z) + 2)),
    "bell": (lambda z: torch.exp(-(z**2)), lambda z: 1 / torch.exp(z * z)),
    "not_bounded": (lambda z: torch.exp(-z), lambda z: 1 / torch.exp(z)),
}


@pytest.mark.parametrize("kind", [EpsilonPlus, CPLRP, RelP, AttnLRP])
@pytest.mark.parametrize("name", OF_EXPONENTIALS)
def test_gates_that_are_made_of_exponentials(name, kind):
    def net(function):
        layers = {"up": nn.Linear(6, 5), "gate": nn.Linear(6, 5), "down": nn.Linear(5, 3)}
        return seeded(core_cases.Net(lambda s, x: s.down(F.relu(s.up(x)) * function(s.gate(x))), **layers))

    assert_same_map(*map(net, OF_EXPONENTIALS[name]), numbers(3, 6, seed=3), kind())


def test_a_tanh_by_a_sigmoid_is_a_gate():
    x, z, r = numbers(2, 5), numbers(2, 5, seed=1), numbers(2, 5, seed=2)
    (of_x, of_z), _ = explain(lambda x, z: x * (2 * torch.sigmoid(2 * z) - 1), (x, z), r, lrp("constant"))
    assert not of_z.any() and off(of_x, r) <= 1e-12


def chosen(logits):
    return logits.gather(1, logits.topk(2, 1).indices)


def mask_of(weights):
    return torch.zeros_like(weights).scatter(1, weights.topk(2, 1).indices, 1.0)


def masked(weights):
    return weights * mask_of(weights)


#: Weights of all experts of which a router chose some: sigmoids of logits that were chosen before, or chosen by masks.
ROUTERS = {
    "one_hot": lambda logits: logits.softmax(1) * F.one_hot(logits.softmax(1).argmax(1), 4),
    "several_one_hot": lambda logits: logits.softmax(1) * F.one_hot(logits.topk(2, 1).indices, 4).sum(1).to(logits),
    "mask": lambda logits: masked(logits.softmax(1)),
    "mask_of_sigmoids": lambda logits: masked(logits.sigmoid()),
    "divided": lambda logits: masked(logits.softmax(1)) / masked(logits.softmax(1)).sum(1, keepdim=True),
    "filled": lambda logits: logits.softmax(1).masked_fill(mask_of(logits) == 0, 0.0),
    "threshold": lambda logits: torch.where(logits >= logits.kthvalue(3, 1, True).values, logits.softmax(1), 0.0),
    "gathered": lambda logits: torch.zeros_like(logits).scatter(1, logits.topk(2, 1).indices, chosen(logits).sigmoid()),
    "top": lambda logits: torch.zeros_like(logits).scatter(1, logits.topk(2, 1)[1], logits.topk(2, 1)[0].sigmoid()),
    "masked": lambda logits: torch.full_like(logits, -torch.inf).scatter_(1, *logits.topk(2, 1)[::-1]).sigmoid(),
}


@pytest.mark.parametrize("kind", [AttnLRP, CPLRP, RelP])
@pytest.mark.parametrize("name", ROUTERS)
def test_weights_of_chosen_experts_are_held_constant(name, kind):
    class Experts(nn.Module):
        def __init__(self, is_held):
            super().__init__()
            self.is_held, self.router, self.experts = is_held, nn.Linear(6, 4), nn.Linear(6, 20)

        def forward(self, x):
            weights = ROUTERS[name](self.router(x))
            weights = weights.detach() if self.is_held else weights
            return (self.experts(x).reshape(-1, 4, 5) * weights[..., None]).sum(1)

    model, held = seeded(Experts(False)), seeded(Experts(True))
    assert_same_map(model, held, numbers(3, 6), kind())


@pytest.mark.parametrize("kind", [CPLRP, RelP, EpsilonPlus])
@pytest.mark.parametrize("of_gate", [lambda gate: gate[:, :, :], lambda gate: torch.ones_like(gate) - gate])
def test_a_gate_that_was_moved_or_turned_is_one_where_a_zero_is_added(of_gate, kind):
    """As by ``sum(gates)``, which begins with 0."""

    def net(added):
        layers = {name: nn.Linear(6, size) for name, size in (("gate", 6), ("values", 6), ("head", 3))}
        return seeded(
            core_cases.Net(lambda s, x: s.head(added(of_gate(s.gate(x).sigmoid())).mT @ s.values(x)).mean(1), **layers)
        )

    found, wanted = (net(added) for added in (lambda gate: sum([gate]), lambda gate: gate))
    assert_same_map(found, wanted, numbers(2, 4, 6), kind())
