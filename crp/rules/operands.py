"""Sums of weighted inputs, taken apart: which operand of a call is the input, which the weight and which the bias.

The operand that depends on the model's input is the input, in whatever place it stands. The other operand is the
weight, whatever made it. A call in which both depend on the model's input is a product, and is not taken apart.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from string import ascii_letters
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor, nn


class Operands(NamedTuple):
    """A call of an affine function.

    Attributes
    ----------
    a : Tensor
        What depends on the model's input.
    weight : Tensor
    bias : Tensor or None
        What is added, if it is constant.
    run : callable
        ``run(a, weight, bias)`` is the call with other operands.
    space : int
        Number of axes over which the weight slides.
    convolves : bool
        Whether the weight is a kernel of shape (outputs, inputs in a group, *kernel shape), whose outputs sum up ``a``.
    added : Tensor or None
        What else is added, as it depends on the model's input, or is infinite or nearly so; `run` does not add it.
    """

    a: Tensor
    weight: Tensor
    bias: Tensor | None
    run: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    space: int = 0
    convolves: bool = False
    added: Tensor | None = None


#: Stands for operands of a call that only scales, and perhaps moves, entries of its input.
NOTHING_SUMMED = Operands(torch.empty(0), torch.empty(0), None, lambda a, w, b: a * w)
#: From function, arguments, keywords, and the test whether a tensor depends on the model's input.
Parse: TypeAlias = Callable[
    [Callable[..., Any], Sequence[Any], Mapping[str, Any], Callable[[Tensor], bool]], Operands | None
]


def _layer(slides: bool = False, convolves: bool = False) -> Parse:
    """Calls of ``f(input, weight, bias, ...)``."""

    def parse(
        function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], depends: Callable[[Tensor], bool]
    ) -> Operands | None:
        others = dict(kwargs)
        first, weight, bias = [
            args[i] if i < len(args) else others.pop(name, None) for i, name in enumerate(("input", "weight", "bias"))
        ]
        rest, space, added = args[3:], weight.dim() - 2 if slides else 0, None
        if bias is not None and depends(bias):
            added, bias = bias.reshape(-1, *(1,) * space) if space else bias, None
        if depends(weight):  # a weight that is made of the input, for data that are constant
            if not depends(first):
                swapped = lambda a, w, b: function(w, a, b, *rest, **others)  # noqa: E731
                return Operands(weight, _dense(first), bias, swapped, space, added=added)
            return None
        weight = _dense(weight)
        if not depends(first):  # only the addend depends on the input
            return None
        if others or rest:
            run = lambda a, w, b: function(a, w, b, *rest, **others)  # noqa: E731
            return Operands(first, weight, bias, run, space, convolves, added)
        return Operands(first, weight, bias, function, space, convolves, added)

    return parse


def _product(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], depends: Callable[[Tensor], bool]
) -> Operands | None:
    """Calls of ``f(left, right)``."""
    names = [
        name for name in ("input", "self", "other", "mat1", "mat2", "mat_a", "mat_b", "vec", "tensor") if name in kwargs
    ]
    left, right, *rest = [*args[:2], *(kwargs[name] for name in names), *args[2:]]
    if not (isinstance(left, Tensor) and isinstance(right, Tensor)) or (depends(left) and depends(right)):
        return None
    others = {key: value for key, value in kwargs.items() if key not in names}
    if depends(left):
        return Operands(left, _dense(right), None, lambda a, w, b: function(a, w, *rest, **others))
    return Operands(right, _dense(left), None, lambda a, w, b: function(w, a, *rest, **others))


def _is_parameter(tensor: Tensor) -> bool:
    """Whether a tensor is a parameter, or a view of one."""
    return isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter)


def _dense(weight: Tensor) -> Tensor:
    return weight.to_dense() if weight.layout != torch.strided else weight


def _sum_of_product(product: Callable[[Tensor, Tensor], Tensor], *names: str) -> Parse:
    """Calls of ``f(bias, left, right, beta, alpha)``: ``beta bias + alpha left right``."""

    def parse(
        function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], depends: Callable[[Tensor], bool]
    ) -> Operands | None:
        bias, left, right = (args[i] if i < len(args) else kwargs[name] for i, name in enumerate(names))
        if not isinstance(bias, Tensor) or depends(left) == depends(right):  # both, or the bias alone
            return None
        alpha, beta, is_left = kwargs.get("alpha", 1), kwargs.get("beta", 1), depends(left)
        a, weight = (left, right) if is_left else (right, left)

        def run(a: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
            z = product(a, w) if is_left else product(w, a)
            return z if b is None else z + b

        weight, scaled = _dense(weight) if alpha == 1 else _dense(weight) * alpha, bias if beta == 1 else bias * beta
        if depends(bias):
            return Operands(a, weight, None, run, added=scaled)
        if _is_parameter(bias):
            return Operands(a, weight, scaled, run)
        # (a mask of attention: no rule can divide by minus infinity, or by the least number)
        hides = scaled.abs() > torch.finfo(scaled.dtype).max / 2
        return Operands(a, weight, scaled.masked_fill(hides, 0), run, added=scaled.masked_fill(~hides, 0))

    return parse


def _summed_bmm(left: Tensor, right: Tensor) -> Tensor:
    return torch.bmm(left, right).sum(0)


def _einsum(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], depends: Callable[[Tensor], bool]
) -> Operands | None:
    equation, *operands = args
    listed = len(operands) == 1 and isinstance(operands[0], list | tuple)
    if not isinstance(equation, str):  # operands and lists of axes in turn
        return None
    if listed:
        operands = list(operands[0])

    def call(equation: str, *operands: Tensor) -> Tensor:
        return function(equation, list(operands)) if listed else function(equation, *operands)  # type: ignore[no-any-return]

    dependent = [operand for operand in operands if depends(operand)]
    if len(dependent) != 1:
        return None
    (a,) = dependent
    place = next(i for i, operand in enumerate(operands) if operand is a)
    constants = [operand for operand in operands if operand is not a]
    axes, result = _axes(equation, operands)
    if {*axes[place]} <= {*result} and len({*axes[place]}) == len(axes[place]):
        return NOTHING_SUMMED
    if not constants:
        return None
    if len(constants) == 1:

        def run(a: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
            return call(equation, *((a, w) if place == 0 else (w, a)))

        return Operands(a, constants[0], None, run)
    # Several constants are one weight: their product, with every axis that the input or the result has.
    rest = [axis for i, axis in enumerate(axes) if i != place]
    kept = "".join(dict.fromkeys(c for axis in rest for c in axis if c in axes[place] or c in result))
    weight = call(f"{','.join(rest)}->{kept}", *constants)
    return Operands(a, weight, None, lambda a, w, b: call(f"{axes[place]},{kept}->{result}", a, w))


def _steps(equation: Any, *operands: Any) -> Callable[[], Tensor] | None:
    """An einsum of tensors of which two depend on the input, as the operations that it consists of; None if it is one.

    Of several operands, two are multiplied at a time, so that constants weight what is summed up with them; and two
    that are multiplied entry by entry are a product, which may be summed up.
    """
    tensors = list(operands[0]) if len(operands) == 1 else list(operands)
    if not isinstance(equation, str) or len(tensors) < 2:
        return None
    axes, result = _axes(equation, tensors)
    if len(axes) == 2:
        return _entry_by_entry(tensors, axes, result)

    def multiply() -> Tensor:
        product, own = tensors[0], axes[0]
        for number, (tensor, other) in enumerate(zip(tensors[1:], axes[1:], strict=True), 2):
            later = {*result, *"".join(axes[number:])}
            kept = result if number == len(axes) else "".join(dict.fromkeys(c for c in own + other if c in later))
            product, own = torch.einsum(f"{own},{other}->{kept}", product, tensor), kept
        return cast(Tensor, product)

    return multiply


def _axes(equation: str, tensors: Sequence[Tensor]) -> tuple[list[str], str]:
    """Axes of operands and of the result of an einsum; letters stand for ``...``."""
    terms, arrow, result = equation.replace(" ", "").partition("->")
    axes = terms.split(",")
    if not arrow:
        result = "".join(sorted(c for c in {*terms} - {*",."} if terms.count(c) == 1))
        result = f"...{result}" if "." in terms else result
    counts = [
        tensor.dim() - len(own.replace(".", "")) if "." in own else 0
        for own, tensor in zip(axes, tensors, strict=False)
    ]
    letters = "".join(sorted({*ascii_letters} - {*result, *"".join(axes)})[: max(counts)])
    others = [own.replace("...", letters[len(letters) - count :]) for own, count in zip(axes, counts, strict=False)]
    return others, result.replace("...", letters)


def _entry_by_entry(factors: Sequence[Tensor], axes: Sequence[str], result: str) -> Callable[[], Tensor] | None:
    """A product of two tensors with these axes, or its sum; None if it is one of matrices."""
    summed = "".join(axis for axis in axes[0] if axis not in result)
    is_of_matrices = {*axes[0]} != {*axes[1]} and {*result} != {*axes[0], *axes[1]}
    if is_of_matrices or any(len({*own}) < len(own) for own in axes):
        return None

    def multiply() -> Tensor:
        left, right = (_aligned(factor, own, result + summed) for factor, own in zip(factors, axes, strict=True))
        return left.mul(right).sum(tuple(range(-len(summed), 0))) if summed else left.mul(right)

    return multiply


def _aligned(tensor: Tensor, own: str, axes: str) -> Tensor:
    """A tensor with all these axes, in their order; it has its ``own`` ones of them."""
    if own == axes:
        return tensor
    ordered = tensor.permute([own.index(axis) for axis in axes if axis in own])
    return ordered[tuple(slice(None) if axis in own else None for axis in axes)]


def _bilinear(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], depends: Callable[[Tensor], bool]
) -> Operands | None:
    """``y_o = sum_ij x_i W_oij z_j + b_o``: the product of ``W`` and the constant one of ``x``, ``z`` is the weight."""
    names = ("input1", "input2", "weight", "bias")
    arguments: list[Any] = [args[i] if i < len(args) else kwargs.get(name) for i, name in enumerate(names)]
    left, right, kernel, bias = arguments
    if depends(kernel) or depends(left) == depends(right):
        return None
    if depends(left):
        a, weight = left, torch.einsum("oij,...j->...oi", kernel, right)
    else:
        a, weight = right, torch.einsum("oij,...i->...oj", kernel, left)

    def run(a: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        z = (w @ a[..., None])[..., 0]
        return z if b is None else z + b

    is_free = bias is not None and depends(bias)
    return Operands(a, weight, None if is_free else bias, run, added=bias if is_free else None)


def _chain(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], depends: Callable[[Tensor], bool]
) -> Operands | None:
    """Product of several matrices, of which the first or the last depends on the input."""
    matrices = list(args[0]) if len(args) == 1 and isinstance(args[0], list | tuple) else list(args)
    dependent = [i for i, matrix in enumerate(matrices) if depends(matrix)]
    if dependent == [0]:
        weight = functools.reduce(torch.matmul, matrices[1:])
        return Operands(matrices[0], weight, None, lambda a, w, b: a @ w)
    if dependent == [len(matrices) - 1]:
        weight = functools.reduce(torch.matmul, matrices[:-1])
        return Operands(matrices[-1], weight, None, lambda a, w, b: w @ a)
    return None


def _sparse_product(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], depends: Callable[[Tensor], bool]
) -> Operands | None:
    """Calls of ``torch.sparse.mm(sparse, dense, reduce)``; "mean" is of the entries that each row stores."""
    values = dict(zip(("sparse", "dense", "reduce"), args, strict=False)) | dict(kwargs)
    reduce = values.pop("reduce", "sum")
    found = _product(torch.matmul, [values["sparse"], values["dense"]], {}, depends)
    if found is None or reduce == "sum":
        return found
    if reduce != "mean":  # the largest is chosen, or the smallest
        return None
    stored = values["sparse"].crow_indices().diff().clamp(min=1)
    return found._replace(weight=found.weight / stored[:, None])


def _in_parts(operands: Operands) -> Operands:
    """Sums of weighted complex numbers as sums of real ones: of both parts of each, along a new last axis.

    The weight is that of each part of the input (first axis) for each part of the output (second axis).
    """
    a, (real, imaginary) = operands.a.resolve_conj(), torch.view_as_real(operands.weight.resolve_conj()).unbind(-1)
    weight = torch.stack([real, imaginary, -imaginary, real]).reshape(2, 2, *real.shape)
    bias = None if operands.bias is None else torch.view_as_real(operands.bias.resolve_conj())

    def run(a: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        added = (None, None) if b is None else b.unbind(-1)
        of_both = [operands.run(a[..., 0], w[0, k], added[k]) + operands.run(a[..., 1], w[1, k], None) for k in (0, 1)]
        return torch.stack(of_both, -1)

    return Operands(torch.view_as_real(a), weight, bias, run, added=operands.added)


_CONVOLUTION, _TRANSPOSED = _layer(slides=True, convolves=True), _layer(slides=True)
#: By name of the function.
PARSERS: dict[str, Parse] = {
    **{f"conv{n}d": _CONVOLUTION for n in (1, 2, 3)},
    "convolution": _TRANSPOSED,  # (or not, as one of its arguments says)
    **{f"conv_transpose{n}d": _TRANSPOSED for n in (1, 2, 3)},
    "linear": _layer(),
    **dict.fromkeys(("matmul", "mm", "bmm", "mv", "dot", "vdot", "grouped_mm", "inner", "tensordot"), _product),
    "sparse_mm": _sparse_product,
    "rmatmul": lambda _, args, kwargs, depends: _product(torch.matmul, args[::-1], kwargs, depends),
    "addmm": _sum_of_product(torch.matmul, "input", "mat1", "mat2"),
    "sparse_addmm": _sum_of_product(torch.matmul, "mat", "mat1", "mat2"),
    "baddbmm": _sum_of_product(torch.matmul, "input", "batch1", "batch2"),
    "addmv": _sum_of_product(torch.matmul, "input", "mat", "vec"),
    "addbmm": _sum_of_product(_summed_bmm, "input", "batch1", "batch2"),
    "einsum": _einsum,
    **dict.fromkeys(("chain_matmul", "linalg_multi_dot"), _chain),
    "bilinear": _bilinear,
}
#: Names of the operand that products only add, and its position.
ADDED: dict[str, tuple[int, tuple[str, ...]]] = {
    **dict.fromkeys(("addbmm", "addmm", "addmv", "addr", "baddbmm"), (0, ("input", "self"))),
    **dict.fromkeys(("convolution", "linear", *(f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3))),
                    (2, ("bias",))),
    "sparse_addmm": (0, ("mat",)),
    "bilinear": (3, ("bias",)),
}  # fmt: skip
