r"""DeepLIFT's rules for what the paper leaves out: products, quotients, normalizations and softmax.

A product of two factors that both depend on the input differs from that of the reference by

.. math:: \Delta(uv) = \bar v \, \Delta u + \bar u \, \Delta v, \qquad \bar u = \tfrac12 (u + u_0), \;
    \bar v = \tfrac12 (v + v_0),

which is exact, symmetric, and gives each factor its Shapley value. Quotients are products with :math:`1/v`, and
elementwise functions inside are treated as by `Rescale`, so that summation-to-delta holds throughout. The paper does
not say so: the composite warns. Other implementations take the ordinary chain rule here, which conserves nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from crp.errors import StateError
from crp.layers.nested import tensors_in
from crp.rules.deeplift import Difference, same_values, slope
from crp.rules.layer import Layer, _no_rule
from crp.rules.operands import ADDED


class _Decomposed(Difference):
    """Base: functions whose difference is that of a linear surrogate, with coefficients that are held constant."""

    def through(self, layer: Layer, reference: Layer, surrogate: Tensor) -> Tensor:
        """Value of the call, with the gradient of the surrogate."""
        self.note_constants(layer, reference)
        name = str(layer)

        def refuse() -> NoReturn:
            raise StateError(f"DeepLIFT has no second derivatives through {name}")

        return self.send(layer, layer.output, [surrogate], [layer.output.new_ones(())], refuse)

    def linear(self, layer: Layer, reference: Layer) -> Tensor:
        """Value of a call that is linear in what depends on the input, if all else is as for the reference."""
        self.note_constants(layer, reference)
        return cast(Tensor, layer.output)


class SelectionDifference(_Decomposed):
    """Functions such as `torch.where`: the ordinary chain rule, which is right where both passes select alike."""

    def compare(self, layer: Layer, reference: Layer) -> Tensor:
        """Return what was selected."""
        return self.linear(layer, reference)


class ProductDifference(_Decomposed):
    """Products of two factors, each with the mean of the other: see the module."""

    def compare(self, layer: Layer, reference: Layer) -> Tensor:
        """Return the product."""
        is_added = _is_added(layer)
        factors = [number for number, is_one in enumerate(is_added) if not is_one]
        if len(factors) < 2:
            return self.linear(layer, reference)
        if len(factors) > 2:
            self.beyond(layer, exact=False)
            return cast(Tensor, layer.output)
        if not any(same_values(layer.inputs[number], reference.inputs[number]) for number in factors):
            self.beyond(layer, exact=True)
        call, means = layer.again(), _means(layer, reference)
        # (what is only added flows into the first of both)
        first, second = list(layer.inputs), list(means)
        first[factors[1]], second[factors[1]] = means[factors[1]], layer.inputs[factors[1]]
        return self.through(layer, reference, call.value(*first) + call.value(*second))


class QuotientDifference(_Decomposed):
    r"""Quotients :math:`u / v`: :math:`\Delta y = \overline{1/v} \, \Delta u - \bar u \, \Delta v / (v v_0)`."""

    def compare(self, layer: Layer, reference: Layer) -> Tensor:
        """Return the quotient."""
        if layer.kwargs.get("rounding_mode") is not None:
            self.beyond(layer, exact=False)
            return cast(Tensor, layer.output)
        dividend = layer.arguments.get("input")
        if len(layer.inputs) == 1 and layer.inputs[0] is dividend:
            return self.linear(layer, reference)
        if len(layer.inputs) == 1:
            return self.rescaled(layer, reference)
        if not same_values(layer.inputs[1], reference.inputs[1]):
            self.beyond(layer, exact=True)
        (u, v), (_, v0) = layer.inputs, reference.inputs
        u_mean, _ = _means(layer, reference)
        fixed = v.detach()
        return self.through(layer, reference, u * (1 / fixed + 1 / v0) / 2 - u_mean / (fixed * v0) * v)


class NormalizationDifference(_Decomposed):
    r"""Layer, group, instance and RMS norm: :math:`y = w \odot u r + b`, :math:`u = x - \operatorname{mean} x`.

    With :math:`\sigma^2 = \operatorname{mean} u^2 + \varepsilon` and :math:`r = 1/\sigma`, a product of two factors,
    where each side counts with its variance, :math:`\lambda = \sigma^2 / (\sigma^2 + \sigma_0^2)`:

    .. math:: \Delta(ur) = (\lambda r + (1 - \lambda) r_0) \, \Delta u + ((1 - \lambda) u + \lambda u_0) \, \Delta r,

    and :math:`\Delta r = -\frac{r^2 r_0^2}{r + r_0} \Delta\sigma^2`,
    :math:`\Delta\sigma^2 = \operatorname{mean}((u + u_0) \Delta u)`. It is exact for every :math:`\lambda`; at equal
    variances it is the product's. (With halves throughout, a constant reference, for which
    :math:`r_0 = \varepsilon^{-1/2}`, would give multipliers of hundreds that cancel.)
    """

    def compare(self, layer: Layer, reference: Layer) -> Tensor:
        """Return the normalized values."""
        named = {"eps": None if layer.name == "rms_norm" else 1e-5} | layer.arguments
        if not named.get("use_input_stats", True):
            return cast(Tensor, layer.output)
        self.beyond(layer, exact=True)
        x, x0 = layer.inputs[0], reference.inputs[0]
        weight = named.get("weight")
        eps: float = torch.finfo(x.dtype).eps if named["eps"] is None else named["eps"]

        def centered(x: Tensor) -> Tensor:
            if layer.name in ("layer_norm", "rms_norm"):
                x = x.flatten(-len(named["normalized_shape"]))
            else:
                x = x.reshape(len(x), named.get("num_groups", x.shape[1]), -1)
            return x if layer.name == "rms_norm" else x - x.mean(-1, keepdim=True)

        def inverse(u: Tensor) -> Tensor:
            return (u.square().mean(-1, keepdim=True) + eps).rsqrt()

        u = centered(x)
        with torch.no_grad():
            u_now, u0 = u.detach(), centered(x0)
            r, r0 = inverse(u_now), inverse(u0)
            share = r0.square() / (r.square() + r0.square())
            scale, factor = share * r + (1 - share) * r0, (1 - share) * u_now + share * u0
            quotient = -(r * r0).square() / (r + r0)
        z = u * scale + factor * quotient * ((u_now + u0) * u).mean(-1, keepdim=True)
        z = z.reshape(x.shape)
        if weight is not None:
            of_channels = layer.name not in ("layer_norm", "rms_norm")
            z = z * (weight.reshape(-1, *(1,) * (x.dim() - 2)) if of_channels else weight).detach()
        return self.through(layer, reference, z)


class SoftmaxDifference(_Decomposed):
    r"""Softmax, its logarithm :math:`t = x - \log \sum e^x`, and the subtrahend of that alone.

    :math:`\Delta \log \sum e^x = q \sum_j p_j \Delta x_j`, with the quotients :math:`p` of the exponential and
    :math:`q` of the logarithm; softmax is :math:`e^t`, with one quotient more. (For a softmax at the end of a model the
    paper explains the logits instead, section 3.6.)
    """

    def compare(self, layer: Layer, reference: Layer) -> Tensor:
        """Return the function's value."""
        self.beyond(layer, exact=True)
        sign = -1 if layer.name == "softmin" else 1
        lowest = torch.finfo(layer.inputs[0].dtype).min  # (what a mask of minus infinity leaves)
        x, x0 = ((value * sign).clamp(min=lowest) for value in (layer.inputs[0], reference.inputs[0]))
        dim = layer.arguments.get("dim")
        if dim is None:  # as torch chooses
            dim = 0 if x.dim() in (0, 1, 3) else 1
        with torch.no_grad():
            now = x.detach()
            top = torch.maximum(now.amax(dim, keepdim=True), x0.amax(dim, keepdim=True))
            e, e0 = (now - top).exp(), (x0 - top).exp()
            s, s0 = e.sum(dim, keepdim=True), e0.sum(dim, keepdim=True)
            shares = slope(torch.exp, now - top, x0 - top, e, e0) * slope(torch.log, s, s0, s.log(), s0.log())
        if layer.known.canonical == "logsumexp":
            return self.through(layer, reference, (shares * x).sum(dim, keepdim=layer.arguments.get("keepdim", False)))
        t = x - (shares * x).sum(dim, keepdim=True)
        if layer.known.canonical != "log_softmax":
            log, log0 = now.log_softmax(dim), x0.log_softmax(dim)
            t = t * slope(torch.exp, log, log0, log.exp(), log0.exp())
        return self.through(layer, reference, t)


def _written_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` as products and a softmax, without infinite logits."""
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
    logits = query * (query.shape[-1] ** -0.5 if scale is None else scale) @ key.transpose(-2, -1)
    hidden = None if attn_mask is None else attn_mask.isneginf() if attn_mask.is_floating_point() else ~attn_mask
    if is_causal:
        hidden = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1)
    elif attn_mask is not None and attn_mask.is_floating_point():
        logits = logits + attn_mask.masked_fill(attn_mask.isneginf(), 0.0)
    if hidden is not None:
        logits = logits.masked_fill(hidden, torch.finfo(logits.dtype).min)
    shares = logits.softmax(-1)
    if hidden is not None:
        shares = shares.masked_fill(hidden, 0.0)
    return F.dropout(shares, dropout_p) @ value if dropout_p else shares @ value


class TakenApart(Difference):
    """Functions that are several others, which have rules, as attention is products and a softmax.

    Parameters
    ----------
    written_out : callable
        The same, written out; it gives NotImplemented for arguments for which it is not.
    """

    def __init__(self, written_out: Callable[..., Any] = _written_attention) -> None:
        super().__init__()
        self.written_out = written_out

    def compare(self, layer: Layer, reference: Layer) -> Tensor:
        """Return the function's value; refuse kernels of which torch does not know how they are written."""
        if layer.known.has("attention"):
            raise NotImplementedError(_no_rule("DeepLift", layer))
        self.beyond(layer, exact=False)
        return cast(Tensor, layer.output)


def _is_added(layer: Layer) -> list[bool]:
    """Whether a product only adds an input, for each of them."""
    position, names = ADDED.get(layer.known.canonical, (-1, ()))
    values = [(value, number == position) for number, value in enumerate(layer.args)]
    values += [(value, name in names) for name, value in layer.kwargs.items()]
    mine = {id(tensor) for tensor in layer.inputs}
    return [is_one for value, is_one in values for tensor in tensors_in(value) if id(tensor) in mine]


def _means(layer: Layer, reference: Layer) -> list[Tensor]:
    """Mean of each operand and its reference, held constant."""
    pairs = zip(layer.inputs, reference.inputs, strict=True)
    return [(value.detach() + value0) / 2 for value, value0 in pairs]
