"""Dense layers whose weights are packed into a few bits, as those of quantized language models.

They run kernels of their own, which no rule can see. What such a layer makes of its input is a sum of weighted inputs
all the same: its weights are what it makes of unit vectors. While a composite is on a model, these layers run as one
function each, with a weight that is unpacked where a rule takes it apart, and not kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils._pytree import tree_map_only

from crp.layers.autograd import graph_nodes
from crp.layers.interrupts import atomic
from crp.layers.packed import is_packed
from crp.rules.functions import _enter, look_up
from crp.rules.operands import Operands

#: Whether layers were found to be sums of weighted inputs.
_are_affine: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
#: Unit vectors of which a layer makes its weights at a time.
_AT_ONCE = 1024


class _PackedWeight(Tensor):
    """Weight of a layer that keeps it packed: of shape (outputs, inputs), without memory of its own.

    Parameters
    ----------
    forward : callable
        The layer's.
    shape : (int, int)
    input : Tensor
        Of which it has type and device.
    """

    _forward: Callable[[Tensor], Tensor]

    @staticmethod
    def __new__(cls, forward: Callable[[Tensor], Tensor], shape: tuple[int, int], input: Tensor) -> _PackedWeight:
        """Stand for the weight."""
        weight = Tensor._make_wrapper_subclass(cls, shape, dtype=input.dtype, device=input.device)
        weight._forward = forward
        return weight

    def __init__(self, *_: object) -> None:
        super().__init__()

    def dequantize(self) -> Tensor:
        """What the layer makes of unit vectors, less what it makes of zeros."""
        n_outputs, n_inputs = self.shape
        found = torch.empty(n_outputs, n_inputs, dtype=self.dtype, device=self.device)
        with torch.enable_grad():  # (without, a layer of bitsandbytes would pack its weights in another way, for good)
            nothing = self._forward(found.new_zeros(1, n_inputs, requires_grad=True)).detach()
            for start in range(0, n_inputs, _AT_ONCE):
                units = found.new_zeros(min(_AT_ONCE, n_inputs - start), n_inputs)
                units[:, start:].fill_diagonal_(1)
                made = self._forward(units.requires_grad_()).detach() - nothing
                found[:, start : start + len(units)] = made.T
        return found

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Run a function of torch on the weight, unpacked."""
        if func is torch.ops.aten.detach.default:
            return args[0]
        return func(*tree_map_only(cls, cls.dequantize, args), **tree_map_only(cls, cls.dequantize, kwargs or {}))


def _is_packed_layer(module: nn.Module) -> bool:
    """Whether a module that says how many inputs and outputs it has, keeps weights as integers."""
    own: dict[str, Any] = vars(module)
    sizes = own.get("in_features"), own["out_features"]
    if not all(type(size) is int for size in sizes) or any(module.children()):
        return False
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.is_floating_point():
        return is_packed(weight)
    tensors = [t for kept in (module._parameters, module._buffers, own) for t in kept.values() if isinstance(t, Tensor)]
    integers = [tensor for tensor in tensors if not (tensor.is_floating_point() or tensor.is_complex())]
    return any(8 * tensor.nbytes >= sizes[0] * sizes[1] > 0 for tensor in integers)  # (a bit of each weight, at least)


def _packed_linear(input: Tensor, weight: Tensor, bias: Tensor | None, forward: Callable[..., Any]) -> Tensor:
    """Output of a layer whose weights are packed; modes see a call of it as one of `F.linear`."""
    if has_torch_function((input,)):
        return handle_torch_function(_packed_linear, (input,), input, weight, bias, forward)
    output: Tensor = forward(input)
    if torch.is_grad_enabled() and input.requires_grad and not _has_derivative(output, [input]):
        return cast(Tensor, _ByWeights.apply(input, output.detach(), weight))
    return output


class _ByWeights(torch.autograd.Function):
    """What a kernel without a derivative has made of an input, as a function of it."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, output: Tensor, weight: Tensor) -> Tensor:
        ctx.weight, ctx.dtype = weight, input.dtype
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        weight = ctx.weight.dequantize()
        return (grads[0].to(weight.dtype) @ weight).to(ctx.dtype), None, None


def _has_derivative(output: Tensor, inputs: Iterable[Tensor]) -> bool:
    """Whether autograd knows the derivative of all that has made an output of inputs."""
    nodes = graph_nodes([output], [input for input in inputs if input is not output])
    # (an operator that is registered without one has a node of that name)
    return output.requires_grad and not any(node.name().endswith("NotImplemented") for node in nodes)


def _parse(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], depends: Callable[[Tensor], bool]
) -> Operands:
    input, weight, bias, forward = args

    def run(a: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        if not is_packed(w):
            return F.linear(a, w, b)
        output = _packed_linear(a, w, bias, forward)
        if b is bias or (b is not None and bias is not None and b.data_ptr() == bias.data_ptr()):
            return output
        output = output if bias is None else output - bias
        return output if b is None else output + b

    return Operands(input, weight, bias, run)


_enter(_packed_linear, replace(look_up(F.linear), parse=_parse))


def packed_seen(modules: Iterable[nn.Module]) -> list[AbstractContextManager[None]]:
    """Contexts in which layers whose weights are packed run as functions that a mode sees; none without such layers."""
    packed = [
        module
        for module in modules
        if "out_features" in module.__dict__
        and not (type(weight := module._parameters.get("weight")) is nn.Parameter and weight.is_floating_point())
        and _is_packed_layer(module)
    ]
    return [_as_functions(packed)] if packed else []


@atomic
def _as_functions(packed: Sequence[nn.Module]) -> Iterator[None]:
    own = {module: vars(module)["forward"] for module in packed if "forward" in vars(module)}
    try:
        for module in packed:
            vars(module)["forward"] = _seen(module, module.forward)
        yield
    finally:
        for module in packed:
            vars(module).pop("forward", None)
            vars(module).update({"forward": own[module]} if module in own else {})


def _seen(module: Any, forward: Callable[..., Any]) -> Callable[..., Tensor]:
    """What such a layer runs in place of its ``forward``."""
    weights: dict[Any, Tensor] = {}

    def run(*args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) != 1:
            return forward(*args, **kwargs)
        (input,) = args
        if module not in _are_affine:
            _are_affine[module] = _is_affine(forward, input)
        if not _are_affine[module]:
            return forward(input)
        bias, key = getattr(module, "bias", None), (input.dtype, input.device)
        if key not in weights:
            kept = getattr(module, "weight", None)
            shape = module.out_features, module.in_features
            weights[key] = (
                kept if isinstance(kept, Tensor) and is_packed(kept) else _PackedWeight(forward, shape, input)
            )
        return _packed_linear(input, weights[key], bias if isinstance(bias, Tensor) else None, forward)

    return run


def _is_affine(forward: Callable[[Tensor], Tensor], input: Tensor) -> bool:
    """Whether -2 times some numbers give -2 times what these give, but for rounding them to 8 bits."""
    row = torch.linspace(-1, 1, input.shape[-1], dtype=input.dtype, device=input.device)[None]
    with torch.enable_grad():  # (as above)
        nothing, once, twice = (forward((factor * row).requires_grad_()).detach() for factor in (0, 1, -2))
    return bool(((twice - nothing) + 2 * (once - nothing)).norm() <= 0.05 * (twice - nothing).norm())
