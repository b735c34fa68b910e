"""What else makes nets fast: `torch.compile`, channels last, bfloat16; in time, and in what it does to heatmaps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import ours
from benchmarks.clocks import Run
from benchmarks.harness import Case, Ratio
from benchmarks.nets import Setup, gradient
from crp.attribution import CondAttribution

TITLE = "torch.compile, channels_last, bfloat16 autocast; EpsilonPlusFlat"


class Treatment(NamedTuple):
    """Memory format of net and data, and whether convolutions and matrix products are done in bfloat16."""

    name: str
    channels_last: bool = False
    bfloat16: bool = False

    def build(self, setup: Setup) -> tuple[nn.Module, Tensor]:
        """Net and data."""
        model, data = setup.build()
        if self.channels_last:
            model = model.to(memory_format=torch.channels_last)
            data = data.contiguous(memory_format=torch.channels_last)
        return model, data

    def run(self, work: Callable[[Tensor], Tensor], data: Tensor) -> Tensor:
        """Result of some work on the data."""
        with torch.autocast(data.device.type, torch.bfloat16, enabled=self.bfloat16):
            return work(data)


TREATMENTS = (
    Treatment("plain"),
    Treatment("channels last", channels_last=True),
    Treatment("bfloat16", bfloat16=True),
    Treatment("bfloat16, channels last", channels_last=True, bfloat16=True),
)


def heatmaps(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Function of the data that attributes the first output."""
    explain, rules = CondAttribution(model), ours.composite("EpsilonPlusFlat")
    explain.replay = False
    return lambda data: explain(data, [{"y": [0]}], rules).heatmap


def timed(setup: Setup, rounds: int) -> Case:
    """Gradient and attribution under each treatment, and the gradient of the compiled net."""
    unit, compiled = "gradient, plain", "gradient, compiled"

    def make() -> dict[str, Run]:
        runs: dict[str, Run] = {}
        for treatment in TREATMENTS:
            model, data = treatment.build(setup)
            runs[f"gradient, {treatment.name}"] = partial(treatment.run, partial(gradient, model), data)
            runs[f"attribution, {treatment.name}"] = partial(treatment.run, heatmaps(model), data)
        model, data = setup.build()
        return {**runs, compiled: partial(gradient, torch.compile(model), data)}

    ratios = [Ratio("gradient, compiled ÷ gradient, plain", compiled, unit)]
    for name in (treatment.name for treatment in TREATMENTS):
        own, attribution = f"gradient, {name}", f"attribution, {name}"
        ratios.append(Ratio(f"{own} ÷ {unit}", own, unit))
        ratios.append(Ratio(f"{attribution} ÷ {unit}", attribution, unit))
        ratios.append(Ratio(f"{attribution} ÷ {own}", attribution, own))
    ratios.append(Ratio("attribution, plain ÷ gradient, compiled", "attribution, plain", compiled))
    lines = dict.fromkeys(line for line in ratios if line.over != line.under)  # (of "plain", some are the same)
    return Case(str(setup), make, tuple(lines), rounds=rounds, thorough=True)


def deviating(setup: Setup) -> Case:
    """Largest deviation of heatmaps from those in float64, relative to their largest pixel."""

    def make() -> dict[str, Run]:
        model, data = setup.build()
        exact = heatmaps(model.double())(data.double())

        def deviation(treatment: Treatment) -> float:
            model, data = treatment.build(setup)
            found = treatment.run(heatmaps(model), data)
            return float((found - exact).abs().max() / exact.abs().max())

        return {treatment.name: partial(deviation, treatment) for treatment in TREATMENTS}

    ratios = tuple(Ratio(f"deviation from float64, {each.name}", each.name) for each in TREATMENTS)
    return Case(str(setup), make, ratios, clock="value", rounds=1, warmup=0, thorough=True)


def cases() -> list[Case]:
    """Time and deviation on a net with and one without residual connections."""
    setups = Setup("resnet18", 64, 8), Setup("vgg16_bn", 64, 4)
    return [*(timed(setup, 5) for setup in setups), *(deviating(setup) for setup in setups)]
