r"""Presets of the gradient-type methods: gradient, gradient × input, guided backprop, deconvnet, β-smooth.

Their results are multipliers, :math:`m` itself and not :math:`a \odot m` (gradient × input aside): what the gradient of
an output would be under a modified chain rule. The target's multiplier is 1 by default. They need no canonizers.

**What conditions mean for them.** A condition keeps the multiplier of some concepts of a layer and sets that of the
others to 0: the result is how the output changes with the input through these concepts alone. Gradient, gradient ×
input and β-smooth are linear, so that the results of all concepts of a layer add up to the whole. Guided backprop and
deconvnet rectify what flows back: each result is what the method shows for that concept, but they do not add up,
and neither do those of several outputs. `start_layer` explains a unit inside the model, the first use of these
methods.
"""

from __future__ import annotations

from torch import nn

from crp.composites.base import Canonizers, Composite, LayerMap
from crp.composites.registry import register
from crp.composites.selection import Functions
from crp.rules.base import Rule
from crp.rules.functions import Function
from crp.rules.gradient import DeconvReLU, GuidedReLU, SmoothReLU


@register("gradient")
class Gradient(Composite):
    r"""The gradient of the target, :math:`\partial f / \partial x`.

    Simonyan, Vedaldi and Zisserman, "Deep inside convolutional networks" (ICLR workshop 2014). Says how the output
    changes with each input; its absolute value is the saliency map, its square the sensitivity. Conserves nothing.

    Parameters
    ----------
    canonizers : "auto", list of zennit.canonizers.Canonizer, or None
    layer_map : list of (what, rule)
        Rules, if any.
    """

    readout = "multiplier"

    def __init__(self, canonizers: Canonizers = None, layer_map: LayerMap = ()) -> None:
        super().__init__(canonizers, layer_map=layer_map)


@register("gradient_x_input")
class GradientTimesInput(Composite):
    r"""Gradient × input, :math:`x \odot \partial f / \partial x`; simple Taylor decomposition at the root point 0.

    Shrikumar et al., "Not just a black box" (2016); Montavon et al. (2017), eq. 4. In nets of ReLU and affine layers it
    is LRP-0 (Ancona et al., ICLR 2018), and sums to the output where there are no biases.

    Parameters
    ----------
    canonizers : "auto", list of zennit.canonizers.Canonizer, or None
    layer_map : list of (what, rule)
        Rules, if any.
    """

    def __init__(self, canonizers: Canonizers = None, layer_map: LayerMap = ()) -> None:
        super().__init__(canonizers, layer_map=layer_map)


class _ReLUMethod(Composite):
    """A rule for ReLU, wherever the model calls it; other activations are warned of."""

    readout = "multiplier"

    def __init__(self, canonizers: Canonizers, rule: Rule, layer_map: LayerMap) -> None:
        super().__init__(canonizers, layer_map=[*layer_map, (Functions(("relu",)), rule)])

    def is_method(self, known: Function) -> bool:
        """Whether a function is no activation: for all others, the methods take the ordinary chain rule."""
        return known.known and known.kind != "activation"

    def unreached(self, model: nn.Module) -> str | None:
        """Message of the error that a model without ReLU gets."""
        return (
            f"{type(self).__name__} changes the backward pass of ReLU, and {type(model).__name__} calls none; its "
            "result would be the gradient. Map a rule to the model's activations in layer_map, or use Gradient"
        )


@register("guided_backprop")
class GuidedBackprop(_ReLUMethod):
    r"""Guided backprop: what flows back through a ReLU is cut off at 0, :math:`m_a = m\,1[m > 0]\,1[a > 0]`.

    Springenberg et al., "Striving for simplicity: the all convolutional net" (ICLR workshop 2015). Shows sharply what
    excites a unit; it depends little on the class (Adebayo et al., "Sanity checks for saliency maps", NeurIPS 2018).
    Conserves nothing, and is not linear: see `crp.composites.gradient` for what conditions mean.

    Modules and functions are treated alike; zennit and captum only see modules, and give the plain gradient where a
    model calls `F.relu`. The method is defined for ReLU. If a model has other activations as well, a warning names
    them: map this rule to them, ``layer_map=[(F.gelu, GuidedReLU())]``, or None for the ordinary chain rule.

    Parameters
    ----------
    canonizers : "auto", list of zennit.canonizers.Canonizer, or None
    layer_map : list of (what, rule)
        Rules that come before that of the preset.

    Raises
    ------
    ValueError
        When a model runs that has no ReLU.
    """

    def __init__(self, canonizers: Canonizers = None, layer_map: LayerMap = ()) -> None:
        super().__init__(canonizers, GuidedReLU(), layer_map)


@register("deconvnet")
class DeconvNet(_ReLUMethod):
    r"""Deconvnet: what flows back through a ReLU is rectified, whatever its input was, :math:`m_a = m\,1[m > 0]`.

    Zeiler and Fergus, "Visualizing and understanding convolutional networks" (ECCV 2014); max-pooling goes back through
    its switches. Conserves nothing, and is not linear: see `crp.composites.gradient` for what conditions mean.

    Modules and functions, and other activations, as in `GuidedBackprop`. The paper projects single feature maps, as
    do the notebooks of "Understanding NN" (all ones of one map): ``start_layer="conv5"``, ``{"conv5": [3]}``.

    Parameters
    ----------
    canonizers, layer_map
        As in `GuidedBackprop`.

    Raises
    ------
    ValueError
        When a model runs that has no ReLU.
    """

    def __init__(self, canonizers: Canonizers = None, layer_map: LayerMap = ()) -> None:
        super().__init__(canonizers, DeconvReLU(), layer_map)


@register("beta_smooth")
class BetaSmooth(_ReLUMethod):
    r"""β-smooth gradient: that of softplus in place of that of ReLU, :math:`m_a = m\,\sigma(\beta a)`.

    Dombrowski et al., "Explanations can be manipulated and geometry is to blame" (NeurIPS 2019), section 3.2. Gradients
    that small changes of the input cannot manipulate as easily. Predictions and activations stay those of the model.
    Linear in the relevance that starts; conserves nothing.

    Parameters
    ----------
    canonizers : "auto", list of zennit.canonizers.Canonizer, or None
    beta : float
        The larger, the closer to the gradient.
    layer_map : list of (what, rule)
        Rules that come before that of the preset.

    Raises
    ------
    ValueError
        If ``beta`` is not positive and finite; when a model runs that has no ReLU.
    """

    def __init__(self, canonizers: Canonizers = None, beta: float = 10.0, layer_map: LayerMap = ()) -> None:
        super().__init__(canonizers, SmoothReLU(beta), layer_map)
