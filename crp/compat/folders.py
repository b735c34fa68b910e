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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple
from urllib.parse import unquote

import numpy as np

from crp.checks import check_number
from crp.concepts import as_ids
from crp.kinds import as_path, check_kind
from crp.visualization.table.manifest import TableNotFoundError
from crp.visualization.table.question import Answers, Question, TableAnswers
from crp.visualization.table.ranking import ClassStatistics, ReferenceSamples, list_targets
from crp.visualization.table.store import Table

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
    check_kind("layer_name", layer_name, str, "the name of a layer")
    return _UNSAFE.sub(lambda match: "".join(f"%{byte:02X}" for byte in match[0].encode()), layer_name)


def layer_name(name: str) -> str:
    """Layer that `file_name` gave this name."""
    return unquote(name)


def max_prefix(folder: Path, layer: str, span: tuple[int, int] | None = None) -> str:
    """Path of a layer's files up to ``data.npy``; ``span`` is the range of samples of a partial result."""
    return str(folder / f"{file_name(layer)}_{_span(span)}")


def stats_prefix(folder: Path, layer: str, target: object, span: tuple[int, int] | None = None) -> str:
    """Path of a layer's files for one target, up to ``data.npy``."""
    return stats_prefixes(folder, layer, [target], span)[0]


def stats_prefixes(
    folder: Path, layer: str, targets: Iterable[object], span: tuple[int, int] | None = None
) -> list[str]:
    """Paths of a layer's files for several targets: joining a thousand paths one by one takes longer than all else."""
    of_layer, end = str(folder / file_name(layer)), _span(span)
    return [f"{of_layer}{os.sep}{target}_{end}" for target in targets]


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
        _write_array(Path(prefix + suffix), array)
    return prefix


def write_size(folder: Path, size: int) -> None:
    """Keep how many samples of a concept are to be read from a table under the name of this folder."""
    file = folder / _SIZE
    if size == SAMPLE_SIZE:
        file.unlink(missing_ok=True)
    else:
        with replacing(file) as opened:
            opened.write(f"{size}\n".encode())


def _make_listed(folder: Path) -> Path:
    """Make a folder that scripts list to see whether to mine: it is left empty until a table has all samples."""
    with contextlib.suppress(OSError):  # (what others mined may be read-only)
        folder.mkdir(parents=True, exist_ok=True)
        if not any(folder.iterdir()) and (table := _table_at(folder)) and not table.coverage().missing:
            (folder / _SIZE).write_text(f"{SAMPLE_SIZE}\n")
    return folder


def _read_size(folder: Path) -> int:
    """How many samples of a concept `write_size` said are to be read; 40 where it said nothing."""
    try:
        return int((folder / _SIZE).read_text())
    except FileNotFoundError:
        return SAMPLE_SIZE


def write_targets(folder: Path, targets: Iterable[int]) -> None:
    """Write ``targets.npy``; as strings, which is what zennit-crp writes."""
    _write_array(folder / "targets.npy", np.array(sorted(targets), dtype=str))


def _write_array(path: Path, array: np.ndarray) -> None:
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


Arrays = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]


@dataclass(frozen=True)
class _FolderAnswers:
    """Answers of one result folder that zennit-crp wrote, whatever it is called."""

    folder: Path

    def references(
        self, question: Question, layer: str, size: int | None, of_class: int | None = None
    ) -> ReferenceSamples:
        """Best samples of every concept of a layer; the targets are -1, as the files do not name them.

        Raises
        ------
        FileNotFoundError
            If there are no such files.
        """
        folder = self.folder
        prefix = max_prefix(folder, layer) if of_class is None else stats_prefix(folder, layer, of_class)
        try:
            sample, value, position = (array[:size] for array in read_top(prefix))
        except FileNotFoundError:
            raise self._missing(prefix) from None
        return ReferenceSamples(sample, value, position, np.broadcast_to(np.int64(-1), sample.shape))

    def class_statistics(
        self, question: Question, layer: str, column: Callable[[int], int], mean_n: int
    ) -> ClassStatistics:
        """Classes, by the mean of the concept's ``mean_n`` best values in each."""
        targets = self.targets()
        values = [self.references(question, layer, mean_n, int(target)).value for target in targets]
        means = np.array([value[:, column(value.shape[1])].mean() for value in values])
        order = np.lexsort((targets, -means))
        return ClassStatistics(targets[order], means[order])

    def content(self, question: Question, layer: str) -> object:
        """The best samples themselves."""
        return self.references(question, layer, None)

    def targets(self) -> np.ndarray:
        """Classes that the folder holds statistics of, as int64, in the order of the file."""
        file = self.folder / "targets.npy"
        try:
            targets: np.ndarray = np.load(file, allow_pickle=False).astype(np.int64)
        except FileNotFoundError:
            raise self._missing(str(file)) from None
        return targets

    def _missing(self, file: str) -> TableNotFoundError:
        return TableNotFoundError(
            f"no results in {str(self.folder.parent)!r}: neither a table nor zennit-crp's files, {file}... "
            "Mine them first, with FeatureVisualization.run"
        )


def open_answers(folder: str | Path) -> Answers:
    """Table that answers for a result folder, or else the files in this folder."""
    return TableAnswers(table) if (table := _table_at(folder)) is not None else _FolderAnswers(Path(folder))


def load_maximization(path_folder: str | Path, layer_name: str, sample_size: int | None = None) -> Arrays:
    """Best samples of every concept of a layer.

    Parameters
    ----------
    path_folder : str or Path
        Such as ``FeatureVisualization(...).RelMax.PATH``, or ``"results/ActMax_sum_unnormed"``.
    layer_name : str
    sample_size : int, optional
        Samples per concept, at most. By default all that files of zennit-crp hold; of a table as many as the
        ``SAMPLE_SIZE`` with which it was mined, 40 unless it was changed.

    Returns
    -------
    sample : ndarray of shape (samples, concepts)
        Dataset index, best first (int64).
    value : ndarray of shape (samples, concepts)
        Relevance or activation, or its share.
    position : ndarray of shape (samples, concepts)
        Where the concept's maximum is, in the flattened space.

    Raises
    ------
    FileNotFoundError
        If there are no results.
    KeyError
        If the table has no such layer.
    """
    return _load(as_path("path_folder", path_folder), layer_name, sample_size, None)


def load_statistics(path_folder: str | Path, layer_name: str, target: Any, sample_size: int | None = None) -> Arrays:
    """Best samples of every concept of a layer among those of one class.

    Parameters
    ----------
    path_folder : str or Path
        Such as ``FeatureVisualization(...).RelStats.PATH``.
    layer_name : str
    target : int
        One of `load_stat_targets`.
    sample_size : int, optional
        As in `load_maximization`.

    Returns
    -------
    sample, value, position : ndarrays of shape (samples, concepts)
        As `load_maximization`, with the same errors.
    """
    (of_class,) = as_ids([int(target) if isinstance(target, str) and target.isdigit() else target], what="target")
    return _load(as_path("path_folder", path_folder), layer_name, sample_size, of_class)


def load_stat_targets(path_folder: str | Path) -> np.ndarray[Any, Any]:
    """Classes that were mined (int64); of a folder such as ``FeatureVisualization(...).RelStats.PATH``.

    Raises
    ------
    FileNotFoundError
        If there are no results.
    """
    table = _table_at(path_folder)
    return _FolderAnswers(Path(path_folder)).targets() if table is None else list_targets(table)


def load_receptive_field(path_folder: str | Path, layer_name: str) -> np.ndarray[Any, Any]:
    """Array ``<layer>.npy`` of a folder of receptive fields, memory-mapped."""
    file = as_path("path_folder", path_folder) / f"{file_name(layer_name)}.npy"
    array: np.ndarray[Any, Any] = np.load(file, mmap_mode="r", allow_pickle=False)
    return array


def find_files(path: str | Path | None = None) -> tuple[list[str], list[str], list[str], list[str], list[str]]:
    """Result folders in ``path`` (the working directory by default).

    Where there is a table, those of the settings with which it was mined come first, and then the others that
    `load_maximization` and `load_statistics` read from it.

    Returns
    -------
    r_max, a_max, r_stats, a_stats, rf : lists of str
        Paths whose names contain ``RelMax``, ``ActMax``, ``RelStats``, ``ActStats`` and ``ReField``.
    """
    path = Path.cwd() if path is None else as_path("path", path)
    names = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
    if Table.exists(path):
        table = Table.open(path)
        names += [
            folder_name(Question(mode, kind, normed, per_class))
            for mode in table.modes
            for kind in table.kinds
            for per_class in (False, True)
            for normed in (True, False)
        ]
    r_max, a_max, r_stats, a_stats, rf = (
        [str(path / name) for name in dict.fromkeys(names) if kind in name]
        for kind in ("RelMax", "ActMax", "RelStats", "ActStats", "ReField")
    )
    return r_max, a_max, r_stats, a_stats, rf


def _table_at(folder: str | Path) -> Table | None:
    folder = as_path("path_folder", folder)
    return Table.open(folder.parent) if question_of(folder.name) and Table.exists(folder.parent) else None


def _load(folder: Path, layer: str, size: int | None, target: int | None) -> Arrays:
    if size is not None:
        check_number("sample_size", size, 1, whole=True)
    answers, question = open_answers(folder), question_of(folder.name)
    if isinstance(answers, TableAnswers) and question is not None:
        return answers.references(question, layer, _read_size(folder) if size is None else size, target)[:3]
    return _FolderAnswers(folder).references(question or Question(), layer, size, target)[:3]
