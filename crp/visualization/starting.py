"""Conditions whose relevance starts in the conditioned layer, beside others whose relevance comes from the output."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from zennit.core import Composite

from crp.attribution import CondAttribution
from crp.concepts import Concept, mask_of
from crp.engine import encoding
from crp.engine.masks import apply_masks

_Mask = Callable[[Tensor], Tensor]


def starts_from_one(attribution: CondAttribution, composite: Composite | None) -> bool:
    """Whether relevance that starts in a layer, and is its activation, is a multiplier of 1 there."""
    own = type(attribution).relevance_init is not CondAttribution.relevance_init
    return not own and encoding.starts_at_one(encoding.propagation_of(composite))


def starting_masks(layer_map: Mapping[str, Concept]) -> dict[str, Callable[..., _Mask]]:
    """Masks of a layer each, after which a concept that is given as ``(id,)`` starts there with its own activation.

    One that is given as ``[id]`` has what arrives at it, as usual. So conditions of both kinds, and of several layers,
    share a forward pass, which a ``start_layer`` of a call would not let them. Right where `starts_from_one` holds:
    whatever arrives at the layer is replaced by 1.
    """

    def of_layer(make: Callable[..., _Mask]) -> Callable[..., _Mask]:
        def mask(row: int, ids: Sequence[Any], layer: str) -> _Mask:
            return _Starting((row,) if isinstance(ids, tuple) else (), (make(row, list(ids), layer),))

        return mask

    return {layer: of_layer(mask_of(concept)) for layer, concept in layer_map.items()}


@dataclass(frozen=True)
class _Starting:
    """Masks of some rows, in some of which a concept starts."""

    rows: tuple[int, ...]
    masks: tuple[_Mask, ...]

    def __call__(self, gradient: Tensor) -> Tensor:
        """Masked gradient, which is changed in place where rows start."""
        if self.rows:
            gradient[list(self.rows)] = 1
        return apply_masks(list(self.masks), gradient)

    @staticmethod
    def together(masks: Sequence[_Starting]) -> _Starting:
        """One function that does what several of one layer do one after the other."""
        return _Starting(
            tuple(row for mask in masks for row in mask.rows), tuple(one for mask in masks for one in mask.masks)
        )
