"""Hooks that keep what layers of a model put out, or are called with, in a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn, preserve_format

from crp.errors import InputError, InputTypeError
from crp.layers import check_returned, find_layers, modules_of, referencing, tracing
from crp.layers.addresses import Address, hooked_at
from crp.layers.interrupts import atomic
from crp.layers.repeated import watch
from crp.notices import warn
from crp.wording import shortened


@dataclass
class Tap:
    """Forward hook that keeps every output of a layer, or input, apart; the model goes on with a copy.

    Attributes
    ----------
    layer : str
    outputs : list of Tensor
        Of each call of the layer.
    references : list of Tensor
        Of the same calls for the reference input of a composite that has one.
    """

    layer: str
    outputs: list[Tensor] = field(default_factory=list)
    references: list[Tensor] = field(default_factory=list)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | None:
        """Forward hook, with keywords."""
        if tracing() or watch():
            return None
        check_returned(output, module, self.layer)
        if referencing():
            self.references.append(output.detach())
            return None
        # Dropout and the like return their input, which what flows past the layer reads too.
        passed_on = any(output is given for given in (*args, *kwargs.values()))
        self.outputs.append(output.clone() if passed_on else output)
        return self.outputs[-1].clone(memory_format=preserve_format)  # (which tells rules that it is our copy)

    def call_meant(self, number: int | None, role: str) -> int | None:
        """Which call is meant by the number in a layer's name, or by none; None where nothing can be recorded."""
        layer, n_calls = self.layer, len(self.outputs)
        if not n_calls and role == "record":
            warn(f"layer {layer!r} is not called in the forward pass; nothing is recorded")
            return None
        if not n_calls:
            raise InputError(f"layer {layer!r}, named as {role}, is not called in the forward pass")
        if number is not None and number >= n_calls:
            raise InputError(f"layer {layer!r} is called {n_calls} times; there is no {layer}#{number}")
        if number is None and n_calls > 1:
            names = ", ".join(f"{layer}#{i}" for i in range(n_calls))
            if role != "record":
                raise InputError(f"layer {layer!r} is called {n_calls} times in the forward pass; name one: {names}")
            warn(f"layer {layer!r} is called {n_calls} times; its last call is recorded, of {names}")
        return n_calls - 1 if number is None else number


@atomic
def tapped(model: nn.Module, roles: Mapping[str, str]) -> Iterator[dict[str, tuple[int | None, Tap]]]:
    """Context in which layers of a model are tapped; yields for each which of its calls is meant, and the tap.

    ``roles`` says for each layer why it is tapped: ``"condition"``, ``"start"``, ``"layer"`` or ``"record"``. Names
    are read as in `crp.layers.addresses`: ``"name#1"`` is the second call of a layer, ``"name.input"`` its input.
    """
    known = modules_of(model) if roles else {}
    meant = {layer: Address.of(layer, known) for layer in roles}
    taps = {(address.layer, address.is_input): Tap(address.place) for address in meant.values()}
    with hooked_at(known, taps):
        yield {layer: (address.number, taps[address.layer, address.is_input]) for layer, address in meant.items()}


def outputs_meant(
    taps: Mapping[str, tuple[int | None, Tap]], roles: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str | None, Tensor]]:
    """Outputs of the calls that are meant, and those for the reference, by layer; without what cannot be recorded."""
    outputs: dict[str, Tensor] = {}
    references: dict[str | None, Tensor] = {}
    for layer, (number, tap) in taps.items():
        call = tap.call_meant(number, roles[layer])
        if call is not None:
            outputs[layer] = tap.outputs[call]
            if tap.references:
                references[layer] = tap.references[call]
    return outputs, references


@atomic
def changed_at(model: nn.Module, layer: str, change: Callable[[Tensor], Tensor]) -> Iterator[list[bool]]:
    """Context in which a layer gives, or is called with, something else.

    Parameters
    ----------
    model : nn.Module
    layer : str
        Named as in `crp.layers.addresses`; without the number of a call, all its calls are changed.
    change : callable
        Function of what the layer gives, or is called with.

    Yields
    ------
    list of bool
        For each call of the layer, whether it was changed.

    Raises
    ------
    KeyError
        If the model has no such layer.
    TypeError
        If it gives no tensor.
    """
    check_layers(model, [layer], "layer")
    modules = modules_of(model)
    name, is_input, number = Address.of(layer, modules)
    calls = list[bool]()

    def hook(module: nn.Module, _args: object, _kwargs: object, output: Any) -> Tensor | None:
        if tracing() or referencing() or watch():
            return None
        calls.append(number in (None, len(calls)))
        if not calls[-1]:
            return None
        check_returned(output, module, name)
        return change(output)

    with hooked_at(modules, {(name, is_input): hook}):
        yield calls


def check_changed_once(layer: str, calls: Sequence[bool]) -> None:
    """Raise a `ValueError` unless one call of a layer was changed."""
    if not any(calls):
        raise InputError(f"the forward pass does not use layer {layer!r}")
    if sum(calls) > 1:
        names = ", ".join(f"{layer}#{i}" for i in range(len(calls)))
        raise InputError(f"layer {layer!r} is called {len(calls)} times in the forward pass; name one: {names}")


def check_layers(model: nn.Module, layers: Sequence[str], role: str) -> None:
    """Raise a `KeyError` that names the nearest layers if the model lacks one (``"name#1"`` counts as ``"name"``)."""
    known = modules_of(model) if len(layers) else {}
    for layer in layers:
        if not isinstance(layer, str):
            raise InputTypeError(
                f"<{role}> layers are named by strings, as in model.named_modules(), not {shortened(layer)}"
            )
    find_layers(model, [Address.of(layer, known).layer for layer in layers], role)


def in_model_order(model: nn.Module, layers: Iterable[str]) -> list[str]:
    """Names of layers in the order of ``model.named_modules()``, that of a layer's input before its output."""
    order = list(modules_of(model))
    addresses = {layer: Address.of(layer, order) for layer in layers}
    return sorted(addresses, key=lambda layer: (order.index(addresses[layer].layer), not addresses[layer].is_input))


def in_call_order(model: nn.Module, layers: Sequence[str], run: Callable[[nn.Module], object]) -> list[str]:
    """Names of layers in the order in which what they name is there when ``run`` calls the model.

    None is before what it is computed from: a block is behind the layers inside of it. Layers that are not called are
    at the end.
    """
    known = modules_of(model)
    addresses = {layer: Address.of(layer, known) for layer in layers}
    calls: list[tuple[str, bool]] = []

    def note(place: tuple[str, bool], *_: object) -> None:
        if not referencing():
            calls.append(place)

    places = {(address.layer, address.is_input) for address in addresses.values()}
    with hooked_at(known, {place: partial(note, place) for place in places}):
        run(model)

    def when(layer: str) -> int:
        name, is_input, number = addresses[layer]
        times = [time for time, place in enumerate(calls) if place == (name, is_input)]
        of_call = times[-1:] if number is None else times[number : number + 1]
        return of_call[0] if of_call else len(calls)

    return sorted(layers, key=when)
