"""Meanings, interventions and audits of a table: the figures are those of the functions that they rest on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from feature_net import Images, mined
from kept_cases import TEXTS, embed
from scipy.stats import spearmanr
from zennit.composites import EpsilonPlus

from crp.audit import (
    Prototypes,
    audit,
    audit_table,
    clarity,
    context_scores,
    contexts,
    embed_references,
    intervene,
    interventions,
    meanings,
    polysemanticity,
    prototypes,
    redundancy,
    save_audit,
    search,
)
from crp.audit.tested import rank_correlation
from crp.visualization.table.derived import read_kept
from crp.visualization.table.ranking import top_k
from crp.visualization.table.store import Table


@pytest.fixture(scope="module")
def fv(tmp_path_factory):
    return mined(tmp_path_factory.mktemp("mined"), Images(30))


@pytest.mark.parametrize(
    ("first", "second", "wanted"),
    [
        ([1, 2, 3], [10, 20, 90], 1.0),
        ([1, 2, 3], [3, 2, 1], -1.0),
        # (ranks 0.5 0.5 2 3 and 0 1 2 3: covariance 4.5, variances 4.5 and 5)
        ([0, 0, 5, 9], [1, 2, 3, 4], 4.5 / (4.5 * 5) ** 0.5),
        ([2, 2, 2], [1, 2, 3], 0.0),
    ],
    ids=["same order", "reversed", "ties", "constant"],
)
def test_rank_correlation(first, second, wanted):
    assert rank_correlation(np.array(first), np.array(second)) == pytest.approx(wanted)


@pytest.mark.parametrize("background", [None, [1.0, 1, 0, 0, 1]], ids=["plain", "background"])
def test_meanings(fv, background):
    found = meanings(fv, "second", embed, TEXTS, n=4, background=background)
    vectors = embed_references(fv, "second", range(5), embed, n=4)
    assert np.array_equal(found.clarity, clarity(vectors)) and found.concept.tolist() == [0, 1, 2, 3, 4]
    assert np.array_equal(found.redundancy, redundancy(vectors))
    assert np.array_equal(found.polysemanticity, polysemanticity(vectors))
    for text, vector in TEXTS.items():
        match = search(vectors, vector, background)
        best = found.best(text, 3)
        assert [concept for concept, _ in best] == match.concept[:3].tolist()
        assert [similarity for _, similarity in best] == match.similarity[:3].tolist()
    with pytest.raises(KeyError, match="'wheel' is none of the texts"):
        found.best("wheel")
    with pytest.raises(ValueError, match="k must be a whole number of at least 0, not -1"):
        found.best(next(iter(TEXTS)), -1)
    some = meanings(fv, "second", embed, concept_ids=[3, 1], n=4)
    assert some.concept.tolist() == [3, 1] and some.clarity.tolist() == found.clarity[[3, 1]].tolist()
    assert some.similarity.shape == (0, 2)
    with pytest.raises(IndexError, match="there is no concept 5"):
        meanings(fv, "second", embed, concept_ids=[5])


def test_texts_may_be_embedded_by_a_function(fv):
    found = meanings(fv, "second", embed, list(TEXTS), embed_text=TEXTS.__getitem__, n=4)
    assert np.array_equal(found.similarity, meanings(fv, "second", embed, TEXTS, n=4).similarity)
    assert found.texts == list(TEXTS)
    with pytest.raises(TypeError, match=r"texts \['upper left', .* need embeddings: give a mapping, or a list"):
        meanings(fv, "second", embed, list(TEXTS))
    with pytest.raises(TypeError, match=r"texts <function .* need embeddings"):
        meanings(fv, "second", TEXTS, embed)
    with pytest.raises(TypeError, match="texts 'upper left' need embeddings"):
        meanings(fv, "second", embed, "upper left", embed_text=TEXTS.get)


def test_meanings_are_kept(fv):
    found = meanings(fv, "second", embed, TEXTS, n=4)
    table = Table.open(fv.path)
    found.save(table)
    kept = read_kept(table, "meanings", "second")
    assert kept.settings == {"texts": list(TEXTS)} and np.array_equal(kept.arrays["similarity"], found.similarity)


def test_interventions(fv):
    found = interventions(fv, EpsilonPlus(), "second", [2, 0, 5], [4, 1, 0], scale=0.5)
    data = fv.dataset.data[[2, 0, 5]]
    predicted = fv.attribution.model(data).argmax(1).tolist()
    assert found.target.tolist() == predicted and found.sample.tolist() == [2, 0, 5]
    change = intervene(fv.attribution, data, "second", fv.layer_map["second"], [4, 1, 0], predicted, scale=0.5)
    assert np.array_equal(found.change, change.numpy())
    result = fv.attribution(data, [{"y": y} for y in predicted], EpsilonPlus(), ["second"])
    sums = result.relevances["second"].flatten(2).sum(2)[:, [4, 1, 0]].detach()
    assert np.allclose(found.relevance, sums.numpy(), rtol=1e-12)
    wanted = [spearmanr(r, -c).statistic for r, c in zip(found.relevance, found.change, strict=True)]
    assert found.agreement == pytest.approx(np.mean(wanted), abs=1e-12)
    patched = interventions(fv, EpsilonPlus(), "second", [2, 0, 5], scale=1, patch=[1, 1, 3])
    other = fv.dataset.data[[1, 1, 3]]
    change = intervene(
        fv.attribution, data, "second", fv.layer_map["second"], range(5), predicted, scale=1, patch=other
    )
    assert np.array_equal(patched.change, change.numpy()) and patched.patched and not found.patched
    whole = interventions(fv, EpsilonPlus(), "second", [2], targets=[1])
    assert whole.relevance.shape == (1, 5) and whole.target.tolist() == [1]
    with pytest.raises(ValueError, match="interventions need one sample at least"):
        interventions(fv, EpsilonPlus(), "second", [])


@pytest.mark.parametrize(
    ("one", "other"),
    [([1.0, 2, 2, 3], [4.0, 4, 1, 0]), ([0.0, 0, 0], [1.0, 2, 3]), ([3.0, 1, 2], [3.0, 1, 2])],
    ids=["ties", "constant", "equal"],
)
def test_agreement_with_ties_is_that_of_shared_ranks(fv, one, other):
    found = interventions(fv, None, "second", [0], [0])
    found = found._replace(relevance=np.array([one]), change=-np.array([other]))
    wanted = 0.0 if len(set(one)) == 1 else spearmanr(one, other).statistic
    assert found.agreement == pytest.approx(wanted, abs=1e-12)


def test_interventions_are_kept(fv):
    table = Table.open(fv.path)
    found = interventions(fv, EpsilonPlus(), "second", [0, 1])
    found.save(table)
    kept = read_kept(table, "interventions", "second")
    assert np.array_equal(kept.arrays["change"], found.change)
    assert kept.settings == {"scale": 0.0, "patched": False, "agreement": found.agreement}


def test_contexts(fv):
    """The scores of `context_scores`, of the predicted classes or others; a concept may have none."""
    table, inside = Table.open(fv.path), torch.zeros(3, 6, 6, dtype=torch.bool)
    inside[:, 1:4, 2:] = True
    found = contexts(fv, EpsilonPlus(), "second", [2, 0, 5], inside, [4, 1, 0], batch_size=2)
    data = fv.dataset.data[[2, 0, 5]]
    predicted = fv.attribution.model(data).argmax(1).tolist()
    assert found.target.tolist() == predicted and found.sample.tolist() == [2, 0, 5]
    concept = fv.layer_map["second"]
    wanted = context_scores(fv.attribution, data, predicted, EpsilonPlus(), "second", concept, [4, 1, 0], inside)
    assert np.allclose(found.score, wanted.detach().numpy(), rtol=1e-12, equal_nan=True)
    assert contexts(fv, None, "second", [2], inside[:1], targets=[1]).score.shape == (1, 5)
    assert contexts(fv, None, "second", [-1], inside[:1]).sample.tolist() == [len(fv.dataset) - 1]
    with pytest.raises(ValueError, match="there are 2 targets for 1 samples"):
        contexts(fv, None, "second", [2], inside[:1], targets=[1, 2])
    some = found._replace(score=np.array([[0.5, np.nan, np.nan], [1.0, 0.25, np.nan], [0.0, 0.75, np.nan]]))
    assert np.array_equal(some.mean, [0.5, 0.5, np.nan], equal_nan=True)
    some.save(table)
    kept = read_kept(table, "context", "second")
    assert kept.arrays["score"].tolist() == [[0.5, -1, -1], [1, 0.25, -1], [0, 0.75, -1]]
    with pytest.raises(ValueError, match="contexts need one sample at least"):
        contexts(fv, None, "second", [], inside[:0])


def test_the_audit_of_the_table_is_that_of_its_samples(fv):
    table = Table.open(fv.path)
    found = prototypes(table, "second", 2)
    audited = audit_table(table, found, describe=fv.layer_map["second"].describe)
    labels = fv.dataset.labels
    again = audit(fv.attribution, fv.dataset.data, EpsilonPlus(), found, fv.layer_map["second"], targets=labels)
    for one in audited:
        other = again[one.sample]
        assert (one.predicted, one.percentile, one.prototype, one.nearest) == other[:4]
        for uses, others in ((one.over, other.over), (one.under, other.under)):
            assert [use[:2] for use in uses] == [use[:2] for use in others]
            assert [use.difference for use in uses] == pytest.approx([use.difference for use in others], abs=1e-6)
    best = top_k(table, "second", k=3).sample
    of_table = audit(fv.attribution, fv.dataset.data[:1], EpsilonPlus(), found, fv.layer_map["second"], table=table)
    for use in [*audited[0].over, *audited[0].under, *of_table[0].over]:
        assert use.references == best[:, use.concept].tolist()
    assert again[0].over[0].references == []
    with pytest.raises(ValueError, match="no number in the table; audit_table gives those that have"):
        save_audit(table, found, again)
    scores = {}
    for of_class, mixture in found.classes.items():
        blocks = list(table.blocks("second", normed=True, of_class=of_class))
        low, middle, high = np.percentile(mixture.log_density, [25, 50, 75])
        for block in blocks:
            values = (found.score(block.value, of_class) - middle) / (high - low)
            scores |= dict(zip(block.sample.tolist(), values.tolist(), strict=True))
    assert [one.sample for one in audited] == sorted(scores, key=scores.__getitem__)
    some = audit_table(table, found, [4, 7])
    assert [one.sample for one in some] == [one.sample for one in audited if one.sample in (4, 7)]
    with pytest.raises(KeyError, match="sample 30 of 30 has no row of a class with prototypes"):
        audit_table(table, found, [4, 30])


def test_prototypes_beside_a_table_need_a_layer(fv):
    with pytest.raises(ValueError, match="beside a table need layer="):
        Prototypes.load(Table.open(fv.path))
