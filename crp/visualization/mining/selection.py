"""Layers chosen by name, by pattern, or by type."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

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


def _kinds(module: nn.Module) -> set[str]:
    """Names of a module's types, up to what every module is."""
    return {kind.__name__ for kind in type(module).__mro__ if issubclass(kind, nn.Module)} - {"Module"}
