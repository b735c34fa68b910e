"""The model's input in autograd's graph, and functions that turn multipliers into relevance and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx


class ModelInput:
    """The model's inputs, at which arriving multipliers become relevance.

    Attributes
    ----------
    active : bool
        Whether rules act; otherwise the gradient is the ordinary one.
    """

    def __init__(self) -> None:
        self.active = True

    def is_active(self) -> bool:
        """Whether rules act."""
        return self.active

    def enter(self, data: Tensor, reference: Tensor | None = None) -> Tensor:
        """Pass on the model's input so that the multiplier that comes back to it leaves it as relevance.

        Parameters
        ----------
        data : Tensor
        reference : Tensor, optional
            What the relevance counts from (DeepLIFT); it broadcasts to ``data``.
        """
        return cast(Tensor, _AsRelevance.apply(data, reference, self))


class _AsRelevance(torch.autograd.Function):
    """Identity; multiplies the arriving multiplier with the value, which makes it relevance."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, reference: Tensor | None = None, model_input: ModelInput | None = None) -> Tensor:
        """Return a copy."""
        ctx.save_for_backward(a)
        ctx.reference, ctx.model_input = reference, model_input
        return a.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Multiply with the value, or with what it differs by from the reference."""
        if ctx.model_input is not None and not ctx.model_input.active:
            return grads[0], None, None
        (a,) = ctx.saved_tensors
        return grads[0] * (a if ctx.reference is None else a - ctx.reference), None, None


class _Unit(torch.autograd.Function):
    """Ones in the shape of ``a``; what arrives is handed to ``leaf`` as it is."""

    @staticmethod
    def forward(ctx: FunctionCtx, leaf: Tensor, a: Tensor) -> Tensor:
        """Return ones."""
        return torch.ones_like(a)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Pass a copy on, as rules may give all channels the same memory."""
        return grads[0].clone(memory_format=torch.contiguous_format), None


class _DetachedInput(torch.autograd.Function):
    """Identity through which relevance does not flow; only the ordinary gradient does, where rules are inactive."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, model_input: ModelInput) -> Tensor:
        """Return another view."""
        ctx.model_input = model_input
        return a.view_as(a)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        """Pass on, or not."""
        return None if ctx.model_input.active else grads[0], None


class _UnitMultiplier(torch.autograd.Function):
    """Ones in the shape of ``a``; divides the arriving relevance by ``a``, and drops it where ``a`` is 0."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        """Return ones."""
        ctx.save_for_backward(a)
        return torch.ones_like(a)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """Divide by the value."""
        (a,) = ctx.saved_tensors
        return torch.where(a == 0, 0.0, grads[0] / a)


class _PartOf(torch.autograd.Function):
    """Identity; only a part of the multiplier that arrives is handed on, and all where rules are inactive."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, part: float, is_active: Callable[[], bool]) -> Tensor:
        """Return another view."""
        ctx.part, ctx.is_active = part, is_active
        return a.view_as(a)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        """Scale."""
        if not ctx.is_active():
            return grads[0], None, None
        return (grads[0] * ctx.part if ctx.part else None), None, None
