"""What is held constant, against models that detach it; with it, state-space models have MambaLRP."""

from __future__ import annotations

import core_cases
import pytest
import torch
from preset_cases import assert_closes, maps, numbers, off, seeded
from torch import nn
from torch.nn import functional as F

from crp.composites import CPLRP, AttnLRP, EpsilonPlus, RelP
from crp.rules import Constant


class Selective(nn.Module):
    """A layer of Mamba: a scan whose step and weights depend on what it reads, and a gate.

    With ``part``, as MambaLRP (Jafari et al., NeurIPS 2024) writes it: activations are scaled, what parametrizes the
    scan is constant, and half of the product flows on (or all, which is the signal's).
    """

    def __init__(self, part=None):
        super().__init__()
        self.part, bias = part, {"bias": False}
        self.in_proj, self.out_proj = nn.Linear(6, 16, **bias), nn.Linear(8, 6, **bias)
        self.conv = nn.Conv1d(8, 8, 3, padding=2, groups=8, **bias)
        self.x_proj, self.dt_proj = nn.Linear(8, 9), nn.Linear(1, 8)

    def silu(self, x):
        return F.silu(x) if self.part is None else x * x.sigmoid().detach()

    def forward(self, x):
        h, gate = self.in_proj(x).mT.chunk(2, 1)
        u = self.silu(self.conv(h)[..., : h.shape[-1]])
        parameters = self.x_proj(u.mT)
        step, b, c = (parameters if self.part is None else parameters.detach()).split([1, 4, 4], -1)
        step = F.softplus(self.dt_proj(step))[..., None]
        decay, update = torch.exp(-step), step * b[:, :, None] * u.mT[..., None]
        state, outputs = torch.zeros_like(update[:, 0]), []
        for i in range(x.shape[1]):
            state = decay[:, i] * state + update[:, i]
            outputs.append((state @ c[:, i, :, None]).squeeze(-1))
        y, gate = torch.stack(outputs, -1) + u, self.silu(gate)
        if self.part == 1:
            gate = gate.detach()
        product, part = y * gate, self.part or 1
        return x + self.out_proj((part * product + (1 - part) * product.detach()).mT)


def net(part=None):
    layers = [Selective(part), Selective(part), nn.Flatten(), nn.Linear(30, 3, bias=False)]
    return seeded(nn.Sequential(*layers))


@pytest.mark.parametrize(("kind", "part"), [(RelP, 0.5), (AttnLRP, 0.5), (CPLRP, 1)])
def test_state_space_models_have_mamba_lrp(kind, part):
    data = numbers(2, 5, 6)
    composite = kind(layer_map=[("*.x_proj", Constant())])
    wanted = data.clone().requires_grad_()
    output = net(part)(wanted)[:, 1]
    (gradient,) = torch.autograd.grad(output.sum(), wanted)
    with composite.context(net()) as model:
        found = data.clone().requires_grad_()
        (relevance,) = torch.autograd.grad(model(found)[:, 1].sum(), found)
    assert off(relevance, (gradient * wanted).detach()) <= 1e-12
    assert off(relevance.flatten(1).sum(1), output.detach()) <= 1e-9
    assert_closes(net(), data, composite)


def test_functions_and_blocks_may_be_held_constant():
    def gated(function):
        return lambda s, x: s.head(s.up(x) * function(s.gate(x)))

    layers = {name: nn.Linear(4, 4) for name in ("up", "gate", "head")}
    data = numbers(3, 4)
    plain = seeded(core_cases.Net(gated(lambda g: g.cosh().detach()), **layers))
    model = seeded(core_cases.Net(gated(torch.cosh), **layers))
    wanted = maps(plain, data, EpsilonPlus(gates="split"))
    for what in (torch.cosh, "gate"):
        assert off(maps(model, data, EpsilonPlus(gates="split", layer_map=[(what, Constant())])), wanted) <= 1e-12
    assert off(maps(model, data, EpsilonPlus(gates="split")), wanted) > 0.1
