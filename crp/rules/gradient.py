r"""Rules of the gradient-type methods, which change the backward pass of ReLU: guided backprop, deconvnet, β-smooth.

With a multiplier :math:`m` at the output of :math:`y = \max(a, 0)`, the ordinary chain rule sends :math:`m\,1[a > 0]`
back. The rules here send something else; they are for the function ``"relu"``, which `torch.nn.ReLU` calls too.

Guided backprop and deconvnet are not linear in :math:`m`: they cut off what is negative, so that the result for a sum
of two starts is not the sum of the results.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

from crp.checks import check_number
from crp.errors import InputError, InputTypeError
from crp.rules.base import Rule
from crp.rules.functions import Function
from crp.rules.layer import Layer
from crp.rules.terms import Term

#: Where βa is beyond this, softplus is a to the last digit in float64.
_LINEAR_BEYOND = 40.0


class _ReLURule(Rule):
    """Base of these rules: the gradient of an activation goes through its `surrogate`, perhaps cut off at 0."""

    #: Whether the negative part of what arrives is cut off.
    cuts: ClassVar[bool] = True
    settings: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        super().__init__(0.0)

    def operate(self, layer: Layer) -> Any:
        """Treat an activation; sums of weighted inputs are refused."""
        weighted = layer.operands is not None or (layer.module and next(layer.module.parameters(), None) is not None)
        if weighted:
            raise InputTypeError(f"{type(self).__name__} treats activations such as ReLU, not {layer}")
        return super().operate(layer)

    def propagate(self, layer: Layer, a: Tensor, y: Tensor) -> Tensor:
        """Return the activation's output, whose gradient goes through the surrogate."""
        z = self.surrogate(layer, a)
        return self.redirect(layer, a, y, [cast(Tensor, _Cut.apply(z)) if self.cuts else z], [torch.ones_like(y)])

    def _scale(self, term: Term, y: Tensor) -> Tensor:
        return torch.ones_like(y)

    def treats(self, known: Function, kind: str, alone: bool) -> bool:
        """Activations."""
        return kind == "activation"


class GuidedReLU(_ReLURule):
    r"""Guided backprop, :math:`m_a = m\,1[m > 0]\,1[a > 0]`.

    Springenberg, Dosovitskiy, Brox and Riedmiller, "Striving for simplicity: the all convolutional net" (ICLR
    workshop 2015), section 3.4. On an activation :math:`f` other than ReLU it is :math:`m^+ f'(a)`.
    """

    def surrogate(self, layer: Layer, a: Tensor) -> Tensor:
        """Return the activation itself."""
        return cast(Tensor, layer.itself(a))


class DeconvReLU(_ReLURule):
    r"""Deconvnet, :math:`m_a = m\,1[m > 0]`: what flows back is rectified, whatever the input was.

    Zeiler and Fergus, "Visualizing and understanding convolutional networks" (ECCV 2014), section 2.1.
    """

    def surrogate(self, layer: Layer, a: Tensor) -> Tensor:
        """Return the input."""
        return a


class SmoothReLU(_ReLURule):
    r"""β-smooth ReLU, :math:`m_a = m\,\sigma(\beta a)`: the gradient of softplus in place of that of ReLU.

    Dombrowski et al., "Explanations can be manipulated and geometry is to blame" (NeurIPS 2019), section 3.2. The
    output is still that of ReLU. Linear in :math:`m`.

    Parameters
    ----------
    beta : float
        The larger, the closer to ReLU.

    Raises
    ------
    ValueError
        If ``beta`` is not positive and finite.
    """

    cuts = False
    settings: ClassVar[tuple[str, ...]] = ("beta",)

    def __init__(self, beta: float = 10.0) -> None:
        super().__init__()
        check_number("beta", beta)
        if beta <= 0:
            raise InputError(f"beta must be positive, got {beta}")
        self.beta = beta

    def surrogate(self, layer: Layer, a: Tensor) -> Tensor:
        """Return the softplus of the input."""
        return F.softplus(a, self.beta, _LINEAR_BEYOND)


class _Cut(torch.autograd.Function):
    """Identity; the negative part of its gradient is cut off."""

    @staticmethod
    def forward(ctx: FunctionCtx, z: Tensor) -> Tensor:
        """Return a copy."""
        return z.clone()

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> Tensor:
        """Cut off what is negative."""
        return grads[0].clamp(min=0)
