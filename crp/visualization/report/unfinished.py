"""Heatmaps of files that are not complete yet, kept so that an interrupted report need not draw them again.

A file holds the heatmaps of a concept, and is written when all are there. Concepts are drawn together, so that they
share what is computed of a sample: after an hour, none of a thousand files may be complete. What is drawn meanwhile is
therefore written every minute. Each process writes files of its own, and they are gone when the report is complete.
Where several processes share the work, each draws the rows of its samples, and the last one finds them here.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Iterable
from operator import index
from pathlib import Path
from typing import NamedTuple

import numpy as np

from crp.visualization.report.drawing import Drawn, HeatmapFile
from crp.visualization.table.files import read_file, write_atomic
from crp.visualization.table.manifest import Array

#: Seconds between two files.
_EVERY = 60.0
_SUFFIX = ".unfinished.npz"


class Cell(NamedTuple):
    """Heatmap in a place of a file.

    Attributes
    ----------
    values : array of shape (size, size), uint8
        Pixels as they stand in the file. (Of a sample's file, shares of relevance, until all are there.)
    facts : Drawn
    """

    values: Array
    facts: Drawn


class Unfinished:
    """Heatmaps of some files that are drawn together.

    A context: what is not written yet is written when it is left by an error, such as an interruption; without one,
    all files are complete, and what was written is deleted, unless it is ``shared`` with a process that completes them.
    """

    def __init__(self, folder: Path, jobs: Iterable[HeatmapFile], shared: bool) -> None:
        self._folder, self._shared = folder, shared
        self._keys, self._n_rows = list[str](), list[int]()
        for job in jobs:
            self._keys.append(job.key)
            self._n_rows.append(len(job.rows))
        self._waiting: dict[tuple[int, int], Cell] = {}
        self._written: list[Path] = []
        self._time = time.monotonic()

    def __enter__(self) -> Unfinished:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None or self._shared:
            self._write()
            return
        for file in self._written:
            file.unlink(missing_ok=True)

    def read(self) -> dict[tuple[int, int], Cell]:
        """Heatmaps that an earlier run left: by the number of their file, and their place in it."""
        numbers = {key: number for number, key in enumerate(self._keys)}
        found = {}
        for file in sorted(self._folder.glob(f"*{_SUFFIX}")):
            for key, place, cell in _read(file):
                if key in numbers and 0 <= place < self._n_rows[numbers[key]]:
                    found[numbers[key], place] = cell
        return found

    def add(self, number: int, place: int, cell: Cell) -> None:
        """Keep a heatmap; it is written within about a minute."""
        self._waiting[number, place] = cell
        if time.monotonic() - self._time >= _EVERY:
            self._write()

    def _write(self) -> None:
        if not self._waiting:
            return
        about = [[self._keys[number], place, cell.facts] for (number, place), cell in self._waiting.items()]
        buffer = io.BytesIO()
        np.savez(buffer, pixels=np.stack([cell.values for cell in self._waiting.values()]), about=json.dumps(about))
        content = buffer.getvalue()
        file = self._folder / f"{hashlib.sha256(content).hexdigest()[:16]}{_SUFFIX}"
        self._folder.mkdir(parents=True, exist_ok=True)
        write_atomic(file, content)
        self._written.append(file)
        self._waiting.clear()
        self._time = time.monotonic()


def _read(file: Path) -> list[tuple[str, int, Cell]]:
    """Content of a file, each heatmap with the key of its file and its place there; nothing where it is damaged."""
    try:
        with np.load(io.BytesIO(read_file(file)), allow_pickle=False) as content:
            about, pixels = json.loads(str(content["about"])), content["pixels"]
        if pixels.dtype != np.uint8 or pixels.ndim != 3:
            return []
        return [
            (str(key), index(place), Cell(values, Drawn(*facts)))
            for (key, place, facts), values in zip(about, pixels, strict=True)
        ]
    except Exception:  # (a damaged archive fails in many ways, and a link or a pipe is none)
        return []
