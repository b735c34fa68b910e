"""Which axis of a layer's output is that of its channels: the operation that made the tensor tells.

Convolutions, batch norms and poolings put out (batch, channel, *space), dense layers and layer norms (..., channel).
Reshaping operations move that axis, and operations on entries leave it where it is. Where a tensor was made in another
way, nothing is known.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import Any, NamedTuple

from torch import nn

from crp.layers import evaluating, unwrap
from crp.layers.addresses import attention_around
from crp.trace.cache import recorded, structure
from crp.trace.record import FunctionCall, ModuleCall, Node, Reader, TensorKind, Trace

_LAST = frozenset("linear addmm layer_norm rms_norm embedding multi_head_attention_forward".split())  # noqa: SIM905
_SECOND = frozenset(
    """conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d batch_norm group_norm instance_norm
    local_response_norm avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
    max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d interpolate
    pixel_shuffle pixel_unshuffle""".split()  # noqa: SIM905
)
#: Functions of which nothing is known, even where the shape stays.
_MIXING = frozenset(
    "T bmm baddbmm einsum tensordot mm matmul rmatmul chain_matmul outer kron gather take_along_dim".split()  # noqa: SIM905
)
_SWAPS = frozenset("transpose swapaxes swapdims mT mH adjoint".split())  # noqa: SIM905
_RESHAPES = frozenset("reshape view flatten unflatten squeeze unsqueeze reshape_as view_as".split())  # noqa: SIM905
_RESIZES = frozenset(
    "cat concat concatenate pad chunk split tensor_split unsafe_chunk unsafe_split split_with_sizes".split()  # noqa: SIM905
)
#: Operations that are followed from a tensor down to what tells its axis.
_DEEPEST = 400


class ChannelAxis(NamedTuple):
    """Axis of a layer's channels.

    Attributes
    ----------
    axis : int or None
        1, or -1 for the last of several; None where it is not known.
    shape : tuple of int
        Of what the layer puts out, with the batch's axis.
    maker : str
        Function that made it.
    """

    axis: int | None
    shape: tuple[int, ...]
    maker: str


def channel_axes(model: nn.Module, data: Any, layers: Iterable[str]) -> dict[str, ChannelAxis]:
    """Axis of the channels of layers, from a forward pass in evaluation; without layers that it does not call."""
    model, args = unwrap(model), () if isinstance(data, dict) else (data,)
    with evaluating(model):
        record = recorded(model, args, {} if args else data, structure(model), alike=bool(args))
    found = {}
    for name in layers:
        layer, is_input, number = record.address(name)
        attention = attention_around(layer, record.modules)
        calls = record.calls_of(attention or layer)
        if not calls:
            continue
        call = calls[-1 if number is None or number >= len(calls) else number]
        found[name] = _of_attention(record, layer, call) if attention else _of_call(call, is_input)
    return found


def _of_attention(record: Trace, projection: str, call: ModuleCall) -> ChannelAxis:
    """Channels of an output projection: of a call of its own, as of attention in windows, or in the fused function."""
    weight = f"{projection}.weight"
    for function in record.operations:
        if function.name == "linear" and any(operand.parameter == weight for operand in function.operands):
            return ChannelAxis(-1, _shape(function.returned), "linear")
    return ChannelAxis(-1, _shape(call.given), "multi_head_attention_forward")


def _of_call(call: ModuleCall, is_input: bool) -> ChannelAxis:
    kind, nodes = (call.given, call.inputs) if is_input else (call.returned, call.outputs)
    shape = _shape(kind)
    if len(shape) < 3:
        return ChannelAxis(1, shape, "")
    place, maker = (_axis(nodes[0], shape), _function(nodes[0])) if nodes else (None, None)
    axis = None if place is None else {1: 1, len(shape) - 1: -1}.get(place)  # (the second or the last, or not known)
    return ChannelAxis(axis, shape, "" if maker is None else maker.name)


def _shape(kind: TensorKind | None) -> tuple[int, ...]:
    return () if kind is None else tuple(kind.shape)


def _function(node: Node) -> FunctionCall | None:
    """Function of torch that made what a node held; modules that return their input are looked through."""
    while node.function is None:
        if node.maker is not None:
            node = node.maker
        elif len(node.sources) == 1 and Reader("identity", node.call) in node.sources[0].readers:
            (node,) = node.sources
        else:
            return None
    return node.function


def _axis(node: Node, shape: tuple[int, ...], depth: int = 0) -> int | None:
    """Axis of the channels of a tensor of this shape, counted from 0."""
    function = _function(node)
    if function is None or depth > _DEEPEST:
        return None
    if len(shape) == 2:
        return 1
    name = function.name
    if name in _LAST or (name == "matmul" and not function.operands[1].origins):
        return len(shape) - 1
    if name in _SECOND:
        return 1
    if name in _MIXING:
        return None
    for operand in function.operands:
        maker = _function(operand.node) if operand.node is not None and operand.origins else None
        if operand.node is None or maker is None or not (below := _shape(maker.returned)):
            continue
        if moved := _moved(function, below, shape):
            axis = _axis(operand.node, below, depth + 1)
            if axis in moved:
                return moved[axis]
    return None


def _moved(function: FunctionCall, below: tuple[int, ...], shape: tuple[int, ...]) -> dict[int, int]:
    """Where a function puts the axes of an operand, as far as it is known."""
    name, numbers, n = function.name, _numbers(function), len(below)
    if name in _SWAPS:
        one, other = (axis % n for axis in (numbers[:2] or (-2, -1)))  # (without numbers: mT, and its like)
        return {axis: {one: other, other: one}.get(axis, axis) for axis in range(n)}
    if name in ("movedim", "moveaxis"):
        if len(numbers) != 2:
            return {}
        one, other = (axis % n for axis in numbers)
        order = [axis for axis in range(n) if axis != one]
        order.insert(other, one)
        return {axis: place for place, axis in enumerate(order)}
    if name == "permute":
        return {axis % n: place for place, axis in enumerate(numbers)}
    if name in _RESHAPES or (name == "getitem" and len(shape) != n):
        return _kept(below, shape)
    if len(shape) != n:
        return {}
    return {axis: axis for axis in range(n) if name in _RESIZES or below[axis] == shape[axis]}


def _numbers(function: FunctionCall) -> list[int]:
    """Whole numbers among the arguments of a function, in order."""
    values = [*function.arguments, *function.keywords.values()]
    return [one for value in values for one in (value if isinstance(value, tuple) else (value,)) if type(one) is int]


def _kept(below: tuple[int, ...], shape: tuple[int, ...]) -> dict[int, int]:
    """Axes of which reshaping leaves the size and what is around them, or all that is behind them."""
    places = {}
    for axis, size in enumerate(below):
        same = [
            place
            for place, other in enumerate(shape)
            if other == size and prod(shape[place + 1 :]) == prod(below[axis + 1 :])
        ]
        if len(same) == 1:
            places[axis] = same[0]
    return places
