"""Activation checkpoints: parts of a model that run again in the backward pass have the same relevance."""

from __future__ import annotations

import gc
import random
import threading
import weakref
from functools import partial

import numpy as np
import pytest
import torch
from preset_cases import numbers, off
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformer_families import built

from crp.attribution import CondAttribution
from crp.composites import CPLRP, AttnLRP, DeepLift, EpsilonPlus, EpsilonPlusFlat, UniformGamma
from crp.concepts import AxisConcept
from crp.rules import Epsilon

#: Family, and the list of its blocks.
BLOCKS = {
    "gpt2": lambda model: model.model.transformer.h,
    "bert": lambda model: model.model.bert.encoder.layer,
    "llama": lambda model: model.model.model.layers,
    "timm_vit": lambda model: model.blocks,
    "torchvision_vit": lambda model: model.encoder.layers,
}
KINDS = pytest.mark.parametrize("use_reentrant", [False, True], ids=["plain", "reentrant"])


def checkpointed(family, use_reentrant):
    """Model of a family, the same with checkpoints around its blocks, and data."""
    (model, data), (other, _) = built(family), built(family)
    for block in BLOCKS[family](other):
        block.forward = partial(checkpoint, block.forward, use_reentrant=use_reentrant)
    return model, other, data


@KINDS
@pytest.mark.parametrize("family", BLOCKS)
@pytest.mark.parametrize("kind", [AttnLRP, CPLRP, EpsilonPlus, UniformGamma, EpsilonPlusFlat])
def test_relevance_is_the_same(family, kind, use_reentrant, untouched):
    model, other, data = checkpointed(family, use_reentrant)
    with untouched(other):
        found = CondAttribution(other)(data, [{"y": 1}, {"y": 2}], kind())
    wanted = CondAttribution(model)(data, [{"y": 1}, {"y": 2}], kind())
    assert torch.equal(found.heatmap, wanted.heatmap) and found.heatmap.abs().max() > 0
    assert torch.equal(found.prediction, wanted.prediction)


@KINDS
@pytest.mark.filterwarnings("ignore:outside DeepLIFT")
@pytest.mark.parametrize("kind", [AttnLRP, CPLRP, DeepLift])
def test_what_looks_inside_a_part(kind, use_reentrant):
    """Conditions and records inside of a part, and the account of what layers keep."""
    model, other, data = checkpointed("timm_vit", use_reentrant)
    heads, inside = AxisConcept(-1, groups=2), "blocks.1.attn.proj.input"
    for conditions in ([{"y": 1, inside: [1]}], [{"y": 1, inside: [0], "blocks.0": [1]}]):
        results = [
            CondAttribution(one)(data, conditions, kind(), ["blocks.0", "blocks.1.mlp.act", inside], heads.mask,
                                 exclude_parallel=False)
            for one in (model, other)
        ]  # fmt: skip
        assert torch.equal(*(result.heatmap for result in results))
        for layer in results[0].relevances:
            assert torch.equal(*(result.relevances[layer] for result in results))
            assert torch.equal(*(result.activations[layer] for result in results))
    if kind is not DeepLift:
        one, two = (CondAttribution(net).absorbed(data, [{"y": 1}], kind()) for net in (model, other))
        assert torch.equal(one.input, two.input) and one.layers.keys() == two.layers.keys()
        assert str(kind().report(model, data)) == str(kind().report(other, data))


@KINDS
def test_rules_of_a_module_around_a_part(use_reentrant):
    model, other, data = checkpointed("timm_vit", use_reentrant)
    composites = AttnLRP(layer_map=[("blocks.1", Epsilon(0.5))]), AttnLRP()
    found, wanted = (CondAttribution(one)(data, [{"y": 1}], composites[0]).heatmap for one in (other, model))
    assert torch.equal(found, wanted)
    assert not torch.allclose(found, CondAttribution(other)(data, [{"y": 1}], composites[1]).heatmap)


class Parts(nn.Module):
    """A model with a part that is called in some way."""

    def __init__(self, run, part=None):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.inner, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.run, self.part = run, part
        self.double().eval()

    def block(self, h, scale=1.0):
        return self.inner(h * scale).relu() + h

    def forward(self, x):
        return self.last(self.run(self, self.first(x)))


def plainly(function, *args, use_reentrant=None, **kwargs):
    return function(*args, **kwargs)


#: Numbers of NumPy's global generator.
draw, seed = np.random.rand, np.random.seed

#: Ways to call a part, by a function that may be `checkpoint`.
WAYS = {
    "method": lambda check, net, h: check(net.block, h, use_reentrant=False),
    "keyword": lambda check, net, h: check(net.block, use_reentrant=False, h=h, scale=2.0),
    "partial": lambda check, net, h: check(partial(net.block, scale=0.5), h, use_reentrant=False),
    "partial_of_input": lambda check, net, h: check(partial(net.block, h), use_reentrant=False),
    "two_outputs": lambda check, net, h: sum(check(lambda h: (net.block(h), [h * 2]), h, use_reentrant=False)[1], h),
    "dict": lambda check, net, h: check(lambda h: {"a": net.block(h), "n": 3}, h, use_reentrant=False)["a"],
    "nested": lambda check, net, h: check(
        lambda h: check(net.block, h, use_reentrant=False) + h, h, use_reentrant=False
    ),
    "captured": lambda check, net, h: check(lambda c: net.block(h) * c, torch.tensor(2.0), use_reentrant=False),
    "captured_beside": lambda check, net, h: check(lambda g: net.block(g) + h, h.sin(), use_reentrant=False),
    "constant": lambda check, net, h: h + check(net.inner, torch.ones(6).double(), use_reentrant=False),
    "input": lambda check, net, h: check(lambda h: h, h, use_reentrant=False).relu(),
    "same_twice": lambda check, net, h: check(lambda a, b: net.block(a) * b.sigmoid(), h, h, use_reentrant=False),
    "gate_outside": lambda check, net, h: check(lambda h: net.inner(h).sigmoid(), h, use_reentrant=False) * h,
    "softmax_in_two": lambda check, net, h: (
        (lambda e: e / e.sum(-1, keepdim=True))(check(lambda h: net.inner(h).exp(), h, use_reentrant=False)) * h
    ),
    "random": lambda check, net, h: check(lambda h: F.dropout(net.block(h), 0.5, True), h, use_reentrant=False),
    "random_of_python": lambda check, net, h: check(lambda h: net.block(h, random.random()), h, use_reentrant=False),
    "random_of_numpy": lambda check, net, h: check(lambda h: net.block(h, draw()), h, use_reentrant=False),
    "unused": lambda check, net, h: check(lambda a, b: net.block(a), h, h.cos(), use_reentrant=False),
}


@pytest.mark.filterwarnings("ignore:.* as by random numbers")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", [AttnLRP, CPLRP, EpsilonPlus, UniformGamma])
def test_ways_to_call_a_part(way, kind):
    found = []
    for check in (plainly, checkpoint):
        torch.manual_seed(3)
        model = Parts(partial(WAYS[way], check))
        attribution = CondAttribution(model)
        torch.manual_seed(5), random.seed(5), seed(5)
        found.append(attribution(numbers(2, 4), [{"y": 1}], kind(), record_layer=["first", "last"]))
    assert off(found[0].heatmap, found[1].heatmap) <= 1e-14 and found[0].heatmap.abs().max() > 0
    assert off(found[0].relevances["first"], found[1].relevances["first"]) <= 1e-14


@pytest.mark.filterwarnings("ignore:.* as by random numbers")
def test_a_part_that_is_looked_into_draws_the_same_numbers_again():
    found = []
    for check in (plainly, checkpoint):
        attribution = CondAttribution(Parts(partial(WAYS["random"], check)))
        torch.manual_seed(5)
        found.append(attribution(numbers(2, 4), [{"y": 1}], AttnLRP(), record_layer=["inner"]).heatmap)
    assert off(*found) <= 1e-14


@KINDS
def test_backward_passes_by_hand(use_reentrant):
    model, other, data = checkpointed("timm_vit", use_reentrant)
    found = []
    for one in (model, other):
        with AttnLRP().context(one):
            leaf = data.clone().requires_grad_()
            out = one(leaf)
            found.append([torch.autograd.grad(out[:, c].sum(), leaf, retain_graph=True)[0] for c in (0, 1)])
            out[:, 0].sum().backward()
            assert torch.equal(leaf.grad, found[-1][0])
    assert all(map(torch.equal, *found))


def test_what_cannot_be():
    _, other, data = checkpointed("timm_vit", False)
    leaf = data.clone().requires_grad_()
    with AttnLRP().context(other):
        out = other(leaf)[0, 1]
        with pytest.raises(RuntimeError, match="no second derivatives through activation checkpoints; switch them off"):
            torch.autograd.grad(out, leaf, create_graph=True)
        out = other(leaf)[0, 1]
    with pytest.raises(RuntimeError, match="AttnLRP is no longer on the model, a checkpointed part of which has to"):
        torch.autograd.grad(out, leaf)


def test_other_threads_and_models_have_checkpoints_as_ever():
    model, other, data = checkpointed("gpt2", False)
    wanted = torch.autograd.grad(model(leaf := data.clone().requires_grad_())[0, 1], leaf)[0]
    found = []

    def plain():
        leaf = data.clone().requires_grad_()
        found.append(torch.autograd.grad(other(leaf)[0, 1], leaf)[0])

    before = getattr(checkpoint.__wrapped__, "__dynamo_disable", None)
    with AttnLRP().context(model):
        thread = threading.Thread(target=plain)
        thread.start()
        thread.join()
        plain()
    plain()
    assert len(found) == 3 and all(torch.equal(one, wanted) for one in found)
    assert before is None or getattr(checkpoint.__wrapped__, "__dynamo_disable", None) is before


def test_a_part_is_let_go_of():
    """Between forward and backward pass, what a part has saved is gone, and so is the whole graph afterwards."""
    seen = []

    def part(h):
        wide = F.gelu(h @ torch.ones(6, 60).double())
        seen.append(weakref.ref(wide))
        return wide @ torch.ones(60, 6).double() * 0.01

    model = Parts(lambda net, h: checkpoint(part, h, use_reentrant=False))
    with AttnLRP().context(model):
        leaf = numbers(2, 4).requires_grad_()
        out = model(leaf)
        gc.collect()
        assert len(seen) == 1 and seen[0]() is None
        torch.autograd.grad(out[:, 1].sum(), leaf)
        gc.collect()
        assert len(seen) == 2 and seen[1]() is None
