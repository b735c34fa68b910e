r"""Rules for functions of torch: gates, quotients, normalizations, and what must be refused.

The ordinary chain rule on multipliers is LRP-0 for every function that is homogeneous of degree one in what depends on
the model's input, :math:`f(c\,x) = c f(x)`: then :math:`\sum_i x_i \partial f / \partial x_i = f(x)` (Euler), and
relevance is conserved. `HOMOGENEOUS` lists these functions. What stands here are the others.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crp.rules.account import Shares
from crp.rules.base import Again, Redirect, Rule
from crp.rules.lrp import Pass
from crp.rules.operation import Operation
from crp.rules.redirect import released

#: What becomes of a product's gate: held constant, or given half of the relevance.
Gates: TypeAlias = Literal["signal", "split"]
#: Functions that choose between operands, of which some may be constant.
CHOOSING = ("max", "maximum", "min", "minimum")
#: Functions that are homogeneous of degree one, for which the ordinary chain rule is LRP-0.
HOMOGENEOUS = frozenset(CHOOSING) | frozenset(
    """H T abs adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d
    adaptive_max_pool1d_with_indices adaptive_max_pool2d adaptive_max_pool2d_with_indices adaptive_max_pool3d
    adaptive_max_pool3d_with_indices add alpha_dropout amax amin as_strided atleast_1d atleast_2d atleast_3d
    avg_pool1d avg_pool2d avg_pool3d bfloat16 broadcast_tensors broadcast_to cat channel_shuffle chunk clone
    column_stack concat concatenate contiguous copy cpu cuda cummax cumsum diagonal diff double dropout dropout1d
    dropout2d dropout3d dsplit dstack einsum expand expand_as feature_alpha_dropout flatten flip fliplr flipud float
    fold fractional_max_pool2d fractional_max_pool3d gather getitem half hsplit hstack identity index_add index_copy
    index_fill index_put index_select interpolate leaky_relu lp_pool1d lp_pool2d lp_pool3d mH mT masked_fill
    masked_scatter masked_select matmul max_pool1d max_pool1d_with_indices max_pool2d max_pool2d_with_indices
    max_pool3d max_pool3d_with_indices max_unpool1d max_unpool2d max_unpool3d mean mm moveaxis movedim mv nansum
    narrow native_channel_shuffle neg negative norm pad permute pixel_shuffle pixel_unshuffle positive prelu ravel
    relu repeat repeat_interleave reshape resolve_conj roll rot90 row_stack rrelu rsub scatter scatter_add select
    select_scatter setitem slice_scatter sort split split_with_sizes squeeze stack sub subtract sum swapaxes
    swapdims t take take_along_dim tensor_split tile to topk transpose tril triu type type_as unbind unflatten
    unfold unsqueeze upsample upsample_bilinear upsample_nearest view view_as vsplit vstack where""".split()  # noqa: SIM905
)
#: Steps, which no small change moves: they hand nothing on, in any method.
STEPS = frozenset(
    ("ceil", "fix", "floor", "floor_divide", "floordiv", "heaviside", "rfloordiv", "round", "sgn", "sign", "trunc")
)
#: Elementwise functions that hand relevance on as it is.
ELEMENTWISE = tuple(
    """acos acosh arccos arccosh arcsin arcsinh arctan arctanh asin asinh atan atanh batch_norm celu clamp clamp_max
    clamp_min clip cos cosh elu erf erfc exp exp2 expm1 gelu hardshrink hardswish hardtanh local_response_norm log log10
    log1p log2 log_sigmoid logsigmoid mish nan_to_num normalize pow rdiv reciprocal relu6 rpow rsqrt selu silu sin sinh
    softplus softshrink softsign sqrt square tan tanh tanhshrink threshold""".split()  # noqa: SIM905
)
#: Elementwise functions with outputs between 0 and 1.
SQUASHING = ("sigmoid", "hardsigmoid", "expit")
#: Functions of two operands that attention is made of.
ATTENTION = ("multi_head_attention_forward", "scaled_dot_product_attention")
PRODUCTS = tuple(
    """addbmm addmm addmv addr baddbmm bilinear bmm chain_matmul dot einsum ger inner kron linalg_multi_dot matmul mm mv
    outer tensordot vdot""".split()  # noqa: SIM905
)
#: Autograd nodes of functions that give the same values in another shape.
_RESHAPING = (
    "Alias", "AsStrided", "Clone", "CopyBackwards", "CopySlices", "Expand", "Overwrite", "Permute", "Repeat",
    "ReshapeAlias", "Squeeze", "T", "ToCopy", "Transpose", "UnsafeView", "Unsqueeze", "View",
)  # fmt: skip


class Linearized(Rule):
    r"""Base of rules that replace a function by one that is linear in its operands.

    :math:`y = \sum_k s_k \odot z_k + c`, with :math:`z_k` linear in the operands that depend on the model's input, and
    :math:`s_k` and :math:`c` held constant; :math:`c` keeps its share of the relevance.
    """

    def parts(self, operation: Operation, *inputs: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
        """Pairs of :math:`z_k`, in the shape of the output, and of :math:`s_k`, which broadcasts to it."""
        raise NotImplementedError

    def operate(self, operation: Operation) -> Tensor:
        """Return the function's output, with this rule as its gradient."""
        parts = self.parts(operation, *operation.inputs)
        zs, scales = [z for z, _ in parts], [scale.detach() for _, scale in parts]
        own, again = operation.output, _Parts(self, operation)
        out = cast(Tensor, Redirect.apply(released(own), again, len(zs), *zs, *scales, own))
        if self.run is None or self.run.account is None:
            return out
        constant = own.detach() - sum(z.detach() * scale for z, scale in zip(zs, scales, strict=True))
        return self.run.account.absorb(self.layer, operation.inputs[0], out, Shares(bias=constant))


class _Parts(Again):
    """Scales of a linearized function, computed once more so that they can be differentiated."""

    def __init__(self, rule: Linearized, operation: Operation) -> None:
        super().__init__(rule, operation.inputs)
        self.linearized, self.operation = rule, operation

    def scales(self) -> list[Tensor]:
        return [scale for _, scale in self.linearized.parts(self.operation, *self.operation.inputs)]


class Gate(Linearized):
    r"""A product :math:`y = s \odot g` of two factors that both depend on the model's input.

    The ordinary chain rule would give the whole relevance to each factor. ``"signal"`` holds the gate :math:`g`
    constant, so that the signal :math:`s` takes all ("signal-take-all", Arras et al., "Explaining and interpreting
    LSTMs", 2019, section 11.2.3); ``"split"`` gives each factor half (AttnLRP, Achtibat et al., ICML 2024, eq. 13).
    Both conserve relevance. The gate is the factor that is broadcast, as in squeeze-and-excitation, or else the one
    that is the output of a sigmoid, in whatever shape; where neither holds, the relevance is split.

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
        self.mode = _checked(mode)

    def operate(self, operation: Operation) -> Tensor:
        """Return the product; one factor alone is right by the ordinary chain rule."""
        return cast(Tensor, operation.output) if len(operation.inputs) == 1 else super().operate(operation)

    def parts(self, operation: Operation, *inputs: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
        """The signal, scaled by the gate."""
        left, right = inputs
        shape = operation.output.shape
        if left is right:
            return [(left, left)]  # the square of a tensor hands its relevance on
        # (what is asked is the operands' own history, which second derivatives do not know)
        first, second = operation.inputs
        if self.mode == "signal" and _is_gate(first, second, shape):
            return [(right.expand(shape), left)]
        if self.mode == "signal" and _is_gate(second, first, shape):
            return [(left.expand(shape), right)]
        return [(left.expand(shape), right / 2), (right.expand(shape), left / 2)]


class Squash(Pass):
    """`Pass` for functions whose outputs are between 0 and 1: in a product, they are the gate."""


def _checked(mode: Gates) -> Gates:
    if mode not in ("signal", "split"):
        raise ValueError(f'gates are held constant ("signal") or take half ("split"); got {mode!r}')
    return mode


def _is_gate(factor: Tensor, other: Tensor, shape: torch.Size) -> bool:
    if _is_broadcast(factor, shape) != _is_broadcast(other, shape):
        return _is_broadcast(factor, shape)
    return _is_squashed(factor) and not _is_squashed(other)


def _is_broadcast(factor: Tensor, shape: torch.Size) -> bool:
    expanded = (size > 1 and stride == 0 for size, stride in zip(factor.shape, factor.stride(), strict=True))
    return factor.shape != shape or any(expanded)


def _is_squashed(tensor: Tensor) -> bool:
    """Whether a tensor holds outputs of `Squash`, as autograd knows."""
    node = tensor.grad_fn
    while node is not None:
        again = getattr(node, "again", None)
        if again is not None:
            return isinstance(again.rule, Squash)
        if not node.name().rpartition("::")[2].startswith((*_RESHAPING, "Absorb")):
            return False
        above = [n for n, _ in node.next_functions if n is not None and not n.name().startswith("Sink")]
        # (what is copied into a tensor comes last)
        node = above[-1] if above else None
    return False


class GLU(Linearized):
    """Gated linear unit, ``a * sigmoid(b)`` of the two halves of its input.

    Parameters
    ----------
    mode : "signal" or "split"
        What becomes of the gate ``sigmoid(b)``, as in `Gate`.

    Raises
    ------
    ValueError
        If it is neither.
    """

    settings: ClassVar[tuple[str, ...]] = ("mode",)

    def __init__(self, mode: Gates = "signal") -> None:
        super().__init__()
        self.mode = _checked(mode)

    def parts(self, operation: Operation, *inputs: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
        """First half, scaled by the gate; the other one hands on what its gate is given."""
        args, kwargs = operation.args, operation.kwargs
        signal, below = inputs[0].chunk(2, kwargs.get("dim", args[1] if len(args) > 1 else -1))
        gate = below.sigmoid()
        if self.mode == "signal":
            return [(signal, gate)]
        return [(signal, gate / 2), (below, torch.where(below == 0, 0.0, signal * gate / 2 / below))]


class Quotient(Linearized):
    """A quotient: what divides is held constant, as the statistics of a normalization.

    The ordinary chain rule would take from the divisor what it gives to the dividend, and leave nothing.
    """

    settings: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        super().__init__()

    def operate(self, operation: Operation) -> Tensor:
        """Return the quotient; with a constant divisor, or rounded, the ordinary chain rule is right."""
        dividend = operation.args[0] if operation.args else operation.kwargs.get("input")
        if (len(operation.inputs) == 1 and operation.inputs[0] is dividend) or operation.kwargs.get("rounding_mode"):
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
        ``"bias"`` gives the share of each bias to the input at the same place. (To share it among all inputs would
        divide by differences from the mean, which may be close to 0.)
    """

    settings: ClassVar[tuple[str, ...]] = ("zero_params",)

    def __init__(self, zero_params: str | Sequence[str] | None = None) -> None:
        super().__init__(0.0, zero_params)

    def parts(self, operation: Operation, *inputs: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
        """Centred input, scaled; and the input at the same place for the bias, where that counts as zero."""
        (a,) = inputs
        given = _arguments(operation)
        weight, bias = (_aligned(given.get(name), operation.name, a) for name in ("weight", "bias"))
        z, mean, deviation = _STATISTICS[operation.name](a, given)
        scale = 1 / deviation if weight is None else weight / deviation
        if "bias" not in self.zero_params:
            return [(z, scale)]
        shift = (0.0 if bias is None else bias) - scale * mean
        return [(z, scale), (a, torch.where(a == 0, 0.0, shift / a))]


class Proportional(Rule):
    """The ordinary chain rule, for functions in which constants may take part: these keep their share."""

    settings: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        super().__init__()

    def operate(self, operation: Operation) -> Any:
        """Return the function's output; what the operands that depend on the model's input do not explain is kept."""
        output = operation.output
        if self.run is None or self.run.account is None or not isinstance(output, Tensor):
            return output
        shares = Shares(bias=output.detach() - _explained(operation))
        return self.run.account.absorb(self.layer, operation.inputs[0], output.clone(), shares)


class Refused(Proportional):
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

    def operate(self, operation: Operation) -> Any:
        """Refuse functions of more than one operand that depends on the model's input; others are affine.

        Raises
        ------
        NotImplementedError
            Naming the operation and the layer.
        """
        if len(operation.inputs) == 1 and operation.name not in ATTENTION:
            return super().operate(operation)
        # (a TypeError inside an operator such as @ would be taken for "not my type")
        raise NotImplementedError(self._message(str(operation)))

    def check(self, module: nn.Module) -> None:
        """Refuse every module."""
        raise TypeError(self._message(type(module).__name__))

    def _message(self, what: str) -> str:
        return f"{self.method} has no rule for {what}; give one in layer_map, or None for the ordinary chain rule"


def _explained(operation: Operation) -> Tensor:
    r"""What the inputs contribute by the ordinary chain rule, :math:`\sum_i x_i \, \partial f / \partial x_i`."""
    with torch.enable_grad():
        inputs = [t.detach().requires_grad_() for t in operation.inputs]
        output = operation(*inputs)
        # (the derivative of a vector-Jacobian product by its vector is the Jacobian)
        vector = torch.zeros_like(output).requires_grad_()
        gradients = torch.autograd.grad(output, inputs, vector, create_graph=True)
        return torch.autograd.grad(gradients, vector, [t.detach() for t in inputs])[0]


def _arguments(operation: Operation) -> dict[str, Any]:
    signature = _SIGNATURES[operation.name]
    given = signature.bind(*operation.args[: len(signature.parameters)], **operation.kwargs)
    given.apply_defaults()
    return given.arguments


def _aligned(parameter: Tensor | None, function: str, a: Tensor) -> Tensor | None:
    """Parameter of a normalization as it broadcasts to the input."""
    if parameter is None or function in ("layer_norm", "rms_norm"):
        return parameter
    return parameter.reshape(-1, *(1,) * (a.dim() - 2))


def _layer_statistics(a: Tensor, given: dict[str, Any]) -> Statistics:
    dims = tuple(range(-len(given["normalized_shape"]), 0))
    return a - a.mean(dims, keepdim=True), 0.0, _deviation(a, dims, given["eps"])


def _rms_statistics(a: Tensor, given: dict[str, Any]) -> Statistics:
    dims = tuple(range(-len(given["normalized_shape"]), 0))
    eps = torch.finfo(a.dtype).eps if given["eps"] is None else given["eps"]
    return a, 0.0, (a.square().mean(dims, keepdim=True) + eps).sqrt()


def _group_statistics(a: Tensor, given: dict[str, Any]) -> Statistics:
    grouped = a.reshape(len(a), given["num_groups"], -1)
    deviation = _deviation(grouped, (-1,), given["eps"]).expand(grouped.shape)
    return (grouped - grouped.mean(-1, keepdim=True)).reshape(a.shape), 0.0, deviation.reshape(a.shape)


def _instance_statistics(a: Tensor, given: dict[str, Any]) -> Statistics:
    if given["use_input_stats"]:
        return _group_statistics(a, given | {"num_groups": a.shape[1]})
    mean, var = (given[name].reshape(-1, *(1,) * (a.dim() - 2)) for name in ("running_mean", "running_var"))
    return a, mean, (var + given["eps"]).sqrt()


def _deviation(a: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    return (a.var(dims, unbiased=False, keepdim=True) + eps).sqrt()


#: Function linear in the input, constant mean, and deviation.
Statistics: TypeAlias = tuple[Tensor, Tensor | float, Tensor]
_STATISTICS: dict[str, Callable[[Tensor, dict[str, Any]], Statistics]] = {
    "layer_norm": _layer_statistics,
    "group_norm": _group_statistics,
    "instance_norm": _instance_statistics,
    "rms_norm": _rms_statistics,
}
_SIGNATURES = {name: inspect.signature(getattr(F, name)) for name in _STATISTICS}
