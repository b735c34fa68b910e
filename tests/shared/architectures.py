"""Every classification family of torchvision, small, in float64, with random weights and statistics."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torchvision
from torch import Tensor, nn


@dataclass(frozen=True)
class Family:
    """A classifier of torchvision.

    Attributes
    ----------
    name : str
        Its function in `torchvision.models`.
    size : int
        Height and width of the smallest input, or nearly so.
    middle : str
        Layer near the middle through which everything flows.
    conserves : bool
        Whether z+ keeps the relevance if biases count as zero: nearly every output of a convolution has positive
        contributions (not so in depthwise ones), the model adds no constants, and all batch norms are merged (in
        DenseNet, some meet inputs of exactly 0, which their bias makes positive).
    keywords : dict
        For the function.
    """

    name: str
    size: int
    middle: str
    conserves: bool = True
    keywords: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join([self.name, *(k for k, v in self.keywords.items() if v is True)])

    @property
    def make(self) -> Callable[..., nn.Module]:
        """The function itself."""
        return getattr(torchvision.models, self.name)

    def build(self, seed: int = 0, narrow: bool = True) -> nn.Module:
        """Model in float64 and evaluation mode.

        Parameters
        ----------
        seed : int
        narrow : bool
            Whether hidden dense layers of AlexNet and VGG have 64 units; they have 100 million weights otherwise.
        """
        # Torchvision's own initialization takes longer than everything else. (RegNet computes its widths in tensors.)
        with torch.device("cpu" if self.name.startswith("regnet") else "meta"):
            model = self.make(weights=None, **self.keywords)
            if narrow and self.name.startswith(("alexnet", "vgg")):
                _narrow(model.classifier, 64)
        model = model.double()
        return randomized(model if self.name.startswith("regnet") else model.to_empty(device="cpu"), seed).eval()

    def images(self, n: int = 1, size: int | None = None) -> Tensor:
        """Tensor of shape (n, 3, size, size), within -3 and 3."""
        generator = torch.Generator().manual_seed(len(self.name))
        size = size or self.size
        return torch.randn(n, 3, size, size, dtype=torch.float64, generator=generator).clamp(-3, 3)


FAMILIES = [
    Family("alexnet", 63, "features.6"),
    Family("vgg11", 32, "features.8"),
    Family("vgg11_bn", 32, "features.11"),
    Family("resnet18", 32, "layer2"),
    Family("resnet50", 32, "layer2"),
    Family("resnext50_32x4d", 32, "layer2", conserves=False),
    Family("squeezenet1_0", 21, "features.7"),
    Family("squeezenet1_1", 17, "features.7"),
    Family("densenet121", 32, "features.transition2", conserves=False),
    Family("googlenet", 32, "inception4a", keywords={"init_weights": False}),
    Family("googlenet", 32, "inception4a", False, keywords={"init_weights": False, "transform_input": True}),
    Family("inception_v3", 75, "Mixed_6a", keywords={"init_weights": False}),
    Family("shufflenet_v2_x0_5", 32, "stage3", conserves=False),
    Family("mobilenet_v2", 32, "features.7", conserves=False),
    Family("mobilenet_v3_small", 32, "features.5", conserves=False),
    Family("mobilenet_v3_large", 32, "features.8", conserves=False),
    Family("mnasnet0_5", 32, "layers.10", conserves=False),
    Family("efficientnet_b0", 32, "features.4", conserves=False),
    Family("efficientnet_v2_s", 32, "features.4", conserves=False),
    Family("regnet_x_400mf", 32, "trunk_output.block3"),
    Family("regnet_y_400mf", 32, "trunk_output.block3", conserves=False),
    Family("convnext_tiny", 32, "features.3", conserves=False),
]


def randomized(model: nn.Module, seed: int) -> nn.Module:
    """Model with seeded parameters that keep activations in scale, and statistics that are not trivial."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.dim() > 1 and name == "weight":
                    bound = math.sqrt(6 / parameter[0].numel())
                    parameter.uniform_(-bound, bound, generator=generator)
                elif name == "bias":
                    parameter.uniform_(-0.1, 0.1, generator=generator)
                elif name == "layer_scale":
                    parameter.uniform_(0.01, 0.1, generator=generator)
                else:
                    parameter.uniform_(0.5, 1.0, generator=generator)
            if getattr(module, "running_mean", None) is not None:
                module.running_mean.uniform_(-0.1, 0.1, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
                if getattr(module, "num_batches_tracked", None) is not None:
                    module.num_batches_tracked.zero_()
    return model


def _narrow(classifier: nn.Sequential, width: int) -> None:
    for i, layer in enumerate(classifier):
        if isinstance(layer, nn.Linear):
            inputs = layer.in_features if i < 2 else width
            outputs = layer.out_features if layer.out_features == 1000 else width
            classifier[i] = nn.Linear(inputs, outputs)
