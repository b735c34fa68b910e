"""An interrupt at any instant leaves nothing on a model, and is raised as it is."""

from __future__ import annotations

import contextlib
import itertools
import random
import time

import pytest
import torch
from trust_cases import ENTRIES, Stop, differences, images, interrupted, net, state

from crp.layers.interrupts import _Waiting, atomic, undivided

#: A signal outside of all contexts may come in a ``__del__`` of others, where Python loses the exception.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def attempts(n_interrupts: int, seed: int = 0) -> list[str]:
    """What was left by calls of which so many were interrupted."""
    draw, model, data = random.Random(seed), net(), images()
    lasts: dict[str, float] = {}
    n_hit, left = 0, []
    names = list(ENTRIES)
    for name in names:
        ENTRIES[name](model, data)
        start = time.perf_counter()
        ENTRIES[name](model, data)
        lasts[name] = time.perf_counter() - start
    for name in itertools.cycle(names):
        before = state(model)
        n_hit += interrupted(lambda name=name, model=model: ENTRIES[name](model, data), draw.uniform(1e-6, lasts[name]))
        wrong = differences(before | {"random": None}, state(model) | {"random": None})
        if wrong:
            left.append(f"{name}: {wrong}")
            model = net()
        if n_hit >= n_interrupts:
            return left
    return left


@pytest.mark.promise("Model", "Ctrl-C at any instant leaves nothing on the model")
def test_interrupts_at_random_instants():
    assert attempts(100) == []


@pytest.mark.promise("Model", "5,000 interrupts at random instants leave nothing")
@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_many_interrupts_at_random_instants():
    assert attempts(5000, seed=1) == []


@pytest.mark.promise("Model", "A call after an interrupt gives what it gave before")
def test_results_after_interrupts_are_the_same():
    model, data = net(), images()
    wanted = {name: ENTRIES[name](model, data) for name in ("call", "call of zennit", "absorbed")}
    for name in wanted:
        for k in range(10):
            interrupted(lambda name=name: ENTRIES[name](model, data), 1e-4 * (k + 1))
        assert torch.equal(ENTRIES[name](model, data), wanted[name])


# --- contexts -------------------------------------------------------------------------------------------------------


def raise_alarm() -> None:
    import signal

    signal.raise_signal(signal.SIGALRM)


@pytest.fixture
def alarmed():
    import signal

    def stop(*_: object) -> None:
        raise Stop

    before = signal.signal(signal.SIGALRM, stop)
    yield
    assert signal.getsignal(signal.SIGALRM) is stop
    assert _Waiting.depth == 0
    signal.signal(signal.SIGALRM, before)


@pytest.mark.promise(
    "Model",
    "A signal whose handler raises an exception waits while something is put on or taken off, and is raised then",
)
@pytest.mark.parametrize("place", ["entering", "inside", "leaving"])
def test_a_context_is_entered_and_left_as_a_whole(alarmed, place):
    steps: list[str] = []

    @atomic
    def context():
        steps.append("on")
        if place == "entering":
            raise_alarm()
        steps.append("entered")
        try:
            yield
        finally:
            steps.append("leaving")
            if place == "leaving":
                raise_alarm()
            steps.append("off")

    with pytest.raises(Stop), context():
        steps.append("body")
        if place == "inside":
            raise_alarm()
            steps.append("never")
    body = [] if place == "entering" else ["body"]
    assert steps == ["on", "entered", *body, "leaving", "off"]


def test_an_undivided_function_runs_to_its_end(alarmed):
    steps: list[str] = []

    @undivided
    def put() -> None:
        raise_alarm()
        steps.append("end")

    @atomic
    def context():
        yield

    with pytest.raises(Stop), context():
        put()
        steps.append("after")
    assert steps == ["end", "after"]


def test_errors_pass_an_atomic_context_as_they_are():
    @atomic
    def context(handles: type[Exception] = KeyError):
        with contextlib.suppress(handles):
            yield 3

    with context() as value:
        assert value == 3
        raise KeyError
    for error in (ValueError("a"), StopIteration("b"), StopIteration()):
        with pytest.raises(type(error)) as raised, context():
            raise error
        assert raised.value is error
