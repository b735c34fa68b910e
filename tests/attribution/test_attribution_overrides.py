"""The methods of `CondAttribution` that users override take effect, with the signatures of zennit-crp."""

from __future__ import annotations

import pytest
import torch
from attribution_cases import close, every_kind, net, parallel, plain_sums, same, stack
from core_cases import Maps
from torch import Tensor, nn

from crp.attribution import AttributionGraph, CondAttribution
from crp.composites import EpsilonPlus
from crp.concepts import ChannelConcept
from crp.trace.graph import trace_model_graph

CONDITIONS = [{"y": [1], "2": [0, 3]}, {"y": [2], "2": [5]}, {"y": [0]}, {"2": [1], "y": 3}]


def both(attribution, data, conditions, composite, record=("0",), **keywords):
    """Result of `__call__`, which that of `generate` must equal."""
    found = attribution(data, conditions, composite, record, **keywords)
    for batch_size in (1, 3):
        parts = attribution.generate(
            data, conditions, composite, record, batch_size=batch_size, verbose=False, **keywords
        )
        assert same(stack(parts), found)
    return found


class Absolute(CondAttribution):
    """Heatmap of tables: one number for each sample."""

    def heatmap_modifier(self, data: Tensor, on_device: object = None) -> Tensor:
        self.seen = data
        heatmap = data.grad.detach().abs().sum(-1)
        return heatmap.to(on_device) if on_device else heatmap


@every_kind
@parallel
def test_heatmap_modifier(mlp, vectors, composite, exclude_parallel):
    attribution = Absolute(mlp)
    wanted = Maps(mlp)(vectors[:2], CONDITIONS, composite, ["0"], exclude_parallel=exclude_parallel)
    found = both(attribution, vectors[:2], CONDITIONS, composite, exclude_parallel=exclude_parallel)
    assert close(found.heatmap, wanted.heatmap.abs().sum(-1))
    attribution(vectors[:2], CONDITIONS, composite)
    assert close(attribution.seen, vectors[:2].repeat_interleave(4, 0))


def test_methods_replaced_on_an_object(mlp, vectors):
    attribution = CondAttribution(mlp)
    attribution.heatmap_modifier = lambda data, on_device=None: data.grad
    attribution.select_output = lambda output: 2 * output
    found = attribution(vectors[:2], CONDITIONS, init_rel=1)
    assert close(found.heatmap, 2 * Maps(mlp)(vectors[:2], CONDITIONS, init_rel=1).heatmap)


class Margin(Maps):
    """Starts with the target's output minus the mean of all."""

    def relevance_init(self, prediction: Tensor, target_list: object, init_rel: object) -> Tensor:
        self.given = (len(prediction), target_list, init_rel)
        start = torch.zeros_like(prediction)
        for row, targets in enumerate(target_list):
            start[row] = -1 / 4
            start[row, targets] += 1
        return start * (1 if init_rel is None else init_rel)


@every_kind
@parallel
def test_relevance_init(mlp, vectors, composite, exclude_parallel):
    attribution = Margin(mlp)
    keywords = {"exclude_parallel": exclude_parallel}
    found = both(attribution, vectors[:2], CONDITIONS, composite, **keywords)
    assert attribution.given == (2, [[0], 3], None)
    start = torch.full((8, 4), -0.25, dtype=torch.float64)
    start[range(8), [1, 2, 0, 3] * 2] += 1
    free = [{name: ids for name, ids in condition.items() if name != "y"} for condition in CONDITIONS]
    wanted = Maps(mlp)(vectors[:2], free, composite, ["0"], init_rel=start, **keywords)
    assert same(found, wanted)
    doubled = attribution(vectors[:2], CONDITIONS, composite, init_rel=2, **keywords)
    assert close(doubled.heatmap, 2 * found.heatmap)


def test_relevance_init_gets_no_targets_from_a_start_layer(mlp, vectors):
    class Starts(Maps):
        def relevance_init(self, prediction: Tensor, target_list: object, init_rel: object) -> Tensor:
            assert target_list is None
            assert prediction.shape == (3, 8)
            return super().relevance_init(prediction, target_list, init_rel)

    conditions = [{"2": [i]} for i in range(3)]
    found = Starts(mlp)(vectors[:1], conditions, EpsilonPlus(), start_layer="2")
    assert same(found, Maps(mlp)(vectors[:1], conditions, EpsilonPlus(), start_layer="2"))


@pytest.mark.parametrize("wrong", [1.0, None, torch.ones(2, 4), torch.ones(8, 3), torch.ones(4)])
def test_wrong_relevance_init_is_an_error(mlp, vectors, wrong):
    class Wrong(Maps):
        def relevance_init(self, prediction: Tensor, target_list: object, init_rel: object) -> Tensor:
            return wrong

    for composite in (None, EpsilonPlus()):
        with pytest.raises(ValueError, match=r"initial relevance has the (shape|type).*tensor of .* = \(8, 4\)"):
            Wrong(mlp)(vectors[:2], CONDITIONS, composite)


class Positive(Maps):
    """Sends only positive relevance back."""

    def backward(self, pred, grad_mask, partial_backward, layer_names, layer_out, generate=False):
        assert isinstance(generate, bool)
        assert set(layer_names) <= set(layer_out)
        self.partial = partial_backward
        super().backward(pred, grad_mask.clamp(min=0) * 3, partial_backward, layer_names, layer_out, generate)


@every_kind
@parallel
def test_backward(mlp, vectors, composite, exclude_parallel):
    weights = torch.tensor([1.0, -1.0, 2.0, -2.0], dtype=torch.float64)
    keywords = {"exclude_parallel": exclude_parallel}
    attribution = Positive(mlp)
    found = both(attribution, vectors[:2], CONDITIONS, composite, init_rel=weights, **keywords)
    assert attribution.partial == exclude_parallel

    def start(prediction: Tensor) -> Tensor:
        # With our composites, what is sent back is relevance over activation.
        scale = prediction if getattr(composite, "encoding", None) == "multiplier" else 1
        return 3 * scale * (weights / scale).clamp(min=0)

    assert same(found, Maps(mlp)(vectors[:2], CONDITIONS, composite, ["0"], init_rel=start, **keywords))


class Unchanged(Maps):
    def backward(self, pred, grad_mask, partial_backward, layer_names, layer_out, generate=False):
        super().backward(pred, grad_mask, partial_backward, layer_names, layer_out, generate)


@plain_sums
@every_kind
@parallel
def test_inherited_backward_goes_from_layer_to_layer(resnet, images, composite, exclude_parallel):
    conditions = [{"y": 1, "layer2.conv2": [1, 2, 5], "layer1.conv1": [0, 3]}, {"y": 0, "layer1.conv2": [2]}]
    found = both(Unchanged(resnet), images[:2], conditions, composite, ["conv1"], exclude_parallel=exclude_parallel)
    assert same(found, Maps(resnet)(images[:2], conditions, composite, ["conv1"], exclude_parallel=exclude_parallel))
    if exclude_parallel:
        with pytest.raises(RuntimeError, match=r"must be ordered.*from 'layer1' does not reach 'layer2'"):
            Unchanged(resnet)(images, [{"y": 1, "layer1": [0], "layer2": [1]}], composite)


class WholeModel(Maps):
    """A backward of its own, in one pass whatever the conditions are."""

    def backward(self, pred, grad_mask, partial_backward, layer_names, layer_out, generate=False):
        torch.autograd.backward((pred,), (grad_mask,), retain_graph=generate)


@plain_sums
@every_kind
@parallel
def test_backward_written_anew(resnet, images, composite, exclude_parallel):
    """Masks act in any backward pass, and relevance is recorded before them."""
    conditions = [{"y": 1, "layer2.conv2": [1, 2], "layer1": [0, 3]}, {"y": 0, "layer1": [2]}]
    found = both(WholeModel(resnet), images[:2], conditions, composite, ["conv1"], exclude_parallel=exclude_parallel)
    assert same(found, Maps(resnet)(images[:2], conditions, composite, ["conv1"], exclude_parallel=False))


class Pairs(Maps):
    """Conditions first, samples second."""

    def broadcast(self, data, conditions):
        paired = [condition for condition in conditions for _ in range(len(data))]
        return torch.cat([data] * len(conditions)), paired


@every_kind
@parallel
def test_broadcast(mlp, vectors, composite, exclude_parallel):
    data = vectors[:2].clone().requires_grad_()
    found = both(Pairs(mlp), data, CONDITIONS[:2], composite, exclude_parallel=exclude_parallel)
    pairs = vectors[[0, 1, 0, 1]], [CONDITIONS[i] for i in (0, 0, 1, 1)]
    assert same(found, Maps(mlp)(*pairs, composite, ["0"], exclude_parallel=exclude_parallel))
    plain, paired = CondAttribution(mlp).broadcast(vectors[:2], CONDITIONS)
    assert torch.equal(plain, vectors[[0] * 4 + [1] * 4])
    assert paired == CONDITIONS * 2


def test_broadcast_that_does_not_pair_is_an_error(mlp, vectors):
    class Unpaired(Maps):
        def broadcast(self, data, conditions):
            return data, conditions

    with pytest.raises(ValueError, match="broadcast gave 4 samples and 2 conditions"):
        Unpaired(mlp)(vectors, CONDITIONS[:2])


@every_kind
def test_select_output(mlp, vectors, composite):
    class Second(Maps):
        def select_output(self, output):
            return output[1]

    model = net(lambda s, x: (None, s.inner(x)), inner=mlp)
    conditions = [{name if name == "y" else f"inner.{name}": ids for name, ids in c.items()} for c in CONDITIONS]
    found = Second(model)(vectors[:2], conditions, composite)
    assert close(found.heatmap, Maps(mlp)(vectors[:2], CONDITIONS, composite).heatmap)
    parts = Second(model).generate(vectors[:2], conditions, composite, batch_size=3, verbose=False)
    assert same(stack(parts), found)


def test_name_of_the_output(vectors, untouched):
    """L5: a module may be called "y", once the output is called otherwise."""
    model = net(lambda s, x: s.head(s.y(x).relu()), y=nn.Linear(6, 5), head=nn.Linear(5, 3))
    attribution = Maps(model)
    assert attribution.MODEL_OUTPUT_NAME == "y"
    with untouched(model), pytest.raises(ValueError, match=r"layer called 'y'.*MODEL_OUTPUT_NAME"):
        attribution(vectors, [{"y": 1}])
    attribution.MODEL_OUTPUT_NAME = "class"
    found = attribution(vectors, [{"class": 1, "y": [2]}], EpsilonPlus())
    assert set(found.relevances) == {"y"}
    parts = attribution(vectors[:1], [{"class": 1, "y": [i]} for i in range(5)], EpsilonPlus())
    assert close(parts.heatmap.sum(0), attribution(vectors[:1], [{"class": 1}], EpsilonPlus()).heatmap[0])
    graph = trace_model_graph(model, vectors[:1], ["y", "head"])
    nodes, _ = AttributionGraph(attribution, graph, {name: ChannelConcept() for name in ("y", "head")})(
        vectors[:1], EpsilonPlus(), 1, "head", target=1, width=[2], verbose=False
    )
    assert nodes[0] == ("head", 1)
    assert len(nodes) == 3


@pytest.mark.parametrize("name", ["_collect_hook_activation_relevance", "backward_initialization"])
def test_a_method_that_is_never_called_is_named(name):
    with pytest.warns(
        UserWarning, match=f"Own overrides {name} of zennit-crp, which nothing calls here. Override"
    ) as w:
        type("Own", (CondAttribution,), {name: lambda self, *args: args})
    assert [one.filename for one in w] == [__file__]
