"""What the host and a device do beside each other: small tensors on their way, and work that is recorded.

And operations of a GPU, as torch's own: what records or counts those sees them, too.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

#: Attribute of modules whose weights, or data, accelerate moves at each call, with what moves them.
MOVING = "_hf_hook"


def device_of(model: nn.Module) -> torch.device:
    """Where a model runs: on the device of its first parameter that is loaded, or where accelerate loads them to."""
    if (parameter := next((p for p in model.parameters() if not p.is_meta), None)) is not None:
        return parameter.device
    loading = (getattr(vars(module).get(MOVING), "execution_device", None) for module in model.modules())
    return torch.device(next((device for device in loading if device is not None), "cpu"))


def send_to(device: torch.device, tensor: Tensor) -> Tensor:
    """A tensor of the host on a device.

    A GPU copies it from pinned memory by itself. From ordinary memory the host would have to wait until the GPU has
    done everything before, and the GPU then for the host.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


_recordings = 0


@contextmanager
def recording() -> Iterator[None]:
    """Context in which work for a device is recorded, to be done again with other numbers: nothing may look at them."""
    global _recordings
    _recordings += 1
    try:
        yield
    finally:
        _recordings -= 1


def is_recording() -> bool:
    """Whether work is recorded, in whatever thread: autograd works in threads of its own."""
    return _recordings > 0


class _Relied(threading.local):
    holds: Callable[[Callable[[], Tensor]], bool] | None = None


_relied = _Relied()


@contextmanager
def relying(holds: Callable[[Callable[[], Tensor]], bool]) -> Iterator[None]:
    """Context of a recording that takes down conditions, which must hold again where it is used: see `holds`."""
    _relied.holds = holds
    try:
        yield
    finally:
        _relied.holds = None


def holds(condition: Callable[[], Tensor]) -> bool:
    """Whether a condition on values holds; what is computed where it does not must be right in any case."""
    if not is_recording():
        return bool(condition())
    return _relied.holds is not None and _relied.holds(condition)


def can_be_read(tensor: Tensor) -> bool:
    """Whether the host may look at values now: not where they are recorded, traced, mapped over or left out."""
    return _is_plain(tensor) and not (is_recording() or tensor.is_meta or torch.compiler.is_compiling())


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is one of torch's own, which no function such as `torch.vmap` has wrapped."""
    return type(tensor) in (Tensor, torch.nn.Parameter) and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


#: Kinds of numbers that kernels compute with.
_KERNEL_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def has_kernels(module: str, *tensors: Tensor) -> bool:
    """Whether the kernels of a module in Triton can compute with these tensors: on a GPU, and where there is Triton."""
    return all(t.is_cuda and t.dtype in _KERNEL_DTYPES and _is_plain(t) for t in tensors) and bool(kernels_in(module))


@cache
def kernels_in(module: str) -> Any:
    """Module of kernels in Triton, which is imported; None where there is no Triton."""
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


_library: Any = torch.library.Library("crp", "FRAGMENT")  # type: ignore[no-untyped-call]


def define_operation(signature: str, function: Callable[..., Any]) -> None:
    """Make a function an operation ``torch.ops.crp.NAME`` of tensors on a GPU.

    Parameters
    ----------
    signature : str
        ``"NAME(Tensor a, float b) -> Tensor"``
    function : callable
        It launches the kernels.
    """
    name = signature.partition("(")[0]
    if not hasattr(torch.ops.crp, name):  # (where the package is imported once more)
        _library.define(signature)
        _library.impl(name, function, "CUDA")
