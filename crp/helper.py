"""Helpers under the module name of zennit-crp: layers of a model, norms, and reading results.

The ``load_...`` functions take the path of a result folder, such as ``FeatureVisualization(...).RelMax.PATH``. They
read the table that `FeatureVisualization.run` mined, and folders that zennit-crp wrote.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crp.compat import folders
from crp.compat.results import export, list_folders, read_references, read_targets
from crp.image import max_norm as max_norm
from crp.layers import get_layer_names, get_output_shapes

__all__ = [
    "abs_norm",
    "export",
    "find_files",
    "get_layer_names",
    "get_output_shapes",
    "load_maximization",
    "load_receptive_field",
    "load_stat_targets",
    "load_statistics",
    "max_norm",
]

Arrays = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]


def abs_norm(rel: Tensor, stabilize: float = 1e-10) -> Tensor:
    """Divide by the sum of the absolute values; zeros stay zeros, in every dtype.

    Parameters
    ----------
    rel : Tensor
    stabilize : float
        Added to the sum.

    Returns
    -------
    Tensor of the same shape

    Examples
    --------
    >>> abs_norm(torch.tensor([3.0, -1.0]))
    tensor([ 0.7500, -0.2500])
    """
    return rel / (rel.abs().sum() + _at_least_tiny(stabilize, rel))


def load_maximization(path_folder: str | Path, layer_name: str, sample_size: int | None = None) -> Arrays:
    """Best samples of every concept of a layer.

    Parameters
    ----------
    path_folder : str or Path
        Such as ``FeatureVisualization(...).RelMax.PATH``, or ``"results/ActMax_sum_unnormed"``.
    layer_name : str
    sample_size : int, optional
        Samples per concept, at most. By default 40 of a table, and all that files of zennit-crp hold.

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
    return read_references(path_folder, layer_name, sample_size)[:3]


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
    return read_references(path_folder, layer_name, sample_size, int(target))[:3]


def load_stat_targets(path_folder: str | Path) -> np.ndarray[Any, Any]:
    """Classes that were mined (int64).

    Parameters
    ----------
    path_folder : str or Path
        Such as ``FeatureVisualization(...).RelStats.PATH``.

    Raises
    ------
    FileNotFoundError
        If there are no results.
    """
    return read_targets(path_folder)


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
    kinds = ("RelMax", "ActMax", "RelStats", "ActStats", "ReField")
    found: dict[str, list[str]] = {kind: [] for kind in kinds}
    for folder in list_folders(Path.cwd() if path is None else path):
        for kind in kinds:
            if kind in folder.name:
                found[kind].append(str(folder))
                break
    r_max, a_max, r_stats, a_stats, rf = found.values()
    return r_max, a_max, r_stats, a_stats, rf


def _at_least_tiny(stabilize: float, rel: Tensor) -> float:
    """Stabilizer that does not vanish in the dtype of ``rel``."""
    return max(stabilize, torch.finfo(rel.dtype).tiny)
