"""Small tensors on their way to a device."""

from __future__ import annotations

import torch
from torch import Tensor


def send_to(device: torch.device, tensor: Tensor) -> Tensor:
    """A tensor of the host on a device.

    A GPU copies it from pinned memory by itself. From ordinary memory the host would have to wait until the GPU has
    done everything before, and the GPU then for the host.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
