"""``python -m benchmarks.interventions [--data FOLDER]``: relevance of channels against switching them off.

Relevance is a hypothesis about what a prediction rests on, and an intervention is its test. For each image, channels of
a layer are ranked by their relevance for the predicted class, and by how much that class's logit drops when the channel
is set to 0; figures are Spearman's rank correlation of both, with the mean and the standard error over images. The nets
are the demo's, and a ResNet-20 of CIFAR-10, where a folder has its weights. No order of methods is promised.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor, nn

from crp.attribution import CondAttribution
from crp.audit import intervene
from crp.audit.tested import rank_correlation
from crp.composites import (
    DeepLift,
    EpsilonAlpha2Beta1,
    EpsilonGamma,
    EpsilonPlus,
    Gradient,
    GradientTimesInput,
)
from crp.concepts import ChannelConcept
from crp.demo.data import load_digits_data
from crp.demo.net import DigitNet
from crp.demo.training import train

STEPS = 20
COMPOSITES = {
    "EpsilonPlus": EpsilonPlus(),
    "EpsilonGamma": EpsilonGamma(),
    "EpsilonAlpha2Beta1": EpsilonAlpha2Beta1(),
    "DeepLIFT": DeepLift(),
    "gradient × activation": GradientTimesInput(),
}
METHODS = (*COMPOSITES, "integrated gradients", "random")


def conductance(attribution: CondAttribution, data: Tensor, targets: Sequence[int], layers: Sequence[str]) -> Any:
    """Integrated gradients of channels: the gradient along the way from a black image, times the activation's steps.

    Dhamdhere et al., "How important is a neuron?", ICLR (2019).
    """
    conditions = [{"y": target} for target in targets]
    totals: dict[str, Tensor] = dict.fromkeys(layers, torch.zeros(1))
    before: dict[str, Tensor] = {}
    for step in range(STEPS + 1):
        result = attribution(data * (step / STEPS), conditions, Gradient(), layers)
        for layer in layers if step else ():
            totals[layer] = totals[layer] + result.relevances[layer] * (result.activations[layer] - before[layer])
        before = result.activations
    return {layer: total.flatten(2).sum(2) for layer, total in totals.items()}


def correlations(model: nn.Module, data: Tensor, layers: Sequence[str]) -> dict[str, dict[str, list[float]]]:
    """Rank correlation for each layer, method and image."""
    attribution = CondAttribution(model)
    with torch.no_grad():
        targets = [int(target) for target in model(data).argmax(1)]
    found: dict[str, dict[str, Tensor]] = {}
    for name, composite in COMPOSITES.items():
        result = attribution(data, [{"y": target} for target in targets], composite, layers)
        found[name] = {layer: result.relevances[layer].flatten(2).sum(2) for layer in layers}
    found["integrated gradients"] = conductance(attribution, data, targets, layers)
    generator = torch.Generator().manual_seed(0)
    shapes = {layer: relevance.shape for layer, relevance in found["EpsilonPlus"].items()}
    found["random"] = {layer: torch.randn(shape, generator=generator) for layer, shape in shapes.items()}
    figures: dict[str, dict[str, list[float]]] = {}
    for layer, shape in shapes.items():
        drop = -intervene(attribution, data, layer, ChannelConcept(), range(shape[1]), targets).detach().numpy()
        figures[layer] = {
            name: [rank_correlation(a, b) for a, b in zip(of_layer[layer].detach().numpy(), drop, strict=True)]
            for name, of_layer in found.items()
        }
    return figures


def table(title: str, figures: dict[str, dict[str, list[float]]]) -> str:
    """Figures as a table in Markdown."""
    layers = list(figures)
    lines = [f"| {title} | {' | '.join(layers)} |", "|---" * (len(layers) + 1) + "|"]
    for name in METHODS:
        cells = []
        for layer in layers:
            values = np.array(figures[layer][name])
            cells.append(f"{values.mean():.2f} ± {values.std(ddof=1) / len(values) ** 0.5:.2f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def demo_net(n: int) -> tuple[nn.Module, Tensor, Sequence[str]]:
    """Demo's net, its test images and layers."""
    data = load_digits_data()
    return train(data.train, verbose=False), data.test.images[:n], DigitNet.CONCEPT_LAYERS


def cifar_net(folder: Path, n: int) -> tuple[nn.Module, Tensor, Sequence[str]]:
    """ResNet-20 of CIFAR-10 from the folder, test images and layers."""
    spec = importlib.util.spec_from_file_location("cifar_resnet", folder / "cifar_resnet.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with np.load(folder / "cifar10_test500.npz") as arrays:
        pixels = torch.tensor(arrays["images"])[:: 500 // n][:n].permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return module.load(folder / "resnet20-12fca82f.th", 20), (pixels - mean) / std, ("layer2", "layer3.0", "layer3.1")


@click.command()
@click.option("--data", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Of the ResNet-20.")
@click.option("--images", default=50, show_default=True, help="Images of each net.")
def main(data: Path | None, images: int) -> None:
    """Print a table for each net."""
    nets: dict[str, Callable[[], tuple[nn.Module, Tensor, Sequence[str]]]] = {"demo's net": lambda: demo_net(images)}
    if data is not None:
        nets["ResNet-20"] = lambda: cifar_net(data, images)
    for name, make in nets.items():
        click.echo(table(name, correlations(*make())) + "\n")


if __name__ == "__main__":
    main()
