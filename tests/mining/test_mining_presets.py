"""Mining works with every preset: the table holds what an attribution of each sample gives."""

import pytest
import torch
from torch import nn

from crp import composites
from crp.attribution import CondAttribution
from crp.concepts import ChannelConcept
from crp.helper import load_maximization
from crp.visualization import FeatureVisualization

LAYER = "4"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(36, 3)).eval()


@pytest.mark.parametrize("name", composites.names())
def test_most_relevant_samples_are_those_of_an_attribution(name, model, tmp_path):
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(6, 1, 12, 12, generator=generator)
    targets = [i % 3 for i in range(6)]
    box = {"low": 0.0, "high": 1.0} if name == "epsilon_gamma_box" else {}
    composite, concept = composites.get(name, **box), ChannelConcept()
    attribution = CondAttribution(model)

    fv = FeatureVisualization(attribution, list(zip(images, targets, strict=True)), {LAYER: concept}, path=tmp_path)
    fv.run(composite, 0, 6, 4)

    each = [{"y": target} for target in targets]
    relevance = attribution(images, each, composite, record_layer=[LAYER]).relevances[LAYER]
    wanted = concept.attribute(relevance, abs_norm=True)
    assert wanted.abs().sum() > 0
    ids, values, _ = load_maximization(fv.RelMax.PATH, LAYER)
    for channel in range(4):
        found = torch.as_tensor(values[:6, channel])
        torch.testing.assert_close(found, wanted[torch.as_tensor(ids[:6, channel]), channel], rtol=1e-4, atol=1e-6)
        assert (found[:-1] >= found[1:]).all()
