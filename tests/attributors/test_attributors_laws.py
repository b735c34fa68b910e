"""What holds for every attributor and method: how a model runs, how many rows at once, and what is refused."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
import zennit.composites
from attributor_cases import NAMES, TwoInputs, close, explain, gap_net, images
from torch import nn

import crp
from crp.attributors import Gradient, GuidedGradCAM, IntegratedGradients, Neuron
from crp.attributors.backgrounds import make_background, median
from crp.attributors.catalogue import ATTRIBUTORS
from crp.attributors.flow import concept_flow
from crp.composites import DeepLift, EpsilonPlus
from crp.concepts import ChannelConcept, Concept

KINDS = sorted({kind for kind, _, _ in ATTRIBUTORS.values()}, key=lambda kind: kind.__name__)


def made(kind, model, **keywords):
    needed = {"layer": "4"} if "layer" in inspect.signature(kind).parameters else {}
    return kind(model, **needed, **keywords)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_in_training_is_explained_in_evaluation_without_a_graph(name):
    model, x = gap_net(), images()
    wanted = explain(name, model, x, 1)
    model.add_module("8", nn.Dropout(0.5))
    model.train()
    with torch.no_grad(), pytest.warns(UserWarning, match="explained in evaluation mode"):
        close(explain(name, model, x, 1), wanted, rtol=1e-8, atol=1e-12)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("target", [None, 2])
def test_no_pass_has_more_rows_than_asked_for(name, target):
    model, rows = gap_net(), []
    model[0].register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    explain(name, model, images(5), target, batch_size=2)
    assert max(rows) == 2


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_explained_under_a_composite_of_someone_else(name):
    model = gap_net()
    with EpsilonPlus().context(model), pytest.raises(RuntimeError, match="EpsilonPlus is on the model"):
        explain(name, model, images(), 1)


@pytest.mark.parametrize("kind", KINDS)
def test_constructors_keep_what_they_are_given(kind):
    known = inspect.signature(kind).parameters
    given = {
        "condition": {"4": [1]},
        "mask_map": {"4": ChannelConcept.mask},
        "batch_size": 2,
        "interpolation": "nearest",
        "reshape": lambda values: values,
        "relu": True,
    }
    given = {name: value for name, value in given.items() if name in known}
    one = made(kind, gap_net(), **given)
    parts = [one.fine, one.coarse] if kind is GuidedGradCAM else [one]
    for part in parts:
        assert {name: getattr(part, name) for name in given if hasattr(part, name)} == {
            name: value for name, value in given.items() if hasattr(part, name)
        }
    assert all(any(hasattr(part, name) for part in parts) for name in given)


@pytest.mark.parametrize("kind", KINDS)
def test_values_that_are_no_numbers_are_refused_without_explain_too(kind):
    with pytest.raises(ValueError, match="finite"):
        made(kind, gap_net())(torch.full_like(images(), torch.nan), 1)


@pytest.mark.parametrize("composite", [None, DeepLift(), DeepLift(reference=1.0), zennit.composites.EpsilonPlus()])
def test_the_output_is_that_of_the_model_whatever_else_runs(composite):
    model, x = gap_net(), images()
    assert torch.equal(Gradient(model, composite)(x, 1)[0], model(x))
    close(IntegratedGradients(model, composite, steps=2)(x, 1)[0], model(x))


def test_what_zennits_composites_give_is_integrated_as_it_is():
    model, x, composite = gap_net(), images(), zennit.composites.EpsilonPlus()
    found = IntegratedGradients(model, composite, steps=1)(x, 1)[1]
    close(found, x * Gradient(model, composite)(x, 1)[1])


@pytest.mark.parametrize("mask_map", [ChannelConcept.mask, {"1": ChannelConcept.mask}])
def test_concepts_below_a_neuron_add_up_to_it(mask_map):
    model, x, neuron = gap_net(), images(), Neuron("3", (2, 1, 1))
    parts = [Gradient(model, condition={"1": [i]}, mask_map=mask_map)(x, neuron)[1] for i in range(5)]
    assert all(part.abs().sum() > 0 for part in parts)
    close(sum(parts), Gradient(model)(x, neuron)[1])


def test_a_layer_may_have_the_name_of_the_output():
    model, x = nn.Sequential(), images()
    model.add_module("y", gap_net()[:5])
    model.add_module("rest", gap_net()[5:])
    model.eval()
    parts = [crp.explain("epsilon", model, x, 1, condition={"y": [i]}) for i in range(6)]
    close(sum(parts), crp.explain("epsilon", model, x, 1))


def test_windows_in_numbers_of_numpy():
    model, x = gap_net(), images()
    wanted = crp.explain("occlusion", model, x, 1, window_shape=(3, 4, 4), step=(3, 4, 4))
    window = tuple(np.array([3, 4, 4]))
    assert torch.equal(crp.explain("occlusion", model, x, 1, window_shape=window, step=window), wanted)


def test_noise_of_several_inputs_is_given_as_often():
    noise = torch.zeros(4, 2, 2, 4, 4), torch.zeros(3, 2, 3)
    inputs = torch.randn(2, 2, 4, 4).double(), torch.randn(2, 3).double()
    with pytest.raises(ValueError, match=r"noise is given \[4, 3\] times; as often for each input"):
        crp.explain("smoothgrad", TwoInputs(), inputs, 1, noise=noise)


@pytest.mark.parametrize("name", ["saliency", "intgrad", "epsilon", "occlusion"])
def test_an_input_without_effect_has_no_relevance(name):
    class One(TwoInputs):
        def forward(self, picture, vector):
            return super().forward(picture, torch.zeros_like(vector))

    inputs = torch.randn(2, 2, 4, 4).double(), torch.randn(2, 3).double()
    picture, vector = crp.explain(name, One(), inputs, 1, **({"window_shape": 1} if name == "occlusion" else {}))
    assert picture.abs().sum() > 0 and torch.equal(vector, torch.zeros_like(vector))


class Pairs(Concept):
    """Two channels each."""

    def mask(self, row, ids, layer_name=None):
        def keep(gradient):
            kept = torch.zeros_like(gradient[row])
            for i in ids:
                kept[2 * i : 2 * i + 2] = gradient[row, 2 * i : 2 * i + 2]
            gradient[row] = kept
            return gradient

        return keep

    def relevance(self, values, layer_name=None):
        return values.unflatten(1, (-1, 2)).sum(2)


def test_relevance_flows_between_concepts_of_ones_own():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).double().eval()
    x = torch.ones(1, 3).double()
    flow = concept_flow("epsilon", net, x, 1, {"3": Pairs(), "1": ChannelConcept()}, width=4)
    pairs = crp.explain("epsilon", net, x, 1, layer="3")[0].unflatten(0, (3, 2)).sum(1)
    for (layer, concept), share in flow.columns[1].items():
        assert layer == "3"
        assert share == pytest.approx(float(pairs[concept] / pairs.abs().sum()))
    for concept in range(3):
        below = crp.explain("epsilon", net, x, 1, layer="1", condition={"3": [concept]}, mask_map={"3": Pairs().mask})
        for channel, part in enumerate((below[0] / below.abs().sum().clamp(min=1e-30)).tolist()):
            found = flow.edges.get((("3", concept), ("1", channel)), 0.0)
            assert found == pytest.approx(flow.columns[1][("3", concept)] * part)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, x: median(x, -1), ValueError, "width must be an odd number of pixels, not -1"),
        (lambda m, x: make_background("sepia", x), ValueError, "a background must be one of"),
        (lambda m, x: make_background("blur", x, -1.0), ValueError, "sigma must be a number of at least 0"),
        (lambda m, x: make_background(lambda _: None, x), TypeError, "must give a tensor or a number, not None"),
        (lambda m, x: IntegratedGradients(m, quadrature=np.array(["left"] * 2)), ValueError, "must be one of 'right'"),
        (lambda m, x: IntegratedGradients(m, steps=1.5), ValueError, "steps must be a whole number of at least 1"),
        (lambda m, x: crp.explain("intgrad", m, x, 1, baseline=True), TypeError, "a baseline is a number"),
        (lambda m, x: explain("grad_cam", m, x, 1, relu="no"), TypeError, "relu must be"),
        (lambda m, x: explain("grad_cam_pp", m, x, 1, eps=-1.0), ValueError, "eps must be a number of at least 0"),
        (lambda m, x: explain("grad_cam", m, x, 1, reshape=lambda v: v[:1]), ValueError, "reshape made"),
        (lambda m, x: explain("grad_cam", m, x, 1, reshape=lambda v: None), ValueError, "reshape made NoneType of"),
    ],
)
def test_what_is_wrong_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call(gap_net(), images())


def test_maps_of_volumes_are_enlarged():
    net = nn.Sequential(nn.Conv3d(1, 2, 3, padding=1), nn.ReLU(), nn.AvgPool3d(2), nn.Flatten(), nn.Linear(16, 2))
    x = torch.rand(2, 1, 4, 4, 4).double()
    found = crp.explain("grad_cam", net.double().eval(), x, 1, layer="2")
    small = found.new_tensor(crp.attributors.GradCAM(net, layer="2").maps(x, 1)[1].tolist())
    close(found, nn.functional.interpolate(small, (4, 4, 4), mode="trilinear", align_corners=False))
