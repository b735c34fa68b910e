"""Small seeded nets in float64, and what every room asserts: that a model is left as it was."""

from __future__ import annotations

import os

os.environ.setdefault("MPLBACKEND", "Agg")

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from covering import mark_the_rest_slow
from model_state import state_of
from suite_cost import collected_untraced, keep_out_of_garbage, kept_out_of_garbage, traced_at_first
from torch import Tensor, nn
from versions import skip_what_is_newer

# Nets this small gain nothing from threads, and lose much where the machine is busy.
torch.set_num_threads(1)


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Iterator[None]:
    with kept_out_of_garbage(), collected_untraced(session):
        return (yield)


@pytest.hookimpl(tryfirst=True)  # before pytest deselects by mark
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark_the_rest_slow(items)
    skip_what_is_newer(items)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    with traced_at_first(item):
        result = yield
    if nextitem is not None and nextitem.path != item.path:
        keep_out_of_garbage()
    return result


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two to four processes for the whole suite, none for a few files, whose start would take longer than they do."""
    is_whole = config.args == config.getini("testpaths")
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 4) * is_whole


@pytest.fixture(autouse=True)
def _seeded() -> None:
    # (`torch.manual_seed` notes its caller for every kind of accelerator, which takes longer than many a test.)
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(0)


def _ready(model: nn.Module, seed: int) -> nn.Module:
    """Model in float64 and evaluation mode, with seeded parameters and batch-norm statistics that are not trivial."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.5 if parameter.dim() == 1 else parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * scale)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
                module.running_mean.normal_(generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
                module.weight.uniform_(0.5, 1.5, generator=generator)
    return model


class Block(nn.Module):
    """Residual block as torchvision writes it: one in-place ReLU, called twice."""

    def __init__(self, channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = None
        if stride > 1 or channels != width:
            self.downsample = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    """Stem, a plain residual block, one with a projection, pooling and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = Block(6, 6)
        self.layer2 = Block(6, 8, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer2(self.layer1(x))
        return self.fc(torch.flatten(self.avgpool(x), 1))


@pytest.fixture
def vgg_bn() -> nn.Module:
    """Plain net with batch norm: (n, 3, 16, 16) -> (n, 5); convolutions are ``features.0``, ``.3``, ``.7``."""
    features = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
    )
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(8 * 16, 10), nn.ReLU(), nn.Dropout(), nn.Linear(10, 5))
    model = nn.Sequential()
    model.add_module("features", features)
    model.add_module("classifier", classifier)
    return _ready(model, seed=1)


@pytest.fixture
def resnet() -> nn.Module:
    """Residual net with batch norm: (n, 3, 16, 16) -> (n, 5); blocks are ``layer1`` and ``layer2``."""
    return _ready(ResNet(), seed=2)


@pytest.fixture
def mlp() -> nn.Module:
    """Linear layers and ReLUs: (n, 6) -> (n, 4); linear layers are ``0``, ``2``, ``4``."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    return _ready(model, seed=3)


@pytest.fixture
def images() -> Tensor:
    """Tensor of shape (4, 3, 16, 16)."""
    return torch.randn(4, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


@pytest.fixture
def vectors() -> Tensor:
    """Tensor of shape (4, 6)."""
    return torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def model_state() -> Callable[[nn.Module], dict[str, Any]]:
    """Snapshot of values, flags, hooks and attributes of a model: equal snapshots, untouched model."""
    return state_of


@pytest.fixture
def untouched() -> Callable[[nn.Module], AbstractContextManager[None]]:
    """``with untouched(model): ...`` fails if the model differs afterwards, also where the block raised."""

    @contextmanager
    def check(model: nn.Module) -> Iterator[None]:
        before = state_of(model)
        try:
            yield
        finally:
            after = state_of(model)
            changed = [key for key in {**before, **after} if before.get(key) != after.get(key)]
            assert not changed, f"the model was changed: {changed}"

    return check
