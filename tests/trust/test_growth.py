"""Calls that are repeated leave nothing: no tensors, hooks, files, threads or memory; also calls that are refused."""

from __future__ import annotations

import contextlib
import gc
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trust_cases import CONDITIONS, ENTRIES, images, net, state, zennit_merged

import crp
from crp.attribution import CondAttribution
from crp.composites import DeepLift, EpsilonPlus, EpsilonPlusFlat, UniformLRP0
from crp.concepts import ChannelConcept
from crp.concepts.linear import DirectionConcept
from crp.engine.kernel_calls import CallRecorder
from crp.engine.replayed import Replayed
from crp.metrics import pixel_flipping
from crp.visualization.mining.run import mine

Case = Callable[[nn.Module, Tensor], Any]


def refused(call: Case) -> Case:
    """The same call, whose error is caught."""

    def caught(model: nn.Module, data: Tensor) -> None:
        with contextlib.suppress(Exception):
            call(model, data)
            raise AssertionError

    return caught


def boom(*_: Any) -> Any:
    raise ZeroDivisionError


def in_a_thread(model: nn.Module, data: Tensor) -> None:
    thread = threading.Thread(target=lambda: ENTRIES["call"](model, data))
    thread.start()
    thread.join()


def with_direction(model: nn.Module, data: Tensor) -> Tensor:
    concept = DirectionConcept(torch.eye(3, dtype=torch.float64))
    return CondAttribution(model)(data, [{"y": 1, "3": [0]}], EpsilonPlus(), mask_map=concept.mask).heatmap


def recorded(model: nn.Module, data: Tensor) -> None:
    """Attributions that are repeated until they are replayed."""
    attribution, rules = CondAttribution(model), EpsilonPlus()
    attribution._replayed = Replayed(CallRecorder(cost=0))
    for _ in range(8):
        attribution(data, [{"y": 1}], rules)
    assert attribution._replayed.replays.replayed


MORE: dict[str, Case] = {
    "linear concepts": with_direction,
    "check": lambda m, x: CondAttribution(m).check(x, CONDITIONS, UniformLRP0()),
    "one attribution": lambda m, x, known={}: known.setdefault(id(m), CondAttribution(m))(x, CONDITIONS, DeepLift()),
    "a list": lambda m, x: CondAttribution(m)(list(x), CONDITIONS, EpsilonPlus()).heatmap,
    "a thread": in_a_thread,
    "recordings": recorded,
    "pixel flipping": lambda m, x: pixel_flipping(m, x, 1, relevance=x.sum(1)),
    "a layer that is not there": refused(lambda m, x: CondAttribution(m)(x, [{"y": 1, "9": [0]}], EpsilonPlus())),
    "data of another type": refused(lambda m, x: CondAttribution(m)(x.float(), CONDITIONS, EpsilonPlusFlat())),
    "an error in a mask": refused(lambda m, x: CondAttribution(m)(x, CONDITIONS, EpsilonPlus(), mask_map=boom)),
    "an error under zennit": refused(
        lambda m, x: CondAttribution(m)(x, CONDITIONS, zennit_merged(), mask_map=lambda *_: boom)
    ),
    "an error in parts": refused(
        lambda m, x: list(CondAttribution(m).generate(x, [*CONDITIONS, {"y": 7}], EpsilonPlus(), verbose=False))
    ),
}
CASES: dict[str, Case] = {**ENTRIES, **MORE}


def left() -> dict[str, int]:
    """What there is in this process."""
    gc.collect()
    objects = gc.get_objects()
    files = Path("/proc/self/fd")
    return {
        "objects": len(objects),
        "tensors": sum(issubclass(type(one), Tensor) for one in objects),
        "blocks": sys.getallocatedblocks(),
        "files": len([*files.iterdir()]) if files.exists() else 0,
        "threads": threading.active_count(),
    }


def growth(case: Case, n: int) -> dict[str, int]:
    """What came to be in the second half of ``n`` calls."""
    model, data = net(), images()
    for _ in range(n - n // 2):
        case(model, data)
    known = state(model)
    before = left()
    for _ in range(n // 2):
        case(model, data)
    after = left()
    assert state(model)["model"] == known["model"] and state(model)["attached"] == known["attached"]
    # (caches may still get an entry or two, and counting takes some blocks, but none for each call)
    allowed = {"objects": n // 4, "blocks": 400}
    return {name: after[name] - before[name] for name in after if after[name] - before[name] > allowed.get(name, 0)}


def test_there_are_31_cases():
    assert len(CASES) == 31


@pytest.mark.promise("Model", "Calls that are repeated leave no tensors, hooks, files, threads or memory")
@pytest.mark.parametrize("name", ["call", "generate of zennit", "absorbed", "an error in a mask", "recordings"])
def test_repeated_calls_leave_nothing(name):
    assert growth(CASES[name], 20) == {}


@pytest.mark.promise("Model", "500 repeats of 30 kinds of calls leave nothing")
@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("name", CASES)
def test_500_calls_leave_nothing(name):
    assert growth(CASES[name], 500) == {}


@pytest.mark.promise("Model", "Runs of mining that are repeated leave no memory, threads or open files")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_mining_again_leaves_nothing(tmp_path):
    def mined(model: nn.Module, data: Tensor) -> None:
        rows, about = [(sample, 1) for sample in data], {"3": ChannelConcept()}
        mine(CondAttribution(model), rows, about, EpsilonPlus(), tmp_path, overwrite=True, progress=False)

    found = growth(mined, 12)
    if "coverage" in sys.modules:  # (which keeps something of every thread that there was)
        found.pop("objects", None)
    assert found == {}
    assert crp.attached(net()) == []
