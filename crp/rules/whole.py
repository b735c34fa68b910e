"""A module as one operation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from zennit.core import RemovableHandle, RemovableHandleList

from crp.errors import InputTypeError
from crp.layers import referencing, tracing
from crp.layers.nested import changed, tensors_in
from crp.notices import kind_of
from crp.rules.base import Attachment, Rule
from crp.rules.functions import Function, activation
from crp.rules.layer import Layer


class Whole(Rule):
    """A module as one operation: the rule treats the module's output as a function of its input.

    What the module calls inside gets no rule. For modules whose parts no rule can see (scripted or traced ones, custom
    autograd functions), and for blocks that count as one function.

    Parameters
    ----------
    rule : Rule
        Such as ``Epsilon()`` or ``Pass()``.

    Raises
    ------
    TypeError
        If the rule takes weights apart: a module as a whole has none.

    Examples
    --------
    >>> from crp.composites import EpsilonPlus
    >>> from crp.rules import Pass
    >>> composite = EpsilonPlus(layer_map=[("activation", Whole(Pass()))])
    """

    settings: ClassVar[tuple[str, ...]] = ("rule",)

    def __init__(self, rule: Rule) -> None:
        if not isinstance(rule, Rule) or isinstance(rule, Whole) or rule.needs_weight:
            raise InputTypeError(
                f"Whole takes a rule that takes no weights apart, such as Epsilon() or Pass(), not {rule!r}; a module "
                "as a whole has no weights"
            )
        super().__init__(0.0)
        self.rule = rule

    def treats(self, known: Function, kind: str, alone: bool) -> bool:
        """Nothing inside the module."""
        return False

    def operate(self, layer: Layer) -> Any:
        """Treat the call of the module.

        Raises
        ------
        TypeError
            If it is a call of a function.
        """
        if layer.module is None:
            raise InputTypeError(f"Whole is for modules, not for functions such as {layer}; map {self.rule!r} itself")
        return self.rule.operate(layer)

    def attach(self, attachment: Attachment) -> Rule:
        """Whole of a rule that is attached."""
        other = Whole(self.rule.attach(attachment))
        other.multiplier, other.attachment = True, attachment
        return other

    def copy(self) -> Rule:
        """Rule of the same settings."""
        return Whole(self.rule.copy())

    def register(self, module: nn.Module) -> RemovableHandleList:
        """Put the rule on a module, in a composite of zennit."""
        known, kept = activation(type(module).__name__), list[tuple[Any, dict[str, Any], list[Tensor]] | None]()

        def begin(module: nn.Module, args: Any, kwargs: Any) -> Any:
            inputs = [tensor for tensor in tensors_in((args, kwargs)) if tensor.requires_grad]
            acts = not tracing() and not referencing() and torch.is_grad_enabled() and bool(inputs)
            kept.append((args, kwargs, inputs) if acts else None)
            return changed((args, kwargs), Tensor.clone) if acts else None  # (the module may overwrite them)

        def end(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            call = kept.pop()
            return None if call is None else self.rule.operate(whole_call(module, *call, output=output, known=known))

        return RemovableHandleList(
            [
                RemovableHandle(self),
                module.register_forward_pre_hook(begin, with_kwargs=True),
                module.register_forward_hook(end, with_kwargs=True),
            ]
        )


def whole_call(
    module: nn.Module, args: Any, kwargs: dict[str, Any], inputs: Sequence[Tensor], output: Any, known: Function
) -> Layer:
    """Call of a module as one function.

    Raises
    ------
    TypeError
        If it returns no tensor, or one of complex numbers.
    """
    if not isinstance(output, Tensor) or output.is_complex():
        what = "complex numbers" if isinstance(output, Tensor) else f"{kind_of(output)}, not a tensor"
        raise InputTypeError(
            f"{type(module).__name__} returns {what}, so that it cannot count as one function. "
            "Map rules to the layers or functions inside it, or None to it for the ordinary chain rule"
        )
    # (asking a scripted module for its forward would leave something in it)
    function = module if isinstance(module, torch.jit.ScriptModule) else module.forward
    return Layer(function, args, kwargs, tuple(inputs), known, module=module, result=output)
