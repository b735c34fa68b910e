"""Channels as concepts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from crp.concepts.base import Concept
from crp.concepts.ids import as_ids, in_range
from crp.concepts.scores import channels_in
from crp.errors import InputTypeError
from crp.layers.devices import send_to
from crp.types import MaskFn


class ChannelConcept(Concept):
    """Every channel (axis 1) of a layer's output is a concept; its positions are the remaining axes, flattened.

    For outputs of shape (batch, channel, *space) and (batch, channel). Channels of tokens, (batch, token, channel), are
    `AxisConcept(-1)`, as axis 1 is that of the tokens.
    """

    noun = "channel"

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
            raise InputTypeError(f"layer {layer_name!r}: mask_rf needs {{channel: positions}}, not {neuron_ids!r}")
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
