"""On a GPU, at realistic sizes: time, launches, memory, and whether the host waits."""

from __future__ import annotations

from dataclasses import replace

from benchmarks import ours
from benchmarks.clocks import Run
from benchmarks.harness import Bound, Case, Ratio
from benchmarks.nets import Setup
from benchmarks.sections.attribution import case

TITLE = "on a GPU, 224×224 batch 64, and 512 concepts"
DEVICE = "cuda"
PRESET = "EpsilonPlusFlat"


def attributions(device: str, size: int = 224, batch: int = 64) -> list[Case]:
    """Time, launches and memory of one attribution."""
    nets = {"resnet50": (1.35, 2.0, 1.9), "vgg16_bn": (1.40, 1.50, 2.0)}
    rounds = {"cuda": 9, "launches": 1, "cuda peak": 1}
    return [
        replace(
            case("", Setup(net, size, batch, device), limits, n, clock), name=f"{clock}, {net} {size} batch {batch}"
        )
        for net, limits in nets.items()
        for clock, n in rounds.items()
    ]


def concepts(setup: Setup, layer: str, n: int = 512, batch_size: int = 64, clock: str = "cuda") -> Case:
    """Many concepts of a layer, against the gradient below and the peer."""
    below, peer = "gradient below on copies", f"zennit-crp generate(batch_size={batch_size})"

    def make() -> dict[str, Run]:
        model, data = setup.build()
        part = ours.gradient_below(model, data, layer, batch_size)
        return {
            below: lambda: [part() for _ in range(n // batch_size)],
            "ours": ours.concepts(model, data, ours.composite(PRESET), layer, n, batch_size),
        }

    return Case(
        name=f"{setup.net} {setup.size}, {n} concepts of {layer}, parts of {batch_size}",
        make=make,
        ratios=(
            Ratio(f"time ÷ {below}", "ours", below, Bound(1.2), "", peer),
            Ratio("zennit-crp ÷ ours", peer, "ours", Bound(6.0, at_least=True)),
            Ratio("ours, ms", "ours", peer=peer, scale=1e3),
        ),
        peers={
            peer: {"candidate": "concepts", "setup": setup, "preset": PRESET}
            | {"layer": layer, "n": n, "batch_size": batch_size}
        },
        clock=clock,
        rounds=5,
    )


def waiting(setup: Setup) -> Case:
    """Backward passes in which a synchronization raises an error: 1 where the host waits."""

    def make() -> dict[str, Run]:
        model, data = setup.build()
        return {"ours": ours.backward(model, data, ours.composite(PRESET))}

    return Case(
        name=str(setup),
        make=make,
        ratios=(Ratio("backward passes in which the host waits", "ours", bound=Bound(0.0)),),
        clock="synchronizations",
        rounds=1,
    )


def cases() -> list[Case]:
    """resnet50 and vgg16_bn."""
    resnet, vgg = Setup("resnet50", 224, 64, DEVICE), Setup("vgg16_bn", 224, 64, DEVICE)
    return [
        *attributions(DEVICE),
        concepts(resnet, "layer4.1.conv2"),
        concepts(vgg, "features.40"),
        waiting(resnet),
        waiting(vgg),
    ]
