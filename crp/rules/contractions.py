"""Sums of products, such as ``(a[:, None] * weight).sum(-1)``: one operation, as ``a @ weight.T`` is.

A product alone scales, and a sum alone adds up; only together they are a dense layer, or a product of matrices. So
products are remembered, and a sum of one is taken for a call with both factors if it is of matrices: each input has
weights for several results, or a parameter weights it; of two factors that depend on the model's input, one is used for
several results, and neither divides the other, as in a norm. Others, such as the mean over positions that a mask lets
pass, stay what they are.

And a product of several factors, such as ``a * b * sigmoid(a)``, is the same in whatever order they are multiplied:
those that are made of one tensor, entry by entry, come first, so that an activation is one, here ``silu(a)``.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from crp.errors import InputError
from crp.rules.functions import Function, look_up
from crp.rules.operands import PARSERS, _is_parameter
from crp.rules.operation import Operation

#: Functions that sum up a product; what is known of them then.
_SUMMING = {name: replace(look_up(torch.einsum), name=name, parse=PARSERS["matmul"]) for name in ("sum", "mean")}
#: What multiplies, or divides.
_BY = (operator.mul, operator.truediv)
#: Products that are remembered, the latest ones: factors of more would be kept in memory for nothing.
_LATEST = 8


class _Product(NamedTuple):
    """A product, both its factors, and the versions of all three.

    It may be a quotient, which ``divides`` by the second; or a copy of one, as the output of a layer that is named.
    """

    result: weakref.ref[Tensor]
    factors: tuple[Any, Any]
    versions: tuple[int, ...]
    divides: bool = False
    is_copied: bool = False


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

    def add(self, product: object, operands: Sequence[Any], divides: bool = False) -> None:
        """Note what a product, or a quotient, was made of."""
        tensors = [value for value in operands if isinstance(value, Tensor)]
        if len(operands) != 2 or not isinstance(product, Tensor) or any(map(_is_special, (product, *tensors))):
            return
        is_of_inputs = all(tensor.requires_grad for tensor in tensors)
        if any(map(self._found, tensors)) or (len(tensors) == 2 and (is_of_inputs or self._is_matrices(tensors))):
            versions = _versions((product, *operands))
            self._add(_Product(weakref.ref(product), (operands[0], operands[1]), versions, divides))

    def add_copy(self, copy: Tensor, original: Tensor) -> None:
        """Note a copy, through which the relevance of a named layer flows."""
        if (known := self._found(original)) is not None:
            versions = (copy._version, *known.versions[1:])
            self._add(known._replace(result=weakref.ref(copy), versions=versions, is_copied=True))

    def _add(self, product: _Product) -> None:
        there = [known for known in self._latest if known.result() is not None]
        self._latest = [*there[1 - _LATEST :], product]

    def _found(self, tensor: object) -> _Product | None:
        """What is remembered of a product whose factors are what they were."""
        known = next((known for known in self._latest if known.result() is tensor), None)
        return known if known is not None and known.versions == _versions((tensor, *known.factors)) else None

    def regrouped(self, op: Operation, common: Callable[[Sequence[Tensor]], object]) -> Callable[[], Tensor] | None:
        """A product in which factors come first that are made of one tensor, entry by entry; None if they do so.

        Raises
        ------
        ValueError
            If relevance shall flow through what is multiplied in another order.
        """
        values, divides = op.factors(), op.known.canonical == "div"
        known, orders = [self._found(value) for value in values], list[tuple[Any, Any, bool, Any, bool]]()
        if len(values) != 2 or not any(known) or _are_of_one(x := values[0], y := values[1], common):
            return None
        if (product := known[0]) is not None:
            (left, right), by = product.factors, product.divides
            orders.append((left, y, divides, right, by))
            if not (by and divides):
                orders.append((y, right, True, left, False) if by else (right, y, divides, left, False))
        if (product := known[1]) is not None:
            (left, right), by = product.factors, product.divides != divides
            orders += [(x, left, divides, right, by), (x, right, by, left, divides)]
        order = next((order for order in orders if self._share(order[0], order[1], common)), None)
        if order is None:
            return None
        if any(product is not None and product.is_copied for product in known):
            raise InputError(
                f"{op.known} has a factor that is made of what a product before it reads, so that all is one product: "
                "no relevance flows through what is named as a layer inside. Name one before, or behind"
            )
        one, other, is_over, rest, is_below = order
        return lambda: _BY[is_below](_BY[is_over](one, other), rest)

    def _share(self, value: Any, other: Any, common: Callable[[Sequence[Tensor]], object]) -> bool:
        """Whether a factor of one is made of the same tensor as one of the other, entry by entry."""
        for one, second in ((value, other), (other, value)):
            if (known := self._found(one)) is not None:
                return any(self._share(factor, second, common) for factor in known.factors)
        return _are_of_one(value, other, common)

    def _is_matrices(self, factors: Sequence[Tensor], axes: set[int] | None = None) -> bool:
        return _is_of_matrices(factors, axes, any(map(self._is_divisor, factors)))

    def summed(
        self, function: Callable[..., Tensor], known: Function, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> _Contraction | None:
        """The call of one of `_SUMMING` as one of both factors; None if it is no product of matrices."""
        product, *rest = args or (kwargs["input"],)
        found = self._found(product)
        is_product = found is not None and not (found.divides or found.is_copied)
        if found is None or not is_product or not all(isinstance(factor, Tensor) for factor in found.factors):
            return None
        others = {name: value for name, value in kwargs.items() if name != "input"}
        axes = _axes(rest[0] if rest else others.get("dim", others.get("axis")), product.dim())
        if axes is None or not self._is_matrices(found.factors, axes):
            return None

        def contract(left: Tensor, right: Tensor) -> Tensor:
            is_own = left is found.factors[0] and right is found.factors[1]
            return function(product if is_own else left * right, *rest, **others)

        return _Contraction(contract, found.factors, _SUMMING[known.name])


def _are_of_one(value: Any, other: Any, common: Callable[[Sequence[Tensor]], object]) -> bool:
    """Whether both are made of one tensor, entry by entry."""
    is_input = all(isinstance(one, Tensor) and one.requires_grad for one in (value, other))
    return is_input and value.shape == other.shape and common((value, other)) is not None


def _is_special(tensor: Tensor) -> bool:
    return tensor.is_nested or tensor.layout != torch.strided


def _versions(values: Sequence[Any]) -> tuple[int, ...]:
    return tuple(getattr(value, "_version", 0) for value in values)


def _axes(dim: Any, dims: int) -> set[int] | None:
    """Axes that are summed up, counted from the first; None where they are named."""
    if dim is None:
        return set(range(dims))
    axes = [dim] if isinstance(dim, int) else list(dim)
    return {axis % dims for axis in axes} if all(isinstance(axis, int) for axis in axes) else None


def _is_of_matrices(factors: Sequence[Tensor], axes: set[int] | None = None, has_divisor: bool = False) -> bool:
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
