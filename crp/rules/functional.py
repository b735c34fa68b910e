r"""Rules for functions of torch: gates, quotients, normalizations, and what must be refused.

The ordinary chain rule on multipliers is LRP-0 for every function that is homogeneous of degree one in what depends on
the model's input, :math:`f(c\,x) = c f(x)`: then :math:`\sum_i x_i \partial f / \partial x_i = f(x)` (Euler), and
relevance is conserved. `crp.rules.functions` says which functions are. This module has rules for the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, TypeAlias, cast

import torch
from torch import Tensor

from crp.errors import InputError
from crp.rules.activations import _Activation
from crp.rules.attention import Attention, _by_chain_rule, _weigh, check_attention
from crp.rules.exponentials import _OfExponentials
from crp.rules.functions import Function
from crp.rules.layer import Layer
from crp.rules.linearized import Linearized
from crp.rules.notes import Born
from crp.rules.redirect import _acting
from crp.rules.shared import Part, Parts, _Shared

#: Whether a product's gate is held constant ("signal") or takes half of the relevance ("split").
Gates: TypeAlias = Literal["signal", "split"]


class Gate(_Shared):
    r"""A product :math:`y = s \odot g` of two factors that both depend on the model's input.

    The ordinary chain rule would give the whole relevance to each factor. ``"signal"`` holds the gate :math:`g`
    constant, so that the signal :math:`s` takes all ("signal-take-all", Arras et al., "Explaining and interpreting
    LSTMs", 2019, section 11.2.3); ``"split"`` gives each factor half (AttnLRP, Achtibat et al., ICML 2024, eq. 13).
    Both conserve relevance. The gate is the factor that is broadcast, as in squeeze-and-excitation. If none or both
    are, it is the factor that a sigmoid has made (or a number plus or minus such or a tanh), also resized, averaged or
    cut off, or else the one that an activation has made, also after reshaping or indexing, or squared. If that does not
    decide, the relevance is split.

    Both modes hold constant what other rules hold constant: a factor that is one over something, and no gate, as the
    deviation in a norm is, and the weights of experts that a router chooses. A factor that a softmax has made is
    treated as ``attention`` says. Where relevance would be split between two factors that are made of one tensor entry
    by entry, as in ``h * relu6(h + 3) / 6``, the product is an activation, and hands its relevance on to that tensor.
    Such factors are multiplied first, in whatever order a model does so: ``a * b * sigmoid(a)`` is ``silu(a) * b``.

    How relevance is split hangs on how a model is written otherwise: in ``(a * b) * c``, ``c`` takes half; `torch.lerp`
    is ``a + w * (b - a)``; and a softmax of two tensors is one, and not the sigmoid of their difference.

    Parameters
    ----------
    mode : "signal" or "split"
    attention : "constant" or "split", optional
        What becomes of factors that a softmax has made; as the gates by default.

    Raises
    ------
    ValueError
        If it is something else.
    """

    settings: ClassVar[tuple[str, ...]] = ("mode", "attention")

    def __init__(self, mode: Gates = "signal", attention: Attention | None = None) -> None:
        super().__init__()
        self.mode = _checked(mode)
        held: Attention = "constant" if mode == "signal" else "split"
        self.attention = held if attention is None else check_attention(attention)

    def operate(self, layer: Layer) -> Any:
        """Return the product; one factor alone is right by the ordinary chain rule."""
        if len(layer.inputs) == 1:
            return layer.output
        if isinstance(layer.parts, _OfExponentials):
            _weigh(layer, self.attention)
            softmax = _by_chain_rule(self, layer)
            if softmax is not None:
                return softmax
        held = self._gate(layer) if self._is_plain(layer) else None
        if held is None:
            source = self._made_of(layer)
            return super().operate(layer) if source is None else _Activation(source, self.attachment).operate(layer)
        return _SignalTimesGate.apply(*layer.inputs, held, layer.function, _acting(self.is_active, layer))

    def _is_plain(self, layer: Layer) -> bool:
        """Whether a call is a product of two different real tensors, and nothing is accounted for."""
        if layer.known.canonical != "mul" or len(layer.args) != 2 or layer.kwargs:
            return False
        left, right = layer.inputs
        is_real = left.is_floating_point() and right.is_floating_point() and left is not right
        return is_real and self._account is None

    def _made_of(self, layer: Layer) -> Tensor | None:
        """What both factors are made of entry by entry, where the relevance is split; None if there is nothing."""
        if self.attachment is None or layer.inputs[0] is layer.inputs[1]:
            return None
        note = None if self._gate(layer) is not None else self.attachment.notes.common(layer.inputs)
        source = None if note is None else note.now()
        is_plain = source is not None and not source.is_complex() and source.shape == layer.output.shape
        return source if is_plain else None

    def treats(self, known: Function, kind: str, alone: bool) -> bool:
        """Products of two factors that a module without parts calls."""
        return alone and kind == "product" and known.parse is None

    def parts(self, layer: Layer) -> Parts:
        """All for the signal, or half for each; a square hands its relevance on."""
        left, right = layer.inputs
        held = None if left is right else self._gate(layer)
        of_inputs = iter((0.5, 0.5) if held is None else (float(held == 1), float(held == 0)))
        mine = {id(left), id(right)}
        parts: list[Part] = [next(of_inputs) if id(value) in mine else 1.0 for value in layer.args]
        return parts, {name: next(of_inputs) if id(value) in mine else 1.0 for name, value in layer.kwargs.items()}

    def _gate(self, layer: Layer) -> int | None:
        """Which of the two factors is held constant, if one is."""
        shape = torch.broadcast_shapes(*(tensor.shape for tensor in layer.inputs))  # type: ignore[no-untyped-call]
        broadcast = [_is_broadcast(factor, shape) for factor in layer.inputs]

        def only(marks: Sequence[bool]) -> int | None:
            return marks.index(True) if marks[0] != marks[1] else None

        def born_of(flags: int) -> list[bool]:
            return [bool(born & flags) for born in layer.born]

        def broadcast_of(flags: int) -> list[bool]:
            return [mark and is_one for mark, is_one in zip(born_of(flags), broadcast, strict=True)]

        # (of two inverses, as where one is normalized, the statistics divide; of weights, those that choose experts)
        for marks in (born_of(Born.DIVISOR), broadcast_of(Born.DIVISOR), broadcast_of(Born.ROUTED)):
            if (held := only(marks)) is not None:
                return held
        if (held := only(born_of(Born.SOFTMAX))) is not None:
            return held if self.attention == "constant" else None
        if self.mode == "split":
            return None
        kinds = (broadcast, born_of(Born.SQUASHED | Born.ROUTED), born_of(Born.ACTIVATION))
        return next((held for marks in kinds if (held := only(marks)) is not None), None)


def _checked(mode: Gates) -> Gates:
    if not isinstance(mode, str) or mode not in ("signal", "split"):
        raise InputError(f'gates are held constant ("signal") or take half ("split"); got {mode!r}')
    return mode


def _is_broadcast(factor: Tensor, shape: torch.Size) -> bool:
    expanded = (size > 1 and stride == 0 for size, stride in zip(factor.shape, factor.stride(), strict=True))
    return factor.shape != shape or any(expanded)


class _SignalTimesGate(torch.autograd.Function):
    """A product; what arrives goes to the signal only, so that the gate's gradient is not computed to be dropped."""

    @staticmethod
    def forward(
        ctx: Any, left: Tensor, right: Tensor, held: int, product: Callable[..., Tensor], is_active: Callable[[], bool]
    ) -> Tensor:
        """Multiply; ``held`` is the number of the gate."""
        ctx.save_for_backward(left, right)
        ctx.held, ctx.is_active = held, is_active
        ctx.read = left, right  # (an activation below, whose gradient comes later, may borrow its output: `Pass`)
        return product(left, right)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        """Multiply with the other factor; autograd sums over axes along which a factor was broadcast."""
        left, right = ctx.saved_tensors
        takes = [number != ctx.held or not ctx.is_active() for number in (0, 1)]
        return grads[0] * right if takes[0] else None, grads[0] * left if takes[1] else None, None, None, None


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

    def parts(self, layer: Layer, *inputs: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
        """First half, scaled by the gate; for ``"split"`` also the second half, from which the gate is made."""
        signal, below = inputs[0].chunk(2, layer.arguments.get("dim", -1))
        gate, note = below.sigmoid(), self._note_of(layer.inputs[0])
        of_gate = torch.where(below == 0, 0.0, signal * gate / below)
        if note is not None and note.flags & Born.DIVISOR:  # (as in a product: what divides is held constant)
            return [(below, of_gate)]
        return [(signal, gate)] if self.mode == "signal" else [(signal, gate / 2), (below, of_gate / 2)]


class Quotient(Linearized):
    """A quotient, with the divisor held constant, as the statistics of a normalization are.

    By the ordinary chain rule, the divisor would get minus the relevance of the dividend, and the sum would be zero.
    Exponentials that are divided by their sum are a softmax, which has the ordinary chain rule.

    Parameters
    ----------
    mode : "signal" or "split"
        As in `Gate`, where one over the divisor is a gate: ``s / (1 + exp(-g))`` is ``s * sigmoid(g)``.

    Raises
    ------
    ValueError
        If it is neither.
    """

    settings: ClassVar[tuple[str, ...]] = ("mode",)

    def __init__(self, mode: Gates = "signal") -> None:
        super().__init__()
        self.mode = _checked(mode)

    def operate(self, layer: Layer) -> Tensor:
        """Return the quotient; with a constant divisor, or rounded, the ordinary chain rule is right."""
        dividend = layer.arguments.get("input")
        if (len(layer.inputs) == 1 and layer.inputs[0] is dividend) or layer.kwargs.get("rounding_mode"):
            return cast(Tensor, layer.output)
        softmax = _by_chain_rule(self, layer)
        return super().operate(layer) if softmax is None else softmax

    def parts(self, layer: Layer, *inputs: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
        """Dividend, scaled by one over the divisor; a divisor alone hands its relevance on."""
        if len(inputs) == 1:
            (divisor,) = inputs
            y = cast(Tensor, layer.value(divisor))
            return [(divisor.expand(y.shape), y / divisor)]
        dividend, divisor = (tensor.expand(layer.output.shape) for tensor in inputs)
        notes = None if self.attachment is None else self.attachment.notes
        is_gate = self.mode == "split" and bool(layer.born[1] & Born.GATING)
        if notes is None or not is_gate or notes.common(inputs) is not None:  # (of one tensor, it is an activation)
            return [(dividend, 1 / divisor)]
        return [(dividend, 0.5 / divisor), (divisor, layer.value(dividend, divisor) / (2 * divisor))]


class Normalization(Linearized):
    r"""Batch, layer, group, instance and RMS norm, with the variance held constant.

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

    def parts(self, layer: Layer, *inputs: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
        """Centred input, scaled; and the input at the same place for the bias, where that counts as zero."""
        a = layer.only_input(self)
        arguments = _arguments(layer)
        weight, bias = (_aligned(arguments.get(name), layer.name, a) for name in ("weight", "bias"))
        if layer.name in ("layer_norm", "rms_norm") and not self.zero_params and self._account is None:
            dims = tuple(range(-len(arguments["normalized_shape"]), 0))
            z = cast(Tensor, _Centred.apply(a, weight, dims if layer.name == "layer_norm" else None))
            return [(z, 1 / _DEVIATIONS[layer.name](a, dims, arguments["eps"]))]
        z, mean, deviation = _STATISTICS[layer.name](a, arguments)
        scale = 1 / deviation if weight is None else weight / deviation
        if "bias" not in self.zero_params:
            return [(z, scale)]
        shift = (0.0 if bias is None else bias) - scale * mean
        return [(z, scale), (a, torch.where(a == 0, 0.0, shift / a))]


class _Centred(torch.autograd.Function):
    """Stands for the centred input times the weight: with its gradient, but not its value, which nobody needs."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, weight: Tensor | None, dims: tuple[int, ...] | None) -> Tensor:
        """Return another view of the input; ``dims`` are None where nothing is centred."""
        ctx.weight, ctx.dims = weight, dims
        return a.view_as(a)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Scale, and centre."""
        u = grads[0] if ctx.weight is None else grads[0] * ctx.weight.detach()
        return u if ctx.dims is None else u - u.mean(ctx.dims, keepdim=True), None, None


def _arguments(layer: Layer) -> dict[str, Any]:
    """Arguments of a normalization, with those that calls may leave out."""
    eps = None if layer.name == "rms_norm" else 1e-5
    return {"eps": eps, "use_input_stats": True} | layer.arguments


def _aligned(parameter: Tensor | None, function: str, a: Tensor) -> Tensor | None:
    """Parameter of a normalization as it broadcasts to the input."""
    if parameter is None or function in ("layer_norm", "rms_norm"):
        return parameter
    return parameter.reshape(-1, *(1,) * (a.dim() - 2))


def _layer_statistics(a: Tensor, arguments: dict[str, Any]) -> Statistics:
    dims = tuple(range(-len(arguments["normalized_shape"]), 0))
    return a - a.mean(dims, keepdim=True), 0.0, _deviation(a, dims, arguments["eps"])


def _rms_statistics(a: Tensor, arguments: dict[str, Any]) -> Statistics:
    dims = tuple(range(-len(arguments["normalized_shape"]), 0))
    return a, 0.0, _root_mean_square(a, dims, arguments["eps"])


def _group_statistics(a: Tensor, arguments: dict[str, Any]) -> Statistics:
    grouped = a.reshape(len(a), arguments["num_groups"], -1)
    deviation = _deviation(grouped, (-1,), arguments["eps"]).expand(grouped.shape)
    return (grouped - grouped.mean(-1, keepdim=True)).reshape(a.shape), 0.0, deviation.reshape(a.shape)


def _instance_statistics(a: Tensor, arguments: dict[str, Any]) -> Statistics:
    if arguments["use_input_stats"]:
        return _group_statistics(a, arguments | {"num_groups": a.shape[1]})
    return _running_statistics(a, arguments)


def _batch_statistics(a: Tensor, arguments: dict[str, Any]) -> Statistics:
    if arguments.get("training"):
        dims = (0, *range(2, a.dim()))
        return a - a.mean(dims, keepdim=True), 0.0, _deviation(a, dims, arguments["eps"])
    return _running_statistics(a, arguments)


def _running_statistics(a: Tensor, arguments: dict[str, Any]) -> Statistics:
    mean, var = (arguments[name].reshape(-1, *(1,) * (a.dim() - 2)) for name in ("running_mean", "running_var"))
    return a, mean, (var + arguments["eps"]).sqrt()


def _deviation(a: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    # (torch's `var` takes twenty times as long on a CPU; what is squared is no larger than the deviation)
    length = math.prod(a.shape[dim] for dim in dims)
    norm: Tensor = torch.linalg.vector_norm(a - a.mean(dims, keepdim=True), dim=dims, keepdim=True)
    return ((norm / math.sqrt(length)).square() + eps).sqrt()


def _root_mean_square(a: Tensor, dims: tuple[int, ...], eps: float | None) -> Tensor:
    return (a.square().mean(dims, keepdim=True) + (torch.finfo(a.dtype).eps if eps is None else eps)).sqrt()


_DEVIATIONS: dict[str, Callable[..., Tensor]] = {"layer_norm": _deviation, "rms_norm": _root_mean_square}
#: Function linear in the input, constant mean, and deviation.
Statistics: TypeAlias = tuple[Tensor, Tensor | float, Tensor]
_STATISTICS: dict[str, Callable[[Tensor, dict[str, Any]], Statistics]] = {
    "layer_norm": _layer_statistics,
    "group_norm": _group_statistics,
    "instance_norm": _instance_statistics,
    "batch_norm": _batch_statistics,
    "rms_norm": _rms_statistics,
}
