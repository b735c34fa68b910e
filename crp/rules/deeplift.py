r"""DeepLIFT's rules: what multiplies :math:`m` at a function that is not linear, given its value for a reference input.

With :math:`\Delta` for "less its value for the reference input", a multiplier says what a difference in ``x`` is worth
for a target ``t``: :math:`m_{\Delta x \Delta t} = C_{\Delta x \Delta t} / \Delta x`. Multipliers obey a chain rule
(Shrikumar, Greenside, Kundaje, "Learning important features through propagating activation differences", ICML 2017,
eq. 3), so that only functions that are not linear need a rule; for affine ones the ordinary chain rule is the paper's
Linear rule (section 3.5.1). Each rule keeps :math:`\sum C = \Delta t` (summation-to-delta, eq. 1).

`Rescale` (section 3.5.2) treats elementwise functions, `RevealCancel` (section 3.5.3) those that read an `Affine`
layer, and `MaxPool` is for pooling. What the paper has no rule for stands in `crp.rules.products`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from crp.errors import InputTypeError
from crp.rules.base import Attachment, Rule
from crp.rules.functions import Function
from crp.rules.layer import Layer, negative, positive
from crp.rules.operands import _dense
from crp.rules.redirect import Redirect, SecondOrder, _released

#: A midpoint derivative that predicts Δy to this many roundings of y is used in place of the quotient.
_ROUNDINGS = 4


@dataclass
class Differences(Attachment):
    """What DeepLIFT's rules share while they are on a model.

    Attributes
    ----------
    outside : dict of str to bool
        Operations for which the method has no rule, and whether their treatment keeps summation-to-delta.
    differing : dict of str to None
        Operations that read other constants than for the reference.
    """

    keeps_constants: ClassVar[bool] = False  # (they cancel out in differences)

    outside: dict[str, bool] = field(default_factory=dict)
    differing: dict[str, None] = field(default_factory=dict)

    def clear(self) -> None:
        """Forget past forward passes."""
        super().clear()
        self.outside.clear()
        self.differing.clear()


class Difference(Rule):
    """Base of DeepLIFT's rules, which compare a function's call with the same call for the reference."""

    settings: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        super().__init__(0.0)

    def operate(self, layer: Layer) -> Any:
        """Treat a function of torch.

        Raises
        ------
        TypeError
            If the rule's composite has no reference.
        """
        if layer.reference is None and not isinstance(self.attachment, Differences):
            raise InputTypeError(
                f"{type(self).__name__} compares with a reference, which composites such as DeepLift have"
            )
        # Without a reference call, no input that is explained has entered the model.
        return layer.output if layer.reference is None else self.compare(layer, layer.reference)

    def compare(self, layer: Layer, reference: Layer) -> Any:
        """Value of the call, with the rule as its gradient."""
        raise NotImplementedError(f"{type(self).__name__} does not implement compare")

    def treats(self, known: Function, kind: str, alone: bool) -> bool:
        """What a module without parts calls."""
        return alone and not known.has("selects", "copies")

    def beyond(self, layer: Layer, exact: bool) -> None:
        """Note that the paper has no rule for an operation."""
        if isinstance(self.attachment, Differences):
            self.attachment.outside[str(layer)] = exact and self.attachment.outside.get(str(layer), True)

    def note_constants(self, layer: Layer, reference: Layer) -> None:
        """Note where a call reads other constants than for the reference, for which the rule is not exact."""
        if reference.differs and isinstance(self.attachment, Differences):
            self.attachment.differing[str(layer)] = None

    def parts_of(self, tensor: Tensor) -> _Parts | None:
        """Parts of an affine output, or of a copy of it; None for other tensors."""
        note = self._note_of(tensor)
        return note.parts if note is not None and isinstance(note.parts, _Parts) else None

    def rescaled(self, layer: Layer, reference: Layer) -> Tensor:
        """Value of an elementwise function, whose gradient is the quotient of differences."""
        x = layer.inputs[0].expand(layer.output.shape)
        x0, y0, call = reference.inputs[0].expand(reference.output.shape), reference.output, layer.again()
        with torch.no_grad():
            scale = slope(call, x.detach(), x0, layer.output.detach(), y0)
        return self.send(layer, layer.output, [x], [scale], lambda: [slope(call, x, x0, call(x), y0)])

    def send(
        self,
        layer: Layer,
        output: Tensor,
        surrogates: Sequence[Tensor],
        scales: Sequence[Tensor],
        compute: Callable[[], Sequence[Tensor]],
    ) -> Tensor:
        """Output of the call, whose gradient goes into the surrogates, each scaled.

        Parameters
        ----------
        layer : Layer
        output : Tensor
            With its own graph, for derivatives where rules are inactive.
        surrogates, scales : sequence of Tensor
        compute : callable
            Gives the scales once more, differentiable, for second derivatives.
        """
        y = _released(output)
        own = output if output.requires_grad else None
        second = SecondOrder(layer.again(), layer.inputs, self.is_active, compute)
        return cast(Tensor, Redirect.apply(y, second, len(surrogates), *surrogates, *scales, own))


class Rescale(Difference):
    r"""Elementwise functions :math:`y = f(x)`: :math:`m_x = m_y \, \Delta y / \Delta x`.

    Shrikumar et al. 2017, section 3.5.2. Where the difference quotient is lost in rounding, the derivative at the
    midpoint :math:`\tfrac12 (x + x_0)` stands for it: that is where the derivative predicts :math:`\Delta y` to within
    4 roundings of :math:`|y| + |y_0|` (and of :math:`|x| + |x_0|` for GELU). So there is no threshold to choose, kinks
    are never averaged, and piecewise linear functions are exact. Where :math:`\Delta x = 0` and the derivative is
    infinite, nothing is handed on. Conserves: summation-to-delta, exactly.
    """

    def compare(self, layer: Layer, reference: Layer) -> Tensor:
        """Return the function's value; its gradient is the quotient of differences."""
        if len(layer.inputs) != 1:
            self.beyond(layer, exact=False)
            return cast(Tensor, layer.output)
        if layer.operands is not None:
            raise InputTypeError(f"{type(self).__name__} treats elementwise functions, which {layer} is not")
        return self.rescaled(layer, reference)


class MaxPool(Difference):
    r"""Max-pooling, with windows of any kind; a special case of Rescale over one chosen input.

    Let :math:`i` be where the window's maximum is, and :math:`i_0` where it is for the reference. All of
    :math:`\Delta y` goes to :math:`k = i` where :math:`y \ge y_0`, and to :math:`k = i_0` elsewhere, so that

    .. math:: m_{x_k} = m_y \, \Delta y / \Delta x_k \in [0, m_y].

    Derivation: for :math:`y \ge y_0`, :math:`x_i = y \ge y_0 \ge x_{0,i}`; so :math:`\Delta x_i \ge \Delta y \ge 0`.
    For :math:`y < y_0`, :math:`x_{i_0} \le y < y_0 = x_{0,i_0}`; so :math:`\Delta x_{i_0} \le \Delta y < 0`. This is
    what swapping the two maxima gives, :math:`\max(y, y_0) - y_0` to :math:`i` and :math:`y - \max(y, y_0)` to
    :math:`i_0`, of which one is zero. Inputs that several windows share get the sum. Conserves: summation-to-delta,
    exactly.
    (captum overwrites instead of adding where windows overlap, and DeepExplain has no rule for pooling.)
    """

    def compare(self, layer: Layer, reference: Layer) -> Any:
        """Return the maxima; their gradient is that of the chosen inputs."""
        if not layer.known.has("maximum"):
            raise InputTypeError(f"{type(self).__name__} treats max-pooling, which {layer} is not")
        x, x0, call = layer.inputs[0], reference.inputs[0], layer.again()
        y, y0 = _first(layer.output), _first(reference.output)
        at = -int(layer.name.partition("pool")[2][0])
        chosen = torch.where(y >= y0, _maxima(layer, x.detach()), _maxima(reference, x0)).flatten(at)

        def gathered(values: Tensor) -> Tensor:
            return values.flatten(at).gather(-1, chosen).view(y.shape)

        z, z0 = gathered(x), gathered(x0)

        def ratio(value: Tensor, best: Tensor) -> Tensor:
            dz = best - z0
            return torch.where(dz == 0, 1.0, (value - y0) / torch.where(dz == 0, 1.0, dz))

        scale = ratio(y.detach(), z.detach())
        out = self.send(layer, y, [z], [scale], lambda: [ratio(_first(call(x)), gathered(x))])
        return (out, *layer.output[1:]) if isinstance(layer.output, tuple) else out


@dataclass(frozen=True)
class _Parts:
    r"""An affine output, and what its positive contributions are.

    Attributes
    ----------
    whole : Tensor
        The output.
    positive : callable
        Gives the sum of the positive contributions :math:`w_i \Delta a_i > 0`, differentiable in the layer's input.
    """

    whole: Tensor
    positive: Callable[[], Tensor]


class Affine(Difference):
    r"""Affine layers under `RevealCancel`: the ordinary chain rule; what reads the output can ask for its parts.

    :math:`\Delta z^{\pm}_j = \sum_i [\pm w_{ij} \Delta a_i > 0] \, w_{ij} \Delta a_i` (Shrikumar et al. 2017, section
    3.5.1). The multipliers of the two parts differ, but those of :math:`\Delta a^+_i` and :math:`\Delta a^-_i` do not:
    :math:`m_{a_i} = \sum_j w_{ij} ([w_{ij} \Delta a_i > 0] m_j^+ + [w_{ij} \Delta a_i < 0] m_j^-)`, with half of each
    where :math:`\Delta a_i = 0`. So that one multiplier for each activation is enough.
    """

    def compare(self, layer: Layer, reference: Layer) -> Tensor:
        """Return the layer's output, which remembers its parts."""
        self.note_constants(layer, reference)
        whole, call = cast(Tensor, layer.output), layer.again()
        a, a0 = layer.inputs[0], reference.inputs[0]

        def above() -> Tensor:
            delta = a - a0
            half = (delta == 0).to(delta) / 2
            up, down = (delta > 0).to(delta) + half, (delta < 0).to(delta) + half
            return call(delta * up, positive, bias=False) + call(delta * down, negative, bias=False)

        layer.parts = _Parts(whole, above)
        return cast(Tensor, _Apart.apply(whole.data, whole))


class BatchNorm(Difference):
    """Batch norm in evaluation mode: linear, so the ordinary chain rule; the parts of an affine layer pass through.

    In training mode it depends on the batch, for which the method has no rule; a warning says so.
    """

    def compare(self, layer: Layer, reference: Layer) -> Tensor:
        """Return the normalized values."""
        self.note_constants(layer, reference)
        whole = layer.output
        if layer.arguments.get("training", False):
            self.beyond(layer, exact=False)
            return cast(Tensor, whole)
        parts = self.parts_of(layer.inputs[0])
        if parts is None:
            return cast(Tensor, whole)
        below, scale = parts, _derivative(layer.again(), layer.inputs[0].detach())
        # (A negative factor swaps the two parts, between which RevealCancel makes no difference.)
        layer.parts = _Parts(below.whole * scale, lambda: below.positive() * scale)
        return cast(Tensor, _Apart.apply(whole.data, whole))


class RevealCancel(Rescale):
    r"""Elementwise functions of an affine output: positive and negative contributions are kept apart.

    .. math:: \Delta y^+ = \tfrac12 [f(z_0 + \Delta z^+) - f(z_0)] + \tfrac12 [f(z) - f(z_0 + \Delta z^-)],
        \quad m^+ = m_y \Delta y^+ / \Delta z^+,

    and likewise :math:`\Delta y^-` and :math:`m^-` (Shrikumar et al. 2017, section 3.5.3): the Shapley values of the
    two parts. Each is the mean of two quotients as in `Rescale`. Elsewhere (after an addition, say) the parts of the
    input are its own, :math:`\Delta x^+` or :math:`\Delta x^-`; one of them is zero, and this is `Rescale`. Conserves:
    summation-to-delta, exactly.
    """

    def compare(self, layer: Layer, reference: Layer) -> Tensor:
        """Return the function's value; its gradient goes to the two parts."""
        parts = self.parts_of(layer.inputs[0]) if len(layer.inputs) == 1 else None
        if parts is None or layer.output.shape != layer.inputs[0].shape:
            return super().compare(layer, reference)
        self.note_constants(layer, reference)
        x, x0 = layer.inputs[0], reference.inputs[0].expand_as(layer.inputs[0])
        call, plus = layer.again(), parts.positive()

        def scales(x: Tensor = x, plus: Tensor = plus) -> list[Tensor]:
            minus = x - x0 - plus
            above, below = x0 + plus, x0 + minus
            y0, y, high, low = reference.output, call(x), call(above), call(below)
            up = slope(call, above, x0, high, y0) + slope(call, x, below, y, low)
            down = slope(call, below, x0, low, y0) + slope(call, x, above, y, high)
            rescaled = slope(call, x, x0, y, y0)
            return [rescaled, down / 2 - rescaled, (up - down) / 2]

        with torch.no_grad():
            now = scales(x.detach(), plus.detach())
        # The layer's output receives the multiplier of Rescale, m·Δy/Δz, which is the layer's own relevance. The other
        # two terms sum to zero; below the layer they tell the two parts apart.
        return self.send(layer, layer.output, [x, parts.whole, plus], now, scales)


class _Apart(torch.autograd.Function):
    """Value of ``y`` as a new tensor, whose gradient goes into ``z``; notes can tell the two apart."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor) -> Tensor:
        """Return ``y`` itself."""
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Pass on."""
        return None, grads[0]


def slope(call: Callable[[Tensor], Tensor], x: Tensor, x0: Tensor, y: Tensor, y0: Tensor) -> Tensor:
    """Quotient Δy/Δx of an elementwise function; where it is lost in rounding, the derivative at the midpoint."""
    dx, dy = x - x0, y - y0
    quotient = dy / torch.where(dx == 0, 1.0, dx)
    name = getattr(call, "name", getattr(call, "__name__", ""))
    if name == "relu":
        return torch.where(dx == 0, (x > 0).to(quotient), quotient)
    between = _derivative(call, (x + x0) / 2)
    size = y.abs() + y0.abs()
    if name == "gelu":  # 1 + erf(x) is no better than 1
        size = size + x.abs() + x0.abs()
    rounding = _ROUNDINGS * max(torch.finfo(x.dtype).eps, torch.finfo(y.dtype).eps) * size
    return torch.where((between * dx - dy).abs() <= rounding, between, quotient)


def _derivative(call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Derivative of an elementwise function, differentiable if ``x`` is."""
    differentiable = torch.is_grad_enabled() and x.requires_grad
    with torch.enable_grad():
        x = x if differentiable else x.detach().requires_grad_()
        (slopes,) = torch.autograd.grad(call(x).sum(), x, create_graph=differentiable)
    return slopes


def _maxima(layer: Layer, x: Tensor) -> Tensor:
    """Where each window of a max-pooling has its maximum, as an index into the flattened space."""
    pool: Any = getattr(F, layer.name.removesuffix("_with_indices") + "_with_indices")
    named = {k: v for k, v in layer.kwargs.items() if k not in ("input", "self", "return_indices")}
    return cast(Tensor, pool(x, *layer.args[1:], **named)[1])


def same_values(value: Tensor, value0: Tensor) -> bool:
    """Whether two tensors hold the same values."""
    value, value0 = _dense(value), _dense(value0)  # (sparse ones have no memory of that kind)
    return value.shape == value0.shape and (value.data_ptr() == value0.data_ptr() or torch.equal(value, value0))


def _first(output: Any) -> Tensor:
    return cast(Tensor, output[0] if isinstance(output, tuple) else output)
