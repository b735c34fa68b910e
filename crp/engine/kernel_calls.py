"""Computations recorded as calls of torch's kernels: a small net's attribution without the Python around them."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from crp.engine.recordings import NotReplayableError, Run, Tensors, some

#: Properties of operations of which a program of others cannot be made: what Python goes on with depends on values.
_RANDOM = {torch.Tag.nondeterministic_seeded}
_UNFIT = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} | _RANDOM


#: Operations that give the tensor that they take, where there are no gradients.
_NOTHING = {torch.ops.aten.detach.default, torch.ops.aten.lift_fresh.default, torch.ops.aten.alias.default}


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
        with calls:
            outputs = run(dict(inputs))
        return calls.recording(outputs)


@dataclass
class KernelCalls:
    """Recorded calls, which are made again for other inputs; weights and the like are kept, and read as they then are.

    Attributes
    ----------
    calls : callable
        From inputs and constants to outputs.
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
    def replay(self, inputs: Mapping[str, Tensor], only: Collection[str] | None, own: bool = True) -> Tensors:
        """Outputs, in memory of their own."""
        outputs = self.calls(*[inputs[name] for name in self.inputs], *self.constants)
        return some(dict(zip(self.outputs, outputs, strict=True)), only)


@dataclass(frozen=True)
class _Made:
    """A tensor among those that were given, made or met while recording, by its number."""

    number: int


class _Calls(TorchDispatchMode):
    """Writes down each call; tensors between them are not kept."""

    def __init__(self, inputs: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._inputs, self._constants = [*inputs], dict[int, Tensor]()
        self._calls: list[tuple[Any, Any, Any, Any]] = []
        self._known: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._own: dict[int, StorageWeakRef] = {}
        self._fixed: set[int] = set()  # memory with numbers that depend on nothing, as those of `torch.arange`
        for number, tensor in enumerate(inputs.values()):
            self._known[id(tensor)] = weakref.ref(tensor), number
        self._n, self._given = len(inputs), {_place(tensor) for tensor in inputs.values()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        form = func._schema.arguments
        given = {argument.name: value for argument, value in zip(form, args, strict=False)} | kwargs
        read = {_place(tensor) for tensor in _tensors((args, kwargs))}
        unfit = _UNFIT & {*func.tags} if read - self._fixed else _RANDOM & {*func.tags}
        if func.namespace != "aten" or (unfit and not _is_harmless(func, given)):
            raise NotReplayableError(f"{func} depends on values, draws random numbers, or is unknown")
        written = [given.get(each.name) for each in form if each.alias_info is not None and each.alias_info.is_write]
        if not all(map(self._is_own, _tensors(written))):
            raise NotReplayableError(f"{func} writes to what was there before")
        taken = tree_map(self._number, (args, kwargs))
        result = func(*args, **kwargs)
        made = {_place(tensor): tensor for tensor in _tensors(result) if _place(tensor) not in read}
        for place, tensor in made.items():
            self._own[place] = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
        if read <= self._fixed:
            self._fixed |= made.keys()
        else:
            self._fixed -= made.keys() | {_place(tensor) for tensor in _tensors(written)}
        if written or _tensors(result):  # (others tell of forms, which are the same at each call)
            self._calls.append((func, *taken, tree_map(self._new_number, result)))
        return result

    def recording(self, outputs: Tensors) -> KernelCalls:
        """The calls as a program, which lets go of each tensor where it is read for the last time."""
        given = {name: (self._number(output), self._is_own(output)) for name, output in outputs.items()}
        graph, nodes = fx.Graph(), dict[int, fx.Node]()
        for number in [*range(len(self._inputs)), *self._constants]:
            nodes[number] = graph.placeholder(f"x{number}")

        def node_of(value: Any) -> Any:
            return nodes[value.number] if isinstance(value, _Made) else value

        for function, args, kwargs, result in self._calls:
            if function in _NOTHING:
                nodes[result.number] = node_of(args[0])
                continue
            node = graph.call_function(function, *tree_map(node_of, (args, kwargs)))
            if isinstance(result, _Made):
                nodes[result.number] = node
                continue
            for place, entry in enumerate(result or ()):
                if isinstance(entry, _Made):
                    nodes[entry.number] = graph.call_function(operator.getitem, (node, place))
        clone = torch.ops.aten.clone.default
        # (what is given out is the caller's own)
        found = [node_of(made) if own else graph.call_function(clone, (node_of(made),)) for made, own in given.values()]
        graph.output(tuple(found))
        # (a `fx.GraphModule` would leave its source behind for good)
        code = graph.python_code("self")
        names = dict(code.globals)
        exec(code.src, names)
        return KernelCalls(partial(names["forward"], None), self._inputs, [*given], [*self._constants.values()])

    def _number(self, value: Any) -> Any:
        """A tensor's number; other values as they are."""
        if not isinstance(value, Tensor):
            return value
        known, number = self._known.get(id(value), (None, 0))
        if known is None or known() is not value:
            if self._is_own(value) or _place(value) in self._given:
                raise NotReplayableError("a tensor has the memory of another one, and no call tells how it came by it")
            number = self._new_number(value).number
            self._constants[number] = value
            self._fixed.discard(_place(value))
        return _Made(number)

    def _new_number(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        self._n += 1
        self._known[id(value)] = weakref.ref(value), self._n
        return _Made(self._n)

    def _is_own(self, tensor: Tensor) -> bool:
        """Whether its memory was made while recording."""
        storage = self._own.get(_place(tensor))
        return storage is not None and not storage.expired()  # type: ignore[no-untyped-call]


def _is_harmless(func: Any, given: Mapping[str, Any]) -> bool:
    """Whether an operation that may depend on values does not: places without a mask, or attention without dropout."""
    if func is torch.ops.aten.index.Tensor:
        return not any(tensor.dtype in (torch.bool, torch.uint8) for tensor in _tensors(given["indices"]))
    return "scaled_dot_product" in func.name() and given.get("dropout_p", 0.0) == 0.0


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
