"""Hooks that the engine puts on layers: masking the backward flow, and keeping a layer's output apart to read it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from crp.engine.reference import referencing
from crp.trace.graph import tracing
from crp.types import MaskFn


@dataclass
class Flow:
    """Gradient of a tensor as it arrives: kept, then masked. Only its first arrival counts, until `reset`.

    (A tensor that is first an input and then a root of a backward pass sees its gradient twice.)
    """

    gradient: Tensor | None = None
    mask: Callable[[Tensor], Tensor] | None = None
    arrived: bool = False

    def reset(self, mask: Callable[[Tensor], Tensor] | None = None) -> None:
        """Forget what arrived, and mask with ``mask`` from now on."""
        self.gradient, self.mask, self.arrived = None, mask, False

    def __call__(self, grad: Tensor) -> Tensor | None:
        """Tensor hook."""
        if self.arrived:
            return None
        self.arrived, self.gradient = True, grad
        return None if self.mask is None else self.mask(grad)


@dataclass(frozen=True)
class Use:
    """One call of a layer: its output, and the flow of gradient into it, which never holds the output (no cycle).

    ``reference`` is the output of the same call for the reference input of a composite that has one.
    """

    output: Tensor
    flow: Flow
    reference: Tensor | None = None

    @property
    def value(self) -> Tensor:
        """What relevance counts: the output, or what it differs by from its reference."""
        output = self.output.detach()
        return output if self.reference is None else output - self.reference


@dataclass
class Tap:
    """Forward hook that keeps every output of a layer apart; the model goes on with a copy."""

    name: str
    uses: list[Use] = field(default_factory=list)
    references: list[Tensor] = field(default_factory=list)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | None:
        """Forward hook, with keywords."""
        if tracing():
            return None
        if not isinstance(output, Tensor):
            raise TypeError(
                f"layer {self.name!r} ({type(module).__name__}) returns a {type(output).__name__}, not a tensor; "
                "name a layer inside it, or after it, that returns one"
            )
        if referencing():
            self.references.append(output.detach())
            return None
        # Dropout and the like return their input, which what flows past the layer reads too.
        passed_on = any(output is given for given in (*args, *kwargs.values()))
        reference = self.references[len(self.uses)] if self.references else None
        use = Use(output.clone() if passed_on else output, Flow(), reference)
        if use.output.requires_grad:
            use.output.register_hook(use.flow)  # type: ignore[no-untyped-call]
        self.uses.append(use)
        return use.output.clone()


def apply_masks(functions: list[MaskFn], grad: Tensor) -> Tensor:
    """Apply mask functions in order to a copy: other branches may share ``grad``, and it may be an expanded tensor."""
    if functions:
        grad = grad.clone(memory_format=torch.contiguous_format)
    kind: Any = type(functions[0]) if functions else None
    if len(functions) > 1 and hasattr(kind, "together") and all(type(function) is kind for function in functions):
        functions = [kind.together(functions)]  # (a mask for each row would be several kernels for each row)
    for function in functions:
        masked = function(grad)
        if getattr(masked, "shape", None) != grad.shape:
            got = tuple(masked.shape) if isinstance(masked, Tensor) else type(masked).__name__
            raise TypeError(f"the mask function {function!r} must return a gradient of {tuple(grad.shape)}, not {got}")
        grad = masked
    return grad
