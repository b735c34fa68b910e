"""Operations of the forward pass on a reference input, to compare with those of the pass on the data."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from numbers import Number
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from crp.errors import StateError
from crp.layers.interrupts import atomic
from crp.layers.nested import changed
from crp.layers.state import version_of
from crp.rules.deeplift import same_values
from crp.rules.layer import Layer
from crp.rules.operation import Operation


class _Constants:
    """What a call reads beside what depends on the model's input: tensors, numbers and words, in their order.

    Parameters
    ----------
    call : Operation or Layer
    """

    def __init__(self, call: Operation | Layer) -> None:
        read = call.args[:1] if call.known.reads_first else (call.args, call.kwargs)
        self.name, self.shape = call.known.name, next((tensor.shape for tensor in call.inputs), None)
        self.values = list(_constants_in(read, {id(tensor) for tensor in call.inputs}))
        if isinstance(call, Operation) and call.overwrites:
            self.values = [value.clone() if isinstance(value, Tensor) else value for value in self.values]
        self._versions = [version_of(value) if isinstance(value, Tensor) else None for value in self.values]
        # (not holding weights, which may be loaded for each call)
        self.values = [weakref.ref(value) if isinstance(value, nn.Parameter) else value for value in self.values]

    def are_those_of(self, other: _Constants) -> bool:
        """Whether both are of the same function, and have not changed, as far as that can be known."""
        is_same = self.name == other.name and len(self.values) == len(other.values)
        return is_same and all(map(partial(self._is_same, other.shape), self.values, other.values, self._versions))

    def _is_same(self, shape: torch.Size | None, value0: Any, value: Any, version: int | None) -> bool:
        value0, value = (one() if isinstance(one, weakref.ref) else one for one in (value0, value))
        if value is value0 or value0 is None:
            return True
        if isinstance(value, Tensor) and isinstance(value0, Tensor):
            is_known = value.shape == value0.shape and version_of(value0) == version
            return not is_known or same_values(value, value0)
        # (a whole number may be that of the samples, of which there may be fewer)
        return type(value) is type(value0) and (value == value0 or (type(value) is int and shape != self.shape))


class _ReferenceCalls:
    """Calls in the order in which the model's pass on the data will meet them.

    Attributes
    ----------
    is_recording : bool
        Whether the model runs on the reference now.
    is_on : bool
        Whether it does, or has, and calls are to be compared.
    """

    def __init__(self) -> None:
        self.is_recording = self.is_on = False
        self._calls: list[tuple[Layer, _Constants]] = []
        self._without_rule: list[_Constants] = []

    @atomic
    def recording(self) -> Iterator[None]:
        """Context in which the model runs on the reference; nothing is kept if it fails."""
        self.clear()
        self.is_recording = self.is_on = True
        try:
            yield
        except BaseException:
            self.clear()
            raise
        finally:
            self.is_recording = False

    def keep(self, layer: Layer) -> None:
        """Keep a call that has a rule."""
        self._calls.append((_detached(layer), _Constants(layer)))

    def next_for(self, layer: Layer) -> Layer | None:
        """The same call on the reference; None if there was no such pass.

        Raises
        ------
        RuntimeError
            If the model did something else there.
        """
        if not self._calls:
            return None
        reference, constants = self._calls.pop(0)
        shapes = [[tuple(tensor.shape) for tensor in one.inputs] for one in (layer, reference)]
        of_data, of_reference = (str(layer), str(reference))
        if reference.name == layer.name and not all(map(_comparable, *shapes)):
            of_data, of_reference = (f"{layer} on {of_one}" for of_one in shapes)
        elif reference.name == layer.name:
            reference.differs = not constants.are_those_of(_Constants(layer))
            return reference
        raise StateError(
            f"the model ran {of_data} for the data, but {of_reference} for the reference: its path depends on the "
            "values, so that they cannot be compared"
        )

    def differ(self, op: Operation) -> bool:
        """Whether a call without a rule reads other constants than for the reference, or was not made there."""
        if op.known.properties >= {"copies", "elementwise"}:  # (which a model may leave out, by how tensors lie)
            return False
        if self.is_recording:
            self._without_rule.append(_Constants(op))
            return False
        return not (self._without_rule and self._without_rule.pop(0).are_those_of(_Constants(op)))

    def clear(self) -> tuple[list[str], list[str]]:
        """Forget all calls; functions that are left, which the model did not call for the data: by a rule, or none."""
        left = [str(layer) for layer, _ in self._calls], [f"{one.name}()" for one in self._without_rule]
        self._calls, self._without_rule, self.is_on = [], [], False
        return left


def _constants_in(value: Any, mine: Collection[int]) -> Iterator[Any]:
    """Tensors but for ``mine``, numbers and words, also in nested sequences and slices."""
    if isinstance(value, Tensor):
        if id(value) not in mine:
            yield value
    elif isinstance(value, Number | str):
        yield value
    elif isinstance(value, np.ndarray):
        yield value.tobytes()
    elif isinstance(value, slice):
        yield from _constants_in((value.start, value.stop, value.step), mine)
    elif isinstance(value, list | tuple | Mapping):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _constants_in(part, mine)


def _comparable(shape: tuple[int, ...], of_reference: tuple[int, ...]) -> bool:
    """Whether two tensors differ in the number of samples only, of which a reference has one or as many."""
    if shape[:1] == of_reference[:1]:
        return shape == of_reference
    return shape[1:] == of_reference[1:] and of_reference[0] > 0 and shape[0] % of_reference[0] == 0


def _detached(layer: Layer) -> Layer:
    """A call with copies of what depends on the model's input, as the model may overwrite it later."""
    copies = {id(tensor): tensor.detach().clone() for tensor in layer.inputs}

    def copied(tensor: Tensor) -> Tensor:
        return copies[id(tensor)] if id(tensor) in copies else tensor.detach()

    args, kwargs = changed((tuple(layer.args), dict(layer.kwargs)), copied)
    inputs, output = tuple(map(copied, layer.inputs)), changed(layer.output, lambda tensor: tensor.detach().clone())
    return Layer(
        layer.function, args, kwargs, inputs, layer.known, place=layer.place, module=layer.module, result=output
    )
