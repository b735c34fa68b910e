r"""A linear layer with batch norm in it.

After the layer, :math:`w' = s \odot w,\; b' = s \odot (b - \mu) + \beta`, with one :math:`s` per output channel. Before
it, :math:`w' = w \odot s,\; b' = b + \sum w \odot (\beta - s \odot \mu)`, with one :math:`s` per input channel; this is
exact where a constant that is added to the input reaches every output alike, or where it is zero.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils.weak import WeakIdKeyDictionary

from crp.canonizers import norms

#: Layers that can take in a batch norm.
LINEAR = (nn.Linear, _ConvNd)

_folded: WeakIdKeyDictionary = WeakIdKeyDictionary()


def fold(linear: Any, before: nn.Module | None, after: nn.Module | None) -> tuple[nn.Parameter, nn.Parameter]:
    """Weight and bias of the layer with the batch norms in it; computed again only when a tensor has changed.

    Optimizers, ``load_state_dict``, conversions and in-place operations are noticed; writes through ``tensor.data``,
    which torch does not count as changes, are not.
    """
    tensors = [linear.weight, linear.bias]
    for norm in (before, after):
        tensors += norms.sources(norm) if norm is not None else []
    settings = [getattr(norm, "eps", None) for norm in (before, after)]
    known = _folded.get(linear)  # type: ignore[no-untyped-call]
    if known is None or known[0] != settings or not _unchanged(known[1], tensors):
        marks = [None if tensor is None else _Mark(tensor) for tensor in tensors]
        known = _folded[linear] = (settings, marks, *_compute(linear, before, after))
    return known[2], known[3]


def is_shift_invariant(linear: Any) -> bool:
    """Whether a constant added to an input channel adds a constant to every output channel, at borders too."""
    if isinstance(linear, nn.Linear):
        return True
    if isinstance(linear, _ConvTransposeNd):  # elsewhere the number of inputs that meet in an output varies
        return {*linear.kernel_size, *linear.stride, *linear.dilation} == {1}
    if linear.padding_mode != "zeros" or linear.padding == "valid":
        return True
    return not any(k > 1 for k in linear.kernel_size) if linear.padding == "same" else not any(linear.padding)


def has_shift(norm: Any) -> bool:
    """Whether a batch norm makes anything else than 0 of 0."""
    with torch.no_grad():
        return bool(norms.affine(norm, torch.promote_types(norm.running_mean.dtype, torch.float32)).shift.any())


class _Mark:
    """Recognizes a tensor as long as nobody writes to it, or gives it other memory."""

    __slots__ = ("_state", "_storage", "_tensor")

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = weakref.ref(tensor)
        # While this is held, no other storage can have the same address.
        self._storage = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
        self._state = self._state_of(tensor)

    def fits(self, tensor: Tensor | None) -> bool:
        return tensor is not None and self._tensor() is tensor and self._state == self._state_of(tensor)

    @staticmethod
    def _state_of(tensor: Tensor) -> tuple[object, ...]:
        version = object() if tensor.is_inference() else tensor._version  # inference tensors do not count: never equal
        address = tensor.untyped_storage()._cdata
        return version, address, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _unchanged(marks: list[_Mark | None], tensors: list[Tensor | None]) -> bool:
    return all(
        tensor is None if mark is None else mark.fits(tensor) for mark, tensor in zip(marks, tensors, strict=True)
    )


@torch.no_grad()
def _compute(linear: Any, before: nn.Module | None, after: nn.Module | None) -> tuple[nn.Parameter, nn.Parameter]:
    weight = linear.weight
    dtype = torch.promote_types(weight.dtype, torch.float32)
    precise = weight.to(dtype)
    bias = torch.zeros((), dtype=dtype, device=weight.device) if linear.bias is None else linear.bias.to(dtype)
    factor = torch.ones((), dtype=dtype, device=weight.device)
    if before is not None:
        first = norms.affine(before, dtype)
        bias = bias + _response(linear, precise * _per_input(linear, first.shift))
        factor = factor * _per_input(linear, first.scale)
    if after is not None:
        second = norms.affine(after, dtype)
        bias = (bias - second.mean) * second.scale + second.offset
        factor = factor * _per_output(linear, second.scale)
    # The weight's own memory format, whatever that of the factors.
    merged = torch.mul(precise, factor, out=torch.empty_like(weight))
    return nn.Parameter(merged, requires_grad=False), nn.Parameter(bias.to(weight.dtype), requires_grad=False)


def _per_output(linear: Any, values: Tensor) -> Tensor:
    """Values per output channel, of a shape that broadcasts with the weight."""
    if isinstance(linear, _ConvTransposeNd):
        return _per_group(linear, values)
    return values.reshape(-1, *(1,) * (linear.weight.dim() - 1))


def _per_input(linear: Any, values: Tensor) -> Tensor:
    """Values per input channel, of a shape that broadcasts with the weight."""
    if isinstance(linear, _ConvTransposeNd):
        return values.reshape(-1, *(1,) * (linear.weight.dim() - 1))
    return _per_group(linear, values)


def _per_group(linear: Any, values: Tensor) -> Tensor:
    """Values of all channels along the weight's second axis, which has those of one group only."""
    groups, rows = getattr(linear, "groups", 1), linear.weight.shape[0]
    spread = values.reshape(groups, 1, -1).expand(-1, rows // groups, -1)
    return spread.reshape(rows, -1, *(1,) * (linear.weight.dim() - 2))


def _response(linear: Any, weight: Tensor) -> Tensor:
    """Output channels for an input of ones, away from all borders."""
    if isinstance(linear, _ConvTransposeNd):
        rows, columns = weight.shape[:2]
        return weight.reshape(linear.groups, rows // linear.groups, columns, -1).sum((1, 3)).flatten()
    return weight.flatten(1).sum(1)
