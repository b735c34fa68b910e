"""What is said where a model cannot take what it is called with: the layer that refused it, and the remedy."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from crp.errors import CRPError, InputError, InputTypeError, OutOfRangeError
from crp.layers import modules_of
from crp.notices import kind_of


@contextmanager
def telling_misfits(model: object, explained: Iterable[Tensor], arguments: Mapping[int | str, Any]) -> Iterator[None]:
    """Context in which the error of a model that cannot take its data is told in our words, where they are known.

    Parameters
    ----------
    model : callable
    explained : iterable of Tensor
        The data.
    arguments : mapping of int or str to Any
        What the model is called with, by position or name.
    """
    try:
        yield
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
        known = isinstance(error, CRPError)
        problem = None if known else _misfit(error, model, explained, arguments) or _lone_text(error, arguments)
        if problem is None:
            raise
        raise problem from error


def _misfit(
    error: BaseException, model: object, explained: Iterable[Tensor], arguments: Mapping[int | str, Any]
) -> InputError | InputTypeError | OutOfRangeError | None:
    """What is wrong with data that a model cannot take, by the layer that raised the error; None if that is unknown."""
    if isinstance(error, TypeError) and (wrong := _wrong_arguments(model, arguments)):
        return InputTypeError(wrong)
    has_decoder = takes_decoder_ids(model) and not any(str(name).startswith("decoder_") for name in arguments)
    if isinstance(error, ValueError) and "inputs_embeds" in str(error) and has_decoder:
        return InputTypeError(
            "the model has a decoder, and the data have no 'decoder_input_ids' (texts that are mined never have; mine "
            f"its encoder, or a model around it that adds them): {error}"
        )
    found = _layer_of(error.__traceback__)
    shapes = " and ".join(f"{tuple(tensor.shape)} ({tensor.dtype})" for tensor in explained)
    if found is None:
        return None
    layer, given = found
    known = modules_of(model) if isinstance(model, nn.Module) else {}
    name = next((name for name, module in known.items() if module is layer), "")
    where = f"layer {name!r} ({type(layer).__name__})"
    if not isinstance(given, Tensor):
        kinds = ", ".join(f"{key!r} is {kind_of(value)}" for key, value in arguments.items())
        return InputTypeError(f"{where} gets {kind_of(given)} in place of a tensor; of the inputs, {kinds}")
    weight = getattr(layer, "weight", None)
    if isinstance(weight, Tensor) and weight.dtype != given.dtype and _size_of(layer)[1] is not None:
        other = f" or model.to({given.dtype})" if given.is_floating_point() else ""
        return InputError(
            f"{where} has weights of {weight.dtype} and gets {given.dtype}, for data of shape {shapes}: convert one, "
            f"as by data.to({weight.dtype}){other}"
        )
    if isinstance(weight, Tensor) and weight.device != given.device:
        return InputError(f"{where} is on {weight.device} and gets a tensor on {given.device}; move the whole model")
    if isinstance(layer, nn.Embedding) and given.is_floating_point():
        return InputTypeError(f"{where} looks up numbers of tokens, integers, and gets {given.dtype}: give ids.long()")
    if isinstance(layer, nn.Embedding) and len(unknown := unknown_ids(given, layer)):
        return OutOfRangeError(
            f"{where} has embeddings of the numbers 0 to {layer.num_embeddings - 1} and gets {int(unknown[0])}, for "
            f"data of shape {shapes}"
        )
    (axis, size), space = _size_of(layer), _space_of(layer)
    if space is not None and given.dim() != space + 2:
        return InputError(
            f"{where} takes (samples, {size} channels, {space} axes of space) and gets {tuple(given.shape)}, for data "
            f"of shape {shapes}; the first axis of data must be that of the samples: data[None] for a single one"
        )
    if size is not None and (given.dim() <= abs(axis) - (axis < 0) or given.shape[axis] != size):
        what = "channels" if axis == 1 else "features"
        is_last = axis == 1 and given.dim() > 2 and given.shape[-1] == size
        remedy = (
            "its channels seem to be on the last axis: give data.movedim(-1, 1)" if is_last else
            "give data as the model was made for, with the samples on the first axis (data[None] for a single one)"
        )  # fmt: skip
        return InputError(
            f"{where} takes {size} {what} and gets a tensor of shape {tuple(given.shape)}, for data of shape {shapes}; "
            f"{remedy}"
        )
    return None


def _lone_text(error: BaseException, arguments: Mapping[int | str, Any]) -> InputError | None:
    """What is wrong where all that a model gets are ids without an axis of samples."""
    tensors = [value for value in arguments.values() if isinstance(value, Tensor)]
    if not tensors or any(value.dim() != 1 or value.is_floating_point() for value in tensors):
        return None
    return InputError(
        f"the model cannot take ids of shape {tuple(tensors[0].shape)}, which are one for each sample: give ids[None] "
        f"for a single text ({error})"
    )


def unknown_ids(ids: Tensor, layer: nn.Embedding) -> Tensor:
    """Those of some ids that have no embedding."""
    return ids[(ids < 0) | (ids >= layer.num_embeddings)]


def takes_decoder_ids(model: object) -> bool:
    """Whether a model of Hugging Face takes the ids of its decoder, too."""
    config, forward = getattr(model, "config", None), getattr(model, "forward", None)
    is_of_both = bool(getattr(config, "is_encoder_decoder", False))
    return is_of_both and "decoder_input_ids" in inspect.signature(forward).parameters  # type: ignore[arg-type]


def _wrong_arguments(model: object, arguments: Mapping[int | str, Any]) -> str | None:
    """What does not go with the arguments that a model takes."""
    forward = getattr(model, "forward", None)
    positional = [value for name, value in arguments.items() if isinstance(name, int)]
    named = {name: value for name, value in arguments.items() if isinstance(name, str)}
    try:
        signature = inspect.signature(forward)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    try:
        signature.bind(*positional, **named)
    except TypeError as error:
        return f"the model takes {signature}, and the data do not fit that: {error}"
    return None


def _layer_of(traceback: TracebackType | None) -> tuple[nn.Module, Any] | None:
    """Innermost layer in which an error was raised, and its input; one that is no tensor is told of torch's layers."""
    found = None
    while traceback is not None:
        names = traceback.tb_frame.f_locals
        layer, arguments = names.get("self"), names.get("args")
        given = names["input"] if "input" in names else arguments[0] if arguments else None
        is_of_torch = type(layer).__module__.startswith("torch.nn")
        is_known = "input" in names if isinstance(given, Tensor) else is_of_torch and ("input" in names or arguments)
        if isinstance(layer, nn.Module) and is_known:
            found = layer, given
        traceback = traceback.tb_next
    return found


def _size_of(layer: nn.Module) -> tuple[int, int | None]:
    """Axis of channels or features that a layer reads, and their number."""
    for attribute, axis in (("in_channels", 1), ("num_features", 1), ("in_features", -1)):
        size = getattr(layer, attribute, None)
        if isinstance(size, int):
            return axis, size
    return 1, None


def _space_of(layer: nn.Module) -> int | None:
    kinds = {1: nn.Conv1d | nn.ConvTranspose1d, 2: nn.Conv2d | nn.ConvTranspose2d, 3: nn.Conv3d | nn.ConvTranspose3d}
    return next((n for n, kind in kinds.items() if isinstance(layer, kind)), None)
