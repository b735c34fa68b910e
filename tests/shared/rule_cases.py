"""Affine layers of every kind, and the rules as the papers write them: products of matrices and relevances."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import crp.rules as rules
from crp.composites import Composite, Kind
from crp.rules import Rule

LAYERS = {
    "linear": lambda b: (nn.Linear(6, 5, bias=b), (6,)),
    "linear_tokens": lambda b: (nn.Linear(6, 5, bias=b), (3, 6)),
    "conv1d": lambda b: (nn.Conv1d(3, 4, 3, stride=2, padding=1, bias=b), (3, 7)),
    "conv1d_same": lambda b: (nn.Conv1d(2, 4, 4, padding="same", dilation=2, groups=2, bias=b), (2, 7)),
    "conv1d_reflect": lambda b: (nn.Conv1d(2, 3, 3, padding=2, padding_mode="reflect", bias=b), (2, 4)),
    "conv2d": lambda b: (nn.Conv2d(2, 3, 3, padding=1, bias=b), (2, 5, 4)),
    "conv2d_strided": lambda b: (nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(0, 1), bias=b), (2, 5, 4)),
    "conv2d_grouped": lambda b: (nn.Conv2d(4, 6, 2, groups=2, dilation=2, bias=b), (4, 5, 5)),
    "conv2d_depthwise": lambda b: (nn.Conv2d(3, 3, 3, groups=3, bias=b), (3, 4, 4)),
    "conv2d_same": lambda b: (nn.Conv2d(2, 2, (2, 3), padding="same", dilation=(2, 1), bias=b), (2, 4, 4)),
    "conv2d_valid": lambda b: (nn.Conv2d(2, 2, 2, padding="valid", bias=b), (2, 3, 4)),
    "conv2d_reflect": lambda b: (nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect", bias=b), (2, 4, 3)),
    "conv2d_reflect_same": lambda b: (nn.Conv2d(2, 2, (2, 3), 1, "same", padding_mode="reflect", bias=b), (2, 4, 4)),
    "conv2d_replicate": lambda b: (nn.Conv2d(2, 2, 3, 2, padding=2, padding_mode="replicate", bias=b), (2, 4, 4)),
    "conv2d_circular": lambda b: (nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular", bias=b), (2, 4, 4)),
    "conv3d": lambda b: (nn.Conv3d(2, 2, 2, bias=b), (2, 3, 3, 2)),
    "conv3d_grouped": lambda b: (nn.Conv3d(2, 4, 2, 2, 1, dilation=(1, 2, 1), groups=2, bias=b), (2, 3, 3, 2)),
    "conv3d_replicate": lambda b: (nn.Conv3d(1, 2, 3, padding=1, padding_mode="replicate", bias=b), (1, 2, 3, 2)),
    "transposed1d": lambda b: (nn.ConvTranspose1d(3, 2, 3, stride=2, bias=b), (3, 4)),
    "transposed1d_grouped": lambda b: (nn.ConvTranspose1d(2, 4, 3, dilation=2, groups=2, padding=1, bias=b), (2, 4)),
    "transposed2d": lambda b: (nn.ConvTranspose2d(4, 4, 3, stride=2, output_padding=1, groups=2, bias=b), (4, 3, 3)),
    "transposed2d_padded": lambda b: (nn.ConvTranspose2d(2, 3, (3, 2), stride=(1, 2), padding=1, bias=b), (2, 3, 3)),
    "transposed3d": lambda b: (nn.ConvTranspose3d(2, 2, 2, bias=b), (2, 2, 2, 2)),
    "transposed3d_grouped": lambda b: (
        nn.ConvTranspose3d(2, 2, 2, stride=2, padding=1, output_padding=1, groups=2, bias=b),
        (2, 2, 2, 2),
    ),
}  # fmt: skip
STABILIZER = 1e-3  # large enough to be seen if it were in the wrong place


def seeded(name: str, bias: bool, nonnegative: bool) -> tuple[nn.Module, Tensor]:
    """Layer in float64 and a batch of three inputs."""
    torch.manual_seed(list(LAYERS).index(name))
    layer, shape = LAYERS[name](bias)
    a = torch.randn(3, *shape, dtype=torch.float64)
    return layer.double(), a.relu() if nonnegative else a


def jacobian(function, x):
    with torch.enable_grad():
        return torch.autograd.functional.jacobian(lambda t: function(t).flatten(), x).flatten(1)


def as_matrices(layer, a):
    """Padding (padded, in), weight (out, padded) and bias (out,) of an affine layer for inputs of the shape of ``a``.

    A pixel that the padding repeats is one input of the layer for each time it is there.
    """
    zero = torch.zeros_like(a[:1])
    bias = layer(zero).detach().flatten()
    if getattr(layer, "padding_mode", "zeros") == "zeros":
        return torch.eye(zero.numel(), dtype=a.dtype), jacobian(layer, zero), bias
    sizes = layer._reversed_padding_repeated_twice
    plain = copy.deepcopy(layer)
    plain.padding_mode, plain.padding = "zeros", 0
    repeat = jacobian(lambda x: F.pad(x, sizes, layer.padding_mode), zero)
    return repeat, jacobian(plain, F.pad(zero, sizes, layer.padding_mode)), bias


def stabilize(z, epsilon=STABILIZER):
    return z + epsilon * (1 - 2 * (z < 0).to(z))


def pos(t):
    return t.clamp(min=0)


def neg(t):
    return t.clamp(max=0)


def form_epsilon(a, w, b, r):
    return a * ((r / stabilize(a @ w.T + b)) @ w)


def form_zplus(a, w, b, r):
    z = pos(a) @ pos(w).T + neg(a) @ neg(w).T + pos(b)
    s = torch.where(z == 0, 0.0, r / stabilize(z))
    return pos(a) * (s @ pos(w)) + neg(a) * (s @ neg(w))


def form_alpha_beta(a, w, b, r, alpha, beta):
    below = pos(a) @ neg(w).T + neg(a) @ pos(w).T + neg(b)
    s = torch.where(below == 0, 0.0, r / stabilize(below))
    return alpha * form_zplus(a, w, b, r) - beta * (pos(a) * (s @ neg(w)) + neg(a) * (s @ pos(w)))


def form_gamma(a, w, b, r, gamma):
    up, down, y = w + gamma * pos(w), w + gamma * neg(w), a @ w.T + b
    above = pos(a) @ up.T + neg(a) @ down.T + b + gamma * pos(b)
    below = pos(a) @ down.T + neg(a) @ up.T + b + gamma * neg(b)
    s, t = (y > 0) * r / stabilize(above), (y < 0) * r / stabilize(below)
    return pos(a) * (s @ up + t @ down) + neg(a) * (s @ down + t @ up)


def form_wsquare(a, w, b, r):
    return (r / stabilize((w**2).sum(1) + b**2)) @ w**2


def form_flat(a, w, b, r):
    reach = (w != 0).double()
    return (r / stabilize(reach.sum(1))) @ reach


def form_zbox(a, w, b, r, low, high):
    parts = a[:, None] * w - low * pos(w) - high * neg(w)
    return ((r / stabilize(parts.sum(2)))[:, :, None] * parts).sum(1)


def without_bias(form):
    return lambda a, w, b, r: form(a, w, torch.zeros_like(b), r)


FORMS = {
    "epsilon": (rules.Epsilon(STABILIZER), form_epsilon),
    "epsilon_zero_bias": (rules.Epsilon(STABILIZER, "bias"), without_bias(form_epsilon)),
    "zplus": (rules.ZPlus(STABILIZER), form_zplus),
    "zplus_zero_bias": (rules.ZPlus(STABILIZER, "bias"), without_bias(form_zplus)),
    "alpha2_beta1": (rules.AlphaBeta(2, 1, STABILIZER), lambda *t: form_alpha_beta(*t, 2, 1)),
    "alpha1.4_beta0.4": (rules.AlphaBeta(1.4, 0.4, STABILIZER), lambda *t: form_alpha_beta(*t, 1.4, 0.4)),
    "alpha1_beta0": (rules.AlphaBeta(1, 0, STABILIZER), form_zplus),
    "gamma": (rules.Gamma(0.25, STABILIZER), lambda *t: form_gamma(*t, 0.25)),
    "gamma100": (rules.Gamma(100, STABILIZER), lambda *t: form_gamma(*t, 100)),
    "wsquare": (rules.WSquare(STABILIZER), form_wsquare),
    "wsquare_zero_bias": (rules.WSquare(STABILIZER, "bias"), without_bias(form_wsquare)),
    "flat": (rules.Flat(STABILIZER), form_flat),
    "zbox": (rules.ZBox(-3.0, 2.5, STABILIZER), lambda *t: form_zbox(*t, -3.0, 2.5)),
}


def in_matrices(form, matrices, a, r):
    """Relevance of ``a`` by a form in matrices, from those of `as_matrices`."""
    repeat, w, b = matrices
    return (form(a.flatten(1) @ repeat.T, w, b, r.flatten(1)) @ repeat).reshape(a.shape)


def expected(form, layer, a, r):
    """Relevance of ``a`` by a form in matrices."""
    return in_matrices(form, as_matrices(layer, a), a, r)


def attribute(rule: Rule, layer: nn.Module, a: Tensor, start: Tensor, multiplier: bool = False) -> Tensor:
    """Relevance of ``a`` by a rule on a layer, from relevances or multipliers of its output."""
    rule = rule.copy()
    rule.multiplier = multiplier
    handle = rule.register(layer)
    try:
        data = a.clone().requires_grad_()
        (grad,) = torch.autograd.grad(layer(data), data, start)
    finally:
        handle.remove()
    return a.detach() * grad if multiplier else grad


def by_hook(hook, layer: nn.Module, a: Tensor, relevance: Tensor) -> Tensor:
    """Relevance of ``a`` by one of zennit's hooks."""
    hook, data = hook.copy(), a.clone().requires_grad_()
    handle = hook.register(layer)
    try:
        return torch.autograd.grad(layer(data), data, relevance)[0]
    finally:
        handle.remove()


def close(found, wanted, rtol: float = 1e-10) -> None:
    """Assert that the largest deviation is ``rtol`` of the largest value at most."""
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= rtol * wanted.abs().max(), (found - wanted).abs().max() / wanted.abs().max()


def affine(rule: Rule) -> list[tuple[Kind, Rule]]:
    """Layer map with one rule for all affine operations."""
    return [(Kind("convolution"), rule), (Kind("dense"), rule)]


def mapped(rule: Rule) -> Composite:
    """One rule for all affine operations, and the chain rule for everything else."""
    return Composite(None, layer_map=affine(rule))


def relevance(rule: Rule, model: nn.Module, a: Tensor, m: Tensor) -> Tensor:
    """Relevance of ``a`` by a rule on all affine operations, from multipliers of the output."""
    with mapped(rule).context(model):
        data = a.clone().requires_grad_()
        return torch.autograd.grad(model(data), data, m)[0]
