"""``crp attribute --page``: which concepts a picture's page shows, with their heatmaps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from crp.commands.errors import CommandError

if TYPE_CHECKING:
    from torch import Tensor

    from crp.visualization.models import Loaded
    from crp.visualization.report.explained import ExplainedConcept

#: Concepts that are shown, unless they are named.
_FEW = 4
#: What a method must take, so that concepts of a layer have shares and heatmaps.
_NEEDED = frozenset({"layer", "condition", "mask_map"})


class PageConcepts(NamedTuple):
    """Which concepts are asked for: the layer (the last that ``crp layers`` suggests by default), and their numbers."""

    layer: str | None
    concepts: Sequence[int]


def concepts_of_picture(
    asked: PageConcepts, method: str, loaded: Loaded, data: Tensor, target: int, given: Mapping[str, Any]
) -> tuple[str, list[ExplainedConcept]]:
    """Layer, and its concepts with their shares and heatmaps; none by a method that has no relevance of layers."""
    from crp.attributors.explaining import explain, find_method
    from crp.visualization.mining.axes import concepts_of_channels
    from crp.visualization.mining.selection import list_layers
    from crp.visualization.report.explained import ExplainedConcept

    how = find_method(method)
    # (the layer of a class activation map is where the map is made)
    if how.family == "cam" or not _NEEDED.issubset(how.options):
        if asked.concepts or (asked.layer is not None and how.family != "cam"):
            wrong_option = "--concept" if asked.concepts else "--layer"
            raise CommandError(f"method {method!r} has no relevance of concepts; leave {wrong_option} out")
        return "", []
    layer = asked.layer
    if layer is None:
        suggested = [one.name for one in list_layers(loaded.model, data) if one.suggested]
        if not suggested:
            return "", []
        layer = suggested[-1]
    (concept,) = concepts_of_channels(loaded.model, data, [layer]).values()
    relevance = explain(method, loaded.model, data, target, layer=layer, **given)
    shares = concept.attribute(relevance, layer_name=layer, abs_norm=True)[0].detach()
    chosen = asked.concepts or shares.argsort(descending=True, stable=True)[:_FEW].tolist()
    if wrong := [one for one in chosen if not 0 <= one < len(shares)]:
        raise CommandError(f"layer {layer!r} has the concepts 0 to {len(shares) - 1}; there is no {wrong[0]}")
    found = []
    for one in chosen:
        condition: dict[str, Any] = {"condition": {layer: [one]}, "mask_map": concept.mask}
        heatmap = explain(method, loaded.model, data, target, **condition, **given)
        found.append(ExplainedConcept(str(one), float(shares[one]), heatmap[0].sum(0)))
    return layer, found
