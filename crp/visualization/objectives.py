"""What an image is made up for: functions of layers' outputs that are to be large, which add up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from crp.checks import check_number
from crp.concepts import ChannelConcept, Concept, as_ids
from crp.concepts.ids import as_numbers
from crp.concepts.reading import activation_sums
from crp.errors import InputError, OutOfRangeError

#: Name of the model's output among the layers; no layer has this name.
OUTPUT = ""

Ids: TypeAlias = int | Sequence[int] | Tensor


@dataclass(frozen=True)
class Objective:
    """What is to be large: a function of layers' outputs. May be added, subtracted, and multiplied by numbers.

    Attributes
    ----------
    layers : frozenset of str
        Layers that it needs; ``""`` is the model's output.
    function : callable
        ``{layer: output of shape (images, ...)} -> Tensor of shape (images,)``
    """

    layers: frozenset[str]
    function: Callable[[Mapping[str, Tensor]], Tensor]

    def __call__(self, outputs: Mapping[str, Tensor]) -> Tensor:
        """Value for each image."""
        return self.function(outputs)

    def __add__(self, other: Objective) -> Objective:
        if not isinstance(other, Objective):
            return NotImplemented
        return Objective(self.layers | other.layers, lambda outputs: self(outputs) + other(outputs))

    def __mul__(self, factor: float) -> Objective:
        check_number("an objective's factor", factor)
        return Objective(self.layers, lambda outputs: self(outputs) * factor)

    def __sub__(self, other: Objective) -> Objective:
        return self + -other

    def __neg__(self) -> Objective:
        return self * -1

    __rmul__ = __mul__


def log_probability(target: Ids) -> Objective:
    """Log-probability of a class by softmax: one class for all images, or one for each."""
    return Objective(frozenset({OUTPUT}), lambda outputs: _pick(outputs[OUTPUT].log_softmax(1), target, _name(OUTPUT)))


def logit(target: Ids) -> Objective:
    """Output for a class: one class for all images, or one for each."""
    return unit(OUTPUT, target)


def unit(layer: str, channel: Ids, position: int | Sequence[int] | None = None) -> Objective:
    """One neuron of a layer.

    Parameters
    ----------
    layer : str
        Name as in ``model.named_modules()``.
    channel : int, or one for each image
    position : int or sequence of int, optional
        Index in each further axis; the middle by default.
    """

    def value(outputs: Mapping[str, Tensor]) -> Tensor:
        output = outputs[layer]
        at = [size // 2 for size in output.shape[2:]] if position is None else np.atleast_1d(position).tolist()
        if len(at) != output.dim() - 2 or any(not -n <= i < n for i, n in zip(at, output.shape[2:], strict=True)):
            raise OutOfRangeError(
                f"{_name(layer)} has positions in {tuple(output.shape[2:])}; there is no {position!r}"
            )
        place = (slice(None), slice(None), *at)
        return _pick(output[place], channel, _name(layer))

    return Objective(frozenset({layer}), value)


def channel(layer: str, channel: Ids) -> Objective:
    """Mean over all positions of a channel of a layer: one channel for all images, or one for each."""
    return Objective(
        frozenset({layer}),
        lambda outputs: _pick(_flat(outputs[layer]).mean(2), channel, _name(layer)),
    )


def direction(layer: str, vector: Tensor | Sequence[float]) -> Objective:
    """Inner product of a layer's output with a direction, such as a concept activation vector.

    Parameters
    ----------
    layer : str
    vector : Tensor of shape (channels,) or (channels, *space)
        Without space: averaged over all positions.
    """
    numbers = torch.from_numpy(as_numbers("vector", vector))
    if not numbers.any():
        raise InputError("vector must be other than 0")

    def value(outputs: Mapping[str, Tensor]) -> Tensor:
        output = outputs[layer]
        along = numbers.to(output)
        if along.shape == output.shape[1:]:
            return (output * along).flatten(1).sum(1)
        if along.shape != output.shape[1:2]:
            raise InputError(
                f"vector has shape {tuple(along.shape)}; {_name(layer)} needs ({output.shape[1]},) or "
                f"{tuple(output.shape[1:])}"
            )
        return torch.einsum("ncp,c->n", _flat(output), along) / _flat(output).shape[2]

    return Objective(frozenset({layer}), value)


def concept(layer: str, concept_id: Any, kind: Concept | None = None) -> Objective:
    """Activation of a concept of any kind, as `Concept.code` gives it, summed over positions."""
    kind = ChannelConcept() if kind is None else kind

    def value(outputs: Mapping[str, Tensor]) -> Tensor:
        values = activation_sums(kind, outputs[layer], layer)
        place = kind.column(concept_id, layer) if hasattr(kind, "column") else concept_id
        return _pick(values, place, _name(layer))

    return Objective(frozenset({layer}), value)


def _name(layer: str) -> str:
    return f"layer {layer!r}" if layer else "the model's output"


def _flat(output: Tensor) -> Tensor:
    """Output of a layer in the shape (images, channels, positions)."""
    return output.reshape(*output.shape[:2], -1)


def _pick(values: Tensor, ids: Ids, where: str) -> Tensor:
    """Column of each row of ``values``, of shape (images, columns)."""
    if values.dim() != 2:
        raise InputError(f"{where} has shape {tuple(values.shape)}; there must be one value per image and channel")
    listed, size = as_ids(ids), values.shape[1]
    if len(listed) not in (1, len(values)):
        raise InputError(f"{where}: there must be one id, or one for each of {len(values)} images, not {len(listed)}")
    for i in listed:
        if not -size <= i < size:
            raise OutOfRangeError(f"{where} has channels 0 to {size - 1}; there is no {i}")
    return values.gather(1, (torch.tensor(listed, device=values.device) % size).expand(len(values))[:, None])[:, 0]
