"""What batches are worth: meaningful perturbation and pixel flipping in batches against one input at a time.

``python -m benchmarks.metrics`` prints a table; ``--quick`` uses fewer rounds. The demo's net with random weights, one
thread, wall time; a ratio is the median over interleaved rounds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import click
import torch
from torch import Tensor, nn

import crp
from crp.attributors.perturbation import MeaningfulPerturbation
from crp.demo import DigitNet
from crp.metrics import pixel_flipping, selectivity


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def candidates(model: nn.Module, images: Tensor) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """Each method on all images at once, and one by one."""
    mask = MeaningfulPerturbation(model, steps=20, sigma=4.0, mask_size=16, mask_blur=1.0, jitter=2, start="ones")
    relevance = torch.rand(len(images), 32, 32)

    def flip(batch_size: int) -> object:
        return pixel_flipping(model, images, 0, relevance=relevance, patch=2, batch_size=batch_size)

    def select(data: Tensor, batch_size: int) -> object:
        return selectivity(model, data, 0, "gradient", steps=10, batch_size=batch_size)

    return {
        "meaningful perturbation, 20 steps": (lambda: mask(images), lambda: [mask(image[None]) for image in images]),
        "pixel flipping, 2 x 257 points": (lambda: flip(256), lambda: flip(1)),
        "selectivity, 10 steps": (lambda: select(images, 256), lambda: [select(image[None], 1) for image in images]),
    }


@click.command()
@click.option("--quick", is_flag=True, help="Two rounds in place of seven.")
def main(quick: bool) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images = torch.rand(16, 1, 32, 32)
    model = DigitNet().eval()
    click.echo(f"crp {crp.__version__}, torch {torch.__version__}, CPU, one thread; {len(images)} images of 32 x 32")
    for name, (together, alone) in candidates(model, images).items():
        rounds = [(seconds(together), seconds(alone)) for _ in range(3 if quick else 8)][1:]
        ratios = [one / all_ for all_, one in rounds]
        spent = statistics.median(t for t, _ in rounds) * 1e3
        spread = f"{statistics.median(ratios):.1f} times as fast ({min(ratios):.1f} to {max(ratios):.1f})"
        click.echo(f"  {name:36} {spent:6.0f} ms in batches, {spread} as one by one")


if __name__ == "__main__":
    main()
