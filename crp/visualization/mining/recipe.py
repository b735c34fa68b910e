"""What is mined, in words: what a table says of itself to people, and to a run that has nothing but the folder."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from zennit.core import Composite

from crp.attribution import CondAttribution
from crp.concepts import AxisConcept, ChannelConcept, Concept, DirectionConcept, SubspaceConcept
from crp.errors import LoadingError
from crp.layers import unwrap
from crp.visualization.mining.encoded import encoded_in
from crp.visualization.mining.marks import source_of
from crp.visualization.mining.texts import texts_in
from crp.visualization.table.fingerprint import fingerprint

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
#: Characters of what has no plainer words, entries of a list, and levels of lists in lists.
_LENGTH, _ENTRIES, _DEPTH = 300, 10_000, 6
#: Concepts that can be made again from words and tensors, and the bytes of tensors that a recipe takes.
_OURS = (ChannelConcept, AxisConcept, DirectionConcept, SubspaceConcept)
_BYTES = 16_000_000


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
    if fingerprint_attribution(attribution):
        recipe["attribution"] = _name(attribution)
    if precision := _precision(attribution):
        recipe["precision"] = precision
    if attribution.output is not None:
        recipe["output"] = {"function": in_words(attribution.output), "exclusive": attribution.exclusive}
    encoded = encoded_in(dataset)
    if encoded is not None:
        recipe["decoder"] = in_words(encoded.words())
    texts = texts_in(dataset)
    if texts is not None:
        recipe["texts"] = in_words(texts.describe())
    recipe |= {key: in_words(value) for key, value in settings.items()}
    for key, value in dict(said or {}).items():
        words, known = in_words(value), recipe.get(key)
        recipe[key] = known | words if isinstance(words, dict) and isinstance(known, dict) else words
    return recipe


def fingerprint_attribution(attribution: CondAttribution) -> str:
    """Fingerprint of a subclass with its own state, or of methods that are set on an object; empty if all is usual."""
    usual = CondAttribution(torch.nn.Identity())
    own = {name: value for name, value in vars(attribution).items() if name not in vars(usual)}
    return fingerprint((type(attribution), own)) if own or type(attribution) is not CondAttribution else ""


def _precision(attribution: CondAttribution) -> str:
    """In which numbers torch computes in place of the model's own; empty if it does not."""
    kind = attribution.device.type
    return f"autocast to {torch.get_autocast_dtype(kind)}" if torch.is_autocast_enabled(kind) else ""


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
    known = {key: value for key, value in getattr(concept, "__dict__", {}).items() if key[:1] != "_"}
    words = {"concept": _name(concept), "axis": in_words(axis), "settings": in_words(known)}
    tensors = {key: value for key, value in known.items() if isinstance(value, Tensor)}
    if tensors and type(concept) in _OURS and sum(value.nbytes for value in tensors.values()) <= _BYTES:
        words["tensors"] = {key: _encode(value) for key, value in tensors.items()}
    return words


def make_concept(layer: str, words: Mapping[str, Any]) -> Concept:
    """Concept of a layer, from what the recipe says of it.

    Raises
    ------
    LoadingError
        If it is a concept of the user's own, or its tensors are too large for a recipe.
    """
    kinds = {f"{kind.__module__}.{kind.__qualname__}": kind for kind in _OURS}
    kind, settings = kinds.get(str(words.get("concept"))), words.get("settings")
    if kind is None or not isinstance(settings, Mapping):
        raise LoadingError(
            f"layer {layer!r} was mined with {words.get('concept')}, a concept of your own with the settings "
            f"{settings}: give layer_map={{{layer!r}: ...}}"
        )
    if kind is ChannelConcept:
        return ChannelConcept()
    if kind is AxisConcept:
        return AxisConcept(settings["axis"], settings["groups"])
    if "tensors" not in words:
        raise LoadingError(f"the directions of layer {layer!r} are too large for a recipe: give layer_map")
    directions, dual = (_decode(words["tensors"][name]) for name in ("directions", "dual"))
    more = {"rest": settings["rest"], "axis": settings["axis"], "names": settings["names"]}
    if kind is DirectionConcept:
        return DirectionConcept(directions, dual, **more)
    blocks, duals = (torch.split(matrix, settings["sizes"]) for matrix in (directions, dual))
    return SubspaceConcept(blocks, duals, **more)


def _encode(tensor: Tensor) -> dict[str, Any]:
    values = tensor.detach().cpu().contiguous().numpy()
    return {
        "dtype": str(values.dtype),
        "shape": list(values.shape),
        "base64": base64.b64encode(values.tobytes()).decode("ascii"),
    }


def _decode(words: Mapping[str, Any]) -> Tensor:
    values = np.frombuffer(base64.b64decode(words["base64"]), np.dtype(words["dtype"]))
    return torch.from_numpy(values.reshape(words["shape"]).copy())
