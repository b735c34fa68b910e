"""Pictures that torchvision decodes on the device: those that Pillow reads, in the same table for any workers."""

from __future__ import annotations

import io
import os
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mining_cases import files_of, rows_of, shards_of
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Subset
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.io import ImageReadMode
from torchvision.io import decode_jpeg as by_torchvision
from torchvision.transforms import v2

from crp.attribution import CondAttribution
from crp.composites import EpsilonPlus
from crp.concepts import ChannelConcept
from crp.errors import LoadingError
from crp.image.reading import as_viewed
from crp.visualization import Decoded, FeatureVisualization, Pairs, decoding, jpegs
from crp.visualization.mining.datasets import Sample
from crp.visualization.mining.run import SampleError, mine
from crp.visualization.prepared import Prepared
from crp.visualization.sources import Pictures
from crp.visualization.table.manifest import TableMismatchError

LAYER = {"0": ChannelConcept()}
TO_32 = v2.Compose([v2.ToImage(), v2.Resize(32), v2.CenterCrop(32), v2.ToDtype(torch.float32, scale=True)])
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


def photograph(seed: int = 0, size: tuple[int, int] = (45, 34), mode: str = "RGB") -> Image.Image:
    """Smooth noise of a width and height."""
    small = np.random.default_rng(seed).integers(0, 256, (size[1] // 4, size[0] // 4, 3), np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).convert(mode)


def as_jpeg(picture: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", **{"quality": 90} | options)
    return buffer.getvalue()


def as_png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def folder_with(path: Path, **files: bytes) -> Path:
    (path / "cat").mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (path / "cat" / name.replace("_", ".")).write_bytes(content)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eleven JPEGs of several sizes, and one PNG, in two classes."""
    for i in range(12):
        of_class = tmp_path / "pictures" / ("cat", "dog")[i % 2]
        of_class.mkdir(parents=True, exist_ok=True)
        picture = photograph(i, (40 + i, 50 - i), "L" if i == 4 else "RGB")
        picture.save(of_class / f"{i:02d}.{'png' if i == 7 else 'jpg'}", **({} if i == 7 else {"exif": turned(i % 9)}))
    return tmp_path / "pictures"


def shown(path: Path, mode: str = "RGB") -> np.ndarray:
    with Image.open(path) as file:
        return np.asarray(as_viewed(file).convert(mode)).astype(int)


def pixels(data: Tensor) -> np.ndarray:
    return (data.squeeze(0) if len(data) == 1 else data.permute(1, 2, 0)).mul(255).round().int().numpy()


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 2)).eval()


def run(path: Path, data: Any, **changes: Any) -> Any:
    settings: dict[str, Any] = {"batch_size": 3, "shard_size": 6, "progress": False}
    return mine(CondAttribution(net()), data, LAYER, EpsilonPlus(), path, **settings | changes)


# --- pixels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("of_file", ["RGB", "L"])
@pytest.mark.parametrize(
    "options", [{}, {"subsampling": 0}, {"progressive": True}, {"quality": 30}], ids=lambda options: "".join(options)
)
def test_pixels_are_those_of_pillow(tmp_path: Path, options: dict[str, Any], of_file: str, mode: str) -> None:
    """Both decode by libjpeg-turbo; versions of it may differ by rounding."""
    folder_with(tmp_path, a_jpg=as_jpeg(photograph(mode=of_file), **options))
    data, label = Decoded(ImageFolder(tmp_path), mode=mode)[0]
    assert label == 0 and data.dtype == torch.float32
    assert np.abs(pixels(data) - shown(tmp_path / "cat" / "a.jpg", mode)).max() <= 2


@pytest.mark.parametrize("orientation", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
def test_pictures_are_upright(tmp_path: Path, orientation: int) -> None:
    folder_with(tmp_path, a_jpg=as_jpeg(photograph(), exif=turned(orientation)))
    dataset = Decoded(ImageFolder(tmp_path))
    assert dataset.files[0][0].dim() == 1  # (torchvision decodes it)
    data, _ = dataset[0]
    assert np.abs(pixels(data) - shown(tmp_path / "cat" / "a.jpg")).max() <= 2


def test_pictures_are_prepared_as_those_of_pillow(folder: Path) -> None:
    """Resized with antialiasing: torch and Pillow round differently."""
    pictures, prepared = Pictures(folder, {"cat": 0, "dog": 1}), Prepared("RGB", 24, 20)
    ours, theirs = Decoded(pictures, prepared.decoded), Pairs(pictures, 0, 1, prepared)
    for (data, label), (expected, of_pillow) in zip(ours, theirs, strict=True):
        assert data.shape == expected.shape == (3, 20, 20) and label == of_pillow
        assert (data - expected).abs().max() <= 2.5 / 255


def test_the_transform_is_that_of_the_folder(folder: Path) -> None:
    for dataset in (ImageFolder(folder, TO_32), Subset(ImageFolder(folder, TO_32), range(12))):
        data, _ = Decoded(dataset)[3]
        assert type(data) is Tensor and data.shape == (3, 32, 32)
        torch.testing.assert_close(data, Decoded(ImageFolder(folder), TO_32)[3][0])


# --- files that torchvision does not read -----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:1 of .* files:UserWarning")
def test_a_random_transform_is_told(folder: Path, tmp_path: Path) -> None:
    data = Decoded(ImageFolder(folder), v2.Compose([v2.RandomCrop(16), v2.ToDtype(torch.float32, scale=True)]))
    with pytest.warns(
        UserWarning, match=r"dataset\[0\] gives other data at every reading, as under a random transform"
    ):
        run(tmp_path / "table", data)


def without_tables(content: bytes) -> bytes:
    """A JPEG without the tables of its quantization, which neither Pillow nor torchvision can decode."""
    return content.replace(b"\xff\xdb", b"\xff\xee")


OTHERS = {
    "png": ("a_png", lambda: as_png(photograph())),
    "png called jpg": ("a_jpg", lambda: as_png(photograph())),
    "cmyk": ("a_jpg", lambda: as_jpeg(photograph().convert("CMYK"))),
    "stored as red, green and blue": ("a_jpg", lambda: as_jpeg(photograph(), keep_rgb=True)),
}


@pytest.mark.parametrize(("name", "make"), OTHERS.values(), ids=OTHERS)
def test_other_files_are_read_by_pillow(tmp_path: Path, name: str, make: Any) -> None:
    folder_with(tmp_path, **{name: make()})
    dataset = Decoded(ImageFolder(tmp_path))
    assert dataset.files[0][0].dim() == 3
    data, _ = dataset[0]
    np.testing.assert_array_equal(pixels(data), shown(tmp_path / "cat" / name.replace("_", ".")))


DAMAGED = {
    "cut": as_jpeg(photograph())[:-40],
    "no tables": without_tables(as_jpeg(photograph())),
    "empty": b"",
    "nothing between the marks": b"\xff\xd8\xff\xd9",
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_has_the_problem_that_pillow_tells(tmp_path: Path, content: bytes) -> None:
    folder_with(tmp_path, a_jpg=content)
    with pytest.raises(OSError, match=r"image|Truncated") as expected:
        ImageFolder(tmp_path)[0]
    with pytest.raises(expected.type) as found:
        Decoded(ImageFolder(tmp_path))[0]
    assert str(found.value).partition(" <")[0] == str(expected.value).partition(" <")[0]


def test_a_file_that_is_cut_never_reaches_the_decoder(tmp_path: Path) -> None:
    """Not every decoder notices that the end is missing."""
    folder_with(tmp_path, a_jpg=DAMAGED["cut"], b_jpg=as_jpeg(photograph()) + bytes(7))
    files = Decoded(ImageFolder(tmp_path)).files
    with pytest.raises(OSError, match="image file is truncated"):
        files[0]
    assert files[1][0].dim() == 1  # (some cameras fill files up)


def test_what_torchvision_cannot_decode_is_read_by_pillow(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One such file fails the batch; the others are decoded as they would be without it."""
    expected = list(Decoded(ImageFolder(folder), TO_32))
    decode, refused = decoding.decode_jpegs, Decoded(ImageFolder(folder)).files[2][0][1:]

    def failing(encoded: list[Tensor], device: torch.device) -> list[Tensor]:
        if any(torch.equal(one, refused) for one in encoded):
            raise RuntimeError("nvjpeg does not know it")
        return decode(encoded, device)

    monkeypatch.setattr(decoding, "decode_jpegs", failing)
    dataset = Decoded(ImageFolder(folder), TO_32)
    samples = [Sample(i, *dataset.files[i], None) for i in range(12)]
    decoder = dataset.decoder()
    found = [sample.data for sample in decoder.decode(samples)]
    for one, (other, _) in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2.5 / 255)
    assert (decoder.n_files, decoder.n_by_pillow) == (12, 2)
    told = "2 of 12 files .* read by Pillow, such as cat/04.jpg .RuntimeError: nvjpeg does not know it"
    with pytest.warns(UserWarning, match=told):
        decoder.finish()


def test_the_host_decodes_one_after_the_other(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision 0.19 takes a list on a GPU only."""

    def of_one(file: Any, **options: Any) -> Tensor:
        assert isinstance(file, Tensor)
        return by_torchvision(file, **options)

    files = [torch.from_numpy(np.fromfile(path, np.uint8)) for path in sorted(folder.rglob("*.jpg"))[:2]]
    expected = jpegs.decode_jpegs(files, torch.device("cpu"))
    monkeypatch.setattr(jpegs, "_torchcodec", lambda: None)
    monkeypatch.setattr("torchvision.io.decode_jpeg", of_one)
    found = jpegs.decode_jpegs(files, torch.device("cpu"))
    assert len(found) == 2 and all(map(torch.equal, found, expected))


def test_lack_of_memory_is_no_damage(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = decoding.decode_jpegs

    def limited(encoded: list[Tensor], device: torch.device) -> list[Tensor]:
        if len(encoded) > limit:
            raise torch.OutOfMemoryError("no memory")
        return decode(encoded, device)

    limit = 1
    dataset = Decoded(ImageFolder(folder), TO_32)
    samples = [Sample(i, *dataset.files[i], None) for i in range(6)]
    expected = [sample.data for sample in dataset.decoder().decode(samples)]
    monkeypatch.setattr(decoding, "decode_jpegs", limited)
    decoder = dataset.decoder()
    assert all(map(torch.equal, (sample.data for sample in decoder.decode(samples)), expected))
    assert decoder.n_by_pillow == 0
    limit = 0
    with pytest.raises(torch.OutOfMemoryError):
        list(decoder.decode(samples))


# --- libraries --------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["in its place", "installed"])
def torchcodec(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchcodec, or what does the same with torchvision: as that, it turns pictures by their EXIF data."""
    if request.param == "installed":
        pytest.importorskip("torchcodec.decoders", reason="no torchcodec: pip install torchcodec")

    def decode_jpeg(source: list[Tensor], *, mode: str, device: torch.device) -> list[Tensor]:
        assert mode == "RGB"
        found = []
        for encoded in source:
            with Image.open(io.BytesIO(encoded.numpy().tobytes())) as file:
                orientation = file.getexif().get(0x0112, 1)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                picture = by_torchvision(encoded, ImageReadMode.RGB)
            found.append(decoding._TURNS.get(orientation, decoding._TURNS[1])(picture))
        return found

    if request.param != "installed":
        module = types.ModuleType("torchcodec.decoders")
        module.decode_jpeg = decode_jpeg  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "torchcodec", types.ModuleType("torchcodec"))
        monkeypatch.setitem(sys.modules, "torchcodec.decoders", module)
    jpegs._torchcodec.cache_clear()
    assert jpegs.jpeg_library() == "torchcodec"


@pytest.fixture(autouse=True)
def _forget_libraries() -> Iterator[None]:
    yield
    getattr(jpegs._torchcodec, "cache_clear", int)()


def test_both_libraries_give_the_same_pictures(folder: Path, tmp_path: Path, torchcodec: None) -> None:
    """In all orientations, and in one table; no warning is raised."""
    dataset = Decoded(ImageFolder(folder), TO_32)
    found, mark, words = [data for data, _ in dataset], dataset.mark(), dataset.words()
    assert words["function"] == "torchcodec.decoders.decode_jpeg"
    with pytest.MonkeyPatch.context() as context:
        context.setattr(jpegs, "_torchcodec", lambda: None)
        assert all(map(torch.equal, found, (data for data, _ in dataset)))
        assert dataset.mark() == mark and dataset.words()["function"] == "torchvision.io.decode_jpeg"


def test_decoders_of_a_gpu_are_told_apart(folder: Path, torchcodec: None) -> None:
    dataset = Decoded(ImageFolder(folder), TO_32)
    dataset.device = torch.device("cuda")
    own = dataset.mark()
    assert own == dataset.mark("cuda by torchcodec") != dataset.mark("cuda")
    with pytest.warns(UserWarning, match="decoded on cuda when they were mined, and are on cuda by torchcodec now"):
        assert decoding.decoder_mark({"decoder": dataset.mark("cuda")}, dataset) == dataset.mark("cuda")


def test_segments_of_exif_are_cut_out() -> None:
    with_exif, without = (as_jpeg(photograph(), **more) for more in ({"exif": turned(6)}, {}))

    def cut(content: bytes) -> bytes:
        return jpegs._without_exif(torch.frombuffer(bytearray(content), dtype=torch.uint8)).numpy().tobytes()

    assert cut(with_exif) == cut(without) == without != with_exif
    for end in range(2, 60):  # (what is no JPEG is left as it is, or as much of it as is none)
        assert len(cut(with_exif[:end])) <= end


# --- tables -----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:1 of .* files:UserWarning")
def test_shards_are_the_same_for_any_workers(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(tmp_path / "0", Decoded(ImageFolder(folder), TO_32))
    run(tmp_path / "2", Decoded(ImageFolder(folder), TO_32), num_workers=2)
    monkeypatch.setattr(decoding, "_AT_ONCE", 2)
    run(tmp_path / "parts", Decoded(ImageFolder(folder), TO_32), stop=7)
    run(tmp_path / "parts", Decoded(ImageFolder(folder), TO_32))
    expected = files_of(tmp_path / "0")
    assert len(whole.shards) == 2 and rows_of(whole) == [(i, int(i > 5)) for i in range(12)]
    assert files_of(tmp_path / "2") == expected
    assert rows_of(run(tmp_path / "parts", Decoded(ImageFolder(folder), TO_32))) == rows_of(whole)
    words = whole.header.recipe["decoder"]
    assert words["function"].endswith(".decode_jpeg") and words["device"] == "cpu"
    assert words["transform"].endswith("v2._container.Compose")


@pytest.mark.filterwarnings("ignore:1 of .* files:UserWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_stopped_at_a_damaged_file_goes_on(folder: Path, tmp_path: Path, workers: int) -> None:
    run(tmp_path / "whole", Decoded(ImageFolder(folder), TO_32))
    broken = folder / "dog" / "09.jpg"
    content, times = broken.read_bytes(), broken.stat()
    broken.write_bytes(without_tables(content))
    with pytest.raises(SampleError, match="sample 10: OSError: "):
        run(tmp_path / "out", Decoded(ImageFolder(folder), TO_32), num_workers=workers)
    with pytest.warns(UserWarning, match="2 of 12 files|1 sample was skipped"):
        skipping = run(tmp_path / "skip", Decoded(ImageFolder(folder), TO_32), num_workers=workers, on_error="skip")
    assert list(skipping.coverage().skipped) == [10]
    broken.write_bytes(content)
    os.utime(broken, ns=(times.st_atime_ns, times.st_mtime_ns))
    run(tmp_path / "out", Decoded(ImageFolder(folder), TO_32), num_workers=workers)
    assert shards_of(files_of(tmp_path / "out")) == shards_of(files_of(tmp_path / "whole"))


def test_the_number_of_files_that_pillow_read_is_told(folder: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"^1 of 12 files are no JPEG .* such as dog/07.png$"):
        run(tmp_path / "out", Decoded(ImageFolder(folder), TO_32), num_workers=2)


@pytest.mark.filterwarnings("ignore:1 of .* files:UserWarning")
def test_a_table_of_another_decoder_is_refused(folder: Path, tmp_path: Path) -> None:
    ours, theirs = Decoded(ImageFolder(folder), TO_32), ImageFolder(folder, TO_32)
    other = Decoded(ImageFolder(folder), v2.Compose([TO_32, v2.RandomHorizontalFlip(0.0)]))
    run(tmp_path / "ours", ours)
    run(tmp_path / "theirs", theirs)
    for name, data in (("ours", theirs), ("theirs", ours), ("ours", other)):
        with pytest.raises(TableMismatchError, match="was mined with another decoder"):
            run(tmp_path / name, data)
        fv = FeatureVisualization(CondAttribution(net()), data, LAYER, path=tmp_path / name)
        with pytest.raises(TableMismatchError, match="was mined with another decoder"):
            fv.get_max_reference([0], "0", "relevance")


@pytest.mark.filterwarnings("ignore:1 of .* files:UserWarning")
def test_pictures_are_shown_as_they_were_mined(folder: Path, tmp_path: Path) -> None:
    fv = FeatureVisualization(CondAttribution(net()), Decoded(ImageFolder(folder), TO_32), LAYER, path=tmp_path / "out")
    fv.run(EpsilonPlus(), batch_size=3, num_workers=2, progress=False)
    (data, _) = fv.get_data_sample(3, preprocessing=False)
    assert torch.equal(data[0].detach(), fv.dataset[3][0])
    assert fv.get_max_reference([0], "0", "relevance")


def test_another_kind_of_device_is_told(folder: Path) -> None:
    """A table that was mined on a GPU, shown on the CPU."""
    dataset = Decoded(ImageFolder(folder), TO_32)
    there = {"decoder": dataset.mark("cuda")}
    with pytest.warns(UserWarning, match="were decoded on cuda when they were mined, and are on cpu now"):
        assert decoding.decoder_mark(there, dataset) == there["decoder"]
    assert decoding.decoder_mark({"decoder": dataset.mark()}, dataset) == dataset.mark()
    assert decoding.decoder_mark({}, dataset) == dataset.mark()
    assert decoding.decoder_mark(there, ImageFolder(folder)) == "none"
    assert decoding.decoder_mark({}, ImageFolder(folder)) is None


# --- refusals ---------------------------------------------------------------------------------------------------------


class OwnFolder(ImageFolder):
    def __getitem__(self, index: int) -> Any:
        return super().__getitem__(index)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda path: ImageFolder(path, transforms.ToTensor()),
            "transform ToTensor.* cannot take a picture as a tensor",
        ),
        (lambda path: ImageFolder(path, lambda image: image.convert("L")), "no attribute 'convert'.*transforms.v2 do"),
        (lambda path: ImageFolder(path, lambda image: 3), "must make a tensor of a tensor, not an int"),
        (lambda path: ImageFolder(path, loader=Image.open), "a loader of its own, .*which would not be called"),
        (OwnFolder, "an OwnFolder reads pictures itself; .* such as torchvision's ImageFolder"),
        (lambda path: Pairs(ImageFolder(path)), "a Pairs reads pictures itself"),
        (lambda path: [(torch.zeros(3, 8, 8), 0)], "a list reads pictures itself"),
    ],
    ids=["ToTensor", "of Pillow", "no tensor", "loader", "own folder", "pairs", "list"],
)
def test_other_datasets_and_transforms_are_refused(folder: Path, make: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Decoded(make(folder))


def test_a_mode_that_is_none_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="mode must be one of 'RGB', 'L', not 'CMYK'"):
        Decoded(ImageFolder(folder), mode="CMYK")


@pytest.mark.parametrize("device", ["cuda", "meta"])
def test_a_device_without_decoder_is_refused(folder: Path, device: str) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(LoadingError, match=f"torch(vision|codec) cannot decode JPEGs on {device} .*--decode host"):
        Decoded(ImageFolder(folder), device=device)


def test_torchvision_without_jpeg_support_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(encoded: list[Tensor], device: torch.device) -> list[Tensor]:
        raise RuntimeError("decode_jpeg: torchvision not compiled with libjpeg support")

    monkeypatch.setattr(decoding, "decode_jpegs", lacking)
    decoding._check_decoder.cache_clear()
    with pytest.raises(LoadingError, match=r"not compiled with libjpeg support\): install one"):
        Decoded(ImageFolder(folder))
