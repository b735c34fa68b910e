"""A question to what was mined, as data, and a table that answers it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from crp.errors import InputError
from crp.flags import check_flags
from crp.visualization.table.manifest import KINDS, MODES
from crp.visualization.table.ranking import ClassStatistics, ReferenceSamples, class_statistics, top_k
from crp.visualization.table.store import Table


@dataclass(frozen=True)
class Question:
    """By what the samples of a concept are ranked.

    Attributes
    ----------
    mode : {"relevance", "activation"}
    kind : {"sum", "max"}
        Sum over a concept's positions, or the largest value among them.
    normed : bool
        Whether a sample's values are divided by the sum of their absolute values over all concepts.
    per_class : bool
        Whether the samples of each class are ranked apart.
    """

    mode: str = "relevance"
    kind: str = "sum"
    normed: bool = True
    per_class: bool = False

    def __post_init__(self) -> None:
        check_flags(normed=self.normed, per_class=self.per_class)
        for name, value, known in (("mode", self.mode, MODES), ("kind", self.kind, KINDS)):
            if not isinstance(value, str) or value not in known:
                raise InputError(f"{name} must be {' or '.join(map(repr, known))}, not {value!r}")


class Answers(Protocol):
    """What answers questions: a table, or result folders that zennit-crp wrote."""

    def references(self, question: Question, layer: str, size: int, of_class: int | None = None) -> ReferenceSamples:
        """Best samples of every concept of a layer, at most ``size``; of one class, if the question is per class."""

    def class_statistics(
        self, question: Question, layer: str, column: Callable[[int], int], mean_n: int
    ) -> ClassStatistics:
        """Classes of a concept, best first; ``column`` gives the concept's column for the number of concepts."""

    def content(self, question: Question, layer: str) -> object:
        """Something that differs where the answers would differ, for the keys of caches."""


@dataclass(frozen=True)
class TableAnswers:
    """Answers of a table; they are kept beside it."""

    table: Table

    def references(self, question: Question, layer: str, size: int, of_class: int | None = None) -> ReferenceSamples:
        """See `crp.visualization.table.ranking.top_k`, which names what was not mined."""
        by = question.mode, question.kind, question.normed
        return top_k(self.table, layer, *by, size, of_class=of_class, cache=True)

    def class_statistics(
        self, question: Question, layer: str, column: Callable[[int], int], mean_n: int
    ) -> ClassStatistics:
        """See `crp.visualization.table.ranking.class_statistics`."""
        by = question.mode, question.kind, question.normed
        index = column(self.table.n_concepts(layer))
        return class_statistics(self.table, layer, index, *by, mean_n=mean_n, cache=True)

    def content(self, question: Question, layer: str) -> object:
        """Digest of the whole table."""
        return self.table.digest
