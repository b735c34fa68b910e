"""Columns about samples: where each comes from, what its label says, and what the model says."""

from __future__ import annotations

import json
import operator
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from crp.errors import InputError, InputTypeError, OutOfRangeError
from crp.flags import is_flag
from crp.kinds import check_kind
from crp.visualization.table.contents import ABOUT, SAMPLE_COLUMNS
from crp.visualization.table.manifest import Array, ShardRecord, TableCorruptError
from crp.visualization.table.shards import open_shard


class SampleColumns(NamedTuple):
    """Samples that have rows, in ascending order.

    Attributes
    ----------
    sample : array of shape (samples,)
        Dataset index (int64).
    source : list of str
        Name of the file within the dataset's folder; empty where the dataset does not tell it.
    label : list
        A class, a list of classes, a number, a word, or None.
    prediction : array of shape (samples,)
        Class of the highest output (int64), -1 where the model gives no scores of classes.
    probability : array of shape (samples,)
        Probability of this class (float32): by a softmax, unless the outputs are probabilities already; NaN where there
        is none, as of classes that do not exclude each other.
    content, stamp : arrays of shape (samples,)
        Hashes (int64) of the sample, and of size and time of its file; 0 where unknown.
    """

    sample: Array
    source: list[str]
    label: list[Any]
    prediction: Array
    probability: Array
    content: Array
    stamp: Array


def pack_about(sources: Sequence[str], labels: Sequence[Any]) -> Array:
    """Names and labels as the bytes of a JSON text."""
    text = json.dumps({"source": list(sources), "label": list(labels)}, allow_nan=False)
    return np.frombuffer(text.encode(), np.uint8)


def read_columns(folder: Path, shards: Sequence[ShardRecord], check: bool = True) -> Iterator[SampleColumns]:
    """Columns of every shard; of version 1, which keeps none, all is unknown.

    Without ``check``, nothing else of a shard is read, and these columns may be damaged.
    """
    for shard in shards:
        if shard.rows:
            with open_shard(folder, shard, check) as file:
                yield _read(file, folder / shard.file)


def join_columns(parts: Sequence[SampleColumns]) -> SampleColumns:
    """Columns of several shards as one; a sample that is in several counts once."""
    none = np.zeros(0, np.int64)
    parts = [SampleColumns(none, [], [], none, np.zeros(0, np.float32), none, none), *parts]
    sample, first = np.unique(np.concatenate([part.sample for part in parts]), return_index=True)
    sources, labels = ([value for part in parts for value in getattr(part, name)] for name in ("source", "label"))
    arrays = (np.concatenate([getattr(part, name) for part in parts])[first] for name in SAMPLE_COLUMNS)
    return SampleColumns(sample, [sources[i] for i in first], [labels[i] for i in first], *arrays)


def _read(file: Any, path: Path) -> SampleColumns:
    sample = np.unique(file.get_tensor("sample"))
    n = len(sample)
    if ABOUT not in file.keys():  # noqa: SIM118
        none = np.zeros(n, np.int64)
        return SampleColumns(sample, [""] * n, [None] * n, none - 1, np.full(n, np.nan, np.float32), none, none)
    try:
        about = json.loads(file.get_tensor(ABOUT).tobytes())
        sources, labels = [str(name) for name in about["source"]], list(about["label"])
        if not len(sources) == len(labels) == n:
            raise InputError(f"{len(sources)} names for {n} samples")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise TableCorruptError(f"{path} is not what mining writes: names of samples: {error}") from error
    prediction, content, stamp = (file.get_tensor(name) for name in SAMPLE_COLUMNS if name != "probability")
    probability = np.full(n, np.nan, np.float32)
    if "probability" in file.keys():  # noqa: SIM118 (not of classes that do not exclude each other)
        probability[prediction >= 0] = file.get_tensor("probability")[prediction >= 0]
    return SampleColumns(sample, sources, labels, prediction, probability, content, stamp)


def sample_numbers(samples: Iterable[int], n_samples: int) -> Array:
    """Numbers of samples as an array, ascending and each once; an error for what is none of these samples."""
    check_kind("samples", samples, Iterable, "numbers of samples")
    given = np.asarray(list(samples))
    if given.size and (given.dtype.kind not in "iu" or given.ndim != 1):
        raise InputTypeError(f"samples must be whole numbers, not {given.reshape(-1)[0]!r}")
    numbers = np.unique(given.astype(np.int64))
    for number in numbers[(numbers < 0) | (numbers >= n_samples)][:1]:
        raise OutOfRangeError(f"there is no sample {number}; the dataset has {n_samples}, 0 to {n_samples - 1}")
    return numbers


def _class_number(of_class: Any) -> int | None:
    """Number of a class as an int, None for none; a `TypeError` if it is no whole number."""
    if of_class is None:
        return None
    with suppress(TypeError):
        if not is_flag(of_class):
            return operator.index(of_class)
    raise InputTypeError(f"of_class must be a whole number, not {of_class!r}")
