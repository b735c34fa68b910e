"""Rules that leave a call as it is, and hand each operand a part of its gradient; what is missing is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, TypeAlias, cast

from torch import Tensor

from crp.layers.nested import changed
from crp.rules.account import _Balance
from crp.rules.base import Rule
from crp.rules.functions import Function
from crp.rules.layer import Layer, _no_rule
from crp.rules.model_input import _PartOf
from crp.rules.notes import Born
from crp.rules.redirect import _acting

#: Part of an argument's gradient; or a function that tells it for each tensor in the argument.
Part: TypeAlias = float | Callable[[Tensor], float]
#: Parts of all positional arguments, and of all keywords.
Parts: TypeAlias = tuple[list[Part], dict[str, Part]]


class _Shared(Rule):
    """Base of these rules."""

    settings: ClassVar[tuple[str, ...]] = ()
    shares = True
    #: What a report shows, where nobody can write the rule's name.
    words: ClassVar[str] = ""

    def __repr__(self) -> str:
        return self.words or super().__repr__()

    def parts(self, layer: Layer) -> Parts:
        """Parts of all arguments."""
        raise NotImplementedError

    def operate(self, layer: Layer) -> Any:
        """Return the function's output; parts of what flows back go to its operands."""
        sink = None if self._account is None else self._account.open(layer.place, layer.inputs[0])
        mine, is_active = {id(tensor) for tensor in layer.inputs}, _acting(self.is_active, layer)

        def taking(value: Any, part: Part) -> Any:
            def take(tensor: Tensor) -> Tensor:
                if id(tensor) not in mine:
                    return tensor
                counted = tensor if sink is None else cast(Tensor, _Balance.apply(tensor, sink, -1))
                size = part(tensor) if callable(part) else part
                return counted if size == 1 else cast(Tensor, _PartOf.apply(counted, size, is_active))

            return value if sink is None and part == 1 else changed(value, take)

        parts, named = self.parts(layer)
        args = [taking(arg, part) for arg, part in zip(layer.args, parts, strict=True)]
        result = layer.function(*args, **{name: taking(value, named[name]) for name, value in layer.kwargs.items()})
        if sink is None:
            return result
        return changed(result, lambda tensor: _Balance.apply(tensor, sink, 1) if tensor.requires_grad else tensor)


class Proportional(_Shared):
    """The ordinary chain rule, for functions with constant operands, which keep their share of the relevance."""

    words = "ordinary chain rule"

    def operate(self, layer: Layer) -> Any:
        """Return the function's output; what the operands that depend on the model's input do not explain is kept."""
        return layer.output if self._account is None else super().operate(layer)

    def parts(self, layer: Layer) -> Parts:
        """All of it."""
        return [1.0] * len(layer.args), dict.fromkeys(layer.kwargs, 1.0)

    def treats(self, known: Function, kind: str, alone: bool) -> bool:
        """Whatever is inside the module."""
        return True


class EndingSoftmax(Proportional):
    """The same for a softmax or its logarithm, of which a composite wants to know whether a model ends in it."""

    def operate(self, layer: Layer) -> Any:
        """Return the function's output."""
        if self.attachment is not None:
            self.attachment.softmaxes |= Born.LOGARITHM if layer.known.canonical == "log_softmax" else Born.SOFTMAX
        return super().operate(layer)


class _OfSquares(_Shared):
    """A mean of squares, such as a variance: of degree two, so that half of its gradient is all of its relevance."""

    words = "half of the ordinary chain rule"

    def parts(self, layer: Layer) -> Parts:
        """A half."""
        return [0.5] * len(layer.args), dict.fromkeys(layer.kwargs, 0.5)


class _ByGrid(_Shared):
    """Samples of a tensor, at places that a grid names: the grid is held constant, as an index is."""

    words = "chain rule, with the grid held constant"

    def parts(self, layer: Layer) -> Parts:
        """All for what is sampled."""
        sampled = layer.args[0] if layer.args else layer.kwargs["input"]
        of_each: Part = lambda tensor: float(tensor is sampled)  # noqa: E731
        return [of_each] * len(layer.args), dict.fromkeys(layer.kwargs, of_each)


class _Solved(_Shared):
    """Solutions X of linear equations A X = B: the matrix A is held constant, as what divides is.

    Of a constant B, a solution is of degree -1 in A: minus its gradient is all of its relevance, as of one over a
    number.
    """

    words = "chain rule, with the matrix held constant"

    def parts(self, layer: Layer) -> Parts:
        """All for B, if it depends on the model's input."""
        matrix = layer.args[0] if layer.args else layer.kwargs["A"]
        of_matrix = 0.0 if len(layer.inputs) > 1 else -1.0
        of_each: Part = lambda tensor: of_matrix if tensor is matrix else 1.0  # noqa: E731
        return [of_each] * len(layer.args), dict.fromkeys(layer.kwargs, of_each)


class _OfMethod(Rule):
    """Base of rules that refuse what a method has no rule for.

    Parameters
    ----------
    method : str
        Name of the method, for the message.
    """

    settings: ClassVar[tuple[str, ...]] = ("method",)

    def __init__(self, method: str) -> None:
        super().__init__()
        self.method = method


class _OfFactors(_Shared):
    """A product of all entries along an axis, each of which has an equal share, as each of two factors has."""

    words = "an equal part of the chain rule for each factor"

    def parts(self, layer: Layer) -> Parts:
        """One over their number."""
        (factors,), dim = layer.inputs, layer.arguments.get("dim")
        part = 1 / max(factors.numel() if dim is None else factors.shape[dim], 1)
        return [part] * len(layer.args), dict.fromkeys(layer.kwargs, part)


class Refused(_OfMethod, Proportional):
    """Refuses operations for which a method has no rule, so that no other method's result goes by its name."""

    def operate(self, layer: Layer) -> Any:
        """Refuse functions of more than one operand that depends on the model's input; others are affine.

        Raises
        ------
        NotImplementedError
            Naming the operation and where it ran.
        """
        if len(layer.inputs) == 1 and not layer.known.has("attention"):
            return super().operate(layer)
        # (Python takes a TypeError inside an operator such as @ for "operands of another type")
        raise NotImplementedError(_no_rule(self.method, layer))


#: Rules of functions that have one of their own under every preset of LRP.
BY_FUNCTION: dict[tuple[str, ...], type[_Shared]] = {
    ("cdist", "frac", "fmod", "logsumexp", "pairwise_distance", "remainder", "std"): Proportional,
    ("var",): _OfSquares,
    ("grid_sample",): _ByGrid,
    ("linalg_solve", "linalg_solve_triangular"): _Solved,
    ("prod",): _OfFactors,
}
