"""Presets of excitation backprop and its contrastive form."""

from __future__ import annotations

from zennit.types import Linear

from crp.composites.base import Canonizers, LayerMap
from crp.composites.lrp import _base, _OfDegreeOne
from crp.composites.registry import register
from crp.composites.selection import Kind, Last
from crp.errors import InputTypeError
from crp.rules.excitation import ContrastiveExcitation, Excitation, Signed
from crp.rules.stabilizer import Stabilize


@register("excitation_backprop")
class ExcitationBackprop(_OfDegreeOne):
    r"""Excitation backprop: from every winner to its inputs, with probability :math:`\propto a_j w_{ij}^+`.

    Zhang et al., IJCV 126 (2018), eq. 10; see `crp.rules.Excitation`. Results are probabilities: the
    initial relevance of a target is 1 by default, and in nets of ReLU, convolutions, dense layers and pooling all
    layers sum to 1, apart from outputs without any excitatory input, which are positive through their bias alone (what
    they keep is in `accounting`). ``init_rel`` starts from a distribution over outputs. For localisation: the maps are
    smooth and not negative, and say little about what speaks against a class.

    Max-pooling hands all to the winner, average pooling, additions and concatenations share in proportion to the
    values, and smooth activations pass relevance on. If a summand of a residual block is negative, its share is
    negative, too; the sum is still 1. Batch norm is merged; with ``canonizers=None`` it passes relevance on, which is
    the same if its scale is positive. Zennit's preset gives biases a share, which changes results by up to 60 %.
    TorchRay adds 1e-20 to denominators; Greydanus' port adds 1e-10, and gives biases of convolutions a share.

    Parameters
    ----------
    canonizers : "auto", list of zennit.canonizers.Canonizer, or None
    signed : "split", "as_is" or "shift"
        What to do with inputs of both signs, such as normalised pixels; see `crp.rules.Excitation`.
    stabilizer : float or callable
    layer_map : list of (what, rule)
        Rules that come before those of the preset.
    """

    initial = "one"

    def __init__(
        self,
        canonizers: Canonizers = "auto",
        signed: Signed = "split",
        stabilizer: Stabilize = 0.0,
        layer_map: LayerMap = (),
    ) -> None:
        rule = Excitation(signed, stabilizer)
        rules = [(Kind("convolution"), rule), (Kind("dense"), rule)]
        others = _base(zero_params="bias", method=type(self).__name__)
        super().__init__(canonizers, layer_map=[*layer_map, *rules, *others])


@register("contrastive_excitation_backprop")
class ContrastiveExcitationBackprop(ExcitationBackprop):
    r"""Contrastive excitation backprop: for a class minus against it, at one layer; excitation backprop elsewhere.

    Zhang et al., IJCV 126 (2018), section 3.3; see `crp.rules.ContrastiveExcitation`. For finding what
    distinguishes a class from others, where excitation backprop finds whatever is salient.

    All layers below the contrastive one sum to 0. The paper keeps what is positive: sum the channels first,
    ``heatmap.sum(1).clamp(min=0)``, as TorchRay does (the default heatmap is this sum, before clamping).

    The paper and the implementations propagate both parts and subtract them further down: at the classifier's input
    (Caffe, Greydanus' port) or at any ``contrast_layer`` (TorchRay). Excitation backprop is linear in the relevance
    that starts, so that every place of the subtraction gives the same result; here it is the classifier itself. The
    result depends only on ``layer``, whose weights change sign.

    Parameters
    ----------
    canonizers : "auto", list of zennit.canonizers.Canonizer, or None
    layer : str, optional
        Name of a convolutional or dense layer; the model's last one of these by default.
    signed, stabilizer, layer_map
        As in `ExcitationBackprop`.

    Raises
    ------
    KeyError
        When it is put on a model that has no such layer.
    """

    def __init__(
        self,
        canonizers: Canonizers = "auto",
        layer: str | None = None,
        signed: Signed = "split",
        stabilizer: Stabilize = 0.0,
        layer_map: LayerMap = (),
    ) -> None:
        if not isinstance(layer, str | None):
            raise InputTypeError(f"layer must be the name of a layer, not {layer!r}")
        contrastive = (Last(Linear) if layer is None else layer, ContrastiveExcitation(signed, stabilizer))
        super().__init__(canonizers, signed, stabilizer, [*layer_map, contrastive])
