"""Composites: which rule goes on which layer, and which canonizers come before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from zennit.canonizers import Canonizer
from zennit.core import Composite as ZennitComposite
from zennit.core import Hook

from crp.canonizers import for_model
from crp.composites.keywords import Remembered
from crp.composites.report import Report, report_on
from crp.composites.selection import Selector, Types, check_map, functions, select, treatable
from crp.graph import tracing
from crp.layers import modules_of, uncompiled, without_parameter_gradients
from crp.reference import referencing
from crp.rules import Rule, lift
from crp.rules.account import Account
from crp.rules.base import Run
from crp.rules.operation import Operations, Seen, changed, tensors_in

Canonizers = Literal["auto"] | Sequence[Canonizer] | None
#: ``[(what, rule), ...]``; the first match wins, and None is the ordinary chain rule.
LayerMap = Sequence[tuple[Selector, Hook | None]]
FirstMap = Sequence[tuple[Types, Hook | None]]
NameMap = Sequence[tuple[Sequence[str], Hook | None]]
#: Composite whose model runs now.
_running: ContextVar[Composite | None] = ContextVar("running", default=None)


class Composite(Remembered, ZennitComposite):  # type: ignore[misc]
    """Maps layers to rules; a zennit composite whose rules propagate multipliers, ``R = a * m``.

    Inside its `context`, a model predicts as before (up to rounding), and the gradient of its input is the input's
    relevance (or the multiplier, where `readout` says so).

    Parameters
    ----------
    canonizers : "auto", list of zennit.canonizers.Canonizer, or None
        ``"auto"`` is what the model needs (`crp.canonizers.for_model`); a list replaces it; None or ``[]`` is none.
    layer_map : list of (what, rule)
        Rules by module type (or a tuple of types), by layer name or pattern (``"features.*"``), by position (`First`,
        `Last`, `Depth`), or by function of torch (`torch.nn.functional.relu`, or a tuple), for operations that have no
        module and for what modules call.
    first_map : list of (types, rule)
        Rules for the model's first layer of any of these types.
    name_map : list of (names, rule)
        Rules by layer names or patterns; these come first.

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
    The first match wins: names, then the first layer, then the layer map in its order. A rule on a module (also None,
    the ordinary chain rule) covers the functions that it calls; functions that no module covers get theirs.
    Rules are those of `crp.rules`, or zennit's `BasicHook`.
    """

    encoding: ClassVar[str] = "multiplier"
    readout: ClassVar[Literal["relevance", "multiplier"]] = "relevance"
    initial: ClassVar[Literal["output", "one"]] = "output"
    #: Whether `register` itself runs the model uncompiled, and its parameters outside autograd.
    isolates: ClassVar[bool] = True
    #: Functions of torch for which the ordinary chain rule is the method; None for all. Others are warned of.
    right: ClassVar[frozenset[str] | None] = None

    def __init__(
        self,
        canonizers: Canonizers = "auto",
        *,
        layer_map: LayerMap = (),
        first_map: FirstMap = (),
        name_map: NameMap = (),
    ) -> None:
        if isinstance(canonizers, str) != (canonizers == "auto") or not isinstance(canonizers, Sequence | None):
            raise TypeError(f'canonizers must be "auto", a list of canonizers or None, not {canonizers!r}')
        check_map(layer_map, first_map, name_map)
        self.auto = isinstance(canonizers, str)
        self.layer_map = [(what, hook and lift(hook)) for what, hook in layer_map]
        self.first_map = [(types, hook and lift(hook)) for types, hook in first_map]
        self.name_map = [(tuple(names), hook and lift(hook)) for names, hook in name_map]
        #: Canonizers that are on a model now, each with the instances that it made.
        self.applied: list[tuple[Canonizer, Sequence[Canonizer]]] = []
        self._run = Run()
        self._operations: Operations | None = None
        self._depth, self._entered = 0, False
        super().__init__(self.mapping, [] if self.auto or canonizers is None else list(canonizers))

    def plan(self, model: nn.Module) -> dict[str, Rule | None]:
        """Rule of every layer that the maps reach; None is the ordinary chain rule.

        Raises
        ------
        KeyError
            If a name or pattern is of no layer of the model.
        ValueError
            If the composite has rules for modules, and none of them reaches a layer.
        """
        modules = modules_of(model)
        found: dict[str, Rule | None] = {}
        for names, hook in self.name_map:
            for name in names:
                layers = treatable(select(name, modules, "name_map"), name, hook, modules)
                found.update({layer: hook for layer in layers if layer not in found})
        for name, module in modules.items():
            fitting = [hook for types, hook in self.first_map if isinstance(module, types)]
            if fitting and name not in found:
                found[name] = fitting[0]
                break
        for selector, hook in self.layer_map:
            layers = treatable(select(selector, modules), selector, hook, modules)
            found.update({layer: hook for layer in layers if layer not in found})
        maps = [*self.first_map, *((what, hook) for what, hook in self.layer_map if not functions(what))]
        if not any(found.values()) and any(hook for _, hook in maps):
            kinds = {kind.__name__ for module in modules.values() for kind in [type(module)]}
            raise ValueError(
                f"{type(self).__name__} has no rule for any layer of the model, which consists of "
                f"{', '.join(sorted(kinds))}; map one of these in layer_map"
            )
        return found

    def mapping(self, ctx: dict[str, Any], name: str, module: nn.Module) -> Hook | None:
        """Rule for a layer, or None; in zennit's protocol, so the model itself (named ``""``) comes first."""
        if "plan" not in ctx:
            ctx["plan"] = self.plan(module)
        hook: Hook | None = ctx["plan"].get(name)
        return hook

    def function_map(self) -> dict[str, Rule | None]:
        """Rule of every function of torch that has one, by plain name."""
        found: dict[str, Rule | None] = {}
        for selector, hook in self.layer_map:
            found.update({name: hook for name in functions(selector) if name not in found})
        return found

    def register(self, module: nn.Module) -> None:
        """Put canonizers and rules on a model; `context` does it for the length of a ``with`` block.

        Until `remove`, the model runs uncompiled, and its parameters do not require a gradient.

        Raises
        ------
        RuntimeError
            If the composite is on a model already.
        """
        if self.handles:
            raise RuntimeError(
                f"this {type(self).__name__} is on a model already, and can be on one at a time; leave its context "
                "(or call remove()) first, or use another composite"
            )
        plan, rules = self.plan(module), self.function_map()
        mode = Operations(module, rules, self.right, type(self).__name__, self._run)
        try:
            for canonizer in for_model(module) if self.auto else self.canonizers:
                instances = canonizer.apply(module)
                self.handles += instances
                self.applied.append((canonizer, instances))
            for state in (uncompiled(module), without_parameter_gradients(module)):
                self.handles.append(_Lasting(state))
            self.handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
            context: dict[str, Any] = {"plan": plan}
            for name, child in modules_of(module).items():  # (canonizers may have changed it)
                rule = self.module_map(context, name, child)
                if rule is not None or name in plan:
                    self._put(name, child, rule, mode)
            # Last, so that the mode is active as long as any hook of the composite.
            self._operations = mode
            self.handles.append(module.register_forward_hook(self._leave, always_call=True))
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Take everything off the model again."""
        if self._depth:  # (a forward pass was interrupted)
            self._depth = 1
            self._leave()
        # In reverse: what came last may stand on what came first.
        for handle in reversed(self.handles):
            handle.remove()
        self.handles.clear()
        self.hook_refs.clear()
        self.applied.clear()
        self._run.clear()
        self._operations = None

    @contextmanager
    def accounting(self) -> Iterator[Account]:
        """Account for the relevance that layers keep, in forward passes inside this context.

        Yields
        ------
        Account
            Its ``sinks`` belong to the last forward pass; their gradients are what was kept.
        """
        self._run.account = Account()
        try:
            yield self._run.account
        finally:
            self._run.account = None

    @contextmanager
    def watching(self) -> Iterator[list[Seen]]:
        """List the operations that forward passes of the model run, inside its context.

        Yields
        ------
        list of Seen
            Operations that no rule of a module covers.

        Raises
        ------
        RuntimeError
            If the composite is on no model.
        """
        if self._operations is None:
            raise RuntimeError(f"{type(self).__name__} is on no model; enter its context first")
        seen: list[Seen] = []
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
        return report_on(self, model, *args, **kwargs)

    @contextmanager
    def inactive(self) -> Iterator[None]:
        """Context in which backward passes are the ordinary ones: for the derivative of relevance.

        Relevance is differentiated with respect to the data in two steps: its own backward pass with
        ``create_graph=True`` and the rules, then the second one in this context, without them.
        """
        before, self._run.entry.active = self._run.entry.active, False
        try:
            yield
        finally:
            self._run.entry.active = before

    def unreached(self, model: nn.Module) -> str | None:
        """Why results are not those of the method, if a model calls no function that has a rule and no layer has one.

        Parameters
        ----------
        model : nn.Module

        Returns
        -------
        str or None
            Message of the error; None if this is as it should be.
        """
        names = [name for name, rule in self.function_map().items() if rule is not None]
        if not names:
            return None
        return (
            f"{type(self).__name__} has rules for functions only ({', '.join(names)}), and {type(model).__name__} "
            "calls none of them; its result would be that of the ordinary chain rule"
        )

    def reference_for(self, data: Tensor, number: int) -> Tensor | None:
        """What the relevance of an input counts from, if the method has a reference (DeepLIFT).

        Parameters
        ----------
        data : Tensor
            The ``number``-th of the model's inputs that are explained.

        Returns
        -------
        Tensor or None
            It broadcasts to ``data``; its first axis is 1 or that of ``data``.
        """
        return None

    def _put(self, name: str, module: nn.Module, rule: Rule | None, mode: Operations) -> None:
        # What a module calls is covered by its rule. The cover ends after the rule's own hook.
        self.handles.append(module.register_forward_pre_hook(lambda *_: mode.cover(name), prepend=True))
        if rule is not None:
            hook = rule.copy()
            hook.multiplier, hook.run, hook.layer = True, self._run, name
            self.hook_refs.add(hook)
            try:
                self.handles.append(hook.register(module))
            except TypeError as error:
                raise TypeError(f"layer {name!r}: {error}") from error
        self.handles.append(module.register_forward_hook(lambda *_: mode.uncover(), always_call=True))

    def _enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Turn the multiplier of the model's inputs into relevance, and look at what the model does."""
        mode = self._operations
        if tracing() or mode is None:
            return None
        if self._depth:  # the model calls itself
            self._depth += 1
            return None
        other = _running.get()
        if other is not None and other is not self:
            raise RuntimeError(
                f"{type(other).__name__} and {type(self).__name__} are on one model, or on a model and a part of it; "
                "put all rules into one composite, by layer names where they differ"
            )
        if not referencing():
            args, kwargs = self._explain(module, mode, args, kwargs)
        if self._run.account is not None:
            self._run.account.sinks.clear()
        self._depth, self._entered = 1, mode.is_needed
        _running.set(self)
        if self._entered:
            mode.__enter__()  # type: ignore[no-untyped-call]
        return args, kwargs

    def _explain(
        self, module: nn.Module, mode: Operations, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        explained = {id(data): data for data in tensors_in((args, kwargs)) if data.requires_grad}
        references = {key: self.reference_for(data, n) for n, (key, data) in enumerate(explained.items())}
        if torch.is_grad_enabled() and any(reference is not None for reference in references.values()):

            def referred(value: Tensor) -> Tensor:
                reference = references.get(id(value))
                return value if reference is None else reference

            mode.record(module, *changed((args, kwargs), referred))
        if self.readout != "relevance":
            return args, kwargs

        def enter(value: Tensor) -> Tensor:
            return self._run.entry.enter(value, references[id(value)]) if id(value) in explained else value

        entered: tuple[tuple[Any, ...], dict[str, Any]] = changed((args, kwargs), enter)
        return entered

    def _leave(self, module: nn.Module | None = None, args: Any = (), output: Any = None) -> None:
        mode = self._operations
        if mode is None or not self._depth:
            return
        self._depth -= 1
        if self._depth:
            return
        _running.set(None)
        if self._entered:
            mode.leave()
        if referencing():
            return
        mode.finish(completed=output is not None)
        if module is not None and not mode.treated and not self.hook_refs:
            why = self.unreached(module) if any(t.requires_grad for t in tensors_in(output)) else None
            if why is not None:
                raise ValueError(why)


class _Lasting:
    """Handle of a context that lasts until it is removed."""

    def __init__(self, state: AbstractContextManager[Any]) -> None:
        self._exits = ExitStack()
        self._exits.enter_context(state)

    def remove(self) -> None:
        """Leave the context."""
        self._exits.close()
