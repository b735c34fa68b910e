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
import weakref
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from zennit.core import Hook, RemovableHandle, RemovableHandleList, Stabilizer

from crp.graph import tracing
from crp.rules.layer import Layer


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
    """

    z: Tensor
    weight: float | Tensor = 1.0
    denominator: Tensor | None = None


class Entry:
    """Where the model's input is: rules that make relevance out of nothing (flat, w², zᴮ) hand it out there."""

    def __init__(self) -> None:
        self._inputs: list[tuple[weakref.ref[Tensor], Tensor]] = []

    def enter(self, data: Tensor) -> Tensor:
        """Pass on the model's input so that the multiplier that comes back to it leaves it as relevance."""
        inner: Tensor = AsRelevance.apply(data)
        self._inputs = [(ref, leaf) for ref, leaf in self._inputs if ref() is not None]
        self._inputs.append((weakref.ref(inner), data))
        return inner

    def find(self, tensor: Tensor) -> Tensor | None:
        """Model input that ``tensor`` is, or is an elementwise image of; None if there is none."""
        for ref, leaf in self._inputs:
            inner = ref()
            if inner is tensor or (
                inner is not None and inner.shape == tensor.shape and _is_elementwise(tensor, inner)
            ):
                return leaf
        return None

    def clear(self) -> None:
        """Forget all inputs."""
        self._inputs.clear()


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
    entry : Entry or None
        The model's input, where the composite knows it.
    """

    #: Whether relevance is independent of the input's value, so that it cannot be expressed as a multiplier.
    at_input = False
    #: Module attributes of a rule that are settings; `__repr__` shows them.
    settings: ClassVar[tuple[str, ...]] = ("stabilizer", "zero_params")

    def __init__(
        self, stabilizer: float | Callable[[Tensor], Tensor] = 1e-6, zero_params: str | Sequence[str] | None = None
    ) -> None:
        super().__init__()
        self.stabilizer = stabilizer
        self.zero_params = _names(zero_params)
        self.multiplier = False
        self.entry: Entry | None = None
        self._before: list[Tensor] = []
        self._stabilize = Stabilizer.ensure(stabilizer)

    def surrogate(self, layer: Layer, a: Tensor) -> Tensor:
        """Differentiable function of ``a`` that stands in for the layer in the backward pass.

        Parameters
        ----------
        layer : Layer
            ``layer(a)`` is the layer itself; ``layer(a, weight, bias)`` has modified parameters.
        a : Tensor of shape (batch, *input shape)
            For rules at the input (``at_input``) a tensor of ones that stands for one unit of relevance.

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
        Layer(module, self.zero_params)

    def pre_forward(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Keep the input of a module that works in place."""
        self._before.append(args[0])
        return (args[0].clone(), *args[1:])

    def post_forward(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor | None:
        """Give the layer's output the gradient of the surrogate."""
        a = self._before.pop() if self._before else args[0]
        if tracing() or not torch.is_grad_enabled() or not a.requires_grad or output is a:
            return None
        y = output.detach()
        return self.propagate(Layer(module, self.zero_params, a.detach(), output), a, y)

    def propagate(self, layer: Layer, a: Tensor, y: Tensor) -> Tensor:
        """Layer's output, with this rule as its gradient."""
        terms = self.terms(layer, self._source(a), y)
        scales = []
        for z, weight, denominator in terms:
            below = (z if denominator is None else denominator).detach()
            above = weight * y if self.multiplier else weight
            scales.append(torch.where(below == 0, 0.0, above / self._stabilize(below)).to(z.dtype))
        return cast(Tensor, Redirect.apply(y, len(terms), *(term.z for term in terms), *scales))

    def _source(self, a: Tensor) -> Tensor:
        """Tensor that stands for the input in the surrogate, and turns its gradient into what travels on."""
        if not self.at_input:
            return a if self.multiplier else cast(Tensor, AsRelevance.apply(a))
        leaf = self.entry.find(a) if self.entry is not None else None
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

    def register(self, module: nn.Module) -> RemovableHandleList:
        """Put the rule on a module.

        Raises
        ------
        TypeError
            If the rule cannot treat the module.
        """
        self.check(module)
        handles = RemovableHandleList([RemovableHandle(self), module.register_forward_hook(self.post_forward)])
        if getattr(module, "inplace", False):
            handles.append(module.register_forward_pre_hook(self.pre_forward))
        return handles

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in self.settings)})"

    def __getstate__(self) -> dict[str, Any]:
        # Hook state is per registration; what is left are the settings.
        return {
            k: v for k, v in vars(self).items() if k not in ("stored_tensors", "tensor_handles", "entry", "_before")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        Hook.__init__(self)
        self.__dict__.update(state, entry=None, _before=[])


class Redirect(torch.autograd.Function):
    """Value of ``y``; its gradient goes into the surrogates ``z``, scaled."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, n: int, *tensors: Tensor) -> Tensor:
        """Return ``y`` itself; ``tensors`` are the n surrogates and their n scales."""
        ctx.save_for_backward(*tensors[n:])
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Scale the gradient for each surrogate."""
        scales = ctx.saved_tensors
        return (None, None, *(grads[0] * scale for scale in scales), *(None for _ in scales))


class AsRelevance(torch.autograd.Function):
    """Identity; the multiplier that arrives is multiplied with the value, and so leaves as relevance."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        """Return a copy."""
        ctx.save_for_backward(a)
        return a.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """Multiply with the value."""
        (a,) = ctx.saved_tensors
        return cast(Tensor, grads[0] * a)


class Unit(torch.autograd.Function):
    """Ones in the shape of ``a``; what arrives is handed to ``leaf`` as it is."""

    @staticmethod
    def forward(ctx: FunctionCtx, leaf: Tensor, a: Tensor) -> Tensor:
        """Return ones."""
        return torch.ones_like(a)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Pass on."""
        return grads[0], None


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
_ELEMENTWISE = ("Mul", "Div", "Sub", "Add", "Clone", "ToCopy", "Contiguous", "Alias")


def _is_elementwise(tensor: Tensor, source: Tensor) -> bool:
    """Whether ``tensor`` comes from ``source`` by elementwise operations only."""
    node = tensor.grad_fn
    while node is not None and node is not source.grad_fn:
        above = [n for n, _ in node.next_functions if n is not None]
        if not node.name().startswith(_ELEMENTWISE) or len(above) != 1:
            return False
        node = above[0]
    return node is not None


def _names(zero_params: str | Sequence[str] | None) -> tuple[str, ...]:
    names = (zero_params,) if isinstance(zero_params, str) else tuple(zero_params or ())
    for name in names:
        if name not in ("weight", "bias"):
            raise ValueError(f"zero_params may name 'weight' and 'bias', not {name!r}")
    return names
