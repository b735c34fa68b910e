"""Data of the command line as pairs of a tensor and a label: folders of pictures, and datasets of one's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from crp.errors import LoadingError
from crp.notices import warn
from crp.visualization.mining.datasets import Pairs, indexed
from crp.visualization.mining.marks import Source
from crp.visualization.models import Loaded, called, imported, nearest

_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"})


class Pictures:
    """Pictures of a folder, in the order of their names; with class folders in it, these are the labels.

    What file managers and notebooks leave behind is passed over: names that begin with a dot, and ``__MACOSX``.

    Attributes
    ----------
    labels : dict of str to int, optional
        Class of every class folder.
    """

    def __init__(self, folder: Path, labels: dict[str, int] | None) -> None:
        found = sorted(p for p in folder.rglob("*") if _is_picture_file(p, folder))
        if not found:
            raise LoadingError(f"--data {folder} holds no pictures ({', '.join(sorted(_SUFFIXES))})")
        self._folder = str(folder)
        self._names = [str(path.relative_to(folder)) for path in found]
        self.labels = labels

    def __len__(self) -> int:
        return len(self._names)

    def source(self, index: int) -> Source:
        """File of a picture."""
        return Source(self._folder, Path(self._names[index]).as_posix())

    def __getitem__(self, index: int) -> tuple[Image.Image, int | None]:
        name = self._names[index]
        with Image.open(Path(self._folder, name)) as file:
            file.load()
            return file.copy(), None if self.labels is None else self.labels[Path(name).parts[0]]


def open_source(data: str) -> Any:
    """What ``--data`` names; asked before the model is loaded.

    Parameters
    ----------
    data : str
        A folder of pictures, with or without class folders, or ``"package.module:factory"``, a function without
        arguments that gives a dataset, or a dataset.

    Returns
    -------
    Path or Dataset

    Raises
    ------
    LoadingError
        If there is no such data, or it has no length and no index.
    """
    if Path(data).is_dir():
        return Path(data)
    if ":" not in data:
        raise LoadingError(f"--data {data} is neither a folder nor package.module:factory")
    factory = imported(data)
    try:
        return indexed(called(factory, data) if callable(factory) else factory)
    except TypeError as error:
        raise LoadingError(f"--data {data}: {error}") from error


def load_source(
    source: Any, fields: Sequence[str], loaded: Loaded, *, by_label: bool
) -> tuple[Pairs, Callable[[Tensor], Tensor] | None]:
    """Dataset of pairs, and what prepares a sample for the model.

    Parameters
    ----------
    source : Path or Dataset
        From `open_source`.
    fields : sequence of str
        Where an item of the dataset holds its data and, if there is one, its label: keys, or places.
    loaded : Loaded
        The model, and how it takes pictures.
    by_label : bool
        Whether labels are needed.

    Raises
    ------
    LoadingError
        If the classes of a folder are not those of the model, or ``fields`` are none.
    """
    places: list[int | str | None] = [int(field) if field.isdigit() else field for field in fields]
    if len(places) > 2:
        raise LoadingError(f"--fields names data and label, not {len(places)} fields")
    if isinstance(source, Path):
        if places:
            raise LoadingError("--fields is for datasets; a folder holds pictures")
        labels = _labels(source, loaded.classes) if by_label else None
        made = Pairs(Pictures(source, labels), 0, 1, loaded.prepared)
    else:
        first, *rest = places or _usual_places(source)
        made = Pairs(source, first, rest[0] if rest else None, loaded.prepared)
    return made, loaded.normalized if gives_pictures(made) else None


def _usual_places(source: Any) -> list[int | str | None]:
    """Where data and label are without ``--fields``: items are pairs, tuples of one, or the data alone."""
    for index in range(min(len(source), 100)):
        try:
            item = source[index]
        except Exception:  # an unreadable sample, which mining will report
            continue
        if isinstance(item, tuple | list):
            return [0] if len(item) == 1 else [0, 1]
        if not hasattr(item, "keys"):
            return [None]
        break
    return [0, 1]


def as_list(label: Any) -> list[int]:
    """Classes of a label that lists them."""
    return list(label)


def as_hot(label: Any) -> list[int]:
    """Classes of a label that has a number for each class, and 0 for those that are not there."""
    found: list[int] = np.flatnonzero(np.asarray(label)).tolist()
    return found


#: What ``--multi-label`` says of labels.
MULTI_LABEL = {"list": as_list, "hot": as_hot}


def gives_pictures(pairs: Pairs) -> bool:
    """Whether the data of a dataset's items are pictures of Pillow."""
    raw = Pairs(pairs.dataset, pairs.data, None, _is_picture)
    for index in range(min(len(raw), 100)):
        try:
            return bool(raw[index][0])
        except Exception:  # an unreadable sample, which mining will report
            continue
    return False


def _is_picture(data: Any) -> Any:
    return np.bool_(hasattr(data, "getbands"))


def class_folders(folder: Path) -> list[str]:
    """Names of the class folders in a folder of pictures, in order."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not _is_hidden(path.name))


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _is_picture_file(path: Path, folder: Path) -> bool:
    parts = path.relative_to(folder).parts
    return path.suffix.lower() in _SUFFIXES and not any(map(_is_hidden, parts)) and path.is_file()


def _labels(folder: Path, classes: Sequence[str]) -> dict[str, int]:
    """Class of every class folder: by name where the names are those of the model, by number, else in order."""
    names = class_folders(folder)
    if not names:
        raise LoadingError(f"--data {folder} has no class folders, so there are no labels; give --targets prediction")
    loose = [p.name for p in folder.iterdir() if _is_picture_file(p, folder)]
    if loose:
        raise LoadingError(f"--data {folder} holds pictures beside its class folders, such as {loose[0]}")
    empty = [name for name in names if not any(_is_picture_file(p, folder) for p in (folder / name).rglob("*"))]
    if empty:
        warn(f"--data {folder}: no picture is in the class folders {', '.join(empty)}")
    found = [_find_class(name, classes) for name in names]
    if any(found):
        return {name: _one_class(name, of_name, folder, classes) for name, of_name in zip(names, found, strict=True)}
    if all(name.isdecimal() for name in names):
        return _by_number(names, folder, classes)
    if classes and len(names) != len(classes):
        raise LoadingError(
            f"--data {folder} has {len(names)} class folders and the model {len(classes)} classes: name the folders as "
            "the classes are called, or give --targets prediction"
        )
    return {name: label for label, name in enumerate(names)}


def _find_class(name: str, classes: Sequence[str]) -> list[int]:
    """Classes that are called like a folder; in any case, where none is spelt alike."""
    exact = [index for index, one in enumerate(classes) if one == name]
    return exact or [index for index, one in enumerate(classes) if one.casefold() == name.strip().casefold()]


def _one_class(name: str, found: Sequence[int], folder: Path, classes: Sequence[str]) -> int:
    if len(found) == 1:
        return found[0]
    if found:
        raise LoadingError(
            f"--data {folder}: {name!r} is the name of the classes {', '.join(map(str, found))}; give --classes with "
            "names that differ"
        )
    raise LoadingError(
        f"--data {folder}: the class folder {name!r} is no class of the model, and others are{nearest(name, classes)}; "
        "rename it, or give --targets prediction"
    )


def _by_number(names: Sequence[str], folder: Path, classes: Sequence[str]) -> dict[str, int]:
    """Classes of folders that are called 0 to n - 1, which in the order of names would be 0, 1, 10, 2, ..."""
    numbers = sorted(map(int, names))
    if numbers != list(range(len(names))) or (classes and len(names) != len(classes)):
        raise LoadingError(
            f"--data {folder}: the class folders are the numbers {numbers[0]} to {numbers[-1]}, and the classes "
            f"count from 0 to {len(classes or names) - 1}: say by --classes which class has which folder's name"
        )
    return {name: int(name) for name in names}
