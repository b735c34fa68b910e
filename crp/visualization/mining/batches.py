"""What a mining job does with a range of samples: attribute, score, and write shards."""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from crp.engine.backward import lacks_memory
from crp.errors import ConceptError
from crp.notices import warn
from crp.visualization.mining.datasets import Problem, Sample, SampleError, read_batches
from crp.visualization.mining.encoded import Decoder
from crp.visualization.mining.job import Job
from crp.visualization.mining.output_layers import OutputLayer
from crp.visualization.mining.preparation import Preparation
from crp.visualization.mining.rows import ShardRows
from crp.visualization.mining.scores import Scoring, Unit, UnitScores, score_unit
from crp.visualization.mining.targets import choose_targets, keeps_graph, to_targets
from crp.visualization.mining.text_batches import Filling, end_of_texts, unknown_id, whole_texts
from crp.visualization.mining.texts import n_items_of
from crp.visualization.mining.transfers import Transfers
from crp.visualization.mining.writing import Shards, ShardWriter
from crp.visualization.table.files import make_own_folder
from crp.visualization.table.manifest import Array, ShardRecord

T = TypeVar("T")


def mine_ranges(
    job: Job, ranges: Sequence[tuple[int, int]], progress: Callable[[int], object] | None = None
) -> Iterator[ShardRecord]:
    """Mine ranges into shard files of the job's folder, and yield the record of each once it is written.

    Shards end at multiples of the job's shard size, or where they are full; batches start where a shard does.
    """
    folder = job.path / "shards"
    make_own_folder(folder)
    batches = list(_get_batches(job, ranges))
    indices = (range(begin, end) for begin, end, _ in batches)
    pin = job.device.type == "cuda" and job.encoded is None  # (files differ in size, and the decoder copies them)
    loaded = read_batches(job.dataset, indices, job.options.num_workers, pin=pin)
    state = _MiningState.of(job)
    with ShardWriter() as writer:
        shards = Shards(writer, job, folder, progress)
        begun: deque[tuple[int, int, bool, Callable[[ShardRows], None]]] = deque()
        for (begin, end, is_last), samples in zip(batches, loaded, strict=True):
            batch = _Batch(job, samples, state)
            try:
                batch.begin()
            except Exception:
                while begun:  # (what was computed before is kept)
                    yield from shards.add(*begun.popleft())
                raise
            begun.append((begin, end, is_last, batch.finish))
            if len(begun) > state.transfers.batches_ahead:
                yield from shards.add(*begun.popleft())
        while begun:
            yield from shards.add(*begun.popleft())
        yield from writer.written(wait=True)
    if state.decoder is not None:
        state.decoder.finish()


def _get_batches(job: Job, ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int, bool]]:
    """Begin and end of every batch, and whether a shard ends with it."""
    for start, stop in ranges:
        while start < stop:
            end = min(stop, (start // job.shard_size + 1) * job.shard_size)
            while start < end:
                last = end_of_texts(job.dataset, job.texts, start, end, job.options.batch_size)
                yield start, last, last == end
                start = last


@dataclass
class _MemoryLimit:
    """What earlier batches have shown about the memory of the device.

    Attributes
    ----------
    rows : int
        How many rows go through a backward pass at once.
    works : bool
        Whether any sample was attributed, so that an error is about the sample at hand.
    """

    rows: int
    works: bool = False


@dataclass(frozen=True)
class _MiningState:
    """What all batches share."""

    limit: _MemoryLimit
    transfers: Transfers
    scoring: Scoring
    preparation: Preparation | None
    filling: Filling | None
    decoder: Decoder | None
    output_layer: OutputLayer

    @classmethod
    def of(cls, job: Job) -> _MiningState:
        return cls(
            _MemoryLimit(job.options.batch_size),
            Transfers(job.device),
            Scoring(job),
            None if job.options.preprocess is None else Preparation(job.options.preprocess),
            None if job.texts is None else Filling(job.texts, job.attribution, job.device),
            None if job.encoded is None else job.encoded.decoder(),
            OutputLayer(job),
        )


class _NotFiniteError(Exception):
    """An error of a batch in which data is not finite, and which says nothing about the other samples."""


@dataclass
class _Group:
    """Samples of one shape: their data on the device, whether it is finite, and their scores on the way to the host."""

    indices: list[int]
    data: Tensor
    finite: Tensor
    scores: list[UnitScores]


class _Batch:
    """Samples of one batch, which are prepared, attributed and scored; those with problems are left out.

    `begin` gives all work to the device; `finish` waits for it.
    """

    def __init__(self, job: Job, samples: Sequence[Sample], state: _MiningState) -> None:
        self._job = job
        self._samples = samples
        self._state = state
        self._problems: dict[int, str] = {}
        self._targets: dict[int, list[int]] = {}
        self._groups: list[_Group] = []

    def begin(self) -> None:
        """Have the batch attributed and scored."""
        by_label = self._job.targets == "label"
        self._targets = self._get_targets() if by_label else {i: [0] for i in self._get_readable()}
        for indices, data in self._get_data([sample for sample in self._samples if self._targets.get(sample.id)]):
            finite = torch.isfinite(data).flatten(1).all(1)
            try:
                group = _Group(indices, data, finite, self._attribute(indices, data, finite))
            except _NotFiniteError:
                indices, data = self._only_finite(indices, data, finite.cpu().numpy())
                group = _Group(indices, data, finite, self._attribute(indices, data, None))
            self._groups.append(group)

    def finish(self, shard: ShardRows) -> None:
        """Add the rows of the batch to a shard."""
        parts = [arrays for group in self._groups for arrays in self._get_arrays(group)]
        self._groups.clear()
        if parts:
            arrays = {key: _joined([part[key] for part in parts]) for key in parts[0]}
            self._drop_not_finite(arrays)
            self._state.scoring.tell_lost(arrays)
            order = np.lexsort((arrays["target"], arrays["sample"]))
            keep = order[~np.isin(arrays["sample"][order], list(self._problems))]
            if not np.array_equal(keep, np.arange(len(order))):
                arrays = {key: array[keep] for key, array in arrays.items()}
            shard.extend(arrays, self._samples)
        shard.skipped.update(self._problems)

    def _attribute(self, indices: list[int], data: Tensor, finite: Tensor | None) -> list[UnitScores]:
        """Scores of samples of one shape, in units; in another attempt, ``finite`` is None: they are known to be."""
        if not indices:
            return []
        if self._job.targets != "label":
            self._targets |= self._choose(indices, data, finite)
        units = self._get_units([self._targets[index] for index in indices], indices)
        state, first = self._state, not self._state.limit.works
        means = state.scoring, state.transfers, state.output_layer.ask
        score = partial(score_unit, self._job, *means, data, indices, finite=finite, check=first)

        def compute(unit: Unit) -> UnitScores:
            return score(unit=unit, at_once=self._state.limit.rows if _shares_texts(self._job) else None)

        scores = self._in_parts(units, indices, partial(_blame_data, compute, finite))
        self._state.limit.works |= bool(scores)
        return scores

    def _get_arrays(self, group: _Group) -> list[dict[str, Array]]:
        found = [scores.arrays() for scores in group.scores]
        finite = next((flags for _, flags in found if flags is not None), None)
        if finite is not None and not finite.all():
            indices, data = self._only_finite(group.indices, group.data, finite)
            found = [scores.arrays() for scores in self._attribute(indices, data, None)]
        return [arrays for arrays, _ in found]

    def _only_finite(self, indices: list[int], data: Tensor, finite: Array) -> tuple[list[int], Tensor]:
        """The samples whose data is finite; the others are skipped."""
        for index in np.array(indices)[~finite].tolist():
            self._problems[index] = "its data is not finite"
        places = np.flatnonzero(finite).tolist()
        return [indices[place] for place in places], data[places]

    def _drop(self, index: int, reason: str, error: Exception | None = None) -> None:
        """Note why a sample is skipped, or raise, as ``on_error`` says."""
        if self._job.options.on_error == "stop":
            raise SampleError(index, reason) from error
        self._problems.setdefault(index, reason)

    def _get_readable(self) -> dict[int, Any]:
        """Labels of the samples that could be read."""
        for sample in self._samples:
            if sample.problem is not None:
                self._drop(sample.id, sample.problem.reason, sample.problem.error)
        return {sample.id: sample.label for sample in self._samples if sample.problem is None}

    def _get_targets(self) -> dict[int, list[int]]:
        found, needed = dict[int, list[int]](), "relevance" in self._job.header.modes
        for index, label in self._get_readable().items():
            try:
                found[index] = to_targets(label, self._job.options.single_targets, needed)
            except Exception as error:
                self._drop(index, Problem.of(error).reason, error)
        return found

    def _choose(self, indices: list[int], data: Tensor, finite: Tensor | None) -> dict[int, list[int]]:
        """Targets of samples where they are not taken from the labels."""

        def chosen(unit: Unit) -> list[tuple[int, list[int]]]:
            places = [place for place, _ in unit]
            found = choose_targets(self._job.targets, self._job.attribution, self._state.output_layer.ask(data[places]))
            return [(indices[place], targets) for place, targets in zip(places, found, strict=True)]

        units = self._get_units([[-1]] * len(indices), indices)
        parts = self._in_parts(units, indices, partial(_blame_data, chosen, finite))
        found: dict[int, list[int]] = {index: [] for index in indices}
        return found | dict(pair for part in parts for pair in part)

    def _get_data(self, samples: Sequence[Sample]) -> list[tuple[list[int], Tensor]]:
        """Indices and prepared data of the sound samples, grouped by shape."""
        alike: dict[tuple[object, ...], list[Sample]] = {}
        if self._state.filling is not None:
            samples = self._state.filling.filled(samples)
        for sample in self._with_known_ids(self._decoded(samples)):
            alike.setdefault((sample.data.shape, sample.data.dtype, sample.data.device), []).append(sample)
        ready = [prepared for of_shape in alike.values() for prepared in self._prepare(of_shape)]
        groups: dict[tuple[int, ...], list[tuple[list[int], Tensor]]] = {}
        for indices, data in ready:
            reason = self._misfit(tuple(data.shape[1:]), data.dtype)
            if reason is None:
                groups.setdefault(tuple(data.shape[1:]), []).append((indices, data))
            for index in indices if reason is not None else ():
                self._drop(index, reason or "")
        return [_in_order(group) for group in groups.values()]

    def _decoded(self, samples: Sequence[Sample]) -> Iterator[Sample]:
        decoder = self._state.decoder
        for sample in samples if decoder is None else decoder.decode(samples):
            if sample.problem is None:
                yield sample
            else:
                self._drop(sample.id, sample.problem.reason, sample.problem.error)

    def _with_known_ids(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        """Samples without texts that hold an id that the model does not know."""
        for sample in samples:
            texts = self._job.texts
            unknown = None if texts is None else unknown_id(self._job.attribution.model, texts, sample.data)
            if unknown is None:
                yield sample
            else:
                self._drop(sample.id, f"it holds the id {unknown}, of which the model has no embedding")

    def _prepare(self, samples: list[Sample]) -> list[tuple[list[int], Tensor]]:
        """Samples of one shape as the model gets them: all at once, or each by itself."""
        indices, preparation = [sample.id for sample in samples], self._state.preparation
        batch = self._state.transfers.send([sample.data for sample in samples])
        together = batch if preparation is None else preparation.batch(batch)
        if preparation is None or together is not None:
            return [(indices, batch if together is None else together)]
        ready = []
        for index, data in zip(indices, batch, strict=True):
            try:
                ready.append(([index], preparation.one(data[None])))
            except Exception as error:
                self._drop(index, Problem.of(error, "preprocess: ").reason, error)
        return ready

    def _misfit(self, shape: tuple[int, ...], dtype: torch.dtype) -> str | None:
        """Why prepared data does not fit to that of the first sample; None if it does."""
        shape_asked, dtype_asked = self._job.shape, self._job.dtype
        if dtype == dtype_asked and shape_asked in (None, shape):
            return None
        reason = f"its shape is {shape}, {dtype}; that of the first sample is {shape_asked or 'any'}, {dtype_asked}"
        return reason + ("; mixed_shapes=True (--mixed-shapes) mines them, too" if dtype == dtype_asked else "")

    def _get_units(self, targets: list[list[int]], indices: Sequence[int]) -> list[Unit]:
        """Units, each attributed in one call: samples with equally many targets share a forward pass."""
        units: list[Unit] = []
        keeps, size = keeps_graph(self._job.composite), self._state.limit.rows
        for n in sorted({len(of_sample) for of_sample in targets} - {0}):
            alike = [place for place, of_sample in enumerate(targets) if len(of_sample) == n]
            # A graph that is kept serves one target after the other: memory holds the samples. Else it holds all rows.
            width = n if keeps else min(n, size)
            height = size if keeps else max(size // width, 1)
            texts = self._job.texts if _shares_texts(self._job) else None
            for places in whole_texts(self._job.dataset, texts, alike, indices, height):
                units += [[(place, targets[place][i : i + width]) for place in places] for i in range(0, n, width)]
        return units

    def _in_parts(self, units: list[Unit], indices: list[int], compute: Callable[[Unit], T]) -> list[T]:
        """Results for the units. Where a call fails, its halves are tried: memory may suffice for these."""
        failures: list[tuple[int, int, Exception]] = []
        parts, reasons = list[T](), list[str]()
        todo = units[::-1]
        while todo:
            unit = todo.pop()
            n_rows = sum(len(targets) for _, targets in unit)
            try:
                parts.append(compute(unit))
                continue
            except (_NotFiniteError, ConceptError):  # (no sample's fault, or known whose)
                raise
            except Exception as error:
                if n_rows == 1:
                    failures.append((unit[0][0], unit[0][1][0], error))
                    continue
                reasons.append(f"{n_rows} rows at once failed ({Problem.of(error).reason})")
                is_memory = lacks_memory(error)
            # The exception is gone here, and with it the tensors of the failed call that it referred to.
            halves = _halved(unit)
            todo += halves[::-1]
            if is_memory:
                held = len(halves[1]) if keeps_graph(self._job.composite) else sum(len(t) for _, t in halves[1])
                if _shares_texts(self._job):  # (a text may have more positions than go back at once)
                    held = min(held, -(-self._state.limit.rows // 2))
                self._state.limit.rows = min(self._state.limit.rows, held)
                torch.cuda.empty_cache()
        failures.sort(key=operator.itemgetter(0, 1))
        n_causes = n_items_of(self._job.dataset, [indices[place] for place, _, _ in failures])
        if not parts and not self._state.limit.works and n_causes > 1:
            raise failures[0][2]  # nothing ever worked: it is not about one sample
        if reasons and not failures:
            warn(f"{reasons[0]} and were attributed in parts; lower batch_size")
        for place, target, failure in failures:
            doing = f"target {target}: " if target >= 0 else ""
            self._drop(indices[place], Problem.of(failure, doing).reason, failure)
        return parts

    def _drop_not_finite(self, arrays: Mapping[str, Array]) -> None:
        for key, norm in arrays.items():
            if norm.ndim == 1 and "_norm/" in key:
                name, _, layer = key.partition("/")
                for index in arrays["sample"][~np.isfinite(norm)].tolist():
                    self._problems.setdefault(index, f"its {name.partition('.')[0]} at layer {layer!r} is not finite")


def _shares_texts(job: Job) -> bool:
    """Whether rows of several positions of a text go back through one forward pass, so many at a time."""
    return job.texts is not None and job.texts.position == "each" and keeps_graph(job.composite)


def _halved(unit: Unit) -> tuple[Unit, Unit]:
    """Halves of a unit: of its samples, or of the targets of a single sample. The second half is at least as large."""
    if len(unit) > 1:
        return unit[: len(unit) // 2], unit[len(unit) // 2 :]
    [(place, targets)] = unit
    return [(place, targets[: len(targets) // 2])], [(place, targets[len(targets) // 2 :])]


def _blame_data(compute: Callable[[Unit], T], finite: Tensor | None, unit: Unit) -> T:
    """Result for a unit; an error where data is not finite is a `_NotFiniteError`."""
    try:
        return compute(unit)
    except Exception as error:
        if not isinstance(error, ConceptError) and finite is not None and not finite.all():
            raise _NotFiniteError from error
        raise


def _in_order(parts: list[tuple[list[int], Tensor]]) -> tuple[list[int], Tensor]:
    """Samples of several parts as one, in the order of the dataset."""
    if len(parts) == 1:
        return parts[0]
    indices = np.array([index for part, _ in parts for index in part])
    order, data = np.argsort(indices), torch.cat([part for _, part in parts])
    return indices[order].tolist(), data if (np.diff(order) == 1).all() else data[order.tolist()]


def _joined(arrays: list[Array]) -> Array:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
