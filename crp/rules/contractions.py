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

import itertools
import operator
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
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
_divides = operator.attrgetter("divides")
#: Products that are remembered, the latest ones: factors of more would be kept in memory for nothing.
_LATEST = 8


class _Product(NamedTuple):
    """A product, both its factors, and the versions of all three.

    It may be a quotient, which ``divides`` by the second; or a copy, as the output of a layer that is named.
    """

    result: weakref.ref[Tensor]
    factors: tuple[Any, Any]
    versions: tuple[int, ...]
    divides: bool = False
    is_named: bool = False


class _Factor(NamedTuple):
    """A factor of a product, which may be divided by it; and whether a layer that is named stands behind it."""

    value: Any
    divides: bool = False
    is_named: bool = False


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

    def add_copy(self, copy: Tensor, original: Tensor, is_named: bool) -> None:
        """Note a copy; whether it is the output of a layer that is named, through which relevance flows."""
        if (known := self._found(original)) is not None:
            versions = (copy._version, *known.versions[1:])
            is_named |= known.is_named
            self._add(known._replace(result=weakref.ref(copy), versions=versions, is_named=is_named))

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
        values = op.factors()
        if len(values) != 2 or not any(map(self._found, values)):
            return None
        both = _Factor(values[0]), _Factor(values[1], op.known.canonical == "div")
        ways = itertools.product(*map(self._within, both))
        pair = next(((x, y, [*left, *right]) for (x, left), (y, right) in ways if _are_of_one(x, y, common)), None)
        if pair is None or not pair[2]:
            return None
        if any(factor.is_named for factor in pair[2]):
            raise InputError(
                f"{op.known} has a factor that is made of what a product before it reads, so that all is one product: "
                "no relevance flows through what is named as a layer inside. Name one before, or behind"
            )
        return lambda: _multiplied(*pair)

    def _within(self, factor: _Factor) -> Iterator[tuple[_Factor, list[_Factor]]]:
        """A factor, and each that it is a product of, with those beside it."""
        yield factor, []
        if (known := self._found(factor.value)) is not None:
            left = _Factor(known.factors[0], factor.divides, known.is_named)
            right = _Factor(known.factors[1], factor.divides != known.divides, known.is_named)
            for one, other in ((left, right), (right, left)):
                yield from ((inner, [*beside, other]) for inner, beside in self._within(one))

    def _is_matrices(self, factors: Sequence[Tensor], axes: set[int] | None = None) -> bool:
        return _is_of_matrices(factors, axes, any(map(self._is_divisor, factors)))

    def summed(
        self, function: Callable[..., Tensor], known: Function, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> _Contraction | None:
        """The call of one of `_SUMMING` as one of both factors; None if it is no product of matrices."""
        product, *rest = args or (kwargs["input"],)
        found = self._found(product)
        is_product = found is not None and not (found.divides or found.is_named)
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


def _are_of_one(x: _Factor, y: _Factor, common: Callable[[Sequence[Tensor]], object]) -> bool:
    """Whether both are made of one tensor, entry by entry."""
    values = x.value, y.value
    is_input = all(isinstance(value, Tensor) and value.requires_grad for value in values)
    return is_input and x.value.shape == y.value.shape and common(values) is not None


def _multiplied(one: _Factor, other: _Factor, beside: list[_Factor]) -> Tensor:
    """Product of factors, of which two come first."""
    one, other = sorted((one, other), key=_divides)
    first = _BY[one.divides != other.divides](one.value, other.value)
    if one.value is other.value and one.divides != other.divides:
        first = first.detach()  # (it is 1, whatever it is made of)
    begin, *factors = sorted((_Factor(first, one.divides), *beside), key=_divides)
    product: Tensor = begin.value
    for factor in factors:
        product = _BY[factor.divides](product, factor.value)
    return product


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
