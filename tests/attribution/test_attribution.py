"""Laws of conditional attribution, and a flow written by hand that it must equal."""

from __future__ import annotations

import itertools

import pytest
import torch
from attribution_cases import close, every_composite, every_kind, net, parallel, plain_sums, rows, same, stack
from torch import Tensor, nn
from zennit.composites import NameMapComposite
from zennit.core import BasicHook, Composite

from crp.attribution import CondAttribution
from crp.composites import Composite as OurComposite

pytestmark = plain_sums


def one_each(layer: str, n: int, target: int = 1) -> list[dict]:
    return [{"y": target, layer: [i]} for i in range(n)]


# --- concepts of a layer add up -------------------------------------------------------------------------------------


@every_composite
@parallel
@pytest.mark.parametrize(
    ("net", "layer", "n"),
    [
        *(("vgg_bn", layer, n) for layer, n in (("features.0", 6), ("features.7", 8), ("classifier.1", 10))),
        *(("resnet", layer, n) for layer, n in (("conv1", 6), ("layer1", 6), ("layer2", 8))),
    ],
)
def test_channels_add_up(request, images, composite, exclude_parallel, net, layer, n):
    """In a residual net, at the end of a block, which all that flows passes."""
    attribution = CondAttribution(request.getfixturevalue(net))
    whole = attribution(images[:1], [{"y": 1}], composite, [layer])
    parts = attribution(images[:1], one_each(layer, n), composite, exclude_parallel=exclude_parallel)
    assert close(parts.heatmap.sum(0), whole.heatmap[0])
    assert whole.heatmap.abs().max() > 0
    everything = attribution(
        images[:1], [{"y": 1, layer: range(n)}], composite, [layer], exclude_parallel=exclude_parallel
    )
    assert same(everything, whole)


@every_composite
def test_channels_and_the_shortcut_add_up(resnet, images, composite):
    """Inside a block, what passes the layer and what passes by it through the shortcut add up."""
    attribution, layer, n = CondAttribution(resnet), "layer2.conv1", 8
    whole = attribution(images[:1], [{"y": 1}], composite).heatmap[0]
    past = attribution(images[:1], [{"y": 1, layer: []}], composite, exclude_parallel=False).heatmap[0]
    through = attribution(images[:1], one_each(layer, n), composite).heatmap
    both = attribution(images[:1], one_each(layer, n), composite, exclude_parallel=False).heatmap
    assert close(through.sum(0) + past, whole)
    assert close(both, through + past)
    assert min(past.abs().max(), through.sum(0).abs().max()) > 1e-3 * whole.abs().max()


@every_kind
def test_parallel_layers_are_recorded_as_zeros(resnet, images, composite):
    attribution, layer, parallel = CondAttribution(resnet), "layer2.conv1", "layer2.downsample.0"
    whole = attribution(images[:1], [{"y": 1}], composite, [parallel, "layer1"])
    exclusive = attribution(images[:1], [{"y": 1, layer: [2]}], composite, [parallel, "layer1"])
    masked = attribution(images[:1], [{"y": 1, layer: [2]}], composite, [parallel, "layer1"], exclude_parallel=False)
    assert not exclusive.relevances[parallel].any()
    assert close(masked.relevances[parallel], whole.relevances[parallel])
    assert close(exclusive.activations[parallel], whole.activations[parallel])
    assert not close(exclusive.relevances["layer1"], masked.relevances["layer1"], 1e-3)


# --- rows do not depend on their company ----------------------------------------------------------------------------

MIXED = [
    {"y": 0},
    {"y": 1, "layer2.conv2": [3, 5], "layer1": [0, 1]},
    {"y": [2, 3]},
    {"y": 1, "layer1": [2]},
    {"y": 4, "layer2.conv2": [1], "layer1": [-1]},
]
RECORD = ["conv1", "layer2.downsample.0"]


@every_kind
@parallel
def test_rows_come_in_the_order_of_the_caller(resnet, images, composite, exclude_parallel):
    """S2, S3: conditions on different layers keep their place, and pair with as many samples."""
    attribution, data, record = CondAttribution(resnet), images[[0, 1, 2, 3, 1]], [*RECORD, "layer1", "layer2.conv2"]
    found = attribution(data, MIXED, composite, record, exclude_parallel=exclude_parallel)
    alone = [
        attribution(data[[row]], [condition], composite, record, exclude_parallel=exclude_parallel)
        for row, condition in enumerate(MIXED)
    ]
    assert same(found, stack(alone))


@every_kind
@parallel
def test_every_sample_meets_every_condition_samples_first(resnet, images, composite, exclude_parallel):
    attribution = CondAttribution(resnet)
    found = attribution(images[:2], MIXED, composite, RECORD, exclude_parallel=exclude_parallel)
    for i in range(2):
        one = attribution(images[[i]], MIXED, composite, RECORD, exclude_parallel=exclude_parallel)
        assert same(rows(found, list(range(5 * i, 5 * i + 5))), one)


@every_kind
@parallel
def test_parts_are_the_whole(resnet, images, composite, exclude_parallel):
    """S7, rows 2 x 5: any batch size gives the rows of `__call__`, for several samples too."""
    attribution = CondAttribution(resnet)
    whole = attribution(images[:2], MIXED, composite, RECORD, exclude_parallel=exclude_parallel)
    for batch_size in (1, 3, 4, 10, 64):
        parts = list(
            attribution.generate(
                images[:2], MIXED, composite, RECORD, batch_size=batch_size, exclude_parallel=exclude_parallel,
                verbose=False,
            )
        )  # fmt: skip
        assert [len(part.heatmap) for part in parts[:-1]] == [batch_size] * (-(-10 // batch_size) - 1)
        assert same(stack(parts), whole)


@every_kind
def test_parts_are_the_callers_own(vgg_bn, images, composite):
    """Writing into what one part gave changes neither other rows nor later parts."""
    attribution, conditions = CondAttribution(vgg_bn), one_each("features.3", 5)
    whole = attribution(images[:1], conditions, composite, ["features.0", "classifier.1"])
    for batch_size in (1, 2):
        found = attribution.generate(
            images[:1], conditions, composite, ["features.0", "classifier.1"], batch_size=batch_size, verbose=False
        )
        for i, part in enumerate(found):
            for row in range(len(part.heatmap)):
                assert same(rows(part, [row]), rows(whole, [i * batch_size + row]))
                for tensor in (part.heatmap, part.prediction, *part.activations.values(), *part.relevances.values()):
                    tensor[row] += 1


def branching(out_grad: Tensor, outputs: list[Tensor]) -> list[Tensor]:
    return [out_grad / (z + 1e-6) if out_grad.abs().max() > 0 else out_grad for z in outputs]


def through_numpy(out_grad: Tensor, outputs: list[Tensor]) -> list[Tensor]:
    return [torch.from_numpy(out_grad.numpy() / (z.detach().numpy() + 1e-6)) for z in outputs]


def indexing(out_grad: Tensor, outputs: list[Tensor]) -> list[Tensor]:
    out_grad = out_grad.clone()
    out_grad[out_grad < 0] *= 1.5
    return [out_grad / (z + 1e-6) for z in outputs]


@pytest.mark.parametrize("kind", [NameMapComposite, lambda names: OurComposite(name_map=names)], ids=["zennit", "ours"])
@pytest.mark.parametrize("gradient_mapper", [branching, through_numpy, indexing])
def test_rules_that_act_on_one_row_at_a_time(vgg_bn, images, kind, gradient_mapper):
    """Rows of one sample share a pass where the rules allow it; the result is the same where they do not."""
    rule = BasicHook(gradient_mapper=gradient_mapper, reducer=lambda inputs, gradients: inputs[0] * gradients[0])
    composite, attribution = kind([(["features.3"], rule)]), CondAttribution(vgg_bn)
    conditions = one_each("features.7", 3)
    found = attribution(images[:2], conditions, composite, ["features.0"])
    alone = [
        attribution(x[None], [condition], composite, ["features.0"]) for x in images[:2] for condition in conditions
    ]
    assert same(found, stack(alone))
    assert found.heatmap.any()


class Blocked(torch.autograd.Function):
    """Has no gradient, though it depends on its input."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


@parallel
@pytest.mark.parametrize("n", [1, 3])
def test_flow_that_ends_on_its_way(images, exclude_parallel, n):
    """What it does not reach has no relevance."""
    model = net(lambda s, x: s.b(Blocked.apply(s.a(x))).flatten(1), a=nn.Conv2d(3, 2, 3), b=nn.Conv2d(2, 3, 3))
    found = CondAttribution(model)(images[:1], one_each("b", n), None, ["a"], exclude_parallel=exclude_parallel)
    assert found.heatmap.shape == (n, 16, 16)
    assert not found.heatmap.any()
    assert not found.relevances["a"].any()
    assert found.relevances["b"].any()


# --- relevance is recorded before it is masked ----------------------------------------------------------------------


@every_kind
@parallel
def test_relevance_is_recorded_before_masking(vgg_bn, images, composite, exclude_parallel):
    """S1: at a conditioned layer, neither masked nor doubled."""
    attribution, record = CondAttribution(vgg_bn), ["features.7", "features.3", "classifier.1"]
    free = attribution(images[:2], [{"y": 0}, {"y": 1}], composite, record)
    first = [{"y": 0, "features.7": [2]}, {"y": 1, "features.7": [0, 4]}]
    second = [condition | {"features.3": [1]} for condition in first]
    above = attribution(images[:2], first, composite, record, exclude_parallel=exclude_parallel)
    assert close(above.relevances["classifier.1"], free.relevances["classifier.1"])
    both = attribution(images[:2], second, composite, exclude_parallel=exclude_parallel)
    assert close(above.relevances["features.7"], free.relevances["features.7"])
    assert close(both.relevances["features.7"], free.relevances["features.7"])
    assert close(both.relevances["features.3"], above.relevances["features.3"])
    assert not close(both.relevances["features.3"], free.relevances["features.3"], 1e-3)
    assert set(both.activations) == set(both.relevances) == {"features.7", "features.3"}


@every_kind
@parallel
def test_relevance_at_the_start_layer_is_recorded_before_masking(vgg_bn, images, composite, exclude_parallel):
    attribution = CondAttribution(vgg_bn)
    found = attribution(
        images[:1], [{"features.3": [2]}, {}], composite, start_layer="features.3", exclude_parallel=exclude_parallel
    )
    assert close(found.relevances["features.3"], found.activations["features.3"])
    assert close(found.prediction, found.activations["features.3"])
    each = [{"features.3": [i]} for i in range(6)]
    parts = attribution(images[:1], each, composite, start_layer="features.3", exclude_parallel=exclude_parallel)
    assert close(parts.heatmap.sum(0), found.heatmap[1])
    assert close(parts.heatmap[2], found.heatmap[0])


# --- the same by hand -----------------------------------------------------------------------------------------------


def by_hand(
    model: nn.Module, x: Tensor, condition: dict, composite: Composite | None, exclusive: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Heatmap and relevance of one sample, by `torch.autograd.grad` from layer to layer."""
    layers = {name: ids for name, ids in condition.items() if name != "y"}
    multiplier = getattr(composite, "encoding", None) == "multiplier"
    outputs: dict[str, Tensor] = {}

    def mask(name: str, grad: Tensor) -> Tensor:
        keep = torch.zeros_like(grad)
        keep[:, layers[name]] = 1
        return grad * keep

    arrived: dict[str, Tensor] = {}
    with (composite or Composite()).context(model) as modified:
        handles = []
        for name in layers:

            def hook(module: nn.Module, args: object, output: Tensor, name: str = name) -> Tensor:
                outputs[name] = output
                return output.clone()

            handles.append(model.get_submodule(name).register_forward_hook(hook))
        x = x.clone().requires_grad_()
        root = modified(x)
        grad = torch.zeros_like(root)
        grad[:, condition["y"]] = 1.0 if multiplier else root.detach()[:, condition["y"]]
        if exclusive:
            for name in layers:
                (arrived[name],) = torch.autograd.grad(root, outputs[name], grad, retain_graph=True)
                root, grad = outputs[name], mask(name, arrived[name])
        else:
            for name in layers:

                def listen(grad: Tensor, name: str = name) -> Tensor:
                    arrived[name] = grad
                    return mask(name, grad)

                outputs[name].register_hook(listen)
        (relevance,) = torch.autograd.grad(root, x, grad)
        for handle in handles:
            handle.remove()
    if multiplier:
        arrived = {name: grad * outputs[name].detach() for name, grad in arrived.items()}
    return relevance.sum(1), arrived


A, B = [0, 2, 5], [1, 2, 3, 4]


@every_composite
@parallel
@pytest.mark.parametrize(
    ("model", "conditions"),
    [
        ("vgg_bn", [{"y": 3, "features.7": A, "features.3": B}, {"y": 0, "features.7": B, "features.3": A}]),
        ("resnet", [{"y": 3, "layer2.conv1": A, "layer1.conv2": B}, {"y": 2, "layer2.conv1": B, "layer1.conv2": A}]),
    ],
    ids=["vgg", "resnet"],
)
def test_flow_by_hand(request, images, composite, exclude_parallel, model, conditions):
    model = request.getfixturevalue(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    found = CondAttribution(model)(images[:2], conditions, composite, exclude_parallel=exclude_parallel)
    for row, condition in enumerate(conditions):
        heatmap, arrived = by_hand(model, images[[row]], condition, composite, exclude_parallel)
        assert close(found.heatmap[[row]], heatmap)
        for name, relevance in arrived.items():
            assert close(found.relevances[name][[row]], relevance)
        assert heatmap.any()


@every_kind
@parallel
def test_permuted_conditions_give_permuted_rows(resnet, images, composite, exclude_parallel):
    attribution = CondAttribution(resnet)
    found = attribution(images[:1], MIXED, composite, RECORD, exclude_parallel=exclude_parallel)
    for order in itertools.islice(itertools.permutations(range(len(MIXED))), 7, 120, 31):
        shuffled = [MIXED[i] for i in order]
        again = attribution(images[:1], shuffled, composite, RECORD, exclude_parallel=exclude_parallel)
        assert same(again, rows(found, list(order)))
