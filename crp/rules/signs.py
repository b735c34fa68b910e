"""Which tensors of a forward pass are known not to be negative, so that no one has to look at their values."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from torch import Tensor

#: Functions whose results are never negative.
_NEVER_NEGATIVE = frozenset(
    "relu relu6 sigmoid hardsigmoid softmax exp square abs softplus sqrt norm expit".split()  # noqa: SIM905
)
#: Functions whose results are not negative if no tensor that they are given is.
_KEEPING = frozenset(
    """adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d
    adaptive_max_pool3d avg_pool1d avg_pool2d avg_pool3d cat clone contiguous dropout dropout2d flatten getitem
    max_pool1d max_pool2d max_pool3d mean mul permute reshape squeeze sum to transpose unsqueeze view chunk
    pixel_shuffle channel_shuffle float double half bfloat16""".split()  # noqa: SIM905
)
NOTED = _NEVER_NEGATIVE | _KEEPING


class Signs:
    """Tensors that are known not to be negative, as long as they are not changed in place."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], int]] = {}

    def note(self, function: str, given: Iterable[Tensor], made: Iterable[Tensor]) -> None:
        """Learn from a call of a function of `NOTED`."""
        if function in _NEVER_NEGATIVE or all(self.nonnegative(tensor) for tensor in given):
            for tensor in made:
                self._known[id(tensor)] = weakref.ref(tensor), tensor._version

    def nonnegative(self, tensor: Tensor) -> bool:
        """Whether a tensor is known not to be negative."""
        ref, version = self._known.get(id(tensor), (None, 0))
        return ref is not None and ref() is tensor and tensor._version == version

    def clear(self) -> None:
        """Forget everything."""
        self._known.clear()
