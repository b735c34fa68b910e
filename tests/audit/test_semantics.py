"""Scores of meaning against closed forms, with an embedding that is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from feature_net import mined

from crp.audit import clarity, embed_references, polysemanticity, redundancy, search

RNG = np.random.default_rng(0)


def cosines(vectors: np.ndarray) -> np.ndarray:
    unit = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    return unit @ unit.T


@pytest.mark.parametrize("n", [2, 5, 16])
def test_clarity_is_the_mean_cosine_of_pairs(n):
    embeddings = RNG.normal(size=(4, n, 7))
    wanted = [(cosines(vectors).sum() - n) / (n * (n - 1)) for vectors in embeddings]
    assert np.allclose(clarity(embeddings), wanted, atol=1e-12)
    assert np.allclose(clarity(np.ones((1, n, 3))), 1)
    assert np.allclose(clarity(torch.eye(n)[None]), 0, atol=1e-12)


def test_redundancy_is_the_largest_cosine():
    embeddings = RNG.normal(size=(6, 3, 5))
    similarity = cosines(embeddings.mean(1)) - 3 * np.eye(6)
    assert np.allclose(redundancy(embeddings), similarity.max(1), atol=1e-12)
    assert np.allclose(redundancy(np.eye(3)[:, None]), 0, atol=1e-12)
    assert np.allclose(redundancy(np.stack([embeddings[0]] * 2)), 1)


@pytest.mark.parametrize("angle", [0.0, 30.0, 90.0, 180.0])
def test_polysemanticity_of_two_meanings(angle):
    """Half of the references in one direction, half in another: 1 - cos of the angle."""
    radians = np.deg2rad(angle)
    one, two = np.array([1.0, 0, 0]), np.array([np.cos(radians), np.sin(radians), 0])
    embeddings = np.stack([one] * 4 + [two] * 4)[None]
    assert polysemanticity(embeddings) == pytest.approx([1 - np.cos(radians)], abs=1e-9)
    assert polysemanticity(embeddings, 3) == pytest.approx([1 - np.cos(radians)], abs=1e-9)


@pytest.mark.parametrize("n_meanings", [1, 0, -1, True, 2.5])
def test_numbers_of_meanings_that_are_none_are_refused(n_meanings):
    with pytest.raises(ValueError, match=r"^n_meanings must be a whole number of at least 2"):
        polysemanticity(np.eye(3)[None], n_meanings)


def test_search():
    embeddings = np.repeat(np.eye(4)[:, None], 3, 1)
    found = search(embeddings, [0.1, 0.9, 0.0, 0.2])
    assert found.concept.tolist() == [1, 3, 0, 2]
    assert np.allclose(found.similarity, np.array([0.9, 0.2, 0.1, 0]) / np.sqrt(0.86))
    less = search(embeddings, [0.1, 0.9, 0.0, 0.2], background=[0, 1, 0, 0.0])
    assert less.concept.tolist() == [3, 0, 2, 1]


def test_references_of_concepts(tmp_path):
    fv = mined(tmp_path)
    found = embed_references(fv, "second", [0, 3], lambda samples: samples.flatten(1)[:, :4], n=5)
    assert found.shape == (2, 5, 4)
    wanted = fv.get_max_reference(3, "second", "relevance", (0, 5))[3]
    assert np.allclose(found[1], wanted.flatten(1)[:, :4])
    again = embed_references(fv, "second", [3, 0, 3], lambda samples: samples.flatten(1)[:, :4], n=5)
    assert np.array_equal(again, found[[1, 0, 1]])
    with pytest.raises(ValueError, match=r"embed gives \(5, 1, 6, 6\) for 5 samples; it must be \(samples, features\)"):
        embed_references(fv, "second", [0], lambda samples: samples, n=5)
    with pytest.raises(TypeError, match="embed must be a function of samples"):
        embed_references(fv, "second", [0], "clip", n=5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: clarity(np.ones((2, 1, 3))), "clarity needs two references of each concept"),
        (lambda: redundancy(np.ones((1, 2, 3))), "redundancy needs two concepts"),
        (lambda: clarity(np.ones((2, 3))), r"embeddings must be of shape \(concepts, n, features\), not \(2, 3\)"),
        (lambda: clarity(np.zeros((1, 2, 3))), "an embedding is 0"),
        (lambda: clarity(np.full((1, 2, 3), np.inf)), "embeddings must be finite"),
        (lambda: search(np.ones((1, 2, 3)), [1, np.nan, 0]), "a text's embedding must be finite"),
        (lambda: search(np.ones((1, 2, 3)), [1, 2]), "the text's embedding has 2 features; the concepts' have 3"),
    ],
    ids=range(7),
)
def test_what_is_wrong_is_said(call, message):
    with pytest.raises(ValueError, match=message):
        call()
