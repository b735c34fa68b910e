r"""The rules of layer-wise relevance propagation, for affine layers.

Notation: input :math:`a`, weight :math:`w`, bias :math:`b`, :math:`z = \sum_i a_i w_i + b`; :math:`(\cdot)^+` and
:math:`(\cdot)^-` are positive and negative parts. The overview of all of them is Montavon, Binder, Lapuschkin, Samek
and Müller, "Layer-wise relevance propagation: an overview", in *Explainable AI* (2019), table 10.1; each rule names
the paper it comes from. The bias takes its share of the relevance and keeps it; ``zero_params="bias"`` gives that
share to the inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from zennit.core import expand

from crp.rules.base import Redirect, Rule, Term
from crp.rules.layer import Boosted, Layer, negative, ones, positive, signs, square

Stabilize = float | Callable[[Tensor], Tensor]
Names = str | Sequence[str] | None


class Epsilon(Rule):
    r"""ε rule, :math:`R_i = \sum_j \frac{a_i w_{ij}}{z_j + \varepsilon \operatorname{sign} z_j} R_j`.

    Bach et al., PLoS ONE 10 (2015), eq. 58. Conserves relevance up to what bias and ε take.

    Parameters
    ----------
    epsilon : float or callable
        Larger values drop weak and contradictory contributions.
    zero_params : str or sequence of str, optional
    """

    settings: ClassVar[tuple[str, ...]] = ("epsilon", "zero_params")

    def __init__(self, epsilon: Stabilize = 1e-6, zero_params: Names = None) -> None:
        super().__init__(epsilon, zero_params)
        self.epsilon = epsilon

    def surrogate(self, layer: Layer, a: Tensor) -> Tensor:
        """Return the layer itself."""
        return layer.itself(a) if self.multiplier else layer(a)


class LRP0(Epsilon):
    r"""LRP-0, :math:`R_i = \sum_j \frac{a_i w_{ij}}{z_j} R_j`; an output of 0 hands nothing on.

    Bach et al. (2015), eq. 56. Conserves relevance up to what the bias takes.

    Parameters
    ----------
    zero_params : str or sequence of str, optional
    """

    settings: ClassVar[tuple[str, ...]] = ("zero_params",)

    def __init__(self, zero_params: Names = None) -> None:
        super().__init__(0.0, zero_params)


class Norm(Epsilon):
    """ε rule for layers without parameters, such as average pooling: in proportion to the contribution.

    In multiplier encoding this is what the ordinary chain rule does, up to the stabilizer.

    Parameters
    ----------
    stabilizer : float or callable
    """

    settings: ClassVar[tuple[str, ...]] = ("stabilizer",)

    def __init__(self, stabilizer: Stabilize = 1e-6) -> None:
        super().__init__(stabilizer)


class Pass(Rule):
    """Identity: an elementwise layer hands relevance on as it is, :math:`R_a = R_y`.

    In multiplier encoding ``m_a = m_y * y / a``; relevance at an input of exactly 0 is not handed on.
    """

    settings: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        # Enough to keep the quotient finite; any more would lose relevance near 0.
        super().__init__(1e-30)

    def propagate(self, layer: Layer, a: Tensor, y: Tensor) -> Tensor:
        """Return the layer's output, whose gradient goes to the input as it is."""
        if a.shape != y.shape:
            raise ValueError(
                f"Pass needs an elementwise layer; {type(layer.module).__name__} maps {tuple(a.shape)} to "
                f"{tuple(y.shape)}"
            )
        return super().propagate(layer, a, y) if self.multiplier else Redirect.apply(y, 1, a, torch.ones_like(y))

    def terms(self, layer: Layer, a: Tensor, y: Tensor) -> Sequence[Term]:
        """One term, the input itself."""
        return [Term(a)]

    def check(self, module: nn.Module) -> None:
        """Accept every module."""


class ZPlus(Rule):
    r"""z⁺ rule, :math:`R_i = \sum_j \frac{a_i^+ w_{ij}^+ + a_i^- w_{ij}^-}{\sum_{i'} (\cdot) + b_j^+} R_j`.

    Montavon et al., Pattern Recognition 65 (2017), eq. 17, extended to inputs of any sign; the same as αβ with α = 1,
    β = 0.

    Parameters
    ----------
    stabilizer : float or callable
    zero_params : str or sequence of str, optional
    """

    def surrogate(self, layer: Layer, a: Tensor) -> Tensor:
        """Return the layer's positive contributions."""
        return _contributions(layer, a, positive, negative)


class AlphaBeta(Rule):
    r"""αβ rule: α times the positive minus β times the negative contributions, each in proportion.

    Bach et al. (2015), eq. 60, with α − β = 1 so that relevance is conserved.

    Parameters
    ----------
    alpha, beta : float
        Not negative, and α − β = 1.
    stabilizer : float or callable
    zero_params : str or sequence of str, optional

    Raises
    ------
    ValueError
        If α or β is negative or α − β is not 1 (up to rounding).
    """

    settings: ClassVar[tuple[str, ...]] = ("alpha", "beta", "stabilizer", "zero_params")

    def __init__(
        self, alpha: float = 2.0, beta: float = 1.0, stabilizer: Stabilize = 1e-6, zero_params: Names = None
    ) -> None:
        super().__init__(stabilizer, zero_params)
        if alpha < 0 or beta < 0 or not math.isclose(alpha - beta, 1.0, abs_tol=1e-9):
            raise ValueError(f"alpha and beta must not be negative, and alpha - beta must be 1; got {alpha} and {beta}")
        self.alpha, self.beta = alpha, beta

    def terms(self, layer: Layer, a: Tensor, y: Tensor) -> Sequence[Term]:
        """Positive and negative contributions."""
        terms = [Term(_contributions(layer, a, positive, negative), self.alpha)]
        if self.beta:
            terms.append(Term(_contributions(layer, a, negative, positive), -self.beta))
        return terms


class Gamma(Rule):
    r"""γ rule: contributions of the output's own sign count 1 + γ times.

    Montavon et al. (2019), table 10.1, generalised to inputs and outputs of any sign (Andéol et al., "Learning domain
    invariant representations by joint Wasserstein distance minimization", 2021): for :math:`z_j > 0` with weights
    :math:`w + \gamma w^+` on positive and :math:`w + \gamma w^-` on negative inputs, for :math:`z_j < 0` the other
    way round.

    Parameters
    ----------
    gamma : float
        0 is LRP-0; large values approach z⁺ where outputs are positive.
    stabilizer : float or callable
    zero_params : str or sequence of str, optional

    Raises
    ------
    ValueError
        If ``gamma`` is negative.
    """

    settings: ClassVar[tuple[str, ...]] = ("gamma", "stabilizer", "zero_params")

    def __init__(self, gamma: float = 0.25, stabilizer: Stabilize = 1e-6, zero_params: Names = None) -> None:
        super().__init__(stabilizer, zero_params)
        if gamma < 0:
            raise ValueError(f"gamma must not be negative, got {gamma}")
        self.gamma = gamma

    def terms(self, layer: Layer, a: Tensor, y: Tensor) -> Sequence[Term]:
        """One term for the positive and one for the negative outputs."""
        up, down = Boosted(self.gamma, positive), Boosted(self.gamma, negative)
        return [
            Term(_contributions(layer, a, up, down), (y > 0).to(y)),
            Term(_contributions(layer, a, down, up), (y < 0).to(y)),
        ]


class WSquare(Rule):
    r"""w² rule, :math:`R_i = \sum_j \frac{w_{ij}^2}{\sum_{i'} w_{i'j}^2 + b_j^2} R_j`, at unbounded inputs.

    Montavon et al. (2017), eq. 12, whose nets have no bias: ``zero_params="bias"`` for these.

    Parameters
    ----------
    stabilizer : float or callable
    zero_params : str or sequence of str, optional
    """

    at_input = True

    def surrogate(self, layer: Layer, a: Tensor) -> Tensor:
        """Return the sum of the squared weights."""
        return layer(a, square)


class Flat(Rule):
    r"""Flat rule, :math:`R_i = \sum_j \frac{1}{\sum_{i'} 1} R_j`: the same for every input in reach.

    Lapuschkin et al., Nature Communications 10 (2019), supplementary note 2.

    Parameters
    ----------
    stabilizer : float or callable
    """

    at_input = True
    settings: ClassVar[tuple[str, ...]] = ("stabilizer",)

    def __init__(self, stabilizer: Stabilize = 1e-6) -> None:
        super().__init__(stabilizer)

    def surrogate(self, layer: Layer, a: Tensor) -> Tensor:
        """Return the number of inputs in reach."""
        return layer(a, ones, bias=False)


class ZBox(Rule):
    r"""zᴮ rule, for inputs between bounds :math:`l` and :math:`h`.

    .. math:: R_i = \sum_j \frac{a_i w_{ij} - l_i w_{ij}^+ - h_i w_{ij}^-}{\sum_{i'} (\cdot)} R_j

    Montavon et al. (2017), eq. 14. Conserves relevance.

    Parameters
    ----------
    low, high : float or Tensor
        Smallest and largest value an input can have; tensors broadcast, such as (1, channels, 1, 1).
    stabilizer : float or callable
    zero_params : str or sequence of str, optional

    Raises
    ------
    ValueError
        If ``low`` is not below ``high`` everywhere.
    """

    at_input = True
    settings: ClassVar[tuple[str, ...]] = ("low", "high", "stabilizer", "zero_params")

    def __init__(
        self, low: float | Tensor, high: float | Tensor, stabilizer: Stabilize = 1e-6, zero_params: Names = None
    ) -> None:
        super().__init__(stabilizer, zero_params)
        if not (torch.as_tensor(low) < torch.as_tensor(high)).all():
            raise ValueError(f"low must be below high everywhere; got low={low} and high={high}")
        self.low, self.high = low, high

    def surrogate(self, layer: Layer, a: Tensor) -> Tensor:
        """Return the contributions beyond those of the bounds."""
        value = layer.input
        assert value is not None
        low, high = (expand(bound, value.shape, cut_batch_dim=True).to(value) for bound in (self.low, self.high))
        return layer(a * value) - layer(a * low, positive) - layer(a * high, negative)


def _contributions(layer: Layer, a: Tensor, up: Callable[[Tensor], Tensor], down: Callable[[Tensor], Tensor]) -> Tensor:
    """Output from positive inputs with weights ``up`` and negative inputs with weights ``down``; bias as ``up``."""
    above, below = signs(a)
    z = layer(above, up)
    return z if below is None else z + layer(below, down, bias=False)
