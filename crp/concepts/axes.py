"""Heads, neurons, tokens and patches as concepts: places along an axis, one by one or in groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from crp.checks import check_number
from crp.concepts.base import Concept, _InTurn
from crp.concepts.channels import ChannelConcept, _KeepChannels
from crp.concepts.ids import check_alike, check_axis
from crp.errors import InputError
from crp.types import MaskFn


class AxisConcept(Concept):
    """Places along one axis of a layer's output are concepts, or equal groups of them.

    The concepts of a layer are disjoint: what conditions on all of them give adds up to the whole.

    Parameters
    ----------
    axis : int
        Of the layer's output, which has the batch as axis 0: -1 for the neurons of outputs (batch, token, neuron), 1
        for their tokens.
    groups : int, optional
        Number of groups into which the axis is divided, in order: the number of heads, where each head has several
        entries side by side. None is a concept for each place.

    Raises
    ------
    ValueError
        If the axis is that of the batch, or there is less than one group.

    Notes
    -----
    Heads of attention stand side by side in the input of its output projection, neurons of an MLP in the input of its
    last layer. A layer's input has a name, too (see `crp.layers.addresses`): ``"attn.proj.input"``, and
    ``"self_attention.out_proj.input"`` for an `nn.MultiheadAttention`. Swin's attention has one row for each window.

    Examples
    --------
    >>> heads = AxisConcept(-1, groups=12)
    >>> tokens = AxisConcept(1)
    >>> condition = {"y": 3, "blocks.5.attn.proj.input": [0, 7]}    # with mask_map=heads.mask
    """

    def __init__(self, axis: int = -1, groups: int | None = None) -> None:
        check_axis(axis)
        if groups is not None:
            check_number("groups", groups, 1, whole=True)
        self.axis, self.groups = axis, groups

    def code(self, activation: Tensor) -> Tensor:
        """Entries of each place or group, of shape (batch, concepts, *positions)."""
        return self.arranged(activation)

    def relevance(self, activation: Tensor, multiplier: Tensor) -> Tensor:
        """Relevance of the entries of each place or group, of shape (batch, concepts, *positions)."""
        check_alike(activation, multiplier)
        return self.arranged(activation * multiplier)

    def mask(self, batch_id: int, concept_ids: Any, layer_name: str | None = None) -> MaskFn:
        """Keep only some places or groups of one row; negative ids count from the end."""
        return _KeepAlongAxis(self, ChannelConcept.mask(batch_id, concept_ids, layer_name), layer_name)

    def mask_rf(self, batch_id: int, neuron_ids: Mapping[int, Any], layer_name: str | None = None) -> MaskFn:
        """Keep only single positions of some places or groups; they are counted as in `get_rf_indices`."""
        return _KeepAlongAxis(self, ChannelConcept.mask_rf(batch_id, neuron_ids, layer_name), layer_name)

    def get_rf_indices(self, output_shape: Sequence[int], layer_name: str | None = None) -> Sequence[int] | np.ndarray:
        """Positions of a concept: places in its group, times those of all other axes, flattened in this order."""
        sizes = [1, *output_shape]
        n_places = sizes.pop(self._axis(len(sizes), layer_name))
        n_groups = n_places if self.groups is None else self.groups
        return np.arange(n_places // n_groups * int(np.prod(sizes)))

    def arranged(self, values: Tensor, layer_name: str | None = None) -> Tensor:
        """View of a layer's output with its concepts along axis 1: (batch, concepts, *positions).

        Raises
        ------
        ValueError
            If the layer has no such axis, or it cannot be divided into so many groups.
        """
        values = values.movedim(self._axis(values.dim(), layer_name), 1)
        if self.groups is None:
            return values
        if values.shape[1] % self.groups:
            raise InputError(
                f"layer {layer_name!r} has {values.shape[1]} places along axis {self.axis}, which are not "
                f"{self.groups} equal groups"
            )
        return values.unflatten(1, (self.groups, -1))  # type: ignore[no-untyped-call, no-any-return]

    def _from_relevance(self, relevance: Tensor, layer_name: str | None) -> Tensor:
        if type(self).relevance is AxisConcept.relevance:
            return self.arranged(relevance, layer_name)
        return super()._from_relevance(relevance, layer_name)

    def _axis(self, n_axes: int, layer_name: str | None) -> int:
        axis = self.axis + n_axes if self.axis < 0 else self.axis
        if not 0 < axis < n_axes:
            raise InputError(f"layer {layer_name!r} has {n_axes} axes with the batch's, so that none is {self.axis}")
        return axis

    def __repr__(self) -> str:
        return f"AxisConcept(axis={self.axis}, groups={self.groups})"


@dataclass(frozen=True)
class _KeepAlongAxis:
    """Mask function that acts on a gradient whose concepts are along another axis.

    Attributes
    ----------
    concept : AxisConcept
    keep : callable
        Of the gradient as `AxisConcept.arranged` gives it; it works in place.
    layer_name : str or None
        Named in error messages.
    """

    concept: AxisConcept
    keep: MaskFn
    layer_name: str | None

    def __call__(self, grad: Tensor) -> Tensor:
        """Mask a gradient, in place."""
        self.keep(self.concept.arranged(grad, self.layer_name))
        return grad

    @staticmethod
    def together(masks: Sequence[_KeepAlongAxis]) -> MaskFn:
        """One function that does what several of one layer do one after the other."""
        keeps = [mask.keep for mask in masks]
        if all(isinstance(keep, _KeepChannels) for keep in keeps) and len({id(mask.concept) for mask in masks}) == 1:
            return replace(masks[0], keep=_KeepChannels.together(keeps))  # type: ignore[arg-type]
        return _InTurn(tuple(masks))
