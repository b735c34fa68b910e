"""``crp attribute --page``: which concepts a picture's page shows, with their heatmaps, and the graph of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from crp.commands.errors import CommandError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from crp.visualization.models import Loaded
    from crp.visualization.report.explained import ExplainedConcept, ExplainedGraph

#: Concepts that are shown, unless they are named.
_FEW = 4


class PageConcepts(NamedTuple):
    """What is asked for: the layer (the last suggested one by default), its concepts, and layers of the graph."""

    layer: str | None
    concepts: Sequence[int]
    graph: Sequence[str] = ()


class FoundConcepts(NamedTuple):
    """What a page shows of concepts; nothing by a method that has no relevance of layers."""

    layer: str = ""
    concepts: Sequence[ExplainedConcept] = ()
    graph: ExplainedGraph | None = None

    def as_data(self) -> list[dict[str, Any]]:
        """Edges of the graph between concepts, for machines."""
        if self.graph is None:
            return []
        ends = [(*pair, share) for pair, share in self.graph.edges.items() if pair[0][0] in self.graph.layers]
        return [{"from": list(above), "to": list(below), "share": share} for above, below, share in ends]


def concepts_of_picture(
    asked: PageConcepts, method: str, loaded: Loaded, data: Tensor, target: int, given: Mapping[str, Any]
) -> FoundConcepts:
    """Layer, and its concepts with their shares and heatmaps, and how relevance flows from them to lower layers."""
    from crp.attributors.explaining import explain, find_method
    from crp.attributors.flow import concept_flow, through_concepts
    from crp.concepts.ids import in_range
    from crp.visualization.mining.axes import concepts_of_channels
    from crp.visualization.report.explained import ExplainedConcept, ExplainedGraph

    how = find_method(method)
    if not how.has_concepts:
        # (the layer of a class activation map is where the map is made)
        layer_named = asked.layer is not None and how.family != "cam"
        wrong = [(asked.concepts, "--concept"), (asked.graph, "--graph"), (layer_named, "--layer")]
        if named := [option for value, option in wrong if value]:
            raise CommandError(f"method {method!r} has no relevance of concepts; leave {' and '.join(named)} out")
        return FoundConcepts()
    explained = partial(explain, method, loaded.model, data, target, **given)
    layers = _layers(asked, loaded.model, data, explained)
    if not layers:
        return FoundConcepts()
    known, top = concepts_of_channels(loaded.model, data, layers), layers[0]

    def heatmap(layer: str, one: int) -> Tensor:
        relevance: Tensor = explained(**through_concepts(known, {layer: [one]}))
        return relevance[0].sum(0)

    shares = known[top].attribute(explained(layer=top), layer_name=top, abs_norm=True)[0].detach()
    chosen = asked.concepts or shares.argsort(descending=True, stable=True)[:_FEW].tolist()
    # (as everywhere, -1 is the last; one that is named twice is shown once)
    chosen = list(dict.fromkeys(one % len(shares) for one in in_range(chosen, len(shares), top, "concept")))
    concepts = [ExplainedConcept(str(one), float(shares[one]), heatmap(top, one)) for one in chosen]
    if len(layers) == 1:
        return FoundConcepts(top, concepts)
    maps = {(top, one): part.heatmap for one, part in zip(chosen, concepts, strict=True)}
    flow = concept_flow(method, loaded.model, data, target, known, width=_FEW, concepts=chosen, **given)
    columns: list[dict[Any, tuple[str, Tensor | None]]] = [
        dict.fromkeys(flow.columns[0], (loaded.class_name(target), None))
    ]
    for column in flow.columns[1:]:
        columns.append({node: (str(node[1]), maps[node] if node in maps else heatmap(*node)) for node in column})
    return FoundConcepts(top, concepts, ExplainedGraph(columns, flow.edges, layers))


def _layers(asked: PageConcepts, model: nn.Module, data: Tensor, explained: Callable[..., Tensor]) -> list[str]:
    """Layer whose concepts are shown, and those below it in the graph; none where no layer can be suggested."""
    from crp.attributors.flow import through_concepts
    from crp.errors import CRPError
    from crp.visualization.mining.axes import concepts_of_channels
    from crp.visualization.mining.selection import list_layers

    suggested = [one.name for one in list_layers(model, data) if one.suggested]

    def carries(*layers: str) -> bool:
        """Whether relevance flows through these layers, from the output to the input, with an entry for each sample."""
        try:
            known = concepts_of_channels(model, data, layers)
            explained(layer=layers[-1], **through_concepts(known, {layer: [0] for layer in layers}))
        except CRPError:
            return False
        return True

    layer = next(filter(carries, reversed(suggested)), None) if asked.layer is None else asked.layer
    if layer is None:
        if asked.graph:
            raise CommandError("--graph needs the --layer that it begins with: no layer of the model is suggested")
        return []
    lower = list(asked.graph)
    if not lower and layer in suggested[1:]:
        below = suggested[: suggested.index(layer)]
        lower = next(([one] for one in reversed(below) if carries(layer, one)), [])
    if len({layer, *lower}) <= len(lower):
        raise CommandError(f"--graph has a layer twice: {', '.join([layer, *lower])}, of which the first is --layer")
    return [layer, *lower]
