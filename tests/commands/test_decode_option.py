"""``crp mine --decode device``: pictures of a folder are decoded by torchvision, and by it again for the pages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_cases import MODULE, crp, place_with_module
from mining_cases import files_of, same_rows
from PIL import Image

from crp.visualization import Decoded, FeatureVisualization
from crp.visualization.table.store import Table

SOURCE = f"""{MODULE}
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from crp.visualization import Decoded

def decoded():
    change = v2.Compose([v2.Resize(8), v2.CenterCrop(8), v2.ToDtype(torch.float32, scale=True)])
    return Decoded(ImageFolder("pictures"), change)

words = [("a word", 0)]
"""
OPTIONS = ["--model", "nets:net", "--layers", "0", "--composite", "epsilon_plus", "--quiet"]
PICTURES = ["--data", "pictures", "--size", "8", "--mean", "0.5", "--std", "0.25", "--batch-size", "4"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder with a module and ten JPEGs of cats and dogs, some of them stored sideways."""
    for i in range(10):
        folder = tmp_path / "pictures" / ("cats", "dogs")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        exif = Image.Exif()
        exif[0x0112] = 1 + i % 8
        small = np.random.default_rng(i).integers(0, 256, (6, 5, 3), np.uint8)
        Image.fromarray(small).resize((25, 31)).save(folder / f"{i}.jpg", exif=exif, quality=95)
    return place_with_module(tmp_path, monkeypatch, "nets", SOURCE)


def mined(out: str, *more: object) -> Any:
    return crp("mine", *OPTIONS, *(more if "--data" in more else [*PICTURES, *more]), "--out", out)


def test_the_table_is_that_of_pillow_within_rounding(here: Path) -> None:
    for out, more in (("host", []), ("device", ["--decode", "device"])):
        result = mined(out, *more)
        assert (result.exit_code, result.output) == (0, "10 of 10 samples, 10 rows; complete\n")
    assert (here / "host").exists()
    same_rows(Table.open(here / "host"), Table.open(here / "device"), tolerance=0.1)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_run_goes_on_with_the_decoder_that_the_table_names(here: Path) -> None:
    assert mined("whole", "--decode", "device").exit_code == 0
    assert mined("out", "--decode", "device", "--shard-size", "4", "--stop", "4").exit_code == 0
    assert mined("workers", "--decode", "device", "--workers", "2").exit_code == 0
    result = crp("mine", "--out", "out", "--quiet")
    assert (result.exit_code, result.output) == (0, "10 of 10 samples, 10 rows; complete\n")
    same_rows(Table.open(here / "out"), Table.open(here / "whole"))
    assert files_of(here / "workers" / "shards") == files_of(here / "whole" / "shards")
    facts = json.loads(crp("status", "out", "--json").output)
    assert facts["recipe"]["decoder"]["device"] == "cpu" and facts["recipe"]["command"]["decode"] == "device"
    refused = mined("out", "--decode", "host")
    assert refused.exit_code == 1 and "was mined with another decoder" in refused.output


def test_pages_show_what_was_mined(here: Path) -> None:
    assert mined("out", "--decode", "device").exit_code == 0
    fv = FeatureVisualization.open(here / "out")
    assert isinstance(fv.dataset, Decoded) and fv.dataset[0][0].shape == (3, 8, 8)
    assert torch.equal(fv.get_data_sample(3, preprocessing=False)[0][0].detach(), fv.dataset[3][0])
    result = crp("report", "out", "--quiet", "--concepts", "1")
    assert result.exit_code == 0, result.output


def test_a_dataset_of_files_may_decode_itself(here: Path) -> None:
    result = mined("out", "--data", "nets:decoded")
    assert result.exit_code == 0, result.output
    assert "decoder" in Table.open(here / "out").fingerprints
    assert isinstance(FeatureVisualization.open(here / "out").dataset, Decoded)


@pytest.mark.parametrize(("data", "kind"), [("nets:decoded", "Decoded"), ("nets:words", "list")])
def test_what_is_no_folder_is_refused(here: Path, data: str, kind: str) -> None:
    result = mined("out", "--data", data, "--decode", "device")
    assert result.exit_code == 1
    assert f"--decode device is for a folder of pictures, and --data {data} gives {kind};" in result.output
    assert not (here / "out").exists()
