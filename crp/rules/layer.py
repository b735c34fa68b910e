"""A layer as a function of its input and its parameters, which rules modify."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary
from zennit.types import ConvolutionStandard, ConvolutionTranspose

Modifier = Callable[[Tensor], Tensor]
#: How many modified copies of a parameter are kept.
KEPT = 8

_TRANSPOSED = {
    nn.ConvTranspose1d: F.conv_transpose1d,
    nn.ConvTranspose2d: F.conv_transpose2d,
    nn.ConvTranspose3d: F.conv_transpose3d,
}
_modified: WeakIdKeyDictionary = WeakIdKeyDictionary()


def same(parameter: Tensor) -> Tensor:
    """Parameter as it is."""
    return parameter


def positive(parameter: Tensor) -> Tensor:
    """Positive part."""
    return parameter.clamp(min=0)


def negative(parameter: Tensor) -> Tensor:
    """Negative part."""
    return parameter.clamp(max=0)


def square(parameter: Tensor) -> Tensor:
    """Square."""
    return parameter.square()


def ones(parameter: Tensor) -> Tensor:
    """Ones in place of every entry."""
    return torch.ones_like(parameter)


@dataclass(frozen=True)
class Boosted:
    """Parameter plus ``gamma`` times a part of it."""

    gamma: float
    part: Modifier

    def __call__(self, parameter: Tensor) -> Tensor:
        """Modify a parameter."""
        return parameter + self.gamma * self.part(parameter)


def signs(a: Tensor) -> tuple[Tensor, Tensor | None]:
    """Positive and negative part of a layer's input; None where there is no negative part, as behind a ReLU."""
    if a.numel() == 0 or a.detach().amin() >= 0:
        return a, None
    positive_part, negative_part = cast(tuple[Tensor, Tensor], Signs.apply(a))
    return positive_part, negative_part


class Signs(torch.autograd.Function):
    """Positive and negative part; each entry takes the gradient of the part that it is in."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> tuple[Tensor, Tensor]:
        """Take apart."""
        ctx.save_for_backward(a)
        return a.clamp(min=0), a.clamp(max=0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """Put together."""
        (a,) = ctx.saved_tensors
        return torch.where(a > 0, grads[0], grads[1])


class Layer:
    """Linear, convolutional or transposed convolutional module, or any module without parameters, as a function.

    Parameters
    ----------
    module : nn.Module
    zero_params : tuple of str
        Parameters that count as zero.
    input : Tensor, optional
        What the module was given in this forward call.
    output : Tensor, optional
        What the module gave, with its graph; spares running it once more.
    nonnegative : bool
        Whether the input is known not to be negative.
    own : dict of str to nn.Parameter, optional
        Parameters of the module in this forward call; those that it has now by default.
    """

    def __init__(
        self,
        module: nn.Module,
        zero_params: tuple[str, ...] = (),
        input: Tensor | None = None,
        output: Tensor | None = None,
        nonnegative: bool = False,
        own: dict[str, nn.Parameter | None] | None = None,
    ) -> None:
        self.module = module
        self.zero_params = zero_params
        self._input = input
        self.output = output
        self.nonnegative = nonnegative
        # (canonizers may take theirs back before the last backward pass)
        self._own = dict(module._parameters) if own is None else own

    def __call__(self, a: Tensor, modifier: Modifier = same, bias: bool = True) -> Tensor:
        """Layer's output for the input ``a``, with modified parameters, differentiable in ``a`` only.

        Parameters
        ----------
        a : Tensor of shape (batch, *input shape)
        modifier : callable
            Applied to weight and bias (cached as long as they do not change).
        bias : bool
            Whether the bias takes part.

        Returns
        -------
        Tensor of shape (batch, *output shape)
        """
        if getattr(self.module, "weight", None) is None:
            return self._forward(a, {})
        module = self.module
        w, b = self._parameter("weight", modifier), self._parameter("bias", modifier) if bias else None
        assert w is not None
        if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
            return F.linear(a, w, b)
        if isinstance(module, ConvolutionStandard) and type(module).forward in PLAIN_FORWARDS:
            return cast(Tensor, module._conv_forward(a, w, b))
        if isinstance(module, ConvolutionTranspose) and type(module) in _TRANSPOSED and module.padding_mode == "zeros":
            return _TRANSPOSED[type(module)](
                a, w, b, module.stride, module.padding, module.output_padding, module.groups, module.dilation
            )
        return self._forward(a, {"weight": w, "bias": b})

    def itself(self, a: Tensor) -> Tensor:
        """Layer with its own parameters; the output of this forward call where it serves."""
        if self.output is not None and not self.zero_params:
            return self.output
        return self(a)

    @property
    def input(self) -> Tensor | None:
        """What the module was given, as a constant."""
        given = self._input
        if given is None or not given.requires_grad:
            return given
        node = given.grad_fn
        return given if node is not None and node.name() == "HeldBackward" else given.detach()

    def signs(self, a: Tensor) -> tuple[Tensor, Tensor | None]:
        """Positive and negative part of an input; None where there is no negative part, as behind a ReLU."""
        return (a, None) if self.nonnegative else signs(a)

    def again(self) -> Layer:
        """The same layer, to be run once more: without the output of this forward call."""
        return Layer(self.module, self.zero_params, self._input, nonnegative=self.nonnegative, own=self._own)

    def value(self, a: Tensor) -> Tensor:
        """What the module gives for ``a``, with all of its parameters; differentiable in ``a``."""
        return Layer(self.module, own=self._own)(a)

    def _parameter(self, name: str, modifier: Modifier) -> Tensor | None:
        parameter = self._own[name] if name in self._own else getattr(self.module, name, None)
        if parameter is None or (name == "bias" and name in self.zero_params):
            return None
        if name in self.zero_params:
            return torch.zeros_like(parameter)
        return parameter.detach() if modifier is same else modified(parameter, modifier)

    def _forward(self, a: Tensor, parameters: dict[str, Tensor | None]) -> Tensor:
        parameters = {**self._own, **parameters}
        own = {name: self.module._parameters[name] for name in parameters if name in self.module._parameters}
        try:
            self.module._parameters.update({name: parameters[name] for name in own})  # type: ignore[misc]
            return cast(Tensor, self.module.forward(a.clone() if works_in_place(self.module) else a))
        finally:
            self.module._parameters.update(own)


def works_in_place(module: nn.Module) -> bool:
    """Whether a module, or a part of it, overwrites its input."""
    return any(getattr(part, "inplace", False) for part in module.modules())


def check_parameters(module: nn.Module) -> None:
    """Raise a TypeError if a module has parameters that no rule knows."""
    names = module._parameters if not module._modules else dict(module.named_parameters())
    extra = [name for name in names if name not in ("weight", "bias") and names[name] is not None]
    if extra and not hasattr(module, "parametrizations"):
        raise TypeError(
            f"{type(module).__name__} has parameters {extra}; rules treat modules whose parameters are "
            "'weight' and 'bias' (Linear, Conv1-3d, ConvTranspose1-3d and the like), or that have none"
        )


#: Forwards that convolve and do nothing else.
PLAIN_FORWARDS = {nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward}


def is_plain(module: nn.Module) -> bool:
    """Whether a module does what its type says, so that `Layer` need not run its forward."""
    return (
        type(module).forward in PLAIN_FORWARDS
        or type(module).forward is nn.Linear.forward
        or type(module) in _TRANSPOSED
    )


def modified(parameter: Tensor, modifier: Modifier) -> Tensor:
    """Parameter modified by ``modifier``, computed once as long as the parameter does not change.

    Modifiers are told apart by identity or equality, and the last `KEPT` of a parameter are kept: give a function,
    not a new ``lambda`` at each call. Optimizers, ``load_state_dict`` and in-place operations are noticed; writes
    through ``parameter.data``, which torch does not count as changes, are not.
    """
    state = (parameter._version, parameter.data_ptr(), parameter.device, parameter.dtype)
    known: dict[Modifier, tuple[object, Tensor]] = _modified.setdefault(parameter, {})  # type: ignore[no-untyped-call]
    if modifier not in known or known[modifier][0] != state:
        with torch.no_grad():
            known.pop(modifier, None)
            while len(known) >= KEPT:
                del known[next(iter(known))]
            known[modifier] = (state, modifier(parameter.detach()))
    return known[modifier][1]
