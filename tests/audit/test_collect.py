"""Vectors of a layer: what they are, and from which samples."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from feature_net import Images, make_net
from zennit.composites import EpsilonPlus as ZennitEpsilonPlus

from crp.attribution import CondAttribution
from crp.audit import collect
from crp.composites import EpsilonPlus
from crp.concepts import directions
from crp.errors import CRPError


@pytest.fixture
def attribution() -> CondAttribution:
    return CondAttribution(make_net())


@pytest.mark.parametrize(("layer", "space"), [("second", 9), ("hidden", 1)])
def test_vectors_are_those_of_their_samples(attribution, layer, space):
    data = Images(12)
    found = collect(attribution, data, EpsilonPlus(), layer, 1000, batch_size=5)
    assert len(found.sample) == 12 * min(space, 10) == len(found.activations)
    assert found.target.tolist() == [data.labels[i] for i in found.sample]
    result = attribution(data.data, [{"y": label} for label in data.labels], EpsilonPlus(), [layer])
    flat = result.activations[layer].reshape(12, -1, space), result.multipliers[layer].reshape(12, -1, space)
    for vectors, wanted in zip(found[:2], flat, strict=True):
        assert torch.allclose(vectors, wanted[found.sample, :, found.position], rtol=1e-12)
    assert len(set(zip(found.sample, found.position, strict=True))) == len(found.sample)
    total = (found.activations * found.multipliers).sum()
    assert torch.allclose(total, result.relevances[layer].sum(), rtol=1e-10)
    everything = directions.prca(*found[:2], found.activations.shape[1])
    assert everything.explained(*found[:2]).sum() == pytest.approx(1, rel=1e-10)


def test_classes_take_turns(attribution):
    """Nine of twelve samples are of class 0; of six that are drawn, two are."""
    data = Images(12, [0] * 9 + [1, 1, 2])
    found = collect(attribution, data, EpsilonPlus(), "second", 18, per_sample=3)
    assert np.bincount(found.target).tolist() == [9, 6, 3]
    again = collect(attribution, data, EpsilonPlus(), "second", 18, per_sample=3)
    assert np.array_equal(found.position, again.position)
    assert not np.array_equal(found.sample, collect(attribution, data, EpsilonPlus(), "second", 18, seed=1).sample)


def test_labels_are_not_read_where_the_dataset_has_them(attribution):
    data = Images(12, [0] * 12)
    found = collect(attribution, data, EpsilonPlus(), "second", 6, per_sample=3, labels=[2] * 12)
    assert set(found.target) == {2}
    del data.labels
    with pytest.raises(ValueError, match="there are 3 labels for 12 samples"):
        collect(attribution, data, EpsilonPlus(), "second", labels=[1, 2, 0])
    with pytest.raises(TypeError, match="labels must be one class for each sample; they are"):
        collect(attribution, data, EpsilonPlus(), "second", labels=[[1, 2]] * 12)


def test_classes_are_those_that_the_dataset_gives(attribution):
    """Datasets of torchvision hold labels before their ``target_transform``."""
    data = Images(12)
    data.targets, data.target_transform = data.labels, lambda label: 2 - label
    data.labels = [2 - label for label in data.targets]
    found = collect(attribution, data, EpsilonPlus(), "second")
    assert found.target.tolist() == [data[i][1] for i in found.sample]


def test_composites_without_multipliers_are_refused(attribution):
    with pytest.raises(TypeError, match="has no multipliers whose product with activation is relevance"):
        collect(attribution, Images(4), ZennitEpsilonPlus(), "second")


class Sizes(Images):
    """Every second picture is larger."""

    def __getitem__(self, index):
        data, label = super().__getitem__(index)
        return (torch.cat([data, data], -1) if index % 2 else data), label


@pytest.mark.parametrize("n", [23, 1000])
def test_each_sample_of_another_size_has_the_vectors_that_are_its_own(attribution, n):
    """The first sample has one position, and every second one three: of each are drawn as many as it has, at most."""
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()).double()
    pictures = [torch.rand(1, 3, 5 if i % 2 else 3, dtype=torch.float64) for i in range(16)]
    data = [(picture, i % 3) for i, picture in enumerate(pictures)]
    found = collect(CondAttribution(net.eval()), data, EpsilonPlus(), "0", n, per_sample=2, batch_size=1)
    assert len(found.sample) == min(n, 8 * 1 + 8 * 2)
    for vector, sample, target, position in zip(found.activations, *found[2:], strict=True):
        assert torch.allclose(vector, net[0](pictures[sample][None])[0].flatten(1)[:, position])
        assert target == sample % 3


WRONG = {
    "axis of the samples": ({"axis": 0}, "axis must be a whole number, and not 0"),
    "axis of a word": ({"axis": "1"}, "axis must be a whole number, .* not '1'"),
    "axis beyond": ({"axis": 4}, r"axis 4 is none of channels in layer 'second', of shape \(4, 5, 3, 3\)"),
    "axis before": ({"axis": -4}, "axis -4 is none of channels in layer 'second'"),
    "samples without labels": ({"labels": [0, 1, -1, 2]}, "classes, which count from 0; sample 2 has -1"),
    "fractions of labels": ({"labels": [0.5] * 4}, "labels must be one class for each sample"),
    "no sample": ({"dataset": Images(0)}, "there is no sample"),
    "samples of two sizes": (
        {"dataset": Sizes(4)},
        r"sample \d has shape .*; samples of several shapes need batch",
    ),
    "not finite": ({"preprocess": lambda data: data / 0}, r"sample \d: its data is not finite"),
    "a function that is none": (
        {"preprocess": "normalize"},
        "preprocess must be a function of samples, .*not 'normalize'",
    ),
    "vectors of a fraction": ({"n": 1.5}, "n must be a whole number of at least 1, not 1.5"),
    "layer": ({"layer": "third"}, "'third' not found in model"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused(attribution, untouched, case):
    options, message = WRONG[case]
    options = {"dataset": Images(4), "layer": "second", "composite": EpsilonPlus()} | options
    with untouched(attribution.model), pytest.raises(CRPError, match=message):
        collect(attribution, **options)
