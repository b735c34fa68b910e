"""One attribution as a multiple of one gradient, in time: computed, as at first, and replayed, as it is repeated."""

from __future__ import annotations

from benchmarks import ours
from benchmarks.clocks import Run
from benchmarks.harness import Bound, Case, Ratio
from benchmarks.nets import Setup

TITLE = "time of one attribution ÷ time of one gradient (forward and backward pass)"
THREE = ("EpsilonPlusFlat", "EpsilonGammaBox", "EpsilonAlpha2Beta1Flat")
#: Goal number, net, limits of the three presets (those of the list end where none is given), rounds.
ASKED: list[tuple[str, Setup, tuple[float, ...], int]] = [
    ("1", Setup("vgg16_bn", 64, 4), (1.25, 1.30, 1.55), 7),
    ("2", Setup("vgg16_bn", 224, 1), (1.40, 1.50, 2.0), 5),
    ("3", Setup("resnet18", 64, 8), (1.35, 2.0, 1.9), 9),
    ("4", Setup("resnet50", 128, 4), (1.45, 1.95, 1.95), 5),
    ("4", Setup("resnet50", 224, 2), (1.6,), 5),
    ("4", Setup("densenet121", 224, 2), (1.6,), 5),
    ("4", Setup("mobilenet_v2", 224, 2), (1.6,), 7),
    ("4", Setup("efficientnet_b0", 224, 2), (2.2,), 7),
]


def case(goal: str, setup: Setup, limits: tuple[float, ...], rounds: int, clock: str = "cpu") -> Case:
    """One net, with one preset for each limit."""
    presets = THREE[: len(limits)]

    def make() -> dict[str, Run]:
        model, data = setup.build()
        runs = {"gradient": ours.gradient_of(model, data)}
        for preset in presets:
            runs[preset] = ours.replayed(model, data, ours.composite(preset))
            runs[f"{preset}, computed"] = ours.attribution(model, data, ours.composite(preset))
        return runs

    return Case(
        name=str(setup),
        make=make,
        ratios=tuple(
            ratio
            for preset, limit in zip(presets, limits, strict=True)
            for ratio in (
                Ratio(f"{preset} ÷ gradient", preset, "gradient", Bound(limit), goal, f"zennit-crp {preset}"),
                Ratio(f"{preset}, computed ÷ gradient", f"{preset}, computed", "gradient"),
            )
        ),
        peers={
            f"zennit-crp {preset}": {"candidate": "attribution", "setup": setup, "preset": preset} for preset in presets
        },
        clock=clock,
        rounds=rounds,
        thorough=setup.net != "mobilenet_v2" and setup.size == 224,
    )


def cases() -> list[Case]:
    """Every net of the goals."""
    return [case(*asked) for asked in ASKED]
