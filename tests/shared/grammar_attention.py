"""Attention in the grammar of small models: tokens (count, width) as queries, keys and values, in one head or two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from grammar_affine import Operation, Settings, Weights
from torch import Tensor, nn
from torch.nn import functional as F

#: What a query sees: everything, itself and what comes before, or everything with a number for each distance.
MASKS = ("none", "none", "causal", "distance")


def _settings(choose: Any, *shapes: tuple[int, ...]) -> Settings | None:
    if len(set(shapes)) > 1 or len(shapes[0]) != 2:
        return None
    heads = [n for n in (1, 2) if shapes[0][1] % n == 0]
    return {"heads": choose.of(heads), "scale": choose.of((1.0, 0.5)), "mask": choose.of(MASKS)}


def in_heads(s: Settings, tokens: Tensor) -> Tensor:
    """Tokens (batch, count, width) as (batch, heads, count, width of a head)."""
    return tokens.unflatten(-1, (s["heads"], -1)).transpose(1, 2)


def joined(heads: Tensor) -> Tensor:
    return heads.transpose(1, 2).flatten(-2)


def _mask(s: Settings, n: int) -> Tensor | None:
    """What is added to the logits."""
    places = torch.arange(n)
    if s["mask"] == "causal":
        return torch.zeros(n, n, dtype=torch.float64).masked_fill(places > places[:, None], -torch.inf)
    return None if s["mask"] == "none" else -0.3 * (places - places[:, None]).abs().double()


def logits(s: Settings, q: Tensor, k: Tensor) -> Tensor:
    mask = _mask(s, q.shape[-2])
    found = q @ k.mT * s["scale"]
    return found if mask is None else found + mask


def _with(attend: Callable[[Settings, Tensor, Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda s, w, q, k, v: joined(attend(s, *(in_heads(s, tokens) for tokens in (q, k, v))))


def _fused(s: Settings, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    is_causal = s["mask"] == "causal"
    mask = None if is_causal else _mask(s, q.shape[-2])
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=s["scale"])


def _by_einsum(s: Settings, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    found, mask = torch.einsum("nhid,nhjd->nhij", q * s["scale"], k), _mask(s, q.shape[-2])
    found = found if mask is None else found.add(mask)
    return torch.einsum("nhij,nhjd->nhid", F.softmax(found, dim=-1), v)


def _by_exponentials(s: Settings, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    found = logits(s, q, k)
    weights = torch.exp(found - found.amax(-1, keepdim=True))
    return torch.matmul(weights / weights.sum(-1, keepdim=True), v)


def _divided_last(s: Settings, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = logits(s, q, k).exp()
    return (weights @ v) / weights.sum(-1, keepdim=True)


def _by_logarithm(s: Settings, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.exp(logits(s, q, k).log_softmax(-1)) @ v


def _filled(s: Settings, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n = q.shape[-2]
    hidden = torch.ones(n, n, dtype=torch.bool).triu(1)
    return (q @ k.mT * s["scale"]).masked_fill(hidden, -torch.inf).softmax(-1) @ v


def _in_batches(s: Settings, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    count, mask = q.shape[-2], _mask(s, q.shape[-2])
    q, k, v = (heads.reshape(-1, *heads.shape[-2:]) for heads in (q, k, v))
    added = q.new_zeros(1) if mask is None else mask.expand(len(q), count, count)
    weights = torch.baddbmm(added, q, k.mT, alpha=s["scale"]).softmax(-1)
    return torch.bmm(weights, v).unflatten(0, (-1, s["heads"]))


def _each_head(s: Settings, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Head by head."""
    found = [logits(s, q[:, i], k[:, i]).softmax(-1) @ v[:, i] for i in range(s["heads"])]
    return torch.stack(found, 1)


def _keys_first(s: Settings, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = logits(s, q, k).mT.softmax(-2)
    return (v.mT @ weights).mT


def _plain(s: Settings, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return logits(s, q, k).softmax(-1) @ v


class Attend(nn.Module):
    """Attention without projections."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings = settings

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _with(_plain)(self.settings, {}, q, k, v)


def _attended(s: Settings, w: Weights) -> nn.Module:
    return Attend(s)


ATTENTION = {
    "attention": Operation(
        _with(_plain), "attention", _settings,
        {
            "fused": _with(_fused), "einsum": _with(_by_einsum), "exponentials": _with(_by_exponentials),
            "divided_last": _with(_divided_last), "logarithm": _with(_by_logarithm), "filled": _with(_filled),
            "batches": _with(_in_batches), "each_head": _with(_each_head), "keys_first": _with(_keys_first),
        },
        {"module": _attended},
        fits={"filled": lambda s, shapes: s["mask"] == "causal"},
    ),
}  # fmt: skip
