"""One attribution as a multiple of one gradient, in what can be counted exactly; see `tests/engine/test_cost.py`."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.harness import Case
from benchmarks.nets import Setup
from benchmarks.sections.attribution import case

TITLE = "floating-point operations and kernel calls of one attribution ÷ those of one gradient"


def cases() -> list[Case]:
    """Operations at full size, and calls, which do not depend on it."""
    vgg, resnet = Setup("vgg16_bn", 224, 1), Setup("resnet18", 224, 1)
    counted = [
        case("5", vgg, (1.50, 1.51, 2.0), 1, "flops"),
        case("", resnet, (1.45, 2.06, 1.91), 1, "flops"),
        case("6", Setup("vgg16_bn", 64, 2), (1.5,), 1, "calls"),
        case("", Setup("resnet18", 64, 2), (2.1, 3.7, 2.9), 1, "calls"),
    ]
    return [replace(one, name=f"{one.clock}, {one.name}", thorough=one.name.startswith("resnet")) for one in counted]
