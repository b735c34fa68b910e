"""DeepLIFT against one reference, beside captum's."""

from __future__ import annotations

from benchmarks import ours
from benchmarks.clocks import Run
from benchmarks.harness import Bound, Case, Ratio
from benchmarks.nets import Setup
from crp.composites import DeepLift

TITLE = "DeepLIFT, reference 0 ÷ gradient"
CAPTUM = "captum DeepLift"


def case(setup: Setup, rounds: int) -> Case:
    """One net."""

    def make() -> dict[str, Run]:
        model, data = setup.build()
        return {"gradient": ours.gradient_of(model, data), "ours": ours.attribution(model, data, DeepLift())}

    return Case(
        name=str(setup),
        make=make,
        ratios=(
            Ratio("DeepLIFT ÷ gradient", "ours", "gradient", Bound(2.1), "10", CAPTUM),
            Ratio("captum's ÷ ours", CAPTUM, "ours", Bound(1.0, at_least=True), "10"),
        ),
        peers={CAPTUM: {"candidate": "captum deeplift", "setup": setup}},
        rounds=rounds,
        thorough=setup.size == 224,
    )


def cases() -> list[Case]:
    """vgg16 without batch norm."""
    return [case(Setup("vgg16", 64, 4), 9), case(Setup("vgg16", 224, 1), 5)]
