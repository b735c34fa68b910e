"""Interventions and contexts of texts, one text after the other: each has a number of tokens of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from zennit.core import Composite

from crp.audit.asked import _one_for_each, predicted_by
from crp.concepts import mask_of
from crp.concepts.reading import LayerValues, relevance_sums
from crp.engine.attached import put_on
from crp.errors import InputError, InputTypeError, OutOfRangeError
from crp.visualization.feature import FeatureVisualization
from crp.visualization.mining.text_batches import Asked
from crp.visualization.text_references import TextRow, read_text, text_heatmaps
from crp.visualization.without import predict_without

#: Concepts that are switched off in one pass.
_TOGETHER = 32


def read_texts(
    fv: FeatureVisualization, samples: Sequence[int], targets: int | Sequence[int] | None
) -> tuple[list[Asked], list[int]]:
    """Texts of the data set, and a target for each: a class, or a token at the position that is explained."""
    texts = [read_text(fv.dataset, sample, fv.device) for sample in samples]
    if targets is not None:
        return texts, _one_for_each(targets, len(texts), "targets")
    return texts, [predicted_by(fv.attribution, text)[0] for text in texts]


def change_in_texts(
    fv: FeatureVisualization,
    composite: Composite | None,
    layer: str,
    concept_ids: Sequence[int],
    texts: Sequence[Asked],
    targets: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Relevance of concepts, and change of the target's output when each is scaled, (texts, concepts) both."""
    attribution, concept = fv.attribution, fv.layer_map[layer]
    relevance, change = [], []
    for text, target in zip(texts, targets, strict=True):
        with torch.no_grad(), put_on(None, attribution.model) as model:
            output = text.chosen(attribution.select_output(text.run(model)))[0]
        if not -len(output) <= target < len(output):
            raise OutOfRangeError(f"the model has outputs 0 to {len(output) - 1}; there is no output {target}")
        condition = text.condition(attribution.MODEL_OUTPUT_NAME, 0, [target])
        result = attribution(text.data, [condition], composite, [layer])
        sums = relevance_sums(concept, LayerValues.of(result, layer), layer, abs_norm=False)
        relevance.append(sums[0, list(concept_ids)].detach())
        with torch.no_grad(), put_on(None, attribution.model):
            for begin in range(0, len(concept_ids), _TOGETHER):
                some = concept_ids[begin : begin + _TOGETHER]
                masks = [mask_of(concept)(row, [one], layer) for row, one in enumerate(some)]
                positions = None if text.positions is None else [text.positions[0]] * len(some)
                after = predict_without(attribution, text.data, layer, masks, positions, scale=scale)
                if after is None:
                    raise InputError(f"the forward pass does not use layer {layer!r}, or several times")
                change.append(after[:, target] - output[target])
    return torch.stack(relevance), torch.cat(change).reshape(len(texts), -1)


def context_in_texts(
    fv: FeatureVisualization,
    composite: Composite | None,
    layer: str,
    concept_ids: Sequence[int],
    texts: Sequence[Asked],
    targets: Sequence[int],
    inside: Sequence[Tensor],
    batch_size: int,
) -> Tensor:
    """Share of each concept's positive relevance on the other tokens than those ``inside``, (texts, concepts)."""
    if len(inside) != len(texts):
        raise InputError(f"{len(inside)} masks are given for {len(texts)} texts")
    scores = []
    for number, (text, target, within) in enumerate(zip(texts, targets, inside, strict=True)):
        assert text.lengths is not None
        n = text.lengths[0]
        if not isinstance(within, Tensor) or within.shape != (n,) or within.dtype != torch.bool:
            found = f"{tuple(within.shape)}, {within.dtype}" if isinstance(within, Tensor) else repr(within)
            raise InputTypeError(f"inside[{number}] must be boolean, with one for each of {n} tokens; it is {found}")
        rows = [TextRow((target,), layer, one) for one in concept_ids]
        heatmaps = text_heatmaps(fv.attribution, text, rows, fv.layer_map, composite, batch_size).clamp_min(0)
        scores.append(1 - heatmaps[:, within.to(heatmaps.device)].sum(1) / heatmaps.sum(1))
    return torch.stack(scores)
