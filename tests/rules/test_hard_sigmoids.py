"""Numbers before and behind an activation are part of it where models write it out, and biases elsewhere."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from preset_cases import LRP_PRESETS, assert_closes, assert_same_map, numbers, off, seeded
from test_attention import explain, lrp
from torch import nn
from torch.nn import functional as F

import crp.composites as composites
from crp.attribution import CondAttribution

PRESETS = LRP_PRESETS | {name: partial(composites.get, name) for name in ("attn_lrp", "relp")}
DATA = numbers(3, 6, seed=3)
ONE = torch.ones(1, dtype=torch.float64)
ZERO, HALF, THREE, SIX = 0 * ONE, ONE / 2, 3 * ONE, torch.tensor(6.0, dtype=torch.float64)


class Net(nn.Module):
    """Dense layers around an activation, and around a product with a gate that it makes."""

    def __init__(self, activation):
        super().__init__()
        self.below, self.gate, self.head, self.activation = (
            nn.Linear(6, 6),
            nn.Linear(6, 6),
            nn.Linear(6, 3),
            activation,
        )

    def forward(self, x):
        h = self.activation(3 * self.below(x))
        return self.head(h * self.activation(5 * self.gate(h)))


class Decomposed(nn.Module):
    """As torchvision's MobileNetV3 was ported to others: a layer inside."""

    def __init__(self):
        super().__init__()
        self.cut = nn.ReLU6(inplace=True)

    def forward(self, a):
        return self.cut(a + 3) / 6


def in_place(a):
    h = a + 3
    F.relu6(h, inplace=True)
    return h.div_(6)


def augmented(a):
    h = 1.0 * a
    h += 3
    h = F.relu6(h, inplace=True)
    h /= 6
    return h


def one_more_softsign(a):
    return 1 + F.softsign(a)


def half_more_softsign(a):
    return F.softsign(a) + 0.5


def snake(a):
    return a + a.sin() ** 2


def one_more_elu(a):
    return F.elu(a) + 1


def shifted_softplus(a):
    return F.softplus(a) - math.log(2)


def log_of_relu(a):
    return torch.log1p(F.relu(a))


#: By the function of torch, how else it is written.
SPELLINGS = {
    F.hardsigmoid: {
        "relu6": lambda a: F.relu6(a + 3) / 6,
        "relu6_in_place": lambda a: F.relu6(3 + a, inplace=True) * (1 / 6),
        "in_place": in_place,
        "all_in_place": lambda a: a.clone().add_(3).clamp_(0, 6).div_(6),
        "augmented": augmented,
        "in_words": lambda a: F.relu6(torch.add(input=a, other=3)) / 6,
        "three_times_one": lambda a: F.relu6(torch.add(a, 1, alpha=3)) / 6,
        "through_views": lambda a: (F.relu6((a + 3).view(-1)[:, None]) / 6).view(a.shape),
        "module": Decomposed(),
        "clamp": lambda a: torch.add(a, 3).clamp(0, 6) / 6,
        "clip": lambda a: torch.clip(a - -3, min=0.0, max=6.0).div(6),
        "hardtanh": lambda a: F.hardtanh(a + 3, min_val=0, max_val=6) / 6,
        "exported": lambda a: (a + 3).clamp(min=0).clamp(max=6) / 6,
        "two_cuts": lambda a: F.relu(a + 3).clamp_max(6) / 6,
        "scaled_before": lambda a: (a * (1 / 6) + 0.5).clamp(0, 1),
        "scaled_behind": lambda a: ((a / 3 + 1) / 2).clamp(0, 1),
        "opposite": lambda a: (0.5 - -a / 6).clamp(0, 1),
        "complement": lambda a: 1 - F.hardsigmoid(-a),
        "complement_of_a_tensor": lambda a: ONE - F.hardsigmoid(-a),
        "complement_in_place": lambda a: F.hardsigmoid(-a).neg_().add_(1),
        "complement_of_relu6": lambda a: 1 - F.relu6(3 - a) / 6,
        "of_hardtanh": lambda a: (F.hardtanh(a / 3) + 1) / 2,
        "of_tensors": lambda a: torch.clamp(a + THREE, ZERO, SIX) / SIX,
        "maximum_and_minimum": lambda a: torch.minimum(torch.maximum(a + 3, ZERO), SIX) / 6,
        "max_and_min": lambda a: torch.min(torch.max(torch.zeros_like(a), a + 3), torch.full_like(a, 6)) / 6,
        "two_relus": lambda a: (F.relu(a + 3) - F.relu(a - 3)) / 6,
        "one_less_relus": lambda a: 1 - F.relu(1 - F.relu(a / 6 + 0.5)),
        "where": lambda a: torch.where(a <= -3, ZERO, torch.where(a >= 3, ONE, (a + 3) / 6)),
        "masked": lambda a: ((a + 3) / 6).masked_fill(a < -3, 0).masked_fill(a > 3, 1),
        "of_a_type": lambda a: F.relu6((a + 3).type_as(a)).to(a) / 6,
        "behind_a_number": lambda a: F.relu6((a + 3 - 3) + 3) / 6,
        "copied": lambda a: ((a + 3).clone().clamp(0, 6)).clone() / 6,
        "of_stacks": lambda a: torch.stack([(a + 3).clamp(min=0), torch.full_like(a, 6)]).amin(0) / 6,
        "of_values_of_a_stack": lambda a: torch.stack([F.relu(a + 3), torch.full_like(a, 6)], 2).min(2).values / 6,
    },
    F.hardtanh: {
        "clamp": lambda a: a.clamp(-1, 1),
        "maximum_and_minimum": lambda a: torch.minimum(torch.maximum(a, -ONE), ONE),
        "distances": lambda a: ((a + 1).abs() - (a - 1).abs()) / 2,
        "where": lambda a: torch.where(a > 1, 1.0, torch.where(a < -1, -ONE, a)),
        "masked": lambda a: a.masked_fill(a > 1, 1).masked_fill(a < -1, -1),
        "sign": lambda a: torch.where(a.abs() > 1, a.sign(), a),
    },
    F.softshrink: {
        "by_sign": lambda a: a.sign() * F.relu(a.abs() - 0.5),
        "by_sign_and_maximum": lambda a: torch.sign(a) * torch.maximum(a.abs() - HALF, ZERO),
        "two_relus": lambda a: F.relu(a - 0.5) - F.relu(-a - 0.5),
        "where": lambda a: torch.where(a > 0.5, a - 0.5, torch.where(a < -0.5, a + 0.5, ZERO)),
        "less_clamp": lambda a: a - a.clamp(-0.5, 0.5),
    },
    F.relu6: {
        "minimum": lambda a: torch.minimum(F.relu(a), SIX),
        "fmin": lambda a: torch.fmin(SIX, F.relu(a)),
        "where": lambda a: torch.where(a > 6, 6.0, torch.where(a < 0, ZERO, a)),
        "difference": lambda a: F.relu(a) - F.relu(a - 6),
        "masks": lambda a: a * ((a > 0) & (a < 6)) + 6 * (a >= 6),
        "rest_of_a_mask": lambda a: a * ~((a <= 0) | (a >= 6)) + 6 * (a >= 6).int(),
        "stacks": lambda a: torch.stack([F.relu(a), torch.full_like(a, 6)]).amin(0),
    },
    shifted_softplus: {"log": lambda a: torch.log(0.5 * a.exp() + 0.5)},
    log_of_relu: {"log": lambda a: torch.log(1 + F.relu(a))},
    snake: {
        "cosine": lambda a: a + (1 - (2 * a).cos()) / 2,
        "cosine_behind_a_number": lambda a: a + 0.5 - (2 * a).cos() / 2,
    },
    torch.asinh: {"logarithm": lambda a: torch.log(a + torch.sqrt(a * a + 1))},
    F.mish: {"by_exp": lambda a: a * ((1 + a.exp()) ** 2 - 1) / ((1 + a.exp()) ** 2 + 1)},
    F.hardswish: {"maximum_and_minimum": lambda a: a * torch.minimum(torch.maximum(a + 3, ZERO), SIX) / 6},
    torch.sigmoid: {"complement_of_by_exp": lambda a: 1 - 1 / (1 + torch.exp(a))},
    torch.tanh: {"by_exp": lambda a: 1 - 2 / (1 + (2 * a).exp())},
    one_more_softsign: {"by_abs": lambda a: 1 + a / (1 + a.abs())},
    half_more_softsign: {"by_abs": lambda a: a / (1 + a.abs()) + 0.5},
}
ORDER = torch.tensor([3, 0, 1, 5, 2, 4])
#: Functions of one tensor by softmax, beside numbers or what else is made of it; and by numbers beside exponentials.
BY_EXPONENTIALS = {
    "one": (torch.sigmoid, lambda a: torch.softmax(torch.stack([a, torch.zeros_like(a)], -1), -1)[..., 0]),
    "rows": (torch.sigmoid, lambda a: torch.vstack([a[None], 0 * a[None]]).softmax(0)[0]),
    "hstack": (torch.sigmoid, lambda a: torch.hstack([a[:, None], 0 * a[:, None]]).softmax(1)[:, 0]),
    "dstack": (torch.sigmoid, lambda a: torch.dstack([a, 0 * a]).softmax(-1)[..., 0]),
    "column_stack": (
        torch.sigmoid,
        lambda a: torch.stack([torch.column_stack([row, 0 * row]).softmax(1)[:, 0] for row in a]),
    ),
    "cat": (torch.sigmoid, lambda a: torch.cat([a[None], 0 * a[None]]).softmax(0)[0]),
    "halves": (torch.sigmoid, lambda a: torch.stack([-a / 2, a / 2]).softmax(0)[1]),
    "columns": (torch.sigmoid, lambda a: torch.cat([a[..., None], ZERO.expand(3, 6, 1)], -1).softmax(-1).select(-1, 0)),
    "padded": (torch.sigmoid, lambda a: F.pad(a[..., None], (1, 0)).softmax(-1)[..., 1]),
    "padded_rows": (torch.sigmoid, lambda a: F.pad(a[:, None], (0, 0, 0, 1), value=0.0).softmax(1)[:, 0]),
    "padded_by_aten": (torch.sigmoid, lambda a: torch.ops.aten.pad(a[None], [0, 0, 0, 0, 0, 1]).softmax(0)[0]),
    "taken_apart": (torch.sigmoid, lambda a: torch.stack([a, 0 * a], 1).softmax(1).unbind(1)[0]),
    "in_chunks": (torch.sigmoid, lambda a: torch.stack([a, 0 * a], 1).softmax(1).chunk(2, 1)[0].squeeze(1)),
    "taken_by_index": (torch.sigmoid, lambda a: torch.stack([a, 0 * a], -1).softmax(-1)[..., ORDER[1:2]].squeeze(-1)),
    "selected": (torch.sigmoid, lambda a: torch.stack([a, 0 * a]).softmax(0).index_select(0, ORDER[1:2])[0]),
    "in_another_order": (lambda a: F.hardsigmoid(a)[:, ORDER], lambda a: F.relu6(a + 3)[:, ORDER] / 6),
    "gathered": (lambda a: F.hardsigmoid(a)[:, ORDER], lambda a: (a + 3).gather(1, ORDER.expand(3, 6)).clamp(0, 6) / 6),
    "moved_exponentials": (
        lambda a: 1 / (a.sigmoid() ** 2 + 2),
        lambda a: 1 / ((1 / (1 + (-a).exp().flatten().view_as(a))) ** 2 + 2),
    ),
    "dropout_in_evaluation": (F.hardsigmoid, lambda a: (F.dropout(F.relu(a + 3), training=False) - F.relu(a - 3)) / 6),
    "rest": (torch.sigmoid, lambda a: 1 - torch.stack([a, 0 * a], 1).softmax(1)[:, 1]),
    "logarithm": (F.logsigmoid, lambda a: torch.stack([a, 0 * a], -1).log_softmax(-1)[..., 0]),
    "one_more_elu": (one_more_elu, lambda a: torch.where(a > 0, a + 1, a.exp())),
    "one_more_elu_in_two_parts": (one_more_elu, lambda a: F.relu(a) + torch.exp(-F.relu(-a))),
    "of_sum": (F.softplus, lambda a: torch.stack([a, ZERO.expand_as(a)]).logsumexp(0)),
}
#: Those that are no gates where gates are held constant.
NO_GATES = {
    "hardtanh_by_relu6": (F.hardtanh, lambda a: F.relu6(3 * a + 3) / 3 - 1),
    "hardtanh_by_hardsigmoid": (F.hardtanh, lambda a: 2 * F.hardsigmoid(3 * a) - 1),
    "tanh_by_sigmoid": (torch.tanh, lambda a: 2 * torch.sigmoid(2 * a) - 1),
}
CASES = {f"{f.__name__}_{name}": (f, spelling) for f, others in SPELLINGS.items() for name, spelling in others.items()}


@pytest.mark.covering(3)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", CASES)
def test_an_activation_is_the_same_however_it_is_written(name, preset):
    plain, spelled = (seeded(Net(activation)) for activation in CASES[name])
    assert_same_map(spelled, plain, DATA, PRESETS[preset]())
    if preset != "contrastive_excitation_backprop":
        assert_closes(spelled, DATA, PRESETS[preset]())


@pytest.mark.parametrize("kind", [composites.EpsilonPlus, composites.CPLRP, composites.AttnLRP, composites.RelP])
@pytest.mark.parametrize("name", BY_EXPONENTIALS)
def test_exponentials_of_one_tensor_beside_numbers_are_an_activation(name, kind):
    plain, spelled = (seeded(Net(activation)) for activation in BY_EXPONENTIALS[name])
    assert_same_map(spelled, plain, DATA, kind())
    assert_closes(spelled, DATA, kind())


#: What is made of exponentials, or of a softmax, before an activation.
OF_EXPONENTIALS = {
    "each": lambda a: a.exp() - 1.5,
    "sum": lambda a: (0.3 * a).exp().sum(-1, keepdim=True).expand(a.shape) - 1,
    "weighted": lambda a: a.exp() @ numbers(6, 6, seed=5),
    "softmax": lambda a: 10 * a.softmax(-1) - 2,
}
#: Activations, and how else they are written.
ACTIVATIONS = {
    "relu6": (F.hardsigmoid, lambda t: F.relu6(t + 3) / 6),
    "clamp": (F.hardsigmoid, lambda t: (t + 3).clamp(0, 6) / 6),
    "two_relus": (F.hardsigmoid, lambda t: (F.relu(t + 3) - F.relu(t - 3)) / 6),
    "difference": (F.relu6, lambda t: F.relu(t) - F.relu(t - 6)),
    "softmax": (torch.sigmoid, lambda t: torch.stack([t, 0 * t]).softmax(0)[0]),
    "of_sum": (F.softplus, lambda t: torch.stack([0 * t, t]).logsumexp(0)),
}


@pytest.mark.parametrize("kind", [composites.EpsilonPlus, composites.AttnLRP, composites.RelP])
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("below", OF_EXPONENTIALS)
def test_an_activation_of_exponentials_is_the_same_however_it_is_written(below, name, kind):
    made = OF_EXPONENTIALS[below]
    plain, spelled = (seeded(Net(lambda a, f=f: f(made(a / 3)))) for f in ACTIVATIONS[name])
    assert_same_map(spelled, plain, DATA, kind())
    assert_closes(spelled, DATA, kind())


#: Functions of a part of a tensor, and the same where it is taken again for each call; a beginning may take it, too.
PARTS = {
    "hardtanh": (F.hardtanh, lambda half: ((half() + 1).abs() - (half() - 1).abs()) / 2),
    "softshrink": (F.softshrink, lambda half: F.relu(half() - 0.5) - F.relu(-half() - 0.5)),
    "silu": (F.silu, lambda half: half() * half().sigmoid()),
    "tanh": (torch.tanh, lambda half: (half().exp() - (-half()).exp()) / (half().exp() + (-half()).exp())),
    "one_more_elu": (one_more_elu, lambda half: torch.where(half() > 0, half() + 1, half().exp())),
}


@pytest.mark.parametrize("kind", [composites.EpsilonPlus, composites.AttnLRP])
@pytest.mark.parametrize("take", [lambda a: a[:, :3], lambda a: a.chunk(2, 1)[0], lambda a: a.view(-1, 2, 3)[:, 0]])
@pytest.mark.parametrize("name", PARTS)
def test_the_same_part_of_a_tensor_may_be_taken_again(name, take, kind):
    plain, spelled = PARTS[name]

    def net(function):
        return seeded(Net(lambda a: torch.cat([function(a), a[:, 3:] * function(a)], 1)))

    model = net(lambda a: spelled(lambda: take(a)))
    assert_same_map(model, net(lambda a: plain(take(a))), DATA, kind())
    assert_closes(model, DATA, kind())


def test_a_part_that_was_overwritten_is_another():
    """Both together are no soft shrinkage, which would be a gate."""

    def function(a):
        h, signal = a.clone(), a[:, 3:]
        above = F.relu(h[:, :3] - 0.5)
        h.mul_(0.1)
        return (above - F.relu(-h[:, :3] - 0.5)) * signal

    a, r = 10 * numbers(4, 6), numbers(4, 3, seed=1)
    (found,), _ = explain(function, [a], r, lrp("split"))
    torch.testing.assert_close(found[:, 3:], torch.where(function(a) == 0, 0, r / 2), rtol=1e-9, atol=1e-12)


def test_what_a_named_layer_copies_inside_of_an_activation_is_refused_through_other_copies_too():
    net = nn.Sequential(nn.Linear(6, 6), Plus(), nn.Identity(), nn.ReLU6(), nn.Linear(6, 3))
    net[2].forward = torch.clone
    with pytest.raises(ValueError, match="makes an activation of numbers before it"):
        CondAttribution(seeded(net))(DATA, [{"y": 1}], composites.UniformLRP0(), record_layer=["1"])


@pytest.mark.parametrize("kind", [composites.AttnLRP, composites.RelP])
@pytest.mark.parametrize("name", NO_GATES)
def test_an_activation_that_is_no_gate_is_the_same_however_it_is_written(name, kind):
    plain, spelled = (seeded(Net(activation)) for activation in NO_GATES[name])
    assert_same_map(spelled, plain, DATA, kind())


def test_a_hard_sigmoid_that_torch_has_exported():
    plain = seeded(Net(F.hardsigmoid))
    exported = torch.export.export(plain, (DATA,)).run_decompositions().module()
    assert_same_map(exported, plain, DATA, composites.AttnLRP())


EACH = torch.linspace(1, 1.5, 6, dtype=torch.float64)
#: Sums with a number that is a bias, and cuts of them.
BIASES = {
    "not_in_the_middle": lambda a: F.relu6(a + 2),
    "one_side": lambda a: (a + 3).clamp(min=0),
    "of_a_bound_per_entry": lambda a: (a + 3).clamp(0 * EACH, 6 * EACH),
    "scaled": lambda a: F.relu6((a + 3) * EACH),
    "a_parameter": lambda a: F.relu6(a + nn.Parameter(3 * ONE)),
}


@pytest.mark.parametrize("name", BIASES)
def test_other_numbers_keep_their_share(name):
    a, r, cut = 2 * numbers(4, 6), numbers(4, 6, seed=1), BIASES[name]
    (found,), _ = explain(cut, [a], r, lrp("split"))
    number = 2 if name == "not_in_the_middle" else 3
    torch.testing.assert_close(found, torch.where(cut(a) == 0, 0, r * a / (a + number)), rtol=1e-9, atol=1e-12)


def test_a_small_number_before_a_logarithm_keeps_its_share():
    """Infinite at minus this number, the logarithm was taken for small at zero."""
    a, r = 0.05 * numbers(4, 6), numbers(4, 6, seed=1)
    (found,), _ = explain(lambda a: torch.log(a.square() + 1e-3), [a], r, lrp("split"))
    torch.testing.assert_close(found, r * a.square() / (a.square() + 1e-3), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("number", [3.0, 3 * ONE], ids=["python", "tensor"])
def test_numbers_are_read_at_each_call(number):
    a, r, shift = 2 * numbers(4, 6), numbers(4, 6, seed=1), [number]

    def function(a):
        return F.relu6(a + shift[0]) / 6

    for _ in range(2):
        (found,), _ = explain(function, [a], r, lrp("split"))
        (wanted,), _ = explain(F.hardsigmoid, [a], r, lrp("split"))
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    shift[0] = 2.0 if isinstance(number, float) else number.clone().fill_(2)
    (found,), _ = explain(function, [a], r, lrp("split"))
    torch.testing.assert_close(found, torch.where(function(a) == 0, 0, r * a / (a + 2)), rtol=1e-9, atol=1e-12)


def test_a_single_entry_may_be_written_into_a_number():
    """As where a model adds up a score of a single sample; what is there first is the number that is added."""

    def function(a):
        total = torch.full_like(a, 3)
        total += a
        return F.relu6(total) / 6

    a, r = numbers(1, 1), numbers(1, 1, seed=1)
    (found,), _ = explain(function, [a], r, lrp("split"))
    (wanted,), _ = explain(F.hardsigmoid, [a], r, lrp("split"))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=0)


def test_what_is_overwritten_takes_no_relevance():
    """Then the number is a bias: what it was added to is not there any more."""

    def overwriting(a):
        h = a.flip(1).flip(1)
        shifted = h + 3
        h.mul_(0.1)
        return F.relu6(shifted) + 0 * h

    a, r = numbers(4, 6), numbers(4, 6, seed=1)
    (found,), _ = explain(overwriting, [a], r, lrp("split"))
    torch.testing.assert_close(found, r * a / (a + 3), rtol=1e-9, atol=1e-12)


#: Numbers behind exponentials, and what they make.
AROUND_EXPONENTIALS = {
    "softplus": lambda a: torch.log(1 + a.exp()),
    "sigmoid": lambda a: 1 / (1 + torch.exp(-a)),
    "expm1": lambda a: a.exp() - 1,
    "logit": lambda a: a.sigmoid().logit(),
    "hardly_anything": lambda a: (-100 * a.abs()).exp() + 3,
}


@pytest.mark.parametrize("name", AROUND_EXPONENTIALS)
def test_a_number_behind_an_exponential_keeps_nothing(name):
    """It counted in full as kept, beside all that was handed on."""
    a, r = numbers(4, 6), numbers(4, 6, seed=1)
    (found,), kept = explain(AROUND_EXPONENTIALS[name], [a], r, lrp("split"))
    assert off(found, r) <= 1e-12
    assert kept.abs().max() <= 1e-12


def test_relevance_of_a_hard_sigmoid_has_derivatives():
    net, direction = seeded(Net(lambda a: F.relu6(a + 3) / 6)), numbers(3, 6, seed=6)
    composite = composites.AttnLRP()

    def relevance(leaf, create_graph=False):
        return torch.autograd.grad(net(leaf)[:, 0].sum(), leaf, create_graph=create_graph)[0]

    with composite.context(net):
        leaf = DATA.clone().requires_grad_()
        value = (relevance(leaf, True) * direction).sum()
        with composite.inactive():
            (gradient,) = torch.autograd.grad(value, leaf)
        step = 1e-6
        above, below = (
            (relevance((DATA + sign * step * direction).requires_grad_()) * direction).sum() for sign in (1, -1)
        )
    assert math.isclose(float((gradient * direction).sum()), float((above - below) / (2 * step)), rel_tol=1e-5)


class Plus(nn.Module):
    def forward(self, a):
        return a + 3


@pytest.mark.parametrize("keywords", [{"record_layer": ["1"]}, {"record_layer": ["2.input"]}])
def test_the_sum_with_the_number_is_no_layer_through_which_relevance_flows(keywords):
    """Recording it made the number a bias, in the heatmap, too."""
    net = seeded(nn.Sequential(nn.Linear(6, 6), Plus(), nn.ReLU6(), nn.Linear(6, 3)))
    attribution, conditions = CondAttribution(net), [{"y": 1}]
    with pytest.raises(ValueError, match="makes an activation of numbers before it"):
        attribution(DATA, conditions, composites.UniformLRP0(), **keywords)
    others = {"record_layer": ["0", "2"]}
    recorded, plain = (attribution(DATA, conditions, composites.UniformLRP0(), **k) for k in (others, {}))
    assert off(recorded.heatmap, plain.heatmap) <= 1e-12
    assert off(recorded.relevances["0"].sum(1), recorded.relevances["2"].sum(1)) <= 1e-12


def test_a_sum_that_is_a_layer_and_cut_off_on_one_side():
    net = seeded(nn.Sequential(nn.Linear(6, 6), Plus(), nn.ReLU(), nn.Linear(6, 3)))
    recorded, plain = (
        CondAttribution(net)(DATA, [{"y": 1}], composites.UniformLRP0(), record_layer=names) for names in (["1"], [])
    )
    assert off(recorded.heatmap, plain.heatmap) <= 1e-12


class Expert(nn.Module):
    """As those of gpt-oss: a number is added to what is cut off far from zero, and multiplied with a swish."""

    def __init__(self, cut):
        super().__init__()
        self.up, self.gate, self.head, self.cut = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3), cut

    def forward(self, x):
        g = self.gate(x)
        return self.head((self.cut(self.up(x)) + 1) * (g * torch.sigmoid(1.7 * g)))


@pytest.mark.parametrize("preset", PRESETS)
def test_what_is_added_to_a_sum_that_is_cut_off_far_away_is_a_bias(preset):
    cut, whole = (seeded(Expert(function)) for function in (lambda u: u.clamp(-7.0, 7.0), lambda u: u))
    assert cut.up(DATA).abs().max() < 7
    assert_same_map(cut, whole, DATA, PRESETS[preset]())


class Stacked(nn.Module):
    """An activation of two functions of one tensor, side by side."""

    def __init__(self, activation):
        super().__init__()
        self.below, self.head, self.activation = nn.Linear(6, 6), nn.Linear(12, 3), activation

    def forward(self, x):
        h = self.below(x)
        return self.head(self.activation(torch.stack([h * h, h], 1)).flatten(1))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_hard_sigmoid_of_functions_that_are_side_by_side(preset):
    written, whole = (seeded(Stacked(function)) for function in (lambda a: F.relu6(a + 3) / 6, F.hardsigmoid))
    assert_same_map(written, whole, DATA, PRESETS[preset]())


def test_an_exponential_of_a_number_and_a_tensor_side_by_side():
    """As of an entry that is overwritten."""

    class Overwritten(nn.Module):
        def __init__(self, is_written):
            super().__init__()
            self.below, self.head, self.is_written = nn.Linear(6, 2), nn.Linear(2, 3), is_written

        def forward(self, x):
            h = self.below(x)
            if self.is_written:
                return self.head(torch.cat([torch.zeros_like(h[:, :1]), h[:, 1:]], 1).exp())
            return self.head((h * ONE.new_tensor([0, 1])).exp())

    assert_same_map(*(seeded(Overwritten(is_written)) for is_written in (True, False)), DATA, composites.UniformLRP0())
