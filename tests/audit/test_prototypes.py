"""Prototypes of classes against closed forms, and the audit of single samples."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from feature_net import Images, make_fv
from safetensors.numpy import save
from table_maker import make_table
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal, Normal

from crp.audit import AuditedSample, Prototypes, audit, prototypes
from crp.audit.auditing import Use
from crp.composites import EpsilonPlus
from crp.concepts import ChannelConcept, DirectionConcept
from crp.visualization.table.store import Table


@pytest.fixture
def blobs(tmp_path):
    """Class 0 in two ways, 60 and 20 samples; class 1 in one way; 4 concepts."""
    rng = np.random.default_rng(0)
    table, source = make_table(tmp_path / "t", ranges=(), n_samples=4, n_concepts=4)
    centres = np.array([[3.0, 0, 0, 0], [0, 0, 5, 1], [0, 1, 0, 0]])
    which = np.repeat([0, 1, 2], [60, 20, 40])
    vectors = (centres[which] + rng.normal(size=(120, 4)) * 0.1).astype(np.float32)
    source.sample, source.target = np.arange(120), (which == 2).astype(np.int64)
    for key in source.columns:
        source.columns[key] = np.zeros((120, *source.columns[key].shape[1:]), source.columns[key].dtype)
    source.columns["relevance.sum/a"] = vectors
    source.columns["relevance.sum_norm/a"] = np.abs(vectors).sum(1)
    source.columns["relevance.sum/b"][:80] = [0.7, 0.1, 0.1, 0.1]  # (equal, but for the rounding of one)
    source.columns["relevance.sum/b"][0] *= 1 + 2**-23
    source.columns["relevance.sum_norm/b"][:] = 1
    table = Table.create(tmp_path / "made", type(table.header)(**{**vars(table.header), "n_samples": 120}))
    table.add(source.write(table, 0, 120))
    return table, vectors.astype(np.float64), which


@pytest.mark.parametrize("covariance", ["full", "diag"])
def test_one_prototype_is_a_gaussian(blobs, covariance):
    table, vectors, which = blobs
    found = prototypes(table, "a", 1, covariance=covariance, normed=False, regularization=0.02)
    of_class = vectors[which == 2]
    added = 0.02 * of_class.var(0).mean()
    mixture = found.classes[1]
    assert np.allclose(mixture.means[0], of_class.mean(0), rtol=1e-10, atol=1e-12)
    scatter = np.cov(of_class.T, bias=True) + added * np.eye(4)
    wanted = scatter if covariance == "full" else np.diag(scatter)
    assert np.allclose(mixture.covariances[0], wanted, rtol=1e-9, atol=1e-12)
    as_full = torch.from_numpy(scatter if covariance == "full" else np.diag(np.diag(scatter)))
    density = MultivariateNormal(torch.from_numpy(of_class.mean(0)), as_full).log_prob(torch.from_numpy(vectors))
    assert np.allclose(found.score(vectors, 1), density.numpy(), rtol=1e-9)
    nearest = np.flatnonzero(which == 2)[np.linalg.norm(of_class - of_class.mean(0), axis=1).argmin()]
    assert mixture.sample.tolist() == [nearest]
    assert np.allclose(found.deviation(vectors, 1), vectors - of_class.mean(0), atol=1e-12)


@pytest.mark.parametrize("covariance", ["full", "diag"])
def test_percentiles_are_the_same_for_one_and_for_all(blobs, covariance):
    """A solution for one vector is rounded otherwise than that for many."""
    table, vectors, which = blobs
    found = prototypes(table, "a", 2, covariance=covariance, normed=False)
    of_class = vectors[which != 2]
    alone = [found.percentile(one[None], 0)[0] for one in of_class]
    assert alone == found.percentile(of_class, 0).tolist()


@pytest.mark.parametrize("covariance", ["full", "diag"])
def test_two_ways_are_two_prototypes(blobs, covariance):
    """Their number is that of the least BIC, and the density that of the mixture."""
    table, vectors, which = blobs
    found = prototypes(table, "a", range(1, 5), covariance=covariance, normed=False)
    assert repr(found) == "Prototypes(3 of 2 classes, layer='a')"
    mixture = found.classes[0]
    order = np.argsort(-mixture.weights)
    assert np.allclose(mixture.weights[order], [0.75, 0.25], atol=1e-6)
    for i, way in zip(order, (0, 1), strict=True):
        assert np.allclose(mixture.means[i], vectors[which == way].mean(0), atol=1e-6)
        assert which[mixture.sample[i]] == way
        assert (found.assign(vectors[which == way], 0) == i).all()
    parts = [torch.from_numpy(part) for part in mixture[:3]]
    if covariance == "full":
        components = MultivariateNormal(parts[1], parts[2])
    else:
        components = torch.distributions.Independent(Normal(parts[1], parts[2].sqrt()), 1)
    wanted = MixtureSameFamily(Categorical(parts[0]), components).log_prob(torch.from_numpy(vectors))
    assert np.allclose(found.score(vectors, 0), wanted.numpy(), rtol=1e-9)
    of_class = vectors[which != 2]
    ranks = found.score(of_class, 0).argsort().argsort()
    assert np.allclose(found.percentile(of_class, 0), 100 * (ranks + 1) / 80)
    assert found.percentile(vectors[:1] + 9, 0) == 0


def test_shares(blobs):
    table, vectors, which = blobs
    found = prototypes(table, "a", 1, classes=[1])
    shares = vectors / np.abs(vectors).sum(1, keepdims=True)
    assert np.allclose(found.classes[1].means[0], shares[which == 2].mean(0), atol=1e-6)
    assert list(found.classes) == [1] and found.normed


def test_saved_and_read_again(blobs, tmp_path):
    table, vectors, _ = blobs
    found = prototypes(table, "a", 2, normed=False, seed=4)
    found.save(tmp_path / "p.safetensors")
    again = Prototypes.load(tmp_path / "p.safetensors")
    assert (again.layer, again.normed, list(again.classes), again.seed) == ("a", False, [0, 1], 4)
    assert np.array_equal(again.score(vectors, 0), found.score(vectors, 0))


def test_a_file_is_written_whole_or_not_at_all(blobs, tmp_path, monkeypatch):
    found, path = prototypes(blobs[0], "a", 2, normed=False), tmp_path / "p.safetensors"
    found.save(path)
    before = path.read_bytes()

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", full)
    monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(OSError, match="no space left"):
        prototypes(blobs[0], "a", 1).save(path)
    assert path.read_bytes() == before and [one.name for one in tmp_path.glob("p*")] == [path.name]


@pytest.mark.parametrize("kind", ["empty", "text", "cut off", "other numbers", "of no class"])
def test_a_file_of_something_else_is_refused(blobs, tmp_path, kind):
    path = tmp_path / "p.safetensors"
    prototypes(blobs[0], "a", 2, normed=False).save(path)
    content = {"empty": b"", "text": b"prototypes of a\n" * 9, "cut off": path.read_bytes()[:-7]}
    content["other numbers"] = save({"weights": np.ones(3)})
    content["of no class"] = save({"dog/weights": np.ones(3)}, {"layer": "a", "normed": "True"})
    path.write_bytes(content[kind])
    with pytest.raises(ValueError, match=r"p\.safetensors is no file that Prototypes\.save has written, or is damaged"):
        Prototypes.load(path)


WRONG = {
    "fraction of a number": ({"n": 1.5}, TypeError, "numbers of prototypes must be integers, not 1.5"),
    "truth": ({"n": True}, TypeError, "numbers of prototypes must be integers, not True"),
    "no number": ({"n": []}, ValueError, "n must be at least 1, not"),
    "one of them 0": ({"n": [2, 0]}, ValueError, r"n must be at least 1, not \[2, 0\]"),
    "class of a fraction": ({"n": 1, "classes": [0.5]}, TypeError, "classes must be integers"),
    "class of a word": ({"n": 1, "classes": "01"}, TypeError, "classes must be integers, not '01'"),
    "class beyond": ({"n": 1, "classes": [7]}, (KeyError, ValueError), "7"),
    "negative regularization": ({"n": 1, "regularization": -1.0}, ValueError, "regularization must be a number of at"),
    "no regularization": ({"n": 1, "regularization": float("nan")}, ValueError, "regularization must be a number"),
    "seed": ({"n": 1, "seed": -1}, ValueError, "seed must be a whole number of at least 0, not -1"),
    "samples alone": (
        {"n": 40, "regularization": 0.0, "covariance": "full"},
        ValueError,
        "no prototypes can be made with regularization=0",
    ),
    "no table": ({"table": "nowhere"}, FileNotFoundError, "nothing was mined into nowhere"),
}


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused(blobs, case):
    options, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        prototypes(**{"table": blobs[0], "layer": "a"} | options)


def test_classes_in_any_form(blobs):
    """Each class once, ascending; their vectors are read by a number of any kind."""
    found = prototypes(blobs[0], "a", np.int64(1), classes=torch.tensor([1, 0, 1]))
    assert list(found.classes) == [0, 1]
    vectors = torch.from_numpy(blobs[1][:3]).requires_grad_()
    assert np.array_equal(found.score(vectors, np.int64(1)), found.score(blobs[1][:3], 1))
    with pytest.raises(TypeError, match="a class must be integers, not"):
        found.score(vectors, 0.5)


@pytest.mark.parametrize("concept", [ChannelConcept(), DirectionConcept(torch.eye(5)[:3])], ids=repr)
def test_audit(tmp_path, concept):
    data = Images(60)
    fv = make_fv(tmp_path, data, layers={"second": concept})
    fv.run(EpsilonPlus(), 0, 60, batch_size=20, progress=False, targets="prediction")
    found = prototypes(Table.open(fv.path), "second", 1)
    usual = data.data[:20]
    findings = audit(fv.attribution, usual, EpsilonPlus(), found, concept, k=2)
    predicted = fv.attribution.model(usual).argmax(1)
    assert [finding.predicted for finding in findings] == predicted.tolist()
    blocks = Table.open(fv.path).blocks("second", normed=True, samples=range(20))
    vectors = np.concatenate([block.value for block in blocks])
    for finding, vector in zip(findings, vectors, strict=True):
        mixture = found.classes[finding.predicted]
        difference = vector - mixture.means[0]
        assert finding.over[0].concept == difference.argmax()
        assert finding.under[0].difference == pytest.approx(difference.min(), abs=1e-6)
        assert finding.over[0].name == concept.describe(int(difference.argmax()))
        assert finding.nearest == mixture.sample[0]
        assert 0 < finding.percentile <= 100
        assert f"class {finding.predicted}, percentile" in str(finding)
    with pytest.raises(KeyError, match=r"there are no prototypes of class 7; there are of \["):
        found.score(vectors, 7)


def test_small_differences_are_told():
    uses = [Use(3, "channel 3", 0.1234), Use(4, "channel 4", 0.000321)]
    text = str(AuditedSample(1, 5.0, 0, 7, uses, [Use(2, "channel 2", -0.00005)]))
    assert text.endswith("more of channel 3 (+0.12), channel 4 (+0.00032); less of channel 2 (-5e-05)")


def test_what_is_wrong_is_said(blobs):
    table = blobs[0]
    with pytest.raises(ValueError, match="covariance must be one of 'full', 'diag', not 'tied'"):
        prototypes(table, "a", covariance="tied")
    with pytest.raises(ValueError, match="n must be at least 1, not 0"):
        prototypes(table, "a", 0)
    with pytest.raises(ValueError, match=r"class 0 has 80 samples of mean variance .*, which are too few, .* alike"):
        prototypes(table, "b", 1, normed=False)
    with pytest.raises(ValueError, match=r"class 1 has 40 samples of mean variance 0, .* too alike"):
        prototypes(table, "b", 1, classes=[1])
    with pytest.raises(ValueError, match="class 1 has 40 samples, too few for 41 prototypes; give a smaller n"):
        prototypes(table, "a", 41, classes=[1])
    with pytest.raises(ValueError, match=r"vectors are of shape \(3,\); layer 'a' has 4 concepts"):
        prototypes(table, "a", 1).score([1, 2, 3], 0)
    with pytest.raises(ValueError, match="vectors must be finite"):
        prototypes(table, "a", 1).score([[1, 2, 3, np.nan]], 0)
    with pytest.raises(TypeError, match="vectors must be real numbers"):
        prototypes(table, "a", 1).score([["1", "2", "3", "4"]], 0)
