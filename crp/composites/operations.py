"""The mode of a composite: which of its entries an operation gets, and what is kept of a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode

from crp.composites.activations import one_activation
from crp.composites.selection import Entry, fits, is_counted
from crp.notices import warn
from crp.reference import on_reference, referencing
from crp.rules import Rule, Whole
from crp.rules.account import Shares
from crp.rules.base import Attachment
from crp.rules.functional import Proportional
from crp.rules.functions import AFFINE, Function, activation, in_place, overwrites
from crp.rules.layer import Layer, changed, tensors_in
from crp.rules.mode import Choice, SeeingMode, constant_of, innermost_module, whole_call
from crp.rules.notes import FIRST
from crp.rules.redirect import overwritten


class Seen(NamedTuple):
    """An operation that depends on the model's input, and the rule that reached it.

    Attributes
    ----------
    layer : str
        Name of the innermost module in which it ran.
    call : int
        Which call of that module, counted from 0.
    operation : str
        Plain name of the function; or type of the module, if that is one operation.
    rule : Rule or None
        None is the ordinary chain rule.
    is_method : bool
        Whether that is what the method says.
    why : str
        The entry that it matched, or why there is none.
    """

    layer: str
    call: int
    operation: str
    rule: Rule | None
    is_method: bool
    why: str


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
    entries : sequence of Entry
        The first that matches wins.
    choices : dict
        Rules that were found, to be kept as long as the entries are the same.
    is_method : callable
        Whether the ordinary chain rule is what the method says for a function. Others that have no rule are listed in
        a warning when the model has run.
    method : str
        What messages call the method.
    attachment : Attachment

    Attributes
    ----------
    treated : int
        Operations that got a rule, in all forward passes.
    seen : list of Seen or None
        Where all operations are listed, for a report.
    """

    def __init__(
        self,
        model: nn.Module,
        entries: Sequence[Entry],
        choices: dict[Any, Choice],
        is_method: Callable[[Function], bool],
        method: str,
        attachment: Attachment,
    ) -> None:
        super().__init__(attachment.notes)
        self.model, self.entries, self.method, self.attachment = model, entries, method, attachment
        self.is_method = is_method
        self.treated = 0
        self.seen: list[Seen] | None = None
        self.positions = [entry for entry in entries if entry.position is not None]
        #: How many operations each position chooses among; set before the model runs.
        self.totals: dict[int, int] = {}
        self.is_counting = False
        self._counts: dict[int, dict[object, int]] = {}
        self._choices = choices
        self._context: tuple[tuple[int, bool], ...] = ()
        self._stack: list[tuple[tuple[tuple[int, bool], ...], int]] = []
        self._wholes: list[_Whole | None] = []
        self._is_running = False
        self._called: set[int] = set()
        self._met: set[int] = set()
        self._places: list[tuple[str, int]] | None = None
        self._aside = 0
        self._recording: list[Layer] | None = None
        self._references: list[Layer] = []
        self._untreated: dict[str, None] = {}

    # --- rules ------------------------------------------------------------------------------------------------------

    def choose(self, known: Function, kind: str, flags: int, several: bool) -> Choice:
        """First entry that matches."""
        first, context = bool(flags & FIRST) and kind in AFFINE, self._context
        if self.positions:
            context = context + self._chosen_positions(known, kind)
            if self.is_counting:
                return Choice(None, True, "")
        if context and kind in AFFINE:
            self._met.update(number for number, _ in context)
        key = (known, kind, first, several, context)
        found = self._choices.get(key)
        if found is None:
            found = self._choices[key] = self._match(known, kind, first, several, dict(context))
        return found

    def _match(self, known: Function, kind: str, first: bool, several: bool, context: Mapping[int, bool]) -> Choice:
        for entry in self.entries:
            if entry.first and not first:
                continue
            if entry.position is None and entry.means(known, kind):
                return Choice(entry.rule, True, str(entry), entry.number)
            if entry.number not in context:
                continue
            is_meant = entry.position is not None and fits(known, kind, entry.position.types)
            if entry.rule is None or is_meant:
                return Choice(entry.rule, True, str(entry), entry.number)
            if not several and entry.rule.treats(known, kind, context[entry.number]):
                return Choice(entry.rule, True, str(entry), entry.number)
        # (a sum of weighted inputs that could not be taken apart has no rule, whatever the chain rule is for others)
        is_method = self.is_method(known) and (bool(kind) or known.parse is None)
        why = "the ordinary chain rule is the method" if is_method else "no entry matches"
        return Choice(None, is_method, why, len(self.entries))

    def _chosen_positions(self, known: Function, kind: str) -> tuple[tuple[int, bool], ...]:
        """Positions that this operation has, which is counted."""
        found = []
        for entry in self.positions:
            assert entry.position is not None
            if fits(known, kind, entry.position.types) and self._is_chosen(entry, self._weight_of_call()):
                found.append((entry.number, False))
        return tuple(found)

    def _weight_of_call(self) -> object:
        """What calls of one layer have in common: a parameter; otherwise each call counts."""
        weight = None if self.operands is None else self.operands.weight
        parameter = weight if weight is None or weight._base is None else weight._base
        return id(parameter) if isinstance(parameter, nn.Parameter) else object()

    def _is_chosen(self, entry: Entry, layer: object) -> bool:
        known = self._counts.setdefault(entry.number, {})
        k = known.setdefault(layer, len(known))
        assert entry.position is not None
        return entry.position.chooses(k, self.totals.get(entry.number, 0) or k + 1)

    def count(self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[int, int]:
        """Run the model to count what each position chooses among."""
        self.is_counting = True
        try:
            given, named = changed((tuple(args), dict(kwargs)), lambda tensor: _entered(tensor, False))
            with torch.enable_grad():
                self.begin((given, named), {})
                try:
                    model(*given, **named)
                finally:
                    self.leave()
            return {entry.number: len(self._counts.get(entry.number, ())) for entry in self.positions}
        finally:
            self.is_counting = False
            self._called, self._met = set(), set()
            self._forget()

    def by_rule(self, choice: Choice, layer: Layer) -> Any:
        """Output of a call, with the rule as its gradient."""
        if self._recording is not None:
            self._recording.append(_detached(layer))
            return layer.output
        self._note_reading(layer.inputs)
        layer.reference = self._reference(layer)
        self._list(layer.name, choice)
        self.treated += 1
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
        """Output of a call as it is; constants in it are accounted for, and a lacking rule is noted."""
        account = self.attachment.account
        if choice.is_method and account is None and self.seen is None:
            if known.canonical != "relu":
                self._note_reading(inputs)
                return func(*args, **kwargs)
            call = self.attachment.rectifiable.get(id(inputs[0]))
            result = None if call is None else call.rectify(inputs[0], in_place(func, args, kwargs))
            return func(*args, **kwargs) if result is None else result
        self._note_reading(inputs)
        constant = None
        if account is not None and self._recording is None and (known.has("constant") or (kind in AFFINE)):
            constant = constant_of(func, args, kwargs, inputs)
        result = func(*args, **kwargs)
        target = args[0] if args and overwrites(func, args, kwargs) else result
        if self._recording is not None or not any(tensor.requires_grad for tensor in tensors_in(target)):
            return result
        if not choice.is_method:
            place = self.innermost()
            self._untreated[f"{known.name}() in {place!r}" if place else f"{known.name}()"] = None
        self._list(known.name, choice)
        if account is not None and not choice.is_method and result is target and isinstance(result, Tensor):
            # (what a function does that the method knows no rule for is not to be lost)
            layer = Layer(func, args, kwargs, tuple(inputs), known, place=self.place(), result=result)
            return Proportional().attach(self.attachment).operate(layer)
        if account is not None and constant is not None and constant.any():
            target = account.absorb(self.place(), inputs[0], target, Shares(bias=constant))
            return None if result is None else target
        return result

    def _note_reading(self, inputs: Sequence[Tensor]) -> None:
        """Tell outputs of the γ rule that not only a ReLU reads them."""
        for tensor in inputs if self.attachment.rectifiable else ():
            call = self.attachment.rectifiable.get(id(tensor))
            if call is not None and call.holds(tensor):
                call.read()

    def _list(self, operation: str, choice: Choice) -> None:
        if self.seen is not None:
            layer, call = self._places[-1] if self._places else ("", 0)
            self.seen.append(Seen(layer, call, operation, choice.rule, choice.is_method, choice.why))

    # --- modules ----------------------------------------------------------------------------------------------------

    def enter_module(
        self, module: nn.Module, own: Sequence[tuple[Entry, bool]], args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        """From now on operations are inside a module that entries mean; forward pre-hook."""
        if not self._is_running:
            return None
        explained = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors_in((args, kwargs)))
        known, added, tolerant = dict(self._context), [], 0
        for entry, alone in own:
            position = entry.position
            counts = position is not None and is_counted(type(module), position.types)
            if position is not None and not (counts and self._is_chosen(entry, module)):
                continue
            if explained:
                self._called.add(entry.number)
            if entry.number not in known:
                added.append((entry.number, alone))
            tolerant += entry.rule is None
        self._stack.append((self._context, tolerant))
        self._wholes.append(None)
        self._context = (*self._context, *added)
        self.notes.tolerant += tolerant
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
        given: tuple[Any, dict[str, Any]]
        given = changed((tuple(args), dict(kwargs)), lambda tensor: copies.get(id(tensor), tensor))
        return given

    def leave_module(self, module: nn.Module, output: Any) -> Any:
        """End of a module that entries mean, also after an error; forward hook."""
        if not self._stack:
            return None
        (self._context, tolerant), whole = self._stack.pop(), self._wholes.pop()
        self.notes.tolerant -= tolerant
        if whole is None:
            if tolerant and output is not None:  # what was unseen inside is known from here on
                self.notes.allow(tensors_in(output))
            return None
        try:
            if output is None:
                return None
            inputs = whole.inputs
            layer = whole_call(module, whole.args, whole.kwargs, inputs, output, whole.known)
            layer.place = self.place() or self._names.get(id(module), "")
            note = self.notes.of(inputs[0]) if inputs else None
            written = [tensor for tensor in inputs if whole.copies[id(tensor)]._version]
            if any(output.data_ptr() != whole.copies[id(t)].data_ptr() or output.shape != t.shape for t in written):
                raise TypeError(
                    f"{layer} changes its input in place and returns another tensor, so that it cannot count as one "
                    "function. Map rules to the layers or functions inside it"
                )
            result = self.by_rule(whole.choice, layer)
            keeps = 0 if note is None or next(module.parameters(), None) is not None else note.flags & FIRST
            for tensor in written:
                result = overwritten(tensor, result)
                self.notes.add_written(tensor, keeps | whole.known.gives)
            self.notes.add(result, keeps | whole.known.gives)
            return result
        finally:
            self._step_back()

    def _choice_of_whole(
        self, module: nn.Module, own: Sequence[tuple[Entry, bool]], args: Any, kwargs: Any
    ) -> tuple[Choice, Function] | None:
        """Rule of a module that counts as one operation; None for others."""
        if self._aside:
            return None
        context = dict(self._context)
        for entry in self.entries:
            if entry.number in context and entry.rule is None:
                break
            if isinstance(entry.rule, Whole) and any(entry is mine for mine, _ in own):
                return Choice(entry.rule, True, str(entry), entry.number), activation(type(module).__name__)
        self._step_aside()
        try:
            functions = one_activation(module, args, kwargs)
        finally:
            self._step_back()
        if functions is None:
            return None
        known = activation(type(module).__name__, functions[-1].gives)
        choice = self.choose(known, known.kind, 0, False)
        if choice.rule is None or any(
            self.choose(function, function.kind, 0, False).number < choice.number for function in functions
        ):
            return None
        return choice, known

    def _step_aside(self) -> None:
        # (being asked for each function has its price)
        if not self._aside and _get_current_function_mode() is self:  # type: ignore[no-untyped-call]
            self.__exit__(None, None, None)
            self._aside = 1
        else:
            self._aside += 2

    def _step_back(self) -> None:
        if self._aside == 1:
            self._aside = 0
            self.__enter__()  # type: ignore[no-untyped-call]
        elif self._aside > 1:
            self._aside -= 2

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function, under its rule if it has one."""
        if self._aside:
            return func(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)

    # --- forward passes ---------------------------------------------------------------------------------------------

    @property
    def is_needed(self) -> bool:
        """Whether there is anything to look for."""
        return bool(self.entries) or self.seen is not None or self.attachment.account is not None

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
        self._counts.clear()
        self._is_running = True
        if self._places is not None:
            self._places.clear()
        self.__enter__()  # type: ignore[no-untyped-call]

    def leave(self) -> None:
        """End of a forward pass, which may have been interrupted inside a module that is one operation."""
        if self._aside != 1:
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        self._aside, self._is_running = 0, False

    def refuse_unseen(self, reader: str, tensor: Tensor, is_changed: bool) -> None:
        """Raise an `UnseenError`; a report lists what was unseen instead."""
        if self.seen is None:
            super().refuse_unseen(reader, tensor, is_changed)
        node = tensor.grad_fn
        layer, call = self._places[-1] if self._places else ("", 0)
        maker = "unseen" if node is None else node.name().rpartition("::")[2]
        why = f"{reader} reads what was {'changed' if is_changed else 'made'} where no rule can see it: refused"
        assert self.seen is not None
        self.seen.append(Seen(layer, call, maker, None, False, why))

    def check_output(self, output: Any) -> None:
        """Raise an `UnseenError` if the model's output was made by what cannot be seen."""
        if torch.is_grad_enabled():
            self._note_reading(list(tensors_in(output)))
            self.notes.read(
                tensors_in(output), [], lambda t, changed: self.refuse_unseen("what reads the output", t, changed)
            )

    def record(self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Run the model on a reference, and keep the operations that have a rule.

        Inputs that require grad are what is explained; all, if none does.
        """
        none = not any(tensor.requires_grad for tensor in tensors_in((args, kwargs)))
        self._recording = []
        try:
            given, named = changed((tuple(args), dict(kwargs)), lambda tensor: _entered(tensor, none))
            with on_reference(), torch.enable_grad():
                self.begin((given, named), {})
                try:
                    model(*given, **named)
                finally:
                    self.leave()
            self._references = self._recording
        finally:
            self._recording = None
            self._forget()

    def _forget(self) -> None:
        self.notes.clear()
        self._stack.clear()
        self._wholes.clear()
        self._context = ()

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
        left, self._references = self._references, []
        explained = bool(self.notes)
        called = self._called - self._met
        self._called, self._met = set(), set()
        self._forget()
        if not completed:
            return
        if left:
            raise RuntimeError(f"the model ran {left[0]} for the reference, but not for the data")
        for entry in self.positions:
            count = len(self._counts.get(entry.number, ()))
            if explained and self.totals.get(entry.number, count) != count:
                raise RuntimeError(
                    f"{entry}: the model ran {count} such operations, and {self.totals[entry.number]} when they were "
                    "counted; its path depends on the values, so that positions have no meaning"
                )
        for entry in self.entries:
            if explained and entry.number in called and entry.rule is not None and entry.rule.needs_weight:
                names = ", ".join(map(repr, entry.modules(dict(self.model.named_modules()))[:5]))
                raise TypeError(
                    f"{entry}: {type(entry.rule).__name__} treats sums of weighted inputs (Linear, Conv1-3d, "
                    f"ConvTranspose1-3d and the functions that they call), and {names} call no such operation"
                )
        if untreated:
            warn(
                f"{self.method} has no rule for {', '.join(untreated)}; the ordinary chain rule is used there. Give a "
                "rule in layer_map, or None to say so."
            )

    def _reference(self, layer: Layer) -> Layer | None:
        if not self._references:
            return None
        reference = self._references.pop(0)
        if reference.name != layer.name:
            raise RuntimeError(
                f"the model ran {layer.name}() in {self.innermost()!r} for the data, but {reference} for the "
                "reference: its path depends on the values, so that they cannot be compared"
            )
        return reference

    # --- names ------------------------------------------------------------------------------------------------------

    def track_places(self) -> list[Any]:
        """Hooks that track the innermost module, for accounts and reports; they must be removed."""
        self._places = []
        calls: dict[str, int] = {}
        handles: list[Any] = []

        def enter(name: str, module: nn.Module, args: Any) -> None:
            if not referencing() and self._places is not None:
                calls[name] = calls.get(name, -1) + 1
                self._places.append((name, calls[name]))

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if not referencing() and self._places:
                self._places.pop()

        for name, module in self.model.named_modules():
            if module is not self.model:
                handles += hook(module, partial(enter, name), leave)
        return handles

    def forget_places(self) -> None:
        """Stop tracking."""
        self._places = None

    def place(self) -> str:
        """Name of the innermost module that runs, where it is tracked."""
        return self._places[-1][0] if self._places else ""

    @property
    def _names(self) -> dict[int, str]:
        return {id(module): name for name, module in self.model.named_modules()}

    def innermost(self) -> str:
        """Name of the innermost module that runs, for a message."""
        return self.place() or innermost_module(self._names)

    def suspects(self) -> str:
        """Scripted parts of the model, for an error."""
        names = [
            repr(name) for name, module in self.model.named_modules() if isinstance(module, torch.jit.ScriptModule)
        ]
        return f" (the model's scripted parts: {', '.join(names[:5])})" if names else ""


def hook(module: nn.Module, before: Callable[..., Any], after: Callable[..., Any], **keywords: Any) -> list[Any]:
    """Hooks that run before and after each call of a module, after errors, too; they must be removed."""
    # (scripted modules say that they cannot be hooked, but torch runs hooks of them)
    keywords = {"prepend": True} | keywords
    return [
        nn.Module.register_forward_pre_hook(module, before, **keywords),
        nn.Module.register_forward_hook(module, after, always_call=True),
    ]


def _detached(layer: Layer) -> Layer:
    # Copies, as the model may overwrite what it has used; of each tensor one.
    known: dict[int, Tensor] = {}
    mine = {id(tensor) for tensor in layer.inputs}

    def copied(tensor: Tensor) -> Tensor:
        if id(tensor) not in known:
            known[id(tensor)] = tensor.detach().clone() if id(tensor) in mine else tensor.detach()
        return known[id(tensor)]

    args, kwargs = changed((tuple(layer.args), dict(layer.kwargs)), copied)
    inputs = tuple(copied(tensor) for tensor in layer.inputs)
    output = changed(layer.output, lambda tensor: tensor.detach().clone())
    return Layer(
        layer.function, args, kwargs, inputs, layer.known, place=layer.place, module=layer.module, result=output
    )


def _entered(tensor: Tensor, explained: bool) -> Tensor:
    """Input of its own for a model, which may change it in place."""
    entered = tensor.detach()
    return entered.requires_grad_(tensor.requires_grad or (explained and entered.is_floating_point())).clone()
