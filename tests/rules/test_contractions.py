"""Sums of products are dense layers and products of matrices; scaled sums stay what they are."""

from __future__ import annotations

import weakref

import pytest
import torch
from core_cases import Net
from preset_cases import LRP_PRESETS, assert_closes, assert_same_map, maps, numbers, seeded
from torch import nn
from torch.nn import functional as F

from crp.composites import CPLRP, LRP, AttnLRP, DeepLift, DeepTaylor, Last, RelP, UniformAlphaBeta, UniformEpsilon
from crp.rules import AlphaBeta
from crp.rules.contractions import _Products

TOKENS = numbers(2, 4, 6, seed=3)
WEIGHTS, MASK = numbers(5, 6, seed=5), torch.tensor([[1, 1, 0, 1], [1, 0, 0, 1]]).double()[..., None]
SCALES = nn.Parameter(numbers(4, 6, seed=9), requires_grad=False)


def between(function):
    """Net of a dense layer, a function of its positive features, and a dense layer behind."""
    size = function(torch.ones(2, 4, 6).double()).flatten(1).shape[1]
    layers = {"up": nn.Linear(6, 6), "down": nn.Linear(size, 3)}
    return seeded(Net(lambda s, x: s.down(function(F.relu(s.up(x))).flatten(1)), **layers))


def in_two_steps(h):
    product = h[..., None, :] * WEIGHTS
    h = h.square()  # (another product)
    return product.sum(3)


#: Sums of products, and the same by matrices.
DENSE = {
    "mean": (lambda h: (h[..., None, :] * WEIGHTS).mean(-1), lambda h: h @ (WEIGHTS.T / 6)),
    "of_axes_that_are_left_out": (
        lambda h: torch.einsum("b...c,c->bc", h, SCALES[0]),
        lambda h: torch.einsum("btc,c->bc", h, SCALES[0]),
    ),
    "in_two_steps": (in_two_steps, lambda h: h @ WEIGHTS.T),
    "of_positions": (lambda h: (h[:, None] * WEIGHTS[:, :4, None]).sum(2), lambda h: WEIGHTS[:, :4] @ h),
    "one_output": (lambda h: (h * SCALES[0]).sum(-1), lambda h: h @ SCALES[0]),
    "all_axes": (
        lambda h: torch.stack([(tokens * SCALES).sum()[None] for tokens in h]),
        lambda h: h.flatten(1) @ SCALES.view(24, 1),
    ),
}
#: Sums that are no products of matrices, and the same without the product, or behind it.
SCALED = {
    "features": (lambda h: (h * SCALES[0]).sum(1), lambda h: h.sum(1) * SCALES[0]),
    "masked_mean": (
        lambda h: (h * MASK).sum(1) / MASK.sum(1),
        lambda h: torch.stack([tokens[mask > 0].mean(0) for tokens, mask in zip(h, MASK[..., 0], strict=True)]),
    ),
    "overwritten": (
        lambda h: (h[..., None] * WEIGHTS.T).relu_().sum(2),
        lambda h: F.relu(h[..., None] * WEIGHTS.T).sum(2),
    ),
    "norm": (
        lambda h: (h * (h.square().mean(-1, keepdim=True) + 1e-5).rsqrt()).mean(1),
        lambda h: F.rms_norm(h, (6,), eps=1e-5).mean(1),
    ),
    "query_that_is_a_gate": (
        lambda h: (h * torch.sigmoid(h.mean(2, keepdim=True))).sum(1),
        lambda h: torch.einsum("btd,bt->bd", h, torch.sigmoid(h.mean(2))),
    ),
    "gate": (
        lambda h: (h * torch.sigmoid(h.mean(1, keepdim=True))).mean(1),
        lambda h: h.mean(1) * torch.sigmoid(h.mean(1)),
    ),
}


@pytest.mark.covering(2)
@pytest.mark.parametrize("preset", LRP_PRESETS)
@pytest.mark.parametrize("name", DENSE)
def test_a_sum_of_products_is_a_dense_layer(name, preset):
    summed, by_matrices = map(between, DENSE[name])
    assert_same_map(summed, by_matrices, TOKENS, LRP_PRESETS[preset]())


@pytest.mark.covering(2)
@pytest.mark.parametrize("preset", LRP_PRESETS)
@pytest.mark.parametrize("name", SCALED)
def test_a_scaled_sum_is_no_dense_layer(name, preset):
    """α2β1 would give twice the relevance of what is positive."""
    one, other = map(between, SCALED[name])
    assert_same_map(one, other, TOKENS, LRP_PRESETS[preset]())


def attention(by_products):
    """Net of an attention head, by products that are summed up or by matrices."""

    def wiring(s, x):
        q, k, v = s.q(x), s.k(x), s.v(x)
        if by_products:
            shares = (q[:, :, None] * k[:, None]).sum(-1).softmax(-1)
            heads = (shares[..., None] * v[:, None]).sum(2)
        else:
            heads = (q @ k.mT).softmax(-1) @ v
        return s.out(heads.flatten(1))

    return seeded(Net(wiring, q=nn.Linear(6, 5), k=nn.Linear(6, 5), v=nn.Linear(6, 5), out=nn.Linear(20, 3)))


@pytest.mark.parametrize("kind", [AttnLRP, CPLRP, RelP, UniformEpsilon, DeepLift])
@pytest.mark.filterwarnings("ignore:outside DeepLIFT's rules")
def test_attention_by_sums_of_products(kind):
    assert_same_map(attention(True), attention(False), TOKENS, kind())


@pytest.mark.parametrize("kind", [AttnLRP, CPLRP, RelP, UniformEpsilon])
def test_one_query_and_many_keys_by_a_sum_of_products(kind):
    def wiring(s, x):
        query, keys = s.q(x[:, :1]), s.k(x)
        return s.out((query * keys).sum(-1) if s.by_products else (query @ keys.mT)[:, 0])

    models = [seeded(Net(wiring, q=nn.Linear(6, 5), k=nn.Linear(6, 5), out=nn.Linear(4, 3))) for _ in range(2)]
    models[0].by_products, models[1].by_products = True, False
    assert_same_map(*models, TOKENS, kind())


#: What makes the weights that are summed up with values, or the values.
MAKERS = {
    "dense": lambda t: t,
    "relu": F.relu,
    "gelu": F.gelu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softmax": lambda t: t.softmax(1),
    "exp": torch.exp,
}


@pytest.mark.covering(4)
@pytest.mark.parametrize("kind", [AttnLRP, CPLRP, RelP, UniformEpsilon, UniformAlphaBeta])
@pytest.mark.parametrize("of_values", MAKERS)
@pytest.mark.parametrize("of_weights", MAKERS)
@pytest.mark.parametrize("axes", ["bt,btd->bd", "btd,btd->bt"])
def test_a_sum_of_products_is_the_einsum_that_it_is(axes, of_weights, of_values, kind):
    """Whatever made the factors: weights of values, and vectors of the same axes."""

    def wiring(s, x):
        weights, values = MAKERS[of_weights](s.weights(x)), MAKERS[of_values](s.values(x))
        if axes == "bt,btd->bd":
            weights = weights[..., 0]
            summed = (weights[..., None] * values).sum(1)
        else:
            summed = (weights * values).sum(-1)
        return s.out(torch.einsum(axes, weights, values) if s.by_einsum else summed)

    size = 5 if axes == "bt,btd->bd" else 4
    models = [
        seeded(Net(wiring, weights=nn.Linear(6, 5), values=nn.Linear(6, 5), out=nn.Linear(size, 3))) for _ in range(2)
    ]
    models[0].by_einsum, models[1].by_einsum = True, False
    assert_same_map(*models, TOKENS, kind())


def test_methods_without_a_rule_for_attention_refuse_scores_by_sums_of_products():
    with pytest.raises(NotImplementedError, match=r"DeepTaylor has no rule for sum\(\)"):
        maps(attention(True), TOKENS, DeepTaylor())


@pytest.mark.parametrize("where", [nn.Linear, Last(nn.Linear, 3), ""])
def test_types_positions_and_names_mean_sums_of_products(where):
    summed, by_matrices = map(between, DENSE["in_two_steps"])
    assert_same_map(summed, by_matrices, TOKENS, LRP(layer_map=[(where, AlphaBeta())]))


def test_what_a_sum_of_products_keeps_is_accounted_for():
    assert_closes(between(DENSE["mean"][0]), TOKENS, UniformEpsilon(epsilon=0.1))


def gelu_factor(a):
    return 1 + torch.erf(a / 2**0.5)


#: An activation beside another factor, and the same in other orders.
ORDERS = {
    "silu": (F.silu, lambda a, b: a * b * a.sigmoid()),
    "silu_turned": (F.silu, lambda a, b: a.sigmoid() * b * a),
    "silu_of_a_product": (F.silu, lambda a, b: a * (b * a.sigmoid())),
    "silu_overwritten": (F.silu, lambda a, b: (b * a).mul_(a.sigmoid())),
    "silu_divided": (F.silu, lambda a, b: a * b / (1 + (-a).exp())),
    "silu_divided_before": (F.silu, lambda a, b: b / (1 + (-a).exp()) * a),
    "silu_divided_in_two": (F.silu, lambda a, b: a * (b / (1 + (-a).exp()))),
    "silu_divided_in_words": (F.silu, lambda a, b: torch.div(other=1 + (-a).exp(), input=torch.mul(other=a, input=b))),
    "silu_by_einsum": (F.silu, lambda a, b: torch.einsum("ti,ti->ti", a * b, a.sigmoid())),
    "gelu": (F.gelu, lambda a, b: a * b * 0.5 * gelu_factor(a)),
    "gelu_scaled_later": (F.gelu, lambda a, b: 0.5 * (gelu_factor(a) * (b * a))),
    "mish": (F.mish, lambda a, b: F.softplus(a).tanh() * b * a),
    "softsign": (F.softsign, lambda a, b: b * a / (1 + a.abs())),
    "square": (torch.square, lambda a, b: a * b * a),
    "silu_of_a_copy": (F.silu, lambda a, b: (a * b).clone() * a.sigmoid()),
    "cancelled": (torch.clone, lambda a, b: (a * (c := a + b)) * (b / c)),
    "cancelled_before": (torch.clone, lambda a, b: a * (b / (c := a + b) * c)),
    "broadcast": (F.silu, lambda a, b: a * b.mean(-1, keepdim=True) * 6 * a.sigmoid()),
}


@pytest.mark.parametrize("kind", [AttnLRP, CPLRP, RelP, UniformAlphaBeta, DeepTaylor])
@pytest.mark.parametrize("name", ORDERS)
def test_factors_may_be_multiplied_in_any_order(name, kind):
    activation, spelled = ORDERS[name]

    def plain(a, b):
        return activation(a) * (6 * b.mean(-1, keepdim=True) if name == "broadcast" else b)

    def net(function):
        layers = {name: nn.Linear(6, size) for name, size in (("left", 6), ("right", 6), ("out", 3))}
        return seeded(Net(lambda s, x: s.out(function(2 * s.left(x), s.right(x))), **layers))

    assert_same_map(net(spelled), net(plain), TOKENS[0], kind())
    assert_closes(net(spelled), TOKENS[0], kind())


@pytest.mark.parametrize("kind", [AttnLRP, CPLRP, RelP, DeepTaylor])
def test_two_divisors_that_are_made_of_one_tensor_are_one(kind):
    layers = {"left": nn.Linear(6, 6), "right": nn.Linear(6, 6), "out": nn.Linear(6, 3)}
    nets = [
        seeded(Net(lambda s, x, divided=divided: s.out(divided(s.right(x), s.left(x))), **layers))
        for divided in (lambda b, a: b / a.exp() / a.cosh(), lambda b, a: b / (a.exp() * a.cosh()))
    ]
    assert_same_map(*nets, TOKENS[0], kind())


def test_a_product_inside_another_is_no_layer_through_which_relevance_flows():
    class Product(nn.Module):
        def forward(self, a, b):
            return a * b

    layers = {"left": nn.Linear(6, 6), "right": nn.Linear(6, 6), "out": nn.Linear(6, 3), "product": Product()}
    net = seeded(Net(lambda s, x: s.out(s.product(a := s.left(x), s.right(x)) * a.sigmoid()), **layers))
    with pytest.raises(ValueError, match="so that all is one product: no relevance flows"):
        maps(net, TOKENS[0], CPLRP(), record_layer=["product"])


@pytest.mark.parametrize(("scales", "n_kept"), [(WEIGHTS, 8), (numbers(1, 6, seed=6), 0)])
def test_factors_of_the_latest_products_are_kept_where_sums_may_be_of_matrices(scales, n_kept):
    products, of_model, factors = _Products(lambda tensor: False), [], []
    for _ in range(20):
        factor = torch.ones(2, 1, 6, requires_grad=True)
        factors.append(weakref.ref(factor))
        of_model.append(factor.detach() * scales)
        products.add(of_model[-1], (factor, scales))
        del factor
    assert [ref() is not None for ref in factors] == [False] * (20 - n_kept) + [True] * n_kept
    products.clear()
    assert all(ref() is None for ref in factors)


EXPERTS = nn.Parameter(numbers(3, 6, 4, seed=11), requires_grad=False)
#: Einsums of two tensors that depend on the input, h and z, and of a constant; and the same, two at a time.
OF_THREE = {
    "experts": (
        lambda h, z: torch.einsum("btd,kde,btk->bte", h, EXPERTS, z),
        lambda h, z: torch.einsum("btke,btk->bte", torch.einsum("btd,kde->btke", h, EXPERTS), z),
    ),
    "scaled": (
        lambda h, z: torch.einsum("btd, bt, d -> btd", [h, z[..., 0], SCALES[0]]),
        lambda h, z: h * z[..., :1] * SCALES[0],
    ),
}


def of_two(function, squash=lambda z: z.softmax(-1)):
    """Net around a function of features, and of others that are squashed."""

    def wiring(s, x):
        return s.out(function(F.relu(s.up(x)), squash(s.router(x))).flatten(1))

    size = function(torch.ones(1, 4, 6).double(), torch.ones(1, 4, 3).double()).numel()
    return seeded(Net(wiring, up=nn.Linear(6, 6), router=nn.Linear(6, 3), out=nn.Linear(size, 3)))


@pytest.mark.parametrize("kind", [AttnLRP, UniformAlphaBeta, UniformEpsilon])
@pytest.mark.parametrize("name", OF_THREE)
def test_an_einsum_of_two_inputs_and_a_weight_is_two_operations(name, kind):
    assert_same_map(*map(of_two, OF_THREE[name]), TOKENS, kind())


#: Einsums that name not all axes, and the products that they are.
UNNAMED = {
    "dots": (lambda h, z: torch.einsum("...t,...t->...t", h[..., :3], z), lambda h, z: h[..., :3] * z),
    "nothing_but_dots": (lambda h, z: torch.einsum("...,...->...", h[..., :3], z), lambda h, z: h[..., :3] * z),
    "dots_of_one": (lambda h, z: torch.einsum("bt...,bt->bt...", h, z[..., 0]), lambda h, z: h * z[..., :1]),
    "no_result": (lambda h, z: torch.einsum("...t,...t", h[..., :3], z), lambda h, z: (h[..., :3] * z).sum(-1)),
}


@pytest.mark.parametrize("name", UNNAMED)
def test_an_einsum_that_multiplies_entry_by_entry_is_a_product(name):
    assert_same_map(*(of_two(function, torch.sigmoid) for function in UNNAMED[name]), TOKENS, RelP())
