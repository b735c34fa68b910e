"""Metrics against Quantus, with the same explanations, replacement values and noise."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from crp.attributors.perturbation import MeaningfulPerturbation
from crp.composites import DeepLift, EpsilonPlus, GradientTimesInput, GuidedBackprop
from crp.metrics import local_lipschitz, pixel_flipping, quantus_explain

pytestmark = pytest.mark.peer
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    quantus = pytest.importorskip("quantus", minversion="0.6")

METHODS = {
    "gradient x input": GradientTimesInput(),
    "epsilon plus": EpsilonPlus(),
    "guided backprop": GuidedBackprop(),
    "deeplift": DeepLift(),
}
PLAIN = {"abs": False, "normalise": False, "disable_warnings": True, "display_progressbar": False}


class Doubled(nn.Module):
    """Takes the float32 inputs that Quantus predicts on."""

    def forward(self, x: Tensor) -> Tensor:
        return x.double()


@pytest.fixture
def model(vgg_bn: nn.Module) -> nn.Module:
    return nn.Sequential(Doubled(), vgg_bn).eval()


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def evaluate(
    metric: Any, model: nn.Module, data: Tensor, targets: Any, explain_func: Any, **options: Any
) -> np.ndarray:
    scores = metric(
        model=model,
        x_batch=data.numpy(),
        y_batch=np.asarray(targets),
        explain_func=explain_func,
        softmax=False,
        **options,
    )
    return np.asarray(scores, dtype=np.float64)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("step", "value"), [(1, 0.0), (32, 0.25)])
def test_pixel_flipping(model, images, monkeypatch, name, step, value):
    monkeypatch.setattr(np, "trapz", np.trapezoid, raising=False)  # (which it calls, and numpy 2.4 has no more)
    targets = model(images).argmax(1)
    data, explain_func = images.float().double(), quantus_explain(METHODS[name])
    ours = pixel_flipping(
        model, data, targets, explain_func, channels="apart", step=step, replacement=value, score="output"
    )
    settings = {**PLAIN, "features_in_step": step, "perturb_baseline": value}
    curves = evaluate(quantus.PixelFlipping(**settings), model, data, targets, explain_func)
    relevance = torch.from_numpy(explain_func(model, data.numpy(), targets.numpy())).flatten(1)
    assert all(len(row.unique()) == len(row) for row in relevance)
    assert np.abs(curves - ours.most[:, 1:].numpy()).max() < 1e-12
    areas = evaluate(quantus.PixelFlipping(**settings, return_auc_per_sample=True), model, data, targets, explain_func)
    assert np.allclose(areas, torch.trapezoid(ours.most[:, 1:]).numpy(), rtol=1e-12)


@pytest.mark.parametrize("name", METHODS)
def test_local_lipschitz(model, images, name):
    noise = 0.1 * torch.randn(6, *images.shape, dtype=torch.float64)
    draws = iter(noise)
    ours = local_lipschitz(model, images, [0, 1, 2, 3], METHODS[name], noise=noise)
    metric = quantus.LocalLipschitzEstimate(
        **PLAIN, nr_samples=6, perturb_func=lambda arr, **_: arr + next(draws).flatten(1).numpy()
    )
    theirs = evaluate(metric, model, images, [0, 1, 2, 3], quantus_explain(METHODS[name]))
    # (They add 1e-10 to the distance.)
    assert np.allclose(theirs, ours.numpy(), rtol=1e-8)


@pytest.mark.parametrize("metric", ["Sparseness", "MaxSensitivity", "FaithfulnessCorrelation"])
def test_its_other_metrics_take_our_methods(model, images, metric):
    explain_func = quantus_explain(
        MeaningfulPerturbation,
        steps=3,
        mask_size=4,
        mask_blur=0.0,
        sigma=2.0,
        jitter=1,
        start=0.5,
        learning_rate=0.3,
    )
    options: dict[str, Any] = {
        "Sparseness": {},
        "MaxSensitivity": {"nr_samples": 2},
        "FaithfulnessCorrelation": {"nr_runs": 5, "subset_size": 20, "return_aggregate": False},
    }
    found = getattr(quantus, metric)(**PLAIN, **options[metric])
    scores = evaluate(found, model, images, [0, 1, 2, 3], explain_func)
    assert scores.shape == (4,)
    assert np.isfinite(scores).all()
