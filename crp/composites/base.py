"""Composites: which rule goes on which layer, and which canonizers come before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from threading import get_ident
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from zennit.canonizers import Canonizer
from zennit.core import Composite as ZennitComposite
from zennit.core import Hook

from crp.canonizers import for_model
from crp.composites.activations import _may_be_activation
from crp.composites.checkpoints import checkpoints_under_rules, running
from crp.composites.keywords import _check_canonizers, _Remembered, _Setting
from crp.composites.matching import Matching, SeenOperation
from crp.composites.operations import Operations
from crp.composites.places import _hook, _lasting
from crp.composites.positions import _totals_of
from crp.composites.report import Report, _report_on
from crp.composites.selection import (
    MapEntry,
    Selector,
    Types,
    _addresses,
    _by_chain_rule_first,
    _check_map,
    _entries_of,
    _lifted,
)
from crp.engine.attached import check_free, note_placed, note_removed
from crp.engine.encoding import Propagation
from crp.errors import InputError, StateError
from crp.layers import ByChainRule, modules_of, referencing, tracing, uncompiled, unwrap, without_parameter_gradients
from crp.layers.interrupts import atomic, undivided
from crp.layers.nested import changed, tensors_in
from crp.rules.account import Account
from crp.rules.base import Attachment
from crp.rules.functions import Function
from crp.rules.kernels import in_registries
from crp.rules.packed import packed_seen
from crp.trace import Structure, structure

Canonizers = Literal["auto"] | Sequence[Canonizer] | None
#: ``[(what, rule), ...]``; the first match wins, and None is the ordinary chain rule.
LayerMap = Sequence[tuple[Selector, Hook | None]]
FirstMap = Sequence[tuple[Types, Hook | None]]
NameMap = Sequence[tuple[Sequence[str], Hook | None]]


class Composite(_Remembered, ZennitComposite, Propagation):  # type: ignore[misc]
    """Maps operations to rules; a zennit composite whose rules propagate multipliers, ``R = a * m``.

    Inside its `context`, a model predicts as before (up to rounding), and the gradient of its input is the input's
    relevance (or the multiplier, where `readout` says so).

    Parameters
    ----------
    canonizers : "auto", list of zennit.canonizers.Canonizer, or None
        ``"auto"`` is what the model needs (`crp.canonizers.for_model`); a list replaces it; None or ``[]`` is none.
    layer_map : list of (what, rule)
        Rules by kind of operation (`Kind`), by function of torch (`torch.nn.functional.relu`, or a tuple), or by the
        modules around operations: their type (or a tuple of types), name or pattern (``"features.*"``), or position
        (`First`, `Last`, `Depth`). Types of convolutions and dense layers mean the functions that these call, too.
    first_map : list of (types, rule)
        Rules for operations of any of these types that read the model's input, without an affine one between.
    name_map : list of (names, rule)
        Rules by layer names or patterns; these come first.
    at_input : list of (types, rule)
        As ``first_map``, for presets: rules of ``layer_map`` for named modules come before these.

    Attributes
    ----------
    readout : "relevance" or "multiplier"
        What results hold: ``a * m``, or ``m`` itself as the gradient-type methods have it.
    initial : "output" or "one"
        Initial relevance of a target, if a call gives none: the output's value, or 1.

    Raises
    ------
    TypeError
        If a rule, what it is for, or the canonizers are of no such kind.

    Notes
    -----
    The first match wins: names, then the first operations, then the layer map in its order. A rule that is mapped to a
    module is for the operations inside it that it can treat (sums of weighted inputs, mostly); None is for all of them.
    `crp.rules.Whole` makes the module itself one operation. Rules are those of `crp.rules`, or zennit's `BasicHook`.
    """

    encoding: ClassVar[Literal["relevance", "multiplier"]] = "multiplier"
    isolates: ClassVar[bool] = True
    canonizers: Any = _Setting()
    layer_map: Any = _Setting()
    first_map: Any = _Setting()
    at_input: Any = _Setting()
    name_map: Any = _Setting()

    def __init__(
        self,
        canonizers: Canonizers = "auto",
        *,
        layer_map: LayerMap = (),
        first_map: FirstMap = (),
        name_map: NameMap = (),
        at_input: FirstMap = (),
    ) -> None:
        _check_canonizers(canonizers)
        _check_map(layer_map, [*first_map, *at_input], name_map)
        self.auto = isinstance(canonizers, str)
        self.layer_map, self.first_map, self.at_input = (
            tuple((what, _lifted(rule)) for what, rule in pairs) for pairs in (layer_map, first_map, at_input)
        )
        self.name_map = tuple((tuple(names), _lifted(rule)) for names, rule in name_map)
        #: Canonizers that are on a model now, each with the instances that it made.
        self.applied: list[tuple[Canonizer, Sequence[Canonizer]]] = []
        self._attachment = Attachment()
        self._operations: Operations | None = None
        self._depth, self._entered, self._explained, self._thread = 0, False, False, 0
        self._structure: Structure | None = None
        self._choices: dict[Any, Any] = {}
        super().__init__(lambda *_: None, () if self.auto or canonizers is None else tuple(canonizers))

    def is_method(self, known: Function) -> bool:
        """Whether the ordinary chain rule is what the method says for a function; others are warned of."""
        return True

    @cached_property
    def entries(self) -> list[MapEntry]:
        """Entries of the maps in the order in which they are asked, with rules that are ready for a model."""
        entries = _entries_of(self.name_map, self.first_map, self.at_input, self.layer_map)
        rules = [entry.rule and entry.rule.attach(self._attachment) for entry in entries]
        return [replace(entry, rule=rule) for entry, rule in zip(entries, rules, strict=True)]

    def register(self, module: nn.Module) -> None:
        """Put canonizers and rules on a model; `context` does it for the length of a ``with`` block.

        Until `remove`, the model runs uncompiled, and its parameters do not require a gradient.

        Raises
        ------
        RuntimeError, TypeError
            If the composite is on a model already, or this is no model.
        """
        if self.handles:
            raise StateError(
                f"this {type(self).__name__} is on a model already, and can be on one at a time; leave its context "
                "(or call remove()) first, or use another composite"
            )
        unwrap(module)  # (refuses what is no model)
        check_free(self, module)
        entries, choices, modules = self.entries, self._choices, modules_of(module)
        if ByChainRule in {kind for child in modules.values() for kind in type(child).__mro__}:
            entries, choices = _by_chain_rule_first(entries), {}
        addressed = _addresses(entries, modules)  # (errors come before anything is done)
        try:
            for canonizer in for_model(module) if self.auto else self.canonizers:
                instances = canonizer.apply(module)
                self.handles += instances
                self.applied.append((canonizer, instances))
            by_position = [entry for entry in entries if entry.position is not None]
            self._structure = structure(module) if by_position else None
            if self.canonizers:  # (which may have given the model other modules)
                modules = modules_of(module)
                addressed = _addresses(entries, modules)
            parts = modules.values()
            of_model = uncompiled(module, parts), without_parameter_gradients(module, parts), *packed_seen(parts)
            self.handles.append(_lasting(*of_model, in_registries, checkpoints_under_rules))
            self._thread = get_ident()
            matching = Matching(entries, choices, self.is_method, module)
            mode = Operations(module, matching, type(self).__name__, self._attachment)
            self.handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
            for name, child in modules.items():
                if name in addressed or (entries and _may_be_activation(child)):
                    self._put(child, addressed.get(name, []), mode, is_root=child is module)
            # This hook is the last one, so that the mode is active while any hook of the composite runs.
            self._operations = mode
            self.handles.append(module.register_forward_hook(self._leave, always_call=True))
            note_placed(self, module)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Take everything off the model again."""
        if self._depth:  # (a forward pass was interrupted)
            self._depth = 1
            self._leave()
        # In reverse order, as later handles may depend on earlier ones.
        for handle in reversed(self.handles):
            handle.remove()
        self.handles.clear()
        self.applied.clear()
        self._attachment.clear()
        self._operations = None
        note_removed(self)

    @atomic
    def context(self, module: nn.Module) -> Iterator[nn.Module]:
        """The composite on a model, for calls of this thread only."""
        self.register(module)
        try:
            yield module
        finally:
            self.remove()

    @atomic
    def accounting(self) -> Iterator[Account]:
        """Account for the relevance that layers keep; ``sinks`` belong to the last forward pass inside this context.

        Their gradients are what was kept.
        """
        self._attachment.account = Account()
        try:
            yield self._attachment.account
        finally:
            self._attachment.account = None

    @atomic
    def watching(self) -> Iterator[list[SeenOperation]]:
        """List the operations that forward passes of the model run, in their order, inside its context.

        Raises
        ------
        RuntimeError
            If the composite is on no model.
        """
        if self._operations is None:
            raise StateError(f"{type(self).__name__} is on no model; enter its context first")
        seen: list[SeenOperation] = []
        self._operations.seen = seen
        try:
            yield seen
        finally:
            self._operations.seen = None

    def report(self, model: nn.Module, *args: Any, **kwargs: Any) -> Report:
        """Tell which rule and which canonizer reaches which layer and operation of a model.

        Parameters
        ----------
        model : nn.Module
            It is run once, in evaluation mode, and left as it is.
        *args, **kwargs
            A sample, and whatever else the model is called with.

        Returns
        -------
        Report
            ``print`` it, or take its `to_dict`.
        """
        return _report_on(self, model, *args, **kwargs)

    @atomic
    def inactive(self) -> Iterator[None]:
        """Context in which backward passes are the ordinary ones: for the derivative of relevance.

        Relevance is differentiated with respect to the data in two steps: its own backward pass with
        ``create_graph=True`` and the rules, then the second one in this context, without them.
        """
        before, self._attachment.model_input.active = self._attachment.model_input.active, False
        try:
            yield
        finally:
            self._attachment.model_input.active = before

    def unreached(self, model: nn.Module) -> str | None:
        """Message of the error if no operation of a model gets a rule; None if that is what the method says."""
        entries, modules = [entry for entry in self.entries if entry.rule is not None], modules_of(model)
        types = {type(module) for module in modules.values()}
        if not entries or any(e.modules(modules) or any(map(e.means_module, types)) for e in entries):
            return None
        functions = [name for entry in entries for name in entry.functions]
        if functions and all(entry.functions for entry in entries):
            return (
                f"{type(self).__name__} has rules for functions only ({', '.join(functions)}), and "
                f"{type(model).__name__} calls none of them; its result would be that of the ordinary chain rule"
            )
        return (
            f"{type(self).__name__} has no rule for any layer of the model, which consists of "
            f"{', '.join(sorted(kind.__name__ for kind in types))}, or for any function that it calls; its result "
            "would be that of the ordinary chain rule. Map a rule to one of these in layer_map"
        )

    def reference_for(self, data: Tensor, number: int) -> Tensor | None:
        """What the relevance of an input counts from, if the method has a reference (DeepLIFT).

        Parameters
        ----------
        data, number : Tensor, and int
            One of the model's inputs that are explained, and which, counted from 0.

        Returns
        -------
        Tensor or None
            It broadcasts to ``data``; its first axis is 1 or that of ``data``.
        """
        return None

    def _put(self, module: nn.Module, own: list[tuple[MapEntry, bool]], mode: Operations, is_root: bool) -> None:
        def enter(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            return mode.enter_module(module, own, args, kwargs) if self._acts(mode) else None

        def leave(module: nn.Module, args: Any, output: Any) -> Any:
            return mode.leave_module(module, output) if self._acts(mode) else None

        self.handles += _hook(module, enter, leave, prepend=not is_root, with_kwargs=True)

    def _acts(self, mode: Operations) -> bool:
        # (in the backward pass, parts of the model run again, perhaps in another thread)
        is_here = get_ident() == self._thread or running.get() is self
        return is_here and (mode.matching.is_counting or not tracing())

    @undivided
    def _enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Prepare the model's inputs, whose multipliers become relevance, and begin to see operations."""
        mode = self._operations
        if mode is None or get_ident() != self._thread or tracing() or referencing():
            return None
        if self._depth:  # the model calls itself
            self._depth += 1
            return None
        check_free(self, module)
        if (other := running.get()) is not None and other is not self:
            raise StateError(
                f"{type(other).__name__} and {type(self).__name__} are on one model, or on a model and a part of it; "
                "put all rules into one composite, by layer names where they differ"
            )
        if self._structure is not None:
            mode.matching.totals = _totals_of(mode, module, self._structure, args, kwargs)
        args, kwargs, leaves = self._explain(module, mode, args, kwargs)
        if self._attachment.account is not None:
            self._attachment.account.sinks.clear()
        if self._attachment.account is not None or mode.seen is not None:
            mode.places.track()
        self._depth, self._entered = 1, mode.is_needed
        running.set(self)
        if self._entered:
            mode.begin((args, kwargs), leaves)
        return args, kwargs

    def _explain(
        self, module: nn.Module, mode: Operations, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any], dict[int, Tensor]]:
        """Arguments for the model; and by `id` of each input, the tensor that takes relevance handed out as it is."""
        explained = {id(data): data for data in tensors_in((args, kwargs)) if data.requires_grad}
        self._explained = bool(explained)
        references = {key: self.reference_for(data, n) for n, (key, data) in enumerate(explained.items())}
        if torch.is_grad_enabled() and any(reference is not None for reference in references.values()):

            def referred(value: Tensor) -> Tensor:
                reference = references.get(id(value))
                return value if reference is None else reference

            mode.record(module, *changed((args, kwargs), referred))
        leaves: dict[int, Tensor] = {}
        if self.readout != "relevance":
            return args, kwargs, leaves

        def enter(value: Tensor) -> Tensor:
            if id(value) not in explained:
                return value
            inner = self._attachment.model_input.enter(value, references[id(value)])
            leaves[id(inner)] = value
            return inner

        args, kwargs = changed((args, kwargs), enter)
        return args, kwargs, leaves

    @undivided
    def _leave(self, module: nn.Module | None = None, args: Any = (), output: Any = None) -> None:
        mode = self._operations
        if mode is None or not self._depth or referencing() or (module is not None and get_ident() != self._thread):
            return
        self._depth -= 1
        if self._depth:
            return
        running.set(None)
        mode.places.stop()
        if self._entered:
            mode.leave()
        try:
            if output is not None and (self._entered or self.readout == "relevance"):
                mode.check_output(output, self._explained)
        except BaseException:
            mode.finish(completed=False)
            raise
        mode.finish(completed=output is not None)
        if module is not None and self._entered and not mode.treated and mode.seen is None:
            why = self.unreached(module) if any(t.requires_grad for t in tensors_in(output)) else None
            if why is not None:
                raise InputError(why)
