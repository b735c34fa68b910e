"""Baselines of one input or several: the values that stand for "this feature is absent"."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn

from crp.concepts.ids import as_numbers
from crp.engine.inputs import Inputs, Tensors
from crp.engine.tokens import Embedded
from crp.errors import InputError, InputTypeError
from crp.layers import unwrap
from crp.wording import shortened

OneBaseline: TypeAlias = float | Tensor | np.ndarray | Callable[[Tensor], Tensor] | None
Baseline: TypeAlias = OneBaseline | Sequence[OneBaseline] | Mapping[str, OneBaseline]


def single_baselines(given: Baseline, inputs: Inputs, model: nn.Module) -> Tensors:
    """The only baseline of each input that is explained, in its shape; as `_all_baselines`.

    Raises
    ------
    ValueError
        If there are several.
    """
    each = _all_baselines(given, inputs, model)
    if len(each[0]) > 1:
        raise InputError(
            f"{len(each[0])} baselines are given, and this method has one; integrated gradients, Shapley values and "
            "DeepLIFT average over several"
        )
    return tuple(of_input[0] for of_input in each)


def _all_baselines(given: Baseline, inputs: Inputs, model: nn.Module) -> Tensors:
    """Baselines of each input that is explained, of shape (baselines, *shape of the input), as views.

    Parameters
    ----------
    given : number, Tensor, ndarray, callable or None
        A single one is for all inputs. A tuple holds one for each that is explained, or for each that there is; a dict
        names them. None is 0. A tensor has the input's shape with or without the batch axis, which may be 1; with one
        more axis in front, it has several baselines, those of several inputs together. A function of the input returns
        such a tensor. Whole numbers for token ids are ids, such as that of padding, whose embeddings are the baseline.
    inputs : Inputs
    model : nn.Module
        It looks up the embeddings of ids.

    Raises
    ------
    ValueError
        If a shape does not fit, or there are not as many as inputs.
    TypeError
        If a baseline is none of these.
    """
    names = inputs.names
    each: list[Any] = [given] * len(names)
    if isinstance(given, Mapping):
        unknown = [name for name in given if name not in names]
        if unknown:
            known = ", ".join(map(repr, names))
            raise InputError(f"there is a baseline for {unknown[0]!r}, which is not explained; {known} are")
        given = tuple(given.get(str(name)) for name in names)
    if isinstance(given, tuple) or (isinstance(given, list) and len(inputs.values) > 1):
        if len(given) == len(inputs.values):
            given = [one for name, one in zip(inputs.values, given, strict=True) if name in names]
        if len(given) != len(names):
            raise InputError(f"there are {len(given)} baselines for {len(names)} inputs; give one for each")
        each = list(given)
    found = [
        _of_ids(one, data, model, inputs.embedded[name].layer, name)
        if name in inputs.embedded and are_ids(one)
        else _of_values(one, data)
        for one, data, name in zip(each, inputs.explained, names, strict=True)
    ]
    numbers = [len(of_input) for of_input in found]
    if len({*numbers} - {1}) > 1:
        raise InputError(f"inputs have {numbers} baselines; give as many for each, as they are taken together, or one")
    return tuple(of_input.expand(max(numbers), *of_input.shape[1:]) for of_input in found)


def are_ids(given: Any) -> TypeGuard[Tensor | np.ndarray | int]:
    """Whether baselines are whole numbers, which for token ids are ids."""
    if isinstance(given, Tensor):
        return not given.is_floating_point() and not given.is_complex() and given.dtype != torch.bool
    return isinstance(given, np.ndarray | int | np.integer) and np.asarray(given).dtype.kind in "iu"


def _of_ids(given: Any, data: Tensor, model: nn.Module, layer: str, name: int | str) -> Tensor:
    """Baselines of embeddings, of shape (baselines, samples, features, *space), from ids."""
    ids = _stacked(torch.as_tensor(given).long(), (len(data), *data.shape[2:]), "token ids")
    own = ids if ids.stride(1) else ids[:, :1]  # (one for all samples is looked up once)
    values = Embedded.of(unwrap(model), layer, own.flatten(0, 1), name).values.to(data)
    return values.reshape(*own.shape[:2], *data.shape[1:]).expand(len(ids), *data.shape)


def _of_values(given: Any, data: Tensor) -> Tensor:
    if callable(given):
        given = given(data)
    given = 0.0 if given is None else given
    if isinstance(given, bool) or not isinstance(given, int | float | np.number | np.ndarray | Tensor | list):
        raise InputTypeError(f"a baseline is a number, a tensor or a function of the data, not {shortened(given)}")
    return _stacked(torch.from_numpy(as_numbers("the baseline", given)).to(data), tuple(data.shape), "data")


def _stacked(given: Tensor, shape: tuple[int, ...], what: str) -> Tensor:
    """View of one baseline, or of several, as (baselines, *shape)."""
    one = shape[1:], (1, *shape[1:])
    if given.dim() == 0 or given.shape in (shape, *one):
        return given.expand(1, *shape)
    if given.dim() > len(shape) and len(given) and given.shape[1:] in (shape, one[1]):
        return given.expand(len(given), *shape)
    raise InputError(
        f"the baseline has shape {tuple(given.shape)} for {what} of shape {shape}; give a number, one baseline for "
        f"all samples as {one[0]} or {one[1]}, one for each as {shape}, or n to average over as "
        f"(n, {', '.join(map(str, one[1]))})"
    )
