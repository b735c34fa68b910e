"""DeepLIFT against captum, where captum is right: no overlapping windows, nothing between two hooked modules."""

from __future__ import annotations

import warnings

import pytest
import torch
from deeplift_cases import relevance
from torch import Tensor, nn

from crp.composites import DeepLift

pytestmark = pytest.mark.peer
captum = pytest.importorskip("captum.attr")


class Copied(nn.Module):
    """Keeps two hooked modules apart."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 1.0


def net(kind: str, activation: type[nn.Module]) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    if kind == "mlp":
        model = nn.Sequential(nn.Linear(8, 9), activation(), nn.Linear(9, 7), activation(), nn.Linear(7, 3))
        shape: tuple[int, ...] = (8,)
    else:
        model = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), activation(), Copied(), nn.MaxPool2d(2),
            nn.Conv2d(4, 4, 3, 2, 1, groups=2), activation(), nn.AvgPool2d(2, padding=1), nn.Flatten(),
            nn.Linear(16, 3),
        )  # fmt: skip
        nn.init.uniform_(model[1].running_var, 0.5, 1.5)
        shape = (2, 12, 12)
    x, x0 = torch.randn(2, 4, *shape, dtype=torch.float64)
    return model.double().eval(), x, x0


@pytest.mark.parametrize("activation", [nn.ReLU, nn.LeakyReLU, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.ELU])
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
@pytest.mark.parametrize("reference", ["zero", "one", "each"])
def test_agrees_with_captum(kind: str, activation: type[nn.Module], reference: str) -> None:
    model, x, x0 = net(kind, activation)
    x0 = {"zero": torch.zeros_like(x[:1]), "one": x0[:1], "each": x0}[reference]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # captum speaks of its hooks
        expected = captum.DeepLift(model).attribute(x, x0, target=1)
    found = relevance(model, x, DeepLift(reference=x0), 1)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
