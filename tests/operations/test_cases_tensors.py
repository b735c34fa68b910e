"""What is known about a tensor and makes things faster must be true of it: changes in place, joins, additions."""

from __future__ import annotations

import pytest
import torch
from core_cases import Maps
from preset_cases import LRP_PRESETS, assert_same_map, maps, numbers, off, seeded
from rule_cases import STABILIZER, form_alpha_beta, form_flat, form_gamma, form_zplus
from torch import nn
from torch.nn import functional as F

from crp.composites import LRP, EpsilonPlus, UniformAlphaBeta, UniformGamma, UniformZPlus
from crp.rules import LRP0, Epsilon, Flat, Gamma

DATA = numbers(3, 6, seed=3)


class Behind(nn.Module):
    """Dense layer, a function of its output, dense layer: (n, 6) -> (n, 3)."""

    def __init__(self, function):
        super().__init__()
        self.lin, self.head, self.function = nn.Linear(6, 6), nn.Linear(6, 3), function

    def forward(self, x):
        return self.head(self.function(self.lin(x)))


def added(y):
    y.add_(2)
    return F.relu(y)


def augmented(y):
    y += 2
    return y.relu()


def added_through_a_view(y):
    y[:, :3].add_(2)
    return torch.relu(y)


def set_item(y):
    y[:, 1] = y[:, 2] + 2
    return F.relu(y)


def filled(y):
    y.masked_fill_(torch.arange(6) > 3, 0.5)
    return F.relu(y)


def filled_by_index(y):
    y[y < 0.3] = 0.5
    return F.relu(y)


def rows_filled_by_index(y):
    z = y.view(3, 2, 3)
    z[z[..., 0] < 0] = -0.5
    return F.relu(y)


def copied(y):
    y.copy_(y.flip(1).clone())
    return F.relu(y)


def scaled(y):
    return F.relu(y.mul_(-1.0))


def turned(y):
    return F.relu(y.neg_())


def out_argument(y):
    with torch.no_grad():
        twice = torch.empty_like(y)
        torch.mul(y.detach(), 2, out=twice)
    return F.relu(y + twice)


def part_in_place(y):
    y[:, :3].relu_()
    return y


def other_branch(y):
    high = F.relu(y)
    return high + 0.5 * y


#: In place, and the same out of place.
IN_PLACE = {
    "added": (added, lambda y: F.relu(y + 2)),
    "augmented": (augmented, lambda y: F.relu(y + 2)),
    "added_through_a_view": (added_through_a_view, lambda y: F.relu(torch.cat([y[:, :3] + 2, y[:, 3:]], 1))),
    "set_item": (set_item, lambda y: F.relu(torch.cat([y[:, :1], y[:, 2:3] + 2, y[:, 2:]], 1))),
    "filled": (filled, lambda y: F.relu(y.masked_fill(torch.arange(6) > 3, 0.5))),
    "filled_by_index": (filled_by_index, lambda y: F.relu(y.masked_fill(y < 0.3, 0.5))),
    "rows_filled_by_index": (
        rows_filled_by_index,
        lambda y: F.relu(y.view(3, 2, 3).masked_fill(y.view(3, 2, 3)[..., :1] < 0, -0.5).view(3, 6)),
    ),
    "copied": (copied, lambda y: F.relu(y.flip(1))),
    "scaled": (scaled, lambda y: F.relu(-y)),
    "turned": (turned, lambda y: F.relu(-y)),
    "relu_in_place": (lambda y: y.relu_(), F.relu),
    "relu_of_a_view": (lambda y: y.view(-1).relu_().view(3, 6), F.relu),
    "part_in_place": (part_in_place, lambda y: torch.cat([F.relu(y[:, :3]), y[:, 3:]], 1)),
    "clamped": (lambda y: y.clamp_(min=0), lambda y: y.clamp(min=0)),
    "threshold": (lambda y: F.threshold_(y, 0.0, 0.0), F.relu),
    "leaky": (lambda y: F.leaky_relu_(y, 0.2), lambda y: F.leaky_relu(y, 0.2)),
}


@pytest.mark.covering(3)
@pytest.mark.parametrize("preset", LRP_PRESETS)
@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_equals_out_of_place(name, preset):
    in_place, out_of_place = (seeded(Behind(function)) for function in IN_PLACE[name])
    assert_same_map(in_place, out_of_place, DATA, LRP_PRESETS[preset](), 1e-12)


#: What may stand behind a layer whose rule would like to know whether a ReLU follows.
FOLLOWED = {
    **{name: pair[0] for name, pair in IN_PLACE.items()},
    "nothing": lambda y: y,
    "relu": F.relu,
    "module": nn.ReLU(),
    "tanh": torch.tanh,
    "out_argument": out_argument,
    "other_branch": other_branch,
    "relu_of_a_part": lambda y: torch.cat([y[:, :3].relu(), y[:, 3:]], 1),
    "relu_of_the_negative": lambda y: F.relu(-y),
    "relu_of_a_sum": lambda y: F.relu(y + 1),
    "two_relus": lambda y: F.relu(y) - F.relu(-y),
    "relu_after_a_view": lambda y: y.view(3, 2, 3).relu().flatten(1),
    "maximum": lambda y: torch.maximum(y, torch.zeros(1).to(y)),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_gamma_is_that_of_the_paper_whatever_follows(name):
    model = seeded(Behind(FOLLOWED[name]))
    for target in range(3):
        composite = UniformGamma(gamma=0.5, stabilizer=STABILIZER)
        result = Maps(model)(DATA, [{"y": target}], composite, record_layer=["lin"])
        w, b = model.lin.weight.detach(), model.lin.bias.detach()
        relevance = _at_output(model, target, name)
        assert off(result.heatmap, form_gamma(DATA, w, b, relevance, 0.5)) <= 1e-9


def _at_output(model, target, name):
    """Relevance of the first layer's output: γ of the head by the formula, the rest by the ordinary chain rule."""
    y = model.lin(DATA).detach()
    leaf = y.clone().requires_grad_()
    h = model.function(leaf.clone())
    w, b = model.head.weight.detach(), model.head.bias.detach()
    start = torch.zeros(3, 3, dtype=h.dtype)
    start[:, target] = model.head(h).detach()[:, target]
    m = torch.where(h == 0, 0.0, form_gamma(h.detach(), w, b, start, 0.5) / h.detach())
    if name == "tanh":
        return h.detach() * m
    (m,) = torch.autograd.grad(h, leaf, m)
    return y * m


class Mixed(nn.Module):
    """Dense layer, a function of its output, a point to look at, dense layer, dense layer."""

    def __init__(self, function):
        super().__init__()
        self.lin, self.mid, self.last, self.head = nn.Linear(6, 6), nn.Identity(), nn.LazyLinear(5), nn.Linear(5, 3)
        self.function = function

    def forward(self, x):
        return self.head(F.relu(self.last(self.mid(self.function(self.lin(x))))))


def set_negative(h):
    h = F.relu(h).clone()
    h[:, 2] = -1.0
    return h


def lowered(h):
    h = F.relu(h).clone()
    h -= 0.5
    return h


def lowered_through_a_view(h):
    h = F.relu(h).clone()
    h.view(-1)[::2].sub_(1.0)
    return h


def joined_by_copy(h):
    out = torch.zeros(3, 12, dtype=h.dtype)
    out[:, :6] = h.relu()
    out[:, 6:] = h
    return out


#: What looks as if it were not negative; where the first is true, it is not.
SIGNS = {
    "cat": lambda h: torch.cat([h.relu(), h], 1),
    "cat_behind": lambda h: torch.cat([h, h.relu()], 1),
    "concatenate_in_words": lambda h: torch.concatenate(tensors=[h.relu(), h], dim=1),
    "stack": lambda h: torch.stack([h.relu(), h], 2).flatten(1),
    "hstack": lambda h: torch.hstack((h.relu(), h)),
    "copied": joined_by_copy,
    "padded": lambda h: F.pad(h.relu(), (1, 1), value=-1.0),
    "added": lambda h: h.relu() + h,
    "lowered": lambda h: h.relu() - 0.5,
    "lowered_in_place": lowered,
    "lowered_through_a_view": lowered_through_a_view,
    "set_negative": set_negative,
    "difference": lambda h: h.relu() - h.flip(1).relu(),
    "negative": lambda h: -h.relu(),
    "scaled": lambda h: h.relu() * torch.linspace(-1, 1, 6).to(h),
    "scaled_by_a_number": lambda h: h.relu() * -2.0,
    "divided": lambda h: h.relu() / -2.0,
    "where": lambda h: torch.where(torch.arange(6) > 2, h.relu(), h),
    "filled": lambda h: h.relu().masked_fill(torch.arange(6) > 3, -0.7),
    "minimum": lambda h: torch.minimum(h.relu(), -h.relu().flip(1)),
    "lerp": lambda h: torch.lerp(h.relu(), h, 0.5),
    "centred": lambda h: h.relu() - h.relu().mean(1, keepdim=True),
    "layer_norm": lambda h: F.layer_norm(h.relu(), (6,)),
    "matmul": lambda h: h.relu() @ numbers(6, 6),
    "index_add": lambda h: h.relu().index_add(1, torch.arange(6), -torch.ones(3, 6).to(h)),
    "leaky": lambda h: F.leaky_relu(h, 0.5),
    "gelu": F.gelu,
    "relu": F.relu,
    "relu_sum": lambda h: h.relu() + h.flip(1).relu(),
    "relu_pooled": lambda h: F.max_pool1d(h.relu()[:, None], 2)[:, 0],
    "relu_cat": lambda h: torch.cat([h.relu(), h.flip(1).relu()], 1),
    "relu_view": lambda h: h.view(3, 2, 3).relu().transpose(1, 2).flatten(1),
    "sigmoid": torch.sigmoid,
    "square": lambda h: h**2,
}


@pytest.mark.parametrize("name", SIGNS)
@pytest.mark.parametrize(
    ("composite", "form"),
    [
        (UniformZPlus(stabilizer=STABILIZER), form_zplus),
        (UniformAlphaBeta(stabilizer=STABILIZER), lambda *args: form_alpha_beta(*args, 2, 1)),
        (UniformGamma(gamma=0.5, stabilizer=STABILIZER), lambda *args: form_gamma(*args, 0.5)),
    ],
    ids=["zplus", "alpha_beta", "gamma"],
)
def test_inputs_of_both_signs_are_treated_as_such(name, composite, form):
    model = Mixed(SIGNS[name]).double()
    model(DATA)
    result = Maps(seeded(model))(DATA, [{"y": [0, 1, 2]}], composite, record_layer=["mid", "last"])
    w, b = model.last.weight.detach(), model.last.bias.detach()
    wanted = form(result.activations["mid"], w, b, result.relevances["last"])
    assert wanted.abs().max() > 0
    assert off(result.relevances["mid"], wanted) <= 1e-9


#: Sums and joins of the input and of what is made of it; none is the input.
JOINED = {
    "sum": lambda x, h: x + h,
    "sum_behind": lambda x, h: torch.add(h, x),
    "in_place": lambda x, h: h.add_(x),
    "augmented": lambda x, h: _augmented(x, h),
    "scaled": lambda x, h: 0.5 * x + h,
    "difference": lambda x, h: x - h,
    "lerp": lambda x, h: torch.lerp(x, h, 0.3),
    "where": lambda x, h: torch.where(torch.arange(6) > 2, x, h),
    "stacked": lambda x, h: torch.stack([x, h]).sum(0),
    "set_item": lambda x, h: _set(x, h),
}


def _augmented(x, h):
    x = x.clone()
    x += h
    return x


def _set(x, h):
    out = torch.zeros_like(x)
    out[:, :3] = x[:, :3]
    out[:, 3:] = h[:, 3:]
    return out


class Residual(nn.Module):
    """A dense layer that reads a join of the input and of another layer's output."""

    def __init__(self, join):
        super().__init__()
        self.low, self.mid, self.high, self.head = (
            nn.Linear(6, 6, bias=False),
            nn.Identity(),
            nn.Linear(6, 5),
            nn.Linear(5, 3),
        )
        self.join = join

    def forward(self, x):
        return self.head(F.relu(self.high(self.mid(self.join(x, self.low(x))))))


@pytest.mark.parametrize("name", JOINED)
def test_flat_behind_a_join_hands_nothing_to_the_data_directly(name):
    """Flat says what the joined tensor gets, which is shared in proportion to values below."""
    model = seeded(Residual(JOINED[name]))
    rules = [("high", Flat(STABILIZER)), ("low", LRP0()), ("head", Epsilon(STABILIZER))]
    result = Maps(model)(DATA, [{"y": 1}], LRP(layer_map=rules), record_layer=["mid", "high"])
    w, b = model.high.weight.detach(), model.high.bias.detach()
    wanted = form_flat(result.activations["mid"], w, b, result.relevances["high"])
    assert off(result.relevances["mid"], wanted) <= 1e-9
    leaf = DATA.clone().requires_grad_()
    joined = model.join(leaf.clone(), model.low(leaf))
    (m,) = torch.autograd.grad(joined, leaf, wanted / joined.detach())
    assert off(result.heatmap, DATA * m) <= 1e-9


def test_flat_on_the_first_layer_does_hand_relevance_to_the_data():
    model = seeded(Residual(lambda x, h: x))
    result = Maps(model)(
        DATA, [{"y": 1}], LRP(layer_map=[("high", Flat(STABILIZER)), (nn.Linear, Epsilon())]), record_layer=["high"]
    )
    w, b = model.high.weight.detach(), model.high.bias.detach()
    assert off(result.heatmap, form_flat(DATA, w, b, result.relevances["high"])) <= 1e-9
    zero = DATA.clone()
    zero[:, 2] = 0.0
    assert maps(model, zero, LRP(layer_map=[("high", Flat()), (nn.Linear, Epsilon())]))[:, 2].all()


def test_gamma_is_the_same_on_every_call():
    """Nothing in the process remembers what followed a layer."""
    model = seeded(Behind(F.relu))
    first = maps(model, DATA, UniformGamma())
    for _ in range(3):
        assert torch.equal(maps(model, DATA, UniformGamma()), first)
    half = seeded(Behind(F.relu)).to(torch.bfloat16)
    maps_of = [maps(half, DATA.to(torch.bfloat16), EpsilonPlus(layer_map=[(nn.Linear, Gamma())])) for _ in range(3)]
    assert all(torch.equal(found, maps_of[0]) for found in maps_of)
