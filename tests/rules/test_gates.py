"""Gates are found wherever a model writes them: a gate held constant is a gate taken out of the graph."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from crp.attribution import CondAttribution
from crp.composites import EpsilonPlus


class Sigmoid(nn.Module):
    def forward(self, x):
        return x.sigmoid()


class Sharp(nn.Module):
    def forward(self, x):
        return torch.sigmoid(2 * x)


class Squeezed(nn.Module):
    """A module that gates by the squeezed signal alone."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, z, x):
        return self.module(z)


#: Functions of the squeezed signal and of the signal.
GATES = {
    "function": lambda z, x: z.sigmoid(),
    "module of one function": Squeezed(Sigmoid()),
    "module of two functions": Squeezed(Sharp()),
    "softmax": lambda z, x: z.softmax(1),
    "closed by another": lambda z, x: 1 - z.sigmoid(),
    "expand_as": lambda z, x: z.sigmoid().expand_as(x),
    "view_as": lambda z, x: z.sigmoid().flatten(1).view_as(x),
    "reshape_as": lambda z, x: z.sigmoid().flatten(1).reshape_as(x),
    "type_as": lambda z, x: z.sigmoid().type_as(x),
}


class Gated(nn.Module):
    """Squeeze and excitation of maps of one pixel, which gates by their shape cannot be told from."""

    def __init__(self, gate, held):
        super().__init__()
        self.conv1, self.conv2, self.squeeze = nn.Conv2d(3, 6, 2), nn.Conv2d(6, 2, 1), nn.Conv2d(6, 6, 1)
        self.gate, self.held = gate, held

    def forward(self, x):
        x = self.conv1(x)
        gate = self.gate(self.squeeze(x.mean((2, 3), keepdim=True)), x)
        return self.conv2(x * (gate.detach() if self.held else gate)).flatten(1)


@pytest.mark.filterwarnings("ignore:.*has no rule for softmax:UserWarning")
@pytest.mark.parametrize("name", GATES)
def test_gate_is_held_constant(name):
    net = Gated(GATES[name], held=False).double().eval()
    held = Gated(GATES[name], held=True).double().eval()
    held.load_state_dict(net.state_dict())
    data = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    found, expected = (CondAttribution(m)(data, [{"y": 1}], EpsilonPlus()).heatmap for m in (net, held))
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
