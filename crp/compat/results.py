"""Best samples of concepts, by the name of a result folder: from our table, or from files that zennit-crp wrote.

The name of ``<path>/RelMax_sum_normed`` is a question to what lies in ``<path>``. Where that is a table, the folder
itself need not exist.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crp.compat import folders
from crp.compat.accumulators import Maximization, Statistics
from crp.compat.folders import SAMPLE_SIZE, folder_name, question_of
from crp.visualization.table.manifest import TableNotFoundError
from crp.visualization.table.question import Answers, Question, TableAnswers
from crp.visualization.table.ranking import ClassStatistics, ReferenceSamples, list_targets, top_k
from crp.visualization.table.store import Table

Arrays = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]


@dataclass(frozen=True)
class FolderAnswers:
    """Answers of one result folder that zennit-crp wrote, whatever it is called."""

    folder: Path
    layers: None = None

    def check(self, **fingerprints: str) -> None:
        """Do nothing: the files do not say what they were made of."""

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
        prefix = (
            folders.max_prefix(folder, layer) if of_class is None else folders.stats_prefix(folder, layer, of_class)
        )
        try:
            sample, value, position = (array[:size] for array in folders.read_top(prefix))
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
    return TableAnswers(table) if (table := _table_at(folder)) is not None else FolderAnswers(Path(folder))


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
    return _load(Path(path_folder), layer_name, sample_size, None)


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
    return _load(Path(path_folder), layer_name, sample_size, int(target))


def load_stat_targets(path_folder: str | Path) -> np.ndarray[Any, Any]:
    """Classes that were mined (int64); of a folder such as ``FeatureVisualization(...).RelStats.PATH``.

    Raises
    ------
    FileNotFoundError
        If there are no results.
    """
    table = _table_at(path_folder)
    return FolderAnswers(Path(path_folder)).targets() if table is None else list_targets(table)


def load_receptive_field(path_folder: str | Path, layer_name: str) -> np.ndarray[Any, Any]:
    """Array ``<layer>.npy`` of a folder of receptive fields, memory-mapped."""
    file = Path(path_folder) / f"{folders.file_name(layer_name)}.npy"
    array: np.ndarray[Any, Any] = np.load(file, mmap_mode="r", allow_pickle=False)
    return array


def find_files(path: str | Path | None = None) -> tuple[list[str], list[str], list[str], list[str], list[str]]:
    """Result folders in ``path`` (the working directory by default).

    Where there is a table, the folders that `load_maximization` and `load_statistics` read from it are listed, too.

    Returns
    -------
    r_max, a_max, r_stats, a_stats, rf : lists of str
        Paths whose names contain ``RelMax``, ``ActMax``, ``RelStats``, ``ActStats`` and ``ReField``.
    """
    path = Path.cwd() if path is None else Path(path)
    names = {entry.name for entry in path.iterdir() if entry.is_dir()}
    if Table.exists(path):
        table = Table.open(path)
        names |= {
            folder_name(Question(mode, kind, normed, per_class))
            for mode in table.modes
            for kind in table.kinds
            for per_class in (False, True)
            for normed in (False, True)
        }
    kinds = ("RelMax", "ActMax", "RelStats", "ActStats", "ReField")
    of_kind: dict[str, list[str]] = {kind: [] for kind in kinds}
    for name in sorted(names):
        if kind := next((kind for kind in kinds if kind in name), None):
            of_kind[kind].append(str(path / name))
    r_max, a_max, r_stats, a_stats, rf = of_kind.values()
    return r_max, a_max, r_stats, a_stats, rf


def export(
    path: str | Path,
    destination: str | Path,
    max_target: str = "sum",
    abs_norm: bool = True,
    sample_size: int = SAMPLE_SIZE,
) -> list[Path]:
    """Write a table as the result folders of zennit-crp, which its `helper.load_maximization` and others read.

    Parameters
    ----------
    path : str or Path
        Folder of the table.
    destination : str or Path
        Folder for ``RelMax_...``, ``ActMax_...``, ``RelStats_...`` and ``ActStats_...``.
    max_target : {"sum", "max"}
    abs_norm : bool
    sample_size : int
        Samples per concept (and class).

    Returns
    -------
    list of Path
        The folders written; modes that were not mined are left out.

    Raises
    ------
    FileNotFoundError
        If there is no table at ``path``.
    ValueError
        If two layers would have the same file name on some file system.
    """
    table = Table.open(path)
    known: dict[str, str] = {}
    for layer in table.layers:
        twin = known.setdefault(folders.file_name(layer).casefold(), layer)
        if twin != layer:
            raise ValueError(f"layers {twin!r} and {layer!r} differ in case only, and cannot be files side by side")
    written = []
    for mode in table.modes:
        best = Maximization(mode, max_target, abs_norm, destination)
        stats = Statistics(mode, max_target, abs_norm, destination)
        best.SAMPLE_SIZE = stats.SAMPLE_SIZE = sample_size
        for layer in table.layers:
            top = top_k(table, layer, mode, max_target, abs_norm, sample_size)
            best.concatenate_with_results(layer, *_tensors(top.sample, top.value, top.position))
            for block in table.blocks(layer, mode, max_target, abs_norm):
                ids = (np.broadcast_to(ids[:, None], block.value.shape) for ids in (block.sample, block.target))
                sample, target = _tensors(*ids)
                value, position = _tensors(block.value, block.position)
                stats.analyze_layer(sample, value, position, target, layer)
        for results in (best, stats):
            results._save_results()
            written.append(results.PATH)
    return written


def _table_at(folder: str | Path) -> Table | None:
    folder = Path(folder)
    return Table.open(folder.parent) if question_of(folder.name) and Table.exists(folder.parent) else None


def _load(folder: Path, layer: str, size: int | None, target: int | None) -> Arrays:
    answers, question = open_answers(folder), question_of(folder.name)
    if isinstance(answers, TableAnswers) and question is not None:
        return answers.references(question, layer, folders.read_size(folder) if size is None else size, target)[:3]
    return FolderAnswers(folder).references(question or Question(), layer, size, target)[:3]


def _tensors(*arrays: np.ndarray) -> list[Tensor]:
    return [torch.from_numpy(np.array(array)) for array in arrays]
