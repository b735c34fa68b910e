"""Language models: what AttnLRP and CP-LRP cost beside a gradient, in time and in bytes for the backward pass."""

from __future__ import annotations

from benchmarks import ours, tiny
from benchmarks.clocks import Run
from benchmarks.harness import Bound, Case, Ratio
from benchmarks.nets import Setup
from crp.attribution import CondAttribution
from crp.composites import CPLRP, AttnLRP
from crp.composites.base import Composite

TITLE = "AttnLRP and CP-LRP of GPT-2 with random weights ÷ gradient, beside lxt"
GOAL = "transformers"
#: Composite, name of lxt's rules, and what is asked of the time.
METHODS: dict[str, tuple[type[Composite], str, float]] = {
    "AttnLRP": (AttnLRP, "attnLRP", 1.15),
    "CP-LRP": (CPLRP, "cp_LRP", 1.0),
}


def time(setup: Setup, name: str, rounds: int) -> Case:
    """Time of one attribution."""
    kind, theirs, limit = METHODS[name]
    peer = f"lxt {name}"

    def make() -> dict[str, Run]:
        model, data = setup.build()
        runs = {"ours": ours.replayed, "ours, computed": ours.attribution}
        return {"gradient": ours.gradient_of(model, data)} | {n: run(model, data, kind()) for n, run in runs.items()}

    return Case(
        name=f"{name}, {setup}",
        make=make,
        ratios=(
            Ratio(f"{name} ÷ gradient", "ours", "gradient", Bound(limit), GOAL, peer),
            Ratio(f"{name}, computed ÷ gradient", "ours, computed", "gradient"),
        ),
        peers={peer: {"candidate": "lxt", "setup": setup, "rules": theirs}},
        rounds=rounds,
        thorough=setup.size > 256,
    )


def saved(setup: Setup) -> Case:
    """Bytes that are kept between forward and backward pass; with checkpoints, too, ÷ gradient without."""

    def make() -> dict[str, Run]:
        (model, data), (blocks, _) = setup.build(), setup._replace(net=f"{setup.net} checkpointed").build()
        runs = {"gradient": ours.graph(model, data)}
        for name, (kind, _, _) in METHODS.items():
            runs[name] = ours.graph(model, data, kind())
            runs[f"{name}, checkpointed"] = ours.graph(blocks, data, kind())
        return runs

    lines = [Ratio(f"kept by {name} ÷ gradient", name, "gradient", Bound(1.2), GOAL) for name in METHODS]
    lines += [
        Ratio(f"kept by {name} with checkpoints ÷ gradient", f"{name}, checkpointed", "gradient", Bound(0.2), GOAL)
        for name in METHODS
    ]
    lines.append(Ratio("kept by a gradient, MiB", "gradient", scale=2.0**-20))
    return Case(str(setup), make, tuple(lines), clock="kept", rounds=1, warmup=0, thorough=setup.size > 256)


def agreement(family: str, name: str) -> Case:
    """How far lxt's relevance of each entry of a tiny model's input is from ours, in float64 ÷ the largest."""
    kind, theirs, _ = METHODS[name]

    def relevance() -> list[float]:
        model, data = tiny.build(family)
        CondAttribution(model)(leaf := data.requires_grad_(), [{"y": 1}], kind())
        assert leaf.grad is not None
        return [float(value) for value in leaf.grad.flatten()]

    request = {"candidate": "lxt difference", "family": family, "rules": theirs, "relevance": relevance}
    return Case(
        name=f"{name}, tiny {family}",
        make=dict,
        ratios=(Ratio("lxt − ours, largest entry ÷ largest of ours", "lxt", bound=Bound(1e-7), goal=GOAL),),
        peers={"lxt": request},
        clock="value",
        rounds=1,
        warmup=0,
    )


def cases() -> list[Case]:
    """A small model, and one of the size of the smallest GPT-2."""
    small, full = Setup("gpt2 4×256", 256, 1), Setup("gpt2 12×768", 1024, 1)
    return [
        *(time(small, name, 15) for name in METHODS),
        saved(small),
        *(time(full, name, 5) for name in METHODS),
        saved(full),
        *(agreement(family, name) for family in tiny.FAMILIES for name in METHODS),
        agreement(tiny.VIT, "CP-LRP"),  # (lxt has no AttnLRP of it)
    ]
