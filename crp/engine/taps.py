"""Taps: hooks that keep the outputs of layers apart in a forward pass, and the names by which calls are meant."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from crp.engine.reference import referencing
from crp.layers import find_layers, modules_of
from crp.notices import warn
from crp.trace.graph import tracing


@dataclass
class Tap:
    """Forward hook that keeps every output of a layer apart; the model goes on with a copy.

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
        if tracing():
            return None
        if not isinstance(output, Tensor):
            raise TypeError(
                f"layer {self.layer!r} ({type(module).__name__}) returns a {type(output).__name__}, not a tensor; "
                "name a layer inside it, or after it, that returns one"
            )
        if referencing():
            self.references.append(output.detach())
            return None
        # Dropout and the like return their input, which what flows past the layer reads too.
        passed_on = any(output is given for given in (*args, *kwargs.values()))
        self.outputs.append(output.clone() if passed_on else output)
        return self.outputs[-1].clone()

    def call_meant(self, number: int | None, role: str) -> int | None:
        """Which call is meant by the number in a layer's name, or by none; None where nothing can be recorded."""
        layer, n_calls = self.layer, len(self.outputs)
        if not n_calls and role == "record":
            warn(f"layer {layer!r} is not called in the forward pass; nothing is recorded")
            return None
        if not n_calls:
            raise ValueError(f"layer {layer!r}, named as {role}, is not called in the forward pass")
        if number is not None and number >= n_calls:
            raise ValueError(f"layer {layer!r} is called {n_calls} times; there is no {layer}#{number}")
        if number is None and n_calls > 1:
            names = ", ".join(f"{layer}#{i}" for i in range(n_calls))
            if role != "record":
                raise ValueError(f"layer {layer!r} is called {n_calls} times in the forward pass; name one: {names}")
            warn(f"layer {layer!r} is called {n_calls} times; its last call is recorded, of {names}")
        return n_calls - 1 if number is None else number


@contextmanager
def tapped(model: nn.Module, roles: Mapping[str, str]) -> Iterator[dict[str, tuple[int | None, Tap]]]:
    """Context in which layers of a model are tapped; yields for each which of its calls is meant, and the tap.

    ``roles`` says for each layer why it is tapped: ``"condition"``, ``"start"`` or ``"record"``. ``"name#1"`` is its
    second call.
    """
    known = modules_of(model) if roles else {}
    meant = {layer: _split(layer, known) for layer in roles}
    taps = {name: Tap(name) for name, _ in meant.values()}
    handles = []
    try:
        for name, tap in taps.items():
            handles.append(known[name].register_forward_hook(tap, with_kwargs=True))
        yield {layer: (number, taps[name]) for layer, (name, number) in meant.items()}
    finally:
        for handle in handles:
            handle.remove()


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


def _split(layer: str, known: Collection[str]) -> tuple[str, int | None]:
    """Name of a layer and number of its call, ``"name#1"`` being the second."""
    name, _, number = layer.rpartition("#")
    if layer in known or not name or name not in known or not number.isdigit():
        return layer, None
    return name, int(number)


def check_layers(model: nn.Module, layers: Sequence[str], role: str) -> None:
    """Raise a `KeyError` that names the nearest layers if the model lacks one (``"name#1"`` counts as ``"name"``)."""
    if not layers:
        return
    known = modules_of(model)
    for layer in layers:
        if not isinstance(layer, str):
            raise TypeError(f"<{role}> layers are named by strings, as in model.named_modules(), not {layer!r}")
    find_layers(model, [_split(layer, known)[0] for layer in layers], role)
