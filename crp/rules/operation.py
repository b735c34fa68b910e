"""Functions of torch as layers: operations that have no module, and the mode that brings rules to them.

`F.relu`, ``x * gate``, ``x.softmax(-1)`` and what modules such as `torch.nn.GELU` call inside are all seen here, by a
`torch.overrides.TorchFunctionMode` that is active while the model runs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode

from crp.notices import warn
from crp.reference import on_reference
from crp.rules.account import Shares
from crp.rules.calls import METADATA, custom_function, has_negative, in_place, name_of, out_of_place, overwrites
from crp.rules.redirect import overwritten
from crp.rules.signs import NOTED

if TYPE_CHECKING:
    from crp.rules.base import Rule, Run


@dataclass(frozen=True)
class Operation:
    """One call of a function of torch, as a layer.

    Attributes
    ----------
    function : callable
    args, kwargs
        What it was called with.
    layer : str
        Name of the innermost module in which it ran, where that is known.
    inputs : tuple of Tensor
        Operands that depend on the model's input, in order; one that is used twice is there twice.
    output : Tensor
        What the call gave, with its graph.
    reference : Operation or None
        The same call in the forward pass of the reference input, where there is one.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    layer: str
    inputs: tuple[Tensor, ...]
    output: Any
    reference: Operation | None = None

    @property
    def name(self) -> str:
        """Plain name of the function."""
        return name_of(self.function)

    def __call__(self, *operands: Any, **_: Any) -> Any:
        """Result with other operands in place of `inputs`; modifiers of parameters have no effect."""
        given = iter([*operands[: len(self.inputs)]])
        args, kwargs = _replaced((self.args, dict(self.kwargs)), given)
        return self.function(*args, **kwargs)

    def itself(self, a: Tensor) -> Tensor:
        """Output of this call."""
        return cast(Tensor, self.output)

    def value(self, a: Tensor) -> Tensor:
        """Output for another input."""
        return cast(Tensor, self(a))

    def again(self) -> Operation:
        """The same operation, to be run once more: without the output of this call."""
        return _Rerun(self.function, self.args, self.kwargs, self.layer, self.inputs, None, self.reference)

    @property
    def input(self) -> Tensor:
        """First operand, detached."""
        return self.inputs[0].detach()

    def __str__(self) -> str:
        return f"{self.name}() in {self.layer!r}" if self.layer else f"{self.name}()"


class _Rerun(Operation):
    def itself(self, a: Tensor) -> Tensor:
        return cast(Tensor, self(a))


class Seen(NamedTuple):
    """An operation that depends on the model's input, and the rule that reached it."""

    layer: str
    operation: str
    rule: Rule | None
    treated: bool


class Operations(TorchFunctionMode):
    """Brings rules to functions of torch while a model runs.

    Parameters
    ----------
    model : nn.Module
    rules : dict of str to Rule or None
        By plain name of the function; None is the ordinary chain rule.
    right : collection of str, optional
        Functions for which the ordinary chain rule is the method. Others that have no rule are listed in a warning
        when the model has run. None: the ordinary chain rule is right for all.
    method : str
        What the warning calls the method.
    run : Run

    Attributes
    ----------
    recording : list of Operation or None
        Where operations with a rule are kept while the reference runs.
    references : list of Operation
        What was kept, in the order in which the model's own pass will meet them.
    seen : list of Seen or None
        Where all operations are listed, for a report.
    """

    def __init__(
        self, model: nn.Module, rules: Mapping[str, Rule | None], right: frozenset[str] | None, method: str, run: Run
    ) -> None:
        super().__init__()
        self.model, self.rules, self.right, self.method, self.run = model, rules, right, method, run
        self.treated = 0
        self._covers: list[str] = []
        self._is_aside = False
        self.recording: list[Operation] | None = None
        self.references: list[Operation] = []
        self.seen: list[Seen] | None = None
        self._untreated: dict[str, None] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function, under its rule if it has one."""
        kwargs = kwargs or {}
        if self._covers:
            return func(*args, **kwargs)
        name = name_of(func)
        rule = self.rules.get(name)
        known = name in self.rules or self.right is None or name in self.right
        if name in METADATA:
            return func(*args, **kwargs)
        result = self._call(name, rule, known, func, args, kwargs)
        if name in NOTED and not (name == "mul" and has_negative(args, kwargs)):
            self.run.signs.note(name, tensors_in((args, kwargs)), tensors_in(result))
        return result

    def _call(self, name: str, rule: Rule | None, known: bool, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if rule is None and known and self.seen is None and self.run.account is None:
            if name == "relu" and self.run.rectifiable:
                return self._rectified(func, args, kwargs)
            return func(*args, **kwargs)
        inputs = tuple(t for t in tensors_in((args, kwargs)) if depends(t))
        if inputs and not torch.is_grad_enabled():
            self._note_custom()
        if not inputs or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        if rule is None:
            return self._by_chain_rule(func, args, kwargs, inputs, known)
        return self._by_rule(rule, func, args, kwargs, inputs)

    def _by_rule(self, rule: Rule, func: Any, args: Any, kwargs: dict[str, Any], inputs: tuple[Tensor, ...]) -> Any:
        function, target = func, None
        if in_place(func, args, kwargs):
            # The rule works out of place; the result then takes the place of what the model overwrites.
            key = next((key for key, value in kwargs.items() if isinstance(value, Tensor)), "")
            target, *others = args or [kwargs[key]]
            kwargs = kwargs if args else {k: v for k, v in kwargs.items() if k != key}
            args = (target.clone(), *others)
            if kwargs.get("inplace"):
                kwargs = {**kwargs, "inplace": False}
            else:
                function = out_of_place(func)
            inputs = tuple(t for t in tensors_in((args, kwargs)) if depends(t))
        layer = self._layer()
        output = function(*args, **kwargs)
        operation = Operation(function, args, kwargs, layer, inputs, output, self._reference(function, layer))
        if self.recording is not None:
            self.recording.append(_detached(operation))
            result = output
        else:
            if self.seen is not None:
                self.seen.append(Seen(layer, operation.name, rule, True))
            self.treated += 1
            rule = rule.copy()
            rule.multiplier, rule.run, rule.layer = True, self.run, layer
            result = rule.operate(operation)
        return result if target is None else overwritten(target, result)

    def _rectified(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """ReLU of the output of a layer whose rule wants to know."""
        call = self.run.rectifiable.get(id(args[0])) if args else None
        result = None if call is None else call.rectify(args[0], in_place(func, args, kwargs))
        return func(*args, **kwargs) if result is None else result

    def _by_chain_rule(
        self, func: Any, args: Any, kwargs: dict[str, Any], inputs: tuple[Tensor, ...], known: bool
    ) -> Any:
        account = self.run.account if self.recording is None and name_of(func) in KEEPING else None
        constant = None if account is None else _constant(func, args, kwargs)
        result = func(*args, **kwargs)
        target = args[0] if args and overwrites(func, args, kwargs) else result
        if self.recording is not None or not any(t.requires_grad for t in tensors_in(target)):
            return result
        layer, name = self._layer(), name_of(func)
        if not known:
            self._untreated[f"{name}() in {layer!r}" if layer else f"{name}()"] = None
        if self.seen is not None:
            self.seen.append(Seen(layer, name, None, known))
        if account is not None and constant is not None and constant.any():
            target = account.absorb(layer, inputs[0], target, Shares(bias=constant))
            return None if result is None else target
        return result

    def _note_custom(self) -> None:
        """List the custom function of a model that runs now, as its backward pass is out of reach."""
        name = None if self.right is None else custom_function()
        if name is not None:
            layer = self._layer()
            self._untreated[f"{name}.apply() in {layer!r}" if layer else f"{name}.apply()"] = None

    def _reference(self, function: Any, layer: str) -> Operation | None:
        if self.recording is not None or not self.references:
            return None
        operation = self.references.pop(0)
        if (operation.name, operation.layer) != (name_of(function), layer):
            raise RuntimeError(
                f"the model ran {name_of(function)}() in {layer!r} for the data, but {operation} for the reference: "
                "its path depends on the values, so that they cannot be compared"
            )
        return operation

    @property
    def is_needed(self) -> bool:
        """Whether there is anything to look for."""
        return bool(self.rules) or self.right is not None or self.seen is not None or self.run.account is not None

    def cover(self, layer: str) -> None:
        """From now on functions belong to a layer that has a rule."""
        if not self._covers and _get_current_function_mode() is self:  # type: ignore[no-untyped-call]
            self._is_aside = True  # (being asked for each function has its price)
            self.__exit__(None, None, None)
        self._covers.append(layer)

    def uncover(self) -> None:
        """The layer that was covered last is done."""
        if self._covers:
            self._covers.pop()
        if self._is_aside and not self._covers:
            self._is_aside = False
            self.__enter__()  # type: ignore[no-untyped-call]

    def leave(self) -> None:
        """End of the forward pass, which may have been interrupted inside a layer that has a rule."""
        if not self._is_aside:
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        self._is_aside = False

    def record(self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Run the model on a reference, and keep the operations that have a rule.

        Inputs that require grad are what is explained; all, if none does.
        """
        none = not any(t.requires_grad for t in tensors_in((args, kwargs)))
        self.recording = []
        try:
            given, named = changed((tuple(args), dict(kwargs)), lambda t: _entered(t, none))
            with on_reference(), torch.enable_grad():
                model(*given, **named)
            self.references = self.recording
        finally:
            self.recording = None

    def finish(self, completed: bool) -> None:
        """Forget the pass that ends; warn of operations that had no rule.

        Raises
        ------
        RuntimeError
            If the model called more functions that have a rule for the reference than for the data.
        """
        untreated, self._untreated = list(self._untreated), {}
        left, self.references = self.references, []
        self._covers.clear()
        self.run.signs.clear()
        if not completed:
            return
        if left:
            raise RuntimeError(f"the model ran {left[0]} for the reference, but not for the data")
        if untreated:
            warn(
                f"{self.method} has no rule for {', '.join(untreated)}; the ordinary chain rule is used there. Give a "
                "rule in layer_map, or None to say so."
            )

    @cached_property
    def _names(self) -> dict[int, str]:
        return {id(module): name for name, module in self.model.named_modules()}

    def _layer(self) -> str:
        """Name of the innermost module of the model whose forward is running."""
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:
            owner = frame.f_locals.get("self")
            if isinstance(owner, nn.Module) and id(owner) in self._names:
                return self._names[id(owner)]
            frame = frame.f_back
        return ""


#: Functions that add a constant, which keeps its share.
AFFINE = frozenset(
    """add sub rsub conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d linear batch_norm pad
    addmm""".split()  # noqa: SIM905
)
#: Functions that are affine in what depends on the model's input, and may add a constant to it.
KEEPING = AFFINE | frozenset(
    """addbmm addmv addr baddbmm cat column_stack concat concatenate copy dstack fill hstack index_copy index_fill
    index_put lerp masked_fill masked_scatter put row_stack scatter scatter_add select_scatter setitem slice_scatter
    stack subtract vstack where""".split()  # noqa: SIM905
)


def _constant(function: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Tensor:
    """Value of an affine function where all that depends on the model's input is zero."""
    with torch.no_grad():
        given, named = changed((args, dict(kwargs)), lambda t: torch.zeros_like(t) if depends(t) else t)
        if given and overwrites(function, args, kwargs):
            given = (given[0].clone(), *given[1:])
            function(*given, **named)
            return cast(Tensor, given[0])
        return cast(Tensor, function(*given, **named))


def _detached(operation: Operation) -> Operation:
    # Copies, as the model may overwrite what it has used; of each tensor one.
    known: dict[int, Tensor] = {}

    def copied(tensor: Tensor) -> Tensor:
        if id(tensor) not in known:
            known[id(tensor)] = tensor.detach().clone() if depends(tensor) else tensor.detach()
        return known[id(tensor)]

    args, kwargs = changed((operation.args, dict(operation.kwargs)), copied)
    inputs = tuple(copied(t) for t in operation.inputs)
    return Operation(operation.function, args, kwargs, operation.layer, inputs, changed(operation.output, copied))


def depends(tensor: Tensor) -> bool:
    """Whether a tensor depends on the model's input, as far as autograd knows."""
    return tensor.requires_grad and not isinstance(tensor, nn.Parameter)


def _entered(tensor: Tensor, explained: bool) -> Tensor:
    """Input of its own for a model, which may change it in place."""
    entered = tensor.detach()
    return entered.requires_grad_(tensor.requires_grad or (explained and entered.is_floating_point())).clone()


def tensors_in(value: object) -> Iterator[Tensor]:
    """Tensors in tuples, lists and dicts, nested in any way."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)


def changed(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """Tuples, lists and dicts, nested in any way, with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if hasattr(value, "_fields"):  # a named tuple
        return type(value)(*(changed(item, change) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(changed(item, change) for item in value)
    if isinstance(value, dict):
        return {key: changed(item, change) for key, item in value.items()}
    return value


def _replaced(value: Any, operands: Iterator[Any]) -> Any:
    return changed(value, lambda tensor: next(operands) if depends(tensor) else tensor)
