"""All classification families of torchvision: without attention: predictions, undoing, conservation, concepts."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torchvision
from architectures import FAMILIES, Family
from torch import Tensor, nn

from crp.attribution import CondAttribution
from crp.composites import EpsilonAlpha2Beta1, EpsilonGammaBox, EpsilonPlus, EpsilonPlusFlat

#: Nets of many layers, whose blocks a smaller one of them has as well.
LARGE = {"efficientnet_v2_s"}


@pytest.fixture(
    scope="module",
    params=[pytest.param(f, id=str(f), marks=[pytest.mark.slow] if f.name in LARGE else []) for f in FAMILIES],
)
def net(request):
    """One model at a time is in memory."""
    family = request.param
    model, data = family.build(), family.images()
    with torch.no_grad():
        logits = model(data)
    return Net(family, model, data, logits, int(logits.argmax()))


class Net(NamedTuple):
    family: Family
    model: nn.Module
    data: Tensor
    logits: Tensor
    target: int

    def absorbed(self, composite):
        return CondAttribution(self.model).absorbed(self.data, [{"y": self.target}], composite)


def scale(kept):
    """Sum of the amounts of relevance that were counted, against which rounding is measured."""
    amounts = [share.abs() for shares in kept.layers.values() for share in shares.values()]
    return kept.initial.abs() + kept.input.abs() + sum(amounts)


def test_families_are_those_of_torchvision():
    files = {torchvision.models.get_model_builder(name).__module__ for name in torchvision.models.list_models(
        module=torchvision.models)}  # fmt: skip
    attending = ["vit_b_16", "swin_t", "maxvit_t"]  # (see test_transformers.py)
    ours = {torchvision.models.get_model_builder(name).__module__ for name in [*(f.name for f in FAMILIES), *attending]}
    assert files == ours


def test_prediction_is_the_model_s_and_the_model_is_untouched(net, untouched):
    with untouched(net.model):
        result = CondAttribution(net.model)(net.data, [{"y": net.target}], EpsilonPlus())
    assert (result.prediction - net.logits).abs().max() <= 1e-12 * net.logits.abs().max()
    assert result.heatmap.isfinite().all()
    assert result.heatmap.any() or net.family.name == "mobilenet_v2"


def test_model_whose_forward_raises_is_untouched(net, untouched):
    last = [module for module in net.model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))][-1]

    def fail(*_):
        raise RuntimeError("half-way")

    handle = last.register_forward_pre_hook(fail)
    try:
        with untouched(net.model), pytest.raises(RuntimeError, match="half-way"):
            net.absorbed(EpsilonPlus())
    finally:
        handle.remove()


def test_epsilon_plus_accounts_for_all_relevance(net):
    kept = net.absorbed(EpsilonPlus())
    torch.testing.assert_close(kept.initial, net.logits[:, net.target], rtol=1e-12, atol=0)
    assert (kept.rest / kept.initial).abs().max() <= 1e-9


def test_epsilon_plus_conserves_where_biases_count_as_zero(net):
    kept = net.absorbed(EpsilonPlus(epsilon=1e-14, stabilizer=1e-14, zero_params="bias"))
    assert (kept.rest / scale(kept)).abs().max() <= 1e-9
    ratio = kept.input / kept.initial
    if not net.family.conserves:  # what is missing was at outputs without positive contributions, or is a constant's
        empty = sum(shares["empty"] for shares in kept.layers.values())
        ratio = ratio + (empty + kept.layers.get("", {"bias": 0})["bias"]) / kept.initial
    assert (ratio - 1).abs().max() <= 1e-4


@pytest.mark.parametrize(
    "composite",
    [EpsilonPlusFlat(), EpsilonGammaBox(low=-3.0, high=3.0), EpsilonAlpha2Beta1()],
    ids=lambda composite: composite.name,
)
def test_other_presets_account_for_all_relevance(net, composite):
    kept = net.absorbed(composite)
    assert kept.input.isfinite().all()
    assert (kept.rest / scale(kept)).abs().max() <= 1e-9


def test_concepts_sum_up_to_the_whole(net):
    attribution, middle = CondAttribution(net.model), net.family.middle
    recorded = attribution(net.data, [{"y": net.target}], EpsilonPlus(), record_layer=[middle])
    whole, n = recorded.heatmap[0], recorded.relevances[middle].shape[1]
    parts = [{"y": net.target, middle: list(range(first, n, 4))} for first in range(4)]
    found = attribution(net.data, parts, EpsilonPlus()).heatmap.sum(0)
    assert (found - whole).abs().max() <= 1e-10 * whole.abs().max()
