"""Layers chosen by name, by pattern, or by type."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from crp.layers import LayerNotFoundError


def select_layers(model: nn.Module, wanted: Sequence[str | type[nn.Module]]) -> list[str]:
    """Names of a model's layers, in the order of ``model.named_modules()``.

    Parameters
    ----------
    model : nn.Module
    wanted : sequence of str or module types
        Names; patterns such as ``"layer4.*.conv*"``, in which ``*`` also stands for dots; types, or the names of types,
        such as ``nn.Conv2d`` or ``"Conv2d"``, subclasses included.

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
        if isinstance(one, str):
            matching = {one} & set(modules) or {
                name for name, module in modules.items() if fnmatchcase(name, one) or one in _kinds(module)
            }
        else:
            matching = {name for name, module in modules.items() if isinstance(module, one)}
        if not matching:
            raise LayerNotFoundError(one if isinstance(one, str) else one.__name__, list(modules), "layers")
        found |= matching
    return [name for name in modules if name in found]


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
    ResNet, ``layer1`` to ``layer4``. Concepts are channels, so that only layers of shape (channel, height, width) are.

    Parameters
    ----------
    model : nn.Module
        In evaluation mode.
    data : Tensor
        A sample as the model takes it, with a batch axis.
    n : int
        How many are suggested, at most.
    """
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    pooled: list[Tensor] = []  # (kept, so that no other tensor can be taken for one of them)
    maps: dict[str, tuple[int, ...]] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, _inputs: object, output: object) -> None:
            if isinstance(output, Tensor) and output.dim() > 1:
                found.pop(name, None)
                found[name] = type(module).__name__, tuple(output.shape[1:])
                if "Pool" in found[name][0]:
                    pooled.append(output)
                elif output.dim() == 4 and min(output.shape[2:]) > 1 and not any(output is one for one in pooled):
                    maps[name] = found[name][1]

        return hook

    handles = [module.register_forward_hook(note(name)) for name, module in model.named_modules() if name]
    try:
        model(data)
    finally:
        for handle in handles:
            handle.remove()
    last = {maps[name][1:]: name for name in found if name in maps}
    chosen = set(sorted(last.values(), key=list(found).index)[-n:])
    return [LayerShape(name, kind, shape, name in chosen) for name, (kind, shape) in found.items()]


def _kinds(module: nn.Module) -> set[str]:
    """Names of a module's types, up to what every module is."""
    return {kind.__name__ for kind in type(module).__mro__ if issubclass(kind, nn.Module)} - {"Module"}
