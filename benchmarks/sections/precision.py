"""Half precision under autocast: what it does to heatmaps, and to which samples stand for a concept."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks import ours
from benchmarks.clocks import Run
from benchmarks.harness import Case, Ratio
from benchmarks.nets import Samples, Setup, convolutions
from crp.attribution import CondAttribution
from crp.concepts import ChannelConcept
from crp.visualization.mining.run import mine
from crp.visualization.table.manifest import Array
from crp.visualization.table.ranking import top_k

TITLE = "half precision under autocast, EpsilonPlusFlat, against float64"
#: References of a concept that are compared.
BEST = 8
#: Precision by name; that of the model, or the one in which autocast computes.
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Measured(NamedTuple):
    """What one precision gives.

    Attributes
    ----------
    heatmaps : Tensor of shape (samples, height, width)
    references : dict of str to list of array of shape (k, concepts)
        The best samples of every concept, layer by layer, by mode.
    """

    heatmaps: Tensor
    references: Mapping[str, list[Array]]


def measured(setup: Setup, n: int, precision: torch.dtype) -> Measured:
    """Heatmaps of a batch, and references mined among ``n`` samples of noise."""
    model, data = setup.build()
    dataset = Samples(n, tuple(data.shape[1:]), 10)
    if precision == torch.float64:
        model, data, dataset.images = model.double(), data.double(), dataset.images.double()
    attribution, rules = CondAttribution(model), ours.composite("EpsilonPlusFlat")
    layers = convolutions(model)
    is_half = precision in (torch.bfloat16, torch.float16)
    with torch.autocast("cpu", precision if is_half else None, enabled=is_half), tempfile.TemporaryDirectory() as path:
        heatmaps = attribution(data, [{"y": [0]}], rules).heatmap
        concepts = dict.fromkeys(layers, ChannelConcept())
        table = mine(attribution, dataset, concepts, rules, path, progress=False)
        references = {mode: [top_k(table, x, mode, k=BEST).sample for x in layers] for mode in table.modes}
    return Measured(heatmaps.double(), references)


def agreement(found: list[Array], exact: list[Array]) -> float:
    """Share of the exact references that are found, over all concepts of all layers."""
    same = [np.isin(a[:, c], b[:, c]).mean() for a, b in zip(exact, found, strict=True) for c in range(a.shape[1])]
    return float(np.mean(same))


def deviating(setup: Setup, n: int) -> Case:
    """Deviation of heatmaps, and agreement of references, in each precision."""

    def make() -> dict[str, Run]:
        known = cache(partial(measured, setup, n))

        def deviation(precision: torch.dtype) -> float:
            exact = known(torch.float64).heatmaps
            return float((known(precision).heatmaps - exact).abs().max() / exact.abs().max())

        def references(precision: torch.dtype, mode: str) -> float:
            return agreement(known(precision).references[mode], known(torch.float64).references[mode])

        runs: dict[str, Run] = {}
        for name, precision in PRECISIONS.items():
            runs[f"heatmap, {name}"] = partial(deviation, precision)
            for mode in ("relevance", "activation"):
                runs[f"{mode}, {name}"] = partial(references, precision, mode)
        return runs

    ratios = [Ratio(f"largest deviation of a heatmap ÷ its largest pixel, {x}", f"heatmap, {x}") for x in PRECISIONS]
    ratios += [
        Ratio(f"share of the {BEST} references by {mode} that are the same, {x}", f"{mode}, {x}")
        for mode in ("relevance", "activation")
        for x in PRECISIONS
    ]
    name = f"{setup}, references among {n} samples of noise, all convolutions"
    return Case(name, make, tuple(ratios), clock="value", rounds=1, warmup=0, thorough=True)


def cases() -> list[Case]:
    """A net with and one without residual connections."""
    return [deviating(Setup("resnet18", 64, 8), 96), deviating(Setup("vgg16_bn", 64, 4), 96)]
