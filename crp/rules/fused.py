"""Quotients of rules by one kernel of a GPU each, which reads what goes in and writes what comes out.

torch's own operations read and write memory once each: adding the bias, the test for 0, ε, the quotient. On a GPU that
takes as long as the convolutions. The kernels are written in Triton, which comes with torch where there are CUDA
devices; where it is missing, or tensors do not lie alike in memory, torch's operations give the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crp.layers.devices import define_operation, has_kernels, is_recording, kernels_in

_KERNELS = "crp.rules.triton_kernels"
#: Entries that a kernel can count; and from which on it saves more than it costs to start it from Python.
_MOST, _FEWEST = 2**31 - 4096, 1 << 24


def fused_quotient(
    above: Tensor, below: Tensor, added: Tensor | None, epsilon: float, sign: int, weight: float
) -> Tensor | None:
    """``weight * above`` over the stabilized ``below + added``, and 0 where that is 0; None where no kernel does it.

    Parameters
    ----------
    above, below : Tensor
    added : Tensor or None
        Bias, which has entries along one axis of ``below`` only.
    epsilon : float
    sign : 1, -1 or 0
        1 if the denominator is not negative, -1 if it is not positive, 0 if that is not known.
    weight : float
    """
    if not _fits(below, added, above):
        return None
    result: Tensor = torch.ops.crp.quotient(above.detach(), below.detach(), added, epsilon, sign, weight)
    return result


def fused_gamma_scales(
    y: Tensor, p: Tensor, added: Tensor | None, gamma: float, epsilon: float
) -> tuple[Tensor, Tensor] | None:
    """Scales of the γ rule, as `crp.rules.gamma.gamma_scales` has them; None where no kernel does it."""
    if not _fits(p, added, y):
        return None
    scales: tuple[Tensor, Tensor] = torch.ops.crp.gamma_scales(y.detach(), p.detach(), added, gamma, epsilon)
    return scales


def _fits(below: Tensor, added: Tensor | None, above: Tensor) -> bool:
    fewest = 1 if is_recording() else _FEWEST  # (a replay starts it without Python)
    if not fewest <= below.numel() < _MOST or not has_kernels(_KERNELS, above, below):
        return False
    alike = above.dtype == below.dtype and above.shape == below.shape and above.stride() == below.stride()
    dense = below.is_contiguous() or (below.dim() == 4 and below.is_contiguous(memory_format=torch.channels_last))
    fits = added is None or (added.dtype == below.dtype and added.numel() == below.shape[below.dim() - added.dim()])
    return alike and dense and fits


def _quotient(above: Tensor, below: Tensor, added: Tensor | None, epsilon: float, sign: int, weight: float) -> Tensor:
    with torch.cuda.device_of(below):  # type: ignore[no-untyped-call]
        result: Tensor = kernels_in(_KERNELS).launch_quotient(above, below, added, epsilon, sign, weight)
    return result


def _gamma_scales(y: Tensor, p: Tensor, added: Tensor | None, gamma: float, epsilon: float) -> tuple[Tensor, Tensor]:
    with torch.cuda.device_of(p):  # type: ignore[no-untyped-call]
        result: tuple[Tensor, Tensor] = kernels_in(_KERNELS).launch_gamma_scales(y, p, added, gamma, epsilon)
    return result


define_operation(
    "quotient(Tensor above, Tensor below, Tensor? added, float epsilon, int sign, float weight) -> Tensor", _quotient
)
define_operation(
    "gamma_scales(Tensor y, Tensor p, Tensor? added, float gamma, float epsilon) -> (Tensor, Tensor)", _gamma_scales
)
