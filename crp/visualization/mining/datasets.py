"""Datasets of any kind as pairs of a tensor and a label, and the one reader of their samples.

Mining and pictures read samples alike; a sample that cannot be read is told apart from a fault.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    default_collate,
    default_convert,
    get_worker_info,
)

from crp.errors import InputError, InputTypeError, StateError
from crp.visualization.mining.marks import Source, content_of, contents_of, source_of, stamp_of

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
        raise InputTypeError(f"the dataset is a {type(dataset).__name__} of {names}; give one of them (split=...)")
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
        f"the DataLoader chooses samples by a {type(sampler).__name__}, and mining looks at all of a dataset: give "
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
    raise InputTypeError(f"the data is a {type(data).__name__}; a transform must make it a tensor")


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
        return f"sample {self.index}: {self.reason}"


class LabelError(InputError):
    """A label that names no classes."""


class Problem(NamedTuple):
    """Why a sample has no rows, with the exception if there is one (an exception of a worker process stays there)."""

    reason: str
    error: Exception | None = None

    @classmethod
    def of(cls, error: Exception, doing: str = "") -> Problem:
        """Problem of an exception, described without addresses, so that the text is the same in every run."""
        text = str(error) if isinstance(error, LabelError) else f"{type(error).__name__}: {error}"
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
        return Sample(index, _NOTHING, None, Problem.of(error))
    wrong = _wrong(item)
    if wrong is not None:
        return Sample(index, _NOTHING, None, Problem(wrong))
    # (a copy: the dataset may give the same memory again, and a preparation may work in place)
    return Sample(index, keep(item[0].detach()), item[1], None)


def read_batches(
    dataset: Any, batches: Iterable[Sequence[int]], num_workers: int, pin: bool = False
) -> Iterator[list[Sample]]:
    """Samples of every batch of indices.

    Without workers, samples are read one after the other in this process, when they are needed, and with ``pin`` into
    memory from which a GPU copies by itself. Torch's random state is left alone.
    """
    loader = DataLoader(
        _Guarded(dataset, pin and not num_workers),
        batch_sampler=_Batches(batches),
        num_workers=num_workers,
        collate_fn=_pack if num_workers else list,
        generator=torch.Generator().manual_seed(0),
    )
    yield from map(_unpack, loader) if num_workers else loader


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
            raise InputTypeError(f"a {type(item).__name__} has no fields")
        return item[field]
    except (KeyError, IndexError, TypeError) as error:
        if hasattr(item, "keys"):
            has = f"the keys {', '.join(map(repr, item.keys()))}"
        elif isinstance(item, tuple | list):
            has = f"{len(item)} entries"
        else:
            has = f"a {type(item).__name__} without fields, which data=None takes as it is"
        hint = f"Say where the {role} is, by {role}=... or --fields"
        raise InputTypeError(f"an item of the dataset has no {role} at {field!r}; it has {has}. {hint}") from error


class _Guarded(Dataset[Sample]):
    """Dataset whose samples come with what is wrong with them, a batch at a time."""

    def __init__(self, dataset: Any, pin: bool) -> None:
        self._dataset, self._pin = dataset, pin

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        beside = _Beside(len(indices), self._pin)
        # (a file is looked at before it is read, so that a change in between is noticed later)
        found = [(stamp_of(self._dataset, index), read(self._dataset, index, beside)) for index in indices]
        sound = [sample for _, sample in found if sample.problem is None]
        labels = [sample.label for sample in sound]
        if 0 < len(beside.used) == len(sound):
            contents = iter(contents_of(beside.used, labels))
        else:
            contents = (content_of(sample.data, label) for sample, label in zip(sound, labels, strict=True))
        return [s if s.problem is not None else s._replace(content=next(contents), stamp=stamp) for stamp, s in found]


#: Bytes that are taken for a batch before its samples are known, which may be smaller than the first.
_MOST_BESIDE = 1 << 30


class _Beside:
    """Copies tensors that are alike into one memory, one beside the other, so that `as_batch` need not copy again.

    Parameters
    ----------
    n : int
        Tensors for which there is room.
    pin : bool
        Whether a GPU is to copy from this memory.
    """

    def __init__(self, n: int, pin: bool) -> None:
        self._n, self._pin = n, pin
        self._memory = _NOTHING
        self._rows: Iterator[tuple[Tensor, Any]] | None = None
        self._n_used = 0

    @property
    def used(self) -> Tensor:
        """The tensors of one shape that lie in this memory."""
        return self._memory[: self._n_used]

    def __call__(self, tensor: Tensor) -> Tensor:
        if not _is_plain(tensor):
            return tensor.clone()
        if self._rows is None:
            n = self._n if self._n * tensor.nbytes <= _MOST_BESIDE else 0
            self._memory = torch.empty((n, *tensor.shape), dtype=tensor.dtype, pin_memory=self._pin)
            self._rows = zip(self._memory.unbind(), _memory_of(self._memory), strict=True)
        if not len(self._memory) or tensor.shape != self._memory.shape[1:] or tensor.dtype != self._memory.dtype:
            return tensor.clone()
        row, memory = next(self._rows)
        self._n_used += 1
        if not tensor.is_contiguous():
            return row.copy_(tensor)
        # (by one thread: several of torch's would wait for each other while other threads write shards)
        np.copyto(memory, _memory_of(tensor[None])[0])
        return row


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is nothing but numbers in the host's memory."""
    usual = type(tensor) is Tensor and tensor.device.type == "cpu" and tensor.layout == torch.strided
    return usual and not (tensor.is_quantized or tensor.is_conj() or tensor.is_neg())


def _memory_of(tensor: Tensor) -> Any:
    """Memory of contiguous rows, the first axis, as an array of as many."""
    return tensor.reshape(len(tensor), math.prod(tensor.shape[1:])).view(torch.uint8).numpy()


def as_batch(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape as (tensors, *shape); no copy where they lie beside each other already."""
    whole = tensors[0]._base
    if whole is not None and whole.dim() == tensors[0].dim() + 1 and whole.is_contiguous():
        first, step = whole.storage_offset(), tensors[0].numel()
        if all(t._base is whole and t.storage_offset() == first + i * step for i, t in enumerate(tensors)):
            return whole[: len(tensors)]
    return torch.stack(list(tensors))


class _Batches:
    """Sampler that gives batches of indices."""

    def __init__(self, batches: Iterable[Sequence[int]]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        return (list(batch) for batch in self._batches)


def _pack(samples: list[Sample]) -> tuple[bytes, Tensor | None]:
    """Samples for another process: the data as one tensor, since every tensor sent takes a file."""
    data = [sample.data for sample in samples if sample.problem is None]
    shapes = None
    if len({(one.shape, one.dtype) for one in data}) == 1:
        together = as_batch(data)
    elif len({one.dtype for one in data}) == 1 and all(map(_is_plain, data)):
        together = torch.cat([one.reshape(-1) for one in data])
        shapes = [one.shape for one in data]
    else:
        return pickle.dumps(samples), None
    return pickle.dumps(([sample._replace(data=_NOTHING) for sample in samples], shapes)), together


def _unpack(packed: tuple[bytes, Tensor | None]) -> list[Sample]:
    content, together = packed
    if together is None:
        return list(pickle.loads(content))
    samples, shapes = pickle.loads(content)
    parts = together if shapes is None else torch.split(together, list(map(math.prod, shapes)))
    data = (part if shapes is None else part.reshape(shapes[i]) for i, part in enumerate(parts))
    return [sample if sample.problem is not None else sample._replace(data=next(data)) for sample in samples]


def _wrong(item: object) -> str | None:
    if not isinstance(item, tuple | list) or len(item) != 2:
        what = f"{len(item)} entries" if isinstance(item, tuple | list) else f"a {type(item).__name__}"
        return f"the dataset gives {what}, not a pair (tensor, label); {_HINT}"
    if not isinstance(item[0], Tensor):
        return f"the dataset gives (..., label) with a {type(item[0]).__name__}, not a tensor; {_HINT}"
    return None
