"""Shards: filled batch by batch, and written in the background while the next ones are computed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import TracebackType

from crp.visualization.mining.job import Job
from crp.visualization.mining.rows import ShardRows
from crp.visualization.table.manifest import ShardRecord

#: Bytes of scores after which a shard is closed.
SHARD_BYTES = 128 << 20
#: Shards that are written at once; hashing and writing leave the interpreter to others.
THREADS = 2


class ShardWriter:
    """Writes shards in threads; a context whose end waits until all of them are on disk.

    Memory is bounded: beside the shard that is being filled, there are at most `THREADS` others.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(THREADS, "crp-shard-writer")
        self._writing: deque[Future[ShardRecord]] = deque()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True)

    def put(self, write: Callable[[], ShardRecord]) -> Iterator[ShardRecord]:
        """Have a shard written; gives the records of earlier ones, for which it waits if there are too many.

        Raises
        ------
        OSError
            If an earlier one could not be written.
        """
        while len(self._writing) >= THREADS:
            yield self._writing.popleft().result()
        self._writing.append(self._pool.submit(write))

    def written(self, wait: bool = False) -> Iterator[ShardRecord]:
        """Records of the shards that are on disk by now, in their order; with ``wait``, of all.

        Raises
        ------
        OSError
            If one of them, or one behind them, could not be written.
        """
        for future in self._writing:
            if future.done() and (error := future.exception()) is not None:
                raise error
        while self._writing and (wait or self._writing[0].done()):
            yield self._writing.popleft().result()


class Shards:
    """Puts batches into shards, one after the other, and has shards written that are full or at their end.

    ``progress`` is called with the number of samples that were added.
    """

    def __init__(
        self, writer: ShardWriter, job: Job, folder: Path, progress: Callable[[int], object] | None = None
    ) -> None:
        self._writer, self._job, self._folder, self._progress = writer, job, folder, progress
        self._shard: ShardRows | None = None

    def add(self, begin: int, end: int, is_last: bool, fill: Callable[[ShardRows], object]) -> Iterator[ShardRecord]:
        """Add samples ``begin`` to ``end``, which ``fill`` puts into a shard; gives the records of written shards."""
        shard = self._shard = self._shard or ShardRows(begin)
        fill(shard)
        if self._progress is not None:
            self._progress(end - begin)
        if is_last or shard.n_bytes >= SHARD_BYTES:
            self._shard = None
            header, sources = self._job.header, shard.sources(self._job.dataset)
            write = partial(shard.write, self._folder, header.identity, end, sources, header.storage)
            yield from self._writer.put(write)
        yield from self._writer.written()
