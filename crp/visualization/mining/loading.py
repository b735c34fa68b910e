"""Samples of a dataset, one by one or by worker processes; a sample that cannot be read is told apart from a fault."""

from __future__ import annotations

import operator
import pickle
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_NOTHING = torch.empty(0)
_HINT = "crp.visualization.Pairs makes pairs of it"


class SampleError(RuntimeError):
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


class LabelError(ValueError):
    """A label that names no classes."""


class Problem(NamedTuple):
    """Why a sample has no rows, and the exception that says so, where it is at hand."""

    reason: str
    error: Exception | None = None

    @classmethod
    def of(cls, error: Exception, doing: str = "") -> Problem:
        """Problem that an exception tells of, in words that do not change from run to run."""
        text = str(error) if isinstance(error, LabelError) else f"{type(error).__name__}: {error}"
        text = _ADDRESS.sub("", text.strip().splitlines()[0])[:300]
        # Exceptions of worker processes stay there: not every one can be pickled.
        return cls(f"{doing}{text}", error if get_worker_info() is None else None)


class Sample(NamedTuple):
    """One sample, or what is wrong with it."""

    id: int
    data: Tensor
    label: Any
    problem: Problem | None


def read(dataset: Any, index: int) -> Sample:
    """Sample of a dataset, checked to be a pair of a tensor and a label."""
    try:
        item = dataset[index]
    except Exception as error:
        return Sample(index, _NOTHING, None, Problem.of(error))
    wrong = _wrong(item)
    if wrong is not None:
        return Sample(index, _NOTHING, None, Problem(wrong))
    return Sample(index, item[0].detach(), item[1], None)


def load(dataset: Any, batches: Iterable[Sequence[int]], num_workers: int) -> Iterator[list[Sample]]:
    """Samples of every batch of indices.

    Without workers, samples are read one after the other in this process, when they are needed. Torch's random state is
    left alone.
    """
    loader = DataLoader(
        _Guarded(dataset),
        batch_sampler=_Batches(batches),
        num_workers=num_workers,
        collate_fn=_pack if num_workers else list,
        generator=torch.Generator().manual_seed(0),
    )
    yield from map(_unpack, loader) if num_workers else loader


def to_targets(label: Any, single_targets: Callable[[Any], Iterable[Any]] | None, needed: bool) -> list[int]:
    """Targets that a label names, ascending and each once; [-1] stands for no label, where none is ``needed``.

    Raises
    ------
    LabelError
        If they are no classes.
    """
    if single_targets is None and label is None and not needed:
        return [-1]
    targets = [label] if single_targets is None else list(single_targets(label))
    found = []
    for target in targets:
        try:
            found.append(operator.index(target))
        except TypeError:
            what = "label" if single_targets is None else "target"
            raise LabelError(
                f"{what} {_shortened(target)} is no integer class; single_targets (of FeatureVisualization: "
                "multitarget_to_single; of crp mine: --multi-label) turns a label into classes, and "
                "targets='prediction' (--targets prediction) needs no labels"
            ) from None
    for target in found:
        if not 0 <= target < 1 << 63:
            raise LabelError(f"target {target} is no class; classes count from 0")
    return sorted(set(found))


def _shortened(label: object) -> str:
    text = " ".join(repr(label).split())
    return text if len(text) <= 60 else f"{text[:60]}…"


class _Guarded(Dataset[Sample]):
    """Dataset whose samples come with what is wrong with them."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __getitem__(self, index: int) -> Sample:
        return read(self._dataset, index)


class _Batches:
    """Sampler that gives batches of indices."""

    def __init__(self, batches: Iterable[Sequence[int]]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        return (list(batch) for batch in self._batches)


def _pack(samples: list[Sample]) -> tuple[bytes, Tensor | None]:
    """Samples for another process: the data as one tensor where it is alike, since every tensor sent takes a file."""
    data = [sample.data for sample in samples]
    if len({(one.shape, one.dtype) for one in data}) > 1:
        return pickle.dumps(samples), None
    return pickle.dumps([sample._replace(data=_NOTHING) for sample in samples]), torch.stack(data)


def _unpack(packed: tuple[bytes, Tensor | None]) -> list[Sample]:
    samples: list[Sample] = pickle.loads(packed[0])
    if packed[1] is None:
        return samples
    return [sample._replace(data=one) for sample, one in zip(samples, packed[1], strict=True)]


def _wrong(item: object) -> str | None:
    if not isinstance(item, tuple | list) or len(item) != 2:
        what = f"{len(item)} entries" if isinstance(item, tuple | list) else f"a {type(item).__name__}"
        return f"the dataset gives {what}, not a pair (tensor, label); {_HINT}"
    if not isinstance(item[0], Tensor):
        return f"the dataset gives (..., label) with a {type(item[0]).__name__}, not a tensor; {_HINT}"
    return None
