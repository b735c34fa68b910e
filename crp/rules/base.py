r"""What a rule is: a surrogate of one layer in the backward pass.

Theory
------
What travels backward is the *multiplier* :math:`m` (DeepLIFT's word); relevance is :math:`R = a \odot m`. Take a layer
:math:`y = f(a)` and a differentiable *surrogate* :math:`z(a)` of it. Every rule of the LRP family sends

.. math:: m_a = (\partial z / \partial a)^\top \; \frac{y \odot m_y}{z + \varepsilon \operatorname{sign} z}

back, for a surrogate that says which contributions count: :math:`z = f` is LRP-0, the layer with its positive weights
is :math:`z^+`, and so on. In relevances this is the familiar :math:`R_a = \sum_j \frac{a_i w_{ij}}{z_j} R_j` (Bach et
al., PLoS ONE 2015, eq. 56; Montavon et al., "Layer-wise relevance propagation: an overview", 2019, eq. 10.2). Where
:math:`z = 0` nothing contributed, and nothing is handed on. Additions, concatenations, poolings and reshapes need no
rule: for them the ordinary chain rule on :math:`m` is already LRP-0.

A new rule is one method, `Rule.surrogate`:

>>> from crp.rules import Rule
>>> from crp.rules.layer import positive
>>> class PositiveWeights(Rule):
...     def surrogate(self, layer, a):
...         return layer(a, positive)

Rules live inside a composite of `crp.composites`, which propagates multipliers. Inside one of zennit's they propagate
relevance, as zennit's own rules do. Each forward call has its own state, so a module may be used several times.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from zennit.core import Hook, RemovableHandle, RemovableHandleList

from crp.graph import tracing
from crp.reference import referencing
from crp.rules.account import Account, Shares
from crp.rules.entry import AsRelevance, Entry, Held, Unit, UnitMultiplier
from crp.rules.layer import Layer, check_parameters, is_plain, works_in_place
from crp.rules.operation import Operation
from crp.rules.redirect import Again as Again
from crp.rules.redirect import Forward, LayerAgain, released, saves_output
from crp.rules.redirect import Redirect as Redirect
from crp.rules.signs import Signs
from crp.rules.stabilizer import quotient, stabilizing


class Term(NamedTuple):
    """One part of a rule: relevance is sent back through ``z`` in proportion to ``weight / denominator``.

    Attributes
    ----------
    z : Tensor of shape (batch, *output shape)
        Surrogate of the layer, differentiable in its input.
    weight : float or Tensor
        Share of the relevance that this term distributes.
    denominator : Tensor or None
        What the contributions are divided by; ``z`` by default.
    sign : int
        1 or -1 if the denominator is known not to be negative or positive; 0 otherwise.
    outputs : int
        1 or -1 if only positive or negative outputs hand relevance on through this term; 0 for all.
    """

    z: Tensor
    weight: float | Tensor = 1.0
    denominator: Tensor | None = None
    sign: int = 0
    outputs: int = 0

    @property
    def below(self) -> Tensor:
        """What stands below the fraction."""
        return self.z if self.denominator is None else self.denominator


@dataclass
class Run:
    """What the rules of one composite share while they are on a model.

    Attributes
    ----------
    entry : Entry
        The model's input.
    account : Account or None
        Where layers account for what they keep, if anyone asked.
    signs : Signs
        Tensors that are known not to be negative.
    rectifiable : dict of int to object
        By `id`, outputs of layers whose rule is simpler where a ReLU follows; see `crp.rules.gamma`.
    """

    entry: Entry = field(default_factory=Entry)
    account: Account | None = None
    signs: Signs = field(default_factory=Signs)
    rectifiable: dict[int, Any] = field(default_factory=dict)

    def clear(self) -> None:
        """Forget the forward passes that were."""
        self.entry.clear()
        self.signs.clear()
        self.rectifiable.clear()


class Rule(Hook):  # type: ignore[misc]
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
    run : Run or None
        What rules of the same composite share; None in a composite of zennit.
    layer : str
        Name of the layer that the rule is on; the composite says so.
    """

    #: Whether relevance is independent of the input's value, so that it cannot be expressed as a multiplier.
    at_input = False
    #: Whether the layer's output is the sum of the terms, so that the layer itself need not be run.
    adds_up = False
    #: Module attributes of a rule that are settings; `__repr__` shows them.
    settings: ClassVar[tuple[str, ...]] = ("stabilizer", "zero_params")

    def __init__(
        self, stabilizer: float | Callable[[Tensor], Tensor] = 1e-6, zero_params: str | Sequence[str] | None = None
    ) -> None:
        super().__init__()
        self.stabilizer = stabilizer
        self.zero_params = _names(zero_params)
        self.multiplier = False
        self.run: Run | None = None
        self.layer = ""
        self._before: list[Tensor] = []
        self._parts: list[tuple[Tensor, Sequence[Term]]] = []
        self._stabilize = stabilizing(stabilizer)

    def surrogate(self, layer: Layer, a: Tensor) -> Tensor:
        r"""Differentiable function of ``a`` that stands in for the layer in the backward pass.

        Parameters
        ----------
        layer : Layer
            ``layer(a)`` is the layer itself; ``layer(a, weight, bias)`` has modified parameters.
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
        """Parts among which the relevance of the layer's output ``y`` is shared; one, the `surrogate`, by default."""
        return [Term(self.surrogate(layer, a))]

    def check(self, module: nn.Module) -> None:
        """Raise a TypeError if the rule cannot treat the module; called before the model runs."""
        check_parameters(module)

    def pre_forward(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Keep the input of a module that works in place."""
        self._before.append(args[0])
        return (args[0].clone(), *args[1:])

    def post_forward(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor | None:
        """Give the layer's output the gradient of the surrogate."""
        a = self._before.pop() if self._before else args[0]
        for what, value in (("reads", a), ("returns", output)):
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"{type(self).__name__} treats layers of one tensor; {self.layer!r} ({type(module).__name__}) "
                    f"{what} a {type(value).__name__}. Map rules to the layers or functions inside it"
                )
        terms = self._parts.pop()[1] if self._parts and self._parts[-1][0] is a else None
        if not self._acts_on(a) or output is a:
            return None
        # Becoming the output counts as a change in place, which views and outputs that a gradient needs cannot bear.
        bears = output.requires_grad and not output._is_view() and not saves_output(output)
        y = output if bears else released(output)
        layer = self._layer(module, a, output)
        return self.propagate(layer, a, y) if terms is None else self.share(layer, a, y, terms)

    def _acts_on(self, a: Tensor) -> bool:
        return not tracing() and not referencing() and torch.is_grad_enabled() and a.requires_grad

    def _layer(self, module: nn.Module, a: Tensor, output: Tensor | None = None) -> Layer:
        nonnegative = self.run is not None and self.run.signs.nonnegative(a)
        return Layer(module, self.zero_params, self._held(a), output, nonnegative)

    def _forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Forward of a module whose output is the sum of the terms."""
        if len(args) != 1 or kwargs or not self._acts_on(args[0]):
            return type(module).forward(module, *args, **kwargs)
        (a,) = args
        terms = self.terms(self._layer(module, a), a, a)
        self._parts.append((a, terms))
        return functools.reduce(torch.add, [term.z for term in terms])

    def operate(self, operation: Operation) -> Tensor:
        """Treat a function of torch: its output, with this rule as its gradient.

        Parameters
        ----------
        operation : Operation
            A layer without parameters; ``operation.inputs`` are the operands that depend on the model's input.

        Raises
        ------
        NotImplementedError
            If it has more than one such operand.
        """
        if len(operation.inputs) != 1:
            # (a TypeError inside an operator such as ** would be taken for "not my type")
            raise NotImplementedError(
                f"{type(self).__name__} treats functions of one input; {operation} has {len(operation.inputs)} that "
                "depend on the model's input"
            )
        return self.propagate(cast(Layer, operation), operation.inputs[0], released(operation.output))

    def propagate(self, layer: Layer, a: Tensor, y: Tensor) -> Tensor:
        """Layer's output, with this rule as its gradient.

        Parameters
        ----------
        layer : Layer
        a : Tensor of shape (batch, *input shape)
        y : Tensor of shape (batch, *output shape)
            It becomes the output.
        """
        return self.share(layer, a, y, self.terms(layer, self._source(a), y))

    def share(self, layer: Layer, a: Tensor, y: Tensor, terms: Sequence[Term]) -> Tensor:
        """Layer's output, whose relevance is shared among the terms."""
        with torch.no_grad():
            scales = [self._scale(term, y).to(term.z.dtype) for term in terms]
        out = self.redirect(layer, a, y, [term.z for term in terms], scales)
        if self.run is not None and self.run.account is not None:
            out = self.run.account.absorb(self.layer, a, out, self._shares(layer.again(), a, terms, scales, out))
        return out

    def redirect(
        self, layer: Layer, a: Tensor, y: Tensor, surrogates: Sequence[Tensor], scales: Sequence[Tensor]
    ) -> Tensor:
        """Layer's output, whose gradient goes into the surrogates, each scaled.

        Parameters
        ----------
        layer : Layer
        a : Tensor of shape (batch, *input shape)
        y : Tensor of shape (batch, *output shape)
            It becomes the output.
        surrogates, scales : sequence of Tensor
            Differentiable functions of ``a``, and what the gradient is multiplied with before it goes into them.
        """
        apart = layer.output is not None and layer.output is not y and layer.output.requires_grad
        own, again = layer.output if apart else None, LayerAgain(self, layer.again(), a)
        return cast(Tensor, Redirect.apply(y, again, len(surrogates), *surrogates, *scales, own))

    def _scale(self, term: Term, y: Tensor) -> Tensor:
        """What the gradient is multiplied with before it goes into ``term.z``."""
        below, above = term.below, self._above(term, y, self.multiplier)
        if above is y and below.data_ptr() == y.data_ptr():  # the layer itself: its output is its surrogate
            above = below
        scale = quotient(above, below, self._stabilize, term.sign)
        if isinstance(term.weight, float) and not scale.requires_grad:
            return scale if term.weight == 1 else scale.mul_(term.weight)
        return scale * term.weight

    def _above(self, term: Term, y: Tensor, multiplier: bool) -> Tensor:
        """What is shared among the contributions, for each unit that arrives at an output."""
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
            nothing = term.below == 0
            above = term.weight * self._above(term, y, multiplier=True)
            bias = bias + scale * zero.z
            empty = empty + torch.where(nothing, above, 0.0)
            stabilizer = stabilizer + torch.where(nothing, 0.0, above - scale * term.z.detach())
        return Shares(bias, empty, stabilizer)

    def _held(self, a: Tensor) -> Tensor:
        """Input as a constant, which second derivatives still know."""
        if self.at_input and self.run is not None:
            return cast(Tensor, Held.apply(a, self.run.entry))
        return a

    def _source(self, a: Tensor) -> Tensor:
        """Tensor that stands for the input in the surrogate, and turns its gradient into what travels on."""
        if not self.at_input:
            return a if self.multiplier else cast(Tensor, AsRelevance.apply(a))
        leaf = self.run.entry.find(a) if self.run is not None else None
        if leaf is not None:
            return cast(Tensor, Unit.apply(leaf, a))
        return cast(Tensor, UnitMultiplier.apply(a) if self.multiplier else Unit.apply(a, a))

    def copy(self) -> Rule:
        """Rule of the same settings for another module."""
        return copy.copy(self)

    def remove(self) -> None:
        """Forget everything about past calls."""
        super().remove()
        self._before.clear()
        self._parts.clear()

    def register(self, module: nn.Module) -> RemovableHandleList:
        """Put the rule on a module.

        Raises
        ------
        TypeError
            If the rule cannot treat the module.
        """
        self.check(module)
        after = module.register_forward_hook(self._after, with_kwargs=True)
        handles = RemovableHandleList([RemovableHandle(self), after])
        if self.adds_up and self.multiplier and is_plain(module) and "forward" not in vars(module):
            handles.append(Forward(module, functools.partial(self._forward, module)))
        if works_in_place(module):
            handles.append(module.register_forward_pre_hook(self._prepare, with_kwargs=True))
        return handles

    def _prepare(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.pre_forward(module, args or tuple(kwargs.values())), {}

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | None:
        return self.post_forward(module, args or tuple(kwargs.values()), output)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in self.settings)})"

    def __getstate__(self) -> dict[str, Any]:
        # Hook state is per registration; what is left are the settings.
        return {
            k: v
            for k, v in vars(self).items()
            if k not in ("stored_tensors", "tensor_handles", "run", "layer", "_before", "_parts")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        Hook.__init__(self)
        self.__dict__.update(state, run=None, layer="", _before=[], _parts=[])


def _names(zero_params: str | Sequence[str] | None) -> tuple[str, ...]:
    names = (zero_params,) if isinstance(zero_params, str) else tuple(zero_params or ())
    for name in names:
        if name not in ("weight", "bias"):
            raise ValueError(f"zero_params may name 'weight' and 'bias', not {name!r}")
    return names
