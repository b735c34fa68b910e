"""What a run costs: time of the processor or of the GPU, operations, calls of kernels, memory.

A clock takes a function without arguments, runs it once and returns a number. It is used on both sides of a comparison,
and hence imports nothing of this package.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # (the profiler would write to the terminal)

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

Run = Callable[[], object]


def cpu_seconds(run: Run) -> float:
    """Time of the processor in this process, all threads."""
    start = time.process_time()
    run()
    return time.process_time() - start


def flops(run: Run) -> float:
    """Floating-point operations, as torch counts them: of convolutions and matrix products."""
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


class CountCalls(TorchDispatchMode):
    """Counts the calls of torch's kernels, views included."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.n = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.n += 1
        return func(*args, **(kwargs or {}))


def calls(run: Run) -> float:
    """Calls of torch's kernels."""
    with CountCalls() as counter:
        run()
    return float(counter.n)


def memory_changes(run: Run) -> list[int]:
    """Bytes that torch's allocator took (positive) and gave back (negative), in order; the result is dropped."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    found = record.profiler.kineto_results.events() if record.profiler is not None else []
    events = sorted((event for event in found if event.name() == "[memory]"), key=lambda event: event.start_ns())
    return [event.nbytes() for event in events]


def peak_bytes(run: Run) -> float:
    """Largest number of bytes that were allocated at once, beyond what was allocated before."""
    live = peak = 0
    for change in memory_changes(run):
        live += change
        peak = max(peak, live)
    return peak


def kept_bytes(run: Run) -> float:
    """Bytes that are still allocated afterwards."""
    return sum(memory_changes(run))


def wall_seconds(run: Run) -> float:
    """Time that a user waits: until the host and, where there is one, the GPU have done everything."""
    _synchronize()
    start = time.perf_counter()
    run()
    _synchronize()
    return time.perf_counter() - start


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def cuda_seconds(run: Run) -> float:
    """Time on the GPU from the first to the last kernel; synchronizes before and after only."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def cuda_peak_bytes(run: Run) -> float:
    """Peak of the memory on the GPU, beyond what was allocated before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return float(torch.cuda.max_memory_allocated() - before)


def cuda_events(run: Run, *names: str) -> float:
    """Number of the profiler's events that have one of these parts in their names."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
        run()
        torch.cuda.synchronize()
    return float(sum(event.count for event in record.key_averages() if any(name in event.key for name in names)))


def launches(run: Run) -> float:
    """Kernels and graphs that were started on the GPU."""
    return cuda_events(run, "LaunchKernel", "GraphLaunch")


def waits(run: Run) -> float:
    """How often the host waited for work that it had given to the GPU."""
    return cuda_events(run, "cudaStreamSynchronize", "cudaEventSynchronize")


def copies_to_host(run: Run) -> float:
    """Copies from the GPU to the host."""
    return cuda_events(run, "Memcpy DtoH")


def copies_to_device(run: Run) -> float:
    """Copies from the host to the GPU."""
    return cuda_events(run, "Memcpy HtoD")


def synchronizations(run: Run) -> float:
    """1 if the host waits for the GPU anywhere in the run, else 0."""
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return 1.0
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return 0.0


def value(run: Run) -> float:
    """What the run returns, which must be a number."""
    found = run()
    assert isinstance(found, int | float)
    return float(found)


#: Clocks, and the unit of what they give.
CLOCKS: dict[str, Callable[[Run], float]] = {
    "cpu": cpu_seconds,
    "flops": flops,
    "calls": calls,
    "peak": peak_bytes,
    "kept": kept_bytes,
    "wall": wall_seconds,
    "cuda": cuda_seconds,
    "cuda peak": cuda_peak_bytes,
    "launches": launches,
    "waits": waits,
    "copies to host": copies_to_host,
    "copies to device": copies_to_device,
    "synchronizations": synchronizations,
    "value": value,
}
