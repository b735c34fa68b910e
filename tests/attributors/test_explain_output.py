"""`crp.explain` of models that return a dict, a segmentation or boxes: ``output=`` takes what is explained."""

from __future__ import annotations

import operator

import pytest
import torch
from attributor_cases import InDict, close, gap_net, images
from detectors import DETECTORS
from preset_cases import numbers, seeded
from test_explain import GIVEN, NAMES
from torch import nn

import crp
from crp import composites
from crp.attribution import CondAttribution
from crp.attributors import Gradient, Neuron
from crp.outputs import Element, Pixels, detection, segmentation, with_logits


def scores(returned):
    return returned["scores"]


class Segmenter(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 1))

    def forward(self, x):
        return {"out": super().forward(x)}


def autograd(function, x):
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(function(leaf).sum(), leaf)[0]


def segmenter():
    return seeded(Segmenter())


# --- any method, any target ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_what_is_taken_from_a_dict_is_explained_as_if_it_were_returned(name, untouched):
    net, x, options = gap_net(), images(), GIVEN.get(name, {})
    model = InDict(gap_net()).eval()
    with untouched(model):
        found = crp.explain(name, model, x, [0, 3, 1], output=scores, **options)
    close(found, crp.explain(name, net, x, [0, 3, 1], **options))
    close(crp.explain(name, model, x, output=scores, **options), crp.explain(name, net, x, **options))


@pytest.mark.parametrize("name", ["epsilon_plus", "intgrad", "occlusion"])
@pytest.mark.parametrize(
    "target",
    [
        torch.tensor([0.5, 0.0, -1.0, 0.0], dtype=torch.float64),
        lambda y: y.square().sum(1),
        Element((2,)),
        Neuron("1", (1,)),
    ],
    ids=["mask", "function", "element", "neuron"],
)
def test_targets_of_any_kind_mean_what_is_taken(name, target):
    net, x, options = gap_net(), images(), GIVEN.get(name, {})
    found = crp.explain(name, InDict(gap_net()).eval(), x, target, output=scores, batch_size=3, **options)
    close(found, crp.explain(name, net, x, target, batch_size=3, **options))


# --- segmentation -------------------------------------------------------------------------------------------------


def test_the_class_of_a_segmentation_is_the_sum_of_its_own_pixels():
    model, x = segmenter(), numbers(2, 3, 6, 6, seed=1)
    logits = model(x)["out"]
    own = (logits == logits.amax(1, keepdim=True)) & (logits > 0)
    for target in range(3):
        wanted = autograd(lambda data, c=target: (model(data)["out"] * own)[:, c], x)
        close(crp.explain("gradient", model, x, target, output=segmentation()), wanted)
        found = crp.explain("epsilon_plus", model, x, target, output=segmentation())
        engine = CondAttribution(model, output=segmentation())
        wanted = engine(x, [{"y": target}], composites.EpsilonPlus()).heatmap
        close(found.sum(1), wanted)


def test_pixels_and_elements_are_targets_of_a_dense_output():
    model, x = segmenter(), numbers(2, 3, 8, 8, seed=1)
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[2, 1:4] = True
    found = crp.explain("gradient", model, x, Pixels(1, mask), output=operator.itemgetter("out"))
    close(found, autograd(lambda data: model(data)["out"][:, 1, 2, 1:4], x))
    places = [Element((0, 1, 2)), Element((2, 5, 0))]
    found = crp.explain("occlusion", model, x, places, output=operator.itemgetter("out"), **GIVEN["occlusion"])
    for i, place in enumerate(places):
        dense = nn.Sequential(*segmenter(), nn.Flatten()).eval()
        flat = place[0] * 64 + place[1] * 8 + place[2]
        close(found[i : i + 1], crp.explain("occlusion", dense, x[i : i + 1], flat, **GIVEN["occlusion"]))


# --- boxes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DETECTORS)
def test_boxes_are_explained_as_by_the_engine(name):
    model, x = with_logits(seeded(DETECTORS[name]())), numbers(2, 3, 64, 64, seed=4).sigmoid()
    engine = CondAttribution(model, output=detection())
    wanted = engine(x, [{"y": 1}], composites.EpsilonPlus()).heatmap
    close(crp.explain("epsilon_plus", model, x, 1, output=detection()).sum(1), wanted)


def test_a_box_is_explained_by_occlusion_and_by_class_activation_maps():
    model, x = with_logits(seeded(DETECTORS["retinanet"]())), numbers(1, 3, 64, 64, seed=4).sigmoid()
    windows = {"window_shape": 32, "step": 32, "output": detection(box=0)}
    found = crp.explain("occlusion", model, x, 1, **windows)
    with torch.no_grad():
        whole = detection(box=0)(model(x))[0, 1]
        for row, column in ((0, 0), (32, 32)):
            without = x.clone()
            without[:, :, row : row + 32, column : column + 32] = 0
            close(found[0, 0, row, column], whole - detection(box=0)(model(without))[0, 1])
    mapped = crp.explain("grad_cam", model, x, 1, layer="backbone.3", output=detection(box=0))
    assert mapped.shape == x.shape and mapped.abs().sum() > 0


# --- the output beside the explanation -------------------------------------------------------------------------------


def test_the_output_is_that_of_the_data_where_a_composite_has_a_reference():
    net, x = gap_net(), images()
    output, _ = Gradient(net, composites.DeepLift())(x, 0)
    close(output, net(x).detach())


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options", "error", "message"),
    [
        ("gradient", {}, TypeError, "the model returns a dict.*output=, of CondAttribution or crp.explain"),
        ("occlusion", {}, TypeError, "the model returns a dict.*output=, of CondAttribution or crp.explain"),
        ("gradient", {"output": "scores"}, TypeError, "output must be a function.*not 'scores'"),
        ("gradient", {"output": lambda y: y}, TypeError, "output must return the tensor to explain; .* a dict"),
        ("gradient", {"output": lambda y: [*y["scores"]]}, TypeError, r"returned a list.*detection\(box=0\)"),
        ("gradient", {"output": lambda y: y["scores"].sum()}, TypeError, r"a row for each sample; .* shape \(\)"),
        ("occlusion", {"output": lambda y: y["scores"][:1]}, ValueError, r"first axis must be that of 3 samples"),
        ("meaningful_perturbation", {"output": lambda y: y["scores"][:1]}, ValueError, "must be that of 3 samples"),
        ("meaningful_perturbation", {"output": segmentation("scores")}, TypeError, "a segmentation has logits"),
    ],
)
def test_what_is_no_output_is_refused(method, options, error, message, untouched):
    model, x = InDict(gap_net()).eval(), images()
    with untouched(model), pytest.raises(error, match=message):
        crp.explain(method, model, x, 0, **GIVEN.get(method, {}), **options)


def test_scores_without_a_softmax_have_no_probability():
    model, x = segmenter(), numbers(1, 3, 8, 8, seed=1)
    options = {**GIVEN["meaningful_perturbation"], "output": segmentation()}
    with pytest.raises(ValueError, match="score='softmax' is of classes that exclude each other"):
        crp.explain("meaningful_perturbation", model, x, 1, **options)
    assert crp.explain("meaningful_perturbation", model, x, 1, score="output", **options).shape == x.shape


def test_a_picture_without_a_box_is_named():
    model, x = with_logits(seeded(DETECTORS["retinanet"]())), numbers(1, 3, 64, 64, seed=4).sigmoid()
    with pytest.raises(IndexError, match="box 9 is to be explained, but 4 boxes are found in sample 0"):
        crp.explain("gradient", model, x, 1, output=detection(box=9))
