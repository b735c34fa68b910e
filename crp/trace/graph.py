"""Which layer feeds which.

`crp.trace.trace` records one forward pass; two queries stand on it:

- `adjacent`: pairs of layers, of which only the second reads the output of the first, unchanged; an exact merge of
  batch norm needs this;
- `ModelGraph.find_input_layers`: the nearest layers, among chosen ones, that feed a layer, for `AttributionGraph`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from torch import Tensor, nn

from crp.flags import check_flags
from crp.kinds import check_kind
from crp.layers import evaluating, find_layers, modules_of, unwrap
from crp.layers.addresses import Address
from crp.layers.misfits import telling_misfits
from crp.layers.nested import tensors_in
from crp.trace import FunctionCall, ModuleCall, Reader, Trace, trace

_logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Unit:
    """A layer, or a function of torch with parameters of its own, and all of its calls.

    Attributes
    ----------
    name : str
        The layer, or the function and where it is called.
    calls : sequence of ModuleCall, or of FunctionCall
    parameters : dict of str to list of Reader
        Its parameters, and who reads each.
    """

    name: str
    calls: Sequence[ModuleCall | FunctionCall] = field(repr=False)
    parameters: dict[str, list[Reader]] = field(repr=False)

    def __str__(self) -> str:
        return self.name if self.calls and isinstance(self.calls[0], FunctionCall) else repr(self.name)

    def ran(self, reader: Reader) -> bool:
        """Whether a reader is one of its calls, or inside one."""
        calls = self._set_of_calls
        return reader.function in calls or (reader.call is not None and any(c in calls for c in reader.call.around()))

    @cached_property
    def _set_of_calls(self) -> frozenset[ModuleCall | FunctionCall]:
        return frozenset(self.calls)


class Pair(NamedTuple):
    """Two units of which the second is the only reader of what the first hands out."""

    first: Unit
    second: Unit


class Adjacency(NamedTuple):
    """What `adjacent` returns.

    Attributes
    ----------
    pairs : list of Pair
        In the order in which the second units are given.
    unpaired : dict of str to str
        For every other unit: its name, and why it is in no pair.
    """

    pairs: list[Pair]
    unpaired: dict[str, str]


def layers_as_units(record: Trace, layers: Iterable[str]) -> list[Unit]:
    """Layers with all their calls, and with the parameters that they and the modules inside them hold."""
    calls: dict[str, list[ModuleCall]] = {layer: [] for layer in layers}
    parameters: dict[str, dict[str, list[Reader]]] = {layer: {} for layer in calls}
    for call in record.calls:
        if call.layer in calls:
            calls[call.layer].append(call)
    for name, readers in record.parameter_readers.items():
        parts = name.split(".")
        for end in range(len(parts)):
            if (layer := ".".join(parts[:end])) in parameters:
                parameters[layer][".".join(parts[end:])] = readers
    return [Unit(layer, calls[layer], parameters[layer]) for layer in calls]


def adjacent(first: Iterable[Unit], second: Iterable[Unit]) -> Adjacency:
    """Pairs in which the second unit's whole input is the output of the first one, which nothing else uses.

    In every call of both, the tensor is the same object (possibly handed through containers), unchanged, and no part of
    the model's output. Nothing outside their calls reads a parameter of either. So one layer that computes both can
    replace the two, and every other value of this forward pass stays as it is.

    Parameters
    ----------
    first, second : iterable of Unit

    Returns
    -------
    Adjacency
    """
    first, second = list(first), list(second)
    made_by = {id(node): unit for unit in first for call in unit.calls for node in call.outputs}
    pairs: list[Pair] = []
    unpaired: dict[str, str] = {}
    for unit in second:
        if unit.calls:
            partner = _partner(unit, made_by)
            if isinstance(partner, Unit):
                pairs.append(Pair(partner, unit))
            else:
                unpaired[unit.name] = partner
    paired = {unit.name for pair in pairs for unit in pair}
    for unit in (*first, *second):
        if unit.name not in paired and unit.name not in unpaired:
            unpaired[unit.name] = _why_alone(unit)
    return Adjacency(pairs, unpaired)


def _partner(unit: Unit, made_by: dict[int, Unit]) -> Unit | str:
    """Unit whose calls alone feed those of another one, and only these; otherwise the reason why there is none."""
    partners: dict[Unit, None] = {}
    for call in unit.calls:
        maker = _maker(call, made_by)
        if isinstance(maker, str):
            return _times(unit) + maker
        partners[maker] = None
    partner, *others = partners
    if others:
        return f"called {len(unit.calls)} times, behind {', '.join(map(str, partners))}"
    source, count = f"input comes from {partner}", len(partner.calls)
    times = f", which is called {count} times and" if count > 1 else ","
    for call in partner.calls:
        if len(call.outputs) != 1:
            return f"{source}, which has {len(call.outputs)} outputs"
        if names := _names(reader for reader in call.outputs[0].readers if not (call.ran(reader) or unit.ran(reader))):
            return f"{source}{times} whose output is also read by {names}"
    for one in (partner, unit):
        for name, readers in one.parameters.items():
            if names := _names(reader for reader in readers if not one.ran(reader)):
                return f"{name} of {one} is also read by {names}"
    return partner


def _maker(call: ModuleCall | FunctionCall, made_by: dict[int, Unit]) -> Unit | str:
    """Unit that made the whole input of a call; otherwise the reason why there is none."""
    if len(call.inputs) != 1:
        return f"has {len(call.inputs)} inputs that the model made" if call.inputs else "input is made by no layer"
    node, shown = call.inputs[0], None
    while id(node) not in made_by:
        is_container = node.kind == "output" and node.call is not None and not node.call.is_leaf
        if shown is None and (node.maker is None or not is_container):
            shown = node
        if node.maker is None:
            return f"input comes from {shown}"
        node = node.maker
    return made_by[id(node)]


def _why_alone(unit: Unit) -> str:
    """Reason why a unit is the first of no pair."""
    if not unit.calls:
        return "not called"
    outputs = [(node, call) for call in unit.calls for node in call.outputs]
    readers = _names(reader for node, call in outputs for reader in node.readers if not call.ran(reader))
    return _times(unit) + (f"output is read by {readers}" if readers else "nothing reads its output")


def _times(unit: Unit) -> str:
    return f"called {len(unit.calls)} times: " if len(unit.calls) > 1 else ""


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
        check_kind("layer_names", layer_names, Iterable, "a list of layers")
        names = list(layer_names)
        for name in names:
            self._record.address(name, "layer_names")
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
    """Find the connections between the layers of a model by running it once, in evaluation mode.

    Parameters
    ----------
    model : nn.Module
        Left as it is.
    sample : Tensor of shape (batch, *input shape), or tuple
        What the model is called with; a tuple holds several arguments.
    layer_names : iterable of str
        The layers to connect; everything between them is skipped.
    debug : bool
        Whether to log the whole graph (level DEBUG of the logger ``crp.trace.graph``).

    Returns
    -------
    ModelGraph

    Raises
    ------
    KeyError
        If a layer is not in the model; the message gives the nearest names.
    ValueError or TypeError
        If the model cannot take the sample; the message names the layer that refused it, and what it takes.

    Examples
    --------
    >>> import torch
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> graph = trace_model_graph(model, torch.zeros(1, 4), ["0", "2"])
    >>> graph.find_input_layers("2")
    ['0']
    """
    check_flags(debug=debug)
    check_kind("layer_names", layer_names, Iterable, "a list of layers")
    names, known = list(layer_names), modules_of(unwrap(model))
    find_layers(unwrap(model), [Address.of(name, known).layer for name in names], "layer_names")
    arguments = sample if isinstance(sample, tuple) else (sample,)
    with telling_misfits(model, tensors_in(arguments), dict(enumerate(arguments))), evaluating(unwrap(model)):
        graph = ModelGraph(trace(model, *arguments))
    graph.set_layer_names(names)
    if debug:
        _logger.debug("%s", graph)
    return graph
