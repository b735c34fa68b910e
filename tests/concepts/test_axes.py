"""Heads, neurons and tokens as concepts: masks, scores, and that parts add up to the whole."""

from __future__ import annotations

import pytest
import torch
from preset_cases import numbers, off
from transformer_families import built

from crp.attribution import CondAttribution
from crp.composites import CPLRP, AttnLRP, EpsilonPlus
from crp.concept_graph import AttributionGraph
from crp.concepts import AxisConcept, ChannelConcept, check_concept, relevance_in
from crp.concepts.reading import LayerValues
from crp.engine.masks import apply_masks
from crp.graph import trace_model_graph
from crp.types import AttributionResults

HEADS, NEURONS, TOKENS = AxisConcept(-1, groups=2), AxisConcept(-1), AxisConcept(1)


@pytest.mark.parametrize("axis", [1, 2, 3, -1, -2, -3])
@pytest.mark.parametrize("groups", [None, 1, 2])
def test_mask_keeps_groups_of_one_row(axis, groups):
    grad, concept = numbers(3, 4, 6, 2), AxisConcept(axis, groups)
    n = grad.shape[axis] if groups is None else groups
    size = grad.shape[axis] // n
    wanted = grad.clone()
    for place in range(grad.shape[axis]):
        if place // size != n - 1:
            wanted[1].select(axis - 1 if axis > 0 else axis, place).zero_()
    given = grad.clone()
    assert concept.mask(1, [-1], "layer")(given) is given
    assert torch.equal(given, wanted)


@pytest.mark.parametrize("rows", [(0, 1, 2), (2, 0), (1,), (1, 1)])
def test_masks_of_many_rows_at_once(rows):
    grad = numbers(3, 5, 4)
    masks = [HEADS.mask(row, [i % 2], "layer") for i, row in enumerate(rows)]
    masks.append(HEADS.mask_rf(rows[0], {0: [0, 3]}, "layer"))
    one_by_one = grad.clone()
    for mask in masks:
        one_by_one = mask(one_by_one)
    assert torch.equal(apply_masks(masks, grad.clone()), one_by_one)
    assert torch.equal(apply_masks(masks[:-1], grad.clone()), apply_masks(masks[:-1][::-1], grad.clone()))


@pytest.mark.parametrize("concept", [HEADS, NEURONS, TOKENS], ids=repr)
def test_scores_are_those_of_channels_of_the_arranged_values(concept):
    relevance = numbers(3, 5, 4)
    moved = relevance if concept is TOKENS else relevance.movedim(-1, 1)
    moved = moved.unflatten(1, (2, 2)) if concept is HEADS else moved
    channels = ChannelConcept()
    for found, wanted in zip(concept.scores(relevance), channels.scores(moved), strict=True):
        assert torch.equal(found, wanted)
    assert torch.equal(concept.attribute(relevance), channels.attribute(moved))
    assert torch.equal(concept.attribute(relevance, torch.zeros(())), torch.zeros(moved.shape[:2]).double())
    for found, wanted in zip(concept.reference_sampling(relevance), channels.reference_sampling(moved), strict=True):
        assert torch.equal(found, wanted)
    assert len(concept.get_rf_indices((5, 4))) == moved[0, 0].numel()


def test_single_positions_add_up():
    grad = numbers(1, 3, 4)
    parts = [HEADS.mask_rf(0, {head: [at]})(grad.clone()) for head in range(2) for at in HEADS.get_rf_indices((3, 4))]
    torch.testing.assert_close(sum(parts), grad)
    assert all(part.count_nonzero() == 1 for part in parts)


#: Family, layer, the concepts of its output, and how many there are.
LAYERS = {
    "heads": ("timm_vit", "blocks.1.attn.norm", HEADS, 2),
    "value_groups": ("llama", "model.model.layers.1.self_attn.v_proj", AxisConcept(-1, groups=1), 1),
    "neurons": ("gpt2", "model.transformer.h.0.mlp.act", NEURONS, 32),
    "neurons_of_an_image": ("torchvision_swin", "features.1.1.mlp.1", NEURONS, 32),
    "tokens": ("bert", "model.bert.encoder.layer.0", TOKENS, 6),
    "patches": ("timm_vit", "blocks.0", TOKENS, 5),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("kind", [AttnLRP, CPLRP, EpsilonPlus])
def test_parts_add_up_to_the_whole(name, kind):
    family, layer, concept, n = LAYERS[name]
    model, data = built(family)
    attribution = CondAttribution(model)
    mask_map = {layer: concept.mask}
    (whole,) = attribution(data, [{"y": 1, layer: list(range(n))}], kind(), mask_map=mask_map).heatmap
    conditions = [{"y": 1, layer: [c]} for c in range(n)]
    result = attribution(data, conditions, kind(), mask_map=mask_map, record_layer=[layer])
    assert off(result.heatmap.sum(0), whole) <= 1e-10
    assert whole.abs().max() > 0
    # (what a layer's concepts have is what the condition on it hands on)
    recorded = concept.attribute(result.relevances[layer][:1], abs_norm=False)
    assert recorded.shape == (1, n)
    torch.testing.assert_close(recorded.sum(), result.relevances[layer][:1].sum(), rtol=1e-9, atol=1e-12)


def test_heads_in_an_attribution_graph():
    model, data = built("timm_vit")
    attribution, lower, upper = CondAttribution(model), "blocks.0.attn.norm", "blocks.1.attn.norm"
    graph = trace_model_graph(model, data, [lower, upper])
    found = AttributionGraph(attribution, graph, {lower: HEADS, upper: HEADS})
    nodes, connections = found(data, AttnLRP(), 1, upper, target=1, width=[2], abs_norm=False)
    assert {layer for layer, _ in nodes} == {lower, upper}
    ((lower_name, head), value) = connections[upper, 1][0][:2], connections[upper, 1][0][2]
    wanted = attribution(
        data, [{"y": 1, upper: [1]}], AttnLRP(), mask_map=HEADS.mask, record_layer=[lower], exclude_parallel=False
    ).relevances[lower]
    assert lower_name == lower
    torch.testing.assert_close(
        torch.as_tensor(value), HEADS.attribute(wanted, abs_norm=False)[0, head].to(torch.as_tensor(value))
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AxisConcept(0), "axis must be a whole number, and not 0, that of the samples"),
        (lambda: AxisConcept(1, 0), "groups must be a whole number of at least 1, not 0"),
        (lambda: AxisConcept("1"), "axis must be a whole number, .*; not '1'"),
        (lambda: AxisConcept(1, 1.5), "groups must be a whole number of at least 1, not 1.5"),
        (lambda: AxisConcept(3).attribute(numbers(2, 3, 4), layer_name="a"), "layer 'a' has 3 axes .* none is 3"),
        (lambda: AxisConcept(-3).attribute(numbers(2, 3, 4), layer_name="a"), "layer 'a' has 3 axes .* none is -3"),
        (lambda: AxisConcept(1, 2).mask(0, [0], "a")(numbers(2, 3)), "3 places along axis 1, which are not 2 equal"),
    ],
)
def test_what_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()
    assert repr(HEADS) == "AxisConcept(axis=-1, groups=2)"


@pytest.mark.parametrize("concept", [HEADS, NEURONS, TOKENS], ids=repr)
def test_code_and_relevance_are_arranged(concept):
    activation, multiplier = numbers(3, 5, 4), numbers(3, 5, 4).flip(0)
    assert torch.equal(concept.code(activation), concept.arranged(activation))
    relevance = activation * multiplier
    assert torch.equal(concept.relevance(activation, multiplier), concept.arranged(relevance))
    result = AttributionResults(relevance, {"a": activation}, {"a": relevance}, relevance)
    assert torch.equal(relevance_in(concept, result, "a"), concept.arranged(relevance))
    check_concept(concept, LayerValues.of(result, "a"), "a")


class Backward(AxisConcept):
    """Counts places from the end."""

    def relevance(self, activation, multiplier):
        return super().relevance(activation, multiplier).flip(1)


def test_relevance_of_a_subclass_is_what_is_summed_and_scored():
    relevance = torch.randn(2, 5, 3)
    for own, base in ((Backward(), AxisConcept()), (Backward(-1, groups=3), AxisConcept(-1, groups=3))):
        assert torch.equal(own.attribute(relevance), base.attribute(relevance).flip(1))
        assert torch.equal(own.scores(relevance).sum, base.scores(relevance).sum.flip(1))
