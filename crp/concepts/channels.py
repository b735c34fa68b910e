"""Channels as concepts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from crp.concepts.base import Concept
from crp.concepts.ids import as_ids, in_range
from crp.concepts.scores import ConceptScores, by_position, channels_in, normalize, scores_of
from crp.devices import send_to
from crp.types import MaskFn


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
            flat = row.reshape(channels_in(grad, layer_name), -1)
            keep = torch.zeros_like(flat, dtype=torch.bool)
            for channel, positions in kept:
                in_range(channel, flat.shape[0], layer_name)
                keep[channel, in_range(positions, flat.shape[1], layer_name, "position")] = True
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
        total = by_position(relevance, layer_name).sum(-1)
        return normalize(total) if abs_norm else total

    def scores(self, relevance: Tensor, layer_name: str | None = None) -> ConceptScores:
        """Sum, maximum and its position for every channel, accumulated in at least float32."""
        if self._ranks_itself() and type(self).scores is ChannelConcept.scores:
            return super().scores(relevance, layer_name)
        return scores_of(relevance, layer_name)

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
        scores = (scores_of if self._ranks_itself() else self.scores)(relevance, layer_name)
        value = getattr(scores, max_target)
        if abs_norm:
            value = normalize(value)
        value, order = value.sort(dim=0, descending=True, stable=True)
        return order, value, scores.position.gather(0, order)

    def _ranks_itself(self) -> bool:
        """Whether a subclass has a `reference_sampling` of its own, which may call this one's."""
        return type(self).reference_sampling is not ChannelConcept.reference_sampling


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

    #: A mask of this kind says for each row and channel whether it is kept, and nothing else.
    selects_channels: ClassVar[bool] = True

    kept: tuple[tuple[int, tuple[int, ...]], ...]
    layer_name: str | None

    def __call__(self, grad: Tensor) -> Tensor:
        """Mask a gradient of shape (rows, channels, *space), in place."""
        n_channels = channels_in(grad, self.layer_name)
        places = {row: place for place, row in enumerate(sorted({row for row, _ in self.kept}))}
        rows = list(places)
        drop = np.zeros((len(rows), n_channels, *[1] * (grad.dim() - 2)), dtype=bool)
        for row, channels in self.kept:
            others = np.ones(n_channels, dtype=bool)
            others[in_range(channels, n_channels, self.layer_name)] = False
            drop[places[row], others] = True
        dropped = send_to(grad.device, torch.from_numpy(drop))
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
