r"""Class activation maps: activations of a layer :math:`A_k`, weighted by what each channel is worth for the score.

They differ in the weights :math:`w_k`: those of the classifier (CAM), the mean gradient (Grad-CAM), or a weighted mean
of positive gradients (Grad-CAM++). A new one is a subclass of `LayerCAM` with `weigh`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from zennit.core import Composite

from crp.attributors.base import Attributor
from crp.attributors.gradient import Gradient
from crp.attributors.target import Target
from crp.checks import check_choice, check_number
from crp.composites import GuidedBackprop
from crp.concepts import ChannelConcept
from crp.engine.conditions import MaskMap
from crp.engine.encoding import propagation_of, write
from crp.engine.inputs import Data, Inputs, Tensors
from crp.engine.masks import apply_masks, row_masks
from crp.engine.taps import check_layers
from crp.errors import InputError
from crp.flags import check_flags, check_function
from crp.layers import modules_of, unwrap
from crp.layers.addresses import Address

Interpolation = Literal["linear", "nearest"]
#: From a layer's output to (samples, channels, *space).
Reshape = Callable[[Tensor], Tensor]


class LayerCAM(Attributor):
    r"""Base of class activation maps, :math:`\sum_k w_k A_k` of a layer, enlarged to the input.

    Parameters
    ----------
    model, attr_output, mask_map, batch_size
        As in `Attributor`.
    composite : zennit.core.Composite, optional
        What takes the place of the gradient of the layer.
    layer : str
        Layer whose output has positions: (samples, channels, *space), with as many axes of space as the input. Channels
        come last in what `nn.Linear` and `nn.LayerNorm` return, and where the other axis is that of a text's tokens.
    relu : bool
        Whether to keep positive parts only.
    interpolation : "linear" or "nearest"
        How maps are enlarged (linear: bilinear for images, corners of pixels aligned, not centres).
    reshape : callable, optional
        From the layer's output to (samples, channels, *space), where it has another form: for a vision transformer with
        a class token and 14x14 patches ``lambda tokens: tokens[:, 1:].mT.unflatten(2, (14, 14))``.
    condition : mapping of str to concept ids, optional
        Only the gradient through these concepts counts; of ``layer`` itself, only these channels are in the map.

    Raises
    ------
    KeyError
        If the model has no such layer.
    ValueError
        If the layer's output has no positions.
    """

    def __init__(
        self,
        model: nn.Module,
        composite: Composite | None = None,
        attr_output: Any = None,
        *,
        layer: str,
        relu: bool = True,
        interpolation: Interpolation = "linear",
        reshape: Reshape | None = None,
        condition: Mapping[str, Any] | None = None,
        mask_map: MaskMap = ChannelConcept.mask,
        batch_size: int | None = None,
    ) -> None:
        check_flags(relu=relu)
        super().__init__(
            model, composite, attr_output, condition=condition, mask_map=mask_map, batch_size=batch_size
        )  # fmt: skip
        check_choice("interpolation", interpolation, Interpolation)
        check_layers(unwrap(model), [layer], "layer")
        check_function("reshape", reshape, "the layer's output")
        self.layer, self.relu, self.interpolation, self.reshape = layer, relu, interpolation, reshape

    def attribute(self, inputs: Inputs, target: Target) -> tuple[Tensor, Tensors]:
        """Output, and the map, the same for every channel of the input."""
        if len(inputs.explained) > 1:
            raise InputError(
                f"{type(self).__name__} explains models of one input, not of {len(inputs.explained)}; name one by "
                "explain=, and the others are passed on"
            )
        (data,) = inputs.explained
        output, maps = self.maps(inputs, target)
        space = data.shape[2:]
        if maps.dim() != data.dim():
            raise InputError(
                f"layer {self.layer!r} has {maps.dim() - 2} axes of space and the input of shape {tuple(data.shape)} "
                f"has {len(space)}; name a layer that keeps them, or say by reshape= how its output has (samples, "
                "channels, *space)"
            )
        mode = {"linear": {1: "linear", 2: "bilinear", 3: "trilinear"}[len(space)], "nearest": "nearest"}
        large = F.interpolate(maps.to(data), space, mode=mode[self.interpolation])
        return output, (large.expand(data.shape).contiguous(),)

    def maps(self, data: Data, target: Any) -> tuple[Tensor, Tensor]:
        """Output, and the map as large as the layer.

        Parameters
        ----------
        data : Tensor of shape (samples, channels, *space), or tuple or dict of inputs
        target : Target, class, Tensor or callable
            As in `crp.attributors.Target.of`.

        Returns
        -------
        output : Tensor of shape (samples, *output shape)
        maps : Tensor of shape (samples, 1, *space of the layer)
        """
        target = Target.of(target)
        if target.layer is not None:
            raise InputError(f"{type(self).__name__} explains an output of the model, not neurons of {target.layer!r}")
        inputs = Inputs.of(data, None, self.model)
        outputs, heatmaps = [], []
        for part, of_part in self.parts(inputs, target):
            flow = self.flow(part, of_part, record=self.layer)
            activation, gradient = flow.layers.activations[self.layer], flow.layers.relevances[self.layer]
            if activation.dim() < 3:
                raise InputError(
                    f"layer {self.layer!r} has the output shape {tuple(activation.shape)}, which has no positions; "
                    "name a layer of shape (samples, channels, *space), such as the last convolution"
                )
            gradient = write(propagation_of(self._composite()), gradient, activation)
            # (a condition on the layer itself masks what comes after it was recorded)
            if self.layer in self.condition:
                own = {row: {self.layer: self.condition[self.layer]} for row in range(len(gradient))}
                gradient = apply_masks(row_masks(own, self.layer, self.mask_map), gradient)
            activation, gradient = (self._arranged(values, inputs) for values in (activation, gradient))
            weights = self.weigh(activation, gradient, flow.output, of_part)
            cam = (weights * activation).sum(1, keepdim=True)
            outputs.append(flow.output)
            heatmaps.append(cam.clamp(min=0) if self.relu else cam)
        return torch.cat(outputs), torch.cat(heatmaps)

    def _arranged(self, values: Tensor, inputs: Inputs) -> Tensor:
        """Values of the layer as (rows, channels, *space)."""
        shape = tuple(values.shape)
        if self.reshape is not None:
            arranged = self.reshape(values)
            if not isinstance(arranged, Tensor) or arranged.dim() < 3 or len(arranged) != len(values):
                what = tuple(arranged.shape) if isinstance(arranged, Tensor) else type(arranged).__name__
                raise InputError(
                    f"reshape made {what} of the output of layer {self.layer!r}, {shape}; it must be (samples, "
                    "channels, *space)"
                )
            return arranged
        modules = modules_of(unwrap(self.model))
        name, is_input, _ = Address.of(self.layer, modules)
        module, size = modules[name], None
        if type(module) is nn.Linear:
            size = module.in_features if is_input else module.out_features
        elif type(module) is nn.LayerNorm and len(module.normalized_shape) == 1:
            (size,) = module.normalized_shape
        if size == shape[-1]:
            return values.movedim(-1, 1)
        tokens = next((entry.values.shape[2:] for entry in inputs.embedded.values()), None)
        if tokens is not None and len(shape) == 3 and shape[1:2] == tokens:
            if shape[2:] == tokens:
                raise InputError(
                    f"the output of layer {self.layer!r}, {shape}, has as many channels as tokens; say by reshape= "
                    "which axis is which: (samples, channels, tokens) is asked for"
                )
            return values.movedim(-1, 1)
        return values

    def weigh(self, activation: Tensor, gradient: Tensor, output: Tensor, target: Target) -> Tensor:
        """Weight of each channel.

        Parameters
        ----------
        activation, gradient : Tensor of shape (rows, channels, *space)
        output : Tensor of shape (rows, *output shape)
        target : Target

        Returns
        -------
        Tensor of shape (rows, channels, *space), or broadcasting to it
        """
        raise NotImplementedError


class GradCAM(LayerCAM):
    r"""Grad-CAM, :math:`\max(\sum_k w_k A_k, 0)` with the mean gradient :math:`w_k` of a channel.

    Selvaraju et al., "Grad-CAM: visual explanations from deep networks via gradient-based localization" (ICCV 2017),
    eq. 1 and 2. Of the score before softmax, unless the target is a function of the output. Parameters as `LayerCAM`.

    Examples
    --------
    >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2)).eval()
    >>> GradCAM(net, layer="1")(torch.rand(1, 1, 6, 6), 0)[1].shape
    torch.Size([1, 1, 6, 6])
    """

    def weigh(self, activation: Tensor, gradient: Tensor, output: Tensor, target: Target) -> Tensor:
        """Mean of the gradient over positions."""
        return gradient.mean(tuple(range(2, gradient.dim())), keepdim=True)


class GradCAMPlusPlus(LayerCAM):
    r"""Grad-CAM++, with :math:`w_k = \sum_u \alpha_k(u) \max(g_k(u), 0)` for gradients g.

    Chattopadhyay et al., "Grad-CAM++: improved visual explanations for deep convolutional networks" (WACV 2018), eq. 5
    and 19: :math:`\alpha_k(u) = g_k(u)^2 / (2 g_k(u)^2 + \sum_v A_k(v) g_k(u)^3)`, and 0 where that is 0/0. The paper
    explains :math:`\exp(f)`, whose further factor is the same at all positions, and is left out.

    Parameters
    ----------
    model, composite, attr_output, layer, relu, interpolation, reshape, condition, mask_map, batch_size
        As in `LayerCAM`.
    eps : float
        Added to the denominators of α. pytorch-grad-cam has 1e-6.
    """

    def __init__(
        self,
        model: nn.Module,
        composite: Composite | None = None,
        attr_output: Any = None,
        *,
        layer: str,
        eps: float = 0.0,
        relu: bool = True,
        interpolation: Interpolation = "linear",
        reshape: Reshape | None = None,
        condition: Mapping[str, Any] | None = None,
        mask_map: MaskMap = ChannelConcept.mask,
        batch_size: int | None = None,
    ) -> None:
        common: dict[str, Any] = {"condition": condition, "mask_map": mask_map, "batch_size": batch_size}
        how: dict[str, Any] = {"relu": relu, "interpolation": interpolation, "reshape": reshape}
        super().__init__(model, composite, attr_output, layer=layer, **how, **common)
        check_number("eps", eps, 0)
        self.eps = eps

    def weigh(self, activation: Tensor, gradient: Tensor, output: Tensor, target: Target) -> Tensor:
        """Mean of the positive gradient, weighted by α (eq. 19)."""
        space = tuple(range(2, gradient.dim()))
        # (both sides of the fraction divided by the square, which would vanish for small gradients)
        below = 2 + activation.sum(space, keepdim=True) * gradient
        if self.eps:
            below = below + self.eps / gradient.square()
        alpha = torch.where((gradient == 0) | (below == 0), 0, 1 / below)
        return (alpha * gradient.clamp(min=0)).sum(space, keepdim=True)


class CAM(LayerCAM):
    r"""Class activation map, :math:`\sum_k w_{ck} A_k` with the weights of the classifier.

    Zhou, Khosla, Lapedriza, Oliva and Torralba, "Learning deep features for discriminative localization" (CVPR 2016),
    eq. 2. For nets that average a layer over its positions, and then have a single dense layer: the mean of the map,
    plus the bias, is the score. Elsewhere it is refused, as the map would mean nothing. Not rectified by default. A
    composite has no effect.

    Parameters
    ----------
    model, composite, attr_output, layer, relu, interpolation, reshape, mask_map, batch_size
        As in `LayerCAM`; the layer is the one that is averaged.
    classifier : str, optional
        Name of the dense layer; by default the model's last one.
    condition : mapping of str to concept ids, optional
        ``{layer: channels}``: only these channels are in the map.

    Raises
    ------
    ValueError
        If there is no dense layer of as many inputs as the layer has channels, or the score is not the mean of the map
        plus the bias.
    """

    def __init__(
        self,
        model: nn.Module,
        composite: Composite | None = None,
        attr_output: Any = None,
        *,
        layer: str,
        classifier: str | None = None,
        relu: bool = False,
        interpolation: Interpolation = "linear",
        reshape: Reshape | None = None,
        condition: Mapping[str, Any] | None = None,
        mask_map: MaskMap = ChannelConcept.mask,
        batch_size: int | None = None,
    ) -> None:
        if condition is not None and set(condition) - {layer}:
            raise InputError(f"CAM has weights for layer {layer!r} only; condition names {sorted(condition)}")
        common: dict[str, Any] = {"condition": condition, "mask_map": mask_map, "batch_size": batch_size}
        super().__init__(
            model, None, attr_output, layer=layer, relu=relu, interpolation=interpolation, reshape=reshape, **common
        )
        dense = {name: m for name, m in unwrap(model).named_modules() if isinstance(m, nn.Linear)}
        if classifier is None:
            classifier = next(reversed(dense), "")
        if classifier not in dense:
            raise InputError(f"the classifier of CAM is a dense layer, one of {list(dense)}, not {classifier!r}")
        self.classifier, self._dense = classifier, dense[classifier]

    def weigh(self, activation: Tensor, gradient: Tensor, output: Tensor, target: Target) -> Tensor:
        """Weights of the classifier, summed over classes as the target weighs them."""
        dense, channels = self._dense, activation.shape[1]
        if dense.in_features != channels or output.shape[1:] != (dense.out_features,):
            raise InputError(
                f"the classifier {self.classifier!r} maps {dense.in_features} features to {dense.out_features}, where "
                f"{self.layer!r} has {channels} channels and the model's output is {tuple(output.shape)}; CAM needs "
                "them to agree"
            )
        accuracy = max(1e-3, 10 * torch.finfo(output.dtype).eps)
        with torch.autocast(activation.device.type, enabled=False):
            weight = dense.weight.detach().to(torch.promote_types(dense.weight.dtype, torch.float32))
            mean = activation.to(weight).flatten(2).mean(2) @ weight.T
        mean = mean if dense.bias is None else mean + dense.bias.detach()
        if not torch.allclose(mean, output.to(mean), rtol=accuracy, atol=accuracy * float(output.abs().max())):
            raise InputError(
                f"the model's output is not {self.classifier!r} of the mean of {self.layer!r} over its positions, as "
                "CAM needs; name the layer that is averaged, or use grad_cam"
            )
        map_gradient = target.weights(output.to(weight)) @ weight
        map_gradient = map_gradient.reshape(*map_gradient.shape, *[1] * (activation.dim() - 2))
        # (of a mean, the gradient at each position is the weight over their number, here through the concepts alone)
        return map_gradient if not self.condition else gradient * gradient[0, 0].numel()


class GuidedGradCAM(Attributor):
    """Guided Grad-CAM: the product of guided backprop and of `GradCAM`, enlarged.

    Selvaraju et al. (2017), section 3.2: as fine as guided backprop, and as specific for the class as Grad-CAM.

    Parameters
    ----------
    model, attr_output, layer, interpolation, reshape, condition, mask_map, batch_size
        As in `GradCAM`. The condition holds in both factors.
    composite : zennit.core.Composite, optional
        Of the first factor; guided backprop by default.
    """

    def __init__(
        self,
        model: nn.Module,
        composite: Composite | None = None,
        attr_output: Any = None,
        *,
        layer: str,
        interpolation: Interpolation = "linear",
        reshape: Reshape | None = None,
        condition: Mapping[str, Any] | None = None,
        mask_map: MaskMap = ChannelConcept.mask,
        batch_size: int | None = None,
    ) -> None:
        common: dict[str, Any] = {"condition": condition, "mask_map": mask_map, "batch_size": batch_size}
        super().__init__(model, composite or GuidedBackprop(), attr_output, **common)
        self.fine = Gradient(model, self.composite, **common)
        self.coarse = GradCAM(model, layer=layer, interpolation=interpolation, reshape=reshape, **common)

    def attribute(self, inputs: Inputs, target: Target) -> tuple[Tensor, Tensors]:
        """Output and product."""
        _, (coarse,) = self.coarse.attribute(inputs, target)
        output, (fine,) = self.fine.attribute(inputs, target)
        return output, (fine * coarse.to(fine),)
