r"""The rules of layer-wise relevance propagation, for affine layers.

Notation: input :math:`a`, weight :math:`w`, bias :math:`b`, :math:`z_j = \sum_i a_i w_{ij} + b_j`; :math:`(\cdot)^+`
and :math:`(\cdot)^-` are positive and negative parts. The overview of all of them is Montavon, Binder, Lapuschkin,
Samek and Müller, "Layer-wise relevance propagation: an overview", in *Explainable AI* (2019), table 10.1; each rule
names the paper it comes from. They treat Linear, Conv1-3d and ConvTranspose1-3d with any stride, groups, dilation and
padding; a pixel that padding repeats is an input of its own for each time it is read.

The bias takes its share of the relevance and keeps it; ``zero_params="bias"`` gives that share to the inputs. A rule
is said to conserve relevance where this is so without bias and for :math:`\varepsilon \to 0`: then
:math:`\sum_i R_i = \sum_j R_j`. Denominators are stabilized, :math:`z + \varepsilon \operatorname{sign} z`, with
``norm_scale=True`` by :math:`\varepsilon` times the root mean square of each sample's :math:`z`, so that
:math:`\varepsilon` means the same at every layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor

from crp.checks import check_choice, check_number
from crp.errors import InputError
from crp.rules.base import Rule, _is_exact
from crp.rules.layer import Layer, Modifier, negative, positive
from crp.rules.stabilizer import Stabilize, stabilizing
from crp.rules.terms import Term

Names = str | Sequence[str] | None
Empty = Literal["drop", "epsilon"]


class LRPRule(Rule):
    """Base of the rules of this family.

    Parameters
    ----------
    stabilizer : float or callable
        ε of the denominators; or a function of the denominator.
    zero_params : str or sequence of str, optional
        Parameters that count as zero in the rule: ``"bias"``, ``"weight"``.
    norm_scale : bool
        Whether ε is relative to the root mean square of each sample's denominators.

    Raises
    ------
    ValueError
        If ε is negative or not finite, or ``zero_params`` names something else.
    """

    needs_weight: ClassVar[bool] = True
    settings: ClassVar[tuple[str, ...]] = ("stabilizer", "zero_params", "norm_scale")

    def __init__(self, stabilizer: Stabilize = 1e-6, zero_params: Names = None, *, norm_scale: bool = False) -> None:
        super().__init__(stabilizing(stabilizer, norm_scale), zero_params)
        self.stabilizer, self.norm_scale = stabilizer, norm_scale

    @cached_property
    def _stabilize(self) -> Callable[[Tensor], Tensor]:
        return stabilizing(self.stabilizer, self.norm_scale)


class Epsilon(LRPRule):
    r"""ε rule, :math:`R_i = \sum_j \frac{a_i w_{ij}}{z_j + \varepsilon \operatorname{sign} z_j} R_j`.

    Bach et al., PLoS ONE 10 (2015), eq. 58. For dense layers and, with a larger ε, wherever the explanation is noisy:
    ε takes most from outputs whose contributions are weak or contradictory. Conserves relevance up to what bias and ε
    take. With ε > 0 an output of exactly 0 hands nothing on. Any operation of one input may have this rule.

    Parameters
    ----------
    epsilon : float or callable
        0 is LRP-0.
    zero_params : str or sequence of str, optional
    norm_scale : bool
        Whether ε is relative, that is ε times the root mean square of the sample's :math:`z`.

    Raises
    ------
    ValueError
        If ε is negative or not finite.
    """

    needs_weight = False
    settings: ClassVar[tuple[str, ...]] = ("epsilon", "zero_params", "norm_scale")

    def __init__(self, epsilon: Stabilize = 1e-6, zero_params: Names = None, *, norm_scale: bool = False) -> None:
        stabilizing(epsilon, norm_scale, "epsilon")
        super().__init__(epsilon, zero_params, norm_scale=norm_scale)
        self.epsilon = epsilon

    @cached_property
    def _stabilize(self) -> Callable[[Tensor], Tensor]:
        return stabilizing(self.epsilon, self.norm_scale, "epsilon")

    def propagate(self, layer: Layer, a: Tensor, y: Tensor) -> Tensor:
        """Output of an operation, with this rule as its gradient: for ε = 0 the ordinary chain rule."""
        return layer.output if _is_exact(self) else super().propagate(layer, a, y)

    def surrogate(self, layer: Layer, a: Tensor) -> Tensor:
        """Return the layer itself."""
        return _itself(self, layer, a)


class LRP0(Epsilon):
    r"""LRP-0, :math:`R_i = \sum_j \frac{a_i w_{ij}}{z_j} R_j`: in multipliers, the ordinary chain rule.

    Bach et al. (2015), eq. 56. In ReLU nets the same as gradient × input; the point of reference for other rules.
    Conserves relevance up to what the bias takes.

    Parameters
    ----------
    zero_params : str or sequence of str, optional
    """

    settings: ClassVar[tuple[str, ...]] = ("zero_params",)

    def __init__(self, zero_params: Names = None) -> None:
        super().__init__(0.0, zero_params)


class Norm(Epsilon):
    """ε rule for layers without parameters, such as average pooling: in proportion to the contribution.

    In multiplier encoding this is what the ordinary chain rule does, up to the stabilizer. Conserves relevance.

    Parameters
    ----------
    stabilizer : float or callable
    norm_scale : bool
    """

    settings: ClassVar[tuple[str, ...]] = ("stabilizer", "norm_scale")

    def __init__(self, stabilizer: Stabilize = 1e-6, *, norm_scale: bool = False) -> None:
        stabilizing(stabilizer, norm_scale)
        super().__init__(stabilizer, norm_scale=norm_scale)


class ZPlus(LRPRule):
    r"""z⁺ rule, :math:`R_i = \sum_j \frac{p_{ij}}{\sum_{i'} p_{i'j} + b_j^+} R_j`.

    With the positive contributions :math:`p_{ij} = a_i^+ w_{ij}^+ + a_i^- w_{ij}^-`. Montavon et al., Pattern
    Recognition 65 (2017), eq. 17, extended to inputs of any sign and to biases; the same as αβ with α = 1, β = 0. For
    convolutions, where it gives smooth explanations without negative relevance.

    Conserves relevance wherever there is a positive contribution. An output with none, positive through its bias
    alone, hands nothing on; nets with depthwise convolutions may lose nearly everything so. ``empty="epsilon"`` lets
    these outputs share by the ε rule instead:

    .. math:: R_i = \sum_{j:\, p_j > 0} \frac{p_{ij}}{p_j + b_j^+} R_j + \sum_{j:\, p_j = 0} \frac{a_i w_{ij}}{z_j} R_j,
        \qquad p_j = \sum_i p_{ij}

    Captum's version looks at the signs of the weights only and leaves the bias as it is; it agrees for non-negative
    inputs and no bias. The z⁺ rule of deep Taylor decomposition has no bias: ``zero_params="bias"``.

    Parameters
    ----------
    stabilizer : float or callable
    zero_params : str or sequence of str, optional
    empty : "drop" or "epsilon"
        What an output without positive contributions does with its relevance.
    norm_scale : bool

    Raises
    ------
    ValueError
        If the stabilizer is negative or not finite, or ``empty`` is something else.
    """

    settings: ClassVar[tuple[str, ...]] = ("stabilizer", "zero_params", "empty", "norm_scale")

    def __init__(
        self,
        stabilizer: Stabilize = 1e-6,
        zero_params: Names = None,
        *,
        empty: Empty = "drop",
        norm_scale: bool = False,
    ) -> None:
        super().__init__(stabilizer, zero_params, norm_scale=norm_scale)
        check_choice("empty", empty, Empty)
        self.empty = empty

    def surrogate(self, layer: Layer, a: Tensor) -> Tensor:
        """Return the layer's positive contributions."""
        return _contributions(layer, a, positive, negative)

    def terms(self, layer: Layer, a: Tensor, y: Tensor) -> Sequence[Term]:
        """Positive contributions, and the layer itself where there are none, if asked for."""
        z, added = _contributions_apart(layer, a, positive, negative)
        terms = [Term(z, sign=1, added=added)]
        if self.empty == "drop":
            return terms
        return _or_itself(terms, _is_empty(layer, a, positive, negative), _itself(self, layer, a))


class AlphaBeta(LRPRule):
    r"""αβ rule: α times the positive minus β times the negative contributions, each in proportion.

    .. math:: R_i = \sum_j \left( \alpha \frac{p_{ij}}{\sum_{i'} p_{i'j} + b_j^+}
        - \beta \frac{n_{ij}}{\sum_{i'} n_{i'j} + b_j^-} \right) R_j

    With :math:`p_{ij} = a_i^+ w_{ij}^+ + a_i^- w_{ij}^-` and :math:`n_{ij} = a_i^+ w_{ij}^- + a_i^- w_{ij}^+`. Bach et
    al. (2015), eq. 60. For convolutions, where β says how much of the contradicting evidence is shown.

    Conserves relevance, as α − β = 1, wherever there are contributions of both signs. A part that is empty hands
    nothing on: an output with positive contributions only gives α times its relevance, one with negative only −β
    times. ``empty="epsilon"`` lets the outputs of which a part is empty (the negative one counts if β > 0) share by
    the ε rule instead, :math:`\sum_j \frac{a_i w_{ij}}{z_j} R_j`.

    Zennit compares α − β with 1 exactly, and so refuses 1.4 and 0.4. Captum looks at the signs of the weights only and
    leaves the bias as it is.

    Parameters
    ----------
    alpha, beta : float
        Not negative, and α − β = 1.
    stabilizer : float or callable
    zero_params : str or sequence of str, optional
    empty : "drop" or "epsilon"
        What an output does with its relevance if the positive or the negative part is empty.
    norm_scale : bool

    Raises
    ------
    ValueError
        If α or β is negative, α − β is not 1 (up to rounding), the stabilizer is negative or not finite, or ``empty``
        is something else.
    """

    settings: ClassVar[tuple[str, ...]] = ("alpha", "beta", "stabilizer", "zero_params", "empty", "norm_scale")

    def __init__(
        self,
        alpha: float = 2.0,
        beta: float = 1.0,
        stabilizer: Stabilize = 1e-6,
        zero_params: Names = None,
        *,
        empty: Empty = "drop",
        norm_scale: bool = False,
    ) -> None:
        super().__init__(stabilizer, zero_params, norm_scale=norm_scale)
        check_number("alpha", alpha)
        check_number("beta", beta)
        if alpha < 0 or beta < 0 or not math.isclose(alpha - beta, 1.0, abs_tol=1e-9):
            raise InputError(f"alpha and beta must not be negative, and alpha - beta must be 1; got {alpha} and {beta}")
        self.alpha, self.beta = alpha, beta
        check_choice("empty", empty, Empty)
        self.empty = empty
        # Positive and negative contributions are all there are.
        self.adds_up = beta > 0 and self.empty == "drop" and not self.zero_params

    def terms(self, layer: Layer, a: Tensor, y: Tensor) -> Sequence[Term]:
        """Positive and negative contributions, and the layer itself where a part is empty, if asked for."""
        parts = [(self.alpha, positive, negative), (-self.beta, negative, positive)][: 2 if self.beta else 1]
        terms = []
        for weight, up, down in parts:
            z, added = _contributions_apart(layer, a, up, down)
            terms.append(Term(z, weight, sign=1 if weight > 0 else -1, added=added))
        if self.empty == "drop":
            return terms
        empty = [_is_empty(layer, a, up, down) for _, up, down in parts]
        return _or_itself(terms, torch.stack(empty).any(0), _itself(self, layer, a))


def _itself(rule: Rule, layer: Layer, a: Tensor) -> Tensor:
    """Layer as it is; in multipliers the output of this forward call serves."""
    return cast(Tensor, layer.itself(a) if rule.multiplier else layer(a))


def _contributions(layer: Layer, a: Tensor, up: Modifier, down: Modifier, bias: bool = True) -> Tensor:
    """Output from positive inputs with weights ``up`` and negative inputs with weights ``down``; bias as ``up``."""
    above, below = layer.split_by_sign(a)
    z = layer(above, up, bias)
    return z if below is None else z + layer(below, down, bias=False)


def _contributions_apart(layer: Layer, a: Tensor, up: Modifier, down: Modifier) -> tuple[Tensor, Tensor | None]:
    """The same, and what of the bias is not in it."""
    above, below = layer.split_by_sign(a)
    z, added = layer.apart(above, up)
    return (z if below is None else z + layer(below, down, bias=False)), added


def _is_empty(layer: Layer, a: Tensor, up: Modifier, down: Modifier) -> Tensor:
    """Where an output has no contributions of this sign."""
    with torch.no_grad():
        return _contributions(layer, a, up, down, bias=False) == 0


def _or_itself(terms: Sequence[Term], empty: Tensor, itself: Tensor) -> list[Term]:
    """Terms where they are not ``empty``, and the layer itself where they are."""
    rest, others = empty.to(itself), (~empty).to(itself)
    return [*(term._replace(weight=term.weight * others) for term in terms), Term(itself, rest)]
