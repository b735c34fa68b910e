"""Results that are kept beside a table: read as they were written, and refused when anything is not as it was."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file
from table_maker import make_table

from crp.visualization.table.derived import keep_result, list_kept, read_kept
from crp.visualization.table.manifest import TableCorruptError, TableMismatchError, TableNotFoundError
from crp.visualization.table.store import Table

ARRAYS = {
    "sample": np.array([4, 7, -1]),
    "3/members": np.array([[5, 8]]),
    "strongest": np.array([[0, 4, -1]]),
    "value": np.array([0.5, -2.0]),
}


@pytest.fixture
def table(tmp_path):
    return make_table(tmp_path / "t", ranges=((0, 40),))[0]


def test_a_result_is_read_as_it_was_kept(table):
    keep_result(table, "prototypes", "a", ARRAYS, {"normed": True})
    path = keep_result(table, "clusters", "b", ARRAYS, {"separation": 0.5}, of_class=3)
    assert path.parent == table.path / "derived"
    found = read_kept(Table.open(table.path), "clusters", "b", 3)
    assert (found.kind, found.layer, found.of_class, found.settings) == ("clusters", "b", 3, {"separation": 0.5})
    assert found.digest == table.digest
    assert {name: array.tolist() for name, array in found.arrays.items()} == {
        name: array.tolist() for name, array in ARRAYS.items()
    }
    assert [one.name for one in list_kept(table)] == ["prototypes of layer 'a'", "clusters of layer 'b', class 3"]
    keep_result(table, "prototypes", "a", ARRAYS, {"normed": False})
    assert [one.settings for one in list_kept(table)] == [{"normed": False}, {"separation": 0.5}]


def test_a_result_of_an_earlier_state_is_refused(table):
    keep_result(table, "audit", "a", ARRAYS, {})
    _, source = make_table(table.path.parent / "like", ranges=())
    table.add(source.write(table, 40, 60))
    message = r"has changed since audit of layer 'a' were made; crp audit makes them again"
    with pytest.raises(TableMismatchError, match=message):
        read_kept(table, "audit", "a")
    assert [one.digest == table.digest for one in list_kept(table)] == [False], "listed, and told apart"


def test_what_is_not_there_is_said(table):
    with pytest.raises(TableNotFoundError, match=r"no prototypes of layer 'a' in .*; crp prototypes makes them"):
        read_kept(table, "prototypes", "a")
    with pytest.raises(KeyError, match="'c' not found in the table"):
        read_kept(table, "prototypes", "c")
    with pytest.raises(ValueError, match=r"kind must be one of prototypes, .*; not 'dreams'"):
        keep_result(table, "dreams", "a", {}, {})
    assert list_kept(table) == []


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("sample", np.array([40]), "'sample' has samples without rows"),
        ("8/nearest", np.array([-2]), "'8/nearest' has samples without rows"),
        ("over", np.array([[5]]), "'over' has concepts beyond 0 to 4"),
        ("strongest", np.array([-2]), "'strongest' has concepts beyond 0 to 4"),
        ("concept", np.array([1.0]), "'concept' has no numbers"),
        ("1/means", np.array([np.inf]), "'1/means' has values that are not finite"),
    ],
    ids=["sample", "nearest", "over", "strongest", "kind", "infinite"],
)
def test_arrays_that_are_not_of_the_table_are_refused(table, name, array, message):
    with pytest.raises(ValueError, match=message):
        keep_result(table, "audit", "a", {name: array}, {})
    assert not (table.path / "derived").exists()
    path = keep_result(table, "audit", "a", {}, {})
    forge(path, {name: array})
    with pytest.raises(TableCorruptError, match=f"is not of this table: {message}"):
        read_kept(table, "audit", "a")


def forge(path, arrays, **changes):
    """A file whose checksum is right."""
    from crp.visualization.table.derived import _checksum

    with safe_open(path, "numpy") as file:
        about = json.loads(file.metadata()["about"]) | changes
    text = json.dumps(about, sort_keys=True)
    save_file(arrays, path, {"about": text, "sha256": _checksum(text, arrays)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "dreams"}, "it is of 'dreams'"),
        ({"kind": "clusters"}, "it says of itself to be 'clusters'"),
        ({"layer": "b"}, "has audit of layer 'b', not audit of layer 'a'"),
        ({"of_class": "3"}, "it is of 'audit', 'a', '3'"),
        ({"settings": []}, "it says of itself"),
        ({"more": 1}, "is damaged, or no result of a table"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_forged_record_is_refused(table, changes, message):
    forge(keep_result(table, "audit", "a", {}, {}), {}, **changes)
    with pytest.raises(TableCorruptError, match=message):
        read_kept(table, "audit", "a")


def test_damage_is_noticed(table):
    path = keep_result(table, "audit", "a", ARRAYS, {})
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(300):
        place, bit = rng.integers(len(content)), rng.integers(8)
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(bit)
        path.write_bytes(damaged)
        with pytest.raises(TableCorruptError):
            read_kept(table, "audit", "a")
    path.write_bytes(content[:-1])
    with pytest.raises(TableCorruptError, match="delete it"):
        list_kept(table)


def test_links_are_not_followed_and_discarding_takes_results_along(table, tmp_path):
    path = keep_result(table, "audit", "a", {}, {})
    other = path.with_name("notes.safetensors")
    other.write_bytes(b"mine")
    moved = tmp_path / "moved.safetensors"
    path.rename(moved)
    path.symlink_to(moved)
    with pytest.raises(TableCorruptError, match="is a link"):
        read_kept(table, "audit", "a")
    path.unlink()
    moved.rename(path)
    Table.discard(table.path)
    assert not path.exists() and other.exists()
