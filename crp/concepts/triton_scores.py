"""Kernel of `crp.concepts.fused`: one pass over a layer, wherever its channels lie in memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Entries that a program reads at once, of short layers and of long ones, of which few programs read much; and concepts
#: among them where those are neighbours in memory.
_TILE, _LONG_TILE, _NEIGHBOURS = 2048, 8192, 32


def launch_scores(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `crp.concepts.fused.fused_scores`."""
    rows, n, length = values.shape
    wide = torch.promote_types(values.dtype, torch.float32)
    total, largest = (torch.empty((rows, n), dtype=wide, device=values.device) for _ in range(2))
    position = torch.empty((rows, n), dtype=torch.int64, device=values.device)
    tile = _TILE if length < _TILE else _LONG_TILE
    at_once = _NEIGHBOURS if values.stride(1) == 1 else max(1, tile // min(triton.next_power_of_2(length), tile))
    _scores[(rows, triton.cdiv(n, at_once))](
        values, *values.stride(), total, largest, position, n, length,
        WIDE=tl.float64 if wide == torch.float64 else tl.float32, CONCEPTS=at_once, PLACES=tile // at_once,
        num_warps=8 if tile == _LONG_TILE else 4,
    )  # fmt: skip
    return total, largest, position


@triton.jit
def _scores(
    values, row_step, concept_step, place_step, total, largest, position, n, length,
    WIDE: tl.constexpr, CONCEPTS: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    concept = tl.program_id(1) * CONCEPTS + tl.arange(0, CONCEPTS)
    begins = values + row * row_step + concept[:, None] * concept_step
    place = tl.arange(0, PLACES)[None, :]
    # Each place of the tile keeps the sum and the first largest value of what it has seen.
    sums = tl.zeros((CONCEPTS, PLACES), WIDE)
    best = tl.full((CONCEPTS, PLACES), float("-inf"), WIDE)
    where = tl.zeros((CONCEPTS, PLACES), tl.int32) + length
    for first in range(0, length, PLACES):
        at = first + place
        inside = (concept[:, None] < n) & (at < length)
        value = tl.load(begins + at * place_step, mask=inside, other=float("-inf")).to(WIDE)
        sums += tl.where(inside, value, 0)
        # (what is no number counts as the largest, as it does for torch's `argmax`)
        better = inside & ((value > best) | ((value != value) & (best == best)) | (where == length))
        best = tl.where(better, value, best)
        where = tl.where(better, at, where)
    no_number = best != best
    spoilt = tl.max(no_number.to(tl.int32), 1) > 0
    top = tl.max(tl.where(no_number, float("-inf"), best), 1)
    hit = tl.where(spoilt[:, None], no_number, best == top[:, None])
    out = row * n + concept
    stored = concept < n
    tl.store(total + out, tl.sum(sums, 1), mask=stored)
    tl.store(largest + out, tl.where(spoilt, float("nan"), top), mask=stored)
    tl.store(position + out, tl.min(tl.where(hit, where, length), 1).to(tl.int64), mask=stored)
