"""Texts of several lengths in one batch: filled up where that changes nothing, and scored token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crp.attribution import CondAttribution
from crp.concepts import Concept
from crp.concepts.reading import LayerValues, code_of, relevance_at
from crp.concepts.scores import ConceptScores, scores_of
from crp.engine.attached import put_on
from crp.engine.targets import Position
from crp.engine.tokens import input_embeddings, scored_at
from crp.errors import ConceptError, InputError, StateError
from crp.layers.misfits import telling_misfits, unknown_ids
from crp.notices import warn
from crp.visualization.mining.datasets import Sample
from crp.visualization.mining.texts import EXPLAINED, Texts, place_in

#: By how much outputs may differ, as a share of the largest, that are the same but for rounding.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-5}

#: Batches that a text may fill, whose positions share a forward pass; a longer one has further ones.
_LONGEST = 16


@dataclass(frozen=True)
class Asked:
    """What a model is asked for a batch.

    Attributes
    ----------
    data : Tensor or dict of str to Tensor
        What it is called with.
    n_samples : int
    lengths : tuple of int, or None
        Number of tokens of each text; None for samples that are no texts.
    positions : tuple of int, or None
        Token of each text whose prediction is explained; None where the output is (batch, classes).
    texts : tuple of int, or None
        Entry of the data for each sample: samples of several positions of a text share one, and with it a forward pass.
        None where each sample has its own.
    output_layer : str, optional
        Layer that is known to score tokens at each position by itself (`OutputLayer`): of texts with one position, it
        then scores no other.
    """

    data: Any
    n_samples: int
    lengths: tuple[int, ...] | None = None
    positions: tuple[int, ...] | None = None
    texts: tuple[int, ...] | None = None
    output_layer: str | None = None

    @classmethod
    def of(cls, batch: Tensor, texts: Texts | None, *, filled: bool = False) -> Asked:
        """What a batch of packed texts, (samples, fields and 1, tokens), or of other samples asks.

        Texts are no longer than the longest of the batch, unless they are to stay ``filled``.
        """
        if texts is None:
            return cls(batch, len(batch))
        kinds = batch[:, -1]
        lengths = (kinds > 0).sum(1).tolist()
        names, named = texts.form
        length = batch.shape[-1] if filled else max(lengths)
        positions = None if texts.position is None else tuple((kinds == EXPLAINED).int().argmax(1).tolist())
        shared = _shared_texts(batch) if texts.position == "each" else None
        own = batch if shared is None else batch[[shared.index(text) for text in range(shared[-1] + 1)]]
        fields = {name: own[:, row, :length].contiguous() for row, name in enumerate(names)}
        return cls(fields if named else fields["input_ids"], len(batch), tuple(lengths), positions, shared)

    @property
    def n_texts(self) -> int:
        """Number of entries of the data."""
        return self.n_samples if self.texts is None else self.texts[-1] + 1

    @property
    def columns(self) -> list[int]:
        """Entry of the data for each sample."""
        return list(range(self.n_samples) if self.texts is None else self.texts)

    def of_samples(self, tensor: Tensor) -> Tensor:
        """Entries of each sample, from those of the data."""
        return tensor if self.texts is None else tensor[self.columns]

    def paired(self) -> Any:
        """The data with an entry for each sample."""
        if isinstance(self.data, Mapping):
            return {name: self.of_samples(field) for name, field in self.data.items()}
        return self.of_samples(self.data)

    def condition(self, name: str, place: int, targets: Sequence[int]) -> dict[str, Any]:
        """Condition whose relevance starts at classes of a sample; of a language model, at tokens at its position."""
        if self.positions is None:
            return {name: list(targets)}
        return {name: Position(0 if self.scores_one else self.positions[place], list(targets))}

    def first(self) -> Asked:
        """What is asked for the first sample."""
        named = isinstance(self.data, Mapping)
        data = {name: field[:1] for name, field in self.data.items()} if named else self.data[:1]
        first = slice(1)
        return Asked(data, 1, self.lengths and self.lengths[first], self.positions and self.positions[first])

    @property
    def scores_one(self) -> bool:
        """Whether tokens are scored at one position of each text, so that the output has no other."""
        return self.output_layer is not None and self.texts is None

    def scoring(self, model: nn.Module) -> AbstractContextManager[object]:
        """Context in which a model scores tokens at no other positions than those that are asked."""
        return scored_at(model, self.positions) if self.scores_one and self.positions else nullcontext()

    def run(self, model: nn.Module) -> Any:
        """What a model returns for copies of the data."""
        with self.scoring(model):
            return self._run(model)

    def _run(self, model: nn.Module) -> Any:
        named = dict(self.data) if isinstance(self.data, Mapping) else {}
        arguments: dict[int | str, Tensor] = named or {0: self.data}
        with telling_misfits(model, arguments.values(), arguments):
            if named:
                return model(**{name: field.clone() for name, field in named.items()})
            return model(self.data.clone())

    def chosen(self, output: Tensor) -> Tensor:
        """Output of shape (samples, classes): of a language model, that at the positions which are explained.

        Raises
        ------
        ValueError
            If the model's output has no such positions.
        """
        if self.positions is None:
            return output
        if output.dim() != 3 or len(output) != self.n_texts:
            raise InputError(
                f"the output has shape {tuple(output.shape)}, and that of a language model is (samples, positions, "
                "vocabulary); Texts(..., position=None) is for classifiers"
            )
        return output[self.columns, self._places_in(output)]

    def chosen_of_rows(self, output: Tensor, first: int) -> Tensor:
        """The same of rows that have the output of their text each; the first is of this sample."""
        if self.positions is None:
            return output
        rows = list(range(len(output)))
        return output[rows, self._places_in(output)[first : first + len(rows)]]

    def _places_in(self, output: Tensor) -> list[int]:
        """Where an output has the position that is explained of each sample."""
        assert self.positions is not None
        if not self.scores_one:
            return list(self.positions)
        if output.shape[1] != 1:
            raise StateError(
                f"layer {self.output_layer!r} scored one position of the first text, and the output for others has "
                f"shape {tuple(output.shape)}; all are scored by CondAttribution(model, output=lambda out: out.logits)"
            )
        return [0] * self.n_samples

    @property
    def shares_starts(self) -> bool:
        """Whether relevance of several positions may start together, as it is told apart at the output layer."""
        return self.output_layer is not None and self.texts is not None

    def starting_together(
        self, name: str, slots: Sequence[Sequence[Mapping[str, Any]]], at_once: int
    ) -> list[list[dict[str, Any]]]:
        """Conditions of positions, ``slots`` from `condition`, as those of a text that go back at once start alike.

        Relevance starts at all of their tokens, and of what arrives at the output layer's input, each keeps its own
        position. The scores of a long text, (positions, vocabulary), are then sent back once, and not for each of them.
        """
        assert self.texts is not None and self.positions is not None
        groups: dict[tuple[int, int, int], dict[int, Any]] = {}
        found = []
        for number, slot in enumerate(slots):
            of_slot = []
            for place, condition in enumerate(slot):
                part = (number * len(slot) + place) // at_once
                # (a position that is mined twice has the same target twice)
                group = groups.setdefault((part, number, self.texts[place]), {})
                group[self.positions[place]] = condition[name]
                of_slot.append((group, self.positions[place]))
            found.append(of_slot)
        return [
            [{name: list(group.values()), f"{self.output_layer}.input": [at]} for group, at in of_slot]
            for of_slot in found
        ]


def unknown_id(model: nn.Module, texts: Texts, data: Tensor) -> int | None:
    """A token id of a packed text that the model has no embedding of: after one, a GPU fails at all that follows."""
    layer = input_embeddings(model)
    if not isinstance(layer, nn.Embedding):
        return None
    wrong = unknown_ids(data[texts.form[0].index("input_ids")], layer)
    return int(wrong[0]) if len(wrong) else None


def end_of_texts(dataset: Any, texts: Texts | None, begin: int, end: int, size: int) -> int:
    """Where a batch of so many samples ends: of texts with several positions, where a text does, which stay together.

    A text with more positions than a batch has samples is a batch by itself.
    """
    last = min(begin + size, end)
    if last == end or texts is None or texts.position != "each":
        return last
    of, first = partial(place_in, dataset), last
    while first > begin and of(first - 1) == of(last):
        first -= 1
    while first == begin and last < min(begin + _LONGEST * size, end) and of(last) == of(begin):
        last += 1
    return first if first > begin else last


def whole_texts(
    dataset: Any, texts: Texts | None, places: list[int], indices: Sequence[int], size: int
) -> list[list[int]]:
    """Parts of at most so many places of a batch; those of one text, whose rows share a forward pass, stay together.

    ``indices`` are the samples in all places.
    """
    if texts is None or texts.position != "each":
        return [places[first : first + size] for first in range(0, len(places), size)]
    parts: list[list[int]] = []
    for _, text in groupby(places, lambda place: place_in(dataset, indices[place])):
        of_text = list(text)
        if parts and len(parts[-1]) + len(of_text) <= size:
            parts[-1] += of_text
        else:
            parts.append(of_text)
    return parts


def _shared_texts(batch: Tensor) -> tuple[int, ...]:
    """Number of each sample's text, of which neighbours that differ only in what is explained are the same."""
    fields, is_token = batch[:, :-1].flatten(1), batch[:, -1] > 0
    is_same = (fields[1:] == fields[:-1]).all(1) & (is_token[1:] == is_token[:-1]).all(1)
    return (0, *(~is_same).cumsum(0).tolist())


def is_close(found: Tensor, expected: Tensor) -> bool:
    """Whether tensors are the same but for rounding."""
    limit = _ROUNDING.get(expected.dtype, 1e-2) * float(expected.abs().max())
    return found.shape == expected.shape and float((found - expected).abs().max()) <= limit


class Filling:
    """Fills up texts of a batch to one length, if the model says the same of a text that is filled up.

    The first batch with texts of several lengths decides, by its shortest text.
    """

    def __init__(self, texts: Texts, attribution: CondAttribution, device: torch.device) -> None:
        self._texts, self._attribution, self._device = texts, attribution, device
        self._changes_nothing: bool | None = None

    def filled(self, samples: Sequence[Sample]) -> list[Sample]:
        """Samples of one length, or as they are where the model reads padding."""
        lengths = [sample.data.shape[-1] for sample in samples]
        if len(set(lengths)) < 2 or self._changes_nothing is False:
            return list(samples)
        longest = max(lengths)
        if self._changes_nothing is None:
            self._decide(samples[lengths.index(min(lengths))].data, longest)
        if not self._changes_nothing:
            return list(samples)
        return [sample._replace(data=self._longer(sample.data, longest)) for sample in samples]

    def _longer(self, packed: Tensor, length: int) -> Tensor:
        more = length - packed.shape[-1]
        filled = F.pad(packed, (0, more))
        if more:
            filled[0, -more:] = self._texts.padding
        return filled

    @torch.no_grad()
    def _decide(self, packed: Tensor, length: int) -> None:
        n = packed.shape[-1]
        alone, filled = (self._output(one) for one in (packed, self._longer(packed, length)))
        if alone is not None and filled is not None:
            filled = filled[:, :n] if alone.dim() > 2 and filled.shape[1] == length else filled
            self._changes_nothing = is_close(filled, alone)
        else:
            self._changes_nothing = False
        # (a text that the model cannot take as it is says nothing about filling up, and its error comes by itself)
        if not self._changes_nothing and alone is not None:
            warn(
                "the model says something else of a text that is filled up to a longer one's length, so that texts of "
                "each length are mined by themselves, which is slower; a batch needs an attention_mask, and a padding "
                "id that the model knows"
            )

    def _output(self, packed: Tensor) -> Tensor | None:
        asked = Asked.of(packed[None].to(self._device), self._texts, filled=True)
        try:
            with put_on(None, self._attribution.model) as model:
                return self._attribution.select_output(asked.run(model))
        except Exception:  # (whatever the model raises, the texts themselves will raise it, too)
            return None


def token_scores(
    concept: Concept, values: Tensor | LayerValues, layer: str, lengths: Sequence[int], check: bool, first: int = 0
) -> ConceptScores:
    """Sum and largest value over the tokens of a text, and the token of the largest, for every concept.

    The entries that a concept has at a token, such as those of an attention head, are summed.

    Parameters
    ----------
    concept : Concept
    values : Tensor of shape (rows, tokens, ...), or LayerValues of such
        Layers of shape (rows, features), behind the tokens, have one score.
    layer : str
    lengths : sequence of int
        Tokens of each sample; the rows are those of one sample after the other, and of the first one again.
    check : bool
        Whether to look if concepts lie along another axis than the tokens.
    first : int
        Sample of the first row.

    Raises
    ------
    ConceptError
        If the tokens are not on axis 1 of the layer, or the concept does not keep them apart.
    """
    like = values if isinstance(values, Tensor) else values.relevance
    n_rows, tokens = len(like), max(lengths)
    of_rows = [lengths[(first + row) % len(lengths)] for row in range(n_rows)]
    if like.dim() > 2 and like.shape[1] != tokens:
        raise ConceptError(
            f"layer {layer!r} gives {tuple(like.shape)} for texts of up to {tokens} tokens; concepts of texts are read "
            "where they are (samples, tokens, features), or (samples, features)"
        )
    if check and like.dim() > 2:
        _check_keeps_tokens(concept, like, layer)
    groups: dict[int, list[int]] = {}
    for row, length in enumerate(of_rows):
        groups.setdefault(length if like.dim() > 2 else 0, []).append(row)
    parts = [scores_of(_by_token(concept, _cut(values, rows, length), layer), layer) for length, rows in groups.items()]
    if len(parts) == 1:
        return parts[0]
    order = torch.tensor([row for rows in groups.values() for row in rows], device=like.device).argsort()
    return ConceptScores(*(torch.cat(columns)[order] for columns in zip(*parts, strict=True)))


def _cut(values: Tensor | LayerValues, rows: list[int], length: int) -> Tensor | LayerValues:
    """Values of some rows, up to the length of their texts; a length of 0 leaves them whole."""

    def part(tensor: Tensor) -> Tensor:
        chosen = tensor if len(rows) == len(tensor) else tensor[rows]
        return chosen[:, :length] if length else chosen

    if isinstance(values, Tensor):
        return part(values)
    return LayerValues(*(None if tensor is None else part(tensor) for tensor in values))  # type: ignore[arg-type]


def _by_token(concept: Concept, values: Tensor | LayerValues, layer: str) -> Tensor:
    """Relevance or activation of concepts, (rows, concepts, tokens)."""
    found = code_of(concept, values) if isinstance(values, Tensor) else relevance_at(concept, values, layer)
    return found.flatten(2, -2).sum(2) if found.dim() > 3 else found


def _check_keeps_tokens(concept: Concept, like: Tensor, layer: str) -> None:
    """Refuse a concept whose last axis is not that of the tokens, as that of `ChannelConcept` is not."""
    n = int(like.shape[-1]) + 1  # (no other axis is as long)
    first = like.new_zeros(1, n, *like.shape[2:])
    first[:, 0] = 1
    try:
        found = _by_token(concept, LayerValues(first, first, torch.ones_like(first), first), layer)
    except (ValueError, RuntimeError, IndexError):
        found = first[..., 0]
    if found.dim() != 3 or found.shape[-1] != n or bool(found[..., 1:].any()):
        raise ConceptError(
            f"layer {layer!r} gives (samples, tokens, features), and {concept!r} has no value for each token; "
            "AxisConcept(-1) has one for each feature, AxisConcept(-1, groups=heads) for each head"
        )
