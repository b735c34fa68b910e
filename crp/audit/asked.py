"""What is asked about samples: which concepts, which class of each, and by what it was found."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from crp.attribution import CondAttribution
from crp.concepts.base import check_is_concept
from crp.concepts.ids import as_ids
from crp.engine.door import check_attribution
from crp.errors import InputError
from crp.kinds import check_kind
from crp.visualization.mining.targets import choose_targets
from crp.visualization.mining.text_batches import Asked


def _check_asked(attribution: object, data: object, concept: object) -> None:
    """Raise a `TypeError` if these are no attribution, no tensor of samples, or no concept."""
    check_attribution(attribution)
    check_is_concept("concept", concept)
    check_kind("data", data, Tensor, "a tensor of samples")


def _check_found(found: object, kind: type) -> None:
    """Raise a `TypeError` if this is no result of a kind, whose function has its name."""
    check_kind("found", found, kind, f"what {kind.__name__.lower()}(table, ...) gives")


def _one_for_each(values: Any, n_samples: int, what: str) -> list[int]:
    """Classes that a user gives: a number for all samples, or one for each."""
    is_number = isinstance(values, int) or getattr(values, "ndim", 1) == 0
    classes = as_ids(values, what=what) * (n_samples if is_number else 1)
    if len(classes) != n_samples:
        raise InputError(f"there are {len(classes)} {what} for {n_samples} samples")
    return classes


def _named_concepts(concept_ids: Any, layer: str) -> list[int]:
    """Concepts of a layer that a user names, at least one."""
    if not (ids := as_ids(concept_ids, layer)):
        raise InputError("concept_ids is empty; name at least one concept")
    return ids


def predicted_by(attribution: CondAttribution, asked: Asked) -> list[int]:
    """Class, or token, that the model predicts for each sample."""
    return [target for [target] in choose_targets("prediction", attribution, asked)]
