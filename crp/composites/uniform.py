"""One rule on every affine layer: "uniform" LRP."""

from __future__ import annotations

from crp.composites.base import Canonizers, FirstMap, LayerMap
from crp.composites.lrp import _Preset, _Rules
from crp.composites.registry import register
from crp.composites.selection import Functions
from crp.rules import lrp as rules
from crp.rules.attention import Attention
from crp.rules.functional import Gates, Normalization
from crp.rules.gamma import Gamma
from crp.rules.lrp import Empty, Names
from crp.rules.stabilizer import Stabilize


class _Uniform(_Preset):
    def __init__(
        self, canonizers: Canonizers, rule: rules.LRPRule, layer_map: LayerMap, first_map: FirstMap, zero_params: Names,
        gates: Gates, attention: Attention,
    ) -> None:  # fmt: skip
        # By LRP-0, batch norm is the same merged and not merged: an affine function, whose shift keeps its share.
        norms = [(Functions(("batch_norm",)), Normalization(zero_params))] if isinstance(rule, rules.Epsilon) else []
        own: _Rules = {"convolution": rule, "dense": rule}
        super().__init__(canonizers, [*layer_map, *norms], first_map, zero_params, gates, attention, own)


@register("lrp_0")
class UniformLRP0(_Uniform):
    r"""LRP-0 everywhere, :math:`R_i = \sum_j \frac{a_i w_{ij}}{z_j} R_j`.

    Bach et al., PLoS ONE 10 (2015), eq. 56. In nets of ReLU without biases this is gradient × input (Ancona et al.,
    ICLR 2018, proposition 1, for ε → 0), and as noisy in deep nets. Conserves relevance up to what biases take.

    Parameters
    ----------
    canonizers : "auto", list of zennit.canonizers.Canonizer, or None
    layer_map : list of (what, rule)
        Rules that come before that of the preset.
    first_map : list of (types, rule)
        Rules for the first layer.
    zero_params : str or sequence of str, optional
        Parameters that count as zero in the rules, such as ``"bias"``.
    gates : "signal" or "split"
        As in `LRP`.
    attention : "constant" or "split"
        As in `LRP`.
    """

    def __init__(
        self,
        canonizers: Canonizers = "auto",
        layer_map: LayerMap = (),
        first_map: FirstMap = (),
        zero_params: Names = None,
        gates: Gates = "signal",
        attention: Attention = "constant",
    ) -> None:
        super().__init__(canonizers, rules.LRP0(zero_params), layer_map, first_map, zero_params, gates, attention)


@register("epsilon")
class UniformEpsilon(_Uniform):
    r"""ε everywhere, :math:`R_i = \sum_j \frac{a_i w_{ij}}{z_j + \varepsilon \operatorname{sign} z_j} R_j`.

    Bach et al. (2015), eq. 58. A larger ε leaves out weak and contradictory contributions. Conserves relevance up to
    what biases and ε take. ε-LRP of DeepExplain stabilizes the input of activations instead (Ancona et al., ICLR 2018).

    Parameters
    ----------
    canonizers : "auto", list of zennit.canonizers.Canonizer, or None
    epsilon : float or callable
    norm_scale : bool
        Whether ε is relative to the root mean square of each sample's output.
    layer_map, first_map, zero_params, gates, attention
        As in `UniformLRP0`.
    """

    def __init__(
        self,
        canonizers: Canonizers = "auto",
        epsilon: Stabilize = 1e-6,
        norm_scale: bool = False,
        layer_map: LayerMap = (),
        first_map: FirstMap = (),
        zero_params: Names = None,
        gates: Gates = "signal",
        attention: Attention = "constant",
    ) -> None:
        rule = rules.Epsilon(epsilon, zero_params, norm_scale=norm_scale)
        super().__init__(canonizers, rule, layer_map, first_map, zero_params, gates, attention)


@register("gamma")
class UniformGamma(_Uniform):
    """γ everywhere: contributions of an output's own sign count 1 + γ times.

    Montavon et al. (2019), table 10.1, generalised to any sign (Andéol et al., 2021). Between LRP-0 (γ = 0) and z⁺.
    Conserves relevance up to what biases take.

    Parameters
    ----------
    canonizers : "auto", list of zennit.canonizers.Canonizer, or None
    gamma : float
    stabilizer : float or callable
    layer_map, first_map, zero_params, gates, attention
        As in `UniformLRP0`.
    """

    def __init__(
        self,
        canonizers: Canonizers = "auto",
        gamma: float = 0.25,
        stabilizer: Stabilize = 1e-6,
        layer_map: LayerMap = (),
        first_map: FirstMap = (),
        zero_params: Names = None,
        gates: Gates = "signal",
        attention: Attention = "constant",
    ) -> None:
        rule = Gamma(gamma, stabilizer, zero_params)
        super().__init__(canonizers, rule, layer_map, first_map, zero_params, gates, attention)


@register("zplus")
class UniformZPlus(_Uniform):
    """z⁺ everywhere: positive contributions only.

    Montavon et al., Pattern Recognition 65 (2017), eq. 17. Relevance keeps the sign of the output; classes look alike.

    Parameters
    ----------
    canonizers : "auto", list of zennit.canonizers.Canonizer, or None
    stabilizer : float or callable
    layer_map, first_map, zero_params, gates, attention
        As in `UniformLRP0`.
    empty : "drop" or "epsilon"
        What becomes of relevance at outputs without a positive part; see `crp.rules.ZPlus`.
    """

    def __init__(
        self,
        canonizers: Canonizers = "auto",
        stabilizer: Stabilize = 1e-6,
        layer_map: LayerMap = (),
        first_map: FirstMap = (),
        zero_params: Names = None,
        empty: Empty = "drop",
        gates: Gates = "signal",
        attention: Attention = "constant",
    ) -> None:
        rule = rules.ZPlus(stabilizer, zero_params, empty=empty)
        super().__init__(canonizers, rule, layer_map, first_map, zero_params, gates, attention)


@register("alpha_beta")
class UniformAlphaBeta(_Uniform):
    """αβ everywhere: α times the positive less β times the negative contributions, α − β = 1.

    Bach et al. (2015), eq. 60. Conserves relevance up to what biases and empty parts take.

    Parameters
    ----------
    canonizers : "auto", list of zennit.canonizers.Canonizer, or None
    alpha, beta : float
    stabilizer : float or callable
    layer_map, first_map, zero_params, gates, attention
        As in `UniformLRP0`.
    empty : "drop" or "epsilon"
        As in `UniformZPlus`.
    """

    def __init__(
        self,
        canonizers: Canonizers = "auto",
        alpha: float = 2.0,
        beta: float = 1.0,
        stabilizer: Stabilize = 1e-6,
        layer_map: LayerMap = (),
        first_map: FirstMap = (),
        zero_params: Names = None,
        empty: Empty = "drop",
        gates: Gates = "signal",
        attention: Attention = "constant",
    ) -> None:
        rule = rules.AlphaBeta(alpha, beta, stabilizer, zero_params, empty=empty)
        super().__init__(canonizers, rule, layer_map, first_map, zero_params, gates, attention)
