"""Texts that are explained by name: token ids as baselines, and numbers that are positions and no classes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from preset_cases import off, seeded
from torch import Tensor, nn
from transformer_families import built

import crp
from crp.attribution import CondAttribution
from crp.composites import EpsilonPlus
from crp.outputs import Position

IDS = torch.tensor([[3, 4, 5, 1, 9, 2], [4, 4, 7, 8, 3, 3]])
PADDED = torch.zeros_like(IDS)


class Reader(nn.Module):
    """Tokens in their order, (n, 6) -> (n, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.mix, self.out = nn.Embedding(11, 4), nn.Linear(24, 5), nn.Linear(5, 3)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.out(torch.relu(self.mix(self.words(ids).flatten(1))))
        return logits


@pytest.mark.parametrize(
    "pad", [0, np.int64(0), torch.tensor(0), torch.zeros(6, dtype=torch.int32), torch.zeros_like(IDS).numpy()]
)
def test_ids_are_a_baseline_in_place_of_their_embeddings(pad):
    model = seeded(Reader())
    drop = (model(IDS) - model(PADDED))[:, 1].detach()
    values = model.words.weight[0].detach()[:, None].expand(4, 6)
    assert off(crp.explain("shapley_sampling", model, IDS, 1, baseline=pad).sum(1), drop) <= 1e-10
    assert off(crp.explain("deeplift", model, IDS, 1, baseline=pad).sum(1), drop) <= 1e-10
    by_ids, by_values = (crp.explain("intgrad", model, {"ids": IDS}, 1, baseline={"ids": b}) for b in (pad, values))
    assert torch.equal(by_ids, by_values)
    covered = torch.where(torch.arange(6) == 2, PADDED, IDS)
    of_third = crp.explain("occlusion", model, IDS, 1, window_shape=1, baseline=pad)[:, 2]
    assert off(of_third, (model(IDS) - model(covered))[:, 1].detach()) <= 1e-10


@pytest.mark.parametrize(
    ("pad", "message"),
    [(11, "holds the id 11"), (torch.zeros(5).long(), r"shape \(5,\) for token ids of shape \(2, 6\)")],
)
def test_ids_that_are_no_baseline(pad, message):
    with pytest.raises((ValueError, IndexError), match=message):
        crp.explain("intgrad", seeded(Reader()), IDS, 1, baseline=pad)


def test_a_number_that_is_a_position_and_no_class():
    model = seeded(nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 3)))
    message = r"target 3 is a position of the text, as the output is of shape \(6, 3\) for each, and all of its 3 sc"
    with pytest.warns(UserWarning, match=message):
        CondAttribution(model)(IDS, [{"y": 3}], EpsilonPlus())
    for output in (None, lambda returned: returned):
        with pytest.warns(UserWarning, match=message):
            crp.explain("gradient", model, IDS, 3, output=output)
    beyond = r"outputs 0 to 5, the first axis of \(6, 3\) for each sample; Position\(5, token\) is a token"
    for explain in (
        lambda y: CondAttribution(model)(IDS, [{"y": y}]),
        lambda y: crp.explain("gradient", model, IDS, y),
    ):
        explain(Position(3, 1))
        with pytest.raises(IndexError, match=beyond):
            explain(7)


@pytest.mark.parametrize("name", ["gpt2", "bert", "llama"])
@pytest.mark.parametrize("form", [lambda ids: ids, lambda ids: {"input_ids": ids, "attention_mask": ids > 0}])
def test_a_text_without_the_axis_of_samples(name, form):
    model = built(name)[0].model
    with pytest.raises(
        ValueError, match=r"ids of shape \(6,\), which are one for each sample: give ids\[None\] for a si"
    ):
        crp.explain("attn_lrp", model, form(IDS[0]), Position(-1, 1))
    single = crp.explain("attn_lrp", nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 3)).eval(), IDS[0], 1)
    assert single.shape == (6,)
