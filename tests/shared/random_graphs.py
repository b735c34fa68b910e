"""Random calls of `AttributionGraph`, right and wrong ones, and what `matrix_nets` finds in their place."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from matrix_nets import PLANS, Masked, MatrixNet
from random_calls import METHODS, Call, Drawing, keeping
from torch import Tensor

from crp.attribution import AttributionGraph, CondAttribution
from crp.concepts import ChannelConcept
from crp.trace.graph import trace_model_graph

WRONG: dict[str, list[Any]] = {
    "concept_id": [99, -50, "0", 1.5, None, [[0]]],
    "layer_name": ["nope", "", 3, None, "fc#9"],
    "target": [99, -50, "1", 1.5, [[0], [1, 2]]],
    "width": [3, None, ["2"], [1.5], [-1], "21", [0]],
    "parent_c_id": [0],
    "parent_layer": ["conv1"],
    "batch_size": [0, -1, 2.5, "2"],
    "composite": ["epsilon_plus", 3],
    "sample": [None, torch.ones(2, 2, 4, 4).double(), torch.ones(0, 2, 4, 4).double(), torch.ones(2, 4, 4).double()],
}


@dataclass
class GraphCall:
    """A call of a graph.

    Attributes
    ----------
    call : Call
        Model, composite and data.
    layers : dict of str to int
        Value of each layer of the graph.
    arguments : dict
    wrong : str or None
    """

    call: Call
    layers: dict[str, int]
    arguments: dict[str, Any]
    wrong: str | None = None

    @classmethod
    def of(cls, seed: int) -> GraphCall:
        """Draw one."""
        drawing = Drawing(seed)
        draw, call = drawing.draw, drawing.call()
        while call.plan not in ("chain", "branch", "normed", "maps") or call.dtype != torch.float64:
            call = drawing.call()
        call.kind, call.by_hand, call.wrong = "graph", False, None
        call.inputs = [call.inputs[0][:1]]
        names = {name: value for name, value in PLANS[call.plan].names().items() if "#" not in name}
        layers = dict(draw.sample(sorted(names.items()), draw.randint(2, len(names))))
        shapes = call.net().shapes
        name = draw.choice([*layers])
        arguments: dict[str, Any] = {
            "sample": call.inputs[0], "composite": call.composite, "layer_name": name,
            "concept_id": draw.randrange(shapes[layers[name]][0]), "verbose": False,
            "width": [draw.randint(1, 3) for _ in range(draw.randint(0, 3))], "abs_norm": draw.random() < 0.5,
        }  # fmt: skip
        net = call.net()
        above = [one for one in layers if layers[name] in net.below(layers[one]) and one != name]
        if above and draw.random() < 0.3:
            arguments["parent_layer"] = draw.choice(above)
            arguments["parent_c_id"] = draw.randrange(shapes[layers[arguments["parent_layer"]]][0])
        if draw.random() < 0.6:
            arguments["target"] = draw.randrange(shapes[-1][0])
        if draw.random() < 0.3:
            arguments["batch_size"] = draw.choice([1, 2, 3])
        made = cls(call, layers, arguments)
        if draw.random() < 0.35:
            made.spoil(draw)
        return made

    def spoil(self, draw: Any) -> None:
        what = draw.choice(list(WRONG))
        if what.startswith("parent"):
            for key in ("parent_layer", "parent_c_id"):
                self.arguments.pop(key, None)
        value = draw.choice(WRONG[what])
        is_read = self.arguments["width"] and self.feeding(self.call.net(), self.layers[self.arguments["layer_name"]])
        if what in ("width", "parent_c_id", "parent_layer", "layer_name", "sample") or is_read:
            self.arguments[what], self.wrong = value, f"{what}: {value!r}"

    def answer(self) -> Any:
        """What the product gives."""
        call, model = self.call, self.call.model
        graph = trace_model_graph(model, call.inputs[0], list(self.layers))
        ask = AttributionGraph(CondAttribution(model), graph, dict.fromkeys(self.layers, ChannelConcept()))
        return ask(**self.arguments)

    # --- the reference ---

    def feeding(self, net: MatrixNet, value: int) -> set[str]:
        """Nearest layers of the graph that a value is made of."""
        of_value = {v: name for name, v in self.layers.items()}
        found, todo = set(), [*net.plan.steps[value - net.n_inputs].reads]
        while todo:
            i = todo.pop()
            if i in of_value:
                found.add(of_value[i])
            elif i >= net.n_inputs:
                todo += net.plan.steps[i - net.n_inputs].reads
        return found

    def values(self, net: MatrixNet, node: tuple[str, int]) -> dict[str, Tensor]:
        """Relevance of every concept of the layers that feed a node, in its context."""
        given, start = self.arguments, None
        about = (given["layer_name"], given["concept_id"])
        context = (given["parent_layer"], given["parent_c_id"]) if "parent_layer" in given else about
        if "target" not in given:
            start = self.layers[context[0]]
        masks = {node[0]: node[1], context[0]: context[1]}
        masked = [Masked(self.layers[name], keeping([concept])) for name, concept in masks.items()]
        names = self.feeding(net, self.layers[node[0]])

        def initial(output: Tensor) -> Tensor:
            if start is not None:
                return output
            chosen = torch.zeros_like(output)
            chosen[given["target"]] = output[given["target"]]
            return chosen

        records = [self.layers[name] for name in names]
        row = net.row([self.call.inputs[0][0]], masked, records, start, initial, through=False)
        sums = {name: row.relevances[self.layers[name]].reshape(net.shapes[self.layers[name]][0], -1).sum(1)
                for name in names}  # fmt: skip
        if not given["abs_norm"]:
            return sums
        return {name: value / (value.abs().sum() + 1e-10) for name, value in sums.items()}

    def problems(self, found: Any) -> list[str]:
        """How a graph differs from the reference's."""
        net, given = MatrixNet(self.call.model, METHODS[self.call.method][1]), self.arguments
        level = [(given["layer_name"], given["concept_id"])]
        nodes = list(level)
        n_told = Counter[tuple[str, int]]()
        for n_kept in given["width"]:
            lower = []
            for node in level:
                values = self.values(net, node)
                # (a node that is met several times is decomposed, and told of, each time)
                first, length = n_told[node], sum(min(n_kept, len(value)) for value in values.values())
                told = found.connections.get(node, [])[first : first + length]
                n_told[node] += length
                for name in {name for name, _, _ in told} | set(values):
                    mine = [(concept, value) for layer, concept, value in told if layer == name]
                    mine = mine[: min(n_kept, len(values.get(name, ())))]
                    if name not in values or len(mine) < min(n_kept, len(values[name])):
                        return [f"{node} is fed by {set(values)}, not as {told}"]
                    best = values[name].sort(descending=True).values[: len(mine)]
                    scale = max(float(values[name].abs().max()), 1e-9)
                    for (concept, value), wanted in zip(mine, best, strict=True):
                        if max(abs(value - wanted), abs(value - values[name][concept])) > 1e-9 * scale:
                            return [f"{node} <- {name} {concept}: {value}, not {wanted}"]
                lower += [(layer, concept) for layer, concept, _ in told]
            if not lower:
                break
            nodes += lower
            level = lower
        if unmet := {node for node, told in found.connections.items() if len(told) != n_told[node]}:
            return [f"{sorted(unmet)} have more connections than the reference"]
        return [] if [*found.nodes] == nodes else [f"nodes {found.nodes}, not {nodes}"]
