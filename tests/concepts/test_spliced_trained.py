"""Autoencoders within a trained net, up to 16 times as wide as its layer: nothing changes, and latents add up."""

from __future__ import annotations

import pytest
import torch
from concept_cases import Autoencoder, Identity
from torch import Tensor, nn
from torch.nn import functional as F
from trained_nets import MEAN, STD, cifar_images, cifar_net

from crp.attribution import CondAttribution
from crp.composites import EpsilonGamma, EpsilonPlus
from crp.concepts import splice

LAYER, CHANNELS = "layer3.1", 64


@pytest.fixture(scope="module")
def net() -> tuple[nn.Module, Tensor, list[int], Tensor]:
    """Model, eight images with their classes, and activations of the layer at all positions of 300 others."""
    model, (images, labels) = cifar_net(), cifar_images()
    data = (images - MEAN) / STD
    found: list[Tensor] = []
    handle = model.get_submodule(LAYER).register_forward_hook(lambda _m, _a, out: found.append(out))
    with torch.no_grad():
        model(data[200:])
    handle.remove()
    return model, data[:8], labels[:8].tolist(), found[0].movedim(1, -1).reshape(-1, CHANNELS)


def trained(width: int, activations: Tensor, steps: int) -> Autoencoder:
    torch.manual_seed(0)
    model = Autoencoder(CHANNELS, width)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(steps):
        batch = activations[torch.randint(len(activations), (512,))]
        latents = model.encode(batch)
        optimizer.zero_grad()
        (F.mse_loss(model.decode(latents), batch) + 0.02 * latents.sum(1).mean()).backward()
        optimizer.step()
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("composite", [EpsilonPlus(), EpsilonGamma()], ids=lambda c: type(c).__name__)
@pytest.mark.parametrize(
    ("width", "steps"), [(0, 0), (1, 0), (16, 0), (4, 300), (16, 300)],
    ids=["identity", "random", "random, 16 times", "trained, 4 times", "trained, 16 times"],
)  # fmt: skip
def test_autoencoders_of_a_trained_net(net, composite, width, steps):
    """In float32: 1e-6 of the largest logit, and of the largest relevance."""
    model, data, labels, activations = net
    code = trained(width, activations, steps) if width else Identity()
    attribution, conditions = CondAttribution(model), [{"y": label} for label in labels]
    before = attribution(data, conditions, composite, [LAYER])
    with splice(model, LAYER, code) as names:
        found = attribution(data, conditions, composite, [names.code, names.error])
    assert (found.prediction - before.prediction).abs().max() <= 1e-6 * before.prediction.abs().max()
    assert (found.heatmap - before.heatmap).abs().max() <= 1e-6 * before.heatmap.abs().max()
    wanted = code.encode(before.activations[LAYER].movedim(1, -1)).movedim(-1, 1).detach()
    assert (found.activations[names.code] - wanted).abs().max() <= 1e-6 * wanted.abs().max()
    of_error = found.relevances[names.error].flatten(1).sum(1)
    bias = (before.multipliers[LAYER].movedim(1, -1) @ code.decoder.bias.detach()).flatten(1).sum(1) if width else 0
    total = found.relevances[names.code].flatten(1).sum(1) + of_error + bias
    whole = before.relevances[LAYER].flatten(1).sum(1)
    assert (total - whole).abs().max() <= 1e-5 * whole.abs().max()
    share = (of_error / whole).abs().mean()
    assert share == 0 if not width else 0.1 < share < 0.6 if steps else share > 0.8
