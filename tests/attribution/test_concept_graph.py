"""The graph of concepts against single attributions."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from attribution_cases import every_kind, plain_sums
from core_cases import Maps
from torch import Tensor, nn

from crp.attribution import AttributionGraph, CondAttribution, attrGraphResult
from crp.composites import EpsilonPlus
from crp.concepts import ChannelConcept
from crp.errors import InputError, InputTypeError
from crp.trace.graph import trace_model_graph
from crp.types import AttributionGraphResults

pytestmark = plain_sums
LAYERS = ["conv1", "layer1.conv1", "layer1.conv2", "layer2.conv1", "layer2.conv2", "layer2.downsample.0"]


@pytest.fixture
def sample(images) -> Tensor:
    return images[:1, :, :8, :8]


@pytest.fixture
def graph(resnet, sample) -> AttributionGraph:
    return AttributionGraph(
        CondAttribution(resnet),
        trace_model_graph(resnet, sample, LAYERS),
        {layer: ChannelConcept() for layer in LAYERS},
    )


def relevance(graph, sample, composite, condition, layer, norm=True, **keywords) -> Tensor:
    """Relevance of each channel of a layer, under one condition."""
    found = graph.attribution(sample, [condition], composite, [layer], exclude_parallel=False, **keywords)
    return ChannelConcept().attribute(found.relevances[layer], abs_norm=norm)[0]


def check_level(graph, sample, composite, connections, node, n, context, norm=True, **keywords) -> list:
    """Connections of one node, which are the ``n`` most relevant concepts of each layer that feeds it."""
    layer, concept = node
    inputs = graph.graph.find_input_layers(layer)
    assert [name for name, _, _ in connections[node]] == [name for name in inputs for _ in range(n)]
    for name in inputs:
        value = relevance(graph, sample, composite, {layer: [concept], **context}, name, norm, **keywords)
        top = value.argsort(descending=True, stable=True)[:n]
        found = [(concept, value) for other, concept, value in connections[node] if other == name]
        assert [i for i, _ in found] == top.tolist()
        assert torch.allclose(torch.tensor([v for _, v in found], dtype=value.dtype), value[top], rtol=1e-10)
    return [(name, i) for name, i, _ in connections[node]]


@every_kind
@pytest.mark.parametrize("norm", [True, False])
def test_levels_in_the_context_of_a_target(graph, sample, composite, norm):
    result = graph(sample, composite, 2, "layer2.conv2", target=3, width=[3, 2], abs_norm=norm, verbose=False)
    nodes, connections = result
    assert isinstance(result, AttributionGraphResults)
    assert attrGraphResult is AttributionGraphResults
    context = {"y": [3], "layer2.conv2": [2]}
    root = ("layer2.conv2", 2)
    first = check_level(graph, sample, composite, connections, root, 3, context, norm)
    assert {layer for layer, _ in first} == {"layer2.conv1"}
    second = [
        below for node in first for below in check_level(graph, sample, composite, connections, node, 2, context, norm)
    ]
    assert nodes == [root, *first, *second]
    assert {layer for layer, _ in second} == {"conv1", "layer1.conv2"}
    assert set(connections) == {root, *first}


def test_a_target_of_a_wrong_type_is_named(graph, sample):
    with pytest.raises(TypeError, match=r"^target must be an int, .* not 'cat'"):
        graph(sample, None, 0, "layer1.conv2", target="cat", verbose=False)


@every_kind
def test_levels_without_a_target_start_at_the_concept(graph, sample, composite):
    nodes, connections = graph(sample, composite, 1, "layer2.conv1", width=[2], verbose=False)
    start = {"start_layer": "layer2.conv1"}
    below = check_level(graph, sample, composite, connections, nodes[0], 2, {"layer2.conv1": [1]}, **start)
    assert nodes[1:] == below
    assert below[0][0] != below[-1][0]


@every_kind
def test_concept_in_the_context_of_its_parent(graph, sample, composite):
    keywords = {"parent_c_id": 4, "parent_layer": "layer2.conv2", "width": [2], "verbose": False}
    nodes, connections = graph(sample, composite, 1, "layer2.conv1", 2, **keywords)
    context = {"y": [2], "layer2.conv2": [4]}
    assert nodes[1:] == check_level(graph, sample, composite, connections, nodes[0], 2, context)
    nodes, connections = graph(sample, composite, 1, "layer2.conv1", **keywords)
    context, start = {"layer2.conv2": [4]}, {"start_layer": "layer2.conv2"}
    assert nodes[1:] == check_level(graph, sample, composite, connections, nodes[0], 2, context, **start)


def test_relevance_that_flows_past_a_concept_is_left_out(graph, resnet, sample):
    """What flows through shortcuts is no connection of a concept; by the plain gradient, which starts at the output."""
    graph = AttributionGraph(graph.attribution, graph.graph, graph.layer_map, exclude_parallel=True)
    _, connections = graph(sample, None, 2, "layer2.conv2", 3, width=[3, 2], abs_norm=False, verbose=False)
    values: dict[str, Tensor] = {}
    hooks = [
        resnet.get_submodule(layer).register_forward_hook(lambda _, __, out, layer=layer: values.update({layer: out}))
        for layer in LAYERS
    ]
    output = resnet(sample.clone().requires_grad_())
    for hook in hooks:
        hook.remove()
    (root,) = torch.autograd.grad(output[0, 3] ** 2 / 2, values["layer2.conv2"], retain_graph=True)
    for (layer, concept), below in connections.items():
        flow, at = root[:, 2], values["layer2.conv2"][:, 2]
        if layer != "layer2.conv2":
            (upper,) = torch.autograd.grad(at, values[layer], flow, retain_graph=True)
            flow, at = upper[:, concept], values[layer][:, concept]
        for name in graph.graph.find_input_layers(layer):
            (lower,) = torch.autograd.grad(at, values[name], flow, retain_graph=True)
            expected = lower.sum((0, 2, 3)).sort(descending=True)
            found = [(i, value) for other, i, value in below if other == name]
            assert [i for i, _ in found] == expected.indices[: len(found)].tolist()
            np.testing.assert_allclose([v for _, v in found], expected.values[: len(found)], rtol=1e-9)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_batch_size_changes_no_result(graph, sample, batch_size):
    keywords = {"target": 1, "width": [3, 3], "verbose": False}
    wanted = graph(sample, EpsilonPlus(), 0, "layer2.conv2", **keywords)
    sizes = []
    graph.attribution.heatmap_modifier = lambda data, on_device: sizes.append(len(data)) or data.grad
    found = graph(sample, EpsilonPlus(), 0, "layer2.conv2", batch_size=batch_size, **keywords)
    assert max(sizes) == min(batch_size, 3)
    assert found.nodes == wanted.nodes
    for node, below in wanted.connections.items():
        assert [entry[:2] for entry in found.connections[node]] == [entry[:2] for entry in below]
        assert [value for *_, value in found.connections[node]] == pytest.approx([value for *_, value in below], 1e-10)


def test_nodes_repeat_and_levels_end_at_the_first_layer(graph, sample):
    """L11: a node that is reached twice is listed twice; what is deeper than the model does not exist."""
    keywords = {"target": 1, "verbose": False}
    deep = graph(sample, EpsilonPlus(), 0, "layer1.conv2", width=[6, 6, 2, 2], **keywords)
    assert deep == graph(sample, EpsilonPlus(), 0, "layer1.conv2", width=[6, 6], **keywords)
    assert len(deep.nodes) == 1 + 6 + 36
    assert len(set(deep.nodes)) == 1 + 6 + 6
    alone = graph(sample, EpsilonPlus(), 0, "conv1", width=[2], **keywords)
    assert alone == ([("conv1", 0)], {})
    assert graph(sample, EpsilonPlus(), 0, "layer1.conv2", width=[], **keywords).connections == {}
    assert len(graph(sample, EpsilonPlus(), 0, "layer1.conv2", width=[99], **keywords).nodes) == 7


def test_default_width_and_progress(graph, sample, capsys):
    nodes, _ = graph(sample, None, 0, "layer1.conv2", target=0)
    assert len(nodes) == 1 + 4 + 4 * 2
    assert capsys.readouterr().err
    graph(sample, None, 0, "layer1.conv2", target=0, verbose=False)
    assert capsys.readouterr() == ("", "")


def test_layer_map_can_be_changed(graph, sample):
    class Reversed(ChannelConcept):
        """Concept ``i`` is the channel before the last ``i``."""

        def attribute(self, relevance, mask=None, layer_name=None, abs_norm=True):
            return super().attribute(relevance, mask, layer_name, abs_norm).flip(1)

        @staticmethod
        def mask(batch_id, concept_ids, layer_name=None):
            return ChannelConcept.mask(batch_id, [5 - i for i in concept_ids], layer_name)

    wanted = graph(sample, EpsilonPlus(), 0, "layer1.conv2", target=0, width=[2, 2], verbose=False)
    layer_map = {**dict.fromkeys(LAYERS, ChannelConcept()), "layer1.conv1": Reversed()}
    graph.set_layer_map(layer_map)
    assert graph.mask_map["layer1.conv1"] == layer_map["layer1.conv1"].mask
    found = graph(sample, EpsilonPlus(), 0, "layer1.conv2", target=0, width=[2, 2], verbose=False)
    assert [(layer, 5 - i if layer == "layer1.conv1" else i) for layer, i in found.nodes] == wanted.nodes
    assert len(wanted.nodes) == 1 + 2 + 4


def test_errors_name_the_culprit(graph, sample, images):
    def fails(kind: type[Exception], message: str, *args: object, **keywords: object) -> None:
        with pytest.raises(kind, match=re.escape(message)):
            graph(*args, **keywords, verbose=False)

    composite = EpsilonPlus()
    fails(ValueError, "belongs to one sample; sample has 4", images, composite, 0, "conv1")
    fails(
        KeyError, "layer_map has no concept for layer 'fc'; it has ['conv1', 'layer1.conv1'", sample, composite, 0, "fc"
    )
    fails(
        ValueError,
        "parent_c_id (3) and parent_layer (None) belong together",
        sample,
        composite,
        0,
        "conv1",
        parent_c_id=3,
    )
    fails(
        ValueError,
        "parent_c_id (None) and parent_layer ('layer1.conv1') belong",
        sample,
        composite,
        0,
        "conv1",
        parent_layer="layer1.conv1",
    )
    fails(
        IndexError,
        "layer 'layer1.conv2' has 6 channels, 0 to 5; there is no channel 6",
        sample,
        composite,
        6,
        "layer1.conv2",
        target=0,
    )
    fails(IndexError, "target is 5, but the model has outputs 0 to 4", sample, composite, 0, "layer1.conv2", target=5)
    for width, kind, message in (
        (3, TypeError, "width must be a list, with the number of concepts kept at each level; not 3"),
        ((2, 0), ValueError, "each number in width must be a whole number of at least 1, not 0"),
        ((1.5,), ValueError, "each number in width must be a whole number of at least 1, not 1.5"),
    ):
        fails(kind, message, sample, composite, 0, "layer1.conv2", target=0, width=width)
    del graph.layer_map["layer1.conv1"]
    fails(KeyError, "layer_map has no concept for layer 'layer1.conv1'", sample, composite, 0, "layer1.conv2", target=0)


@pytest.mark.parametrize("parent", ["layer2.conv1", "layer1.conv2", "layer1.conv1", "conv1"])
def test_parents_are_above(graph, sample, parent):
    """The parent's concept took the place of the concept itself, or masked what nobody looks at."""
    with pytest.raises(InputError, match=f"parent_layer '{parent}' must be a layer that 'layer2.conv1' feeds"):
        graph(sample, EpsilonPlus(), 0, "layer2.conv1", parent_c_id=1, parent_layer=parent, width=[1], verbose=False)


@pytest.mark.parametrize("concept", [torch.tensor(2), torch.tensor([2]), np.int64(2)])
def test_numbers_of_concepts_are_plain(graph, sample, concept):
    found = graph(sample, EpsilonPlus(), concept, "layer2.conv1", target=1, width=[1], verbose=False)
    assert found == graph(sample, EpsilonPlus(), 2, "layer2.conv1", target=1, width=[1], verbose=False)
    assert ("layer2.conv1", 2) in found.connections


@pytest.mark.parametrize("layer_map", [["conv1"], {"conv1": "channels"}, {"conv1": ChannelConcept}, ChannelConcept()])
def test_what_is_no_layer_map(graph, layer_map):
    with pytest.raises(InputTypeError, match="layer_map must be a dict of layers and concepts"):
        graph.set_layer_map(layer_map)


def test_linear_layers(mlp, vectors):
    layers = [name for name, layer in mlp.named_modules() if isinstance(layer, nn.Linear)]
    graph = AttributionGraph(
        Maps(mlp), trace_model_graph(mlp, vectors[:1], layers), dict.fromkeys(layers, ChannelConcept())
    )
    nodes, connections = graph(vectors[:1], EpsilonPlus(), 2, "4", target=2, width=[2, 2], verbose=False)
    assert [layer for layer, _ in nodes] == ["4", "2", "2", "0", "0", "0", "0"]
    shares = relevance(graph, vectors[:1], EpsilonPlus(), {"y": 2}, "2")
    assert connections["4", 2][0][2] == pytest.approx(shares.max().item())


def test_single_calls_of_a_shared_layer():
    torch.manual_seed(0)
    relu = nn.ReLU()
    net = nn.Sequential(nn.Linear(6, 5), relu, nn.Linear(5, 5), relu, nn.Linear(5, 3)).double().eval()
    apart = nn.Sequential(net[0], nn.ReLU(), net[2], nn.ReLU(), net[4]).eval()
    sample = torch.randn(1, 6, dtype=torch.float64)

    def nodes(model: nn.Module, first: str, second: str) -> AttributionGraphResults:
        layers = [first, second]
        graph = AttributionGraph(
            CondAttribution(model), trace_model_graph(model, sample, layers), dict.fromkeys(layers, ChannelConcept())
        )
        return graph(sample, EpsilonPlus(), 2, second, target=1, width=[3], verbose=False)

    found, wanted = nodes(net, "1#0", "1#1"), nodes(apart, "1", "3")
    names = {"1#0": "1", "1#1": "3"}
    assert [(names[layer], concept) for layer, concept in found.nodes] == wanted.nodes
    assert len(wanted.nodes) == 4
