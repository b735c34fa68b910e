"""What a recorded computation is, whatever records it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Protocol, TypeAlias

from torch import Tensor

Tensors: TypeAlias = dict[str, Tensor]
#: A computation: tensors by name, from tensors by name.
Run: TypeAlias = Callable[[Tensors], Tensors]


class NotReplayableError(RuntimeError):
    """A computation that depends on values that Python reads."""


class Recording(Protocol):
    """A recorded computation."""

    def can_read(self) -> bool:
        """Whether all memory that it reads is still there."""

    def replay(self, inputs: Mapping[str, Tensor], only: Collection[str] | None, own: bool = True) -> Tensors | None:
        """Outputs for other inputs, or only some of these; on a GPU, the host does not wait for them.

        If they need no memory of their own, the next replay may overwrite them. There are none if the computation
        would go another way with these inputs.
        """


class Recorder(Protocol):
    """Records computations.

    Attributes
    ----------
    runs_ahead : bool
        Whether the host has time for something else while a recording is replayed.
    tolerance : float
        Largest deviation of a replay, relative to the largest value.
    """

    runs_ahead: bool
    tolerance: float

    def pays(self, runs: int, seconds: float, saved: float) -> bool:
        """Whether to record what took so many seconds for so many times, of which a replay may save some each time."""

    def record(self, run: Run, inputs: Mapping[str, Tensor]) -> Recording:
        """Recording of a computation, made with these inputs."""


def some(tensors: Tensors, only: Collection[str] | None) -> Tensors:
    """Tensors of some names; all, if none are named."""
    return tensors if only is None else {name: tensor for name, tensor in tensors.items() if name in only}
