"""Cost of an attribution as a multiple of a plain gradient, ours beside zennit's, in one interleaved run.

``python -m benchmarks`` prints a table; ``--quick`` uses fewer rounds. One thread, process CPU time, float32, random
weights: each round runs every candidate once, and a ratio is the median over the rounds of the ratio to that round's
gradient.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import click
import torch
import torchvision
import zennit
import zennit.canonizers
import zennit.composites
import zennit.torchvision
from torch import Tensor, nn
from zennit.core import Composite

import crp
import crp.composites
from crp.attribution import CondAttribution

PRESETS = {"EpsilonPlusFlat": {}, "EpsilonGammaBox": {"low": -3.0, "high": 3.0}, "EpsilonAlpha2Beta1Flat": {}}
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], type, str]] = {
    "vgg16_bn": (
        torchvision.models.vgg16_bn,
        (4, 3, 64, 64),
        zennit.canonizers.SequentialMergeBatchNorm,
        "features.17",
    ),
    "resnet18": (torchvision.models.resnet18, (8, 3, 64, 64), zennit.torchvision.ResNetCanonizer, "layer3.1.conv2"),
}


def cpu_time(run: Callable[[], object]) -> float:
    """Process CPU time of one call, in seconds."""
    start = time.process_time()
    run()
    return time.process_time() - start


def interleaved(candidates: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """CPU times of every candidate, each run once a round after one round that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(rounds + 1):
        for name, run in candidates.items():
            spent = cpu_time(run)
            if number:
                times[name].append(spent)
    return times


def candidates(model: nn.Module, data: Tensor, canonizer: type, layer: str) -> dict[str, Callable[[], object]]:
    """What is timed on one net: the gradient, one attribution by each preset, and 64 concepts of a layer."""
    attribution = CondAttribution(model)

    def gradient() -> None:
        leaf = data.clone().requires_grad_()
        torch.autograd.grad(model(leaf)[:, 0].sum(), leaf)

    def attribute(composite: Composite) -> Callable[[], object]:
        return lambda: attribution(data, [{"y": [0]}], composite)

    def concepts(composite: Composite) -> Callable[[], object]:
        conditions = [{"y": [0], layer: [channel]} for channel in range(64)]
        return lambda: list(attribution.generate(data[:1], conditions, composite, batch_size=64, verbose=False))

    found: dict[str, Callable[[], object]] = {"gradient": gradient}
    for name, keywords in PRESETS.items():
        ours = getattr(crp.composites, name)(**keywords)
        theirs = getattr(zennit.composites, name)(canonizers=[canonizer()], **keywords)
        found |= {f"{name} (crp)": attribute(ours), f"{name} (zennit)": attribute(theirs)}
        if name == "EpsilonPlusFlat":
            found |= {"64 concepts (crp)": concepts(ours), "64 concepts (zennit)": concepts(theirs)}
    return found


@click.command()
@click.option("--quick", is_flag=True, help="Three rounds in place of nine.")
def main(quick: bool) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    click.echo(f"crp {crp.__version__}, torch {torch.__version__}, CPU, one thread; multiples of a gradient's CPU time")
    for name, (make, shape, canonizer, layer) in NETS.items():
        torch.manual_seed(0)
        model = make().eval().requires_grad_(False)
        times = interleaved(candidates(model, torch.randn(shape), canonizer, layer), 3 if quick else 9)
        base = times["gradient"]
        click.echo(f"\n{name}, input {tuple(shape)}: gradient {statistics.median(base) * 1e3:.0f} ms")
        for candidate, spent in times.items():
            ratios = [t / g for t, g in zip(spent, base, strict=True)]
            click.echo(f"  {candidate:36} {statistics.median(ratios):6.2f}  ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
