"""Relevance against interventions: whether the concepts that are said to matter change the prediction."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from zennit.core import Composite

from crp.audit.asked import _one_for_each, predicted_by
from crp.audit.in_texts import change_in_texts, read_texts
from crp.audit.intervening import intervene
from crp.checks import check_number
from crp.concepts import as_ids
from crp.concepts.reading import LayerValues, relevance_sums
from crp.errors import InputError
from crp.metrics.sanity import rank_correlations
from crp.visualization.feature import FeatureVisualization, table_of
from crp.visualization.mining.text_batches import Asked
from crp.visualization.table.derived import keep_result
from crp.visualization.table.store import Table


class Interventions(NamedTuple):
    """Relevance of concepts on some samples, and what the output does when each is changed.

    Attributes
    ----------
    layer : str
    concept : ndarray of shape (concepts,), int64
    sample, target : ndarray of shape (samples,), int64
        Samples of the data set, and the outputs that are looked at.
    relevance, change : ndarray of shape (samples, concepts)
        Change is the output with the concept changed, less that of the whole model.
    scale : float
        What the concept's part of the activation was multiplied by; 0 where it was switched off.
    patched : bool
        Whether it was that of other samples.
    """

    layer: str
    concept: np.ndarray
    sample: np.ndarray
    target: np.ndarray
    relevance: np.ndarray
    change: np.ndarray
    scale: float
    patched: bool = False

    @property
    def agreement(self) -> float:
        """Rank correlation of relevance and loss of output over the concepts, mean over samples; 1 is the best."""
        return float(np.mean([rank_correlation(*pair) for pair in zip(self.relevance, -self.change, strict=True)]))

    def save(self, table: Table | str | Path) -> Path:
        """Keep them beside a table, where ``crp report`` finds them until the table changes."""
        arrays = {name: value for name, value in self._asdict().items() if isinstance(value, np.ndarray)}
        settings = {"scale": self.scale, "patched": self.patched, "agreement": self.agreement}
        return keep_result(table, "interventions", self.layer, arrays, settings)


def interventions(
    fv: FeatureVisualization,
    composite: Composite | None,
    layer: str,
    samples: Sequence[int],
    concept_ids: Sequence[int] | None = None,
    *,
    targets: int | Sequence[int] | None = None,
    scale: float = 0.0,
    patch: Sequence[int] | None = None,
) -> Interventions:
    """Switch concepts off, scale or patch them, one at a time, and compare what the output loses with their relevance.

    Parameters
    ----------
    fv : FeatureVisualization
        After a run.
    composite : zennit Composite, or None for the plain gradient
        Rules for the relevance.
    layer : str
    samples : sequence of int
        Of the data set; all are passed together, and texts one after the other.
    concept_ids : sequence of int, optional
        All of the layer by default.
    targets : int or sequence of int, optional
        Outputs that are looked at, one for all or for each; by default, those predicted.
    scale : float
        As in `intervene`.
    patch : sequence of int, optional
        As many samples of the data set, whose part of the activation takes its place; ``scale=1`` is usual then. Not of
        texts.

    Returns
    -------
    Interventions
    """
    check_number("scale", scale)
    numbers, ids, data, classes = _read_samples(fv, layer, samples, concept_ids, targets, "interventions")
    attribution, concept = fv.attribution, fv.layer_map[layer]
    if isinstance(data, list):
        if patch is not None:
            raise InputError(
                "texts have tokens of their own number, so that none is patched by another; leave patch out"
            )
        relevance, change = change_in_texts(fv, composite, layer, ids.tolist(), data, classes, scale)
    else:
        result = attribution(data, [{attribution.MODEL_OUTPUT_NAME: y} for y in classes], composite, [layer])
        relevance = relevance_sums(concept, LayerValues.of(result, layer), layer, abs_norm=False)[:, ids.tolist()]
        other = None if patch is None else fv.get_data_concurrently(patch, True)[0].detach()
        change = intervene(attribution, data, layer, concept, ids.tolist(), classes, scale=scale, patch=other)
    return Interventions(
        layer,
        ids,
        numbers,
        np.asarray(classes, np.int64),
        relevance.detach().cpu().double().numpy(),
        change.detach().cpu().double().numpy(),
        scale,
        patch is not None,
    )


def _read_samples(
    fv: FeatureVisualization,
    layer: str,
    samples: Sequence[int],
    concept_ids: Sequence[int] | None,
    targets: int | Sequence[int] | None,
    what: str,
) -> tuple[np.ndarray, np.ndarray, Tensor | list[Asked], list[int]]:
    """Numbers of samples, concept ids, data, and a target for each sample: those given, or all and those predicted.

    The data of texts is a list of what is asked of each.
    """
    given = as_ids(samples, what="samples")
    if not given:
        raise InputError(f"{what} need one sample at least")
    table = table_of(fv, layer)
    ids = table.concept_ids(layer, range(table.n_concepts(layer)) if concept_ids is None else concept_ids)
    data: Tensor | list[Asked]
    if fv.texts is not None:
        data, targets = read_texts(fv, given, targets)
    else:
        data = fv.get_data_concurrently(given, True)[0].detach()
        targets = predicted_by(fv.attribution, Asked.of(data, None)) if targets is None else targets
    classes = _one_for_each(targets, len(data), "targets")
    return np.asarray([number % len(fv.dataset) for number in given], np.int64), ids, data, classes


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's: the correlation of ranks, where equal values share theirs; 0 where one of them never varies."""
    return float(rank_correlations(*(torch.from_numpy(values)[None] for values in (one, other))))
