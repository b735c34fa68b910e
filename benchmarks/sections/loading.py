"""How many pictures mining can read: JPEGs of a usual size, decoded, resized and cropped as for ImageNet."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import to_tensor

from benchmarks.clocks import Run
from benchmarks.harness import Case, Ratio
from crp.visualization import Decoded
from crp.visualization.jpegs import decode_jpegs
from crp.visualization.mining.loading import read_batches
from crp.visualization.prepared import Prepared

TITLE = "reading JPEGs, beside which mining cannot be faster"
#: Width and height of a picture of ImageNet, on average.
SIZE = (500, 375)
PICTURES, BATCH = 256, 32
WORKERS = (0, 1, 2)
SETUP = f"{PICTURES} JPEGs of {SIZE[0]}×{SIZE[1]}, resized to 256 and cropped to 224×224"


@cache
def folder_of_jpegs() -> Path:
    """Folder of pictures of one class, about as large in bytes as photographs: smooth noise."""
    folder, rng = Path(tempfile.mkdtemp()), np.random.default_rng(0)
    atexit.register(shutil.rmtree, folder)
    (folder / "class").mkdir()
    for number in range(PICTURES):
        small = rng.integers(0, 256, (SIZE[1] // 4, SIZE[0] // 4, 3), np.uint8)
        picture = Image.fromarray(small).resize(SIZE, Image.Resampling.BICUBIC)
        picture.save(folder / "class" / f"{number:04d}.jpg", quality=90)
    return folder


def by_pillow(path: str) -> Tensor:
    """Picture, decoded, resized and cropped by Pillow, as in most programs."""
    with Image.open(path) as picture:
        return to_tensor(_CROP(_RESIZE(picture.convert("RGB"))))


def by_decode_jpeg(path: str) -> Tensor:
    """Picture, decoded by torchcodec or torchvision, and resized and cropped as a tensor."""
    encoded = torch.from_numpy(np.fromfile(path, np.uint8))
    picture: Tensor = _CROP(_RESIZE(*decode_jpegs([encoded], torch.device("cpu"))))
    return picture.float() / 255


_RESIZE, _CROP = transforms.Resize(256, antialias=True), transforms.CenterCrop(224)


def reading(loader: Callable[[str], Tensor], workers: int) -> Run:
    """Function that reads all pictures as mining does, with so many worker processes."""
    dataset = ImageFolder(folder_of_jpegs(), loader=loader)
    batches = [range(start, start + BATCH) for start in range(0, PICTURES, BATCH)]

    def read() -> None:
        n = sum(sample.problem is None for batch in read_batches(dataset, batches, workers) for sample in batch)
        assert n == PICTURES

    return read


def decoding(device: str) -> dict[str, Run]:
    """Functions that read all files, and that also decode, resize and crop them on a device, as mining does."""
    dataset = Decoded(ImageFolder(folder_of_jpegs()), Prepared("RGB", 256, 224).decoded, device=device)
    batches = [range(start, start + BATCH) for start in range(0, PICTURES, BATCH)]

    def read() -> None:
        assert sum(len(batch) for batch in read_batches(dataset.files, batches, 0)) == PICTURES

    def decode() -> None:
        decoder = dataset.decoder()
        for batch in read_batches(dataset.files, batches, 0):
            torch.stack([sample.data for sample in decoder.decode(batch)]).sum().item()  # (waits for a GPU)
        assert (decoder.n_files, decoder.n_by_pillow) == (PICTURES, 0)

    return {"files alone": read, f"decoded on {device}": decode}


def cases() -> list[Case]:
    """Two ways to decode, several numbers of worker processes, and files that are decoded on the device."""
    decoders = {"Pillow": by_pillow, "decode_jpeg": by_decode_jpeg}
    workers = {f"{n} workers": n for n in WORKERS}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parts = ("files alone", f"decoded on {device}")
    return [
        Case(
            f"{SETUP}, no worker",
            lambda: {name: reading(decode, 0) for name, decode in decoders.items()},
            tuple(Ratio(f"ms of the processor a picture, {name}", name, scale=1e3 / PICTURES) for name in decoders),
            rounds=3,
        ),
        Case(
            SETUP,
            lambda: {name: reading(by_pillow, n) for name, n in workers.items()},
            tuple(Ratio(f"ms a picture, Pillow, {name}", name, scale=1e3 / PICTURES) for name in workers),
            clock="wall",
            rounds=3,
        ),
        Case(
            f"{SETUP}, --decode device",
            lambda: decoding(device),
            tuple(Ratio(f"ms a picture, {name}", name, scale=1e3 / PICTURES) for name in parts),
            clock="wall" if device == "cuda" else "cpu",
            rounds=3,
        ),
    ]
