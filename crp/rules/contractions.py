"""Sums of products, such as ``(a[:, None] * weight).sum(-1)``: one operation, as ``a @ weight.T`` is.

A product alone scales, and a sum alone adds up; only together they are a dense layer, or a product of matrices. So
products are remembered, and a sum of one is taken for a call with both factors if it is of matrices: each input has
weights for several results, or a parameter weights it; of two factors that depend on the model's input, one is used for
several results, and neither divides the other, as in a norm. Others, such as the mean over positions that a mask lets
pass, stay what they are.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from crp.rules.functions import Function, look_up
from crp.rules.operands import PARSERS, _is_parameter

#: Functions that sum up a product; what is known of them then.
_SUMMING = {name: replace(look_up(torch.einsum), name=name, parse=PARSERS["matmul"]) for name in ("sum", "mean")}
#: Products that are remembered, the latest ones: factors of more would be kept in memory for nothing.
_LATEST = 8


class _Product(NamedTuple):
    """A product, both its factors, and the versions of all three."""

    result: weakref.ref[Tensor]
    factors: tuple[Tensor, Tensor]
    versions: tuple[int, ...]


class _Contraction(NamedTuple):
    """A sum of a product, as a function of both factors.

    Attributes
    ----------
    function : callable
    factors : tuple of Tensor
    known : Function
        What is known of such a function.
    """

    function: Callable[[Tensor, Tensor], Tensor]
    factors: tuple[Tensor, Tensor]
    known: Function


class _Products:
    """The latest products of a forward pass that are still there, and that a sum may make one of matrices.

    Parameters
    ----------
    is_divisor : callable
        Whether a tensor is one over something.
    """

    def __init__(self, is_divisor: Callable[[Tensor], bool]) -> None:
        self._is_divisor = is_divisor
        self._latest: list[_Product] = []

    def clear(self) -> None:
        """Forget all."""
        self._latest.clear()

    def add(self, product: object, operands: Sequence[object]) -> None:
        """Note what a product was made of."""
        tensors = [tensor for tensor in (product, *operands) if isinstance(tensor, Tensor) and not _is_special(tensor)]
        factors = tuple(tensors[1:])
        if len(factors) != 2 or not _is_of_matrices(factors, has_divisor=any(map(self._is_divisor, factors))):
            return
        there = [known for known in self._latest if known.result() is not None]
        self._latest = [*there[1 - _LATEST :], _Product(weakref.ref(tensors[0]), factors, _versions(tensors))]

    def summed(
        self, function: Callable[..., Tensor], known: Function, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> _Contraction | None:
        """The call of one of `_SUMMING` as one of both factors; None if it is no product of matrices."""
        product, *rest = args or (kwargs.get("input"),)
        found = next((known for known in self._latest if known.result() is product), None)
        if not isinstance(product, Tensor) or found is None or found.versions != _versions((product, *found.factors)):
            return None
        others = {name: value for name, value in kwargs.items() if name != "input"}
        axes = _axes(rest[0] if rest else others.get("dim", others.get("axis")), product.dim())
        if axes is None or not _is_of_matrices(found.factors, axes, any(map(self._is_divisor, found.factors))):
            return None

        def contract(left: Tensor, right: Tensor) -> Tensor:
            is_own = left is found.factors[0] and right is found.factors[1]
            return function(product if is_own else left * right, *rest, **others)

        return _Contraction(contract, found.factors, _SUMMING[known.name])


def _is_special(tensor: Tensor) -> bool:
    return tensor.is_nested or tensor.layout != torch.strided


def _versions(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(tensor._version for tensor in tensors)


def _axes(dim: Any, dims: int) -> set[int] | None:
    """Axes that are summed up, counted from the first; None where they are named."""
    if dim is None:
        return set(range(dims))
    axes = [dim] if isinstance(dim, int) else list(dim)
    return {axis % dims for axis in axes} if all(isinstance(axis, int) for axis in axes) else None


def _is_of_matrices(factors: tuple[Tensor, Tensor], axes: set[int] | None = None, has_divisor: bool = False) -> bool:
    """Whether the sum along axes of a product is a product of matrices, and no scaled sum; by default along any."""
    dims = max(tensor.dim() for tensor in factors)
    used = [_axes_used(tensor, dims) for tensor in factors]
    axes = used[0] & used[1] if axes is None else axes
    if not axes & used[0] & used[1]:  # one of them is the same for all that are summed up
        return False
    is_input = [tensor.requires_grad for tensor in factors]
    is_reused = [bool(used[1 - i] - used[i] - axes) for i in (0, 1)]
    if all(is_input):
        return all(is_reused) or (any(is_reused) and not has_divisor)
    number = is_input.index(True)
    return is_reused[number] or _is_parameter(factors[1 - number])


def _axes_used(tensor: Tensor, dims: int) -> set[int]:
    """Axes of a product of so many axes along which this factor has several entries."""
    added = dims - tensor.dim()
    entries = enumerate(zip(tensor.shape, tensor.stride(), strict=True))
    return {axis + added for axis, (size, stride) in entries if size > 1 and stride != 0}
