"""Which layer feeds which.

`crp.provenance.trace` records one forward pass; two queries stand on it:

- `adjacent_pairs`: layers whose output goes, unchanged and to no one else, into another one, as an exact merge of
  batch norm needs it;
- `ModelGraph.find_input_layers`: the nearest layers, among chosen ones, that feed a layer, for `AttributionGraph`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor, nn

from crp.layers import LayerNotFoundError, find_layers, unwrap
from crp.provenance import Call, Node, Reader, Trace, trace, tracing

__all__ = [
    "Adjacency",
    "Call",
    "GraphNode",
    "ModelGraph",
    "Node",
    "Pair",
    "Reader",
    "Trace",
    "adjacent_pairs",
    "trace",
    "trace_model_graph",
    "tracing",
]

_logger = logging.getLogger(__name__)

ModuleTypes: TypeAlias = type[nn.Module] | tuple[type[nn.Module], ...]


class Pair(NamedTuple):
    """Two layers of which the second is the only reader of what the first hands out."""

    first_name: str
    first: nn.Module
    second_name: str
    second: nn.Module


class Adjacency(NamedTuple):
    """What `adjacent_pairs` returns.

    Attributes
    ----------
    pairs : list of Pair
        In the order in which the second layers were called.
    unpaired : dict of str to str
        For every other layer of either kind: its name, and why it is in no pair.
    """

    pairs: list[Pair]
    unpaired: dict[str, str]


def adjacent_pairs(record: Trace, first: ModuleTypes, second: ModuleTypes) -> Adjacency:
    """Layers of type `second` whose whole input is the output of a layer of type `first` that nothing else uses.

    Both are called once, the tensor is the same object (possibly handed through containers), unchanged and no part
    of the model's output, and nothing outside the two calls reads a parameter of either. So replacing the two layers by
    one that computes both leaves every other value of this forward pass as it is.

    Parameters
    ----------
    record : Trace
    first, second : module type or tuple of module types

    Returns
    -------
    Adjacency
    """
    pairs: list[Pair] = []
    unpaired: dict[str, str] = {}
    for call in record.calls:
        if isinstance(call.module, second):
            found = _partner(record, call, first)
            if isinstance(found, Call):
                pairs.append(Pair(found.layer, found.module, call.layer, call.module))
            else:
                unpaired[call.layer] = found
    paired = {name for pair in pairs for name in (pair.first_name, pair.second_name)}
    for name, module in record.modules.items():
        if isinstance(module, (first, second)) and name not in paired and name not in unpaired:
            unpaired[name] = _why_alone(record, name)
    return Adjacency(pairs, unpaired)


def _partner(record: Trace, call: Call, first: ModuleTypes) -> Call | str:
    """Call of type `first` that alone feeds `call`, and only it; otherwise the reason why there is none."""
    if (count := len(record.calls_of(call.layer))) > 1:
        return f"called {count} times"
    if len(call.inputs) != 1:
        return f"has {len(call.inputs)} inputs that the model made" if call.inputs else "input is made by no layer"
    node = call.inputs[0]
    while node.is_passed_on and not isinstance(node.call and node.call.module, first):
        node = node.sources[0]
    maker = node.call
    if node.kind != "output" or maker is None or not isinstance(maker.module, first):
        return f"input comes from {node}"
    if (count := len(record.calls_of(maker.layer))) > 1:
        return f"input comes from {maker.layer!r}, which is called {count} times"
    if len(maker.outputs) != 1:
        return f"input comes from {maker.layer!r}, which has {len(maker.outputs)} outputs"
    if others := _names(reader for reader in node.readers if not _ran_in(reader, call, maker)):
        return f"input comes from {maker.layer!r}, whose output is also read by {others}"
    for one in (maker, call):
        for name, parameter in one.module.named_parameters():
            readers = record.parameter_readers.get(id(parameter), [])
            if others := _names(reader for reader in readers if not _ran_in(reader, one)):
                return f"{name} of {one.layer!r} is also read by {others}"
    return maker


def _why_alone(record: Trace, name: str) -> str:
    """Reason why a layer is the first of no pair."""
    calls = record.calls_of(name)
    if len(calls) != 1:
        return f"called {len(calls)} times" if calls else "not called"
    readers = _names(reader for node in calls[0].outputs for reader in node.readers)
    return f"output is read by {readers}" if readers else "nothing reads its output"


def _ran_in(reader: Reader, *calls: Call) -> bool:
    return reader.call is not None and any(reader.call.within(call) for call in calls)


def _names(readers: Iterable[Reader]) -> str:
    """Names of the readers, each once; an empty text if there is none."""
    return ", ".join(dict.fromkeys(str(reader) for reader in readers))


@dataclass(eq=False)
class GraphNode:
    """A layer of a `ModelGraph`.

    Attributes
    ----------
    id : int
        Position in the order of the first calls.
    layer_name : str
    input_nodes, output_nodes : list of GraphNode
        The layers next to it, containers aside.
    """

    id: int
    layer_name: str
    input_nodes: list[GraphNode] = field(default_factory=list, repr=False)
    output_nodes: list[GraphNode] = field(default_factory=list, repr=False)


class ModelGraph:
    """How the layers of a model are connected.

    Parameters
    ----------
    record : Trace
        One forward pass.

    Attributes
    ----------
    layer_names : list of str
        The layers that `find_input_layers` chooses from.
    layer_node_map : dict of str to GraphNode
        All layers that were called, in the order of their first calls.
    id_node_map : dict of int to GraphNode
        The same by `GraphNode.id`.
    """

    def __init__(self, record: Trace) -> None:
        self.layer_names: list[str] = []
        self._record = record
        called = dict.fromkeys(call.layer for call in record.calls if call.layer)
        self.layer_node_map = {layer: GraphNode(number, layer) for number, layer in enumerate(called)}
        self.id_node_map = {node.id: node for node in self.layer_node_map.values()}
        leaves = {call.layer for call in record.calls if call.is_leaf}
        for layer, node in self.layer_node_map.items():
            node.input_nodes = [self.layer_node_map[name] for name in record.upstream(layer, leaves)]
            if layer in leaves:
                for source in node.input_nodes:
                    source.output_nodes.append(node)

    def set_layer_names(self, layer_names: Iterable[str]) -> None:
        """Choose the layers that `find_input_layers` answers with.

        Raises
        ------
        KeyError
            If a layer is not in the model; the message gives the nearest names.
        """
        names = list(layer_names)
        for name in names:
            if name not in self._record.modules:
                raise LayerNotFoundError(name, self._record.modules, "layer_names")
        self.layer_names = names

    def find_input_layers(self, layer_name: str) -> list[str]:
        """Nearest layers among `layer_names` from whose outputs the output of this layer is made.

        Parameters
        ----------
        layer_name : str
            Any layer of the model, also one that is not among `layer_names`.

        Returns
        -------
        list of str
            Each once, in the order of the layer's inputs; empty where only the model's input feeds it. A layer that is
            called again after itself (a shared activation) is in its own list.

        Raises
        ------
        KeyError
            If the layer is not in the model, or the forward pass did not call it.
        """
        return self._record.upstream(layer_name, frozenset(self.layer_names))

    def __str__(self) -> str:
        lines = []
        for node in self.layer_node_map.values():
            targets = ", ".join(target.layer_name for target in node.output_nodes) or "end"
            lines.append(f"{node.layer_name} -> {targets}")
        return "\n".join(lines)


def trace_model_graph(
    model: nn.Module, sample: Tensor | tuple[Any, ...], layer_names: Iterable[str], debug: bool = False
) -> ModelGraph:
    """Find the connections between the layers of a model by running it once.

    Parameters
    ----------
    model : nn.Module
        Left as it is.
    sample : Tensor of shape (batch, *input shape), or tuple
        What the model is called with; a tuple holds several arguments.
    layer_names : iterable of str
        The layers to connect; everything between them is skipped.
    debug : bool
        Whether to log the whole graph (level DEBUG of the logger ``crp.graph``).

    Returns
    -------
    ModelGraph

    Raises
    ------
    KeyError
        If a layer is not in the model; the message gives the nearest names.

    Examples
    --------
    >>> import torch
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> graph = trace_model_graph(model, torch.zeros(1, 4), ["0", "2"])
    >>> graph.find_input_layers("2")
    ['0']
    """
    names = list(layer_names)
    find_layers(unwrap(model), names, "layer_names")
    arguments = sample if isinstance(sample, tuple) else (sample,)
    graph = ModelGraph(trace(model, *arguments))
    graph.set_layer_names(names)
    if debug:
        _logger.debug("%s", graph)
    return graph
