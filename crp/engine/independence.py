"""Whether a model predicts each sample by itself, as results are told sample by sample."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from crp.engine.attached import put_on
from crp.engine.inputs import Inputs
from crp.engine.model_state import is_watched
from crp.errors import InputError
from crp.layers import looking, modules_of
from crp.layers.interrupts import atomic
from crp.layers.state import undisturbed
from crp.wording import first_few, percent

#: Deviation of an output, relative to its largest value, up to which it is rounding; that of short numbers, with which
#: GPUs also multiply those of 32 bits.
_TOLERANCE, _SHORT_TOLERANCE = 1e-3, 0.02
#: Models that predict each sample by itself, and those that give the same again, as far as was seen.
_independent: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_keeping_nothing: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def check_independent(model: nn.Module, inputs: Inputs, passes: Iterable[Sequence[int]]) -> None:
    """Raise an `InputError` where what a model puts out for a sample depends on the samples beside it.

    The model is given the first sample between two others, and between two of another kind. That is done once for each
    model, which is left as it was. It is left out where others watch the model run, as their hooks would see calls that
    nobody asked for. Nothing is known of models that draw random numbers or do not take such data, and of outputs whose
    shape is another one for a sample alone, such as tables of similarities.

    Parameters
    ----------
    model : nn.Module
    inputs : Inputs
        On the device of the model.
    passes : iterable of sequence of int
        Samples of each forward pass. Where all have one, nothing needs to be known.
    """
    if model in _independent or all(len(samples) < 2 for samples in passes) or is_watched(model):
        return
    try:
        between = [_between(inputs, factor) for factor in (0.0, 3.0)]
        one, other = (_outputs(model, three, 1) for three in between)
        off, tolerance = _deviation(_like_alone(model, inputs, one), other), _tolerance(inputs)
        is_random = off > tolerance and _is_random(model, between[0], 1)
    except Exception:  # (the model is run to be explained, too, and its error is told there)
        return
    if off <= tolerance or is_random:
        _independent.add(model)
        return
    raise InputError(
        f"what {type(model).__name__} puts out for a sample depends on the samples beside it (by {percent(off)} of the "
        f"largest value){_culprits(model)}; relevance of one would be spread over all. Give one sample at a time, such "
        "as by batch_size=1"
    )


def check_keeps_nothing(model: nn.Module, inputs: Inputs) -> None:
    """Raise an `InputError` where a model puts out something else when it is given the first sample again.

    That is done once for each model, and left out, as in `check_independent`.
    """
    if model in _keeping_nothing or is_watched(model):
        return
    alone, tolerance = inputs.select([0]), _tolerance(inputs)
    try:
        with _looking_at(model):
            off = _deviation(*(_of(alone.run(model), 0, 1) for _ in range(2)))
        is_random = off > tolerance and _is_random(model, alone, 0)
    except Exception:
        return
    if off > tolerance and not is_random:
        raise InputError(
            f"{type(model).__name__} puts out something else when it is given the same sample again (by {percent(off)} "
            "of the largest value): it keeps something of a call for the next one, so that results would depend on the "
            "order of the samples. Let each call start from the same state"
        )
    _keeping_nothing.add(model)


def _between(inputs: Inputs, factor: float) -> Inputs:
    """The first of some samples between two others: its values, or ones for zeros, and at the beginning so many times.

    (Layers that normalize would make the same of one number times all values.)
    """
    threes = []
    for data in inputs.select([0]).explained:
        factors = torch.linspace(factor, 1, data.numel()).view(data.shape).to(data)
        other = data * factors if data.any() else factors
        threes.append(torch.cat([other, data, other]))
    return inputs.having(threes, torch.tensor([0, 0, 0]))


@atomic
def _looking_at(model: nn.Module) -> Iterator[None]:
    """Context in which a model runs, and after which it is as it was."""
    with put_on(None, model), looking(), torch.no_grad(), undisturbed(model, later=model.parameters()):
        yield


def _outputs(model: nn.Module, inputs: Inputs, place: int, later: bool = False) -> list[Tensor]:
    """What a model puts out for one of the samples, by the random numbers that come next, or by ``later`` ones."""
    with _looking_at(model):
        for device in {data.device for data in inputs.explained} if later else ():
            torch.rand(1, device=device)
        return _of(inputs.run(model), place, len(inputs))


def _is_random(model: nn.Module, inputs: Inputs, place: int) -> bool:
    """Whether other random numbers give another output."""
    return _deviation(*(_outputs(model, inputs, place, later) for later in (False, True))) > _tolerance(inputs) / 100


def _like_alone(model: nn.Module, inputs: Inputs, outputs: list[Tensor]) -> list[Tensor]:
    """Outputs for the first of some samples; empty ones in place of those of another shape for that sample alone."""
    try:
        alone = _outputs(model, inputs.select([0]), 0)
    except Exception:  # (such as that of batch norm that needs several samples)
        return outputs
    pairs = zip(outputs, alone, strict=True)
    return [output if output.shape == single.shape else output.new_empty(0) for output, single in pairs]


def _of(returned: Any, place: int | None, n_samples: int) -> list[Tensor]:
    """Tensors that a model has returned for one of its samples; empty ones where that cannot be told.

    Samples have a row of a tensor each, or an entry of a list, of which all (``place`` is None) is theirs.
    """
    if isinstance(returned, Tensor):
        if place is None:
            return [returned]
        return [returned[place] if returned.dim() and len(returned) == n_samples else returned.new_empty(0)]
    if isinstance(returned, list) and place is not None and len(returned) == n_samples:
        return _of(returned[place], None, n_samples)
    entries = list(returned.values()) if isinstance(returned, Mapping) else returned
    return [t for entry in entries for t in _of(entry, place, n_samples)] if isinstance(entries, tuple | list) else []


def _deviation(outputs: list[Tensor], others: list[Tensor]) -> float:
    """Largest deviation of tensors of equal shape, relative to the largest value; infinite where one is not finite."""
    deviations = [0.0]
    for output, other in zip(outputs, others, strict=False):
        if output.shape != other.shape or not output.is_floating_point():
            continue
        is_finite = torch.isfinite(output)
        if is_finite.any():
            output, other = output[is_finite], other[is_finite]
            largest = torch.maximum(output.abs().max(), other.abs().max()).clamp(min=torch.finfo(output.dtype).tiny)
            deviations.append(float((output - other).abs().max() / largest))
    return max(math.inf if math.isnan(deviation) else deviation for deviation in deviations)


def _tolerance(inputs: Inputs) -> float:
    data = inputs.explained[0]
    is_short = data.element_size() < (8 if data.is_cuda else 4) or torch.is_autocast_enabled(data.device.type)
    return _SHORT_TOLERANCE if is_short else _TOLERANCE


def _culprits(model: nn.Module) -> str:
    """Layers that are known to mix samples, as a message goes on with them."""
    norms = {name: module for name, module in modules_of(model).items() if isinstance(module, _BatchNorm)}
    names = [repr(name) for name, norm in norms.items() if norm.running_mean is None]
    return f", as {first_few(names, 3, 'layers')} normalizes by the batch (no running statistics)" if names else ""
