"""Directions found in collected vectors, each against a closed form."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch

from crp.concepts import DirectionConcept, Directions, SubspaceConcept, directions

RNG = np.random.default_rng(0)
BASIS = np.linalg.qr(RNG.normal(size=(6, 6)))[0].T


def aligned(found: np.ndarray, wanted: np.ndarray, tolerance: float = 1e-9) -> bool:
    """Whether rows are the same but for their signs."""
    return bool((np.abs((found * wanted).sum(1)) - np.linalg.norm(found, axis=1) > -tolerance).all())


def two_groups(n: int = 400) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vectors, labels, and the difference of the means that the vectors have exactly."""
    noise = np.random.default_rng(1).normal(size=(n, 6))
    labels = np.arange(n) % 4 == 0
    for kind in (True, False):
        noise[labels == kind] -= noise[labels == kind].mean(0)
    difference = np.array([1.0, -2.0, 0.0, 0.5, 0.0, 3.0])
    return noise + labels[:, None] * difference, labels, difference


def test_principal_components():
    a = RNG.normal(size=(300, 6)) * [5, 4, 3, 2, 1, 0.5] @ BASIS
    found = directions.pca(a, 3)
    values, vectors = np.linalg.eigh(np.cov(a.T))
    assert aligned(found.directions, vectors.T[::-1][:3])
    assert np.allclose(found.quality["variance"], values[::-1][:3] / values.sum(), rtol=1e-9)
    assert found.dual is found.directions
    assert isinstance(found.concept(), DirectionConcept)


def test_principal_relevant_components():
    """Eigenvalues are the mean relevance of the directions, which for all of them adds up to that of the vectors."""
    a, m = RNG.normal(size=(200, 6)), RNG.normal(size=(200, 6))
    found = directions.prca(a, m, 6)
    relevance = ((a @ found.directions.T) * (m @ found.directions.T)).mean(0)
    assert np.allclose(found.quality["relevance"], relevance, atol=1e-12)
    assert np.isclose(relevance.sum(), (a * m).sum(1).mean(), rtol=1e-10)
    values, vectors = np.linalg.eigh((a.T @ m + m.T @ a) / (2 * len(a)))
    assert np.allclose(found.quality["relevance"], values[::-1], atol=1e-12)
    assert aligned(found.directions, vectors.T[::-1])
    assert np.allclose(found.explained(a, m).sum(), 1, rtol=1e-10)
    turned = np.linalg.qr(RNG.normal(size=(6, 6)))[0]
    for k in range(1, 6):  # no other directions have more relevance in sum
        assert relevance[:k].sum() >= ((a @ turned[:, :k]) * (m @ turned[:, :k])).mean(0).sum()


def test_factors_without_negative_entries():
    """Parts that share no channel are found as they are."""
    parts = np.array([[1.0, 2, 0, 0, 0, 0], [0, 0, 3, 1, 0, 0], [0, 0, 0, 0, 1, 1]])
    parts /= np.linalg.norm(parts, axis=1, keepdims=True)
    weights = RNG.uniform(0, 1, (50, 3)) * (RNG.uniform(size=(50, 3)) > 0.3)
    found = directions.nmf(weights @ parts, 3)
    order = found.directions[:, [0, 2, 4]].argmax(1)
    assert sorted(order) == [0, 1, 2]
    assert np.abs(found.directions - parts[order]).max() < 1e-6
    assert found.quality["error"] < 1e-9
    assert np.allclose(found.dual @ found.directions.T, np.eye(3), atol=1e-12)
    with pytest.raises(ValueError, match="activations must not be negative, as after a ReLU; the least is -0"):
        directions.nmf(-parts, 2)


def test_pattern_is_the_difference_of_the_means():
    a, labels, difference = two_groups()
    found = directions.cav(a, labels)
    assert np.allclose(found.directions[0] * found.quality["norm"], difference, atol=1e-12)
    assert found.quality["cosine"] == pytest.approx(1, abs=1e-12)
    assert directions.tcav(found.directions, difference[None].repeat(3, 0)) == 1


@pytest.mark.parametrize("method", ["ridge", "svm"])
def test_classifiers_turn_away_from_what_disturbs(method):
    """Noise that is shared by two channels: the filter subtracts one from the other, the pattern does not."""
    a, labels, _ = two_groups()
    shared = np.random.default_rng(2).normal(size=(len(a), 1)) * 20
    a = a * [1, 0, 0, 0, 0, 0] + shared * [1, 1, 0, 0, 0, 0]
    pattern, found = directions.cav(a, labels), directions.cav(a, labels, method)
    assert abs(found.directions[0, 1] / found.directions[0, 0] + 1) < 0.1
    assert found.quality["auc"] > pattern.quality["auc"]
    assert found.quality["cosine"] < 1


def test_ridge_is_least_squares():
    a, labels, _ = two_groups()
    weight = np.where(labels, len(a) / (2 * labels.sum()), len(a) / (2 * (~labels).sum()))
    t = np.where(labels, 1.0, -1.0)
    centred, target = a - np.average(a, 0, weight), t - np.average(t, weights=weight)
    wanted = np.linalg.solve((centred.T * weight) @ centred + np.eye(6), (centred.T * weight) @ target)
    assert np.allclose(directions.cav(a, labels, "ridge").directions[0], wanted / np.linalg.norm(wanted), atol=1e-9)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_share_of_growing_outputs(share):
    gradients = np.ones((4, 2, 3)) * np.array([1.0] * int(4 * share) + [-1.0] * int(4 - 4 * share))[:, None, None]
    assert directions.tcav([1.0, 0.0], gradients) == share
    with pytest.raises(ValueError, match=r"gradients are of shape \(4, 2, 3\); the direction has 3 channels"):
        directions.tcav([1.0, 0.0, 0.0], gradients)


@pytest.mark.parametrize(("n", "dimension"), [(3, 1), (3, 2), (2, 3)])
def test_relevant_subspaces(n, dimension):
    """Samples whose relevance lies in one of n blocks each: the blocks are found, and no other."""
    rng = np.random.default_rng(3)
    blocks = BASIS[: n * dimension].reshape(n, dimension, 6)
    which = rng.integers(0, n, 300)
    weights = rng.normal(size=(300, dimension))
    a = np.einsum("sd,sdc->sc", weights, blocks[which])
    found = directions.drsa(a, a, n, dimension, restarts=20)
    assert np.abs(found.directions @ found.directions.T - np.eye(n * dimension)).max() < 1e-12
    projections = [block.T @ block for block in found.directions.reshape(n, dimension, 6)]
    wanted = [block.T @ block for block in blocks]
    assert all(min(np.abs(one - other).max() for other in wanted) < 1e-6 for one in projections)
    assert np.isclose(found.quality["relevance"].sum(), (a * a).sum(1).mean(), rtol=1e-9)
    concept = found.concept()
    assert isinstance(concept, DirectionConcept) == (dimension == 1) and isinstance(concept, SubspaceConcept)
    assert len(concept) == n + 1
    assert np.isclose(found.explained(a, a).sum(), 1, rtol=1e-9)


def test_the_objective_of_relevant_subspaces():
    """Power 1/2 over blocks of power 2 over vectors of positive relevance, at its largest: no small turn raises it."""
    rng = np.random.default_rng(6)
    a, m = rng.normal(size=(40, 6)), rng.normal(size=(40, 6))

    def objective(rows: np.ndarray) -> float:
        relevance = np.maximum(((a @ rows.T) * (m @ rows.T)).reshape(40, 2, 2).sum(2), 0)
        return float((((relevance**2).mean(0) ** 0.5) ** 0.5).mean() ** 2)

    found = directions.drsa(a, m, 2, 2, steps=4000, restarts=3)
    best = found.quality["objective"]
    assert best == pytest.approx(objective(found.directions), rel=1e-9)
    for _ in range(20):
        turn = rng.normal(size=(6, 6)) * 1e-4
        turned = found.directions @ scipy.linalg.expm(turn - turn.T)
        assert (objective(turned) - best) / 1e-4 < 1e-5 * best


def test_a_soft_minimum_leaves_no_block_empty():
    """Of two concepts, one has a hundredth of the relevance of the other: both blocks are relevant all the same."""
    rng = np.random.default_rng(4)
    which = rng.uniform(size=500) < 0.5
    a = np.where(which[:, None], BASIS[0] * 10, BASIS[1]) * rng.uniform(0.5, 1, (500, 1))
    weakest = directions.drsa(a, a, 2).quality["relevance"].min()
    assert weakest > 10 * directions.prca(a, a, 2).quality["relevance"].min()


def test_subspaces_from_a_seed_are_the_same_again():
    a, m = RNG.normal(size=(50, 6)), RNG.normal(size=(50, 6))
    one, two = (directions.drsa(a, m, 2, steps=20, seed=5) for _ in range(2))
    assert np.array_equal(one.directions, two.directions)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: directions.pca(np.ones((3, 4)), 5), "there are 1 to 3 principal components in these vectors"),
        (lambda: directions.prca(np.ones((3, 4)), np.ones((3, 5)), 1), r"of shape \(3, 4\) and multipliers of \(3, "),
        (lambda: directions.drsa(np.ones((3, 4)), np.ones((3, 4)), 3, 2), "there are 1 to 2 blocks of 2 directions in"),
        (lambda: directions.drsa(np.eye(4), np.eye(4), -1, -1), "dimension must be a whole number of at least 1"),
        (lambda: directions.drsa(np.eye(4), np.eye(4), 1, 5), "there are 1 to 0 blocks of 5 directions"),
        (lambda: directions.drsa(np.eye(4), np.eye(4), 1, steps=0), "steps must be a whole number of at least 1"),
        (lambda: directions.drsa(np.eye(4), np.eye(4), 1, restarts=1.5), "restarts must be a whole number"),
        (lambda: directions.nmf(np.eye(4), 1, seed=-1), "seed must be a whole number of at least 0, not -1"),
        (lambda: directions.nmf(np.eye(4), 1, steps=0.5), "steps must be a whole number of at least 1, not 0.5"),
        (lambda: directions.drsa(np.eye(4), np.eye(4), 1, seed=0.5), "seed must be a whole number of at least 0"),
        (lambda: directions.pca(np.eye(4), 1.5), "n must be a whole number of at least 1, not 1.5"),
        (lambda: directions.prca(np.eye(4), np.eye(4), True), "n must be a whole number of at least 1, not True"),
        (lambda: directions.pca(np.ones((3, 4)), 1), "activations are all the same"),
        (lambda: directions.tcav([0.0, 0.0], np.ones((3, 2))), "direction must be a vector other than 0"),
        (lambda: directions.tcav([1.0, 0.0], np.full((3, 2), np.nan)), "gradients must be finite"),
        (lambda: directions.tcav([1.0, 0.0], np.ones((0, 2))), r"gradients are of shape \(0, 2\)"),
        (lambda: directions.tcav([1.0, 0.0], np.ones(2)), r"gradients are of shape \(2,\)"),
        (lambda: directions.cav(np.eye(3), [0, 1, np.nan]), "labels must be finite"),
        (lambda: directions.drsa(np.ones((3, 4)), -np.ones((3, 4)), 1), "no block has positive relevance"),
        (lambda: directions.drsa(np.zeros((3, 4)), np.ones((3, 4)), 1), "no block has positive relevance"),
        (lambda: directions.pca(np.ones(3), 1), r"activations must be of shape \(vectors, channels\), not \(3,\)"),
        (lambda: directions.pca(np.full((3, 4), np.nan), 1), "activations must be finite, without NaN"),
        (lambda: directions.cav(np.ones((3, 4)), [0, 1]), "3 values of 0 and 1, both among them; not 2 of"),
        (lambda: directions.cav(np.eye(3), [0, 1, 2]), "3 values of 0 and 1, both among them; not 3 of"),
        (lambda: directions.cav(np.eye(3), [1, 1, 1]), "3 values of 0 and 1, both among them; not 3 of"),
        (lambda: directions.cav(np.ones((3, 4)), [0, 1, 1]), "the same mean; there is no direction"),
        (lambda: directions.cav(np.full((11, 4), 0.1), [0, 1] + [1] * 9), "the same mean; there is no direction"),
        (lambda: directions.cav(np.tile(np.eye(5) / 3, (2, 1)), [0] * 5 + [1] * 5), "same mean; there is no direction"),
        (lambda: directions.cav(np.eye(3), [0, 1, 1], "lda"), "method must be one of 'pattern', 'ridge', 'svm', not"),
        (lambda: directions.pca(np.eye(3), 1).explained(np.eye(3), 0 * np.eye(3)), "relevance of all vectors is 0"),
    ],
    ids=range(30),
)  # fmt: skip
def test_what_is_wrong_is_said(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda: directions.pca(np.eye(3) * 1j, 1),
        lambda: directions.nmf([["a"] * 3] * 3, 1),
        lambda: directions.cav(np.eye(3), ["0", "1", "1"]),
        lambda: directions.tcav(["a", "b"], np.ones((3, 2))),
        lambda: directions.tcav([1.0, 0.0], torch.ones(3, 2) * 1j),
    ],
    ids=["complex activations", "words", "labels of words", "direction of words", "complex gradients"],
)
def test_what_are_no_real_numbers(call):
    with pytest.raises(TypeError, match="must be real numbers"):
        call()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64], ids=str)
def test_vectors_of_any_dtype_and_that_require_a_gradient(dtype):
    a = torch.tensor([[1, 0, 2], [3, 1, 0], [0, 2, 1]]).to(dtype)
    a = a.requires_grad_() if dtype.is_floating_point else a
    expected = directions.pca(a.detach().double().numpy(), 2)
    assert np.array_equal(directions.pca(a, 2).directions, expected.directions)
    assert directions.tcav([1.0, -1.0, 0.0], a) == 2 / 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.eye(4), np.eye(3), "mine"), r"directions are of shape \(4, 4\) and dual of \(3, 3\)"),
        ((np.eye(4), np.eye(4), "mine", {}, 0), "block must be a whole number of at least 1, not 0"),
        ((np.eye(4), np.eye(4), "mine", {}, 3), "4 directions are no blocks of 3"),
        ((np.full((2, 2), np.nan), np.eye(2), "mine"), "directions must be finite"),
        ((np.ones(3), np.ones(3), "mine"), r"directions must be of shape \(vectors, channels\), not \(3,\)"),
    ],
    ids=["shapes", "no block", "a part of a block", "nan", "one vector"],
)
def test_what_are_no_directions(arguments, message):
    with pytest.raises(ValueError, match=message):
        Directions(*arguments)


def test_directions_of_ones_own():
    found = Directions(BASIS[:2], BASIS[:2], "mine")
    a = RNG.normal(size=(4, 6))
    assert np.allclose(found.explained(a, a), ((a @ BASIS[:2].T) ** 2).sum(0) / (a**2).sum(), rtol=1e-10)
    assert repr(found) == "Directions(2 in 6 channels, method='mine')"
    assert found.concept(axis=-1).axis == Directions(BASIS, BASIS, "mine", block=3).concept(axis=-1).axis == -1
    assert repr(Directions(BASIS[:4], BASIS[:4], "mine", block=2)) == "Directions(2 x 2 in 6 channels, method='mine')"
