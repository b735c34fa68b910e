"""What a concept is: a part of a layer's output that can be masked, scored and ranked.

A concept type answers three questions about one layer: how the backward flow is restricted to some of its concepts
(`mask`, `mask_rf`), how relevant or active each concept was (`attribute`, `scores`), and where (`get_rf_indices`).
Channels are the concepts of "From attribution maps to human-understandable explanations through Concept Relevance
Propagation" (Achtibat et al., Nature Machine Intelligence 2023); subclass `Concept` for heads, directions, or
anything else.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from crp.types import MaskFactory, MaskFn


class ConceptScores(NamedTuple):
    """Per-sample scores of every concept of a layer; what a mining run stores.

    Attributes
    ----------
    sum : Tensor of shape (batch, concepts)
        Sum over the concept's positions.
    max : Tensor of shape (batch, concepts)
        Largest value among the concept's positions.
    position : Tensor of shape (batch, concepts)
        Index of that position in the flattened space (int64).
    """

    sum: Tensor
    max: Tensor
    position: Tensor


class Concept:
    """Interface of a concept type.

    `mask` is enough for conditional attribution, `attribute` for relevant concepts and attribution graphs; reference
    mining needs `scores` (or `reference_sampling`, from which the base class derives it), receptive-field references
    `mask_rf`. Concepts whose ids are tuples, not numbers, also define ``column(concept_id, layer_name) -> int``, the
    place of a concept in `attribute` and `scores`.

    Attributes
    ----------
    needs_multiplier : bool
        Whether masks are right for multipliers only, as those that do more than select entries: such as a projection on
        a direction. They are then refused under composites that propagate relevance itself, as those of zennit do. A
        function that is no method says so by an attribute of its own.
    """

    needs_multiplier: bool = False

    def mask(self, batch_id: int, concept_ids: Any, layer_name: str | None = None) -> MaskFn:
        """Return a function that keeps only ``concept_ids`` in row ``batch_id`` of a gradient of shape (rows, ...).

        The function may work in place: it is given a tensor of its own. If its type has a static method ``together``,
        which makes one function of those of many rows, that one is called for all of them.
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


class ChannelConcept(Concept):
    """Every channel (axis 1) of a layer's output is a concept; its positions are the remaining axes, flattened.

    For outputs of shape (batch, channel, *space) and (batch, channel). Tokens of shape (batch, token, channel) need a
    concept type of their own, as axis 1 is that of the tokens.
    """

    @staticmethod
    def mask(batch_id: int, concept_ids: Any, layer_name: str | None = None) -> MaskFn:
        """Keep only some channels of one row.

        Parameters
        ----------
        batch_id : int
            Row of the gradient.
        concept_ids : int, or sequence, array or tensor of int
            Channels to keep; negative ids count from the end, an empty sequence keeps nothing.
        layer_name : str, optional
            Named in error messages.

        Returns
        -------
        callable
            Function of a gradient of shape (rows, channels, *space); it works in place and returns the gradient.

        Raises
        ------
        IndexError
            By the function, if the layer has no such channel.
        """
        return _KeepChannels(((batch_id, tuple(as_ids(concept_ids, layer_name))),), layer_name)

    @staticmethod
    def mask_rf(batch_id: int, neuron_ids: Mapping[int, Any], layer_name: str | None = None) -> MaskFn:
        """Keep only single positions of some channels of one row.

        Parameters
        ----------
        batch_id : int
            Row of the gradient.
        neuron_ids : mapping of int to int or sequence of int
            For each channel, the positions to keep, counted in the flattened space.
        layer_name : str, optional
            Named in error messages.

        Returns
        -------
        callable
            Function of a gradient of shape (rows, channels, *space); it works in place and returns the gradient.
        """
        if not isinstance(neuron_ids, Mapping):
            raise TypeError(f"layer {layer_name!r}: mask_rf needs {{channel: positions}}, not {neuron_ids!r}")
        kept = [(as_ids(channel, layer_name), as_ids(at, layer_name)) for channel, at in neuron_ids.items()]

        def mask_fn(grad: Tensor) -> Tensor:
            row = grad[batch_id]
            flat = row.reshape(_channels(grad, layer_name), -1)
            keep = torch.zeros_like(flat, dtype=torch.bool)
            for channel, positions in kept:
                _in_range(channel, flat.shape[0], layer_name)
                keep[channel, _in_range(positions, flat.shape[1], layer_name, "position")] = True
            grad[batch_id] = flat.masked_fill(~keep, 0).reshape(row.shape)
            return grad

        return mask_fn

    def get_rf_indices(self, output_shape: Sequence[int], layer_name: str | None = None) -> Sequence[int] | np.ndarray:
        """Positions of a channel: ``[0]`` for a layer without space."""
        return [0] if len(output_shape) == 1 else np.arange(int(np.prod(output_shape[1:])))

    def attribute(
        self, relevance: Tensor, mask: Tensor | None = None, layer_name: str | None = None, abs_norm: bool = True
    ) -> Tensor:
        """Relevance of every channel, summed in at least float32.

        Parameters
        ----------
        relevance : Tensor of shape (batch, channels, *space), or (channels,) of a single sample
        mask : Tensor, optional
            Multiplied with ``relevance`` first; broadcast to its shape.
        layer_name : str, optional
        abs_norm : bool
            Divide by the sum over channels of the absolute values plus 1e-10, so that they become shares.

        Returns
        -------
        Tensor of shape (batch, channels)
        """
        if isinstance(mask, Tensor):
            relevance = relevance * mask
        if relevance.dim() == 1:
            relevance = relevance[None]
        total = _positions(relevance, layer_name).sum(-1)
        return normalize(total) if abs_norm else total

    def scores(self, relevance: Tensor, layer_name: str | None = None) -> ConceptScores:
        """Sum, maximum and its position for every channel, accumulated in at least float32."""
        if self._ranks_itself() and type(self).scores is ChannelConcept.scores:
            return super().scores(relevance, layer_name)
        return _channel_scores(relevance, layer_name)

    def reference_sampling(
        self,
        relevance: Tensor,
        layer_name: str | None = None,
        max_target: Literal["sum", "max"] | str = "sum",
        abs_norm: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sort the batch by each channel's relevance.

        Parameters
        ----------
        relevance : Tensor of shape (batch, channels, *space)
        layer_name : str, optional
        max_target : {"sum", "max"}
            Rank by the sum or by the largest value among a channel's positions.
        abs_norm : bool
            Rank by shares: divide each sample's values by the sum of their absolute values.

        Returns
        -------
        sample, value, position : Tensors of shape (batch, channels)
            Batch index, value, and position of the maximum, in descending order; ties in the order of the batch.
        """
        if max_target not in ("sum", "max"):
            raise ValueError(f"max_target must be 'sum' or 'max', not {max_target!r}")
        scores = (_channel_scores if self._ranks_itself() else self.scores)(relevance, layer_name)
        value = getattr(scores, max_target)
        if abs_norm:
            value = normalize(value)
        value, order = value.sort(dim=0, descending=True, stable=True)
        return order, value, scores.position.gather(0, order)

    def _ranks_itself(self) -> bool:
        """Whether a subclass has a `reference_sampling` of its own, which may call this one's."""
        return type(self).reference_sampling is not ChannelConcept.reference_sampling


def mask_of(concept: Concept, method: Literal["mask", "mask_rf"] = "mask") -> MaskFactory:
    """Mask factory of a concept, which says itself whether it needs multipliers: a static method does not."""
    make: MaskFactory = getattr(concept, method)
    if not getattr(concept, "needs_multiplier", False):
        return make
    saying: Any = partial(make)
    saying.needs_multiplier = True
    return cast(MaskFactory, saying)


@dataclass(frozen=True)
class _KeepChannels:
    """Mask function that keeps only some channels, of some rows.

    Attributes
    ----------
    kept : tuple of (int, tuple of int)
        Row and channels; a row that is named twice keeps what both name.
    layer_name : str or None
        Named in error messages.
    """

    kept: tuple[tuple[int, tuple[int, ...]], ...]
    layer_name: str | None

    def __call__(self, grad: Tensor) -> Tensor:
        """Mask a gradient of shape (rows, channels, *space), in place."""
        n_channels = _channels(grad, self.layer_name)
        places = {row: place for place, row in enumerate(sorted({row for row, _ in self.kept}))}
        rows = list(places)
        drop = np.zeros((len(rows), n_channels, *[1] * (grad.dim() - 2)), dtype=bool)
        for row, channels in self.kept:
            others = np.ones(n_channels, dtype=bool)
            others[_in_range(channels, n_channels, self.layer_name)] = False
            drop[places[row], others] = True
        dropped = torch.from_numpy(drop).to(grad.device)
        if len(rows) == 1:
            grad[rows[0]].masked_fill_(dropped[0], 0)
        elif rows == list(range(len(grad))):
            grad.masked_fill_(dropped, 0)
        else:
            grad[rows] = grad[rows].masked_fill(dropped, 0)
        return grad

    @staticmethod
    def together(masks: Sequence[_KeepChannels]) -> _KeepChannels:
        """One function that does what several of one layer do one after the other."""
        return _KeepChannels(tuple(kept for mask in masks for kept in mask.kept), masks[0].layer_name)


def _channel_scores(relevance: Tensor, layer_name: str | None) -> ConceptScores:
    flat = _positions(relevance, layer_name)
    if flat.shape[-1] == 1:
        value = flat[..., 0]
        return ConceptScores(value, value, torch.zeros_like(value, dtype=torch.int64))
    if flat.device.type == "cpu":  # torch's argmax on the CPU costs seven times numpy's
        position = torch.from_numpy(flat.detach().numpy().argmax(-1))
    else:
        position = flat.argmax(-1)
    return ConceptScores(flat.sum(-1), flat.gather(-1, position[..., None])[..., 0], position)


def normalize(value: Tensor, stabilizer: float = 1e-10) -> Tensor:
    """Divide by the sum of the absolute values along the last axis; zeros stay zeros, in every dtype.

    Parameters
    ----------
    value : Tensor of shape (..., n)
    stabilizer : float
        Added to the sum; raised to the smallest number of the dtype where it would vanish.

    Returns
    -------
    Tensor of shape (..., n)
    """
    stabilizer = max(stabilizer, torch.finfo(value.dtype).tiny)
    return value / (value.abs().sum(-1, keepdim=True) + stabilizer)


def as_ids(ids: Any, layer_name: str | None = None, what: str = "concept ids") -> list[int]:
    """Ids as a list of int, from an int, a sequence, an array or a tensor.

    Raises
    ------
    TypeError
        If they are anything else, such as a boolean mask; the message names the layer, where it is given.
    """
    listed = ids.reshape(-1).tolist() if isinstance(ids, Tensor | np.ndarray) else ids
    # (What can be read only once would serve one row only.)
    listed = list(listed) if isinstance(listed, Collection) and not isinstance(ids, str | Mapping) else [listed]
    try:
        if any(isinstance(i, bool | np.bool_) for i in listed):
            raise TypeError
        return [operator.index(i) for i in listed]
    except TypeError:
        where = "" if layer_name is None else f"layer {layer_name!r}: "
        raise TypeError(f"{where}{what} must be integers, not {ids!r}") from None


def _channels(tensor: Tensor, layer_name: str | None) -> int:
    if tensor.dim() < 2:
        raise ValueError(f"layer {layer_name!r} gives {tuple(tensor.shape)}; channels need (batch, channel, *space)")
    return tensor.shape[1]


def _positions(relevance: Tensor, layer_name: str | None) -> Tensor:
    _channels(relevance, layer_name)
    relevance = relevance.to(torch.promote_types(relevance.dtype, torch.float32))
    return relevance.reshape(*relevance.shape[:2], -1)


def _in_range(ids: Sequence[int], size: int, layer_name: str | None, what: str = "channel") -> list[int]:
    for i in ids:
        if not -size <= i < size:
            raise IndexError(f"layer {layer_name!r} has {size} {what}s, 0 to {size - 1}; there is no {what} {i}")
    return list(ids)
