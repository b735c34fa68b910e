r"""What layers keep of the relevance that reaches them.

A rule hands on what the inputs contributed. The rest stays in the layer: the share of the bias, all of the relevance of
an output to which nothing contributed (an *empty* part), and what the stabilizer takes. With :math:`z` the surrogate of
a rule, :math:`z(0)` its value at an input of zero and :math:`s = z + \varepsilon \operatorname{sign} z`,

.. math:: R = \underbrace{\tfrac{z - z(0)}{s} R}_{\text{handed on}} + \underbrace{\tfrac{z(0)}{s} R}_{\text{bias}}
    + \underbrace{\tfrac{s - z}{s} R}_{\text{stabilizer}} \quad (z \ne 0), \qquad R = \text{empty} \quad (z = 0).

Each layer gets an extra input for these shares, a *sink*. They flow into it with the relevance, and so are right for
conditioned relevance, too.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

#: What a layer can keep.
KINDS = ("bias", "empty", "stabilizer")


class Shares(NamedTuple):
    """Share of each output's multiplier that becomes absorbed relevance; tensors of the output's shape, or 0."""

    bias: Tensor | float = 0.0
    empty: Tensor | float = 0.0
    stabilizer: Tensor | float = 0.0


class Account:
    """Collects the sinks of all layers in one forward pass.

    Attributes
    ----------
    sinks : dict of str to list of Tensor of shape (batch, 3)
        Sinks of the calls of each layer; the gradient of one is what this call keeps, by `KINDS`.
    """

    kinds: tuple[str, ...] = KINDS

    def __init__(self) -> None:
        self.sinks: dict[str, list[Tensor]] = {}

    def absorb(self, layer: str, a: Tensor, y: Tensor, shares: Shares) -> Tensor:
        """Layer's output, with an account of what is kept of the relevance that reaches it.

        Parameters
        ----------
        layer : str
        a : Tensor of shape (batch, *input shape)
        y : Tensor of shape (batch, *output shape)
        shares : Shares
        """
        sink = cast(Tensor, _Sink.apply(a, y.detach()))
        self.sinks.setdefault(layer, []).append(sink)
        tensors = [torch.as_tensor(share, dtype=y.dtype, device=y.device) for share in shares]
        return cast(Tensor, _Absorb.apply(y, sink, *(share.detach().expand(y.shape) for share in tensors)))

    def open(self, layer: str, a: Tensor) -> Tensor:
        """Sink of an operation of several inputs, which keeps what arrives and is not handed on; see `Balance`.

        Parameters
        ----------
        layer : str
        a : Tensor
            Any of the inputs.
        """
        kind = torch.promote_types(a.dtype.to_real(), torch.float32)
        sink = cast(Tensor, _Sink.apply(a, a.detach().new_empty(1, dtype=kind)))
        self.sinks.setdefault(layer, []).append(sink)
        return sink


class _Sink(torch.autograd.Function):
    """Zeros, one row per sample (one for a scalar), behind ``a`` in the graph, so that autograd keeps the order."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, y: Tensor) -> Tensor:
        """Return zeros."""
        return torch.zeros(len(y) if y.dim() else 1, len(KINDS), dtype=y.dtype.to_real(), device=y.device)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        """Hand nothing on."""
        return None, None


class _Absorb(torch.autograd.Function):
    """Identity; each sample's share of what arrives goes into the sink as well."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, sink: Tensor, *shares: Tensor) -> Tensor:
        """Return ``y`` itself."""
        ctx.save_for_backward(*shares)
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Sum each share over the sample."""
        (m,) = grads
        rows = len(m) if m.dim() else 1
        of_each = (rows, m.numel() // max(rows, 1))  # (an expert may have no tokens)
        kept = [_relevance(m, share).reshape(of_each).sum(1) for share in ctx.saved_tensors]
        return m, torch.stack(kept, 1), *(None for _ in kept)


def _relevance(m: Tensor, a: Tensor) -> Tensor:
    """Relevance of values for their multipliers, real numbers."""
    # (the gradient of a complex number is that of its parts, each times its own)
    products = (m.conj() * a).real if a.is_complex() else m * a
    # (0 times the minus infinity by which pooling pads would be NaN; where nothing arrives, nothing is kept)
    return torch.where(m == 0, 0.0, products)


class _Balance(torch.autograd.Function):
    """Identity; the relevance that arrives is added to the sink's share of the bias, or (sign -1) taken from it."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, sink: Tensor, sign: int) -> Tensor:
        """Return a copy."""
        ctx.save_for_backward(a.clone() if sign < 0 else a)  # (the model may write over an operand later)
        ctx.sign, ctx.dtype = sign, sink.dtype
        return a.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Sum the relevance up."""
        (m,), (a,) = grads, ctx.saved_tensors
        total = ctx.sign * _relevance(m if a.is_complex() else m.to(ctx.dtype), a).to(ctx.dtype).sum()
        return m, torch.stack([total, *[torch.zeros_like(total)] * (len(KINDS) - 1)])[None], None
