"""Pixel flipping of texts, and of one of several inputs: against loops that replace what is flipped by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import crp
from crp.composites import AttnLRP
from crp.metrics import pixel_flipping
from crp.outputs import Position

IDS = torch.tensor([[3, 4, 5, 1, 9], [4, 7, 2, 8, 3]])
PAD = 10
OWN = torch.tensor([[0.1, 0.5, -1.0, 0.3, 0.2], [0.0, 0.4, 0.6, -0.2, 0.1]])


class Reader(nn.Module):
    """Token ids, and a factor, to logits of 6 words at each position, or of the whole text."""

    def __init__(self, whole: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.mix, self.out = nn.Embedding(11, 4), nn.Linear(4, 5), nn.Linear(5, 6)
        self.whole = whole
        self.double().eval()

    def forward(self, ids: Tensor, factor: int = 1) -> Tensor:
        hidden = torch.relu(self.mix(self.words(ids).cumsum(1)))
        logits: Tensor = self.out(hidden.mean(1) if self.whole else hidden)
        return logits * factor


def by_hand(score, relevance: Tensor) -> Tensor:
    """Scores of shape (texts, tokens + 1), the most relevant token first."""
    ids, curve = IDS.clone(), [score(IDS)]
    for place in relevance.argsort(dim=1, descending=True, stable=True).T:
        ids[range(2), place] = PAD
        curve.append(score(ids))
    return torch.stack(curve, 1).detach()


@pytest.mark.parametrize("data", [IDS, {"ids": IDS, "factor": 1}], ids=["ids", "dict"])
@pytest.mark.parametrize("method", ["attn_lrp", AttnLRP(), lambda model, inputs, targets: OWN])
def test_tokens_at_a_position(data, method):
    model, why = Reader(whole=False), Position(-1, 2, against=5)
    named = isinstance(method, str | AttnLRP)
    relevance = crp.explain("attn_lrp", model, IDS, why) if named else OWN
    found = pixel_flipping(model, data, why, method, replacement=PAD, score="output", batch_size=4)
    torch.testing.assert_close(found.most, by_hand(lambda ids: model(ids)[:, -1, 2] - model(ids)[:, -1, 5], relevance))
    given = pixel_flipping(model, data, why, relevance=relevance, replacement=PAD, score="output")
    torch.testing.assert_close(given, found)


def test_classes_of_texts():
    model = Reader(whole=True)
    classes = model(IDS).argmax(1)
    relevance = crp.explain("attn_lrp", model, IDS, classes)
    found = pixel_flipping(model, IDS, None, "attn_lrp", replacement=torch.full((5,), PAD))
    torch.testing.assert_close(found.most, by_hand(lambda ids: model(ids).softmax(1)[range(2), classes], relevance))
    nothing = pixel_flipping(model, IDS, None, "attn_lrp").most[:, -1]
    model.words.weight.data[PAD] = 0
    torch.testing.assert_close(nothing, model(torch.full_like(IDS, PAD)).softmax(1)[range(2), classes].detach())


def test_one_of_several_inputs():
    class Scaled(nn.Module):
        def forward(self, vectors: Tensor, power: int, row: Tensor) -> Tensor:
            return vectors**power * row[:, None]

    vectors, row = torch.rand(3, 4).double(), torch.tensor([1, 2, 3])
    found = pixel_flipping(Scaled().eval(), (vectors, 2, row), 0, relevance=vectors, score="output", batch_size=5)
    first = vectors.argsort(dim=1, descending=True, stable=True).argsort(1)[:, :1]
    kept = torch.arange(5) <= first
    torch.testing.assert_close(found.most, torch.where(kept, vectors[:, :1] ** 2 * row[:, None], 0))


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        (Position(-1, 2), {}, "score='softmax' is of classes; that of places in the output is 'output'"),
        (Position(-1, 6), {"score": "output"}, r"is Position\(.*token=6.* has the shape \(5, 6\) for each sample"),
        (Position(-1, 2), {"score": "output", "replacement": 11}, "holds the id 11; layer 'words' has embeddings"),
    ],
)
def test_what_cannot_be_flipped(target, options, message):
    with pytest.raises((ValueError, IndexError), match=message):
        pixel_flipping(Reader(whole=False), IDS, target, "attn_lrp", **options)
