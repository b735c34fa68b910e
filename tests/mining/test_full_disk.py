"""A disk that is full at any moment costs no shard that was written, says what to do, and is no obstacle afterwards."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from mining_cases import Data, files_of, run

from crp.__main__ import cli
from crp.concepts import ChannelConcept
from crp.visualization.mining.run import merge
from crp.visualization.table.store import Table

CALLS = ["open", "writev", "fsync", "replace", "mkdir"]
SETTINGS: dict[str, Any] = {"shard_size": 4, "layer_map": {"relu": ChannelConcept()}, "composite": None}
HINT = "what was written before is kept; make room, then run the same again to go on"


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an uninterrupted run in one process; three shards."""
    return run(tmp_path_factory.mktemp("reference"), Data(9), **SETTINGS).path


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Folders of its parts, on disks of their own."""
    return [run(tmp_path_factory.mktemp("part"), Data(9), part=(number, 2), **SETTINGS).path for number in (0, 1)]


def full_at(number: int, patch: pytest.MonkeyPatch, call: str) -> None:
    """From now on, the disk is full at the ``number``-th call of a function of `os`; what fits is written."""
    original, calls = getattr(os, call), count(1)

    def failing(*args: Any, **kwargs: Any) -> Any:
        if next(calls) != number:
            return original(*args, **kwargs)
        if call == "writev":
            original(args[0], [piece[: len(piece) // 2] for piece in args[1][:1]])
        raise OSError(errno.ENOSPC, "No space left on device")

    patch.setattr(os, call, failing)


def check_every_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, act: Callable[[Path], object], reference: Path
) -> list[int]:
    """Fill the disk at the first call, the second, ... until nothing fails; returns the shards that each time left."""
    left = []
    for number in range(1, 200):
        path = tmp_path / str(number)
        with monkeypatch.context() as patch:
            full_at(number, patch, call)
            try:
                act(path)
                break
            except OSError as error:
                assert error.errno == errno.ENOSPC
                assert str(tmp_path) in str(error) and HINT in str(error)
        shards = {file.name for file in path.glob("shards/*.safetensors")}
        assert shards <= {file.name for file in reference.glob("shards/*")}
        if Table.exists(path):
            assert Table.open(path).verify() == []
            assert {shard.file for shard in Table.open(path).shards} <= shards
        assert not list(tmp_path.rglob("*.tmp")) and not list(tmp_path.rglob("lock-*"))
        times = {name: (path / "shards" / name).stat().st_mtime_ns for name in shards}
        act(path)
        assert files_of(path) == files_of(reference)
        assert all((path / "shards" / name).stat().st_mtime_ns == time for name, time in times.items())  # none redone
        left.append(len(shards))
    assert files_of(path) == files_of(reference)
    return left


@pytest.mark.parametrize("call", CALLS)
def test_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, reference: Path) -> None:
    data = Data(9)
    left = check_every_call(tmp_path, monkeypatch, call, lambda path: run(path, data, **SETTINGS), reference)
    # (Shards are written beside each other: which call is the n-th, and what else is on its way, may differ.)
    assert left[0] == 0
    assert left[-1] == 0 if call == "mkdir" else max(left) >= 2


@pytest.mark.parametrize("call", CALLS)
def test_of_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, reference: Path) -> None:
    data = Data(9)

    def parts(path: Path) -> None:
        for number in (1, 0):
            run(path, data, part=(number, 2), **SETTINGS)

    left = check_every_call(tmp_path, monkeypatch, call, parts, reference)
    assert left[0] == 0
    assert call == "mkdir" or max(left) == 3


@pytest.mark.parametrize("call", CALLS)
def test_of_a_merge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, reference: Path, halves: list[Path]
) -> None:
    before = [files_of(half) for half in halves]
    left = check_every_call(tmp_path, monkeypatch, call, lambda path: merge(path, *halves), reference)
    assert left == sorted(left) and left[0] == 0
    assert call == "mkdir" or set(left) >= {0, 1, 2, 3}
    assert [files_of(half) for half in halves] == before


def test_commands_tell_it_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, halves: list[Path]) -> None:
    with monkeypatch.context() as patch:
        full_at(3, patch, "writev")
        result = CliRunner().invoke(cli, ["merge", str(tmp_path / "all"), *map(str, halves)])
    assert result.exit_code == 1
    assert result.output.startswith("Error: [Errno 28] No space left on device: what was written before is kept")
    assert result.output.count("\n") == 1
    assert CliRunner().invoke(cli, ["merge", str(tmp_path / "all"), *map(str, halves)]).exit_code == 0
