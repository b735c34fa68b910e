"""Numbers and a stand-in for an autoencoder, for the tests of concepts."""

from __future__ import annotations

import torch
from torch import Tensor


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Identity:
    """Autoencoder whose latents are the channels."""

    def encode(self, activation: Tensor) -> Tensor:
        return activation

    def decode(self, latents: Tensor) -> Tensor:
        return latents
