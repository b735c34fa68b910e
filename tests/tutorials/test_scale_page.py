"""The page on mining at scale: its commands and its code run, one after the other, on the digits."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from command_cases import crp

PAGE = Path(__file__).resolve().parents[2] / "tutorials" / "scale.md"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
#: What needs a download or a cluster.
ELSEWHERE = ("imagenet/val", "SLURMCluster")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Outputs of the page's commands, and the names that its code has defined."""
    names: dict[str, Any] = {"outputs": {}}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("scale"))
        for kind, block in BLOCKS:
            if any(word in block for word in ELSEWHERE):
                continue
            if kind == "sh":
                for line in block.splitlines():
                    result = crp(*shlex.split(line)[1:])
                    assert result.exit_code == 0, (line, result.output)
                    names["outputs"][line.split()[1]] = result.output
            elif file := re.match(r"# (\w+\.py)\n", block):
                Path(file[1]).write_text(block, encoding="utf-8")
            else:
                exec(compile(block, str(PAGE), "exec"), names)
        again = crp("mine", "--out", "index", "--quiet")
        assert again.exit_code == 0, again.output
        names["again"] = again.output
        names["atlas"] = Path("index/atlas/index.html").resolve()
        sys.modules.pop("mydata", None)
    return names


def test_the_blocks_of_the_page_are_what_the_test_takes_them_for() -> None:
    assert [kind for kind, _ in BLOCKS] == ["sh", "python", "sh", "python", "python"]
    assert all(any(word in block for _, block in BLOCKS) for word in ELSEWHERE)


def test_the_commands_mine_check_and_show(done: dict[str, Any]) -> None:
    assert list(done["outputs"]) == ["mine", "status", "report"]
    status = done["outputs"]["status"]
    assert "898 of 898 samples" in status and "complete" in status and "integrity" in status
    assert "model      mydata:model" in status and "epsilon_plus_flat" in status
    assert done["atlas"].exists()
    assert "898 of 898 samples" in done["again"]


def test_the_table_tells_what_the_page_says(done: dict[str, Any]) -> None:
    assert done["table"].header.version == 2
    assert done["table"].header.recipe["model"]["named"] == "mydata:model"
    assert 0 < len(done["wrong"]) < 150
    assert done["references"][17].shape == (8, 1, 32, 32)
