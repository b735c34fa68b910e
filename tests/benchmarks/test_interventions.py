"""Relevance against interventions: the figures in closed form, and the table."""

from __future__ import annotations

import numpy as np
import torch
from attribution_cases import close, net
from torch import nn

from benchmarks.interventions import METHODS, conductance, correlations, table
from crp.attribution import CondAttribution


def linear_after(layer: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return net(lambda s, x: s.fc(s.conv(x).relu().mean((2, 3))), conv=layer, fc=nn.Linear(6, 3))


DATA = torch.randn(4, 2, 5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_gradient_times_activation_is_the_effect_itself_where_the_rest_is_linear():
    """Of all methods, on channels behind which the net is linear; random numbers do not follow it."""
    model = linear_after(nn.Conv2d(2, 6, 3, bias=False))
    model.act = nn.ReLU().eval()
    model.wiring = lambda s, x: s.fc(s.act(s.conv(x)).mean((2, 3)))
    figures = correlations(model, DATA, ["act"])
    assert set(figures["act"]) == set(METHODS)
    for name in ("gradient × activation", "EpsilonGamma", "DeepLIFT"):
        assert np.allclose(figures["act"][name], 1)
    assert np.abs(figures["act"]["random"]).max() < 1
    text = table("net", figures)
    assert "| gradient × activation | 1.00 ± 0.00 |" in text and len(text.splitlines()) == 2 + len(METHODS)


def test_conductance_adds_up():
    """Over channels it is the difference of the logits at both ends, for a net that is linear along the way."""
    model = linear_after(nn.Conv2d(2, 6, 3, bias=False))
    found = conductance(CondAttribution(model), DATA, [0, 1, 2, 0], ["conv"])["conv"]
    wanted = (model(DATA) - model(DATA * 0)).gather(1, torch.tensor([[0], [1], [2], [0]]))[:, 0]
    assert close(found.sum(1), wanted, 1e-9)
