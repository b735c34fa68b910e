"""Scores of concepts, from their values at every position."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from crp.concepts.fused import fused_scores
from crp.errors import InputError
from crp.kinds import check_kind
from crp.layers.devices import is_recording

#: Positions from which numpy's argmax on a CPU is vectorised, and several times as fast as torch's, which has threads.
_VECTORIZED = 64


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


def scores_of(values: Tensor, layer_name: str | None = None) -> ConceptScores:
    """Sum, maximum and its position of each concept.

    Parameters
    ----------
    values : Tensor of shape (batch, concepts, *positions)
    layer_name : str, optional
        Named in error messages.
    """
    channels_in(values, layer_name)
    if (found := fused_scores(_flat(values))) is not None:
        return ConceptScores(*found)
    flat = by_position(values, layer_name)
    if flat.shape[-1] == 1:
        value = flat[..., 0]
        return ConceptScores(value, value, torch.zeros_like(value, dtype=torch.int64))
    if flat.device.type == "cpu" and flat.shape[-1] >= _VECTORIZED and not is_recording():
        position = torch.from_numpy(flat.detach().numpy().argmax(-1))
    else:
        position = flat.argmax(-1)
    return ConceptScores(flat.sum(-1), flat.gather(-1, position.unsqueeze(-1)).squeeze(-1), position)


def normalize(value: Tensor) -> Tensor:
    """Shares: values divided by the sum of their absolute values along the last axis; zeros stay zeros.

    As in zennit-crp, 1e-10 is added to the sum, which ranks equal shares by their size; but at most a millionth of it.

    Parameters
    ----------
    value : Tensor of shape (..., n)

    Returns
    -------
    Tensor of shape (..., n)
    """
    check_kind("value", value, Tensor, "a tensor")
    total = value.abs().sum(-1, keepdim=True)
    return value / (total + (1e-6 * total).clamp(max=1e-10).clamp(min=torch.finfo(value.dtype).tiny))


def by_position(values: Tensor, layer_name: str | None) -> Tensor:
    """Values of shape (batch, concepts, positions), in at least float32."""
    channels_in(values, layer_name)
    return _flat(values.to(torch.promote_types(values.dtype, torch.float32)))


def _flat(values: Tensor) -> Tensor:
    """Values of shape (batch, concepts, positions), of no samples, too."""
    return values.flatten(2) if values.dim() > 2 else values[..., None]


def channels_in(tensor: Tensor, layer_name: str | None) -> int:
    """Length of axis 1."""
    check_kind(f"what layer {layer_name!r} gives", tensor, Tensor, "a tensor")
    if tensor.dim() < 2:
        raise InputError(f"layer {layer_name!r} gives {tuple(tensor.shape)}; channels need (batch, channel, *space)")
    return tensor.shape[1]
