"""An operation, as the mode sees it: one call of a function of torch that reads what depends on the model's input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from crp.layers.devices import holds
from crp.layers.nested import changed, tensors_in
from crp.rules.functions import Function, _arguments_of, look_up
from crp.rules.notes import BORN, FIRST, Born
from crp.rules.operands import NOTHING_SUMMED, Operands, _is_parameter
from crp.rules.spellings import in_place

_add, _sum, _largest, _select = look_up(torch.add), look_up(torch.sum), look_up(torch.amax), look_up(torch.select)
_scaling = replace(
    look_up(torch.einsum), kind="", properties=frozenset({"homogeneous", "linear"}), parse=None, keeps=FIRST | BORN
)
#: Functions of entries that an index chooses: the same, where the index holds tensors, which may depend on the data.
_BY_TENSORS = {
    known: replace(known, properties=known.properties | {"selection"})
    for known in (look_up(Tensor.__getitem__), look_up(Tensor.__setitem__))
}
#: Functions that multiply all that an index puts at one place, if they are told to.
_REDUCING = {
    known: replace(known, properties=frozenset())
    for known in (look_up(Tensor.scatter_reduce), look_up(Tensor.index_reduce), look_up(torch.segment_reduce))
}
#: Functions that add a number to what a gate is made of, and so are part of it, as in ``1 / (1 + exp(-x))``.
_SHIFTS = {
    known: replace(known, properties=known.properties | {"identity"})
    for known in (look_up(torch.add), look_up(torch.sub), look_up(torch.rsub))
}
#: Batch norm; and the same by statistics of the batch itself, which depend on the data as those of other norms do.
_batch_norm = look_up(F.batch_norm)
_of_batch = replace(_batch_norm, properties=frozenset({"statistics"}))
_of_kernel = ("input", "weight", "bias")  # (what kernels of norms begin with)
#: Functions that cut off, if one of the two operands is a number.
_CUTS = {
    look_up(function): look_up(cut)
    for cut, functions in (
        (torch.clamp_min, (torch.maximum, torch.fmax, torch.max)),
        (torch.clamp_max, (torch.minimum, torch.fmin, torch.min)),
    )
    for function in functions
}
#: Functions of several results: what each is the result of; those of a norm that follow are statistics.
RESULTS = {
    "var_mean": (look_up(torch.var), look_up(torch.mean)),
    "std_mean": (look_up(torch.std), look_up(torch.mean)),
    "native_layer_norm": (look_up(F.layer_norm),),
    "native_group_norm": (
        replace(look_up(F.group_norm), arguments=(*_of_kernel, "N", "C", "HxW", "num_groups", "eps")),
    ),
    "native_batch_norm_legit_no_training": (
        replace(look_up(F.batch_norm), arguments=(*_of_kernel, "running_mean", "running_var", "momentum", "eps")),
    ),
}


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
        Of `crp.rules.functions.KINDS`, or ``""``; this and what follows is found by `take_apart`.
    operands : Operands or None
        Input, weight and bias, where weighted inputs are summed up.
    is_in_place : bool
        Whether the result takes the place of the first operand, and is returned.
    overwrites : bool
        Whether the first operand is changed.
    """

    function: Callable[..., Any]
    args: Sequence[Any]
    kwargs: dict[str, Any]
    known: Function
    inputs: list[Tensor]
    flags: int
    kind: str = ""
    operands: Operands | None = None
    is_in_place: bool = False
    overwrites: bool = False

    def run(self) -> Any:
        """Output of the call as it is."""
        return self.function(*self.args, **self.kwargs)

    def depends(self, value: object) -> bool:
        """Whether an operand depends on the model's input."""
        return value is self.inputs[0] or (len(self.inputs) > 1 and any(value is tensor for tensor in self.inputs))

    def take_apart(self) -> None:
        """Find out what it writes to, its kind, and what is input, weight and bias where weighted inputs are summed."""
        self.is_in_place = in_place(self.function, self.kwargs)
        self.overwrites = self.is_in_place or self.known.name == "setitem"
        self.kind, is_single = self.known.kind, len(self.inputs) == 1
        if self.known.parse is None:
            if self.known in _BY_TENSORS and next(tensors_in(self.args[1]), None) is not None:
                self.known = _BY_TENSORS[self.known]
            if is_single and self.kind == "product":
                self.kind = ""
            if self.known is _batch_norm and self._given("training"):
                self.known = _of_batch
            if self.known in _REDUCING and "prod" in self._words():
                self.known = _REDUCING[self.known]
            if is_single and self.flags & Born.GATING and self.known in _SHIFTS and self._is_beside_a_number():
                self.known = _SHIFTS[self.known]
            elif is_single and self.known in _CUTS and len(self._tensors()) == 2 and self._is_beside_a_number():
                self.known = _CUTS[self.known]
                self.kind = self.known.kind
            return
        self.operands = self.known.parse(self.function, self.args, self.kwargs, self.depends)
        if self.operands is NOTHING_SUMMED:
            self.known, self.kind, self.operands = _scaling, "", None
            return
        if self.operands is not None:
            return
        if is_single and self.known.has("constant"):  # only the addend depends on the input
            self.known, self.kind = _add, ""
        elif is_single and self.known.canonical == "sparse_mm":  # (of weighted inputs, the largest is chosen)
            self.known, self.kind = _largest, ""
        elif len(self._tensors()) == 1:  # there is nothing to weight it with
            self.known, self.kind = _sum, ""
        else:
            self.kind = "" if is_single else "product"

    def _given(self, name: str) -> Any:
        """An argument by name."""
        return _arguments_of(self.known, self.function, self.args, self.kwargs).get(name)

    def factors(self) -> list[Any]:
        """Operands of a product or a quotient in order, and what else it is given."""
        given = _arguments_of(self.known, self.function, self.args, self.kwargs)
        return [given.pop("input"), given.pop("other"), *given.values()]

    def _words(self) -> list[str]:
        """Arguments that are words."""
        return [value for value in (*self.args, *self.kwargs.values()) if isinstance(value, str)]

    def _is_beside_a_number(self) -> bool:
        """Whether all other operands are numbers, or constant tensors of one number, which is no parameter."""
        return all(_is_one_number(tensor) for tensor in self._tensors() if tensor is not self.inputs[0])

    def _tensors(self) -> list[Tensor]:
        return list(tensors_in((self.args, self.kwargs)))

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
        other = Operation(function, (copy, *others), kwargs, self.known, inputs, self.flags, self.kind)
        if self.operands is not None and self.known.parse is not None:
            other.operands = self.known.parse(function, other.args, kwargs, other.depends)
        return other, target

    def results(self) -> list[Operation]:
        """The call, of a function of several results, as one for each of these."""
        kinds = enumerate(RESULTS.get(self.known.canonical) or [_select] * len(self.run()))
        return [replace(self, function=partial(_result, self.function, i), known=known) for i, known in kinds]

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


def _result(function: Callable[..., Any], number: int, *args: Any, **kwargs: Any) -> Any:
    """One of the results of a function of several."""
    return function(*args, **kwargs)[number]


def _fills(target: object, index: object, value: object) -> bool:
    """Whether a number is put where a mask says, as by `masked_fill`."""
    is_number = isinstance(value, int | float) or (isinstance(value, Tensor) and value.dim() == 0)
    return is_number and isinstance(index, Tensor) and index.dtype == torch.bool


def _is_one_number(tensor: Tensor) -> bool:
    """Whether all entries of a constant tensor are the same number, and no parameter."""
    is_plain = tensor.numel() > 0 and not tensor.is_complex() and not _is_parameter(tensor)
    return is_plain and holds(lambda: tensor.amin() == tensor.amax())


@lru_cache(maxsize=256)  # (so that the same function is known again)
def _on_a_copy(function: Callable[..., Any]) -> Callable[..., Any]:
    """Like a function that works in place, but on a copy."""

    def copying(first: Any, *args: Any, **kwargs: Any) -> Any:
        copy = first.clone()
        result = function(copy, *args, **kwargs)
        return copy if result is None else result

    copying.__name__ = getattr(function, "__name__", str(function)).rstrip("_")
    return copying
