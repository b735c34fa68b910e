"""Which dataset was mined: what is noticed, what is let pass, and how a dataset grows."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mining_cases import Data, files_of, make_net, rows_of, run, same_rows, shards_of
from PIL import Image
from torch.utils.data import Subset

from crp.attribution import CondAttribution
from crp.composites import EpsilonPlus
from crp.concepts import ChannelConcept
from crp.visualization import FeatureVisualization, Pairs
from crp.visualization.mining.identity import check_dataset
from crp.visualization.mining.marks import Source, content_of, contents_of, plain_label, source_of, stamp_of
from crp.visualization.table.store import Table, TableError, TableMismatchError

# --- marks ------------------------------------------------------------------------------------------------------------


def test_every_change_of_one_entry_changes_the_content() -> None:
    data = torch.randn(3, 17, 19, generator=torch.Generator().manual_seed(0))
    known = content_of(data, 3)
    assert known == content_of(data.clone(), 3) > 0
    for place in range(0, data.numel(), 7):
        other = data.clone()
        other.view(-1)[place] += 1e-6 * (1 + abs(float(other.view(-1)[place])))
        assert content_of(other, 3) != known
    swapped = data.clone()
    swapped[0, 0], swapped[0, 1] = data[0, 1], data[0, 0]
    others = [
        (swapped, 3),
        (data, 4),
        (data, None),
        (data.double(), 3),
        (data.reshape(3, 19, 17), 3),
        (data.flip(2), 3),
    ]
    assert known not in [content_of(*other) for other in others]
    assert content_of(data.transpose(1, 2).contiguous().transpose(1, 2), 3) == known
    assert content_of(torch.zeros(1, 3)[:, 0], 0) == content_of(torch.zeros(1), 0)  # a single entry, of stride 3
    assert content_of(torch.zeros(0), 0) != content_of(torch.zeros(1), 0)
    assert content_of(torch.eye(3).to_sparse(), 0) == content_of(torch.eye(3), 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 17, 19), (5, 61, 16)])
def test_contents_of_a_batch_are_those_of_its_samples(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    samples = (torch.randn(4, *shape, generator=torch.Generator().manual_seed(0)) * 9).to(dtype)
    labels = [1, True, "1", None]
    contents = contents_of(samples, labels)
    assert contents == [content_of(data, label) for data, label in zip(samples, labels, strict=True)]
    assert len({content_of(samples[0], label) for label in [*labels, 1.0]}) == 5


@pytest.mark.parametrize(
    ("label", "plain"),
    [
        (3, 3),
        (np.int64(3), 3),
        (torch.tensor(3), 3),
        ([1, 2], [1, 2]),
        (torch.tensor([1, 2]), [1, 2]),
        ("cat", "cat"),
        (0.5, 0.5),
        (float("nan"), None),
        (None, None),
        ({"boxes": 1}, None),
        (list(range(1000)), None),
    ],
)
def test_labels_as_plain_values(label: Any, plain: Any) -> None:
    assert plain_label(label) == plain


class Listed:
    """Has what torchvision's folders have."""

    def __init__(self, root: str, names: list[str]) -> None:
        self.root, self.samples = root, [(str(Path(root, name)), 0) for name in names]


def test_where_a_sample_comes_from(tmp_path: Path) -> None:
    listed = Listed(str(tmp_path), ["a/1.png", "b/2.png"])
    assert source_of(listed, 1) == Source(str(tmp_path), "b/2.png")
    assert source_of(Subset(listed, [1, 0]), 0) == Source(str(tmp_path), "b/2.png")  # type: ignore[arg-type]
    assert source_of([1, 2], 0) is None and source_of(Data(), 0) is None
    assert stamp_of(listed, 0) == 0  # no such file
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").write_bytes(b"12")
    before = stamp_of(listed, 0)
    (tmp_path / "a" / "1.png").write_bytes(b"123")
    assert 0 < before != stamp_of(listed, 0)


# --- samples ----------------------------------------------------------------------------------------------------------


@pytest.mark.promise("Tables", "Samples that changed are another data set")
def test_many_changed_samples_are_noticed_also_beside_those_that_the_manifest_keeps(tmp_path: Path) -> None:
    table = run(tmp_path, Data(200), shard_size=100, layer_map={"fc": ChannelConcept()}, composite=None)
    other = Data(200)
    kept = list(map(int, table.header.probes))
    for i in set(range(200)) - set(kept):
        other.images[i] += 1
    assert len(kept) == 8
    with pytest.raises(TableMismatchError, match=r"was mined with another dataset: sample \d+ is not what it was"):
        check_dataset(table, other)
    check_dataset(table, Data(200))


@pytest.mark.promise("Tables", "A sample that cannot be read for a while is no other data set")
def test_a_sample_that_cannot_be_read_for_a_while_is_no_other_dataset(tmp_path: Path) -> None:
    run(tmp_path, Data(), stop=8)
    data = Data()
    data.special = {20: OSError("not mounted")}
    with pytest.warns(UserWarning, match=r"1 samples .* were not compared \(sample 20: OSError: not mounted\)"):
        table = run(tmp_path, data, stop=16)
    assert table.coverage().missing == [(16, 21)]
    gone = Data()
    gone.special = {i: OSError("not mounted") for i in range(21)}
    with pytest.raises(TableError, match=r"cannot be told, .* \(sample 0: OSError: not mounted\); if that passes, try"):
        check_dataset(table, gone)


def test_random_augmentation_is_no_other_dataset(tmp_path: Path) -> None:
    class Noisy(Data):
        def __getitem__(self, index: int) -> Any:
            return super().__getitem__(index)[0] + torch.randn(1, 6, 6).double(), 1

    with pytest.warns(
        UserWarning, match=r"dataset\[0\] gives other data at every reading, as under a random transform"
    ):
        assert run(tmp_path, Noisy(), stop=8).header.probes["0"] == "(1, 6, 6) torch.float64"
    with pytest.warns(UserWarning, match="Take random transforms off the dataset"):
        assert run(tmp_path, Noisy()).coverage().missing == []
    with pytest.raises(TableMismatchError, match="sample 0 is not what it was"):
        run(tmp_path, Data())


def test_what_a_damaged_shard_says_of_samples_is_not_believed(tmp_path: Path) -> None:
    table = run(tmp_path, Data(), shard_size=21)
    file = tmp_path / "shards" / table.shards[0].file
    content = np.array(table.samples().content)
    file.write_bytes(file.read_bytes().replace(content.tobytes(), (content + 1).tobytes()))
    with pytest.warns(UserWarning, match="is damaged: .*; its samples are mined again|its samples are mined again"):
        again = run(tmp_path, Data(), shard_size=21)
    assert again.verify() == [] and np.array_equal(again.samples().content, content)


# --- growth -----------------------------------------------------------------------------------------------------------


def test_a_dataset_that_has_grown_is_appended_to(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", Data(21))
    part = Data(21)
    part.images, part.labels = part.images[:13], part.labels[:13]
    first = run(tmp_path / "a", part)
    data = Data(21)
    table = run(tmp_path / "a", data)
    assert (table.n_samples, table.coverage().missing) == (21, [])
    assert table.header.identity == first.header.identity
    assert [(s.start, s.stop) for s in table.shards] == [(0, 8), (8, 13), (13, 16), (16, 21)]
    same_rows(table, whole)
    with pytest.raises(TableMismatchError, match="another dataset: of n_samples = 21, not 13"):
        run(tmp_path / "a", part)
    other = Data(30)
    other.images[4] += 1  # neither it nor its neighbours are among those that the manifest keeps
    assert "4" not in table.header.probes
    with pytest.raises(TableMismatchError, match="another dataset: sample 0 is not what it was"):
        other.images[0] += 1
        run(tmp_path / "a", other)


def test_parts_of_a_dataset_that_has_grown(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"shard_size": 4}
    short = Data(21)
    short.images, short.labels = short.images[:12], short.labels[:12]
    for number in (0, 1):
        run(tmp_path / "a", short, part=(number, 2), **settings)
    for number in (1, 0):
        table = run(tmp_path / "a", Data(21), part=(number, 2), **settings)
    same_rows(table, run(tmp_path / "b", Data(21), **settings))
    assert shards_of(files_of(tmp_path / "a")).keys() >= {f"shards/{s.file}" for s in table.shards}


# --- files ------------------------------------------------------------------------------------------------------------


class Folder:
    """Pictures of a folder, by name."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.names = folder, sorted(path.name for path in folder.glob("*.png"))

    def __len__(self) -> int:
        return len(self.names)

    def source(self, index: int) -> Source:
        return Source(str(self.folder), self.names[index])

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        with Image.open(self.folder / self.names[index]) as file:
            return file.copy(), index % 3


def save(path: Path, seed: int) -> None:
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (6, 6)).astype(np.uint8)).save(path)


def opened(folder: Path) -> Pairs:
    return Pairs(Folder(folder), 0, 1, lambda picture: torch.tensor(np.array(picture) / 255)[None])


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    for i in range(40):
        save(tmp_path / "pictures" / f"{i:03}.png", i)
    return tmp_path / "pictures"


def test_a_table_knows_its_files(pictures: Path, tmp_path: Path) -> None:
    table = run(tmp_path / "table", opened(pictures))
    samples = table.samples()
    assert samples.source == [f"{i:03}.png" for i in range(40)]
    assert samples.label == [i % 3 for i in range(40)]
    assert table.header.recipe["dataset"]["folder"] == str(pictures)
    outputs = make_net()(torch.stack([opened(pictures)[i][0] for i in range(40)])).detach()
    assert samples.prediction.tolist() == outputs.argmax(1).tolist()
    np.testing.assert_allclose(samples.probability, outputs.softmax(1).max(1).values, rtol=1e-6)


def overwritten(folder: Path) -> None:
    """One picture with other content of the same size."""
    file = folder / "017.png"
    data = bytearray(file.read_bytes())
    with Image.open(file) as picture:
        pixels = np.array(picture)
    for seed in range(1000):
        save(file, 1000 + seed)
        if file.stat().st_size == len(data):
            break
    assert file.stat().st_size == len(data) and pixels.shape == (6, 6)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (overwritten, r"sample 17 \('017.png'\) is not what it was"),
        (lambda folder: save(folder / "0165.png", 99), r"sample 17 was '017.png', and is '0165.png'"),
        (lambda folder: (folder / "017.png").unlink(), "of n_samples = 40, not 39"),
        (lambda folder: (folder / "017.png").rename(folder / "0171.png"), "was '017.png', and is '0171.png'"),
    ],
    ids=["overwritten", "inserted", "deleted", "renamed"],
)
def test_changed_files_are_noticed(
    pictures: Path, tmp_path: Path, change: Callable[[Path], object], match: str
) -> None:
    table = run(tmp_path / "table", opened(pictures))
    check_dataset(table, opened(pictures))
    change(pictures)
    with pytest.raises(TableMismatchError, match=match):
        check_dataset(Table.open(table.path), opened(pictures))


def test_a_copy_of_a_folder_is_the_same_dataset_and_may_grow(pictures: Path, tmp_path: Path) -> None:
    table = run(tmp_path / "table", opened(pictures))
    for file in pictures.iterdir():
        os.utime(file, (random.random() * 1e9, random.random() * 1e9))
    check_dataset(table, opened(pictures))
    save(pictures / "040.png", 40)
    assert run(tmp_path / "table", opened(pictures)).coverage() == ([(0, 41)], {}, [])


# --- feature visualization --------------------------------------------------------------------------------------------


def make_fv(path: Path, data: Data) -> FeatureVisualization:
    return FeatureVisualization(CondAttribution(make_net()), data, {"fc": ChannelConcept()}, path=path)


def test_questions_are_answered_for_the_same_samples_only(tmp_path: Path) -> None:
    make_fv(tmp_path, Data()).run(EpsilonPlus(), progress=False)
    assert make_fv(tmp_path, Data()).compute_stats(0, "fc")[0].shape == (3,)
    grown = Data(30)
    grown.images[:21] = Data().images
    assert make_fv(tmp_path, grown).compute_stats(0, "fc")[0].shape == (3,)
    other = Data()
    other.images += 1
    with pytest.raises(TableMismatchError, match="another dataset: sample 0 is not what it was"):
        make_fv(tmp_path, other).compute_stats(0, "fc")
    assert len(rows_of(Table.open(tmp_path))) == 21
