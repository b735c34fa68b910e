"""Results and type names that every room shares."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

#: ``{layer name: concept ids, "y": targets}``.
Condition: TypeAlias = Mapping[str, Any]
#: A function that keeps the conditioned part of a gradient of shape ``(rows, *layer shape)``.
MaskFn: TypeAlias = Callable[[Tensor], Tensor]
#: ``(row, concept ids, layer name) -> MaskFn``.
MaskFactory: TypeAlias = Callable[[int, Any, str], MaskFn]
#: ``(layer name, concept id)``.
Node: TypeAlias = tuple[str, Hashable]


class AttributionResults(NamedTuple):
    """What `CondAttribution` returns; one row per (sample, condition), samples first.

    Attributes
    ----------
    heatmap : Tensor of shape (rows, *space)
        Relevance of the input, summed over its channels (by default).
    activations : dict of str to Tensor of shape (rows, *layer shape)
        Outputs of the recorded layers.
    relevances : dict of str to Tensor of shape (rows, *layer shape)
        Relevance at the outputs of the recorded layers, before a condition on that layer masks it.
    prediction : Tensor of shape (rows, *output shape)
        Model output, or the activation of the start layer where one is given.
    """

    heatmap: Tensor
    activations: dict[str, Tensor]
    relevances: dict[str, Tensor]
    prediction: Tensor


class AttributionGraphResults(NamedTuple):
    """What `AttributionGraph` returns.

    Attributes
    ----------
    nodes : list of (layer name, concept id)
        In the order in which they were reached, with repetitions.
    connections : dict of node to list of (layer name, concept id, relevance)
        For each decomposed node, the concepts of the layers that feed it.
    """

    nodes: list[Node]
    connections: dict[Node, list[tuple[str, Hashable, float]]]
