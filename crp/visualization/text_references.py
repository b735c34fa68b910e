"""References of concepts that are texts: their words, with the relevance of each token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from zennit.core import Composite

from crp.attribution import CondAttribution
from crp.concepts import Concept, mask_of
from crp.concepts.reading import code_of
from crp.errors import InputTypeError
from crp.image.texts import TextHeatmap
from crp.visualization.mining.datasets import read
from crp.visualization.mining.targets import record_activations
from crp.visualization.mining.text_batches import Asked
from crp.visualization.mining.texts import place_in, texts_in, words_in
from crp.visualization.references import ConceptId, column
from crp.visualization.table.manifest import Array


class TextRow(NamedTuple):
    """A heatmap of a text.

    Attributes
    ----------
    targets : tuple of int
        Classes, or tokens at the position that is explained, whose relevance is shown. Without them, the heatmap shows
        how active the concept is.
    layer, concept : str and concept id, or None
        Through which relevance flows; None is the whole heatmap.
    at : int, optional
        The only token of the layer that counts.
    """

    targets: tuple[int, ...] = ()
    layer: str | None = None
    concept: ConceptId | None = None
    at: int | None = None


def read_text(dataset: Any, index: int, device: torch.device) -> Asked:
    """One text of a dataset, and what a model is asked about it."""
    sample = read(dataset, int(index))
    if sample.problem is not None:
        raise sample.problem.error or InputTypeError(f"sample {index}: {sample.problem.reason}")
    return Asked.of(sample.data[None].to(device), texts_in(dataset))


def token_ids(dataset: Any, index: int) -> Array:
    """Ids of a text's tokens."""
    data = read_text(dataset, index, torch.device("cpu")).data
    ids: Array = (data["input_ids"] if isinstance(data, Mapping) else data)[0].numpy()
    return ids


def samples_by_text(dataset: Any, samples: Sequence[int]) -> list[list[int]]:
    """Samples of each text: several, where these are positions of it."""
    of_text: dict[int, list[int]] = {}
    for sample in samples:
        of_text.setdefault(place_in(dataset, sample), []).append(sample)
    return list(of_text.values())


def layers_of_tokens(attribution: CondAttribution, asked: Asked, layers: Sequence[str]) -> set[str]:
    """Those of the layers whose values are of single tokens, of shape (texts, tokens, features)."""
    found, _ = record_activations(attribution, asked, None, layers)
    return {layer for layer, values in found.items() if values.dim() > 2}


def condition_at(asked: Asked, name: str, position: int | None, target: int) -> dict[str, Any]:
    """Condition whose relevance starts at a class of a text, or at a token at another position of it."""
    return replace(asked, positions=None if position is None else (position,)).condition(name, 0, [target])


def text_heatmaps(
    attribution: CondAttribution,
    asked: Asked,
    rows: Sequence[TextRow],
    layer_map: Mapping[str, Concept],
    composite: Composite | None,
    batch_size: int = 32,
) -> Tensor:
    """Heatmaps of one text, of shape (rows, tokens); those that start at the output share a forward pass."""
    assert asked.lengths is not None
    found: dict[int, Tensor] = {}
    together = [number for number, row in enumerate(rows) if row.targets and row.at is None]
    if together:
        conditions = [_condition(attribution, asked, rows[number]) for number in together]
        masks: Any = {layer: mask_of(concept) for layer, concept in layer_map.items()}
        parts = attribution.generate(
            asked.data, conditions, composite, mask_map=masks, batch_size=batch_size, verbose=False
        )
        found = dict(zip(together, torch.cat([part.heatmap.detach() for part in parts]), strict=True))
    for number, row in enumerate(rows):
        if number not in found:
            found[number] = _alone(attribution, asked, row, layer_map, composite)
    return torch.stack([found[number] for number in range(len(rows))])


def _condition(attribution: CondAttribution, asked: Asked, row: TextRow) -> dict[str, Any]:
    condition = asked.condition(attribution.MODEL_OUTPUT_NAME, 0, row.targets)
    return condition if row.layer is None else condition | {row.layer: [row.concept]}


def _alone(
    attribution: CondAttribution,
    asked: Asked,
    row: TextRow,
    layer_map: Mapping[str, Concept],
    composite: Composite | None,
) -> Tensor:
    """Heatmap that starts from a concept's activation, or flows through it at one token only."""
    assert row.layer is not None and row.concept is not None and asked.lengths is not None
    concept = layer_map[row.layer]
    if not row.targets:
        start = partial(_active_at, concept, column(concept, row.concept, row.layer), row.at)
        heatmap: Tensor = attribution(asked.data, [{}], composite, start_layer=row.layer, init_rel=start).heatmap
        return heatmap.detach()[0]
    outputs, _ = record_activations(attribution, asked, composite, [row.layer])
    n_positions = len(concept.get_rf_indices(outputs[row.layer].shape[1:], row.layer))
    # (a head has several entries at a token: one behind the other, each with all tokens)
    at = range(row.at or 0, n_positions, asked.lengths[0]) if outputs[row.layer].dim() > 2 else range(n_positions)
    condition = _condition(attribution, asked, row) | {row.layer: {row.concept: list(at)}}
    heatmap = attribution(asked.data, [condition], composite, mask_map=mask_of(concept, "mask_rf")).heatmap
    return heatmap.detach()[0]


def _active_at(concept: Concept, index: int, at: int | None, activation: Tensor) -> Tensor:
    """Relevance that explains how active a concept is, at one token or all: activation times gradient of its code."""
    with torch.enable_grad():
        leaf = activation.detach().clone().requires_grad_()
        values = code_of(concept, leaf)[:, index]
        kept = values if at is None or activation.dim() < 3 else values[..., at]
        (gradient,) = torch.autograd.grad(kept.sum(), leaf)
    return leaf.detach() * gradient


def reference_texts(
    visualization: Any,
    samples: Sequence[int],
    strongest: Sequence[int],
    row: TextRow,
    composite: Composite | None,
    rf: bool,
    targets: Sequence[Sequence[int]] | None,
    batch_size: int,
) -> list[TextHeatmap]:
    """References of a concept, each with its heatmap if there is a composite.

    Parameters
    ----------
    visualization : FeatureVisualization
    samples, strongest : sequences of int
        Dataset indices, and the token of each on which the concept is strongest.
    row : TextRow
        Layer and concept.
    composite : zennit Composite, optional
    rf : bool
        Whether only that token of the layer counts.
    targets : sequence of sequence of int, optional
        Classes or tokens of each, whose relevance is shown.
    batch_size : int
    """
    found = []
    for number, (sample, token) in enumerate(zip(samples, strongest, strict=True)):
        heat = None
        if composite is not None:
            asked = read_text(visualization.dataset, sample, visualization.device)
            of_sample = () if targets is None else tuple(int(target) for target in targets[number])
            wanted = row._replace(targets=of_sample, at=int(token) if rf else None)
            heat = text_heatmaps(
                visualization.attribution, asked, [wanted], visualization.layer_map, composite, batch_size
            )[0]
        found.append(text_of(visualization.dataset, sample, heat, int(token)))
    return found


def text_of(dataset: Any, sample: int, heat: Tensor | None, strongest: int | None = None) -> TextHeatmap:
    """A sample's words, with the relevance of each token."""
    words = words_in(dataset, int(sample))
    relevance = None if heat is None else heat.detach().cpu().double().numpy()
    return TextHeatmap(words.words, relevance, words.special, words.position, strongest)
