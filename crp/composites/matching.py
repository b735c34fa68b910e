"""Which entry of a composite an operation gets: by what it is, by the modules around it, and by its position."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from crp.composites.origins import Origins
from crp.composites.selection import OF_MODULE, MapEntry, _is_counted
from crp.errors import InputTypeError, StateError
from crp.rules import Rule, Whole
from crp.rules.functions import AFFINE, Function, look_up
from crp.rules.mode import Choice
from crp.rules.operands import Operands

_LINEAR = look_up(nn.functional.linear)

#: Numbers of the entries that mean modules around an operation; whether each such module contains no other.
Context = tuple[tuple[int, bool], ...]


class SeenOperation(NamedTuple):
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


class Matching:
    """Entries of a composite, while a model runs.

    Parameters
    ----------
    entries : sequence of MapEntry
        The first that matches wins.
    choices : dict
        Cache of chosen rules, valid as long as the entries are the same.
    is_method : callable
        Whether the ordinary chain rule is what the method says for a function.
    model : nn.Module

    Attributes
    ----------
    origins : Origins or None
        What the weights of layers are made of, where there are positions.
    totals : dict of int to int
        How many layers each position chooses among, by the number of its entry; set before the model runs.
    is_counting : bool
        Whether the model runs to count these.
    counts : dict of int to dict
        Layers that each position has met in this forward pass.
    """

    def __init__(
        self,
        entries: Sequence[MapEntry],
        choices: dict[Any, Choice],
        is_method: Callable[[Function], bool],
        model: nn.Module,
    ) -> None:
        self.entries, self.is_method = entries, is_method
        self.positions = [entry for entry in entries if entry.position is not None]
        self.origins = Origins(model) if self.positions else None
        self._named = [entry for entry in entries if isinstance(entry.selector, str)]
        self.totals: dict[int, int] = {}
        self.is_counting = False
        self.counts: dict[int, dict[object, int]] = {}
        self._has_exempt = bool(entries) and entries[0].role == OF_MODULE
        self._choices = choices
        self._context: Context = ()
        self._stack: list[tuple[Context, int]] = []
        self._called: set[int] = set()
        self._met: set[int] = set()

    def choose(self, known: Function, kind: str, first: bool, several: bool, operands: Operands | None) -> Choice:
        """Rule of an operation.

        Parameters
        ----------
        known : Function
        kind : str
        first : bool
            Whether no affine operation stands between it and the model's input.
        several : bool
            Whether more than one operand depends on the model's input.
        operands : Operands or None
            Of a sum of weighted inputs.
        """
        first, context = first and kind in AFFINE, self._context
        if self.positions and not (self._has_exempt and any(number == 0 for number, _ in context)):
            context = context + self._positions(known, kind, operands)
            if self.is_counting:
                return Choice(None, True, "")
        for number, alone in context:
            entry = self.entries[number]
            if entry.rule is None or entry.position is not None or _treats(entry.rule, known, kind, several, alone):
                self._met.add(number)
            elif not known.has("selects", "copies", "arithmetic"):  # (for these, every method takes the chain rule)
                self._called.add(number)
        key = (known, kind, first, several, context)
        choice = self._choices.get(key)
        if choice is None:
            choice = self._choices[key] = self._match(known, kind, first, several, dict(context))
        return choice

    def _match(self, known: Function, kind: str, first: bool, several: bool, context: Mapping[int, bool]) -> Choice:
        is_named = any(_is_meant(entry, known, kind, several, context) for entry in self._named)
        for entry in self.entries:
            if (entry.first and not first) or (entry.role == "at_input" and is_named):
                continue
            if _is_meant(entry, known, kind, several, context):
                return Choice(entry.rule, True, str(entry), entry.number)
        # (a sum of weighted inputs that could not be taken apart has no rule, whatever the chain rule is for others)
        is_method = self.is_method(known) and (bool(kind) or known.parse is None)
        why = "the ordinary chain rule is the method" if is_method else "no entry matches"
        return Choice(None, is_method, why, len(self.entries))

    def _positions(self, known: Function, kind: str, operands: Operands | None) -> Context:
        """Positions that an operation has; it is counted."""
        fitting = [entry for entry in self.positions if entry.means(known, kind)]
        layer: object = None
        if fitting and operands is not None and self.origins is not None:
            layer = self.origins.of(operands.weight) or object()  # (calls with the same stored weight are one layer)
        return tuple((entry.number, False) for entry in fitting if self._is_chosen(entry, layer))

    def _is_chosen(self, entry: MapEntry, layer: object) -> bool:
        known = self.counts.setdefault(entry.number, {})
        k = known.setdefault(layer, len(known))
        assert entry.position is not None
        return entry.position.chooses(k, self.totals.get(entry.number, 0) or k + 1)

    def counted(self) -> dict[int, int]:
        """How many layers each position has met."""
        return {entry.number: len(self.counts.get(entry.number, ())) for entry in self.positions}

    def enter(self, module: nn.Module, own: Sequence[tuple[MapEntry, bool]], explained: bool) -> int:
        """Begin of a module; returns how many of its entries are the ordinary chain rule.

        Parameters
        ----------
        module : nn.Module
        own : sequence of (MapEntry, bool)
            Entries that mean it, and whether it contains no other module.
        explained : bool
            Whether it reads what depends on the model's input.
        """
        known, added, without_rule = dict(self._context), [], 0
        for entry, alone in own:
            position = entry.position
            counts = position is not None and _is_counted(type(module), position.types)
            if position is not None and not (counts and self._is_chosen(entry, module)):
                continue
            if explained and entry.rule is not None and entry.rule.needs_weight:
                self._called.add(entry.number)
            if entry.number not in known:
                added.append((entry.number, alone))
            without_rule += entry.rule is None
        self._stack.append((self._context, without_rule))
        self._context = (*self._context, *added)
        return without_rule

    def leave(self) -> int:
        """End of a module; returns how many of its entries were the ordinary chain rule."""
        self._context, without_rule = self._stack.pop()
        return without_rule

    def whole(self, own: Sequence[tuple[MapEntry, bool]]) -> MapEntry | None:
        """Entry by which the module that was entered last is one operation; None if it is not."""
        context = dict(self._context)
        for entry in self.entries:
            if entry.number in context and entry.rule is None:
                return None
            if isinstance(entry.rule, Whole) and any(entry is mine for mine, _ in own):
                return entry
        return None

    def problem(self, model: nn.Module) -> Exception | None:
        """Error of the entries that a completed forward pass has shown; None if there is none."""
        for number, count in self.counted().items():
            if self.totals.get(number, count) != count:
                counted = self.totals[number]
                self.totals.clear()  # (which are remembered for the model: they are counted anew at its next call)
                return StateError(
                    f"{self.entries[number]}: the model ran {count} such layers, and {counted} when they "
                    "were counted; positions have no meaning where its path depends on the values. If a setting of the "
                    "model was changed, call it again"
                )
        for number in sorted(self._called - self._met):
            entry = self.entries[number]
            rule = entry.rule
            if rule is None or isinstance(rule, Whole):
                continue
            names = ", ".join(map(repr, entry.modules(dict(model.named_modules()))[:5]))
            what = f"{type(rule).__name__} treats "
            if isinstance(rule, Rule) and rule.treats(_LINEAR, "dense", False):
                return InputTypeError(
                    f"{entry}: {what}sums of weighted inputs (Linear, Conv1-3d, ConvTranspose1-3d and the functions "
                    f"that they call), and no such operation is called in {names}"
                )
            return InputTypeError(f"{entry}: {what}no operation that is called in {names}")
        return None

    def state(self) -> Any:
        """Modules that run, for `set_state`."""
        return self._context, list(self._stack), set(self._called), set(self._met)

    def set_state(self, state: Any) -> None:
        """Be inside of the modules that ran when `state` was asked."""
        self._context, stack, called, met = state
        self._stack, self._called, self._met = list(stack), set(called), set(met)

    def clear(self) -> None:
        """Forget the forward pass."""
        self._context = ()
        self._stack.clear()
        self._called.clear()
        self._met.clear()


def _is_meant(entry: MapEntry, known: Function, kind: str, several: bool, context: Mapping[int, bool]) -> bool:
    """Whether an entry is for an operation, in the modules and at the positions that ``context`` has."""
    is_meant = entry.means(known, kind)
    if entry.number not in context:  # (the module, or the position, is another)
        return is_meant and entry.position is None
    return entry.rule is None or is_meant or _treats(entry.rule, known, kind, several, context[entry.number])


def _treats(rule: Rule, known: Function, kind: str, several: bool, alone: bool) -> bool:
    """Whether a rule that is mapped to a module is for such an operation inside of it."""
    return (rule.shares or not several) and rule.treats(known, kind, alone)
