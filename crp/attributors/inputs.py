"""One input or several: checked, joined so that they are explained together, and their baselines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from crp.conditions import check_data

#: Each of shape (samples, *input shape).
Inputs: TypeAlias = tuple[Tensor, ...]
OneBaseline: TypeAlias = float | Tensor | np.ndarray | Callable[[Tensor], Tensor] | None
Baseline: TypeAlias = OneBaseline | Sequence[OneBaseline]


def as_inputs(data: Tensor | Sequence[Tensor]) -> Inputs:
    """Inputs of a model as a tuple.

    Raises
    ------
    TypeError
        If one is no floating-point tensor.
    ValueError
        If there is none, one has NaN or infinite values, or they are for different numbers of samples.
    """
    inputs = (data,) if isinstance(data, Tensor) else data
    if not isinstance(inputs, tuple | list) or not inputs:
        raise TypeError(f"data must be a tensor, or a tuple of them for models with several inputs, not {data!r}")
    for tensor in inputs:
        check_data(tensor)
    if len({len(tensor) for tensor in inputs}) > 1:
        raise ValueError(f"the inputs are for {[len(tensor) for tensor in inputs]} samples; these must be equally many")
    return tuple(tensor.detach() for tensor in inputs)


def baselines(given: Baseline, inputs: Inputs) -> Inputs:
    """Baseline of each input, in its shape.

    Parameters
    ----------
    given : number, Tensor, ndarray, callable or None
        One for each input, in a tuple, where there are several; a single one is for all. None is 0. A tensor has the
        input's shape with or without the batch axis, which may be 1; a function of the input returns such a tensor.
    inputs : tuple of Tensor

    Raises
    ------
    ValueError
        If a shape does not fit, or there are not as many as inputs.
    TypeError
        If one is nothing of this kind.
    """
    if isinstance(given, tuple) or (isinstance(given, list) and len(inputs) > 1):
        if len(given) != len(inputs):
            raise ValueError(f"there are {len(given)} baselines for {len(inputs)} inputs; give one for each")
        return tuple(_baseline(one, data) for one, data in zip(given, inputs, strict=True))
    return tuple(_baseline(given, data) for data in inputs)


def _baseline(given: Any, data: Tensor) -> Tensor:
    if callable(given) and not isinstance(given, Tensor):
        given = given(data)
    given = 0.0 if given is None else given
    if isinstance(given, bool) or not isinstance(given, int | float | np.number | np.ndarray | Tensor | list):
        raise TypeError(f"a baseline is a number, a tensor or a function of the data, not {given!r}")
    tensor = torch.as_tensor(given).detach().to(data)
    if not torch.isfinite(tensor).all():
        raise ValueError("the baseline has NaN or infinite values")
    shape = tuple(data.shape)
    if tensor.dim() > 0 and tensor.shape not in (shape, (1, *shape[1:]), shape[1:]):
        raise ValueError(
            f"the baseline has shape {tuple(tensor.shape)} for data of shape {shape}; give a number, one baseline for "
            f"all samples as {shape[1:]} or {(1, *shape[1:])}, or one for each as {shape}"
        )
    return tensor.expand(shape)


def join(inputs: Inputs) -> Tensor:
    """All inputs side by side, (samples, sum of their sizes); a single one stays as it is."""
    return inputs[0] if len(inputs) == 1 else torch.cat([tensor.flatten(1) for tensor in inputs], 1)


def separate(joined: Tensor, like: Inputs) -> Inputs:
    """Undo `join`; rows may be other samples."""
    if len(like) == 1:
        return (joined,)
    parts = torch.split(joined, [tensor[0].numel() for tensor in like], 1)
    return tuple(
        part.reshape(len(part), *tensor.shape[1:]).to(tensor.dtype) for part, tensor in zip(parts, like, strict=True)
    )


@contextmanager
def splitting(model: nn.Module, inputs: Inputs) -> Iterator[None]:
    """Let a model of several inputs take them joined."""
    if len(inputs) == 1:
        yield
        return

    def take_apart(module: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor, ...] | None:
        # (A pass of references through the model has them apart already.)
        return separate(args[0], inputs) if len(args) == 1 else None

    handle = model.register_forward_pre_hook(take_apart)
    try:
        yield
    finally:
        handle.remove()
