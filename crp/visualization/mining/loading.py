"""Batches of samples as they are read: by this process or by workers, one sample beside the other in memory."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from crp.visualization.mining.datasets import Sample, read
from crp.visualization.mining.marks import content_of, contents_of, stamp_of

#: Bytes that are taken for a batch before its samples are known, which may be smaller than the first.
_MOST_BESIDE = 1 << 30
_BY_THREADS = 32768  #: entries from which torch copies by threads, which would wait while others write shards
_NOTHING = torch.empty(0)


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


def as_batch(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape as (tensors, *shape); no copy where they lie beside each other already."""
    whole = tensors[0]._base
    if whole is not None and whole.dim() == tensors[0].dim() + 1 and whole.is_contiguous():
        first, step = whole.storage_offset(), tensors[0].numel()
        if all(t._base is whole and t.storage_offset() == first + i * step for i, t in enumerate(tensors)):
            return whole[: len(tensors)]
    return torch.stack(list(tensors))


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
        self._memory, self._n_used = _NOTHING, 0
        self._rows: Iterator[tuple[Tensor, Any]] | None = None
        self._form: tuple[torch.Size, torch.dtype] | None = None

    @property
    def used(self) -> Tensor:
        """The tensors of one shape that lie in this memory."""
        return self._memory[: self._n_used]

    def __call__(self, tensor: Tensor) -> Tensor:
        if not _is_plain(tensor):
            return tensor.clone()
        form = tensor.shape, tensor.dtype
        if self._rows is None:
            n = self._n if self._n * tensor.nbytes <= _MOST_BESIDE else 0
            self._memory = torch.empty((n, *tensor.shape), dtype=tensor.dtype, pin_memory=self._pin)
            self._rows, self._form = zip(self._memory.unbind(), _memory_of(self._memory), strict=True), form
        if not self._memory.numel() or form != self._form:
            return tensor.clone()
        row, memory = next(self._rows)
        self._n_used += 1
        if tensor.numel() < _BY_THREADS or not tensor.is_contiguous():
            return row.copy_(tensor)
        np.copyto(memory, _memory_of(tensor[None])[0])
        return row


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is nothing but numbers in the host's memory."""
    usual = type(tensor) is Tensor and tensor.device.type == "cpu" and tensor.layout == torch.strided
    return usual and not (tensor.is_quantized or tensor.is_conj() or tensor.is_neg())


def _memory_of(tensor: Tensor) -> Any:
    """Memory of contiguous rows, the first axis, as an array of as many."""
    return tensor.reshape(tensor.shape[0], math.prod(tensor.shape[1:])).view(torch.uint8).numpy()


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
