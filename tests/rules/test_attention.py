"""Attention against its closed forms, as relevances in matrices, however it is written."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from preset_cases import maps, numbers, off
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from crp.attribution import CondAttribution
from crp.composites import CPLRP, LRP, AttnLRP, DeepLift, DeepTaylor, RelP, UniformEpsilon, UniformGamma, UniformZPlus
from crp.errors import UnseenError
from crp.rules import LRP0, DotProductAttention, Gate, MatrixProduct, ZPlus, register_attention

HEADS, L, S, E = 2, 3, 4, 5


class Net(nn.Module):
    """A function of several inputs as a model; one layer that is never called has a rule."""

    def __init__(self, function):
        super().__init__()
        self.function, self.unused = function, nn.Linear(1, 1)

    def forward(self, *inputs):
        return self.function(*inputs)


def lrp(attention, **keywords):
    return LRP(layer_map=[((nn.Linear, nn.Conv2d), LRP0())], attention=attention, **keywords)


def explain(function, inputs, r, composite):
    """Relevance of each input, for that of the output ``r``, and all that is kept."""
    net = Net(function).double().eval()
    with composite.context(net):
        leaves = [x.clone().requires_grad_() for x in inputs]
        y = net(*leaves)
        found = torch.autograd.grad(y, leaves, torch.where(y == 0, 0.0, r / y).detach())
    torch.testing.assert_close(y.detach(), function(*inputs), rtol=1e-12, atol=1e-13)
    start = torch.where(y == 0, 0.0, r).detach()
    kept = CondAttribution(net).absorbed(tuple(inputs), [{}], composite, init_rel=start)
    assert kept.rest.abs().max() <= 1e-10 * (r.abs().sum() + sum(f.abs().sum() for f in found))
    return found, kept.total


def closed_form(q, k, v, r, attention, scale=None, mask=None, dependent="qkv"):
    """Relevance of queries, keys, values and mask, pair by pair, from the papers' rules.

    ``R(v_jd) = sum_i P_ij v_jd R_id / O_id`` (all of it, or half); the rest reaches ``P_ij``, is softmax's Taylor term
    at the logits, ``R(S_ij) = S_ij P_ij (g_ij - sum_l P_il g_il)`` with ``g`` its multiplier, and halved for q and k.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    mask = torch.zeros(q.shape[-2], k.shape[-2], dtype=q.dtype) if mask is None else mask
    found = {name: torch.zeros_like(t) for name, t in (("q", q), ("k", k), ("v", v))}
    found["mask"] = torch.zeros(*q.shape[:-1], k.shape[-2], dtype=q.dtype)
    has_logits = bool(set(dependent) - {"v"})
    to_values = 1.0 if attention == "constant" or not has_logits else 0.5
    to_logits = 1 - to_values if "v" in dependent else 1.0
    to_operands = to_logits / (2 if "q" in dependent and "k" in dependent else 1)
    for place in itertools.product(*map(range, q.shape[:-2])):
        allowed = mask.expand(*q.shape[:-2], *mask.shape[-2:])[place]
        for i in range(q.shape[-2]):
            logits = torch.stack([scale * (q[place][i] * k[place][j]).sum() for j in range(k.shape[-2])]) + allowed[i]
            if logits.isinf().all():
                continue
            p = (logits - logits.max()).exp()
            p = p / p.sum()
            o = sum(p[j] * v[place][j] for j in range(len(p)))
            m = r[place][i] / o
            g = torch.stack([(v[place][j] * m).sum() for j in range(len(p))])
            below = p * (g - (p * g).sum())
            for j in range(len(p)):
                found["v"][place][j] += to_values * p[j] * v[place][j] * m
                found["q"][place][i] += to_operands * scale * q[place][i] * k[place][j] * below[j]
                found["k"][place][j] += to_operands * scale * q[place][i] * k[place][j] * below[j]
                found["mask"][place][i, j] += to_logits * (below[j] * allowed[i, j] if p[j] > 0 else 0.0)
    return found


def operands(heads=HEADS):
    shapes = ((1, heads, L, E), (1, heads, S, E), (1, heads, S, E))
    return [numbers(*shape, seed=seed) for seed, shape in enumerate(shapes)]


def masked(*hidden):
    mask = torch.zeros(L, S, dtype=torch.float64)
    for i, j in hidden:
        mask[i, j] = -torch.inf
    return mask


CAUSAL = masked(*((i, j) for i in range(L) for j in range(S) if j > i))
HIDDEN = masked((0, 0), (1, 2), (2, 0), (2, 1))
FULL = masked((0, 0), *((1, j) for j in range(S)))
BIAS = numbers(1, HEADS, L, S, seed=9)
#: Keywords of the call, and what these do to logits.
CALLS = {
    "plain": ({}, {}),
    "scale": ({"scale": 0.3}, {"scale": 0.3}),
    "causal": ({"is_causal": True}, {"mask": CAUSAL}),
    "bool_mask": ({"attn_mask": HIDDEN == 0}, {"mask": HIDDEN}),
    "float_mask": ({"attn_mask": HIDDEN}, {"mask": HIDDEN}),
    "bias": ({"attn_mask": BIAS}, {"mask": BIAS}),
    "hidden_row": ({"attn_mask": FULL == 0}, {"mask": FULL}),
    "hidden_row_float": ({"attn_mask": FULL, "dropout_p": 0.0}, {"mask": FULL}),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("attention", ["constant", "split"])
def test_dot_product_attention(call, attention):
    given, meant = CALLS[call]
    inputs, r = operands(), numbers(1, HEADS, L, E, seed=8)
    found, kept = explain(lambda *t: F.scaled_dot_product_attention(*t, **given), inputs, r, lrp(attention))
    expected = closed_form(*inputs, r, attention, **meant)
    for name, one in zip("qkv", found, strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, expected[name], rtol=1e-9, atol=1e-9 * float(r.abs().max()))
    reached = r.clone()
    if "hidden_row" in call:
        reached[:, :, 1] = 0
    assert abs(float(kept.sum() - (reached.sum() - sum(expected[name].sum() for name in "qkv")))) <= 1e-8
    if attention == "constant":
        assert not found[0].any() and not found[1].any() and kept.abs().max() <= 1e-9


DEPENDENT = ["v", "q", "k", "qk", "qv", "kv", "qkv", "m", "vm", "qkvm"]


@pytest.mark.parametrize("dependent", DEPENDENT)
@pytest.mark.parametrize("attention", ["constant", "split"])
@pytest.mark.parametrize("is_written", [False, True])
def test_operands_that_do_not_depend_on_the_input_take_no_part(dependent, attention, is_written):
    everything = dict(zip("qkvm", [*operands(), BIAS], strict=True))
    r = numbers(1, HEADS, L, E, seed=8)

    def function(*inputs):
        t = everything | dict(zip(dependent, inputs, strict=True))
        if not is_written:
            return F.scaled_dot_product_attention(t["q"], t["k"], t["v"], t["m"])
        return (t["q"] @ t["k"].mT * E**-0.5 + t["m"]).softmax(-1) @ t["v"]

    found, _ = explain(function, [everything[name] for name in dependent], r, lrp(attention))
    t = everything
    expected = closed_form(t["q"], t["k"], t["v"], r, attention, mask=t["m"], dependent=dependent)
    expected["m"] = expected["mask"]
    for name, one in zip(dependent, found, strict=True):
        torch.testing.assert_close(one, expected[name], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("attention", ["constant", "split"])
def test_grouped_heads(attention):
    q, k, v = operands(4)[0], *operands(2)[1:]
    r = numbers(1, 4, L, E, seed=8)
    found, _ = explain(lambda *t: F.scaled_dot_product_attention(*t, enable_gqa=True), [q, k, v], r, lrp(attention))
    k, v = (t.repeat_interleave(2, 1) for t in (k, v))
    expected = closed_form(q, k, v, r, attention)
    for name, one in zip("qkv", found, strict=True):
        wanted = expected[name] if name == "q" else expected[name].unflatten(1, (2, 2)).sum(2)
        torch.testing.assert_close(one, wanted, rtol=1e-9, atol=1e-9)


def by_parts(q, k, v):
    """Product and sum, one query at a time."""
    logits = (q[..., :, None, :] * k[..., None, :, :]).sum(-1) * E**-0.5
    return (logits.softmax(-1)[..., None] * v[..., None, :, :]).sum(-2)


def baddbmm(q, k, v):
    flat = [t.flatten(0, 1) for t in (q, k, v)]
    logits = torch.baddbmm(torch.zeros(1, dtype=q.dtype), flat[0], flat[1].mT, alpha=E**-0.5)
    return torch.bmm(F.softmax(logits, -1), flat[2]).unflatten(0, q.shape[:2])


def einsum(q, k, v):
    p = torch.einsum("bhid,bhjd->bhij", q, k).mul(E**-0.5).softmax(-1)
    return torch.einsum("bhij,bhjd->bhid", p, v)


def masked_fill(q, k, v):
    logits = torch.matmul(q, k.transpose(-1, -2)) / E**0.5
    return F.dropout(logits.masked_fill(torch.zeros(L, S) > 0, -torch.inf).softmax(-1), 0.1, False) @ v


def sink(q, k, v):
    """A logit that takes attention away, and is cut off."""
    logits = torch.cat([q @ k.mT * E**-0.5, torch.full((len(q), HEADS, L, 1), -1e3, dtype=q.dtype)], -1)
    return logits.softmax(-1)[..., :-1] @ v


def exponentials(q, k, v):
    logits = q @ k.mT * E**-0.5
    e = torch.exp(logits - logits.amax(-1, keepdim=True))
    return (e / e.sum(-1, keepdim=True)) @ v


def exponentials_in_place(q, k, v):
    e = (q @ k.mT * E**-0.5).exp_()
    e /= e.sum(-1, keepdim=True)
    return e @ v


LN2 = math.log(2)


def divided(e):
    return e / e.sum(-1, keepdim=True)


def log2_of_sum(logits):
    return torch.exp2(logits).sum(-1, keepdim=True).log2()


def by_exponentials(shares):
    """Attention whose probabilities are a function of the exponentials of its logits."""
    return lambda q, k, v: shares((q @ k.mT * E**-0.5).exp()) @ v


def by_logits(shares):
    """Attention whose probabilities are a function of its logits."""
    return lambda q, k, v: shares(q @ k.mT * E**-0.5) @ v


SPELLINGS = {
    "normalized": by_exponentials(lambda e: F.normalize(e, p=1, dim=-1)),
    "times_reciprocal": by_exponentials(lambda e: e * e.sum(-1, keepdim=True).reciprocal()),
    "times_one_over": by_exponentials(lambda e: (1 / e.sum(-1))[..., None] * e),
    "expanded_sum": by_exponentials(lambda e: e / e.sum(-1, keepdim=True).expand_as(e)),
    "masked_exponentials": by_exponentials(lambda e: (e * torch.ones(L, S)) / (e * torch.ones(L, S)).sum(-1, True)),
    "log_softmax": by_logits(lambda logits: F.log_softmax(logits, -1).exp()),
    "log_softmax_module": by_logits(lambda logits: torch.exp(nn.LogSoftmax(-1)(logits))),
    "less_logarithm": by_logits(lambda logits: (logits - logits.exp().sum(-1, keepdim=True).log()).exp()),
    "powers_of_two": by_logits(lambda logits: divided(2 ** (logits / LN2))),
    "powers_of_e": by_logits(lambda logits: divided(torch.pow(torch.tensor(math.e, dtype=logits.dtype), logits))),
    "powers_in_words": by_logits(lambda logits: divided(torch.pow(2.0, exponent=logits / LN2))),
    "exp2": by_logits(lambda logits: divided((logits / LN2).exp2())),
    "less_logarithm_to_base_two": by_logits(lambda logits: torch.exp2(logits / LN2 - log2_of_sum(logits / LN2))),
    "softmin": by_logits(lambda logits: F.softmin(-logits, -1)),
    "exponentials": exponentials,
    "exponentials_in_place": exponentials_in_place,
    "exponentials_in_words": lambda q, k, v: torch.einsum(
        "bhij,bhjd->bhid", torch.div((q @ k.mT * E**-0.5).exp(), (q @ k.mT * E**-0.5).exp().sum(3, True)), v
    ),
    "function": F.scaled_dot_product_attention,
    "in_words": lambda q, k, v: F.scaled_dot_product_attention(value=v, key=k, query=q),
    "built_in": torch._C._nn.scaled_dot_product_attention,
    "aten": torch.ops.aten.scaled_dot_product_attention,
    "matmul": lambda q, k, v: torch.matmul(torch.softmax(torch.matmul(q, k.mT) * E**-0.5, -1), v),
    "operators": lambda q, k, v: (q * E**-0.5 @ k.mT).softmax(-1) @ v,
    "right_hand": lambda q, k, v: (v.mT @ (q @ k.mT / E**0.5).softmax(-1).mT).mT,
    "aten_products": lambda q, k, v: torch.ops.aten.matmul(
        torch.ops.aten.softmax(torch.ops.aten.matmul(q, k.mT) * E**-0.5, -1), v
    ),
    "baddbmm": baddbmm,
    "einsum": einsum,
    "masked_fill": masked_fill,
    "product_and_sum": by_parts,
    "sink": sink,
    "module": lambda q, k, v: nn.Softmax(-1)(q @ k.mT * E**-0.5) @ v,
    "rows": lambda q, k, v: torch.stack([F.scaled_dot_product_attention(*t) for t in zip(q, k, v, strict=True)]),
}


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("attention", ["constant", "split"])
def test_spellings_of_attention_are_explained_alike(name, attention):
    inputs, r = operands(), numbers(1, HEADS, L, E, seed=8)
    found, _ = explain(SPELLINGS[name], inputs, r, lrp(attention, gates="split" if attention == "split" else "signal"))
    expected = closed_form(*inputs, r, attention)
    for key, one in zip("qkv", found, strict=True):
        torch.testing.assert_close(one, expected[key], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("attention", ["constant", "split"])
def test_values_that_are_one_over_something_are_values(attention):
    """They were held constant, and the probabilities took all."""
    inputs, r = operands(), numbers(1, HEADS, L, E, seed=8)

    def inverted(function):
        return lambda q, k, v: function(q, k, 1 / v.exp().square())

    spelled, fused = (inverted(SPELLINGS[name]) for name in ("operators", "function"))
    found, wanted = (explain(function, inputs, r, lrp(attention))[0] for function in (spelled, fused))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def with_ones(e, v):
    both = e @ torch.cat([v, torch.ones_like(v[..., :1])], -1)
    return both[..., :-1] / both[..., -1:]


#: Exponentials that weight values, and whose sum divides the result.
DIVIDED_LATER = {
    "exp": lambda s, v: (s.exp() @ v) / s.exp().sum(-1, keepdim=True),
    "less the largest": lambda s, v: ((s - s.amax(-1, True)).exp() @ v) / (s - s.amax(-1, True)).exp().sum(-1, True),
    "powers": lambda s, v: torch.einsum("bhij,bhjd->bhid", 2 ** (s / LN2), v) / (2 ** (s / LN2)).sum(-1, True),
    "ones among the values": lambda s, v: with_ones(s.exp(), v),
    "one over the sum": lambda s, v: (s.exp() @ v) * (1 / s.exp().sum(-1, keepdim=True)),
    "masked": lambda s, v: (s.exp().tril(S) @ v) / (s.exp().tril(S)).sum(-1, keepdim=True),
    "turned": lambda s, v: ((v.mT @ s.exp().mT) / s.exp().sum(-1)[..., None, :]).mT,
    "product and sum": lambda s, v: (s.exp()[..., None] * v[..., None, :, :]).sum(-2) / s.exp().sum(-1, keepdim=True),
}


@pytest.mark.parametrize("name", DIVIDED_LATER)
@pytest.mark.parametrize("attention", ["constant", "split"])
def test_exponentials_that_weight_values_are_attention(name, attention):
    inputs, r = operands(), numbers(1, HEADS, L, E, seed=8)
    attend = DIVIDED_LATER[name]
    found, _ = explain(lambda q, k, v: attend(q @ k.mT * E**-0.5, v), inputs, r, lrp(attention))
    expected = closed_form(*inputs, r, attention)
    for key, one in zip("qkv", found, strict=True):
        torch.testing.assert_close(one, expected[key], rtol=1e-8, atol=1e-8)


#: Attention pooling of scores and features of shape (n, 5, 3), by a softmax and by exponentials.
POOLED = {
    "one score for all features": (lambda s: s[..., :1], lambda p, h: (p * h).sum(1)),
    "each feature for itself": (lambda s: s, lambda p, h: (p * h).sum(1)),
    "by matrices": (lambda s: s[..., :1], lambda p, h: (p.mT @ h)[:, 0]),
}


@pytest.mark.parametrize("kind", [AttnLRP, RelP, CPLRP, UniformGamma])
@pytest.mark.parametrize("name", POOLED)
def test_pooling_by_exponentials_is_attention(name, kind):
    scores, pool = POOLED[name]
    inputs, r = [numbers(2, 5, 3), numbers(2, 5, 3, seed=2)], numbers(2, 3, seed=1)

    def later(s, h):
        e = torch.exp(scores(s) - scores(s).amax(1, keepdim=True))
        return pool(e, h) / e.sum(1)

    found, _ = explain(later, inputs, r, kind())
    wanted, _ = explain(lambda s, h: pool(scores(s).softmax(1), h), inputs, r, kind())
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_exponentials_that_gate_are_no_attention():
    """As in a flow of couplings: they share, or are held constant, as other gates, and a quotient is one."""
    inputs, r = [numbers(2, 4), numbers(2, 4, seed=2), numbers(2, 1, seed=3)], numbers(2, 4, seed=1)
    (of_s, of_h, of_n), _ = explain(lambda s, h, n: s.exp() * h / n, inputs, r, RelP())
    for one in (of_s, of_h):
        torch.testing.assert_close(one, r / 2, rtol=1e-9, atol=1e-9)
    assert not of_n.any()


@pytest.mark.parametrize("convert", [Tensor.double, lambda e: e.to(torch.float64), lambda e: e.type(torch.float64)])
def test_exponentials_that_are_summed_up_in_another_precision(convert):
    x, rounded = numbers(2, 4, 6), lambda logits: divided(convert(logits.float().exp()))
    nets = [Net(lambda x, by=by: (by(x @ x.mT) @ x).sum(1)).eval() for by in (rounded, nn.Softmax(-1))]
    found, wanted = (CondAttribution(net)(x, [{"y": 1}], AttnLRP()).heatmap for net in nets)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["constant", "split"])
def test_attention_by_logsumexp(attention):
    inputs, r = operands(), numbers(1, HEADS, L, E, seed=8)
    spelled = by_logits(lambda logits: (logits - logits.logsumexp(-1, True)).exp())
    found, _ = explain(spelled, inputs, r, lrp(attention, gates="split" if attention == "split" else "signal"))
    expected = closed_form(*inputs, r, attention)
    for key, one in zip("qkv", found, strict=True):
        torch.testing.assert_close(one, expected[key], rtol=1e-8, atol=1e-8)


SCALE, MIX = numbers(1, seed=4), numbers(HEADS, HEADS, seed=5)
#: What models make of the probabilities p, and of others, o, before they weight values.
MADE_OF_PROBABILITIES = {
    "difference": lambda p, o: p - SCALE * o,
    "mean": lambda p, o: (p + o) / 2,
    "mean_of_heads": lambda p, o: p.mean(1, keepdim=True),
    "sum_of_heads": lambda p, o: p.sum(1, keepdim=True),
    "mixed_heads": lambda p, o: F.linear(p.permute(0, 2, 3, 1), MIX).permute(0, 3, 1, 2),
    "mixed_by_einsum": lambda p, o: torch.einsum("bhij,hg->bgij", p, MIX),
    "mixed_by_a_convolution": lambda p, o: F.conv2d(p, MIX[..., None, None], bias=MIX[0]),
    "clamped": lambda p, o: p.clamp(min=0.01),
    "sharpened": lambda p, o: p**2 / (p**2).sum(-1, keepdim=True),
    "residual": lambda p, o: p + 0.1,
    "complement": lambda p, o: 1 - p,
}


@pytest.mark.parametrize("name", MADE_OF_PROBABILITIES)
def test_what_is_made_of_probabilities_of_attention_is_held_constant_with_them(name):
    (q, k, v), made = operands(), MADE_OF_PROBABILITIES[name]

    def weights(q, k):
        return made((q @ k.mT * E**-0.5).softmax(-1), (k @ k.mT * E**-0.5).softmax(-1)[..., :L, :])

    constant = weights(q, k)
    values = lambda v: v[..., : constant.shape[-1], :]  # noqa: E731
    r = numbers(*(constant @ values(v)).shape, seed=8)
    (of_q, of_k, of_v), _ = explain(lambda q, k, v: weights(q, k) @ values(v), [q, k, v], r, lrp("constant"))
    (wanted,), _ = explain(lambda v: constant @ values(v), [v], r, lrp("constant"))
    assert not of_q.any()
    assert not of_k.any()
    torch.testing.assert_close(of_v, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("masked", [False, True])
def test_what_probabilities_weight_is_no_attention(masked):
    """A memory that is read shares its product with another tensor."""
    x, v, r, memory = numbers(1, 3, 4), numbers(1, 5, 2, seed=2), numbers(1, 3, 2, seed=1), numbers(4, 5, seed=3)
    mask = torch.tensor([[[0.0], [1.0], [2.0]]]).double() if masked else 1.0
    (_, of_v), _ = explain(lambda x, v: (mask * x.softmax(-1) @ memory) @ v, [x, v], r, lrp("constant"))
    torch.testing.assert_close(of_v.sum(), r[:, 1 if masked else 0 :].sum() / 2, rtol=1e-9, atol=1e-9)


def test_exponentials_over_their_sum_and_one_are_held_constant():
    """Attention that may attend to nothing."""
    x, v, r = numbers(3, 4), numbers(3, 4, 5, seed=2), numbers(3, 5, seed=1)

    def attend(x, v):
        return ((x.exp() / (1 + x.exp().sum(-1, keepdim=True)))[:, None] @ v)[:, 0]

    (of_x, of_v), _ = explain(attend, [x, v], r, lrp("constant"))
    assert not of_x.any()
    torch.testing.assert_close(of_v.sum((1, 2)), r.sum(1), rtol=1e-9, atol=1e-9)


MASK = torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64)
#: Softmax of the logits that a mask of zeros and ones lets pass.
MASKED = {
    "exponentials": lambda x: (x.exp() * MASK) / (x.exp() * MASK).sum(-1, keepdim=True),
    "safe": lambda x: torch.exp(x - x.amax(-1, True)) * MASK / (torch.exp(x - x.amax(-1, True)) * MASK).sum(-1, True),
    "normalized": lambda x: F.normalize(MASK * x.exp(), 1.0, 1),
    "filled": lambda x: F.normalize(x.exp().masked_fill(MASK == 0, 0), 1.0, -1),
    "where": lambda x: divided(torch.where(MASK > 0, x.exp(), 0)),
    "triangle": lambda x: divided(x.exp().tril(9) * MASK),
}


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("attention", ["constant", "split"])
def test_a_softmax_of_masked_exponentials(name, attention):
    x, v, r = numbers(3, 4), numbers(3, 4, 5, seed=2), numbers(3, 5, seed=1)

    def relevance(shares):
        return explain(lambda x, v: (shares(x)[:, None] @ v)[:, 0], [x, v], r, lrp(attention))[0]

    found, wanted = relevance(MASKED[name]), relevance(lambda x: x.masked_fill(MASK == 0, -torch.inf).softmax(-1))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:the model ends in a softmax")
def test_weights_of_exponentials_are_added_to_the_logits_as_logarithms():
    x, r, scale = numbers(3, 4), numbers(3, 4, seed=1), numbers(4, seed=2).abs()
    (found,), _ = explain(lambda x: (x.exp() * scale) / (x.exp() * scale).sum(-1, True), [x], r, lrp("split"))
    (wanted,), _ = explain(lambda x: (x + scale.log()).softmax(-1), [x], r, lrp("split"))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_what_comes_after_an_exponential_in_place_is_none():
    """Shares of sizes are no softmax; `explain` compares the prediction, too."""

    def shares(x):
        e, sizes = x.clone().exp_(), x.abs()
        return sizes / sizes.sum(-1, keepdim=True) + 0.0 * e

    x, r = numbers(2, 4), numbers(2, 4, seed=1)
    (found,), kept = explain(shares, [x], r, lrp("constant"))
    torch.testing.assert_close(found, r, rtol=1e-9, atol=1e-9)
    assert kept.abs().max() <= 1e-9


@pytest.mark.parametrize("attention", ["constant", "split"])
def test_self_attention_of_one_tensor(attention):
    x, r = numbers(2, L, E), numbers(2, L, E, seed=8)
    (found,), _ = explain(lambda x: F.scaled_dot_product_attention(x, x, x), [x], r, lrp(attention))
    expected = closed_form(x, x, x, r, attention)
    torch.testing.assert_close(found, sum(expected[name] for name in "qkv"), rtol=1e-9, atol=1e-9)


def test_attention_that_is_not_torchs_own_call_is_refused_by_name():
    def low(q, k, v):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]

    with pytest.raises(NotImplementedError, match="no rule for scaled_dot_product_flash_attention_for_cpu"):
        explain(low, operands(), numbers(1, HEADS, L, E), lrp("split"))


@torch.compile(backend="eager")
def compiled(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


def written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-2, -1), -1) @ v


def scripted(q, k, v):
    return torch.jit.script(written)(q, k, v)


def flexible(q, k, v):
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(q, k, v)


class Kernel(torch.autograd.Function):
    """Attention as a custom function, without a derivative of its derivative."""

    @staticmethod
    def forward(ctx, q, k, v, bias):
        ctx.save_for_backward(q, k, v, bias)
        return F.scaled_dot_product_attention(q, k, v, bias)

    @staticmethod
    def backward(ctx, grad):
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in ctx.saved_tensors]
            return torch.autograd.grad(F.scaled_dot_product_attention(*leaves), leaves, grad)


def kernel(values, bias, keys, queries):
    """Attention with its arguments in an order of its own, and more than one result."""
    return Kernel.apply(queries, keys, values, bias), None


UNSEEN = {
    "vmap": lambda q, k, v: torch.vmap(F.scaled_dot_product_attention)(q, k, v),
    "scripted": scripted,
    "kernel": lambda q, k, v: kernel(v, BIAS, k, q)[0],
    "flex_attention": flexible,
    "compiled": compiled,
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:.*(flex_attention|performance drop|not a leaf Tensor):UserWarning")
@pytest.mark.parametrize("name", UNSEEN)
@pytest.mark.parametrize("attention", ["constant", "split"])
def test_what_cannot_be_seen_is_right_or_refused(name, attention):
    inputs, r = operands(), numbers(1, HEADS, L, E, seed=8)
    try:
        found, _ = explain(UNSEEN[name], inputs, r, lrp(attention))
    except UnseenError as error:
        assert "Map Whole(rule) to the module" in str(error)
        return
    except NotImplementedError as error:
        assert "FlexAttention does not support backward on CPU" in str(error)
        return
    assert name in ("compiled", "flex_attention")
    expected = closed_form(*inputs, r, attention)
    for key, one in zip("qkv", found, strict=True):
        torch.testing.assert_close(one, expected[key], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("attention", ["constant", "split"])
def test_registered_kernels_have_the_rule(attention):
    attend = register_attention(kernel, q="queries", k=2, v=0, mask="bias")
    assert register_attention(kernel) is attend and attend.__name__ == "kernel"
    inputs, r = [*operands(), BIAS], numbers(1, HEADS, L, E, seed=8)
    found, _ = explain(lambda q, k, v, m: attend(v, m, queries=q, keys=k)[0], inputs, r, lrp(attention))
    expected = closed_form(*inputs[:3], r, attention, mask=BIAS, dependent="qkvm")
    for key, one in zip(["q", "k", "v", "mask"], found, strict=True):
        torch.testing.assert_close(one, expected[key], rtol=1e-8, atol=1e-9)
    for composite, method in ((DeepLift(reference=0.3), "DeepLift"), (DeepTaylor(), "DeepTaylor")):
        with pytest.raises(NotImplementedError, match=rf"{method} has no rule for kernel\(\)"):
            explain(lambda q, k, v: attend(v, BIAS, queries=q, keys=k)[0], inputs[:3], r, composite)


def test_kernels_that_cannot_be_registered():
    with pytest.raises(ValueError, match=r"exponentials has no argument 3; it has \('q', 'k', 'v'\)"):
        register_attention(exponentials, mask=3)
    with pytest.raises(TypeError, match="have no names; wrap it in a function of Python"):
        register_attention(torch.add)


# --- nn.MultiheadAttention ------------------------------------------------------------------------------------------


class Plain(nn.Module):
    """The same as an `nn.MultiheadAttention`, of dense layers and matrix products; batch first."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        a = attention
        weights = a.in_proj_weight.chunk(3) if a._qkv_same_embed_dim else (a.q_proj_weight, a.k_proj_weight,
                                                                          a.v_proj_weight)  # fmt: skip
        biases = [None] * 3 if a.in_proj_bias is None else a.in_proj_bias.chunk(3)
        for name, weight, bias in zip("qkv", weights, biases, strict=True):
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None).double()
            layer.weight = nn.Parameter(weight.detach().clone())
            if bias is not None:
                layer.bias = nn.Parameter(bias.detach().clone())
            self.add_module(name, layer)
        self.out = nn.Linear(a.embed_dim, a.embed_dim, a.out_proj.bias is not None).double()
        self.out.load_state_dict(a.out_proj.state_dict())
        self.heads, self.more = a.num_heads, (a.bias_k, a.bias_v)
        self.adds_zero = a.add_zero_attn

    def forward(self, q, k, v, mask=None):
        q, k, v = self.q(q), self.k(k), self.v(v)
        if self.more[0] is not None:
            k, v = (torch.cat([t, row.expand(len(t), 1, -1)], 1) for t, row in zip((k, v), self.more, strict=True))
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        if self.adds_zero:
            k, v = (F.pad(t, (0, 0, 0, 1)) for t in (k, v))
        logits = q @ k.mT * q.shape[-1] ** -0.5
        if mask is not None:
            logits = logits + F.pad(mask, (0, logits.shape[-1] - mask.shape[-1]))
        return self.out((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))


MODULES = {
    "self": {},
    "without_bias": {"bias": False},
    "bias_k": {"add_bias_kv": True},
    "zero": {"add_zero_attn": True},
    "both": {"add_bias_kv": True, "add_zero_attn": True},
    "widths": {"kdim": 5, "vdim": 7},
}
WIDTH = 6
PADDING = torch.tensor([[False, False, False, True], [False, False, False, False]])
ADDED = numbers(L, S, seed=6)


def modules_of(name):
    torch.manual_seed(1)
    attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **MODULES[name]).double().eval()
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return attention, Plain(attention)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("needs_weights", [True, False])
@pytest.mark.parametrize("masks", ["none", "added", "padding", "both"])
@pytest.mark.parametrize("kind", [AttnLRP, CPLRP, UniformZPlus, UniformGamma])
def test_multi_head_attention_is_dense_layers_and_attention(name, needs_weights, masks, kind):
    attention, plain = modules_of(name)
    inputs = [numbers(2, L, WIDTH), numbers(2, S, attention.kdim, seed=2), numbers(2, S, attention.vdim, seed=3)]
    padding = torch.zeros(2, S, dtype=torch.float64).masked_fill(PADDING, -torch.inf)
    given, mask = {}, torch.zeros(2, 1, L, S, dtype=torch.float64)
    if masks in ("added", "both"):
        given["attn_mask"], mask = ADDED, mask + ADDED
    if masks in ("padding", "both"):
        given["key_padding_mask"] = padding if masks == "both" else PADDING
        mask = mask + padding[:, None, None]
    m = numbers(2, L, WIDTH, seed=8)
    found = []
    for model, call in (
        (attention, lambda net, *t: net(*t, need_weights=needs_weights, **given)[0]),
        (plain, lambda net, *t: net(*t, mask)),
    ):
        wrapped = Wrapped(model, call)
        with kind().context(wrapped):
            leaves = [x.clone().requires_grad_() for x in inputs]
            y = wrapped(*leaves)
            found.append((y.detach(), *torch.autograd.grad(y, leaves, m)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)
    assert found[0][3].abs().max() > 0


class Wrapped(nn.Module):
    """A module that is called in some way."""

    def __init__(self, module, call):
        super().__init__()
        self.module, self.call = module, call

    def forward(self, *inputs):
        return self.call(self.module, *inputs)


@pytest.mark.parametrize("needs_weights", [True, False])
@pytest.mark.parametrize("layout", ["unbatched", "time_first", "one_tensor"])
def test_layouts_of_multi_head_attention(needs_weights, layout):
    attention, plain = modules_of("self")
    x, m = numbers(2, L, WIDTH), numbers(2, L, WIDTH, seed=8)

    def call(net, x):
        if layout == "one_tensor":
            return net(x, x, x, need_weights=needs_weights)[0]
        if layout == "unbatched":
            return torch.stack([net(row, row, row, need_weights=needs_weights)[0] for row in x])
        net.batch_first = False
        t = x.transpose(0, 1)
        return net(t, t, t, need_weights=needs_weights)[0].transpose(0, 1)

    found = []
    for model, way in ((attention, call), (plain, lambda net, x: net(x, x, x))):
        wrapped = Wrapped(model, way)
        with AttnLRP().context(wrapped):
            leaf = x.clone().requires_grad_()
            found.append(torch.autograd.grad(wrapped(leaf), leaf, m)[0])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-10)


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
def test_encoder_of_torch_is_explained_with_padding_and_names_of_inner_operations():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 8, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True).double().eval()
    x, padding = numbers(2, S, WIDTH), PADDING
    wrapped = Wrapped(model, lambda net, x: net(x, src_key_padding_mask=padding).masked_fill(padding[..., None], 0.0))
    with torch.no_grad():
        plain = wrapped(x)
    with CPLRP().context(wrapped):
        leaf = x.clone().requires_grad_()
        y = wrapped(leaf)
        (found,) = torch.autograd.grad(y[:, 0].sum(), leaf)
    torch.testing.assert_close(y.detach(), plain, rtol=1e-9, atol=1e-10)
    assert not found[0, 3].any() and found[1, 3].any()
    rows = [(row.function, row.rule.partition("(")[0]) for row in CPLRP().report(wrapped, x).operations]
    assert ("linear", "Epsilon") in rows and ("scaled_dot_product_attention", "DotProductAttention") in rows
    assert not any(function == "multi_head_attention_forward" for function, _ in rows)


def test_attention_as_one_function_if_it_is_named():
    attention, _ = modules_of("self")
    wrapped = Wrapped(attention, lambda net, x: net(x, x, x, need_weights=False)[0])
    x, m = numbers(2, L, WIDTH), numbers(2, L, WIDTH, seed=8)
    (wanted,) = torch.autograd.grad(wrapped(leaf := x.clone().requires_grad_()), leaf, m)
    with AttnLRP(layer_map=[(F.multi_head_attention_forward, None)]).context(wrapped):
        (found,) = torch.autograd.grad(wrapped(leaf := x.clone().requires_grad_()), leaf, m)
    assert off(found, wanted * x) <= 1e-12


# --- in all ways to run ---------------------------------------------------------------------------------------------


def projected():
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(E, 3 * E), nn.Linear(E, 2)).double()

    def forward(net, x):
        q, k, v = net[0](x).chunk(3, -1)
        return net[1](F.scaled_dot_product_attention(q, k, v)).mean(1)

    return Wrapped(net, forward).eval(), numbers(3, S, E)


def test_fused_kernels_stay_fused():
    model, data = projected()
    for composite in (AttnLRP(), CPLRP()):
        with composite.context(model):
            out = model(data.clone().requires_grad_())
        names, todo = set(), [out.grad_fn]
        while todo:
            node = todo.pop()
            names.add(node.name())
            todo += [below for below, _ in node.next_functions if below is not None]
        assert any("FlashAttention" in name for name in names)
        assert not any("Softmax" in name for name in names)


@pytest.mark.parametrize("kind", [AttnLRP, CPLRP])
def test_many_conditions_go_back_together(kind):
    model, data = projected()
    conditions = [{"y": 1, "module.0": [c]} for c in range(3 * E)]
    mask = _last_axis
    together = CondAttribution(model)(data[:1], conditions, kind(), mask_map=mask).heatmap
    alone = [CondAttribution(model)(data[:1], [one], kind(), mask_map=mask).heatmap for one in conditions]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-10, atol=1e-12)
    whole = CondAttribution(model)(data[:1], [{"y": 1}], kind()).heatmap
    torch.testing.assert_close(together.sum(0, keepdim=True), whole, rtol=1e-10, atol=1e-12)


def _last_axis(batch_id, concept_ids, layer_name=None):
    def mask(grad: Tensor) -> Tensor:
        kept = torch.ones_like(grad)
        kept[batch_id] = 0
        kept[batch_id][..., concept_ids] = 1
        return grad * kept

    return mask


@pytest.mark.parametrize("kind", [AttnLRP, CPLRP])
def test_relevance_has_derivatives_where_the_kernel_has(kind):
    model, data = projected()
    weight, direction = numbers(3, S, E, seed=5), numbers(3, S, E, seed=6)

    def relevance(leaf, create_graph=False):
        return torch.autograd.grad(model(leaf)[:, 0].sum(), leaf, create_graph=create_graph)[0]

    composite = kind()
    with sdpa_kernel(SDPBackend.MATH), composite.context(model):
        leaf = data.clone().requires_grad_()
        value = (relevance(leaf, True) * weight).sum()
        with composite.inactive():
            (gradient,) = torch.autograd.grad(value, leaf)
        step = 1e-5
        above, below = (
            (relevance((data + sign * step * direction).requires_grad_()) * weight).sum() for sign in (1, -1)
        )
    assert abs((gradient * direction).sum() - (above - below) / (2 * step)) <= 1e-7 * abs(value.detach())


@pytest.mark.parametrize("kind", [AttnLRP, CPLRP])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision(kind, dtype, autocast):
    model, data = projected()
    composite = kind()

    def relevance(model, data):
        with composite.context(model), torch.autocast("cpu", dtype, enabled=autocast and data.dtype == torch.float32):
            leaf = data.clone().requires_grad_()
            return torch.autograd.grad(model(leaf)[:, 0].sum(), leaf)[0]

    wanted = relevance(model, data)
    low = torch.float32 if autocast else dtype
    found = relevance(model.to(low), data.to(low))
    assert found.dtype == low and found.isfinite().all()
    assert off(found.double(), wanted) <= (0.02 if dtype == torch.float16 else 0.1)


@pytest.mark.parametrize("kind", [AttnLRP, CPLRP])
def test_checkpoints_change_nothing(kind):
    model, data = projected()
    plain, found = model.call, []
    for call in (plain, lambda net, x: torch.utils.checkpoint.checkpoint(plain, net, x, use_reentrant=False)):
        model.call = call
        with kind().context(model):
            leaf = data.clone().requires_grad_()
            found.append(torch.autograd.grad(model(leaf)[:, 0].sum(), leaf)[0])
    assert torch.equal(*found)


def test_rule_of_another_mode_is_refused():
    with pytest.raises(ValueError, match=r'attention is held constant \("constant"\) or takes half'):
        DotProductAttention("signal")


@pytest.mark.filterwarnings("ignore:.*outside DeepLIFT")
@pytest.mark.parametrize("call", CALLS)
def test_deeplift_takes_attention_apart(call):
    given, _ = CALLS[call]
    inputs = operands()
    net = Net(lambda *t: F.scaled_dot_product_attention(*t, **given).flatten(1)).double().eval()
    composite = DeepLift(reference=0.3)
    with composite.context(net):
        leaves = [x.clone().requires_grad_() for x in inputs]
        y = net(*leaves)
        found = torch.autograd.grad(y[:, 0].sum(), leaves)
    reference = net(*(torch.full_like(x, 0.3) for x in inputs))
    total = sum(one.flatten(1).sum(1) for one in found)
    torch.testing.assert_close(total, (y - reference)[:, 0].detach(), rtol=1e-9, atol=1e-10)


class _Core(nn.Module):
    """Attention as a module without parts, fused or written out."""

    def __init__(self, fused):
        super().__init__()
        self.fused = fused

    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v) if self.fused else (q @ k.mT / 2).softmax(-1) @ v


class _AroundCore(nn.Module):
    def __init__(self, fused):
        super().__init__()
        self.q, self.k, self.v, self.head = (nn.Linear(4, 4) for _ in range(4))
        self.core = _Core(fused)

    def forward(self, x):
        return self.head(self.core(self.q(x), self.k(x), self.v(x)).mean(1))


@pytest.mark.parametrize(
    ("fused", "rule"), [(True, DotProductAttention), (False, MatrixProduct)], ids=["fused", "products"]
)
def test_rules_for_several_operands_can_be_mapped_to_a_module(fused, rule):
    """They were passed over there without a word."""
    torch.manual_seed(0)
    model = _AroundCore(fused).double().eval()
    data = torch.randn(2, 5, 4, dtype=torch.float64)
    here = maps(model, data, UniformEpsilon(layer_map=[("core", rule("split"))]))
    assert off(here, maps(model, data, UniformEpsilon(attention="split"))) <= 1e-12
    assert off(here, maps(model, data, UniformEpsilon())) > 1e-3


@pytest.mark.parametrize("rule", [Gate(), ZPlus()], ids=["gate", "zplus"])
def test_a_rule_that_treats_no_operation_of_several_operands_is_refused(rule):
    with pytest.raises(TypeError, match="'core'"):
        maps(_AroundCore(True).double().eval(), numbers(2, 5, 4), UniformEpsilon(layer_map=[("core", rule)]))


def test_a_dense_layer_behind_exponentials_keeps_its_rule():
    """What divides behind it makes no attention of it, whatever the values are."""

    class Late(nn.Module):
        def __init__(self, divided_late):
            super().__init__()
            self.scores, self.values, self.out = nn.Linear(E, 1), nn.Linear(E, E), nn.Linear(E, 3, bias=False)
            self.divided_late = divided_late

        def forward(self, x):
            e = self.scores(x).exp()
            summed = (e * self.values(x)).sum(1)
            return self.out(summed) / e.sum(1) if self.divided_late else self.out(summed / e.sum(1))

    torch.manual_seed(0)
    nets = [Late(late).double().eval() for late in (True, False)]
    nets[1].load_state_dict(nets[0].state_dict())
    assert off(*(maps(net, numbers(2, L, E), UniformZPlus(stabilizer=1e-14)) for net in nets)) <= 1e-10
