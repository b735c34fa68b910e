"""``crp audit --data``: samples that are not in the table, with the model that the table names."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from command_cases import crp, mine_pictures
from feature_net import Images, make_fv
from PIL import Image

from crp.audit import Prototypes, audit
from crp.composites import EpsilonPlus
from crp.concepts import DirectionConcept
from crp.visualization import FeatureVisualization, Table


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = mine_pictures(tmp_path, monkeypatch, 40, "prediction")
    assert crp("prototypes", folder, "0", "--n", 1).exit_code == 0
    for name, seed in (("b.png", 3), ("a.png", 100)):
        Path("new").mkdir(exist_ok=True)
        pixels = np.random.default_rng(seed).integers(0, 255, (8, 8, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(Path("new", name))
    return folder


def test_new_pictures_are_compared_with_the_prototypes(folder: Path) -> None:
    """One of them is in the table, too; both are as the audit in Python has them."""
    rows = json.loads(crp("audit", folder, "0", "--data", "new", "--json").output)["samples"]
    found = {row["name"]: row for row in rows}
    assert sorted(found) == ["a.png", "b.png"] and [row["sample"] for row in rows] == [None, None]
    fv = FeatureVisualization.open(folder)
    prototypes = Prototypes.load(Table.open(folder), "0")
    place = [Path(fv.dataset.source(i).name).name for i in range(40)].index("3.png")
    data = fv.get_data_sample(place)[0]
    (wanted,) = audit(fv.attribution, data, EpsilonPlus(), prototypes, fv.layer_map["0"])
    got = found["b.png"]
    assert (got["class"], got["percentile"]) == (wanted.predicted, wanted.percentile)
    assert got["over"][0]["name"] == wanted.over[0].name and got["over"][0]["name"].startswith("channel ")
    assert got["over"][0]["difference"] == pytest.approx(wanted.over[0].difference, abs=1e-6)
    line = [line for line in crp("audit", folder, "0", "--data", "new").output.splitlines() if "b.png" in line]
    assert len(line) == 1 and f"percentile {wanted.percentile:.1f}" in line[0]


def test_a_dataset_of_ones_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("more.py").write_text(
        "import torch\n"
        "def rows(): return [(torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(i)), 0) for i in range(3)]\n"
        "def ids(): return [(torch.tensor([3, 1, 2]), 0)]\n"
    )
    monkeypatch.syspath_prepend(".")
    results = [crp("audit", folder, "0", "--data", "more:rows", "--batch-size", n).output for n in (1, 32)]
    assert results[0] == results[1] and "more:rows 2  " in results[0]
    result = crp("audit", folder, "0", "--data", "more:ids")
    assert result.exit_code == 1 and "--data more:ids holds texts, or no numbers" in result.output


def test_pictures_that_cannot_be_read_are_named_and_the_others_audited(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree("new", "odd")
    Path("odd", "0.png").write_bytes(b"no picture")
    alone, result = (crp("audit", folder, "0", "--data", data) for data in ("new", "odd"))
    assert result.exit_code == 1 and result.output.startswith(alone.output)
    (line,) = result.output.removeprefix(alone.output).splitlines()
    assert line.startswith("Error: 1 of 3 samples left out: 0.png is no picture that can be read: ")
    Path("halves.py").write_text(
        "import torch\nclass Rows:\n    def __len__(self): return 2\n"
        "    def __getitem__(self, i): return torch.ones(3, 8, 8), 1 // i\n"
        "class Blind(Rows):\n    def __getitem__(self, i): return torch.ones(3, 8, 8) / (1 - i), 0\n"
    )
    monkeypatch.syspath_prepend(".")
    result = crp("audit", folder, "0", "--data", "halves:Rows")
    assert "halves:Rows 1  " in result.output and "left out: halves:Rows 0: ZeroDivisionError" in result.output
    result = crp("audit", folder, "0", "--data", "halves:Blind", "--batch-size", 1)
    assert "halves:Blind 0  " in result.output and "left out: halves:Blind 1: its data is not finite" in result.output


def test_pictures_of_classes_without_prototypes_are_named_and_the_others_audited(folder: Path) -> None:
    shown = json.loads(crp("audit", folder, "0", "--data", "pictures", "--least", 40, "--json").output)["samples"]
    names = {of_class: {row["name"] for row in shown if row["class"] == of_class} for of_class in (0, 1)}
    assert names[0] and names[1]
    assert crp("prototypes", folder, "0", 0, "--n", 1).exit_code == 0
    result = crp("audit", folder, "0", "--data", "pictures", "--batch-size", 7)
    assert result.exit_code == 1 and f"layer '0': {len(names[0])} samples" in result.output
    left_out = result.output.splitlines()[-1].removeprefix(f"Error: {len(names[1])} of 40 samples left out: ")
    assert {one.partition(": no prototypes of class 1")[0] for one in left_out.split(", ")[:8]} <= names[1]


def test_what_is_wrong_is_one_line(folder: Path) -> None:
    for data, message in (
        ("absent", "--data absent is neither a folder nor package.module:factory"),
        ("absent:rows", "absent"),
    ):
        result = crp("audit", folder, "0", "--data", data)
        assert result.exit_code == 1 and message in result.output
        assert result.output.startswith("Error: ") and len(result.output.splitlines()) == 1
    Path("pictures").rename("moved")
    assert crp("audit", folder, "0", "--data", "new").exit_code == 0, "the data of the table are not needed"
    Path("nets.py").unlink()
    sys.modules.pop("nets", None)
    result = crp("audit", folder, "0", "--data", "new")
    assert result.exit_code == 1 and len(result.output.splitlines()) == 1
    assert crp("audit", folder, "0").exit_code == 0, "nor the model, for samples of the table"


def test_directions_are_called_by_their_names(tmp_path: Path) -> None:
    concept = DirectionConcept(torch.eye(5)[:2], names=["edge", "corner"])
    fv = make_fv(tmp_path, Images(30), layers={"second": concept})
    fv.run(EpsilonPlus(), 0, 30, progress=False)
    result = crp("prototypes", fv.path, "second", "--n", 1, "--json")
    names = {one["name"] for row in json.loads(result.output)["prototypes"] for one in row["concepts"]}
    assert {"edge", "corner"} <= names
    (row,) = json.loads(crp("audit", fv.path, "second", "--sample", 4, "--json").output)["samples"]
    assert {use["name"] for use in row["over"] + row["under"]} <= names
