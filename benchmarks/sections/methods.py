"""Methods that pass through the net many times: against as many gradients, and in batches against one by one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.clocks import Run
from benchmarks.harness import Bound, Case, Ratio
from benchmarks.nets import Setup, gradient
from crp.attributors import IntegratedGradients, Occlusion, ShapleySampling, SmoothGrad
from crp.attributors.perturbation import MeaningfulPerturbation
from crp.metrics import pixel_flipping, selectivity

TITLE = "methods and metrics of many passes, on the demo's net"
STEPS = 50


def steps(images: int) -> Case:
    """Methods that average gradients, against these gradients."""

    def make() -> dict[str, Run]:
        model, data = Setup("demo", 32, images).build()
        integrated, smooth = IntegratedGradients(model, steps=STEPS), SmoothGrad(model, n=STEPS)
        return {
            "gradients": lambda: [gradient(model, data) for _ in range(STEPS)],
            "integrated gradients": lambda: integrated(data, 3),
            "smoothgrad": lambda: smooth(data, 3),
        }

    ratios = [
        Ratio(f"{name} ÷ {STEPS} gradients", name, "gradients", Bound(1.1))
        for name in ("integrated gradients", "smoothgrad")
    ]
    return Case(f"batch {images}", make, tuple(ratios), thorough=images in (4, 32))


def batches(name: str, images: int, make: Callable[[nn.Module, Tensor], tuple[Run, Run]], limit: float | None) -> Case:
    """One by one against in batches; ``make`` gives both."""

    def runs() -> dict[str, Run]:
        alone, together = make(*Setup("demo", 32, images).build())
        return {"one by one": alone, "in batches": together}

    bound = None if limit is None else Bound(limit, at_least=True)
    ratios = (
        Ratio("one by one ÷ in batches", "one by one", "in batches", bound),
        Ratio("in batches, ms", "in batches", scale=1e3),
    )
    return Case(f"{name}, batch {images}", runs, ratios, rounds=5, thorough=limit is None)


def occlusion(model: nn.Module, data: Tensor, window: int | None = None, step: int = 1) -> tuple[Run, Run]:
    """Patches of the image, one by one or in batches."""
    alone = Occlusion(model, window_shape=window, step=step, batch_size=1)
    together = Occlusion(model, window_shape=window, step=step)
    return lambda: alone(data, 3), lambda: together(data, 3)


def shapley(model: nn.Module, data: Tensor) -> tuple[Run, Run]:
    """Coalitions of rows."""
    alone = ShapleySampling(model, sampling_dims=(2,), samples=10, batch_size=1)
    together = ShapleySampling(model, sampling_dims=(2,), samples=10)
    return lambda: alone(data, 3), lambda: together(data, 3)


def perturbation(model: nn.Module, data: Tensor) -> tuple[Run, Run]:
    """Masks of all images at once, or of one after the other."""
    mask = MeaningfulPerturbation(model, steps=20, sigma=4.0, mask_size=16, mask_blur=1.0, jitter=2, start="ones")
    return lambda: [mask(image[None]) for image in data], lambda: mask(data)


def flipping(model: nn.Module, data: Tensor) -> tuple[Run, Run]:
    """Curves of two orders, 257 points each."""
    relevance = torch.rand(len(data), 32, 32)
    flip = partial(pixel_flipping, model, data, 0, relevance=relevance, patch=2)
    return lambda: flip(batch_size=1), lambda: flip(batch_size=256)


def selecting(model: nn.Module, data: Tensor) -> tuple[Run, Run]:
    """Selectivity of the gradient."""
    select = partial(selectivity, model, steps=10)
    return (
        lambda: [select(image[None], 0, "gradient", batch_size=1) for image in data],
        lambda: select(data, 0, "gradient", batch_size=256),
    )


def cases() -> list[Case]:
    """Averages of gradients, occlusion, Shapley values, perturbation, metrics."""
    return [
        *(steps(images) for images in (1, 4, 16, 32)),
        batches("occlusion of every pixel", 1, occlusion, 3.0),
        batches("occlusion, 4×4, step 2", 1, partial(occlusion, window=4, step=2), 3.0),
        batches("Shapley sampling of rows", 1, shapley, 3.0),
        batches("meaningful perturbation, 20 steps", 16, perturbation, None),
        batches("pixel flipping, 2×257 points", 16, flipping, None),
        batches("selectivity, 10 steps", 16, selecting, None),
    ]
