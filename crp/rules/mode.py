"""The mode that sees every operation of a running model, asks for its rule, and notes what it makes.

A `torch.overrides.TorchFunctionMode` is told of each call of a function of torch: `F.relu`, ``x * gate``,
``x.softmax(-1)``, and what modules call inside. What it cannot see (scripted parts, custom autograd functions, other
threads) makes tensors without a note, and the next operation that reads one is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import FrameType
from typing import Any, NamedTuple, NoReturn, Protocol, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from crp.errors import UnseenError
from crp.layers.addresses import rebound
from crp.rules.functions import Function, _on_a_copy, in_place, look_up, overwrites
from crp.rules.layer import Layer, changed
from crp.rules.notes import FIRST, Copied, Notes
from crp.rules.operands import Operands
from crp.rules.passing import _passed
from crp.rules.redirect import overwritten
from crp.trace.recorder import tensors_in

# In torch 2.4 no function tells whether hooks on saved tensors are set: there they count as set.
_saved_tensors_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: ())
_transform = torch._C._functorch.peek_interpreter_stack
_add, _sum = look_up(torch.add), look_up(torch.sum)


class _Operates(Protocol):
    """What a mode needs of a rule."""

    def operate(self, layer: Layer) -> Any:
        """Output of a call, with the rule as its gradient."""

    @property
    def shares(self) -> bool:
        """Whether the rule is for operations of which several operands depend on the model's input."""

    def treats(self, known: Function, kind: str, alone: bool) -> bool:
        """Whether the rule is for such operations where it is mapped to a module around them."""


class Choice(NamedTuple):
    """The rule of an operation.

    Attributes
    ----------
    rule : Rule or None
        None is the ordinary chain rule.
    is_method : bool
        Whether that is what the method says.
    why : str
        What was matched, for a report.
    number : int
        Place of the entry among those of the composite.
    """

    rule: Any
    is_method: bool
    why: str
    number: int = 0


class SeeingMode(TorchFunctionMode):
    """Sees operations, brings rules to them, and notes what they make.

    Parameters
    ----------
    notes : Notes
    """

    def __init__(self, notes: Notes) -> None:
        super().__init__()
        self.notes = notes
        self._reading = _add
        self._parts: Any = None
        self._gives = 0
        self.operands: Operands | None = None

    def choose(self, known: Function, kind: str, flags: int, several: bool) -> Choice:
        """Rule of an operation.

        Parameters
        ----------
        known : Function
        kind : str
            Of the operation: of `crp.rules.functions.KINDS`, or ``""``.
        flags : int
            What is known of its operands (`crp.rules.notes`).
        several : bool
            Whether more than one operand depends on the model's input.
        """
        raise NotImplementedError

    def is_named(self, known: Function) -> bool:
        """Whether a function that calls others shall be one operation all the same."""
        return False

    def note_constant(self, result: Any, args: Any, kwargs: Any) -> None:
        """Note a call on which the model's input has no influence."""

    def place(self) -> str:
        """Name of the innermost module that runs, where it is tracked."""
        return ""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function, under its rule if it has one."""
        kwargs = kwargs or {}
        known = look_up(func)
        if known.metadata or not torch.is_grad_enabled() or _transform() is not None:
            return func(*args, **kwargs)
        inputs: list[Tensor] = []
        self._reading = known
        flags = self.notes.read(args[:1] if known.reads_first else args, inputs, self._unseen)
        if kwargs:
            flags &= self.notes.read(kwargs.values(), inputs, self._unseen)
        if not inputs:
            result = func(*args, **kwargs)
            self.note_constant(result, args, kwargs)
            return result
        if known.canonical in _DERIVATIVES:
            self._refuse_derivative(known)
        if known.canonical in _IN_TWO and len(args) + len(kwargs.keys() & _ADDENDS) == len(_ADDENDS):
            return self._in_two(func, known, types, args, kwargs)
        if _saved_tensors_hooks(False) is not None:
            # A checkpoint would run the operation again in the backward pass, where no rule acts.
            with torch.autograd.graph.saved_tensors_hooks(Tensor.detach, _keep):
                return self._see(func, known, args, kwargs, inputs, flags)
        return self._see(func, known, args, kwargs, inputs, flags)

    def _in_two(self, func: Any, known: Function, types: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        arguments = dict(zip(_ADDENDS, args, strict=False)) | kwargs
        first, *pair = (arguments.pop(name) for name in _ADDENDS)
        product = self.__torch_function__(_IN_TWO[known.canonical], types, pair)
        add = Tensor.add_ if in_place(func, args, kwargs) else torch.add
        arguments["alpha"] = arguments.pop("value", 1)
        return self.__torch_function__(add, types, (first, product), arguments)

    def _see(
        self, func: Any, known: Function, args: Any, kwargs: dict[str, Any], inputs: list[Tensor], flags: int
    ) -> Any:
        kind, operands = known.kind, None
        if "composed" in known.properties and not self.is_named(known):
            with self:  # (the function asks whether a mode is to be told of itself)
                return rebound(func, has_torch_function=lambda values: False)(*args, **kwargs)
        if known.parse is not None:
            operands = known.parse(func, args, kwargs, _among(inputs))
            if operands is None and len(inputs) == 1 and known.has("constant"):
                known, kind = _add, ""  # only the addend depends on the input
            elif operands is None and len(list(tensors_in((args, kwargs)))) == 1:
                known, kind = _sum, ""  # there is nothing to weight it with
            elif operands is None:
                kind = "product" if len(inputs) > 1 else ""
        elif kind == "product" and len(inputs) == 1:
            kind = ""
        self.operands = operands
        copied = self._copied(func, known, args, kwargs, inputs, flags) if flags & FIRST else None
        choice = self.choose(known, kind, flags, operands is None and len(inputs) > 1)
        apart = None if choice.rule is None else choice.rule.written_out
        if apart is not None and not known.operands:
            with self:
                return apart(*args, **kwargs)
        writes = known.name == "setitem" or in_place(func, args, kwargs)
        target = args[0] if args and writes else kwargs.get("out")
        if choice.rule is None:
            result = self.by_chain_rule(choice, func, known, kind, args, kwargs, inputs)
        else:
            result = self._by_rule(choice, func, known, args, kwargs, inputs, flags, operands)
        first = flags & FIRST if kind == "product" else 0  # (several factors depend on the input: it is not affine)
        flags = _passed(known, args, kwargs, inputs, flags, self.notes.born) | first | self._gives
        self._gives = 0
        if isinstance(target, Tensor) and target.requires_grad:
            self.notes.add_written(target, flags, copied if isinstance(copied, Copied) else None)
            if result is target:
                return result
        if isinstance(copied, list):
            for item, way in zip(result, copied, strict=False):
                self.notes.add(item, flags, way)
        else:
            self.notes.add(result, flags, copied)
        if known.canonical == "clone":
            note = self.notes.of(inputs[0])
            self._parts = None if note is None else note.parts
        if self._parts is not None:
            self.notes.remember(result, self._parts)
            self._parts = None
        return result

    def _by_rule(
        self,
        choice: Choice,
        func: Any,
        known: Function,
        args: Any,
        kwargs: dict[str, Any],
        inputs: list[Tensor],
        flags: int,
        operands: Operands | None,
    ) -> Any:
        target = None
        if in_place(func, args, kwargs):
            # The rule works out of place; the result then takes the place of what the model overwrites.
            func, args, kwargs, target = _out_of_place(func, args, kwargs)
            copy = args[0]
            self.notes.add_copy(copy, target)
            inputs = [copy if tensor is target else tensor for tensor in inputs]
            operands = (
                None if operands is None or known.parse is None else known.parse(func, args, kwargs, _among(inputs))
            )
        layer = Layer(func, args, kwargs, tuple(inputs), known, operands, self.place())
        layer.locate = self.innermost
        if len(inputs) > 1:
            layer.born = tuple(self.notes.born(tensor) for tensor in inputs)
        if operands is not None:
            if operands.added is not None:
                layer.function, layer.args, layer.kwargs = operands.run, (operands.a, operands.weight, None), {}
            layer.inputs = (operands.a,)
        layer.nonnegative = self.notes.nonnegative(layer.inputs[0])
        result = self.by_rule(choice, layer)
        self._parts, self._gives = layer.parts, layer.gives
        if operands is not None and operands.added is not None:
            result = result + operands.added
        if target is None:
            return result
        written = overwritten(target, result)
        if layer.follow is not None and written.dtype == result.dtype:
            layer.follow(written)
        return written

    def by_rule(self, choice: Choice, layer: Layer) -> Any:
        """Output of a call, with the rule as its gradient."""
        return choice.rule.operate(layer)

    def by_chain_rule(
        self,
        choice: Choice,
        func: Any,
        known: Function,
        kind: str,
        args: Any,
        kwargs: dict[str, Any],
        inputs: Sequence[Tensor],
    ) -> Any:
        """Output of a call as it is."""
        return func(*args, **kwargs)

    def _copied(
        self, func: Any, known: Function, args: Any, kwargs: dict[str, Any], inputs: list[Tensor], flags: int
    ) -> Copied | list[Copied] | None:
        """How the result will be copied from the model's input."""
        below = [note.copied for note in map(self.notes.of, inputs) if note is not None and note.copied is not None]
        if len(below) != len(inputs):
            return None
        if known.canonical in _IN_PLACE_OF_THE_INPUT:
            return Copied(below) if len(below) == 1 else None
        if known.canonical == "setitem":
            return Copied(below, partial(_set_again, args, inputs))
        if not known.has("copies") or overwrites(func, args, kwargs):
            return None

        def again(*others: Tensor) -> Any:
            copies = {id(tensor): other for tensor, other in zip(inputs, others, strict=True)}
            positional, named = changed((list(args), dict(kwargs)), lambda t: copies.get(id(t), _none_of(t)))
            return func(*positional, **named)

        if known.has("constant"):  # beside copies, which count as no input
            return Copied(below, lambda *others: again(*others) - again(*map(torch.zeros_like, others)))
        if known.canonical not in _SEVERAL:
            return Copied(below, again)
        return [Copied(below, partial(_item, again, i)) for i in range(len(func(*args, **kwargs)))]

    def _unseen(self, tensor: Tensor, is_changed: bool) -> None:
        self.refuse_unseen(f"{self._reading.name}()", tensor, is_changed)

    def refuse_unseen(self, reader: str, tensor: Tensor, is_changed: bool) -> None:
        """Raise an `UnseenError` for a tensor that was made, or changed in place, by what cannot be seen."""
        where = self.innermost()
        node = tensor.grad_fn
        maker = "nothing known" if node is None else node.name().rpartition("::")[2]
        what = "was changed in place" if is_changed else f"was made by {maker}"
        raise UnseenError(
            f"{reader}{f' in {where!r}' if where else ''} reads a tensor of shape {tuple(tensor.shape)} that "
            f"depends on the model's input and {what}, where no rule can see it: in a scripted or traced part, a "
            f"custom autograd.Function, a transform of torch.func or another thread{self.suspects()}. Map Whole(rule) "
            "to the module that holds it, which then is one function, as in "
            "layer_map=[('name', Whole(Epsilon()))], or None for the ordinary chain rule"
        )

    def _refuse_derivative(self, known: Function) -> NoReturn:
        where = self.innermost()
        raise UnseenError(
            f"the model differentiates inside its forward pass ({known.name}(){f' in {where!r}' if where else ''}): "
            "under rules its derivative, and so its prediction, would be another one. Explain a model without that step"
        )

    def innermost(self) -> str:
        """Name of the innermost module that runs, for an error."""
        return self.place()

    def suspects(self) -> str:
        """Modules that may have made an unseen tensor, for an error."""
        return ""


_DERIVATIVES = frozenset({"grad", "backward"})
#: Functions that add a product or a quotient, which is a function of its own; their operands.
_IN_TWO: dict[str, Callable[..., Tensor]] = {"addcmul": torch.mul, "addcdiv": torch.div}
_ADDENDS = ("input", "tensor1", "tensor2")
#: Functions that leave every entry of one operand in its place, whatever constants do to it.
_IN_PLACE_OF_THE_INPUT = frozenset(
    """add sub rsub mul div neg positive dropout dropout1d dropout2d dropout3d alpha_dropout
    feature_alpha_dropout""".split()  # noqa: SIM905
)
#: Functions that return several tensors.
_SEVERAL = frozenset(
    "chunk dsplit hsplit split split_with_sizes tensor_split unbind unsafe_chunk unsafe_split vsplit".split()  # noqa: SIM905
)


def _item(call: Callable[..., Any], index: int, *operands: Tensor) -> Tensor:
    return cast(Tensor, call(*operands)[index])


def _set_again(args: Sequence[Any], inputs: Sequence[Tensor], *others: Tensor) -> Tensor:
    """What ``target[index] = value`` makes of other operands; constants count as nothing."""
    copies = {id(tensor): other for tensor, other in zip(inputs, others, strict=True)}
    target, index, value = args
    result = copies[id(target)].clone() if id(target) in copies else torch.zeros_like(target, dtype=others[0].dtype)
    result[index] = copies.get(id(value), 0.0)
    return result


def _none_of(constant: Tensor) -> Tensor:
    """What a constant counts beside ones for the model's input: nothing; an index stays."""
    return torch.zeros_like(constant) if constant.is_floating_point() else constant


def _keep(tensor: Tensor) -> Tensor:
    return tensor


def _among(inputs: Sequence[Tensor]) -> Callable[[object], bool]:
    if len(inputs) == 1:
        only = inputs[0]
        return lambda value: value is only
    return lambda value: any(value is tensor for tensor in inputs)


def _out_of_place(
    func: Callable[..., Any], args: Any, kwargs: dict[str, Any]
) -> tuple[Callable[..., Any], Any, dict[str, Any], Tensor]:
    """The same call on a copy, and what it would have overwritten."""
    key = next((key for key, value in kwargs.items() if isinstance(value, Tensor)), "")
    target, *others = args or [kwargs[key]]
    kwargs = kwargs if args else {k: v for k, v in kwargs.items() if k != key}
    copy = target.clone()
    if kwargs.get("inplace"):
        return func, (copy, *others), {**kwargs, "inplace": False}, target
    return _on_a_copy(func), (copy, *others), kwargs, target


def innermost_module(names: Mapping[int, str]) -> str:
    """Name of the innermost module whose forward is running; slow, for messages."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and id(owner) in names:
            return names[id(owner)]
        frame = frame.f_back
    return ""


def constant_of(function: Callable[..., Any], args: Any, kwargs: Mapping[str, Any], inputs: Sequence[Tensor]) -> Tensor:
    """Value of an affine function where all that depends on the model's input is zero."""
    depends = _among(inputs)
    with torch.no_grad():
        positional, named = changed((args, dict(kwargs)), lambda t: torch.zeros_like(t) if depends(t) else t)
        if positional and overwrites(function, args, kwargs):
            positional = (positional[0].clone(), *positional[1:])
            function(*positional, **named)
            return cast(Tensor, positional[0])
        return cast(Tensor, function(*positional, **named))
