"""Outputs of a model that ends in a softmax are probabilities, and are not taken for scores of one."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from trust_cases import images, net

from crp.attributors import Occlusion
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


@pytest.mark.promise("Results", "Pixel flipping does not depend on whether the model ends in its softmax")
def test_pixel_flipping_does_not_depend_on_where_the_softmax_is():
    model = net()
    ends = nn.Sequential(model, nn.Softmax(1)).eval()
    relevance = Occlusion(model, window_shape=2, step=2)(images(), 1)[1].sum(1)
    first, second = (pixel_flipping(one, images(), 1, relevance=relevance) for one in (model, ends))
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(first, second, strict=True))
