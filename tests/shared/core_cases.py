"""Nets that models in the wild resemble, and comparisons that the tests of rules on a whole model share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crp.attribution import CondAttribution
from crp.composites import Composite, EpsilonPlus
from crp.composites.base import LayerMap


class Net(nn.Module):
    """Layers that a function ``(net, *inputs) -> output`` wires up."""

    def __init__(self, wiring: Callable[..., object], **layers: nn.Module) -> None:
        super().__init__()
        self.wiring = wiring
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *args: object, **kwargs: object) -> object:
        return self.wiring(self, *args, **kwargs)


def net(wiring: Callable[..., object], **layers: nn.Module) -> Net:
    """Net in float64 and evaluation mode, with seeded parameters."""
    generator = torch.Generator().manual_seed(1)
    model = Net(wiring, **layers).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return model


def conv_net(between: Callable[..., Tensor], **layers: nn.Module) -> Net:
    """Convolution, ``between(net, h)`` of shape (n, channels, ...), mean over positions, linear layer."""

    def wiring(s: Net, x: Tensor) -> Tensor:
        return s.fc(between(s, s.conv(x)).flatten(2).mean(2))

    return net(wiring, conv=nn.Conv2d(3, 4, 3, padding=1), fc=nn.Linear(4, 3), **layers)


class Exhibit(nn.Module):
    """Batch norm, SiLU, squeeze-and-excitation, a residual branch, one module used twice; (n, 3, 8, 8) -> (n, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.deep = nn.Conv2d(6, 6, 3, padding=1, groups=3)
        self.norm = nn.BatchNorm2d(6)
        self.squeeze = nn.Conv2d(6, 6, 1)
        self.act = nn.SiLU(inplace=True)
        self.pool = nn.MaxPool2d(2)
        self.mix = nn.Conv2d(6, 6, 1)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        h = self.act(self.norm(self.deep(x)))
        h = h * torch.sigmoid(self.squeeze(h.mean((2, 3), keepdim=True)))
        h += x
        h = self.pool(F.relu(h))
        h = F.relu(self.mix(F.relu(self.mix(h))))
        return self.fc(h.mean((2, 3)))


def exhibit() -> Exhibit:
    """`Exhibit` in float64 and evaluation mode."""
    generator = torch.Generator().manual_seed(2)
    model = Exhibit().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.3 if parameter.dim() > 1 else 0.1))
        for norm in (model.stem[1], model.norm):
            norm.running_mean.normal_(0, 0.2, generator=generator)
            norm.running_var.uniform_(0.5, 1.5, generator=generator)
            norm.weight.uniform_(0.5, 1.5, generator=generator)
    return model


def images(n: int = 2, size: int = 6) -> Tensor:
    """Shape (n, 3, size, size)."""
    return torch.randn(n, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def exact(layer_map: LayerMap = ()) -> EpsilonPlus:
    """Conserves relevance to the last digits."""
    return EpsilonPlus(epsilon=1e-14, stabilizer=1e-14, empty="epsilon", zero_params="bias", layer_map=layer_map)


class Maps(CondAttribution):
    """Heatmaps that keep the channels."""

    def heatmap_modifier(self, data: Tensor, on_device: object = None) -> Tensor:
        assert data.grad is not None
        return data.grad


def heatmap(model: nn.Module, composite: Composite, data: Tensor | None = None, target: int = 0) -> Tensor:
    """Relevance of the data for a target."""
    return Maps(model)(images() if data is None else data, [{"y": target}], composite).heatmap


def rules(model: nn.Module, composite: Composite, data: Tensor | None = None) -> list[tuple[str, str, str]]:
    """Layer, function and name of the rule (or "chain") of each operation, in the order of execution."""
    report = composite.report(model, images() if data is None else data)
    names = {"ordinary chain rule": "chain"}
    return [(o.layer, o.function, names.get(o.rule, o.rule.partition("(")[0])) for o in report.operations]


def within(model: nn.Module, composite: Composite, *args: object, **kwargs: object) -> list[Tensor]:
    """Gradients of all inputs that require one, inside the composite's context, for target 0."""
    from crp.layers.nested import tensors_in

    leaves = [t for t in tensors_in((args, kwargs)) if t.requires_grad]
    with composite.context(model):
        return list(torch.autograd.grad(model(*args, **kwargs)[:, 0].sum(), leaves))


def deviation(found: Tensor, wanted: Tensor) -> float:
    """Largest deviation, over the largest value."""
    assert found.shape == wanted.shape
    return float((found - wanted).abs().max() / wanted.abs().max())


def inputs() -> Tensor:
    """Three samples of six numbers."""
    return torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def explained(model: nn.Module, composite: Composite, m: Tensor) -> Tensor:
    """Gradient that a composite gives to `inputs`."""
    with composite.context(model):
        leaf = inputs().requires_grad_()
        return torch.autograd.grad(model(leaf), leaf, m)[0]
