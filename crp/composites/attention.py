"""Presets of layer-wise relevance propagation for transformers.

They differ in what becomes of attention and of gates; see `crp.rules.attention` and `crp.rules.functional.Gate`. Every
other preset of LRP takes the same two arguments.
"""

from __future__ import annotations

from typing import ClassVar

from crp.composites.base import Canonizers, FirstMap, LayerMap
from crp.composites.registry import register
from crp.composites.uniform import _Uniform
from crp.rules import Epsilon
from crp.rules.attention import Attention
from crp.rules.functional import Gates
from crp.rules.lrp import Names
from crp.rules.stabilizer import Stabilize


class _ForTransformers(_Uniform):
    #: What becomes of gates and of attention, as in `LRP`.
    _gates: ClassVar[Gates]
    _attention: ClassVar[Attention]

    def __init__(
        self,
        canonizers: Canonizers = "auto",
        epsilon: Stabilize = 0.0,
        layer_map: LayerMap = (),
        first_map: FirstMap = (),
        zero_params: Names = None,
    ) -> None:
        rule = Epsilon(epsilon, zero_params)
        super().__init__(canonizers, rule, layer_map, first_map, zero_params, self._gates, self._attention)


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

    _gates, _attention = "split", "split"


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

    _gates, _attention = "signal", "constant"


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

    _gates, _attention = "split", "constant"
