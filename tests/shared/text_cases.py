"""Texts as token ids, a tokenizer of letters, and tiny models that read them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformer_families import built


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
