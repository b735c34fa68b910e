"""A rule on the operations of one module, in composites of zennit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from crp.errors import InputTypeError
from crp.layers import referencing, tracing
from crp.layers.nested import tensors_in
from crp.rules.functions import Function
from crp.rules.mode import Choice, SeeingMode
from crp.rules.notes import Notes
from crp.rules.operands import Operands


class OneModule(SeeingMode):
    """Brings one rule to the operations of one module, in composites of zennit.

    Parameters
    ----------
    rule : Rule
    module : nn.Module
    """

    def __init__(self, rule: Any, module: nn.Module) -> None:
        super().__init__(Notes())
        self.rule, self.alone = rule, not module._modules
        self.kind = type(module).__name__
        self._treated = 0
        self._depth = 0

    def choose(
        self, known: Function, kind: str, first: bool = False, several: bool = False, operands: Operands | None = None
    ) -> Choice:
        """Give the rule, if it is for the operation."""
        treats = not several and self.rule.treats(known, kind, self.alone)
        self._treated += treats
        return Choice(self.rule if treats else None, True, "")

    def begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Forward pre-hook."""
        if tracing() or referencing():
            return
        self._depth += 1
        if self._depth == 1:
            self._treated = 0
            for tensor in tensors_in((args, kwargs)):
                if tensor.requires_grad:
                    self.notes.enter(tensor, None)
            self.__enter__()  # type: ignore[no-untyped-call]

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook, also after an error."""
        if not self._depth or tracing() or referencing():
            return
        self._depth -= 1
        if self._depth:
            return
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        explained = bool(self.notes)
        try:
            if output is not None and explained and torch.is_grad_enabled():
                self.notes.read(tensors_in(output), [], self._reader_of_output)
                if not self._treated and any(tensor.requires_grad for tensor in tensors_in(output)):
                    raise InputTypeError(f"{self.rule!r} has no operation to act on in {self.kind}")
        finally:
            self.notes.clear()
            self.products.clear()

    def _reader_of_output(self, tensor: Tensor, is_changed: bool) -> None:
        self.refuse_unseen(f"what reads the output of {self.kind}", tensor, is_changed)
