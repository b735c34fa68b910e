r"""What a rule is: a surrogate of one operation in the backward pass.

Theory
------
What travels backward is the *multiplier* :math:`m` (DeepLIFT's word); relevance is :math:`R = a \odot m`. Take an
operation :math:`y = f(a)` and a differentiable *surrogate* :math:`z(a)` of it. Every rule of the LRP family sends

.. math:: m_a = (\partial z / \partial a)^\top \; \frac{y \odot m_y}{z + \varepsilon \operatorname{sign} z}

back, for a surrogate that says which contributions count: :math:`z = f` is LRP-0, the operation with its positive
weights is :math:`z^+`, and so on. In relevances this is the familiar
:math:`R_a = \sum_j \frac{a_i w_{ij}}{z_j} R_j` (Bach et al., PLoS ONE 2015, eq. 56; Montavon et al., "Layer-wise
relevance propagation: an overview", 2019, eq. 10.2). Where :math:`z = 0` nothing contributed, and nothing is handed
on. For additions, concatenations, poolings and reshapes, the ordinary chain rule on :math:`m` is LRP-0 already.

A new rule is one method, `Rule.surrogate`:

>>> from crp.rules import Rule
>>> from crp.rules.layer import positive
>>> class PositiveWeights(Rule):
...     def surrogate(self, layer, a):
...         return layer(a, positive)

Rules live inside a composite of `crp.composites`, which propagates multipliers. Inside one of zennit's they propagate
relevance, as zennit's own rules do. An operation is a call of a function of torch, whoever makes it; a module says
where rules apply. Each call has its own state, so a module may be used several times.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from zennit.core import Hook, RemovableHandle, RemovableHandleList

from crp.errors import InputError, InputTypeError
from crp.notices import kind_of
from crp.rules.account import Account, Shares
from crp.rules.functions import AFFINE, Function
from crp.rules.layer import Layer
from crp.rules.model_input import ModelInput, _AsRelevance, _DetachedInput, _Unit, _UnitMultiplier
from crp.rules.notes import Copied, Note, Notes
from crp.rules.one_module import OneModule
from crp.rules.redirect import Redirect, SecondOrder, _released, _saves_output
from crp.rules.stabilizer import Absolute, _Stabilized, quotient, stabilizing
from crp.rules.terms import Term


@dataclass
class Attachment:
    """What the rules of one composite share while they are on a model.

    Attributes
    ----------
    model_input : ModelInput
    account : Account or None
        Where layers account for what they keep, if anyone asked.
    notes : Notes
        What is known of the tensors of the forward pass.
    rectifiable : dict of int to object
        Outputs, by `id`, of operations whose rule is simpler if a ReLU follows; see `crp.rules.gamma`.
    rectified : WeakIdKeyDictionary
        Weights of operations whose output was read by a ReLU: a hint, which saves work and changes no number.
    softmaxes : int
        What those were born of (`crp.rules.notes.Born`) that a softmax without a rule of the user's has made.
    """

    #: Whether constants, such as biases, keep a share of the relevance.
    keeps_constants: ClassVar[bool] = True

    model_input: ModelInput = field(default_factory=ModelInput)
    account: Account | None = None
    notes: Notes = field(default_factory=Notes)
    rectifiable: dict[int, Any] = field(default_factory=dict)
    rectified: WeakIdKeyDictionary = field(default_factory=WeakIdKeyDictionary)
    softmaxes: int = 0

    def clear(self) -> None:
        """Forget past forward passes."""
        self.notes.clear()
        self.rectifiable.clear()


class Rule(_Stabilized, Hook):  # type: ignore[misc]
    """Base of all rules; override `surrogate`, or `terms` for rules of several parts.

    Parameters
    ----------
    stabilizer : float or callable
        Added to the denominator with its sign (+ for 0); or a function of the denominator.
    zero_params : str or sequence of str, optional
        Parameters that count as zero in the surrogate: ``"bias"``, ``"weight"``.

    Attributes
    ----------
    multiplier : bool
        Whether multipliers travel, and not relevance; the composite says so.
    attachment : Attachment or None
        What rules of the same composite share; None in a composite of zennit.
    """

    #: Whether relevance does not depend on the input's value, so that it cannot be expressed as a multiplier.
    at_input = False
    shares = False  #: whether the rule is for operations of which several operands depend on the model's input
    is_identity = False  #: whether an activation hands on its relevance as it is
    adds_up = False  #: whether the output is the sum of the terms, so that the operation itself need not be run
    #: Whether the rule takes weights apart, and so treats sums of weighted inputs only.
    needs_weight: ClassVar[bool] = False
    written_out: Callable[..., Any] | None = None  #: run in place of a call; what it calls has rules
    settings: ClassVar[tuple[str, ...]] = ("stabilizer", "zero_params")  #: attributes that `__repr__` shows

    def __init__(
        self, stabilizer: float | Callable[[Tensor], Tensor] = 1e-6, zero_params: str | Sequence[str] | None = None
    ) -> None:
        super().__init__()
        stabilizing(stabilizer)
        self.stabilizer = stabilizer
        self.zero_params = _names(zero_params)
        self.multiplier = False
        self.attachment: Attachment | None = None

    def surrogate(self, layer: Layer, a: Tensor) -> Tensor:
        r"""Differentiable function of ``a`` that stands in for the operation in the backward pass.

        Parameters
        ----------
        layer : Layer
            The operation: ``layer(a)`` as it is; ``layer(a, weight, bias)`` with a modified weight and bias.
        a : Tensor of shape (batch, *input shape)
            For rules at the input (``at_input``) a tensor of ones that stands for one unit of relevance.

        Notes
        -----
        It should be homogeneous of degree one in ``a`` but for a constant, :math:`z(c\,a) - z(0) = c\,(z(a) - z(0))`:
        then the contributions :math:`a_i \partial z / \partial a_i` add up to :math:`z - z(0)`, and relevance is
        conserved.

        Returns
        -------
        Tensor of shape (batch, *output shape)
        """
        raise NotImplementedError(f"{type(self).__name__} implements neither surrogate nor terms")

    def terms(self, layer: Layer, a: Tensor, y: Tensor) -> Sequence[Term]:
        """Parts among which the relevance of the output ``y`` is shared; one, the `surrogate`, by default."""
        return [Term(self.surrogate(layer, a))]

    def treats(self, known: Function, kind: str, alone: bool) -> bool:
        """Whether the rule is for such operations where it is mapped to a module around them.

        Parameters
        ----------
        known : Function
            What is called.
        kind : str
            Kind of the operation, of `crp.rules.functions.KINDS` or ``""``.
        alone : bool
            Whether the module contains no other modules; it then is what it calls, arithmetic and moves aside.
        """
        if kind in AFFINE:
            return True
        return alone and not self.needs_weight and not known.has("selects", "copies", "arithmetic")

    def operate(self, layer: Layer) -> Any:
        """Treat an operation: its output, with this rule as its gradient.

        Parameters
        ----------
        layer : Layer
            The call; ``layer.inputs`` are the operands that depend on the model's input.

        Raises
        ------
        NotImplementedError
            If it has more than one such operand, or a complex one.
        TypeError
            If the rule takes weights apart and the call has none.
        """
        if self.needs_weight and layer.operands is None:
            raise InputTypeError(f"{type(self).__name__} treats sums of weighted inputs, which {layer} is not")
        a = layer.only_input(self)
        layer.zero_params = self.zero_params
        layer.at_input = self.stands_at_input(layer)
        if self.attachment is not None and layer.at_input:
            note = self._note_of(a)
            layer.copied = None if note is None else note.copied
            layer.held = cast(Tensor, _DetachedInput.apply(a, self.attachment.model_input))
        if self.adds_up and self.multiplier and layer.operands is not None:
            terms = self.terms(layer, a, a)
            layer.result = functools.reduce(torch.add, [term.whole for term in terms])
            return self.share(layer, a, _writable(layer.result), terms)
        output = layer.output
        if output is a:  # handed back as it was
            return output
        if not isinstance(output, Tensor):
            raise InputTypeError(
                f"{type(self).__name__} treats operations of one result; {layer} returns {kind_of(output)}"
            )
        # (what a module as a whole has saved for its gradient cannot be known)
        return self.propagate(layer, a, _writable(output) if layer.module is None else output.detach().clone())

    def propagate(self, layer: Layer, a: Tensor, y: Tensor) -> Tensor:
        """Output of an operation, with this rule as its gradient.

        Parameters
        ----------
        layer : Layer
        a : Tensor of shape (batch, *input shape)
        y : Tensor of shape (batch, *output shape)
            It becomes the output.
        """
        return self.share(layer, a, y, self.terms(layer, self._source(layer, a), y))

    def share(self, layer: Layer, a: Tensor, y: Tensor, terms: Sequence[Term]) -> Tensor:
        """Output of an operation, whose relevance is shared among the terms."""
        surrogates = [term.z for term in terms]
        self._check_surrogates(layer, a, y, surrogates)
        with torch.no_grad():
            scales = [self._scale(term, y).to(term.z.dtype) for term in terms]
        out = self.redirect(layer, a, y, surrogates, scales)
        if self._account is None:
            return out
        return self._account.absorb(layer.place, a, out, self._shares(layer.again(), a, terms, scales, out))

    def _check_surrogates(self, layer: Layer, a: Tensor, y: Tensor, surrogates: Sequence[Tensor]) -> None:
        """Raise an error if one has not the output's shape, or if relevance could not reach the input."""
        for z in surrogates:
            if not isinstance(z, Tensor) or z.shape != y.shape:
                raise InputTypeError(
                    f"{type(self).__name__} makes {kind_of(z)} the surrogate of {layer}, which returns {tuple(y.shape)}"
                )
        if a.requires_grad and not any(z.requires_grad for z in surrogates):
            raise InputTypeError(
                f"{type(self).__name__} makes a constant the surrogate of {layer}: it must be differentiable in a"
            )

    def redirect(
        self, layer: Layer, a: Tensor, y: Tensor, surrogates: Sequence[Tensor], scales: Sequence[Tensor]
    ) -> Tensor:
        """Output of an operation, whose gradient goes into the surrogates, each scaled.

        Parameters
        ----------
        layer : Layer
        a : Tensor of shape (batch, *input shape)
        y : Tensor of shape (batch, *output shape)
            It becomes the output.
        surrogates, scales : sequence of Tensor
            Differentiable functions of ``a``, and what the gradient is multiplied with before it goes into them.
        """
        own = layer.output
        # (of a module as a whole, what no surrogate needs may have no gradient)
        apart = own is not y and own.requires_grad and (layer.module is None or any(z is own for z in surrogates))
        again = layer.again()
        second = SecondOrder(again, [a], self.is_active, lambda: self._scales_again(again, a))
        return cast(Tensor, Redirect.apply(y, second, len(surrogates), *surrogates, *scales, own if apart else None))

    def is_active(self) -> bool:
        """Whether the rule acts, and not the ordinary chain rule."""
        return self.attachment is None or self.attachment.model_input.active

    def stands_at_input(self, layer: Layer) -> bool:
        """Whether the relevance of this call's input does not depend on its value."""
        return self.at_input

    def _scales_again(self, layer: Layer, a: Tensor) -> list[Tensor]:
        """Scales of the terms, computed once more."""
        with layer.precision():
            y, source = layer.value(a), torch.ones_like(a) if layer.at_input else a
            return [self._scale(term, y).to(term.z.dtype) for term in self.terms(layer, source, y)]

    def _scale(self, term: Term, y: Tensor) -> Tensor:
        """What the gradient is multiplied with before it goes into ``term.z``."""
        added = term.added if term.denominator is None else None
        below = term.z if term.denominator is None else term.denominator
        above = self._above(term, y, self.multiplier)
        if above is y and below.data_ptr() == y.data_ptr():  # the operation itself: its output is its surrogate
            above = below
        if isinstance(term.weight, float):
            return quotient(above, below, self._stabilize, term.sign, added, term.weight)
        return quotient(above, below, self._stabilize, term.sign, added) * term.weight

    def _above(self, term: Term, y: Tensor, multiplier: bool) -> Tensor:
        """Numerator of the rule: what the contributions share, for each unit that arrives at an output."""
        if not multiplier:
            return torch.ones_like(y) if term.outputs == 0 else (y > 0 if term.outputs > 0 else y < 0).to(y.dtype)
        return y if term.outputs == 0 else y.clamp(min=0) if term.outputs > 0 else y.clamp(max=0)

    def _shares(self, layer: Layer, a: Tensor, terms: Sequence[Term], scales: Sequence[Tensor], out: Tensor) -> Shares:
        """What stays in the layer, for each unit of multiplier that arrives at an output."""
        y = out.detach()
        bias, empty, stabilizer = (torch.zeros_like(y) for _ in range(3))
        with torch.no_grad():
            at_zero = self.terms(layer, torch.zeros_like(a), y)
        for term, zero, scale in zip(terms, at_zero, scales, strict=True):
            nothing = (term.whole if term.denominator is None else term.denominator) == 0
            above = term.weight * self._above(term, y, multiplier=True)
            bias = bias + scale * zero.whole
            empty = empty + torch.where(nothing, above, 0.0)
            # (an entry that is masked by minus infinity hands on 0, not 0 times infinity)
            handed_on = torch.where(scale == 0, 0.0, scale * term.whole.detach())
            stabilizer = stabilizer + torch.where(nothing, 0.0, above - handed_on)
        return Shares(bias, empty, stabilizer)

    def _source(self, layer: Layer, a: Tensor) -> Tensor:
        """Tensor that stands for the input in the surrogate, and turns its gradient into what travels on."""
        if not layer.at_input:
            return a if self.multiplier else cast(Tensor, _AsRelevance.apply(a))
        unit = None if layer.copied is None else _unit_of(layer.copied)
        if unit is not None and unit.shape == a.shape:
            return unit
        if not self.multiplier:
            return cast(Tensor, _Unit.apply(a, a))
        source = cast(Tensor, _UnitMultiplier.apply(a.clone()))  # (the model may overwrite its tensor)
        if self._account is None:
            return source
        lost = Shares(empty=(a.detach() == 0).to(a.dtype))  # no multiplier of 0 is relevance
        return self._account.absorb(layer.place, a, source, lost)

    @property
    def _account(self) -> Account | None:
        """Where layers account for what they keep, if anyone asked."""
        return None if self.attachment is None else self.attachment.account

    def _note_of(self, tensor: Tensor) -> Note | None:
        """What is known of a tensor of the forward pass, if anything is."""
        return None if self.attachment is None else self.attachment.notes.of(tensor)

    def copy(self) -> Rule:
        """Rule of the same settings."""
        assert self._stabilize is not None  # (made once for all copies)
        return copy.copy(self)

    def attach(self, attachment: Attachment) -> Rule:
        """Rule of the same settings for a composite in which multipliers travel."""
        rule = self.copy()
        rule.__dict__.update(multiplier=True, attachment=attachment)
        return rule

    def register(self, module: nn.Module) -> RemovableHandleList:
        """Put the rule on the operations of a module, in a composite of zennit."""
        mode = OneModule(self, module)
        return RemovableHandleList(
            [
                RemovableHandle(self),
                module.register_forward_pre_hook(mode.begin, with_kwargs=True),
                module.register_forward_hook(mode.end, always_call=True),
            ]
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in self.settings)})"

    def __getstate__(self) -> dict[str, Any]:
        left_out = "stored_tensors", "tensor_handles", "attachment", "_is_fixed"  # (of one registration or composite)
        return {k: v for k, v in vars(self).items() if k not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Hook.__init__(self)
        self.__dict__.update(state, attachment=None)


def _unit_of(copied: Copied) -> Tensor:
    """Ones in the shape of a copy of the model's input; their gradient reaches the input as relevance."""
    return copied.of(lambda leaf: cast(Tensor, _Unit.apply(leaf, leaf)))


def _writable(output: Tensor) -> Tensor:
    """Values of an output, which may become the output of another autograd function.

    Autograd counts that as a change in place. Views, and outputs that their own gradient needs, must not be changed;
    these are copied.
    """
    can_change = output.requires_grad and not output._is_view() and not _saves_output(output)
    return output if can_change else _released(output)


def _is_exact(rule: Rule) -> bool:
    """Whether a rule whose surrogate is the operation itself is the ordinary chain rule."""
    return (
        rule.multiplier
        and isinstance(rule._stabilize, Absolute)
        and rule._stabilize.epsilon == 0
        and not rule.zero_params
        and rule._account is None
    )


def _names(zero_params: str | Sequence[str] | None) -> tuple[str, ...]:
    names = [zero_params] if isinstance(zero_params, str) else [] if zero_params is None else zero_params
    wrong = [name for name in names if name not in ("weight", "bias")] if isinstance(names, Sequence) else [names]
    if wrong:
        raise InputError(f"zero_params may name 'weight' and 'bias', not {wrong[0]!r}")
    return tuple(names)
