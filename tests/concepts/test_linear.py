"""Directions and subspaces: closed forms, sums over concepts, and the same through every part of the package."""

from __future__ import annotations

import pytest
import torch
from attribution_cases import close, net
from concept_cases import drawn
from torch import Tensor, nn
from zennit.composites import EpsilonPlus as ZennitEpsilonPlus

from crp.attribution import AttributionGraph, CondAttribution
from crp.composites import DeepLift, EpsilonPlus, Gradient, GradientTimesInput
from crp.concepts import AxisConcept, ChannelConcept, DirectionConcept, SubspaceConcept, mask_of, relevance_in
from crp.engine.masks import apply_masks
from crp.trace.graph import trace_model_graph

C = 5


def orthonormal(n: int = C, seed: int = 1) -> Tensor:
    return torch.linalg.qr(drawn(C, C, seed=seed))[0][:n]


def autoencoder() -> DirectionConcept:
    """A dictionary of twice the width whose codes are read by an encoder of its own."""
    return DirectionConcept(drawn(2 * C, C, seed=3), drawn(2 * C, C, seed=4))


CONCEPTS = {
    "whole basis": DirectionConcept(orthonormal()),
    "orthonormal": DirectionConcept(orthonormal(3)),
    "one": DirectionConcept(drawn(C)),
    "oblique": DirectionConcept(drawn(3, C)),
    "overcomplete": DirectionConcept(drawn(8, C)),
    "autoencoder": autoencoder(),
    "subspaces": SubspaceConcept([orthonormal()[:2], orthonormal()[2:3]]),
    "oblique subspaces": SubspaceConcept([drawn(2, C), drawn(1, C, seed=2)]),
}
every_concept = pytest.mark.parametrize("concept", CONCEPTS.values(), ids=list(CONCEPTS))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return net(
        lambda s, x: s.fc(s.conv2(s.conv1(x).relu()).relu().mean((2, 3))),
        conv1=nn.Conv2d(3, C, 3), conv2=nn.Conv2d(C, C, 3), fc=nn.Linear(C, 4),
    )  # fmt: skip


# --- closed forms ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", [(), (4,), (2, 3)], ids=str)
@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("seed", range(3))
def test_relevance_of_directions(space, axis, seed):
    """(e·a)(d·m) at every position; the rest is what remains of the relevance; the masks let through as much."""
    a, m = drawn(2, C, *space, seed=seed).movedim(1, axis), drawn(2, C, *space, seed=seed + 9).movedim(1, axis)
    d, e = drawn(4, C, seed=5), drawn(4, C, seed=6)
    concept = DirectionConcept(d, e, axis=axis)
    flat_a, flat_m = (t.movedim(axis, 1).reshape(2, C, -1) for t in (a, m))
    coefficients = torch.einsum("kc,bcp->bkp", e, flat_a)
    wanted = coefficients * torch.einsum("kc,bcp->bkp", d, flat_m)
    rest = flat_a - torch.einsum("kc,bkp->bcp", d, coefficients)
    found = concept.relevance(a, m)
    assert found.shape == (2, 5, *space)
    assert close(found.reshape(2, 5, -1)[:, :4], wanted)
    assert close(found.reshape(2, 5, -1)[:, 4], (rest * flat_m).sum(1), 1e-9)
    assert close(concept.code(a).reshape(2, 5, -1), torch.cat([coefficients, rest.norm(dim=1, keepdim=True)], 1))
    for k in range(5):
        masks = [concept.mask(row, [k]) for row in range(2)]
        assert close((a * apply_masks(masks, m)).flatten(1).sum(1), found[:, k].reshape(2, -1).sum(1), 1e-9)


def test_relevance_of_channels_is_not_enough():
    """Two pairs with the same relevance of channels, and different relevance of a direction."""
    concept = DirectionConcept([0.6, 0.8], rest=False)
    a, m, other = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 5.0]])
    assert torch.equal(a * m, a * other)
    assert concept.relevance(a, m).item() == pytest.approx(0.36)
    assert concept.relevance(a, other).item() == pytest.approx(2.76)
    with pytest.raises(TypeError, match=r"does not follow from that of the layer.*relevance_in"):
        concept.attribute(a * m)
    with pytest.raises(TypeError, match=r"layer 'fc': the relevance of DirectionConcept.1 of 2 channels"):
        concept.scores(a * m, "fc")


@every_concept
@pytest.mark.parametrize("shape", [(3, C, 2, 4), (3, C)], ids=str)
def test_concepts_and_the_rest_are_the_whole(concept, shape):
    a, m = drawn(*shape), drawn(*shape, seed=1)
    assert close(concept.relevance(a, m).sum(1), (a * m).sum(1), 1e-10)
    rows = [concept.mask(row, range(len(concept))) for row in range(3)]
    assert close(apply_masks(rows, m), m, 1e-10)


@every_concept
def test_masks_of_many_rows_are_those_of_each(concept):
    m = drawn(4, C, 2, 3)
    ids = [[0], [-1], [], [0, -1]]
    masks = [concept.mask(row, kept) for row, kept in enumerate(ids)] + [concept.mask(0, [0, 1])]
    one_by_one = m.clone()
    for mask in masks:
        one_by_one = mask(one_by_one)
    assert close(apply_masks(masks, m), one_by_one, 1e-12)
    assert not one_by_one[2].any() and one_by_one[[0, 1, 3]].flatten(1).any(1).all()


def test_an_orthonormal_dictionary_is_its_own_dual():
    concept, u, m = CONCEPTS["orthonormal"], orthonormal(3), drawn(2, C, seed=7)
    assert close(concept.dual, concept.directions)
    for k in range(3):
        assert close(concept.mask(1, k)(m.clone())[1], u[k] * (u[k] @ m[1]))
    assert close(concept.mask(1, [0, 1, 2])(m.clone())[1], u.mT @ u @ m[1])


def test_the_dual_of_a_basis_is_its_inverse():
    """E = D⁻ᵀ for as many directions as channels: nothing is left to the rest; else the least squares' E = (D⁺)ᵀ."""
    d, a, m = drawn(C, C, seed=11), drawn(3, C, 2, seed=12), drawn(3, C, 2, seed=13)
    concept = DirectionConcept(d, rest=False)
    assert close(concept.dual, torch.linalg.inv(d).mT, 1e-9)
    wanted = torch.einsum("kc,bcp->bkp", torch.linalg.inv(d).mT, a) * torch.einsum("kc,bcp->bkp", d, m)
    assert close(concept.relevance(a, m), wanted, 1e-9)
    assert close(concept.relevance(a, m).sum(1), (a * m).sum(1), 1e-10)
    assert close(DirectionConcept(d[:3]).dual, torch.linalg.pinv(d[:3]).mT, 1e-9)


def test_relevance_does_not_depend_on_the_length_of_a_direction():
    a, m, d = drawn(2, C, 3), drawn(2, C, 3, seed=1), drawn(3, C)
    scaled = DirectionConcept(d * torch.tensor([[2.0], [-3.0], [0.1]]))
    assert close(DirectionConcept(d).relevance(a, m), scaled.relevance(a, m), 1e-9)


def test_a_subspace_is_the_sum_over_any_of_its_bases():
    a, m, turned = drawn(2, C, 3), drawn(2, C, 3, seed=1), torch.linalg.qr(drawn(2, 2))[0]
    u = orthonormal()
    one, two = (SubspaceConcept([basis, u[2:]]) for basis in (u[:2], turned @ u[:2]))
    assert close(one.relevance(a, m), two.relevance(a, m))
    assert close(one.code(a)[:, 0], (u[:2] @ a).norm(dim=1))
    assert close(one.relevance(a, m)[:, 0], DirectionConcept(u[:2], rest=False).relevance(a, m).sum(1))


# --- single positions -----------------------------------------------------------------------------------------------


@every_concept
def test_single_positions(concept):
    """`mask_rf` follows from `mask`: relevance of a concept at a position is what its mask lets through there."""
    a, m = drawn(2, C, 2, 3), drawn(2, C, 2, 3, seed=1)
    found = concept.relevance(a, m).flatten(2)
    kept = concept.mask_rf(1, {0: [4], len(concept) - 1: [0, 2]})(m.clone())
    assert (a * kept)[1].sum().item() == pytest.approx((found[1, 0, 4] + found[1, -1, [0, 2]].sum()).item(), rel=1e-9)
    assert torch.equal(kept[0], m[0])
    assert list(concept.get_rf_indices((C, 2, 3))) == list(range(6))
    assert list(concept.get_rf_indices((C,))) == [0]
    with pytest.raises(IndexError, match="layer 'conv' has 6 positions, 0 to 5; there is no position 6"):
        concept.mask_rf(0, {0: 6}, "conv")(m.clone())


def test_positions_that_are_not_those_of_the_layer_are_refused():
    concept = DirectionConcept(drawn(2, C), axis=-1)
    with pytest.raises(NotImplementedError, match=r"layer 'embed': positions of .* shape \(4,\).*define DirectionCon"):
        concept.mask_rf(0, {0: 1}, "embed")(drawn(1, 4, C))
    assert list(concept.get_rf_indices((4, C))) == [0, 1, 2, 3]


# --- through the package --------------------------------------------------------------------------------------------


@every_concept
@pytest.mark.parametrize("composite", [EpsilonPlus(), GradientTimesInput(), DeepLift()], ids=repr)
def test_conditions(model, concept, composite):
    """The heatmaps of all concepts add up to that of the whole, in one call and in parts."""
    attribution, data = CondAttribution(model), drawn(2, 3, 7, 7)
    whole = attribution(data, [{"y": 1}], composite, ["conv1"])
    found = relevance_in(concept, whole, "conv1")
    assert close(found.sum(1), whole.relevances["conv1"].sum(1), 1e-10)
    conditions = [{"y": 1, "conv1": [k]} for k in range(len(concept))] + [{"y": 1, "conv1": []}]
    for exclude_parallel in (True, False):
        parts = attribution(data, conditions, composite, mask_map=concept.mask, exclude_parallel=exclude_parallel)
        assert close(parts.heatmap.unflatten(0, (2, -1)).sum(1), whole.heatmap, 1e-10)
    chunks = attribution.generate(data, conditions, composite, mask_map=mask_of(concept), batch_size=3, verbose=False)
    assert close(torch.cat([chunk.heatmap for chunk in chunks]), parts.heatmap, 1e-10)


@every_concept
def test_graph(model, concept):
    data = drawn(1, 3, 7, 7)
    layers = ["conv1", "conv2"]
    attribution = CondAttribution(model)
    graph = AttributionGraph(attribution, trace_model_graph(model, data, layers), dict.fromkeys(layers, concept))
    n = len(concept)
    nodes, connections = graph(data, EpsilonPlus(), 0, "conv2", 1, [n], abs_norm=False, verbose=False)
    above = attribution(data, [{"y": 1, "conv2": [0]}], EpsilonPlus(), ["conv1"], concept.mask, exclude_parallel=False)
    wanted = relevance_in(concept, above, "conv1").flatten(2).sum(2)[0]
    assert close(
        torch.tensor([value for *_, value in connections["conv2", 0]], dtype=torch.float64),
        wanted.sort(descending=True)[0],
    )
    assert close(wanted.sum(), above.relevances["conv1"].sum(), 1e-10)
    assert len(nodes) == n + 1


def test_composites_without_multipliers_are_refused(model):
    concept, data = CONCEPTS["oblique"], drawn(1, 3, 7, 7)
    attribution = CondAttribution(model)
    calls = model.calls
    with pytest.raises(TypeError, match="layer 'conv1' needs multipliers"):
        attribution(data, [{"y": 1, "conv1": [0]}], ZennitEpsilonPlus(), mask_map=concept.mask)
    assert model.calls == calls
    for composite in (None, ZennitEpsilonPlus(), Gradient(), DeepLift(reference=[data * 0, data + 1])):
        result = attribution(data, [{"y": 1}], composite, ["conv1"])
        with pytest.raises(TypeError, match=r"layer 'conv1': .* needs multipliers.*GradientTimesInput"):
            relevance_in(concept, result, "conv1")
        assert torch.equal(relevance_in(ChannelConcept(), result, "conv1"), result.relevances["conv1"])
    with pytest.raises(KeyError, match=r"layer 'conv2' was not recorded; the result has \['conv1'\]"):
        relevance_in(concept, result, "conv2")


# --- words ----------------------------------------------------------------------------------------------------------


def test_names():
    concept = DirectionConcept(drawn(2, C), names=["wheel", "sky"])
    assert [concept.describe(i) for i in (0, 1, 2, -1)] == ["wheel", "sky", "rest", "rest"]
    assert [concept.describe(i) for i in (-2, -3)] == ["sky", "wheel"]
    assert DirectionConcept(drawn(2, C), rest=False).describe(1) == "direction 1"
    assert CONCEPTS["subspaces"].describe(1) == "subspace 1"
    assert ChannelConcept().describe(7) == "channel 7"
    assert repr(concept) == "DirectionConcept(2 of 5 channels, 2 directions)"
    assert repr(SubspaceConcept([drawn(2, C)], rest=False)).endswith("(1 of 5 channels, 2 directions, rest=False)")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DirectionConcept([]), r"directions must be vectors of shape \(directions, channels\), not"),
        (lambda: DirectionConcept(drawn(1, 2, 3)), r"not \(1, 2, 3\)"),
        (lambda: DirectionConcept([[1.0, float("nan")]]), "directions must be finite, without NaN"),
        (lambda: DirectionConcept(drawn(2, C), drawn(3, C)), r"dual has blocks of \(1, 1, 1\) vectors of 5 channels"),
        (lambda: DirectionConcept([[1.0, 0.0], [0.0, 0.0]]), "direction 1 is all zeros, .* leave it out"),
        (lambda: DirectionConcept(drawn(2, C), torch.zeros(2, C)), "direction 0 is all zeros, or its dual is"),
        (lambda: SubspaceConcept([drawn(2, C), torch.zeros(2, C)]), "subspace 1 is all zeros"),
        (lambda: DirectionConcept(drawn(2, C), axis=0), "axis must be a whole number, and not 0"),
        (lambda: DirectionConcept(drawn(2, C), names=["a"]), "names must be a list of 2 names, one for each concept"),
        (lambda: DirectionConcept(drawn(2, C), names="ab"), "a list of 2 names, .* not 'ab'"),
        (lambda: DirectionConcept(drawn(2, C), names={"a", "b"}), "names must be a list of 2 names"),
        (lambda: DirectionConcept(drawn(2, C), names=[1, 2]), r"names must be a list of 2 names, .* not \[1, 2\]"),
        (lambda: DirectionConcept(drawn(2, C), axis="1"), "-1 for tokens; not '1'"),
        (lambda: DirectionConcept(drawn(2, C), axis=1.0), "-1 for tokens; not 1.0"),
        (lambda: SubspaceConcept([]), "blocks is empty"),
        (lambda: SubspaceConcept([drawn(1, 2), drawn(1, 3)]), r"blocks have different numbers of channels: \[2, 3\]"),
        (lambda: DirectionConcept(drawn(2, C)).code(drawn(1, 4)), r"the layer gives \(1, 4\); .*5 channels on axis 1"),
        (lambda: DirectionConcept(drawn(2, C)).mask(0, 0, "fc")(drawn(1, 4)), r"layer 'fc' gives \(1, 4\)"),
    ],
    ids=range(18),
)  # fmt: skip
def test_what_is_wrong_is_said(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DirectionConcept([["a", "b"]]), "directions must be real numbers"),
        (lambda: DirectionConcept(drawn(2, C) * 1j), "directions must be real numbers, not of complex128"),
        (lambda: DirectionConcept([[1.0, 2.0], [1.0]]), "directions must be real numbers"),
        (lambda: DirectionConcept(None), "directions must be real numbers"),
        (lambda: SubspaceConcept({"one": drawn(2, C)}), "blocks must be a list of blocks of directions"),
        (lambda: SubspaceConcept("blocks"), "blocks must be a list of blocks of directions, not 'blocks'"),
        (lambda: SubspaceConcept(3), "blocks must be a list of blocks of directions, not 3"),
    ],
    ids=["words", "complex", "ragged", "nothing", "mapping", "word", "number"],
)
def test_what_are_no_directions(make, message):
    with pytest.raises(TypeError, match=message):
        make()


@pytest.mark.parametrize("concept", [DirectionConcept(drawn(2, C)), ChannelConcept(), AxisConcept(-1)], ids=repr)
def test_multipliers_of_other_samples_are_refused(concept):
    """One multiplier would be taken for that of every sample."""
    for shape in ((1, C), (3, 1)):
        with pytest.raises(
            ValueError, match=r"activation is of shape \(3, 5\) and multiplier of \(\d, \d\); they belong"
        ):
            concept.relevance(drawn(3, C), drawn(*shape))


def test_a_concept_that_is_not_there():
    with pytest.raises(IndexError, match="layer 'fc' has 3 concepts, 0 to 2; there is no concept 3"):
        DirectionConcept(drawn(2, C)).mask(0, [3], "fc")
