"""Repeated computations of one shape, recorded once and replayed: on a GPU, as a graph that needs no Python.

What Python decides is decided while recording. Whoever uses `Replays` must therefore say by a key and a state what the
computation depends on beside its tensors. A computation that reads values cannot be recorded, and a replay that gives
other numbers than the computation itself, which is tried once on other data, is given up.
"""

from __future__ import annotations

import gc
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from crp.layers.devices import recording

Tensors: TypeAlias = dict[str, Tensor]
#: A computation: tensors by name, from tensors by name.
Run: TypeAlias = Callable[[Tensors], Tensors]
#: Times that something is computed before it is recorded; recording costs about as much as a few of them.
FIRST_RUNS = 2
#: Recordings that are kept.
KEPT = 4
#: Share of a GPU's memory that recordings leave free.
_SPARE = 0.1
#: Largest deviation of a replay, relative to the largest value: what different kernels may differ by in TF32.
TOLERANCE = 1e-3
#: Operations by which Python reads a value.
_READING = {"_local_scalar_dense", "equal", "nonzero", "is_nonzero", "masked_select", "unique", "_unique2"}


class NotReplayableError(RuntimeError):
    """A computation that depends on values that Python reads."""


class Recording(Protocol):
    """A recorded computation, which reads its inputs where they were and leaves its outputs where they were."""

    def can_read(self) -> bool:
        """Whether all memory that it reads is still there."""

    def replay(self) -> None:
        """Compute again; on a GPU, the host does not wait for it."""


class Computation(NamedTuple):
    """What is computed as a model stands now.

    Attributes
    ----------
    state : object
        What it reads beside its inputs, such as weights; compared by ``==``.
    compute : callable
    """

    state: object
    compute: Run


class Recorder(Protocol):
    """Records computations."""

    def record(self, run: Callable[[], Tensors]) -> tuple[Recording, Tensors]:
        """Recording of a computation, and its outputs, which every replay overwrites."""


class _GraphRecorder:
    """Records CUDA graphs."""

    def record(self, run: Callable[[], Tensors]) -> tuple[Recording, Tensors]:
        """Recording of a computation, and its outputs."""
        run()  # (kernels are compiled and loaded when they are first used, which cannot be recorded)
        graph = torch.cuda.CUDAGraph()
        with _Reads() as reads, torch.cuda.graph(graph):
            outputs = run()
        free, total = torch.cuda.mem_get_info()
        if free < _SPARE * total:
            raise MemoryError("a graph keeps its memory, and too little would be left for others")
        return _Graph(graph, reads), outputs


@dataclass
class _Graph:
    """A CUDA graph, and the memory that it reads: such as modified weights, which others may drop."""

    graph: torch.cuda.CUDAGraph
    reads: _Reads

    def can_read(self) -> bool:
        return all(storage.data_ptr() == place for place, storage in self.reads.kept.items())

    def replay(self) -> None:
        self.graph.replay()


class _Reads(TorchDispatchMode):
    """Keeps the memory that operations read and did not make."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept: dict[int, torch.UntypedStorage] = {}
        self._made: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        read = {s.data_ptr(): s for s in map(_storage, tree_leaves((args, kwargs))) if s is not None}
        # (From memory of the host, a graph copies at each replay.)
        kept = {place: s for place, s in read.items() if place not in self._made or s.device.type == "cpu"}
        self.kept |= kept
        result = func(*args, **(kwargs or {}))
        self._made |= {s.data_ptr() for s in map(_storage, tree_leaves(result)) if s is not None} - set(read)
        return result


def _storage(value: object) -> torch.UntypedStorage | None:
    return value.untyped_storage() if isinstance(value, Tensor) else None


class CallRecorder:
    """Records the calls of torch's kernels, and makes them again: what a graph does, on any device."""

    def record(self, run: Callable[[], Tensors]) -> tuple[Recording, Tensors]:
        """Recording of a computation, and its outputs."""
        with _Calls() as calls:
            outputs = run()
        return _CallRecording(calls.made, outputs), outputs


class _Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in _READING:
            raise NotReplayableError(f"{func} reads a value")
        result = func(*args, **(kwargs or {}))
        self.made.append((func, args, kwargs or {}, result))
        return result


@dataclass
class _CallRecording:
    calls: list[tuple[Any, Any, Any, Any]]
    outputs: Tensors

    def can_read(self) -> bool:
        return True

    @torch.no_grad()
    def replay(self) -> None:
        now: dict[int, Any] = {}

        def current(value: Any) -> Any:
            return now.get(id(value), value)

        for func, args, kwargs, before in self.calls:
            args, kwargs = tree_map(current, (args, kwargs))
            after = func(*args, **kwargs)
            for old, new in zip(tree_leaves(before), tree_leaves(after), strict=True):
                if isinstance(old, Tensor):
                    now[id(old)] = new
        for output in self.outputs.values():
            output.copy_(now.get(id(output), output))


@dataclass
class _Entry:
    """What is known of one computation.

    Attributes
    ----------
    state : object
        Of the model and the rules, when it was computed last.
    runs : int
        Times it was computed in this state.
    recording : Recording or None
    inputs, outputs : dict of str to Tensor
        Where a recording reads and writes.
    trusted : bool
        Whether a replay has given what the computation gives.
    """

    state: object
    runs: int = 0
    recording: Recording | None = None
    inputs: Tensors | None = None
    outputs: Tensors | None = None
    trusted: bool = False
    refused: bool = False


class Replays:
    """Computes, and replays what is computed again and again.

    Parameters
    ----------
    recorder : Recorder, optional
        CUDA graphs by default, for tensors on a GPU only.
    """

    def __init__(self, recorder: Recorder | None = None) -> None:
        self._recorder = recorder
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._lock = threading.RLock()
        self.replayed = 0

    def serves(self, device: torch.device) -> bool:
        """Whether computations on a device can be recorded."""
        return self._recorder is not None or device.type == "cuda"

    def clear(self) -> None:
        """Let go of all recordings, and their memory."""
        with self._lock:
            self._entries.clear()

    def run(
        self,
        key: Hashable,
        prepare: Callable[[], Computation | None],
        inputs: Mapping[str, Tensor],
        only: Collection[str] | None = None,
    ) -> Tensors | None:
        """Outputs of a computation, in memory of their own; None where it must not be replayed, and was not made.

        Parameters
        ----------
        key : hashable
            Which computation: what Python decides by, and the forms of the tensors.
        prepare : callable
            Looks at the model: gives its state and the computation, or None where others watch it. A change of the
            state discards the recording. A trusted recording is replayed meanwhile, since a GPU computes by itself.
        inputs : dict of str to Tensor
            Those of the host are sent to where a recording reads them.
        only : collection of str, optional
            Outputs that are given; all by default. The others show whether a replay is right.

        Raises
        ------
        Exception
            What the computation raises.
        """
        with self._lock:
            entry = self._entries.get(key)
            early = self._replay(entry, inputs, only) if entry is not None and entry.trusted else None
            prepared = prepare()
            if prepared is None:
                return None
            if entry is None or entry.state != prepared.state:
                entry, early = _Entry(prepared.state), None
                self._entries[key] = entry
            self._entries.move_to_end(key)
            while len(self._entries) > KEPT:
                self._entries.popitem(last=False)
            entry.runs += 1
            if early is not None:
                self.replayed += 1
                return early
            compute = prepared.compute
            if entry.refused or entry.runs <= FIRST_RUNS or not self._has_recording(entry, compute, inputs):
                return _some(compute(dict(inputs)), only)
            return self._compared(entry, compute, inputs, only)

    def _has_recording(self, entry: _Entry, compute: Run, inputs: Mapping[str, Tensor]) -> bool:
        if entry.recording is not None and not entry.recording.can_read():
            entry.recording, entry.trusted = None, False
        return entry.recording is not None or self._record(entry, compute, inputs)

    def _record(self, entry: _Entry, compute: Run, inputs: Mapping[str, Tensor]) -> bool:
        """Record a computation; False where that is impossible, which is not tried again."""
        recorder = self._recorder or _GraphRecorder()
        static = {name: tensor.clone() for name, tensor in inputs.items()}
        try:
            with recording(), _no_warnings():
                entry.recording, entry.outputs = recorder.record(lambda: compute(static))
            entry.inputs = static
        except Exception:
            # Reading a value, a lack of memory, a warning for the user: the computation itself says what there is to
            # say, whenever it is asked for.
            entry.refused, entry.recording, entry.outputs = True, None, None
            gc.collect()
        return entry.recording is not None

    def _replay(self, entry: _Entry, inputs: Mapping[str, Tensor], only: Collection[str] | None) -> Tensors | None:
        """Outputs by the recording; None where memory that it reads is gone."""
        assert entry.recording is not None and entry.inputs is not None and entry.outputs is not None
        if not entry.recording.can_read():
            return None
        for name, tensor in inputs.items():
            entry.inputs[name].copy_(tensor, non_blocking=True)
        entry.recording.replay()
        return {name: output.clone() for name, output in _some(entry.outputs, only).items()}

    def _compared(
        self, entry: _Entry, compute: Run, inputs: Mapping[str, Tensor], only: Collection[str] | None
    ) -> Tensors:
        """Outputs by a recording that is not trusted yet, if the computation itself gives the same."""
        outputs, exact = self._replay(entry, inputs, only), compute(dict(inputs))
        if outputs is None or entry.outputs is None or not _are_close(entry.outputs, exact):
            entry.refused, entry.recording, entry.inputs, entry.outputs = True, None, None, None
            return _some(exact, only)
        entry.trusted = entry.runs > FIRST_RUNS + 1  # (by data that were not there while it was recorded)
        self.replayed += 1
        return outputs


def _some(tensors: Tensors, only: Collection[str] | None) -> Tensors:
    return tensors if only is None else {name: tensor for name, tensor in tensors.items() if name in only}


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Context in which a warning is an error: a replay would not give it again."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def _are_close(found: Tensors, exact: Tensors) -> bool:
    """Whether tensors are equal to rounding; on the GPU, the host waits for it."""
    if found.keys() != exact.keys():
        return False
    for name, tensor in found.items():
        other = exact[name]
        if tensor.shape != other.shape or tensor.dtype != other.dtype:
            return False
        if not tensor.is_floating_point():  # (where the largest number is, say, may change with the last digit)
            continue
        size = other.abs().nan_to_num().amax() if other.numel() else other.sum()
        off = ~torch.isclose(tensor, other, rtol=0, atol=TOLERANCE * float(size), equal_nan=True)
        if bool(off.any()):
            return False
    return True
