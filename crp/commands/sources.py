"""Data of the command line as pairs of a tensor and a label: folders of pictures, and datasets of one's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from crp.commands.errors import CommandError
from crp.commands.models import Loaded, imported
from crp.visualization.datasets import Pairs

_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"})


class Pictures:
    """Pictures of a folder, in the order of their names; with class folders in it, these are the labels."""

    def __init__(self, folder: Path, labels: dict[str, int] | None) -> None:
        found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in _SUFFIXES and p.is_file())
        if not found:
            raise CommandError(f"--data {folder} holds no pictures ({', '.join(sorted(_SUFFIXES))})")
        self._folder = str(folder)
        self._names = [str(path.relative_to(folder)) for path in found]
        self._labels = labels

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> tuple[Image.Image, int | None]:
        name = self._names[index]
        with Image.open(Path(self._folder, name)) as file:
            file.load()
            return file.copy(), None if self._labels is None else self._labels[Path(name).parts[0]]


class Prepared:
    """A picture as a tensor in 0..1, resized and cut as the weights ask for; tensors and arrays are left alone.

    Parameters
    ----------
    mode : {"RGB", "L"}
        What pictures are converted to.
    resize, size : int
        Length of the shorter side, and side of the square in the middle; 0 to leave them.
    interpolation : torchvision.transforms.InterpolationMode, optional
        Bilinear by default.
    """

    def __init__(self, mode: str, resize: int = 0, size: int = 0, interpolation: Any = None) -> None:
        self.mode, self.resize, self.size, self.interpolation = mode, resize, size, interpolation

    def __call__(self, data: Any) -> Any:
        """Tensor of shape (channels, height, width)."""
        if not hasattr(data, "getbands"):
            return data
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms import functional as F

        picture = data.convert(self.mode)
        if self.resize:
            picture = F.resize(picture, [self.resize], self.interpolation or InterpolationMode.BILINEAR, antialias=True)
        if self.size:
            picture = F.center_crop(picture, [self.size])
        tensor: Tensor = F.to_tensor(picture)
        return tensor


class Normalized:
    """Samples of shape (samples, channels, ...) less ``mean``, divided by ``std``."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean, self.std = tuple(mean), tuple(std)

    def __call__(self, data: Tensor) -> Tensor:
        """Samples as the model takes them."""
        if len(self.mean) not in (1, data.shape[1]):
            raise ValueError(f"{len(self.mean)} means for {data.shape[1]} channels")
        mean, std = (data.new_tensor(values).view(-1, *[1] * (data.dim() - 2)) for values in (self.mean, self.std))
        return (data - mean) / std


def load_source(
    data: str,
    fields: Sequence[str],
    loaded: Loaded,
    *,
    by_label: bool,
    interpolation: Any = None,
    size: int | None = None,
) -> tuple[Pairs, Callable[[Tensor], Tensor] | None]:
    """Dataset of pairs, and what prepares a sample for the model.

    Parameters
    ----------
    data : str
        A folder of pictures, with or without class folders, or ``"package.module:factory"``, a function without
        arguments that gives a dataset, or a dataset.
    fields : sequence of str
        Where an item of the dataset holds its data and, if there is one, its label: keys, or places.
    loaded : Loaded
        The model, and how it takes pictures.
    by_label : bool
        Whether labels are needed.
    interpolation : torchvision.transforms.InterpolationMode, optional
        Of resized pictures.
    size : int, optional
        Pictures are resized and cut to it, where the model does not say.

    Raises
    ------
    CommandError
        If there is no such data, or its classes are not those of the model.
    """
    places: list[int | str] = [int(field) if field.isdigit() else field for field in fields]
    if len(places) > 2:
        raise CommandError(f"--fields names data and label, not {len(places)} fields")
    transform = Prepared(_mode(loaded.model), loaded.resize, size or loaded.size, interpolation)
    folder = Path(data)
    if folder.is_dir():
        if places:
            raise CommandError("--fields is for datasets; a folder holds pictures")
        made = Pairs(Pictures(folder, _labels(folder, loaded.classes) if by_label else None), 0, 1, transform)
    elif ":" in data:
        default: list[int | str] = [0, 1]
        first, *rest = places or default
        made = Pairs(_made(data), first, rest[0] if rest else None, transform)
    else:
        raise CommandError(f"--data {data} is neither a folder nor package.module:factory")
    return made, Normalized(loaded.mean, loaded.std) if loaded.mean and _gives_pictures(made) else None


def _mode(model: nn.Module) -> str:
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    return "L" if first is not None and first.in_channels == 1 else "RGB"


def _gives_pictures(pairs: Pairs) -> bool:
    raw = Pairs(pairs.dataset, pairs.data, None, _is_picture)
    for index in range(min(len(raw), 100)):
        try:
            return bool(raw[index][0])
        except Exception:  # an unreadable sample, which mining will report
            continue
    return False


def _is_picture(data: Any) -> Any:
    return np.bool_(hasattr(data, "getbands"))


def _labels(folder: Path, classes: Sequence[str]) -> dict[str, int]:
    """Class of every class folder: by name where the names are those of the model, else in order."""
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    if not names:
        raise CommandError(f"--data {folder} has no class folders, so there are no labels; give --targets prediction")
    loose = [p.name for p in folder.iterdir() if p.suffix.lower() in _SUFFIXES]
    if loose:
        raise CommandError(f"--data {folder} holds pictures beside its class folders, such as {loose[0]}")
    if classes and set(names) <= set(classes):
        return {name: list(classes).index(name) for name in names}
    if classes and len(names) != len(classes):
        raise CommandError(
            f"--data {folder} has {len(names)} class folders and the model {len(classes)} classes: name the folders as "
            "the classes are called, or give --targets prediction"
        )
    return {name: label for label, name in enumerate(names)}


def _made(place: str) -> Any:
    factory = imported(place)
    made = factory() if callable(factory) else factory
    if isinstance(made, torch.utils.data.DataLoader):
        made = made.dataset
    if not (hasattr(made, "__len__") and hasattr(made, "__getitem__")):
        raise CommandError(f"{place} gives a {type(made).__name__}, not a dataset with a length and an index")
    return made
