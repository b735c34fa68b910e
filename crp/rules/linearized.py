"""Rules that replace a function by one that is linear in its operands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor

from crp.rules.account import Shares
from crp.rules.base import Rule
from crp.rules.functions import Function
from crp.rules.layer import Layer
from crp.rules.redirect import Redirect, SecondOrder, _released


class Linearized(Rule):
    r"""Base of rules that replace a function by one that is linear in its operands.

    :math:`y = \sum_k s_k \odot z_k + c`, with :math:`z_k` linear in the operands that depend on the model's input, and
    :math:`s_k` and :math:`c` held constant; :math:`c` keeps its share of the relevance.
    """

    def parts(self, layer: Layer, *inputs: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
        """Pairs of :math:`z_k`, in the shape of the output, and of :math:`s_k`, which broadcasts to it."""
        raise NotImplementedError

    def operate(self, layer: Layer) -> Tensor:
        """Return the function's output, with this rule as its gradient."""
        own, again = cast(Tensor, layer.output), layer.again()
        parts = self.parts(layer, *layer.inputs)
        zs, scales = [z for z, _ in parts], [scale.detach() for _, scale in parts]
        second = SecondOrder(again, layer.inputs, self.is_active, lambda: self._scales_of(again))
        out = cast(Tensor, Redirect.apply(_released(own), second, len(zs), *zs, *scales, own))
        if self._account is None:
            return out
        constant = own.detach() - sum(z.detach() * scale for z, scale in zip(zs, scales, strict=True))
        return self._account.absorb(layer.place, layer.inputs[0], out, Shares(bias=constant))

    def treats(self, known: Function, kind: str, alone: bool) -> bool:
        """What a module without parts calls."""
        return alone and not known.has("selects", "copies")

    def _scales_of(self, layer: Layer) -> list[Tensor]:
        """Scales, computed once more."""
        with layer.precision():
            return [scale for _, scale in self.parts(layer, *layer.inputs)]
