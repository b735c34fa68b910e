"""The γ rule, and its shorter form for a layer that a ReLU follows."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from crp.checks import check_number
from crp.rules.fused import fused_gamma_scales
from crp.rules.layer import Layer, _Boosted, negative, positive
from crp.rules.lrp import LRPRule, Names, _contributions, _contributions_apart, _itself
from crp.rules.redirect import SecondOrder
from crp.rules.stabilizer import Absolute, Stabilize, quotient
from crp.rules.terms import Term


class Gamma(LRPRule):
    r"""γ rule: contributions of the output's own sign count 1 + γ times.

    .. math:: R_i = \sum_{j:\, z_j > 0} \frac{a_i w_{ij} + \gamma p_{ij}}{z_j + \gamma p_j} R_j
        + \sum_{j:\, z_j < 0} \frac{a_i w_{ij} + \gamma n_{ij}}{z_j + \gamma n_j} R_j

    With :math:`p_{ij} = a_i^+ w_{ij}^+ + a_i^- w_{ij}^-`, :math:`n_{ij} = a_i^+ w_{ij}^- + a_i^- w_{ij}^+` and
    :math:`p_j = \sum_i p_{ij} + b_j^+`, :math:`n_j = \sum_i n_{ij} + b_j^-`. For non-negative inputs and positive
    outputs these are the weights :math:`w + \gamma w^+` of Montavon et al. (2019), table 10.1; the generalisation to
    any sign is Andéol et al., "Learning domain invariant representations by joint Wasserstein distance minimization"
    (2021). For convolutions; γ moves between LRP-0 and z⁺. Conserves relevance. Outputs of exactly 0 hand nothing on.

    The sign is that of the output with its bias, also where ``zero_params`` names it, as in zennit. Captum's γ rule is
    the one for positive outputs, and differs where outputs are negative.

    Parameters
    ----------
    gamma : float
        0 is LRP-0; large values approach z⁺ where outputs are positive.
    stabilizer : float or callable
    zero_params : str or sequence of str, optional
    norm_scale : bool

    Raises
    ------
    ValueError
        If ``gamma`` or the stabilizer is negative or not finite.
    """

    settings: ClassVar[tuple[str, ...]] = ("gamma", "stabilizer", "zero_params", "norm_scale")

    def __init__(
        self,
        gamma: float = 0.25,
        stabilizer: Stabilize = 1e-6,
        zero_params: Names = None,
        *,
        norm_scale: bool = False,
    ) -> None:
        super().__init__(stabilizer, zero_params, norm_scale=norm_scale)
        check_number("gamma", gamma, 0)
        self.gamma = gamma

    def terms(self, layer: Layer, a: Tensor, y: Tensor) -> Sequence[Term]:
        """One term for the positive and one for the negative outputs."""
        z, p = _itself(self, layer, a), _contributions(layer, a, positive, negative)
        # The negative contributions are what the positive ones leave of z: where z < 0 nothing cancels.
        return [Term(z + self.gamma * p, outputs=1), Term(z + self.gamma * (z - p), outputs=-1)]

    def propagate(self, layer: Layer, a: Tensor, y: Tensor) -> Tensor:
        """Layer's output, with this rule as its gradient.

        If only a ReLU reads the output, only positive outputs have relevance, and one surrogate with weights
        ``w + γ w⁺`` is enough: the ReLU sends its gradient there (`rectify`). The whole rule, for anything else that
        reads the output, is computed only when a gradient arrives.
        """
        attachment = self.attachment
        # (with zero_params, the surrogate of a positive output may be negative)
        if attachment is None or self._account is not None or layer.weight is None or self.zero_params:
            return super().propagate(layer, a, y)
        waiting = layer.again()
        if attachment.rectified.get(layer.weight):  # type: ignore[no-untyped-call]
            out = cast(Tensor, _Later.apply(y, a, self, waiting))
        elif self._is_joint():
            surrogates, scales = self.joint(layer, a, y)
            out = self.redirect(layer, a, y, surrogates, scales)
        else:
            out = super().propagate(layer, a, y)
        versions = out._version, a._version
        attachment.rectifiable[id(out)] = _Rectifiable(weakref.ref(out), versions, self, waiting, a)
        return out

    def joint(self, layer: Layer, a: Tensor, y: Tensor, live: bool = False) -> tuple[list[Tensor], list[Tensor]]:
        """The two terms as scales of the operation and of its positive contributions, of which both are sums.

        Live scales have a graph, for second derivatives.
        """
        z, (p, added) = _itself(self, layer, a), _contributions_apart(layer, a, positive, negative)
        assert isinstance(self._stabilize, Absolute)
        with torch.set_grad_enabled(live):
            scales = gamma_scales(y, p, added, self.gamma, self._stabilize)
        return [z, p], [scale.to(z.dtype) for scale in scales]

    def _is_joint(self) -> bool:
        """Whether both terms can be scales of two sums; see `joint`."""
        is_usual = self.multiplier and self._account is None and not self.zero_params
        return is_usual and isinstance(self._stabilize, Absolute)

    def _scales_again(self, layer: Layer, a: Tensor) -> list[Tensor]:
        if not self._is_joint():
            return super()._scales_again(layer, a)
        with layer.precision():
            return self.joint(layer, a, layer.value(a), live=torch.is_grad_enabled())[1]

    def rectified(self, layer: Layer, a: Tensor) -> tuple[Tensor, Tensor | None]:
        """Surrogate of the layer for its positive outputs, and what of the bias is not in it."""
        return _contributions_apart(layer, a, _Boosted(self.gamma, positive), _Boosted(self.gamma, negative))


def gamma_scales(
    y: Tensor, p: Tensor, added: Tensor | None, gamma: float, stabilize: Absolute
) -> tuple[Tensor, Tensor]:
    r"""Scales of an operation, and of its positive contributions, under the γ rule.

    With :math:`q = y / (y + \gamma\,p)` where :math:`y > 0` and :math:`q = y / (y + \gamma (y - p))` where
    :math:`y < 0`, they are :math:`q` and :math:`\gamma q` there, and :math:`(1 + \gamma) q` and :math:`-\gamma q`.

    Parameters
    ----------
    y, p : Tensor of shape (batch, *output shape)
        Output, and its positive contributions without what is ``added`` to them.
    added : Tensor or None
    gamma : float
    stabilize : Absolute
    """
    if p.is_cuda and not torch.is_grad_enabled():
        fused = fused_gamma_scales(y, p, added, gamma, stabilize.epsilon)
        if fused is not None:
            return fused
    p = p if added is None else p + added
    share = quotient(y, y + gamma * torch.where(y > 0, p, y - p), stabilize)
    negative = y < 0
    return torch.where(negative, (1 + gamma) * share, share), torch.where(negative, -gamma, gamma) * share


@dataclass
class _Rectifiable:
    """Output of a layer under the γ rule, which a ReLU may read."""

    output: weakref.ref[Tensor]
    versions: tuple[int, int]
    rule: Gamma
    layer: Layer
    a: Tensor

    def rectify(self, x: Tensor, in_place: bool) -> Tensor | None:
        """ReLU of the output, under the γ rule for positive outputs; None if output or input are not what they were."""
        if self.output() is not x:
            return None
        if not self.holds(x) or self.a._version != self.versions[1]:
            self.read()
            return None
        assert self.rule.attachment is not None
        rectified = self.rule.attachment.rectified
        rectified.setdefault(self.layer.weight, True)  # type: ignore[no-untyped-call]
        z, added = self.rule.rectified(self.layer, self.a)
        second = SecondOrder(self.layer, [self.a], self.rule.is_active, self._scales)
        return cast(Tensor, _Rectified.apply(x, z, added, self.rule, second, in_place))

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is the output, as it was."""
        return self.output() is tensor and tensor._version == self.versions[0]

    def read(self) -> None:
        """Note that something else than a ReLU reads the output, so that later calls compute the whole rule at once."""
        assert self.rule.attachment is not None
        self.rule.attachment.rectified[self.layer.weight] = False

    def _scales(self) -> Sequence[Tensor]:
        """Scale of the surrogate, computed once more."""
        with self.layer.precision():
            y, (z, added) = self.layer.value(self.a).relu(), self.rule.rectified(self.layer, self.a)
            return [quotient(y, z, self.rule._stabilize, 1, added)]


class _Rectified(torch.autograd.Function):
    """ReLU of a layer's output; its gradient goes into the layer's surrogate, past the layer's output."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, z: Tensor, added: Tensor | None, rule: Gamma, second: SecondOrder, in_place: bool
    ) -> Tensor:
        y = x.relu_() if in_place else x.relu()
        if in_place:
            ctx.mark_dirty(x)
        ctx.save_for_backward(quotient(y, z, rule._stabilize, 1, added).to(z.dtype))
        ctx.second = second
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (scale,) = ctx.saved_tensors
        if not ctx.second.is_active():
            return grads[0] * (scale > 0), None, None, None, None, None
        if torch.is_grad_enabled():
            (scale,) = ctx.second()
        return None, grads[0] * scale, None, None, None, None


class _Later(torch.autograd.Function):
    """Value of ``y``; the rule is computed only when a gradient arrives."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, a: Tensor, rule: Gamma, layer: Layer) -> Tensor:
        ctx.mark_dirty(y)
        ctx.set_materialize_grads(False)
        ctx.second = SecondOrder(layer, [a], rule.is_active, tuple)
        ctx.a, ctx.layer, ctx.rule = a, layer, rule
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        rule, layer, m = ctx.rule, ctx.layer, grads[0]
        if m is None:  # (all of the gradient went through a ReLU)
            return None, None, None, None
        if not ctx.second.is_active():
            return m, None, None, None
        ctx.second.check_inputs()
        live = torch.is_grad_enabled()
        a = ctx.a if live else ctx.a.detach().requires_grad_()
        with torch.enable_grad(), layer.precision():
            y = layer.value(a)
            if rule._is_joint():
                surrogates, scales = rule.joint(layer, a, y, live)
            else:
                terms = rule.terms(layer, a, y)
                surrogates = [term.z for term in terms]
                scales = [rule._scale(term, y).to(term.z.dtype) for term in terms]
            gradients = torch.autograd.grad(surrogates, a, [m * scale for scale in scales], create_graph=live)
        return None, gradients[0], None, None
