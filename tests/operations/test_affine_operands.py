"""What an operation is follows from which of its operands depend on the input."""

import pytest
import torch
from core_cases import deviation
from rule_cases import FORMS, jacobian, relevance
from torch import nn
from torch.nn import functional as F

from crp.attribution import CondAttribution
from crp.composites import EpsilonPlus


def constant(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Calls(nn.Module):
    """A function of the input, as a model."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def deviations(found, wanted, a):
    """Forms of which the relevance differs between two functions."""
    m = constant(*found(a).shape, seed=9)
    every = {
        name: deviation(relevance(rule, Calls(found), a, m), relevance(rule, Calls(wanted), a, m))
        for name, (rule, _) in FORMS.items()
    }
    return {name: value for name, value in every.items() if not value <= 1e-12}


C, C3, K, T, B = constant(3, 6), constant(2, 3, 6), constant(3, 4, 5, 5), constant(7, 4, 6), constant(5)
#: Shape of the input, and functions whose constant data stands where weights usually do, and the other way round.
HYPER = {
    "linear": ((5, 6), lambda x: F.linear(C, x)),
    "linear_bias": ((5, 6), lambda x: F.linear(C, x, B)),
    "linear_keywords": ((5, 6), lambda x: F.linear(weight=x, input=C)),
    "linear_reshaped": ((1, 30), lambda x: F.linear(C, x.view(5, 6), B)),
    "matmul": ((6, 5), lambda x: C @ x),
    "matmul_batched": ((2, 6, 5), lambda x: C3 @ x),
    "bmm": ((2, 6, 5), lambda x: torch.bmm(C3, x)),
    "mm": ((6, 5), lambda x: torch.mm(mat2=x, input=C)),
    "addmm": ((6, 5), lambda x: torch.addmm(B, C, x, alpha=0.5)),
    "baddbmm": ((2, 6, 5), lambda x: torch.baddbmm(B, C3, x)),
    "mv": ((6,), lambda x: C.mv(x)),
    "einsum": ((2, 6, 5), lambda x: torch.einsum("bni,bio->bno", C3, x)),
    "einsum_three": ((5, 6), lambda x: torch.einsum("ni,oi,o->no", C, x, B)),
    "einsum_elementwise": ((3, 6), lambda x: torch.einsum("ni,ni->n", C, x)),
    "conv1d": ((2, 4, 3), lambda x: F.conv1d(K[:, :, 0], x, B[:2], 2, 1)),
    "conv2d": ((2, 4, 3, 2), lambda x: F.conv2d(K, x, None, (2, 1), 1)),
    "conv2d_grouped": ((4, 2, 3, 3), lambda x: F.conv2d(K, x, B[:4], padding=1, groups=2, dilation=2)),
    "conv2d_keywords": ((2, 4, 3, 2), lambda x: F.conv2d(weight=x, input=K, stride=2)),
    "conv3d": ((2, 4, 1, 3, 3), lambda x: F.conv3d(K[:, :, None], x)),
    "conv_transpose2d": ((4, 2, 3, 3), lambda x: F.conv_transpose2d(K, x, B[:2], 2, 1, 1)),
    "dynamic": (
        (3, 2 * 4 * 9),
        lambda x: F.conv2d(K.view(1, 12, 5, 5), x.view(6, 4, 3, 3), groups=3).view(3, 2, 3, 3),
    ),
    "aten_convolution": (
        (2, 4, 3, 3),
        lambda x: torch.ops.aten.convolution(K, x, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1),
    ),
}


@pytest.mark.parametrize("name", HYPER)
def test_weight_that_depends_on_the_input_while_the_data_does_not(name):
    """The constant operand is what rules take apart: the matrix of the whole operation."""
    (shape, function), wrong = HYPER[name], {}
    a = constant(*shape, seed=3)
    w, b = jacobian(function, a), function(torch.zeros_like(a)).flatten()
    m = constant(*function(a).shape, seed=4)
    r = (m * function(a)).view(1, -1)
    for form_name, (rule, form) in FORMS.items():
        found = relevance(rule, Calls(function), a, m)
        value = deviation(found, form(a.view(1, -1), w, b, r).view(shape))
        wrong |= {form_name: value} if not value <= 1e-10 else {}
    assert not wrong


W, W3, V, Q = constant(6, 5, seed=5), constant(2, 6, 5, seed=6), constant(5, 6, seed=7), constant(5, 5, seed=10)
#: A bias that depends on the input; and the same as a sum.
BIASES = {
    "linear": ((3, 6), lambda x: F.linear(x, V, x[0, :5]), lambda x: F.linear(x, V) + x[0, :5]),
    "linear_squashed": ((3, 6), lambda x: F.linear(x, V, x[0, :5].tanh()), lambda x: F.linear(x, V) + x[0, :5].tanh()),
    "linear_keywords": ((3, 6), lambda x: F.linear(bias=x[0, :5], weight=V, input=x), lambda x: x @ V.T + x[0, :5]),
    "addmm": ((3, 6), lambda x: torch.addmm(x[:, :5], x, W), lambda x: x @ W + x[:, :5]),
    "addmm_factors": (
        (3, 6),
        lambda x: torch.addmm(x[:, :5], x, W, beta=0.5, alpha=2),
        lambda x: x @ (2 * W) + x[:, :5] * 0.5,
    ),
    "addmm_beta_0": ((3, 6), lambda x: torch.addmm(x[:, :5], x, W, beta=0), lambda x: x @ W),
    "addmm_alpha_0": ((3, 6), lambda x: torch.addmm(x[:, :5], x, W, alpha=0), lambda x: x @ (0 * W) + x[:, :5]),
    "addmm_method": ((3, 6), lambda x: x[:, :5].addmm(x, W), lambda x: x[:, :5] + x @ W),
    "addmm_in_place": ((3, 6), lambda x: (x[:, :5] * 2).addmm_(x, W), lambda x: x[:, :5] * 2 + x @ W),
    "addmm_of_constants": ((3, 5), lambda x: torch.addmm(x @ Q, C, W), lambda x: x @ Q + C @ W),
    "addmm_row": ((1, 6), lambda x: torch.addmm(x[:, :5], x, W), lambda x: x @ W + x[:, :5]),
    "addmm_row_factors": (
        (1, 6),
        lambda x: torch.addmm(x[:, :5], x, W, beta=0.5),
        lambda x: x @ W + x[:, :5] * 0.5,
    ),
    "baddbmm": ((2, 3, 6), lambda x: torch.baddbmm(x[..., :5], x, W3), lambda x: x @ W3 + x[..., :5]),
    "addbmm": (
        (2, 3, 6),
        lambda x: torch.addbmm(x[0, :, :5], x, W3),
        lambda x: torch.einsum("bni,bio->no", x, W3) + x[0, :, :5],
    ),
    "addmv": ((6,), lambda x: torch.addmv(x[:5], V, x), lambda x: V @ x + x[:5]),
    "conv1d": (
        (1, 4, 7),
        lambda x: F.conv1d(x, K[:, :, 0, :3], x[0, :3, 0], 2, 1),
        lambda x: F.conv1d(x, K[:, :, 0, :3], None, 2, 1) + x[0, :3, 0, None],
    ),
    "conv2d": (
        (2, 4, 5, 5),
        lambda x: F.conv2d(x, K, x.mean((0, 2, 3))[:3], padding=1),
        lambda x: F.conv2d(x, K, padding=1) + x.mean((0, 2, 3))[:3, None, None],
    ),
    "conv_transpose2d": (
        (2, 3, 4, 4),
        lambda x: F.conv_transpose2d(x, K, x[0, 0, 0], 2),
        lambda x: F.conv_transpose2d(x, K, None, 2) + x[0, 0, 0][:, None, None],
    ),
    "conv2d_of_constants": (
        (5,),
        lambda x: F.conv2d(K, K, (x @ Q)[:3]),
        lambda x: F.conv2d(K, K) + (x @ Q)[:3, None, None],
    ),
    "bilinear": (
        (3, 6),
        lambda x: F.bilinear(x, constant(3, 4), constant(5, 6, 4), x[0, :5]),
        lambda x: F.bilinear(x, constant(3, 4), constant(5, 6, 4)) + x[0, :5],
    ),
    "linear_matrix": ((3, 6), lambda x: F.linear(x, V, x[:, :5]), lambda x: F.linear(x, V) + x[:, :5]),
    "weight_and_bias": ((6, 6), lambda x: F.linear(C, x[:5], x[5, :5]), lambda x: C @ x[:5].T + x[5, :5]),
}


@pytest.mark.parametrize("name", BIASES)
def test_bias_that_depends_on_the_input_is_added_by_the_chain_rule(name):
    shape, found, wanted = BIASES[name]
    a = constant(*shape, seed=8)
    torch.testing.assert_close(found(a), wanted(a), rtol=1e-12, atol=1e-12)
    assert not deviations(found, wanted, a)


@pytest.mark.parametrize("name", ["baddbmm", "addmm", "in_place"])
def test_a_mask_of_minus_infinity_is_no_bias(name):
    """As where constant queries attend: what is hidden has no share, and other numbers of the mask are a bias."""
    sums = {
        "baddbmm": lambda mask, x: torch.baddbmm(mask, C3, x),
        "addmm": lambda mask, x: torch.stack([torch.addmm(mask, one, other) for one, other in zip(C3, x, strict=True)]),
        "in_place": lambda mask, x: mask.repeat(2, 1, 1).baddbmm_(C3, x),
    }
    added, hidden = constant(3, 5), torch.ones(3, 5, dtype=torch.bool).triu(1)
    mask, total = added.masked_fill(hidden, -torch.inf), sums[name]

    def found(x):
        return total(mask, x).softmax(-1)

    def wanted(x):
        return total(added, x).masked_fill(hidden, -torch.inf).softmax(-1)

    a = constant(2, 6, 5, seed=3)
    assert not deviations(found, wanted, a)
    kept = CondAttribution(Calls(found).eval()).absorbed(a, [{}], EpsilonPlus(), init_rel=found(a))
    assert kept.rest.abs().max() <= 1e-10


def test_two_operands_that_depend_are_a_product():
    """No rule takes the one for the weight of the other: it is a product of two factors, as ``*`` and a sum."""

    def found(x):
        h = x @ Q
        return h @ h.tanh().T

    def wanted(x):
        h = x @ Q
        return (h[:, None] * h.tanh()).sum(2)

    assert not deviations(found, wanted, constant(3, 5, seed=1))


def test_weight_of_a_bilinear_form_that_depends_on_the_input_is_told():
    def function(x):
        return F.bilinear(C, constant(3, 4, seed=1), (x @ Q).view(5, 6, 4), B)

    a = constant(24, 5, seed=3)
    with pytest.warns(UserWarning, match=r"no rule for bilinear\(\)"):
        relevance(FORMS["zplus"][0], Calls(function), a, constant(3, 5))
