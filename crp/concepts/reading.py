"""What concepts read in the results of an attribution, and a check that a concept type agrees with itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from crp.concepts.axes import AxisConcept
from crp.concepts.base import Concept, check_is_concept, mask_of
from crp.concepts.scores import ConceptScores, by_position, scores_of
from crp.errors import ConceptError, InputTypeError, NameNotFoundError
from crp.kinds import check_kind
from crp.notices import kind_of, warn
from crp.types import AttributionResults


class LayerValues(NamedTuple):
    """What an attribution recorded of one layer.

    Attributes
    ----------
    activation : Tensor of shape (rows, *layer shape)
    relevance : Tensor of the same shape
    multiplier : Tensor of the same shape, or None
        None where it is not known, as under composites of zennit.
    counted : Tensor of the same shape, or None
        What relevance counts: the activation, or what it differs by from a reference. None where relevance is not its
        product with the multiplier.
    """

    activation: Tensor
    relevance: Tensor
    multiplier: Tensor | None = None
    counted: Tensor | None = None

    @classmethod
    def of(cls, result: AttributionResults, layer: str) -> LayerValues:
        """Values of a recorded layer."""
        check_kind("result", result, AttributionResults, "what an attribution gives")
        for recorded in (result.activations, result.relevances):
            if not isinstance(layer, str) or layer not in recorded:
                raise NameNotFoundError(f"layer {layer!r} was not recorded; the result has {sorted(recorded)}")
        multipliers, counted = result.multipliers or {}, result.counted or {}
        return cls(result.activations[layer], result.relevances[layer], multipliers.get(layer), counted.get(layer))

    def rows(self, chosen: slice | Sequence[int]) -> LayerValues:
        """Values of some rows."""
        at = chosen if isinstance(chosen, slice) else list(chosen)
        return LayerValues(*(None if tensor is None else tensor[at].detach() for tensor in self))  # type: ignore[arg-type]


def relevance_in(concept: Concept, result: AttributionResults, layer_name: str) -> Tensor:
    """Relevance of every concept at every position, from the result of an attribution.

    Parameters
    ----------
    concept : Concept
    result : AttributionResults
        With the layer among its recorded ones.
    layer_name : str

    Returns
    -------
    Tensor of shape (rows, concepts, *positions)

    Raises
    ------
    KeyError
        If the layer was not recorded.
    TypeError
        If the concepts need multipliers, and the composite propagated relevance itself.
    """
    check_is_concept("concept", concept)
    return relevance_at(concept, LayerValues.of(result, layer_name), layer_name)


def code_of(concept: Any, activation: Tensor) -> Tensor:
    """How active each concept is: `Concept.code`, or the activation for concepts from before it."""
    code = getattr(concept, "code", None)
    return activation if code is None else code(activation)


def activation_scores(concept: Any, activation: Tensor, layer_name: str) -> ConceptScores:
    """Scores of every concept of every sample by how active it was."""
    if _has_own(concept, "code"):
        return scores_of(code_of(concept, activation), layer_name)
    found: ConceptScores = concept.scores(activation, layer_name)
    return found


def activation_sums(concept: Any, activation: Tensor, layer_name: str) -> Tensor:
    """How active every concept is, summed over its positions, of shape (rows, concepts)."""
    if _has_own(concept, "code"):
        return by_position(code_of(concept, activation), layer_name).sum(-1)
    found: Tensor = concept.attribute(activation, layer_name=layer_name, abs_norm=False)
    return found


def relevance_scores(concept: Any, values: LayerValues, layer_name: str) -> ConceptScores:
    """Scores of every concept of every sample by how relevant it was."""
    if _has_own(concept, "relevance") and concept.needs_multiplier:
        return scores_of(relevance_at(concept, values, layer_name), layer_name)
    found: ConceptScores = concept.scores(values.relevance, layer_name)
    return found


def relevance_sums(concept: Any, values: LayerValues, layer_name: str, abs_norm: bool = True) -> Tensor:
    """Relevance of every concept, of shape (rows, concepts): `Concept.attribute`, also where it needs multipliers."""
    if _has_own(concept, "relevance") and concept.needs_multiplier:
        return Concept().attribute(relevance_at(concept, values, layer_name), layer_name=layer_name, abs_norm=abs_norm)
    found: Tensor = concept.attribute(values.relevance, layer_name=layer_name, abs_norm=abs_norm)
    return found


def initial_relevance_of(
    concept: Any, activation: Tensor, concept_id: int, positions: Sequence[int] | None = None
) -> Tensor:
    """Relevance that explains how active one concept is: activation times the gradient of the concept's `code`.

    Parameters
    ----------
    concept : Concept
    activation : Tensor of shape (rows, *layer shape)
    concept_id : int
        Its place on axis 1 of `code`.
    positions : sequence of int, optional
        One for each row, in the flattened space of `code`; by default, the sum over all positions is explained.

    Returns
    -------
    Tensor of shape (rows, *layer shape)
    """
    with torch.enable_grad():
        leaf = activation.detach().clone().requires_grad_()
        code = code_of(concept, leaf)
        values = code.reshape(*code.shape[:2], -1)[:, concept_id]
        if positions is not None:
            values = values[range(len(values)), list(positions)]
        (gradient,) = torch.autograd.grad(values.sum(), leaf)
    return leaf.detach() * gradient


def starts_by_code(concept: Any) -> bool:
    """Whether only `initial_relevance_of` explains how active a concept is.

    Channels, and places along an axis, are parts of the activation, which their mask lets through.
    """
    return _has_own(concept, "code") and type(concept).code is not AxisConcept.code


def check_concept(concept: Concept, values: LayerValues, layer_name: str) -> None:
    """Compare a concept type's scores with the relevance that its mask lets through, in one row.

    Compared are the strongest, the first and the last concept. Concept types without a mask, or with ids that are
    tuples, are not checked.

    Parameters
    ----------
    concept : Concept
    values : LayerValues
        Of one batch; its first row is looked at.
    layer_name : str

    Raises
    ------
    ConceptError
        If they differ. For concept types from before `Concept.relevance` it is a warning.
    """
    if hasattr(concept, "column") or not _has_own(concept, "mask"):
        return
    first = values.rows(slice(1))
    flows, counted = (
        (first.relevance, torch.ones_like(first.relevance))
        if first.counted is None or first.multiplier is None
        else (first.multiplier, first.counted)
    )
    of_device = relevance_scores(concept, first, layer_name).sum[0]
    dtype = torch.promote_types(of_device.dtype, torch.float32)
    whole_of_device = first.relevance.abs().sum(dtype=dtype)
    # (two copies to the host, whatever the number of concepts: each waits for the device)
    *scores, whole = torch.cat([of_device.to(dtype), whole_of_device[None]]).tolist()
    if math.isnan(whole):
        return
    make = mask_of(concept)
    ids = sorted({max(range(len(scores)), key=lambda i: abs(scores[i])), 0, len(scores) - 1})
    let_through = []
    for concept_id in ids:
        masked = make(0, [concept_id], layer_name)(flows.clone())
        if not isinstance(masked, Tensor) or masked.shape != flows.shape:
            raise ConceptError(
                f"layer {layer_name!r}: the function that {type(concept).__name__}.mask returns must return the masked "
                f"gradient, of {tuple(flows.shape)}; it returns {kind_of(masked)}"
            )
        let_through.append((counted * masked).sum(dtype=dtype))
    for concept_id, kept in zip(ids, torch.stack(let_through).tolist(), strict=True):
        score = scores[concept_id]
        if abs(kept - score) <= 1e-3 * whole + torch.finfo(flows.dtype).tiny:
            continue
        message = (
            f"layer {layer_name!r}: {concept!r} contradicts itself. It scores {concept.describe(concept_id)} by "
            f"{score:.4g}, but its mask lets {kept:.4g} of the relevance through; define "
            f"{type(concept).__name__}.relevance(activation, multiplier) so that both agree"
        )
        older = any(_has_own(concept, name) for name in ("scores", "reference_sampling"))
        if not older or concept.needs_multiplier or _has_own(concept, "relevance"):
            raise ConceptError(message)
        warn(message)
        return


def relevance_at(concept: Concept, values: LayerValues, layer_name: str) -> Tensor:
    """Relevance of every concept at every position, (rows, concepts, *positions)."""
    check_is_concept("concept", concept)
    if not concept.needs_multiplier:
        return concept._from_relevance(values.relevance, layer_name)
    if values.counted is None or values.multiplier is None:
        raise InputTypeError(
            f"layer {layer_name!r}: {concept!r} needs multipliers, and relevance is their product with activation; the "
            "composite propagates relevance itself, gives gradients, or averages over references. Use one of "
            "crp.composites, such as EpsilonPlus or GradientTimesInput"
        )
    return concept.relevance(values.counted, values.multiplier)


def _has_own(concept: Any, method: str) -> bool:
    """Whether a concept type defines a method, and does not inherit that of `Concept`."""
    defined = getattr(type(concept), method, None)
    return defined is not None and defined is not getattr(Concept, method)
