"""The page on concepts: its code runs, and gives the figures that it names."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

PAGE = Path(__file__).resolve().parents[2] / "tutorials" / "concepts.md"


@pytest.fixture(scope="module")
def found():
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S):
        exec(compile(block, str(PAGE), "exec"), names)
    yield names
    shutil.rmtree(names["folder"])


def percent(number: float) -> int:
    return round(100 * number)


def test_a_subspace_is_on_the_mark(found):
    assert abs(percent(found["on_the_mark"]) - 84) <= 3
    whole = found["relevance"].sum(1)
    assert torch.allclose(whole, found["result"].relevances["relu2"].flatten(1).sum(1), rtol=1e-4, atol=1e-4)


def test_marked_eights_are_a_cluster_and_a_prototype_of_their_own(found):
    assert found["parts"].sizes == [43, 43]
    assert sorted(found["marked_in_each"]) == [0, 1]
    marked = found["marked"][found["eights"]].tolist()
    of_each = [{finding.prototype for finding, is_marked in zip(found["findings"], marked, strict=True)
                if is_marked == kind} for kind in (True, False)]  # fmt: skip
    assert [len(kinds) for kinds in of_each] == [1, 1] and of_each[0] != of_each[1]


def test_the_mark_is_projected_out(found):
    rows = re.findall(r"\| (\d+) % \| (\d+) % \|", PAGE.read_text(encoding="utf-8"))
    wanted = [(int(before), int(after)) for before, after in rows]
    got = [(percent(before), percent(after)) for before, after in zip(found["before"], found["after"], strict=True)]
    assert len(wanted) == 3
    assert all(abs(x - y) <= 2 for pair in zip(got, wanted, strict=True) for x, y in zip(*pair, strict=True)), got
    assert found["after"][0] < 0.2 * found["before"][0]
    assert found["after"][1] > found["before"][1]


def test_the_rest_of_the_page(found):
    assert found["spliced"].relevances["relu2.error"].shape == (4, 24, 16, 16)
    assert found["of_class"].heatmap.shape == (2, 32, 32)
    assert [tuple(heatmap.shape) for heatmap in found["of_boxes"].heatmap] == [(60, 80), (64, 64)]
    assert found["of_third_box"].prediction.shape[2] == 4
