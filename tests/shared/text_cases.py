"""Texts as token ids, a tokenizer of letters, and tiny models that read them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformer_families import built

#: Token that a feature of `Bag` reads.
MARK = 9


class Letters:
    """Tokenizer whose tokens are letters; it knows the fields that those of Hugging Face give."""

    all_special_ids = (0, 1)
    pad_token_id = 0

    def __init__(self, letters: str = "abcdefgh ") -> None:
        self.letters = letters

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        ids = [1, *(2 + self.letters.index(letter) for letter in text)]
        return {"input_ids": ids, "attention_mask": [1] * len(ids)}

    def decode(self, ids: list[int]) -> str:
        return "".join("<>"[token] if token < 2 else self.letters[token - 2] for token in ids)

    def get_vocab(self) -> dict[str, int]:
        return {letter: number for number, letter in enumerate("<>" + self.letters)}


def texts_of_ids(n: int = 14, pad: str = "left", longest: int = 9) -> list[dict[str, Any]]:
    """Dicts as tokenizers give them: ids of random lengths from 2 on, padded to one length, with labels."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for i in range(n):
        length = int(torch.randint(2, longest + 1, (1,), generator=generator))
        ids = torch.randint(3, 11, (length,), generator=generator).tolist()
        empty = [0] * (longest - length if pad != "none" else 0)
        mask = [1] * length
        pair = (empty + ids, empty + mask) if pad == "left" else (ids + empty, mask + empty)
        found.append({"input_ids": pair[0], "attention_mask": pair[1], "label": i % 5})
    return found


def model_of(name: str) -> nn.Module:
    """Tiny model of Hugging Face, in float64."""
    model, _ = built(name)
    inner: nn.Module = model.model
    return inner


class Bag(nn.Module):
    """Sum over the tokens of what each adds to four features. Feature 0 is the mark alone, and speaks for class 0."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.features = nn.ReLU()
        self.pooled = nn.Identity()
        self.out = nn.Linear(4, 3, bias=False)
        with torch.no_grad():
            self.embed.weight.copy_(torch.rand(11, 4, generator=torch.Generator().manual_seed(0)))
            self.embed.weight[:, 0] = 0
            self.embed.weight[MARK] = torch.tensor([3.0, 0, 0, 0])
            self.out.weight.copy_(torch.tensor([[1.0, 0.3, 0.3, 0.3], [0, 1, 0.2, 0.5], [0, 0.2, 1, 0.5]]))
        self.double().eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        found = self.features(self.embed(input_ids))
        kept = found if attention_mask is None else found * attention_mask[..., None]
        result: Tensor = self.out(self.pooled(kept.sum(1)))
        return result
