"""Preset of deep Taylor decomposition."""

from __future__ import annotations

from typing import Literal

from zennit.types import Linear

from crp.checks import check_choice
from crp.composites.base import Canonizers, FirstMap, LayerMap
from crp.composites.lrp import _base, _OfDegreeOne
from crp.composites.registry import register
from crp.composites.selection import Having, Kind
from crp.errors import InputError
from crp.rules.input_layer import Bound, WSquare, ZBox
from crp.rules.lrp import Names, ZPlus
from crp.rules.pooling import SumPool
from crp.rules.stabilizer import Stabilize

MaxPool = Literal["wta", "avg"]


@register("deep_taylor")
class DeepTaylor(_OfDegreeOne):
    r"""Deep Taylor decomposition: z⁺ in hidden layers, zᴮ or w² at the input.

    Montavon, Lapuschkin, Binder, Samek and Müller, "Explaining nonlinear classification decisions with deep Taylor
    decomposition", Pattern Recognition 65 (2017): the first-order terms of a Taylor expansion of each neuron's
    relevance, at a root point that lies in the domain of its inputs. Inputs that are not negative give z⁺ (eq. 17),
    those in a box :math:`l \le x \le h` give zᴮ (eq. 14), and unbounded ones w² (eq. 12); the domain of the
    model's input is for you to say.

    :math:`\sum_i R_i` is the target's output, and no relevance has another sign than it, where the paper's conditions
    hold: activations are ReLU, biases are not positive (:math:`b \le 0`), and the input is in its box. Biases count as
    zero by default and so keep nothing. A neuron that is positive through a positive bias alone has no excitatory
    input and keeps its relevance; `accounting` tells how much is lost so.

    For max-pooling, ``"wta"`` gives all to the winner, as in Bach et al. (2015), which leaves the explanation
    discontinuous. ``"avg"`` shares in proportion to the activations in the window: the paper derives this for the
    sum-pooling of its example nets, and its authors recommend it for max-pooling, too (Montavon et al., Digital Signal
    Processing 73, 2018). The notebooks of "Understanding NN" do the same, but start from the softmax probability of
    the class, and add 1e-10 to denominators.

    Parameters
    ----------
    canonizers : "auto", list of zennit.canonizers.Canonizer, or None
    low, high : float, Tensor or nested list, optional
        Smallest and largest value that the input can have, after preprocessing, as in `crp.rules.ZBox`; None for
        unbounded inputs.
    maxpool : "wta" or "avg"
        How max-pooling shares relevance.
    stabilizer : float or callable
        Not needed: denominators are not smaller than what they divide.
    zero_params : str or sequence of str, optional
        ``None`` lets biases keep their share.
    layer_map : list of (what, rule)
        Rules that come before those of the preset.
    first_map : list of (types, rule)
        Rules for the first layer that come before zᴮ or w².

    Raises
    ------
    ValueError
        If only one bound is given, ``low`` is not below ``high``, or ``maxpool`` is something else.
    """

    def __init__(
        self,
        canonizers: Canonizers = "auto",
        low: Bound | None = None,
        high: Bound | None = None,
        maxpool: MaxPool = "wta",
        stabilizer: Stabilize = 0.0,
        zero_params: Names = "bias",
        layer_map: LayerMap = (),
        first_map: FirstMap = (),
    ) -> None:
        check_choice("maxpool", maxpool, MaxPool)
        if (low is None) != (high is None):
            raise InputError(
                f"low and high are given together, for inputs in a box, or not at all, for unbounded ones; got {low=} "
                f"and {high=}"
            )
        at_input = WSquare(stabilizer, zero_params)
        if low is not None and high is not None:
            at_input = ZBox(low, high, stabilizer, zero_params)
        hidden = ZPlus(stabilizer, zero_params)
        rules: LayerMap = [(Kind("convolution"), hidden), (Kind("dense"), hidden)]
        if maxpool == "avg":
            rules = [*rules, (Having("maximum"), SumPool())]
        others = _base(zero_params=zero_params, method=type(self).__name__)
        super().__init__(
            canonizers,
            layer_map=[*layer_map, *rules, *others],
            first_map=first_map,
            at_input=[(Linear, at_input)],
        )
