"""The mode of a composite: it brings the matching rule to each operation of a forward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode

from crp.composites.activations import _one_activation
from crp.composites.matching import Matching, SeenOperation
from crp.composites.places import Places, innermost_module
from crp.composites.references import _ReferenceCalls
from crp.composites.selection import MapEntry
from crp.errors import StateError, UnseenError
from crp.layers import on_reference
from crp.layers.nested import changed, tensors_in
from crp.notices import warn
from crp.rules.account import Shares
from crp.rules.base import Attachment
from crp.rules.deeplift import Differences
from crp.rules.functions import AFFINE, Function, activation
from crp.rules.layer import Layer, call_in_words
from crp.rules.mode import Choice, SeeingMode
from crp.rules.notes import FIRST
from crp.rules.operands import Operands
from crp.rules.operation import Operation
from crp.rules.redirect import overwritten
from crp.rules.shared import Proportional
from crp.rules.whole import whole_call
from crp.wording import first_few


class _Whole(NamedTuple):
    """A module that runs as one operation, and what it was called with."""

    args: Any
    kwargs: dict[str, Any]
    inputs: list[Tensor]
    copies: dict[int, Tensor]
    choice: Choice
    known: Function


class Operations(SeeingMode):
    """Brings the rules of a composite to the operations of a model that runs.

    Parameters
    ----------
    model : nn.Module
    matching : Matching
        After the forward pass, a warning lists operations that have no rule although the method is not the ordinary
        chain rule for them.
    method : str
        What messages call the method.
    attachment : Attachment

    Attributes
    ----------
    treated : int
        Operations that got a rule, in all forward passes.
    seen : list of SeenOperation or None
        Where all operations are listed, for a report.
    """

    def __init__(self, model: nn.Module, matching: Matching, method: str, attachment: Attachment) -> None:
        super().__init__(attachment.notes)
        self.model, self.matching, self.method, self.attachment = model, matching, method, attachment
        self.treated = 0
        self.seen: list[SeenOperation] | None = None
        self._wholes: list[_Whole | None] = []
        self._is_running = False
        self.places = Places(model)
        self.references = _ReferenceCalls()
        self._untreated: dict[str, None] = {}

    # --- rules ------------------------------------------------------------------------------------------------------

    def choose(
        self, known: Function, kind: str, first: bool = False, several: bool = False, operands: Operands | None = None
    ) -> Choice:
        """First entry that matches."""
        return self.matching.choose(known, kind, first, several, operands)

    def is_named(self, known: Function) -> bool:
        """Whether an entry means the function itself, and not what it calls."""
        return any(entry.position is None and entry.means(known, known.kind) for entry in self.matching.entries)

    def note_constant(self, result: Any, args: Any, kwargs: Any) -> None:
        """Note what a constant was made of, where positions ask for it."""
        if self.matching.origins is not None:
            self.matching.origins.add(result, args, kwargs)

    def count(self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[int, int]:
        """Run the model to count what each position chooses among."""
        self.matching.is_counting = True
        try:
            self._run(model, args, kwargs, False)
            return self.matching.counted()
        finally:
            self.matching.is_counting = False
            self._forget()

    def by_rule(self, choice: Choice, layer: Layer) -> Any:
        """Output of a call, with the rule as its gradient."""
        if self.references.is_recording:
            self.references.keep(layer)
            return layer.output
        self._note_reading(layer.inputs)
        layer.reference = self.references.next_for(layer)
        self._list(layer.name, choice)
        self.treated += 1
        return choice.rule.operate(layer)

    def by_chain_rule(self, choice: Choice, op: Operation) -> Any:
        """Output of a call as it is; constants in it are accounted for, and a lacking rule is noted."""
        account, is_recording = self.attachment.account, self.references.is_recording
        account = account if self.attachment.keeps_constants else None
        if self.matching.is_counting:
            return op.run()
        if self.references.is_on and isinstance(self.attachment, Differences) and self.references.differ(op):
            self.attachment.differing[call_in_words(op.known.name, self.innermost())] = None
        if choice.is_method and account is None and self.seen is None:
            return self._read_by(op) if self.attachment.rectifiable else op.function(*op.args, **op.kwargs)
        self._note_reading(op.inputs)
        constant = written = None
        if account is not None and not is_recording and (op.known.has("constant") or op.kind in AFFINE):
            constant = op.constant()
        is_kept = account is not None and not choice.is_method and not is_recording
        if is_kept and op.is_in_place:
            op, written = op.out_of_place()  # (as it runs again below)
        result = op.run()
        target = op.args[0] if op.args and op.overwrites else result
        if is_recording or not any(tensor.requires_grad for tensor in tensors_in(target)):
            return result if written is None else written.copy_(result)
        if not choice.is_method:
            self._untreated[call_in_words(op.known.name, self.innermost())] = None
        self._list(op.known.name, choice)
        if is_kept and result is target:
            # (a function without a rule keeps what its inputs do not explain, and the account must close)
            layer = Layer(
                op.function, op.args, op.kwargs, tuple(op.inputs), op.known, place=self.place(), result=result
            )
            result = Proportional().attach(self.attachment).operate(layer)
            return result if written is None else overwritten(written, result)
        if account is not None and constant is not None and constant.any():
            target = account.absorb(self.place(), op.inputs[0], target, Shares(bias=constant))
            return None if result is None else target
        return result

    def _read_by(self, op: Operation) -> Any:
        """Output of a call that may read an output of the γ rule, which is simpler if a ReLU does."""
        if op.known.canonical != "relu":
            self._note_reading(op.inputs)
            return op.run()
        call = self.attachment.rectifiable.get(id(op.inputs[0]))
        result = None if call is None else call.rectify(op.inputs[0], op.is_in_place)
        return op.run() if result is None else result

    def _note_reading(self, inputs: Sequence[Tensor]) -> None:
        """Note for outputs of the γ rule that something else than a ReLU reads them."""
        for tensor in inputs if self.attachment.rectifiable else ():
            call = self.attachment.rectifiable.get(id(tensor))
            if call is not None and call.holds(tensor):
                call.read()

    def _list(self, operation: str, choice: Choice) -> None:
        if self.seen is not None:
            layer, call = self.places.now
            self.seen.append(SeenOperation(layer, call, operation, choice.rule, choice.is_method, choice.why))

    # --- modules ----------------------------------------------------------------------------------------------------

    def enter_module(
        self, module: nn.Module, own: Sequence[tuple[MapEntry, bool]], args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        """From now on operations are inside a module that entries mean; forward pre-hook."""
        if not self._is_running:
            return None
        explained = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors_in((args, kwargs)))
        self.notes.tolerant += self.matching.enter(module, own, explained)
        self._wholes.append(None)
        choice = self._choice_of_whole(module, own, args, kwargs) if explained else None
        if choice is None:
            return None
        inputs: list[Tensor] = []
        self._reading = choice[1]
        self.notes.read((args, kwargs), inputs, self._unseen)
        self._step_aside()
        # (the module may change its input in place, which the rule needs)
        copies = {id(tensor): tensor.clone() for tensor in inputs}
        self._wholes[-1] = _Whole(args, kwargs, inputs, copies, *choice)
        entered: tuple[Any, dict[str, Any]]
        entered = changed((tuple(args), dict(kwargs)), lambda tensor: copies.get(id(tensor), tensor))
        return entered

    def leave_module(self, module: nn.Module, output: Any) -> Any:
        """End of a module that entries mean, also after an error; forward hook."""
        if not self._wholes:
            return None
        tolerant, whole = self.matching.leave(), self._wholes.pop()
        self.notes.tolerant -= tolerant
        if whole is None:
            if tolerant and output is not None:  # (unseen tensors are allowed inside; from here on the output is known)
                self.notes.allow(tensors_in(output))
            return None
        try:
            if output is None:
                return None
            inputs = whole.inputs
            layer = whole_call(module, whole.args, whole.kwargs, inputs, output, whole.known)
            layer.place = self.place() or self.places.names().get(id(module), "")
            note = self.notes.of(inputs[0]) if inputs else None
            written = [tensor for tensor in inputs if whole.copies[id(tensor)]._version]
            result = self.by_rule(whole.choice, layer)
            keeps = 0 if note is None or next(module.parameters(), None) is not None else note.flags & FIRST
            for tensor in written:
                copy = whole.copies[id(tensor)]
                if output.data_ptr() == copy.data_ptr() and output.shape == copy.shape:
                    result = overwritten(tensor, result)
                    self.notes.add_written(tensor, keeps | whole.known.gives)
                else:
                    with torch.no_grad():  # (what reads it from here on is refused)
                        tensor.copy_(copy)
            self.notes.add(result, keeps | whole.known.gives)
            return result
        finally:
            self._step_back()

    def _choice_of_whole(
        self, module: nn.Module, own: Sequence[tuple[MapEntry, bool]], args: Any, kwargs: Any
    ) -> tuple[Choice, Function] | None:
        """Rule of a module that counts as one operation; None for others."""
        if self._aside:
            return None
        entry = self.matching.whole(own)
        if entry is not None:
            return Choice(entry.rule, True, str(entry), entry.number), activation(type(module).__name__)
        self._step_aside()
        try:
            found = _one_activation(module, args, kwargs)
        finally:
            self._step_back()
        if found is None:
            return None
        known = activation(type(module).__name__, found[1])
        choice = self.choose(known, known.kind)
        if choice.rule is None or any(self.choose(one, one.kind).number < choice.number for one in found[0]):
            return None
        return choice, known

    def _step_aside(self) -> None:
        # (leaving the mode is cheaper than passing every function through it; it cannot leave below another one)
        if _get_current_function_mode() is self:  # type: ignore[no-untyped-call]
            self.__exit__(None, None, None)
            self._aside = 1
        else:
            self._aside = 2

    def _step_back(self) -> None:
        aside, self._aside = self._aside, 0
        if aside == 1:
            self.__enter__()  # type: ignore[no-untyped-call]

    # --- forward passes ---------------------------------------------------------------------------------------------

    @property
    def is_needed(self) -> bool:
        """Whether there is anything to look for."""
        return bool(self.matching.entries) or self.seen is not None or self.attachment.account is not None

    def begin(self, value: Any, leaves: Mapping[int, Tensor]) -> None:
        """Begin of a forward pass on the model's inputs.

        Parameters
        ----------
        value : nested tensors
        leaves : dict of int to Tensor
            What takes relevance that needs no value, by `id` of the input.
        """
        for tensor in tensors_in(value):
            if tensor.requires_grad:
                self.notes.enter(tensor, leaves.get(id(tensor)))
        self.matching.counts.clear()
        self._is_running = True
        self.__enter__()  # type: ignore[no-untyped-call]

    def leave(self) -> None:
        """End of a forward pass, which may have been interrupted inside a module that is one operation."""
        while _get_current_function_mode() is self:  # type: ignore[no-untyped-call]
            self.__exit__(None, None, None)
        self._aside, self._is_running = 0, False

    def refuse_unseen(self, reader: str, tensor: Tensor, is_changed: bool) -> None:
        """Raise an `UnseenError`; a report lists what was unseen instead."""
        if self.seen is None:
            super().refuse_unseen(reader, tensor, is_changed)
        node = tensor.grad_fn
        layer, call = self.places.now
        maker = "unseen" if node is None else node.name().rpartition("::")[2]
        why = f"{reader} reads what was {'changed' if is_changed else 'made'} where no rule can see it: refused"
        assert self.seen is not None
        self.seen.append(SeenOperation(layer, call, maker, None, False, why))

    def check_output(self, output: Any, is_explained: bool) -> None:
        """Raise an `UnseenError` if the model's output was made by what cannot be seen, or of an input that was not."""
        made = [tensor for tensor in tensors_in(output) if tensor.requires_grad]
        if made and not is_explained:
            raise UnseenError(
                f"{self.method} has seen no input, and what the model puts out depends on one: inputs are tensors that "
                "require a gradient, alone or in lists, tuples, mappings and dataclasses"
            )
        if torch.is_grad_enabled() and self.is_needed:
            self._note_reading(made)
            self.notes.read(made, [], partial(self.refuse_unseen, "what reads the output"))

    def record(self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Run the model on a reference, and keep the operations that have a rule.

        Inputs that require grad are what is explained; all, if none does.
        """
        none = not any(tensor.requires_grad for tensor in tensors_in((args, kwargs)))
        try:
            with self.references.recording(), on_reference():
                self._run(model, args, kwargs, none)
        finally:
            self._forget()

    def _run(self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], explained: bool) -> None:
        """Run the model on copies of its inputs, for the record; with ``explained``, all of them require grad."""
        positional, named = changed((tuple(args), dict(kwargs)), lambda tensor: _entered(tensor, explained))
        with torch.enable_grad():
            self.begin((positional, named), {})
            try:
                model(*positional, **named)
            finally:
                self.leave()

    def _forget(self) -> None:
        self.notes.clear()
        self.products.clear()
        self.attachment.rectifiable.clear()
        self.matching.clear()
        self._wholes.clear()

    def finish(self, completed: bool) -> None:
        """Forget the pass that ends; warn of operations that had no rule.

        Raises
        ------
        RuntimeError
            If the model called more functions that have a rule for the reference than for the data, or if it took
            another path than the one by which positions were counted.
        TypeError
            If a rule that takes weights apart is mapped to modules that sum up no weighted inputs.
        """
        untreated, self._untreated = list(self._untreated), {}
        left, left_without_rule = self.references.clear()
        problem = self.matching.problem(self.model) if completed and self.notes else None
        self._forget()
        if not completed:
            return
        if left:
            raise StateError(f"the model ran {left[0]} for the reference, but not for the data")
        if problem is not None:
            raise problem
        if isinstance(self.attachment, Differences):
            self.attachment.differing |= dict.fromkeys(left_without_rule)
        if untreated:
            warn(
                f"{self.method} has no rule for {', '.join(untreated)}; the ordinary chain rule is used there. Give a "
                "rule in layer_map, or None to say so."
            )

    def place(self) -> str:
        """Name of the innermost module that runs, where it is tracked."""
        return self.places.now[0]

    def innermost(self) -> str:
        """Name of the innermost module that runs, for a message."""
        return self.place() or innermost_module(self.places.names())

    def suspects(self) -> str:
        """Scripted parts of the model, for an error."""
        names = self.places.scripted()
        return f" (the model's scripted parts: {first_few([repr(name) for name in names], 5)})" if names else ""


def _entered(tensor: Tensor, explained: bool) -> Tensor:
    """Copy of an input, as the model may change it in place."""
    entered = tensor.detach()
    return entered.requires_grad_(tensor.requires_grad or (explained and entered.is_floating_point())).clone()
