"""Scores of all concepts of all layers for the rows of a unit, which leave the device in one piece."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from crp.attribution import CondAttribution
from crp.concepts import ChannelConcept, Concept, check_concept
from crp.concepts.reading import LayerValues, activation_scores, relevance_scores
from crp.engine.door import is_lost_in_float16
from crp.errors import InputError
from crp.notices import warn
from crp.types import AttributionResults
from crp.visualization.mining.job import Job
from crp.visualization.mining.targets import attribute_targets, calls_itself, record_activations, top_class
from crp.visualization.mining.text_batches import Asked, token_scores
from crp.visualization.mining.transfers import ColumnForm, Fetched, Package, Transfers, pack
from crp.visualization.table.manifest import Array

#: Samples, as places in a batch, each with its targets: equally many for every sample.
Unit: TypeAlias = list[tuple[int, list[int]]]
#: Values of layers, by mode and name.
Recorded: TypeAlias = Mapping[str, Mapping[str, Tensor | LayerValues]]
#: Key of what says for each sample of a batch whether its data is finite.
FINITE = "finite"


@dataclass
class UnitScores:
    """Scores of a unit's rows, on their way to the host.

    Attributes
    ----------
    sample : array of shape (samples,)
        Dataset indices.
    slots : array of shape (slots, samples)
        Targets: row after row those of one slot, first the first target of every sample.
    columns : Fetched
    """

    sample: Array
    slots: Array
    columns: Fetched

    def arrays(self) -> tuple[dict[str, Array], Array | None]:
        """Columns of the rows, slot after slot, and which samples of the batch are finite, if that was asked."""
        n = len(self.slots)
        columns = self.columns.arrays()
        finite = columns.pop(FINITE, None)
        for key, column in columns.items():
            if not key.startswith("relevance.") and n > 1:  # (the others do not depend on the target)
                columns[key] = np.concatenate([column] * n)
        return {"sample": np.tile(self.sample, n), "target": self.slots.reshape(-1)} | columns, finite


#: Forms of the columns that were computed, by attribution and scoring: recordings belong to an attribution, too.
_forms: WeakKeyDictionary[CondAttribution, dict[Hashable, dict[str, ColumnForm]]] = WeakKeyDictionary()


class Scoring:
    """Scores of all concepts of all layers; equal ones score alike, so that a recorded one serves a later run, too."""

    def __init__(self, job: Job) -> None:
        self._concepts, self._kinds = job.concepts, tuple(job.header.kinds)
        self._modes = tuple(job.header.modes)
        self._exclusive = job.attribution.exclusive
        channels = all(type(concept) is ChannelConcept for concept in job.concepts.values())
        self._may_be_recorded = channels and "relevance" in self._modes and job.texts is None
        self._known = _forms.setdefault(job.attribution, {})
        self._dtypes = {parameter.dtype for parameter in job.attribution.model.parameters()}
        self._told = False

    def _key(self) -> Hashable:
        concepts = tuple((layer, id(concept)) for layer, concept in self._concepts.items())
        return concepts, self._modes, self._kinds, self._exclusive

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Scoring) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    @property
    def can_be_recorded(self) -> bool:
        """Whether it is a function of tensors, of which only the numbers change, and its columns are known."""
        return self._may_be_recorded and self._key() in self._known

    def __call__(self, result: AttributionResults) -> Tensor:
        """Scores of one target of every sample, in one piece."""
        relevances = {layer: LayerValues.of(result, layer) for layer in result.relevances}
        recorded: Recorded = {"relevance": relevances, "activation": result.activations}
        return self.package([self.columns(recorded, result.prediction, len(result.prediction))]).content

    def columns(
        self,
        recorded: Recorded,
        output: Any,
        n_samples: int,
        lengths: Sequence[int] | None = None,
        check: bool = False,
        first: int = 0,
    ) -> dict[str, Tensor]:
        """Columns of some rows; what the model predicts is among them if activations are there.

        Parameters
        ----------
        recorded : dict of str to dict of str to Tensor
            By mode and layer.
        output : Tensor
            What is explained.
        n_samples : int
            Rows with activations.
        lengths : sequence of int, optional
            Of texts.
        check : bool
            Whether concepts that contradict themselves are an error.
        first : int
            Sample of the first row.
        """
        found = {}
        if "activation" in recorded:
            found["prediction"], probability = top_class(output, n_samples)
            found |= {"probability": probability} if self._exclusive else {}
        for mode, layer in product([mode for mode in self._modes if mode in recorded], self._concepts):
            if layer not in recorded[mode]:
                raise InputError(f"layer {layer!r} gives no {mode}: the forward pass does not use it; leave it out")
            values = recorded[mode][layer]
            found |= _get_columns(self._concepts[layer], values, layer, mode, self._kinds, check, lengths, first)
        return found

    def package(self, slots: Sequence[Mapping[str, Tensor]]) -> Package:
        """Columns of several targets of every sample, one after the other, in one piece."""
        first, *others = slots
        joined = {
            key: torch.cat([column, *(slot[key] for slot in others if key in slot)]) if others else column
            for key, column in first.items()
        }
        package = pack(joined)
        # (without the rows)
        self._known[self._key()] = {k: form._replace(shape=form.shape[1:]) for k, form in package.forms.items()}
        return package

    def tell_lost(self, arrays: Mapping[str, Array]) -> None:
        """Warn, once, where float16 is too small for a row's relevance of all concepts."""
        for key, sums in arrays.items():
            name, _, layer = key.partition("/")
            if name == "relevance.sum" and not self._told and is_lost_in_float16(torch.from_numpy(sums), *self._dtypes):
                self._told = True
                warn(
                    f"relevance of layer {layer!r} is below 6e-05 for some samples, where float16 has few digits left, "
                    "or none: mine in bfloat16 or float32"
                )

    def recorded(self, content: Tensor, n_rows: int) -> Package:
        """What a replay gave, which has the columns that were there before."""
        forms = self._known[self._key()]
        return Package(content, {key: form._replace(shape=(n_rows, *form.shape)) for key, form in forms.items()})


def score_unit(
    job: Job,
    scoring: Scoring,
    transfers: Transfers,
    ask: Callable[[Tensor], Asked],
    data: Tensor,
    indices: Sequence[int],
    unit: Unit,
    finite: Tensor | None,
    check: bool,
    at_once: int | None = None,
) -> UnitScores:
    """Attribute and score the rows of a unit; nothing waits for the device.

    Parameters
    ----------
    job : Job
    scoring : Scoring
    transfers : Transfers
    ask : callable
        What a model is asked for a batch of such data.
    data : Tensor of shape (samples, ...)
        Of the whole batch.
    indices : sequence of int
        Dataset index of each of its samples.
    unit : list of (int, list of int)
    finite : Tensor of shape (samples,), optional
        Fetched together with the scores.
    check : bool
        Whether concepts that contradict themselves are an error.
    at_once : int, optional
        Rows that are sent back together, at most.
    """
    places = [place for place, _ in unit]
    batch = data if places == list(range(len(data))) else data[places]
    # A sample without a label has target -1, and activations do not depend on the target.
    targets = [[max(target, 0) for target in of_sample] for _, of_sample in unit]
    asked = ask(batch)
    # (channels, which alone can be recorded, need no check)
    reading = scoring if scoring.can_be_recorded and len(targets[0]) == 1 else None
    columns, package, first = [], None, 0
    for recorded, output, n_rows in _get_recorded(job, asked, targets, reading, at_once):
        if isinstance(recorded, Tensor):
            package = scoring.recorded(recorded, len(batch))
            break
        # (of what does not depend on the target, the first target of each sample tells)
        n_new = max(0, min(n_rows, len(batch) - first))
        columns.append(scoring.columns(recorded, output, n_new, asked.lengths, check, first))
        first += n_rows
    flags = [] if finite is None else [pack({FINITE: finite})]
    sample = np.array([indices[place] for place in places], np.int64)
    slots = np.array([of_sample for _, of_sample in unit], np.int64).T
    return UnitScores(sample, slots, transfers.fetch(package or scoring.package(columns), *flags))


def _get_recorded(
    job: Job, asked: Asked, targets: list[list[int]], reading: Scoring | None, at_once: int | None
) -> Iterator[tuple[Recorded | Tensor, Any, int]]:
    """Relevance of layers for so many rows, one target of each sample after the other.

    Rows of the first target also come with their activation, and with the output. Or what was read of them, where a
    replay gave it.
    """
    layers, device = list(job.concepts), job.options.on_device
    if "relevance" not in job.header.modes and not calls_itself(job.attribution):
        found, output = record_activations(job.attribution, asked, job.composite, layers, device)
        output = asked.chosen(output) if isinstance(output, Tensor) else output
        yield {"activation": found}, output, asked.n_samples
        return
    reads = any(type(concept) is not ChannelConcept for concept in job.concepts.values())
    results = attribute_targets(
        job.attribution, asked, targets, job.composite, layers, device, multipliers=reads, reading=reading,
        at_once=at_once,
    )  # fmt: skip
    done = 0
    for result in results:
        if result.reading is not None:
            yield result.reading, None, asked.n_samples
            continue
        n_rows, n_new, output = len(result.prediction), max(0, asked.n_samples - done), result.prediction
        recorded: dict[str, Any] = {"relevance": {layer: LayerValues.of(result, layer) for layer in result.relevances}}
        if n_new:
            recorded["activation"] = {layer: every[:n_new] for layer, every in result.activations.items()}
            output = asked.chosen_of_rows(output[:n_new], done)
        yield recorded, output, n_rows
        done += n_rows


@torch.no_grad()
def _get_columns(
    concept: Concept,
    values: Tensor | LayerValues,
    layer: str,
    mode: str,
    kinds: Sequence[str],
    check: bool,
    lengths: Sequence[int] | None,
    first: int,
) -> dict[str, Tensor]:
    n_rows = len(values if isinstance(values, Tensor) else values.relevance)
    # (each check waits for the device; channels are what masks of channels let through)
    if check and not isinstance(values, Tensor) and type(concept) is not ChannelConcept:
        check_concept(concept, values, layer)
    if lengths is not None:
        scores = token_scores(concept, values, layer, lengths, check, first)
    elif isinstance(values, Tensor):
        scores = activation_scores(concept, values, layer)
    else:
        scores = relevance_scores(concept, values, layer)
    columns = {f"{mode}.position/{layer}": scores.position.to(torch.int32)}
    for kind in kinds:
        value: Tensor = getattr(scores, kind)
        if value.dim() != 2 or len(value) != n_rows or not value.shape[1]:
            raise InputError(
                f"{concept!r} scores {n_rows} rows of layer {layer!r} by a tensor of shape {tuple(value.shape)}; "
                "it must be (rows, concepts), with at least one concept"
            )
        value = value.to(torch.float64 if value.dtype == torch.float64 else torch.float32)
        columns |= {f"{mode}.{kind}/{layer}": value, f"{mode}.{kind}_norm/{layer}": value.abs().sum(-1)}
    return columns
