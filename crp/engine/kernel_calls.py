"""Computations recorded as calls of torch's kernels: a small net's attribution without the Python around them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map

from crp.engine.program import KernelCall, Value, compiled
from crp.engine.recordings import NotReplayableError, Run, Tensors, some
from crp.layers.devices import relying
from crp.layers.nested import tensors_in

#: Properties of operations of which a program of others cannot be made: what Python goes on with depends on values.
_RANDOM = {torch.Tag.nondeterministic_seeded}
_UNFIT = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} | _RANDOM


class CallRecorder:
    """Records calls of kernels, on any device: what they compute is, to the last bit, what they have computed.

    Parameters
    ----------
    first_runs : int
        Times that something is computed before it is recorded.
    cost : float
        Of a recording, in such times: those that are compared with it included.
    """

    runs_ahead = False
    tolerance = 0.0

    def __init__(self, first_runs: int = 4, cost: float = 3.0) -> None:
        self.first_runs, self.cost = first_runs, cost

    def pays(self, runs: int, seconds: float, saved: float) -> bool:
        """Whether as many replays again would have saved what a recording costs."""
        return runs > self.first_runs and runs * saved >= self.cost * seconds

    def record(self, run: Run, inputs: Mapping[str, Tensor]) -> KernelCalls:
        """Recording of a computation.

        Raises
        ------
        NotReplayableError
            If it reads values, draws random numbers, writes to what it has not made, or calls what is not torch's own.
        """
        calls = _Calls(inputs)
        with calls, relying(calls.holds):
            outputs = run(dict(inputs))
        return calls.recording(outputs)


@dataclass
class KernelCalls:
    """Recorded calls, which are made again for other inputs; weights and the like are kept, and read as they then are.

    Attributes
    ----------
    calls : callable
        From inputs and constants to outputs, and conditions that held while recording.
    inputs, outputs : list of str
    constants : list of Tensor
    """

    calls: Any
    inputs: list[str]
    outputs: list[str]
    constants: list[Tensor]

    def can_read(self) -> bool:
        """Whether all memory that it reads is still there: it keeps that."""
        return True

    @torch.no_grad()
    def replay(self, inputs: Mapping[str, Tensor], only: Collection[str] | None, own: bool = True) -> Tensors | None:
        """Outputs, in memory of their own."""
        outputs, conditions = self.calls(*[inputs[name] for name in self.inputs], *self.constants)
        return some(dict(zip(self.outputs, outputs, strict=True)), only) if all(conditions) else None


class _Calls(TorchDispatchMode):
    """Writes down each call; tensors between them are not kept."""

    def __init__(self, inputs: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._inputs, self._constants = [*inputs], dict[int, Tensor]()
        self._calls: list[KernelCall] = []
        self._conditions: list[Value] = []
        self._known: dict[int, tuple[weakref.ref[Tensor], int, Value]] = {}
        self._own: dict[int, tuple[StorageWeakRef, int]] = {}  # memory made while recording
        self._fixed: set[int] = set()  # memory with numbers that depend on nothing, as those of `torch.arange`
        self._n, self._given = 0, {_place(tensor) for tensor in inputs.values()}
        for tensor in inputs.values():
            self._new_value(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        form = func._schema.arguments
        given = {argument.name: value for argument, value in zip(form, args, strict=False)} | kwargs
        read = {_place(tensor) for tensor in tensors_in((args, kwargs))}
        unfit = _UNFIT & {*func.tags} if read - self._fixed else _RANDOM & {*func.tags}
        if func.namespace != "aten" or (unfit and not _is_harmless(func, given)):
            raise NotReplayableError(f"{func} depends on values, draws random numbers, or is unknown")
        written = [given.get(each.name) for each in form if each.alias_info is not None and each.alias_info.is_write]
        if not all(map(self._is_own, tensors_in(written))):
            raise NotReplayableError(f"{func} writes to what was there before")
        taken, named = tree_map(self._value, (args, kwargs))
        result = func(*args, **kwargs)
        made = {_place(tensor): tensor for tensor in tensors_in(result) if _place(tensor) not in read}
        for place, tensor in made.items():
            self._own[place] = StorageWeakRef(tensor.untyped_storage()), self._n  # type: ignore[no-untyped-call]
            self._n += 1
        if read <= self._fixed:
            self._fixed |= made.keys()
        else:
            self._fixed -= made.keys() | {_place(tensor) for tensor in tensors_in(written)}
        # (others tell of forms, which are the same at each call)
        if written or result is None or next(tensors_in(result), None) is not None:
            self._calls.append(KernelCall(func, taken, named, tree_map(self._new_value, result)))
        return result

    def recording(self, outputs: Tensors) -> KernelCalls:
        """The calls as a function."""
        values = {name: self._value(output) for name, output in outputs.items()}
        given = [*range(len(self._inputs)), *self._constants]
        calls = compiled(given, self._calls, ([*values.values()], self._conditions))
        return KernelCalls(calls, self._inputs, [*values], [*self._constants.values()])

    def holds(self, condition: Callable[[], Tensor]) -> bool:
        """Whether a condition on values holds: a recording that relies on it looks at them again."""
        with _disable_current_modes():
            found = bool(condition())
        if found:
            self._conditions.append(self._value(condition()))
        return found

    def _value(self, value: Any) -> Any:
        """What a tensor is in the calls; all else as it is."""
        if not isinstance(value, Tensor):
            return value
        known, place, found = self._known.get(id(value), (None, 0, None))
        if known is None or known() is not value or _place(value) != place:  # (by ``data``, it may have another one)
            if self._is_own(value) or _place(value) in self._given:
                raise NotReplayableError("a tensor has the memory of another one, and no call tells how it came by it")
            found = self._new_value(value)
            self._constants[found.number] = value
            self._fixed.discard(_place(value))
        return found

    def _new_value(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        memory = self._own[_place(value)][1] if self._is_own(value) else None
        new = Value(self._n, memory, (value.shape, value.stride(), value.dtype))
        self._known[id(value)] = weakref.ref(value), _place(value), new
        self._n += 1
        return new

    def _is_own(self, tensor: Tensor) -> bool:
        """Whether its memory was made while recording."""
        storage, _ = self._own.get(_place(tensor), (None, 0))
        return storage is not None and not storage.expired()  # type: ignore[no-untyped-call]


def _is_harmless(func: Any, given: Mapping[str, Any]) -> bool:
    """Whether an operation that may depend on values does not: places without a mask, or attention without dropout."""
    if func is torch.ops.aten.index.Tensor:
        return not any(tensor.dtype in (torch.bool, torch.uint8) for tensor in tensors_in(given["indices"]))
    return "scaled_dot_product" in func.name() and given.get("dropout_p", 0.0) == 0.0


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
