"""What a sample leaves in a table, so that another dataset is noticed: its name, hashes of its file and content."""

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset

from crp.flags import is_flag
from crp.visualization.table.fingerprint import fingerprint

#: Sums that the content of a sample is hashed by; a prime, so that rows of a picture do not fall on each other.
_SUMS = 61
#: Rows of so many words that are added at once, since numpy is slow on short ones.
_AT_ONCE = 16
#: Characters of a label, and numbers in one, that are kept.
_LABEL = 200
_Bytes: TypeAlias = "np.ndarray[Any, np.dtype[np.uint8]]"


class Source(NamedTuple):
    """A sample's file: the folder of the dataset, and the name in it, with ``/`` between folders."""

    folder: str
    name: str


def _behind(dataset: Any, index: int) -> tuple[Any, int]:
    """Dataset inside of a `torch.utils.data.Subset`, and the index of a sample there; anything else as it is."""
    while isinstance(dataset, Subset):
        dataset, index = dataset.dataset, int(dataset.indices[index])
    return dataset, index


def source_of(dataset: Any, index: int) -> Source | None:
    """File of a sample, where the dataset tells it.

    Datasets of this package have a method ``source``, torchvision's folders a list ``samples`` and a ``root``; of a
    `torch.utils.data.Subset` the dataset inside is asked.
    """
    dataset, index = _behind(dataset, index)
    if callable(own := getattr(dataset, "source", None)):
        found = own(index)
        return found if isinstance(found, Source) else None
    listed, root = getattr(dataset, "samples", None), getattr(dataset, "root", None)
    if isinstance(listed, list) and isinstance(root, str | Path) and index < len(listed):
        path = listed[index][0] if isinstance(listed[index], tuple) and listed[index] else None
        if isinstance(path, str | Path):
            is_below = Path(path).is_relative_to(root)
            return Source(str(root), Path(path).relative_to(root).as_posix() if is_below else str(path))
    return None


def stamp_of(dataset: Any, index: int) -> int:
    """Hash of size and time of a sample's file; 0 where there is none."""
    source = source_of(dataset, index)
    if source is None:
        return 0
    try:
        status = Path(source.folder, source.name).stat()
    except OSError:
        return 0
    return _number(f"{status.st_size} {status.st_mtime_ns}".encode())


def content_of(data: Tensor, label: Any) -> int:
    """Hash of a sample's data and label.

    The data enters by sums of its 8-byte words: a tenth of the time of a cryptographic hash, and every single change
    is noticed.
    """
    [found] = _hashes(data.dtype, data.shape, _entries_as_bytes(data)[None], [label])
    return found


def contents_of(samples: Tensor, labels: Sequence[Any]) -> list[int]:
    """Hashes of samples, the first axis, and their labels: `content_of` of each, in a fraction of the time."""
    entries = _entries_as_bytes(samples).reshape(len(samples), -1)
    return _hashes(samples.dtype, samples.shape[1:], entries, labels)


def _hashes(dtype: torch.dtype, shape: Sequence[int], entries: _Bytes, labels: Sequence[Any]) -> list[int]:
    """Hashes of samples of a type and shape, whose entries are rows of bytes."""
    n = entries.shape[1] // (8 * _SUMS) * 8 * _SUMS
    words, rest = entries[:, :n].view(np.int64), entries[:, n:]
    whole = words.shape[1] // (_AT_ONCE * _SUMS) * _AT_ONCE * _SUMS
    # (sums of integers wrap around, in whatever order)
    sums = words[:, :whole].reshape(len(words), -1, _AT_ONCE * _SUMS).sum(1).reshape(-1, _AT_ONCE, _SUMS).sum(1)
    sums += words[:, whole:].reshape(len(words), -1, _SUMS).sum(1)
    kind = f"{dtype} {tuple(shape)} "
    parts = zip(sums, rest, labels, strict=True)
    return [_number(b"".join((own, left, f"{kind}{_print_of(label)}".encode()))) for own, left, label in parts]


def _print_of(label: Any) -> str:
    return _print_of_class(label) if type(label) is int else fingerprint(label)


@lru_cache(maxsize=4096)
def _print_of_class(label: int) -> str:
    return fingerprint(label)


def _entries_as_bytes(data: Tensor) -> _Bytes:
    """Entries of a tensor, one after the other, as bytes."""
    try:
        return np.ascontiguousarray(data.numpy()).reshape(-1).view(np.uint8)
    except (TypeError, RuntimeError):  # numpy lacks the number, or the tensor must first be brought into memory
        pass
    data = data if data.layout == torch.strided else data.to_dense()
    data = data.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    # (a single entry keeps its stride in `contiguous`, and cannot be viewed as bytes)
    data = data if data.stride(0) == 1 else data.clone(memory_format=torch.contiguous_format)
    found: _Bytes = data.view(torch.uint8).numpy()
    return found


def plain_label(label: Any) -> int | float | str | list[int] | None:
    """Label as JSON holds it: a class, classes, a number or a word; None for all else."""
    try:
        return int(label) if is_flag(label) else operator.index(label)
    except (TypeError, ValueError, RuntimeError):
        pass
    if isinstance(label, str):
        return label[:_LABEL]
    if isinstance(label, float):
        return label if math.isfinite(label) else None
    try:
        return [operator.index(one) for one in label] if len(label) <= _LABEL else None
    except (TypeError, ValueError, RuntimeError):
        return None


def _number(content: bytes) -> int:
    """Hash as a positive int64."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") >> 1
