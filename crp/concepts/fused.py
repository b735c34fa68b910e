"""Scores of a layer by one kernel of a GPU, which reads each value once; torch's operations read it four times.

The kernel is written in Triton, which comes with torch where there are CUDA devices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crp.layers.devices import define_operation, has_kernels, kernels_in

_KERNELS = "crp.concepts.triton_scores"
#: Positions that a kernel can count.
_MOST = 2**31 - 4096


def fused_scores(values: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Sum, maximum and its first position of each concept; None where no kernel does it.

    Parameters
    ----------
    values : Tensor of shape (batch, concepts, positions)
    """
    differentiable = values.requires_grad and torch.is_grad_enabled()
    if differentiable or not values.numel() or values.shape[-1] >= _MOST or not has_kernels(_KERNELS, values):
        return None
    scores: tuple[Tensor, Tensor, Tensor] = torch.ops.crp.scores(values.detach())
    return scores


def _scores(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    with torch.cuda.device_of(values):  # type: ignore[no-untyped-call]
        scores: tuple[Tensor, Tensor, Tensor] = kernels_in(_KERNELS).launch_scores(values)
    return scores


define_operation("scores(Tensor values) -> (Tensor, Tensor, Tensor)", _scores)
