"""Whatever happens during a call, the model is afterwards bit for bit what it was, and nothing is kept."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable

import pytest
import torch
from attribution_cases import every_composite, every_kind, plain_sums, same, stack, zennit_flat
from core_cases import Maps
from torch import Tensor, nn
from zennit.canonizers import SequentialMergeBatchNorm
from zennit.composites import EpsilonPlusFlat as ZennitEpsilonPlusFlat
from zennit.composites import NameMapComposite
from zennit.core import BasicHook
from zennit.core import Composite as ZennitComposite

from crp.attribution import AttributionGraph, CondAttribution
from crp.composites import Composite, EpsilonPlusFlat
from crp.concepts import ChannelConcept
from crp.rules import Rule
from crp.trace.graph import trace_model_graph

pytestmark = plain_sums
LAYERS = ["conv1", "layer1.conv1", "layer1.conv2", "layer2.conv1"]
CONDITIONS = [{"y": 1, "layer2.conv1": [1, 2], "layer1.conv1": [i]} for i in range(5)]


class Boom(Exception):
    """What goes wrong in these tests."""


def boom(*args: object, **kwargs: object) -> None:
    raise Boom


class ZennitBoom(BasicHook):
    def __init__(self) -> None:
        super().__init__(gradient_mapper=boom)


class RuleBoom(Rule):
    def surrogate(self, layer, a):
        z = layer(a)
        z.register_hook(boom)
        return z


class Rule0(Rule):
    def surrogate(self, layer, a):
        return layer.itself(a)


class BoomConcept(ChannelConcept):
    def mask(self, batch_id, concept_ids, layer_name=None):
        return boom if layer_name == "layer1.conv1" else ChannelConcept.mask(batch_id, concept_ids, layer_name)


def call(model: nn.Module, data: Tensor, composite: object, concept: ChannelConcept) -> None:
    for exclude_parallel in (True, False):
        CondAttribution(model)(data, CONDITIONS, composite, ["conv1"], concept.mask, exclude_parallel=exclude_parallel)


def generate(model: nn.Module, data: Tensor, composite: object, concept: ChannelConcept) -> None:
    for exclude_parallel in (True, False):
        parts = CondAttribution(model).generate(
            data, CONDITIONS, composite, ["conv1"], concept.mask, batch_size=2, exclude_parallel=exclude_parallel,
            verbose=False,
        )  # fmt: skip
        list(parts)


def attribution_graph(model: nn.Module, data: Tensor, composite: object, concept: ChannelConcept) -> None:
    ask = AttributionGraph(CondAttribution(model), GRAPH[0], dict.fromkeys(LAYERS, concept))
    ask(data[:1], composite, 1, "layer2.conv1", target=1, width=[2, 2, 2], verbose=False)


GRAPH: list = []
ENTRIES: dict[str, Callable[..., None]] = {"call": call, "generate": generate, "graph": attribution_graph}

every_entry = pytest.mark.parametrize("entry", ENTRIES.values(), ids=list(ENTRIES))


@pytest.fixture
def images(images) -> Tensor:
    return images[:2, :, :8, :8]


@pytest.fixture
def model(resnet, images) -> nn.Module:
    """Some parameters learn, some have a gradient; there is a hook of the user's."""
    GRAPH[:] = [trace_model_graph(resnet, images[:1], LAYERS)]
    for i, parameter in enumerate(resnet.parameters()):
        parameter.requires_grad_(i % 3 > 0)
        if i % 3 == 1:
            parameter.grad = torch.randn_like(parameter)
    resnet.fc.register_forward_hook(lambda module, args, output: None)
    resnet.extra = "an attribute of the user's"
    return resnet


@pytest.mark.promise("Model", "Calls of every kind leave no gradients, flags or hooks")
@every_entry
@every_composite
def test_nothing_is_left(model, images, untouched, entry, composite):
    """L1: not even ``requires_grad``."""
    output, random, gradients = model(images).detach(), torch.get_rng_state(), torch.is_grad_enabled()
    filters = list(warnings.filters)
    with untouched(model):
        for _ in range(2):
            entry(model, images, composite, ChannelConcept())
    assert torch.equal(model(images), output)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled() is gradients
    assert warnings.filters == filters


def reference(model: nn.Module, data: Tensor, composite: object):
    return CondAttribution(model)(data, CONDITIONS, composite, ["conv1"])


@every_entry
@every_kind
def test_forward_pass_that_fails(model, images, untouched, entry, composite):
    """L2: nothing is left on the model, which goes on to work."""
    wanted = reference(model, images, composite)
    model.fc.forward = boom
    with untouched(model):
        for _ in range(2):
            with pytest.raises(Boom):
                entry(model, images, composite, ChannelConcept())
    del model.fc.forward
    model(images)
    assert same(reference(model, images, composite), wanted, 0)


@every_entry
@every_kind
def test_mask_that_fails(model, images, untouched, entry, composite):
    wanted = reference(model, images, composite)
    with untouched(model):
        for _ in range(2):
            with pytest.raises(Boom):
                entry(model, images, composite, BoomConcept())
    assert same(reference(model, images, composite), wanted, 0)


@every_entry
@pytest.mark.parametrize(
    "composite",
    [
        NameMapComposite([(["layer1.conv1"], ZennitBoom())], canonizers=[SequentialMergeBatchNorm()]),
        Composite(name_map=[(["layer1.conv1"], RuleBoom())]),
        Composite([SequentialMergeBatchNorm()], name_map=[(["layer1.conv1"], RuleBoom())]),
    ],
    ids=["zennit", "ours", "ours_with_zennits_canonizer"],
)
def test_rule_that_fails(model, images, untouched, entry, composite):
    wanted = reference(model, images, zennit_flat())
    with untouched(model):
        for _ in range(2):
            with pytest.raises(Boom):
                entry(model, images, composite, ChannelConcept())
    assert same(reference(model, images, zennit_flat()), wanted, 0)


class HalfWay(SequentialMergeBatchNorm):
    """Merges one batch norm, and fails at the second."""

    left = 1

    def register(self, linears, batch_norm):
        if HalfWay.left == 0:
            raise Boom
        HalfWay.left -= 1
        super().register(linears, batch_norm)


class Forgetful(SequentialMergeBatchNorm):
    """Merges a batch norm, and fails before anyone could undo it."""

    def register(self, linears, batch_norm):
        super().register(linears, batch_norm)
        raise Boom


class NeverAttached(Rule0):
    """Rule that cannot be put on a model."""

    def attach(self, attachment):
        raise Boom


HALF = {
    "zennit": lambda: ZennitComposite(lambda ctx, name, module: boom() if name == "layer2" else Rule0().copy()),
    "ours": lambda: Composite(name_map=[(["layer1"], Rule0()), (["layer2"], NeverAttached())]),
}


@every_entry
@pytest.mark.parametrize("make", HALF.values(), ids=list(HALF))
def test_composite_that_fails_half_way(model, images, untouched, entry, make):
    """While it puts its hooks, or its rules, on one layer after the other."""
    with untouched(model), pytest.raises(Boom):
        entry(model, images, make(), ChannelConcept())


@every_entry
@pytest.mark.parametrize("kind", [ZennitEpsilonPlusFlat, EpsilonPlusFlat], ids=["zennit", "ours"])
@pytest.mark.parametrize("canonizer", [HalfWay, Forgetful])
def test_canonizer_that_fails_half_way(model, images, untouched, entry, kind, canonizer):
    wanted = reference(model, images, EpsilonPlusFlat())
    for canonizers in ([canonizer()], [SequentialMergeBatchNorm(), canonizer()]):
        HalfWay.left = 1
        with untouched(model), pytest.raises(Boom):
            entry(model, images, kind(canonizers=canonizers), ChannelConcept())
    assert same(reference(model, images, EpsilonPlusFlat()), wanted, 0)


# --- generators -----------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("exclude_parallel", [True, False], ids=["exclusive", "masks_only"])
@pytest.mark.parametrize("end", ["close", "forget", "throw", "never started"])
def test_generator_that_is_left(model, images, model_state, composite, exclude_parallel, end):
    """L3: while it waits, and after it is closed, forgotten or interrupted."""
    before, output = model_state(model), model(images).detach()
    attribution = CondAttribution(model)
    parts = attribution.generate(
        images, CONDITIONS, composite, batch_size=2, exclude_parallel=exclude_parallel, verbose=False
    )
    assert model_state(model) == before
    if end != "never started":
        for _ in range(2):
            next(parts)
            assert model_state(model) == before
            assert torch.equal(model(images), output)
    if end == "close":
        parts.close()
    elif end == "throw":
        with pytest.raises(KeyboardInterrupt):
            parts.throw(KeyboardInterrupt())
    del parts
    gc.collect()
    assert model_state(model) == before
    assert torch.equal(model(images), output)


@every_kind
def test_model_may_be_used_between_parts(model, images, composite):
    """Other attributions, and steps of an optimizer, while a generator waits."""
    attribution = CondAttribution(model)
    wanted = attribution(images[:1], CONDITIONS, composite)
    found, asked = [], attribution.generate(images[:1], CONDITIONS, composite, batch_size=2, verbose=False)
    other = attribution.generate(images[:1], CONDITIONS, zennit_flat(), batch_size=1, verbose=False)
    for part in asked:
        found.append(part)
        next(other)
        attribution(images, [{"y": 0}], EpsilonPlusFlat())
        model(images).sum().backward()
    assert same(stack(found), wanted)


# --- memory ---------------------------------------------------------------------------------------------------------


class Remembers(nn.Module):
    """Keeps weak references to what passes it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[weakref.ref] = []

    def forward(self, x: Tensor) -> Tensor:
        y = x * 1
        self.seen += [weakref.ref(x), weakref.ref(y)]
        return y

    def alive(self) -> bool:
        return any(ref() is not None for ref in self.seen)


@pytest.fixture
def watched(model, images) -> nn.Module:
    """The same with a layer between the blocks that knows when its tensors are gone."""
    model.layer2 = nn.Sequential(Remembers(), model.layer2).eval()
    return model


WATCHED = [{"y": 1, "layer2.1.conv1": [i], "layer1.conv1": [1, 2]} for i in range(5)]


@every_kind
@pytest.mark.parametrize("exclude_parallel", [True, False], ids=["exclusive", "masks_only"])
def test_no_tensor_outlives_the_call(watched, images, composite, exclude_parallel):
    """Nor does one wait for the garbage collector."""
    attribution, memory = CondAttribution(watched), watched.layer2[0]
    asked = {"record_layer": ["layer2.0"], "exclude_parallel": exclude_parallel}
    keeps = composite is None or isinstance(composite, Composite)
    gc.collect()
    gc.disable()
    try:
        result = attribution(images, WATCHED, composite, **asked)
        assert memory.seen
        assert not memory.alive()
        parts = attribution.generate(images, WATCHED, composite, batch_size=3, verbose=False, **asked)
        next(parts)
        assert memory.alive() is keeps
        parts.close()
        assert not memory.alive()
        parts = attribution.generate(images, WATCHED, composite, batch_size=5, verbose=False, **asked)
        last = next(parts), next(parts)
        assert not memory.alive(), "after the last part"
    finally:
        gc.enable()
    assert len(result.heatmap) == 10
    assert len(last[1].heatmap) == 5


def test_no_tensor_outlives_the_call_under_hooks_on_saved_tensors(watched, images):
    """What a hook keeps must not hold the node that keeps it."""
    attribution, memory = CondAttribution(watched), watched.layer2[0]
    gc.collect()
    gc.disable()
    try:
        with torch.autograd.graph.saved_tensors_hooks(Tensor.detach, lambda tensor: tensor):
            attribution(images, WATCHED, EpsilonPlusFlat())
        assert memory.seen
        assert not memory.alive()
    finally:
        gc.enable()


@every_kind
def test_no_tensor_outlives_an_error(watched, images, composite):
    attribution, memory = CondAttribution(watched), watched.layer2[0]
    for conditions, mask in ((WATCHED, BoomConcept().mask), ([{"y": 9}], ChannelConcept.mask)):
        with pytest.raises((Boom, IndexError)):
            attribution(images, conditions, composite, mask_map=mask)
        gc.collect()
        assert memory.seen
        assert not memory.alive()


def test_the_attribution_does_not_keep_the_data(mlp, vectors):
    attribution, data = Maps(mlp), vectors.clone().requires_grad_()
    attribution(data, [{"y": 1, "2": [0]}], EpsilonPlusFlat(), ["0"])
    known = weakref.ref(data)
    del data
    gc.collect()
    assert known() is None
