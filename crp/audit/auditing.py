"""Audit of single predictions against the prototypes of their class: usual or not, and in what."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from zennit.core import Composite

from crp.attribution import CondAttribution
from crp.audit.prototypes import Prototypes
from crp.concepts import Concept
from crp.concepts.reading import LayerValues, relevance_sums
from crp.visualization.mining.targets import choose_targets
from crp.visualization.mining.text_batches import Asked


class Use(NamedTuple):
    """How much more, or less, a sample uses a concept than its prototype.

    Attributes
    ----------
    concept : int
    name : str
    difference : float
        Of the relevance, or its share.
    """

    concept: int
    name: str
    difference: float


class AuditedSample(NamedTuple):
    """Audit of one sample.

    Attributes
    ----------
    predicted : int
    percentile : float
        Share, in percent, of the class's samples that are no more likely than this one: 0 for a new kind of outlier.
    prototype : int
        The most likely one.
    nearest : int
        Sample of the mined data set that shows it.
    over, under : list of Use
        Concepts used more and less than by the prototype, those with the largest difference first.
    """

    predicted: int
    percentile: float
    prototype: int
    nearest: int
    over: list[Use]
    under: list[Use]

    def __str__(self) -> str:
        over, under = (", ".join(f"{u.name} ({u.difference:+.3f})" for u in uses) for uses in (self.over, self.under))
        return (
            f"class {self.predicted}, percentile {self.percentile:.1f}, prototype {self.prototype} as in sample "
            f"{self.nearest}; more of {over or 'nothing'}; less of {under or 'nothing'}"
        )


def audit(
    attribution: CondAttribution,
    data: Tensor,
    composite: Composite | None,
    found: Prototypes,
    concept: Concept,
    *,
    k: int = 5,
    targets: Any = None,
) -> list[AuditedSample]:
    """Compare samples with the prototypes of the classes that are predicted for them.

    Parameters
    ----------
    attribution : CondAttribution
    data : Tensor of shape (samples, ...)
        As the model gets it.
    composite : zennit Composite, or None for the plain gradient
        The one with which the table was mined.
    found : Prototypes
    concept : Concept
        Concept type of their layer.
    k : int
        Number of concepts listed.
    targets : sequence of int, optional
        Classes in place of the predicted ones.

    Returns
    -------
    list of AuditedSample
        One for each sample.

    Raises
    ------
    KeyError
        If there are no prototypes of a class.
    """
    name = attribution.MODEL_OUTPUT_NAME
    if targets is None:
        targets = [chosen[0] for chosen in choose_targets("prediction", attribution, Asked.of(data, None))]
    classes = [int(target) for target in targets]
    result = attribution(data, [{name: target} for target in classes], composite, [found.layer])
    vectors = relevance_sums(concept, LayerValues.of(result, found.layer), found.layer, found.normed)
    rows = vectors.detach().cpu().numpy().astype(np.float64)
    findings = []
    for row, of_class in zip(rows, classes, strict=True):
        vector = row[None]
        prototype = int(found.assign(vector, of_class)[0])
        difference = found.deviation(vector, of_class)[0]
        order = np.argsort(-difference, kind="stable")
        over = [i for i in order[:k] if difference[i] > 0]
        under = [i for i in order[::-1][:k] if difference[i] < 0]
        uses = [[Use(int(i), concept.describe(int(i)), float(difference[i])) for i in ids] for ids in (over, under)]
        findings.append(
            AuditedSample(
                of_class,
                float(found.percentile(vector, of_class)[0]),
                prototype,
                int(found.classes[of_class].sample[prototype]),
                *uses,
            )
        )
    return findings
