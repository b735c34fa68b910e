"""The rule of activations: they hand relevance on as it is, with the numbers that are part of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from crp.errors import InputError
from crp.rules.attention import _by_chain_rule
from crp.rules.base import Attachment, Rule
from crp.rules.entrywise import _function_in
from crp.rules.exponentials import _ENDING, _exponential
from crp.rules.functions import Function
from crp.rules.layer import Layer
from crp.rules.linearized import Linearized
from crp.rules.redirect import Redirect, SecondOrder, _Borrowed, _RedirectLater
from crp.rules.shared import Proportional
from crp.rules.terms import Term

#: Largest absolute value of an input that counts as 0 for `Pass`.
TINY = 1e-30


class Pass(Rule):
    """Identity: an elementwise layer hands relevance on as it is, :math:`R_a = R_y`.

    In multiplier encoding ``m_a = m_y * y / a``; relevance at an input of 0 (to within 1e-30) is not handed on. Numbers
    that are added to a sigmoid, an exponential and the like are part of it, and so are those by which a hard sigmoid is
    written out, as in ``relu6(x + 3) / 6``: what hands on is the whole, to ``x``.
    """

    settings: ClassVar[tuple[str, ...]] = ()
    is_identity = True

    def __init__(self) -> None:
        super().__init__(0.0)

    def operate(self, layer: Layer) -> Any:
        """Return the layer's output, with this rule as its gradient.

        Exponentials that sum up to one are a softmax; numbers around an activation are part of it.
        """
        softmax = _by_chain_rule(self, layer) if layer.known.canonical in _ENDING else None
        if softmax is not None:
            return softmax
        source = self._below_numbers(layer) if self.multiplier else None
        return super().operate(layer) if source is None else _Activation(source, self.attachment).operate(layer)

    def _below_numbers(self, layer: Layer) -> Tensor | None:
        """What is below the numbers around an activation, if the call is the last of both."""
        function = _function_in(layer.parts)
        if function is None:
            return None
        if function.activation is None:  # (an exponential behind which a number stands may be too small to divide by)
            return function.exponent() if layer.known.has("arithmetic") else None
        if function.sources[function.activation].is_copied:
            raise InputError(
                f"{layer} makes an activation of numbers before it, as of a hard sigmoid, so that all is one "
                "function: no relevance flows through what is named as a layer inside. Name one before, or behind"
            )
        return function.activation.now()

    def propagate(self, layer: Layer, a: Tensor, y: Tensor) -> Tensor:
        """Return the layer's output, whose gradient goes to the input as it is."""
        if a.shape != y.shape:
            raise InputError(f"Pass needs an elementwise layer; {layer} maps {tuple(a.shape)} to {tuple(y.shape)}")
        layer.parts = _exponential(layer) or layer.parts
        if self.multiplier and self._scales_later(layer, y):
            again, borrowed = layer.again(), _Borrowed(y)
            second = SecondOrder(again, [a], self.is_active, lambda: self._scales_later_on(again, a, borrowed))
            out = cast(Tensor, _RedirectLater.apply(y, second, a))
            borrowed.follow(out)
            layer.follow = borrowed.follow
            return out
        return super().propagate(layer, a, y) if self.multiplier else Redirect.apply(y, None, 1, a, torch.ones_like(y))

    def _scales_later(self, layer: Layer, y: Tensor) -> bool:
        """Whether the input is kept anyway, by the call's own gradient, so that the scale need not be."""
        # (one over a tensor, times a number, keeps that one)
        is_kept = hasattr(y.grad_fn, "_saved_self") and layer.known.canonical != "rdiv"
        return is_kept and self._account is None and y is layer.output

    def _scales_later_on(self, again: Layer, a: Tensor, borrowed: _Borrowed) -> list[Tensor]:
        """The scale: of the output, if the model's next operation has kept it, or else of the call once more."""
        y = None if torch.is_grad_enabled() else borrowed.values()
        if y is None:
            return self._scales_again(again, a)
        return [self._scale(term, y).to(term.z.dtype) for term in self.terms(again, a, y)]

    def terms(self, layer: Layer, a: Tensor, y: Tensor) -> Sequence[Term]:
        """One term, the input itself."""
        # Where the output is 0, the sign of the input does not matter.
        return [Term(a, sign=1 if _is_rectifier(layer) else 0)]

    def _scale(self, term: Term, y: Tensor) -> Tensor:
        # For inputs close to 0 the quotient would not be finite.
        a = term.z
        if torch.is_grad_enabled() or a.dtype != y.dtype:
            nothing = a.abs() <= TINY
            return y.masked_fill(nothing, 0) / a.masked_fill(nothing, 1)
        if term.sign > 0:
            scale = torch.threshold(a, TINY, math.inf)
            return torch.div(y, scale, out=scale)
        scale = a.abs()
        nothing = scale <= TINY
        return torch.div(y, a, out=scale).masked_fill_(nothing, 0)

    def treats(self, known: Function, kind: str, alone: bool) -> bool:
        """Activations and normalizations, and what a module without parts is."""
        return kind in ("activation", "normalization") or (alone and super().treats(known, kind, alone))


class Softplus(Pass):
    """Logarithms of a sum of two exponentials: activations, where one of both is constant; else the chain rule."""

    shares = True

    def operate(self, layer: Layer) -> Any:
        """Return the logarithm, with this rule as its gradient."""
        if len(layer.inputs) == 1:
            return super().operate(layer)
        return Proportional().attach(cast(Attachment, self.attachment)).operate(layer)


class _Activation(Linearized):
    """Several calls that make one activation of a tensor, which hands on as it is; this is the last of them.

    Parameters
    ----------
    source : Tensor
        What the first of them has read; of the shape of the output.
    attachment : Attachment or None
        Of the rule in whose place this one comes.
    """

    settings: ClassVar[tuple[str, ...]] = ()

    def __init__(self, source: Tensor, attachment: Attachment | None) -> None:
        super().__init__(0.0)
        self.source, self.attachment, self.multiplier = source, attachment, True

    def operate(self, layer: Layer) -> Tensor:
        """Return the output, with this rule as its gradient."""
        layer.inputs = (*layer.inputs, self.source)  # (second derivatives need it as it was)
        return super().operate(layer)

    def parts(self, layer: Layer, *inputs: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
        """What the first call has read, scaled to the output."""
        nothing, y = self.source.abs() <= TINY, cast(Tensor, layer.output)
        return [(self.source, y.masked_fill(nothing, 0) / self.source.masked_fill(nothing, 1))]


def _is_rectifier(layer: Layer) -> bool:
    """Whether an operation gives 0 for all that is below 0."""
    return layer.name in ("relu", "relu6") or (
        layer.name == "hardtanh" and layer.module is None and layer.arguments.get("min_val", -1) == 0
    )
