"""Models that fold a further axis into that of the samples: each entry of a layer follows the sample it came from."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attribution_cases import close, every_kind, net, parallel, rows, same, stack
from torch import Tensor, nn
from zennit.composites import EpsilonPlus as ZennitEpsilonPlus

from crp.attribution import AttributionGraph, CondAttribution
from crp.attributors import GradCAM, Gradient
from crp.composites import DeepLift, EpsilonPlus
from crp.concepts import ChannelConcept
from crp.engine.conditions import Rows
from crp.engine.settings import Settings
from crp.trace.graph import trace_model_graph
from crp.types import AttributionResults
from crp.visualization.mining.targets import attribute_targets, record_activations
from crp.visualization.mining.text_batches import Asked

#: Shape (samples, time, channels, height, width).
VIDEOS = torch.randn(3, 4, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
N, T = VIDEOS.shape[:2]
CONDITIONS = [{"y": 1, "conv2": [1, 3]}, {"y": [0, 2], "conv2": [0]}, {"y": 0}, {"y": 2, "conv2": [2], "conv1": [0, 4]}]


def sample_major(s, x: Tensor) -> Tensor:
    frames = s.conv2(s.conv1(x.flatten(0, 1)).relu()).relu().flatten(1)
    return s.fc(frames.unflatten(0, x.shape[:2]).flatten(1))


def time_major(s, x: Tensor) -> Tensor:
    frames = s.conv2(s.conv1(x.transpose(0, 1).flatten(0, 1)).relu()).relu().flatten(1)
    return s.fc(frames.unflatten(0, (x.shape[1], len(x))).transpose(0, 1).flatten(1))


def volume(s, x: Tensor) -> Tensor:
    """The same function with time as an axis of space: layers of shape (samples, channels, time, height, width)."""
    frames = s.conv2(s.conv1(x.transpose(1, 2)).relu()).relu()
    return s.fc(frames.transpose(1, 2).flatten(1))


def models():
    torch.manual_seed(0)
    layers = {"conv1": nn.Conv2d(2, 5, 3), "conv2": nn.Conv2d(5, 4, 3), "fc": nn.Linear(T * 16, 3)}
    folded = {"sample_major": net(sample_major, **layers), "time_major": net(time_major, **layers)}
    apart = {"conv1": nn.Conv3d(2, 5, (1, 3, 3)), "conv2": nn.Conv3d(5, 4, (1, 3, 3)), "fc": layers["fc"]}
    with torch.no_grad():
        for name in ("conv1", "conv2"):
            apart[name].weight.copy_(layers[name].weight[:, :, None])
            apart[name].bias.copy_(layers[name].bias)
    return folded, net(volume, **apart)


FOLDED, VOLUME = models()
both_orders = pytest.mark.parametrize("order", FOLDED)


def folded(result: AttributionResults) -> AttributionResults:
    """Result of `VOLUME` in the form of the others: (rows, channels, time, ...) to (rows * time, channels, ...)."""

    def fold(tensors: dict[str, Tensor] | None) -> dict[str, Tensor]:
        return {name: t.transpose(1, 2).flatten(0, 1) if t.dim() == 5 else t for name, t in (tensors or {}).items()}

    multipliers = fold(result.multipliers) if result.multipliers is not None else None
    return AttributionResults(
        result.heatmap,
        fold(result.activations),
        fold(result.relevances),
        result.prediction,
        encoding=result.encoding,
        multipliers=multipliers,
    )


class Tables(CondAttribution):
    """Heatmaps in the shape of the input; those of the two forms of the model differ in the order of its axes."""

    def heatmap_modifier(self, data: Tensor, on_device: object = None) -> Tensor:
        assert data.grad is not None
        return data.grad.sum(2)


@both_orders
@every_kind
@parallel
@pytest.mark.parametrize("data", [VIDEOS, VIDEOS[:1], VIDEOS[[0, 1, 2, 0]]], ids=["each_with_each", "one", "paired"])
def test_entries_follow_their_sample(order, composite, exclude_parallel, data):
    """As if time were an axis of space; whichever way entries are ordered in the layer, here they are row by row."""
    ways = {"exclude_parallel": exclude_parallel}
    found = Tables(FOLDED[order])(data, CONDITIONS, composite, ["conv1"], **ways)
    wanted = Tables(VOLUME)(data, CONDITIONS, composite, ["conv1"], **ways)
    assert same(found, folded(wanted))
    assert len(found.relevances["conv1"]) == len(found.prediction) * T
    if found.multipliers is not None:
        for name, multiplier in folded(wanted).multipliers.items():
            assert close(found.multipliers[name], multiplier)


@both_orders
@every_kind
@parallel
def test_generate(order, composite, exclude_parallel):
    attribution, keywords = Tables(FOLDED[order]), {"exclude_parallel": exclude_parallel}
    found = attribution(VIDEOS, CONDITIONS, composite, ["conv1"], **keywords)
    for batch_size in (1, 3, 5, 12):
        parts = attribution.generate(
            VIDEOS, CONDITIONS, composite, ["conv1"], batch_size=batch_size, verbose=False, **keywords
        )
        assert same(stack(parts), found)


@both_orders
@parallel
def test_rows_are_those_of_each_sample_alone(order, exclude_parallel):
    attribution, conditions = CondAttribution(FOLDED[order]), CONDITIONS[:2]
    found = attribution(VIDEOS, conditions, EpsilonPlus(), ["conv1"], exclude_parallel=exclude_parallel)
    for sample in range(N):
        alone = attribution(VIDEOS[[sample]], conditions, EpsilonPlus(), ["conv1"], exclude_parallel=exclude_parallel)
        assert close(found.heatmap[2 * sample : 2 * sample + 2], alone.heatmap)
        of_sample = found.relevances["conv1"].unflatten(0, (-1, T))[2 * sample : 2 * sample + 2]
        assert close(of_sample.flatten(0, 1), alone.relevances["conv1"])


@both_orders
@pytest.mark.parametrize("batch_size", [None, 2])
def test_rows_of_a_sample_that_are_apart(order, batch_size):
    """As in mining: the first condition of every sample, then the second one; results are in this order."""
    conditions = [condition for condition in CONDITIONS[:2] for _ in range(N)]
    settings = Settings(["conv1"], ChannelConcept.mask, None, None, None, exclude_parallel=True)
    found = []
    for model in (FOLDED[order], VOLUME):
        call = Tables(model).plan(VIDEOS, conditions[:N], EpsilonPlus(), settings)
        call = replace(call, rows=Rows.of([*range(N)] * 2, conditions), batch_size=batch_size)
        found.append(stack(result for result, _ in call.parts()))
    assert same(found[0], folded(found[1]))


@both_orders
def test_initial_relevance_and_gradients_of_the_data(order):
    """What has an entry for each row is cut with the rows, and ``data.grad`` sums over them."""
    start = torch.rand(N * 2, 3, dtype=torch.float64)
    conditions = [{"conv2": [1]}, {"conv2": [0, 2]}]
    data, same_data = VIDEOS.clone().requires_grad_(), VIDEOS.clone().requires_grad_()
    found = Tables(FOLDED[order])(data, conditions, EpsilonPlus(), init_rel=start)
    wanted = Tables(VOLUME)(same_data, conditions, EpsilonPlus(), init_rel=start)
    assert same(found, folded(wanted))
    assert close(data.grad, same_data.grad)
    conditions = [{"y": 0, "conv2": 1}, {"y": 2}, {"y": 1}, {"y": 3}]
    with pytest.raises(IndexError, match="row 3: 'y' is 3, but the model has outputs 0 to 2"):
        Tables(FOLDED[order])(VIDEOS[[0, 1, 2, 0]], conditions)


@both_orders
def test_masks_see_all_entries_of_their_row(order):
    seen = []

    def mask_map(row: int, ids: object, layer: str):
        def mask(grad: Tensor) -> Tensor:
            seen.append((row, tuple(grad.shape)))
            return grad

        return mask

    conditions = [{"y": 0}, {"y": 1, "conv2": "anything"}]
    found = CondAttribution(FOLDED[order])(VIDEOS[:1], conditions, mask_map=mask_map, exclude_parallel=True)
    assert seen == [(row, (T, 4, 2, 2)) for row in range(T)]
    assert same(found, CondAttribution(FOLDED[order])(VIDEOS[:1], [{"y": 0}, {"y": 1}], record_layer=["conv2"]))


@both_orders
def test_references_of_deeplift(order):
    reference = torch.rand_like(VIDEOS)
    found = Tables(FOLDED[order])(VIDEOS, CONDITIONS, DeepLift(reference=reference), ["conv1"])
    wanted = Tables(VOLUME)(VIDEOS, CONDITIONS, DeepLift(reference=reference), ["conv1"])
    assert same(found, folded(wanted))
    listed = DeepLift(reference=[reference, torch.zeros_like(VIDEOS)])
    assert same(Tables(FOLDED[order])(VIDEOS, CONDITIONS, listed), folded(Tables(VOLUME)(VIDEOS, CONDITIONS, listed)))


@both_orders
@parallel
def test_absorbed(order, exclude_parallel):
    keywords = {"exclude_parallel": exclude_parallel}
    found = CondAttribution(FOLDED[order]).absorbed(VIDEOS, CONDITIONS, EpsilonPlus(), **keywords)
    wanted = CondAttribution(VOLUME).absorbed(VIDEOS, CONDITIONS, EpsilonPlus(), **keywords)
    assert close(found.input, wanted.input) and close(found.total, wanted.total, 1e-9)


class WholeModel(Tables):
    def backward(self, pred, grad_mask, partial_backward, layer_names, layer_out, generate=False):
        torch.autograd.backward((pred,), (grad_mask,), retain_graph=generate)


@both_orders
@every_kind
def test_backward_of_ones_own(order, composite):
    found = WholeModel(FOLDED[order])(VIDEOS, CONDITIONS, composite, ["conv1"])
    assert same(found, folded(WholeModel(VOLUME)(VIDEOS, CONDITIONS, composite, ["conv1"])))


@both_orders
def test_graph_of_concepts(order):
    """Relevance of a concept is that of all entries, and shares are taken afterwards."""
    layers = ["conv1", "conv2", "fc"]
    graphs = []
    for model in (FOLDED[order], VOLUME):
        graph = trace_model_graph(model, VIDEOS[:1], layers)
        make = AttributionGraph(CondAttribution(model), graph, {name: ChannelConcept() for name in layers})
        graphs.append(
            [make(VIDEOS[[1]], EpsilonPlus(), 1, "fc", 1, [3, 2], abs_norm=n, verbose=False) for n in (True, False)]
        )
    for found, wanted in zip(*graphs, strict=True):
        assert found.nodes == wanted.nodes and len(found.nodes) == 1 + 3 + 6
        for node, below in found.connections.items():
            for (name, concept, value), other in zip(below, wanted.connections[node], strict=True):
                assert (name, concept) == other[:2]
                assert abs(value - other[2]) <= 1e-9 * abs(other[2])


@every_kind
def test_a_layer_that_cannot_be_folded(composite, untouched):
    """A start layer has one entry for each row; and what does not grow with the samples is not theirs."""
    with (
        untouched(FOLDED["sample_major"]),
        pytest.raises(ValueError, match=r"'conv2' has shape \(12, 4, 2, 2\); its f"),
    ):
        CondAttribution(FOLDED["sample_major"])(VIDEOS, [{"conv2": 0}], composite, start_layer="conv2")
    model = net(lambda s, x: s.head(s.step(x.transpose(0, 1)).sum(0)), step=nn.Linear(6, 5), head=nn.Linear(5, 3))
    data = torch.rand(2, 4, 6, dtype=torch.float64)
    for layers in ({"step": [0]}, {}):
        with untouched(model), pytest.raises(ValueError, match=r"\(4, 2, 5\) for 2 samples, and \(4, 1, 5\) for one"):
            CondAttribution(model)(data, [{"y": 1, **layers}], composite, ["step"])


def test_of_zennits_rules_none_sees_two_calls():
    """They know the last call of a layer only, so that each sample is explained in a context of its own."""
    model = FOLDED["sample_major"]
    found = CondAttribution(model)(VIDEOS, [{"y": 1, "conv2": [0]}], ZennitEpsilonPlus())
    for sample in range(N):
        alone = CondAttribution(model)(VIDEOS[[sample]], [{"y": 1, "conv2": [0]}], ZennitEpsilonPlus())
        assert close(found.heatmap[[sample]], alone.heatmap)
    assert rows(found, [0]).heatmap.any()


def test_methods_that_need_one_entry_for_each_sample_refuse():
    model, message = (
        FOLDED["sample_major"],
        r"'conv2' has shape \(12, 4, 2, 2\).* (its first axis must be that of|along its first axis for each of) 3",
    )
    with pytest.raises(ValueError, match=message):
        GradCAM(model, layer="conv2")(VIDEOS, 0)
    attribution, targets = CondAttribution(model), [[0], [1], [0]]
    with pytest.raises(ValueError, match=message):
        list(attribute_targets(attribution, Asked.of(VIDEOS, None), targets, EpsilonPlus(), ["conv2"]))
    with pytest.raises(ValueError, match=message):
        record_activations(attribution, Asked.of(VIDEOS, None), EpsilonPlus(), ["conv2"])
    _, heatmap = Gradient(model, EpsilonPlus(), condition={"conv2": [0]})(VIDEOS, 1)
    assert close(heatmap.sum(2), Tables(model)(VIDEOS, [{"y": 1, "conv2": [0]}], EpsilonPlus()).heatmap)
