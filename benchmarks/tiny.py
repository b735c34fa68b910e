"""Tiny transformers that both sides of a comparison build alike, in float64, in any version of transformers.

It is imported by the peers' process, too, and hence imports nothing of this package.
"""

from __future__ import annotations

import zlib
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

#: Of all language models, and what else a family needs.
_SMALL = {"vocab_size": 11, "num_hidden_layers": 2, "num_attention_heads": 4, "use_cache": False}
_GROUPED = {"hidden_size": 16, "intermediate_size": 24, "num_key_value_heads": 2, "max_position_embeddings": 16}
#: Family, its model, and what its configuration differs in.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", {"n_embd": 16, "n_positions": 16}),
    "llama": ("Llama", {**_GROUPED, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}),
    "qwen2": ("Qwen2", _GROUPED),
}
#: An image model of torchvision.
VIT = "torchvision_vit"


def modeling(family: str) -> ModuleType:
    """Module that defines a family's models."""
    if family == VIT:
        return import_module("torchvision.models.vision_transformer")
    return import_module(f"transformers.models.{family}.modeling_{family}")


class Last(nn.Module):
    """A language model as a function of its input embeddings: logits of the last token."""

    def __init__(self, body: nn.Module, width: int) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(width, 5, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """Shape (batch, tokens, width) to logits of shape (batch, 5)."""
        logits: Tensor = self.head(self.body(inputs_embeds=input).last_hidden_state[:, -1])
        return logits


def build(family: str) -> tuple[nn.Module, Tensor]:
    """Model of a family, with the classes that its module has at the moment, and data for it."""
    module = modeling(family)
    if family == VIT:
        sizes = {"image_size": 8, "patch_size": 4, "num_layers": 2, "num_heads": 2, "hidden_dim": 8, "mlp_dim": 12}
        model, shape = module.VisionTransformer(**sizes, num_classes=5), (1, 3, 8, 8)
    else:
        name, own = FAMILIES[family]
        config = getattr(import_module("transformers"), f"{name}Config")(**_SMALL, **own)
        model, shape = Last(getattr(module, f"{name}Model")(config), 16), (1, 6, 16)
    model = model.double().eval().requires_grad_(False)
    for key, parameter in model.named_parameters():
        scale = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.2
        parameter.copy_(_numbers(key, parameter.shape) * scale + (parameter.dim() == 1 and "bias" not in key) * 0.5)
    return model, _numbers("data", torch.Size(shape))


def _numbers(name: str, shape: torch.Size) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator, dtype=torch.float64)
