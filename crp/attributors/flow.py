"""How relevance flows from a class through concepts of one layer after the other: the attribution graph of a sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias

from torch import nn

from crp.attributors.explaining import explain, find_method
from crp.checks import check_number
from crp.concepts import ChannelConcept, Concept, as_ids, mask_of
from crp.concepts.base import check_is_concept
from crp.engine.inputs import Data, Inputs
from crp.errors import InputError, InputTypeError, OutOfRangeError, StateError

#: A layer and a concept of it; ``("y", class)`` is the class.
_FlowNode: TypeAlias = tuple[str, int]


class ConceptFlow(NamedTuple):
    """What `concept_flow` finds.

    Attributes
    ----------
    columns : list of dict of (layer, concept) to float
        ``("y", class)`` alone, and then the concepts of each layer, from the output to the input, with the share of the
        class's relevance that flows through each.
    edges : dict of ((layer, concept), (layer, concept)) to float
        Share of the class's relevance that flows from a concept to one of the next layer.
    """

    columns: list[dict[_FlowNode, float]]
    edges: dict[tuple[_FlowNode, _FlowNode], float]


def concept_flow(
    method: str,
    model: nn.Module,
    data: Data,
    target: int,
    layers: Mapping[str, Concept] | Sequence[str],
    *,
    width: int = 4,
    concepts: Sequence[int] | None = None,
    **options: Any,
) -> ConceptFlow:
    r"""Concepts that a prediction is made of, layer by layer, and the relevance that flows between them.

    A concept :math:`c` of the first layer has the share :math:`R_c / \sum_k |R_k|` of the relevance in its layer. What
    flows from it to a concept :math:`d` of the next layer is this share times that of :math:`d` where relevance flows
    through :math:`c` alone; what flows through :math:`d` is the sum over the concepts that are kept above. Achtibat et
    al., "From attribution maps to human-understandable explanations through Concept Relevance Propagation", Nature
    Machine Intelligence 5 (2023).

    Parameters
    ----------
    method : str
        As for `crp.explain`; a composite, or a gradient.
    model : nn.Module
    data : Tensor of shape (1, *input shape), or tuple or dict of them
        One sample.
    target : int
        The class.
    layers : mapping of layer name to Concept, or sequence of layer names
        From the output to the input; each feeds the one before. Of names alone, the concepts are channels (axis 1).
    width : int
        How many concepts of each layer are kept, those through which most flows.
    concepts : sequence of int, optional
        Of the first layer, in place of those with the largest shares.
    **options
        As for `crp.explain`, such as ``output``.

    Returns
    -------
    ConceptFlow

    Raises
    ------
    ValueError
        If the method gives concepts no relevance, there are several samples, or a layer does not feed the one before.
    KeyError, IndexError, TypeError
        If there is no such layer, class or concept.

    Examples
    --------
    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    >>> flow = concept_flow("epsilon", net, torch.ones(1, 3), 1, ["3", "1"], width=2)
    >>> [len(column) for column in flow.columns]
    [1, 2, 2]

    `crp.image.plot_graph` draws it:

    >>> from crp.image import PictureNode, plot_graph
    >>> figure = plot_graph([{node: PictureNode(str(node[1])) for node in c} for c in flow.columns], flow.edges)
    """
    _check(method, target, width, layers)
    known = dict(layers) if isinstance(layers, Mapping) else {layer: ChannelConcept() for layer in layers}
    if (n_samples := len(Inputs.of(data, options.get("explain"), model))) != 1:
        raise InputError(f"concepts of one sample are shown; data has {n_samples}")

    def shares(layer: str, condition: Mapping[str, Sequence[int]]) -> list[float]:
        """Shares of a layer's concepts, where relevance flows through some of other layers alone."""
        through = through_concepts(known, condition) if condition else {}
        relevance = explain(method, model, data, target, layer=layer, **through, **options)
        result: list[float] = known[layer].attribute(relevance, layer_name=layer, abs_norm=True)[0].tolist()
        return result

    names, start = list(known), ("y", int(target))
    try:
        if len(names) > 1:
            shares(names[-1], {name: [0] for name in names})
    except StateError as error:
        raise InputError(f"layers {names} must go from the output to the input, each feeding the one before") from error
    own = shares(names[0], {})
    chosen = _strongest(own, width) if concepts is None else _named(concepts, len(own), names[0])
    columns: list[dict[_FlowNode, float]] = [{start: 1.0}, {(names[0], one): own[one] for one in chosen}]
    edges: dict[tuple[_FlowNode, _FlowNode], float] = {(start, node): share for node, share in columns[1].items()}
    for above, layer in pairwise(names):
        flows = {
            node: [share * part for part in shares(layer, {above: [node[1]]})] for node, share in columns[-1].items()
        }
        total = [sum(of_concept) for of_concept in zip(*flows.values(), strict=True)]
        kept = _strongest(total, width)
        edges |= {(node, (layer, one)): flow[one] for node, flow in flows.items() for one in kept if flow[one]}
        columns.append({(layer, one): total[one] for one in kept})
    return ConceptFlow(columns, edges)


def through_concepts(concepts: Mapping[str, Concept], condition: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Options of `crp.explain` by which relevance flows through some of the layers' concepts alone."""
    return {"condition": dict(condition), "mask_map": {layer: mask_of(concepts[layer]) for layer in condition}}


def _strongest(shares: Sequence[float], n: int) -> list[int]:
    return sorted(range(len(shares)), key=lambda concept: -shares[concept])[:n]


def _named(concepts: Sequence[int], n_concepts: int, layer: str) -> list[int]:
    """Concepts of a layer that a user has named."""
    chosen = as_ids(concepts, what="concepts")
    if not chosen:
        raise InputError(f"concepts is empty; name some of layer {layer!r}, or leave it out")
    if wrong := [one for one in chosen if not 0 <= one < n_concepts]:
        raise OutOfRangeError(f"layer {layer!r} has the concepts 0 to {n_concepts - 1}; there is no {wrong[0]}")
    return chosen


def _check(method: str, target: object, width: object, layers: object) -> None:
    known = find_method(method)
    if not known.has_concepts:
        raise InputError(f"method {known.name!r} has no relevance of concepts; a composite has, such as 'epsilon_plus'")
    if isinstance(target, bool) or not hasattr(target, "__index__"):
        raise InputTypeError(f"target must be a class, a whole number, not {target!r}")
    check_number("width", width, 1, whole=True)
    if isinstance(layers, str) or not isinstance(layers, Mapping | Sequence) or not layers:
        raise InputTypeError(f"layers must be names of layers, or a mapping of them to concepts; not {layers!r}")
    if isinstance(layers, Sequence) and len(set(layers)) < len(layers):
        raise InputError(f"layers {list(layers)} has a layer twice")
    for layer, concept in layers.items() if isinstance(layers, Mapping) else ():
        check_is_concept(f"layers[{layer!r}]", concept)
