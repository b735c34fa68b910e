"""Copies between the host and the device: a mining batch needs one each way, and one wait."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from crp.visualization.mining.loading import as_batch
from crp.visualization.table.manifest import Array


class Transfers:
    """Copies samples to a device and scores back, each in one piece, and counts what it does.

    Attributes
    ----------
    to_device, to_host, waits : int
        Copies in each direction, and how often the host waited for one.
    batches_ahead : int
        Batches that are given to the device before the host waits for an earlier one: a GPU computes meanwhile.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.to_device = self.to_host = self.waits = 0
        self.batches_ahead = 1 if device.type == "cuda" else 0

    def send(self, samples: Sequence[Tensor]) -> Tensor:
        """Samples of one shape, dtype and device on this device, as (samples, *shape)."""
        self.to_device += 1
        batch = as_batch(samples)
        if self.device.type != "cuda" or batch.device.type != "cpu":
            return batch.to(self.device)
        # From pinned memory the GPU copies by itself; torch keeps the memory until it has done so.
        return (batch if batch.is_pinned() else batch.pin_memory()).to(self.device, non_blocking=True)

    def fetch(self, *packages: Package) -> Fetched:
        """Begin to copy tensors to the host."""
        self.to_host += 1
        return Fetched(self, packages)


class ColumnForm(NamedTuple):
    """Shape of an array, and what numbers it holds."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


class Package(NamedTuple):
    """Tensors in one piece of memory: their bytes one after the other, and the form of each by its key."""

    content: Tensor
    forms: Mapping[str, ColumnForm]


def pack(tensors: Mapping[str, Tensor]) -> Package:
    """Tensors in one piece; those on other devices than most are moved there before."""
    # Larger numbers come first, so that each array begins at a multiple of its numbers' size.
    ordered = dict(sorted(tensors.items(), key=lambda entry: -entry[1].element_size()))
    forms = {key: ColumnForm(tuple(tensor.shape), _NUMPY[tensor.dtype]) for key, tensor in ordered.items()}
    (device, _), *_ = Counter(tensor.device for tensor in tensors.values()).most_common(1)
    return Package(torch.cat([_flat_bytes(tensor.detach().to(device)) for tensor in ordered.values()]), forms)


class Fetched:
    """Tensors on their way to the host; the wait for them is counted by ``transfers``."""

    def __init__(self, transfers: Transfers, packages: Sequence[Package]) -> None:
        self._transfers = transfers
        self._forms = {key: form for package in packages for key, form in package.forms.items()}
        content = [package.content for package in packages]
        packed = content[0] if len(content) == 1 else torch.cat([one.to(content[0].device) for one in content])
        self._event: torch.cuda.Event | None = None
        if packed.device.type == "cuda":
            self._host = torch.empty(packed.shape, dtype=torch.uint8, pin_memory=True)
            self._host.copy_(packed, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()
        else:
            self._host = packed.cpu()

    def arrays(self) -> dict[str, Array]:
        """The tensors as arrays, by their keys; waits for the copy."""
        self._transfers.waits += 1
        if self._event is not None:
            self._event.synchronize()
        content: Array = self._host.numpy()
        found: dict[str, Array] = {}
        begin = 0
        for key, (shape, dtype) in self._forms.items():
            end = begin + dtype.itemsize * math.prod(shape)
            found[key] = content[begin:end].view(dtype).reshape(shape)
            begin = end
        return found


def _flat_bytes(tensor: Tensor) -> Tensor:
    flat = tensor.reshape(-1)
    if flat.stride(0) != 1:  # (also a single entry may have any stride)
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8)


_NUMPY: dict[torch.dtype, np.dtype[Any]] = {
    torch.float64: np.dtype(np.float64),
    torch.float32: np.dtype(np.float32),
    torch.int64: np.dtype(np.int64),
    torch.int32: np.dtype(np.int32),
    torch.bool: np.dtype(np.bool_),
}
