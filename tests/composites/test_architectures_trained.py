"""Trained nets: composites leave their accuracy alone, and relevance finds what the prediction rests on.

Weights and images are not part of the project: they are looked for in ``CRP_TEST_DATA``, or in ``shared/data`` beside
the repository.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from trained_nets import MEAN, STD, cifar_images, cifar_net, found, loaded

from crp.attribution import CondAttribution
from crp.composites import EpsilonAlpha2Beta1, EpsilonGammaBox, EpsilonPlus, EpsilonPlusFlat

PRESETS = {
    "epsilon_plus": EpsilonPlus(),
    "epsilon_plus_flat": EpsilonPlusFlat(),
    "epsilon_gamma_box": EpsilonGammaBox(low=-MEAN / STD, high=(1 - MEAN) / STD),
    "epsilon_alpha2_beta1": EpsilonAlpha2Beta1(),
}


@pytest.fixture(scope="module")
def cifar():
    """ResNet-20 of CIFAR-10, 500 test images and their labels."""
    images, labels = cifar_images()
    return cifar_net(), (images - MEAN) / STD, labels


@pytest.mark.parametrize("name", ["epsilon_plus_flat", "epsilon_gamma_box"])
def test_accuracy_is_that_of_the_model_alone(cifar, name, untouched):
    model, images, labels = cifar
    with torch.no_grad():
        alone = model(images)
    assert (alone.argmax(1) == labels).float().mean() == pytest.approx(0.798, abs=0.002)
    with untouched(model), PRESETS[name].context(model):
        attached = model(images.clone().requires_grad_()).detach()
    assert torch.equal(attached.argmax(1), alone.argmax(1))
    torch.testing.assert_close(attached, alone, rtol=1e-4, atol=1e-4)


def test_accuracy_without_batch_norm(untouched):
    model = loaded("mnist_lenet", "lenet_mnist.pt")
    with np.load(found("mnist_test1000.npz")) as arrays:
        images, labels = (torch.tensor(arrays[key]) for key in ("images", "labels"))
    images = images.reshape(-1, 1, 28, 28).float() / (255 if images.max() > 1 else 1)
    with untouched(model):
        result = CondAttribution(model)(images[:200], [{"y": int(y)} for y in labels[:200]], EpsilonPlusFlat())
    with torch.no_grad():
        assert torch.equal(result.prediction.argmax(1), model(images[:200]).argmax(1))
    assert (result.prediction.argmax(1) == labels[:200]).float().mean() >= 0.97


def flipped(model, images, targets, scores, replacement, patch=4, steps=5):
    """Probability of the targets, averaged while the highest-scored half of the patches is replaced, per image."""
    patches = F.avg_pool2d(scores[:, None], patch).flatten(1)
    rank = patches.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    side, curve = images.shape[-1] // patch, []
    for step in range(1, steps):  # (nothing is replaced at first)
        mask = (rank < step * rank.shape[1] // (2 * (steps - 1))).float().view(-1, 1, side, side)
        mask = F.interpolate(mask, scale_factor=patch)
        with torch.no_grad():
            probabilities = model(torch.where(mask > 0, replacement, images)).softmax(1)
        curve.append(probabilities.gather(1, targets[:, None])[:, 0])
    return torch.stack(curve).mean(0)


@pytest.fixture(scope="module")
def scored(cifar):
    """Every other image, its predicted class, and what presets, the gradient and chance say of its pixels."""
    model, images, _ = cifar
    images = images[::2]
    with torch.no_grad():
        targets = model(images).argmax(1)
    conditions = [{"y": int(target)} for target in targets]
    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(leaf).gather(1, targets[:, None]).sum(), leaf)
    scores = {name: CondAttribution(model)(images, conditions, preset).heatmap for name, preset in PRESETS.items()}
    scores["gradient"] = gradient.abs().sum(1)
    scores["random"] = torch.rand(len(images), 32, 32, generator=torch.Generator().manual_seed(0))
    return model, images, targets, scores


@pytest.mark.parametrize("kind", ["mean", "blur"])
def test_patches_of_high_relevance_matter_more_than_those_of_high_gradient(scored, kind):
    model, images, targets, scores = scored
    replacement = torch.zeros_like(images)
    if kind == "blur":
        padded = F.pad(images, (4, 4, 4, 4), mode="reflect")
        replacement = F.conv2d(padded, torch.ones(3, 1, 9, 9) / 81, groups=3)
    curves = {name: flipped(model, images, targets, score, replacement) for name, score in scores.items()}
    for name in PRESETS:
        for other in ("gradient", "random"):
            difference = curves[other] - curves[name]
            error = difference.std() / len(images) ** 0.5
            assert difference.mean() > 2 * error, (
                f"{name} {curves[name].mean():.3f}, {other} {curves[other].mean():.3f}"
            )
