"""What every concept type answers about a layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from crp.checks import check_choice
from crp.concepts.ids import _masked, as_ids, check_alike, in_range
from crp.concepts.scores import ConceptScores, by_position, normalize, scores_of
from crp.errors import InputTypeError
from crp.flags import check_flags
from crp.types import MaskFactory, MaskFn
from crp.wording import shortened


class Concept:
    """Interface of a concept type.

    A concept type is two functions of a layer: `code`, how active each concept is at each position, and `relevance`,
    how relevant; and `mask`, which lets only some concepts' relevance flow on. The other methods follow from these.
    For every sample, the relevance of concept ``k`` is what its mask lets through:
    ``relevance(a, m)[:, k].sum() == (a * mask(row, [k])(m)).sum()``; mining checks it on its first batch.

    Concept types from before `code` and `relevance`, with ``scores(relevance)`` or ``reference_sampling`` of their own,
    work as they did. Concepts whose ids are tuples, not numbers, also define ``column(concept_id, layer_name) -> int``,
    the place of a concept on axis 1 of `code`, `relevance` and `scores`.

    Attributes
    ----------
    needs_multiplier : bool
        Whether relevance and masks need multipliers, and not relevance alone, as everything does that is more than a
        selection of entries, such as a projection on a direction. They are then refused under composites that
        propagate relevance itself, as those of zennit do. A mask function that is no method has an attribute of this
        name itself.
    names : sequence of str, or None
        What the concepts are called, by id.
    noun : str
        What a concept without a name is called, followed by its id.

    Examples
    --------
    >>> class Halves(Concept):
    ...     '''The first and the second half of the channels.'''
    ...     def code(self, activation):
    ...         return activation.unflatten(1, (2, -1))
    ...     def relevance(self, activation, multiplier):
    ...         return self.code(activation * multiplier)
    >>> Halves().attribute(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), abs_norm=False)
    tensor([[3., 7.]])
    """

    needs_multiplier: bool = False
    names: Sequence[str] | None = None
    noun: str = "concept"

    def code(self, activation: Tensor) -> Tensor:
        """How active each concept is at each position.

        Parameters
        ----------
        activation : Tensor of shape (batch, *layer shape)

        Returns
        -------
        Tensor of shape (batch, concepts, *positions)
            By default, the activation itself: every entry of axis 1 is a concept.
        """
        return activation

    def relevance(self, activation: Tensor, multiplier: Tensor) -> Tensor:
        """How relevant each concept is at each position.

        Parameters
        ----------
        activation : Tensor of shape (batch, *layer shape)
            What relevance counts: the layer's output, or what it differs by from a reference.
        multiplier : Tensor of the same shape
            Relevance divided by activation.

        Returns
        -------
        Tensor of shape (batch, concepts, *positions)
            By default, their product. Unless `needs_multiplier`, it depends on the product only.
        """
        check_alike(activation, multiplier)
        return activation * multiplier

    def mask(self, batch_id: int, concept_ids: Any, layer_name: str | None = None) -> MaskFn:
        """Return a function that keeps only ``concept_ids`` in row ``batch_id`` of a gradient of shape (rows, ...).

        The function may change the gradient in place, which is a copy. If the functions' type has a static method
        ``together``, it is called with the functions of many rows, and returns one function for all of them.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement Concept.mask")

    def mask_rf(self, batch_id: int, neuron_ids: Mapping[int, Any], layer_name: str | None = None) -> MaskFn:
        """Return a function that keeps only single positions of some concepts in one row.

        By default, it keeps what `mask` keeps of each concept, at its positions. That is right where the positions of
        `code` are those of the layer from axis 2 on.

        Parameters
        ----------
        batch_id : int
            Row of the gradient.
        neuron_ids : mapping of int to int or sequence of int
            For each concept, the positions to keep, counted in the flattened space.
        layer_name : str, optional
            Named in error messages.

        Returns
        -------
        callable
            Function of a gradient of shape (rows, *layer shape).
        """
        if not isinstance(neuron_ids, Mapping):
            raise InputTypeError(f"layer {layer_name!r}: mask_rf needs {{concept: positions}}, not {neuron_ids!r}")
        kept = [(concept, as_ids(at, layer_name)) for concept, at in neuron_ids.items()]

        def mask_fn(grad: Tensor) -> Tensor:
            space = self._space(grad)
            if space != tuple(grad.shape[2:]):
                raise NotImplementedError(
                    f"layer {layer_name!r}: positions of {self!r} have the shape {space}, and those of the layer "
                    f"{tuple(grad.shape[2:])}; define {type(self).__name__}.mask_rf"
                )
            row = torch.zeros_like(grad[batch_id])
            for concept, positions in kept:
                at = torch.zeros(max(1, int(np.prod(space))), dtype=torch.bool, device=grad.device)
                at[in_range(positions, len(at), layer_name, "position")] = True
                of_concept = self.mask(batch_id, [concept], layer_name)(grad.clone())[batch_id]
                row += of_concept * at.reshape(space)
            grad[batch_id] = row
            return grad

        return mask_fn

    def get_rf_indices(self, output_shape: Sequence[int], layer_name: str | None = None) -> Sequence[int] | np.ndarray:
        """Positions of a layer whose output, without the batch axis, has the given shape: ``[0]`` without space."""
        space = self._space(torch.zeros(1, *output_shape))
        return np.arange(int(np.prod(space))) if space else [0]

    def attribute(
        self, relevance: Tensor, mask: Tensor | None = None, layer_name: str | None = None, abs_norm: bool = True
    ) -> Tensor:
        """Relevance of every concept, summed over its positions in at least float32.

        Parameters
        ----------
        relevance : Tensor of shape (batch, *layer shape), or without the batch axis for layers of one axis
            Relevance of a layer, such as ``result.relevances["features.40"]``.
        mask : Tensor, optional
            Multiplied with ``relevance`` first; broadcast to its shape.
        layer_name : str, optional
            Named in error messages.
        abs_norm : bool
            Divide by the sum over concepts of the absolute values, so that they become shares; see `normalize`.

        Returns
        -------
        Tensor of shape (batch, concepts)

        Raises
        ------
        TypeError
            If the relevance of these concepts does not follow from that of the layer (`needs_multiplier`);
            `crp.concepts.relevance_in` reads it from a result.
        """
        check_flags(abs_norm=abs_norm)
        relevance = _masked(relevance, mask)
        if relevance.dim() == 1:
            relevance = relevance[None]
        total = by_position(self._from_relevance(relevance, layer_name), layer_name).sum(-1)
        return normalize(total) if abs_norm else total

    def scores(self, relevance: Tensor, layer_name: str | None = None) -> ConceptScores:
        """Sum, maximum and its position of every concept of every sample, from the relevance of a layer.

        Raises the `TypeError` of `attribute`.
        """
        if self._ranks_itself() and type(self).scores is Concept.scores:
            order, total, position = self.reference_sampling(relevance, layer_name, "sum", False)
            max_order, largest, _ = self.reference_sampling(relevance, layer_name, "max", False)
            unsorted = order.argsort(0)
            return ConceptScores(
                total.gather(0, unsorted), largest.gather(0, max_order.argsort(0)), position.gather(0, unsorted)
            )
        return scores_of(self._from_relevance(relevance, layer_name), layer_name)

    def reference_sampling(
        self,
        relevance: Tensor,
        layer_name: str | None = None,
        max_target: Literal["sum", "max"] | str = "sum",
        abs_norm: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sort the batch by each concept's relevance.

        Parameters
        ----------
        relevance : Tensor of shape (batch, *layer shape)
        layer_name : str, optional
        max_target : {"sum", "max"}
            Rank by the sum or by the largest value among a concept's positions.
        abs_norm : bool
            Rank by shares: divide each sample's values by the sum of their absolute values.

        Returns
        -------
        sample, value, position : Tensors of shape (batch, concepts)
            Batch index, value, and position of the maximum, in descending order; ties in the order of the batch.
        """
        check_flags(abs_norm=abs_norm)
        check_choice("max_target", max_target, Literal["sum", "max"])
        if self._ranks_itself():
            scores = scores_of(self._from_relevance(relevance, layer_name), layer_name)
        else:
            scores = self.scores(relevance, layer_name)
        value = getattr(scores, max_target)
        if abs_norm:
            value = normalize(value)
        value, order = value.sort(dim=0, descending=True, stable=True)
        return order, value, scores.position.gather(0, order)

    def describe(self, concept_id: int) -> str:
        """What a concept is called: its name or, where there is none, such as ``"channel 5"``."""
        if self.names is not None and -len(self.names) <= concept_id < len(self.names):
            return self.names[concept_id]
        return f"{self.noun} {concept_id}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def _space(self, like: Tensor) -> tuple[int, ...]:
        """Shape of the positions, in a layer whose output is like a tensor of shape (rows, *layer shape)."""
        if type(self).code is Concept.code:
            return tuple(like.shape[2:])
        return tuple(self.code(torch.zeros_like(like[:1])).shape[2:])

    def _from_relevance(self, relevance: Tensor, layer_name: str | None) -> Tensor:
        """Relevance of concepts, (batch, concepts, *positions), from that of a layer."""
        if type(self).relevance is Concept.relevance:
            return relevance
        if self.needs_multiplier:
            raise InputTypeError(
                f"layer {layer_name!r}: the relevance of {self!r} does not follow from that of the layer; it needs "
                "activation and multiplier, which crp.concepts.relevance_in(concept, result, layer_name) reads"
            )
        return self.relevance(relevance, torch.ones_like(relevance))

    def _ranks_itself(self) -> bool:
        """Whether a subclass has a `reference_sampling` of its own, which may call this one's."""
        return type(self).reference_sampling is not Concept.reference_sampling


@dataclass(frozen=True)
class _InTurn:
    """Mask functions one after the other."""

    masks: tuple[MaskFn, ...]

    def __call__(self, grad: Tensor) -> Tensor:
        for mask in self.masks:
            grad = mask(grad)
        return grad


def check_is_concept(name: str, concept: object) -> None:
    """Raise a `TypeError` that begins with a name if this is no concept; the class of one is none."""
    if isinstance(concept, type) or not callable(getattr(concept, "mask", None)):
        given = f"the class {concept.__name__}" if isinstance(concept, type) else shortened(concept)
        raise InputTypeError(f"{name} must be a concept, such as ChannelConcept(), not {given}")


def mask_of(concept: Concept, method: Literal["mask", "mask_rf"] = "mask") -> MaskFactory:
    """Mask factory of a concept, with the concept's `needs_multiplier`, which a static method cannot carry."""
    check_is_concept("concept", concept)
    check_choice("method", method, Literal["mask", "mask_rf"])
    make: MaskFactory = getattr(concept, method)
    if not getattr(concept, "needs_multiplier", False):
        return make
    marked: Any = partial(make)
    marked.needs_multiplier = True
    return cast(MaskFactory, marked)
