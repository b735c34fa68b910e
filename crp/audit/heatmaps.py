"""Small heatmaps of the samples of a class, kept beside a mined table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch.nn import functional as F
from zennit.core import Composite

from crp.checks import check_number
from crp.errors import InputError
from crp.visualization.analysis import RowSelection
from crp.visualization.feature import FeatureVisualization, table_of
from crp.visualization.table.derived import keep_result, read_kept
from crp.visualization.table.store import Table

#: Largest value of a heatmap as it is kept; a power of two with room below the largest float16.
_LARGEST = 1 << 14


def keep_heatmaps(
    fv: FeatureVisualization, composite: Composite | None, of_class: int, *, size: int = 16, batch_size: int = 32
) -> Path:
    """Compute the heatmaps of a class's samples, make them small and keep them beside the table, for `clusters`.

    Parameters
    ----------
    fv : FeatureVisualization
        After a run.
    composite : zennit Composite, or None for the plain gradient
        With which heatmaps are computed.
    of_class : int
        Heatmaps are of this class, and of the samples that have rows of it.
    size : int
        Rows and columns of what is kept: relevance is averaged over the pixels of each cell. Smaller heatmaps stay as
        they are.
    batch_size : int

    Returns
    -------
    Path
        The file: numbers in float16 with a scale for each sample, so that none is off by more than 1/2048 of itself,
        or of the 2**28th part of the largest.

    Raises
    ------
    ValueError
        If the class has no rows, or heatmaps have not two axes of space.
    """
    check_number("size", size, 1, whole=True)
    check_number("batch_size", batch_size, 1, whole=True)
    table = table_of(fv)
    layer = table.layers[0]
    blocks = RowSelection(layer, table.modes[0], table.kinds[0], of_class=of_class).blocks(table, 0)
    samples = np.unique(np.concatenate([block.sample for block in blocks]))
    name, parts = fv.attribution.MODEL_OUTPUT_NAME, []
    for begin in range(0, len(samples), batch_size):
        data = fv.get_data_concurrently(samples[begin : begin + batch_size], True)[0].detach()
        heatmap = fv.attribution(data, [{name: of_class}], composite).heatmap.detach().cpu().double()
        if heatmap.dim() != 3:
            raise InputError(f"heatmaps have shape {tuple(heatmap.shape[1:])}; only those of pictures are made small")
        shape = min(size, heatmap.shape[1]), min(size, heatmap.shape[2])
        parts.append(F.adaptive_avg_pool2d(heatmap[:, None], shape)[:, 0].numpy())
    if not np.isfinite(values := np.concatenate(parts)).all():
        raise InputError(f"heatmaps of class {of_class} have NaN or infinite values")
    largest = np.abs(values).max((1, 2))
    # (a power of two changes no digit)
    scale = np.exp2(np.ceil(np.log2(np.where(largest > 0, largest, 1))) - np.log2(_LARGEST))
    arrays = {"sample": samples, "heatmap": (values / scale[:, None, None]).astype(np.float16), "scale": scale}
    return keep_result(table, "heatmaps", layer, arrays, {"size": size, "composite": repr(composite)}, of_class)


def kept_heatmaps(table: Table | str | Path, of_class: int) -> tuple[np.ndarray, np.ndarray]:
    """What `keep_heatmaps` has kept of a class.

    Returns
    -------
    sample : ndarray of shape (samples,), int64
    heatmap : ndarray of shape (samples, rows, columns), float64

    Raises
    ------
    TableNotFoundError, TableMismatchError, TableCorruptError
        If there is nothing, or the table has changed since, or the file is damaged.
    """
    table = Table.open(table)
    arrays = read_kept(table, "heatmaps", table.layers[0], of_class).arrays
    return arrays["sample"], arrays["heatmap"].astype(np.float64) * arrays["scale"][:, None, None]
