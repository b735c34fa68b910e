"""All classification families of torchvision under the presets: predictions, relevance that is kept, cost.

``python -m benchmarks.architectures`` prints a table for inputs of 224 pixels (``--size`` for others, ``--smallest``
for those of the tests); names of families select some. Float64, random weights and statistics of batch norm, one
thread. The columns are

- prediction: largest deviation of the logits under the composite, relative to the largest logit;
- undone: whether parameters, buffers, flags and hooks are bit for bit as before;
- input, bias, empty, stabilizer: where the relevance of the strongest logit is, in multiples of it, for EpsilonPlus;
- rest: what is unaccounted for; the largest of all presets (of the last three relative to all that was counted);
- no bias: input for EpsilonPlus where biases count as zero;
- concepts: deviation of the sum over all channels of the middle layer, in at most 32 parts, from the whole, relative to
  its largest pixel;
- ms: one attribution with EpsilonPlus; ×grad: as a multiple of one gradient; on/off: milliseconds of putting the
  composite on and off again, with batch norm merged.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import click
import torch
from torch import Tensor, nn

from crp.attribution import CondAttribution
from crp.composites import Composite, EpsilonAlpha2Beta1, EpsilonGammaBox, EpsilonPlus, EpsilonPlusFlat
from crp.types import AbsorbedRelevance
from tests.shared.architectures import FAMILIES, Family

T = TypeVar("T")
OTHERS = [EpsilonPlusFlat(), EpsilonGammaBox(low=-3.0, high=3.0), EpsilonAlpha2Beta1()]
WITHOUT_BIAS = EpsilonPlus(epsilon=1e-14, stabilizer=1e-14, zero_params="bias")
HEAD = (
    f"{'family':28}{'px':>5}{'prediction':>11} {'undone':6}{'input':>11}{'bias':>10}{'empty':>10}{'stabil.':>9}"
    f"{'rest':>9}{'no bias':>13}{'concepts':>10}{'ms':>8}{'×grad':>6}{'on/off':>8}"
)


def timed(run: Callable[[], T]) -> tuple[T, float]:
    """Result and wall time in milliseconds."""
    start = time.perf_counter()
    result = run()
    return result, (time.perf_counter() - start) * 1e3


def state(model: nn.Module) -> list[object]:
    """What must be as before: tensors, their identity and flags, hooks, attributes."""
    found: list[object] = []
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        found += [name, id(tensor), tensor.requires_grad, hash(tensor.detach().numpy().tobytes())]
    for name, module in model.named_modules():
        hooks = [list(value) for key, value in vars(module).items() if "hook" in key and hasattr(value, "keys")]
        found += [name, module.training, sorted(vars(module)), hooks]
    return found


def by_kind(kept: AbsorbedRelevance, kind: str) -> float:
    """What all layers keep of one kind, in multiples of the initial relevance."""
    return float(sum(shares[kind] for shares in kept.layers.values()) / kept.initial)


def counted(kept: AbsorbedRelevance) -> Tensor:
    """Sum of all amounts, against which rounding is measured."""
    shares = [share.abs() for layer in kept.layers.values() for share in layer.values()]
    return sum(shares, kept.initial.abs() + kept.input.abs())


def gradient(model: nn.Module, data: Tensor, target: int) -> Tensor:
    """Plain gradient of a logit."""
    leaf = data.clone().requires_grad_()
    return torch.autograd.grad(model(leaf)[:, target].sum(), leaf)[0]


def on_and_off(model: nn.Module, composite: Composite) -> None:
    """Put a composite on a model and take it off."""
    with composite.context(model):
        pass


def concepts(attribution: CondAttribution, data: Tensor, target: int, layer: str) -> float:
    """How far the channels of a layer are from the whole together."""
    recorded = attribution(data, [{"y": target}], EpsilonPlus(), record_layer=[layer])
    whole, n = recorded.heatmap[0], recorded.relevances[layer].shape[1]
    conditions = [{"y": target, layer: list(range(first, n, 32))} for first in range(min(n, 32))]
    parts = attribution.generate(data, conditions, EpsilonPlus(), batch_size=8, verbose=False)
    found = sum((part.heatmap.sum(0) for part in parts), torch.zeros_like(whole))
    return float((found - whole).abs().max() / whole.abs().max())


def measure(family: Family, size: int | None, shares: int) -> None:
    """Print the row of one family, and the layers that keep most."""
    model, data = family.build(narrow=False).requires_grad_(False), family.images(size=size)
    before, attribution = state(model), CondAttribution(model)
    with torch.no_grad():
        logits = model(data)
    target = int(logits.argmax())
    condition = [{"y": target}]
    attribution(data, condition, EpsilonPlus())  # once, so that nothing is measured that is cached
    result, spent = timed(lambda: attribution(data, condition, EpsilonPlus()))
    _, plain = timed(lambda: gradient(model, data, target))
    _, switched = timed(lambda: on_and_off(model, EpsilonPlus()))
    kept = attribution.absorbed(data, condition, EpsilonPlus())
    others = [attribution.absorbed(data, condition, composite) for composite in OTHERS]
    free = attribution.absorbed(data, condition, WITHOUT_BIAS)
    rest = max(float((k.rest / counted(k)).abs()) for k in [*others, free])
    rest = max(rest, float((kept.rest / kept.initial).abs()))
    deviation = float((result.prediction - logits).abs().max() / logits.abs().max())
    sums = concepts(attribution, data, target, family.middle)
    bias, empty, stabilizer = (by_kind(kept, kind) for kind in ("bias", "empty", "stabilizer"))
    click.echo(
        f"{family!s:28}{data.shape[-1]:5}{deviation:11.1e} {'yes' if state(model) == before else 'NO':6}"
        f"{float(kept.input / kept.initial):11.6f}{bias:10.4f}{empty:10.4f}{stabilizer:9.0e}{rest:9.0e}"
        f"{float(free.input / free.initial):13.6f}{sums:10.0e}{spent:8.0f}{spent / plain:6.1f}{switched:8.1f}"
    )
    if not family.conserves:
        amounts = {
            (name or "(model)", kind): float(layer[kind] / free.initial)
            for name, layer in free.layers.items()
            for kind in ("empty", "bias")
        }
        most = sorted(amounts, key=lambda at: -abs(amounts[at]))[:shares]
        text = ", ".join(f"{name} {amounts[name, kind]:.3g}" for name, kind in most if amounts[name, kind])
        click.echo(f"    kept without biases: {text}")


@click.command()
@click.argument("names", nargs=-1)
@click.option("--size", default=224, help="Height and width of the input.")
@click.option("--smallest", is_flag=True, help="The inputs of the tests, in place of --size.")
@click.option("--shares", default=4, help="How many layers to name where much is kept without biases.")
def main(names: tuple[str, ...], size: int, smallest: bool, shares: int) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    click.echo(HEAD)
    for family in FAMILIES:
        if not names or family.name in names:
            measure(family, None if smallest else size, shares)


if __name__ == "__main__":
    main()
