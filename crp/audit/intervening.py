"""Interventions: what the prediction is when a concept is switched off, scaled, or taken from another sample.

Relevance is a hypothesis about what the model uses; an intervention is its test.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from crp.attribution import CondAttribution
from crp.audit.asked import _check_asked, _named_concepts, _one_for_each
from crp.checks import check_number
from crp.concepts import Concept
from crp.concepts.base import check_is_concept
from crp.engine.attached import put_on
from crp.engine.independence import check_independent
from crp.engine.inputs import Inputs, check_data
from crp.engine.taps import changed_at, check_changed_once
from crp.errors import InputError, OutOfRangeError
from crp.kinds import check_kind
from crp.visualization.without import kept_part


def part_of(concept: Concept, activation: Tensor, concept_ids: Any, layer_name: str | None = None) -> Tensor:
    """Part of an activation that belongs to some concepts: channels themselves, or ``(e·a) d`` of a direction.

    It is what the mask of relevance does, the other way round: for every multiplier, the product with it is what the
    mask lets through.

    Parameters
    ----------
    concept : Concept
    activation : Tensor of shape (rows, *layer shape)
    concept_ids : int, or sequence of int
    layer_name : str, optional
        Told to the concept's mask.

    Returns
    -------
    Tensor of shape (rows, *layer shape)
    """
    check_is_concept("concept", concept)
    check_kind("activation", activation, Tensor, "a tensor")
    return kept_part([concept.mask(row, concept_ids, layer_name) for row in range(len(activation))], activation)


def intervene(
    attribution: CondAttribution,
    data: Tensor,
    layer: str,
    concept: Concept,
    concept_ids: Sequence[int],
    targets: int | Sequence[int],
    *,
    scale: float = 0.0,
    patch: Tensor | None = None,
) -> Tensor:
    """Change of the model's output when one concept is changed, for each of several.

    Parameters
    ----------
    attribution : CondAttribution
    data : Tensor of shape (samples, ...)
    layer : str
        Named as in conditions: ``"name.input"`` is what a layer is called with, ``"name#1"`` its second call.
    concept : Concept
        Its concepts are changed at all positions.
    concept_ids : sequence of int
        One at a time.
    targets : int or sequence of int
        Output that is looked at, of all samples or of each.
    scale : float
        What the concept's part of the activation is multiplied by; 0 switches it off.
    patch : Tensor of the shape of the data, optional
        Samples whose part of the activation takes its place, multiplied by ``scale`` (1 is usual then).

    Returns
    -------
    Tensor of shape (samples, concepts)
        Output after the change, less the output before.
    """
    _check_asked(attribution, data, concept)
    check_data(data)
    ids, classes = _named_concepts(concept_ids, layer), _one_for_each(targets, len(data), "targets")
    check_number("scale", scale)
    if patch is not None:
        check_data(patch, "patch")
        if patch.shape != data.shape:
            raise InputError(f"patch is of shape {tuple(patch.shape)}, and the data of {tuple(data.shape)}")

    def output_of(samples: Tensor, model: Any) -> Tensor:
        output = attribution.select_output(Inputs.of(samples.to(attribution.device)).run(model))
        if output.dim() != 2:
            raise InputError(f"targets are outputs of shape (samples, outputs); the model's is {tuple(output.shape)}")
        n_outputs = output.shape[1]
        if wrong := [one for one in classes if not -n_outputs <= one < n_outputs]:
            raise OutOfRangeError(f"the model has outputs 0 to {n_outputs - 1}; there is no output {wrong[0]}")
        columns = torch.tensor(classes, device=output.device) % n_outputs
        return output.gather(1, columns[:, None])[:, 0]

    others: list[Tensor] = []

    def keep(output: Tensor) -> Tensor:
        others.append(output.detach().clone())
        return output

    def change(concept_id: int, output: Tensor) -> Tensor:
        part, *of_others = (part_of(concept, values, [concept_id], layer) for values in (output, *others))
        return output - part + scale * (of_others[0] if others else part)

    def with_layer(changing: Callable[[Tensor], Tensor], samples: Tensor) -> Tensor:
        with changed_at(attribution.model, layer, changing) as calls:
            output = output_of(samples, attribution.model)
        check_changed_once(layer, calls)
        return output

    check_independent(
        attribution.model, Inputs.of(data.to(attribution.device)), [range(len(data))], attribution.select_output
    )
    with torch.no_grad(), put_on(None, attribution.model) as model:
        before = output_of(data, model)
        if patch is not None:
            with_layer(keep, patch)
        return torch.stack([with_layer(partial(change, concept_id), data) - before for concept_id in ids], 1)
