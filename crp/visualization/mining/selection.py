"""Layers chosen by name, by pattern, or by type."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from crp.engine.taps import in_model_order
from crp.errors import InputError
from crp.layers import LayerNotFoundError, hooked
from crp.trace.axes import channel_axes

#: A pattern, with what is called, or which call, behind it.
_ADDRESS = re.compile(r"(.+?)((?:\.input)?(?:#\d{1,9})?)")


def select_layers(model: nn.Module, wanted: Sequence[str | type[nn.Module]]) -> list[str]:
    """Names of a model's layers, in the order of ``model.named_modules()``.

    Parameters
    ----------
    model : nn.Module
    wanted : sequence of str or module types
        Names; patterns such as ``"layer4.*.conv*"``, in which ``*`` also stands for dots; types, or the names of types,
        such as ``nn.Conv2d`` or ``"Conv2d"``, subclasses included. With ``".input"`` behind it, what these layers are
        called with; with ``"#1"``, their second call.

    Returns
    -------
    list of str
        Each once.

    Raises
    ------
    LayerNotFoundError
        If one of them is no layer's; the message names the nearest.

    Examples
    --------
    >>> select_layers(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten()), ["Conv2d", "2"])
    ['0', '2']
    """
    modules = {name: module for name, module in model.named_modules() if name}
    found: set[str] = set()
    for one in wanted:
        matching = _matching(modules, one)
        if not matching and isinstance(one, str) and (parts := _ADDRESS.fullmatch(one)):
            base, behind = parts.groups()
            matching = {name + behind for name in _matching(modules, base)}
        if not matching:
            raise LayerNotFoundError(one if isinstance(one, str) else one.__name__, list(modules), "layers")
        found |= matching
    return in_model_order(model, found)


def _matching(modules: Mapping[str, nn.Module], one: str | type[nn.Module]) -> set[str]:
    if not isinstance(one, str):
        return {name for name, module in modules.items() if isinstance(module, one)}
    return {one} & set(modules) or {
        name for name, module in modules.items() if fnmatchcase(name, one) or one in _kinds(module)
    }


@torch.no_grad()
def check_called_once(model: nn.Module, data: Any, layers: Sequence[str]) -> None:
    """Refuse a layer that is called several times unless its name says which call is meant.

    Raises
    ------
    ValueError
        With the names of the calls.
    """
    modules, calls = dict(model.named_modules()), dict.fromkeys(layers, 0)

    def count(layer: str) -> Any:
        def hook(*_: Any) -> None:
            calls[layer] += 1

        return hook

    with ExitStack() as stack:
        for layer in layers:
            if (module := modules.get(layer.removesuffix(".input"))) is not None:
                stack.enter_context(hooked({module: count(layer)}))
        model(data)
    for layer, n in calls.items():
        if n > 1:
            numbered = ", ".join(f"{layer}#{i}" for i in range(n))
            raise InputError(f"--layers: {layer} is called {n} times for each sample; name a call, of {numbered}")


class LayerShape(NamedTuple):
    """A layer that gives a tensor: its name, type, the shape for one sample, and whether ``auto`` takes it."""

    name: str
    kind: str
    shape: tuple[int, ...]
    suggested: bool


@torch.no_grad()
def list_layers(model: nn.Module, data: Any, n: int = 4) -> list[LayerShape]:
    """Layers of a model that give a tensor, in the order in which they end.

    Suggested is the last layer of each size of the feature maps, poolings apart, for the ``n`` last sizes: in a
    ResNet, ``layer1`` to ``layer4``. Where there are no maps of several sizes, but tokens, they are the ``n`` last
    activation functions behind dense layers, whose channels are the neurons of an MLP. A layer that is called several
    times is not suggested: its concepts are several.

    Parameters
    ----------
    model : nn.Module
        In evaluation mode.
    data : Tensor, or dict of str to Tensor
        A sample as the model takes it, with a batch axis; or its inputs by name.
    n : int
        How many are suggested, at most.
    """
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    pooled: list[Tensor] = []  # (kept, so that no other tensor can be taken for one of them)
    maps: dict[str, tuple[int, ...]] = {}
    neurons: list[str] = []
    #: Layers that are called again: a concept of theirs is not one.
    repeated: set[str] = set()

    def note(name: str) -> Any:
        def hook(module: nn.Module, _inputs: object, output: object) -> None:
            if isinstance(output, Tensor) and output.dim() > 1:
                if found.pop(name, None):
                    repeated.add(name)
                found[name] = type(module).__name__, tuple(output.shape[1:])
                if "Pool" in found[name][0]:
                    pooled.append(output)
                elif output.dim() == 4 and min(output.shape[2:]) > 1 and not any(output is one for one in pooled):
                    maps[name] = found[name][1]
                elif (
                    output.dim() == 3 and not isinstance(module, nn.Softmax) and "activation" in type(module).__module__
                ):
                    neurons.append(name)

        return hook

    with hooked({module: note(name) for name, module in model.named_modules() if name}):
        model(**data) if isinstance(data, dict) else model(data)
    maps = {name: shape for name, shape in maps.items() if name not in repeated}
    neurons = [name for name in neurons if name not in repeated]
    axes = channel_axes(model, data, maps)
    sizes = {
        name: maps[name][:-1] if about.axis == -1 else maps[name][1:] for name, about in axes.items() if about.axis
    }
    last = {sizes[name]: name for name in found if name in sizes}
    suggested = neurons if neurons and len(last) < 2 else last.values()
    chosen = set(sorted(suggested, key=list(found).index)[-n:])
    return [LayerShape(name, kind, shape, name in chosen) for name, (kind, shape) in found.items()]


def _kinds(module: nn.Module) -> set[str]:
    """Names of a module's types, up to what every module is."""
    return {kind.__name__ for kind in type(module).__mro__ if issubclass(kind, nn.Module)} - {"Module"}
