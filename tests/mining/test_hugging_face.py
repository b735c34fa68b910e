"""Datasets of Hugging Face, as they are saved, transformed, loaded and streamed."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from mining_cases import same_rows
from PIL import Image

from crp.__main__ import cli
from crp.visualization import Pairs
from crp.visualization.mining.job import prepare
from crp.visualization.table.store import Table

datasets = pytest.importorskip("datasets", reason="datasets of Hugging Face are not installed")

MODULE = """
import torch
from datasets import DatasetDict, load_from_disk
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms import functional as F

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))

def pictures():
    return load_from_disk("saved")

def transformed():
    def transform(batch):
        return {"pixels": [F.to_tensor(F.center_crop(i, [8])) for i in batch["image"]], "label": batch["label"]}
    return pictures().with_transform(transform)

def loader():
    return DataLoader(transformed(), batch_size=4, shuffle=True)

def stream():
    return pictures().to_iterable_dataset()

def splits():
    return DatasetDict(train=pictures())
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder with a saved dataset of eight pictures of different sizes, and functions that open it."""
    numbers = np.random.default_rng(0)
    pixels = [numbers.integers(0, 256, (8 + i % 2, 9, 3)).astype(np.uint8) for i in range(8)]
    rows = {"image": [Image.fromarray(one) for one in pixels], "label": [i % 3 for i in range(8)]}
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])}
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "opened.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "opened", raising=False)
    return tmp_path


def mined(data: str, *more: str) -> Result:
    words = ["--model", "opened:net", "--layers", "1", "--batch-size", "3", "--quiet", "--out", data]
    return CliRunner().invoke(cli, ["mine", "--data", f"opened:{data}", *words, *more])


def test_rows_with_and_without_a_transform_and_loaders_are_mined_alike(here: Path) -> None:
    for data, more in {
        "pictures": ["--fields", "image,label", "--size", "8"],
        "transformed": ["--fields", "pixels,label"],
        "loader": ["--fields", "pixels,label"],
    }.items():
        result = mined(data, *more)
        assert result.exit_code == 0, result.output
        assert result.output == "8 of 8 samples, 8 rows; complete\n"
    assert Table.open("pictures").rows().target.tolist() == [i % 3 for i in range(8)]
    same_rows(Table.open("loader"), Table.open("transformed"), 0)
    import opened  # type: ignore[import-not-found]

    first = Pairs(opened.loader(), "pixels", "label")
    assert torch.equal(first[5][0], opened.transformed()[5]["pixels"]) and first[5][1] == 2


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_worker_processes_read_them(here: Path) -> None:
    assert mined("pictures", "--fields", "image,label", "--size", "8", "--workers", "2").exit_code == 0
    assert Table.open("pictures").coverage().missing == []


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("stream", "IterableDataset is a stream, .* give a map-style dataset, with __len__ and __getitem__"),
        ("splits", r"the dataset is a DatasetDict of 'train'; give one of them \(split=...\)"),
    ],
)
def test_what_is_no_dataset_is_refused_before_any_work(here: Path, data: str, message: str) -> None:
    (here / "opened.py").write_text(MODULE.replace("torch.manual_seed(0)", "raise AssertionError"))
    result = mined(data, "--fields", "image,label")
    assert result.exit_code == 1 and result.output.startswith(f"Error: --data opened:{data}: ")
    import opened

    for refuse in (Pairs, lambda dataset: prepare(None, dataset, {}, None, here)):  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=message):
            refuse(getattr(opened, data)())
    assert not (here / data).exists()


def test_fields_that_are_not_named_are_asked_for(here: Path) -> None:
    result = mined("pictures")
    assert "it has the keys 'image', 'label'. Say where the data is, by data=... or --fields" in result.output
