"""Peak memory of one attribution: bytes that torch's allocator has handed out at once, beyond net and data."""

from __future__ import annotations

from benchmarks import ours
from benchmarks.clocks import Run
from benchmarks.harness import Bound, Case, Ratio
from benchmarks.nets import Setup

TITLE = "peak memory of one attribution ÷ that of one gradient"
VGG, RESNET = Setup("vgg16_bn", 224, 4), Setup("resnet18", 224, 4)
PRESETS = ("EpsilonPlusFlat", "EpsilonGammaBox", "EpsilonAlpha2Beta1Flat")
PEER = "zennit-crp EpsilonPlusFlat"
MIB = 2.0**-20


def peaks(setup: Setup, limit: float | None) -> Case:
    """One net; the second call, for which modified weights are there from the first."""
    bound, goal = (None, "") if limit is None else (Bound(limit), "13")

    def make() -> dict[str, Run]:
        model, data = setup.build()
        runs = {"gradient": ours.gradient_of(model, data)}
        for preset in PRESETS:
            runs[preset] = ours.attribution(model, data, ours.composite(preset))
            runs[f"{preset}, replayed"] = ours.replayed(model, data, ours.composite(preset))
        return runs

    peers = {"EpsilonPlusFlat": PEER}
    names = [name for preset in PRESETS for name in (preset, f"{preset}, replayed")]
    lines = [Ratio(f"{name} ÷ gradient", name, "gradient", bound, goal, peers.get(name)) for name in names]
    return Case(
        name=str(setup),
        make=make,
        ratios=(*lines, Ratio("gradient, MiB", "gradient", scale=MIB)),
        peers={PEER: {"candidate": "attribution", "setup": setup, "preset": "EpsilonPlusFlat"}},
        clock="peak",
        rounds=1,
        thorough=limit is None,
    )


def kept(setup: Setup, preset: str) -> Case:
    """What the first call for a net keeps for the next ones, of any batch: modified weights."""

    def make() -> dict[str, Run]:
        model, data = setup.build()
        return {"first": ours.attribution(model, data, ours.composite(preset))}

    lines = (Ratio(f"kept after the first call with {preset}, MiB", "first", scale=MIB),)
    return Case(setup.net, make, lines, clock="kept", rounds=1, warmup=0)


def cases() -> list[Case]:
    """Peaks, and what is kept for the next call."""
    small = Setup("vgg16_bn", 32, 1)
    return [peaks(VGG, 1.3), peaks(RESNET, None), *(kept(small, preset) for preset in PRESETS)]
