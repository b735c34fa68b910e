"""The comparison of two checkouts: its arithmetic, and that each runs with its own package; nothing measures time."""

from __future__ import annotations

import re
import sys

import pytest
import torch
from click.testing import CliRunner

from benchmarks import checkouts, harness, numbers
from benchmarks.checkouts import boot, main
from benchmarks.numbers import Difference, apart, compare, difference, fingerprint, stored
from benchmarks.remote import Worker

#: A package with what is asked of ours: relevance is ``factor`` times the input, and half of it is a bias's.
PACKAGE = {
    "__init__.py": "",
    "attribution.py": """
import torch
from crp.composites import registry
class CondAttribution:
    def __init__(self, model):
        self.model = model
    def __call__(self, data, conditions, composite):
        data.grad = data.detach() * registry.FACTOR
        return Result(self.model(data).detach())
    def absorbed(self, data, conditions, composite):
        return Kept(data.sum((1, 2, 3)))
class Result:
    def __init__(self, prediction):
        self.prediction = prediction
class Kept:
    def __init__(self, total):
        self.initial, self.input, self.layers = 2 * total, total, {"0": {"bias": total, "empty": 0 * total}}
""",
    "composites/__init__.py": "",
    "composites/registry.py": """
FACTOR = {factor}
def get(name, **keywords):
    if name == {refused!r}:
        raise ValueError("no " + name)
""",
}


def checkout(folder, factor, refused=""):
    for name, text in PACKAGE.items():
        file = folder / "crp" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text.replace("{factor}", str(factor)).replace("{refused!r}", repr(refused)))
    return folder


def found(heatmap, **account):
    entries = {key: torch.tensor(value) for key, value in account.items()}
    return {"heatmap": torch.tensor(heatmap), "prediction": torch.ones(1), "account": entries}


# --- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ([4.0, -8.0], [4.0, -8.0], 0.0),
        ([4.0, -8.0], [5.0, -8.0], 1 / 8),
        ([0.0], [1.0], float("inf")),
        ([1.0, float("nan")], [1.5, float("nan")], 0.5),
        ([1.0, float("nan")], [1.0, 2.0], float("inf")),
    ],
)
def test_difference_is_relative_to_the_largest_old_value(old, new, expected):
    assert apart([torch.tensor(old)], [torch.tensor(new)]) == expected


def test_accounts_are_compared_by_kind_and_a_missing_kind_is_zero():
    old = found([1.0], initial=[8.0], input=[4.0], bias=[3.0])
    new = found([1.0], initial=[8.0], input=[4.0], bias=[3.0], empty=[1.0])
    row = difference("net", "preset", old, new)
    assert (row.heatmap, row.account, row.prediction, row.rests) == (0.0, 1 / 8, 0.0, (1 / 8, 0.0))
    assert row.size == 1 / 8


def test_what_one_side_refuses_counts_as_different_and_what_both_refuse_does_not():
    old, new = found([1.0], initial=[1.0], input=[1.0]), {"error": "TypeError: no rule"}
    one, both = difference("net", "preset", old, new), difference("net", "preset", new, new)
    assert one.size > numbers.SAME
    assert "new: TypeError: no rule" in str(one)
    assert both.size == 0
    assert "both: TypeError: no rule" in str(both)


def test_the_largest_difference_comes_first(tmp_path):
    folders = [tmp_path / "old", tmp_path / "new"]
    for net, change in (("b", 0.0), ("a/c", 0.5), ("d", 0.25)):
        for folder, value in zip(folders, (1.0, 1.0 + change), strict=True):
            stored(folder, net, "zplus").parent.mkdir(parents=True)
            torch.save(found([value], initial=[1.0], input=[1.0]), stored(folder, net, "zplus"))
    rows = compare(folders, ["b", "a/c", "d", "missing"], ["zplus"])
    assert [(row.net, row.heatmap) for row in rows] == [("a/c", 0.5), ("d", 0.25), ("b", 0.0)]
    assert isinstance(rows[0], Difference)


def test_hash_is_that_of_the_package_s_sources(tmp_path):
    one, two = checkout(tmp_path / "one", 1), checkout(tmp_path / "two", 1)
    assert fingerprint(one) == fingerprint(two)
    assert fingerprint(one) != fingerprint(checkout(two, 2))


def test_command_compares_numbers_of_two_packages_and_keeps_them(tmp_path):
    old, new = checkout(tmp_path / "old", 1.0), checkout(tmp_path / "new", 1.5, refused="deeplift")
    arguments = [
        str(old),
        str(new),
        "--numbers",
        "--nets",
        "torchvision/squeezenet1_1",
        "--into",
        str(tmp_path / "kept"),
    ]
    arguments += ["--presets", "zplus", "--presets", "deeplift"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    _, first, second, last = result.output.splitlines()
    assert re.fullmatch(r"torchvision/squeezenet1_1 +zplus +5.0e-01 +0.0e\+00 +0.0e\+00 +0.0e\+00 +0.0e\+00", first)
    assert re.fullmatch(r"torchvision/squeezenet1_1 +deeplift .*new: ValueError: no deeplift", second)
    assert last.startswith("2 rows: 0 equal; 2 apart")
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "kept").rglob("*.pt")}
    assert len(times) == 4
    assert CliRunner().invoke(main, arguments).output == result.output
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "kept").rglob("*.pt")} == times


def test_command_wants_two_checkouts_for_times(tmp_path):
    assert CliRunner().invoke(main, [str(checkout(tmp_path, 1)), "--time"]).exit_code == 2
    assert CliRunner().invoke(main, [str(tmp_path), str(tmp_path)]).exit_code == 2


# --- time -----------------------------------------------------------------------------------------------------------


SERVE = """
from benchmarks import checkouts, peer
from crp.composites import registry
peer.serve(checkouts.Session({"factor": lambda: lambda: registry.FACTOR}))
"""


def test_worker_has_the_checkout_s_package_and_our_benchmarks(tmp_path):
    with Worker(sys.executable, boot(checkout(tmp_path, 2.0), f"exec({SERVE!r})")) as worker:
        assert worker.cost({"candidate": "factor"}, "value") == 2.0


def test_times_are_taken_in_turn_and_divided(tmp_path, monkeypatch, capsys):
    order = []

    class Stub:
        def __init__(self, python, program):
            self.name = re.search(r"(old|new)'", program)[1]

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def cost(self, request, clock):
            order.append(self.name)
            return {"old": 2.0, "new": 3.0}[self.name]

        def forget(self):
            order.append("forget")

    monkeypatch.setattr(checkouts, "Worker", Stub)
    monkeypatch.setattr(harness.gc, "collect", lambda: 0)
    checkouts.measure({"old": tmp_path / "old", "new": tmp_path / "new"}, ["demo"], 2)
    assert order == ["old", "new"] * 4 * 3 + ["forget"] * 2
    _, *rows = capsys.readouterr().out.splitlines()
    assert [row.split()[-5:] for row in rows] == [["1.500", "1.500", "1.500", "2000.00", "3000.00"]] * 3
