"""Where a batch norm can be merged: the linear layers and functions next to it in the order of execution."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from crp.canonizers.folding import FUNCTIONS, LINEAR, Form, _form_of_call, _form_of_layer, _has_shift
from crp.canonizers.norms import _is_affine_only, is_batch_norm
from crp.errors import InputError
from crp.layers import modules_of, unwrap
from crp.layers.state import undisturbed
from crp.trace import FunctionCall, ModuleCall, Node, Operand, Reader, TensorKind, Trace
from crp.trace.graph import Unit, adjacent, layers_as_units

Side: TypeAlias = Literal["before", "after"]


#: Functions that move all entries of a tensor, and change none.
_MOVES = frozenset(
    """T clone contiguous flatten mT moveaxis movedim permute reshape reshape_as squeeze swapaxes swapdims t transpose
    unflatten unsqueeze view view_as""".split()  # noqa: SIM905
)


class _Slot(NamedTuple):
    """Where a module, held weakly, stores a parameter."""

    module: Callable[[], Any]
    name: str

    def get(self) -> nn.Parameter | None:
        """Parameter that is there now."""
        parameter: nn.Parameter | None = self.module()._parameters.get(self.name)
        return parameter


class _Linear(NamedTuple):
    """A linear layer, or a function called with stored parameters.

    Attributes
    ----------
    name : str
        The layer, or the function and where it is called.
    form : Form
    weight : Slot
    bias : Slot or None
        None for a function that is called without one.
    layer : callable or None
        Weak reference to the module; None for a function.
    """

    name: str
    form: Form
    weight: _Slot
    bias: _Slot | None
    layer: Callable[[], Any] | None

    @property
    def is_stored(self) -> bool:
        """Whether weight and bias are parameters, and not computed at each call, as those of a pruned layer are."""
        bias = self.bias
        return self.weight.get() is not None and (bias is None or bias.name in bias.module()._parameters)


class Place(NamedTuple):
    """A linear layer or function, and on which side of it the batch norm is."""

    linear: _Linear
    side: Side


class _Candidate(NamedTuple):
    """A batch norm, held weakly, its places, and why it has no others."""

    name: str
    norm: Callable[[], Any]
    places: tuple[Place, ...]
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """Batch norms of a model.

    Attributes
    ----------
    candidates : tuple of _Candidate
        All that are modules.
    functions : tuple of str
        Those next to a linear layer that are functions (``F.batch_norm``).
    moved : tuple of str
        Those behind a linear layer of which operations such as `flatten` have moved the entries.
    """

    candidates: tuple[_Candidate, ...]
    functions: tuple[str, ...]
    moved: tuple[str, ...]


_plans: weakref.WeakKeyDictionary[Trace, Plan] = weakref.WeakKeyDictionary()


def _plan_of(root: nn.Module, record: Trace) -> Plan:
    """Batch norms of a model and their places, found once for each record of a forward pass."""
    plan = _plans.get(record)
    if plan is None:
        plan = _plans[record] = _find_places(root, record)
    return plan


def _find_places(root: nn.Module, record: Trace) -> Plan:
    """Find all batch norms and their places."""
    modules = modules_of(unwrap(root))  # (whose names a record of the forward pass has)
    batch_norms = {name: module for name, module in modules.items() if is_batch_norm(module)}
    layers = layers_as_units(record, [name for name, module in modules.items() if isinstance(module, LINEAR)])
    linear: dict[Unit, _Linear | str] = {unit: _layer(unit.name, modules[unit.name]) for unit in layers}
    linear |= _functions(modules, record)
    functions = _normalizing(record, batch_norms)
    units = [*layers_as_units(record, batch_norms), *functions]
    behind, ahead = adjacent(linear, units), adjacent(units, linear)
    pairs: dict[str, list[tuple[Side, Unit, Unit]]] = {unit.name: [] for unit in units}
    for pair in behind.pairs:
        pairs[pair.second.name].append(("after", pair.first, pair.second))
    for pair in ahead.pairs:
        pairs[pair.first.name].append(("before", pair.second, pair.first))
    candidates = []
    for name, norm in batch_norms.items():
        reasons = [other.unpaired[name] for other in (behind, ahead) if name in other.unpaired]
        places = []
        for side, unit, norm_unit in pairs[name]:
            place = linear[unit]
            if isinstance(place, str):
                reasons.append(place)
            elif (reason := _recorded_obstacle(place, unit, norm_unit, side)) is not None:
                reasons.append(reason)
            else:
                places.append(Place(place, side))
        candidates.append(_Candidate(name, weakref.ref(norm), tuple(places), tuple(dict.fromkeys(reasons))))
    found = tuple(dict.fromkeys(unit.name for unit in functions if pairs[unit.name]))
    made = {id(node) for unit in linear for call in unit.calls for node in call.outputs}
    moved = [unit.name for unit in units if any(_is_moved(n, made) for call in unit.calls for n in call.inputs)]
    return Plan(tuple(candidates), found, tuple(dict.fromkeys(moved)))


def _is_moved(node: Node, made: Collection[int]) -> bool:
    """Whether a tensor holds moved entries of a linear layer's output; ``made`` has the ids of these."""
    moves = 0
    while id(node) not in made:
        if node.maker is not None:
            node = node.maker
        elif node.name in _MOVES and node.sources:
            node, moves = node.sources[0], moves + 1  # (what is behind it, as in `view_as`, gives a shape only)
        else:
            return False
    return moves > 0


def _merge_obstacle(norm: Any, linear: _Linear, side: Side) -> str | None:
    """Reason why a batch norm cannot go into a linear layer, as both are now; None if it can."""
    name = _label(linear)
    if not linear.is_stored:
        return f"a parameter of {name} is computed, not stored"
    if side == "before" and not _is_affine_only(norm):
        return f"its activation comes before {name}"
    if side == "before" and not linear.form.is_shift_invariant and _has_shift(norm):
        return f"its shift would not reach the borders of {name} as it does now"
    if linear.bias is None and _has_shift(norm):
        return f"{name} is called without a stored bias that could take up its shift"
    return None


def _label(linear: _Linear) -> str:
    """Name of a linear layer or function in a sentence."""
    return linear.name if linear.layer is None else repr(linear.name)


def _recorded_obstacle(linear: _Linear, unit: Unit, norm: Unit, side: Side) -> str | None:
    """Reason in the recorded calls why the two cannot be merged; None if there is none."""
    weight = linear.weight.get()
    if weight is not None and any(
        call.returned is None or len(call.returned.shape) != weight.dim() for call in unit.calls
    ):
        return f"it normalizes another axis than the features of {_label(linear)}"
    for call in _module_calls(norm):
        read, returned = (None if kind is None else kind.dtype for kind in (call.given, call.returned))
        if read != returned:
            return f"it makes {returned} of {read}"
    first, second = (unit, norm) if side == "after" else (norm, unit)
    changed = [call.output_changed for call in _module_calls(first)] + [c.input_changed for c in _module_calls(second)]
    if any(changed):
        return f"a hook changes what goes between it and {_label(linear)}"
    return None if linear.layer is None else _layer_obstacle(linear, linear.layer(), _module_calls(unit), side)


def _module_calls(unit: Unit) -> list[ModuleCall]:
    return [call for call in unit.calls if isinstance(call, ModuleCall)]


# --- functions ------------------------------------------------------------------------------------------------------


def _functions(modules: Mapping[str, nn.Module], record: Trace) -> dict[Unit, _Linear | str]:
    """Linear functions that are called outside of linear layers, or the reason why one cannot take in a norm."""
    calls: dict[str, list[FunctionCall]] = {}
    for call in record.operations:
        if call.name in FUNCTIONS and not any(issubclass(around.kind, LINEAR) for around in _around(call)):
            calls.setdefault(_name(call), []).append(call)
    units: dict[Unit, _Linear | str] = {}
    for name, same in calls.items():
        operands = (operand for call in same for operand in call.operands)
        parameters = dict.fromkeys(operand.parameter for operand in operands if operand.parameter is not None)
        unit = Unit(name, same, {parameter: record.parameter_readers[parameter] for parameter in parameters})
        units[unit] = _function(modules, record, unit, same)
    return units


def _function(modules: Mapping[str, nn.Module], record: Trace, unit: Unit, calls: list[FunctionCall]) -> _Linear | str:
    """Description of a function that is called with one weight; or the reason why there is none."""
    first, *others = ({**_arguments(call), "input": None} for call in calls)
    weight, bias = first["weight"], first.get("bias")
    if not isinstance(weight, Operand) or weight.parameter is None:
        return f"the weight of {unit} is computed, not stored as a parameter"
    if isinstance(bias, Operand) and bias.parameter is None:
        return f"the bias of {unit} is computed, not stored as a parameter"
    if any(other != first for other in others):
        return f"the calls of {unit} differ in more than their input"
    if ... in first.values():
        return f"{unit} is called with settings that are no plain numbers"
    for parameter, readers in unit.parameters.items():
        names = [name for name, other in record.parameter_readers.items() if other is readers and name != parameter]
        if names:
            return f"the parameter {parameter!r} is also {', '.join(map(repr, names))}"
    slot = _slot(modules, weight.parameter)
    form = _form_of_call(calls[0].name, first, slot.module()._parameters[slot.name])
    return _Linear(unit.name, form, slot, None if bias is None else _slot(modules, bias.parameter), None)


def _normalizing(record: Trace, batch_norms: Collection[str]) -> list[Unit]:
    """Calls of the function outside of batch norms, each as a unit that is called by its weight or its layer."""
    units = []
    for call in record.operations:
        if call.name == "batch_norm" and not any(around.layer in batch_norms for around in _around(call)):
            weight = next((operand.parameter for operand in call.operands if operand.parameter is not None), None)
            units.append(Unit(f"batch_norm ({weight})" if weight else str(Reader(call.name, call.call)), [call], {}))
    return units


def _name(call: FunctionCall) -> str:
    """Function and its weight; where that is no parameter, the layer in which it runs."""
    weight = _arguments(call)["weight"]
    if isinstance(weight, Operand) and weight.parameter is not None:
        return f"{call.name} ({weight.parameter})"
    return f"{call.name} in {call.call.layer!r}" if call.call is not None and call.call.layer else call.name


def _arguments(call: FunctionCall) -> dict[str, Any]:
    """Arguments by name."""
    return dict(zip(FUNCTIONS[call.name], call.arguments, strict=False)) | call.keywords


def _slot(modules: Mapping[str, nn.Module], parameter: str) -> _Slot:
    layer, _, name = parameter.rpartition(".")
    return _Slot(weakref.ref(modules[layer]), name)


def _around(call: FunctionCall) -> Iterator[ModuleCall]:
    return iter(()) if call.call is None else call.call.around()


# --- linear layers --------------------------------------------------------------------------------------------------


def _layer(name: str, layer: Any) -> _Linear:
    here = weakref.ref(layer)
    return _Linear(name, _form_of_layer(layer), _Slot(here, "weight"), _Slot(here, "bias"), here)


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_FORWARDS = {kind.forward for kind in (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED)}
_CONV_FORWARDS = {kind._conv_forward for kind in _CONVOLUTIONS}


def _layer_obstacle(linear: _Linear, layer: Any, calls: list[ModuleCall], side: Side) -> str | None:
    """Reason why a layer whose forward is not torch's does not follow its weight and bias; None if it does."""
    if linear.weight.get() is None or _has_plain_forward(layer):
        return None
    kind = type(layer).__name__
    if side == "before":
        return f"the forward of {kind} {linear.name!r} is not that of torch"
    if layer.weight.is_meta:
        raise InputError(
            f"a norm is to be merged into {kind} {linear.name!r}, whose weights are loaded when it is called; load the "
            "whole model, or give the composite canonizers=None"
        )
    with undisturbed(layer):
        if not all(_follows_its_parameters(layer, given) for given in {call.given for call in calls}):
            return f"the output of {kind} {linear.name!r} does not follow its weight and bias"
    return None


def _has_plain_forward(layer: Any) -> bool:
    plain = "forward" not in vars(layer) and type(layer).forward in _FORWARDS
    if isinstance(layer, nn.Linear | _ConvTransposeNd):
        return plain
    return plain and type(layer)._conv_forward in _CONV_FORWARDS


@torch.no_grad()
def _follows_its_parameters(layer: Any, given: TensorKind | None) -> bool:
    """Whether the layer computes ``weight * input + bias``, however it pads; the caller puts these back.

    Two tests, which a layer that standardizes its weight fails: with a weight of zero, the output is the bias; with -2
    times weight and bias, it is -2 times the output. Both are exact in floating point, so no tolerance is needed.
    """
    if given is None:
        return False
    weight = layer.weight
    size = weight.shape[1] * layer.groups if isinstance(layer, _ConvTransposeNd) else weight.shape[0]
    bias = torch.linspace(-1, 1, size, dtype=weight.dtype, device=weight.device)
    numbers = torch.linspace(-1, 1, given.shape.numel(), device=weight.device)
    data = numbers.to(given.dtype).reshape(given.shape)

    def output(weight: Tensor, bias: Tensor) -> Tensor:
        layer._parameters.update(weight=weight, bias=bias)
        return layer.forward(data)  # type: ignore[no-any-return]

    constant = output(torch.zeros_like(weight), bias).movedim(1, -1)
    once, twice = output(weight.detach(), bias), output(-2 * weight, -2 * bias)
    return torch.equal(constant, bias.expand_as(constant)) and torch.equal(twice, -2 * once)
