"""Many concepts of one layer for one sample, against the gradient of the part of the net below the layer."""

from __future__ import annotations

import zennit.canonizers
import zennit.composites
import zennit.torchvision

from benchmarks import ours
from benchmarks.clocks import Run
from benchmarks.harness import Bound, Case, Ratio
from benchmarks.nets import Setup

TITLE = "many concepts of one layer, one sample, EpsilonPlusFlat"
N = 64
VGG, RESNET = Setup("vgg16_bn", 64, 1), Setup("resnet18", 64, 1)
PRESET = "EpsilonPlusFlat"
#: Net, layer, limit in gradients of the part below, limit of the peer's time in ours, rounds.
ASKED = [(VGG, "features.17", 0.80, 10.0, 5), (RESNET, "layer3.1.conv2", 1.20, 6.0, 9)]
OURS, BELOW, UNMODIFIED = "ours", "gradient below on copies", "zennit's composite through ours"
PEER = "zennit-crp generate(batch_size=16)"


def unmodified(setup: Setup) -> zennit.composites.EpsilonPlusFlat:
    """Preset of zennit, as its users write it."""
    resnet = setup.net.startswith("resnet")
    canonizer = zennit.torchvision.ResNetCanonizer if resnet else zennit.canonizers.SequentialMergeBatchNorm
    return zennit.composites.EpsilonPlusFlat(canonizers=[canonizer()])


def shared(setup: Setup, layer: str, limit: float, ahead: float, rounds: int) -> Case:
    """Concepts share a forward pass: how near is it to the gradient below, how far from the peer."""

    def make() -> dict[str, Run]:
        model, data = setup.build()
        return {
            BELOW: ours.gradient_below(model, data, layer, N),
            OURS: ours.concepts(model, data, ours.composite(PRESET), layer, N, N),
            UNMODIFIED: ours.concepts(model, data, unmodified(setup), layer, N, N),
        }

    return Case(
        name=f"{setup.net} {setup.size}×{setup.size}, {N} concepts of {layer}",
        make=make,
        ratios=(
            Ratio(f"time ÷ {BELOW}", OURS, BELOW, Bound(limit), "7", PEER),
            Ratio(f"{PEER} ÷ ours", PEER, OURS, Bound(ahead, at_least=True), "8"),
            Ratio(f"{PEER} ÷ {UNMODIFIED}", PEER, UNMODIFIED, Bound(3.0, at_least=True), "11"),
            Ratio(f"{BELOW}, ms", BELOW, scale=1e3),
        ),
        peers={PEER: {"candidate": "concepts", "setup": setup, "preset": PRESET, "layer": layer}
               | {"n": N, "batch_size": 16}},
        rounds=rounds,
    )  # fmt: skip


def growing(clock: str, pairs: dict[str, tuple[int, int]], ratios: tuple[Ratio, ...], rounds: int) -> Case:
    """Numbers of concepts and rows in a part, by the name of the candidate."""

    def make() -> dict[str, Run]:
        model, data = VGG.build()
        rules = ours.composite(PRESET)
        return {name: ours.concepts(model, data, rules, "features.17", *sizes) for name, sizes in pairs.items()}

    return Case("vgg16_bn 64×64, features.17", make, ratios, clock=clock, rounds=rounds, thorough=True)


def cases() -> list[Case]:
    """Speed for 64 concepts; growth from 64 to 256."""
    few, most, many, whole = "64 in parts of 64", "192 in parts of 64", "256 in parts of 64", "256 in one part"
    parts = {few: (64, 64), many: (256, 64)}
    time = Ratio("time of 256 concepts ÷ of 64, parts of 64", many, few, Bound(4.2), "9")
    memory = (
        Ratio("peak memory of 256 concepts ÷ of 64, parts of 64", many, few, Bound(1.1), "9"),
        Ratio("peak memory of 256 concepts ÷ of 192, parts of 64", many, most, Bound(1.05), "9"),
        Ratio("peak memory of 256 concepts ÷ of 64, in one part", whole, few, Bound(4.2), "9"),
        Ratio("peak memory of 64 concepts, MiB", few, scale=2.0**-20),
    )
    return [
        *(shared(*asked) for asked in ASKED),
        growing("cpu", parts, (time,), 3),
        growing("peak", {**parts, most: (192, 64), whole: (256, 256)}, memory, 1),
    ]
