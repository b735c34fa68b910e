r"""Rules for functions of torch: gates, quotients, normalizations, and what must be refused.

The ordinary chain rule on multipliers is LRP-0 for every function that is homogeneous of degree one in what depends on
the model's input, :math:`f(c\,x) = c f(x)`: then :math:`\sum_i x_i \partial f / \partial x_i = f(x)` (Euler), and
relevance is conserved. `HOMOGENEOUS` lists these functions. What stands here are the others.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crp.rules.base import Rule
from crp.rules.layer import Layer
from crp.rules.lrp import Pass
from crp.rules.operation import Operation

#: Functions that are homogeneous of degree one, for which the ordinary chain rule is LRP-0.
HOMOGENEOUS = frozenset(
    """abs adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d
    adaptive_max_pool3d add alpha_dropout amax amin avg_pool1d avg_pool2d avg_pool3d broadcast_tensors broadcast_to cat
    channel_shuffle chunk clone concat concatenate contiguous copy cpu cuda cummax cumsum diagonal double dropout
    dropout1d dropout2d dropout3d dsplit einsum expand expand_as feature_alpha_dropout flatten flip fliplr flipud float
    fold fractional_max_pool2d fractional_max_pool3d gather getitem half hsplit hstack identity index_select interpolate
    leaky_relu lp_pool1d lp_pool2d lp_pool3d masked_fill masked_select matmul max max_pool1d max_pool2d max_pool3d
    max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices max_unpool2d maximum mean min minimum mm
    moveaxis movedim mv narrow native_channel_shuffle neg negative nansum norm pad permute pixel_shuffle pixel_unshuffle
    prelu relu repeat repeat_interleave reshape resolve_conj roll rot90 rrelu rsub select setitem sort split
    split_with_sizes squeeze stack sub sum swapaxes swapdims T mT H mH t take take_along_dim tensor_split tile to topk
    transpose tril triu type type_as unbind unflatten unfold unsqueeze upsample view view_as vsplit vstack where
    bfloat16 index_add scatter_add""".split()  # noqa: SIM905
)
#: Steps, which no small change moves: they hand nothing on, in any method.
STEPS = frozenset(("ceil", "floor", "round", "sign", "trunc", "heaviside", "frac", "fix"))
#: Elementwise functions that hand relevance on as it is.
ELEMENTWISE = tuple(
    """batch_norm celu clamp clamp_max clamp_min clip elu erf exp expm1 gelu hardshrink hardswish hardtanh
    local_response_norm log log1p logsigmoid mish normalize pow rdiv reciprocal relu6 rsqrt selu silu sin
    cos sinh softplus softshrink softsign sqrt square tan tanh tanhshrink threshold""".split()  # noqa: SIM905
)
#: Elementwise functions with outputs between 0 and 1.
SQUASHING = ("sigmoid", "hardsigmoid", "expit")
#: Functions of two operands that attention is made of.
ATTENTION = ("multi_head_attention_forward", "scaled_dot_product_attention")
PRODUCTS = ("matmul", "bmm", "baddbmm", "mm", "einsum", "tensordot", "mv", "dot", "inner", "outer")


class Gate(Rule):
    r"""A product :math:`y = s \odot g` of two factors that both depend on the model's input.

    The ordinary chain rule would give the whole relevance to each factor. ``"signal"`` holds the gate :math:`g`
    constant, so that the signal :math:`s` takes all ("signal-take-all", Arras et al., "Explaining and interpreting
    LSTMs", 2019, section 11.2.3); ``"split"`` gives each factor half (AttnLRP, Achtibat et al., ICML 2024, eq. 13).
    Both conserve relevance. The gate is the factor that is broadcast, as in squeeze-and-excitation, or else the one
    that is the output of a sigmoid; where neither holds, the relevance is split.

    Parameters
    ----------
    mode : "signal" or "split"
    """

    settings: ClassVar[tuple[str, ...]] = ("mode",)

    def __init__(self, mode: Literal["signal", "split"] = "signal") -> None:
        super().__init__()
        if mode not in ("signal", "split"):
            raise ValueError(f'gates are held constant ("signal") or take half ("split"); got {mode!r}')
        self.mode = mode

    def operate(self, operation: Operation) -> Tensor:
        """Return the product, with the gate held constant."""
        if len(operation.inputs) == 1:
            return cast(Tensor, operation.output)
        left, right = operation.inputs
        if left is right:
            return _passed(self, operation, left)
        gates = [self._is_gate(left, right), self._is_gate(right, left)]
        if self.mode == "signal" and gates == [True, False]:
            return cast(Tensor, operation(left.detach(), right))
        if self.mode == "signal" and gates == [False, True]:
            return cast(Tensor, operation(left, right.detach()))
        return cast(Tensor, (operation(left, right.detach()) + operation(left.detach(), right)) / 2)

    def _is_gate(self, factor: Tensor, other: Tensor) -> bool:
        if factor.numel() != other.numel():
            return factor.numel() < other.numel()
        return self.run is not None and any(ref() is factor for ref in self.run.squashed)


class Squash(Pass):
    """`Pass` for functions whose outputs are between 0 and 1: in a product, they are the gate."""

    def operate(self, operation: Operation) -> Tensor:
        """Return the function's output, and remember it."""
        out = super().operate(operation)
        if self.run is not None:
            self.run.squashed.append(weakref.ref(out))
        return out


class GLU(Rule):
    """Gated linear unit, ``a * sigmoid(b)`` of the two halves of its input; the gate is held constant."""

    settings: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        super().__init__(0.0)

    def surrogate(self, layer: Any, a: Tensor) -> Tensor:
        """Return the first half, times the gate."""
        dim = layer.kwargs.get("dim", layer.args[1] if len(layer.args) > 1 else -1)
        signal, gate = a.chunk(2, dim)[0], layer.input.chunk(2, dim)[1]
        return cast(Tensor, signal * gate.sigmoid())


class Quotient(Rule):
    """A quotient: what divides is held constant, as the statistics of a normalization.

    The ordinary chain rule would take from the divisor what it gives to the dividend, and leave nothing.
    """

    settings: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        super().__init__()

    def operate(self, operation: Operation) -> Tensor:
        """Return the quotient, with the divisor held constant."""
        dividend = operation.args[0] if operation.args else operation.kwargs.get("input")
        if len(operation.inputs) == 2:
            return cast(Tensor, operation(operation.inputs[0], operation.inputs[1].detach()))
        if operation.inputs[0] is dividend:
            return cast(Tensor, operation.output)
        return _passed(self, operation, operation.inputs[0])


class Normalization(Rule):
    r"""Layer, group, instance and RMS norm, with the variance held constant.

    :math:`y = w \odot (a - \operatorname{mean} a) / \sigma + b` is then linear in :math:`a`; the bias :math:`b` keeps
    its share. Without that, relevance would vanish, as a normalized layer does not depend on its input's scale (Ali et
    al., "XAI for transformers: better explanations through conservative propagation", ICML 2022, section 4.2).

    Parameters
    ----------
    zero_params : str or sequence of str, optional
        ``"bias"`` gives the share of the bias to the inputs.
    """

    settings: ClassVar[tuple[str, ...]] = ("zero_params",)

    def __init__(self, zero_params: str | Sequence[str] | None = None) -> None:
        super().__init__(0.0, zero_params)

    def surrogate(self, layer: Any, a: Tensor) -> Tensor:
        """Return the normalization, linear in ``a``."""
        function, signature = _NORMS[layer.name]
        given = signature.bind(*layer.args[: len(signature.parameters)], **layer.kwargs)
        given.apply_defaults()
        arguments = {name: value for name, value in given.arguments.items() if name != "input"}
        if "bias" in self.zero_params and "bias" in arguments:
            arguments["bias"] = None
        return function(a, layer.input, **arguments)


class Refused(Rule):
    """Stands where a method has no rule, so that no other method's result goes by its name.

    Parameters
    ----------
    method : str
        Name of the method, for the message.
    """

    settings: ClassVar[tuple[str, ...]] = ("method",)

    def __init__(self, method: str) -> None:
        super().__init__()
        self.method = method

    def operate(self, operation: Operation) -> Tensor:
        """Refuse functions of more than one operand that depends on the model's input; others are linear."""
        if len(operation.inputs) == 1 and operation.name not in ATTENTION:
            return cast(Tensor, operation.output)
        raise TypeError(self._message(str(operation)))

    def check(self, module: nn.Module) -> None:
        """Refuse every module."""
        raise TypeError(self._message(type(module).__name__))

    def _message(self, what: str) -> str:
        return f"{self.method} has no rule for {what}; give one in layer_map, or None for the ordinary chain rule"


def _passed(rule: Rule, operation: Operation, a: Tensor) -> Tensor:
    passing = Pass()
    passing.multiplier, passing.run, passing.layer = rule.multiplier, rule.run, rule.layer
    return passing.propagate(cast(Layer, _OneInput(operation)), a, operation.output.detach())


class _OneInput:
    """An operation that reads the same tensor several times, as a layer of one input."""

    def __init__(self, operation: Operation) -> None:
        self.operation = operation

    def again(self) -> _OneInput:
        return self

    def value(self, a: Tensor) -> Tensor:
        return cast(Tensor, self.operation(*(a for _ in self.operation.inputs)))


def _layer_norm(
    a: Tensor, x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    dims = tuple(range(-len(normalized_shape), 0))
    return _affine((a - a.mean(dims, keepdim=True)) / _deviation(x, dims, eps), weight, bias, a.dim() - len(dims))


def _rms_norm(
    a: Tensor, x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, eps: float | None
) -> Tensor:
    dims = tuple(range(-len(normalized_shape), 0))
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    scale = (x.square().mean(dims, keepdim=True) + eps).sqrt()
    return _affine(a / scale, weight, None, a.dim() - len(dims))


def _group_norm(
    a: Tensor, x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    grouped, data = (t.reshape(len(t), num_groups, -1) for t in (a, x))
    z = (grouped - grouped.mean(-1, keepdim=True)) / _deviation(data, (-1,), eps)
    return _affine(z.reshape(a.shape), weight, bias, 1)


def _instance_norm(
    a: Tensor,
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    if use_input_stats:
        return _group_norm(a, x, a.shape[1], weight, bias, eps)
    return F.batch_norm(a, running_mean, running_var, weight, bias, False, 0.0, eps)


def _deviation(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    return (x.var(dims, unbiased=False, keepdim=True) + eps).sqrt()


def _affine(z: Tensor, weight: Tensor | None, bias: Tensor | None, axis: int) -> Tensor:
    def aligned(parameter: Tensor) -> Tensor:
        return parameter.reshape(*parameter.shape, *(1,) * (z.dim() - axis - parameter.dim()))

    z = z if weight is None else z * aligned(weight)
    return z if bias is None else z + aligned(bias)


_NORMS: dict[str, tuple[Callable[..., Tensor], inspect.Signature]] = {
    "layer_norm": (_layer_norm, inspect.signature(F.layer_norm)),
    "group_norm": (_group_norm, inspect.signature(F.group_norm)),
    "instance_norm": (_instance_norm, inspect.signature(F.instance_norm)),
    "rms_norm": (_rms_norm, inspect.signature(F.rms_norm)),
}
