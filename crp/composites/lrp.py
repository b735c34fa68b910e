"""Presets of layer-wise relevance propagation.

They differ in the rule for convolutions and in that for the first layer; dense layers always get ε. ε on dense and z⁺
or αβ on convolutional layers is the "composite" strategy of Kohlbrenner et al., "Towards best practice in explaining
neural network decisions with LRP" (IJCNN 2020); ε, γ and zᴮ by depth is Montavon et al., "Layer-wise relevance
propagation: an overview" (2019), section 10.3; the flat first layer is Lapuschkin et al., Nature Communications 10
(2019).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from zennit.types import BatchNorm, Convolution, Linear

from crp.composites.base import Canonizers, Composite, FirstMap, LayerMap
from crp.composites.registry import register
from crp.composites.selection import Functions
from crp.rules import AlphaBeta, Epsilon, Flat, Gamma, Pass, Rule, ZBox, ZPlus
from crp.rules.functional import (
    ATTENTION,
    ELEMENTWISE,
    GLU,
    HOMOGENEOUS,
    PRODUCTS,
    SQUASHING,
    STEPS,
    Gate,
    Normalization,
    Quotient,
    Refused,
    Squash,
)
from crp.rules.lrp import Names
from crp.rules.stabilizer import Stabilize


def base(gates: Literal["signal", "split"] = "signal", zero_params: Names = None, method: str = "LRP") -> LayerMap:
    """Rules of all LRP presets for what is no affine layer; put those of affine layers before or after them.

    ReLU, max and average pooling, addition, concatenation and the like are right by the ordinary chain rule. Other
    activations pass relevance on, normalizations hold their variance constant, gates are held constant or split, and
    attention is refused.

    Parameters
    ----------
    gates : "signal" or "split"
        See `crp.rules.functional.Gate`.
    zero_params : str or sequence of str, optional
        ``"bias"`` gives the share of the biases of normalizations to their inputs.
    method : str
        Name for messages.
    """
    refused = Refused(method)
    return [
        (nn.MultiheadAttention, refused),
        (BatchNorm, Pass()),
        (Functions(ELEMENTWISE), Pass()),
        (Functions(SQUASHING), Squash()),
        (Functions(("mul", "multiply")), Gate(gates)),
        (Functions(("div", "divide", "true_divide")), Quotient()),
        (Functions(("layer_norm", "group_norm", "instance_norm", "rms_norm")), Normalization(zero_params)),
        (Functions(("glu",)), GLU()),
        (Functions((*ATTENTION, *PRODUCTS)), refused),
    ]


class _ByType(Composite):
    """One rule for convolutions, ε for dense layers, perhaps another for the first layer."""

    right = HOMOGENEOUS | STEPS

    def __init__(
        self,
        canonizers: Canonizers,
        convolution: Rule,
        epsilon: Stabilize,
        zero_params: Names,
        layer_map: LayerMap,
        first: FirstMap = (),
    ) -> None:
        rules = [(Convolution, convolution), (nn.Linear, Epsilon(epsilon, zero_params))]
        others = base(zero_params=zero_params, method=type(self).__name__)
        super().__init__(canonizers, layer_map=[*layer_map, *rules, *others], first_map=first)


@register("epsilon_plus")
class EpsilonPlus(_ByType):
    """z⁺ on convolutions, ε on dense layers.

    Parameters
    ----------
    canonizers : "auto", list of zennit.canonizers.Canonizer, or None
    epsilon : float or callable
        ε of the dense layers.
    stabilizer : float or callable
        Stabilizer of the other rules.
    zero_params : str or sequence of str, optional
        Parameters that count as zero in the rules, such as ``"bias"``.
    layer_map : list of (types, rule)
        Rules by type that come before those of the preset.
    """

    def __init__(
        self,
        canonizers: Canonizers = "auto",
        epsilon: Stabilize = 1e-6,
        stabilizer: Stabilize = 1e-6,
        layer_map: LayerMap = (),
        zero_params: Names = None,
    ) -> None:
        super().__init__(canonizers, ZPlus(stabilizer, zero_params), epsilon, zero_params, layer_map)


@register("epsilon_plus_flat")
class EpsilonPlusFlat(_ByType):
    """z⁺ on convolutions, ε on dense layers, flat on the first.

    Parameters
    ----------
    canonizers : "auto", list of zennit.canonizers.Canonizer, or None
    epsilon, stabilizer, layer_map, zero_params
        As in `EpsilonPlus`.
    first_map : list of (types, rule)
        Rules for the first layer that come before flat.
    """

    def __init__(
        self,
        canonizers: Canonizers = "auto",
        epsilon: Stabilize = 1e-6,
        stabilizer: Stabilize = 1e-6,
        layer_map: LayerMap = (),
        first_map: FirstMap = (),
        zero_params: Names = None,
    ) -> None:
        first = [*first_map, (Linear, Flat(stabilizer))]
        super().__init__(canonizers, ZPlus(stabilizer, zero_params), epsilon, zero_params, layer_map, first)


@register("epsilon_alpha2_beta1")
class EpsilonAlpha2Beta1(_ByType):
    """αβ with α = 2 and β = 1 on convolutions, ε on dense layers.

    Parameters
    ----------
    canonizers : "auto", list of zennit.canonizers.Canonizer, or None
    epsilon, stabilizer, layer_map, zero_params
        As in `EpsilonPlus`.
    """

    def __init__(
        self,
        canonizers: Canonizers = "auto",
        epsilon: Stabilize = 1e-6,
        stabilizer: Stabilize = 1e-6,
        layer_map: LayerMap = (),
        zero_params: Names = None,
    ) -> None:
        rule = AlphaBeta(2.0, 1.0, stabilizer, zero_params)
        super().__init__(canonizers, rule, epsilon, zero_params, layer_map)


@register("epsilon_alpha2_beta1_flat")
class EpsilonAlpha2Beta1Flat(_ByType):
    """αβ with α = 2 and β = 1 on convolutions, ε on dense layers, flat on the first.

    Parameters
    ----------
    canonizers : "auto", list of zennit.canonizers.Canonizer, or None
    epsilon, stabilizer, layer_map, first_map, zero_params
        As in `EpsilonPlusFlat`.
    """

    def __init__(
        self,
        canonizers: Canonizers = "auto",
        epsilon: Stabilize = 1e-6,
        stabilizer: Stabilize = 1e-6,
        layer_map: LayerMap = (),
        first_map: FirstMap = (),
        zero_params: Names = None,
    ) -> None:
        rule = AlphaBeta(2.0, 1.0, stabilizer, zero_params)
        first = [*first_map, (Linear, Flat(stabilizer))]
        super().__init__(canonizers, rule, epsilon, zero_params, layer_map, first)


@register("epsilon_gamma_box")
class EpsilonGammaBox(_ByType):
    """γ on convolutions, ε on dense layers, zᴮ on the first convolution.

    Parameters
    ----------
    canonizers : "auto", list of zennit.canonizers.Canonizer, or None
    low, high : float, Tensor or nested list
        Smallest and largest value that the input can have, after preprocessing; tensors broadcast, such as (1, 3, 1,
        1).
    gamma : float
        γ of the convolutions.
    epsilon, stabilizer, layer_map, first_map, zero_params
        As in `EpsilonPlusFlat`.
    """

    def __init__(
        self,
        canonizers: Canonizers = "auto",
        *,
        low: float | Tensor | Sequence[object],
        high: float | Tensor | Sequence[object],
        epsilon: Stabilize = 1e-6,
        gamma: float = 0.25,
        stabilizer: Stabilize = 1e-6,
        layer_map: LayerMap = (),
        first_map: FirstMap = (),
        zero_params: Names = None,
    ) -> None:
        low, high = (torch.tensor(b) if isinstance(b, Sequence) else b for b in (low, high))
        rule = Gamma(gamma, stabilizer, zero_params)
        first = [*first_map, (Convolution, ZBox(low, high, stabilizer, zero_params))]
        super().__init__(canonizers, rule, epsilon, zero_params, layer_map, first)
