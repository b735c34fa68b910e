"""What a table says about a layer's concepts: shares, references, histograms, what is alike, and who matters where."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from crp.errors import NameNotFoundError
from crp.visualization.analysis import RowSelection, similarity
from crp.visualization.references import once_each
from crp.visualization.table.manifest import Array
from crp.visualization.table.question import Question
from crp.visualization.table.ranking import ClassMeans, ReferenceSamples, class_means, once_per_sample, top_k
from crp.visualization.table.store import Table

BINS = 40
ALIKE = 6
#: Layers with more concepts are not searched for what is alike: the matrix would have more than 67 million entries.
_WIDEST = 8192
#: Negative relevance below this share of a concept's largest is rounding.
_FAINT = 1e-4


class _Histograms(NamedTuple):
    """Distributions of all concepts of a layer.

    Attributes
    ----------
    low, high : arrays of shape (concepts,)
        Ends of the range.
    height : array of shape (concepts, bins)
        Number of rows.
    """

    low: Array
    high: Array
    height: Array


class Reference(NamedTuple):
    """A sample that stands for a concept, and where in it the concept is strongest."""

    sample: int
    target: int
    value: float
    position: int


class References(NamedTuple):
    """References of a concept: where it is most relevant, most active, and where its relevance is most negative."""

    relevant: list[Reference]
    active: list[Reference]
    negative: list[Reference]

    def samples(self) -> Iterator[Reference]:
        """All of them, in the order in which they are drawn."""
        return chain(self.relevant, self.active, self.negative)

    def rows(self) -> list[tuple[int, int]]:
        """Samples and targets of their heatmaps, in the same order.

        Where a concept is most active, the heatmap begins at the concept's own activation (target -1), so that it shows
        what is seen there, whichever class it speaks for. Others are of the class.
        """
        relevant, active, negative = ([(one.sample, one.target) for one in part] for part in self)
        return relevant + [(sample, -1) for sample, _ in active] + negative


@dataclass(frozen=True)
class LayerFacts:
    """What the table says about a layer.

    Attributes
    ----------
    layer : str
    shares : ClassMeans
        Share of every concept in every class.
    relevant, active : ReferenceSamples
        Best samples, each once, of a concept; fewer than asked for are filled by those of value 0.
    negative : ReferenceSamples or None
        Samples of the least relevance; None where they were not asked for, or sums of relevance were not mined.
    histograms : mapping of mode to _Histograms
    alike : (array, array) of shape (concepts, few)
        Concepts whose relevance goes along with that of each, and the cosine.
    """

    layer: str
    shares: ClassMeans
    relevant: ReferenceSamples
    active: ReferenceSamples | None
    negative: ReferenceSamples | None
    histograms: dict[str, _Histograms]
    alike: tuple[Array, Array]

    @property
    def n_concepts(self) -> int:
        """Number of concepts."""
        return int(self.shares.value.shape[1])

    @cached_property
    def mean(self) -> Array:
        """Share of every concept in an average row."""
        rows = self.shares.rows
        if not len(rows):
            return np.zeros(self.n_concepts)
        result: Array = (self.shares.value * rows[:, None]).sum(0) / rows.sum()
        return result

    def of_class(self, target: int) -> Array:
        """Share of every concept in a class; 0 where the class was not mined."""
        row = int(np.searchsorted(self.shares.targets, target))
        known = row < len(self.shares.targets) and self.shares.targets[row] == target
        result: Array = self.shares.value[row] if known else np.zeros(self.n_concepts)
        return result

    def references(self, concept: int, n: Mapping[str, int]) -> References:
        """References of a concept, of each kind so many at most, and each sample once.

        A sample with a value of 0 is none. Of the most negative, nor is one whose relevance is rounding beside the
        largest value, or that is among the most relevant, as where all relevance of a concept is negative.
        """
        relevant = _listed(self.relevant, concept, n["relevance"])
        active = _listed(self.active, concept, n["activation"])
        known = {(one.sample, one.target) for one in relevant}
        largest = max((abs(one.value) for one in relevant), default=0.0)
        negative = [
            one
            for one in _listed(self.negative, concept, 2 * n["negative"])
            if one.value < -_FAINT * largest and (one.sample, one.target) not in known
        ]
        return References(relevant, active, negative[: n["negative"]])


def _chosen(targets: Sequence[int], classes: Sequence[int] | None) -> list[int]:
    """Classes that are asked for, all by default; a `KeyError` names one that was not mined."""
    for target in classes or ():
        if target not in targets:
            raise NameNotFoundError(f"no sample of class {target!r} was mined; the classes are {list(targets)}")
    return list(targets) if classes is None else list(classes)


def _main_kind(table: Table) -> str:
    """Sum over positions, by which shares are told; the largest value where there is no sum."""
    return "sum" if "sum" in table.kinds else table.kinds[0]


def _listed(best: ReferenceSamples | None, concept: int, n: int) -> list[Reference]:
    if best is None:
        return []
    columns = (best.sample, best.target, best.value, best.position)
    every = map(Reference, *(column[:, concept].tolist() for column in columns))
    return [one for one in every if one.value != 0][:n]


def get_facts(table: Table, layer: str, questions: dict[str, Question], n: dict[str, int]) -> LayerFacts:
    """Ask a table about a layer; answers that take long are kept beside the table.

    Of each mode, questions say by what references are ranked, and ``n`` how many there are; ``n["negative"]`` of those
    in which relevance is most negative.
    """
    best: dict[str, ReferenceSamples] = {}
    histograms = {}
    for mode in table.modes:
        kind, normed = questions[mode].kind, questions[mode].normed
        best[mode] = once_each(partial(top_k, table, layer, mode, kind, normed, cache=True), max(1, n[mode]))
        histograms[mode] = _histograms(table, layer, mode, kind, normed)
    negative = None
    # (of a largest value among positions, the least is not where a concept speaks against most)
    if n["negative"] and "sum" in table.kinds:
        normed = questions["relevance"].normed
        least = partial(top_k, table, layer, "relevance", "sum", normed, least=True, cache=True)
        negative = once_each(least, 2 * n["negative"])
    kind = _main_kind(table)
    shares = class_means(table, layer, "relevance", kind, normed=True, cache=True)
    alike = _alike(table, layer, kind, shares.value.shape[1])
    return LayerFacts(layer, shares, best["relevance"], best.get("activation"), negative, histograms, alike)


def concepts_of_samples(
    table: Table, layer: str, samples: Mapping[int, Sequence[int]], n: int
) -> dict[tuple[int, int], list[tuple[int, float]]]:
    """Of each sample, explained for each of its classes, at most ``n`` concepts with the largest shares, and these."""
    found: dict[tuple[int, int], list[tuple[int, float]]] = {}
    found |= {(sample, target): [] for sample, targets in samples.items() for target in targets}
    for block in table.blocks(layer, "relevance", _main_kind(table), normed=True, samples=list(samples)):
        best = np.argsort(-block.value, axis=1, kind="stable")[:, :n]
        for row, (sample, target) in enumerate(zip(block.sample.tolist(), block.target.tolist(), strict=True)):
            if target in samples[sample]:
                shares = block.value[row, best[row]].tolist()
                found[sample, target] = [(c, s) for c, s in zip(best[row].tolist(), shares, strict=True) if s > 0]
    return found


def _histograms(table: Table, layer: str, mode: str, kind: str, normed: bool) -> _Histograms:
    def blocks() -> Any:
        found = table.blocks(layer, mode, kind, normed)
        return once_per_sample(found) if mode == "activation" else found

    n = table.n_concepts(layer)
    low, high = np.full(n, np.inf), np.full(n, -np.inf)
    for block in blocks():
        low, high = np.minimum(low, block.value.min(0)), np.maximum(high, block.value.max(0))
    height = np.zeros((n, BINS), np.int64)
    width = np.where(high > low, high - low, 1.0)
    for block in blocks():
        place = ((block.value - low) / width * BINS).astype(np.int64).clip(0, BINS - 1)
        flat = (place + np.arange(n) * BINS).ravel()
        height += np.bincount(flat, minlength=n * BINS).reshape(n, BINS)
    return _Histograms(low, high, height)


def _alike(table: Table, layer: str, kind: str, n: int) -> tuple[Array, Array]:
    few = min(ALIKE, n - 1)
    if few < 1 or n > _WIDEST:
        return np.zeros((n, 0), np.int64), np.zeros((n, 0))
    cosine = similarity(table, RowSelection(layer, "relevance", kind))
    np.fill_diagonal(cosine, -2)
    best = np.argsort(-cosine, axis=1, kind="stable")[:, :few]
    return best, np.take_along_axis(cosine, best, 1)
