"""Kernels of `crp.rules.fused`. They go through memory in its own order, whatever the order of the axes is."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


def launch_quotient(
    above: Tensor, below: Tensor, added: Tensor | None, epsilon: float, sign: int, weight: float
) -> Tensor:
    """See `crp.rules.fused.fused_quotient`."""
    out = torch.empty_like(below)
    _quotient[_grid(below)](
        above, below, *_bias(below, added), out, below.numel(),
        EPSILON=epsilon, SIGN=sign, WEIGHT=weight, BIASED=added is not None, WIDE=_wide(below), BLOCK=_BLOCK,
    )  # fmt: skip
    return out


def launch_gamma_scales(
    y: Tensor, p: Tensor, added: Tensor | None, gamma: float, epsilon: float
) -> tuple[Tensor, Tensor]:
    """See `crp.rules.fused.fused_gamma_scales`."""
    of_z, of_p = torch.empty_like(p), torch.empty_like(p)
    _gamma_scales[_grid(p)](
        y, p, *_bias(p, added), of_z, of_p, p.numel(),
        GAMMA=gamma, EPSILON=epsilon, BIASED=added is not None, WIDE=_wide(p), BLOCK=_BLOCK,
    )  # fmt: skip
    return of_z, of_p


def _grid(tensor: Tensor) -> tuple[int]:
    return (-(-tensor.numel() // _BLOCK),)


def _bias(tensor: Tensor, added: Tensor | None) -> tuple[Tensor, int, int]:
    """Bias, and how to find its entry for a place in memory: steps in memory along its axis, and its length."""
    if added is None:
        return tensor, 1, 1
    return added.contiguous(), tensor.stride(tensor.dim() - added.dim()), added.numel()


def _wide(tensor: Tensor) -> Any:
    """Numbers in which is computed."""
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32


@triton.jit
def _divided(above, below):
    result = above / below
    if below.dtype == tl.float32:  # (whose `/` is only nearly the quotient)
        result = tl.math.div_rn(above, below)
    return result


@triton.jit
def _quotient(
    above, below, bias, step, length, out, n,
    EPSILON: tl.constexpr, SIGN: tl.constexpr, WEIGHT: tl.constexpr, BIASED: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < n
    y = tl.load(above + place, mask=inside, other=0).to(WIDE)
    z = tl.load(below + place, mask=inside, other=0).to(WIDE)
    if BIASED:
        z += tl.load(bias + (place // step) % length, mask=inside, other=0).to(WIDE)
    if SIGN > 0:
        nothing = z <= 0
        z = z + EPSILON
    elif SIGN < 0:
        nothing = z >= 0
        z = z - EPSILON
    else:
        nothing = z == 0
        z = tl.where(z < 0, z - EPSILON, z + EPSILON)
    # (where nothing is handed on, what is infinite or no number still shows)
    result = tl.where(nothing, y * 0, _divided(y, tl.where(nothing, 1, z)) * WEIGHT)
    tl.store(out + place, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gamma_scales(
    output, positive, bias, step, length, of_z, of_p, n,
    GAMMA: tl.constexpr, EPSILON: tl.constexpr, BIASED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < n
    y = tl.load(output + place, mask=inside, other=0).to(WIDE)
    p = tl.load(positive + place, mask=inside, other=0).to(WIDE)
    if BIASED:
        p += tl.load(bias + (place // step) % length, mask=inside, other=0).to(WIDE)
    below = y + GAMMA * tl.where(y > 0, p, y - p)
    nothing = (y == 0) | (below == 0)
    below = tl.where(below < 0, below - EPSILON, below + EPSILON)
    share = tl.where(nothing, y * 0, _divided(y, tl.where(nothing, 1, below)))
    tl.store(of_z + place, tl.where(y < 0, share + GAMMA * share, share).to(of_z.dtype.element_ty), mask=inside)
    tl.store(of_p + place, (tl.where(y < 0, -share, share) * GAMMA).to(of_p.dtype.element_ty), mask=inside)
