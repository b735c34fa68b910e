"""Mining of concepts that are no channels: directions, concepts from before `code`, and those that are wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from attribution_cases import close
from concept_cases import drawn
from feature_net import Images, as_tensors, make_fv
from torch import Tensor
from zennit.composites import EpsilonPlus as ZennitEpsilonPlus

from crp.composites import DeepLift, EpsilonPlus, Gradient, GradientTimesInput
from crp.concepts import ChannelConcept, DirectionConcept, SubspaceConcept, relevance_in, scores_of
from crp.errors import ConceptError
from crp.visualization.table.store import Table

CONCEPTS = {
    "orthonormal": DirectionConcept(torch.linalg.qr(drawn(5, 5))[0][:3]),
    "oblique": DirectionConcept(drawn(3, 5)),
    "autoencoder": DirectionConcept(drawn(10, 5), drawn(10, 5, seed=2)),
    "subspaces": SubspaceConcept([drawn(2, 5), drawn(1, 5, seed=1)]),
}
every_concept = pytest.mark.parametrize("concept", CONCEPTS.values(), ids=list(CONCEPTS))


def mine(path, concept, composite=None, **keywords):
    fv = make_fv(path, layers={"second": concept}, **keywords)
    fv.run(EpsilonPlus() if composite is None else composite, 0, len(fv.dataset), batch_size=5, progress=False)
    return fv


def blocks(fv, mode: str = "relevance", kind: str = "sum"):
    return list(Table.open(fv.path).blocks("second", mode, kind))


def scores(fv, mode: str = "relevance", kind: str = "sum") -> Tensor:
    """Mined scores, (samples, concepts)."""
    return torch.cat([torch.as_tensor(block.value) for block in blocks(fv, mode, kind)])


@every_concept
@pytest.mark.parametrize("composite", [EpsilonPlus(), GradientTimesInput(), DeepLift()], ids=repr)
def test_what_is_mined(tmp_path, concept, composite):
    """Scores are those of single calls; relevance of all concepts and the rest is that of the layer."""
    fv = mine(tmp_path, concept, composite)
    result = fv.attribution(fv.dataset.data, [{"y": label} for label in fv.dataset.labels], composite, ["second"])
    relevance = relevance_in(concept, result, "second").flatten(2)
    code = concept.code(result.activations["second"]).flatten(2)
    assert close(scores(fv, "relevance", "sum"), relevance.sum(2), 1e-9)
    assert close(scores(fv, "relevance", "max"), relevance.amax(2), 1e-9)
    assert close(scores(fv, "activation", "sum"), code.sum(2), 1e-9)
    assert close(scores(fv, "relevance", "sum").sum(1), result.relevances["second"].flatten(1).sum(1), 1e-10)
    assert np.array_equal(np.concatenate([block.position for block in blocks(fv)]), relevance.argmax(2))


@every_concept
def test_references(tmp_path, concept):
    """Heatmaps of a class's relevance add up over concepts; those of activation explain the concept's code."""
    fv, composite = mine(tmp_path, concept), EpsilonPlus()
    ids = list(range(len(concept)))
    found = fv.get_max_reference(ids, "second", "relevance", (0, 12), composite, plot_fn=as_tensors, init="relevance")
    data, whole = fv.dataset.data, 0
    for samples, heatmaps in found.values():
        order = (samples[:, None] == data[None]).flatten(2).all(2).int().argmax(1)
        whole = whole + torch.zeros_like(heatmaps).index_copy(0, order, heatmaps)
    wanted = fv.attribution(data, [{"y": label} for label in fv.dataset.labels], composite).heatmap
    assert close(whole, wanted, 1e-10)
    samples, heatmaps = fv.get_max_reference(1, "second", "activation", (0, 3), composite, plot_fn=as_tensors)[1]
    assert heatmaps.shape == (3, 6, 6) and heatmaps.any()
    coefficients = GradientTimesInput()
    _, heatmaps = fv.get_max_reference(0, "second", "activation", (0, 3), coefficients, plot_fn=as_tensors)[0]
    leaf = fv.get_max_reference(0, "second", "activation", (0, 3))[0].requires_grad_()
    code = concept.code(fv.attribution.model[:4](leaf))[:, 0]
    (gradient,) = torch.autograd.grad(code.sum(), leaf)
    assert close(heatmaps, (leaf * gradient).sum(1).detach(), 1e-9)
    position = code[0].flatten().argmax().item()
    _, heatmaps = fv.get_max_reference(0, "second", "activation", (0, 1), coefficients, True, as_tensors)[0]
    (gradient,) = torch.autograd.grad(concept.code(fv.attribution.model[:4](leaf))[0, 0].flatten()[position], leaf)
    assert close(heatmaps[0], (leaf * gradient).sum(1).detach()[0], 1e-9)


def test_classes_of_a_direction(tmp_path):
    fv = mine(tmp_path, CONCEPTS["oblique"])
    targets, values = fv.compute_stats(0, "second", top_N=3, mean_N=2)
    found = scores(fv)
    shares = found / found.abs().sum(1, keepdim=True)
    best = [
        shares[[i for i in range(12) if i % 3 == t], 0].sort(descending=True)[0][:2].mean().item() for t in range(3)
    ]
    assert values.tolist() == pytest.approx(sorted(best, reverse=True), rel=1e-6)
    assert targets.tolist() == sorted(range(3), key=lambda t: -best[t])


@pytest.mark.parametrize("composite", [ZennitEpsilonPlus(), Gradient()], ids=["zennit", "gradient"])
def test_composites_without_multipliers_are_refused(tmp_path, composite):
    fv = make_fv(tmp_path, layers={"second": CONCEPTS["oblique"]})
    ran = []
    fv.attribution.model.register_forward_hook(lambda *_: ran.append(1))
    with pytest.raises(TypeError, match=r"layer_map\['second'\]: DirectionConcept.* needs multipliers"):
        fv.run(composite, 0, 12, progress=False)
    assert not ran and not Table.exists(fv.path)


class Wrong(ChannelConcept):
    """A direction whose scores project the relevance of channels, as they were written before `relevance`."""

    needs_multiplier = True

    def mask(self, batch_id, concept_ids, layer_name=None):
        return DirectionConcept([1.0] * 5, rest=False).mask(batch_id, 0)

    def scores(self, relevance, layer_name=None):
        return scores_of(relevance.mean(1, keepdim=True))


class Flipped(ChannelConcept):
    """Channels counted from the end by scores, and from the start by masks; from before `relevance`."""

    def scores(self, relevance, layer_name=None):
        return scores_of(relevance.flip(1))


def test_a_wrong_concept_is_noticed_at_the_first_batch(tmp_path):
    with pytest.raises(ConceptError, match=r"layer 'second': Wrong\(\) contradicts itself. It scores channel 0 by"):
        mine(tmp_path, Wrong())
    assert not list((tmp_path / "fv").glob("**/*.safetensors"))
    with pytest.warns(UserWarning, match=r"layer 'second': Flipped\(\) contradicts itself"):
        fv = mine(tmp_path / "older", Flipped())
    assert close(
        scores(fv, "relevance", "sum").flip(1),
        scores(mine(tmp_path / "channels", ChannelConcept()), "relevance", "sum"),
        1e-9,
    )


def test_a_wrong_concept_is_no_fault_of_a_sample(tmp_path):
    """One sample, and errors that are skipped: still an error."""
    fv = make_fv(tmp_path, Images(1), layers={"second": Wrong()})
    with pytest.raises(ConceptError):
        fv.run(EpsilonPlus(), 0, 1, on_error="skip", progress=False)
