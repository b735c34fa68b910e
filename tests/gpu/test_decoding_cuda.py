"""On a GPU, nvJPEG gives the pictures that Pillow reads, within what decoders of JPEG may differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mining_cases import files_of, rows_of
from PIL import Image
from torch import nn
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from crp.attribution import CondAttribution
from crp.composites import EpsilonPlus
from crp.concepts import ChannelConcept
from crp.image.reading import as_viewed
from crp.visualization import Decoded, FeatureVisualization
from crp.visualization.mining.datasets import Sample
from crp.visualization.mining.run import mine
from crp.visualization.table.manifest import TableMismatchError
from crp.visualization.table.store import Table

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning", "ignore:.* files are no JPEG:UserWarning"),
]
TO_32 = v2.Compose([v2.Resize(32), v2.CenterCrop(32), v2.ToDtype(torch.float32, scale=True)])
#: Kinds of JPEGs by the options of Pillow.
KINDS: list[dict[str, Any]] = [{}, {"subsampling": 0}, {"subsampling": 1}, {"progressive": True}, {"quality": 40}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty files: JPEGs of all kinds, sizes and orientations, some grey, and of every tenth CMYK, PNG or one cut."""
    for i in range(40):
        of_class = tmp_path / "pictures" / ("cat", "dog")[i % 2]
        of_class.mkdir(parents=True, exist_ok=True)
        small = np.random.default_rng(i).integers(0, 256, (10, 12, 3), np.uint8)
        picture = Image.fromarray(small).resize((90 + i, 75 - i % 7), Image.Resampling.BICUBIC)
        exif = Image.Exif()
        exif[0x0112] = 1 + i % 8
        picture = picture.convert({3: "L", 9: "CMYK"}.get(i % 10, "RGB"))
        options = {} if i == 15 else {"exif": exif, **({"quality": 90} | KINDS[i % 5])}
        picture.save(of_class / f"{i:02d}.{'png' if i == 15 else 'jpg'}", **options)
    return tmp_path / "pictures"


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 2)).eval()


def run(path: Path, data: Any, device: str = "cuda", **options: Any) -> Table:
    attribution, layers = CondAttribution(net().to(device)), {"0": ChannelConcept()}
    return mine(attribution, data, layers, EpsilonPlus(), path, batch_size=8, shard_size=16, progress=False, **options)


def test_pictures_are_those_of_pillow(folder: Path) -> None:
    """Decoders upsample colours differently, and round differently; another picture is 60 levels away on average."""
    files = ImageFolder(folder)
    dataset = Decoded(files, device="cuda")
    decoder = dataset.decoder()
    samples = [Sample(i, *dataset.files[i], None) for i in range(40)]
    for sample in decoder.decode(samples):
        assert sample.problem is None and sample.data.device.type == "cuda"
        with Image.open(files.samples[sample.id][0]) as file:
            expected = np.asarray(as_viewed(file).convert("RGB")).astype(float)
        found = sample.data.permute(1, 2, 0).cpu().numpy() * 255
        assert found.shape == expected.shape, files.samples[sample.id]
        difference = np.abs(found - expected)
        assert difference.mean() <= 4 and difference.max() <= 80, (files.samples[sample.id], difference.mean())
    assert decoder.n_by_pillow == 5  # (four in CMYK, and the PNG)


def test_shards_are_the_same_for_any_workers(folder: Path, tmp_path: Path) -> None:
    dataset = Decoded(ImageFolder(folder), TO_32)
    whole = run(tmp_path / "0", dataset)
    run(tmp_path / "2", dataset, num_workers=2)
    run(tmp_path / "parts", dataset, stop=16)
    run(tmp_path / "parts", dataset)
    assert files_of(tmp_path / "2") == files_of(tmp_path / "parts") == files_of(tmp_path / "0")
    assert whole.header.recipe["decoder"]["device"] == "cuda" and len(rows_of(whole)) == 40


def test_a_damaged_file_fails_alone(folder: Path, tmp_path: Path) -> None:
    files = ImageFolder(folder)
    broken = Path(files.samples[4][0])
    broken.write_bytes(broken.read_bytes().replace(b"\xff\xdb", b"\xff\xee"))  # (no tables of quantization)
    with pytest.warns(UserWarning, match="1 sample was skipped"):
        table = run(tmp_path / "out", Decoded(files, TO_32), on_error="skip")
    assert list(table.coverage().skipped) == [4]


def test_another_device_is_told_and_does_not_go_on(folder: Path, tmp_path: Path) -> None:
    dataset = Decoded(ImageFolder(folder), TO_32)
    run(tmp_path / "out", dataset, stop=16)
    with pytest.raises(TableMismatchError, match="was mined with another decoder"):
        run(tmp_path / "out", dataset, device="cpu")
    run(tmp_path / "out", dataset)
    on_cpu = FeatureVisualization(CondAttribution(net()), dataset, {"0": ChannelConcept()}, path=tmp_path / "out")
    with pytest.warns(UserWarning, match="were decoded on cuda when they were mined, and are on cpu now"):
        assert on_cpu.get_max_reference([0], "0", "relevance")
    on_cuda = CondAttribution(net().to("cuda"))
    fv = FeatureVisualization(on_cuda, dataset, {"0": ChannelConcept()}, path=tmp_path / "out")
    assert fv.get_max_reference([0], "0", "relevance")
    assert fv.get_data_sample(0)[0].device.type == "cuda"
