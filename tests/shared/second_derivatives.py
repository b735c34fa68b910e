"""The derivative of relevance by autograd, against finite differences of the relevance itself."""

import warnings

import torch

QUIET = "outside DeepLIFT|(DeepLift|GuidedBackprop|DeconvNet|BetaSmooth) has no rule"


def relevance(model, data, create_graph=False):
    leaf = data.detach().requires_grad_() if not create_graph else data
    return torch.autograd.grad(model(leaf)[:, 0].sum(), leaf, create_graph=create_graph)[0]


def check_derivative(model, composite, data, tolerance=1e-6, step=3e-5):
    """Derivative of relevance, summed with weights and squared, by autograd and by differences of fourth order."""
    generator = torch.Generator().manual_seed(5)
    weight, direction = (torch.randn(data.shape, generator=generator, dtype=data.dtype) for _ in range(2))

    def loss(found):
        return (found * weight).sum() + found.square().sum()

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=QUIET)
        with composite.context(model):
            leaf = data.clone().requires_grad_()
            value = loss(relevance(model, leaf, create_graph=True))
            found = torch.zeros(())
            if value.requires_grad:
                with composite.inactive():
                    (gradient,) = torch.autograd.grad(value, leaf, allow_unused=True)
                found = torch.zeros(()) if gradient is None else (gradient * direction).sum()
            a, b, c, d = (loss(relevance(model, data + n * step * direction)) for n in (-2, -1, 1, 2))
    wanted = (8 * (c - b) - (d - a)) / (12 * step)
    assert (found - wanted).abs() <= tolerance * max(wanted.abs(), 1e-3 * value.abs().detach()), (found, wanted)
    return found
