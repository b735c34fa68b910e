"""What every concept type answers about a layer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, cast

import numpy as np
from torch import Tensor

from crp.concepts.scores import ConceptScores
from crp.types import MaskFactory, MaskFn


class Concept:
    """Interface of a concept type.

    `mask` is enough for conditional attribution, `attribute` for relevant concepts and attribution graphs; reference
    mining needs `scores` (or `reference_sampling`, from which the base class derives it), receptive-field references
    `mask_rf`. Concepts whose ids are tuples, not numbers, also define ``column(concept_id, layer_name) -> int``, the
    place of a concept in `attribute` and `scores`.

    Attributes
    ----------
    needs_multiplier : bool
        Whether masks are right for multipliers only. This is so if they do more than select entries, such as a
        projection on a direction. Such masks are refused under composites that propagate relevance itself, as those of
        zennit do. A mask function that is no method has an attribute of this name itself.
    """

    needs_multiplier: bool = False

    def mask(self, batch_id: int, concept_ids: Any, layer_name: str | None = None) -> MaskFn:
        """Return a function that keeps only ``concept_ids`` in row ``batch_id`` of a gradient of shape (rows, ...).

        The function may change the gradient in place, which is a copy. If the functions' type has a static method
        ``together``, it is called with the functions of many rows, and returns one function for all of them.
        """
        raise self._missing("mask")

    def mask_rf(self, batch_id: int, neuron_ids: Any, layer_name: str | None = None) -> MaskFn:
        """Return a function that keeps single positions of concepts: ``neuron_ids`` maps concept id to positions."""
        raise self._missing("mask_rf")

    def reference_sampling(
        self, relevance: Tensor, layer_name: str | None = None, max_target: str = "sum", abs_norm: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sort the batch for every concept: sample index, value and position, each (batch, concepts), best first."""
        raise self._missing("reference_sampling")

    def get_rf_indices(self, output_shape: Sequence[int], layer_name: str | None = None) -> Sequence[int] | np.ndarray:
        """Positions of a layer whose output, without the batch axis, has the given shape."""
        raise self._missing("get_rf_indices")

    def attribute(
        self, relevance: Tensor, mask: Tensor | None = None, layer_name: str | None = None, abs_norm: bool = True
    ) -> Tensor:
        """Relevance of every concept, of shape (batch, concepts)."""
        raise self._missing("attribute")

    def scores(self, relevance: Tensor, layer_name: str | None = None) -> ConceptScores:
        """Score every concept of every sample; derived from `reference_sampling` where a subclass has only that."""
        order, total, position = self.reference_sampling(relevance, layer_name, "sum", False)
        max_order, largest, _ = self.reference_sampling(relevance, layer_name, "max", False)
        unsorted = order.argsort(0)
        return ConceptScores(
            total.gather(0, unsorted), largest.gather(0, max_order.argsort(0)), position.gather(0, unsorted)
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def _missing(self, method: str) -> NotImplementedError:
        return NotImplementedError(f"{type(self).__name__} does not implement Concept.{method}")


def mask_of(concept: Concept, method: Literal["mask", "mask_rf"] = "mask") -> MaskFactory:
    """Mask factory of a concept, with the concept's `needs_multiplier`, which a static method cannot carry."""
    make: MaskFactory = getattr(concept, method)
    if not getattr(concept, "needs_multiplier", False):
        return make
    marked: Any = partial(make)
    marked.needs_multiplier = True
    return cast(MaskFactory, marked)
