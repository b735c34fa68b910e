"""Functions that are several others, such as a sum with a product, are treated as these."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from crp.attribution import CondAttribution
from crp.composites import EpsilonPlus

W, B = torch.tensor([[0.5, -2.0, 1.5, 0.7]]).double(), torch.tensor([[0.3, -0.4, 0.2, 1.0]]).double()
ROWS = torch.tensor([[1.0, -0.5, 0.3, 2.0], [0.2, 0.4, -1.5, 0.1]]).double()
#: In one function, and in several.
PAIRS = {
    "scale and shift": (lambda x: torch.addcmul(B, W, x), lambda x: B + W * x),
    "value": (lambda x: torch.addcmul(B, x, W, value=-0.5), lambda x: B - 0.5 * (x * W)),
    "by name": (lambda x: torch.addcmul(input=B, tensor1=x, tensor2=W, value=2), lambda x: B + 2 * (x * W)),
    "gate": (lambda x: x.addcmul(x, x.sigmoid()), lambda x: x + x * x.sigmoid()),
    "in place": (lambda x: x.clone().addcmul_(W, B), lambda x: x + W * B),
    "quotient": (lambda x: torch.addcdiv(B, x, W), lambda x: B + x / W),
    "mean": (lambda x: torch.lerp(x, B, 0.3), lambda x: x + 0.3 * (B - x)),
    "gated state": (lambda x: x.lerp(x.tanh(), x.sigmoid()), lambda x: x + x.sigmoid() * (x.tanh() - x)),
    "mean in place": (lambda x: x.clone().lerp_(W, weight=B), lambda x: x + B * (W - x)),
    "mean by name": (lambda x: torch.lerp(input=B, end=x, weight=W), lambda x: B + W * (x - B)),
    "cosine": (
        lambda x: F.cosine_similarity(x[:, None].expand(-1, 4, -1), x.tanh()[:, None] * ROWS[0], dim=-1),
        lambda x: (
            F.normalize(x[:, None].expand(-1, 4, -1), dim=-1) * F.normalize(x.tanh()[:, None] * ROWS[0], dim=-1)
        ).sum(-1),
    ),
    "cosine of prototypes": (
        lambda x: F.cosine_similarity(x[:, None], ROWS[None], dim=2, eps=1e-3).repeat(1, 2),
        lambda x: (F.normalize(x, eps=1e-3) @ F.normalize(ROWS).T).repeat(1, 2),
    ),
    "cosine with a vector": (
        lambda x: F.cosine_similarity(x, ROWS[0])[:, None] * W,
        lambda x: (F.normalize(x) * F.normalize(ROWS[:1])).sum(1, keepdim=True) * W,
    ),
    "cosine of a column": (
        lambda x: F.cosine_similarity(x[:, :1], ROWS)[:, None] * W,
        lambda x: (F.normalize(x[:, :1].expand(-1, 4)) * F.normalize(ROWS)).sum(1, keepdim=True) * W,
    ),
    "norm": (lambda x: torch.addcdiv(B, x, x.norm(dim=1, keepdim=True)), lambda x: B + x / x.norm(dim=1, keepdim=True)),
}


class Net(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.below, self.above, self.function = nn.Linear(3, 4), nn.Linear(4, 2), function

    def forward(self, x):
        return self.above(self.function(self.below(x)))


@pytest.mark.parametrize("name", PAIRS)
def test_one_function_is_several(name):
    nets = [Net(function).double().eval() for function in PAIRS[name]]
    nets[1].load_state_dict(nets[0].state_dict())
    data = torch.randn(2, 3, dtype=torch.float64)
    relevance = []
    for net in nets:
        leaf = data.clone().requires_grad_()
        result = CondAttribution(net)(leaf, [{"y": 1}], EpsilonPlus())
        torch.testing.assert_close(result.prediction, nets[1](data).detach(), rtol=1e-12, atol=0)
        relevance.append(leaf.grad)
    torch.testing.assert_close(*relevance, rtol=1e-12, atol=1e-14)
    found, expected = (CondAttribution(net).absorbed(data, [{"y": 1}], EpsilonPlus()) for net in nets)
    assert found.rest.abs().max() <= 1e-12 * found.initial.abs().max()
    for shares, others in zip(found.layers.values(), expected.layers.values(), strict=True):
        torch.testing.assert_close(shares, others, rtol=1e-10, atol=1e-14)
