"""More questions to a mined table: concepts of a class or of samples, histograms, what goes together, and data frames.

All of them read the table block by block. With ``mode="activation"`` a sample counts once, whatever its targets.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from crp.checks import check_choice, check_number
from crp.errors import InputError, InputTypeError
from crp.flags import check_flags
from crp.kinds import as_path
from crp.visualization.table.manifest import Array, Block
from crp.visualization.table.ranking import list_targets, once_per_sample
from crp.visualization.table.store import Table
from crp.wording import first_few, shortened


class Concepts(NamedTuple):
    """Concepts, best first.

    Attributes
    ----------
    concept : array of shape (concepts,)
        Ids (int64).
    value : array of shape (concepts,)
        Mean over the rows (float64).
    """

    concept: Array
    value: Array


class Histogram(NamedTuple):
    """How often a concept's values fall between edges.

    Attributes
    ----------
    height : array of shape (bins,)
        Number of rows (int64); or their density (float64), which integrates to 1.
    edges : array of shape (bins + 1,)
        Ascending; each bin holds its lower edge, and the last one its upper edge too.
    """

    height: Array
    edges: Array


class RowSelection(NamedTuple):
    """Which rows and values of a table are meant.

    Attributes
    ----------
    layer : str
    mode : {"relevance", "activation"}
    target : {"sum", "max"}
        Sum over a concept's positions, or the largest value among them.
    normed : bool
        Divide by the sum over all concepts of the row's absolute values.
    of_class : int, optional
        Only rows of this target.
    samples : sequence of int, optional
        Only rows of these samples.
    """

    layer: str
    mode: str = "relevance"
    target: str = "sum"
    normed: bool = True
    of_class: int | None = None
    samples: Sequence[int] | None = None

    def blocks(self, table: Table | str | Path, concepts: int | Sequence[int] | None = None) -> Iterator[Block]:
        """The values; a `ValueError` if there are none."""
        table = Table.open(table)
        layer, mode, target, normed, of_class, samples = self
        found = table.blocks(layer, mode, target, normed, concepts=concepts, of_class=of_class, samples=samples)
        empty = True
        for block in once_per_sample(found) if mode == "activation" else found:
            empty = False
            yield block
        if empty:
            of = "" if of_class is None else f" of class {of_class}"
            of += "" if samples is None else " among the samples that are named"
            classes = first_few(list(map(str, list_targets(table).tolist())), 20)
            raise InputError(f"the table in {table.path} has no rows{of}; its classes are {classes or 'none'}")

    def read(self, table: Table | str | Path) -> tuple[Array, Array]:
        """All the values at once, (rows, concepts) in float64, and the sample of each row."""
        blocks = list(self.blocks(table))
        values = np.concatenate([block.value for block in blocks]).astype(np.float64)
        return values, np.concatenate([block.sample for block in blocks])


def _blocks(rows: object, table: Table | str | Path, concepts: int | Sequence[int] | None = None) -> Iterator[Block]:
    if not isinstance(rows, RowSelection):
        raise InputTypeError(f"rows must be a RowSelection, such as RowSelection('conv'), not {shortened(rows)}")
    return rows.blocks(table, concepts)


def top_concepts(table: Table | str | Path, rows: RowSelection, k: int = 10) -> Concepts:
    """Concepts with the largest mean value over some rows, such as those of a class or of a sample.

    Parameters
    ----------
    table : Table, or its folder
    rows : RowSelection
    k : int
        How many, at most.

    Returns
    -------
    Concepts
        Of equal values, the smaller id comes first.
    """
    check_number("k", k, 1, whole=True)
    total: Any = 0.0
    n = 0
    for block in _blocks(rows, table):
        total = total + block.value.sum(axis=0, dtype=np.float64)
        n += len(block.value)
    mean = total / n
    best = np.argsort(-mean, kind="stable")[:k]
    return Concepts(best, mean[best])


def histogram(
    table: Table | str | Path, rows: RowSelection, concept: int, bins: int | Sequence[float] = 50, density: bool = False
) -> Histogram:
    """How a concept's values are distributed.

    Parameters
    ----------
    table : Table, or its folder
    rows : RowSelection
    concept : int
    bins : int or sequence of float
        How many between the least and the largest value, or their edges, beyond which values are not counted.
    density : bool
        Whether to divide by the number of values counted and the width of the bins.
    """
    check_flags(density=density)
    if not isinstance(bins, Sequence | np.ndarray):
        check_number("bins", bins, 1, whole=True)
        ends = [(block.value.min(), block.value.max()) for block in _blocks(rows, table, [concept])]
        extent = float(min(low for low, _ in ends)), float(max(high for _, high in ends))
        edges = np.histogram_bin_edges(np.array(extent), bins)
    else:
        edges = np.asarray(bins, np.float64)
        if edges.ndim != 1 or len(edges) < 2 or not (np.diff(edges) > 0).all():
            raise InputError(f"bins must be a number, or edges in ascending order, not {shortened(bins)}")
    count = sum(np.histogram(block.value, edges)[0] for block in _blocks(rows, table, [concept]))
    if not density:
        return Histogram(np.asarray(count, np.int64), edges)
    if not np.any(count):
        raise InputError(f"no value of concept {concept} is between {edges[0]} and {edges[-1]}: there is no density")
    return Histogram(count / (np.sum(count) * np.diff(edges)), edges)


def similarity(
    table: Table | str | Path, rows: RowSelection, kind: Literal["cosine", "correlation"] = "cosine"
) -> Array:
    """How much alike concepts are in their values over all rows.

    Parameters
    ----------
    table : Table, or its folder
    rows : RowSelection
    kind : {"cosine", "correlation"}
        Cosine of the angle between the columns of two concepts, as they are or less their means.

    Returns
    -------
    array of shape (concepts, concepts), float64
        Symmetric; 0 for a concept that never varies from zero (from its mean).
    """
    check_choice("kind", kind, Literal["cosine", "correlation"])
    values = (block.value.astype(np.float64) for block in _blocks(rows, table))
    return cosines(((value, value) for value in values), kind == "correlation")


def cosines(pairs: Iterable[tuple[Array, Array]], centred: bool) -> Array:
    """Cosine of each column on the left with each on the right, whose rows come some at a time.

    Parameters
    ----------
    pairs : iterable of (array of shape (rows, left), array of shape (rows, right)), float64
    centred : bool
        Whether of the columns less their means: their correlation.

    Returns
    -------
    array of shape (left, right), float64
        0 where a column never varies from zero (from its mean, by more than float32 can tell).
    """
    check_flags(centred=centred)
    shifts: list[Any] = []
    sums: list[Any] = [0.0] * 5
    n = 0
    for pair in pairs:  # (less the first means, so that little cancels below)
        shifts = shifts or [side.mean(axis=0) if centred else np.zeros(1) for side in pair]
        left = pair[0] - shifts[0]
        right = left if pair[1] is pair[0] else pair[1] - shifts[1]  # (one array times itself is exactly symmetric)
        parts = left.sum(0), right.sum(0), (left**2).sum(0), (right**2).sum(0), left.T @ right
        sums, n = [total + part for total, part in zip(sums, parts, strict=True)], n + len(left)
    *ends, product = sums
    if centred:
        product = product - np.outer(ends[0], ends[1]) / n
        ends[2:] = (square - total**2 / n for total, square in zip(ends[:2], ends[2:], strict=True))
    spread = [np.where(one > n * (1e-7 * at) ** 2, one, 0.0) for one, at in zip(ends[2:], shifts, strict=True)]
    scale = np.outer(*map(np.sqrt, spread))
    cosine: Array = np.divide(product, scale, out=np.zeros_like(product), where=scale > 0)
    return cosine.clip(-1, 1)


def co_occurrence(table: Table | str | Path, rows: RowSelection, k: int = 10) -> Array:
    """In how many rows two concepts are both among the ``k`` largest.

    Parameters
    ----------
    table : Table, or its folder
    rows : RowSelection
    k : int
        Of equal values, the smaller id counts as larger.

    Returns
    -------
    array of shape (concepts, concepts), int64
        The diagonal says how often each is among them.
    """
    check_number("k", k, 1, whole=True)
    counts: Any = 0
    for block in _blocks(rows, table):
        best = np.argsort(-block.value, axis=1, kind="stable")[:, :k]
        among = np.zeros(block.value.shape, np.float64)
        np.put_along_axis(among, best, 1.0, axis=1)
        counts = counts + among.T @ among
    return np.asarray(counts).astype(np.int64)


def frames(table: Table | str | Path, rows: RowSelection, concepts: int | Sequence[int] | None = None) -> Iterator[Any]:
    """Values as data frames of pandas, some rows at a time, with columns ``sample``, ``target`` and one per concept."""
    import pandas

    table = Table.open(table)
    blocks = _blocks(rows, table, concepts)
    ids = table.concept_ids(rows.layer, range(table.n_concepts(rows.layer)) if concepts is None else concepts)
    for block in blocks:
        head = pandas.DataFrame({"sample": block.sample, "target": block.target})
        yield head.join(pandas.DataFrame(block.value, columns=[str(i) for i in ids]))


def write_frame(
    table: Table | str | Path, rows: RowSelection, path: str | Path, concepts: int | Sequence[int] | None = None
) -> Path:
    """Write values as one file of CSV or parquet, without holding them all; see `frames`.

    Parameters
    ----------
    table : Table, or its folder
    rows : RowSelection
    path : str or Path
        It ends in ``.csv`` or ``.parquet``; for the latter, pyarrow is needed beside pandas.
    concepts : int or sequence of int, optional
        All by default.
    """
    path = as_path("path", path)
    if path.suffix not in (".csv", ".parquet"):
        raise InputError(f"the file must end in .csv or .parquet, not {path.name!r}")
    parts = frames(table, rows, concepts)
    parts = chain([next(parts)], parts)  # (an error for no rows comes before the file is opened)
    if path.suffix == ".parquet":
        _write_parquet(path, parts)
        return path
    with path.open("w", newline="") as file:
        for i, frame in enumerate(parts):
            frame.to_csv(file, index=False, header=i == 0)
    return path


def _write_parquet(path: Path, parts: Iterable[Any]) -> None:
    from pyarrow import Table as Arrow
    from pyarrow.parquet import ParquetWriter

    writer = None
    try:
        for frame in parts:
            arrow = Arrow.from_pandas(frame, preserve_index=False)
            writer = writer or ParquetWriter(path, arrow.schema)
            writer.write_table(arrow)
    finally:
        if writer is not None:
            writer.close()
