r"""What DeepLIFT's paper has no rule for: products, quotients, normalizations and softmax, decomposed exactly.

A product of two factors that both depend on the input differs from that of the reference by

.. math:: \Delta(uv) = \bar v \, \Delta u + \bar u \, \Delta v, \qquad \bar u = \tfrac12 (u + u_0), \;
    \bar v = \tfrac12 (v + v_0),

which is exact, symmetric, and gives each factor its Shapley value. Quotients are products with :math:`1/v`, and what
is elementwise inside is treated as by `Rescale`; so summation-to-delta holds throughout. The choice is ours, and the
composite warns of it: other implementations take the ordinary chain rule here, with which nothing is conserved.
"""

from __future__ import annotations

from typing import Any, NoReturn, cast

import torch
from torch import Tensor

from crp.rules.deeplift import Difference, same, same_operands, slope
from crp.rules.operation import Operation, depends, tensors_in

#: Functions that are linear in each of two operands.
BILINEAR = ("bilinear", "bmm", "dot", "einsum", "inner", "matmul", "mm", "mul", "multiply", "mv", "outer", "tensordot")
QUOTIENTS = ("div", "divide", "true_divide")
NORMALIZATIONS = ("group_norm", "instance_norm", "layer_norm", "rms_norm")
SOFTMAX = ("log_softmax", "softmax", "softmin")
#: Functions that are linear in their input if what selects is the same for the reference.
SELECTIONS = ("gather", "index_select", "masked_fill", "take_along_dim", "where")


class Decomposed(Difference):
    """Base: functions whose difference is that of a linear surrogate, with coefficients that are held constant."""

    def through(self, operation: Operation, surrogate: Tensor) -> Tensor:
        """Value of the call, with the gradient of the surrogate."""
        name = str(operation)

        def refuse() -> NoReturn:
            raise RuntimeError(f"DeepLIFT has no second derivatives through {name}")

        return self.send(operation, operation.output, [surrogate], [operation.output.new_ones(())], refuse)

    def linear(self, operation: Operation, reference: Operation) -> Tensor:
        """Value of a call that is linear in what depends on the input, if all else is as for the reference."""
        pairs = zip(
            tensors_in((operation.args, operation.kwargs)), tensors_in((reference.args, reference.kwargs)), strict=True
        )
        if not all(depends(value) or same(value, value0) for value, value0 in pairs):
            self.beyond(operation, exact=False)
        return cast(Tensor, operation.output)


class Selection(Decomposed):
    """Functions such as `torch.where`: the ordinary chain rule, which is right where both passes select alike."""

    def compare(self, operation: Operation, reference: Operation) -> Tensor:
        """Return what was selected."""
        return self.linear(operation, reference)


class Product(Decomposed):
    """Products of two factors, each with the mean of the other: see the module."""

    def compare(self, operation: Operation, reference: Operation) -> Tensor:
        """Return the product."""
        if len(operation.inputs) == 1:
            return self.linear(operation, reference)
        if len(operation.inputs) > 2:
            self.beyond(operation, exact=False)
            return cast(Tensor, operation.output)
        if not any(same(value, value0) for value, value0 in zip(operation.inputs, reference.inputs, strict=True)):
            self.beyond(operation, exact=True)
        (u, v), call = operation.inputs, operation.again()
        u_mean, v_mean = means(operation, reference)
        return self.through(operation, call(u, v_mean) + call(u_mean, v))


class Quotient(Decomposed):
    r"""Quotients :math:`u / v`: :math:`\Delta y = \overline{1/v} \, \Delta u - \bar u \, \Delta v / (v v_0)`."""

    def compare(self, operation: Operation, reference: Operation) -> Tensor:
        """Return the quotient."""
        if operation.kwargs.get("rounding_mode") is not None:
            self.beyond(operation, exact=False)
            return cast(Tensor, operation.output)
        dividend = operation.args[0] if operation.args else operation.kwargs["input"]
        if len(operation.inputs) == 1 and operation.inputs[0] is dividend:
            return self.linear(operation, reference)
        if len(operation.inputs) == 1:
            return self.rescaled(operation, reference)
        if not same_operands(operation, reference, 1):
            self.beyond(operation, exact=True)
        (u, v), (_, v0) = operation.inputs, reference.inputs
        u_mean, _ = means(operation, reference)
        fixed = v.detach()
        return self.through(operation, u * (1 / fixed + 1 / v0) / 2 - u_mean / (fixed * v0) * v)


class Normalization(Decomposed):
    r"""Layer, group, instance and RMS norm: :math:`y = w \odot u r + b`, :math:`u = x - \operatorname{mean} x`.

    With :math:`\sigma^2 = \operatorname{mean} u^2 + \varepsilon` and :math:`r = 1/\sigma`, a product of two factors,
    where each side counts with its variance, :math:`\lambda = \sigma^2 / (\sigma^2 + \sigma_0^2)`:

    .. math:: \Delta(ur) = (\lambda r + (1 - \lambda) r_0) \, \Delta u + ((1 - \lambda) u + \lambda u_0) \, \Delta r,

    and :math:`\Delta r = -\frac{r^2 r_0^2}{r + r_0} \Delta\sigma^2`,
    :math:`\Delta\sigma^2 = \operatorname{mean}((u + u_0) \Delta u)`. It is exact for every :math:`\lambda`; at equal
    variances it is the product's. (With halves throughout, a constant reference, for which
    :math:`r_0 = \varepsilon^{-1/2}`, would give multipliers of hundreds that cancel.)
    """

    def compare(self, operation: Operation, reference: Operation) -> Tensor:
        """Return the normalized values."""
        named = _named(operation)
        if not named.get("use_input_stats", True):
            return cast(Tensor, operation.output)
        self.beyond(operation, exact=True)
        x, x0 = operation.inputs[0], reference.inputs[0]
        weight = named.get("weight")
        eps: float = torch.finfo(x.dtype).eps if named["eps"] is None else named["eps"]

        def centered(x: Tensor) -> Tensor:
            if operation.name in ("layer_norm", "rms_norm"):
                x = x.flatten(-len(named["normalized_shape"]))
            else:
                x = x.reshape(len(x), named.get("num_groups", x.shape[1]), -1)
            return x if operation.name == "rms_norm" else x - x.mean(-1, keepdim=True)

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
        if weight is not None and operation.name in ("layer_norm", "rms_norm"):
            z = z * weight.detach()
        elif weight is not None:
            z = z * weight.detach().reshape(-1, *(1,) * (x.dim() - 2))
        return self.through(operation, z)


class Softmax(Decomposed):
    r"""Softmax and its logarithm :math:`t = x - \log \sum e^x`.

    :math:`\Delta \log \sum e^x = q \sum_j p_j \Delta x_j`, with the quotients :math:`p` of the exponential and
    :math:`q` of the logarithm; softmax is :math:`e^t`, with one quotient more. (For a softmax at the end of a model the
    paper explains the logits instead, section 3.6.)
    """

    def compare(self, operation: Operation, reference: Operation) -> Tensor:
        """Return the function's value."""
        self.beyond(operation, exact=True)
        sign = -1 if operation.name == "softmin" else 1
        x = operation.inputs[0] * sign
        x0 = reference.inputs[0] * sign
        dim = operation.kwargs.get("dim", operation.args[1] if len(operation.args) > 1 else None)
        if dim is None:  # as torch chooses
            dim = 0 if x.dim() in (0, 1, 3) else 1
        with torch.no_grad():
            now = x.detach()
            top = torch.maximum(now.amax(dim, keepdim=True), x0.amax(dim, keepdim=True))
            e, e0 = (now - top).exp(), (x0 - top).exp()
            s, s0 = e.sum(dim, keepdim=True), e0.sum(dim, keepdim=True)
            shares = slope(torch.exp, now - top, x0 - top, e, e0) * slope(torch.log, s, s0, s.log(), s0.log())
        t = x - (shares * x).sum(dim, keepdim=True)
        if operation.name != "log_softmax":
            log, log0 = now.log_softmax(dim), x0.log_softmax(dim)
            t = t * slope(torch.exp, log, log0, log.exp(), log0.exp())
        return self.through(operation, t)


class GLU(Decomposed):
    r"""Gated linear unit, :math:`a \, \sigma(b)` of the two halves of its input: a product."""

    def compare(self, operation: Operation, reference: Operation) -> Tensor:
        """Return the gated values."""
        self.beyond(operation, exact=True)
        dim = operation.kwargs.get("dim", operation.args[1] if len(operation.args) > 1 else -1)
        (a, b), (a0, b0) = operation.inputs[0].chunk(2, dim), reference.inputs[0].chunk(2, dim)
        with torch.no_grad():
            gate, gate0 = b.sigmoid(), b0.sigmoid()
            opened = slope(torch.sigmoid, b.detach(), b0, gate, gate0) * (a + a0) / 2
        return self.through(operation, a * (gate + gate0) / 2 + opened * b)


def means(operation: Operation, reference: Operation) -> list[Tensor]:
    """Mean of each operand and its reference, held constant."""
    pairs = zip(operation.inputs, reference.inputs, strict=True)
    return [(value.detach() + value0) / 2 for value, value0 in pairs]


_ORDER: dict[str, tuple[str, ...]] = {
    "layer_norm": ("input", "normalized_shape", "weight", "bias", "eps"),
    "rms_norm": ("input", "normalized_shape", "weight", "eps"),
    "group_norm": ("input", "num_groups", "weight", "bias", "eps"),
    "instance_norm": (
        "input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps",
    ),
}  # fmt: skip
_EPS = {"layer_norm": 1e-5, "rms_norm": None, "group_norm": 1e-5, "instance_norm": 1e-5}


def _named(operation: Operation) -> dict[str, Any]:
    """Arguments of a normalization by their names."""
    given = dict(zip(_ORDER[operation.name], operation.args, strict=False))
    return {"eps": _EPS[operation.name], **given, **operation.kwargs}
