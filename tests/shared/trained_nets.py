"""Trained nets and images, which are no part of the project: in ``CRP_TEST_DATA``, or ``shared/data`` beside it."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

DATA = Path(os.environ.get("CRP_TEST_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
MEAN, STD = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def found(name: str) -> Path:
    """Path of a file; the test is skipped where there is none."""
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{name} is neither in CRP_TEST_DATA nor in shared/data beside the repository")
    return path


def loaded(module: str, *args: Any) -> nn.Module:
    """Net of one of the folder's modules."""
    spec = importlib.util.spec_from_file_location(module, found(f"{module}.py"))
    assert spec is not None and spec.loader is not None
    namespace = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(namespace)
    return namespace.load(found(args[0]), *args[1:]).eval()


def cifar_net() -> nn.Module:
    """ResNet-20 of CIFAR-10; it takes normalised images."""
    return loaded("cifar_resnet", "resnet20-12fca82f.th", 20)


def cifar_images() -> tuple[Tensor, Tensor]:
    """500 test images of shape (3, 32, 32) in 0..1, and their labels."""
    with np.load(found("cifar10_test500.npz")) as arrays:
        pixels, labels = torch.tensor(arrays["images"]), torch.tensor(arrays["labels"])
    return pixels.permute(0, 3, 1, 2).float() / 255, labels.long()
