"""Presets of layer-wise relevance propagation.

They differ in the rule for convolutions and in that for the first layer; dense layers always get ε. ε on dense and z⁺
or αβ on convolutional layers is the "composite" strategy of Kohlbrenner et al., "Towards best practice in explaining
neural network decisions with LRP" (IJCNN 2020); ε, γ and zᴮ by depth is Montavon et al., "Layer-wise relevance
propagation: an overview" (2019), section 10.3; the flat first layer is Lapuschkin et al., Nature Communications 10
(2019).
"""

from __future__ import annotations

from typing import Any, TypedDict

from torch import Tensor, nn
from zennit.types import Convolution, Linear

from crp.composites.base import Canonizers, Composite, FirstMap, LayerMap, NameMap
from crp.composites.registry import register
from crp.composites.selection import Functions, Having, Kind, Types
from crp.notices import warn
from crp.rules import AlphaBeta, Epsilon, Flat, Gamma, Pass, Rule, ZBox, ZPlus
from crp.rules.activations import Softplus
from crp.rules.attention import Attention, ConstantWeights, DotProductAttention, MatrixProduct, check_attention
from crp.rules.functional import GLU, Gate, Gates, Normalization, Quotient
from crp.rules.functions import Function
from crp.rules.input_layer import Bound
from crp.rules.lrp import Empty, Names
from crp.rules.shared import BY_FUNCTION, EndingSoftmax, Proportional, Refused
from crp.rules.stabilizer import Stabilize


def _base(
    gates: Gates = "signal", attention: Attention | None = None, zero_params: Names = None, method: str = "LRP"
) -> LayerMap:
    """Rules of all LRP presets for operations that are not affine.

    ReLU, max and average pooling, addition, concatenation and the like are right by the ordinary chain rule. Other
    activations pass relevance on, normalizations hold their variance constant, gates and attention are held constant or
    split.

    Parameters
    ----------
    gates : "signal" or "split"
        See `crp.rules.functional.Gate`.
    attention : "constant" or "split", optional
        See `crp.rules.attention`; None is for methods that have no rule for attention, and refuse it. (They hold
        constant what a softmax has made where that weights a sum.)
    zero_params : str or sequence of str, optional
        ``"bias"`` gives the share of the biases of normalizations to their inputs.
    method : str
        Name for messages.
    """
    refused = Refused(method)
    products: LayerMap = [
        (Functions(("addr", "kron", "outer")), refused),
        (Kind("product"), ConstantWeights(method)),
    ]
    if attention is not None:
        products = [
            (Functions(("scaled_dot_product_attention",)), DotProductAttention(attention)),
            (Having("softmax"), EndingSoftmax()),
            (Kind("product"), MatrixProduct(attention)),
        ]
    return [
        (Having("identity"), Pass()),
        (Functions(("logaddexp", "logaddexp2")), Softplus()),
        (Functions(("mul",)), Gate(gates, attention)),
        (Having("quotient"), Quotient(gates)),
        (Having("statistics"), Normalization(zero_params)),
        (Functions(("glu",)), GLU(gates)),
        (Having("choosing"), Proportional()),
        *((Functions(functions), rule()) for functions, rule in BY_FUNCTION.items()),
        (Functions(("prelu",)), refused),
        *products,
        (Having("attention"), refused),
    ]


class _OfDegreeOne(Composite):
    """A method that takes the ordinary chain rule for functions of degree one, and for those that hand nothing on."""

    def is_method(self, known: Function) -> bool:
        """Whether the ordinary chain rule is the method for a function."""
        return known.has("homogeneous", "step")


class LRP(_OfDegreeOne):
    """Layer-wise relevance propagation by rules of your own; all LRP presets are one of these.

    Activations, normalizations, gates and attention have rules of their own. Where LRP has neither a rule nor takes
    the ordinary chain rule, a warning names the operation.

    Parameters
    ----------
    canonizers : "auto", list of zennit.canonizers.Canonizer, or None
    layer_map : list of (what, rule)
        Rules as in `Composite`; the first match wins.
    first_map : list of (types, rule)
        Rules for operations of any of these types that read the model's input.
    name_map : list of (names, rule)
        Rules by layer names or patterns; these come first.
    gates : "signal" or "split"
        Whether a product's gate, as in squeeze-and-excitation, is held constant, or takes half of the relevance.
    attention : "constant" or "split"
        Whether the probabilities of attention are held constant, or take half of the relevance; see
        `crp.rules.attention`.
    zero_params : str or sequence of str, optional
        ``"bias"`` gives the share of the biases of normalizations to their inputs.
    convolution, dense, first : Rule, optional
        Rules of convolutions, of dense layers, and of both where they read the model's input. Rules of the maps come
        before these, except that types in ``layer_map`` do not come before ``first``.
    types : type or tuple of types
        What ``first`` is for: convolutions and dense layers by default.
    """

    def __init__(
        self,
        canonizers: Canonizers = "auto",
        *,
        layer_map: LayerMap = (),
        first_map: FirstMap = (),
        name_map: NameMap = (),
        gates: Gates = "signal",
        attention: Attention = "constant",
        zero_params: Names = None,
        convolution: Rule | None = None,
        dense: Rule | None = None,
        first: Rule | None = None,
        types: Types = Linear,
    ) -> None:
        own: LayerMap = [(Kind("convolution"), convolution), (Kind("dense"), dense)]
        super().__init__(
            canonizers,
            layer_map=[
                *layer_map,
                *((kind, rule) for kind, rule in own if rule is not None),
                *_base(gates, check_attention(attention), zero_params, type(self).__name__),
            ],
            first_map=first_map,
            name_map=name_map,
            at_input=[] if first is None else [(types, first)],
        )

    def _leave(self, module: nn.Module | None = None, args: Any = (), output: Any = None) -> None:
        born, self._attachment.softmaxes = self._attachment.softmaxes, 0
        note = self._attachment.notes.of(output) if born and isinstance(output, Tensor) else None
        super()._leave(module, args, output)
        if note is not None and note.flags & born and not self._depth:
            warn(
                "the model ends in a softmax, which hands back almost nothing of a class that is sure: samples cannot "
                "be compared by their relevance. Explain the logits, with nn.Identity() in place of the softmax, or "
                "say by layer_map=[(nn.Softmax, None)] that it is meant"
            )


class _Rules(TypedDict, total=False):
    """Rules of a preset, as arguments of `LRP`."""

    convolution: Rule
    dense: Rule
    first: Rule | None
    types: Types


class _Preset(LRP):
    """LRP with what all presets take, in the same order, and the rules of one."""

    def __init__(
        self,
        canonizers: Canonizers,
        layer_map: LayerMap,
        first_map: FirstMap,
        zero_params: Names,
        gates: Gates,
        attention: Attention,
        rules: _Rules,
    ) -> None:
        super().__init__(
            canonizers,
            layer_map=layer_map,
            first_map=first_map,
            zero_params=zero_params,
            gates=gates,
            attention=attention,
            **rules,
        )


class _EpsilonPreset(_Preset):
    """ε on dense layers, and what else a preset says."""

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
        attention: Attention = "constant",
    ) -> None:
        rules: _Rules = {"dense": Epsilon(epsilon, zero_params), **self._rules(stabilizer, zero_params, empty)}
        super().__init__(canonizers, layer_map, first_map, zero_params, gates, attention, rules)

    def _rules(self, stabilizer: Stabilize, zero_params: Names, empty: Empty) -> _Rules:
        """Rules of the preset beside ε."""
        raise NotImplementedError


@register("epsilon_plus")
class EpsilonPlus(_EpsilonPreset):
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
    first_map : list of (types, rule)
        Rules for the first layer that come before those of the preset.
    empty : "drop" or "epsilon"
        What becomes of relevance at outputs without a positive part; see `crp.rules.ZPlus`.
    gates : "signal" or "split"
        As in `LRP`.
    attention : "constant" or "split"
        As in `LRP`.
    """

    def _rules(self, stabilizer: Stabilize, zero_params: Names, empty: Empty) -> _Rules:
        return {"convolution": ZPlus(stabilizer, zero_params, empty=empty)}


@register("epsilon_plus_flat")
class EpsilonPlusFlat(_EpsilonPreset):
    """z⁺ on convolutions, ε on dense layers, flat on the first.

    Parameters
    ----------
    canonizers : "auto", list of zennit.canonizers.Canonizer, or None
    epsilon, stabilizer, layer_map, first_map, zero_params, empty, gates, attention
        As in `EpsilonPlus`.
    """

    def _rules(self, stabilizer: Stabilize, zero_params: Names, empty: Empty) -> _Rules:
        return {"first": Flat(stabilizer), "convolution": ZPlus(stabilizer, zero_params, empty=empty)}


@register("epsilon_alpha2_beta1")
class EpsilonAlpha2Beta1(_EpsilonPreset):
    """αβ with α = 2 and β = 1 on convolutions, ε on dense layers.

    Parameters
    ----------
    canonizers : "auto", list of zennit.canonizers.Canonizer, or None
    epsilon, stabilizer, layer_map, first_map, zero_params, empty, gates, attention
        As in `EpsilonPlus`.
    """

    def _rules(self, stabilizer: Stabilize, zero_params: Names, empty: Empty) -> _Rules:
        return {"convolution": AlphaBeta(2.0, 1.0, stabilizer, zero_params, empty=empty)}


@register("epsilon_alpha2_beta1_flat")
class EpsilonAlpha2Beta1Flat(_EpsilonPreset):
    """αβ with α = 2 and β = 1 on convolutions, ε on dense layers, flat on the first.

    Parameters
    ----------
    canonizers : "auto", list of zennit.canonizers.Canonizer, or None
    epsilon, stabilizer, layer_map, first_map, zero_params, empty, gates, attention
        As in `EpsilonPlus`.
    """

    def _rules(self, stabilizer: Stabilize, zero_params: Names, empty: Empty) -> _Rules:
        return {"first": Flat(stabilizer), "convolution": AlphaBeta(2.0, 1.0, stabilizer, zero_params, empty=empty)}


def _epsilon_gamma(epsilon: Stabilize, gamma: float, stabilizer: Stabilize, zero_params: Names) -> _Rules:
    """γ on convolutions, ε on dense layers."""
    return {"convolution": Gamma(gamma, stabilizer, zero_params), "dense": Epsilon(epsilon, zero_params)}


@register("epsilon_gamma_box")
class EpsilonGammaBox(_Preset):
    """γ on convolutions, ε on dense layers, zᴮ on the first convolution.

    Parameters
    ----------
    canonizers : "auto", list of zennit.canonizers.Canonizer, or None
    low, high : float, Tensor or nested list
        Smallest and largest value that the input can have, after preprocessing; tensors broadcast, such as (1, 3, 1,
        1).
    gamma : float
        γ of the convolutions.
    epsilon, stabilizer, layer_map, first_map, zero_params, gates, attention
        As in `EpsilonPlus`.
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
        attention: Attention = "constant",
    ) -> None:
        rules = _epsilon_gamma(epsilon, gamma, stabilizer, zero_params)
        rules |= {"first": ZBox(low, high, stabilizer, zero_params), "types": Convolution}
        super().__init__(canonizers, layer_map, first_map, zero_params, gates, attention, rules)
