"""``crp prototypes``, ``crp audit`` and ``crp clusters`` on a table whose class is predicted in two ways."""

from __future__ import annotations

import errno
import json
import os
import sys
from dataclasses import replace

import numpy as np
import pytest
from command_cases import crp
from table_maker import make_header, make_table

from crp.audit import Prototypes
from crp.visualization.table import derived
from crp.visualization.table.derived import keep_result, read_kept
from crp.visualization.table.manifest import TableNotFoundError
from crp.visualization.table.store import Table

RECIPE = {"a": {"concept": "crp.concepts.channels.ChannelConcept", "settings": {}}}


@pytest.fixture
def folder(tmp_path):
    """Class 3: 30 samples by concept 0 and 20 by concept 2; one of them, number 7, by concept 4, too."""
    _, source = make_table(tmp_path / "like", ranges=(), n_samples=4)
    which = np.repeat([0, 2], [30, 20])
    vectors = np.eye(5, dtype=np.float32)[which] + np.random.default_rng(0).normal(size=(50, 5)) * 0.02
    vectors[7, 4] += 0.6
    source.sample, source.target = np.arange(50), np.full(50, 3)
    for key, column in source.columns.items():
        source.columns[key] = np.zeros((50, *column.shape[1:]), column.dtype)
    source.columns["relevance.sum/a"] = vectors.astype(np.float32)
    source.columns["relevance.sum_norm/a"] = np.abs(vectors).sum(1).astype(np.float32)
    table = Table.create(tmp_path / "t", make_header(50))
    table.add(source.write(table, 0, 50))
    return table.path


def test_clusters(folder):
    result = crp("clusters", folder, "a", 3)
    assert result.exit_code == 0, result.output
    first, *rows = result.output.splitlines()
    assert first.startswith("class 3, layer 'a': 50 samples in 2 clusters, separation 1.00")
    assert [row[:21] for row in rows] == ["cluster 0  30 samples", "cluster 1  20 samples"]
    assert "more of concepts 0 (+0." in rows[0] and "more of concepts 2 (+0." in rows[1]
    alone = crp("clusters", folder, "a", 3, "--n", 1, "--no-keep").output
    assert "50 samples in 1 cluster, " in alone and "; concepts 0 (+0." in alone
    assert "in 3 clusters" in crp("clusters", folder, "a", 3, "--n", 3, "--no-keep").output
    kept = read_kept(Table.open(folder), "clusters", "a", 3)
    assert kept.arrays["strongest"][:, 0].tolist() == [0, 2] and kept.arrays["difference"][0, 0] > 0.8
    members = kept.arrays["members"]
    assert (members[0] < 30).all() and (members[1] >= 30).all()
    assert np.bincount(kept.arrays["label"]).tolist() == [30, 20]


def test_clusters_as_json(folder):
    found = json.loads(crp("clusters", folder, "a", 3, "--json", "--neighbours", 5, "--seed", 4, "--no-keep").output)
    assert found["seed"] == 4
    assert (found["class"], found["layer"], [one["size"] for one in found["clusters"]]) == (3, "a", [30, 20])
    assert sorted(found["clusters"][1]["samples"]) == list(range(30, 50))
    assert found["clusters"][1]["concepts"][0]["name"] == "concept 2"
    assert found["eigenvalues"][0] == pytest.approx(0, abs=1e-12)
    assert not (folder / "derived").exists()


def test_clusters_of_heatmaps_name_concepts_of_the_layer(folder):
    result = crp("clusters", folder, "a", 3, "--what", "heatmap")
    assert result.exit_code == 1 and "no heatmaps of class 3" in result.output
    table = Table.open(folder)
    maps = np.repeat(np.eye(4)[[0, 3]], [30, 20], axis=0).reshape(50, 2, 2)
    maps = maps + np.random.default_rng(0).normal(size=maps.shape) * 0.01
    arrays = {"sample": np.arange(50), "heatmap": maps.astype(np.float16), "scale": np.ones(50)}
    keep_result(table, "heatmaps", "a", arrays, {}, 3)
    rows = crp("clusters", folder, "a", 3, "--what", "heatmap").output.splitlines()
    assert "more of concepts 0 (+0." in rows[1] and "more of concepts 2 (+0." in rows[2]
    assert "more of concepts none" in crp("clusters", folder, "b", 3, "--what", "heatmap").output
    kept = read_kept(table, "clusters", "a", 3)
    assert kept.settings["what"] == "heatmap" and kept.arrays["strongest"][:, 0].tolist() == [0, 2]


def test_clusters_for_virelay(folder, tmp_path):
    h5py = pytest.importorskip("h5py")
    assert crp("clusters", folder, "a", 3, "--export", tmp_path / "a.h5").exit_code == 0
    with h5py.File(tmp_path / "a.h5") as file:
        assert list(file) == ["class 3"]
    result = crp("clusters", folder, "a", 3, "--export", tmp_path / "a.h5")
    assert result.exit_code == 1 and "a.h5 is there already; name a new file" in result.output


def test_clusters_for_virelay_say_what_is_missing(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    result = crp("clusters", folder, "a", 3, "--export", tmp_path / "a.h5")
    assert (result.exit_code, result.output) == (
        1,
        "Error: --export needs h5py: pip install concept-relevance[corelay]\n",
    )


def test_prototypes(folder, tmp_path):
    result = crp("prototypes", folder, "a", "--save", tmp_path / "p.safetensors", "--n", 2)
    assert result.exit_code == 0, result.output
    rows = sorted(result.output.splitlines(), key=lambda row: "60.0 %" not in row)
    assert "prototype" in rows[0] and "60.0 % of samples, as in" in rows[0] and "; concepts 0 (+0." in rows[0]
    assert "40.0 % of samples" in rows[1] and "; concepts 2 (+0." in rows[1]
    assert list(Prototypes.load(tmp_path / "p.safetensors").classes) == [3]
    table = Table.open(folder)
    again = Prototypes.load(table, "a")
    assert np.array_equal(again.classes[3].means, Prototypes.load(tmp_path / "p.safetensors").classes[3].means)
    members = read_kept(table, "prototypes", "a").arrays["3/members"]
    for row, sample in zip(members, again.classes[3].sample, strict=True):
        assert row[0] == sample and len(set((row < 30).tolist())) == 1, "all of one way, the nearest first"


def test_prototypes_as_json_and_not_kept(folder):
    result = crp("prototypes", folder, "a", 3, "--json", "--no-keep", "--covariance", "full", "--n", 2, "--seed", 1)
    found = json.loads(result.output)
    assert (found["layer"], found["covariance"], found["seed"]) == ("a", "full", 1)
    assert sorted(round(row["weight"], 2) for row in found["prototypes"]) == [0.4, 0.6]
    assert {row["concepts"][0]["concept"] for row in found["prototypes"]} == {0, 2}
    assert not (folder / "derived").exists()


def test_audit(folder):
    """Sample 7 uses concept 4 as no other one does."""
    assert crp("prototypes", folder, "a", "--n", 2).exit_code == 0
    result = crp("audit", folder, "a", "--least", 3)
    assert result.exit_code == 0, result.output
    head, first, *others = result.output.splitlines()
    assert head == "layer 'a': 50 samples, of which the 3 least usual are listed" and len(others) == 2
    assert first.startswith("sample 7  class 3, percentile 2.0, prototype ") and "; more of concept 4 (+0." in first
    kept = read_kept(Table.open(folder), "audit", "a").arrays
    assert kept["sample"][0] == 7 and kept["over"][0, 0] == 4 and kept["over_difference"][0, 0] > 0.3
    assert (np.diff(kept["percentile"]) >= 0).all() and sorted(kept["sample"]) == list(range(50))
    assert kept["under"][0, 0] in (0, 2) and kept["under_difference"][0, 0] < 0
    nearest = set(Prototypes.load(Table.open(folder), "a").classes[3].sample.tolist())
    assert set(kept["nearest"].tolist()) == nearest


def test_audit_of_some_samples_as_json(folder):
    crp("prototypes", folder, "a", 3, "--n", 2)
    result = crp("audit", folder, "a", "--sample", 7, "--sample", 31, "--json", "--concepts", 1)
    found = json.loads(result.output)
    assert [one["sample"] for one in found["samples"]] == [7, 31] and found["n_samples"] == 2
    assert [len(one["over"]) for one in found["samples"]] == [1, 1]
    assert found["samples"][0]["over"][0]["concept"] == 4
    assert found["samples"][0]["over"][0]["references"][0] == 7
    with pytest.raises(TableNotFoundError):
        read_kept(Table.open(folder), "audit", "a")
    result = crp("audit", folder, "a", "--sample", 99)
    assert result.exit_code == 1
    assert result.output == "Error: sample 99 of 50 has no row of a class with prototypes, which are [3]\n"


def test_a_class_may_be_named(folder, monkeypatch):
    table = Table.open(folder)
    header = replace(table.header, recipe={"class_names": ["Cat", "Dog", "dog", "Sh\x1b[1mip"], "layers": RECIPE})
    Table(folder, header, table.shards)._save()
    result = crp("prototypes", folder, "a", "SH\x1b[1mIP", "--n", 1)
    assert result.exit_code == 0, result.output
    assert result.output.startswith("Sh\\x1b[1mip, prototype 0  100.0 % of samples"), "no control character"
    assert "more of channel 4" in crp("audit", folder, "a", "--least", 1).output
    for name, message in (
        ("do", "'do' is no class; nearest: 'dog'"),
        ("DOG", "'DOG' is no class; it is the name of the classes 1, 2"),
        ("zzz", "'zzz' is no class"),
    ):
        for command in (("prototypes", folder, "a", name), ("clusters", folder, "a", name)):
            result = crp(*command)
            assert (result.exit_code, result.output) == (1, f"Error: {message}\n")


def test_a_number_that_is_a_name_is_the_name(folder):
    table = Table.open(folder)
    header = replace(table.header, recipe={"class_names": ["0", "1", "3", "7"], "layers": RECIPE})
    Table(folder, header, table.shards)._save()
    assert json.loads(crp("clusters", folder, "a", "7", "--json").output)["class"] == 3
    assert "has no rows of class 2; its classes are 3" in crp("clusters", folder, "a", "3").output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("clusters", "z", 3), "Error: <layer> 'z' not found in the table in"),
        (("clusters", "a", 4), "has no rows of class 4; its classes are 3"),
        (("prototypes", "z"), "Error: <layer> 'z' not found in the table in"),
        (("prototypes", "b"), "Error: class 3 has 50 samples of mean variance"),
        (("prototypes", "a", 4), "has no rows of class 4; its classes are 3"),
        (("clusters", "a", 3, "--neighbours", 50), "50 samples have not 50 neighbours each"),
        (("audit", "a"), "Error: no prototypes of layer 'a' in"),
        (("audit", "z"), "Error: <layer> 'z' not found in the table in"),
        (("audit", "a", "--sample", 1, "--data", "x"), "Error: --sample is for samples of the table, and --data for"),
    ],
    ids=range(9),
)
def test_errors(folder, arguments, message):
    command, *rest = arguments
    result = crp(command, folder, *rest)
    assert result.exit_code == 1 and message in result.output and len(result.output.splitlines()) == 1


@pytest.mark.parametrize("command", [("prototypes", "a"), ("audit", "a"), ("clusters", "a", 3)], ids=lambda c: c[0])
def test_what_is_told_to_a_pipe_that_is_closed_is_kept(folder, command, monkeypatch):
    """As by ``crp prototypes atlas/ layer4 | head``."""

    def closed(text):
        raise BrokenPipeError

    name, *rest = command
    crp("prototypes", folder, "a")
    for file in (folder / "derived").glob(f"{name}-*"):
        file.unlink()
    monkeypatch.setattr("click.echo", closed)
    crp(name, folder, *rest)
    assert list((folder / "derived").glob(f"{name}-*"))


@pytest.mark.parametrize("command", [("prototypes", "a"), ("audit", "a"), ("clusters", "a", 3)], ids=lambda c: c[0])
def test_what_cannot_be_kept_is_told_and_so_is_the_option(folder, command, monkeypatch):
    """A table on a disk that cannot be written."""

    def refuse(path, content):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    name, *rest = command
    crp("prototypes", folder, "a")
    told = crp(name, folder, *rest, "--no-keep")
    assert told.exit_code == 0
    monkeypatch.setattr(derived, "write_atomic", refuse)
    result = crp(name, folder, *rest)
    assert result.exit_code == 1 and result.output.startswith(told.output)
    (line,) = result.output.removeprefix(told.output).splitlines()
    assert line.startswith("Error: [Errno 13] Permission denied: ") and "--no-keep" in line


@pytest.mark.parametrize(
    "arguments",
    [
        ("prototypes", "a", "--n", 0),
        ("prototypes", "a", "--covariance", "tied"),
        ("prototypes",),
        ("clusters", "a"),
        ("clusters", "a", 3, "--what", "pixels"),
        ("clusters", "a", 3, "--neighbours", 0),
        ("audit", "a", "--sample", -1),
        ("audit", "a", "--concepts", 0),
        ("audit", "a", "--least", "many"),
        ("audit", "a", "--absent"),
    ],
    ids=lambda arguments: "_".join(map(str, arguments)),
)
def test_wrong_usage(folder, arguments):
    command, *rest = arguments
    result = crp(command, folder, *rest)
    assert result.exit_code == 2 and "Error: " in result.output.splitlines()[-1]


def test_prototypes_and_audits_of_a_table_that_has_grown_are_refused(folder):
    crp("prototypes", folder, "a", "--n", 2)
    _, source = make_table(folder.parent / "more", ranges=(), n_samples=60)
    table = Table.open(folder)
    table.restate(60, table.header.recipe)
    assert crp("audit", folder, "a").exit_code == 0, "nothing was mined since"
    assert "kept       prototypes of layer 'a'\nkept       audit of layer 'a'\n" in crp("status", folder).output
    assert json.loads(crp("status", folder, "--json").output)["kept"] == [
        "prototypes of layer 'a'",
        "audit of layer 'a'",
    ]
    table.add(source.write(table, 50, 60))
    assert "prototypes of layer 'a'\nkept       audit of layer 'a'\n" not in crp("status", folder).output
    assert "kept       prototypes of layer 'a', of an earlier state of the table\n" in crp("status", folder).output
    result = crp("audit", folder, "a")
    assert result.exit_code == 1
    assert "has changed since prototypes of layer 'a' were made; crp prototypes makes them again" in result.output


@pytest.mark.parametrize("command", [("clusters", "a", 1), ("prototypes", "a"), ("audit", "a")], ids=lambda c: c[0])
def test_a_folder_without_a_table(tmp_path, command):
    name, *rest = command
    result = crp(name, tmp_path, *rest)
    assert result.exit_code == 1
    assert result.output == f"Error: nothing was mined into {tmp_path}: it has no manifest.json\n"
