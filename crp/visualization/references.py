"""What reference pictures need: concept ids as users write them, ranks, heatmaps of references, and their cache."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from crp.concepts import Concept, as_ids
from crp.visualization.table.fingerprint import fingerprint

if TYPE_CHECKING:
    from crp.visualization.queries import ReferenceQueries

#: Concept id: a channel, or what a custom concept calls its parts.
ConceptId = int | tuple[int, ...]
_Method = TypeVar("_Method", bound=Callable[..., Any])


def concept_list(concept_ids: Any) -> list[ConceptId]:
    """Concept ids as a list of int (or of tuples of int), from an int, a sequence, or an array or tensor of any shape.

    Raises
    ------
    TypeError
        If an id is not an integer.
    """
    if isinstance(concept_ids, Tensor | np.ndarray):
        return list(as_ids(concept_ids))
    if isinstance(concept_ids, str | bytes):
        raise TypeError(f"concept ids must be integers, not {concept_ids!r}")
    if not isinstance(concept_ids, Iterable):
        return list(as_ids(concept_ids))
    ids: list[ConceptId] = []
    for concept_id in concept_ids:
        if isinstance(concept_id, tuple):
            ids.append(tuple(as_ids(concept_id)))
        else:
            ids.extend(concept_list(concept_id))
    return ids


def target_list(targets: Any) -> list[int]:
    """Targets as a list of int, from an int, a sequence (also of numerals), or an array or tensor of any shape.

    Raises
    ------
    TypeError
        If a target is not an integer.
    """
    if isinstance(targets, Tensor | np.ndarray):
        targets = targets.reshape(-1).tolist()
    elif isinstance(targets, str) or not isinstance(targets, Iterable):
        targets = [targets]
    return as_ids([int(t) if isinstance(t, str) and t.isdecimal() else t for t in targets], what="targets")


def column(concept: Concept, concept_id: ConceptId, layer: str, n_concepts: int) -> int:
    """Column of a concept in a layer's scores: the id itself, or what ``concept.column(concept_id, layer)`` says.

    Raises
    ------
    IndexError
        If the layer has no such concept.
    TypeError
        If the id is a tuple and the concept does not say what its column is.
    """
    method = getattr(concept, "column", None)
    if method is not None:
        index = int(method(concept_id, layer))
    elif isinstance(concept_id, tuple):
        raise TypeError(
            f"concept id {concept_id!r} is a tuple; {type(concept).__name__} needs a method "
            "column(concept_id, layer_name) that returns its column in the concept's scores"
        )
    else:
        index = concept_id
    if not -n_concepts <= index < n_concepts:
        raise IndexError(
            f"layer {layer!r} has {n_concepts} concepts, 0 to {n_concepts - 1}; there is no concept {concept_id}"
        )
    return index


def clip(r_range: tuple[int, int], available: int, what: str) -> tuple[int, int]:
    """Ranks that exist.

    Raises
    ------
    ValueError
        If the range is none, or begins after the last reference.
    """
    start, stop = (int(rank) for rank in r_range)
    if not 0 <= start < stop:
        raise ValueError(
            f"r_range must be (first rank, rank after the last) with 0 <= first < last, not {tuple(r_range)}"
        )
    if start >= available:
        raise ValueError(f"r_range {tuple(r_range)} begins after the last reference: there are {available} for {what}")
    return start, min(stop, available)


def row_targets(init: str, targets: Any, mined: np.ndarray, layer: str) -> dict[str, list[list[int]]]:
    """Say where the heatmaps of some references start.

    Parameters
    ----------
    init : {"activation", "relevance"}
    targets : int, sequence of int, or None
        Classes whose relevance is shown; None is the class for which a reference was mined.
    mined : array of int of shape (references,)
        These classes; -1 where there is none.
    layer : str

    Returns
    -------
    dict
        ``{"targets": classes of each reference}``, or nothing where heatmaps start from the concept's activation. (An
        overridden method need not know of targets until they are asked for.)
    """
    if init == "activation":
        if targets is not None:
            raise ValueError(
                f"heatmaps that start from the activation have no targets={targets!r}; add init='relevance'"
            )
        return {}
    if init != "relevance":
        raise ValueError(f"init must be 'activation' or 'relevance', not {init!r}")
    if targets is not None:
        return {"targets": [target_list(targets)] * len(mined)}
    if (mined < 0).any():
        raise ValueError(
            f"the references of layer {layer!r} were mined without classes; say from which to start: targets="
        )
    return {"targets": [[int(target)] for target in mined]}


def stacked(samples: Sequence[Tensor], indices: Sequence[int]) -> Tensor:
    """Samples of shape (1, ...) as one batch; a `ValueError` names the dataset index of one that does not fit."""
    for index, sample in zip(indices, samples, strict=True):
        if sample.shape != samples[0].shape:
            raise ValueError(
                f"dataset[{index}] has shape {tuple(sample.shape[1:])}, but dataset[{indices[0]}] has "
                f"{tuple(samples[0].shape[1:])}; resize the samples to one shape, in the dataset or in preprocess_data"
            )
    return torch.cat(list(samples))


def cache_reference(method: _Method) -> _Method:
    """Decorate `get_max_reference` or `get_stats_reference` of a `FeatureVisualization` so that its cache is used.

    The decorated method takes a further keyword ``overwrite``: compute again what the cache holds. References without a
    composite or a plot function are tensors, and not cached.
    """
    signature = inspect.signature(method)
    defaults = {name: parameter.default for name, parameter in signature.parameters.items()}
    part = "targets" if "concept_id" in signature.parameters else "concept_ids"

    @functools.wraps(method)
    def wrapper(self: ReferenceQueries, *args: Any, overwrite: bool = False, **kwargs: Any) -> dict[Any, Any]:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        cache, plot_fn, composite = self.Cache, given["plot_fn"], given["composite"]
        if cache is None or plot_fn is None or composite is None:
            return cast("dict[Any, Any]", method(*bound.args, **bound.kwargs))

        layer, mode, rf, r_range = (given[name] for name in ("layer_name", "mode", "rf", "r_range"))
        options = {n: v for n, v in given.items() if n not in (*_KNOWN, part) and repr(v) != repr(defaults[n])}
        key = composite, rf, method.__name__, self._plot_name(plot_fn, layer, mode, options)

        # id -> what the method is asked for, and the class whose samples are ranked
        asked: dict[Any, tuple[Any, int | None]]
        if part == "targets":
            (concept_id,) = concept_list([given["concept_id"]])
            asked = {f"{concept_id}:{t}": (t, t) for t in target_list(given["targets"])}
        else:
            asked = {concept_id: (concept_id, None) for concept_id in concept_list(given["concept_ids"])}
        found: dict[Any, Any] = {}
        missing: dict[tuple[int, int], list[Any]] = {}
        for id_, (_, target) in asked.items():
            _, ranks = self._lookup(layer, mode, r_range, target)
            here, absent = ({}, {id_: ranks}) if overwrite else cache.load([id_], layer, mode, ranks, *key)
            found.update(here)
            for rest in absent.values():
                missing.setdefault(rest, []).append(id_)
        for ranks, ids in missing.items():
            given.update({part: [asked[id_][0] for id_ in ids], "r_range": ranks})
            computed = method(*bound.args, **bound.kwargs)
            cache.save(computed, layer, mode, ranks, *key)
            found = cache.extend_dict(found, computed)
        return {id_: found[id_] for id_ in asked}

    return cast(_Method, wrapper)


#: Arguments that do not tell pictures apart, or that a `Cache` is told by name.
_KNOWN = ["self", "concept_id", "layer_name", "mode", "r_range", "composite", "rf", "plot_fn", "batch_size"]


def plot_name(plot_fn: Callable[..., Any], content: Sequence[Any]) -> str:
    """Name of a plot function, followed by a digest of the function and of all that its pictures depend on."""
    named: Any = plot_fn
    while isinstance(named, functools.partial):
        named = named.func
    name = getattr(named, "__name__", type(named).__name__)
    return f"{name}-{fingerprint([plot_fn, *content])[:16]}"
