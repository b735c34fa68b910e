"""Whether a weight is what it was, also after writes that torch does not count: by ``weight.data``, or by an array."""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from torch import Tensor, nn

#: Bytes up to which all of a tensor is looked at. Of others some entries are, at least about so many, and so many for
#: each index of the longest axis.
_WHOLE, _ENTRIES, _OF_EACH = 4096, 1000, 4


def glimpse(tensor: Tensor) -> int | None:
    """Hash of some thousand entries of a tensor in the memory of the host; None elsewhere, where it would wait.

    Whoever writes to a whole tensor, or to a channel of it, changes some of them; who writes to a few entries may not.
    The memory is read as it is, as a call of torch for each weight would take a twentieth of a small net's attribution.
    """
    if not tensor.numel():
        return 0
    if tensor.device.type != "cpu" or tensor.layout is not torch.strided or type(tensor) not in (Tensor, nn.Parameter):
        return None
    shape, size, n_entries = tensor.shape, tensor.element_size(), 1
    for length, step in zip(shape, tensor.stride(), strict=True):
        n_entries += (length - 1) * step
    if (tensor.storage_offset() + n_entries) * size > tensor.untyped_storage().nbytes():  # (taken away for a while)
        return None
    if n_entries * size <= _WHOLE:
        return hash(ctypes.string_at(tensor.data_ptr(), n_entries * size))
    memory = (ctypes.c_char * (n_entries * size)).from_address(tensor.data_ptr())
    # (an odd step meets all channels of a power of two, and not always the same ones)
    step = n_entries // max(_ENTRIES, _OF_EACH * max(shape, default=1)) | 1
    return hash(np.frombuffer(memory, f"V{size}")[::step].tobytes())  # type: ignore[call-overload]
