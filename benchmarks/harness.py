"""Cases, rounds and ratios: how everything is measured.

A `Case` has candidates, functions that are run once in each round, ours and the peers' in turn. A `Ratio` is a line of
the table: the median, over the rounds, of one candidate's cost divided by another's in the same round. Whatever makes
the machine slower for a while makes both slower.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol

from benchmarks.clocks import CLOCKS, Run

#: What is asked of a peer's process: the name of a candidate in `benchmarks.peer`, and its keywords. A keyword may be a
#: function, which is called for its value when the case is measured.
Request = Mapping[str, Any]


class Peers(Protocol):
    """What runs the peers' candidates; `benchmarks.remote.Worker`."""

    def cost(self, request: Request, clock: str) -> float:
        """Cost of one run."""

    def forget(self) -> None:
        """Let go of all nets and candidates."""


class Bound(NamedTuple):
    """What is asked of a measured number."""

    limit: float
    at_least: bool = False

    def __str__(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.limit:g}"

    def met(self, number: float) -> bool:
        """Whether a number is as good as asked for."""
        return number >= self.limit if self.at_least else number <= self.limit


class Spread(NamedTuple):
    """Median of the rounds, and the extremes."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, numbers: Sequence[float]) -> Spread:
        """Of at least one number."""
        return cls(statistics.median(numbers), min(numbers), max(numbers))


@dataclass(frozen=True)
class Ratio:
    """One line of the table, in terms of the candidates' names.

    Attributes
    ----------
    metric : str
        What is measured, in words.
    over : str
        Candidate whose cost is counted.
    under : str, optional
        Candidate by which it is divided; without one, the line shows the cost itself.
    bound : Bound, optional
    goal : str
        Number of the goal.
    peer : str, optional
        The peer's candidate that does the same as ``over``.
    scale : float
        By which a cost without ``under`` is multiplied, as in milliseconds.
    """

    metric: str
    over: str
    under: str | None = None
    bound: Bound | None = None
    goal: str = ""
    peer: str | None = None
    scale: float = 1.0


@dataclass(frozen=True)
class Case:
    """Candidates that are measured together.

    Attributes
    ----------
    name : str
    make : callable
        Builds our candidates: ``name -> function``. It is called when the case is measured, so that only one net is in
        memory.
    ratios : tuple of Ratio
    peers : dict of str to Request
        The peers' candidates.
    clock : str
        Of `benchmarks.clocks.CLOCKS`.
    rounds, warmup : int
        Rounds that are counted, and that come before.
    repeat : int
        Calls in one run, for what is very short.
    thorough : bool
        Whether the case is left out where it must be quick.
    """

    name: str
    make: Callable[[], dict[str, Run]]
    ratios: tuple[Ratio, ...]
    peers: Mapping[str, Request] = field(default_factory=dict)
    clock: str = "cpu"
    rounds: int = 7
    warmup: int = 1
    repeat: int = 1
    thorough: bool = False


@dataclass(frozen=True)
class Row:
    """A line of the table, measured.

    Attributes
    ----------
    measured, peer : Spread or None
        None where nothing was measured: without peers, or where the peer fails.
    note : str
        Why nothing was measured.
    """

    goal: str
    metric: str
    case: str
    bound: Bound | None
    measured: Spread | None
    peer: Spread | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None where there is none, or nothing was measured."""
        return None if self.bound is None or self.measured is None else self.bound.met(self.measured.median)

    def as_json(self) -> dict[str, Any]:
        """Plain dict; `from_json` reads it."""
        return {
            **asdict(self),
            "bound": self.bound and self.bound._asdict(),
            "measured": self.measured and self.measured._asdict(),
            "peer": self.peer and self.peer._asdict(),
            "met": self.met,
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Row:
        """Row of such a dict."""
        kinds = {"bound": Bound, "measured": Spread, "peer": Spread}
        known = {key: value for key, value in found.items() if key != "met"}
        return cls(**{k: kinds[k](**v) if k in kinds and v is not None else v for k, v in known.items()})


def interleaved(
    runs: Mapping[str, Callable[[], float]], rounds: int, warmup: int = 1
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Costs of every candidate, each of which is run once a round.

    Parameters
    ----------
    runs : dict of str to callable
        Functions that run a candidate and return its cost.
    rounds : int
    warmup : int
        Rounds before, which are not counted.

    Returns
    -------
    costs : dict of str to list of float
    failed : dict of str to str
        Peers' candidates that failed, which are not run again, and what they said.
    """
    costs: dict[str, list[float]] = {name: [] for name in runs}
    failed: dict[str, str] = {}
    for number in range(warmup + rounds):
        for name in list(costs):
            gc.collect()
            try:
                cost = runs[name]()
            except PeerError as error:
                failed[name] = str(error)
                del costs[name]
                continue
            if number >= warmup:
                costs[name].append(cost)
    return costs, failed


def ratio(costs: Mapping[str, Sequence[float]], over: str, under: str | None, scale: float = 1.0) -> Spread | None:
    """Spread of the ratio within each round, or of the cost itself; None where a candidate was not run."""
    if over not in costs or (under is not None and under not in costs):
        return None
    if under is None:
        return Spread.of([cost * scale for cost in costs[over]])
    # (what costs nothing, such as memory that is not kept, has no ratio)
    pairs = zip(costs[over], costs[under], strict=True)
    return Spread.of([a / b if b else float("inf") for a, b in pairs])


def measure(case: Case, peers: Peers | None = None, quick: bool = False) -> list[Row]:
    """Run a case and give its lines; with ``quick``, in a quarter of the rounds."""
    clock = CLOCKS[case.clock]
    runs = {name: _ours(run, clock, case.repeat) for name, run in case.make().items()}
    if peers is not None:
        requests = {name: {**_known(request), "repeat": case.repeat} for name, request in case.peers.items()}
        runs |= {name: partial(peers.cost, request, case.clock) for name, request in requests.items()}
    gc.collect()
    gc.freeze()  # what is there by now need not be looked through before every run
    try:
        costs, failed = interleaved(runs, max(1, case.rounds // 4) if quick else case.rounds, case.warmup)
    finally:
        gc.unfreeze()
    if peers is not None and case.peers:
        peers.forget()
    rows = []
    for line in case.ratios:
        named = [name for name in (line.over, line.under, line.peer) if name is not None and name in case.peers]
        note = "; ".join(failed.get(name, "needs --peers") for name in named if name not in costs)
        peer = None if line.peer is None else ratio(costs, line.peer, line.under, line.scale)
        measured = ratio(costs, line.over, line.under, line.scale)
        rows.append(Row(line.goal, line.metric, case.name, line.bound, measured, peer, note))
    return rows


def _known(request: Request) -> Request:
    return {key: value() if callable(value) else value for key, value in request.items()}


def not_measured(case: Case, note: str) -> list[Row]:
    """Lines of a case that could not be measured, and why."""
    return [Row(line.goal, line.metric, case.name, line.bound, None, None, note) for line in case.ratios]


def _ours(run: Run, clock: Callable[[Run], float], repeat: int) -> Callable[[], float]:
    if repeat == 1:
        return lambda: clock(run)
    return lambda: clock(lambda: [run() for _ in range(repeat)]) / repeat


class PeerError(RuntimeError):
    """The peer's candidate has failed; the message is what it said."""
