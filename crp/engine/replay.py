"""Repeated computations of one shape, recorded once and replayed without the Python around torch's kernels.

What Python decides is decided while recording. Whoever uses `Replays` must therefore say by a key and a state what the
computation depends on beside its tensors. A computation that reads values cannot be recorded, and a replay that gives
other numbers than the computation itself, which is tried once on other data, is given up.
"""

from __future__ import annotations

import gc
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from crp.engine.cuda_graphs import GraphRecorder
from crp.engine.kernel_calls import CallRecorder
from crp.engine.model_state import State
from crp.engine.names_read import NamesRead
from crp.engine.recordings import Recorder, Recording, Run, Tensors, some
from crp.layers.devices import recording

#: Recordings that are kept.
KEPT = 4


class Computation(NamedTuple):
    """What is computed as a model stands now.

    Attributes
    ----------
    reads : sequence
        What it reads beside its inputs, such as weights, and all that these lead to (see `State`).
    compute : callable
        From inputs to outputs, as it can be recorded.
    usual : callable
        Outputs as they are computed where nothing is recorded, by which a recording is judged; None where they cannot
        be computed at once.
    saved : float
        Seconds that a replay saves, about.
    unnoticed : callable
        Gives a context in which it may be made once more, and leaves nothing behind: no state, no random number drawn.
    """

    reads: Sequence[object]
    compute: Run
    usual: Callable[[], Tensors | None]
    saved: float = 0.0
    unnoticed: Callable[[], AbstractContextManager[object]] = nullcontext


@dataclass
class _Entry:
    """What is known of one computation.

    Attributes
    ----------
    state : State
        Of the model and the rules, when it was computed last.
    runs : int
        Times it was computed in this state.
    recording : Recording or None
    names : NamesRead or None
        What Python looked up while recording.
    judged : int
        Times that a replay has given what the computation gives.
    missed : int
        Times that a recording was of no use for other inputs.
    recorded : int
        Times it had been computed when it was recorded.
    wasted : int
        Recordings, one after the other, that were discarded before they paid.
    refused : bool
    seconds : float
        Shortest time in which it was computed.
    """

    state: State
    runs: int = 0
    recording: Recording | None = None
    names: NamesRead | None = None
    judged: int = 0
    missed: int = 0
    recorded: int = 0
    wasted: int = 0
    refused: bool = False
    seconds: float = math.inf

    @property
    def trusted(self) -> bool:
        """Whether replays were right twice: also for data that were not there while recording."""
        return self.judged > 1

    def pays(self, recorder: Recorder, saved: float) -> bool:
        """Whether it was computed so often that it is worth a recording."""
        return recorder.pays(self.runs >> max(self.wasted - 1, 0), self.seconds, saved)

    def replay(self, inputs: Mapping[str, Tensor], only: Collection[str] | None) -> Tensors | None:
        """Outputs by a recording that is trusted; None where there is none, or none for these inputs."""
        if self.recording is not None and not self.recording.can_read():
            self.drop()
        if self.recording is None or not self.trusted:
            return None
        outputs = self.recording.replay(inputs, only)
        if outputs is None:
            self.miss()
        return outputs

    def drop(self, for_good: bool = False) -> None:
        """Let go of the recording."""
        self.recording, self.names, self.judged, self.refused = None, None, 0, for_good

    def miss(self) -> None:
        """Let go of a recording that other inputs cannot use; after that, one may be made with such."""
        self.missed += 1
        self.drop(for_good=self.missed > 1)

    def renewed(self, reads: Sequence[object]) -> _Entry:
        """The same computation of something else; it is recorded later if several recordings did not pay."""
        wasted = self.wasted
        if self.recorded:
            wasted = wasted + 1 if self.runs < 2 * self.recorded else 0
        return _Entry(State(*reads), wasted=wasted)

    def stands_for(self, reads: Sequence[object]) -> bool:
        """Whether a model and rules, as they are now, are those of which this is known."""
        return self.state.holds(*reads) and (self.names is None or self.names.are_same())


class Replays:
    """Replays what is computed again and again; one thread has it at a time.

    Parameters
    ----------
    recorder : Recorder, optional
        By default CUDA graphs on a GPU, and calls of kernels on a CPU.
    """

    def __init__(self, recorder: Recorder | None = None) -> None:
        graphs, calls = (recorder or GraphRecorder()), (recorder or CallRecorder())
        self._recorders: dict[str, Recorder] = {"cuda": graphs, "cpu": calls}
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self.replayed = 0

    def serves(self, device: torch.device) -> bool:
        """Whether computations on a device can be recorded."""
        return device.type in self._recorders

    def runs_ahead(self, device: torch.device) -> bool:
        """Whether the host has time for something else while a device replays."""
        return self.serves(device) and self._recorders[device.type].runs_ahead

    def clear(self) -> None:
        """Let go of all recordings, and their memory."""
        self._entries.clear()

    def run(
        self,
        key: Hashable,
        device: torch.device,
        prepare: Callable[[], Computation | None],
        inputs: Mapping[str, Tensor],
        only: Collection[str] | None = None,
    ) -> Tensors | None:
        """Outputs of a computation, in memory of their own; None where it must not be replayed, and was not made.

        Parameters
        ----------
        key : hashable
            Which computation: what Python decides by, and the forms of the tensors.
        device : torch.device
        prepare : callable
            Looks at the model: gives what is read of it and the computation, or None where others watch it. A change
            discards the recording. A trusted recording is replayed meanwhile, where the device has its own time.
        inputs : dict of str to Tensor
            Those of the host are sent to where a recording reads them.
        only : collection of str, optional
            Outputs that are given; all by default. The others show whether a replay is right.

        Raises
        ------
        Exception
            What the computation raises.
        """
        recorder = self._recorders[device.type]
        entry = self._entries.get(key)
        early = entry.recording if entry is not None and entry.trusted and recorder.runs_ahead else None
        outputs = early.replay(inputs, only) if early is not None and early.can_read() else None
        prepared = prepare()
        if prepared is None:
            return None
        if entry is None or not entry.stands_for(prepared.reads):
            entry = _Entry(State(*prepared.reads)) if entry is None else entry.renewed(prepared.reads)
            self._entries[key], outputs = entry, None
        self._entries.move_to_end(key)
        while len(self._entries) > KEPT:
            self._entries.popitem(last=False)
        entry.runs += 1
        if entry.refused:
            return None
        if outputs is None:
            outputs = entry.replay(inputs, only)
        if outputs is None:
            return self._computed(entry, recorder, prepared, inputs, only)
        self.replayed += 1
        return outputs

    def _computed(
        self,
        entry: _Entry,
        recorder: Recorder,
        prepared: Computation,
        inputs: Mapping[str, Tensor],
        only: Collection[str] | None,
    ) -> Tensors | None:
        """Outputs in the usual way, by which a recording is judged; one is made where that pays."""
        start = time.perf_counter()
        exact = prepared.usual()
        entry.seconds = min(entry.seconds, time.perf_counter() - start)
        if exact is None:
            entry.drop(for_good=True)
            return None
        if entry.recording is None and not entry.refused and entry.pays(recorder, prepared.saved):
            entry.recorded = entry.runs
            _record(entry, recorder, prepared, inputs)
        if entry.recording is not None:
            _judge(entry, recorder, inputs, exact)
            self.replayed += entry.judged > 0
        return some(exact, only)


def _record(entry: _Entry, recorder: Recorder, prepared: Computation, inputs: Mapping[str, Tensor]) -> None:
    """Record a computation, or give it up for good."""
    names = NamesRead(entry.state.functions)
    try:
        with prepared.unnoticed():
            with recording(), names:
                entry.recording = recorder.record(prepared.compute, inputs)
            entry.names = names
            if not entry.stands_for(prepared.reads):  # (it keeps something, as a replay would not)
                entry.drop(for_good=True)
    except Exception:
        # Reading a value, a lack of memory, a warning for the user: the computation itself says what there is to say,
        # whenever it is asked for.
        entry.drop(for_good=True)
        gc.collect()


def _judge(entry: _Entry, recorder: Recorder, inputs: Mapping[str, Tensor], exact: Tensors) -> None:
    """Compare a replay with what was computed, or give it up for good."""
    assert entry.recording is not None
    try:
        found = entry.recording.replay(inputs, None, own=False)
        if found is None:
            entry.miss()
        elif _are_close(found, exact, recorder.tolerance):
            entry.judged += 1
        else:
            entry.drop(for_good=True)
    except Exception:  # (an operation that needs the Python around it, a lack of memory)
        entry.drop(for_good=True)


def _are_close(found: Tensors, exact: Tensors, tolerance: float) -> bool:
    """Whether tensors are equal to rounding; on the GPU, the host waits for it."""
    if found.keys() != exact.keys():
        return False
    for name, tensor in found.items():
        other = exact[name]
        if tensor.shape != other.shape or tensor.dtype != other.dtype:
            return False
        if not tensor.is_floating_point():
            if not (tolerance or torch.equal(tensor, other)):  # (the last digit may decide where the largest number is)
                return False
            continue
        size = other.abs().nan_to_num().amax() if other.numel() else other.sum()
        off = ~torch.isclose(tensor, other, rtol=0, atol=tolerance * float(size), equal_nan=True)
        if bool(off.any()):
            return False
    return True
