"""Whether a dataset is the one that was mined; it may have grown since, and a sample may be unreadable for a while.

Compared are a few samples that the manifest keeps, the names, sizes and times of files, and the content of some samples
that were mined, others every time. None of it reads more than a few samples.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import numpy as np

from crp.notices import warn
from crp.visualization.mining.datasets import read
from crp.visualization.mining.marks import content_of, source_of, stamp_of
from crp.visualization.table.columns import SampleColumns, read_columns
from crp.visualization.table.manifest import TableCorruptError, TableError, TableMismatchError
from crp.visualization.table.store import ELSEWHERE, Table

#: Samples whose content the manifest keeps.
N_PROBES = 8
#: Mined samples that are read again to be compared: of all, and of those whose files have another size or time.
N_READ, N_CHANGED = 8, 32
#: Samples whose files are asked for name, size and time.
N_FILES = 50_000


def probe(dataset: Any, indices: Iterable[int] | None = None) -> dict[str, str]:
    """Marks of some samples, by default of a few that are spread evenly.

    Returns
    -------
    dict of str to str
        By index, a hash of the content; the shape, where two readings differ, as with random augmentation; or nothing,
        where the sample cannot be read.
    """
    n = len(dataset)
    spread = {int(i) for i in np.linspace(0, n - 1, min(n, N_PROBES))} if n else set()
    return {str(i): _mark(dataset, i) for i in (sorted(spread) if indices is None else indices)}


def check_dataset(table: Table, dataset: Any, probes: Mapping[str, str] | None = None) -> None:
    """Raise unless the first samples of ``dataset`` are those that were mined into ``table``.

    Parameters
    ----------
    table : Table
        Of a manifest that keeps marks of samples.
    dataset : Dataset
    probes : mapping of str to str, optional
        From `probe`, where it was called already.

    Raises
    ------
    TableMismatchError
        If a sample is another one, or the dataset is shorter; the message names the sample.
    TableError
        If no sample can be read to be compared.
    """
    if len(dataset) < table.n_samples:
        raise TableMismatchError(
            f"the table in {table.path} was mined with another dataset: of n_samples = {table.n_samples}, not "
            f"{len(dataset)}; {ELSEWHERE}"
        )
    if probes is None or set(probes) != set(table.header.probes):
        probes = probe(dataset, map(int, table.header.probes))
    try:
        _check_samples(table, dataset, probes)
    except TableMismatchError:
        if not (problems := table.problems()):
            raise
        # What differs may be in a damaged shard, which is mined again.
        sound = [shard for shard in table.shards if shard.file not in problems]
        _check_samples(Table(table.path, table.header, sound), dataset, probes)


def _check_samples(table: Table, dataset: Any, probes: Mapping[str, str]) -> None:
    """Compare the dataset with what manifest and shards keep of it; the bytes of the shards are not checked."""
    columns: list[SampleColumns] = []
    for shard in table.shards:
        with suppress(TableCorruptError):
            columns += read_columns(table.path / "shards", [shard], check=False)
    mined: dict[int, int] = {}
    for part in columns:
        mined |= dict(zip(part.sample.tolist(), part.content.tolist(), strict=True))
    chooser = random.SystemRandom()
    changed = _changed_files(table, dataset, columns, chooser)
    _check_marks(table, dataset, table.header.probes, probes)
    chosen = chooser.sample(changed, min(N_CHANGED, len(changed)))
    chosen += chooser.sample(sorted(mined), min(N_READ, len(mined)))
    marks = {str(i): f"{mined[i]:016x}" for i in chosen if mined[i]}
    _check_marks(table, dataset, marks, probe(dataset, map(int, marks)), varying=True)


def _mark(dataset: Any, index: int) -> str:
    samples = [read(dataset, index) for _ in range(2)]
    if any(sample.problem is not None for sample in samples):
        return ""
    first, second = (f"{content_of(sample.data, sample.label):016x}" for sample in samples)
    return first if first == second else f"{tuple(samples[0].data.shape)} {samples[0].data.dtype}"


def _check_marks(
    table: Table, dataset: Any, there: Mapping[str, str], here: Mapping[str, str], varying: bool = False
) -> None:
    """Compare marks; with ``varying``, those of samples that differ from reading to reading are let pass."""
    unreadable = [index for index, mark in there.items() if mark and not here[index]]
    known = {index: mark for index, mark in there.items() if mark and here[index]}
    for index, mark in known.items():
        if mark != here[index] and not (varying and here[index].startswith("(")):
            name = getattr(source_of(dataset, int(index)), "name", "")
            raise _another(table, f"sample {index}{f' ({name!r})' if name else ''} is not what it was")
    if not unreadable:
        return
    problem = read(dataset, int(unreadable[0])).problem
    reason = f"sample {unreadable[0]}: {problem.reason if problem else 'now it can be read'}"
    if not known:
        raise TableError(
            f"whether the dataset is the one that was mined into {table.path} cannot be told, as none of its samples "
            f"that were compared can be read ({reason}); if that passes, try again"
        )
    warn(f"{len(unreadable)} samples that were mined cannot be read, and were not compared ({reason})")


def _changed_files(table: Table, dataset: Any, columns: list[SampleColumns], chooser: random.Random) -> list[int]:
    """Samples whose files have another size or time than when they were mined; a file of another name is refused."""
    named = [
        (int(i), name, int(stamp))
        for part in columns
        for i, name, stamp in zip(part.sample, part.source, part.stamp, strict=True)
        if name
    ]
    changed = []
    for index, name, stamp in named if len(named) <= N_FILES else chooser.sample(named, N_FILES):
        source = source_of(dataset, index)
        if source is not None and source.name != name:
            raise _another(table, f"sample {index} was {name!r}, and is {source.name!r}")
        if source is not None and stamp_of(dataset, index) != stamp:
            changed.append(index)
    return changed


def _another(table: Table, what: str) -> TableMismatchError:
    return TableMismatchError(f"the table in {table.path} was mined with another dataset: {what}; {ELSEWHERE}")
