"""Models whose layers get their weights when they are called, as accelerate offloads them, are explained as others."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from preset_cases import numbers, seeded
from torch import nn

import crp
from crp.attribution import CondAttribution
from crp.composites import AttnLRP, DeepLift, EpsilonPlus, EpsilonPlusFlat, Gradient
from crp.engine.kernel_calls import CallRecorder
from crp.engine.replayed import Replayed
from crp.errors import InputError

KINDS = [AttnLRP, DeepLift, EpsilonPlus, EpsilonPlusFlat, Gradient]


class Loading:
    """A hook as those of accelerate: weights are on the meta device but for the length of a call."""

    execution_device = "cpu"

    def __init__(self, layer: nn.Module) -> None:
        self.layer, self.forward = layer, layer.forward
        self.kept = {name: p.detach().clone() for name, p in layer.named_parameters(recurse=False)}
        self.unload()
        layer._hf_hook, layer.forward = self, self

    def unload(self) -> None:
        for name, weight in self.kept.items():
            self.layer._parameters[name] = nn.Parameter(weight.to("meta"), requires_grad=False)

    def __call__(self, *args, **kwargs):
        for name, weight in self.kept.items():
            self.layer._parameters[name] = nn.Parameter(weight.clone(), requires_grad=False)
        try:
            return self.forward(*args, **kwargs)
        finally:
            self.unload()


def offloaded(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if next(module.parameters(recurse=False), None) is not None:
            Loading(module)
    return model


def pictures() -> nn.Sequential:
    return seeded(nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(96, 4)))


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.hidden, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, ids):
        return self.head(self.hidden(self.words(ids)).relu().mean(1))


CASES = {"pictures": (pictures, numbers(2, 3, 4, 4)), "words": (lambda: seeded(Words()), torch.tensor([[3, 7, 1, 4]]))}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_results_are_those_of_the_loaded_model(case, kind):
    make, data = CASES[case]
    loaded, other = (CondAttribution(model)(data, [{"y": 1}], kind()) for model in (make(), offloaded(make())))
    assert loaded.heatmap.abs().max() > 0
    torch.testing.assert_close(loaded.heatmap, other.heatmap, rtol=0, atol=0)
    torch.testing.assert_close(loaded.prediction, other.prediction, rtol=0, atol=0)


def test_methods_that_are_no_composite():
    loaded, other = seeded(Words()), offloaded(seeded(Words()))
    for name in ("intgrad", "occlusion"):
        results = [crp.explain(name, model, CASES["words"][1], 1) for model in (loaded, other)]
        torch.testing.assert_close(*results, rtol=0, atol=0)


def moved(model: nn.Sequential) -> nn.Sequential:
    """A model whose weights stay where they are, and whose data go to them."""
    model[0]._hf_hook = SimpleNamespace(execution_device="cpu")
    return model


@pytest.mark.parametrize("make", [offloaded, moved])
def test_they_are_computed_each_time(make):
    """What is recorded would read weights that are gone, or run on one device, and so nothing is."""

    recorded = []

    class Recorder(CallRecorder):
        def record(self, run, inputs):
            recorded.append(inputs)
            return super().record(run, inputs)

    attribution, composite = CondAttribution(make(pictures())), EpsilonPlus()
    attribution._replayed = Replayed(Recorder(2, cost=0))
    for number in range(6):
        data = numbers(2, 3, 4, 4) + number
        found = attribution(data, [{"y": 1}], composite).heatmap
        torch.testing.assert_close(found, CondAttribution(pictures())(data, [{"y": 1}], EpsilonPlus()).heatmap)
    assert not recorded and attribution._replayed.replays.replayed == 0


def test_weights_that_nothing_loads_are_refused():
    model = pictures()
    model[0]._hf_hook = SimpleNamespace(execution_device=None)
    model[3].to("meta")
    with pytest.raises(InputError, match="on the meta device, where tensors have no values; load them"):
        CondAttribution(model)(numbers(2, 3, 4, 4), [{"y": 1}], EpsilonPlus())


def test_norms_that_would_be_merged_into_them_are_refused():
    model = offloaded(seeded(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten())))
    with pytest.raises(InputError, match="merged into Conv2d '0', whose weights are loaded when it is called"):
        CondAttribution(model)(numbers(2, 3, 4, 4), [{"y": 1}], EpsilonPlus())
    CondAttribution(model)(numbers(2, 3, 4, 4), [{"y": 1}], EpsilonPlus(canonizers=None))
