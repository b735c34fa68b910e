"""Functions that are several others, written out: norms, distances and deviations, of which each step has a rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from crp.rules.recurrent import RECURRENT

#: Axes of a function that reduces; None for all.
Axes: TypeAlias = int | Sequence[int] | None


def _all(x: Tensor, dim: Axes) -> tuple[int, ...]:
    return tuple(range(x.dim())) if dim is None else (dim,) if isinstance(dim, int) else tuple(dim)


def _variance(
    input: Tensor, dim: Any = None, unbiased: bool = True, keepdim: bool = False, *, correction: float | None = None
) -> Tensor:
    if isinstance(dim, bool):
        dim, unbiased = None, dim
    axes = _all(input, dim)
    left = math.prod(input.shape[axis] for axis in axes) - (int(unbiased) if correction is None else correction)
    return (input - input.mean(axes, keepdim=True)).square().sum(axes, keepdim=keepdim) / left


def _vector_norm(
    input: Tensor, p: Any = 2.0, dim: Axes = None, keepdim: bool = False, *, dtype: Any = None, out: Any = None
) -> Any:
    p = 2 if p == "fro" else p
    if not isinstance(p, int | float) or not 0 < p < math.inf or (dtype, out) != (None, None):
        return NotImplemented
    axes = _all(input, dim)
    if p == 1:
        return input.abs().sum(axes, keepdim=keepdim)
    if p == 2:
        return input.square().sum(axes, keepdim=keepdim).sqrt()
    return input.abs().pow(p).sum(axes, keepdim=keepdim).pow(1 / p)


def _norm(A: Tensor, ord: Any = None, dim: Axes = None, keepdim: bool = False, **others: Any) -> Any:
    is_of_matrix = ord is not None and len(_all(A, dim)) > 1
    return NotImplemented if is_of_matrix else _vector_norm(A, 2 if ord is None else ord, dim, keepdim, **others)


def _normalized(input: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: Any = None) -> Any:
    norm = _vector_norm(input, p, dim, keepdim=True, out=out)
    return norm if norm is NotImplemented else input / norm.clamp_min(eps)


def _distance(x1: Tensor, x2: Tensor, p: float = 2.0, eps: float = 1e-6, keepdim: bool = False) -> Any:
    return _vector_norm(x1 - x2 + eps, p, -1, keepdim)


def _distances(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: object = None) -> Any:
    return _vector_norm(x1[..., :, None, :] - x2[..., None, :, :], p, -1)


def _gated(input: Tensor, dim: int = -1) -> Tensor:
    signal, gate = input.chunk(2, dim)
    return signal * gate.sigmoid()


def _cosine(left: Tensor, right: Tensor, keywords: dict[str, Any]) -> Tensor:
    """Cosine similarity: a sum of products of directions."""
    shape, dim = torch.broadcast_shapes(left.shape, right.shape), keywords["dim"]  # type: ignore[no-untyped-call]

    def direction(tensor: Tensor) -> Tensor:
        sizes = [1] * (len(shape) - tensor.dim()) + [-1] * tensor.dim()  # (as it is along all other axes)
        sizes[dim] = shape[dim]
        return F.normalize(tensor.expand(sizes), **keywords)

    return (direction(left) * direction(right)).sum(dim)


def _bag(add: object, *operands: Tensor, **given: Any) -> Tensor:
    """`F.embedding_bag`: sums, means or maxima of rows of a table, for bags of ids, which may be of several lengths."""
    if len(operands) != 2 or given["max_norm"] is not None:
        raise NotImplementedError("embedding_bag() is known as torch.nn.functional calls it, without max_norm")
    shares: Tensor | None = given["per_sample_weights"]
    (ids, table), offsets = operands, given["offsets"]
    there = torch.ones_like(ids, dtype=torch.bool)
    if offsets is not None:
        ends = offsets[1:] if given["include_last_offset"] else torch.cat([offsets[1:], offsets.new_tensor([len(ids)])])
        starts = offsets[: len(ends)]
        places = starts[:, None] + torch.arange(int((ends - starts).max()), device=ids.device)
        there = places < ends[:, None]
        places = places.masked_fill(~there, 0)
        ids, shares = ids[places], None if shares is None else shares[places]
    if given["padding_idx"] is not None:
        there = there & (ids != given["padding_idx"] % len(table))
    rows = F.embedding(ids, table)
    if shares is not None:
        return (shares.masked_fill(~there, 0)[:, None] @ rows)[:, 0]
    if given["mode"] == "max":
        largest = rows.masked_fill(~there[..., None], -math.inf).amax(1)
        return largest.masked_fill(~there.any(1)[:, None], 0)
    summed = rows.masked_fill(~there[..., None], 0).sum(1)
    return summed / there.sum(1, keepdim=True).clamp_min(1) if given["mode"] == "mean" else summed


def _while(add: object, is_on: Callable[..., Any], step: Callable[..., Any], carried: Any, others: Any = ()) -> Any:
    """`torch.while_loop`, step by step."""
    while is_on(*carried, *others):
        carried = step(*carried, *others)
    return carried


def _side_by_side(axis: int, dims: int, at_least: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """`torch.vstack` and the like: tensors of so many axes, at least, side by side along one."""

    def place(add: object, tensors: Sequence[Tensor], **out: Any) -> Tensor:
        if all(tensor.dim() == dims - 1 for tensor in tensors):
            return torch.stack(tensors, min(axis, dims - 1), **out)  # type: ignore[arg-type]
        several = [tensor if tensor.dim() >= dims else at_least(tensor) for tensor in tensors]
        return torch.cat(several, min(axis, several[0].dim() - 1), **out)

    return place


#: By name of the function; they give NotImplemented for arguments for which they are not written.
WRITTEN_OUT: dict[str, Callable[..., Any]] = {
    "var": _variance,
    "std": lambda *args, **keywords: _variance(*args, **keywords).sqrt(),
    "norm": lambda input, p="fro", *args, **keywords: _vector_norm(input, p, *args, **keywords),
    "linalg_vector_norm": lambda x, ord=2, *args, **keywords: _vector_norm(x, ord, *args, **keywords),
    "linalg_norm": _norm,
    "normalize": _normalized,
    "pairwise_distance": _distance,
    "cdist": _distances,
    "glu": _gated,
}
#: Functions that are so in any method; these are given how they add up.
STEPS: dict[str, Callable[..., Any]] = {
    "addcmul": lambda add, input, tensor1, tensor2, value=1, **out: add(input, tensor1 * tensor2, alpha=value, **out),
    "addcdiv": lambda add, input, tensor1, tensor2, value=1, **out: add(input, tensor1 / tensor2, alpha=value, **out),
    "lerp": lambda add, input, end, weight, **out: add(input, weight * (end - input), **out),
    "cond": lambda add, is_so, then, otherwise, operands=(): (then if is_so else otherwise)(*operands),
    "while_loop": _while,
    "embedding_bag": _bag,
    **dict.fromkeys(("row_stack", "vstack"), _side_by_side(0, 2, torch.atleast_2d)),
    "hstack": _side_by_side(1, 1, torch.atleast_1d),
    "dstack": _side_by_side(2, 3, torch.atleast_3d),
    "column_stack": _side_by_side(1, 2, lambda tensor: tensor.reshape(-1, 1)),
    "cosine_similarity": lambda add, x1, x2, dim=1, eps=1e-8: _cosine(x1, x2, {"dim": dim, "eps": eps}),
    **{name: lambda add, *args, steps=steps, **keywords: steps(*args, **keywords) for name, steps in RECURRENT.items()},
}
