"""An operation, as the mode sees it: one call of a function of torch that reads what depends on the model's input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from crp.rules.functions import Function, _on_a_copy, in_place, look_up, overwrites
from crp.rules.layer import changed
from crp.rules.operands import Operands
from crp.trace.recorder import tensors_in

_add, _sum = look_up(torch.add), look_up(torch.sum)


@dataclass(eq=False, slots=True)
class Operation:
    """A call of a function of torch. What a rule gets of it is a `crp.rules.layer.Layer`.

    Attributes
    ----------
    function : callable
        What is called.
    args, kwargs
        What it is called with.
    known : Function
        What the table of functions says.
    inputs : list of Tensor
        Operands that depend on the model's input, in order.
    flags : int
        What is known of all operands (`crp.rules.notes`).
    kind : str
        Of `crp.rules.functions.KINDS`, or ``""``; set by `take_apart`.
    operands : Operands or None
        Input, weight and bias, where weighted inputs are summed up; set by `take_apart`.
    """

    function: Callable[..., Any]
    args: Sequence[Any]
    kwargs: dict[str, Any]
    known: Function
    inputs: list[Tensor]
    flags: int
    kind: str = ""
    operands: Operands | None = None

    def run(self) -> Any:
        """Output of the call as it is."""
        return self.function(*self.args, **self.kwargs)

    def depends(self, value: object) -> bool:
        """Whether an operand depends on the model's input."""
        return any(value is tensor for tensor in self.inputs)

    @property
    def is_in_place(self) -> bool:
        """Whether the result takes the place of the first operand, and is returned."""
        return in_place(self.function, self.kwargs)

    @property
    def overwrites(self) -> bool:
        """Whether the first operand is changed."""
        return overwrites(self.function, self.kwargs)

    @property
    def written(self) -> Any:
        """Tensor that the call writes to; None if it makes a new one."""
        return self.args[0] if self.args and self.overwrites else self.kwargs.get("out")

    def take_apart(self) -> None:
        """Find out the kind, and which operands are input, weight and bias where weighted inputs are summed up."""
        self.kind, is_single = self.known.kind, len(self.inputs) == 1
        if self.known.parse is None:
            if is_single and self.kind == "product":
                self.kind = ""
            return
        self.operands = self._parsed()
        if self.operands is not None:
            return
        if is_single and self.known.has("constant"):  # only the addend depends on the input
            self.known, self.kind = _add, ""
        elif len(list(tensors_in((self.args, self.kwargs)))) == 1:  # there is nothing to weight it with
            self.known, self.kind = _sum, ""
        else:
            self.kind = "" if is_single else "product"

    def _parsed(self) -> Operands | None:
        assert self.known.parse is not None
        return self.known.parse(self.function, self.args, self.kwargs, self.depends)

    def out_of_place(self) -> tuple[Operation, Tensor]:
        """The same call on a copy of its first operand; and that operand, which the call itself would overwrite."""
        key = next((key for key, value in self.kwargs.items() if isinstance(value, Tensor)), "")
        target, *others = self.args or [self.kwargs[key]]
        kwargs = self.kwargs if self.args else {k: v for k, v in self.kwargs.items() if k != key}
        if kwargs.get("inplace"):
            function, kwargs = self.function, {**kwargs, "inplace": False}
        else:
            function = _on_a_copy(self.function)
        copy = target.clone()
        inputs = [copy if tensor is target else tensor for tensor in self.inputs]
        other = replace(self, function=function, args=(copy, *others), kwargs=kwargs, inputs=inputs)
        if self.operands is not None:
            other.operands = other._parsed()
        return other, target

    def constant(self) -> Tensor:
        """Output of an affine function where all that depends on the model's input is zero."""
        with torch.no_grad():
            args, kwargs = changed(
                (self.args, self.kwargs), lambda tensor: torch.zeros_like(tensor) if self.depends(tensor) else tensor
            )
            if not (args and self.overwrites):
                return cast(Tensor, self.function(*args, **kwargs))
            target = args[0].clone()
            self.function(target, *args[1:], **kwargs)
            return cast(Tensor, target)
