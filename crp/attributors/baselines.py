"""Baselines of one input or several: the values that stand for "this feature is absent"."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from crp.concepts.ids import as_numbers
from crp.engine.inputs import Inputs, Tensors
from crp.errors import InputError, InputTypeError
from crp.wording import shortened

OneBaseline: TypeAlias = float | Tensor | np.ndarray | Callable[[Tensor], Tensor] | None
Baseline: TypeAlias = OneBaseline | Sequence[OneBaseline] | Mapping[str, OneBaseline]


def _baselines(given: Baseline, inputs: Inputs) -> Tensors:
    """Baseline of each input that is explained, in its shape.

    Parameters
    ----------
    given : number, Tensor, ndarray, callable or None
        A single one is for all inputs. A tuple holds one for each that is explained, or for each that there is; a dict
        names them. None is 0. A tensor has the input's shape with or without the batch axis, which may be 1; a function
        of the input returns such a tensor.
    inputs : Inputs

    Raises
    ------
    ValueError
        If a shape does not fit, or there are not as many as inputs.
    TypeError
        If a baseline is none of these.
    """
    explained = inputs.explained
    if isinstance(given, Mapping):
        unknown = [name for name in given if name not in inputs.names]
        if unknown:
            known = ", ".join(map(repr, inputs.names))
            raise InputError(f"there is a baseline for {unknown[0]!r}, which is not explained; {known} are")
        given = tuple(given.get(str(name)) for name in inputs.names)
    if isinstance(given, tuple) or (isinstance(given, list) and len(inputs.values) > 1):
        if len(given) == len(inputs.values):
            given = [one for name, one in zip(inputs.values, given, strict=True) if name in inputs.names]
        if len(given) != len(explained):
            raise InputError(f"there are {len(given)} baselines for {len(explained)} inputs; give one for each")
        return tuple(_baseline(one, data) for one, data in zip(given, explained, strict=True))
    return tuple(_baseline(given, data) for data in explained)


def _baseline(given: Any, data: Tensor) -> Tensor:
    if callable(given):
        given = given(data)
    given = 0.0 if given is None else given
    if isinstance(given, bool) or not isinstance(given, int | float | np.number | np.ndarray | Tensor | list):
        raise InputTypeError(f"a baseline is a number, a tensor or a function of the data, not {shortened(given)}")
    tensor = torch.from_numpy(as_numbers("the baseline", given)).to(data)
    shape = tuple(data.shape)
    if tensor.dim() > 0 and tensor.shape not in (shape, (1, *shape[1:]), shape[1:]):
        raise InputError(
            f"the baseline has shape {tuple(tensor.shape)} for data of shape {shape}; give a number, one baseline for "
            f"all samples as {shape[1:]} or {(1, *shape[1:])}, or one for each as {shape}"
        )
    return tensor.expand(shape)
