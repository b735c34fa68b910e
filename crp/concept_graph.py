"""The graph of concepts that a prediction flows through."""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from zennit.core import Composite

from crp.checks import check_number
from crp.concepts import Concept, mask_of, normalize
from crp.concepts.reading import LayerValues, relevance_sums
from crp.engine.door import check_attribution
from crp.engine.inputs import Data, Explain, Inputs
from crp.engine.targets import check_target
from crp.errors import InputError, InputTypeError, NameNotFoundError, OutOfRangeError
from crp.flags import check_flags
from crp.trace.graph import ModelGraph
from crp.types import AttributionGraphResults, AttributionResults, Condition, Node
from crp.wording import shortened


class _Generating(Protocol):
    """What a graph needs of a `CondAttribution`."""

    MODEL_OUTPUT_NAME: str

    def generate(
        self, data: Data, conditions: Sequence[Condition], composite: Composite | None, **keywords: Any
    ) -> Iterable[AttributionResults]:
        """Attribute many conditions in parts."""


class AttributionGraph:
    """Decomposes a concept, in the context of one prediction, into the concepts of the layers that feed it.

    Parameters
    ----------
    attribution : crp.attribution.CondAttribution
    graph : ModelGraph
        Which layer feeds which, from `crp.trace.graph.trace_model_graph`.
    layer_map : dict of str to Concept
        Concept type of each layer.
    exclude_parallel : bool
        Whether connections are of relevance that flows through their concept alone. By default, as in zennit-crp, that
        which flows past it, such as through the shortcut of a residual block, counts, too.
    """

    def __init__(
        self,
        attribution: _Generating,
        graph: ModelGraph,
        layer_map: Mapping[str, Concept],
        *,
        exclude_parallel: bool = False,
    ) -> None:
        check_flags(exclude_parallel=exclude_parallel)
        check_attribution(attribution)
        self.exclude_parallel = exclude_parallel
        self.attribution = attribution
        self.graph = graph
        self.set_layer_map(layer_map)

    def set_layer_map(self, layer_map: Mapping[str, Concept]) -> None:
        """Set the concept type of each layer, by the layer's name."""
        concepts = layer_map.values() if isinstance(layer_map, Mapping) else [None]
        if any(isinstance(concept, type) or not hasattr(concept, "mask") for concept in concepts):
            raise InputTypeError(f"layer_map must be a dict of layers and concepts, not {shortened(layer_map)}")
        self.layer_map = dict(layer_map)
        self.mask_map = {name: mask_of(concept) for name, concept in layer_map.items()}

    def __call__(
        self,
        sample: Data,
        composite: Composite | None,
        concept_id: Hashable,
        layer_name: str,
        target: int | None = None,
        width: Sequence[int] = (4, 2),
        parent_c_id: Hashable | None = None,
        parent_layer: str | None = None,
        abs_norm: bool = True,
        batch_size: int = 16,
        verbose: bool = True,
        *,
        explain: Explain = None,
    ) -> AttributionGraphResults:
        """Decompose a concept level by level.

        Parameters
        ----------
        sample : Tensor of shape (1, *input shape), or tuple or dict of them
        composite : zennit.core.Composite, optional
        concept_id : int
            Concept to decompose.
        layer_name : str
            Its layer.
        target : int, optional
            Decompose in the context of this output; otherwise relevance starts at the concept (or its parent).
        width : sequence of int
            Number of concepts kept per input layer at each level; its length is the number of levels.
        parent_c_id : int, optional
            Concept in whose context ``concept_id`` is decomposed.
        parent_layer : str, optional
            Layer of ``parent_c_id``.
        abs_norm : bool
            Whether connections carry shares of a layer's relevance, or relevance.
        batch_size : int
            Conditions attributed at a time.
        verbose : bool
            Whether to show progress bars.
        explain : int, str, or sequence of these, optional
            Inputs that are explained, as in `CondAttribution`.

        Returns
        -------
        AttributionGraphResults
            ``nodes, connections``. Levels below the first layer of the model are absent.

        Raises
        ------
        ValueError
            If ``sample`` is more than one sample, only one of ``parent_c_id`` and ``parent_layer`` is given, that layer
            is not above ``layer_name``, or a number in ``width`` is less than 1.
        KeyError
            If a layer has no entry in ``layer_map``.
        """
        check_flags(abs_norm=abs_norm, verbose=verbose)
        inputs = Inputs.of(sample, explain, getattr(self.attribution, "model", None))
        if len(inputs) != 1:
            raise InputError(f"an attribution graph belongs to one sample; sample has {len(inputs)}")
        if not isinstance(width, Collection):
            raise InputTypeError(f"width must be a list, with the number of concepts kept at each level; not {width!r}")
        for n_kept in width:
            check_number("each number in width", n_kept, least=1, whole=True)
        self._check_mapped([layer_name])
        self._check_parent(layer_name, parent_c_id, parent_layer)
        if isinstance(concept_id, Tensor | np.generic) and math.prod(concept_id.shape) == 1:
            concept_id = concept_id.item()  # (a node whose number is a tensor could not be found again)
        # (An overridden `generate` need not know of it.)
        named: dict[str, Any] = {} if explain is None else {"explain": explain}
        top, top_id = (layer_name, concept_id) if parent_layer is None else (parent_layer, parent_c_id)
        context: dict[str, Any] = {top: [top_id]}
        if target is not None:
            check_target(target, "target")
            context[self.attribution.MODEL_OUTPUT_NAME] = [target]

        nodes: list[Node] = [(layer_name, concept_id)]
        connections: dict[Node, list[tuple[str, Hashable, float]]] = {}
        level = list(nodes)
        for n_kept in width:
            before = list(dict.fromkeys(name for layer, _ in level for name in self.graph.find_input_layers(layer)))
            self._check_mapped(before)
            if not before:
                break
            parts = self.attribution.generate(
                sample, [context | {layer: [concept]} for layer, concept in level], composite, record_layer=before,
                mask_map=self.mask_map, start_layer=top if target is None else None, batch_size=batch_size,
                exclude_parallel=self.exclude_parallel, verbose=verbose, **named,
            )  # fmt: skip
            relevant = (self._most_relevant(part, row, abs_norm, n_kept) for part in self._naming(target, parts)
                        for row in range(len(part.prediction)))  # fmt: skip
            lower: list[Node] = []
            for node, concepts in zip(level, relevant, strict=True):
                for name in self.graph.find_input_layers(node[0]):
                    connections.setdefault(node, []).extend((name, concept, value) for concept, value in concepts[name])
                    lower.extend((name, concept) for concept, _ in concepts[name])
            nodes += lower
            level = lower
        return AttributionGraphResults(nodes, connections)

    def _most_relevant(
        self, results: AttributionResults, row: int, abs_norm: bool, n_kept: int
    ) -> dict[str, list[tuple[int, float]]]:
        """Concepts of each layer with the greatest relevance for one row, and that relevance."""
        most_relevant = {}
        for name, relevances in results.relevances.items():
            if name in self.layer_map:
                n_entries = len(relevances) // len(results.prediction)
                values = LayerValues.of(results, name).rows(slice(row * n_entries, (row + 1) * n_entries))
                # (shares are those of the sum over all entries, such as windows)
                value = relevance_sums(self.layer_map[name], values, name, abs_norm and n_entries == 1).sum(0)
                value = normalize(value) if abs_norm and n_entries > 1 else value
                order = torch.argsort(value, descending=True, stable=True)[:n_kept].tolist()
                most_relevant[name] = [(concept, value[concept].item()) for concept in order]
        return most_relevant

    def _naming(self, target: object, parts: Iterable[AttributionResults]) -> Iterator[AttributionResults]:
        """The parts; an error about the target, in whose context all are, calls it as the caller does."""
        try:
            yield from parts
        except OutOfRangeError as error:
            of_row = f"row 0: {self.attribution.MODEL_OUTPUT_NAME!r} is [{target!r}]"
            raise OutOfRangeError(str(error).replace(of_row, f"target is {target!r}")) from error

    def _check_parent(self, layer: str, parent_c_id: Hashable | None, parent_layer: str | None) -> None:
        if (parent_c_id is None) != (parent_layer is None):
            raise InputError(
                f"parent_c_id ({parent_c_id!r}) and parent_layer ({parent_layer!r}) belong together; give both or none"
            )
        known, todo = {layer}, [layer] if parent_layer is not None else []
        while todo:
            below = set(self.graph.find_input_layers(todo.pop())) - known
            known |= below
            todo += below
        if parent_layer in known:
            raise InputError(f"parent_layer {parent_layer!r} must be a layer that {layer!r} feeds")

    def _check_mapped(self, layers: Iterable[str]) -> None:
        for name in layers:
            if not isinstance(name, str) or name not in self.layer_map:
                raise NameNotFoundError(f"layer_map has no concept for layer {name!r}; it has {sorted(self.layer_map)}")
