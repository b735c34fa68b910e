"""Overridden methods, `generate`, `AttributionGraph` and concepts, on both sides; see `parity_cases`."""

from __future__ import annotations

import numpy as np
import torch
from parity_cases import plus_flat
from parity_nets import Results, array, flat_attribution, images, plain_net, prefixed, residual_net, seeded
from parity_registry import Case, case_decorator
from torch import Tensor
from zennit.composites import EpsilonPlus

from crp.attribution import AttributionGraph, CondAttribution
from crp.concepts import ChannelConcept
from crp.graph import trace_model_graph

CASES: dict[str, Case] = {}
case = case_decorator(CASES, "*relevances/{}")


def generated(attribution: CondAttribution, data: Tensor, conditions: list, **keywords: object) -> Results:
    parts = attribution.generate(data, conditions, plus_flat(), verbose=False, **keywords)
    return prefixed(**{f"part{i}": flat_attribution(part) for i, part in enumerate(parts)})


@case(conv2="S1")
def masks_by_row() -> Results:
    """A mask function that looks up what it keeps by the number of its row."""
    kept = seeded(6, 8, 6, 6, seed=23) > 0

    def look_up(row: int, concept_ids: list[int], layer_name: str | None = None) -> object:
        def mask(grad: Tensor) -> Tensor:
            grad = grad.clone()
            grad[row] *= kept[(row + concept_ids[0]) % 6]
            return grad

        return mask

    attribution = CondAttribution(plain_net())
    conditions = [{"y": [0], "conv2": [1]}, {"y": [4], "conv2": [2]}, {"y": [2], "conv2": [4]}]
    results = {}
    for flow in (True, False):
        for rows in (1, 2, 3):
            attr = attribution(images(rows), conditions, plus_flat(), mask_map=look_up, exclude_parallel=flow)
            results[f"{rows}_{flow}"] = flat_attribution(attr)
    results["generate"] = generated(attribution, images(1), conditions, mask_map=look_up, batch_size=2)
    return prefixed(**results)


class OwnHeatmap(CondAttribution):
    def heatmap_modifier(self, data: Tensor, on_device: object = None) -> Tensor:
        return data.grad.detach().abs().amax(dim=-1)

    def relevance_init(self, prediction: Tensor, target_list: object, init_rel: object) -> Tensor:
        return super().relevance_init(2 * prediction, target_list, init_rel)


class OwnPairs(CondAttribution):
    def broadcast(self, data: Tensor, conditions: list) -> tuple[Tensor, list]:
        conditions = [condition for condition in conditions for _ in range(len(data))]
        data = torch.cat([data] * (len(conditions) // len(data)))
        data.retain_grad()
        return data, conditions


class OwnBackward(CondAttribution):
    def backward(self, pred: Tensor, grad_mask: Tensor, *args: object, **keywords: object) -> None:
        super().backward(pred, grad_mask.clamp(min=0) * 3, *args, **keywords)


@case(conv2="S1")
def subclass_methods() -> Results:
    """The methods that users override."""
    conditions = [{"y": [1], "conv2": [0, 3]}, {"y": [2], "conv2": [5]}, {"y": [0], "conv2": [1]}]
    results = {}
    for kind in (OwnHeatmap, OwnPairs, OwnBackward):
        for flow in (True, False):
            attr = kind(plain_net())(images(2), conditions, plus_flat(), ["conv1"], exclude_parallel=flow)
            results[f"{kind.__name__}_{flow}"] = flat_attribution(attr)
    parts = OwnBackward(plain_net()).generate(images(1), conditions, plus_flat(), batch_size=2, verbose=False)
    results |= {f"generate{i}": flat_attribution(part) for i, part in enumerate(parts)}
    return prefixed(**results)


@case()
def gradient_of_the_data() -> Results:
    """``data.grad`` is the relevance, summed over the rows of a sample."""
    attribution = CondAttribution(plain_net())
    conditions = [{"y": [0], "conv2": [1]}, {"y": [4], "conv2": [2, 3]}, {"y": [2]}]
    results = {}
    for name, rows in {"zip": 3, "product": 2}.items():
        data = images(rows)
        attribution(data, conditions, plus_flat(), exclude_parallel=False)
        results[name] = array(data.grad)
    return results


@case(conv2="S1", fc1="S1")
def generate() -> Results:
    """Seven conditions in batches of three: the last one is uneven."""
    attribution, data = CondAttribution(plain_net()), images(1)
    conditions = [{"y": [i % 5], "conv2": [i, (3 * i + 1) % 8]} for i in range(7)]
    fewer = [{"y": [i], "fc1": [2 * i, 2 * i + 1, 7], "conv2": [i, i + 1]} for i in range(2)]
    different = [*fewer, {"y": [3]}, {"y": [2], "conv2": [5]}]
    return prefixed(
        exclusive=generated(attribution, data, conditions, record_layer=["conv1"], batch_size=3),
        masks_only=generated(
            attribution, data, conditions, record_layer=["conv1"], batch_size=3, exclude_parallel=False
        ),
        even=generated(attribution, data, conditions[:6], record_layer=["conv1"], batch_size=3),
        one_batch=generated(attribution, data, fewer, record_layer=["conv1"], batch_size=10),
        different_keys=generated(
            attribution, data, different, record_layer=["conv1"], batch_size=3, exclude_parallel=False
        ),
        constant=generated(attribution, data, conditions, record_layer=["conv1"], batch_size=3, init_rel=1),
    )


@case(conv2="S1")
def generate_from_start_layer() -> Results:
    attribution, data = CondAttribution(plain_net()), images(1)
    conditions = [{"conv2": [i]} for i in range(7)]
    return prefixed(
        activation=generated(attribution, data, conditions, record_layer=["conv1"], batch_size=3, start_layer="conv2"),
        constant=generated(
            attribution, data, conditions, record_layer=["conv1"], batch_size=3, start_layer="conv2", init_rel=1
        ),
    )


def flat_graph(attribution_graph: tuple) -> Results:
    nodes, connections = attribution_graph
    results = {"nodes": np.array([f"{layer} {concept}" for layer, concept in nodes])}
    results["connected"] = np.array([f"{layer} {concept}" for layer, concept in connections])
    for (layer, concept), inputs in connections.items():
        results[f"{layer} {concept}/to"] = np.array([f"{name} {i}" for name, i, _ in inputs])
        results[f"{layer} {concept}/relevance"] = np.array([value for _, _, value in inputs])
    return results


@case()
def attribution_graph() -> Results:
    results = {}
    nets = {"plain": (plain_net(), ["conv1", "conv2", "fc1", "fc2"])}
    nets["residual"] = (residual_net(), ["stem", "conv1", "conv2", "shortcut", "last", "head"])
    for name, (net, layers) in nets.items():
        sample = images(1)
        graph = trace_model_graph(net, sample, layers)
        ask = AttributionGraph(CondAttribution(net), graph, {layer: ChannelConcept() for layer in layers})
        composite = plus_flat() if name == "plain" else EpsilonPlus()
        top, below = ("conv2", "conv1") if name == "plain" else ("last", "conv2")
        asked = {
            "target": ask(sample, composite, 2, top, 1, width=[3, 2], verbose=False),
            "no_target": ask(sample, composite, 3, top, width=[3, 2], verbose=False),
            "parent": ask(sample, composite, 1, below, 1, [2], parent_c_id=4, parent_layer=top, verbose=False),
            "parent_no_target": ask(sample, composite, 1, below, None, [2], 4, top, verbose=False),
            "unnormed": ask(sample, composite, 2, top, 1, [3, 2], abs_norm=False, verbose=False),
            "small_batches": ask(sample, composite, 0, layers[-1], None, [3, 3, 2], batch_size=2, verbose=False),
            "deeper_than_the_net": ask(sample, composite, 2, top, 1, [2, 2, 2, 2, 2], verbose=False),
        }
        results |= {f"{name}_{key}": flat_graph(value) for key, value in asked.items()}
        inputs = {layer: np.array(graph.find_input_layers(layer), dtype=str) for layer in layers}
        results[f"{name}_inputs"] = inputs
    return prefixed(**results)


@case()
def concepts() -> Results:
    """`ChannelConcept` on its own."""
    concept = ChannelConcept()
    results: Results = {}
    for name, relevance in {"maps": seeded(6, 4, 5, 5, seed=30), "units": seeded(6, 4, seed=31)}.items():
        for norm in (True, False):
            results[f"{name}/attribute/{norm}"] = array(concept.attribute(relevance, abs_norm=norm))
            for target in ("sum", "max"):
                parts = concept.reference_sampling(relevance, "layer", target, norm)
                for part, value in zip(("data", "relevance", "position"), parts, strict=True):
                    results[f"{name}/{target}/{norm}/{part}"] = array(value)
        masked = concept.attribute(relevance, mask=(relevance > 0).to(relevance), layer_name="layer", abs_norm=False)
        results[f"{name}/masked"] = array(masked)
        results[f"{name}/neurons"] = array(concept.get_rf_indices(relevance.shape[1:], "layer"))
        results[f"{name}/mask"] = array(concept.mask(2, [1, 3], "layer")(relevance.clone()))
    maps = seeded(6, 4, 5, 5, seed=30)
    results["maps/mask_rf"] = array(concept.mask_rf(4, {1: [3, 24], 2: [0]}, "layer")(maps))
    return results
