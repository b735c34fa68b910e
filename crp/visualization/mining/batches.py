"""What a mining job does with a range of samples: attribute, score, and write shards."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crp.visualization.mining.datasets import Problem, Sample, SampleError
from crp.visualization.mining.job import Job
from crp.visualization.mining.loading import read_batches
from crp.visualization.mining.output_layers import OutputLayer
from crp.visualization.mining.preparation import Preparation
from crp.visualization.mining.rows import ShardRows
from crp.visualization.mining.scores import Scoring, Unit, UnitScores, score_unit
from crp.visualization.mining.targets import choose_targets, to_targets
from crp.visualization.mining.text_batches import Filling, end_of_texts, unknown_id
from crp.visualization.mining.transfers import Transfers
from crp.visualization.mining.units import NotFiniteError, Units
from crp.visualization.mining.writing import Shards, ShardWriter
from crp.visualization.table.files import make_own_folder
from crp.visualization.table.manifest import Array, ShardRecord


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
    state = _MiningState(job)
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


class _MiningState:
    """What all batches share."""

    def __init__(self, job: Job) -> None:
        self.units, self.scoring, self.output_layer = Units(job), Scoring(job), OutputLayer(job)
        self.transfers = Transfers(job.device)
        self.preparation = None if job.options.preprocess is None else Preparation(job.options.preprocess)
        self.filling = None if job.texts is None else Filling(job.texts, job.attribution, job.device)
        self.decoder = None if job.encoded is None else job.encoded.decoder()


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
            except NotFiniteError:
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
        state, units = self._state, self._state.units
        means = state.scoring, state.transfers, state.output_layer.ask
        score = partial(score_unit, self._job, *means, data, indices, finite=finite, check=not units.works)

        def scored(unit: Unit) -> UnitScores:
            return score(unit=unit, at_once=units.rows_of_text)

        of_batch = units.divide([self._targets[index] for index in indices], indices)
        scores = units.compute(scored, of_batch, indices, finite, self._drop)
        units.works |= bool(scores)
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

        units = self._state.units
        parts = units.compute(chosen, units.divide([[-1]] * len(indices), indices), indices, finite, self._drop)
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
                ready.append(([index], preparation.each(data[None])))
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

    def _drop_not_finite(self, arrays: Mapping[str, Array]) -> None:
        for key, norm in arrays.items():
            if norm.ndim == 1 and "_norm/" in key:
                name, _, layer = key.partition("/")
                for index in arrays["sample"][~np.isfinite(norm)].tolist():
                    self._problems.setdefault(index, f"its {name.partition('.')[0]} at layer {layer!r} is not finite")


def _in_order(parts: list[tuple[list[int], Tensor]]) -> tuple[list[int], Tensor]:
    """Samples of several parts as one, in the order of the dataset."""
    if len(parts) == 1:
        return parts[0]
    indices = np.array([index for part, _ in parts for index in part])
    order, data = np.argsort(indices), torch.cat([part for _, part in parts])
    return indices[order].tolist(), data if (np.diff(order) == 1).all() else data[order.tolist()]


def _joined(arrays: list[Array]) -> Array:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
