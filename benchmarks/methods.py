"""Speed of the methods that pass through the model many times, on the demo's network; prints a table.

Run it as ``python benchmarks/methods.py``. Times are seconds of the processor, in one thread, the best of several.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from crp.attributors import IntegratedGradients, Occlusion, ShapleySampling, SmoothGrad
from crp.demo.net import DigitNet

REPEATS = 7
STEPS = 50


def best(*functions: Callable[[], object]) -> list[float]:
    """Seconds of the processor in the fastest run of each; they take turns, so that other load hits all alike."""
    times = [[] for _ in functions]
    for _ in range(REPEATS):
        for found, function in zip(times, functions, strict=True):
            start = time.process_time()
            function()
            found.append(time.process_time() - start)
    return [min(found) for found in times]


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = DigitNet().eval().requires_grad_(False)

    def gradients(images: torch.Tensor) -> None:
        for _ in range(STEPS):
            leaf = images.clone().requires_grad_()
            torch.autograd.grad(net(leaf)[:, 3].sum(), leaf)

    print(f"against {STEPS} gradients of autograd: at most 1.1 is asked for")
    for n in (1, 4, 16, 32):
        images = torch.rand(n, 1, 32, 32)
        plain, integrated, smooth = best(
            lambda images=images: gradients(images),
            lambda images=images: IntegratedGradients(net, steps=STEPS)(images, 3),
            lambda images=images: SmoothGrad(net, n=STEPS)(images, 3),
        )
        print(
            f"  {n:2} images: gradients {plain * 1e3:6.1f} ms, integrated gradients x {integrated / plain:.2f}, "
            f"smoothgrad x {smooth / plain:.2f}"
        )

    image = torch.rand(1, 1, 32, 32)
    print("batches against one by one: at least 3 is asked for")
    for name, make in {
        "occlusion, every pixel": lambda **options: Occlusion(net, **options),
        "occlusion, 4 x 4, step 2": lambda **options: Occlusion(net, window_shape=4, step=2, **options),
        "shapley_sampling of rows": lambda **options: ShapleySampling(net, sampling_dims=(2,), samples=10, **options),
    }.items():
        single, batched = best(lambda make=make: make(batch_size=1)(image, 3), lambda make=make: make()(image, 3))
        print(
            f"  {name}: {single * 1e3:6.1f} ms one by one, {batched * 1e3:6.1f} ms in batches, x {single / batched:.1f}"
        )


if __name__ == "__main__":
    main()
