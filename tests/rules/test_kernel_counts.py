"""What rules ask of torch beyond the model itself, counted exactly: no kernel runs for values that are there."""

from __future__ import annotations

import gc
import weakref
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from crp.attribution import CondAttribution
from crp.composites import EpsilonPlus


class Kernels(TorchDispatchMode):
    """Counts calls of kernels by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[str(func).split(".")[1]] += 1
        return func(*args, **(kwargs or {}))


class Net(nn.Module):
    """Two convolutions with something between them."""

    def __init__(self, between):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.conv1, self.conv2, self.squeeze = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3), nn.Conv2d(6, 6, 1)
        for parameter in self.parameters():
            parameter.data.normal_(0, 0.3, generator=generator)
        self.between = between

    def forward(self, x):
        return self.conv2(self.between(self, self.conv1(x))).flatten(1)


def net(between):
    return Net(between).double().eval()


DATA = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def attribute(model):
    return CondAttribution(model)(DATA, [{"y": 1}], EpsilonPlus()).heatmap


def counts(model):
    attribute(model)
    with Kernels() as kernels:
        attribute(model)
    return kernels.counts


def written_since(net, x):
    return F.silu(x).mul_(2)  # the next layer keeps it, and has no longer the values that the activation gave


ACTIVATIONS = {
    "SiLU": (lambda net, x: F.silu(x), "silu", 1),
    "SiLU in place": (lambda net, x: F.silu(x, inplace=True), "silu_", 1),
    "ReLU6": (lambda net, x: F.relu6(x), "hardtanh", 1),
    "ReLU6 in place": (lambda net, x: F.hardtanh(x, 0.0, 6.0, inplace=True), "hardtanh", 1),
    "GELU": (lambda net, x: F.gelu(x), "gelu", 1),
    "gated": (lambda net, x: gated(net, F.silu(x)), "silu", 1),
    "read by nothing that keeps it": (lambda net, x: -F.silu(x), "silu", 2),
    "written since": (written_since, "silu", 2),
}


def gated(net, x):
    return torch.sigmoid(net.squeeze(x.mean((2, 3), keepdim=True))) * x


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_runs_once_where_the_next_layer_keeps_what_it_gave(name):
    between, kernel, most = ACTIVATIONS[name]
    found = counts(net(between))
    assert found[kernel.rstrip("_")] + found[f"{kernel.rstrip('_')}_"] == most


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_what_the_next_layer_keeps_has_the_values_of_the_activation(monkeypatch, name):
    model = net(ACTIVATIONS[name][0])
    expected = attribute(model)
    monkeypatch.setattr("crp.rules.redirect._Borrowed.values", lambda self: None)  # each activation runs again
    assert torch.equal(attribute(model), expected)
    assert expected.abs().max() > 0


def test_an_activation_does_not_keep_its_output():
    """It remembers where the output is, and lets it go with whoever has it."""
    outputs = []

    def between(net, x):
        y = F.silu(x)
        outputs.append(weakref.ref(y))
        return -y

    model = net(between)
    gc.disable()
    try:
        with EpsilonPlus().context(model):
            output = model(DATA.clone().requires_grad_())
            assert output.requires_grad
            assert outputs[-1]() is None
        del output
    finally:
        gc.enable()


@pytest.mark.parametrize("calls", [1, 2])
def test_the_gradient_of_a_gate_that_is_held_is_not_computed(calls):
    """Products and sums are as many as if the gate were a constant."""

    def several(gate):
        def between(net, x):
            for _ in range(calls):
                x = gate(torch.sigmoid(net.squeeze(x.mean((2, 3), keepdim=True)))) * x
            return x

        return counts(net(between))

    found, constant = several(lambda gate: gate), several(lambda gate: gate.detach())
    assert [found[name] for name in ("mul", "sum")] == [constant[name] for name in ("mul", "sum")]


BOUNDED = {
    "hardtanh": (lambda net, x: F.hardtanh(x, 0, 6), 1),
    "hardtanh by name": (lambda net, x: F.hardtanh(x, min_val=0.5, max_val=6), 1),
    "ReLU6": (lambda net, x: nn.ReLU6()(x), 1),
    "clamp": (lambda net, x: x.clamp(0, 3), 1),
    "clamp by name": (lambda net, x: x.clamp(min=0), 1),
    "clamp_min": (lambda net, x: x.clamp_min(0.0), 1),
    "hardtanh with negative values": (lambda net, x: F.hardtanh(x), 2),
    "clamp with negative values": (lambda net, x: x.clamp(-1, 3), 2),
    "clamp from above": (lambda net, x: x.clamp(max=3), 2),
    "clamp by a tensor": (lambda net, x: x.clamp(torch.zeros(6, 1, 1, dtype=x.dtype)), 2),
}


@pytest.mark.parametrize("name", BOUNDED)
def test_no_value_is_read_where_none_can_be_negative(name):
    between, most = BOUNDED[name]
    assert counts(net(between))["amin"] == most
