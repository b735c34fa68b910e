"""Datasets of any kind as pairs of a tensor and a label, and the one reader of their samples.

Mining and pictures read samples alike; a sample that cannot be read is told apart from a fault.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    default_collate,
    default_convert,
    get_worker_info,
)

from crp.errors import CRPError, InputTypeError, StateError
from crp.notices import kind_of
from crp.visualization.mining.marks import Source, source_of

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_NOTHING = torch.empty(0)
_HINT = "crp.visualization.Pairs makes pairs of it"


class Pairs:
    """Dataset of pairs (tensor, label), made of one whose items are tuples, dicts, or the data alone.

    Parameters
    ----------
    dataset : Dataset or DataLoader
        With a length, read by index; for example one of torchvision, of Hugging Face, or a list.
    data : int or str, optional
        Place or key of the data in an item; None if an item is the data.
    label : int or str, optional
        Place or key of the label; None if there is none.
    transform : callable, optional
        Function of the data, applied first. What it gives, or the data itself, may be a tensor, an array or a PIL
        image; images become tensors of shape (channels, height, width) in 0..1.

    Examples
    --------
    >>> rows = [{"image": torch.zeros(3, 8, 8), "label": 7, "id": "a"}]
    >>> Pairs(rows, "image", "label")[0][1]
    7
    """

    def __init__(
        self,
        dataset: Any,
        data: int | str | None = 0,
        label: int | str | None = 1,
        transform: Callable[[Any], Any] | None = None,
    ) -> None:
        self.dataset = indexed(dataset)
        self.data = data
        self.label = label
        self.transform = transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __repr__(self) -> str:
        return f"Pairs({type(self.dataset).__name__}, {self.data!r}, {self.label!r})"

    def source(self, index: int) -> Source | None:
        """File of a sample, where the dataset tells it."""
        return source_of(self.dataset, index)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        item = self.dataset[index]
        data = _field(item, self.data, "data")
        label = None if self.label is None else _field(item, self.label, "label")
        return as_tensor(data if self.transform is None else self.transform(data)), label


def indexed(dataset: Any) -> Any:
    """Dataset that has a length and is read by index; of a DataLoader, its dataset.

    Raises
    ------
    TypeError
        If it is something else, such as a stream, or several datasets; the message says what would be right.
    """
    dataset = of_loader(dataset)
    if isinstance(dataset, Iterable) and not hasattr(dataset, "__getitem__"):
        raise _stream(dataset)
    if isinstance(dataset, Mapping) and 0 not in dataset:
        names = ", ".join(map(repr, list(dataset)[:5]))
        raise InputTypeError(f"the dataset is {kind_of(dataset)} of {names}; give one of them (split=...)")
    if isinstance(dataset, str | bytes):
        raise InputTypeError(
            f"the dataset must be a list of samples, or what is read by index, not the word {dataset!r}"
        )
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise InputTypeError(f"the dataset needs __len__ and __getitem__; {type(dataset).__name__} lacks one")
    return dataset


def of_loader(dataset: Any) -> Any:
    """Dataset of a DataLoader; anything else but a stream is left as it is.

    Raises
    ------
    TypeError
        If it is a stream, or a DataLoader with a ``collate_fn``, or with a sampler that chooses among the samples.
    """
    if isinstance(dataset, DataLoader):
        if dataset.collate_fn not in (default_collate, default_convert):
            raise InputTypeError(
                "the DataLoader has a collate_fn, which mining does not call; give a dataset, as Pairs makes"
            )
        if not isinstance(dataset.dataset, IterableDataset):
            _check_sampler(dataset)
        dataset = dataset.dataset
    if isinstance(dataset, IterableDataset):
        raise _stream(dataset)
    return dataset


def _check_sampler(loader: DataLoader[Any]) -> None:
    """Refuse a DataLoader that gives other samples than its dataset has; the order does not matter."""
    batches = loader.batch_sampler
    sampler = loader.sampler if batches is None else getattr(batches, "sampler", batches)
    if type(sampler) is SequentialSampler:
        return
    if type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == len(loader.dataset):  # type: ignore[arg-type]
        return
    raise InputTypeError(
        f"the DataLoader chooses samples by {kind_of(sampler)}, and mining looks at all of a dataset: give "
        "torch.utils.data.Subset(dataset, indices)"
    )


def as_tensor(data: Any) -> Tensor:
    """Tensor, array or PIL image as a tensor; images are (channels, height, width) in 0..1.

    Raises
    ------
    TypeError
        If it is something else, or an image whose mode has no single meaning in numbers, such as a palette.
    """
    if isinstance(data, Tensor):
        return data
    if isinstance(data, np.ndarray | np.generic):
        return torch.from_numpy(np.array(data))
    if hasattr(data, "getbands"):
        if data.mode not in ("L", "RGB"):
            raise InputTypeError(
                f"an image of mode {data.mode!r} needs a transform, such as lambda image: image.convert('RGB')"
            )
        pixels = np.array(data, np.float32) / 255
        return torch.from_numpy(pixels).reshape(data.height, data.width, -1).permute(2, 0, 1).contiguous()
    raise InputTypeError(f"the data is {kind_of(data)}; a transform must make it a tensor")


class SampleError(StateError):
    """A sample that cannot be mined.

    Attributes
    ----------
    index : int
        In the dataset.
    """

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(index, reason)
        self.index = index
        self.reason = reason

    def __str__(self) -> str:
        return f"sample {self.index}: {self.reason}; on_error='skip' (--on-error skip) leaves such samples out"


class Problem(NamedTuple):
    """Why a sample has no rows, with the exception if there is one (an exception of a worker process stays there)."""

    reason: str
    error: Exception | None = None

    @classmethod
    def of(cls, error: Exception, doing: str = "") -> Problem:
        """Problem of an exception, described without addresses, so that the text is the same in every run."""
        text = (isinstance(error, CRPError) and str(error).strip()) or f"{type(error).__name__}: {error}"
        text = _ADDRESS.sub("", text.strip().splitlines()[0])[:300]
        # Exceptions of worker processes stay there: not every one can be pickled.
        return cls(f"{doing}{text}", error if get_worker_info() is None else None)


class Sample(NamedTuple):
    """One sample, or what is wrong with it.

    Attributes
    ----------
    id : int
        In the dataset.
    data : Tensor
    label : object
    problem : Problem or None
    content, stamp : int
        Hashes of the sample and of its file, from `crp.visualization.mining.marks`, where it is read to be mined.
    """

    id: int
    data: Tensor
    label: Any
    problem: Problem | None
    content: int = 0
    stamp: int = 0


def read(dataset: Any, index: int, keep: Callable[[Tensor], Tensor] = torch.clone) -> Sample:
    """Sample of a dataset, checked to be a pair of a tensor and a label; ``keep`` copies the tensor."""
    try:
        item = dataset[index]
    except Exception as error:
        source = source_of(dataset, index)
        file = "" if source is None or source.name in str(error) else f"{source.name}: "
        return Sample(index, _NOTHING, None, Problem.of(error, file))
    wrong = _wrong(item)
    if wrong is not None:
        return Sample(index, _NOTHING, None, Problem(wrong))
    # (a copy: the dataset may give the same memory again, and a preparation may work in place)
    return Sample(index, keep(item[0].detach()), item[1], None)


def _stream(dataset: object) -> TypeError:
    return InputTypeError(
        f"{type(dataset).__name__} is a stream, and shards are mined apart from each other and again: give a map-style "
        "dataset, with __len__ and __getitem__. Load those of Hugging Face without streaming; of other streams, put "
        "part after part into a list, each with a table of its own"
    )


def _field(item: Any, field: int | str | None, role: str) -> Any:
    if field is None:
        return item
    try:
        # (a tensor, a picture or a word has an index, too, but no fields)
        if not (hasattr(item, "keys") or isinstance(item, tuple | list)):
            raise InputTypeError(f"{kind_of(item)} has no fields")
        return item[field]
    except (KeyError, IndexError, TypeError) as error:
        if hasattr(item, "keys"):
            has = f"the keys {', '.join(map(repr, item.keys()))}"
        elif isinstance(item, tuple | list):
            has = f"{len(item)} entries"
        else:
            has = f"{kind_of(item)} without fields, which data=None takes as it is"
        hint = f"Say where the {role} is, by {role}=... or --fields"
        raise InputTypeError(f"an item of the dataset has no {role} at {field!r}; it has {has}. {hint}") from error


def _wrong(item: object) -> str | None:
    if not isinstance(item, tuple | list) or len(item) != 2:
        what = f"{len(item)} entries" if isinstance(item, tuple | list) else kind_of(item)
        return f"the dataset gives {what}, not a pair (tensor, label); {_HINT}"
    if not isinstance(item[0], Tensor):
        return f"the dataset gives (..., label) with {kind_of(item[0])}, not a tensor; {_HINT}"
    return None
