"""Data of the command line as pairs of a tensor and a label: folders of pictures, and datasets of one's own."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from crp.errors import InputError, LoadingError
from crp.layers import nearest
from crp.notices import warn
from crp.visualization.decoding import Decoded
from crp.visualization.mining.datasets import Pairs, indexed
from crp.visualization.mining.marks import Source
from crp.visualization.mining.texts import Texts
from crp.visualization.models import NOT_READ, Loaded, _classes_called, called, imported
from crp.wording import counted, first_few

_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"})


class Pictures:
    """Pictures of a folder, in the order of their names; with class folders in it, these are the labels.

    What file managers and notebooks leave behind is passed over: names that begin with a dot, and ``__MACOSX``.
    Folders may be links. A warning tells of pictures in formats that torchvision's ``ImageFolder`` leaves out, too.

    Attributes
    ----------
    labels : dict of str to int, optional
        Class of every class folder.
    """

    def __init__(self, folder: Path, labels: dict[str, int] | None) -> None:
        # (Pillow may open others, such as .gif, that are not taken for pictures)
        others = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
        files = sorted(_files(folder, _SUFFIXES | others))
        found = [path for path in files if path.suffix.lower() in _SUFFIXES]
        if left_out := [str(path.relative_to(folder)) for path in files if path.suffix.lower() not in _SUFFIXES]:
            warn(
                f"--data {folder}: {counted(len(left_out), 'file')} left out, as pictures are {_named_suffixes()}: "
                f"{first_few(left_out, 5)}; convert them, or give a dataset of your own that opens them"
            )
        if not found:
            raise _nothing_in(folder)
        self._folder = str(folder)
        self._names = [str(path.relative_to(folder)) for path in found]
        self.labels = labels

    def __len__(self) -> int:
        return len(self._names)

    def source(self, index: int) -> Source:
        """File of a picture."""
        return Source(self._folder, Path(self._names[index]).as_posix())

    def label(self, index: int) -> int | None:
        """Class of a picture, whose file is not read."""
        return None if self.labels is None else self.labels[Path(self._names[index]).parts[0]]

    def __getitem__(self, index: int) -> tuple[Image.Image, int | None]:
        try:
            with Image.open(Path(self._folder, self._names[index])) as file:
                file.load()
                return file.copy(), self.label(index)
        except NOT_READ as error:
            raise LoadingError(f"{self._names[index]} is no picture that can be read: {error}") from error


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
    source: Any, fields: Sequence[str], loaded: Loaded, *, by_label: bool, decode: str = "host"
) -> tuple[Pairs | Decoded, Callable[[Tensor], Tensor] | None]:
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
    decode : {"host", "device"}
        Where JPEGs of a folder are decoded: by Pillow as they are read, or by torchvision on the model's device.

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
        pictures, prepared = Pictures(source, labels), loaded.prepared
        if decode == "device":
            return Decoded(pictures, prepared.decoded, prepared.mode), loaded.normalized
        made = Pairs(pictures, 0, 1, prepared)
    elif isinstance(source, Decoded) and not places:
        return source, None
    else:
        first, *rest = places or _usual_places(source)
        made = Pairs(source, first, rest[0] if rest else None, loaded.prepared)
    return made, loaded.normalized if gives_pictures(made) else None


def load_texts(source: Any, tokenizer: str | None, position: str | None, fields: str, model: str) -> Texts | None:
    """Texts of a dataset whose items are words or token ids; None for others.

    Parameters
    ----------
    source : Path or Dataset
        From `open_source`.
    tokenizer : str, optional
        A folder or name that Hugging Face knows, or ``"package.module:factory"``; of a model ``"hf:name"``, its own.
    position : str, optional
        ``"each"``, or a number, as in `Texts`.
    fields : str
        Keys of text and label, such as ``"text,label"``; these are those by default.
    model : str

    Raises
    ------
    LoadingError
        If any of these is none.
    """
    if isinstance(source, Texts):
        for name, given in (("tokenizer", tokenizer), ("position", position), ("fields", fields)):
            if given:
                raise LoadingError(f"--{name} is said by the Texts that --data gives")
        return source
    if isinstance(source, Path) and (tokenizer or position):
        raise LoadingError("--tokenizer and --position are for texts, and --data is a folder of pictures")
    if isinstance(source, Path) or not (tokenizer or position or _holds_texts(source)):
        return None
    if tokenizer is None and model.startswith("hf:"):
        tokenizer = model.removeprefix("hf:")
    named = [field for field in fields.split(",") if field]
    if len(named) > 2:
        raise LoadingError(f"--fields names text and label, not {len(named)} fields")
    keys = dict(zip(("text", "label"), named, strict=False))
    made = None if tokenizer is None else load_tokenizer(tokenizer)
    return Texts(source, made, position=read_position(position), **keys)


def read_position(word: str | None) -> int | str | None:
    """Position that a word names: none, ``"each"``, or a number."""
    if word is None or word == "each":
        return word
    try:
        return int(word)
    except ValueError:
        raise LoadingError(f"--position {word} must be 'each' or a number, such as -1 for the last token") from None


def load_tokenizer(name: str) -> Any:
    """Tokenizer that a name says: of a function ``"package.module:factory"``, or of Hugging Face, maybe in a folder."""
    if ":" in name and not Path(name).exists():
        made = imported(name)
        return made if callable(made) and not isinstance(made, type) and hasattr(made, "decode") else called(made, name)
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise LoadingError(
            f"--tokenizer {name} needs transformers ({error}): python -m pip install transformers"
        ) from error
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # (of any kind, for names that are none and failed downloads)
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise LoadingError(f"--tokenizer {name} cannot be loaded: {line}") from error


def _first_item(source: Any, without: Any) -> Any:
    """First item of a dataset that can be read, of its first hundred: mining will report the others."""
    for index in range(min(len(source), 100)):
        with suppress(Exception):
            return source[index]
    return without


def _holds_texts(source: Any) -> bool:
    item = _first_item(source, None)
    item = item[0] if isinstance(item, tuple | list) and item else item
    return isinstance(item, str) or (isinstance(item, Mapping) and "input_ids" in item)


def _usual_places(source: Any) -> list[int | str | None]:
    """Where data and label are without ``--fields``: items are pairs, tuples of one, or the data alone."""
    item = _first_item(source, (None, None))
    if isinstance(item, tuple | list) and len(item) == 1:
        return [0]
    return [0, 1] if isinstance(item, tuple | list) or hasattr(item, "keys") else [None]


def _as_list(label: Any) -> list[int]:
    """Classes of a label that lists them."""
    return list(label)


def _as_hot(label: Any) -> list[int]:
    """Classes of a label that has 1 for each class that is there, and 0 for each that is not.

    Raises
    ------
    ValueError
        If it has other numbers, such as smoothed labels or a mark for "unknown", which name no classes.
    """
    marks = np.asarray(label)
    if marks.ndim != 1 or not np.isin(marks, (0, 1)).all():
        raise InputError(
            f"a label must have 0 or 1 for each class (--multi-label hot), not {marks.ravel()[:9].tolist()} of shape "
            f"{marks.shape}; a dataset that you write says which classes are there"
        )
    found: list[int] = np.flatnonzero(marks).tolist()
    return found


#: What ``--multi-label`` says of labels.
MULTI_LABEL = {"list": _as_list, "hot": _as_hot}


def gives_pictures(pairs: Pairs | Decoded) -> bool:
    """Whether the data of a dataset's items are pictures, of which those of Pillow are prepared."""
    if isinstance(pairs, Decoded) or isinstance(pairs.dataset, Pictures):  # (also where none can be read)
        return isinstance(pairs.dataset, Pictures)
    return bool(_first_item(Pairs(pairs.dataset, pairs.data, None, _is_picture), [False])[0])


def _is_picture(data: Any) -> Any:
    return np.bool_(hasattr(data, "getbands"))


def _class_folders(folder: Path) -> list[str]:
    """Names of the class folders in a folder of pictures, in order."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not _is_hidden(path.name))


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _is_picture_file(path: Path, suffixes: Collection[str] = _SUFFIXES) -> bool:
    """Whether a file has such a name; a link that leads nowhere counts, so that it is named where it is read."""
    named = path.suffix.lower() in suffixes and not _is_hidden(path.name)
    return named and (path.is_file() or (path.is_symlink() and not path.exists()))


def _files(folder: Path, suffixes: Collection[str] = _SUFFIXES) -> Iterator[Path]:
    """Such files in a folder and those in it, which may be links."""
    for place, folders, names in os.walk(folder, onerror=_refuse, followlinks=True):
        folders[:] = [name for name in folders if not (_is_hidden(name) or _leads_back(Path(place, name)))]
        yield from (path for path in map(Path(place).joinpath, names) if _is_picture_file(path, suffixes))


def _refuse(error: OSError) -> None:
    raise LoadingError(f"--data: the folder {error.filename} cannot be read: {error.strerror}") from error


def _leads_back(folder: Path) -> bool:
    """Whether a folder is a link to one that it is in, by its own place or by the links on the way to it."""
    if not folder.is_symlink():
        return False
    return folder.resolve() in (*folder.parent.resolve().parents, *(one.resolve() for one in folder.parents))


def _named_suffixes() -> str:
    return ", ".join(sorted(_SUFFIXES))


def _nothing_in(folder: Path) -> LoadingError:
    return LoadingError(f"--data {folder} holds no pictures ({_named_suffixes()})")


def _labels(folder: Path, classes: Sequence[str]) -> dict[str, int]:
    """Class of every class folder: by name where the names are those of the model, by number, else in order."""
    names = _class_folders(folder)
    loose = sorted(path.name for path in folder.iterdir() if _is_picture_file(path))
    if not names and not loose:
        raise _nothing_in(folder)
    if not names:
        raise LoadingError(f"--data {folder} has no class folders, so there are no labels; give --targets prediction")
    if loose:
        raise LoadingError(f"--data {folder} holds pictures beside its class folders, such as {loose[0]}")
    if empty := [name for name in names if not any(_files(folder / name))]:
        warn(f"--data {folder}: no picture is in the class folders {', '.join(empty)}")
    found = [_classes_called(name, classes) for name in names]
    if any(found):
        return {name: _one_class(name, of_name, folder, classes) for name, of_name in zip(names, found, strict=True)}
    if all(name.isdecimal() for name in names):
        return _by_number(names, folder, classes)
    if classes and len(names) != len(classes):
        raise LoadingError(
            f"--data {folder} has {len(names)} class folders and the model {len(classes)} classes: name the folders as "
            "the classes are called (by --classes, if it is given), or give --targets prediction"
        )
    return {name: label for label, name in enumerate(names)}


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
