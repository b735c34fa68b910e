"""Files of a result folder as zennit-crp lays it out: their names, and reading and writing them.

For every layer, ``<folder>/RelMax_sum_normed/<layer>_{data,rel,rf}.npy`` hold the best samples of each concept, their
values and the positions of their maxima, each of shape (samples, concepts).
``RelStats_sum_normed/<layer>/<target>_{...}.npy`` hold the same for the samples of one target, and
``RelStats_sum_normed/targets.npy`` lists the targets. ``Act...`` hold activations.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple
from urllib.parse import unquote

import numpy as np

from crp.visualization.table.question import Question

#: Samples kept for each concept, as in zennit-crp.
SAMPLE_SIZE = 40
_UNSAFE = re.compile(r'[%<>:"/\\|?*\x00-\x1f]|^\.|[. ]$')
_FOLDER = re.compile(r"(Rel|Act)(Max|Stats)_(sum|max)_(normed|unnormed)")
_SIZE = "sample_size.txt"
_SUFFIXES = ("data.npy", "rel.npy", "rf.npy")


class Top(NamedTuple):
    """Best samples of every concept of a layer, in descending order of value.

    Attributes
    ----------
    sample : array of shape (samples, concepts)
        Dataset index (int64).
    value : array of shape (samples, concepts)
        Relevance or activation.
    position : array of shape (samples, concepts)
        Index of the concept's maximum in the flattened space (int64).
    """

    sample: np.ndarray
    value: np.ndarray
    position: np.ndarray


def folder_name(question: Question) -> str:
    """Name of the result folder that answers a question."""
    kind = {"relevance": "Rel", "activation": "Act"}[question.mode] + ("Stats" if question.per_class else "Max")
    return f"{kind}_{question.kind}_{'normed' if question.normed else 'unnormed'}"


def question_of(name: str) -> Question | None:
    """Question that a result folder of this name answers, or None if it is no such name."""
    match = _FOLDER.fullmatch(name)
    if match is None:
        return None
    mode = "relevance" if match[1] == "Rel" else "activation"
    return Question(mode, match[3], match[4] == "normed", match[2] == "Stats")


def file_name(layer_name: str) -> str:
    """Layer name as part of a file name that cannot leave its folder; ordinary names stay as they are."""
    return _UNSAFE.sub(lambda match: "".join(f"%{byte:02X}" for byte in match[0].encode()), layer_name)


def layer_name(name: str) -> str:
    """Layer that `file_name` gave this name."""
    return unquote(name)


def max_prefix(folder: Path, layer: str, span: tuple[int, int] | None = None) -> str:
    """Path of a layer's files up to ``data.npy``; ``span`` is the range of samples of a partial result."""
    return str(folder / f"{file_name(layer)}_{_span(span)}")


def stats_prefix(folder: Path, layer: str, target: object, span: tuple[int, int] | None = None) -> str:
    """Path of a layer's files for one target, up to ``data.npy``."""
    return str(folder / file_name(layer) / f"{target}_{_span(span)}")


def read_top(prefix: str) -> Top:
    """Read the three arrays behind a prefix, memory-mapped.

    Raises
    ------
    FileNotFoundError
        If one is missing.
    ValueError
        If a file is no array of numbers, or shorter than its header says.
    """
    return Top(*(np.load(prefix + suffix, mmap_mode="r", allow_pickle=False) for suffix in _SUFFIXES))


def write_top(prefix: str, top: Top) -> str:
    """Write the three arrays behind a prefix; each file is complete or absent."""
    for suffix, array in zip(_SUFFIXES, top, strict=True):
        write_array(Path(prefix + suffix), array)
    return prefix


def write_size(folder: Path, size: int) -> None:
    """Keep how many samples of a concept are to be read from a table under the name of this folder."""
    file = folder / _SIZE
    if size == SAMPLE_SIZE:
        file.unlink(missing_ok=True)
    else:
        with replacing(file) as opened:
            opened.write(f"{size}\n".encode())


def read_size(folder: Path) -> int:
    """How many samples of a concept `write_size` said are to be read; 40 where it said nothing."""
    try:
        return int((folder / _SIZE).read_text())
    except FileNotFoundError:
        return SAMPLE_SIZE


def write_targets(folder: Path, targets: Iterable[int]) -> None:
    """Write ``targets.npy``; as strings, which is what zennit-crp writes."""
    write_array(folder / "targets.npy", np.array(sorted(targets), dtype=str))


def write_array(path: Path, array: np.ndarray) -> None:
    """Write one ``.npy`` file; it is complete or absent."""
    with replacing(path) as file:
        np.save(file, array, allow_pickle=False)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[Any]]:
    """Binary file that takes the place of ``path`` once it is written; an error leaves ``path`` as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_top(prefix: str) -> None:
    """Delete the three arrays behind a prefix."""
    for suffix in _SUFFIXES:
        Path(prefix + suffix).unlink()


def _span(span: tuple[int, int] | None) -> str:
    return "" if span is None else f"{span[0]}_{span[1]}_"
