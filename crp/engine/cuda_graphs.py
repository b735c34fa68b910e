"""Computations recorded as CUDA graphs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from crp.engine.recordings import Run, Tensors, some

#: Share of a GPU's memory that recordings leave free.
_SPARE = 0.1


class GraphRecorder:
    """Records CUDA graphs."""

    runs_ahead = True
    tolerance = 1e-3  # (what different kernels may differ by in TF32)

    def pays(self, runs: int, seconds: float, saved: float) -> bool:
        """Whether it was computed twice: recording costs about as much as a few times."""
        return runs > 2

    def record(self, run: Run, inputs: Mapping[str, Tensor]) -> Graph:
        """Recording of a computation."""
        static = {name: tensor.clone() for name, tensor in inputs.items()}
        run(static)  # (kernels are compiled and loaded when they are first used, which cannot be recorded)
        graph = torch.cuda.CUDAGraph()
        with _Reads() as reads, torch.cuda.graph(graph):
            outputs = run(static)
        free, total = torch.cuda.mem_get_info()
        if free < _SPARE * total:
            raise MemoryError("a graph keeps its memory, and too little would be left for others")
        return Graph(graph, reads.kept, static, outputs)


@dataclass
class Graph:
    """A CUDA graph, and the memory that it reads: such as modified weights, which others may drop."""

    graph: torch.cuda.CUDAGraph
    reads: dict[int, torch.UntypedStorage]
    inputs: Tensors
    outputs: Tensors

    def can_read(self) -> bool:
        """Whether all memory that it reads is still there."""
        return all(storage.data_ptr() == place for place, storage in self.reads.items())

    def replay(self, inputs: Mapping[str, Tensor], only: Collection[str] | None, own: bool = True) -> Tensors:
        """Outputs, which the host does not wait for."""
        for name, tensor in inputs.items():
            self.inputs[name].copy_(tensor, non_blocking=True)
        self.graph.replay()
        return {name: output.clone() if own else output for name, output in some(self.outputs, only).items()}


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
