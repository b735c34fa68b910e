"""Tables that were damaged or forged are refused, or the change has no effect; tables of version 1 are read."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_cases import crp
from safetensors import safe_open
from safetensors.numpy import save
from table_maker import make_table

from crp.visualization.table.document import decode, encode
from crp.visualization.table.lock import TableLockedError, locked
from crp.visualization.table.manifest import ShardRecord
from crp.visualization.table.ranking import top_k
from crp.visualization.table.shards import check_shard, write_shard
from crp.visualization.table.store import Table, TableCorruptError, TableError

VERSION_1 = Path(__file__).parent / "version_1"


# --- the manifest -------------------------------------------------------------------------------------


def test_a_flipped_bit_in_the_manifest_is_refused_or_without_effect(tmp_path: Path) -> None:
    table, _ = make_table(tmp_path, [(0, 40), (40, 100)])
    text = (tmp_path / "manifest.json").read_bytes()
    generator, refused = random.Random(0), 0
    for _ in range(1500):
        place, bit = generator.randrange(len(text)), 1 << generator.randrange(8)
        changed = text[:place] + bytes([text[place] ^ bit]) + text[place + 1 :]
        try:
            assert decode(changed, tmp_path) == (table.header, table.shards)
        except TableCorruptError:
            refused += 1
    assert refused > 1300  # the rest is space


def test_what_was_written_is_read(tmp_path: Path) -> None:
    table, _ = make_table(tmp_path)
    assert decode(encode(table.header, table.shards), tmp_path) == (table.header, table.shards)


# --- shards -------------------------------------------------------------------------------------------


def changed(table: Table, change: Callable[[dict[str, np.ndarray], dict[str, Any]], object]) -> ShardRecord:
    """Write the first shard of a table anew with other content, under its right hash."""
    record = table.shards[0]
    with safe_open(table.path / "shards" / record.file, framework="numpy") as file:
        arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        described = json.loads(file.metadata()["crp"])
    change(arrays, described)
    arrays = {key: np.ascontiguousarray(array) for key, array in arrays.items()}
    content = save(arrays, metadata={"crp": json.dumps(described)})
    sha = hashlib.sha256(content).hexdigest()
    forged = ShardRecord(
        f"{record.start}-{record.stop}-{sha[:8]}.safetensors",
        sha,
        record.start,
        record.stop,
        record.rows,
        record.concepts,
    )
    (table.path / "shards" / forged.file).write_bytes(content)
    return forged


def n_samples(arrays: dict[str, np.ndarray]) -> int:
    return len(np.unique(arrays["sample"]))


@pytest.mark.promise("Tables", "Forged files are refused, also where their hash is right")
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda a, d: d.update(stop=39), "it says of itself to hold 0 to 39"),
        (lambda a, d: d.update(start=1), "it says of itself to hold 1 to 40"),
        (lambda a, d: d.update(skipped={"3": "gone"}), "it says of itself"),
        (lambda a, d: d.clear(), "damaged"),
        (lambda a, d: a["target"].__setitem__(0, -7), "its targets begin at -7"),
        (lambda a, d: a["sample"].__setitem__(-1, 40), "do not ascend from 0 to 39"),
        (lambda a, d: a.update({"target": a["target"].astype(np.int32)}), r"it has not \d+ rows"),
        (lambda a, d: a.update({"sample": a["sample"][1:], "target": a["target"][1:]}), r"it has not \d+ rows"),
        (lambda a, d: a["relevance.sum/a"].__setitem__((3, 2), np.inf), "values that are not finite"),
        (lambda a, d: a["activation.max/b"].__setitem__((0, 0), np.nan), "values that are not finite"),
        (lambda a, d: a["relevance.sum_norm/a"].__setitem__(3, -1), "has negative values"),
        (lambda a, d: a["relevance.sum_norm/a"].__setitem__(3, np.inf), "values that are not finite"),
        (lambda a, d: a.update({"relevance.position/a": -a["relevance.position/a"].astype(np.int64)}), "negative pos"),
        (lambda a, d: a.update({"relevance.sum/a": a["relevance.sum/a"][:, :0]}), r"has shape \(\d+, 0\) in place of"),
        (lambda a, d: a.update({"relevance.sum/a": a["relevance.sum/a"][1:]}), "has shape"),
        (lambda a, d: a.update({"relevance.sum/a": a["relevance.sum/a"].astype(np.int32)}), "not finite"),
        (lambda a, d: a.update({"relevance.mean/a": a["relevance.sum/a"]}), "is no column of a table"),
        (lambda a, d: a.update({"relevance.sum/c": a["relevance.sum/a"]}), "is of no layer of the shard"),
        (lambda a, d: a.update({"relevance.sum_mean/a": a["relevance.sum/a"]}), "is no column of a table"),
        (lambda a, d: a.update({"other.sum/a": a["relevance.sum/a"]}), "is no column of a table"),
        (lambda a, d: a.update({"prediction": np.zeros(3, np.int64)}), "is no column of"),
        (lambda a, d: a.update({"other": np.zeros(n_samples(a))}), "is no column of"),
        (lambda a, d: a.update({"prediction": np.full(n_samples(a), -2)}), "has no classes"),
        (lambda a, d: a.update({"probability": np.full(n_samples(a), 1.5)}), "has no probabilities"),
        (lambda a, d: a.update({"probability": np.full(n_samples(a), -0.5)}), "has no probabilities"),
        (lambda a, d: [a.pop(key) for key in list(a) if key.endswith("/b")], "nothing of layer 'b'"),
    ],
)
def test_a_forged_shard_with_a_right_hash_is_refused(tmp_path: Path, change: Any, problem: str) -> None:
    table, _ = make_table(tmp_path)
    forged = changed(table, change)
    with pytest.raises(TableCorruptError, match=problem):
        check_shard(tmp_path / "shards", forged)
    table.shards[0] = forged
    assert len(table.verify()) == 1
    with pytest.raises(TableCorruptError, match=forged.file):
        top_k(table, "a")


def test_an_unchanged_shard_is_taken(tmp_path: Path) -> None:
    table, _ = make_table(tmp_path)
    check_shard(tmp_path / "shards", changed(table, lambda arrays, described: None), again=True)


@pytest.mark.promise("Tables", "`verify` reads every byte")
def test_verify_reads_bytes(tmp_path: Path) -> None:
    table, _ = make_table(tmp_path)
    assert table.verify() == []
    file = tmp_path / "shards" / table.shards[0].file
    status, content = file.stat(), file.read_bytes()
    file.write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert table.damaged() == []  # size and time are as they were
    assert file.name in table.verify()[0]
    assert file.name in table.damaged()[0]  # what was found out is not forgotten


# --- odd files ----------------------------------------------------------------------------------------

ODD: dict[str, Callable[[Path], object]] = {
    "folder": lambda path: path.mkdir(),
    "pipe": lambda path: os.mkfifo(path),
    "link": lambda path: path.symlink_to(path.with_name("elsewhere")),
    "dangling link": lambda path: path.symlink_to("/nowhere"),
}


@pytest.fixture(params=ODD)
def put(request: pytest.FixtureRequest) -> Callable[[Path], None]:
    """Put something that is no plain file in the place of one."""

    def act(path: Path) -> None:
        if path.exists():
            path.rename(path.with_name("elsewhere"))
        ODD[request.param](path)

    return act


@pytest.mark.timeout(30)
def test_something_else_in_the_place_of_the_manifest(tmp_path: Path, put: Callable[[Path], None]) -> None:
    make_table(tmp_path)
    put(tmp_path / "manifest.json")
    assert Table.exists(tmp_path)
    with pytest.raises(TableCorruptError, match=r"manifest\.json is a .*, not the file of a table, and is left alone"):
        Table.open(tmp_path)


@pytest.mark.timeout(30)
def test_something_else_in_the_place_of_a_shard(tmp_path: Path, put: Callable[[Path], None]) -> None:
    table, _ = make_table(tmp_path)
    put(tmp_path / "shards" / table.shards[0].file)
    for found in (Table.open(tmp_path).verify(), Table.open(tmp_path).damaged()):
        assert len(found) == 1 and table.shards[0].file in found[0]
    assert len(table.drop_damaged()) == 1
    assert table.unlisted() == []


@pytest.mark.promise("Tables", "Links, folders and pipes in the place of files are not followed")
@pytest.mark.timeout(30)
def test_something_else_in_the_place_of_a_lock(tmp_path: Path, put: Callable[[Path], None]) -> None:
    put(tmp_path / "lock-0.json")
    with (
        pytest.raises(TableLockedError, match=r"process unknown on unknown; .*delete .*lock-0\.json"),
        locked(tmp_path),
    ):
        pass


@pytest.mark.parametrize(
    "text", ["[" * 50_000, '{"pid": ' * 50_000, "[1]", " " * 100_000], ids=["[", "{", "list", "long"]
)
def test_a_hostile_lock_counts(tmp_path: Path, text: str) -> None:
    (tmp_path / "lock-0.json").write_text(text)
    with pytest.raises(TableError, match="process unknown"), locked(tmp_path):
        pass


@pytest.mark.promise("Tables", "Links in the place of folders are not written through")
def test_links_in_the_place_of_folders_are_not_written_through(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    table, _ = make_table(tmp_path / "table")
    (table.path / "derived").symlink_to(outside)
    assert len(top_k(table, "a", k=3, cache=True).value) == 3
    assert list(outside.iterdir()) == []
    (table.path / "shards").rename(tmp_path / "kept")
    (table.path / "shards").symlink_to(outside)
    with pytest.raises(TableCorruptError, match="shards is a link, not the folder of a table"):
        Table.open(table.path)
    with pytest.raises(TableCorruptError, match="shards is a link"):
        Table.create(table.path, table.header)
    assert list(outside.iterdir()) == []


def test_a_lock_whose_file_another_run_cleans_away_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, times = Path.replace, []

    def cleaned(self: Path, target: Path) -> Path:
        times.append(self)
        if len(times) <= 2:
            self.unlink()
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", cleaned)
    with locked(tmp_path):
        assert len(list(tmp_path.glob("lock-*.json"))) == 1
    assert len(times) == 3


# --- many ---------------------------------------------------------------------------------------------


def test_many_shards_of_overlapping_ranges_are_no_slow_path(tmp_path: Path) -> None:
    table, source = make_table(tmp_path, [])
    records = [source.write(table, 0, stop, {1: f"{stop}"}) for stop in range(60, 100)]
    folder = tmp_path / "shards"
    arrays = {name: [array] for name, array in source.arrays(0, 40).items()}
    records += [write_shard(folder, table.header.identity, 0, stop, arrays, {}) for stop in range(100, 300)]
    many = Table(tmp_path, table.header, records)
    begin = time.perf_counter()
    rows = many.rows()
    assert time.perf_counter() - begin < 10
    expected = source.sample[source.sample < 99]
    assert np.array_equal(np.sort(rows.sample[rows.sample != 1]), expected[expected != 1])


def test_many_files_of_one_range_are_no_slow_path(tmp_path: Path) -> None:
    table, source = make_table(tmp_path, [(0, 50)])
    for i in range(200):
        source.write(table, 50, 100, {60: f"{i}"})
    begin = time.perf_counter()
    assert table.adopt() == 1
    assert time.perf_counter() - begin < 10


# --- version 1 ----------------------------------------------------------------------------------------


def test_a_table_of_version_1_is_read(tmp_path: Path) -> None:
    """Mined by the code of 5496b8f, the last commit that wrote version 1."""
    table = Table.open(shutil.copytree(VERSION_1, tmp_path / "table"))
    assert (table.header.version, table.n_samples, table.n_rows, table.layers) == (1, 6, 6, ("1", "3"))
    assert table.header.recipe == {} and table.verify() == []
    assert "composite" not in crp("status", tmp_path / "table").output  # (which it does not tell)
    column = table.column("1", 1)
    np.testing.assert_allclose(column.value[:3], [-0.4689105749, 0.4045882225, -0.3994423449], rtol=1e-6)
    assert column.position.tolist() == [8, 8, 7, 7, 8, 8]
    assert column.target.tolist() == [0, 1] * 3
    assert top_k(table, "3", "activation", normed=False, k=2, cache=True).sample[:, 1].tolist() == [3, 0]


def test_a_table_of_version_1_is_not_added_to(tmp_path: Path) -> None:
    table = Table.open(shutil.copytree(VERSION_1, tmp_path / "table"))
    before = (table.path / "manifest.json").read_bytes()
    with pytest.raises(TableError, match="is of version 1, which is read and not added to; mine into another folder"):
        table.add(table.shards[0])
    assert (table.path / "manifest.json").read_bytes() == before


def test_an_edited_range_of_version_1_is_refused(tmp_path: Path) -> None:
    folder = shutil.copytree(VERSION_1, tmp_path / "table")
    text = (folder / "manifest.json").read_text().replace('"stop": 6', '"stop": 200').replace(": 6,", ": 200,")
    (folder / "manifest.json").write_text(text)
    with pytest.raises(TableCorruptError, match="values out of range, or a file name that no such shard has"):
        Table.open(folder)
    old, new = "4-6-1df31fcd", "4-200-1df31fcd"
    (folder / "manifest.json").write_text(text.replace(old, new))
    (folder / "shards" / f"{old}.safetensors").rename(folder / "shards" / f"{new}.safetensors")
    assert "it says of itself to hold 4 to 6" in Table.open(folder).verify()[0]
