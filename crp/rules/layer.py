"""A layer, as rules see it: one call of a function of torch, as a function of the operand that depends on the input."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from crp.errors import InputTypeError
from crp.layers.devices import holds
from crp.layers.marks import TensorMark
from crp.layers.nested import changed
from crp.layers.packed import unpacked
from crp.rules.functions import Function, _arguments_of
from crp.rules.notes import Copied
from crp.rules.operands import Operands
from crp.wording import shortened

Modifier: TypeAlias = Callable[[Tensor], Tensor]
#: How many modified copies of a weight are kept.
KEPT = 8

_modified: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _same(weight: Tensor) -> Tensor:
    """Weight as it is."""
    return weight


def positive(weight: Tensor) -> Tensor:
    """Positive part."""
    return weight.clamp(min=0)


def negative(weight: Tensor) -> Tensor:
    """Negative part."""
    return weight.clamp(max=0)


def _square(weight: Tensor) -> Tensor:
    """Square."""
    return weight.square()


def _ones(weight: Tensor) -> Tensor:
    """Ones in place of every entry."""
    return torch.ones_like(weight)


@dataclass(frozen=True)
class _Boosted:
    """Weight plus ``gamma`` times a part of it."""

    gamma: float
    part: Modifier

    def __call__(self, weight: Tensor) -> Tensor:
        """Modify a weight."""
        return weight + self.gamma * self.part(weight)


def _split_by_sign(a: Tensor) -> tuple[Tensor, Tensor | None]:
    """Positive and negative part of a layer's input; None where there is no negative part, as behind a ReLU."""
    if a.numel() == 0 or holds(lambda: a.detach().amin() >= 0):
        return a, None
    positive_part, negative_part = cast(tuple[Tensor, Tensor], _SplitBySign.apply(a))
    return positive_part, negative_part


class _SplitBySign(torch.autograd.Function):
    """Positive and negative part; each entry takes the gradient of the part that it is in."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> tuple[Tensor, Tensor]:
        """Take apart."""
        ctx.save_for_backward(a >= 0)  # (a zero as where no entry is negative; the model may overwrite its tensor)
        return a.clamp(min=0), a.clamp(max=0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """Put together."""
        (above,) = ctx.saved_tensors
        return torch.where(above, grads[0], grads[1])


@dataclass(eq=False)
class Layer:
    """One call of a function of torch, or of a module that counts as one function.

    Attributes
    ----------
    function : callable
        What was called.
    args, kwargs
        What it was called with.
    inputs : tuple of Tensor
        Operands that depend on the model's input, in order; one that is used twice is there twice.
    known : Function
        What the table of functions says.
    operands : Operands or None
        Input, weight and bias, where the call sums up weighted inputs.
    place : str
        Name of the innermost module in which it ran, where that is known.
    module : nn.Module or None
        The module, where the call is that of a module as a whole.
    nonnegative : bool
        Whether the input is known not to be negative.
    born : tuple of int
        What made the values of each input (`crp.rules.notes.Born`), where there are several.
    zero_params : tuple of str
        Of ``"weight"`` and ``"bias"``, what counts as zero for the rule.
    reference : Layer or None
        The same call in the forward pass of the reference input, where there is one.
    differs : bool
        Of a reference, whether the call on the data reads other constants.
    at_input : bool
        Whether the rule hands out relevance itself and no multiplier.
    copied : Copied or None
        How the input is a copy of the model's, where the rule does not depend on its value.
    locate : callable or None
        Finds the place for a message, where it is not tracked.
    follow : callable or None
        Is told of the tensor that the model overwrites with the output, where the rule can use it.
    parts : object
        What the rule of the next operation needs to know of this call; at first what is remembered of its input.
    gives : int
        What the rule knows of the output (`crp.rules.notes`).
    """

    function: Callable[..., Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    inputs: tuple[Tensor, ...]
    known: Function
    operands: Operands | None = None
    place: str = ""
    module: nn.Module | None = None
    nonnegative: bool = False
    born: tuple[int, ...] = ()
    zero_params: tuple[str, ...] = ()
    reference: Layer | None = None
    differs: bool = False
    at_input: bool = False
    copied: Copied | None = field(default=None, repr=False)
    parts: Any = field(default=None, repr=False)
    gives: int = 0
    locate: Callable[[], str] | None = field(default=None, repr=False)
    held: Tensor | None = field(default=None, repr=False)
    follow: Callable[[Tensor], None] | None = field(default=None, repr=False)
    result: Any = field(default=None, repr=False)
    is_rerun: bool = False

    def __post_init__(self) -> None:
        kind = self.inputs[0].device.type if self.inputs else "cpu"
        # What is computed once more, in a backward pass, shall be in the same precision.
        self._autocast = (kind, torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else None

    @property
    def name(self) -> str:
        """Plain name of the function, or type of the module."""
        return self.known.name

    @property
    def weight(self) -> Tensor | None:
        """Operand that the input is weighted with; None where there is none."""
        return None if self.operands is None else self.operands.weight

    @property
    def bias(self) -> Tensor | None:
        """Operand that is added to the weighted inputs."""
        return None if self.operands is None else self.operands.bias

    @property
    def output(self) -> Any:
        """What the call gave, with its graph; it is run when first asked for."""
        if self.result is None:
            self.result = self.function(*self.args, **self.kwargs)
        return self.result

    @property
    def input(self) -> Tensor:
        """Operand that depends on the model's input, as a constant."""
        if self.held is not None:
            return self.held
        a = self.inputs[0]
        return a.detach() if a.requires_grad else a

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments by name, where the table of functions has the names."""
        return _arguments_of(self.known, self.function, self.args, self.kwargs)

    def only_input(self, rule: object) -> Tensor:
        """Operand that depends on the model's input, for a rule that treats one of real numbers; others are refused."""
        name = type(rule).__name__
        # (Python takes a TypeError inside an operator such as ** for "operands of another type")
        if len(self.inputs) != 1:
            raise NotImplementedError(
                f"{name} treats functions of one input; {self} has {len(self.inputs)} that depend on the model's "
                "input; give another rule, or None in layer_map for the ordinary chain rule"
            )
        if self.inputs[0].is_complex():
            raise NotImplementedError(
                f"{name} treats real numbers, and the input of {self} is complex; write its parts apart, or give None "
                "in layer_map for the ordinary chain rule"
            )
        return self.inputs[0]

    def __call__(
        self,
        a: Tensor,
        weight: Modifier | Tensor | None = None,
        bias: Modifier | Tensor | bool | None = None,
        *others: Tensor,
    ) -> Tensor:
        """Output for the input ``a``, with a modified weight and bias, differentiable in ``a`` only.

        Parameters
        ----------
        a : Tensor of shape (batch, *input shape)
        weight : callable or Tensor, optional
            Modifier of the weight (what it gives is kept as long as the weight does not change), or another weight. A
            call without a weight has none to modify; a second tensor is then its second operand.
        bias : callable, Tensor or bool, optional
            Modifier of the bias, or another bias; that of the weight by default; False leaves it out.
        *others : Tensor
            Further operands of a call without a weight.

        Returns
        -------
        Tensor of shape (batch, *output shape)
        """
        operands = self.operands
        if operands is None:
            self._refuse_modifier(weight, bias)
            return cast(Tensor, self.value(a, *(o for o in (weight, bias, *others) if isinstance(o, Tensor))))
        modifier = _same if weight is None or isinstance(weight, Tensor) else weight
        if not callable(modifier):
            raise InputTypeError(f"weight must be a modifier or a tensor, not {shortened(weight)}")
        w = weight if isinstance(weight, Tensor) else self._modified("weight", operands.weight, modifier)
        assert w is not None
        if not (bias is None or isinstance(bias, Tensor | bool) or callable(bias)):
            raise InputTypeError(f"bias must be a modifier, a tensor, or False to leave it out; not {shortened(bias)}")
        if isinstance(bias, Tensor) or bias is False:
            b = bias if isinstance(bias, Tensor) else None
        else:
            b = self._modified("bias", operands.bias, bias if callable(bias) else modifier)
        with self.precision():
            return operands.run(a, w, b)

    def apart(self, a: Tensor, modifier: Modifier) -> tuple[Tensor, Tensor | None]:
        """Output with a modified weight and bias, and what of the bias is not in it, for `crp.rules.terms.Term`.

        A GPU adds the bias of a convolution by a pass of its own over memory, which the quotient saves.
        """
        operands = self.operands
        if operands is None or operands.bias is None or not (operands.convolves and _adds_by_itself(a)):
            return self(a, modifier), None
        bias = self._modified("bias", operands.bias, modifier)
        added = None if bias is None else bias.reshape(-1, *(1,) * operands.space)
        return self(a, modifier, bias=False), added

    def value(self, *inputs: Tensor) -> Any:
        """Output for other operands in place of `inputs`, as the call has it; differentiable in these."""
        with self.precision():
            if self.operands is not None:
                operands = self.operands
                bias = None if operands.bias is None else operands.bias.detach()
                return operands.run(inputs[0], operands.weight.detach(), bias)
            new = iter(inputs)
            mine = {id(tensor) for tensor in self.inputs}
            args, kwargs = changed((list(self.args), dict(self.kwargs)), lambda t: next(new) if id(t) in mine else t)
            if self.module is not None:  # (which may change them in place)
                args, kwargs = changed((args, kwargs), Tensor.clone)
            return self.function(*args, **kwargs)

    def itself(self, a: Tensor) -> Any:
        """Output for the input of this call; what it gave serves, unless a parameter counts as zero."""
        return self(a) if self.zero_params or self.is_rerun else self.output

    def again(self) -> Layer:
        """The same call, to be run once more: without its output."""
        other = object.__new__(type(self))  # (copy.copy takes several times as long)
        vars(other).update(vars(self), result=None, locate=None, is_rerun=True)
        return other

    @contextlib.contextmanager
    def _recast(self) -> Iterator[None]:
        assert self._autocast is not None
        with torch.autocast(self._autocast[0], self._autocast[1]):
            yield

    def precision(self) -> contextlib.AbstractContextManager[None]:
        """Context of the precision in which the call ran."""
        if self._autocast is None or torch.is_autocast_enabled(self._autocast[0]):
            return contextlib.nullcontext()
        return self._recast()

    def split_by_sign(self, a: Tensor) -> tuple[Tensor, Tensor | None]:
        """Positive and negative part of an input; None where there is no negative part, as behind a ReLU."""
        return (a, None) if self.nonnegative else _split_by_sign(a)

    def _modified(self, name: str, operand: Tensor | None, modifier: Modifier) -> Tensor | None:
        if operand is None or (name == "bias" and name in self.zero_params):
            return None
        if name in self.zero_params:
            return torch.zeros_like(unpacked(operand))
        return operand.detach() if modifier is _same else modified(operand, modifier)

    def _refuse_modifier(self, weight: object, bias: object) -> None:
        has_parameters = self.module is not None and next(self.module.parameters(), None) is not None
        if has_parameters and (callable(weight) or callable(bias)):
            raise InputTypeError(
                f"{self} counts as one function, so that its parameters cannot be modified; map the rule to the "
                "operations inside it, without Whole"
            )

    def __str__(self) -> str:
        place = self.place or (self.locate() if self.locate is not None else "")
        if self.module is not None:
            return f"{self.name} {place!r}"
        return call_in_words(self.name, place)


def call_in_words(function: str, place: str) -> str:
    """A call of a function in a module, if that is known, for messages."""
    return f"{function}() in {place!r}" if place else f"{function}()"


def _adds_by_itself(a: Tensor) -> bool:
    """Whether the bias of a convolution is added after it, and not with it."""
    return a.is_cuda


def _no_rule(method: str, layer: Layer) -> str:
    """Message that a method has no rule for a call."""
    return f"{method} has no rule for {layer}; give one in layer_map, or None for the ordinary chain rule"


def modified(weight: Tensor, modifier: Modifier) -> Tensor:
    """Weight modified by ``modifier``, computed once as long as the weight does not change.

    Modifiers are told apart by identity or equality, and the last `KEPT` of a weight are kept: give a function,
    not a new ``lambda`` at each call. Optimizers, ``load_state_dict`` and in-place operations are noticed; writes
    through ``weight.data``, which torch does not count as changes, as far as a `TensorMark` sees.
    """
    known: dict[Modifier, tuple[TensorMark, Tensor]] = _modified.setdefault(weight, {})  # type: ignore[no-untyped-call]
    if modifier not in known or not known[modifier][0].is_of(weight):
        with torch.no_grad():
            known.pop(modifier, None)
            while len(known) >= KEPT:
                del known[next(iter(known))]
            known[modifier] = (TensorMark(weight), modifier(unpacked(weight.detach())))
    return known[modifier][1]


# --- tensors in what functions are called with ----------------------------------------------------------------------
