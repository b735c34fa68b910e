"""Nets, data and presets that both sides of a comparison build alike, from the same seeds.

It is imported by the peers' process, too, and hence imports nothing of this package.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision.models as vision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from zennit.layer import Sum

DEMO = Path(__file__).resolve().parents[1] / "crp" / "demo" / "net.py"
#: Keywords of the presets, which have the same names here and in zennit.
PRESETS: dict[str, dict[str, Any]] = {
    "EpsilonPlusFlat": {},
    "EpsilonGammaBox": {"low": -3.0, "high": 3.0},
    "EpsilonAlpha2Beta1Flat": {},
    "EpsilonPlus": {},
}


class ForkNet(nn.Module):
    """Small net for 28x28 grey images: two convolutions beside a wide one, added by zennit's `Sum`, and two layers.

    It has the sizes of the net for Fashion-MNIST in zennit-crp's tests.
    """

    LAYERS = ("conv1", "conv2", "parallel.0", "linear1")

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu1 = nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU()
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, stride=2), nn.BatchNorm2d(16)
        self.parallel = nn.Sequential(nn.Conv2d(1, 16, 5, stride=2, bias=False), nn.BatchNorm2d(16))
        self.sum, self.relu2, self.pool, self.flatten = Sum(), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()
        self.linear1, self.relu3, self.linear2 = nn.Linear(576, 120), nn.ReLU(), nn.Linear(120, 10)

    def forward(self, input: Tensor) -> Tensor:
        """Shape (batch, 1, 28, 28) to logits of shape (batch, 10)."""
        straight = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(input)))))
        joined = self.sum(torch.stack([self.parallel(input), straight], dim=-1))
        hidden = self.relu3(self.linear1(self.flatten(self.pool(self.relu2(joined)))))
        output: Tensor = self.linear2(hidden)
        return output


class Gpt2(nn.Module):
    """GPT-2 of Hugging Face with random weights, as a function of its input embeddings: logits of the last token.

    Parameters
    ----------
    layers, width : int
    checkpointed : bool
        Whether every block keeps its input only, and runs again in the backward pass.
    positions : int
        Tokens that it takes at most.
    """

    def __init__(self, layers: int, width: int, checkpointed: bool = False, positions: int = 1024) -> None:
        super().__init__()
        transformers = importlib.import_module("transformers")
        config = transformers.GPT2Config(
            n_layer=layers, n_embd=width, n_head=width // 64, vocab_size=1000, n_positions=positions, use_cache=False
        )
        self.body, self.head = transformers.GPT2Model(config), nn.Linear(width, 1000, bias=False)
        for block in self.body.h if checkpointed else ():
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)

    def forward(self, input: Tensor) -> Tensor:
        """Shape (batch, tokens, width) to logits of shape (batch, 1000)."""
        logits: Tensor = self.head(self.body(inputs_embeds=input).last_hidden_state[:, -1])
        return logits


@lru_cache(maxsize=1)
def _demo() -> Any:
    """Module of the demo's net, read from its file, since the peers' process must not import its package."""
    spec = importlib.util.spec_from_file_location("demo_net", DEMO)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


NETS: dict[str, Callable[[], nn.Module]] = {
    "vgg16_bn": vision.vgg16_bn,
    "vgg16_bn, 100 classes": lambda: vision.vgg16_bn(num_classes=100),
    "vgg16": vision.vgg16,
    "resnet18": vision.resnet18,
    "resnet50": vision.resnet50,
    "densenet121": vision.densenet121,
    "mobilenet_v2": vision.mobilenet_v2,
    "efficientnet_b0": vision.efficientnet_b0,
    "fork": ForkNet,
    "demo": lambda: _demo().DigitNet(),
    "gpt2 4×256": partial(Gpt2, 4, 256),
    "gpt2 4×256 checkpointed": partial(Gpt2, 4, 256, checkpointed=True),
    "gpt2 12×768": partial(Gpt2, 12, 768),
    "gpt2 12×768, long": partial(Gpt2, 12, 768, positions=4096),
    "gpt2 12×768 checkpointed": partial(Gpt2, 12, 768, checkpointed=True),
}
#: Nets of images of one channel.
GREY = {"fork", "demo"}


class Setup(NamedTuple):
    """A net and its input; the size is that of an image, or the number of tokens of a text."""

    net: str
    size: int
    batch: int
    device: str = "cpu"

    def __str__(self) -> str:
        size = f"{self.size} tokens" if self.net.startswith("gpt2") else f"{self.size}×{self.size}"
        return f"{self.net} {size} batch {self.batch}"

    def build(self) -> tuple[nn.Module, Tensor]:
        """Net in eval mode, its parameters without gradient, and data.

        Of shape (batch, channels, size, size), or embeddings of tokens, (batch, size, width).
        """
        # (For a GPU, drawing the weights takes longer than what is measured; on a CPU, memory is what it is without.)
        model, state = _drawn(self.net) if self.device == "cpu" else _drawn_before(self.net)
        torch.set_rng_state(state)
        if isinstance(model, Gpt2):
            data = torch.randn(self.batch, self.size, model.head.in_features)
        else:
            data = pixels((self.batch, 1 if self.net in GREY else 3, self.size, self.size))
        return (model if self.device == "cpu" else copy.deepcopy(model)).to(self.device), data.to(self.device)


def _drawn(net: str) -> tuple[nn.Module, Tensor]:
    """Net with seeded weights and statistics, and torch's random state after it was drawn."""
    torch.manual_seed(0)
    model = NETS[net]().eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            randomize(module)
    return model, torch.get_rng_state()


_drawn_before = lru_cache(maxsize=2)(_drawn)


def pixels(shape: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
    """Noise of shape (batch, channels, ...): grey images from 0 to 1, colours as they are after normalisation."""
    draw = torch.rand if shape[1] == 1 else torch.randn
    return draw(shape, generator=generator)


def randomize(norm: nn.BatchNorm2d) -> None:
    """Fill the statistics and parameters of batch norm as if it were trained."""
    assert norm.running_mean is not None and norm.running_var is not None
    with torch.no_grad():
        norm.running_mean.normal_(0.0, 0.1)
        norm.running_var.uniform_(0.5, 1.5)
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_(0.0, 0.1)


def convolutions(model: nn.Module) -> list[str]:
    """Names of all convolutions."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]


class Samples:
    """Dataset of noise with random labels.

    Parameters
    ----------
    n : int
    shape : tuple of int
    classes : int
        Labels are below it; samples do not depend on it.
    kept : int
        Images that there are; after these, they come again.
    """

    def __init__(self, n: int, shape: tuple[int, ...], classes: int, kept: int = 512) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = pixels((min(n, kept), *shape), generator)
        self.labels: list[int] = torch.randint(0, classes, (n,), generator=generator).tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index % len(self.images)], self.labels[index]


def gradient(model: Callable[[Tensor], Tensor], data: Tensor, target: int = 0) -> Tensor:
    """Gradient of a logit by the data: the unit of every ratio."""
    leaf = data.detach().clone().requires_grad_()
    # (torch's counter of operations does not take `torch.autograd.grad` of a leaf)
    torch.autograd.backward(model(leaf)[:, target].sum())
    assert leaf.grad is not None
    return leaf.grad
