"""The gradient, its square and absolute value, and gradient × input; or a composite's result in its place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from zennit.core import Composite

from crp.attributors.base import Attributor
from crp.attributors.target import Target
from crp.concepts import ChannelConcept
from crp.engine.conditions import MaskMap
from crp.engine.inputs import Inputs, Tensors


class Gradient(Attributor):
    r"""Gradient :math:`\partial f / \partial x`, or what a composite gives in its place: relevance, for most of ours.

    Simonyan, Vedaldi and Zisserman, "Deep inside convolutional networks" (ICLR workshop 2014), section 3.

    Parameters
    ----------
    model, composite, attr_output, condition, mask_map, batch_size
        As in `Attributor`. If ``attr_output`` is a tensor or function in zennit's sense, it is the initial relevance of
        the composite. Any other target starts from its own value, or from 1 if the composite says so.
    layer : str, optional
        Layer that is explained in place of the input.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(3, 2, bias=False)).eval()
    >>> output, gradient = Gradient(net)(torch.ones(1, 3), 1)
    >>> torch.equal(gradient[0], net[0].weight[1])
    True
    """

    def __init__(
        self,
        model: nn.Module,
        composite: Composite | None = None,
        attr_output: Any = None,
        *,
        layer: str | None = None,
        condition: Mapping[str, Any] | None = None,
        mask_map: MaskMap = ChannelConcept.mask,
        batch_size: int | None = None,
    ) -> None:
        super().__init__(
            model, composite, attr_output, condition=condition, mask_map=mask_map, batch_size=batch_size
        )  # fmt: skip
        self.layer = layer

    def attribute(self, inputs: Inputs, target: Target) -> tuple[Tensor, Tensors]:
        """Output and gradient."""
        outputs, gradients = [], []
        for part, of_part in self.parts(inputs, target):
            flow = self.flow(part, of_part, record=self.layer)
            outputs.append(flow.output)
            gradients.append(flow.inputs if self.layer is None else (flow.layers.relevances[self.layer],))
        return torch.cat(outputs), tuple(torch.cat(parts) for parts in zip(*gradients, strict=True))


class Sensitivity(Gradient):
    r"""Sensitivity, :math:`(\partial f / \partial x)^2`: how much the score changes, not what it is made of.

    Gevrey et al. (2003); Montavon, Samek and Müller, "Methods for interpreting and understanding deep neural networks"
    (Digital Signal Processing 73, 2018), section 4.1. Sums to the squared norm of the gradient. The score is usually a
    logit; to explain a probability, give a function of the output. Parameters as `Gradient`.
    """

    def attribute(self, inputs: Inputs, target: Target) -> tuple[Tensor, Tensors]:
        """Output and squared gradient."""
        output, gradients = super().attribute(inputs, target)
        return output, tuple(gradient.square() for gradient in gradients)


class Saliency(Gradient):
    r"""Saliency, :math:`|\partial f / \partial x|`; Simonyan, Vedaldi and Zisserman (2014), section 3.1.

    Parameters as `Gradient`.
    """

    def attribute(self, inputs: Inputs, target: Target) -> tuple[Tensor, Tensors]:
        """Output and absolute value of the gradient."""
        output, gradients = super().attribute(inputs, target)
        return output, tuple(gradient.abs() for gradient in gradients)


class SimpleTaylor(Attributor):
    r"""Simple Taylor decomposition at the root point 0, :math:`x \odot \partial f / \partial x`: gradient × input.

    Montavon, Samek and Müller (2018), section 4.2. Exact for homogeneous functions, such as nets of ReLU
    without biases. Relevance of a composite is divided by the input first, so that it is not multiplied twice.
    Parameters as `Gradient`.
    """

    def attribute(self, inputs: Inputs, target: Target) -> tuple[Tensor, Tensors]:
        """Output and gradient × input."""
        outputs, products = [], []
        for part, of_part in self.parts(inputs, target):
            output, multipliers = self.multipliers(part, of_part)
            outputs.append(output)
            products.append(tuple(m * data.to(m) for m, data in zip(multipliers, part.explained, strict=True)))
        return torch.cat(outputs), tuple(torch.cat(parts) for parts in zip(*products, strict=True))
