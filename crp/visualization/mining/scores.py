"""Scores of all concepts of all layers for the rows of a unit, which leave the device in one piece."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from crp.concepts import ChannelConcept, Concept, check_concept
from crp.concepts.reading import LayerValues, activation_scores, relevance_scores
from crp.visualization.mining.job import Job
from crp.visualization.mining.targets import attribute_targets, calls_itself, record_activations, top_class
from crp.visualization.mining.text_batches import Asked, token_scores
from crp.visualization.mining.transfers import Fetched, Transfers
from crp.visualization.table.manifest import Array

#: Samples, as places in a batch, each with its targets: equally many for every sample.
Unit: TypeAlias = list[tuple[int, list[int]]]
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


def score_unit(
    job: Job, transfers: Transfers, data: Tensor, indices: Sequence[int], unit: Unit, finite: Tensor | None, check: bool
) -> UnitScores:
    """Attribute and score the rows of a unit; nothing waits for the device.

    Parameters
    ----------
    job : Job
    transfers : Transfers
    data : Tensor of shape (samples, ...)
        Of the whole batch.
    indices : sequence of int
        Dataset index of each of its samples.
    unit : list of (int, list of int)
    finite : Tensor of shape (samples,), optional
        Fetched together with the scores.
    check : bool
        Whether concepts that contradict themselves are an error.
    """
    places = [place for place, _ in unit]
    batch = data if places == list(range(len(data))) else data[places]
    # A sample without a label has target -1, and activations do not depend on the target.
    targets = [[max(target, 0) for target in of_sample] for _, of_sample in unit]
    found: dict[str, list[Tensor]] = {}
    asked = Asked.of(batch, job.texts)
    for number, (recorded, output) in enumerate(_get_recorded(job, asked, targets)):
        if not number:
            if asked.positions is not None and output is not None:
                output = asked.chosen(output[: len(batch)])
            found["prediction"], found["probability"] = ([column] for column in top_class(output, len(batch)))
        for mode, layer in product([mode for mode in job.header.modes if mode in recorded], job.concepts):
            if layer not in recorded[mode]:
                raise ValueError(f"layer {layer!r} gives no {mode}: the forward pass does not use it; leave it out")
            values = recorded[mode][layer]
            columns = _get_columns(job.concepts[layer], values, layer, mode, job.header.kinds, check, asked.lengths)
            for key, column in columns.items():
                found.setdefault(key, []).append(column)
    joined = {key: columns[0] if len(columns) == 1 else torch.cat(columns) for key, columns in found.items()}
    flags = {} if finite is None else {FINITE: finite}
    sample = np.array([indices[place] for place in places], np.int64)
    slots = np.array([of_sample for _, of_sample in unit], np.int64).T
    return UnitScores(sample, slots, transfers.fetch(joined | flags))


def _get_recorded(
    job: Job, asked: Asked, targets: list[list[int]]
) -> Iterator[tuple[Mapping[str, Mapping[str, Tensor | LayerValues]], Any]]:
    """Relevance of layers, one target after the other; the first also comes with their activation, and the output."""
    layers, device = list(job.concepts), job.options.on_device
    if "relevance" not in job.header.modes and not calls_itself(job.attribution):
        found, output = record_activations(job.attribution, asked, job.composite, layers, device)
        yield {"activation": found}, output
        return
    reads = any(type(concept) is not ChannelConcept for concept in job.concepts.values())
    results = attribute_targets(job.attribution, asked, targets, job.composite, layers, device, multipliers=reads)
    for number, result in enumerate(results):
        activations = {layer: every[: asked.n_samples] for layer, every in result.activations.items()}
        relevances = {layer: LayerValues.of(result, layer) for layer in result.relevances}
        yield {"relevance": relevances} | ({} if number else {"activation": activations}), result.prediction


@torch.no_grad()
def _get_columns(
    concept: Concept,
    values: Tensor | LayerValues,
    layer: str,
    mode: str,
    kinds: Sequence[str],
    check: bool,
    lengths: Sequence[int] | None,
) -> dict[str, Tensor]:
    n_rows = len(values if isinstance(values, Tensor) else values.relevance)
    # (each check waits for the device; channels are what masks of channels let through)
    if check and not isinstance(values, Tensor) and type(concept) is not ChannelConcept:
        check_concept(concept, values, layer)
    if lengths is not None:
        scores = token_scores(concept, values, layer, lengths, check)
    elif isinstance(values, Tensor):
        scores = activation_scores(concept, values, layer)
    else:
        scores = relevance_scores(concept, values, layer)
    columns = {f"{mode}.position/{layer}": scores.position.to(torch.int32)}
    for kind in kinds:
        value: Tensor = getattr(scores, kind)
        if value.dim() != 2 or len(value) != n_rows or not value.shape[1]:
            raise ValueError(
                f"{concept!r} scores {n_rows} rows of layer {layer!r} by a tensor of shape {tuple(value.shape)}; "
                "it must be (rows, concepts), with at least one concept"
            )
        value = value.to(torch.float64 if value.dtype == torch.float64 else torch.float32)
        columns |= {f"{mode}.{kind}/{layer}": value, f"{mode}.{kind}_norm/{layer}": value.abs().sum(-1)}
    return columns
