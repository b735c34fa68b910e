"""What a mining job does with a range of samples: attribute, score, and write shards."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from zennit.core import Composite

from crp.attribution import CondAttribution
from crp.concepts import Concept
from crp.visualization.loading import Problem, Sample, SampleError, load, to_targets
from crp.visualization.manifest import Array, ShardRecord, TableHeader
from crp.visualization.shards import write_shard

#: Bytes of scores after which a shard is closed.
SHARD_BYTES = 128 << 20


@dataclass(frozen=True)
class Job:
    """All that mining a range needs; `crp.visualization.mining.prepare` makes one. Attributes as for `mine`.

    Attributes
    ----------
    concepts : dict of str to Concept
        The layer map, in the order of the model.
    header : TableHeader
        What the table is about.
    shape, dtype
        Of a sample as the model gets it.
    """

    attribution: CondAttribution
    dataset: Any
    concepts: Mapping[str, Concept]
    composite: Composite | None
    path: Path
    header: TableHeader
    shape: tuple[int, ...]
    dtype: torch.dtype
    batch_size: int
    shard_size: int
    preprocess: Callable[[Tensor], Tensor] | None
    single_targets: Callable[[Any], Iterable[Any]] | None
    num_workers: int
    device: torch.device
    on_device: torch.device | str | None
    on_error: str


def mine_ranges(
    job: Job, ranges: Sequence[tuple[int, int]], progress: Callable[[int], object] | None = None
) -> Iterator[ShardRecord]:
    """Mine ranges into shard files of the job's folder; gives the record of each once it is written.

    Shards end at multiples of the job's shard size, or where they are full; batches start where a shard does.
    """
    folder = job.path / "shards"
    folder.mkdir(parents=True, exist_ok=True)
    batches = list(_get_batches(job, ranges))
    loaded = load(job.dataset, (range(begin, end) for begin, end, _ in batches), job.num_workers)
    shard = None
    works = False  # whether any sample was attributed
    for (begin, end, is_last), samples in zip(batches, loaded, strict=True):
        shard = shard or _Shard(begin)
        works |= _Batch(job, samples, works).score(shard)
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
            for begin in range(start, end, job.batch_size):
                last = min(begin + job.batch_size, end)
                yield begin, last, last == end
            start = end


class _Shard:
    """Rows of a shard in the making."""

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
        # Column after column, so that memory holds the shard once.
        arrays = {key: _narrowed(key, np.concatenate(self._arrays.pop(key))) for key in list(self._arrays)}
        return write_shard(folder, identity, self._start, stop, arrays, self.skipped)


class _Batch:
    """Samples of one batch on their way to scores; those with problems drop out."""

    def __init__(self, job: Job, samples: Sequence[Sample], works: bool) -> None:
        self._job = job
        self._samples = samples
        self._works = works
        self._problems: dict[int, str] = {}

    def score(self, shard: _Shard) -> bool:
        """Add the rows of the batch to a shard; returns whether there are any."""
        targets = self._get_targets()
        indices, data = self._get_data([sample for sample in self._samples if targets.get(sample.id)])
        rows = [(place, target) for place, index in enumerate(indices) for target in targets[index]]
        parts = []
        for begin in range(0, len(rows), self._job.batch_size):
            parts += self._attribute(data, indices, rows[begin : begin + self._job.batch_size])
        if parts:
            arrays = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
            self._drop_not_finite(arrays)
            keep = ~np.isin(arrays["sample"], list(self._problems))
            shard.extend({key: array[keep] for key, array in arrays.items()})
        shard.skipped.update(self._problems)
        return bool(parts)

    def _drop(self, index: int, reason: str, error: Exception | None = None) -> None:
        """Skip a sample, or stop."""
        if self._job.on_error == "stop":
            raise SampleError(index, reason) from error
        self._problems.setdefault(index, reason)

    def _get_targets(self) -> dict[int, list[int]]:
        found = {}
        for index, _, label, problem in self._samples:
            if problem is not None:
                self._drop(index, problem.reason, problem.error)
                continue
            try:
                found[index] = to_targets(label, self._job.single_targets, "relevance" in self._job.header.modes)
            except Exception as error:
                self._drop(index, Problem.of(error).reason, error)
        return found

    def _get_data(self, samples: Sequence[Sample]) -> tuple[list[int], Tensor]:
        """Indices and data, as the model gets it, of the samples that are as they should be."""
        preprocess, like = self._job.preprocess, (self._job.shape, self._job.dtype)
        indices, ready = [], []
        for index, data, _, _ in samples:
            try:
                one = data[None] if preprocess is None else preprocess(data[None].to(self._job.device))
            except Exception as error:
                self._drop(index, Problem.of(error, "preprocess: ").reason, error)
                continue
            if (found := (tuple(one.shape[1:]), one.dtype)) != like:
                self._drop(index, "its shape is {}, {}; that of the first sample is {}, {}".format(*found, *like))
                continue
            indices.append(index)
            ready.append(one)
        if not ready:
            return [], torch.empty(0)
        batch = torch.cat(ready).to(self._job.device)
        finite = torch.isfinite(batch).flatten(1).all(1).tolist()
        for index, is_finite in zip(indices, finite, strict=True):
            if not is_finite:
                self._problems[index] = "its data is not finite"
        if not all(finite):
            batch = batch[torch.tensor(finite, device=batch.device)]
        return [index for index in indices if index not in self._problems], batch

    def _attribute(self, data: Tensor, indices: list[int], rows: list[tuple[int, int]]) -> list[dict[str, Array]]:
        """Scores of the rows, in parts. Where a call fails, its halves are tried: memory may suffice for these."""
        failures: list[tuple[int, int, Exception]] = []
        reasons: list[str] = []

        def attempt(part: list[tuple[int, int]]) -> list[dict[str, Array]]:
            try:
                return [_get_scores(self._job, data, indices, part)]
            except Exception as error:
                if len(part) == 1:
                    failures.append((*part[0], error))
                    return []
                reasons.append(Problem.of(error).reason)
            half = len(part) // 2
            return attempt(part[:half]) + attempt(part[half:])

        parts = attempt(rows)
        if not parts and not self._works and len({place for place, _ in rows}) > 1:
            raise failures[0][2]  # no sample's fault
        if reasons and not failures:
            message = f"{len(rows)} rows at once failed ({reasons[0]}) and were attributed in parts; lower batch_size"
            warnings.warn(message, stacklevel=6)
        for place, target, error in failures:
            self._drop(indices[place], Problem.of(error, f"target {target}: ").reason, error)
        return parts

    def _drop_not_finite(self, arrays: Mapping[str, Array]) -> None:
        for key, norm in arrays.items():
            if norm.ndim == 1 and "_norm/" in key:
                name, _, layer = key.partition("/")
                for index in arrays["sample"][~np.isfinite(norm)].tolist():
                    self._problems.setdefault(index, f"its {name.partition('.')[0]} at layer {layer!r} is not finite")


def _get_scores(job: Job, data: Tensor, indices: list[int], rows: list[tuple[int, int]]) -> dict[str, Array]:
    places = [place for place, _ in rows]
    batch = data if places == list(range(len(data))) else data[places]
    # A sample without a label has target -1, and activations do not depend on the target.
    conditions = [{job.attribution.MODEL_OUTPUT_NAME: [max(target, 0)]} for _, target in rows]
    result = job.attribution(
        batch, conditions, job.composite, list(job.concepts), on_device=job.on_device, exclude_parallel=False
    )
    arrays: dict[str, Array] = {
        "sample": np.array([indices[place] for place in places], np.int64),
        "target": np.array([target for _, target in rows], np.int64),
    }
    for mode in job.header.modes:
        recorded = result.relevances if mode == "relevance" else result.activations
        for layer, concept in job.concepts.items():
            if layer not in recorded:
                raise ValueError(f"layer {layer!r} gives no {mode}: the forward pass does not use it; leave it out")
            arrays |= _get_columns(concept, recorded[layer], layer, mode, job.header.kinds)
    return arrays


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
    """Positions as uint16 where they fit."""
    fits = ".position/" in key and (not array.size or array.max() < 1 << 16)
    return array.astype(np.uint16) if fits else array
