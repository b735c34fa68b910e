"""Concept ids, axes and vectors, in every form that users write them in."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from crp.errors import InputError, InputTypeError, OutOfRangeError
from crp.notices import kind_of
from crp.values import check_form
from crp.wording import shortened


def as_ids(ids: Any, layer_name: str | None = None, what: str = "concept ids") -> list[int]:
    """Ids as a list of int, from an int, a sequence, an array or a tensor.

    Raises
    ------
    TypeError
        If they are anything else, such as a boolean mask; the message names the layer, where it is given.
    """
    if isinstance(ids, Tensor):
        check_form(ids, what)
    listed = ids.reshape(-1).tolist() if isinstance(ids, Tensor | np.ndarray) else ids
    # (an iterator could be read for one row only, so that only collections are ids)
    listed = list(listed) if isinstance(listed, Collection) and not isinstance(ids, str | bytes | Mapping) else [listed]
    try:
        if any(isinstance(i, bool | np.bool_) for i in listed):
            raise TypeError
        return [operator.index(i) for i in listed]
    except TypeError:
        where = "" if layer_name is None else f"layer {layer_name!r}: "
        raise InputTypeError(f"{where}{what} must be integers, not {shortened(ids)}") from None


def in_range(ids: Sequence[int], size: int, layer_name: str | None, what: str = "channel") -> list[int]:
    """The ids themselves; an error that names the layer where one of them is not in range."""
    for i in ids:
        if not -size <= i < size:
            owner = "the layer" if layer_name is None else f"layer {layer_name!r}"
            raise OutOfRangeError(f"{owner} has {size} {what}s, 0 to {size - 1}; there is no {what} {i}")
    return list(ids)


def check_axis(axis: object) -> None:
    """Raise a `ValueError` if an axis of a layer's output is no whole number, or 0, which is that of the samples."""
    if isinstance(axis, bool) or not isinstance(axis, int) or axis == 0:
        raise InputError(
            f"axis must be a whole number, and not 0, that of the samples: 1, or -1 for tokens; not {axis!r}"
        )


def _masked(relevance: Any, mask: object) -> Tensor:
    """Relevance of a layer, times a mask where there is one.

    Raises
    ------
    TypeError, ValueError
        If one is no tensor, or the mask does not broadcast to the relevance.
    """
    if not isinstance(relevance, Tensor):
        raise InputTypeError(
            "relevance must be the tensor of one layer, such as result.relevances['features.40'], not "
            f"{kind_of(relevance)}"
        )
    if mask is None:
        return relevance
    if not isinstance(mask, Tensor):
        raise InputTypeError(f"mask must be a tensor, or None, not {shortened(mask)}")
    try:
        mask = mask.expand(relevance.shape)
    except RuntimeError:
        shapes = f"{tuple(mask.shape)}, which does not broadcast to the relevance's {tuple(relevance.shape)}"
        raise InputError(f"mask has the shape {shapes}") from None
    return relevance * mask


def check_alike(activation: Tensor, multiplier: Tensor) -> None:
    """Raise a `ValueError` if the multipliers are not those of an activation."""
    if activation.shape != multiplier.shape:
        shapes = f"{tuple(activation.shape)} and multiplier of {tuple(multiplier.shape)}"
        raise InputError(f"activation is of shape {shapes}; they belong together")


def as_numbers(name: str, value: Any) -> NDArray[np.float64]:
    """Real and finite numbers of any shape, in float64.

    Raises
    ------
    TypeError, ValueError
        If they are anything else.
    """
    if isinstance(value, Tensor):
        check_form(value, name)
        value = value.detach().cpu()
        value = value.double() if value.is_floating_point() else value
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError):  # (rows of different lengths, tensors of another device in a list)
        array = np.asarray(None)
    if array.dtype.kind not in "buif":
        raise InputTypeError(f"{name} must be real numbers, not of {array.dtype}")
    if not np.isfinite(array).all():
        raise InputError(f"{name} must be finite, without NaN or infinite values")
    return array.astype(np.float64)


def as_direction(value: Any) -> NDArray[np.float64]:
    """A vector other than 0.

    Raises
    ------
    TypeError, ValueError
        If it is anything else.
    """
    vector = as_numbers("direction", value).reshape(-1)
    if not vector.any():
        raise InputError("direction must be a vector other than 0")
    return vector
