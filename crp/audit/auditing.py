"""Audit of single predictions against the prototypes of their class: usual or not, and in what."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from zennit.core import Composite

from crp.attribution import CondAttribution
from crp.audit.asked import _check_asked, _check_found, _one_for_each, predicted_by
from crp.audit.prototypes import Prototypes, _padded
from crp.checks import check_number
from crp.concepts import Concept, as_ids
from crp.concepts.reading import LayerValues, relevance_sums
from crp.engine.inputs import check_data
from crp.errors import InputError, NameNotFoundError
from crp.flags import check_function
from crp.visualization.analysis import RowSelection
from crp.visualization.mining.text_batches import Asked
from crp.visualization.table.derived import keep_result
from crp.visualization.table.ranking import top_k
from crp.visualization.table.store import Table

#: Reference samples of each concept that is used more or less.
_REFERENCES = 3


class Use(NamedTuple):
    """How much more, or less, a sample uses a concept than its prototype.

    Attributes
    ----------
    concept : int
    name : str
    difference : float
        Of the relevance, or its share.
    references : list of int
        Samples of the mined data set in which the concept is most relevant; empty where no table was given.
    """

    concept: int
    name: str
    difference: float
    references: Sequence[int] = ()


class AuditedSample(NamedTuple):
    """Audit of one sample.

    Attributes
    ----------
    predicted : int
        The class with whose prototypes it is compared: the predicted one, or that of ``targets`` or of the table's row.
    percentile : float
        Share, in percent, of the class's samples that are no more likely than this one: 0 for a new kind of outlier.
    prototype : int
        The most likely one.
    nearest : int
        Sample of the mined data set that shows it.
    over, under : list of Use
        Concepts used more and less than by the prototype, those with the largest difference first.
    sample : int or None
        Its number in the mined data set, where it is of one.
    """

    predicted: int
    percentile: float
    prototype: int
    nearest: int
    over: list[Use]
    under: list[Use]
    sample: int | None = None

    def __str__(self) -> str:
        over, under = (", ".join(f"{u.name} ({u.difference:+.2g})" for u in uses) for uses in (self.over, self.under))
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
    table: Table | str | Path | None = None,
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
    targets : int or sequence of int, optional
        Class of all samples or of each, in place of the predicted ones.
    table : Table, optional
        From which references of the concepts are taken.

    Returns
    -------
    list of AuditedSample
        One for each sample.

    Raises
    ------
    KeyError
        If there are no prototypes of a class.
    """
    _check_asked(attribution, data, concept)
    check_data(data)
    uses = _uses(found, getattr(concept, "describe", None), k, table)
    name = attribution.MODEL_OUTPUT_NAME
    targets = predicted_by(attribution, Asked.of(data, None)) if targets is None else targets
    classes = _one_for_each(targets, len(data), "targets")
    result = attribution(data, [{name: target} for target in classes], composite, [found.layer])
    vectors = relevance_sums(concept, LayerValues.of(result, found.layer), found.layer, found.normed)
    rows = vectors.detach().cpu().numpy().astype(np.float64)
    return [_compared(found, row[None], of_class, uses)[0] for row, of_class in zip(rows, classes, strict=True)]


def audit_table(
    table: Table | str | Path,
    found: Prototypes,
    samples: Sequence[int] | None = None,
    *,
    k: int = 5,
    describe: Callable[[int], str] | None = None,
) -> list[AuditedSample]:
    """Compare the mined samples with the prototypes of their class; neither model nor data are needed.

    Parameters
    ----------
    table : Table, or its folder
        From which the prototypes were made.
    found : Prototypes
    samples : sequence of int, optional
        All by default. A sample with rows for several classes is compared for each that has prototypes.
    k : int
        Number of concepts listed.
    describe : callable, optional
        Gives the name of a concept; ``"concept 3"`` by default.

    Returns
    -------
    list of AuditedSample
        The least usual first: by how far the log density is below the median of the class, in units of the distance
        between its quartiles, so that classes can be compared.

    Raises
    ------
    KeyError
        If a sample has no row of a class with prototypes.
    """
    uses = _uses(found, describe, k, table)
    table = Table.open(table)
    samples = None if samples is None else as_ids(samples, what="samples")
    audited: list[tuple[float, AuditedSample]] = []
    for of_class, mixture in found.classes.items():
        vectors, numbers = RowSelection(found.layer, normed=found.normed, of_class=of_class).read(table)
        if samples is not None:
            inside = np.isin(numbers, samples)
            vectors, numbers = vectors[inside], numbers[inside]
        if len(vectors):
            low, middle, high = np.percentile(mixture.log_density, [25, 50, 75])
            likely = (found.score(vectors, of_class) - middle) / max(high - low, 1e-300)
            audited += zip(likely.tolist(), _compared(found, vectors, of_class, uses, numbers.tolist()), strict=True)
    if samples is not None and (missed := sorted(set(samples) - {one.sample for _, one in audited})):
        raise NameNotFoundError(
            f"sample {missed[0]} of {table.n_samples} has no row of a class with prototypes, which are "
            f"{sorted(found.classes)}"
        )
    return [one for _, one in sorted(audited, key=lambda pair: (pair[0], pair[1].sample))]


def save_audit(table: Table | str | Path, found: Prototypes, audited: Sequence[AuditedSample]) -> Path:
    """Keep the audit of a table's samples beside it, where ``crp report`` finds it until the table changes.

    Parameters
    ----------
    table : Table, or its folder
    found : Prototypes
    audited : sequence of AuditedSample
        From `audit_table`.

    Returns
    -------
    Path
        The file.
    """
    _check_found(found, Prototypes)
    if not isinstance(audited, Sequence) or any(getattr(one, "sample", None) is None for one in audited):
        raise InputError("audited samples have no number in the table; audit_table gives those that have")
    numbers = [(one.sample, one.predicted, one.prototype, one.nearest) for one in audited]
    table_of_numbers = np.array(numbers, np.int64).reshape(len(audited), 4)
    columns = dict(zip(("sample", "target", "prototype", "nearest"), table_of_numbers.T, strict=True))
    columns["percentile"] = np.array([one.percentile for one in audited], np.float64)
    for name in ("over", "under"):
        uses = [getattr(one, name) for one in audited]
        columns[name] = _padded([[use.concept for use in of_one] for of_one in uses], -1)
        columns[f"{name}_difference"] = _padded([[use.difference for use in of_one] for of_one in uses], 0.0)
    return keep_result(table, "audit", found.layer, columns, {"normed": found.normed})


def _uses(
    found: Prototypes, describe: Callable[[int], str] | None, k: int, table: Table | str | Path | None
) -> Callable[[np.ndarray], tuple[list[Use], list[Use]]]:
    """What tells the concepts that are used more and less, from the difference to a prototype."""
    check_number("k", k, 0, whole=True)
    _check_found(found, Prototypes)
    check_function("describe", describe, "a concept's number")
    references = None if table is None else top_k(table, found.layer, k=_REFERENCES, cache=True).sample

    def use(i: int, difference: float) -> Use:
        shown = [] if references is None else references[:, i].tolist()
        return Use(i, f"concept {i}" if describe is None else describe(i), difference, shown)

    def uses(difference: np.ndarray) -> tuple[list[Use], list[Use]]:
        ranked = [(i, float(difference[i])) for i in np.argsort(-difference, kind="stable").tolist()]
        return [use(*one) for one in ranked[:k] if one[1] > 0], [use(*one) for one in ranked[::-1][:k] if one[1] < 0]

    return uses


def _compared(
    found: Prototypes,
    vectors: np.ndarray,
    of_class: int,
    uses: Callable[[np.ndarray], tuple[list[Use], list[Use]]],
    samples: Sequence[int | None] = (None,),
) -> list[AuditedSample]:
    """Audit of some vectors of one class."""
    likely, percentiles = found.assign(vectors, of_class).tolist(), found.percentile(vectors, of_class).tolist()
    nearest, used = found.classes[of_class].sample.tolist(), map(uses, found.deviation(vectors, of_class))
    return [
        AuditedSample(of_class, percentile, prototype, nearest[prototype], over, under, sample)
        for percentile, prototype, (over, under), sample in zip(percentiles, likely, used, samples, strict=True)
    ]
