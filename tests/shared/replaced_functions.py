"""LRP-0 of a transformer without any rule: the gradient, times the input, of the model with other functions in it.

Whatever a rule holds constant is detached: the slope of an activation, the scale of a norm, what divides, what a router
chose. Of a product, each factor that depends on the input has an equal share. None of the package's own code is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

ACTIVATIONS = (
    "relu", "relu6", "silu", "gelu", "tanh", "sigmoid", "softplus", "elu", "selu", "celu", "leaky_relu", "hardswish",
    "hardsigmoid", "mish", "hardtanh", "clamp", "exp", "logsigmoid", "log_sigmoid", "square", "pow",
)  # fmt: skip
SCALES = ("rsqrt", "sqrt", "reciprocal", "var", "std", "topk")
PRODUCTS = ("mul", "matmul", "bmm", "einsum")
QUOTIENTS = ("div", "truediv", "true_divide")
IN_PLACE: dict[str, Any] = {"imul": torch.mul, "itruediv": torch.div}


def depends(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def held(values: Any) -> Any:
    if isinstance(values, Tensor):
        return values.detach()
    return type(values)(map(held, values)) if isinstance(values, list | tuple) else values


class Replaced(TorchFunctionMode):
    """Functions as LRP-0 has them.

    Parameters
    ----------
    holds_attention : bool
        Whether probabilities of attention are held constant.
    """

    def __init__(self, holds_attention: bool) -> None:
        super().__init__()
        self._holds_attention = holds_attention

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "").strip("_")
        if name in IN_PLACE:
            function, name = IN_PLACE[name], IN_PLACE[name].__name__
        if not any(depends(value) for value in [*args, *kwargs.values()]) and name != "einsum":
            return function(*args, **kwargs)
        if name in ACTIVATIONS:
            return _with_slope(args[0], function(args[0].clone(), *args[1:], **kwargs))  # (it may be in place)
        if name in SCALES or (name == "gather" and args[0].dim() == 2):  # (of tokens and experts)
            return function(*map(held, args), **kwargs)
        if name in QUOTIENTS:
            return function(args[0], held(args[1]))
        if name == "linalg_solve_triangular":  # (a quotient of matrices)
            return function(held(args[0]), *args[1:], **kwargs)
        if name.removeprefix("r") in PRODUCTS:
            return _shared(function, args)
        if name in ("baddbmm", "addmm") and depends(args[1]) and depends(args[2]):
            return kwargs.get("beta", 1) * args[0] + kwargs.get("alpha", 1) * _shared(torch.matmul, args[1:])
        if name in ("layer_norm", "rms_norm"):
            return _normalized(name, *args[:5], **kwargs)
        if name == "group_norm":
            return _by_groups(*args[:5], **kwargs)
        if name == "softmax" and self._holds_attention:
            return held(function(*args, **kwargs))
        if name == "scaled_dot_product_attention":
            with self:
                return _attention(*args, **kwargs)
        return function(*args, **kwargs)


def _with_slope(x: Tensor, y: Tensor) -> Tensor:
    x = x.masked_fill(x.isinf(), 0.0)  # (as what is masked before an exponential)
    x0, y0 = x.detach(), y.detach()
    slope = torch.where(x0 == 0, 0.0, y0 / torch.where(x0 == 0, 1.0, x0))
    return x * slope + (y0 - x0 * slope)


def _shared(function: Callable[..., Tensor], args: Any) -> Tensor:
    """Product, of which each factor that depends on the input has the same share."""
    equation, factors = (args[:1], args[1:]) if isinstance(args[0], str) else ((), args[:2])
    own = [place for place, factor in enumerate(factors) if depends(factor)]
    parts = [function(*equation, *(f if i == place else held(f) for i, f in enumerate(factors))) for place in own]
    return sum(parts) / len(own) if own else function(*args)


def _normalized(
    name: str, x: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float | None = 1e-5
) -> Tensor:
    axes = tuple(range(-len(shape), 0))
    if name == "rms_norm":  # (its fourth argument is ε)
        bias, eps = None, torch.finfo(x.dtype).eps if bias is None else bias
    centered = x - x.mean(axes, keepdim=True) if name == "layer_norm" else x
    y = centered * (centered.detach().square().mean(axes, keepdim=True) + eps).rsqrt()
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _by_groups(x: Tensor, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Tensor:
    of_groups = x.unflatten(1, (groups, -1))
    y = _normalized("layer_norm", of_groups, of_groups.shape[2:], eps=eps).reshape(x.shape)
    shape = (-1, *[1] * (x.dim() - 2))
    y = y if weight is None else y * weight.view(shape)
    return y if bias is None else y + bias.view(shape)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    if enable_gqa:
        key, value = (each.repeat_interleave(query.shape[-3] // each.shape[-3], -3) for each in (key, value))
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is not None:
        is_kept = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, float("-inf")) if is_kept else scores + attn_mask
    return scores.softmax(-1) @ value


@contextmanager
def _whole_activations(model: nn.Module) -> Iterator[None]:
    """Have activations that are written out, in modules of their own, count as one function each."""

    def with_slope(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return _with_slope(args[0], output.detach())

    written_out = [m for m in model.modules() if "gelu" in type(m).__name__.lower() and not [*m.parameters()]]
    handles = [module.register_forward_hook(with_slope) for module in written_out]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def lrp_0(model: nn.Module, data: Tensor, target: int, holds_attention: bool) -> tuple[Tensor, Tensor]:
    """Output, and relevance of the data for one of it, each of a batch."""
    model.requires_grad_(False)  # (what requires a gradient depends on the input)
    leaf = data.clone().requires_grad_()
    with pytest.MonkeyPatch.context() as patch, _whole_activations(model), Replaced(holds_attention):
        for name in ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"):
            patch.setattr(F, name, lambda *_: False)  # (functions in Python are seen by what they call)
        output = model(leaf)
        (gradient,) = torch.autograd.grad(output[:, target].sum(), leaf)
    return output.detach(), data * gradient
