"""Gates and attention however they are written: held constant, the signal takes all."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from core_cases import Maps
from preset_cases import LRP_PRESETS, assert_closes, assert_same_map, kept, maps, numbers, off, seeded
from torch import nn
from torch.nn import functional as F

import crp.composites as composites
from crp.composites import AttnLRP, EpsilonPlus, RelP, UniformEpsilon

DATA = numbers(3, 6, seed=3)
STEPS = numbers(2, 4, 6, seed=3)
BAGS = numbers(2, 7, 6, seed=3)


class Gated(nn.Module):
    """Signal (n, 6) times a gate, by a function of both before the gate is squashed, and a dense layer."""

    def __init__(self, spelling):
        super().__init__()
        self.signal, self.gate, self.head, self.spelling = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3), spelling

    def forward(self, x):
        return self.head(F.relu(self.spelling(torch.tanh(self.signal(x)), self.gate(x))))


def held(spelling):
    """The same product, with the gate as a constant of autograd."""
    return lambda n, a: spelling(n, a.detach())


def stacked(n, a):
    z = torch.stack([a.sigmoid(), a.sigmoid()], 2)
    return n * z[:, :, 0]


def concatenated(n, a):
    z = torch.cat([torch.sigmoid(a[:, :3]), torch.sigmoid(a[:, 3:])], 1)
    return n * z


def filled(n, a):
    z = torch.sigmoid(a)
    z[:, 2] = 1.0
    return n * z


def looked_up(n, a):
    return n * torch.sigmoid(a)[:, torch.arange(5, -1, -1)]


def in_place(n, a):
    return n.clone().mul_(a.clone().sigmoid_())


#: Products of a signal ``n`` and a gate made of ``a``.
GATES = {
    "plain": lambda n, a: n * torch.sigmoid(a),
    "gate_first": lambda n, a: a.sigmoid() * n,
    "in_place": in_place,
    "sliced": lambda n, a: n * torch.sigmoid(a)[:],
    "halved": lambda n, a: torch.cat([n[:, :3] * a.sigmoid()[:, :3], n[:, 3:]], 1),
    "ellipsis": lambda n, a: n * torch.sigmoid(a)[..., :],
    "looked_up": looked_up,
    "by_mask": lambda n, a: n * a.sigmoid()[torch.ones(6, dtype=torch.bool).expand(3, 6)].reshape(3, 6),
    "index_select": lambda n, a: n * a.sigmoid().index_select(1, torch.tensor([1, 0, 3, 2, 5, 4])),
    "gathered": lambda n, a: n * a.sigmoid().gather(1, torch.zeros(3, 6, dtype=torch.long)),
    "stacked": stacked,
    "concatenated": concatenated,
    "with_constants": lambda n, a: n * torch.cat([a.sigmoid()[:, :4], torch.ones_like(a[:, :2])], 1),
    "where": lambda n, a: n * torch.where(torch.arange(6) > 2, a.sigmoid(), 0.5 * a.sigmoid()),
    "where_constant": lambda n, a: n * torch.where(torch.arange(6) > 2, a.sigmoid(), torch.ones(6).double()),
    "masked": lambda n, a: n * a.sigmoid().masked_fill(torch.arange(6) > 3, 0.0),
    "filled": filled,
    "scaled": lambda n, a: n * (1.0 * torch.sigmoid(a)),
    "doubled": lambda n, a: n * (2 * torch.sigmoid(a)),
    "scaled_in_place": lambda n, a: n * torch.sigmoid(a).mul_(0.7),
    "divided": lambda n, a: n * (torch.sigmoid(a) / 2),
    "scaled_by_a_tensor": lambda n, a: n * (torch.sigmoid(a) * torch.linspace(0.1, 1, 6).double()),
    "scaled_by_einsum": lambda n, a: n * torch.einsum("bc,c->bc", a.sigmoid(), torch.linspace(0.1, 1, 6).double()),
    "negated": lambda n, a: n * -torch.sigmoid(a),
    "reshaped": lambda n, a: n * a.sigmoid().reshape(-1).view(3, 6),
    "transposed": lambda n, a: n * a.T.sigmoid().T,
    "permuted": lambda n, a: (n[:, None] * a.sigmoid()[:, :, None].permute(0, 2, 1)).squeeze(1),
    "chunked": lambda n, a: n * torch.cat(a.sigmoid().chunk(2, 1)[::-1], 1),
    "split": lambda n, a: n * torch.cat(a.sigmoid().split([1, 5], 1), 1),
    "unbound": lambda n, a: n * torch.stack(a.sigmoid().unbind(1), 1),
    "flipped": lambda n, a: n * a.sigmoid().flip(1),
    "rolled": lambda n, a: n * a.sigmoid().roll(1, 1),
    "expanded": lambda n, a: n * a[:, :1].sigmoid().expand(3, 6),
    "repeated": lambda n, a: n * a[:, :2].sigmoid().repeat(1, 3),
    "padded": lambda n, a: n * F.pad(a[:, 1:].sigmoid(), (1, 0)),
    "cloned": lambda n, a: n * a.sigmoid().clone().contiguous().to(torch.float64),
    "dropped": lambda n, a: n * F.dropout(a.sigmoid(), 0.5, training=False),
    "module": lambda n, a: n * nn.Sigmoid()(a),
    "hard": lambda n, a: n * F.hardsigmoid(a),
    "complement": lambda n, a: (1 - a.sigmoid()) * n,
    "complement_behind": lambda n, a: n * (1.0 - torch.sigmoid(a)),
    "complement_by_rsub": lambda n, a: n * torch.rsub(torch.sigmoid(a), 1),
    "complement_by_sub": lambda n, a: n * torch.sub(torch.ones_like(a), torch.sigmoid(a)),
    "complement_by_neg": lambda n, a: n * (-torch.sigmoid(a) + 1),
    "complement_by_a_factor": lambda n, a: n * (torch.sigmoid(a) * -1 + 1),
    "complement_by_a_divisor": lambda n, a: n * (torch.sigmoid(a) / -1 + 1),
    "complement_by_alpha": lambda n, a: n * torch.add(torch.ones_like(a), torch.sigmoid(a), alpha=-1),
    "complement_in_place": lambda n, a: n * torch.sigmoid(a).neg_().add_(1),
    "one_more": lambda n, a: n * (1 + torch.sigmoid(a)),
    "one_less_of_the_opposite": lambda n, a: n * (1 - -torch.sigmoid(a)),
    "one_more_than_tanh": lambda n, a: n * (1 + torch.tanh(a)),
    "one_less_softsign": lambda n, a: n * (1 - F.softsign(a)),
    "normal_distribution": lambda n, a: 0.5 * n * (1.0 + torch.erf(a / 2**0.5)),
    "sigmoid_by_tanh": lambda n, a: n * (0.5 * (torch.tanh(0.5 * a) + 1)),
    "complement_sliced": lambda n, a: n * (1 - a.sigmoid()[:])[:, :],
    "sliced_complement": lambda n, a: n * torch.cat((1 - a.sigmoid()).chunk(2, 1), 1),
    "two_opposites": lambda n, a: n * (torch.sigmoid(a) * -a.flip(1).sigmoid()),
    "two_gates": lambda n, a: n * (a.sigmoid() * a.flip(1).sigmoid()),
    "squared_gate": lambda n, a: n * a.sigmoid() * a.sigmoid(),
    "rows": lambda n, a: torch.stack([row * gate for row, gate in zip(n, a.sigmoid(), strict=True)]),
}


@pytest.mark.covering(3)
@pytest.mark.parametrize("preset", LRP_PRESETS)
@pytest.mark.parametrize("name", GATES)
def test_a_gate_is_constant_whatever_it_went_through(name, preset):
    model, constant = seeded(Gated(GATES[name])), seeded(Gated(held(GATES[name])))
    assert_same_map(model, constant, DATA, LRP_PRESETS[preset]())


#: Spellings of a sigmoid, of which all numbers are part.
SIGMOIDS = {
    "by_exp": lambda a: 1 / (1 + torch.exp(-a)),
    "reciprocal": lambda a: torch.add(torch.exp(-a), 1).reciprocal(),
    "to_the_minus_first": lambda a: (1 + a.neg().exp()) ** -1,
    "in_place": lambda a: a.neg().exp_().add_(1).reciprocal(),
    "quotient": lambda a: a.exp() / (1 + a.exp()),
    "powers": lambda a: 1 / (1 + math.e**-a),
    "by_tanh": lambda a: 0.5 * (1 + torch.tanh(a / 2)),
    "by_half_of_tanh": lambda a: 0.5 * torch.tanh(a / 2) + 0.5,
    "complement": lambda a: 1 - torch.sigmoid(-a),
    "ones_less": lambda a: torch.ones_like(a) - torch.sigmoid(-a),
    "of_a_constant": lambda a: 1 / (torch.tensor(1.0, dtype=a.dtype) + torch.exp(-a)),
    "complement_of_by_exp": lambda a: 1 - 1 / (1 + torch.exp(a)),
}


@pytest.mark.covering(3)
@pytest.mark.parametrize("preset", LRP_PRESETS)
@pytest.mark.parametrize("name", SIGMOIDS)
def test_a_gate_is_a_sigmoid_however_it_is_written(name, preset):
    models = [seeded(Gated(lambda n, a, gate=gate: n * gate(a))) for gate in (SIGMOIDS[name], torch.sigmoid)]
    assert_same_map(*models, DATA, LRP_PRESETS[preset]())


@pytest.mark.parametrize("kind", [AttnLRP, RelP])
def test_a_gate_that_is_wide_open(kind):
    """Where the exponential is too small to divide by."""
    models = [seeded(Gated(lambda n, a, gate=gate: n * gate(100 + a))) for gate in (SIGMOIDS["by_exp"], torch.sigmoid)]
    assert_same_map(*models, DATA, kind())


#: Products of a signal ``n`` and steps of ``a``, which have no derivative.
#: Quotients, as products with one over the divisor: what is divided takes all, also where it is a gate.
QUOTIENTS = {
    "reciprocal": lambda n, a: n.sigmoid() * (1 + a.abs()).reciprocal(),
    "power": lambda n, a: (1 + a.abs()) ** -1 * n.sigmoid(),
    "broadcast": lambda n, a: n.mean(1, keepdim=True) * (1 / (1 + a.abs())),
}


@pytest.mark.parametrize("kind", [UniformEpsilon, EpsilonPlus, AttnLRP])
@pytest.mark.parametrize("name", QUOTIENTS)
def test_one_over_something_is_no_signal(name, kind):
    """Neither beside a gate, nor beside what is broadcast."""
    model, constant = seeded(Gated(QUOTIENTS[name])), seeded(Gated(held(QUOTIENTS[name])))
    assert_same_map(model, constant, DATA, kind())


STEPPED = {
    "round": lambda n, a: n * a.sigmoid().round(),
    "floor": lambda n, a: torch.floor(a) * n,
    "sign": lambda n, a: n * a.sign().clamp(min=0),
    "heaviside": lambda n, a: n * torch.heaviside(a, torch.zeros(1).double()),
    "bernoulli": lambda n, a: n * torch.bernoulli((a * 1e9).clamp(0, 1)),
    "in_place": lambda n, a: n * torch.sigmoid(a).round_(),
    "divided": lambda n, a: n * (a // 0.3),
    "of_itself": lambda n, a: a.sign() * a,
    "matmul": lambda n, a: torch.einsum("ni,nij->nj", n, a.round()[:, :, None].expand(3, 6, 6)),
}


@pytest.mark.covering(3)
@pytest.mark.parametrize("preset", [*LRP_PRESETS, "attn_lrp", "relp"])
@pytest.mark.parametrize("name", STEPPED)
def test_a_step_takes_no_part_of_a_product(name, preset):
    """What it took, none of its operands would get."""
    known = {"sign": lambda n, a: n * (a > 0), "round": lambda n, a: n * (a.sigmoid() > 0.5)}
    known |= {
        "heaviside": known["sign"],
        "bernoulli": known["sign"],
        "in_place": known["round"],
        "of_itself": lambda n, a: a.detach().sign() * a,
    }
    constant = known.get(name, held(STEPPED[name]))
    make = LRP_PRESETS.get(preset, partial(composites.get, preset))
    assert_same_map(seeded(Gated(STEPPED[name])), seeded(Gated(constant)), DATA, make())


TWO_GATES = {
    "complement": lambda n, a: n.sigmoid() * (1 - a.sigmoid()),
    "complement_first": lambda n, a: (1.0 - n.sigmoid()) * a.sigmoid(),
    "complement_by_neg": lambda n, a: n.sigmoid() * (-a.sigmoid() + 1),
    "negative": lambda n, a: n.sigmoid() * torch.sigmoid(-a),
    "by_exp": lambda n, a: n.sigmoid() * (1 / (1 + torch.exp(-a))),
    "both": lambda n, a: (1 - n.sigmoid()) * (1 - a.sigmoid()),
}


@pytest.mark.parametrize("name", TWO_GATES)
def test_two_gates_share_their_product(name):
    """Neither is the signal, also where one is one minus a gate."""
    model = seeded(Gated(TWO_GATES[name]))
    whole = UniformEpsilon(gates="signal")
    assert off(maps(model, DATA, whole), maps(model, DATA, UniformEpsilon(gates="split"))) <= 1e-12


@pytest.mark.parametrize("preset", ["epsilon", "epsilon_plus", "gamma"])
def test_a_gated_linear_unit_is_no_gate(preset):
    """Beside another factor, it is the product that it is when it is written out."""
    one, other = (
        seeded(Gated(lambda n, a, unit=unit: unit(torch.cat([a, n], 1)) * a.flip(1)))
        for unit in (F.glu, lambda x: x.chunk(2, 1)[0] * torch.sigmoid(x.chunk(2, 1)[1]))
    )
    assert_same_map(one, other, DATA, LRP_PRESETS[preset]())


class GRU(nn.Module):
    """Gated recurrent unit of three gates over (n, steps, 6), by the spelling of its last line: (n, 3)."""

    def __init__(self, spelling, hold=False):
        super().__init__()
        for gate in "rzn":
            self.add_module(f"{gate}x", nn.Linear(6, 4))
            self.add_module(f"{gate}h", nn.Linear(4, 4, bias=False))
        self.head, self.spelling, self.hold = nn.Linear(4, 3), spelling, hold

    def forward(self, x):
        h = x.new_zeros(len(x), 4)
        for step in x.unbind(1):
            r, a = torch.sigmoid(self.rx(step) + self.rh(h)), self.zx(step) + self.zh(h)
            if self.hold:
                r, a = r.detach(), a.detach()
            n = torch.tanh(self.nx(step) + r * self.nh(h))
            h = self.spelling(n, h, a)
        return self.head(h)


GRUS = {
    "complement": lambda n, h, a: (1 - a.sigmoid()) * n + a.sigmoid() * h,
    "difference": lambda n, h, a: n - a.sigmoid() * n + a.sigmoid() * h,
    "negative": lambda n, h, a: torch.sigmoid(-a) * n + torch.sigmoid(a) * h,
    "factored": lambda n, h, a: h + (1 - torch.sigmoid(a)) * (n - h),
    "factored_behind": lambda n, h, a: n + torch.sigmoid(a) * (h - n),
    "in_words": lambda n, h, a: torch.add(torch.mul(torch.sub(1, a.sigmoid()), n), torch.mul(a.sigmoid(), h)),
    "chunked": lambda n, h, a: chunked(n, h, a),
}


def chunked(n, h, a):
    keep, new = torch.sigmoid(torch.cat([a, -a], 1)).chunk(2, 1)
    return new * n + keep * h


@pytest.mark.covering(3)
@pytest.mark.parametrize("preset", LRP_PRESETS)
@pytest.mark.parametrize("name", GRUS)
def test_spellings_of_a_gated_recurrent_unit_give_the_same(name, preset):
    model, constant = seeded(GRU(GRUS[name])), seeded(GRU(GRUS["negative"], hold=True))
    assert_same_map(model, constant, STEPS, LRP_PRESETS[preset](), 1e-8 if preset == "alpha_beta" else 1e-9)


class Cell(nn.Module):
    """LSTM over (n, steps, 6) that squashes its gates before or after taking them apart: (n, 3)."""

    def __init__(self, gates):
        super().__init__()
        self.x, self.h, self.head, self.gates = nn.Linear(6, 16), nn.Linear(4, 16, bias=False), nn.Linear(4, 3), gates

    def forward(self, x):
        h, c = x.new_zeros(len(x), 4), x.new_zeros(len(x), 4)
        for step in x.unbind(1):
            z = self.x(step) + self.h(h)
            i, f, o = self.gates(z[:, :12])
            c = f * c + i * torch.tanh(z[:, 12:])
            h = o * torch.tanh(c)
        return self.head(h)


LSTMS = {
    "each": lambda z: [part.sigmoid() for part in z.chunk(3, 1)],
    "together": lambda z: torch.sigmoid(z).chunk(3, 1),
    "split": lambda z: torch.sigmoid(z).split(4, dim=1),
    "sliced": lambda z: [z.sigmoid()[:, 4 * k : 4 * k + 4] for k in range(3)],
    "unbound": lambda z: torch.sigmoid(z).reshape(-1, 3, 4).unbind(1),
    "unflattened": lambda z: torch.sigmoid(z).unflatten(1, (3, 4)).permute(1, 0, 2),
    "narrowed": lambda z: [torch.sigmoid(z).narrow(1, 4 * k, 4) for k in range(3)],
    "scaled": lambda z: [1.0 * part for part in torch.sigmoid(z).tensor_split(3, 1)],
}


@pytest.mark.covering(3)
@pytest.mark.parametrize("preset", LRP_PRESETS)
@pytest.mark.parametrize("name", LSTMS)
def test_spellings_of_a_cell_give_the_same(name, preset):
    model, constant = seeded(Cell(LSTMS[name])), seeded(Cell(lambda z: [g.detach() for g in LSTMS["each"](z)]))
    assert_same_map(model, constant, STEPS, LRP_PRESETS[preset](), 1e-8 if preset == "alpha_beta" else 1e-9)


class Pooled(nn.Module):
    """Multiple-instance learning by gated attention (Ilse et al. 2018): (n, 7, 6) -> (n, 2)."""

    def __init__(self, pool, hold=False):
        super().__init__()
        self.f, self.v, self.u, self.w, self.o = (
            nn.Linear(6, 5),
            nn.Linear(5, 4),
            nn.Linear(5, 4),
            nn.Linear(4, 1),
            nn.Linear(5, 2),
        )
        self.pool, self.hold = pool, hold

    def forward(self, x):
        h = F.relu(self.f(x))
        scores = self.w(torch.tanh(self.v(h)) * torch.sigmoid(self.u(h)))
        return self.o(self.pool(scores.detach() if self.hold else scores, h))


POOLS = {
    "product_and_sum": lambda s, h: (torch.softmax(s, 1) * h).sum(1),
    "product_from_the_right": lambda s, h: (h * F.softmax(s, dim=1)).sum(dim=1),
    "matmul": lambda s, h: torch.matmul(torch.softmax(s, 1).transpose(1, 2), h).squeeze(1),
    "matmul_from_the_right": lambda s, h: (h.mT @ s.softmax(1)).squeeze(2),
    "operator": lambda s, h: (s.softmax(1).mT @ h)[:, 0],
    "bmm": lambda s, h: torch.bmm(s.softmax(1).permute(0, 2, 1), h).flatten(1),
    "baddbmm": lambda s, h: torch.baddbmm(torch.zeros(2, 1, 5).double(), s.softmax(1).mT, h).squeeze(1),
    "einsum": lambda s, h: torch.einsum("bnk,bnd->bkd", s.softmax(1), h).squeeze(1),
    "einsum_of_scores": lambda s, h: torch.einsum("bn,bnd->bd", s.squeeze(2).softmax(1), h),
    "einsum_from_the_right": lambda s, h: torch.einsum("bnd,bn->bd", h, s.squeeze(2).softmax(-1)),
    "rows": lambda s, h: torch.stack([a.softmax(0).T @ b for a, b in zip(s, h, strict=True)]).squeeze(1),
    "module": lambda s, h: nn.Softmax(1)(s).mT.matmul(h).squeeze(1),
    "dropped": lambda s, h: (F.dropout(s.softmax(1), 0.1, training=False).mT @ h).squeeze(1),
    "masked": lambda s, h: (s.masked_fill(torch.arange(7)[:, None] > 4, -torch.inf).softmax(1).mT @ h).squeeze(1),
    "scaled": lambda s, h: ((0.5 * s.softmax(1)).mT @ h).squeeze(1),
}


@pytest.mark.covering(3)
@pytest.mark.filterwarnings("ignore:.*no rule for softmax")
@pytest.mark.parametrize("preset", LRP_PRESETS)
@pytest.mark.parametrize("name", POOLS)
def test_attention_pooling_holds_the_attention_constant(name, preset):
    model, constant = seeded(Pooled(POOLS[name])), seeded(Pooled(POOLS["product_and_sum"], hold=True))
    if name == "scaled":
        constant.pool = lambda s, h: (0.5 * s.softmax(1) * h).sum(1)
    if name == "masked":
        constant.pool = lambda s, h: POOLS["product_and_sum"](s[:, :5], h[:, :5])
    assert_same_map(model, constant, BAGS, LRP_PRESETS[preset]())


@pytest.mark.filterwarnings("ignore:.*no rule for softmax")
def test_attention_pooling_is_gradient_times_input_of_constant_attention():
    """ε → 0, without biases in what the bag's features go through."""
    for pool in POOLS.values():
        model = seeded(Pooled(pool))
        with torch.no_grad():
            model.f.bias.zero_()
            model.o.bias.zero_()
        leaf, model.hold = BAGS.clone().requires_grad_(), True
        wanted = torch.autograd.grad(model(leaf)[:, 1].sum(), leaf)[0] * BAGS
        model.hold = False
        assert off(maps(model, BAGS, UniformEpsilon(epsilon=1e-13)), wanted) <= 1e-9


class Regression(nn.Module):
    """One number for each sample, of shape (n,)."""

    def __init__(self, last):
        super().__init__()
        self.conv, self.fc, self.last = nn.Conv2d(3, 4, 3), nn.Linear(4, 1), last

    def forward(self, x):
        return self.last(self.fc(F.relu(self.conv(x)).mean((2, 3))))


LASTS = {
    "squeezed": lambda y: y.squeeze(-1),
    "first": lambda y: y[:, 0],
    "flattened": lambda y: y.flatten(),
    "summed": lambda y: y.sum(1),
    "softplus": lambda y: F.softplus(y).view(-1),
}


@pytest.mark.covering(3)
@pytest.mark.parametrize("preset", LRP_PRESETS)
@pytest.mark.parametrize("last", LASTS)
def test_the_account_of_one_number_for_each_sample(last, preset):
    model, data = seeded(Regression(LASTS[last])), numbers(3, 3, 6, 6)
    composite = LRP_PRESETS[preset]()
    for start in (lambda y: y, torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64), 1.0):
        if preset == "contrastive_excitation_backprop":
            found = kept(model, data, composite, [{}], init_rel=start)
            assert off(found.rest, found.initial) <= 1e-9  # (the dual takes all away)
        else:
            assert_closes(model, data, composite, conditions=[{}], init_rel=start)
    conditions = [{"conv": [c]} for c in range(4)]
    parts, whole = (kept(model, data, EpsilonPlus(), c, init_rel=lambda y: y) for c in (conditions, [{}]))
    assert parts.input.shape == (12,) and off(parts.input.reshape(3, 4).sum(1), whole.input) <= 1e-9


def test_one_number_for_each_sample_is_explained_as_one_of_shape_n_1():
    model, wide = seeded(Regression(LASTS["squeezed"])), seeded(Regression(lambda y: y))
    data = numbers(3, 3, 6, 6)
    for composite in (EpsilonPlus(), UniformEpsilon()):
        found = Maps(model)(data, [{}], composite, init_rel=lambda y: y).heatmap
        assert off(found, maps(wide, data, composite, target=0)) <= 1e-12
