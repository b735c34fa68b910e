"""Conditions, recorded layers and start layers under every preset."""

import pytest
import torch
from torch import nn

from crp import composites
from crp.attribution import CondAttribution

#: Presets that are not linear in what starts at the output: parts do not add up to the whole.
NOT_LINEAR = {"guided_backprop", "deconvnet"}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 5, 3), nn.ReLU()]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(45, 6), nn.ReLU(), nn.Linear(6, 3)).double().eval()
    with torch.no_grad():
        net[1].running_mean.normal_(0, 0.1)
        net[1].running_var.uniform_(0.5, 1.5)
    return net


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 2, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def make(name):
    return composites.get(name, **({"low": 0.0, "high": 1.0} if name == "epsilon_gamma_box" else {}))


@pytest.mark.parametrize("name", composites.names())
def test_channels_add_up_to_the_whole(name, model, images):
    attribution, composite = CondAttribution(model), make(name)
    whole = attribution(images, [{"y": 1}], composite).heatmap
    parts = attribution(images, [{"y": 1, "4": [channel]} for channel in range(5)], composite).heatmap
    assert whole.abs().sum() > 0
    total = parts.reshape(2, 5, *parts.shape[1:]).sum(1)
    if name in NOT_LINEAR:
        assert (total - whole).abs().max() > 1e-6 * whole.abs().max()
    else:
        torch.testing.assert_close(total, whole, rtol=1e-9, atol=1e-12 * float(whole.abs().max()))


@pytest.mark.parametrize("name", composites.names())
def test_masked_channels_hold_nothing_below_the_mask(name, model, images):
    """What is recorded at the conditioned layer is before the mask; a start layer starts what is asked for."""
    attribution, composite = CondAttribution(model), make(name)
    free = attribution(images, [{"y": 1}], composite, record_layer=["4", "0"])
    masked = attribution(images, [{"y": 1, "4": [2]}], composite, record_layer=["4", "0"])
    torch.testing.assert_close(masked.relevances["4"], free.relevances["4"])
    none = attribution(images, [{"y": 1, "4": []}], composite, record_layer=["0"])
    assert not none.heatmap.any() and not none.relevances["0"].any()
    assert masked.relevances["0"].abs().sum() > 0


@pytest.mark.parametrize("name", composites.names())
def test_start_layer_goes_on_from_what_arrived_there(name, model, images):
    """Relevance that is recorded at a layer and started from there gives the same heatmap."""
    attribution, composite = CondAttribution(model), make(name)
    whole = attribution(images, [{"y": 1}], composite, record_layer=["5"])
    again = attribution(images, [{}], composite, start_layer="5", init_rel=whole.relevances["5"])
    torch.testing.assert_close(again.heatmap, whole.heatmap, rtol=1e-9, atol=1e-12 * float(whole.heatmap.abs().max()))
