"""Where the model's input is, and where relevance is made out of multipliers or multipliers out of relevance."""

from __future__ import annotations

import weakref
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx


class Entry:
    """The model's inputs: what comes back to them leaves as relevance.

    Rules that make relevance out of nothing (flat, w², zᴮ) hand it out here.

    Attributes
    ----------
    active : bool
        Whether rules act; otherwise the gradient is the ordinary one.
    """

    def __init__(self) -> None:
        self.active = True
        self._inputs: list[tuple[weakref.ref[Tensor], Any, Tensor]] = []

    def enter(self, data: Tensor, reference: Tensor | None = None) -> Tensor:
        """Pass on the model's input so that the multiplier that comes back to it leaves it as relevance.

        Parameters
        ----------
        data : Tensor
        reference : Tensor, optional
            What the relevance counts from (DeepLIFT); it broadcasts to ``data``.
        """
        inner = cast(Tensor, AsRelevance.apply(data, reference, self))
        self._inputs = [known for known in self._inputs if known[0]() is not None]
        # (the tensor may be changed in place, and then has another node)
        self._inputs.append((weakref.ref(inner), inner.grad_fn, data))
        return inner

    def find(self, tensor: Tensor) -> Tensor | None:
        """Model input that ``tensor`` is, or is an elementwise image of; None if there is none."""
        for _, node, leaf in self._inputs:
            if node is not None and leaf.shape == tensor.shape and _is_elementwise(tensor, node):
                return leaf
        return None

    def clear(self) -> None:
        """Forget all inputs."""
        self._inputs.clear()


class AsRelevance(torch.autograd.Function):
    """Identity; the multiplier that arrives is multiplied with the value, and so leaves as relevance."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, reference: Tensor | None = None, entry: Entry | None = None) -> Tensor:
        """Return a copy."""
        ctx.save_for_backward(a)
        ctx.reference, ctx.entry = reference, entry
        return a.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Multiply with the value, or with what it differs by from the reference."""
        if ctx.entry is not None and not ctx.entry.active:
            return grads[0], None, None
        (a,) = ctx.saved_tensors
        return grads[0] * (a if ctx.reference is None else a - ctx.reference), None, None


class Unit(torch.autograd.Function):
    """Ones in the shape of ``a``; what arrives is handed to ``leaf`` as it is."""

    @staticmethod
    def forward(ctx: FunctionCtx, leaf: Tensor, a: Tensor) -> Tensor:
        """Return ones."""
        return torch.ones_like(a)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Pass on; each input has memory of its own, also where rules give the same to all channels."""
        return grads[0].clone(memory_format=torch.contiguous_format), None


class Held(torch.autograd.Function):
    """Identity through which relevance does not flow; only the ordinary gradient does, where rules are inactive."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, entry: Entry) -> Tensor:
        """Return another view."""
        ctx.entry = entry
        return a.view_as(a)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        """Pass on, or not."""
        return None if ctx.entry.active else grads[0], None


class UnitMultiplier(torch.autograd.Function):
    """Ones in the shape of ``a``; the relevance that arrives leaves as multiplier, and is lost where ``a`` is 0."""

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


#: Autograd nodes of preprocessing inside a model, such as a normalisation, that keep every pixel in its place.
_ELEMENTWISE = frozenset(
    f"{name}Backward{number}"
    for name in ("Mul", "Div", "Sub", "Rsub", "Add", "Clone", "ToCopy", "Alias", "Absorb")
    for number in ("", "0", "1", "2")
)


def _is_elementwise(tensor: Tensor, source: Any) -> bool:
    """Whether ``tensor`` comes from the node ``source`` by elementwise operations only."""
    node: Any = tensor.grad_fn
    while node is not None and node is not source:
        name = node.name().rpartition("::")[2]
        above = [n for n, _ in node.next_functions if n is not None and not n.name().startswith("Sink")]
        if name in ("CopyBackwards", "OverwriteBackward"):  # in place of all there was; the source comes last
            above = above[-1:]
        elif name not in _ELEMENTWISE:
            return False
        if len(above) != 1:
            return False
        node = above[0]
    return node is not None
