"""Whether a model predicts each sample by itself, and the same again, as results are told sample by sample."""

from __future__ import annotations

import math
import random
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from crp.engine.attached import put_on
from crp.engine.inputs import Inputs
from crp.engine.model_state import State, is_traced
from crp.engine.module_hooks import _changed_hooks, _OfOtherThreads
from crp.errors import InputError
from crp.layers import looking, modules_of, nesting_encoders
from crp.layers.devices import device_of
from crp.layers.interrupts import atomic
from crp.layers.state import GENERATORS, Snapshot, random_numbers, undisturbed
from crp.notices import warn
from crp.wording import first_few, percent

#: Deviation of an output, relative to its largest value, by which kernels may differ; with short numbers, by which GPUs
#: also multiply those of 32 bits, it is larger.
_TOLERANCE, _SHORT_TOLERANCE = 1e-3, 0.02
#: Models that predict each sample by itself, and those that give the same again, as far as was seen.
_independent: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_keeping_nothing: weakref.WeakSet[nn.Module] = weakref.WeakSet()
#: Models whose first call was looked at.
_looked_at: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class FirstLook:
    """Look at a model before and after some forward passes; most of it is done once for each model.

    Attributes
    ----------
    is_first : bool
        Whether nobody has looked at the model before.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self.is_first = model, model not in _looked_at
        self._states = random_numbers([device_of(model)]) if self.is_first else []

    def check(self, inputs: Inputs, passes: Iterator[Sequence[int]], select: Callable[[Any], Any]) -> None:
        """Check what the model did for these samples; as `check_independent`, and whether it would do so again."""
        model, first = self._model, next(passes)
        check_independent(model, inputs, chain([first], passes), select)
        if not self.is_first or model in _looked_at or is_traced():
            return
        has_drawn = not all(map(np.array_equal, self._states, random_numbers([device_of(model)])))
        may_draw = has_drawn or State(model).leads_to(GENERATORS)
        if may_draw and _depends_on_draws(model, inputs.select([0])):
            _warn_of_draws(model)
        _check_padding(model, inputs.select(list(first)), select)
        _looked_at.add(model)


def check_independent(
    model: nn.Module,
    inputs: Inputs,
    passes: Iterable[Sequence[int]],
    select: Callable[[Any], Any] = lambda returned: returned,
) -> None:
    """Raise an `InputError` where what a model puts out for a sample depends on the samples beside it.

    The model is given the first sample among three others, or as many as there are, and among others of another kind.
    That is done once for each model, which is left as it was; where it has outputs of both kinds, at each call for the
    one that is explained. A user's hooks see nothing of it, as nobody asked for these calls; what they change in the
    model is not looked at. It is left out where modes of torch see each operation. Nothing is known of models that do
    not take such data, and of those that draw random numbers, of which a warning tells.

    Parameters
    ----------
    model : nn.Module
    inputs : Inputs
        On the device of the model.
    passes : iterable of sequence of int
        Samples of each forward pass. Where all have one, nothing needs to be known.
    select : callable
        Takes what is explained from what the model returns.
    """
    if model in _independent or all(len(samples) < 2 for samples in passes) or is_traced():
        return
    off: float | None = None
    # (a model of one graph, whose nodes are taken for samples, takes no other number than theirs; where samples are
    # along another axis, only as many as there are give an output for each)
    for number in (4, len(inputs)):
        with suppress(Exception):  # (the model is run to be explained, too, and its error is told there)
            off = _mixes(model, inputs, select, number)
            if off is not None:
                break
    if not off:
        return
    raise InputError(
        f"what {type(model).__name__} puts out for a sample depends on the samples beside it (by {percent(off)} of the "
        f"largest value){_culprits(model)}; relevance of one would be spread over all. Samples are along the first "
        "axis. Give one at a time, such as by batch_size=1; the nodes of a graph are one"
    )


def _mixes(model: nn.Module, inputs: Inputs, select: Callable[[Any], Any], number: int) -> float | None:
    """Deviation of what is explained of a sample among so many; 0 where it is rounding, or by random numbers.

    None where what is explained has no row for each.
    """
    batches = [_among_others(inputs, factor, number) for factor in (0.0, 3.0)]
    pair = [_run(model, batch, later) for batch, later in zip(batches, (False, True), strict=True)]
    rows, tolerance = [_row(returned, 1, number) for returned in pair], _tolerance(inputs)
    is_told = any(tensor.numel() for tensor in rows[0])
    if (is_told or number == len(inputs)) and _deviation(*rows) <= tolerance:
        _independent.add(model)
        return 0.0
    rows = [_row(select(returned), 1, number) for returned in pair]
    if not any(tensor.numel() for tensor in rows[0]):
        return None
    off = _deviation(*rows)
    if off > tolerance and _depends_on_draws(model, batches[0]):
        _independent.add(model)
        _warn_of_draws(model)
        return 0.0
    return off if off > tolerance else 0.0


def check_keeps_nothing(model: nn.Module, inputs: Inputs) -> None:
    """Raise an `InputError` where a model puts out something else when it is given the first sample again.

    That is done once for each model, and left out, as in `check_independent`.
    """
    if model in _keeping_nothing or is_traced():
        return
    alone, tolerance = inputs.select([0]), _tolerance(inputs)
    try:
        with _looking_at(model):
            off = _deviation(*(_row(alone.run(model), 0, 1) for _ in range(2)))
        is_random = off > tolerance and _depends_on_draws(model, alone)
    except Exception:
        return
    if off > tolerance and not is_random:
        raise InputError(
            f"{type(model).__name__} puts out something else when it is given the same sample again (by {percent(off)} "
            "of the largest value): it keeps something of a call for the next one, so that results would depend on the "
            "order of the samples. Let each call start from the same state"
        )
    _keeping_nothing.add(model)
    if is_random:
        _warn_of_draws(model)


def _warn_of_draws(model: nn.Module) -> None:
    _looked_at.add(model)
    warn(
        f"{type(model).__name__} puts out something else of the same data at another call, as by random numbers in "
        "evaluation mode: each call explains another prediction. Take them out, such as a dropout that is always on, "
        "or average over calls"
    )


def _check_padding(model: nn.Module, inputs: Inputs, select: Callable[[Any], Any]) -> None:
    """Warn where what is explained is another output than without gradients.

    `nn.TransformerEncoder` then makes zeros of padded positions, which matters where they are read by what follows.
    """
    modules = modules_of(model)
    encoders = nesting_encoders(modules.values())
    if not encoders:
        return
    try:
        pair = [_run(model, inputs, nesting=nesting) for nesting in ((), encoders)]
        off = _deviation(*(_row(select(returned), None, 0) for returned in pair))
    except Exception:
        return
    if off > _tolerance(inputs):
        names = [repr(name) for name, module in modules.items() if module in encoders]
        warn(
            f"{type(model).__name__} predicts something else without gradients (by {percent(off)} of the largest "
            f"value), where {first_few(names, 3)} makes zeros of padded positions. It is explained as with gradients, "
            "and in training. Leave padding out of what follows, or give nn.TransformerEncoder "
            "enable_nested_tensor=False"
        )


def _among_others(inputs: Inputs, factor: float, number: int) -> Inputs:
    """So many samples: the second is the first of those given, and the others are of another kind.

    These are that sample times factors that go from ``factor`` to 1 over its values, or the factors themselves where
    it is 0 everywhere. One factor for all values would not do: layers that normalize make the same of it. A model that
    turns the order of four samples round puts one of the others in the place of the second.
    """
    batches = []
    for data in inputs.select([0]).explained:
        factors = torch.linspace(factor, 1, data.numel()).view(data.shape).to(data)
        other = data * factors if data.any() else factors
        batches.append(torch.cat([other, data, *[other] * (number - 2)]))
    return inputs.having(batches, torch.zeros(number, dtype=torch.int64))


@atomic
def _looking_at(model: nn.Module) -> Iterator[Snapshot]:
    """Context in which a model runs unseen by hooks that are not its own, and after which it is as it was."""
    as_it_was, nothing_told = undisturbed(model, later=model.parameters()), lambda _: None  # (told where it explains)
    with put_on(None, model, nothing_told), looking(), torch.no_grad(), as_it_was as snapshot:
        modules = modules_of(model).values()
        parts = set(map(id, modules))

        def silent(hook: Callable[..., Any]) -> Callable[..., Any]:
            return hook if id(getattr(hook, "__self__", None)) in parts else _OfOtherThreads(hook)

        with _changed_hooks(modules, silent):
            yield snapshot


def _run(model: nn.Module, inputs: Inputs, later: bool = False, nesting: Iterable[nn.TransformerEncoder] = ()) -> Any:
    """What a model returns, by the random numbers that come next, or by ``later`` ones; and where encoders nest."""
    with _looking_at(model) as snapshot:
        if later:
            for device in {data.device for data in inputs.explained}:
                torch.rand(1, device=device)
            for generator in (random, np.random, *snapshot.generators):
                if isinstance(generator, torch.Generator):
                    torch.rand(1, generator=generator, device=generator.device)
                else:
                    generator.random()
        for encoder in nesting:  # (which is put back with all else)
            encoder.use_nested_tensor = True
        return inputs.run(model)


def _depends_on_draws(model: nn.Module, inputs: Inputs) -> bool:
    """Whether another call, with other random numbers, gives another output."""
    try:
        pair = [_run(model, inputs, later) for later in (False, True)]
    except Exception:
        return False
    return _deviation(*(_row(returned, 0, len(inputs)) for returned in pair)) > _tolerance(inputs) / 100


def _row(returned: Any, place: int | None, n_samples: int) -> list[Tensor]:
    """Tensors that a model has returned for one of its samples; empty ones where that cannot be told.

    Samples have a row of a tensor each, or an entry of a list, of which all (``place`` is None) is theirs.
    """
    if isinstance(returned, Tensor):
        if place is None:
            return [returned]
        return [returned[place] if returned.dim() and len(returned) == n_samples else returned.new_empty(0)]
    if isinstance(returned, list) and place is not None and len(returned) == n_samples:
        return _row(returned[place], None, n_samples)
    entries = list(returned.values()) if isinstance(returned, Mapping) else returned
    return [t for entry in entries for t in _row(entry, place, n_samples)] if isinstance(entries, tuple | list) else []


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
    """Deviation of an output that is rounding, for data of this type on this device."""
    data = inputs.explained[0]
    is_short = data.element_size() < (8 if data.is_cuda else 4) or torch.is_autocast_enabled(data.device.type)
    return _SHORT_TOLERANCE if is_short else _TOLERANCE


def _culprits(model: nn.Module) -> str:
    """Layers that are known to mix samples, as a message goes on with them."""
    norms = {name: module for name, module in modules_of(model).items() if isinstance(module, _BatchNorm)}
    names = [repr(name) for name, norm in norms.items() if norm.running_mean is None]
    return f", as {first_few(names, 3, 'layers')} normalizes by the batch (no running statistics)" if names else ""
