"""Presets of layer-wise relevance propagation for transformers.

They differ in what becomes of attention and of gates; see `crp.rules.attention` and `crp.rules.functional.Gate`. Every
other preset of LRP takes the same two arguments.
"""

from __future__ import annotations

from crp.composites.base import Canonizers, FirstMap, LayerMap
from crp.composites.lrp import LRP
from crp.composites.registry import register
from crp.rules import Epsilon
from crp.rules.attention import Attention
from crp.rules.functional import Gates
from crp.rules.lrp import Names
from crp.rules.stabilizer import Stabilize


class _ForTransformers(LRP):
    def __init__(
        self,
        canonizers: Canonizers,
        epsilon: Stabilize,
        layer_map: LayerMap,
        first_map: FirstMap,
        zero_params: Names,
        gates: Gates,
        attention: Attention,
    ) -> None:
        rule = Epsilon(epsilon, zero_params)
        super().__init__(
            canonizers,
            layer_map=layer_map,
            first_map=first_map,
            gates=gates,
            attention=attention,
            zero_params=zero_params,
            convolution=rule,
            dense=rule,
        )


@register("attn_lrp")
class AttnLRP(_ForTransformers):
    r"""AttnLRP: queries, keys and values, and both factors of a gate, share relevance; ε on dense layers.

    Achtibat et al., "AttnLRP: attention-aware layer-wise relevance propagation for transformers", ICML 2024. Relevance
    also says why a token was attended to, but how it is split depends on how the model is written (arXiv:2510.18810).
    Conserves relevance up to what biases, softmax and ε take.

    Parameters
    ----------
    canonizers : "auto", list of zennit.canonizers.Canonizer, or None
    epsilon : float or callable
        ε of convolutions and dense layers; 0 is LRP-0, by which nothing is added to the cost of a gradient. For vision
        transformers the paper takes γ instead: ``UniformGamma(gates="split", attention="split")``.
    layer_map : list of (what, rule)
        Rules that come before those of the preset.
    first_map : list of (types, rule)
        Rules for the first layer.
    zero_params : str or sequence of str, optional
        Parameters that count as zero in the rules, such as ``"bias"``.
    """

    def __init__(
        self,
        canonizers: Canonizers = "auto",
        epsilon: Stabilize = 0.0,
        layer_map: LayerMap = (),
        first_map: FirstMap = (),
        zero_params: Names = None,
    ) -> None:
        super().__init__(canonizers, epsilon, layer_map, first_map, zero_params, "split", "split")


@register("cp_lrp")
class CPLRP(_ForTransformers):
    r"""CP-LRP: the probabilities of attention and gates are held constant; ε on dense layers.

    Ali et al., "XAI for transformers: better explanations through conservative propagation", ICML 2022. Conserves
    relevance up to what biases and ε take.

    Parameters
    ----------
    canonizers : "auto", list of zennit.canonizers.Canonizer, or None
    epsilon, layer_map, first_map, zero_params
        As in `AttnLRP`.
    """

    def __init__(
        self,
        canonizers: Canonizers = "auto",
        epsilon: Stabilize = 0.0,
        layer_map: LayerMap = (),
        first_map: FirstMap = (),
        zero_params: Names = None,
    ) -> None:
        super().__init__(canonizers, epsilon, layer_map, first_map, zero_params, "signal", "constant")


@register("relp")
class RelP(_ForTransformers):
    r"""RelP: the probabilities of attention are held constant, the factors of gates share; ε on dense layers.

    Relevance patching, arXiv:2508.21258. Conserves relevance up to what biases and ε take.

    Parameters
    ----------
    canonizers : "auto", list of zennit.canonizers.Canonizer, or None
    epsilon, layer_map, first_map, zero_params
        As in `AttnLRP`.
    """

    def __init__(
        self,
        canonizers: Canonizers = "auto",
        epsilon: Stabilize = 0.0,
        layer_map: LayerMap = (),
        first_map: FirstMap = (),
        zero_params: Names = None,
    ) -> None:
        super().__init__(canonizers, epsilon, layer_map, first_map, zero_params, "split", "constant")
