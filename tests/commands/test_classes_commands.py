"""``crp clusters`` and ``crp prototypes`` on a table whose class has two ways."""

from __future__ import annotations

import numpy as np
import pytest
from command_cases import crp
from table_maker import make_header, make_table

from crp.audit import Prototypes
from crp.visualization.table.store import Table


@pytest.fixture
def folder(tmp_path):
    """Class 3: 30 samples by concept 0 and 20 by concept 2."""
    _, source = make_table(tmp_path / "like", ranges=(), n_samples=4)
    which = np.repeat([0, 2], [30, 20])
    vectors = np.eye(5, dtype=np.float32)[which] + np.random.default_rng(0).normal(size=(50, 5)) * 0.02
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
    assert "in 3 clusters" in crp("clusters", folder, "a", 3, "--n", 3).output


def test_clusters_for_virelay(folder, tmp_path):
    h5py = pytest.importorskip("h5py")
    assert crp("clusters", folder, "a", 3, "--export", tmp_path / "a.h5").exit_code == 0
    with h5py.File(tmp_path / "a.h5") as file:
        assert list(file) == ["class 3"]


def test_prototypes(folder, tmp_path):
    result = crp("prototypes", folder, "a", "--save", tmp_path / "p.safetensors", "--n", 2)
    assert result.exit_code == 0, result.output
    rows = sorted(result.output.splitlines(), key=lambda row: "60%" not in row)
    assert "prototype" in rows[0] and "60% of samples, as in" in rows[0] and "; concepts 0 (+0." in rows[0]
    assert "40% of samples" in rows[1] and "; concepts 2 (+0." in rows[1]
    assert list(Prototypes.load(tmp_path / "p.safetensors").classes) == [3]
    assert crp("prototypes", folder, "a", 3).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("clusters", "z", 3), "Error: layer 'z' was not mined into"),
        (("clusters", "a", 4), "has no rows of"),
        (("prototypes", "z"), "Error: layer 'z' was not mined into"),
        (("prototypes", "b"), "Error: class 3 has 50 samples of mean variance"),
    ],
    ids=range(4),
)
def test_errors(folder, arguments, message):
    command, *rest = arguments
    result = crp(command, folder, *rest)
    assert result.exit_code == 1 and message in result.output and "Traceback" not in result.output


@pytest.mark.parametrize("command", [("clusters", "a", 1), ("prototypes", "a")], ids=lambda c: c[0])
def test_a_folder_without_a_table(tmp_path, command):
    name, *rest = command
    result = crp(name, tmp_path, *rest)
    assert result.exit_code == 1
    assert result.output == f"Error: nothing was mined into {tmp_path}: it has no manifest.json\n"
