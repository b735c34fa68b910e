"""A model that ends in a softmax hands back almost nothing of a class that is sure: a warning says so."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import crp
from crp.attribution import CondAttribution
from crp.composites import AttnLRP, EpsilonPlus, Gradient, UniformLRP0

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def model_with(end: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False)
    return nn.Sequential(*layers, end).double().eval()


class Cut(nn.Module):
    """Probabilities that are rearranged, as in front of a loss."""

    def forward(self, logits: Tensor) -> Tensor:
        return logits.softmax(1).reshape(len(logits), 3, 1).clamp(min=1e-9)[..., 0]


class Pooled(nn.Module):
    """A softmax that weights the logits."""

    def forward(self, logits: Tensor) -> Tensor:
        return logits + (logits.softmax(1)[:, None] @ logits[:, :, None])[:, 0]


@pytest.mark.parametrize("end", [nn.Softmax(1), nn.LogSoftmax(1), Cut()], ids=["softmax", "logarithm", "cut"])
@pytest.mark.parametrize("make", [EpsilonPlus, AttnLRP, UniformLRP0])
def test_a_model_that_ends_in_a_softmax(end, make):
    model = model_with(end)
    with pytest.warns(UserWarning, match="the model ends in a softmax, .* almost nothing of a class that is sure"):
        found = CondAttribution(model)(X, [{"y": 1}], make())
    meant = make(layer_map=[(type(end), None)])
    assert torch.equal(CondAttribution(model)(X, [{"y": 1}], meant).heatmap, found.heatmap)
    CondAttribution(model)(X, [{"y": 1}], Gradient())
    if type(end) is nn.Softmax:  # (LRP-0 without biases: what arrives at the logits, z m, with m of the softmax)
        logits, p = model[:3](X), model(X)
        assert (
            found.heatmap - p[:, 1] * (logits[:, 1] - (p * logits).sum(1))
        ).abs().max() <= 1e-12 or make is EpsilonPlus


@pytest.mark.parametrize("end", [nn.Identity(), nn.Sigmoid(), Pooled()], ids=["logits", "sigmoid", "inside"])
def test_models_that_do_not(end):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        crp.explain("epsilon", model_with(end), X, 1)
