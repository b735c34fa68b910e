"""Units of a batch that are computed one after the other, and in halves where memory suffices for no more."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from crp.engine.backward import lacks_memory
from crp.errors import ConceptError, OutOfRangeError
from crp.notices import warn
from crp.visualization.mining.datasets import Problem
from crp.visualization.mining.job import Job
from crp.visualization.mining.scores import Unit
from crp.visualization.mining.targets import keeps_graph
from crp.visualization.mining.text_batches import whole_texts
from crp.visualization.mining.texts import n_items_of

T = TypeVar("T")


class NotFiniteError(Exception):
    """An error of a batch in which data is not finite, and which says nothing about the other samples."""


class Units:
    """Divides batches of a job into units, and computes them.

    Attributes
    ----------
    rows : int
        How many rows go through a backward pass at once: fewer, once memory did not suffice.
    works : bool
        Whether any sample was attributed, so that an error is about the sample at hand.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._keeps_graph = keeps_graph(job.composite)
        self._shares_texts = self._keeps_graph and job.texts is not None and job.texts.position == "each"
        self.rows = job.options.batch_size
        self.works = False

    @property
    def rows_of_text(self) -> int | None:
        """How many positions of a text go back at once through its forward pass; None where they share none."""
        return self.rows if self._shares_texts else None

    def divide(self, targets: list[list[int]], indices: Sequence[int]) -> list[Unit]:
        """Units, each attributed in one call: samples with equally many targets share a forward pass."""
        units: list[Unit] = []
        for n in sorted({len(of_sample) for of_sample in targets} - {0}):
            alike = [place for place, of_sample in enumerate(targets) if len(of_sample) == n]
            # A graph that is kept serves one target after the other: memory holds the samples. Else it holds all rows.
            width = n if self._keeps_graph else min(n, self.rows)
            height = self.rows if self._keeps_graph else max(self.rows // width, 1)
            texts = self._job.texts if self._shares_texts else None
            for places in whole_texts(self._job.dataset, texts, alike, indices, height):
                units += [[(place, targets[place][i : i + width]) for place in places] for i in range(0, n, width)]
        return units

    def compute(
        self,
        function: Callable[[Unit], T],
        units: list[Unit],
        indices: list[int],
        finite: Tensor | None,
        drop: Callable[[int, str, Exception], None],
    ) -> list[T]:
        """What a function gives for units. Where it fails for one, its halves are tried: memory may suffice for these.

        Parameters
        ----------
        function : callable
        units : list of Unit
        indices : list of int
            The sample in each place of the batch.
        finite : Tensor of shape (samples,), optional
            Whether the data of each is finite.
        drop : callable
            Told of each sample that fails by itself, why it does, and the error.

        Raises
        ------
        NotFiniteError
            If the function fails, and some data is not finite.
        """
        failures: list[tuple[int, int, Exception]] = []
        parts, reasons = list[T](), list[str]()
        todo = units[::-1]
        while todo:
            unit = todo.pop()
            n_rows = sum(len(targets) for _, targets in unit)
            try:
                parts.append(function(unit))
                continue
            except ConceptError:  # (no sample's fault, or known whose)
                raise
            except Exception as error:
                if finite is not None and not finite.all():
                    raise NotFiniteError from error
                if n_rows == 1:
                    failures.append((unit[0][0], unit[0][1][0], error))
                    continue
                reasons.append(f"{n_rows} rows at once failed ({Problem.of(error).reason})")
                is_memory = lacks_memory(error)
            # The exception is gone here, and with it the tensors of the failed call that it referred to.
            halves = _halved(unit)
            todo += halves[::-1]
            if is_memory:
                self._lower_limit(halves[1])
        failures.sort(key=operator.itemgetter(0, 1))
        n_causes = n_items_of(self._job.dataset, [indices[place] for place, _, _ in failures])
        if not parts and not self.works and n_causes > 1:
            place, target, failure = failures[0]
            if type(failure) is not OutOfRangeError:
                raise failure  # nothing ever worked: it is not about one sample
            reason = Problem.of(failure, f"target {target}: ").reason
            raise OutOfRangeError(f"sample {indices[place]}, and each other of its batch: {reason}") from failure
        if reasons and not failures:
            warn(f"{reasons[0]} and were attributed in parts; lower batch_size")
        for place, target, failure in failures:
            doing = f"target {target}: " if target >= 0 else ""
            drop(indices[place], Problem.of(failure, doing).reason, failure)
        return parts

    def _lower_limit(self, half: Unit) -> None:
        """Let no more rows go back at once than this half of a unit has."""
        held = len(half) if self._keeps_graph else sum(len(targets) for _, targets in half)
        if self._shares_texts:  # (a text may have more positions than go back at once)
            held = min(held, -(-self.rows // 2))
        self.rows = min(self.rows, held)
        torch.cuda.empty_cache()


def _halved(unit: Unit) -> tuple[Unit, Unit]:
    """Halves of a unit: of its samples, or of the targets of a single sample. The second half is at least as large."""
    if len(unit) > 1:
        return unit[: len(unit) // 2], unit[len(unit) // 2 :]
    [(place, targets)] = unit
    return [(place, targets[: len(targets) // 2])], [(place, targets[len(targets) // 2 :])]
