"""LRP presets that mix rules by the depth of a layer."""

from __future__ import annotations

from typing import Literal

from zennit.types import Convolution

from crp.checks import check_choice, check_number
from crp.composites.base import Canonizers, FirstMap, LayerMap
from crp.composites.lrp import _epsilon_gamma, _Preset, _Rules
from crp.composites.registry import register
from crp.composites.selection import Depth
from crp.errors import InputError
from crp.rules import AlphaBeta, Flat, ZBox
from crp.rules.attention import Attention
from crp.rules.functional import Gates
from crp.rules.input_layer import Bound
from crp.rules.lrp import Empty, Names
from crp.rules.stabilizer import Stabilize

FirstRule = Literal["flat", "box", "none"]


@register("epsilon_gamma")
class EpsilonGamma(_Preset):
    """γ on convolutions, ε on dense layers, no rule of its own at the input.

    Montavon et al., "Layer-wise relevance propagation: an overview" (2019), section 10.3, for inputs without bounds.

    Parameters
    ----------
    gamma : float
        γ of the convolutions.
    canonizers, epsilon, stabilizer, layer_map, zero_params, gates, attention
        As in `crp.composites.EpsilonPlus`.
    first_map : list of (types, rule)
        Rules for the first layer.
    """

    def __init__(
        self,
        canonizers: Canonizers = "auto",
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
        super().__init__(canonizers, layer_map, first_map, zero_params, gates, attention, rules)


@register("lrp_cmp")
class LRPCMP(_Preset):
    """ε on dense layers, γ on the upper and αβ on the lower convolutions, flat or zᴮ at the input.

    The composite strategy, "LRP-CMP", of Kohlbrenner et al., "Towards best practice in explaining neural network
    decisions with LRP" (IJCNN 2020), section III, with the γ of Montavon et al. (2019), section 10.3, between. With
    ``split=1`` all convolutions are lower ones, as in Kohlbrenner et al.; ``alpha=1, beta=0`` is z⁺.

    Parameters
    ----------
    gamma : float
        γ of the upper convolutions.
    alpha, beta : float
        Of the lower convolutions.
    split : float
        Depth where the upper convolutions begin, from 0 (all are upper ones) to 1 (none is).
    first : "flat", "box" or "none"
        Rule of the first layer.
    low, high : float, Tensor or nested list, optional
        Bounds of the input, for ``first="box"``.
    canonizers, epsilon, stabilizer, layer_map, zero_params, empty, gates, attention
        As in `crp.composites.EpsilonPlus`.
    first_map : list of (types, rule)
        Rules for the first layer that come before the preset's.

    Raises
    ------
    ValueError
        If ``split`` is not between 0 and 1, ``first`` is unknown, or bounds are given without ``first="box"`` or the
        other way round.
    """

    def __init__(
        self,
        canonizers: Canonizers = "auto",
        epsilon: Stabilize = 1e-6,
        gamma: float = 0.25,
        alpha: float = 1.0,
        beta: float = 0.0,
        split: float = 0.5,
        first: FirstRule = "flat",
        low: Bound | None = None,
        high: Bound | None = None,
        stabilizer: Stabilize = 1e-6,
        layer_map: LayerMap = (),
        first_map: FirstMap = (),
        zero_params: Names = None,
        empty: Empty = "drop",
        gates: Gates = "signal",
        attention: Attention = "constant",
    ) -> None:
        check_number("split", split)
        if not 0 <= split <= 1:
            raise InputError(f"split must be between 0 (all convolutions get γ) and 1 (all get αβ), got {split}")
        check_choice("first", first, FirstRule)
        if (first == "box") != (low is not None) or (low is None) != (high is None):
            raise InputError(f'first="box" needs low and high, and only it; got first={first!r}, {low}, {high}')
        at_input: Flat | ZBox | None = Flat(stabilizer) if first == "flat" else None
        if low is not None and high is not None:
            at_input = ZBox(low, high, stabilizer, zero_params)
        lower = AlphaBeta(alpha, beta, stabilizer, zero_params, empty=empty)
        layer_map = [*layer_map, *([(Depth(0, split, Convolution), lower)] if split else [])]
        rules: _Rules = {"first": at_input, **_epsilon_gamma(epsilon, gamma, stabilizer, zero_params)}
        super().__init__(canonizers, layer_map, first_map, zero_params, gates, attention, rules)
