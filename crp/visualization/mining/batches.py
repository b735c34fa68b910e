"""What a mining job does with a range of samples: attribute, score, and write shards."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from crp.concepts import Concept
from crp.engine.backward import lacks_memory
from crp.notices import warn
from crp.visualization.mining.datasets import Problem, Sample, SampleError, read_batches
from crp.visualization.mining.job import Job
from crp.visualization.mining.targets import (
    attribute_targets,
    calls_itself,
    choose_targets,
    keeps_graph,
    record_activations,
    to_targets,
)
from crp.visualization.table.manifest import Array, ShardRecord
from crp.visualization.table.shards import make_folder, write_shard

T = TypeVar("T")
#: Samples, as places in a batch, each with its targets: equally many for every sample.
Unit = list[tuple[int, list[int]]]
#: Bytes of scores after which a shard is closed.
SHARD_BYTES = 128 << 20


def mine_ranges(
    job: Job, ranges: Sequence[tuple[int, int]], progress: Callable[[int], object] | None = None
) -> Iterator[ShardRecord]:
    """Mine ranges into shard files of the job's folder, and yield the record of each once it is written.

    Shards end at multiples of the job's shard size, or where they are full; batches start where a shard does.
    """
    folder = job.path / "shards"
    make_folder(folder)
    batches = list(_get_batches(job, ranges))
    loaded = read_batches(job.dataset, (range(begin, end) for begin, end, _ in batches), job.options.num_workers)
    shard = None
    limit = _MemoryLimit(job.options.batch_size)
    for (begin, end, is_last), samples in zip(batches, loaded, strict=True):
        shard = shard or _Shard(begin)
        _Batch(job, samples, limit).score(shard)
        if progress is not None:
            progress(end - begin)
        if is_last or shard.n_bytes >= SHARD_BYTES:
            yield shard.write(folder, job.header.identity, end)
            shard = None


def _get_batches(job: Job, ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int, bool]]:
    """Begin and end of every batch, and whether a shard ends with it."""
    for start, stop in ranges:
        while start < stop:
            end = min(stop, (start // job.shard_size + 1) * job.shard_size)
            for begin in range(start, end, job.options.batch_size):
                last = min(begin + job.options.batch_size, end)
                yield begin, last, last == end
            start = end


class _Shard:
    """Rows of a shard that is not written yet."""

    def __init__(self, start: int) -> None:
        self._start = start
        self._arrays: dict[str, list[Array]] = {"sample": [np.zeros(0, np.int64)], "target": [np.zeros(0, np.int64)]}
        self.skipped: dict[int, str] = {}
        self.n_bytes = 0

    def extend(self, arrays: Mapping[str, Array]) -> None:
        for key, array in arrays.items():
            self._arrays.setdefault(key, []).append(array)
            self.n_bytes += array.nbytes

    def write(self, folder: Path, identity: str, stop: int) -> ShardRecord:
        # One column is joined at a time, so that memory holds the shard only once.
        arrays = {key: _narrowed(key, np.concatenate(self._arrays.pop(key))) for key in list(self._arrays)}
        return write_shard(folder, identity, self._start, stop, arrays, self.skipped)


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


class _Batch:
    """Samples of one batch, which are prepared, attributed and scored; those with problems are left out."""

    def __init__(self, job: Job, samples: Sequence[Sample], limit: _MemoryLimit) -> None:
        self._job = job
        self._samples = samples
        self._limit = limit
        self._problems: dict[int, str] = {}

    def score(self, shard: _Shard) -> None:
        """Add the rows of the batch to a shard."""
        by_label = self._job.targets == "label"
        targets = self._get_targets() if by_label else {i: [0] for i in self._get_readable()}
        parts = []
        for indices, data in self._get_data([sample for sample in self._samples if targets.get(sample.id)]):
            if not by_label:
                targets |= self._choose(indices, data)
            units = self._get_units([targets[index] for index in indices])
            parts += self._in_parts(units, indices, partial(_get_scores, self._job, data, indices))
        if parts:
            self._limit.works = True
            arrays = {key: _joined([part[key] for part in parts]) for key in parts[0]}
            self._drop_not_finite(arrays)
            order = np.lexsort((arrays["target"], arrays["sample"]))
            keep = order[~np.isin(arrays["sample"][order], list(self._problems))]
            if not np.array_equal(keep, np.arange(len(order))):
                arrays = {key: array[keep] for key, array in arrays.items()}
            shard.extend(arrays)
        shard.skipped.update(self._problems)

    def _drop(self, index: int, reason: str, error: Exception | None = None) -> None:
        """Note why a sample is skipped, or raise, as ``on_error`` says."""
        if self._job.options.on_error == "stop":
            raise SampleError(index, reason) from error
        self._problems.setdefault(index, reason)

    def _get_readable(self) -> dict[int, Any]:
        """Labels of the samples that could be read."""
        for index, _, _, problem in self._samples:
            if problem is not None:
                self._drop(index, problem.reason, problem.error)
        return {index: label for index, _, label, problem in self._samples if problem is None}

    def _get_targets(self) -> dict[int, list[int]]:
        found = {}
        for index, label in self._get_readable().items():
            try:
                found[index] = to_targets(
                    label, self._job.options.single_targets, "relevance" in self._job.header.modes
                )
            except Exception as error:
                self._drop(index, Problem.of(error).reason, error)
        return found

    def _choose(self, indices: list[int], data: Tensor) -> dict[int, list[int]]:
        """Targets of samples where they are not taken from the labels."""

        def chosen(unit: Unit) -> list[tuple[int, list[int]]]:
            places = [place for place, _ in unit]
            found = choose_targets(self._job.targets, self._job.attribution, data[places])
            return [(indices[place], targets) for place, targets in zip(places, found, strict=True)]

        parts = self._in_parts(self._get_units([[-1]] * len(indices)), indices, chosen)
        found: dict[int, list[int]] = {index: [] for index in indices}
        return found | dict(pair for part in parts for pair in part)

    def _get_data(self, samples: Sequence[Sample]) -> list[tuple[list[int], Tensor]]:
        """Indices and prepared data of the sound samples, grouped by shape."""
        preprocess, like = self._job.options.preprocess, (self._job.shape, self._job.dtype)
        groups: dict[tuple[int, ...], tuple[list[int], list[Tensor]]] = {}
        for index, data, _, _ in samples:
            try:
                one = data[None] if preprocess is None else preprocess(data[None].to(self._job.device))
            except Exception as error:
                self._drop(index, Problem.of(error, "preprocess: ").reason, error)
                continue
            shape = tuple(one.shape[1:])
            if (shape if like[0] is not None else None, one.dtype) != like:
                reason = f"its shape is {shape}, {one.dtype}; that of the first sample is {like[0] or 'any'}, {like[1]}"
                if one.dtype == like[1]:
                    reason += "; mixed_shapes=True (--mixed-shapes) mines them, too"
                self._drop(index, reason)
                continue
            indices, ready = groups.setdefault(shape, ([], []))
            indices.append(index)
            ready.append(one)
        return [self._get_finite(*group) for group in groups.values()]

    def _get_finite(self, indices: list[int], ready: list[Tensor]) -> tuple[list[int], Tensor]:
        batch = torch.cat(ready).to(self._job.device)
        finite = torch.isfinite(batch).flatten(1).all(1).tolist()
        for index, is_finite in zip(indices, finite, strict=True):
            if not is_finite:
                self._problems[index] = "its data is not finite"
        if not all(finite):
            batch = batch[torch.tensor(finite, device=batch.device)]
        return [index for index in indices if index not in self._problems], batch

    def _get_units(self, targets: list[list[int]]) -> list[Unit]:
        """Units, each attributed in one call: samples with equally many targets share a forward pass."""
        units: list[Unit] = []
        keeps, size = keeps_graph(self._job.composite), self._limit.rows
        for n in sorted({len(of_sample) for of_sample in targets} - {0}):
            alike = [place for place, of_sample in enumerate(targets) if len(of_sample) == n]
            # A graph that is kept serves one target after the other: memory holds the samples. Else it holds all rows.
            width = n if keeps else min(n, size)
            height = size if keeps else max(size // width, 1)
            for first in range(0, len(alike), height):
                places = alike[first : first + height]
                units += [[(place, targets[place][i : i + width]) for place in places] for i in range(0, n, width)]
        return units

    def _in_parts(self, units: list[Unit], indices: list[int], compute: Callable[[Unit], T]) -> list[T]:
        """Results for the units. Where a call fails, its halves are tried: memory may suffice for these."""
        failures: list[tuple[int, int, Exception]] = []
        parts: list[T] = []
        todo = units[::-1]
        reasons: list[str] = []
        while todo:
            unit = todo.pop()
            n_rows = sum(len(targets) for _, targets in unit)
            try:
                parts.append(compute(unit))
                continue
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
                self._limit.rows = min(self._limit.rows, held)
                torch.cuda.empty_cache()
        failures.sort(key=operator.itemgetter(0, 1))
        if not parts and not self._limit.works and len({place for place, _, _ in failures}) > 1:
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


def _halved(unit: Unit) -> tuple[Unit, Unit]:
    """Halves of a unit: of its samples, or of the targets of a single sample. The second half is at least as large."""
    if len(unit) > 1:
        return unit[: len(unit) // 2], unit[len(unit) // 2 :]
    [(place, targets)] = unit
    return [(place, targets[: len(targets) // 2])], [(place, targets[len(targets) // 2 :])]


def _get_scores(job: Job, data: Tensor, indices: list[int], unit: Unit) -> dict[str, Array]:
    """Columns of a unit's rows, ordered by target: first the first target of every sample, then the second, ..."""
    places = [place for place, _ in unit]
    batch = data if places == list(range(len(data))) else data[places]
    # A sample without a label has target -1, and activations do not depend on the target.
    targets = [[max(target, 0) for target in of_sample] for _, of_sample in unit]
    slots = np.array([of_sample for _, of_sample in unit], np.int64).T
    found: dict[str, list[Array]] = {}
    for recorded in _get_recorded(job, batch, targets):
        for mode, layer in product([mode for mode in job.header.modes if mode in recorded], job.concepts):
            if layer not in recorded[mode]:
                raise ValueError(f"layer {layer!r} gives no {mode}: the forward pass does not use it; leave it out")
            columns = _get_columns(job.concepts[layer], recorded[mode][layer], layer, mode, job.header.kinds)
            for key, column in columns.items():
                found.setdefault(key, []).append(column)
    arrays = {key: _joined(columns) for key, columns in found.items()}
    for key, array in arrays.items():
        if key.startswith("activation.") and len(slots) > 1:
            arrays[key] = np.concatenate([array] * len(slots))
    sample = np.array([indices[place] for place in places], np.int64)
    return {"sample": np.tile(sample, len(slots)), "target": slots.reshape(-1)} | arrays


def _get_recorded(job: Job, batch: Tensor, targets: list[list[int]]) -> Iterator[Mapping[str, Mapping[str, Tensor]]]:
    """Relevance of layers, one target after the other; the first also comes with their activation."""
    layers = list(job.concepts)
    if "relevance" not in job.header.modes and not calls_itself(job.attribution):
        yield {"activation": record_activations(job.attribution, batch, job.composite, layers, job.options.on_device)}
        return
    results = attribute_targets(job.attribution, batch, targets, job.composite, layers, job.options.on_device)
    for number, result in enumerate(results):
        activations = {layer: every[: len(batch)] for layer, every in result.activations.items()}
        yield {"relevance": result.relevances} | ({} if number else {"activation": activations})


def _joined(arrays: list[Array]) -> Array:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


@torch.no_grad()
def _get_columns(concept: Concept, values: Tensor, layer: str, mode: str, kinds: Sequence[str]) -> dict[str, Array]:
    scores = concept.scores(values, layer)
    columns = {f"{mode}.position/{layer}": scores.position.to(torch.int32)}
    for kind in kinds:
        value: Tensor = getattr(scores, kind)
        if value.dim() != 2 or len(value) != len(values):
            raise ValueError(
                f"{concept!r} scores {len(values)} rows of layer {layer!r} by a tensor of shape {tuple(value.shape)}; "
                "it must be (rows, concepts)"
            )
        value = value.to(torch.float64 if value.dtype == torch.float64 else torch.float32)
        columns |= {f"{mode}.{kind}/{layer}": value, f"{mode}.{kind}_norm/{layer}": value.abs().sum(-1)}
    return {key: column.cpu().numpy() for key, column in columns.items()}


def _narrowed(key: str, array: Array) -> Array:
    """Positions as uint16, if all of them fit; other columns as they are."""
    fits = ".position/" in key and (not array.size or array.max() < 1 << 16)
    return array.astype(np.uint16) if fits else array
