"""Pictures of a folder that are read as bytes, and decoded many at once on the device of the model.

Processes that load samples read the files; `decode_jpeg` makes pictures of a batch: on a GPU by nvJPEG, on the CPU by
libjpeg-turbo, as Pillow does. It is that of torchcodec where that is installed, and of torchvision otherwise, which has
announced to give it up.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor
from torch.utils.data import Subset

from crp.checks import check_choice
from crp.engine.backward import lacks_memory
from crp.errors import InputError, InputTypeError, LoadingError, OutOfRangeError, StateError
from crp.image.reading import as_viewed
from crp.notices import kind_of, warn
from crp.visualization.jpegs import decode_jpegs, jpeg_library
from crp.visualization.mining.datasets import Problem, Sample, indexed
from crp.visualization.mining.encoded import Decoder, Encoded
from crp.visualization.mining.marks import Source, source_of
from crp.visualization.table.fingerprint import fingerprint

#: Pictures that are decoded at once, so that memory is bounded for any batch size.
_AT_ONCE = 32
#: How a picture is turned upright, by its EXIF orientation.
_TURNS: dict[int, Callable[[Tensor], Tensor]] = {
    1: lambda picture: picture,
    2: lambda picture: picture.flip(-1),
    3: lambda picture: picture.flip(-1, -2),
    4: lambda picture: picture.flip(-2),
    5: lambda picture: picture.mT,
    6: lambda picture: picture.mT.flip(-1),
    7: lambda picture: picture.mT.flip(-1, -2),
    8: lambda picture: picture.mT.flip(-2),
}
#: Kinds of devices that have a decoder; and all decoders. (On a CPU, torchvision and torchcodec give the same pixels.)
_KINDS = ("cpu", "cuda")
_DECODERS = ("cpu", "cuda", "cuda by torchcodec")
#: Identifiers of components that are red, green and blue themselves, and not brightness and colour.
_RED_GREEN_BLUE = (82, 71, 66)


class Decoded(Encoded):
    """Pictures of a folder, which mining reads as bytes and decodes by `decode_jpeg` on the device of the model.

    On a GPU, nvJPEG decodes a batch at once. Pictures are upright, as the EXIF orientation says. Files that are no
    plain JPEG (PNG, CMYK, damaged ones) are read by Pillow; mining warns how many they are.

    Decoders differ a little in their pixels. A table says in its recipe which one it was mined with, and is refused to
    a run with another.

    Parameters
    ----------
    dataset : Dataset
        Folder of files: `torchvision.datasets.ImageFolder`, or a subset of one.
    transform : callable, optional
        Function of a picture, a uint8 tensor of shape (channels, height, width) on the device, such as those of
        ``torchvision.transforms.v2``; by default that of the dataset. What it leaves in uint8 becomes 0..1.
    mode : {"RGB", "L"}
        Colours, or grey.
    device : torch.device or str
        Where ``dataset[i]`` is decoded, which gives a pair (tensor, label). Mining and `FeatureVisualization` decode on
        their own device.

    Raises
    ------
    TypeError
        If the dataset is no folder of files, or the transform takes no tensors.
    LoadingError
        If JPEGs cannot be decoded on the device.
    """

    def __init__(
        self,
        dataset: Any,
        transform: Callable[[Tensor], Tensor] | None = None,
        mode: str = "RGB",
        device: torch.device | str = "cpu",
    ) -> None:
        check_choice("mode", mode, Literal["RGB", "L"])
        self.dataset = indexed(dataset)
        inner = _check_folder(self.dataset)
        self.transform = getattr(inner, "transform", None) if transform is None else transform
        self.mode, self.device = mode, torch.device(device)
        self.files = _Files(self.dataset, mode)
        _check_decoder(self.device.type)
        self._check_transform()

    def __len__(self) -> int:
        return len(self.dataset)

    def __repr__(self) -> str:
        return f"Decoded({type(self.dataset).__name__}, {self.transform!r}, {self.mode!r})"

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        if not -len(self) <= index < len(self):
            raise OutOfRangeError(f"there is no sample {index} among {len(self)}")
        encoded, label = self.files[index]
        (found,) = self.decoder().decode([Sample(index, encoded, label, None)])
        if found.problem is not None:
            raise found.problem.error or StateError(found.problem.reason)
        return found.data, label

    def source(self, index: int) -> Source | None:
        """File of a sample."""
        return source_of(self.dataset, index)

    def on(self, device: torch.device | str) -> Decoded:
        """The same pictures, decoded on another device."""
        if torch.device(device) == self.device:
            return self
        return Decoded(self.dataset, self.transform, self.mode, device)

    def words(self) -> dict[str, Any]:
        """What a recipe says of it."""
        function = {"torchvision": "torchvision.io", "torchcodec": "torchcodec.decoders"}[jpeg_library()]
        return {"function": f"{function}.decode_jpeg", "device": self.device.type, "transform": self.transform}

    def mark(self, kind: str | None = None) -> str:
        """Fingerprint of what makes pictures of bytes, on this or another ``kind`` of device."""
        return fingerprint(("decode_jpeg", kind or _kind_of_device(self.device), self.mode, self.transform))

    def decoder(self) -> _Decoder:
        """What makes pictures of files, and counts them."""
        return _Decoder(self)

    def finished(self, picture: Tensor) -> Tensor:
        """Picture of uint8 as the transform makes it, in floating-point numbers."""
        made = picture if self.transform is None else self.transform(picture)
        if not isinstance(made, Tensor):
            raise InputTypeError(f"the transform must make a tensor of a tensor, not {kind_of(made)}")
        made = made.as_subclass(Tensor)
        return made.float() / 255 if made.dtype == torch.uint8 else made

    def _check_transform(self) -> None:
        devices = [self.device] if self.device.type == "cuda" else []
        picture = torch.zeros(3 if self.mode == "RGB" else 1, 256, 256, dtype=torch.uint8, device=self.device)
        with torch.random.fork_rng(devices):
            try:
                self.finished(picture)
            except Exception as error:
                raise InputTypeError(
                    f"transform {self.transform!r} cannot take a picture as a tensor of uint8 ({type(error).__name__}: "
                    f"{error}); those of torchvision.transforms.v2 do, or have pictures decoded on the host"
                ) from error


class _Files:
    """Files of a folder as they are: dataset of pairs (bytes, label).

    The first byte is the EXIF orientation, and the file follows. A file that is no plain JPEG comes as a picture: uint8
    of shape (channels, height, width).
    """

    def __init__(self, dataset: Any, mode: str) -> None:
        self.dataset, self.mode = dataset, mode

    def __len__(self) -> int:
        return len(self.dataset)

    def source(self, index: int) -> Source | None:
        """File of a sample."""
        return source_of(self.dataset, index)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        place = self.source(index)
        if place is None:
            raise InputTypeError(f"the dataset does not tell the file of sample {index}")
        content = Path(place.folder, place.name).read_bytes()
        orientation = _orientation_of(content)
        if orientation is None:
            return _by_pillow(content, self.mode), _label_of(self.dataset, index)
        encoded = torch.empty(len(content) + 1, dtype=torch.uint8)
        encoded[0] = orientation
        encoded[1:].numpy()[:] = np.frombuffer(content, np.uint8)
        return encoded, _label_of(self.dataset, index)


class _Decoder(Decoder):
    """Makes pictures of encoded files, and counts those that Pillow had to read.

    Attributes
    ----------
    n_files, n_by_pillow : int
    """

    def __init__(self, dataset: Decoded) -> None:
        self._dataset = dataset
        self.n_files = self.n_by_pillow = 0
        self._first_by_pillow = ""

    def decode(self, samples: Sequence[Sample]) -> Iterator[Sample]:
        """Pictures as the dataset gives them, or the problem of a file that no one can read."""
        for begin in range(0, len(samples), _AT_ONCE):
            part = samples[begin : begin + _AT_ONCE]
            encoded = [sample.data[1:] for sample in part if sample.data.dim() == 1]
            pictures = iter(self._by_library(encoded))
            for sample in part:
                picture = next(pictures) if sample.data.dim() == 1 else sample.data
                try:
                    yield sample._replace(data=self._finished(sample, picture))
                except Exception as error:
                    if lacks_memory(error):
                        raise
                    yield sample._replace(problem=Problem.of(error))

    def finish(self) -> None:
        """Tell how many files Pillow has read, if any."""
        if self.n_by_pillow:
            warn(
                f"{self.n_by_pillow} of {self.n_files} files are no JPEG that {jpeg_library()} decodes, and were read "
                f"by Pillow, such as {self._first_by_pillow}"
            )

    def _finished(self, sample: Sample, picture: Tensor | Exception) -> Tensor:
        dataset = self._dataset
        self.n_files += 1
        if isinstance(picture, Exception) or sample.data.dim() > 1:
            if not self.n_by_pillow:
                source = dataset.source(sample.id)
                reason = f" ({Problem.of(picture).reason})" if isinstance(picture, Exception) else ""
                self._first_by_pillow = f"{source.name if source else sample.id}{reason}"
            self.n_by_pillow += 1
            if isinstance(picture, Exception):
                picture = _by_pillow(sample.data[1:].numpy().tobytes(), dataset.mode)
        else:
            picture = _TURNS[int(sample.data[0])](picture if dataset.mode == "RGB" else _grey(picture))
        return dataset.finished(picture.to(dataset.device).contiguous())

    def _by_library(self, encoded: list[Tensor]) -> Sequence[Tensor | Exception]:
        """Pictures in RGB, or why there is none."""
        if not encoded:
            return []
        device = self._dataset.device
        try:
            return decode_jpegs(encoded, device)
        except RuntimeError as error:
            if len(encoded) == 1 and lacks_memory(error):
                raise
            failure = error
        # One damaged file fails the whole batch, and memory may suffice for one after the other.
        if len(encoded) == 1:
            return [failure]
        return [picture for one in encoded for picture in self._by_library([one])]


def decoder_mark(fingerprints: Mapping[str, str], dataset: Any) -> str | None:
    """Fingerprint of the decoder of a dataset that is shown, to be compared with a table's; None where both have none.

    Where only the kind of device is another one, pixels differ a little: that is told, and the table's is given.
    """
    there = fingerprints.get("decoder")
    if not isinstance(dataset, Decoded):
        return None if there is None else "none"
    own = _kind_of_device(dataset.device)
    others = [kind for kind in _DECODERS if kind != own and dataset.mark(kind) == there]
    if not others:
        return dataset.mark()
    warn(
        f"the pictures were decoded on {others[0]} when they were mined, and are on {own} now: pixels differ a "
        "little, and with them heatmaps"
    )
    return there


def _kind_of_device(device: torch.device) -> str:
    """Name of a device's decoder."""
    return f"{device.type} by torchcodec" if (device.type, jpeg_library()) == ("cuda", "torchcodec") else device.type


def _check_folder(dataset: Any) -> Any:
    """Folder behind a dataset; a `TypeError` unless it tells files and labels without reading pictures."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    if callable(getattr(dataset, "source", None)) and callable(getattr(dataset, "label", None)):
        return dataset
    from torchvision.datasets import DatasetFolder
    from torchvision.datasets.folder import default_loader

    if not isinstance(dataset, DatasetFolder) or type(dataset).__getitem__ is not DatasetFolder.__getitem__:
        raise InputTypeError(
            f"{kind_of(dataset)} reads pictures itself; those that are decoded on the device are of a folder of files, "
            "such as torchvision's ImageFolder"
        )
    if dataset.loader is not default_loader:
        raise InputTypeError(
            f"{kind_of(dataset)} reads files by a loader of its own, {dataset.loader!r}, which would not be called; "
            "give one without loader="
        )
    return dataset


def _label_of(dataset: Any, index: int) -> Any:
    """Label of a sample of a folder, whose file is not read."""
    while isinstance(dataset, Subset):
        dataset, index = dataset.dataset, int(dataset.indices[index])
    if callable(own := getattr(dataset, "label", None)):
        return own(index)
    label, change = dataset.samples[index][1], dataset.target_transform
    return label if change is None else change(label)


@cache
def _check_decoder(kind: str) -> None:
    """Raise a `LoadingError` unless JPEGs are decoded on such devices."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "JPEG")
    encoded = torch.from_numpy(np.frombuffer(buffer.getvalue(), np.uint8).copy())
    try:
        if kind not in _KINDS:
            raise InputError(f"there is a decoder for {' and '.join(_KINDS)}")
        decode_jpegs([encoded], torch.device(kind))
    except Exception as error:  # (of any kind, as that depends on how the library was built)
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise LoadingError(
            f"{jpeg_library()} cannot decode JPEGs on {kind} ({reason[0][:200]}): install one with JPEG support, or "
            "have pictures decoded on the host (--decode host)"
        ) from error


def _orientation_of(content: bytes) -> int | None:
    """EXIF orientation of a JPEG that all decoders understand alike; None for other files.

    It must be whole, and in grey or in brightness and colour, since not every decoder notices what it is.
    """
    if content[:2] != b"\xff\xd8" or not content[-64:].rstrip(b"\0").endswith(b"\xff\xd9"):
        return None
    try:
        with Image.open(io.BytesIO(content), formats=["JPEG"]) as file:
            components = tuple(component[0] for component in getattr(file, "layer", ()))
            is_rgb = file.info.get("adobe_transform") == 0 or components == _RED_GREEN_BLUE
            if file.format != "JPEG" or file.mode not in ("L", "RGB") or (file.mode == "RGB" and is_rgb):
                return None
            orientation = file.getexif().get(ExifTags.Base.Orientation, 1)
            return orientation if orientation in _TURNS else 1
    except Exception:  # (Pillow tells what is wrong when it reads the picture)
        return None


def _by_pillow(content: bytes, mode: str) -> Tensor:
    """Picture of a file as a viewer shows it, of uint8."""
    with Image.open(io.BytesIO(content)) as file:
        pixels = np.array(as_viewed(file).convert(mode))
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1).contiguous()


def _grey(picture: Tensor) -> Tensor:
    """Grey of an RGB picture of uint8, as Pillow computes it."""
    weights = torch.tensor([19595, 38470, 7471], dtype=torch.int32, device=picture.device)
    weighted = (picture.int() * weights[:, None, None]).sum(0, keepdim=True, dtype=torch.int32)
    return ((weighted + 32768) >> 16).to(torch.uint8)
