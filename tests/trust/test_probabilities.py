"""Outputs of a model that ends in a softmax are probabilities, and are not taken for scores of one."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from trust_cases import images, net

from crp.attributors import MeaningfulPerturbation, Occlusion
from crp.attributors.scores import score_of
from crp.attributors.target import Classes
from crp.engine.probabilities import are_shares, log_probabilities, probabilities
from crp.metrics import pixel_flipping


@pytest.mark.promise(
    "Results",
    "Outputs that are probabilities are not taken for scores of a softmax; a single output gets a sigmoid",
)
def test_probabilities():
    scores = torch.randn(5, 4, dtype=torch.float64)
    shares = scores.softmax(1)
    assert not are_shares(scores) and are_shares(shares) and are_shares(shares.float())
    for output in (scores, shares):
        assert torch.allclose(probabilities(output), shares)
        assert torch.allclose(log_probabilities(output), shares.log())
    assert torch.allclose(probabilities(scores[:, :1]), scores[:, :1].sigmoid())
    assert torch.allclose(log_probabilities(scores[:, :1]), scores[:, :1].sigmoid().log())
    zero = torch.tensor([[1.0, 0.0]])
    assert torch.isfinite(log_probabilities(zero)).all()


@pytest.mark.parametrize("score", ["softmax", "log_softmax"])
def test_score_of_a_model_that_ends_in_a_softmax(score):
    scores = torch.randn(5, 4)
    target = Classes([0, 1, 2, 3, 0])
    wanted = score_of(scores, target, score)
    assert torch.allclose(score_of(scores.softmax(1), target, score), wanted, atol=1e-6)
    assert torch.equal(score_of(scores, target, "output"), scores.gather(1, target.ids[:, None])[:, 0])


@pytest.mark.parametrize("batch_size", [1, 3, 256])
def test_scores_that_look_like_probabilities_by_chance_are_scores(batch_size):
    """What a model makes of an empty input may be shares, where its biases are: the other inputs tell what it gives."""
    model, x = nn.Linear(4, 2).double().eval(), torch.randn(2, 4, dtype=torch.float64)
    model.bias.data = torch.tensor([0.2, 0.8], dtype=torch.float64)
    found = pixel_flipping(model, x, 0, relevance=x, batch_size=batch_size)
    assert torch.allclose(found.most[:, -1], model.bias.softmax(0)[:1], atol=1e-12)
    games = {"mask_size": None, "mask_blur": 0.0, "jitter": 1, "background": 0.0, "steps": 1}
    flat = nn.Sequential(nn.Flatten(), model).eval()
    assert torch.allclose(MeaningfulPerturbation(flat, **games)(x.view(2, 1, 2, 2), 0).limits[:, 1], found.most[:, -1])


@pytest.mark.promise("Results", "Pixel flipping does not depend on whether the model ends in its softmax")
def test_pixel_flipping_does_not_depend_on_where_the_softmax_is():
    model = net()
    ends = nn.Sequential(model, nn.Softmax(1)).eval()
    relevance = Occlusion(model, window_shape=2, step=2)(images(), 1)[1].sum(1)
    first, second = (pixel_flipping(one, images(), 1, relevance=relevance) for one in (model, ends))
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(first, second, strict=True))
