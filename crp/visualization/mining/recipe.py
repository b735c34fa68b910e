"""What is mined, in words: what a table says of itself to people, and to a run that has nothing but the folder."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from zennit.core import Composite

from crp.attribution import CondAttribution
from crp.concepts import Concept
from crp.layers import unwrap
from crp.visualization.mining.marks import source_of
from crp.visualization.mining.texts import texts_in

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
#: Characters of what has no plainer words, entries of a list, and levels of lists in lists.
_LENGTH, _ENTRIES, _DEPTH = 300, 10_000, 6


def make_recipe(
    attribution: CondAttribution,
    dataset: Any,
    concepts: Mapping[str, Concept],
    composite: Composite | None,
    settings: Mapping[str, Any],
    said: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Recipe of a table.

    Parameters
    ----------
    attribution, dataset, concepts, composite
        What is mined; it is told as far as it can be.
    settings : dict of str to object
        Further parts.
    said : dict of str to object, optional
        Parts that the user gives, which go first.

    Returns
    -------
    dict of str to object
        Plain JSON.
    """
    source = source_of(dataset, 0)
    folder = {} if source is None else {"folder": source.folder}
    recipe: dict[str, Any] = {
        "model": {"class": _name(unwrap(attribution.model))},
        "composite": _describe_composite(composite),
        "layers": {layer: _describe_concept(concept) for layer, concept in concepts.items()},
        "dataset": {"class": _name(getattr(dataset, "dataset", dataset))} | folder,
    }
    texts = texts_in(dataset)
    if texts is not None:
        recipe["texts"] = in_words(texts.describe())
    recipe |= {key: in_words(value) for key, value in settings.items()}
    for key, value in dict(said or {}).items():
        words, known = in_words(value), recipe.get(key)
        recipe[key] = known | words if isinstance(words, dict) and isinstance(known, dict) else words
    return recipe


def in_words(value: Any, depth: int = 0) -> Any:
    """Value as plain JSON: numbers, words, lists and dicts of them as they are, all else as Python shows it."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if isinstance(value, Tensor):
        words = f"tensor of shape {tuple(value.shape)}, {str(value.dtype).removeprefix('torch.')}"
        return in_words(value.tolist(), depth) if value.numel() <= 16 else words
    if isinstance(value, Mapping) and depth < _DEPTH:
        return {str(key): in_words(entry, depth + 1) for key, entry in value.items()}
    if isinstance(value, list | tuple) and depth < _DEPTH and len(value) <= _ENTRIES:
        return [in_words(entry, depth + 1) for entry in value]
    if isinstance(value, torch.nn.Module):
        return _name(value)
    name = getattr(value, "__qualname__", None)
    if isinstance(name, str):
        return f"{getattr(value, '__module__', '')}.{name}"
    return _ADDRESS.sub("", repr(value))[:_LENGTH]


def _name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _describe_composite(composite: Composite | None) -> dict[str, Any] | None:
    if composite is None:
        return None
    name, keywords = getattr(composite, "name", None), getattr(composite, "keywords", None)
    return {
        "class": _name(composite),
        "name": name if isinstance(name, str) else None,
        "keywords": in_words(keywords) if isinstance(keywords, Mapping) else None,
    }


def _describe_concept(concept: Concept) -> dict[str, Any]:
    axis = getattr(concept, "axis", 1 if type(concept).__name__ == "ChannelConcept" else None)
    settings = {key: in_words(value) for key, value in getattr(concept, "__dict__", {}).items() if key[:1] != "_"}
    return {"concept": _name(concept), "axis": in_words(axis), "settings": settings}
