"""captum's LRP, which is the fastest of the peers, on a net that it takes."""

from __future__ import annotations

from benchmarks import ours
from benchmarks.clocks import Run
from benchmarks.harness import Bound, Case, Ratio
from benchmarks.nets import Setup

TITLE = "alpha 1, beta 0 in convolutions and epsilon elsewhere ÷ gradient, beside captum's LRP"
CAPTUM = "captum LRP"


def case(setup: Setup, rounds: int) -> Case:
    """One net without batch norm and without residual connections."""

    def make() -> dict[str, Run]:
        model, data = setup.build()
        attribution = ours.attribution(model, data, ours.composite("EpsilonPlus"))
        return {"gradient": ours.gradient_of(model, data), "ours": attribution}

    return Case(
        name=str(setup),
        make=make,
        ratios=(
            Ratio("EpsilonPlus ÷ gradient", "ours", "gradient", None, "", CAPTUM),
            Ratio("captum's ÷ ours", CAPTUM, "ours", Bound(1.0, at_least=True), "captum"),
        ),
        peers={CAPTUM: {"candidate": "captum lrp", "setup": setup}},
        rounds=rounds,
        thorough=setup.size == 224,
    )


def cases() -> list[Case]:
    """vgg16 without batch norm."""
    return [case(Setup("vgg16", 64, 4), 9), case(Setup("vgg16", 224, 1), 5)]
