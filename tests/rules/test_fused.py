"""Kernels of a GPU give what torch's operations give; and biases that are added apart change nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import crp.composites as composites
from crp.attribution import CondAttribution
from crp.concepts.fused import fused_scores
from crp.layers.devices import has_kernels, kernels_in
from crp.rules import layer as layers
from crp.rules.fused import fused_gamma_scales, fused_quotient


def test_kernels_by_the_interpreter() -> None:
    pytest.importorskip("triton", reason="kernels are written in Triton")
    file = Path(__file__).with_name("run_kernels.py")
    run = subprocess.run(
        [sys.executable, str(file)], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout == f"{5 * 4 * 12 + 5 * 2 * 2 + 4 * 4 * 2} cases"


def test_a_cpu_has_no_kernels() -> None:
    one = torch.ones(2, 3)
    assert fused_quotient(one, one, None, 1e-6, 1, 1.0) is None
    assert fused_gamma_scales(one, one, None, 0.25, 1e-6) is None
    assert fused_scores(one[..., None]) is None


def test_kernels_are_a_module_where_triton_is() -> None:
    assert kernels_in("crp.layers.devices") is sys.modules["crp.layers.devices"]
    assert kernels_in("crp.no_such_kernels") is None
    assert not has_kernels("crp.layers.devices", torch.ones(2))  # (of the CPU)


class Residual(nn.Module):
    """A convolution that a ReLU reads, one that a sum reads, one of inputs of both signs, and a dense layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 3, 2)
        self.dense = nn.Linear(3 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        return self.dense(self.third(x + self.second(x)).flatten(1))


@pytest.mark.parametrize(
    "make",
    [
        composites.EpsilonPlus,
        lambda: composites.EpsilonGammaBox(low=-3.0, high=3.0),
        composites.EpsilonAlpha2Beta1,
        lambda: composites.EpsilonPlus(empty="epsilon"),
    ],
    ids=["z+", "gamma", "alpha beta", "z+ or epsilon"],
)
def test_a_bias_that_is_added_apart(make: Callable[[], composites.Composite], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, data, conditions = Residual().double().eval(), torch.randn(3, 2, 7, 7).double(), [{"y": [1]}]
    exact = CondAttribution(model)(data, conditions, make(), ["first", "third"])
    monkeypatch.setattr(layers, "_adds_by_itself", lambda a: True)
    for attribution in (CondAttribution(model), CondAttribution(model)):
        found = attribution(data, conditions, make(), ["first", "third"])
        torch.testing.assert_close(found.heatmap, exact.heatmap, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(found.relevances, exact.relevances, rtol=1e-12, atol=1e-14)
    absorbed = CondAttribution(model).absorbed(data, conditions, make())
    torch.testing.assert_close(absorbed.input + absorbed.total, absorbed.initial, rtol=1e-10, atol=1e-12)
