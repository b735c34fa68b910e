"""Numbers for the tests of concepts."""

from __future__ import annotations

import torch
from torch import Tensor


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
