"""Our table written as zennit-crp's result folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from crp.compat import folders
from crp.compat.accumulators import Maximization, Statistics
from crp.compat.folders import SAMPLE_SIZE
from crp.errors import InputError
from crp.flags import check_flags
from crp.visualization.table.ranking import top_k
from crp.visualization.table.store import Table


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
    check_flags(abs_norm=abs_norm)
    table = Table.open(path)
    known: dict[str, str] = {}
    for layer in table.layers:
        twin = known.setdefault(folders.file_name(layer).casefold(), layer)
        if twin != layer:
            raise InputError(f"layers {twin!r} and {layer!r} differ in case only, and cannot be files side by side")
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
