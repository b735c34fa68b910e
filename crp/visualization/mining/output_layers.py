"""The layer by which a language model scores tokens: asked for the positions that are explained, and for no others."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from crp.attribution import CondAttribution
from crp.engine.tokens import output_layer
from crp.visualization.mining.job import Job
from crp.visualization.mining.targets import attribute_targets, choose_targets, record_activations
from crp.visualization.mining.text_batches import Asked, is_close
from crp.visualization.mining.texts import EXPLAINED, TOKEN

#: Tokens of the text that decides.
_ENOUGH = 8


class OutputLayer:
    """Looks whether a language model's output layer scores tokens at each position by itself, as a linear one does.

    Of 50 257 tokens, scores of all positions cost more than all else in a small model. Where one position of each text
    is explained, it is the only one that is scored; of several positions of a text, relevance is sent back to the
    input of the layer together. The beginning of a text decides: its relevance must be the same as by scores of all
    positions. (It is not where a model puts something past the layer, or reads scores of other positions.)
    """

    def __init__(self, job: Job) -> None:
        self._job, attribution, texts = job, job.attribution, job.texts
        usual = type(attribution) is CondAttribution and attribution.output is None
        explains = texts is not None and texts.position is not None
        self._name = output_layer(attribution.model) if usual and explains else None
        self._is_sure = False

    def ask(self, batch: Tensor) -> Asked:
        """What a model is asked for a batch; see `Asked.of`."""
        if self._name is not None and not self._is_sure:
            self._decide(batch)
        asked = Asked.of(batch, self._job.texts)
        return replace(asked, output_layer=self._name) if self._is_sure else asked

    def _decide(self, batch: Tensor) -> None:
        """Compare both ways; where no text has enough tokens, the next batch decides."""
        rows = _beginning(batch)
        if rows is None:
            return
        texts = self._job.texts
        asked = Asked.of(rows if texts is not None and texts.position == "each" else rows[:1], texts)
        try:
            targets = choose_targets("prediction", self._job.attribution, asked)
            expected = self._results(asked, targets)
        except Exception:  # (whatever the model raises, the texts themselves will raise it, too)
            return
        try:
            found = self._results(replace(asked, output_layer=self._name), targets)
            self._is_sure = len(found) == len(expected) and all(map(is_close, found, expected))
        except Exception:  # (a model that cannot take it is asked for all positions)
            self._is_sure = False
        self._name = self._name if self._is_sure else None

    def _results(self, asked: Asked, targets: list[list[int]]) -> list[Tensor]:
        """All that mining reads, and the heatmap, which tells of something past the layer."""
        job, layers = self._job, list(self._job.concepts)
        if "relevance" not in job.header.modes:
            activations, output = record_activations(job.attribution, asked, job.composite, layers)
            return [asked.chosen(output), *activations.values()]
        (result,) = attribute_targets(job.attribution, asked, targets, job.composite, layers)
        of_layers = [values[layer] for values in (result.relevances, result.activations) for layer in layers]
        return [result.heatmap, asked.chosen_of_rows(result.prediction, 0), *of_layers]


def _beginning(batch: Tensor) -> Tensor | None:
    """First tokens of the longest text of a batch, packed for an explanation of each of the last two; None of one."""
    lengths = (batch[:, -1] > 0).sum(1)
    n = min(int(lengths.max()), _ENOUGH)
    if n < 2:
        return None
    rows = batch[[int(lengths.argmax())] * 2, :, :n]
    rows[:, -1] = TOKEN
    rows[[0, 1], -1, [n - 2, n - 1]] = EXPLAINED
    return rows
