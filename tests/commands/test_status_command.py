"""``crp status`` and ``crp merge``: what a table holds, how fast it grew, and names that cannot be trusted."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path

import pytest
from command_cases import crp
from table_maker import make_table

from crp.__main__ import cli
from crp.visualization.table.lock import locked


def test_status_tells_coverage_rate_and_integrity(tmp_path: Path) -> None:
    table, source = make_table(tmp_path, [(0, 40)])
    table.add(source.write(table, 60, 80, {66: "broken"}))
    for shard, age in zip(table.shards, (30, 20), strict=True):
        os.utime(tmp_path / "shards" / shard.file, (time.time() - age, time.time() - age))
    source.write(table, 80, 90)
    with locked(tmp_path, "part"):
        result = crp("status", tmp_path, "--verify")
    assert result.exit_code == 1
    told = result.output
    for line in (
        "59 of 100 samples, 1 skipped",
        "incomplete: 40 samples are missing",
        "recorded   relevance and activation, sum and max, of 2 layers:\n           a, b\n",
        "missing    40 to 59\nmissing    80 to 99\n",
        "skipped    66: broken",
        "rate       2 samples/s; 0.3 min left at that",
        "unmerged   1 shard; crp merge",
        f"written by process {os.getpid()} on ",
        "integrity  every shard is as it was written",
    ):
        assert line in told, told
    file = tmp_path / "shards" / table.shards[0].file
    file.write_bytes(file.read_bytes()[:-1] + b"\x07")
    damaged = crp("status", tmp_path, "--verify")
    assert damaged.exit_code == 1 and f"damaged    {file}" in damaged.output and "integrity" not in damaged.output


def test_a_table_whose_files_are_gone_is_not_sound(tmp_path: Path) -> None:
    table, _ = make_table(tmp_path)
    file = tmp_path / "shards" / table.shards[0].file
    file.unlink()
    result = crp("status", tmp_path)
    assert result.exit_code == 1 and f"damaged    {file} is gone; mine again" in result.output
    assert len(json.loads(crp("status", tmp_path, "--json").output)["damaged"]) == 1


def test_a_pause_or_a_copy_does_not_count_in_the_rate(tmp_path: Path) -> None:
    table, _ = make_table(tmp_path, [(i, i + 1) for i in range(80)])
    ages = [10_000.0] * 40 + [float(80 - i) / 2 for i in range(40)]
    for shard, age in zip(table.shards, ages, strict=True):
        os.utime(tmp_path / "shards" / shard.file, (time.time() - age, time.time() - age))
    assert "rate       2 samples/s; 0.2 min left at that" in crp("status", tmp_path).output


def test_a_whole_table_has_status_0(tmp_path: Path) -> None:
    make_table(tmp_path)
    result = crp("status", tmp_path)
    assert result.exit_code == 0 and "100 of 100 samples" in result.output and "; complete" in result.output


@pytest.mark.parametrize("command", ["status", "merge"])
def test_a_folder_without_a_table(tmp_path: Path, command: str) -> None:
    result = crp(command, tmp_path)
    assert result.exit_code == 1
    assert result.output == f"Error: nothing was mined into {tmp_path}: it has no manifest.json\n"


def test_names_from_elsewhere_cannot_write_on_the_terminal(tmp_path: Path) -> None:
    table, source = make_table(tmp_path, [(0, 40)], layers=("\x1b[2Jevil", "\nb"))
    table.add(source.write(table, 40, 100, {50: "\x1b]0;evil\x07"}))
    told = crp("status", tmp_path).output
    assert "\\x1b[2Jevil, \\nb" in told and "\\x1b]0;evil\\x07" in told
    assert "\x1b" not in told


def test_the_page_and_the_script_use_options_that_exist() -> None:
    import click

    folder = Path(__file__).parents[2] / "tutorials"
    script, page = (folder / name for name in ("mine.sbatch", "scale.md"))
    commands = ("mine", "status", "merge", "report")
    known = {option for name in commands for p in cli.commands[name].params for option in p.opts}
    assert isinstance(cli, click.Group)
    called = script.read_text().partition("-m crp mine")[2]
    used = set(re.findall(r"--[a-z-]+", called)) | {
        option
        for code in re.findall(r"`{1,3}[^`]+`{1,3}", page.read_text())
        if "torchrun" not in code and "SLURMCluster" not in code
        for option in re.findall(r"(?<!=)--[a-z-]+", code)
    }
    assert len(used) > 12
    assert used - known - {"--gpus"} == set()
