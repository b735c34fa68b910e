"""The benchmarks' arithmetic, counters, forms and pipes; nothing here measures time."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from benchmarks import clocks, harness, ours, peer, report, tiny
from benchmarks.__main__ import main
from benchmarks.harness import Bound, Case, PeerError, Ratio, Row, Spread, interleaved, measure, ratio
from benchmarks.nets import NETS, PRESETS, Samples, Setup, gradient
from benchmarks.remote import Worker
from benchmarks.sections import SECTIONS, default

MIB = 1 << 20
#: A peers' process with candidates that need no peers.
STUB = """
import sys; sys.path.append(sys.argv[1])
from benchmarks import peer
def number(setup, value):
    return lambda: print("noise", flush=True) or value + setup.size
def broken():
    raise ValueError("no such rule\\nand more")
peer.serve(peer.Session({"number": number, "broken": broken}))
"""


@pytest.fixture(autouse=True)
def _without_collection(monkeypatch):
    """Collecting garbage takes longer than all else here."""
    monkeypatch.setattr(harness.gc, "collect", lambda: 0)


def block(mib):
    return torch.empty(mib * MIB, dtype=torch.uint8)


# --- rounds and ratios ----------------------------------------------------------------------------------------------


def test_candidates_take_turns_and_the_first_round_does_not_count():
    order, cost = [], iter(range(100))

    def candidate(name):
        return lambda: order.append(name) or next(cost)

    costs, failed = interleaved({"a": candidate("a"), "b": candidate("b")}, rounds=2, warmup=1)
    assert order == ["a", "b"] * 3
    assert costs == {"a": [2, 4], "b": [3, 5]}
    assert failed == {}


def test_a_peer_that_fails_is_left_out_and_says_why():
    def fails():
        raise PeerError("unknown layer")

    costs, failed = interleaved({"ours": lambda: 1.0, "peer": fails}, rounds=2)
    assert costs == {"ours": [1.0, 1.0]}
    assert failed == {"peer": "unknown layer"}


def test_ratios_are_taken_within_rounds():
    costs = {"a": [2.0, 30.0, 4.0], "b": [1.0, 10.0, 1.0]}
    assert ratio(costs, "a", "b") == Spread(3.0, 2.0, 4.0)  # (the ratio of the medians is 4)
    assert ratio(costs, "a", None, scale=10.0) == Spread(40.0, 20.0, 300.0)
    assert ratio(costs, "a", "missing") is None
    assert ratio({"a": [1.0], "b": [0.0]}, "a", "b") == Spread(*[float("inf")] * 3)


@pytest.mark.parametrize(
    ("bound", "number", "met"), [(Bound(2), 2, True), (Bound(2), 2.1, False), (Bound(2, True), 1.9, False)]
)
def test_bounds(bound, number, met):
    assert bound.met(number) is met


def values(**numbers):
    return lambda: {name: (lambda number=number: number) for name, number in numbers.items()}


def test_a_case_becomes_rows():
    lines = (
        Ratio("half", "a", "b", Bound(0.4), "7", "p"),
        Ratio("peer's", "p", "a", Bound(1, True)),
        Ratio("of none", "q", "a"),
    )
    peers = {"p": {"value": 8.0}, "q": {}}

    class Peers:
        asked = forgotten = 0

        def cost(self, request, clock):
            if "value" not in request:
                raise PeerError("no q")
            assert (request["repeat"], clock) == (1, "value")
            self.asked += 1
            return request["value"]

        def forget(self):
            self.forgotten += 1

    case, theirs = Case("case", values(a=2.0, b=4.0), lines, peers, clock="value", rounds=8), Peers()
    half, peer, none = measure(case, theirs, quick=True)
    assert half == Row("7", "half", "case", Bound(0.4), Spread(0.5, 0.5, 0.5), Spread(2.0, 2.0, 2.0))
    assert (half.met, peer.met, peer.measured.median) == (False, True, 4.0)
    assert (none.measured, none.note, none.met) == (None, "no q", None)
    assert (theirs.asked, theirs.forgotten) == (1 + 8 // 4, 1)
    alone = measure(case)
    assert [row.note for row in alone] == ["needs --peers"] * 3
    assert [row.measured is None for row in alone] == [False, True, True]


def test_short_runs_are_repeated():
    count = []
    case = Case("case", lambda: {"a": lambda: count.append(1)}, (Ratio("a", "a"),), rounds=1, warmup=0, repeat=5)
    measure(case)
    assert len(count) == 5


# --- clocks ---------------------------------------------------------------------------------------------------------


def known():
    kept, dropped = block(1), block(3)
    view = kept[:10]
    del dropped, kept
    return [block(2), view]


def test_peak_of_a_known_case():
    assert clocks.peak_bytes(known) == 4 * MIB


def test_temporaries_within_a_kernel_count():
    a = torch.rand(512, 512).t()  # (softmax of what is not contiguous makes a copy)
    assert 2 * MIB <= clocks.peak_bytes(lambda: a.softmax(1)) < 2.1 * MIB


def test_what_is_kept():
    held = []
    assert clocks.kept_bytes(lambda: held.append(block(2))) == 2 * MIB
    assert clocks.kept_bytes(held.clear) == -2 * MIB
    assert clocks.kept_bytes(known) == 0


def test_peak_of_a_gradient():
    """The leaf, two results, the gradient of the second (from which an output was selected) and of the first."""
    net = nn.Sequential(nn.ReLU(), nn.ReLU())
    data = torch.ones(1, 1, 512, 512)
    assert clocks.peak_bytes(lambda: gradient(net, data)) / MIB == pytest.approx(5, abs=1e-3)


def test_operations_and_calls():
    a = torch.ones(2, 3)
    assert clocks.flops(lambda: a @ a.T) == 2 * 2 * 3 * 2
    assert clocks.calls(lambda: (a + a).exp()) == 2
    assert clocks.value(lambda: 3) == 3.0


# --- reports --------------------------------------------------------------------------------------------------------

ROWS = [
    Row("1", "a ÷ b", "net", Bound(1.5), Spread(1.25, 1.0, 1.5), Spread(3.0, 3.0, 3.0)),
    Row("", "c", "net", None, None, None, "needs --peers"),
]


def record(path=None):
    made = report.Record(path)
    made.sections["one"] = report.Section("Title", {"date": "2026-11-21"}, list(ROWS))
    return made


def test_json_keeps_what_was_measured_before(tmp_path):
    path = tmp_path / "figures.json"
    record(path).save()
    again = report.Record(path)
    again.sections["two"] = report.Section("Other", {}, [])
    again.save()
    assert report.Record(path).sections == {"one": record().sections["one"], "two": again.sections["two"]}
    assert json.loads(path.read_text(encoding="utf-8"))["one"]["rows"][0]["met"] is True


def test_markdown_keeps_what_is_by_hand(tmp_path):
    page = tmp_path / "RESULTS.md"
    record().write_markdown(page)
    page.write_text(page.read_text(encoding="utf-8") + "\n## Limits\n", encoding="utf-8")
    record().write_markdown(page)
    text = page.read_text(encoding="utf-8")
    assert "| 1 | a ÷ b | net | ≤ 1.5 | 1.250 (1 to 1.500) | met | 3 |" in text
    assert text.endswith(f"{report.BY_HAND}\n\n## Limits\n")
    assert text.count(report.BY_HAND) == 1


def test_figures_of_a_gpu_have_a_table_of_their_own(tmp_path, monkeypatch):
    made = report.Record()
    for device in ("Card B", "CPU", "Card A"):
        monkeypatch.setattr(report, "device_name", lambda _, device=device: device)
        made.add("gpu", report.Section("Title", report.environment({}, "cuda"), list(ROWS)))
    assert list(made.sections) == ["gpu on Card B", "gpu", "gpu on Card A"]
    heads = [line for line in made.markdown().splitlines() if line.startswith("#")]
    assert heads == [
        "# Results", "## gpu: Title",
        "# Results on a GPU: Card A", "## gpu on Card A: Title",
        "# Results on a GPU: Card B", "## gpu on Card B: Title",
    ]  # fmt: skip
    made.add("gpu", report.Section("Newer", made.sections["gpu on Card A"].environment, []))
    assert made.sections["gpu on Card A"].title == "Newer"
    assert report.Section("Title", {}).device == report.CPU


def test_the_table_of_the_terminal():
    head, first, second = report.lines(ROWS)
    assert head.split() == ["#", "metric", "case", "goal", "measured", "peer"]
    assert first.index("1.250") == second.index("needs --peers") == head.index("measured")


@pytest.mark.parametrize(
    ("number", "text"), [(3.0, "3"), (1.2345, "1.234"), (12.344, "12.34"), (1114.2, "1114"), (9.31e-7, "9.31e-07")]
)
def test_numbers(number, text):
    assert report.number(number) == text


# --- the peers' process ---------------------------------------------------------------------------------------------


def test_requests_and_answers():
    with Worker(sys.executable, boot=STUB) as worker:
        request = {"candidate": "number", "setup": Setup("demo", 32, 1), "value": 2.5}
        assert worker.cost(request, "value") == 34.5  # (what it prints does not come between)
        worker.forget()
        assert worker.cost({**request, "value": 1}, "value") == 33.0
        with pytest.raises(PeerError, match=r"^ValueError: no such rule$"):
            worker.cost({"candidate": "broken"}, "value")
        assert worker.cost(request, "value") == 34.5


def test_peers_that_are_not_installed_have_no_version():
    assert peer.versions("torch", "no-such-package") == {"torch": version("torch")}


def test_a_process_that_has_ended_is_told():
    with Worker(sys.executable, boot="") as worker, pytest.raises(PeerError, match="has ended"):
        worker.versions()


# --- sections -------------------------------------------------------------------------------------------------------


def cases():
    return [(name, case) for name, section in SECTIONS.items() for case in section.cases()]


@pytest.mark.parametrize(("section", "case"), cases(), ids=lambda value: getattr(value, "name", value))
def test_cases_are_well_formed(section, case):
    """All without building a net."""
    assert case.name and case.ratios
    assert case.clock in clocks.CLOCKS
    assert case.rounds >= 1 <= case.repeat
    asked = {name for line in case.ratios for name in (line.over, line.under, line.peer) if name}
    assert set(case.peers) <= asked, "a peer is run for nothing"
    assert {line.peer for line in case.ratios if line.peer} <= set(case.peers)
    for request in case.peers.values():
        json.dumps({key: value for key, value in request.items() if not callable(value)})
        assert request["family"] in (*tiny.FAMILIES, tiny.VIT) if "family" in request else request["setup"].net in NETS
        assert request.get("preset", "EpsilonPlus") in PRESETS
    assert ("cuda" in {s["setup"].device for s in case.peers.values() if "setup" in s}) <= (section == "gpu")


def test_every_goal_has_a_line():
    goals = {line.goal for _, case in cases() for line in case.ratios}
    assert goals >= {str(number) for number in range(1, 14)} | {"mining", "captum"}


def test_sections_of_the_devices():
    assert set(default("cpu")) | set(default("cuda")) == set(SECTIONS)
    assert default("cuda") == ["gpu"]


def test_candidates_are_those_of_the_lines():
    """One case in full: the smallest net."""
    case = next(case for case in SECTIONS["small"].cases())
    assert set(case.make()) == {"gradient", "ours", "ours, computed"}
    rows = measure(Case(case.name, case.make, case.ratios, case.peers, clock="calls", rounds=1))
    assert rows[3].metric == "one call ÷ gradient" and rows[3].measured.median > 1
    assert rows[0].note == "needs --peers"


def test_the_part_below_a_layer():
    model, data = Setup("demo", 32, 2).build()
    run = ours.gradient_below(model, data, "conv1", 3)
    (found,) = run()
    assert found.shape == (3, 1, 32, 32)
    assert not model.conv1._forward_hooks
    weight = model.conv1.weight.sum((0, 1))
    inside = found[0, 0, 1:-1, 1:-1]
    torch.testing.assert_close(inside, weight.sum().expand_as(inside), atol=1e-5, rtol=0)
    assert clocks.flops(run) == 0.5 * clocks.flops(lambda: model.conv1(torch.ones(6, 1, 32, 32)))


def test_nets_and_datasets_are_alike_each_time():
    (one, data), (two, same) = (Setup("fork", 28, 2).build() for _ in range(2))
    assert torch.equal(data, same)
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, two.state_dict()[name])
    assert float(one.bn1.running_var.std()) > 0.1
    assert torch.equal(Samples(3, (1, 2, 2), 10).images, Samples(3, (1, 2, 2), 1000).images)


def test_the_command_lists_its_sections():
    result = CliRunner().invoke(main, ["--list"])
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.output.splitlines()] == list(SECTIONS)
    assert CliRunner().invoke(main, ["nothing"]).exit_code == 2


def test_each_section_is_measured_in_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def run(command: list[Any], check: bool) -> None:
        assert check
        commands.append([str(part) for part in command])

    monkeypatch.setattr(subprocess, "run", run)
    page = tmp_path / "page.md"
    result = CliRunner().invoke(main, ["counts", "small", "--quick", "--markdown", str(page)])
    assert result.exit_code == 0, result.output
    assert [command[1:4] for command in commands] == [["-m", "benchmarks", "counts"], ["-m", "benchmarks", "small"]]
    assert commands[0][4:6] == commands[1][4:6]  # one file of figures
    assert all(command[6:] == ["--device", "cpu", "--quick"] for command in commands)
    assert page.exists()


def test_a_section_is_printed_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cases() -> list[Case]:
        def make() -> dict[str, Any]:
            return {"one": lambda: None, "two": lambda: None}

        return [Case("nothing", make, (Ratio("two ÷ one", "two", "one"),), rounds=1)]

    monkeypatch.setitem(SECTIONS, "counts", SimpleNamespace(TITLE="a title", cases=cases))
    kept = tmp_path / "figures.json"
    result = CliRunner().invoke(main, ["counts", "--json", str(kept)])
    assert result.exit_code == 0, result.output
    assert "counts: a title" in result.output
    assert "two ÷ one" in result.output
    assert list(json.loads(kept.read_text())) == ["counts"]
