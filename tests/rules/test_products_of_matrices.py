"""Products of matrices against closed forms: what is added, and what is held constant in them."""

from __future__ import annotations

import operator

import pytest
import torch
from preset_cases import numbers, off
from test_attention import Net, explain, lrp
from torch.nn import functional as F

from crp.composites import DeepTaylor

#: Addend, both factors, and the parts of the product's gradient, from the multiplier of the output.
ADDING = {
    "addmm": ((3, 5), (3, 3), (3, 5), lambda m, a, b: (m @ b.mT, a.mT @ m)),
    "baddbmm": ((2, 3, 5), (2, 3, 4), (2, 4, 5), lambda m, a, b: (m @ b.mT, a.mT @ m)),
    "addmv": ((3,), (3, 3), (3,), lambda m, a, b: (m[:, None] * b, a.mT @ m)),
    "addbmm": ((3, 5), (3, 3, 4), (3, 4, 5), lambda m, a, b: (m @ b.mT, a.mT @ m)),
}


@pytest.mark.parametrize("attention", ["constant", "split"])
@pytest.mark.parametrize("by_keyword", [False, True])
@pytest.mark.parametrize("name", ADDING)
def test_what_is_added_to_a_product_has_the_chain_rule(name, by_keyword, attention):
    """Factors take half of the product's relevance each, and the addend all of its own."""
    *shapes, gradients = ADDING[name]
    inputs = [numbers(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    function = getattr(torch, name)

    def product(added, a, b):
        return function(input=added, **dict(zip(FACTORS[name], (a, b), strict=True))) if by_keyword else function(
            added, a, b
        )  # fmt: skip

    r = numbers(*product(*inputs).shape, seed=7)
    net, leaves = Net(product).double().eval(), [x.clone().requires_grad_() for x in inputs]
    m, (added, a, b) = r / product(*inputs), inputs
    with lrp(attention).context(net):
        found = torch.autograd.grad(net(*leaves), leaves, m)
    of_a, of_b = gradients(m, a, b)
    for one, wanted in zip(found, (added * m, a * of_a / 2, b * of_b / 2), strict=True):
        assert off(one, wanted) <= 1e-12
    assert off(sum(part.sum() for part in found), r.sum()) <= 1e-12


FACTORS = {
    "addmm": ("mat1", "mat2"),
    "baddbmm": ("batch1", "batch2"),
    "addmv": ("mat", "vec"),
    "addbmm": ("batch1", "batch2"),
}


@pytest.mark.parametrize("attention", ["constant", "split"])
@pytest.mark.parametrize("spelling", ["bmm", "matmul", "einsum"])
@pytest.mark.parametrize("divide", [torch.div, operator.itruediv, torch.Tensor.div_], ids=["div", "/=", "div_"])
def test_weights_of_chosen_experts_are_constant_in_products(divide, spelling, attention):
    """Whatever becomes of attention: what the experts have made takes all."""

    def mixed(x, experts):
        weights, chosen = torch.softmax(x, -1).topk(2)
        weights = divide(weights, weights.sum(-1, keepdim=True))
        values = experts.gather(1, chosen[..., None].expand(-1, -1, experts.shape[-1]))
        if spelling == "einsum":
            return torch.einsum("nk,nkd->nd", weights, values)
        return getattr(torch, spelling)(weights[:, None], values)[:, 0]

    x, experts, r = numbers(3, 4), numbers(3, 4, 5, seed=1), numbers(3, 5, seed=2)
    (of_x, of_experts), kept = explain(mixed, (x, experts), r, lrp(attention))
    weights, chosen = torch.softmax(x, -1).topk(2)
    gates = torch.zeros_like(x).scatter(1, chosen, weights / weights.sum(-1, keepdim=True))
    m = r / mixed(x, experts)
    assert not of_x.any() and kept.abs().max() <= 1e-12 * r.abs().sum()
    assert off(of_experts, gates[..., None] * experts * m[:, None]) <= 1e-12


ROWS = torch.arange(3)[:, None]


def put(zeros, chosen, weights):
    zeros[ROWS, chosen] = weights
    return zeros


#: Weights of the chosen experts, put among zeros.
PLACED = {
    "scatter": lambda zeros, chosen, weights: zeros.scatter(1, chosen, weights),
    "scatter_": lambda zeros, chosen, weights: zeros.scatter_(1, chosen, weights),
    "scatter_add": lambda zeros, chosen, weights: zeros.scatter_add(1, chosen, weights),
    "index_put": lambda zeros, chosen, weights: zeros.index_put((ROWS, chosen), weights),
    "set": put,
}


@pytest.mark.parametrize("attention", ["constant", "split"])
@pytest.mark.parametrize("of_chosen", [False, True], ids=["softmax of all", "softmax of the chosen"])
@pytest.mark.parametrize("name", PLACED)
def test_weights_that_are_put_at_the_chosen_experts_are_constant(name, of_chosen, attention):
    """Whatever becomes of attention and of gates: what the experts have made takes all."""

    def gates(x):
        weights, chosen = (x if of_chosen else x.softmax(-1)).topk(2)
        return PLACED[name](torch.zeros_like(x), chosen, weights.softmax(-1) if of_chosen else weights)

    x, experts, r = numbers(3, 4), numbers(3, 4, 5, seed=1), numbers(3, 5, seed=2)
    inputs = (x, experts)
    (of_x, of_experts), _ = explain(
        lambda x, e: (gates(x)[..., None] * e).sum(1), inputs, r, lrp(attention, gates="split")
    )
    m = r / (gates(x)[..., None] * experts).sum(1)
    assert not of_x.any()
    assert off(of_experts, gates(x)[..., None] * experts * m[:, None]) <= 1e-12


@pytest.mark.parametrize("attention", ["constant", "split"])
def test_weights_of_attention_that_a_relu_has_made_share_with_values(attention):
    """They are no probabilities, and features may be made alike: each factor takes half."""

    def attend(q, k, v):
        return (q @ k.mT).relu() / 4 @ v

    q, k, v, r = (numbers(2, 4, 3, seed=seed) for seed in range(4))
    (of_q, of_k, of_v), _ = explain(attend, (q, k, v), r, lrp(attention))
    m, p = r / attend(q, k, v), (q @ k.mT).relu() / 4
    below = (p > 0) * (m @ v.mT) / 4 / 4  # (half of the product, and half of that for queries and keys each)
    for found, wanted in ((of_v, v * (p.mT @ m) / 2), (of_q, q * (below @ k)), (of_k, k * (below.mT @ q))):
        assert off(found, wanted) <= 1e-12


#: Numbers that are divided by their sum along the last axis.
NORMALIZED = {
    "div": lambda p: p / p.sum(-1, keepdim=True),
    "div_": lambda p: p.div_(p.sum(-1, keepdim=True)),
    "by the inverse": lambda p: p * p.sum(-1, keepdim=True).reciprocal(),
    "normalize": lambda p: F.normalize(p, p=1, dim=-1),
}


@pytest.mark.parametrize("attention", ["constant", "split"])
@pytest.mark.parametrize("spelling", NORMALIZED)
def test_sigmoids_that_are_divided_by_their_sum_weight_as_attention_does(spelling, attention):
    """Nothing chooses among them, as a router does among experts: they share with values, or are held constant."""

    def weights(q, k):
        return NORMALIZED[spelling]((q @ k.mT).sigmoid())

    q, k, v, r = (numbers(2, 4, 3, seed=seed) for seed in range(4))
    (of_q, of_k, of_v), _ = explain(lambda q, k, v: weights(q, k) @ v, (q, k, v), r, lrp(attention))
    p = weights(q, k)
    m, part = r / (p @ v), 0.5 if attention == "split" else 0.0
    below = part * p * (m @ v.mT) / (q @ k.mT) / 2  # (the sum and a sigmoid hand on what they get; q and k share it)
    for found, wanted in ((of_q, q * (below @ k)), (of_k, k * (below.mT @ q)), (of_v, (1 - part) * v * (p.mT @ m))):
        assert (found - wanted).abs().max() <= 1e-12 * r.abs().max()


@pytest.mark.parametrize("attention", ["constant", "split"])
def test_both_inputs_of_a_bilinear_layer_take_half(attention):
    """Of what the bias does not keep; as an einsum of both and the weight."""
    a, b, weight, bias = numbers(2, 4), numbers(2, 3, seed=1), numbers(5, 4, 3, seed=2), numbers(5, seed=3)
    r = numbers(2, 5, seed=4)
    found, _ = explain(lambda a, b: F.bilinear(a, b, weight, bias), (a, b), r, lrp(attention))
    wanted, _ = explain(lambda a, b: torch.einsum("ni,oij,nj->no", a, weight, b) + bias, (a, b), r, lrp(attention))
    m = r / F.bilinear(a, b, weight, bias)
    assert off(found[0], a * torch.einsum("no,oij,nj->ni", m, weight, b) / 2) <= 1e-12
    for one, other in zip(found, wanted, strict=True):
        assert off(one, other) <= 1e-12


def test_a_gate_that_is_closed_by_another_is_one():
    """``-sigmoid + 1`` and ``1 - sigmoid`` alike: what they gate takes all."""
    g, u, r = numbers(3, 4), numbers(3, 4, seed=1), numbers(3, 4, seed=2)
    for gated in (lambda g, u: (-torch.sigmoid(g) + 1) * u, lambda g, u: (1 - torch.sigmoid(g)) * u):
        (of_g, of_u), _ = explain(gated, (g, u), r, lrp("constant", gates="signal"))
        assert not of_g.any() and off(of_u, r) <= 1e-12


def test_a_product_with_probabilities_is_none_itself():
    """Both factors of the outer product take half, though one has a softmax within."""

    def weighted(x, u, v):
        return torch.einsum("nk,nkd->nd", torch.softmax(x, -1) * u, v)

    x, u, v, r = numbers(3, 4), numbers(3, 4, seed=1), numbers(3, 4, 5, seed=2), numbers(3, 5, seed=3)
    (_, _, of_v), _ = explain(weighted, (x, u, v), r, lrp("constant"))
    m = r / weighted(x, u, v)
    assert off(of_v, (torch.softmax(x, -1) * u)[..., None] * v * m[:, None] / 2) <= 1e-12


@pytest.mark.parametrize("position", range(3))
def test_methods_without_a_rule_refuse_attention_of_one_operand(position):
    q, k, v = (numbers(1, 3, 4, seed=seed) for seed in range(3))

    def attend(x):
        return F.scaled_dot_product_attention(*(x if i == position else t for i, t in enumerate((q, k, v))))

    net = Net(attend).double().eval()
    leaf = numbers(1, 3, 4, seed=5).requires_grad_()
    message = "DeepTaylor has no rule for scaled_dot_product_attention"
    with DeepTaylor().context(net), pytest.raises(NotImplementedError, match=message):
        net(leaf)


@pytest.mark.parametrize("attention", ["constant", "split"])
@pytest.mark.parametrize("make", [torch.softmax, lambda q, dim: torch.sigmoid(q)], ids=["softmax", "sigmoid"])
def test_a_product_of_three_is_that_of_two_with_a_divisor(make, attention):
    """As linear attention writes it: queries, what keys and values make, and one over what all of it sums up to."""
    q, k, v = (numbers(2, 4, 3, seed=seed) for seed in range(3))

    def products(q, k, v):
        q = make(q, dim=-1)
        return q, torch.einsum("nsd,nse->nde", k, v), 1 / torch.einsum("nsd,nd->ns", q, k.square().sum(1))

    def at_once(q, k, v):
        return torch.einsum("nsd,nde,ns->nse", *products(q, k, v))

    def one_by_one(q, k, v):
        q, context, inverse = products(q, k, v)
        return torch.einsum("nsd,nde->nse", q, context) * inverse[..., None]

    r = numbers(2, 4, 3, seed=3)
    found, wanted = (explain(function, [q, k, v], r, lrp(attention))[0] for function in (at_once, one_by_one))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
