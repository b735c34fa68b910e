"""Shards: filled batch by batch, and written in the background while the next ones are computed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from types import TracebackType

import numpy as np

from crp.visualization.table.manifest import Array, ShardRecord

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


class Shard:
    """Rows of a shard that is not written yet."""

    def __init__(self, start: int) -> None:
        self._start = start
        self._arrays: dict[str, list[Array]] = {"sample": [np.zeros(0, np.int64)], "target": [np.zeros(0, np.int64)]}
        self.skipped: dict[int, str] = {}
        self.n_bytes = 0

    def extend(self, arrays: Mapping[str, Array]) -> None:
        """Add columns of further rows."""
        for key, array in arrays.items():
            self._arrays.setdefault(key, []).append(array)
            self.n_bytes += array.nbytes

    def write(self, write: Callable[..., ShardRecord], stop: int) -> ShardRecord:
        """Have ``write`` (start, stop, columns, skipped) write all rows."""
        # One column is joined at a time, so that memory holds the shard only once.
        arrays = {key: _narrowed(key, np.concatenate(self._arrays.pop(key))) for key in list(self._arrays)}
        return write(self._start, stop, arrays, self.skipped)


class Shards:
    """Puts batches into shards, one after the other, and has shards written that are full or at their end."""

    def __init__(
        self, writer: ShardWriter, write: Callable[..., ShardRecord], progress: Callable[[int], object] | None
    ) -> None:
        self._writer, self._write, self._progress = writer, write, progress
        self._shard: Shard | None = None

    def add(self, begin: int, end: int, is_last: bool, fill: Callable[[Shard], object]) -> Iterator[ShardRecord]:
        """Add samples ``begin`` to ``end``, which ``fill`` puts into a shard; gives the records of written shards."""
        shard = self._shard = self._shard or Shard(begin)
        fill(shard)
        if self._progress is not None:
            self._progress(end - begin)
        if is_last or shard.n_bytes >= SHARD_BYTES:
            self._shard = None
            yield from self._writer.put(partial(shard.write, self._write, end))
        yield from self._writer.written()


def _narrowed(key: str, array: Array) -> Array:
    """Positions as uint16, if all of them fit; other columns as they are."""
    fits = ".position/" in key and (not array.size or array.max() < 1 << 16)
    return array.astype(np.uint16) if fits else array
