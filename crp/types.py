"""Results and type names that every room shares."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

#: ``{layer name: concept ids, "y": targets}``.
Condition: TypeAlias = Mapping[str, Any]
#: A function that keeps the conditioned part of a gradient of shape ``(rows, *layer shape)``.
MaskFn: TypeAlias = Callable[[Tensor], Tensor]
#: ``(row, concept ids, layer name) -> MaskFn``.
MaskFactory: TypeAlias = Callable[[int, Any, str], MaskFn]
#: ``(layer name, concept id)``.
Node: TypeAlias = tuple[str, Hashable]


class _Fields(NamedTuple):
    heatmap: Any
    activations: dict[str, Tensor]
    relevances: dict[str, Tensor]
    prediction: Tensor


class AttributionResults(_Fields):
    """What `CondAttribution` returns; one row per (sample, condition), samples first.

    A tuple of four: ``heatmap, activations, relevances, prediction = result``. The others are attributes.

    Attributes
    ----------
    heatmap : Tensor of shape (rows, *space), or tuple or dict of them
        Relevance of the input, summed over its channels (by default), or over the features of embedded tokens. Where
        several inputs are explained, one for each, in the form of the data, with None for inputs that are not.
    activations : dict of str to Tensor of shape (rows, *layer shape)
        Outputs of the recorded layers. Where a layer has k entries for each sample, as one that runs on (batch * time),
        here and below it is (rows * k, *layer shape): the k entries of the first row, then those of the second, ...;
        ``tensor.unflatten(0, (rows, -1))`` tells them apart.
    relevances : dict of str to Tensor of shape (rows, *layer shape)
        Relevance at the outputs of the recorded layers, before a condition on that layer masks it.
    prediction : Tensor of shape (rows, *output shape)
        Model output, or the activation of the start layer where one is given. Rows of one text that explain a
        `Position` share it in memory, as a thousand tokens have scores of 200 MB: clone it before you write into it.
    encoding : "multiplier" or "relevance"
        What flowed back: relevance divided by activation, as under composites of `crp.composites`, or relevance itself,
        as under those of zennit and without one.
    multipliers : dict of str to Tensor of shape (rows, *layer shape), or None
        What arrived at the outputs of the recorded layers, under multiplier encoding: relevance is its product with the
        activation (or with what that differs by from its reference). None where that is not known: in relevance
        encoding, and for means over several references.
    counted : dict of str to Tensor of shape (rows, *layer shape), or None
        What relevance counts at the recorded layers, so that it is ``counted * multipliers``: the activation, or what
        that differs by from its reference. None where multipliers are, and where relevance is the multiplier itself, as
        under gradients.
    reading : Tensor or None
        What the caller asked the engine to read of the result, where that is all that there is of its layers.
    """

    encoding: Literal["multiplier", "relevance"] = "relevance"
    multipliers: dict[str, Tensor] | None = None
    counted: dict[str, Tensor] | None = None
    reading: Tensor | None = None

    def __new__(
        cls,
        heatmap: Any,
        activations: dict[str, Tensor],
        relevances: dict[str, Tensor],
        prediction: Tensor,
        *,
        encoding: Literal["multiplier", "relevance"] = "relevance",
        multipliers: dict[str, Tensor] | None = None,
        counted: dict[str, Tensor] | None = None,
        reading: Tensor | None = None,
    ) -> AttributionResults:
        """Tuple of the four fields."""
        self = super().__new__(cls, heatmap, activations, relevances, prediction)
        self.encoding, self.multipliers, self.counted, self.reading = encoding, multipliers, counted, reading
        return self

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name}={_shapes(value)}" for name, value in self._asdict().items())
        return f"{type(self).__name__}({shapes})"

    def _replace(self, **changes: Any) -> AttributionResults:
        """Return the same with other fields or attributes."""
        same = {name: getattr(self, name) for name in ("encoding", "multipliers", "counted", "reading")}
        return type(self)(**{**self._asdict(), **same, **changes})


def _shapes(value: Any) -> Any:
    """Shape of a tensor; of several, theirs in a tuple or dict."""
    if isinstance(value, Mapping):
        return {name: _shapes(one) for name, one in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(map(_shapes, value))
    return tuple(value.shape) if isinstance(value, Tensor) else value


class Sinks(Protocol):
    """Account of what layers keep in one forward pass: tensors whose gradient is what was kept.

    Attributes
    ----------
    sinks : dict of str to list of Tensor of shape (batch, kinds)
        One for each call of each layer.
    kinds : tuple of str
        What the columns are.
    """

    sinks: dict[str, list[Tensor]]
    kinds: tuple[str, ...]


class AbsorbedRelevance(NamedTuple):
    """What layers kept of the relevance that reached them, for each row.

    Attributes
    ----------
    initial, input : Tensor of shape (rows,)
        Relevance that started, and that reached the data, summed.
    layers : dict of str to dict of str to Tensor of shape (rows,)
        For each layer what its ``"bias"``, outputs to which nothing contributed (``"empty"``) and the ``"stabilizer"``
        kept.
    """

    initial: Tensor
    input: Tensor
    layers: dict[str, dict[str, Tensor]]

    @property
    def total(self) -> Tensor:
        """What all layers kept, (rows,)."""
        kept = [share for shares in self.layers.values() for share in shares.values()]
        return sum(kept, torch.zeros_like(self.initial))

    @property
    def rest(self) -> Tensor:
        """What is neither in the data nor in a layer, (rows,): masked by conditions, or lost in another way."""
        return self.initial - self.input - self.total


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
