"""What concepts read in results, and how a concept type that contradicts itself is noticed."""

from __future__ import annotations

import pytest
import torch
from concept_cases import drawn

from crp.concepts import ChannelConcept, Concept, DirectionConcept, check_concept, scores_of
from crp.concepts.reading import (
    LayerValues,
    activation_scores,
    initial_relevance_of,
    relevance_scores,
    relevance_sums,
)

C = 4


def values(*space: int, encoding: str = "multiplier") -> LayerValues:
    a, m = drawn(3, C, *space), drawn(3, C, *space, seed=1)
    return LayerValues(a, a * m, m, a) if encoding == "multiplier" else LayerValues(a, a * m)


class OwnScores(ChannelConcept):
    """As before `code` and `relevance`: concept 0 is the sum of all channels."""

    def scores(self, relevance, layer_name=None):
        return scores_of(relevance.sum(1, keepdim=True))

    def attribute(self, relevance, mask=None, layer_name=None, abs_norm=True):
        return relevance.flatten(1).sum(1, keepdim=True)

    def mask(self, batch_id, concept_ids, layer_name=None):
        return lambda grad: grad


class RelevanceOnly(DirectionConcept):
    """A direction whose scores project relevance of channels."""

    def relevance(self, activation, multiplier):
        return self.code(activation * multiplier)


class ProjectedScores(ChannelConcept):
    """The same, as it was written before `relevance`: a mask that projects, and scores that project relevance."""

    needs_multiplier = True

    def mask(self, batch_id, concept_ids, layer_name=None):
        return DirectionConcept([0.5] * C, rest=False).mask(batch_id, 0)

    def scores(self, relevance, layer_name=None):
        return scores_of(relevance.mean(1, keepdim=True))


class MaskOnly(Concept):
    """Only a mask, which is none of the channels."""

    def mask(self, batch_id, concept_ids, layer_name=None):
        return DirectionConcept([0.5] * C, rest=False).mask(batch_id, 0)


@pytest.mark.parametrize("space", [(), (2, 3)], ids=str)
@pytest.mark.parametrize("encoding", ["multiplier", "relevance"])
@pytest.mark.parametrize("concept", [ChannelConcept(), OwnScores()], ids=repr)
def test_selections_are_read_from_relevance(concept, encoding, space):
    of_layer = values(*space, encoding=encoding)
    for found, tensor in (
        (activation_scores(concept, of_layer.activation, "layer"), of_layer.activation),
        (relevance_scores(concept, of_layer, "layer"), of_layer.relevance),
    ):
        assert all(map(torch.equal, found, concept.scores(tensor)))
    assert torch.equal(relevance_sums(concept, of_layer, "layer"), concept.attribute(of_layer.relevance))
    check_concept(concept, of_layer, "layer")


@pytest.mark.parametrize("space", [(), (2, 3)], ids=str)
def test_directions_are_read_from_activation_and_multiplier(space):
    concept, of_layer = DirectionConcept(drawn(2, C, seed=3)), values(*space)
    wanted = concept.relevance(of_layer.activation, of_layer.multiplier)
    assert all(map(torch.equal, relevance_scores(concept, of_layer, "layer"), scores_of(wanted)))
    assert all(
        map(torch.equal, activation_scores(concept, of_layer.activation, "x"), scores_of(concept.code(of_layer[0])))
    )
    summed = wanted.reshape(3, 3, -1).sum(-1)
    assert torch.allclose(relevance_sums(concept, of_layer, "layer", False), summed, rtol=1e-12)
    shares = summed / summed.abs().sum(1, keepdim=True)
    assert torch.allclose(relevance_sums(concept, of_layer, "layer"), shares, rtol=1e-9)
    check_concept(concept, of_layer, "layer")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_rounding_is_no_contradiction(dtype):
    for concept in (DirectionConcept(drawn(3, 64)), ChannelConcept()):
        a, m = drawn(2, 64, 7, 7).relu().to(dtype), drawn(2, 64, 7, 7, seed=1).to(dtype)
        check_concept(concept, LayerValues(a, a * m, m, a), "layer")


@pytest.mark.parametrize("concept", [RelevanceOnly([0.5] * C), ProjectedScores(), MaskOnly()], ids=repr)
@pytest.mark.parametrize("space", [(), (2, 3)], ids=str)
def test_a_wrong_concept_is_noticed(concept, space):
    with pytest.raises(ValueError, match=r"layer 'conv': .* contradicts itself. It scores .* through; define"):
        check_concept(concept, values(*space), "conv")


@pytest.mark.parametrize(
    ("made", "found"), [(lambda grad: None, "None"), (lambda grad: grad[:, :2], r"a Tensor of shape \(1, 2, 3\)")]
)
def test_a_mask_that_returns_no_gradient_is_noticed(made, found):
    class Forgetful(ChannelConcept):
        def mask(self, batch_id, concept_ids, layer_name=None):
            return made

    with pytest.raises(ValueError, match=rf"'conv': the function that Forgetful.mask returns .*; it returns {found}"):
        check_concept(Forgetful(), values(3), "conv")


class WrongRest(DirectionConcept):
    """Only the rest, which is the last concept, is counted twice."""

    def relevance(self, activation, multiplier):
        right = super().relevance(activation, multiplier)
        return torch.cat([right[:, :-1], 2 * right[:, -1:]], 1)


def test_a_weak_last_concept_is_checked_too():
    a = torch.tensor([[10.0, 0.5, 0.5, 0.5]]).double()
    with pytest.raises(ValueError, match=r"contradicts itself. It scores rest by 1\.5, but its mask lets 0\.75"):
        check_concept(WrongRest([[1.0, 0, 0, 0]]), LayerValues(a, a * a, a, a), "conv")


@pytest.mark.parametrize("n", [1, 3], ids=["one", "three"])
def test_a_check_waits_twice_for_the_device(n, monkeypatch):
    """Whatever the number of concepts: once for the scores, once for what masks let through."""
    waits = []
    for name in ("tolist", "item", "__bool__", "__int__", "__float__"):
        own = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda tensor, own=own: waits.append(tensor) or own(tensor))
    check_concept(DirectionConcept(drawn(n, C)), values(4, 5), "layer")
    assert len([tensor for tensor in waits if tensor.is_floating_point()]) == 2


def test_values_that_are_not_finite_are_no_contradiction():
    of_layer = values(2)
    of_layer.relevance[0, 0] = of_layer.multiplier[0, 0] = torch.nan
    check_concept(RelevanceOnly([0.5] * C), of_layer, "layer")


def test_what_cannot_be_checked_is_not():
    class Pairs(ProjectedScores):
        def column(self, concept_id, layer_name):
            return concept_id[0]

    check_concept(Pairs(), values(2), "layer")
    check_concept(Concept(), values(2), "layer")


# --- where the activation of a concept starts -----------------------------------------------------------------------


def test_start_of_a_concept():
    """Gradient of `code`: 1 on a channel, the dual of a direction, the unit vector along the rest."""
    a, d, e = drawn(2, C, 2, 3), drawn(2, C, seed=3), drawn(2, C, seed=4)
    wanted = torch.zeros_like(a)
    wanted[:, 1] = a[:, 1]
    with torch.no_grad():
        assert torch.equal(initial_relevance_of(ChannelConcept(), a, 1), wanted)
    found = initial_relevance_of(DirectionConcept(d, e), a, 1, [4, 2]).flatten(2)
    wanted = torch.zeros(2, C, 6).double()
    wanted[0, :, 4], wanted[1, :, 2] = e[1] * a.flatten(2)[0, :, 4], e[1] * a.flatten(2)[1, :, 2]
    assert torch.allclose(found, wanted, rtol=1e-12)
    u = torch.linalg.qr(d.mT)[0].mT
    rest = a - torch.einsum("kc,kd,bdhw->bchw", u, u, a)
    found = initial_relevance_of(DirectionConcept(u), a, 2)
    assert torch.allclose(found, a * rest / rest.norm(dim=1, keepdim=True), rtol=1e-9)
    flat = initial_relevance_of(DirectionConcept(d, e), a[..., 0, 0], 0)
    assert torch.allclose(flat, e[0] * a[..., 0, 0], rtol=1e-12)
