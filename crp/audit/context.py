"""How much of a concept's relevance lies outside of the object: its use of context."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from zennit.core import Composite

from crp.attribution import CondAttribution
from crp.audit.asked import _check_asked, _named_concepts
from crp.audit.in_texts import context_in_texts
from crp.audit.tested import _read_samples
from crp.checks import check_number
from crp.concepts import Concept, mask_of
from crp.engine.taps import check_layers
from crp.errors import InputError
from crp.kinds import check_kind
from crp.values import check_form
from crp.visualization.feature import FeatureVisualization
from crp.visualization.table.derived import keep_result
from crp.visualization.table.store import Table


def context_scores(
    attribution: CondAttribution,
    data: Tensor,
    targets: Sequence[Any],
    composite: Composite | None,
    layer: str,
    concept: Concept,
    concept_ids: Any,
    inside: Tensor,
    *,
    batch_size: int = 32,
) -> Tensor:
    r"""Share of each concept's positive relevance that lies outside of the object, in the input.

    It is :math:`1 - \sum_{p\,\text{inside}} R_p^+ / \sum_p R_p^+` of the concept's conditional heatmap: 0 for a
    concept of the object itself, 1 for one of its surroundings. Dreyer et al., "Revealing Hidden Context Bias in
    Segmentation and Object Detection through Concept-specific Explanations", CVPR Workshops (2023), section 3.3.

    Parameters
    ----------
    attribution : CondAttribution
    data : Tensor of shape (samples, ...)
    targets : sequence
        For each sample what ``"y"`` may be in a condition.
    composite : zennit Composite, or None for the plain gradient
    layer : str
    concept : Concept
    concept_ids : int, or sequence of int
    inside : Tensor of shape (samples, *space), bool
        The object in each sample, such as the pixels of its segment or its box (`inside_boxes`).
    batch_size : int
        Rows attributed at once.

    Returns
    -------
    Tensor of shape (samples, concepts)
        NaN where a concept has no positive relevance in a sample.
    """
    _check_asked(attribution, data, concept)
    check_number("batch_size", batch_size, 1, whole=True)
    check_layers(attribution.model, [layer], "layer")
    ids = _named_concepts(concept_ids, layer)
    check_kind("inside", inside, Tensor, "a boolean tensor, of the heatmaps' shape")
    check_form(inside, "inside")
    check_kind("targets", targets, (Sequence, Tensor, np.ndarray), "one for each sample")
    if len(targets) != len(data) or len(inside) != len(data):
        raise InputError(f"{len(targets)} targets and {len(inside)} masks are given for {len(data)} samples")
    conditions = [{attribution.MODEL_OUTPUT_NAME: target, layer: [i]} for target in targets for i in ids]
    rows = torch.arange(len(data)).repeat_interleave(len(ids))
    shares = []
    for begin in range(0, len(conditions), batch_size):
        chosen = rows[begin : begin + batch_size]
        heatmap = attribution(
            data[chosen], conditions[begin : begin + batch_size], composite, mask_map=mask_of(concept)
        ).heatmap.clamp_min(0)
        within = inside[chosen].to(heatmap.device)
        if within.shape != heatmap.shape or within.dtype != torch.bool:
            raise InputError(
                f"inside must be boolean, of the heatmaps' shape {tuple(heatmap.shape[1:])} for each sample; it is "
                f"{tuple(within.shape[1:])}, {within.dtype}"
            )
        total = heatmap.flatten(1).sum(1)
        shares.append(1 - torch.where(within, heatmap, 0).flatten(1).sum(1) / total)
    return torch.cat(shares).reshape(len(data), len(ids))


class Contexts(NamedTuple):
    """Context scores of a layer's concepts on some samples.

    Attributes
    ----------
    layer : str
    concept : ndarray of shape (concepts,), int64
    sample, target : ndarray of shape (samples,), int64
        Samples of the data set, and the outputs that are explained.
    score : ndarray of shape (samples, concepts)
        As from `context_scores`; NaN where a concept has no positive relevance.
    """

    layer: str
    concept: np.ndarray
    sample: np.ndarray
    target: np.ndarray
    score: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """Mean score of each concept over the samples where it has one; NaN where it has none."""
        known = np.isfinite(self.score)
        total, n = np.where(known, self.score, 0.0).sum(0), known.sum(0)
        return np.where(n > 0, total / np.maximum(n, 1), np.nan)

    def save(self, table: Table | str | Path) -> Path:
        """Keep them beside a table, where ``crp report`` finds them until the table changes."""
        arrays = {name: getattr(self, name) for name in ("concept", "sample", "target")}
        score = np.where(np.isfinite(self.score), self.score, -1.0)
        return keep_result(table, "context", self.layer, arrays | {"score": score}, {})


def contexts(
    fv: FeatureVisualization,
    composite: Composite | None,
    layer: str,
    samples: Sequence[int],
    inside: Tensor | Sequence[Tensor],
    concept_ids: Sequence[int] | None = None,
    *,
    targets: Sequence[int] | None = None,
    batch_size: int = 32,
) -> Contexts:
    """Context scores of a mined layer's concepts on samples of the data set, for the pages of a report.

    Parameters
    ----------
    fv : FeatureVisualization
        After a run.
    composite : zennit Composite, or None for the plain gradient
    layer : str
    samples : sequence of int
        Of the data set; all are of one shape.
    inside : Tensor of shape (samples, *space), bool
        The object in each of them, as for `context_scores`. Of texts, a list with a tensor of shape (tokens,) for each.
    concept_ids : sequence of int, optional
        All of the layer by default.
    targets : sequence of int, optional
        Outputs that are explained; by default, those predicted.
    batch_size : int
        Rows attributed at once.

    Returns
    -------
    Contexts
    """
    numbers, ids, data, classes = _read_samples(fv, layer, samples, concept_ids, targets, "contexts")
    if isinstance(data, list):
        check_number("batch_size", batch_size, 1, whole=True)
        masks = list(inside) if isinstance(inside, Sequence | Tensor) else [inside]
        score = context_in_texts(fv, composite, layer, ids.tolist(), data, classes, masks, batch_size)
    else:
        score = context_scores(
            fv.attribution, data, classes, composite, layer, fv.layer_map[layer], ids.tolist(), cast(Tensor, inside),
            batch_size=batch_size,
        )  # fmt: skip
    return Contexts(layer, ids, numbers, np.asarray(classes, np.int64), score.detach().cpu().double().numpy())


def inside_boxes(boxes: Tensor, shape: Sequence[int]) -> Tensor:
    """Pixels inside of each box, of shape (boxes, height, width): those whose middle is.

    Parameters
    ----------
    boxes : Tensor of shape (boxes, 4)
        ``x1, y1, x2, y2`` as detectors of torchvision give them, in pixels.
    shape : (int, int)
        Height and width of the picture.

    Examples
    --------
    >>> inside_boxes(torch.tensor([[1.0, 0.0, 3.0, 1.0]]), (2, 4)).int()
    tensor([[[0, 1, 1, 0],
             [0, 0, 0, 0]]], dtype=torch.int32)
    """
    check_kind("shape", shape, Sequence, "a height and a width")
    check_kind("boxes", boxes, Tensor, "a tensor of shape (boxes, 4)")
    if boxes.dim() != 2 or boxes.shape[1] != 4 or len(shape) != 2:
        raise InputError(
            f"boxes must be of shape (boxes, 4), and shape be height and width; they are {tuple(boxes.shape)} and "
            f"{tuple(shape)}"
        )
    within = []
    for axis, size in enumerate(shape):
        middles = torch.arange(size, device=boxes.device) + 0.5
        first, last = (boxes[:, 1 - axis + 2 * end, None] for end in (0, 1))
        within.append((first < middles) & (middles < last))
    rows, columns = within
    return rows[:, :, None] & columns[:, None, :]
