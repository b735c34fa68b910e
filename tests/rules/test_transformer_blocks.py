"""Blocks of transformers against closed forms: multipliers that are handed down step by step, as the papers say."""

from __future__ import annotations

import pytest
import torch
from preset_cases import numbers, off
from test_attention import closed_form, explain, lrp
from torch import nn
from torch.nn import functional as F

from crp.attribution import CondAttribution
from crp.concepts import AxisConcept

TOKENS, WIDTH, N_HEADS, N_NEURONS = 4, 6, 2, 5
MODES = pytest.mark.parametrize(
    ("attention", "gates"), [("constant", "signal"), ("split", "split"), ("constant", "split")]
)


def split(h):
    """Heads of (1, token, channel)."""
    return h.unflatten(-1, (N_HEADS, -1)).transpose(1, 2)


def merge(h):
    return h.transpose(1, 2).flatten(2)


class Block(nn.Module):
    """Attention and an MLP, each with a residual connection, and norms before or behind them; (1, token, channel)."""

    def __init__(self, norms):
        super().__init__()
        self.norms = norms
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in "qkvo")
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH, 1e-3), nn.LayerNorm(WIDTH, 1e-3)
        self.up, self.down, self.head = nn.Linear(WIDTH, N_NEURONS), nn.Linear(N_NEURONS, WIDTH), nn.Linear(WIDTH, 3)
        self.double().eval()
        with torch.no_grad():
            for seed, parameter in enumerate(self.parameters()):
                parameter.copy_(numbers(*parameter.shape, seed=seed) * 0.6)

    def attend(self, a):
        q, k, v = (split(layer(a)) for layer in (self.q, self.k, self.v))
        return self.o(merge(F.scaled_dot_product_attention(q, k, v)))

    def mlp(self, a):
        return self.down(F.gelu(self.up(a)))

    def forward(self, x):
        if self.norms == "before":
            h = x + self.attend(self.norm1(x))
            y = h + self.mlp(self.norm2(h))
        else:
            h = self.norm1(x + self.attend(x))
            y = self.norm2(h + self.mlp(h))
        return self.head(y.mean(1))


class ByHand:
    """Multipliers of a block, from the output down; ``chosen`` are the only heads, neurons or tokens that count."""

    def __init__(self, block, attention, what=None, chosen=()):
        self.block, self.attention, self.what, self.chosen = block, attention, what, list(chosen)

    def kept(self, what, m, n):
        """Multipliers of one of n equal groups along the last axis, or of tokens."""
        if self.what != what:
            return m
        mask = torch.zeros(n, dtype=m.dtype)
        mask[self.chosen] = 1
        return m * (mask[:, None] if what == "tokens" else mask.repeat_interleave(m.shape[-1] // n))

    def past(self, what, m):
        """Multipliers of a residual connection, past what is chosen."""
        return torch.zeros_like(m) if self.what == what else m

    def norm(self, layer, a, m):
        u, sigma = layer.weight * m, (a.var(-1, correction=0, keepdim=True) + layer.eps).sqrt()
        return (u - u.mean(-1, keepdim=True)) / sigma

    def attend(self, a, m):
        b = self.block
        q, k, v = (split(layer(a)) for layer in (b.q, b.k, b.v))
        below = split(self.kept("heads", m @ b.o.weight, N_HEADS))
        relevance = below * F.scaled_dot_product_attention(q, k, v)
        found = closed_form(q, k, v, relevance, self.attention)
        parts = ((b.q, found["q"] / q), (b.k, found["k"] / k), (b.v, found["v"] / v))
        return sum(merge(multiplier) @ layer.weight for layer, multiplier in parts)

    def mlp(self, a, m):
        z = self.block.up(a)
        return self.kept("neurons", m @ self.block.down.weight, N_NEURONS) * (F.gelu(z) / z) @ self.block.up.weight

    @torch.no_grad()
    def relevance(self, x, y):
        b = self.block
        m = (b.head.weight[y] / TOKENS).expand_as(x)
        if b.norms == "before":
            a = b.norm1(x)
            h = x + b.attend(a)
            m = self.past("neurons", m) + self.norm(b.norm2, h, self.mlp(b.norm2(h), m))
            below = self.kept("tokens", self.attend(a, m), TOKENS)
            residual = self.past("tokens", self.past("heads", m))
            return x * (residual + self.norm(b.norm1, x, below))
        s = x + b.attend(x)
        h = b.norm1(s)
        m = self.norm(b.norm2, h + b.mlp(h), m)
        m = self.kept("tokens", self.past("neurons", m) + self.mlp(h, m), TOKENS)
        m = self.norm(b.norm1, s, m)
        return x * (self.past("heads", m) + self.attend(x, m))


@pytest.mark.parametrize("norms", ["before", "behind"])
@pytest.mark.parametrize("attention", ["constant", "split"])
def test_a_block_of_attention_and_an_mlp(norms, attention):
    block, x = Block(norms), numbers(1, TOKENS, WIDTH, seed=50).requires_grad_()
    CondAttribution(block)(x, [{"y": 2}], lrp(attention))
    assert off(x.grad, ByHand(block, attention).relevance(x.detach(), 2)) <= 1e-9


#: Layer, concept and number of concepts.
PARTS = {
    "heads": ("o.input", AxisConcept(-1, groups=N_HEADS), N_HEADS),
    "neurons": ("down.input", AxisConcept(-1), N_NEURONS),
    "tokens": ("norm1", AxisConcept(1), TOKENS),
}


@pytest.mark.parametrize("norms", ["before", "behind"])
@pytest.mark.parametrize("attention", ["constant", "split"])
@pytest.mark.parametrize("what", PARTS)
def test_heads_neurons_and_tokens_of_a_block(what, attention, norms):
    """What flows through one of them, and through two, and nothing past them."""
    block, (layer, concept, n) = Block(norms), PARTS[what]
    for chosen in (*([one] for one in range(n)), [0, n - 1]):
        x = numbers(1, TOKENS, WIDTH, seed=50).requires_grad_()
        CondAttribution(block)(x, [{"y": 1, layer: chosen}], lrp(attention), mask_map=concept.mask)
        assert off(x.grad, ByHand(block, attention, what, chosen).relevance(x.detach(), 1)) <= 1e-9, chosen


def rotated(h, sign=1):
    """Rotary embedding: pairs of channels, of which the halves hold one each, turned by the position."""
    angle = torch.arange(h.shape[-2], dtype=h.dtype)[:, None] * torch.tensor([1.0, 0.3], dtype=h.dtype)
    cos, sin = angle.cos().repeat(1, 2), sign * angle.sin().repeat(1, 2)
    one, other = h.chunk(2, -1)
    return h * cos + torch.cat([-other, one], -1) * sin


@pytest.mark.parametrize("attention", ["constant", "split"])
def test_rotary_embedding_turns_multipliers_back(attention):
    q, k, v, r = (numbers(1, 2, 3, 4, seed=seed) for seed in range(4))
    found, _ = explain(
        lambda q, k, v: F.scaled_dot_product_attention(rotated(q), rotated(k), v), (q, k, v), r, lrp(attention)
    )
    behind = closed_form(rotated(q), rotated(k), v, r, attention)
    wanted = [t * rotated(behind[name] / rotated(t), -1) for name, t in (("q", q), ("k", k))]
    for one, other in zip(found, [*wanted, behind["v"]], strict=True):
        assert (one - other).abs().max() <= 1e-9 * behind["v"].abs().max()


@pytest.mark.parametrize("attention", ["constant", "split"])
def test_cross_attention_explains_both_inputs(attention):
    """Queries are made of one input, keys and values of the other, as in a decoder."""
    x, memory, r = numbers(1, 3, WIDTH), numbers(1, TOKENS, WIDTH, seed=1), numbers(1, 3, WIDTH, seed=2)
    wq, wk, wv = (numbers(WIDTH, WIDTH, seed=seed) for seed in (3, 4, 5))

    def cross(x, memory):
        return merge(F.scaled_dot_product_attention(split(x @ wq), split(memory @ wk), split(memory @ wv)))

    (of_x, of_memory), _ = explain(cross, (x, memory), r, lrp(attention))
    q, k, v = split(x @ wq), split(memory @ wk), split(memory @ wv)
    below = closed_form(q, k, v, split(r), attention)
    m_q, m_k, m_v = (merge(below[name] / t) for name, t in (("q", q), ("k", k), ("v", v)))
    assert (of_x - x * (m_q @ wq.T)).abs().max() <= 1e-9
    assert off(of_memory, memory * (m_k @ wk.T + m_v @ wv.T)) <= 1e-9


@MODES
def test_gated_mlp(attention, gates):
    """silu(x a) ⊙ (x b): half to each factor, or all to the second one."""
    x, r = numbers(3, 4), numbers(3, 5, seed=1)
    a, b = numbers(4, 5, seed=2), numbers(4, 5, seed=3)
    (found,), _ = explain(lambda x: F.silu(x @ a) * (x @ b), (x,), r, lrp(attention, gates=gates))
    z, u = x @ a, x @ b
    m = r / (F.silu(z) * u)
    to_signal = m * F.silu(z) @ b.T
    to_gate = m * u * torch.sigmoid(z) @ a.T
    assert off(found, x * (to_signal if gates == "signal" else (to_signal + to_gate) / 2)) <= 1e-9


@pytest.mark.filterwarnings("ignore:the model ends in a softmax")
def test_softmax_has_the_first_terms_of_its_taylor_expansion():
    """R_i = s_i (R_i' - p_i Σ R'), AttnLRP, eq. 8; what a mask hides gets nothing."""
    s, r = numbers(3, 4), numbers(3, 4, seed=1)
    mask = torch.zeros(3, 4, dtype=torch.float64)
    mask[0, 1], mask[2, 1:] = -torch.inf, -torch.inf
    r = r.masked_fill(mask.isinf(), 0.0)
    (found,), _ = explain(lambda s: torch.softmax(s + mask, -1), (s,), r, lrp("split"))
    p = torch.softmax(s + mask, -1)
    wanted = s * (r - p * r.sum(-1, keepdim=True))
    assert (found - wanted).abs().max() <= 1e-12 and not found[mask.isinf()].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["gelu", "silu", "tanh", "mish"])
def test_activations_near_zero(name, dtype):
    """m_x = m y / x is finite however small x is, nothing at 0, and right where the type can tell."""
    function = getattr(F, name) if hasattr(F, name) else getattr(torch, name)
    for value in (0.0, torch.finfo(dtype).tiny, torch.finfo(dtype).tiny ** 0.5, 2.0**-6):
        x = torch.tensor([[1.0, 1.0]], dtype=dtype).requires_grad_()
        net = Activated(function).to(dtype)
        with torch.no_grad():
            net.first.weight.copy_(torch.tensor([[1.0, -1.0]]))
            net.first.bias.fill_(value)
        with lrp("split").context(net):
            (found,) = torch.autograd.grad(net(x), x)
        assert found.isfinite().all()
        if value == 0:
            assert not found.any()
    exact = torch.tensor(2.0**-6, dtype=torch.float64)
    ratio = float(function(exact) / exact)
    assert (found.double() - torch.tensor([[ratio, -ratio]], dtype=torch.float64)).abs().max() <= 4 * torch.finfo(
        dtype
    ).eps


class Activated(nn.Module):
    """act(w x + b)."""

    def __init__(self, function):
        super().__init__()
        self.first, self.function = nn.Linear(2, 1), function

    def forward(self, x):
        return self.function(self.first(x))
