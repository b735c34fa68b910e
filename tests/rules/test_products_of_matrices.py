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
