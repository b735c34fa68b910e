"""What does not fit is refused by audits, corrections and interventions, and no number comes of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from crp.attribution import CondAttribution
from crp.audit import (
    audit,
    audit_table,
    clusters,
    context_scores,
    effect,
    embed_references,
    export_corelay,
    intervene,
    interventions,
    keep_heatmaps,
    part_of,
    penalty,
    project,
    prune,
    save_audit,
    save_clusters,
    with_concepts,
)
from crp.composites import EpsilonPlus
from crp.concepts import ChannelConcept
from crp.errors import CRPError

DATA = torch.rand(3, 3, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def model():
    layers = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    return nn.Sequential(*layers).double().eval()


def corrected(model, direction=(1.0, 0, 0, 0), **keywords):
    with project(model, "0", direction, **keywords):
        return model(DATA)


def pruned(model, scores, share=0.5):
    with prune(model, {"0": scores}, share):
        return model(DATA)


def penalised(model, direction=(1.0, 0, 0, 0), **keywords):
    with penalty(model, "0", direction, **keywords) as term:
        return term(model(DATA)[:, 0])


def measured(model, labels=(0, 1, 0), ids=(0,)):
    correction = project(model, "0", [1.0, 0, 0, 0])
    return effect(CondAttribution(model), DATA, labels, EpsilonPlus(), correction, "0", ChannelConcept(), ids)


def changed(model, data=DATA, ids=(0,), targets=(0, 1, 0), **keywords):
    return intervene(CondAttribution(model), data, "0", ChannelConcept(), ids, targets, **keywords)


WRONG = {
    "complex direction": (lambda m: corrected(m, torch.ones(4) * 1j), "direction must be real numbers"),
    "direction of words": (lambda m: corrected(m, ["a"] * 4), "direction must be real numbers"),
    "constant": (lambda m: corrected(m, at=float("nan")), "at must be a finite number"),
    "axis of the samples": (lambda m: corrected(m, axis=0), "axis must be a whole number, and not 0"),
    "axis": (lambda m: corrected(m, axis=7), "the direction has 4 channels"),
    "share of a sample": (lambda m: corrected(m, when=lambda o: o.flatten(1).sum(1)), "when must return a boolean"),
    "one for all": (lambda m: corrected(m, when=lambda o: torch.tensor([False])), r"of shape \(3,\)"),
    "nan score": (lambda m: pruned(m, [1.0, float("nan"), 2.0, 3.0]), r"scores\['0'\] must be finite"),
    "share of words": (lambda m: pruned(m, [1.0] * 4, "half"), "share must be a number"),
    "penalty of nan": (lambda m: penalised(m, [float("nan")] * 4), "direction must be finite"),
    "penalty of nothing": (lambda m: penalised(m, [0.0] * 4), "other than 0"),
    "penalty of another width": (lambda m: penalised(m, [1.0] * 3), "the direction has 3 channels"),
    "few labels": (lambda m: measured(m, [0]), "1 labels for 3 samples"),
    "labels of fractions": (lambda m: measured(m, [0.5] * 3), "labels must be integers"),
    "no concept": (lambda m: measured(m, ids=[]), "concept_ids is empty"),
    "concept that is not there": (lambda m: measured(m, ids=[9]), "there is no concept 9"),
    "target that is not there": (lambda m: changed(m, targets=[0, 9, 0]), "there is no output 9"),
    "target of fractions": (lambda m: changed(m, targets=[0.7] * 3), "targets must be integers"),
    "nan": (lambda m: changed(m, DATA * torch.nan), "data has NaN"),
    "scale": (lambda m: changed(m, scale=float("nan")), "scale must be a finite number"),
    "dtype": (lambda m: changed(m, DATA.float()), "has weights of torch.float64 and gets torch.float32"),
    "nothing changed": (lambda m: changed(m, ids=[]), "concept_ids is empty"),
    "no prototypes": (
        lambda m: audit(CondAttribution(m), DATA, EpsilonPlus(), None, ChannelConcept()),
        "found must be what prototypes.* gives, not None",
    ),
    "audit of a model": (
        lambda m: audit(m, DATA, EpsilonPlus(), None, ChannelConcept()),
        "attribution must be CondAttribution.model., not a Sequential",
    ),
    "audit by a class of concepts": (
        lambda m: audit(CondAttribution(m), DATA, EpsilonPlus(), None, ChannelConcept),
        r"concept must be a concept, such as ChannelConcept\(\), not the class ChannelConcept",
    ),
    "audit of a list": (
        lambda m: audit(CondAttribution(m), [DATA], EpsilonPlus(), None, ChannelConcept()),
        "data must be a tensor of samples, not a list",
    ),
    "audit of none kept": (lambda m: save_audit("table", None, []), "found must be what prototypes.* gives, not None"),
    "context by no concept": (
        lambda m: context_scores(CondAttribution(m), DATA, [0] * 3, None, "0", None, [0], DATA[:, 0] > 0),
        "concept must be a concept, .* not None",
    ),
    "context of one target": (
        lambda m: context_scores(CondAttribution(m), DATA, 0, None, "0", ChannelConcept(), [0], DATA[:, 0] > 0),
        "targets must be one for each sample, not an int",
    ),
    "effect on a model": (
        lambda m: effect(m, DATA, [0] * 3, None, project(m, "0", [1.0, 0, 0, 0]), "0", ChannelConcept(), [0]),
        "attribution must be CondAttribution.model., not a Sequential",
    ),
    "intervention on a mask": (
        lambda m: intervene(CondAttribution(m), DATA, "0", ChannelConcept.mask, [0], 0),
        "concept must be a concept, .* not <function",
    ),
    "part of a mask": (lambda m: part_of(ChannelConcept.mask, DATA, [0]), "concept must be a concept"),
    "a word in place of samples that are corrected": (
        lambda m: corrected(m, when="marked"),
        "when must be a function of the layer's output",
    ),
    "references of no visualization": (
        lambda m: embed_references(m, "0", [0], torch.flatten),
        "fv must be a FeatureVisualization, not a Sequ",
    ),
    "no clusters": (lambda m: save_clusters("table", None, "0", 0), "found must be what clusters.* gives, not None"),
    "no clusters named": (lambda m: with_concepts("table", [1], "0", 0), "found must be what clusters.* not a list"),
    "no clusters exported": (lambda m: export_corelay("file", None), "found must be what clusters.* gives, not None"),
    "no prototypes of a table": (
        lambda m: audit_table("table", None),
        "found must be what prototypes.* gives, not None",
    ),
    "audit of nan": (
        lambda m: audit(CondAttribution(m), DATA * torch.nan, EpsilonPlus(), None, ChannelConcept()),
        "data has NaN",
    ),
    "less than no concepts": (
        lambda m: audit(CondAttribution(m), DATA, EpsilonPlus(), None, ChannelConcept(), k=-1),
        "k must be a whole number of at least 0",
    ),
    "clusters of none": (lambda m: clusters(torch.rand(9, 2), n=0, n_neighbours=2), "n must be a whole number"),
    "as many clusters": (lambda m: clusters(torch.rand(9, 2), n=9, n_neighbours=2), "cannot be in 9 clusters"),
    "more clusters": (lambda m: clusters(torch.rand(9, 2), n=10, n_neighbours=2), "cannot be in 10 clusters"),
    "heatmaps of no visualization": (lambda m: keep_heatmaps(m, None, 0), "must be a FeatureVisualization, not a Sequ"),
    "interventions on none": (lambda m: interventions(m, None, "0", [0]), "must be a FeatureVisualization, not a Sequ"),
    "batches of none": (
        lambda m: context_scores(
            CondAttribution(m), DATA, [0] * 3, EpsilonPlus(), "0", ChannelConcept(), [0], DATA[:, 0] > 0, batch_size=0
        ),
        "batch_size must be a whole number",
    ),
}


@pytest.mark.promise("Input", "Audits, corrections and interventions refuse what does not fit, and change nothing")
@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused(model, untouched, case):
    call, match = WRONG[case]
    with untouched(model), pytest.raises(CRPError, match=match):
        call(model)


def test_the_last_class_may_be_counted_from_the_end(model):
    assert measured(model, [-1, -2, -1]) == measured(model, [1, 0, 1])


def test_a_context_is_for_one_use(model):
    correction = project(model, "0", [1.0, 0, 0, 0])
    with correction:
        pass
    with pytest.raises(CRPError, match="was entered before"), correction:
        pass
