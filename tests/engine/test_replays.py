"""When `Replays` records a computation, replays, judges and gives it up, by a recorder that does nothing itself."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from crp.engine import replay
from crp.engine.recordings import Tensors
from crp.engine.replay import Computation, Replays

CPU = torch.device("cpu")


def twice(inputs: Mapping[str, Tensor]) -> Tensors:
    return {"y": inputs["x"] * 2}


class Double:
    """A recorder, and a recording, which gives what it is told to."""

    tolerance = 0.0

    def __init__(self, gives: Callable[[Mapping[str, Tensor]], Tensors | None] = twice, ahead: bool = False) -> None:
        self.gives, self.runs_ahead = gives, ahead
        self.asked: list[tuple[int, float, float]] = []
        self.recorded, self.owned, self.readable = 0, list[bool](), True

    def pays(self, runs: int, seconds: float, saved: float) -> bool:
        self.asked.append((runs, seconds, saved))
        return runs > 2

    def record(self, run: Any, inputs: Mapping[str, Tensor]) -> Double:
        self.recorded += 1
        return self

    def can_read(self) -> bool:
        return self.readable

    def replay(self, inputs: Mapping[str, Tensor], only: Collection[str] | None, own: bool = True) -> Tensors | None:
        self.owned.append(own)
        return self.gives(inputs)


class Book:
    """`Replays` that are asked for twice a number, again and again."""

    def __init__(self, recorder: Double, usual: Callable[[Mapping[str, Tensor]], Tensors | None] = twice) -> None:
        self.replays, self.usual, self.computed = Replays(recorder), usual, 0

    def ask(self, x: float = 1.0, times: int = 1, state: object = None, only: Any = None) -> Tensors | None:
        inputs, found = {"x": torch.tensor(x)}, None

        def usual() -> Tensors | None:
            self.computed += 1
            return self.usual(inputs)

        for _ in range(times):
            computation = Computation([state], twice, usual, 0.5)
            found = self.replays.run("key", CPU, lambda: computation, inputs, only)  # noqa: B023
        return found


def test_it_is_recorded_judged_twice_and_then_trusted() -> None:
    recorder = Double()
    book = Book(recorder)
    assert book.ask(times=2) == {"y": 2.0} and (recorder.recorded, book.replays.replayed) == (0, 0)
    assert book.ask(3.0, times=2) == {"y": 6.0} and (recorder.recorded, book.replays.replayed) == (1, 2)
    assert book.computed == 4 and recorder.owned == [False] * 2  # (what is compared needs no memory of its own)
    assert book.ask(4.0) == {"y": 8.0} and book.computed == 4 and recorder.owned[-1]


def test_a_recorder_is_asked_by_the_shortest_time(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 5.0, 10.0, 12.0, 20.0, 24.0])
    monkeypatch.setattr(replay, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    recorder = Double()
    Book(recorder).ask(times=3)
    assert recorder.asked == [(1, 5.0, 0.5), (2, 2.0, 0.5), (3, 2.0, 0.5)]


def test_only_what_is_asked_for_is_given() -> None:
    book = Book(Double())
    assert [book.ask(only={"z"}) for _ in range(4)] == [{}] * 4


@pytest.mark.parametrize("ahead", [True, False])
def test_what_is_given_up_is_not_computed_here(ahead: bool) -> None:
    book = Book(Double(gives=lambda inputs: {"y": inputs["x"] * 3}, ahead=ahead))
    assert [book.ask() is None for _ in range(5)] == [False] * 3 + [True] * 2
    assert book.computed == 3 and book.replays.replayed == 0
    assert book.ask(state="another") is not None


def test_what_cannot_be_computed_at_once_is_asked_for_once() -> None:
    book = Book(Double(), usual=lambda _: None)
    assert book.ask(times=5) is None and book.computed == 1


def test_an_error_of_a_recording_gives_it_up() -> None:
    def fails(_: Any) -> Tensors:
        raise torch.OutOfMemoryError("too little")

    book = Book(recorder := Double(gives=fails))
    assert book.ask(times=3) == {"y": 2.0} and book.ask(times=3) is None and recorder.recorded == 1


def test_a_recording_that_never_serves_gives_way_to_one_more() -> None:
    book = Book(recorder := Double(gives=lambda _: None))
    assert book.ask(times=4) == {"y": 2.0} and recorder.recorded == 2
    assert book.ask(times=3) is None and recorder.recorded == 2


def test_a_recording_that_is_not_judged_twice_is_not_replayed_ahead() -> None:
    book = Book(Double(ahead=True))
    book.ask(times=3)
    assert book.ask(5.0) == {"y": 10.0} and book.computed == 4


WRONG: dict[str, Tensors] = {
    "a value": {"y": torch.tensor(2.1)},
    "a name": {"z": torch.tensor(2.0)},
    "nothing": {},
    "one more": {"y": torch.tensor(2.0), "z": torch.tensor(2.0)},
    "a shape": {"y": torch.tensor([2.0])},
    "a type": {"y": torch.tensor(2.0, dtype=torch.float64)},
    "no number": {"y": torch.tensor(torch.nan)},
}


@pytest.mark.parametrize("what", WRONG)
def test_what_a_replay_gives_must_be_what_is_computed(what: str) -> None:
    book = Book(Double(gives=lambda _: WRONG[what]))
    assert book.ask(times=3) == {"y": 2.0} and book.ask() is None and book.replays.replayed == 0


ALIKE: dict[str, tuple[Tensor, Tensor, float, bool]] = {
    "whole numbers": (torch.tensor([1, 2]), torch.tensor([1, 2]), 0.0, True),
    "other whole numbers": (torch.tensor([1, 2]), torch.tensor([1, 3]), 0.0, False),
    "whole numbers that rounding may decide": (torch.tensor([1, 2]), torch.tensor([1, 3]), 1e-3, True),
    "whole numbers of another type": (torch.tensor([1, 2]), torch.tensor([1, 2], dtype=torch.int32), 1e-3, False),
    "within the tolerance": (torch.tensor([100.0, 0.0]), torch.tensor([100.0, 0.05]), 1e-3, True),
    "beyond it": (torch.tensor([100.0, 0.0]), torch.tensor([100.0, 0.5]), 1e-3, False),
    "beyond it, of small ones": (torch.tensor([0.1, 0.0]), torch.tensor([0.1, 5e-4]), 1e-3, False),
    "no numbers in the same place": (torch.tensor([torch.nan, 2.0]), torch.tensor([torch.nan, 2.0]), 0.0, True),
    "a number beside what is none": (torch.tensor([torch.nan, 2.0]), torch.tensor([torch.nan, 3.0]), 1e-3, False),
    "within the tolerance beside what is none": (
        torch.tensor([torch.nan, 2.0]),
        torch.tensor([torch.nan, 2.001]),
        1e-3,
        True,
    ),
    "empty ones": (torch.empty(0, 2), torch.empty(0, 2), 0.0, True),
}


@pytest.mark.parametrize("name", ALIKE)
def test_how_alike_replays_must_be(name: str) -> None:
    exact, found, tolerance, are_alike = ALIKE[name]
    recorder = Double(gives=lambda _: {"y": found})
    recorder.tolerance = tolerance
    book = Book(recorder, usual=lambda _: {"y": exact})
    book.ask(times=3)
    assert book.replays.replayed == are_alike
