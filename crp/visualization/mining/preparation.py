"""A user's function of one sample, called for a whole batch where that gives the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from crp.notices import warn

Prepare = Callable[[Tensor], Tensor]
#: Methods of tensors by which Python, or another library, reads values.
_READING = {"item", "tolist", "numpy", "__array__", "__bool__", "__float__", "__int__", "__index__", "__contains__",
            "is_nonzero", "equal", "allclose", "data_ptr", "nonzero", "__dlpack__"}  # fmt: skip


class Preparation:
    """Prepares samples for the model, a batch at once if that is the same as one by one.

    The first batch decides. The function is called for each of its samples, for all of them together, and for copies of
    them that differ in scale. If a result differs in any bit, or if the function reads values of its argument, on which
    it could decide anything, samples are prepared one by one from then on.

    Parameters
    ----------
    function : callable
        Of a sample of shape (1, ...).
    """

    def __init__(self, function: Prepare) -> None:
        self._function = function
        self._takes_batches: bool | None = None

    def each(self, samples: Tensor) -> Tensor:
        """Samples of shape (samples, ...), prepared one by one; of copies, as the function may work in place."""
        return torch.cat([self._function(sample[None].clone()) for sample in samples])

    def batch(self, samples: Tensor) -> Tensor | None:
        """Samples of shape (samples, ...), prepared; None where it must be done one by one."""
        if len(samples) == 1 or self._takes_batches is False:
            return None
        if self._takes_batches is None:
            return self._decide(samples)
        try:
            return self._function(samples)
        except Exception:
            return None  # one by one, it is known whose fault that is

    def _decide(self, samples: Tensor) -> Tensor | None:
        try:
            alone = self.each(samples)
        except Exception:
            return None  # a sample that cannot be prepared says nothing about the others
        devices = [samples.device] if samples.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            together = self._together(samples)
            scaled = _scaled(samples)
            if together is None or (again := self._together(scaled)) is None:
                self._takes_batches = False
                return alone
            try:
                same = _are_same(together, alone) and _are_same(again, self.each(scaled))
            except Exception:
                same = False
        if not same:
            warn(
                f"preprocess {getattr(self._function, '__name__', self._function)!r} gives other numbers for a batch "
                "than for its samples one by one; they are prepared one by one, which is slower"
            )
        self._takes_batches = same
        return alone

    def _together(self, samples: Tensor) -> Tensor | None:
        """A batch prepared at once; None if that fails, reads values, or gives another number of samples."""
        try:
            own = samples.clone()
            with _Watch(own) as watch:
                prepared = self._function(own)
        except Exception:
            return None
        is_batch = isinstance(prepared, Tensor) and prepared.shape[:1] == samples.shape[:1]
        return prepared if is_batch and not watch.reads_values else None


class _Watch(TorchFunctionMode):
    """Notes whether Python reads values that depend on a tensor."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self._known = {id(tensor): tensor}
        self.reads_values = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        depends = any(id(tensor) in self._known for tensor in tree_leaves((args, dict(kwargs))))
        if depends and getattr(func, "__name__", "") in _READING:
            self.reads_values = True
        result = func(*args, **kwargs)
        if depends:
            self._known |= {id(part): part for part in tree_leaves((result, args)) if isinstance(part, Tensor)}
        return result


def _are_same(one: Tensor, other: Tensor) -> bool:
    """Whether tensors have the same entries to the last bit; what is no number is the same as such."""
    if one.shape != other.shape or one.dtype != other.dtype or not one.is_floating_point():
        return torch.equal(one, other) and one.dtype == other.dtype
    return torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def _scaled(samples: Tensor) -> Tensor:
    """Samples of which each differs in scale from the one before, so that a function of all of them shows."""
    factors = torch.arange(1, len(samples) + 1, device=samples.device).reshape(-1, *[1] * (samples.dim() - 1))
    if samples.is_floating_point():
        return samples / factors.to(samples)
    return (
        torch.div(samples, factors.to(samples.dtype), rounding_mode="floor") if samples.dtype != torch.bool else samples
    )
