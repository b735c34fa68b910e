"""Presets of layer-wise relevance propagation.

They differ in the rule for convolutions and in that for the first layer; dense layers always get ε. ε on dense and z⁺
or αβ on convolutional layers is the "composite" strategy of Kohlbrenner et al., "Towards best practice in explaining
neural network decisions with LRP" (IJCNN 2020); ε, γ and zᴮ by depth is Montavon et al., "Layer-wise relevance
propagation: an overview" (2019), section 10.3; the flat first layer is Lapuschkin et al., Nature Communications 10
(2019).
"""

from __future__ import annotations

from torch import nn
from zennit.types import Convolution, Linear

from crp.composites.base import Canonizers, Composite, FirstMap, LayerMap, NameMap
from crp.composites.registry import register
from crp.composites.selection import Functions
from crp.rules import AlphaBeta, Epsilon, Flat, Gamma, Pass, Rule, ZBox, ZPlus
from crp.rules.first import Bound
from crp.rules.functional import (
    ATTENTION,
    CHOOSING,
    ELEMENTWISE,
    GLU,
    HOMOGENEOUS,
    PRODUCTS,
    SQUASHING,
    STEPS,
    Gate,
    Gates,
    Normalization,
    Proportional,
    Quotient,
    Refused,
    Squash,
)
from crp.rules.lrp import Empty, Names
from crp.rules.stabilizer import Stabilize


def base(gates: Gates = "signal", zero_params: Names = None, method: str = "LRP") -> LayerMap:
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
        (Functions(ELEMENTWISE), Pass()),
        (Functions(SQUASHING), Squash()),
        (Functions(("mul", "multiply")), Gate(gates)),
        (Functions(("div", "divide", "true_divide")), Quotient()),
        (Functions(("layer_norm", "group_norm", "instance_norm", "rms_norm")), Normalization(zero_params)),
        (Functions(("glu",)), GLU(gates)),
        (Functions((*CHOOSING, "std")), Proportional()),
        (Functions((*ATTENTION, *PRODUCTS)), refused),
    ]


def by_type(convolution: Rule, epsilon: Stabilize, zero_params: Names) -> LayerMap:
    """One rule for convolutions, ε for dense layers."""
    return [(Convolution, convolution), (nn.Linear, Epsilon(epsilon, zero_params))]


class LRP(Composite):
    """Layer-wise relevance propagation by rules of your own; all LRP presets are one of these.

    What is no affine layer gets the rules of `base`. An operation without a rule that is not right by the ordinary
    chain rule is named in a warning, and attention is refused.

    Parameters
    ----------
    canonizers : "auto", list of zennit.canonizers.Canonizer, or None
    layer_map : list of (what, rule)
        Rules as in `Composite`; the first match wins.
    first_map : list of (types, rule)
        Rules for the model's first layer of any of these types.
    name_map : list of (names, rule)
        Rules by layer names or patterns; these come first.
    gates : "signal" or "split"
        Whether a product's gate, as in squeeze-and-excitation, is held constant, or takes half of the relevance.
    zero_params : str or sequence of str, optional
        ``"bias"`` gives the share of the biases of normalizations to their inputs.
    """

    right = HOMOGENEOUS | STEPS

    def __init__(
        self,
        canonizers: Canonizers = "auto",
        *,
        layer_map: LayerMap = (),
        first_map: FirstMap = (),
        name_map: NameMap = (),
        gates: Gates = "signal",
        zero_params: Names = None,
    ) -> None:
        others = base(gates, zero_params, type(self).__name__)
        super().__init__(canonizers, layer_map=[*layer_map, *others], first_map=first_map, name_map=name_map)


@register("epsilon_plus")
class EpsilonPlus(LRP):
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
    layer_map : list of (what, rule)
        Rules that come before those of the preset.
    empty : "drop" or "epsilon"
        What becomes of relevance at outputs without a positive part; see `crp.rules.ZPlus`.
    gates : "signal" or "split"
        As in `LRP`.
    """

    def __init__(
        self,
        canonizers: Canonizers = "auto",
        epsilon: Stabilize = 1e-6,
        stabilizer: Stabilize = 1e-6,
        layer_map: LayerMap = (),
        zero_params: Names = None,
        empty: Empty = "drop",
        gates: Gates = "signal",
    ) -> None:
        rules = by_type(ZPlus(stabilizer, zero_params, empty=empty), epsilon, zero_params)
        super().__init__(canonizers, layer_map=[*layer_map, *rules], gates=gates, zero_params=zero_params)


@register("epsilon_plus_flat")
class EpsilonPlusFlat(LRP):
    """z⁺ on convolutions, ε on dense layers, flat on the first.

    Parameters
    ----------
    canonizers : "auto", list of zennit.canonizers.Canonizer, or None
    epsilon, stabilizer, layer_map, zero_params, empty, gates
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
        empty: Empty = "drop",
        gates: Gates = "signal",
    ) -> None:
        first = [*first_map, (Linear, Flat(stabilizer))]
        rules = by_type(ZPlus(stabilizer, zero_params, empty=empty), epsilon, zero_params)
        super().__init__(
            canonizers, layer_map=[*layer_map, *rules], first_map=first, gates=gates, zero_params=zero_params
        )


@register("epsilon_alpha2_beta1")
class EpsilonAlpha2Beta1(LRP):
    """αβ with α = 2 and β = 1 on convolutions, ε on dense layers.

    Parameters
    ----------
    canonizers : "auto", list of zennit.canonizers.Canonizer, or None
    epsilon, stabilizer, layer_map, zero_params, empty, gates
        As in `EpsilonPlus`.
    """

    def __init__(
        self,
        canonizers: Canonizers = "auto",
        epsilon: Stabilize = 1e-6,
        stabilizer: Stabilize = 1e-6,
        layer_map: LayerMap = (),
        zero_params: Names = None,
        empty: Empty = "drop",
        gates: Gates = "signal",
    ) -> None:
        rules = by_type(AlphaBeta(2.0, 1.0, stabilizer, zero_params, empty=empty), epsilon, zero_params)
        super().__init__(canonizers, layer_map=[*layer_map, *rules], gates=gates, zero_params=zero_params)


@register("epsilon_alpha2_beta1_flat")
class EpsilonAlpha2Beta1Flat(LRP):
    """αβ with α = 2 and β = 1 on convolutions, ε on dense layers, flat on the first.

    Parameters
    ----------
    canonizers : "auto", list of zennit.canonizers.Canonizer, or None
    epsilon, stabilizer, layer_map, first_map, zero_params, empty, gates
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
        empty: Empty = "drop",
        gates: Gates = "signal",
    ) -> None:
        first = [*first_map, (Linear, Flat(stabilizer))]
        rules = by_type(AlphaBeta(2.0, 1.0, stabilizer, zero_params, empty=empty), epsilon, zero_params)
        super().__init__(
            canonizers, layer_map=[*layer_map, *rules], first_map=first, gates=gates, zero_params=zero_params
        )


@register("epsilon_gamma_box")
class EpsilonGammaBox(LRP):
    """γ on convolutions, ε on dense layers, zᴮ on the first convolution.

    Parameters
    ----------
    canonizers : "auto", list of zennit.canonizers.Canonizer, or None
    low, high : float, Tensor or nested list
        Smallest and largest value that the input can have, after preprocessing; tensors broadcast, such as (1, 3, 1,
        1).
    gamma : float
        γ of the convolutions.
    epsilon, stabilizer, layer_map, first_map, zero_params, gates
        As in `EpsilonPlusFlat`.
    """

    def __init__(
        self,
        canonizers: Canonizers = "auto",
        *,
        low: Bound,
        high: Bound,
        epsilon: Stabilize = 1e-6,
        gamma: float = 0.25,
        stabilizer: Stabilize = 1e-6,
        layer_map: LayerMap = (),
        first_map: FirstMap = (),
        zero_params: Names = None,
        gates: Gates = "signal",
    ) -> None:
        first = [*first_map, (Convolution, ZBox(low, high, stabilizer, zero_params))]
        rules = by_type(Gamma(gamma, stabilizer, zero_params), epsilon, zero_params)
        super().__init__(
            canonizers, layer_map=[*layer_map, *rules], first_map=first, gates=gates, zero_params=zero_params
        )
