"""The section of the GPU: its cases, those that stand for them on a CPU, and its tables."""

from __future__ import annotations

import pytest
import torch
from click.testing import CliRunner

from benchmarks import harness, ours
from benchmarks.__main__ import main
from benchmarks.harness import Case, Ratio, measure
from benchmarks.nets import Setup
from benchmarks.sections import SECTIONS, gpu


@pytest.fixture(autouse=True)
def _without_collection(monkeypatch):
    """Collecting garbage takes longer than all else here."""
    monkeypatch.setattr(harness.gc, "collect", lambda: 0)


def test_the_case_for_the_gpu_on_the_cpu():
    case = gpu.concepts(Setup("demo", 32, 2), "block.relu1", 1.0, n=4, batch_size=2, clock="calls")
    share, calls = measure(case)
    assert share.measured.median > 1
    assert calls.measured.median > 10_000  # (in thousandths)
    model, data = Setup("demo", 32, 2).build()
    run = ours.backward(model, data, ours.composite("EpsilonPlusFlat"))
    assert [run()[0].shape for _ in range(2)] == [data.shape] * 2


def test_tiny_cases_stand_for_those_of_the_gpu():
    """Every case of the GPU, but for what only a GPU has, is also one of the CPU, with the same lines and no goals."""
    on_gpu, tiny = gpu.cases("cuda"), gpu.cases("cpu")
    assert {case.clock for case in on_gpu} - {case.clock for case in tiny} == {
        "cuda", "cuda peak", "launches", "synchronizations"
    }  # fmt: skip
    metrics, those_of_a_cpu = ({r.metric for case in cases for r in case.ratios} for cases in (on_gpu, tiny))
    counted = {f"mining, {clock} a batch" for clock in ("waits", "copies to host", "copies to device", "launches")}
    assert those_of_a_cpu <= metrics
    assert {metric for metric in metrics - those_of_a_cpu if "mining" in metric} == counted
    assert not any(ratio.bound for case in tiny for ratio in case.ratios)
    assert sum(ratio.bound is not None for case in on_gpu for ratio in case.ratios) > 20


@pytest.mark.parametrize("case", gpu.cases("cpu"), ids=lambda case: f"{case.name} {case.clock} {case.ratios[0].metric}")
def test_tiny_cases(case):
    for row in measure(Case(case.name, case.make, case.ratios, case.peers, case.clock, rounds=1, warmup=0)):
        assert row.note == "needs --peers" or row.measured.median > 0


def test_a_case_that_fails_does_not_stop_the_others(tmp_path, monkeypatch):
    def broken():
        raise ValueError("no such net")

    good = Case("good", lambda: {"a": lambda: 3}, (Ratio("a", "a"),), clock="value")
    bad = Case("bad", broken, (Ratio("b", "b"), Ratio("c", "c")))
    monkeypatch.setattr(SECTIONS["small"], "cases", lambda: [bad, good])
    page = tmp_path / "page.md"
    result = CliRunner().invoke(main, ["small", "--markdown", str(page)])
    assert result.exit_code == 1
    assert "not measured: bad: ValueError: no such net" in result.output
    table = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[4].strip() for line in table[1:]] == ["ValueError", "ValueError", "3"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["small", "--device", "cuda"], "small are measured on the CPU only"),
     (["gpu", "--device", "cuda"], "torch finds none")],
)  # fmt: skip
def test_what_cannot_be_measured_on_a_gpu_is_refused(arguments, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert message in result.output
