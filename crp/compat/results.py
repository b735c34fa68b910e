"""Best samples of every concept, by the name of a result folder: from our table, or from files that zennit-crp wrote.

``<path>/RelMax_sum_normed`` names a query (mode, sum or maximum, shares or values) on what lies in ``<path>``. Where
that is a table, the folder itself need not exist.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from crp.compat import folders
from crp.compat.accumulators import SAMPLE_SIZE, Maximization, Statistics
from crp.compat.folders import FolderName
from crp.visualization.table.manifest import TableNotFoundError
from crp.visualization.table.ranking import References, class_statistics, list_targets, top_k
from crp.visualization.table.store import Table


def table_of(folder: str | Path) -> tuple[Table, FolderName] | None:
    """Table that a result folder's name asks for, and how; None if there is none."""
    folder = Path(folder)
    name = FolderName.parse(folder.name)
    return (Table.open(folder.parent), name) if name is not None and Table.exists(folder.parent) else None


def read_references(
    folder: str | Path, layer: str, size: int | None = None, target: int | None = None, *, cache: bool = True
) -> References:
    """Best samples of every concept of a layer.

    Parameters
    ----------
    folder : str or Path
        Such as ``FeatureVisualization(...).RelMax.PATH``; for a ``target``, such as ``RelStats.PATH``.
    layer : str
    size : int, optional
        Samples per concept, at most. By default 40 of a table, and all that files of zennit-crp hold.
    target : int, optional
        Only samples of this class.
    cache : bool
        Whether the answer of a table is kept beside it.

    Returns
    -------
    named tuple
        Arrays ``sample, value, position, target`` of shape (samples, concepts); the target is -1 where it is not known.

    Raises
    ------
    FileNotFoundError
        If there are no results.
    KeyError
        If the table has no such layer or class.
    """
    folder = Path(folder)
    found = table_of(folder)
    if found is not None:
        table, name = found
        size = SAMPLE_SIZE if size is None else size
        return top_k(table, layer, name.mode, name.max_target, name.abs_norm, size, of_class=target, cache=cache)
    prefix = folders.max_prefix(folder, layer) if target is None else folders.stats_prefix(folder, layer, target)
    try:
        top = folders.read_top(prefix)
    except FileNotFoundError:
        raise TableNotFoundError(_missing(folder, prefix)) from None
    sample, value, position = (array[:size] for array in top)
    return References(sample, value, position, np.broadcast_to(np.int64(-1), sample.shape))


def read_targets(folder: str | Path) -> np.ndarray:
    """Classes that a result folder holds statistics of, as int64."""
    found = table_of(folder)
    if found is not None:
        return list_targets(found[0])
    try:
        return folders.read_targets(Path(folder))
    except FileNotFoundError:
        raise TableNotFoundError(_missing(Path(folder), str(Path(folder) / "targets.npy"))) from None


def read_class_statistics(
    folder: str | Path, layer: str, column: Callable[[int], int], mean_n: int
) -> tuple[np.ndarray, np.ndarray]:
    """Classes, and the mean of a concept's ``mean_n`` best values in each, best class first.

    Parameters
    ----------
    folder : str or Path
        Such as ``RelStats.PATH``.
    layer : str
    column : callable
        Column of the concept, given the number of concepts.
    mean_n : int

    Returns
    -------
    targets, means : ndarrays of shape (classes,)
    """
    found = table_of(folder)
    if found is not None:
        table, name = found
        index = column(table.n_concepts(layer))
        return class_statistics(
            table, layer, index, name.mode, name.max_target, name.abs_norm, mean_n=mean_n, cache=True
        )
    targets = read_targets(folder)
    values = [read_references(folder, layer, mean_n, int(target)).value for target in targets]
    means = np.array([value[:, column(value.shape[1])].mean() for value in values])
    order = np.lexsort((targets, -means))
    return targets[order], means[order]


def list_folders(path: str | Path) -> list[Path]:
    """Result folders in ``path``: those that exist, and those that a table answers for."""
    path = Path(path)
    names = {entry.name for entry in path.iterdir() if entry.is_dir()}
    if Table.exists(path):
        table = Table.open(path)
        names |= {
            str(FolderName(mode, per_target, kind, abs_norm))
            for mode in table.modes
            for kind in table.kinds
            for per_target in (False, True)
            for abs_norm in (False, True)
        }
    return [path / name for name in sorted(names)]


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


def _tensors(*arrays: np.ndarray) -> list[Tensor]:
    return [torch.from_numpy(np.array(array)) for array in arrays]


def _missing(folder: Path, file: str) -> str:
    return (
        f"no results in {str(folder.parent)!r}: neither a table nor zennit-crp's files, {file}... "
        "Mine them first, with FeatureVisualization.run"
    )
