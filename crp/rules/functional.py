r"""Rules for functions of torch: gates, quotients, normalizations, and what must be refused.

The ordinary chain rule on multipliers is LRP-0 for every function that is homogeneous of degree one in what depends on
the model's input, :math:`f(c\,x) = c f(x)`: then :math:`\sum_i x_i \partial f / \partial x_i = f(x)` (Euler), and
relevance is conserved. `HOMOGENEOUS` lists these functions. What stands here are the others.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crp.rules.account import Shares
from crp.rules.base import Again, Redirect, Rule
from crp.rules.lrp import Pass
from crp.rules.operation import Operation

#: What becomes of a product's gate: held constant, or given half of the relevance.
Gates: TypeAlias = Literal["signal", "split"]
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


class Linearized(Rule):
    r"""Base of rules that replace a function by one that is linear in its operands.

    :math:`y = \sum_k s_k \odot z_k + c`, with :math:`z_k` linear in the operands that depend on the model's input, and
    :math:`s_k` and :math:`c` held constant. Override `parts`, and `constant` where there is one.
    """

    def parts(self, operation: Operation, *inputs: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
        """Pairs of :math:`z_k`, in the shape of the output, and of :math:`s_k`, which broadcasts to it."""
        raise NotImplementedError

    def constant(self, operation: Operation) -> Tensor | None:
        """Tensor :math:`c` that broadcasts to the output; it keeps its share of the relevance."""
        return None

    def operate(self, operation: Operation) -> Tensor:
        """Return the function's output, with this rule as its gradient."""
        zs, scales = zip(*self.parts(operation, *operation.inputs), strict=True)
        own, again = operation.output, _Parts(self, operation)
        out = cast(Tensor, Redirect.apply(own.data, again, len(zs), *zs, *(s.detach() for s in scales), own))
        constant = self.constant(operation)
        if constant is not None and self.run is not None and self.run.account is not None:
            out = self.run.account.absorb(self.layer, operation.inputs[0], out, Shares(bias=constant))
        return out


class _Parts(Again):
    """Scales of a linearized function, computed once more so that they can be differentiated."""

    def __init__(self, rule: Linearized, operation: Operation) -> None:
        super().__init__(rule, operation.inputs, operation.output.data)
        self.linearized, self.operation = rule, operation

    def scales(self) -> list[Tensor]:
        return [scale for _, scale in self.linearized.parts(self.operation, *self.operation.inputs)]


class Gate(Linearized):
    r"""A product :math:`y = s \odot g` of two factors that both depend on the model's input.

    The ordinary chain rule would give the whole relevance to each factor. ``"signal"`` holds the gate :math:`g`
    constant, so that the signal :math:`s` takes all ("signal-take-all", Arras et al., "Explaining and interpreting
    LSTMs", 2019, section 11.2.3); ``"split"`` gives each factor half (AttnLRP, Achtibat et al., ICML 2024, eq. 13).
    Both conserve relevance. The gate is the factor that is broadcast, as in squeeze-and-excitation, or else the one
    that is the output of a sigmoid; where neither holds, the relevance is split.

    Parameters
    ----------
    mode : "signal" or "split"

    Raises
    ------
    ValueError
        If it is neither.
    """

    settings: ClassVar[tuple[str, ...]] = ("mode",)

    def __init__(self, mode: Gates = "signal") -> None:
        super().__init__()
        if mode not in ("signal", "split"):
            raise ValueError(f'gates are held constant ("signal") or take half ("split"); got {mode!r}')
        self.mode = mode

    def operate(self, operation: Operation) -> Tensor:
        """Return the product; one factor alone is right by the ordinary chain rule."""
        return cast(Tensor, operation.output) if len(operation.inputs) == 1 else super().operate(operation)

    def parts(self, operation: Operation, *inputs: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
        """The signal, scaled by the gate."""
        left, right = inputs
        shape = operation.output.shape
        if left is right:
            return [(left, left)]  # the square of a tensor hands its relevance on
        if self.mode == "signal" and self._is_gate(left, right):
            return [(right.expand(shape), left)]
        if self.mode == "signal" and self._is_gate(right, left):
            return [(left.expand(shape), right)]
        return [(left.expand(shape), right / 2), (right.expand(shape), left / 2)]

    def _is_gate(self, factor: Tensor, other: Tensor) -> bool:
        if factor.numel() != other.numel():
            return factor.numel() < other.numel()
        squashed = [] if self.run is None else [ref() for ref in self.run.squashed]
        return any(t is factor for t in squashed) and not any(t is other for t in squashed)


class Squash(Pass):
    """`Pass` for functions whose outputs are between 0 and 1: in a product, they are the gate."""

    def operate(self, operation: Operation) -> Tensor:
        """Return the function's output, and remember it."""
        out = super().operate(operation)
        if self.run is not None:
            self.run.squashed.append(weakref.ref(out))
        return out


class GLU(Linearized):
    """Gated linear unit, ``a * sigmoid(b)`` of the two halves of its input; the gate is held constant."""

    settings: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        super().__init__()

    def parts(self, operation: Operation, *inputs: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
        """First half, scaled by the gate."""
        args, kwargs = operation.args, operation.kwargs
        signal, gate = inputs[0].chunk(2, kwargs.get("dim", args[1] if len(args) > 1 else -1))
        return [(signal, gate.sigmoid())]


class Quotient(Linearized):
    """A quotient: what divides is held constant, as the statistics of a normalization.

    The ordinary chain rule would take from the divisor what it gives to the dividend, and leave nothing.
    """

    settings: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        super().__init__()

    def operate(self, operation: Operation) -> Tensor:
        """Return the quotient; with a constant divisor, the ordinary chain rule is right."""
        if len(operation.inputs) == 1 and operation.inputs[0] is operation.args[0]:
            return cast(Tensor, operation.output)
        return super().operate(operation)

    def parts(self, operation: Operation, *inputs: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
        """Dividend, scaled by one over the divisor; a divisor alone hands its relevance on."""
        if len(inputs) == 1:
            (divisor,) = inputs
            y = cast(Tensor, operation(divisor))
            return [(divisor.expand(y.shape), y / divisor)]
        dividend, divisor = inputs
        return [(dividend.expand(operation.output.shape), 1 / divisor)]


class Normalization(Linearized):
    r"""Layer, group, instance and RMS norm, with the variance held constant.

    :math:`y = \frac{w}{\sigma} \odot (a - \operatorname{mean} a) + b` is then linear in :math:`a`; the bias :math:`b`
    keeps its share. Without that, relevance would vanish, as a normalized layer does not depend on its input's scale
    (Ali et al., "XAI for transformers: better explanations through conservative propagation", ICML 2022, section 4.2).

    Parameters
    ----------
    zero_params : str or sequence of str, optional
        ``"bias"`` gives the share of the bias to the inputs.
    """

    settings: ClassVar[tuple[str, ...]] = ("zero_params",)

    def __init__(self, zero_params: str | Sequence[str] | None = None) -> None:
        super().__init__(0.0, zero_params)

    def parts(self, operation: Operation, *inputs: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
        """Centred input, scaled; with its bias as if it were the input's, where that counts as zero."""
        (a,) = inputs
        given = _arguments(operation)
        weight = 1.0 if given.get("weight") is None else _aligned(given["weight"], operation.name, a)
        centred, deviation = _STATISTICS[operation.name](a, given)
        scale = weight / deviation
        if "bias" in self.zero_params and given.get("bias") is not None:
            z = centred * scale
            scale = torch.where(z == 0, scale, scale * (1 + _aligned(given["bias"], operation.name, a) / z))
        return [(centred, scale)]

    def constant(self, operation: Operation) -> Tensor | None:
        """Return the bias."""
        bias = _arguments(operation).get("bias")
        if bias is None or "bias" in self.zero_params:
            return None
        return _aligned(bias, operation.name, operation.inputs[0])


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
        """Refuse functions of more than one operand that depends on the model's input; others are linear.

        Raises
        ------
        NotImplementedError
            Naming the operation and the layer.
        """
        if len(operation.inputs) == 1 and operation.name not in ATTENTION:
            return cast(Tensor, operation.output)
        # (a TypeError inside an operator such as @ would be taken for "not my type")
        raise NotImplementedError(self._message(str(operation)))

    def check(self, module: nn.Module) -> None:
        """Refuse every module."""
        raise TypeError(self._message(type(module).__name__))

    def _message(self, what: str) -> str:
        return f"{self.method} has no rule for {what}; give one in layer_map, or None for the ordinary chain rule"


def _arguments(operation: Operation) -> dict[str, Any]:
    signature = _SIGNATURES[operation.name]
    given = signature.bind(*operation.args[: len(signature.parameters)], **operation.kwargs)
    given.apply_defaults()
    return given.arguments


def _aligned(parameter: Tensor, function: str, a: Tensor) -> Tensor:
    """Parameter of a normalization as it broadcasts to the input."""
    return parameter if function in ("layer_norm", "rms_norm") else parameter.reshape(-1, *(1,) * (a.dim() - 2))


def _layer_statistics(a: Tensor, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    dims = tuple(range(-len(given["normalized_shape"]), 0))
    return a - a.mean(dims, keepdim=True), _deviation(a, dims, given["eps"])


def _rms_statistics(a: Tensor, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    dims = tuple(range(-len(given["normalized_shape"]), 0))
    eps = torch.finfo(a.dtype).eps if given["eps"] is None else given["eps"]
    return a, (a.square().mean(dims, keepdim=True) + eps).sqrt()


def _group_statistics(a: Tensor, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    grouped = a.reshape(len(a), given["num_groups"], -1)
    deviation = _deviation(grouped, (-1,), given["eps"]).expand(grouped.shape)
    return (grouped - grouped.mean(-1, keepdim=True)).reshape(a.shape), deviation.reshape(a.shape)


def _instance_statistics(a: Tensor, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    if given["use_input_stats"]:
        return _group_statistics(a, given | {"num_groups": a.shape[1]})
    mean, var = (given[name].reshape(-1, *(1,) * (a.dim() - 2)) for name in ("running_mean", "running_var"))
    return a - mean, (var + given["eps"]).sqrt()


def _deviation(a: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    return (a.var(dims, unbiased=False, keepdim=True) + eps).sqrt()


#: Centred input, linear in the input, and deviation, of each normalization.
_STATISTICS: dict[str, Callable[[Tensor, dict[str, Any]], tuple[Tensor, Tensor]]] = {
    "layer_norm": _layer_statistics,
    "group_norm": _group_statistics,
    "instance_norm": _instance_statistics,
    "rms_norm": _rms_statistics,
}
_SIGNATURES = {name: inspect.signature(getattr(F, name)) for name in _STATISTICS}
