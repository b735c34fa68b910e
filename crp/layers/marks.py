"""Whether a weight is what it was, also after writes that torch does not count: by ``weight.data``, or by an array."""

from __future__ import annotations

import ctypes
import weakref
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

#: Bytes up to which all of a tensor is looked at. Of others some entries are, at least about so many, and so many for
#: each index of the longest axis.
_WHOLE, _ENTRIES, _OF_EACH = 4096, 1000, 4


class TensorMark:
    """Recognizes a tensor as long as nobody writes to it, or gives it other memory.

    In the memory of the host, it has a glimpse of the tensor: a hash of some thousand entries. Whoever writes to a
    whole tensor, or to a channel of it, changes some of them; who writes to a few entries may not. Elsewhere the host
    would wait for it. A tensor of inference mode, whose writes are not counted, is never recognized.

    Parameters
    ----------
    tensor : Tensor
    """

    __slots__ = ("_entries", "_form", "_glimpse", "_storage", "_tensor")

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = weakref.ref(tensor)
        # While this is held, no other storage can have the same address.
        self._storage = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
        self._form, self._entries = _form_of(tensor), _entries_of(tensor)
        self._glimpse = None if self._entries is None else hash(self._entries.tobytes())

    def is_of(self, tensor: Tensor) -> bool:
        """Whether it is of this tensor, as it is now."""
        if self._tensor() is not tensor or self._form != _form_of(tensor):
            return False
        return self._entries is None or hash(self._entries.tobytes()) == self._glimpse


def _form_of(tensor: Tensor) -> tuple[object, ...]:
    """What a tensor is beside its values, and how often it was written to, as far as torch counts that."""
    version = object() if tensor.is_inference() else tensor._version
    storage = tensor.untyped_storage()
    memory = storage._cdata, storage.nbytes(), tensor.data_ptr()
    return version, *memory, tensor.dtype, tensor.shape, tensor.stride()


def _entries_of(tensor: Tensor) -> np.ndarray[Any, Any] | None:
    """Some entries, where they lie: to be read while the tensor has this memory. None where the host has none.

    The memory is read as it is, as a call of torch for each weight would take a twentieth of a small net's attribution.
    """
    if tensor.device.type != "cpu" or type(tensor) not in (Tensor, nn.Parameter) or not tensor.numel():
        return None
    shape, size, n_entries = tensor.shape, tensor.element_size(), 1
    for length, step in zip(shape, tensor.stride(), strict=True):
        n_entries += (length - 1) * step
    if (tensor.storage_offset() + n_entries) * size > tensor.untyped_storage().nbytes():  # (taken away for a while)
        return None
    memory = (ctypes.c_char * (n_entries * size)).from_address(tensor.data_ptr())
    entries: np.ndarray[Any, Any] = np.frombuffer(memory, f"V{size}")  # type: ignore[call-overload]
    # (an odd step meets all channels of a power of two, and not always the same ones)
    step = n_entries // max(_ENTRIES, _OF_EACH * max(shape, default=1)) | 1
    return entries if n_entries * size <= _WHOLE else entries[::step]
