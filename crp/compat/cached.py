"""The decorator by which zennit-crp caches pictures, for methods of a user's own."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

_Method = TypeVar("_Method", bound=Callable[..., Any])
#: Arguments that do not tell pictures apart, or that a cache is told by name.
_KNOWN = ("self", "layer_name", "mode", "r_range", "composite", "rf", "plot_fn", "batch_size")


def cache_reference(method: _Method) -> _Method:
    """Decorate an own `get_max_reference` or `get_stats_reference` so that the cache is asked first.

    The method must name its parameters as those do. It gets a further keyword ``overwrite``: compute again what the
    cache holds. (`FeatureVisualization`'s own methods ask the cache themselves.)
    """
    signature = inspect.signature(method)
    defaults = {name: parameter.default for name, parameter in signature.parameters.items()}
    per_class = "concept_id" in signature.parameters
    asked_for = {"concept_id", "targets"} if per_class else {"concept_ids"}

    @functools.wraps(method)
    def wrapper(self: Any, *args: Any, overwrite: bool = False, **kwargs: Any) -> dict[Any, Any]:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        named = bound.arguments
        layer, mode, composite, rf, plot_fn = (
            named[name] for name in ("layer_name", "mode", "composite", "rf", "plot_fn")
        )
        if self.Cache is None or composite is None or plot_fn is None:
            return cast("dict[Any, Any]", method(*bound.args, **bound.kwargs))
        options = {
            name: value
            for name, value in named.items()
            if name not in _KNOWN and name not in asked_for and repr(value) != repr(defaults[name])
        }

        def compute(ids: list[Any], classes: list[Any], ranks: tuple[int, int]) -> dict[Any, Any]:
            named.update({"targets": classes} if per_class else {"concept_ids": ids}, r_range=ranks)
            return cast("dict[Any, Any]", method(*bound.args, **bound.kwargs))

        ids, classes = ([named["concept_id"]], named["targets"]) if per_class else (named["concept_ids"], None)
        request = method.__name__, layer, mode, composite, rf, plot_fn, options
        return cast("dict[Any, Any]", self._cached(request, ids, classes, named["r_range"], overwrite, compute))

    return cast(_Method, wrapper)
