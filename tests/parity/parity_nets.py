"""Networks, data and result helpers that the two sides of the parity tests share; knows neither ``crp``."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Results = dict[str, np.ndarray]

IMAGE = (3, 12, 12)
CLASSES = 5


def seeded(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def images(rows: int, seed: int = 1, shape: tuple[int, ...] = IMAGE) -> Tensor:
    """Inputs as zennit-crp wants them: leaves that require grad."""
    return seeded(rows, *shape, seed=seed).requires_grad_()


def settle(model: nn.Module, seed: int = 0) -> nn.Module:
    """Seeded float64 parameters and batch-norm statistics, in eval mode."""
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor: Tensor, scale: float, shift: float = 0.0) -> None:
        tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * scale + shift)

    model = model.double().eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            draw(module.weight, 0.2, 1.0)
            draw(module.bias, 0.2)
            draw(module.running_mean, 0.2)
            module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)
        elif isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
            draw(module.weight, (2 / module.weight[0].numel()) ** 0.5)
            if module.bias is not None:
                draw(module.bias, 0.1)
    return model


def plain_net(seed: int = 0, activation: type[nn.Module] = nn.ReLU, pool: type[nn.Module] = nn.MaxPool2d) -> nn.Module:
    """Two convolutions and two linear layers, the first followed by batch norm."""
    return settle(
        nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(3, 6, 3, padding=1),
                bn1=nn.BatchNorm2d(6),
                relu1=activation(),
                pool1=nn.AvgPool2d(2),
                conv2=nn.Conv2d(6, 8, 3, padding=1),
                relu2=activation(),
                pool2=pool(2),
                flat=nn.Flatten(),
                fc1=nn.Linear(72, 10),
                relu3=activation(),
                fc2=nn.Linear(10, CLASSES),
            )
        ),
        seed,
    )


def untied_net() -> nn.Module:
    """The same without exact zeros in activations and relevances, which would tie samples."""
    return plain_net(0, nn.LeakyReLU, nn.AvgPool2d)


class ResidualNet(nn.Module):
    """Stem, one residual block with a shortcut, head; every addition is a plain ``+``."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.conv1 = nn.Conv2d(6, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        self.shortcut = nn.Conv2d(6, 6, 1)
        self.act = nn.ReLU()
        self.last = nn.Conv2d(6, 8, 3, padding=1)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        stem = torch.relu(self.stem(x))
        inner = self.conv2(torch.relu(self.conv1(stem)))
        block = torch.relu(inner + 1.5 * self.shortcut(stem))
        return self.head(torch.relu(self.last(block)).mean((2, 3)))


def residual_net() -> nn.Module:
    return settle(ResidualNet(), 3)


class SharedGradient(nn.Module):
    """``a(x) + b(x)``: autograd hands one gradient tensor to both branches."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3)
        self.b = nn.Conv2d(3, 4, 3)
        self.out = nn.Conv2d(4, 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.a(x) + self.b(x)).flatten(1)


def shared_gradient_net() -> nn.Module:
    return settle(SharedGradient(), 4)


class Reused(nn.Module):
    """One convolution that runs twice in a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Conv2d(3, 3, 3, padding=1)
        self.head = nn.Linear(3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.twice(self.twice(x).relu()).relu().mean((2, 3)))


def reused_net() -> nn.Module:
    return settle(Reused(), 5)


def dense_output_net() -> nn.Module:
    """Output of shape (rows, 4, 12, 12), as of a segmentation model."""
    return settle(
        nn.Sequential(
            OrderedDict(conv1=nn.Conv2d(3, 5, 3, padding=1), relu=nn.ReLU(), conv2=nn.Conv2d(5, 4, 3, padding=1))
        ),
        6,
    )


def table_net() -> nn.Module:
    return settle(nn.Sequential(OrderedDict(fc1=nn.Linear(7, 9), relu=nn.ReLU(), fc2=nn.Linear(9, CLASSES))), 7)


def signal_net() -> nn.Module:
    return settle(
        nn.Sequential(
            OrderedDict(
                conv1=nn.Conv1d(2, 5, 3, padding=1),
                relu=nn.ReLU(),
                conv2=nn.Conv1d(5, 4, 3, stride=2),
                relu2=nn.ReLU(),
                flat=nn.Flatten(),
                head=nn.Linear(28, CLASSES),
            )
        ),
        8,
    )


def resnet() -> nn.Module:
    """torchvision's ResNet with one basic block per stage."""
    from torchvision.models.resnet import BasicBlock, ResNet

    return settle(ResNet(BasicBlock, [1, 1, 1, 1], num_classes=CLASSES), 9)


class Images(torch.utils.data.Dataset):
    """Seeded images in [0, 1), more than 40 of them in class 0."""

    def __init__(self, size: int = 90, seed: int = 11) -> None:
        self.data = torch.rand(size, *IMAGE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        numbers = np.random.RandomState(seed).permutation(size)
        self.labels = [int(i // 2 % CLASSES) if i % 2 else 0 for i in numbers]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        return self.data[index].clone(), self.labels[index]


class MultiLabelImages(Images):
    """The same images with two labels each, as a 0/1 vector."""

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        image, label = super().__getitem__(index)
        hot = np.zeros(CLASSES, dtype=np.int64)
        hot[[label, (label + 1 + index % 3) % CLASSES]] = 1
        return image, hot


def normalise(data: Tensor) -> Tensor:
    return (data - 0.5) / 0.25


def array(value: Any) -> np.ndarray:
    return value.detach().cpu().numpy().copy() if isinstance(value, Tensor) else np.array(value)


def flat_attribution(attr: Any, layers: Iterable[str] | None = None, relevances: bool = True) -> Results:
    """All tensors of one `AttributionResults`, by name; ``layers`` limits the recorded ones."""
    found = {"heatmap": attr.heatmap, "prediction": attr.prediction}
    names = list(attr.activations) if layers is None else list(layers)
    found |= {f"activations/{name}": attr.activations[name] for name in names}
    if relevances:
        found |= {f"relevances/{name}": attr.relevances[name] for name in names}
    return {name: array(value) for name, value in found.items()}


def prefixed(**parts: Mapping[str, np.ndarray]) -> Results:
    return {f"{part}/{name}": value for part, results in parts.items() for name, value in results.items()}
