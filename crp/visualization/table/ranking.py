"""Questions to a mined table: best samples of a concept, classes of a concept, concepts of a class.

All of them read the table block by block. The order is total (value, then sample, then target), so that it depends
neither on batches nor on shards.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from crp.checks import check_number
from crp.errors import NameNotFoundError
from crp.flags import check_flags
from crp.visualization.table.columns import _class_number, sample_numbers
from crp.visualization.table.files import check_file, make_own_folder, write_atomic
from crp.visualization.table.manifest import Array, Block, TableCorruptError
from crp.visualization.table.store import Table


class ReferenceSamples(NamedTuple):
    """Best samples of every concept, best first.

    Attributes
    ----------
    sample : array of shape (references, concepts)
        Dataset index (int64).
    value : array of shape (references, concepts)
        Relevance or activation.
    position : array of shape (references, concepts)
        Index of the concept's maximum in the flattened space (int64).
    target : array of shape (references, concepts)
        Target that the relevance belongs to (int64).
    """

    sample: Array
    value: Array
    position: Array
    target: Array


class ClassStatistics(NamedTuple):
    """Classes of a concept, best first.

    Attributes
    ----------
    targets : array of shape (classes,)
        Class (int64).
    value : array of shape (classes,)
        Mean of the concept's best values on samples of the class.
    """

    targets: Array
    value: Array


class ClassMeans(NamedTuple):
    """Mean value of every concept on the rows of every class.

    Attributes
    ----------
    targets : array of shape (classes,)
        Class (int64), ascending.
    value : array of shape (classes, concepts)
        Of normed relevances, this is the share of each concept in the class.
    rows : array of shape (classes,)
        Number of rows of the class (int64).
    """

    targets: Array
    value: Array
    rows: Array


def list_targets(table: Table | str | Path) -> Array:
    """Classes of the table's rows (int64), ascending."""
    targets: Array = np.unique(Table.open(table).rows().target)
    return targets[targets >= 0]


def top_k(
    table: Table | str | Path,
    layer: str,
    mode: str = "relevance",
    target: str = "sum",
    normed: bool = True,
    k: int = 40,
    *,
    of_class: int | None = None,
    samples: Iterable[int] | None = None,
    concepts: int | Sequence[int] | None = None,
    least: bool = False,
    cache: bool = False,
) -> ReferenceSamples:
    """Best samples of every concept of a layer.

    Parameters
    ----------
    table : Table, or its folder
    layer : str
    mode : {"relevance", "activation"}
        For relevance each (sample, target) is a candidate, for activation each sample.
    target : {"sum", "max"}
        Rank by the sum over a concept's positions, or by the largest value among them.
    normed : bool
        Rank by the concept's share in the sum of absolute values of all concepts.
    k : int
        How many.
    of_class : int, optional
        Only samples of this class.
    samples : iterable of int, optional
        Only these samples.
    concepts : int or sequence of int, optional
        All by default.
    least : bool
        The samples of the least values, in place of the largest: those where a concept's relevance is most negative.
    cache : bool
        Keep the answer beside the table, and take it from there as long as the table is the same.

    Returns
    -------
    top : ReferenceSamples
        Arrays of shape (min(k, candidates), concepts). The order is value descending (ascending with ``least``),
        then sample and target ascending.

    Raises
    ------
    KeyError
        If the table has no such layer or class; the message names those it has.
    ValueError, IndexError
        If the mode, the kind or a concept was not mined, there is no such sample, or ``k`` is below 1.
    """
    check_flags(normed=normed, least=least, cache=cache)
    check_number("k", k, 1, whole=True)
    table = Table.open(table)
    if (of_class := _class_number(of_class)) is not None:
        _check_class(table, of_class)
    chosen = None if samples is None else sample_numbers(samples, table.n_samples).tolist()
    if cache and concepts is not None:  # kept for all concepts at once
        ids = table.concept_ids(layer, concepts)
        every = top_k(table, layer, mode, target, normed, k, of_class=of_class, samples=chosen, least=least, cache=True)
        return ReferenceSamples(*(column[:, ids] for column in every))
    some = None if concepts is None else table.concept_ids(layer, concepts).tolist()

    def compute() -> tuple[Array, ...]:
        best: ReferenceSamples | None = None
        blocks = table.blocks(layer, mode, target, normed, concepts=some, of_class=of_class, samples=chosen)
        for block in once_per_sample(blocks) if mode == "activation" else blocks:
            block = block._replace(value=-block.value) if least else block
            found = _better_of_block(block, best, k) if best is not None and len(best.value) == k else None
            best = _merge(best, _best_of_block(block, k) if found is None else found, k)
        if best is None:
            width = table.n_concepts(layer) if some is None else np.size(some)
            ids = np.zeros((0, width), np.int64)
            return ReferenceSamples(ids, ids.astype(np.float32), ids, ids)
        return best._replace(value=-best.value) if least else best

    query = ["bottom_k" if least else "top_k", layer, mode, target, normed, k, of_class, chosen, some]
    return ReferenceSamples(*_cached(table, query, compute, cache))


def class_statistics(
    table: Table | str | Path,
    layer: str,
    concept: int,
    mode: str = "relevance",
    target: str = "sum",
    normed: bool = True,
    *,
    mean_n: int = 10,
    cache: bool = False,
) -> ClassStatistics:
    """Classes for which a concept is most relevant, or that activate it most.

    Parameters
    ----------
    table : Table, or its folder
    layer : str
    concept : int
    mode, target, normed, cache
        As for `top_k`.
    mean_n : int
        How many of a class's best values are averaged; all, if it has fewer.

    Returns
    -------
    ClassStatistics
        All classes, by descending value; of equal ones the smaller class first.
    """
    check_flags(normed=normed, cache=cache)
    check_number("mean_n", mean_n, 1, whole=True)
    table = Table.open(table)
    (index,) = table.concept_ids(layer, [concept])
    width = table.n_concepts(layer) if cache else 1
    blocks = table.blocks(layer, mode, target, normed, concepts=None if cache else index)

    def compute() -> tuple[Array, ...]:
        best: dict[int, Array] = {}
        dtype = np.dtype(np.float32)
        for block in blocks:
            dtype = block.value.dtype
            for label, value in _by_class(block):
                joined = np.concatenate([best[label], value]) if label in best else value
                best[label] = np.partition(joined, -mean_n, axis=0)[-mean_n:] if len(joined) > mean_n else joined
        targets = sorted(best)
        # Sorted, and concept by concept, so that the sum depends neither on shards nor on the other concepts.
        ordered = [np.sort(np.ascontiguousarray(best[label].T), axis=1) for label in targets]
        means = [value.mean(axis=1, dtype=np.float64).astype(dtype) for value in ordered]
        return np.array(targets, np.int64), np.array(means, dtype).reshape(len(targets), width)

    query = ["class_statistics", layer, mode, target, normed, mean_n]  # cached for all concepts at once
    targets, value = _cached(table, query, compute, cache)
    value = value[:, index if cache else 0]
    order = np.argsort(-value, kind="stable")
    return ClassStatistics(targets[order], value[order])


def class_means(
    table: Table | str | Path,
    layer: str,
    mode: str = "relevance",
    target: str = "sum",
    normed: bool = True,
    *,
    cache: bool = False,
) -> ClassMeans:
    """Mean of every concept over all rows of each class; for normed relevances, its share in the class's relevance.

    Parameters
    ----------
    table, layer, mode, target, normed, cache
        As for `top_k`.
    """
    check_flags(normed=normed, cache=cache)
    table = Table.open(table)
    blocks = table.blocks(layer, mode, target, normed)

    def compute() -> tuple[Array, ...]:
        total: dict[int, Array] = {}
        count: dict[int, int] = {}
        dtype = np.dtype(np.float32)
        for block in blocks:
            dtype = block.value.dtype
            for label, value in _by_class(block):
                total[label] = total.get(label, 0.0) + value.sum(axis=0, dtype=np.float64)
                count[label] = count.get(label, 0) + len(value)
        targets = sorted(total)
        means = [(total[label] / count[label]).astype(dtype) for label in targets]
        value = np.array(means, dtype).reshape(len(targets), table.n_concepts(layer))
        return np.array(targets, np.int64), value, np.array([count[label] for label in targets], np.int64)

    return ClassMeans(*_cached(table, ["class_means", layer, mode, target, normed], compute, cache))


def _check_class(table: Table, of_class: int) -> None:
    targets = list_targets(table)
    if of_class not in targets:
        near = targets[np.argsort(np.abs(targets - of_class), kind="stable")[:5]]
        raise NameNotFoundError(
            f"no row of the table in {table.path} has target {of_class}; it has {len(targets)} targets, nearest: "
            f"{', '.join(map(str, np.sort(near)))}"
        )


def once_per_sample(blocks: Iterator[Block]) -> Iterator[Block]:
    """Keep one row of each sample: its activation is the same for all of its targets."""
    last = -1
    for block in blocks:
        first = np.diff(block.sample, prepend=last) != 0
        last = int(block.sample[-1])
        yield Block(*(column[first] for column in block))


def _best_of_block(block: Block, k: int) -> ReferenceSamples:
    """Best rows of every concept; of rows with equal values, the first ones."""
    n = len(block.value)
    if n <= k:
        row = np.broadcast_to(np.arange(n)[:, None], block.value.shape)
    else:
        least = np.partition(block.value, n - k, axis=0)[n - k]
        above, equal = block.value > least, block.value == least
        keep = above | (equal & (np.cumsum(equal, axis=0) <= k - above.sum(axis=0)))
        row = np.nonzero(keep.T)[1].reshape(-1, k).T
    take = np.take_along_axis
    return ReferenceSamples(
        block.sample[row], take(block.value, row, 0), take(block.position, row, 0), block.target[row]
    )


def _better_of_block(block: Block, best: ReferenceSamples, k: int) -> ReferenceSamples | None:
    """Rows that rank before the last of ``best``; columns with fewer are filled up. None if there are many.

    Most blocks have few, and no sorting is needed to find them.
    """
    last = ReferenceSamples(*(column[-1] for column in best))
    better, equal = block.value > last.value, block.value == last.value
    if equal.any():
        sample, target = block.sample[:, None], block.target[:, None]
        better |= equal & ((sample < last.sample) | ((sample == last.sample) & (target < last.target)))
    counts = np.count_nonzero(better, axis=0)
    if counts.max(initial=0) > 2 * k:
        return None
    concept, row = np.nonzero(better.T)
    place = np.arange(len(row)) - (np.cumsum(counts) - counts)[concept]
    size, ends = (int(counts.max(initial=0)), len(counts)), np.iinfo(np.int64).max
    new = ReferenceSamples(
        np.full(size, ends), np.full(size, -np.inf, block.value.dtype), np.zeros(size, np.int64), np.full(size, ends)
    )
    columns = block.sample[row], block.value[row, concept], block.position[row, concept], block.target[row]
    for filled, column in zip(new, columns, strict=True):
        filled[place, concept] = column
    return new


def _merge(best: ReferenceSamples | None, new: ReferenceSamples, k: int) -> ReferenceSamples:
    if best is not None:
        new = ReferenceSamples(*(np.concatenate(pair) for pair in zip(best, new, strict=True)))
    order = np.lexsort((new.target, new.sample, -new.value), axis=0)[:k]
    return ReferenceSamples(*(np.take_along_axis(column, order, 0) for column in new))


def _by_class(block: Block) -> Iterator[tuple[int, Array]]:
    order = np.argsort(block.target, kind="stable")
    targets, begin = np.unique(block.target[order], return_index=True)
    value = block.value[order]
    for label, rows in zip(targets.tolist(), np.split(value, begin[1:]), strict=True):
        if label >= 0:
            yield label, rows


def _cached(table: Table, query: object, compute: Callable[[], tuple[Array, ...]], cache: bool) -> tuple[Array, ...]:
    """Answer of a query from the table's derived files, or computed.

    A file is named after the table's content and the query, and holds a hash of itself, so that a stale or damaged one
    is not used.
    """
    if not cache:
        return compute()
    asked = json.dumps([table.digest, query], default=int)  # (numbers may be numpy's, such as those of list_targets)
    key = hashlib.sha256(asked.encode()).hexdigest()[:32]
    path = table.path / "derived" / f"{key}.safetensors"
    unusable = (OSError, SafetensorError, KeyError, TypeError, ValueError)
    with contextlib.suppress(*unusable):
        check_file(path)
        with safe_open(path, framework="numpy") as file:
            answer = tuple(file.get_tensor(str(i)) for i in range(len(file.keys())))
            if file.metadata()["sha256"] == _hash(answer):
                return answer
    answer = tuple(np.ascontiguousarray(array) for array in compute())
    content = save({str(i): array for i, array in enumerate(answer)}, metadata={"sha256": _hash(answer)})
    # A folder that cannot be written, or holds a link in place of its own, can still be read.
    with contextlib.suppress(OSError, TableCorruptError):
        make_own_folder(path.parent)
        write_atomic(path, content)
    return answer


def _hash(arrays: Iterable[Array]) -> str:
    result = hashlib.sha256()
    for array in arrays:
        result.update(f"{array.dtype} {array.shape}".encode())
        result.update(np.ascontiguousarray(array).data)
    return result.hexdigest()
