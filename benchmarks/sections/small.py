"""What one call costs where the net costs next to nothing."""

from __future__ import annotations

from benchmarks import ours
from benchmarks.clocks import Run
from benchmarks.harness import Bound, Case, Ratio
from benchmarks.nets import Setup

TITLE = "fixed cost of one call, on the demo's net"
SETUP = Setup("demo", 32, 1)
LAYER = "block.relu1"


def attributions(preset: str) -> Case:
    """One image, explained again and again."""
    peer = f"zennit-crp {preset}"

    def make() -> dict[str, Run]:
        model, data = SETUP.build()
        runs = {"ours": ours.replayed, "ours, computed": ours.attribution}
        attributions = {name: run(model, data, ours.composite(preset)) for name, run in runs.items()}
        return {"gradient": ours.gradient_of(model, data), **attributions}

    return Case(
        name=f"{SETUP}, {preset}",
        make=make,
        ratios=(
            Ratio("one call ÷ zennit-crp's", "ours", peer, Bound(0.5), "12"),
            Ratio("one call, computed ÷ zennit-crp's", "ours, computed", peer),
            Ratio("one call, ms", "ours", peer=peer, scale=1e3),
            Ratio("one call ÷ gradient", "ours", "gradient", peer=peer),
        ),
        peers={peer: {"candidate": "attribution", "setup": SETUP, "preset": preset}},
        rounds=9,
        repeat=20,
    )


def concepts(preset: str, n: int) -> Case:
    """Some concepts of one image."""
    peer = f"zennit-crp, {n} concepts"

    def make() -> dict[str, Run]:
        model, data = SETUP.build()
        return {"ours": ours.concepts(model, data, ours.composite(preset), LAYER, n, n)}

    return Case(
        name=f"{SETUP}, {preset}, {n} concepts of {LAYER}",
        make=make,
        ratios=(
            Ratio("one call ÷ zennit-crp's", "ours", peer, Bound(0.5), "12"),
            Ratio("one call, ms", "ours", peer=peer, scale=1e3),
        ),
        peers={
            peer: {"candidate": "concepts", "setup": SETUP, "preset": preset, "layer": LAYER, "n": n, "batch_size": n}
        },
        rounds=9,
        repeat=10,
    )


def cases() -> list[Case]:
    """An attribution, and a few concepts."""
    return [attributions("EpsilonPlusFlat"), attributions("EpsilonGammaBox"), concepts("EpsilonPlusFlat", 8)]
