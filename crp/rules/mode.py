"""The mode that sees every operation of a running model, asks for its rule, and notes what it makes.

A `torch.overrides.TorchFunctionMode` is told of each call of a function of torch: `F.relu`, ``x * gate``,
``x.softmax(-1)``, and what modules call inside. What it cannot see (scripted parts, custom autograd functions, other
threads) makes tensors without a note, and the next operation that reads one is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from crp.errors import UnseenError
from crp.layers.addresses import rebound
from crp.layers.nested import changed, tensors_in
from crp.rules.contractions import _SUMMING, _Products
from crp.rules.entrywise import _OF_EXPONENTIALS, BEGINNING, _entrywise, _function_in, _is_of_several, _known, _of_mask
from crp.rules.exponentials import _combined, _copy, _OfExponentials, _softmax
from crp.rules.functions import Function, activation, look_up
from crp.rules.layer import Layer, call_in_words
from crp.rules.notes import FIRST, Born, Copied, Note, Notes
from crp.rules.operands import Operands, _in_parts, _steps
from crp.rules.operation import RESULTS, Operation, _fills
from crp.rules.packed import _has_derivative
from crp.rules.passing import _RANKING, _SEVERAL, _copied, _passed
from crp.rules.redirect import overwritten
from crp.rules.spellings import in_place
from crp.rules.written_out import STEPS

# In torch 2.4 no function tells whether hooks on saved tensors are set: there they count as set.
_saved_tensors_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: ())
_transform = torch._C._functorch.peek_interpreter_stack


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

    attachment: Any = None  #: what rules share; None in composites of zennit

    def __init__(self, notes: Notes) -> None:
        super().__init__()
        self.notes, self.products = notes, _Products(lambda tensor: bool(notes.born(tensor) & Born.DIVISOR))
        self._reading: Function | None = None
        #: Not 0 while functions pass as they are: 1 where the mode was left for that, 2 where it could not be.
        self._aside = 0

    def choose(
        self, known: Function, kind: str, first: bool = False, several: bool = False, operands: Operands | None = None
    ) -> Choice:
        """Rule of an operation.

        Parameters
        ----------
        known : Function
        kind : str
            Of the operation: of `crp.rules.functions.KINDS`, or ``""``.
        first : bool
            Whether no affine operation stands between it and the model's input.
        several : bool
            Whether more than one operand depends on the model's input, and it is no sum of weighted inputs.
        operands : Operands or None
            Of a sum of weighted inputs.
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
        if self._aside or known.metadata or not torch.is_grad_enabled() or _transform() is not None:
            return func(*args, **kwargs)
        inputs: list[Tensor] = []
        self._reading = known
        flags = self.notes.read(args[:1] if known.reads_first else args, inputs, self._unseen)
        if kwargs:
            flags &= self.notes.read(kwargs.values(), inputs, self._unseen)
        if not inputs:
            result = func(*args, **kwargs)
            self.note_constant(result, args, kwargs)
            if self.notes.has_parts and args and self._is_mask_of_data(args[0]):
                of_mask = _of_mask(Operation(func, args, kwargs, known, [args[0]], 0), self.notes, result)
                self.notes.remember(result, of_mask)
            if self.notes.has_choices and any(map(self.notes.is_chosen, tensors_in((args, kwargs)))):
                self.notes.add_choice(result)
            return result
        if known.canonical in _DERIVATIVES:
            self._refuse_derivative(known)
        apart = STEPS.get(known.canonical)
        if apart is not None and not (args[1:] and isinstance(args[1], int | float)) and not self.is_named(known):
            with self:
                return apart(Tensor.add_ if in_place(func, kwargs) else torch.add, *args, **kwargs)
        if known.canonical == "einsum" and len(inputs) == 2 and (steps := _steps(*args)) is not None:
            with self:
                return steps()
        if known.name == "setitem" and _fills(*args):
            n_missing = args[0].dim() - args[1].dim()
            mask = args[1].reshape(*args[1].shape, *[1] * n_missing) if n_missing else args[1]
            self.__torch_function__(Tensor.masked_fill_, types, (args[0], mask, args[2]))
            return None
        is_sum = known.name in _SUMMING
        if is_sum and (whole := self.products.summed(func, known, args, kwargs)) is not None:
            func, (args, kwargs), known, inputs = whole.function, (whole.factors, {}), whole.known, []
            flags = self.notes.read(args, inputs, self._unseen)
        op = Operation(func, args, kwargs, known, inputs, flags)
        if known.canonical in RESULTS:
            results = op.results()
            constant = [tensor.detach() for tensor in op.run()[len(results) :]]
            return (*map(self._see, results), *constant)
        if _saved_tensors_hooks(False) is not None:
            # A checkpoint would run the operation again in the backward pass, where no rule acts.
            with torch.autograd.graph.saved_tensors_hooks(Tensor.detach, lambda tensor: tensor):
                return self._see(op)
        return self._see(op)

    def _see(self, op: Operation) -> Any:
        """Output of an operation, under its rule if it has one; it is noted what is known of it."""
        if "composed" in op.known.properties and not self.is_named(op.known):
            with self:  # (the function asks whether a mode is to be told of itself)
                return rebound(op.function, has_torch_function=lambda values: False)(*op.args, **op.kwargs)
        op.take_apart()
        if op.known.canonical in _PRODUCTS and (of_factors := self.products.regrouped(op, self.notes.common)):
            with self:
                result = of_factors()
            return self._written(op.args[0], result) if op.is_in_place else result
        if op.is_in_place and op.known.canonical in ("add", "sub") and isinstance(op.args[-1], int | float):
            # (what is overwritten may be what a hard sigmoid is made of)
            op, target = op.out_of_place()
            self.notes.add_copy(op.args[0], target)
            return self._written(target, self._see(op))
        if op.known.canonical in _SEVERAL and self.notes.has_parts and _is_of_several(self.notes.of(op.inputs[0])):
            return tuple(map(self._see, op.results()))
        is_first, is_affine = bool(op.flags & FIRST), op.operands is not None
        copied = _copied(op, self.notes) if is_first else None
        choice = self.choose(op.known, op.kind, is_first, not is_affine and len(op.inputs) > 1, op.operands)
        apart = None if choice.rule is None else choice.rule.written_out
        if apart is not None and not op.known.operands:
            with self:
                result = apart(*op.args, **op.kwargs)
            if result is not NotImplemented:
                return result
        # (operands may be overwritten, and then nothing is known)
        below = self.notes.common(op.inputs) if "elementwise" in op.known.properties else None
        may_begin = op.known.canonical in BEGINNING or op.flags & Born.GATING
        parts = self._parts(op, below) if may_begin or self.notes.has_parts else None
        function = None if parts is None else _function_in(parts)
        if function is not None and (function.activation is not None or (function.gives and choice.rule is None)):
            choice = self._of_activation(choice, op, is_sent=function.activation is not None)
        is_made = below is not None and (len(op.inputs) > 1 or op.known.canonical in _OF_EXPONENTIALS)
        passed = _passed(op, self.notes)
        if is_made or function is not None:
            passed = _known(op, self.notes, parts, passed)
        if choice.rule is None:
            result = self.by_chain_rule(choice, op)
            if not op.known.known:
                self._check_derivative(op, result)
            if "step" in op.known.properties:  # (a constant, which no factor beside it must share relevance with)
                result = result.detach_() if op.is_in_place and not result._is_view() else result.detach()
        else:
            result, layer = self._by_rule(choice, op, parts)
            passed, parts = passed | layer.gives, layer.parts
        is_quotient = isinstance(parts, _OfExponentials) and parts.is_quotient
        is_softmax = is_quotient or (op.known.canonical == "softmax" and function is None)
        if is_softmax and isinstance(result, Tensor):
            parts = _softmax(result)
        elif op.known.canonical == "clone" and isinstance(parts, _OfExponentials):
            is_counted = getattr(self.attachment, "account", None) is not None  # (of a softmax as a whole)
            parts = parts if is_counted else _copy(parts, result)
        self._note(op, result, passed, copied, parts, below)
        return result

    def _written(self, target: Tensor, result: Tensor) -> Tensor:
        """A tensor that the model overwrites with a result."""
        written = overwritten(target, result)
        self.notes.add_written(target, self.notes.flags(result))
        self.notes.add_copy(written, result)
        return written

    def _parts(self, op: Operation, below: Note | None) -> Any:
        """What is remembered of a call, by what is of its operands."""
        notes = [note for note in map(self.notes.of, op.inputs) if note is not None and note.parts is not None]
        is_whole = len(op.inputs) == 1 or op.known.canonical in ("cat", "stack") or below is not None
        moves_a_gate = bool(op.flags & Born.GATING) and "copies" in op.known.properties
        begins = is_whole and (op.known.canonical in BEGINNING or moves_a_gate)
        is_masked = not notes and "elementwise" in op.known.properties and any(map(self._is_mask_of_data, op.args))
        if not (notes or begins or is_masked):
            return None
        is_made = is_masked or any(_function_in(note.parts) is not None for note in notes)
        function = _entrywise(op, self.notes, not is_made) if begins or is_made else None
        if (exponentials := _combined(op, self.notes)) is not None:
            exponentials.entrywise = None if exponentials.is_quotient else function
            return exponentials
        return notes[0].parts if notes and op.known.canonical == "clone" and not is_made else function

    def _is_mask_of_data(self, value: object) -> bool:
        """Whether an argument is a constant that was made of what depends on the model's input, such as ``x > 0``."""
        return isinstance(value, Tensor) and not value.requires_grad and self.notes.of(value) is not None

    def _of_activation(self, choice: Choice, op: Operation, is_sent: bool) -> Choice:
        """Rule of activations, if relevance is sent through one; else whether the chain rule is the method for one."""
        other = self.choose(activation(op.known.name), "activation")
        if is_sent and other.rule is not None and other.rule.is_identity and other.number <= choice.number:
            return other
        is_of_one = any(self.notes.born(tensor) & Born.ACTIVATION for tensor in op.inputs)  # (which had its own rule)
        return choice if choice.rule or other.is_method or is_of_one else choice._replace(is_method=False)

    def _by_rule(self, choice: Choice, op: Operation, parts: Any) -> tuple[Any, Layer]:
        """Output of an operation, with the rule as its gradient; and the operation as the rule has seen it."""
        target = None
        if op.overwrites:
            # The rule works out of place; the result then takes the place of what the model overwrites.
            op, target = op.out_of_place()
            self.notes.add_copy(op.args[0], target)
        layer, added = self._layer_of(op), None if op.operands is None else op.operands.added
        layer.parts = parts
        result = self.by_rule(choice, layer)
        if layer.operands is not op.operands:
            result = torch.view_as_complex(result)
        if added is not None:
            result = result + added
        if target is None:
            return result, layer
        written = overwritten(target, result)
        if layer.follow is not None and written.dtype == result.dtype:
            layer.follow(written)
        return written, layer

    def _layer_of(self, op: Operation) -> Layer:
        """An operation as a rule sees it."""
        inputs, operands = tuple(op.inputs), op.operands
        if operands is not None and operands.a.is_complex() and op.known.canonical != "vdot":  # (which is not linear)
            operands = _in_parts(operands)
        layer = Layer(op.function, op.args, op.kwargs, inputs, op.known, operands, self.place(), locate=self.innermost)
        for tensor in inputs:
            if tensor.layout in _SPARSE:
                raise NotImplementedError(
                    f"{layer} reads a sparse tensor that depends on the model's input, and rules treat dense ones; "
                    "make it dense by .to_dense(), or give None in layer_map for the ordinary chain rule"
                )
        if len(inputs) > 1:
            layer.born = tuple(map(self.notes.born, inputs))
        if operands is not None:
            layer.inputs = (operands.a,)
            if operands.added is not None or operands is not op.operands:  # (it is added to what the rule returns)
                layer.function, layer.args, layer.kwargs = operands.run, operands[:3], {}
        layer.nonnegative = self.notes.nonnegative(layer.inputs[0])
        return layer

    def _note(
        self,
        op: Operation,
        result: Any,
        flags: int,
        copied: Copied | list[Copied] | None,
        parts: Any,
        below: Note | None,
    ) -> None:
        """Note what is known of an operation's result."""
        if result is op.inputs[0] and not op.overwrites:  # (handed on as it is, as by `to`, or dropout in evaluation)
            return
        self.notes.has_logarithms |= bool(flags & Born.LOGARITHM)
        if op.kind == "product":  # (several factors depend on the input: it is not affine)
            flags |= op.flags & FIRST
        target = op.args[0] if op.args and op.overwrites else op.kwargs.get("out")
        written, call = target if isinstance(target, Tensor) and target.requires_grad else None, None
        if below is not None and (op.known.canonical == "clone" or not op.known.properties >= {"selects", "linear"}):
            if len(op.inputs) == 1 and op.args and op.args[0] is op.inputs[0] and Tensor not in map(type, op.args[1:]):
                call = op.function, (below, *op.args[1:]), op.kwargs
            elif len(op.inputs) > 1:
                args, kwargs = changed((op.args, op.kwargs), lambda one: self.notes.of(one) or one)
                call = op.function, args, kwargs
        if written is not None:
            self.notes.add_written(written, flags, copied if isinstance(copied, Copied) else None, below, call)
        if isinstance(copied, list):
            for item, way in zip(result, copied, strict=False):
                self.notes.add(item, flags, way)
        elif result is not written:
            self.notes.add(result, flags, copied, below, call)
        if parts is not None:
            several = isinstance(parts, _OfExponentials) and isinstance(result, tuple | list)
            is_largest = not several and isinstance(result, tuple)  # (its index comes second)
            one = result[0] if is_largest else written if result is None else result
            for number, item in enumerate(result if several else [one]):
                self.notes.remember(item, parts.one(number) if several else parts)
        is_constant = isinstance(result, Tensor) and not result.requires_grad
        if op.known.canonical in _RANKING or (is_constant and any(map(self.notes.is_chosen, op.inputs))):
            self.notes.add_choice(result)
        if op.known.canonical in _PRODUCTS and not op.overwrites:
            self.products.add(result, op.factors(), op.known.canonical == "div")
        elif op.known.canonical == "clone":
            self.products.add_copy(result, op.inputs[0], is_named="memory_format" in op.kwargs)

    def by_rule(self, choice: Choice, layer: Layer) -> Any:
        """Output of an operation, with the rule as its gradient."""
        return choice.rule.operate(layer)

    def by_chain_rule(self, choice: Choice, op: Operation) -> Any:
        """Output of an operation as it is."""
        return op.run()

    def _unseen(self, tensor: Tensor, is_changed: bool) -> None:
        assert self._reading is not None
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
        raise UnseenError(
            f"the model differentiates inside its forward pass ({call_in_words(known.name, self.innermost())}): under "
            "rules its derivative, and so its prediction, would be another one. Explain a model without that step"
        )

    def _check_derivative(self, op: Operation, result: Any) -> None:
        """Raise a `NotImplementedError` where torch would send nothing back, and only warn of it."""
        for tensor in tensors_in(result):
            if tensor.requires_grad and not _has_derivative(tensor, op.inputs):
                raise NotImplementedError(
                    f"{call_in_words(op.known.name, self.innermost())} is registered with torch without a derivative: "
                    "nothing is sent back through it; register one, as by torch.library.register_autograd"
                )

    def innermost(self) -> str:
        """Name of the innermost module that runs, for an error."""
        return self.place()

    def suspects(self) -> str:
        """Modules that may have made an unseen tensor, for an error."""
        return ""


_SPARSE = frozenset({torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc})
_DERIVATIVES = frozenset({"grad", "backward"})
_PRODUCTS = frozenset({"div", "mul"})
