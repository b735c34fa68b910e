"""DeepLIFT as the paper writes it, in dense matrices, one sample at a time; and what tests of it share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from crp.composites import DeepLift


class Call(nn.Module):
    """A function as a model."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def pairs(*shape: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Three samples and their references."""
    generator = torch.Generator().manual_seed(seed)
    x, x0 = (torch.randn(3, *shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return x, x0


def relevance(model: nn.Module, x: Tensor, composite: DeepLift, target: int = 0) -> Tensor:
    """Relevance of the input for an output, in the composite's own context."""
    data = x.clone().requires_grad_()
    with composite.context(model) as inside:
        (found,) = torch.autograd.grad(inside(data)[:, target].sum(), data)
    return found


def sum_error(model: nn.Module, x: Tensor, x0: Tensor, found: Tensor, target: int = 0) -> float:
    """How far relevances are from summing to the output's difference, relative to the outputs."""
    with torch.no_grad():
        y, y0 = model(x)[:, target], model(x0.expand_as(x))[:, target]
    error = found.flatten(1).sum(1) - (y - y0)
    return (error.abs() / (y.abs() + y0.abs())).max().item()


def matrix_form(layers: nn.Sequential, x: Tensor, x0: Tensor, target: int, variant: str = "rescale") -> Tensor:
    """Relevance of one sample, from the equations of the paper; no batch axis."""
    values = [(x[None], x0[None])]
    for layer in layers:
        values.append(tuple(layer(value).detach() for value in values[-1]))
    m = torch.zeros_like(values[-1][0]).flatten()
    m[target] = 1
    m_plus = m_minus = m
    for number in reversed(range(len(layers))):
        layer, (a, a0), (y, y0) = layers[number], values[number], values[number + 1]
        before = layers[number - 1] if number else None
        da, dy = (a - a0).flatten(), (y - y0).flatten()
        if is_affine(layer):
            w = torch.func.jacrev(lambda v, layer=layer, a=a: layer(v.view_as(a)).flatten())(a.flatten())
            share = w * da
            half = (da == 0).to(w) / 2 * w
            m = ((share > 0) * w + half).T @ m_plus + ((share < 0) * w + half).T @ m_minus
        elif isinstance(layer, nn.MaxPool2d):
            m = torch.stack([cross_max(layer, a, a0, m, dy, y, y0)]).sum(0)
        elif isinstance(layer, nn.Flatten):
            pass
        elif variant == "reveal_cancel" and before is not None and is_affine(before):
            w = torch.func.jacrev(lambda v, b=before, n=number: b(v.view_as(values[n - 1][0])).flatten())(
                values[number - 1][0].flatten()
            )
            share = w * (values[number - 1][0] - values[number - 1][1]).flatten()
            plus, minus, z0 = share.clamp(min=0).sum(1), share.clamp(max=0).sum(1), a0.flatten()
            y_plus = (layer(z0 + plus) - layer(z0) + layer(z0 + minus + plus) - layer(z0 + minus)) / 2
            y_minus = (layer(z0 + minus) - layer(z0) + layer(z0 + minus + plus) - layer(z0 + plus)) / 2
            m_plus, m_minus = (m * y_plus / plus).nan_to_num(), (m * y_minus / minus).nan_to_num()
            continue
        else:
            m = m * dy / da
        m_plus = m_minus = m
    return (m * (x - x0).flatten()).view_as(x)


def is_affine(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear | nn.Conv2d | nn.BatchNorm2d | nn.AvgPool2d | nn.ConvTranspose2d)


def cross_max(layer: nn.Module, a: Tensor, a0: Tensor, m: Tensor, dy: Tensor, y: Tensor, y0: Tensor) -> Tensor:
    """Multipliers below a max-pooling: max(y, y0) - y0 belongs to the one maximum, the rest to the other."""
    ones = torch.eye(a.numel()).to(a).view(-1, *a.shape[1:])
    member = layer(ones).flatten(1).T > 0  # windows x inputs (a window of zeros, padded, has maximum 0)
    found = torch.zeros_like(a).flatten()
    flat, flat0 = a.flatten(), a0.flatten()
    for j, window in enumerate(member):
        inside = window.nonzero().flatten()
        best, best0 = inside[flat[inside].argmax()], inside[flat0[inside].argmax()]
        top = torch.maximum(y.flatten()[j], y0.flatten()[j])
        for index, change in ((best, top - y0.flatten()[j]), (best0, y.flatten()[j] - top)):
            if change != 0:
                found[index] += m[j] * change / (flat[index] - flat0[index])
    return found
