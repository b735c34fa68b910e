"""Numbers and a stand-in for an autoencoder, for the tests of concepts."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Identity:
    """Autoencoder whose latents are the channels."""

    def encode(self, activation: Tensor) -> Tensor:
        return activation

    def decode(self, latents: Tensor) -> Tensor:
        return latents


class Autoencoder(nn.Module):
    """Sparse autoencoder with biases, and ``width`` latents for each channel; it keeps the ``top`` ones if told."""

    def __init__(self, channels: int, width: int, top: int | None = None) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(channels, width * channels), nn.Linear(width * channels, channels)
        self.top = top

    def encode(self, activation: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        latents = self.encoder(activation - self.decoder.bias).relu()
        if self.top is None:
            return latents
        least = latents.topk(self.top, -1).values[..., -1:]
        return torch.where(latents >= least, latents, 0), least

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder(latents)
