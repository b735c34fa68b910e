"""Affine layers as models write them: as functions, and with weights that the forward pass computes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

Call = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]
Write = Callable[[nn.Module, Tensor], "tuple[nn.Module, nn.Module]"]


def call_of(layer: nn.Module) -> Call:
    """What a layer calls, as a function of its input, weight and bias; padding that is not by zeros by `F.pad`."""
    if isinstance(layer, nn.Linear):
        return F.linear
    n = len(layer.kernel_size)
    stride, padding, dilation, groups = layer.stride, layer.padding, layer.dilation, layer.groups
    if layer.transposed:
        transposed, more = getattr(F, f"conv_transpose{n}d"), layer.output_padding
        return lambda x, w, b: transposed(x, w, b, stride, padding, more, groups, dilation)
    convolve, mode, sizes = getattr(F, f"conv{n}d"), layer.padding_mode, layer._reversed_padding_repeated_twice
    if mode == "zeros":
        return lambda x, w, b: convolve(x, w, b, stride, padding, dilation, groups)
    return lambda x, w, b: convolve(F.pad(x, sizes, mode), w, b, stride, 0, dilation, groups)


def standardized(w: Tensor) -> Tensor:
    """Weight of mean 0 and variance 1 for each output (for each input, in transposed convolutions)."""
    variance, mean = torch.var_mean(w, dim=tuple(range(1, w.ndim)), keepdim=True, unbiased=False)
    return (w - mean) / torch.sqrt(variance + 1e-5)


def binarized(w: Tensor) -> Tensor:
    """Sign of the weight, of which the gradient is that of the weight."""
    return w + (w.sign() - w).detach()


class Function(nn.Module):
    """Parameters of other names than torch's, and the call of a function."""

    def __init__(self, layer: nn.Module, compute: Callable[[Tensor], Tensor] = lambda w: w) -> None:
        super().__init__()
        self.kernel, self.offset = layer.weight, layer.bias
        self.call, self.compute = call_of(layer), compute

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x, self.compute(self.kernel), self.offset)


def subclass(layer: nn.Module, compute: Callable[[Tensor], Tensor]) -> nn.Module:
    """The layer, in a class whose forward computes its weight."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return call_of(self)(x, compute(self.weight), self.bias)

    made = copy.deepcopy(layer)
    made.__class__ = type(f"Own{type(layer).__name__}", (type(layer),), {"forward": forward})
    return made


def with_weight(layer: nn.Module, weight: Tensor) -> nn.Module:
    """The layer of torch that holds this weight."""
    plain = copy.deepcopy(layer)
    plain.weight.data = weight.detach().clone()
    return plain


def computed(make: Callable[..., nn.Module], compute: Callable[[Tensor], Tensor]) -> Write:
    def write(layer: nn.Module, a: Tensor) -> tuple[nn.Module, nn.Module]:
        return make(layer, compute), with_weight(layer, compute(layer.weight))

    return write


def by_torch(change: Callable[[nn.Module], object]) -> Write:
    """A utility of torch that replaces the parameter ``weight`` by something computed."""

    def write(layer: nn.Module, a: Tensor) -> tuple[nn.Module, nn.Module]:
        made = copy.deepcopy(layer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the old ones are deprecated
            change(made)
        made.eval()(a)  # the old ones compute the weight before each call
        return made, with_weight(layer, made.weight)

    return write


class Standardize(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return standardized(w)


def _parametrize(layer: nn.Module) -> None:
    parametrize.register_parametrization(layer, "weight", Standardize())


def _old_weight_norm(layer: nn.Module) -> None:
    nn.utils.weight_norm(layer).weight_g.data *= 1.5


def _weight_norm(layer: nn.Module) -> None:
    parametrizations.weight_norm(layer).parametrizations.weight.original0.data *= 1.5


#: Ways to write a layer: from a layer and its input to the model, and to torch's layer that holds the effective weight.
WRITINGS: dict[str, Write] = {
    "function": lambda layer, a: (Function(layer), copy.deepcopy(layer)),
    "function_standardized": computed(Function, standardized),
    "subclass_standardized": computed(subclass, standardized),
    "subclass_binarized": computed(subclass, binarized),
    "parametrize": by_torch(_parametrize),
    "old_weight_norm": by_torch(_old_weight_norm),
    "weight_norm": by_torch(_weight_norm),
    "old_spectral_norm": by_torch(nn.utils.spectral_norm),
    "spectral_norm": by_torch(parametrizations.spectral_norm),
    "pruning": by_torch(lambda layer: prune.l1_unstructured(layer, "weight", 0.3)),
}
