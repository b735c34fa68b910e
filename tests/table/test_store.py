from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import pickle
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from table_maker import Source, make_header, make_table

from crp.concepts import normalize
from crp.visualization.table import lock, shards
from crp.visualization.table.document import get_checksum
from crp.visualization.table.files import write_atomic
from crp.visualization.table.lock import locked
from crp.visualization.table.manifest import ShardRecord, TableHeader
from crp.visualization.table.store import (
    Table,
    TableCorruptError,
    TableError,
    TableLockedError,
    TableMismatchError,
    TableNotFoundError,
)


def content(table: Table) -> dict[str, Any]:
    """All rows of a table, in the order of samples and targets."""
    found: dict[str, Any] = {}
    for layer in table.layers:
        for mode in table.modes:
            for kind in table.kinds:
                columns = zip(*table.blocks(layer, mode, kind, normed=True), strict=True)
                sample, target, value, position = (np.concatenate(column) for column in columns)
                order = np.lexsort((target, sample))
                found[layer, mode, kind] = [c[order].tolist() for c in (sample, target, value, position)]
    return found


# --- reading and writing --------------------------------------------------------------------------


def test_a_shard_is_what_safetensors_writes(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    kinds = ("float64", "float32", "float16", "int64", "int32", "uint16", "uint8", "bool", ">i4")
    columns = {"sample": [np.arange(3), np.arange(3, 7)], "target": [np.zeros(7, np.int64)]}
    for number, kind in enumerate(kinds):
        values = generator.integers(0, 2, (7, number, 2)).astype(kind)
        columns[f'{kind}/"lay\\er" \t é {number}'] = [values[:2], values[2:2], values[2:, ::-1][:, ::-1]]
    columns["strided"] = [np.arange(14.0).reshape(7, 2)[:, 1]]
    columns["empty"] = [np.empty((0, 4), np.float32)]
    (tmp_path / "shards").mkdir()
    record = shards.write_shard(tmp_path / "shards", "that", 3, 10, columns, {7: 'no "é"'})
    described = {"table": "that", "start": 3, "stop": 10, "skipped": {"7": 'no "é"'}}
    whole = {key: np.concatenate(parts) for key, parts in columns.items()}
    content = (tmp_path / "shards" / record.file).read_bytes()
    assert content == safetensors.numpy.save(whole, metadata={"crp": json.dumps(described)})
    assert (record.sha256, record.rows) == (hashlib.sha256(content).hexdigest(), 7)


def test_writes_that_are_cut_short_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = make_table(tmp_path / "whole")
    sizes = itertools.cycle((1, 7, 100, 4096))

    def short(handle: int, pieces: list[memoryview]) -> int:
        assert len(pieces) <= 1024
        return os.write(handle, b"".join(pieces)[: next(sizes)])

    monkeypatch.setattr(os, "writev", short)
    cut, _ = make_table(tmp_path / "cut")
    assert cut.digest == whole.digest
    assert Table.open(cut.path).verify() == []
    monkeypatch.delattr(os, "writev")  # (some systems have none)
    other, _ = make_table(tmp_path / "other")
    assert other.digest == whole.digest


def test_a_table_gives_back_what_was_written(tmp_path: Path) -> None:
    table, source = make_table(tmp_path)
    table = Table.open(tmp_path)
    assert (table.layers, table.modes, table.kinds) == (("a", "b"), ("relevance", "activation"), ("sum", "max"))
    assert (table.n_samples, table.n_rows, table.n_concepts("a")) == (100, len(source.sample), 5)
    rows = table.rows()
    assert rows.sample.tolist() == source.sample.tolist()
    assert rows.target.tolist() == source.target.tolist()
    for mode in table.modes:
        for kind in table.kinds:
            block = [np.concatenate(c) for c in zip(*table.blocks("b", mode, kind), strict=True)]
            assert block[2].tolist() == source.columns[f"{mode}.{kind}/b"].tolist()
            assert block[3].tolist() == source.columns[f"{mode}.position/b"].tolist()
            assert (block[2].dtype, block[3].dtype, block[0].dtype) == (np.float32, np.int64, np.int64)
            column = table.column("b", 3, mode, kind, normed=True)
            value = normalize(torch.from_numpy(block[2]))[:, 3]
            assert column.value.tolist() == value.tolist()
            assert column.position.tolist() == block[3][:, 3].tolist()
    assert table.verify() == []


def test_large_targets_stay_exact(tmp_path: Path) -> None:
    source = Source()
    large = [16777217, 2**53 + 1, 2**63 - 1]
    source.target[-3:] = large
    table = Table.create(tmp_path, make_header())
    table.add(source.write(table, 0, 100))
    assert Table.open(tmp_path).rows().target[-3:].tolist() == large


@pytest.mark.parametrize(
    "layer", ["a/b", "../../evil", "/etc/evil", "enc_1_2_.a", "é 漢 <script>", "__metadata__", "C:\\x"]
)
def test_layer_names_are_never_file_names(tmp_path: Path, layer: str) -> None:
    folder = tmp_path / "deep" / "down"
    table, source = make_table(folder, layers=(layer, "enc_1_2_.b"))
    assert table.column(layer, 2).value.tolist() == source.columns[f"relevance.sum/{layer}"][:, 2].tolist()
    names = [file.name for file in tmp_path.rglob("*") if file.is_file()]
    assert sorted(names) == sorted(["manifest.json", *(shard.file for shard in table.shards)])


def test_coverage_tells_seen_skipped_and_missing(tmp_path: Path) -> None:
    table, source = make_table(tmp_path, [(10, 20), (20, 30), (50, 60), (55, 70)])
    table.add(source.write(table, 80, 90, {83: "broken", 85: "not finite"}))
    coverage = Table.open(tmp_path).coverage()
    assert coverage.seen == [(10, 30), (50, 70), (80, 90)]
    assert coverage.missing == [(0, 10), (30, 50), (70, 80), (90, 100)]
    assert coverage.skipped == {83: "broken", 85: "not finite"}
    assert table.coverage(15, 84) == ([(15, 30), (50, 70), (80, 84)], {83: "broken"}, [(30, 50), (70, 80)])
    assert table.coverage(12, 28).missing == []
    table.add(source.write(table, 0, 60))
    assert table.coverage() == ([(0, 70), (80, 90)], {83: "broken", 85: "not finite"}, [(70, 80), (90, 100)])


def test_a_sample_counts_once_and_a_skipped_one_where_it_was_mined(tmp_path: Path) -> None:
    reference, source = make_table(tmp_path / "reference", [(0, 100)])
    table = Table.create(tmp_path / "table", reference.header)
    table.add(source.write(table, 0, 60, {7: "broken", 8: "broken"}))
    assert 7 in table.coverage().skipped
    table.add(source.write(table, 5, 100, {8: "broken still"}))
    assert table.coverage().skipped == {8: "broken still"}
    table.add(source.write(table, 8, 9))
    assert table.coverage() == ([(0, 100)], {}, [])
    assert content(table) == content(reference)
    assert table.n_rows == reference.n_rows


def test_a_range_mined_again_replaces_its_shard(tmp_path: Path) -> None:
    table, source = make_table(tmp_path, [(0, 50)])
    table.add(source.write(table, 50, 100, {60: "broken"}))
    table.add(source.write(table, 50, 100))
    assert len(Table.open(tmp_path).shards) == 2
    assert table.coverage().skipped == {}
    assert {file.name for file in (tmp_path / "shards").iterdir()} == {shard.file for shard in table.shards}


def test_equal_content_has_an_equal_digest(tmp_path: Path) -> None:
    tables = [make_table(tmp_path / str(i), ranges)[0] for i, ranges in enumerate([[(0, 50), (50, 100)]] * 2)]
    assert tables[0].digest == tables[1].digest == Table.open(tables[0].path).digest
    swapped, _ = make_table(tmp_path / "swapped", [(50, 100), (0, 50)])
    assert swapped.digest == tables[0].digest
    other, _ = make_table(tmp_path / "other", [(0, 50), (50, 100)], seed=1)
    assert other.digest != tables[0].digest


def test_shards_of_another_number_of_concepts_are_refused(tmp_path: Path) -> None:
    table, _ = make_table(tmp_path, [(0, 50)])
    with pytest.raises(ValueError, match=r"samples 50 to 99 give 6 concepts for layer 'a', earlier ones 5"):
        table.add(Source(n_concepts=6).write(table, 50, 100))
    assert len(Table.open(tmp_path).shards) == 1


# --- refusals -------------------------------------------------------------------------------------


def test_no_table(tmp_path: Path) -> None:
    assert not Table.exists(tmp_path / "none")
    with pytest.raises(TableNotFoundError, match=r"nothing was mined into .*none: it has no manifest.json") as caught:
        Table.open(tmp_path / "none")
    assert isinstance(caught.value, FileNotFoundError | TableError)


def test_what_differs_is_named(tmp_path: Path) -> None:
    table, _ = make_table(tmp_path)
    table.check(model="m" * 64, dataset="d" * 64)
    with pytest.raises(TableMismatchError, match=r"another model and another dataset .*torch 2\.4.*overwrite"):
        table.check(model="x" * 64, composite="c" * 64, dataset="y" * 64)
    table.check_header(make_header())
    with pytest.raises(TableMismatchError, match="another composite"):
        table.check_header(make_header(composite="x" * 64))
    with pytest.raises(TableMismatchError, match=r"n_samples = 100, not 50"):
        table.check_header(make_header(50))
    with pytest.raises(TableMismatchError, match=r"layers = \('a', 'b'\), not \('a',\)"):
        table.check_header(make_header(layers=["a"]))


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest, with a checksum that fits."""
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["checksum"]
    change(manifest)
    manifest["checksum"] = get_checksum(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["shards"][0].update(file="../outside.safetensors"),
        lambda m: m["shards"][0].update(file="/etc/passwd"),
        lambda m: m["shards"][0].update(file="0-40-aaaaaaaa.safetensors/../../x"),
        lambda m: m["shards"][0].update(file=3),
        lambda m: m["shards"][0].update(start=-1),
        lambda m: m["shards"][0].update(stop=0),
        lambda m: m["shards"][0].update(rows=1.5),
        lambda m: m["shards"][0].update(skipped={"70": "not in range"}),
        lambda m: m["shards"][0].update(sha256="no hash"),
        lambda m: m["shards"][0].update(concepts=[1]),
        lambda m: m["shards"][0].update(more=1),
        lambda m: m["shards"].__setitem__(0, []),
        lambda m: m.update(shards=None),
        lambda m: m.update(version=1),
        lambda m: m.update(version=3),
        lambda m: m.update(storage="float64"),
        lambda m: m.update(layers=["a", "a"]),
        lambda m: m.update(layers=["a"]),
        lambda m: m.update(recipe=[]),
        lambda m: m.update(n_samples=99),
        lambda m: m["shards"][0].update(stop=100),
        lambda m: m["shards"][0].update(concepts={"a": 0, "b": 5}),
        lambda m: [shard["concepts"].update(a=0) for shard in m["shards"]],
        lambda m: m["shards"][0].update(concepts={"a": 4, "b": 5}),
        lambda m: m["shards"].append(m["shards"][0]),
        lambda m: m.update(probes={"0": float("nan")}),
        lambda m: m.update(more=1),
        lambda m: m.pop("version"),
        lambda m: m.update(layers=1),
    ],
)
def test_a_manifest_is_not_believed(tmp_path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    make_table(tmp_path)
    edit(tmp_path, change)
    with pytest.raises(TableCorruptError, match=r"manifest\.json"):
        Table.open(tmp_path)


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"\xff\xfe", b"null"])
def test_a_damaged_manifest_is_named(tmp_path: Path, damage: bytes) -> None:
    make_table(tmp_path)
    (tmp_path / "manifest.json").write_bytes(damage)
    with pytest.raises(TableCorruptError, match=r"manifest\.json"):
        Table.open(tmp_path)


def flipped(data: bytes) -> bytes:
    return data[:-100] + bytes([data[-100] ^ 1]) + data[-99:]


@pytest.mark.parametrize(
    "damage", [flipped, lambda data: data[:-10], lambda _: b"", lambda data: b"\xff" * 8 + data[8:], None]
)
def test_a_damaged_shard_is_named_and_never_read(tmp_path: Path, damage: Callable[[bytes], bytes] | None) -> None:
    table, _ = make_table(tmp_path)
    content(table)
    file = tmp_path / "shards" / table.shards[1].file
    if damage is None:
        file.unlink()
    else:
        file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(TableCorruptError, match=rf"{file.name}.*mine again"):
        content(Table.open(tmp_path))
    (problem,) = table.verify()
    assert file.name in problem
    # To mine again is to drop it first: its samples are then missing.
    (problem,) = table.drop_damaged()
    assert file.name in problem
    assert Table.open(tmp_path).coverage().missing == [(40, 100)]
    assert table.adopt() == 0


def test_a_header_that_lies_is_no_shard(tmp_path: Path) -> None:
    table, _ = make_table(tmp_path, [(0, 40)])
    fake = b"\xff\xff\xff\xff\x00\x00\x00\x00" + b"{}"
    sha = hashlib.sha256(fake).hexdigest()
    name = f"40-100-{sha[:8]}.safetensors"
    (tmp_path / "shards" / name).write_bytes(fake)
    assert table.adopt() == 0
    table.add(ShardRecord(name, sha, 40, 100, 60, {"a": 5, "b": 5}))
    with pytest.raises(TableCorruptError, match=name):
        content(table)
    assert name in table.verify()[0]


@pytest.mark.parametrize("change", ["other samples", "unsorted", "repeated"])
def test_rows_that_are_not_those_of_the_shard_are_found(tmp_path: Path, change: str) -> None:
    table, source = make_table(tmp_path, [(0, 40)])
    arrays = source.arrays(30 if change == "other samples" else 40, 100)
    rows = {"unsorted": slice(None, None, -1), "repeated": [0, 0, 1]}.get(change, slice(None))
    columns = {key: [np.ascontiguousarray(array[rows])] for key, array in arrays.items()}
    wrong = shards.write_shard(tmp_path / "shards", table.header.identity, 40, 100, columns, {})
    table.add(wrong)
    (problem,) = table.verify()
    assert wrong.file in problem


# --- writing --------------------------------------------------------------------------------------


def test_adopt_takes_in_what_the_manifest_misses(tmp_path: Path) -> None:
    reference, source = make_table(tmp_path / "reference")
    table = Table.create(tmp_path / "table", reference.header)
    for start, stop in ((0, 40), (40, 100)):
        source.write(table, start, stop, {})
    foreign = Table(tmp_path / "table", make_header(model="x" * 64))
    source.write(foreign, 0, 50)
    (tmp_path / "table" / "shards" / "0-10-aaaaaaaa.safetensors").write_bytes(b"something")
    assert table.adopt() == 2
    source.write(table, 40, 100, {50: "what a replaced shard leaves, if deleting it fails"})
    assert table.adopt() == 0
    assert table.shards == reference.shards
    assert table.digest == Table.open(table.path).digest == reference.digest


def test_discard_deletes_the_table_and_nothing_else(tmp_path: Path) -> None:
    make_table(tmp_path)
    (tmp_path / "mine.txt").write_text("x")
    (tmp_path / "shards" / "notes.txt").write_text("x")
    Table.discard(tmp_path)
    assert not Table.exists(tmp_path)
    assert sorted(f.name for f in tmp_path.rglob("*") if f.is_file()) == ["mine.txt", "notes.txt"]


def test_only_a_full_disk_is_told_to_be_full(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        write_atomic(tmp_path / "nothing" / "file", b"content")
    assert "make room" not in str(caught.value)


def test_a_table_is_there_once_it_is_made(tmp_path: Path) -> None:
    header = TableHeader(5, ("a",))
    made = Table.create(tmp_path, header)
    assert Table.open(tmp_path).header == header and Table.open(tmp_path).shards == made.shards == []
    assert made.is_empty


def test_a_shard_without_rows_says_nothing_of_concepts(tmp_path: Path) -> None:
    empty, full = (ShardRecord(f"{i}", "0" * 64, i, i + 1, i, {"a": 3} if i else {}) for i in range(2))
    assert Table(tmp_path, TableHeader(2, ("a",)), [empty, full]).n_concepts("a") == 3


def test_discard_of_what_is_no_table_does_nothing(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    Table.discard(tmp_path)
    Table.discard(tmp_path / "nothing")
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_clean_deletes_what_a_killed_write_left(tmp_path: Path) -> None:
    table, _ = make_table(tmp_path)
    left = [".manifest.json.0123abcd.tmp", "shards/.0-40-aaaaaaaa.safetensors.0123abcd.tmp"]
    kept = [".hidden.tmp", "mine.tmp"]
    for name in left + kept:
        (tmp_path / name).write_text("half")
    table.clean()
    assert [(tmp_path / name).exists() for name in left + kept] == [False, False, True, True]


def calls_of(module: Any, name: str) -> Callable[[pytest.MonkeyPatch, int], list[int]]:
    """Make the n-th call fail with ENOSPC."""

    def fail_at(patch: pytest.MonkeyPatch, n: int) -> list[int]:
        calls: list[int] = []
        original = getattr(module, name)

        def replaced(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == n:
                raise OSError(errno.ENOSPC, "No space left on device")
            return original(*args, **kwargs)

        patch.setattr(module, name, replaced)
        return calls

    return fail_at


@pytest.mark.parametrize(
    "fail_at", [calls_of(os, "open"), calls_of(os, "writev"), calls_of(os, "fsync"), calls_of(Path, "replace")]
)
def test_a_full_disk_loses_nothing_that_was_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail_at: Callable[[pytest.MonkeyPatch, int], list[int]]
) -> None:
    reference, source = make_table(tmp_path / "reference", [(0, 40), (40, 70), (70, 100)])
    for n in range(1, 50):
        folder = tmp_path / str(n)
        table, _ = make_table(folder, [(0, 40)])
        with monkeypatch.context() as patch:
            fail_at(patch, n)
            try:
                for start, stop in ((40, 70), (70, 100)):
                    table.add(source.write(table, start, stop))
                finished = True
            except OSError as error:
                assert error.errno == errno.ENOSPC
                finished = False
        assert not list(folder.rglob("*.tmp"))
        found = Table.open(folder)
        # Where the very last step fails, a file is there that was not reported: never the other way round.
        assert set(map(str, table.shards)) <= set(map(str, found.shards))
        assert table.shards[0].start == 0
        assert found.verify() == []
        for start, stop in ((40, 70), (70, 100)):
            if found.coverage(start, stop).missing:
                found.add(source.write(found, start, stop))
        assert found.digest == reference.digest
        assert content(found) == content(reference)
        if finished:
            break
    assert n > 2


@pytest.mark.parametrize(("number", "is_raised"), [(errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EIO, True)])
def test_drives_that_sync_no_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, is_raised: bool
) -> None:
    usual = os.fsync

    def sync(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(number, os.strerror(number))
        usual(handle)

    monkeypatch.setattr(os, "fsync", sync)
    with pytest.raises(OSError, match=os.strerror(number)) if is_raised else nullcontext():
        write_atomic(tmp_path / "file", b"content")
    assert (tmp_path / "file").read_bytes() == b"content"


# --- lock -----------------------------------------------------------------------------------------


def owner(**changes: Any) -> str:
    return json.dumps(lock._owner() | changes)


def test_a_file_that_cannot_be_written_has_its_own_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"No such file or directory: '.*absent/a\.json'"):
        write_atomic(tmp_path / "absent" / "a.json", b"{}")


def test_a_second_run_fails_at_once(tmp_path: Path) -> None:
    with locked(tmp_path):
        with pytest.raises(TableLockedError, match=rf"written by process {os.getpid()} on"), locked(tmp_path):
            pass
        assert len(list(tmp_path.iterdir())) == 1
    assert not list(tmp_path.iterdir())
    with locked(tmp_path):
        pass


def test_the_lock_is_released_after_an_exception(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), locked(tmp_path):
        raise KeyboardInterrupt
    with locked(tmp_path):
        pass


def test_a_live_process_holds_and_a_dead_one_does_not(tmp_path: Path) -> None:
    code = "import sys; sys.stdin.read()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    other = tmp_path / "lock-other.json"
    other.write_text(owner(pid=process.pid, started=lock._started(process.pid)))
    try:
        with pytest.raises(TableLockedError, match=f"process {process.pid} "), locked(tmp_path):
            pass
        process.kill()
        while lock._started(process.pid) is not None:  # a zombie, until it is waited for, is dead too
            pass
        with locked(tmp_path):
            assert not other.exists()
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("changes", "is_alive"),
    [
        ({}, True),
        ({"started": "1"}, False),  # another process of this number
        ({"boot": "another"}, False),  # the machine was started anew
        ({"host": "elsewhere", "boot": "another", "started": "1"}, True),
        ({"namespace": "another container"}, True),
        ({"pid": "?"}, True),
    ],
)
def test_who_counts_as_alive(tmp_path: Path, changes: dict[str, Any], is_alive: bool) -> None:
    other = tmp_path / "lock-other.json"
    other.write_text(owner(**changes))
    if is_alive:
        with pytest.raises(TableLockedError, match=r"delete .*lock-other\.json"), locked(tmp_path):
            pass
        assert other.exists()
    else:
        with locked(tmp_path):
            assert not other.exists()


def test_an_unreadable_lock_counts(tmp_path: Path) -> None:
    (tmp_path / "lock-other.json").write_text("{")
    with pytest.raises(TableLockedError, match="process unknown on unknown"), locked(tmp_path):
        pass


def test_a_process_that_the_system_hides_is_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of another user, where ``/proc`` shows each their own (``hidepid``)."""
    process = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    other, usual = tmp_path / "lock-other.json", Path.read_text
    other.write_text(owner(pid=process.pid, started=lock._started(process.pid)))

    def hidden(path: Path, *arguments: Any, **keywords: Any) -> str:
        if path == Path(f"/proc/{process.pid}/stat"):
            raise FileNotFoundError
        return usual(path, *arguments, **keywords)

    def refuse(*_: Any) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "read_text", hidden)
    monkeypatch.setattr(os, "kill", refuse)
    try:
        with pytest.raises(TableLockedError, match=f"process {process.pid} "), locked(tmp_path):
            pass
    finally:
        process.communicate()


def test_systems_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.communicate()

    def absent(*_: Any, **__: Any) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", absent)
    assert lock._started(os.getpid()) == ""
    assert lock._started(process.pid) is None

    def refuse(*_: Any) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    assert lock._started(1) == ""
    monkeypatch.setattr(Path, "read_text", refuse)
    assert lock._machine() == {"boot": "", "namespace": ""}


def test_a_lock_that_is_released_while_it_is_read(tmp_path: Path) -> None:
    assert lock._read(tmp_path / "lock-gone.json") is None


# --- from elsewhere -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "manifest",
    [
        b"[" * 200_000,
        b'{"version": ' + b"9" * 5000 + b"}",
        b'{"version": 1, "shards": [], "n_samples": "3", "layers": [], "modes": [], "kinds": []}',
        b'{"version": 1, "shards": [], "n_samples": 3, "layers": [[1]], "modes": [], "kinds": []}',
        b'{"version": 1, "shards": [], "n_samples": 3, "layers": [], "modes": [], "kinds": [], "versions": {"a": 1}}',
    ],
    ids=["nested", "long number", "words for numbers", "lists for words", "numbers for words"],
)
def test_a_hostile_manifest_is_named(tmp_path: Path, manifest: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(manifest)
    with pytest.raises(TableCorruptError, match=r"manifest\.json"):
        Table.open(tmp_path)


def test_nothing_is_deleted_that_no_table_has_written(tmp_path: Path) -> None:
    outside = tmp_path / "models"
    outside.mkdir()
    kept = [outside / name for name in ("weights.safetensors", "0-40-01234567.safetensors", "a" * 32 + ".safetensors")]
    for file in kept:
        file.write_bytes(b"weights")
    for name in ("shards", "derived"):
        folder = tmp_path / name / "table"
        make_table(folder, [(0, 40)])
        (folder / "shards" / "weights.safetensors").write_bytes(b"weights")
        if name == "shards":
            (folder / "shards").rename(folder / "elsewhere")
        (folder / name).symlink_to(outside)
        Table.discard(folder)
        assert all(file.exists() for file in kept)
        assert (folder / ("elsewhere" if name == "shards" else "shards") / "weights.safetensors").exists()


def test_a_pickle_is_never_loaded(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "executed",)

    evil = pickle.dumps(Evil())
    table, _ = make_table(tmp_path, [(0, 40)])
    name = f"40-100-{hashlib.sha256(evil).hexdigest()[:8]}.safetensors"
    (tmp_path / "shards" / name).write_bytes(evil)
    (tmp_path / "derived").mkdir()
    (tmp_path / "derived" / ("a" * 32 + ".safetensors")).write_bytes(evil)
    assert table.adopt() == 0
    table.shards[0] = ShardRecord(name, hashlib.sha256(evil).hexdigest(), 40, 100, 3, {"a": 5, "b": 5})
    with pytest.raises(TableCorruptError, match=name):
        content(table)
    (tmp_path / "manifest.json").write_bytes(evil)
    with pytest.raises(TableCorruptError, match=r"manifest\.json"):
        Table.open(tmp_path)
    assert not (tmp_path / "executed").exists()
