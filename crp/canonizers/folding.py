r"""A linear layer with batch norm in it.

After the layer, :math:`w' = s \odot w,\; b' = s \odot (b - \mu) + \beta`, with one :math:`s` per output channel. Before
it, :math:`w' = w \odot s,\; b' = b + \sum w \odot (\beta - s \odot \mu)`, with one :math:`s` per input channel; this is
exact where a constant that is added to the input reaches every output alike, or where it is zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils.weak import WeakIdKeyDictionary

from crp.canonizers.norms import _affine, _sources
from crp.layers.marks import TensorMark

#: Layers that can take in a batch norm.
LINEAR = (nn.Linear, _ConvNd)

#: Functions that can, with the names of their arguments.
FUNCTIONS = {
    "linear": ("input", "weight", "bias"),
    **dict.fromkeys(
        ("conv1d", "conv2d", "conv3d"), ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    ),
    **dict.fromkeys(
        ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
        ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"),
    ),
}

_folded: WeakIdKeyDictionary = WeakIdKeyDictionary()


class Form(NamedTuple):
    """How a linear layer uses its weight, of shape (channels, channels, *kernel).

    Attributes
    ----------
    is_transposed : bool
        Whether the first axis of the weight is that of the input channels, and not that of the output channels.
    groups : int
        Number of groups of channels that do not mix; the second axis has the channels of one group.
    is_shift_invariant : bool
        Whether a constant added to an input channel adds a constant to every output channel, at borders too.
    """

    is_transposed: bool
    groups: int
    is_shift_invariant: bool


def _form_of_layer(linear: Any) -> Form:
    """Form of a module; its own padding other than with zeros comes before the convolution."""
    if isinstance(linear, nn.Linear):
        return _form(False, {}, ())
    settings = {name: getattr(linear, name) for name in ("stride", "padding", "dilation", "groups")}
    if linear.padding_mode != "zeros":
        settings["padding"] = 0
    return _form(isinstance(linear, _ConvTransposeNd), settings, linear.kernel_size)


def _form_of_call(function: str, settings: Mapping[str, Any], weight: Tensor) -> Form:
    """Form of a call of one of `FUNCTIONS`, with its arguments by name."""
    return _form("transpose" in function, settings, weight.shape[2:])


def _form(is_transposed: bool, settings: Mapping[str, Any], kernel: tuple[int, ...]) -> Form:
    padding, groups = settings.get("padding", 0), settings.get("groups", 1)
    if is_transposed:  # elsewhere the number of inputs that meet in an output varies
        sizes = {*kernel, *_numbers(settings.get("stride", 1)), *_numbers(settings.get("dilation", 1))}
        return Form(True, groups, sizes <= {1})
    if padding == "same":
        return Form(False, groups, not any(size > 1 for size in kernel))
    return Form(False, groups, padding == "valid" or not any(_numbers(padding)))


def _numbers(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def fold(
    form: Form, weight: Tensor, bias: Tensor | None, before: nn.Module | None, after: nn.Module | None
) -> tuple[nn.Parameter, nn.Parameter]:
    """Weight and bias of a layer with the batch norms in it; computed again only when a tensor has changed.

    Optimizers, ``load_state_dict``, conversions and in-place operations are noticed; writes through ``tensor.data``,
    which torch does not count as changes, as far as a `TensorMark` sees.
    """
    tensors = [weight, bias]
    for norm in (before, after):
        tensors += _sources(norm) if norm is not None else []
    settings = [form, getattr(before, "eps", None), getattr(after, "eps", None)]
    known = _folded.get(weight)  # type: ignore[no-untyped-call]
    if known is None or known[0] != settings or not _unchanged(known[1], tensors):
        marks = [None if tensor is None else TensorMark(tensor) for tensor in tensors]
        known = _folded[weight] = (settings, marks, *_compute(form, weight, bias, before, after))
    return known[2], known[3]


def _has_shift(norm: Any) -> bool:
    """Whether a batch norm makes anything else than 0 of 0."""
    return bool(_affine(norm, torch.promote_types(norm.running_mean.dtype, torch.float32)).shift.any())


def _unchanged(marks: list[TensorMark | None], tensors: list[Tensor | None]) -> bool:
    # (a loop, as this is asked for every layer in every call)
    for mark, tensor in zip(marks, tensors, strict=True):
        if not (tensor is None if mark is None else tensor is not None and mark.is_of(tensor)):
            return False
    return True


@torch.no_grad()
def _compute(
    form: Form, weight: Tensor, bias: Tensor | None, before: nn.Module | None, after: nn.Module | None
) -> tuple[nn.Parameter, nn.Parameter]:
    dtype = torch.promote_types(weight.dtype, torch.float32)
    precise = weight.to(dtype)
    shift = torch.zeros((), dtype=dtype, device=weight.device) if bias is None else bias.to(dtype)
    factor = torch.ones((), dtype=dtype, device=weight.device)
    if before is not None:
        first = _affine(before, dtype)
        shift = shift + _response(form, precise * _per_input(form, weight, first.shift))
        factor = factor * _per_input(form, weight, first.scale)
    if after is not None:
        second = _affine(after, dtype)
        shift = (shift - second.mean) * second.scale + second.offset
        factor = factor * _per_output(form, weight, second.scale)
    # The weight's own memory format, whatever that of the factors.
    merged = torch.mul(precise, factor, out=torch.empty_like(weight))
    return nn.Parameter(merged, requires_grad=False), nn.Parameter(shift.to(weight.dtype), requires_grad=False)


def _per_output(form: Form, weight: Tensor, values: Tensor) -> Tensor:
    """Values per output channel, of a shape that broadcasts with the weight."""
    return _per_group(form, weight, values) if form.is_transposed else _per_row(weight, values)


def _per_input(form: Form, weight: Tensor, values: Tensor) -> Tensor:
    """Values per input channel, of a shape that broadcasts with the weight."""
    return _per_row(weight, values) if form.is_transposed else _per_group(form, weight, values)


def _per_row(weight: Tensor, values: Tensor) -> Tensor:
    """Values along the weight's first axis."""
    return values.reshape(-1, *(1,) * (weight.dim() - 1))


def _per_group(form: Form, weight: Tensor, values: Tensor) -> Tensor:
    """Values of all channels along the weight's second axis, which has those of one group only."""
    rows = weight.shape[0]
    spread = values.reshape(form.groups, 1, -1).expand(-1, rows // form.groups, -1)
    return spread.reshape(rows, -1, *(1,) * (weight.dim() - 2))


def _response(form: Form, weight: Tensor) -> Tensor:
    """Output channels for an input of ones, away from all borders."""
    if form.is_transposed:
        rows, columns = weight.shape[:2]
        return weight.reshape(form.groups, rows // form.groups, columns, -1).sum((1, 3)).flatten()
    return weight.flatten(1).sum(1)
