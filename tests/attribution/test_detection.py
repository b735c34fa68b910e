"""Detectors: scores of boxes before softmax or sigmoid, images of several shapes, boxes in any number, concepts."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from attribution_cases import close, net
from detectors import DETECTORS
from preset_cases import numbers, seeded
from torch import Tensor, nn
from torchvision.models import detection as torchvision_detection

from crp.attribution import CondAttribution
from crp.audit import context_scores, inside_boxes, intervene
from crp.composites import DeepLift, EpsilonPlus, GradientTimesInput
from crp.concepts import ChannelConcept
from crp.engine.independence import check_independent
from crp.engine.inputs import Inputs
from crp.outputs import Element, detection, with_logits
from crp.visualization import FeatureVisualization
from crp.visualization.table.store import Table

IMAGES = numbers(2, 3, 64, 64, seed=4).sigmoid()
#: Heights and widths differ.
RAGGED = [IMAGES[0, :, :50], IMAGES[1, :, :, :40], IMAGES[0, :, 10:40, 5:60]]
LAYER = "backbone.3"
every_detector = pytest.mark.parametrize("name", DETECTORS)


def detector(name: str) -> nn.Module:
    return seeded(DETECTORS[name]())


# --- logits of boxes ------------------------------------------------------------------------------------------------


@every_detector
def test_each_box_has_its_logits(name, untouched):
    """Their softmax or sigmoid is its score, and nothing else about the detector changes."""
    model = detector(name)
    with untouched(model):
        wanted, found = model(RAGGED), with_logits(model)(RAGGED)
    assert len(found) == len(wanted) == 3
    for one, plain in zip(found, wanted, strict=True):
        assert all(torch.equal(one[key], plain[key]) for key in plain) and len(plain["scores"])
        assert one["exclusive"] == (name in ("faster_rcnn", "ssd"))
        scores = one["logits"].softmax(-1) if one["exclusive"] else one["logits"].sigmoid()
        of_label = scores[range(len(scores)), one["labels"]]
        if name == "fcos":  # (its scores are geometric means with those of centres, which are at most 1)
            assert (one["scores"] <= of_label.sqrt() * (1 + 1e-12)).all()
        else:
            assert close(of_label, one["scores"], 1e-12)


def test_boxes_that_are_alike_are_told_apart_by_their_scores():
    """Anchors that are larger than the image give every class the same box, from anchors of its own."""
    model = detector("retinanet")
    model.anchor_generator = torchvision_detection.anchor_utils.AnchorGenerator(((4000, 5000),), ((1.0,),))
    model.topk_candidates = 2000
    for parameter in model.head.regression_head.bbox_reg.parameters():
        nn.init.zeros_(parameter)
    (one,) = with_logits(model)(IMAGES[:1])
    assert len(one["labels"]) == 3 and (one["boxes"] == one["boxes"][0]).all()
    assert close(one["logits"].sigmoid()[range(3), one["labels"]], one["scores"], 1e-12)


@every_detector
def test_a_detector_with_logits_shares_its_layers(name):
    model = detector(name)
    found = with_logits(model)
    assert [key for key, _ in found.named_modules()] == [key for key, _ in model.named_modules()]
    assert all(a is b for a, b in zip(found.parameters(), model.parameters(), strict=True))
    again = copy.deepcopy(found)(RAGGED)
    assert all(torch.equal(a["logits"], b["logits"]) for a, b in zip(again, found(RAGGED), strict=True))
    handle = found.register_forward_hook(lambda *_: None)
    assert not model._forward_hooks
    handle.remove()


def test_other_models_have_no_logits_of_boxes():
    with pytest.raises(
        TypeError, match=r"a detector of torchvision is needed: .*, not Linear; let yours return a dict"
    ):
        with_logits(nn.Linear(2, 2))


LOGITS = numbers(4, 5, seed=2)


@pytest.mark.parametrize("box", ["best", "all", 0, -1])
@pytest.mark.parametrize("exclusive", [True, False])
def test_scores_of_boxes(box, exclusive):
    """Log-odds are those of the softmax; of a sigmoid they are the logits."""
    returned = [{"logits": LOGITS, "exclusive": exclusive}, {"logits": LOGITS[:2] + 1, "exclusive": exclusive}]

    def chosen(values: Tensor) -> Tensor:
        return values.amax(0) if box == "best" else values if box == "all" else values[box]

    for score in ("logit", "log-odds"):
        found = detection(score, box)(returned)
        for one, given in zip(found, returned, strict=True):
            wanted = given["logits"]
            if score == "log-odds" and exclusive:
                wanted = wanted.softmax(-1).logit()
            assert close(one, chosen(wanted), 1e-12)
    assert isinstance(found, list if box == "all" else Tensor)


def test_scores_of_queries():
    """Of models such as DETR's, which return logits of all boxes."""
    logits = LOGITS[None].repeat(2, 1, 1)
    assert torch.equal(detection()(type("Output", (), {"logits": logits})), logits.amax(1))
    assert torch.equal(torch.stack(detection(box="all")({"logits": logits})), logits)


@pytest.mark.parametrize(
    ("make", "returned", "error", "message"),
    [
        (lambda: detection("probability"), None, ValueError, "score must be one of 'logit', 'log-odds'"),
        (lambda: detection(box=True), None, ValueError, "box must be 'best', 'all' or the number of a box, not True"),
        (detection, [{"scores": 1, "boxes": 2}], KeyError, r"detections have \['boxes', 'scores'\], and no 'logits'"),
        (detection, [{"logits": LOGITS}, {"logits": LOGITS[:0]}], IndexError, "but 0 boxes are found in sample 1"),
        (lambda: detection(box=4), [{"logits": LOGITS}], IndexError, "box 4 is to be explained, but 4 boxes are found"),
        (detection, LOGITS, TypeError, r"logits of shape \(samples, boxes, classes\), not \(4, 5\)"),
    ],
    ids=range(6),
)  # fmt: skip
def test_what_is_no_detection(make, returned, error, message):
    with pytest.raises(error, match=message):
        make()(returned)


def test_a_saturated_score_is_explained_by_its_logit():
    """The softmax's own heatmap is 0 at a score of 1, that of the logit and of the log-odds is not."""
    model = detector("faster_rcnn").float()
    with torch.no_grad():
        model.roi_heads.box_predictor.cls_score.bias[1] = 50
    data, label = IMAGES.float(), 1
    found = with_logits(model)(data)[0]
    assert found["scores"][0] == 1 and found["labels"][0] == label
    by_score = CondAttribution(model, output=lambda out: torch.stack([one["scores"][:1] for one in out]))
    assert by_score(data[:1], [{"y": 0}], EpsilonPlus()).heatmap.abs().sum() <= 1e-6
    for score in ("logit", "log-odds"):
        attribution = CondAttribution(with_logits(model), output=detection(score, 0))
        result = attribution(data[:1], [{"y": label}], EpsilonPlus())
        assert result.heatmap.abs().sum() > 0.1 and result.prediction[0, label] > 40


# --- samples whose shapes differ ------------------------------------------------------------------------------------


@pytest.mark.parametrize("box", ["best", "all"])
@pytest.mark.parametrize("name", ["faster_rcnn", "retinanet"])
def test_images_in_a_list(name, box, untouched):
    """Each image is explained as if it were alone; where rows differ in shape, results are lists."""
    model = with_logits(detector(name))
    attribution = CondAttribution(model, output=detection(box=box))
    y = Element((0, 1)) if box == "all" else 1
    conditions = [{"y": y}, {"y": y, LAYER: [0, 3]}]
    with untouched(model):
        found = attribution(RAGGED, conditions, EpsilonPlus(), [LAYER])
        parts = list(attribution.generate(RAGGED, conditions, EpsilonPlus(), [LAYER], batch_size=3, verbose=False))
        account = attribution.absorbed(RAGGED, conditions, EpsilonPlus())
    alone = [attribution(image[None], conditions, EpsilonPlus(), [LAYER]) for image in RAGGED]
    rows = [(one, row) for one in alone for row in (0, 1)]
    assert [tuple(heatmap.shape) for heatmap in found.heatmap] == [tuple(i.shape[1:]) for i in RAGGED for _ in (0, 1)]
    for i, (one, row) in enumerate(rows):
        assert close(found.heatmap[i], one.heatmap[row], 1e-12) and found.heatmap[i].isfinite().all()
        assert close(found.prediction[i], one.prediction[row], 1e-12)
        assert close(found.relevances[LAYER][i], one.relevances[LAYER][row], 1e-12)
    assert any(heatmap.any() for heatmap in found.heatmap)
    for field in ("heatmap", "prediction"):
        joined = [row for part in parts for row in getattr(part, field)]
        assert all(torch.equal(a, b) for a, b in zip(joined, getattr(found, field), strict=True))
    assert (account.rest[::2].abs() <= 1e-9 * account.initial[::2].abs()).all()
    assert close(account.input, torch.stack([heatmap.sum() for heatmap in found.heatmap]), 1e-9)


@pytest.mark.parametrize("composite", [None, EpsilonPlus()], ids=["gradient", "plus"])
def test_samples_in_a_list(composite):
    """Those of one shape are a batch; samples and conditions of equal number are paired."""
    model = net(lambda s, x: s.fc(s.conv(x).relu().mean((2, 3))), conv=nn.Conv2d(3, 5, 3), fc=nn.Linear(5, 4))
    attribution = CondAttribution(model)
    check_independent(model, Inputs.single(IMAGES), [range(2)])
    calls = model.calls
    as_list = attribution(list(IMAGES), [{"y": 1}, {"y": 2, "conv": [0]}], composite, ["conv"])
    as_batch = attribution(IMAGES, [{"y": 1}, {"y": 2, "conv": [0]}], composite, ["conv"])
    assert model.calls == calls + 2
    assert torch.equal(as_list.heatmap, as_batch.heatmap)
    assert torch.equal(as_list.relevances["conv"], as_batch.relevances["conv"])
    paired = attribution(RAGGED, [{"y": 0}, {"y": 1}, {"y": 2}], composite)
    for i, image in enumerate(RAGGED):
        assert close(paired.heatmap[i], attribution(image[None], [{"y": i}], composite).heatmap[0], 1e-12)
    assert isinstance(paired.prediction, Tensor) and paired.prediction.shape == (3, 4)
    parts = attribution.generate(RAGGED, [{"y": 0}, {"y": 1}, {"y": 2}], composite, batch_size=1, verbose=False)
    assert all(torch.equal(part.heatmap[0], heatmap) for part, heatmap in zip(parts, paired.heatmap, strict=True))


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([], ValueError, "data is an empty list"),
        ([IMAGES[0], 3], TypeError, r"data\[1\] is int. Several inputs are a tuple or dict of them"),
        ([IMAGES[0], RAGGED[0] / 0], ValueError, r"data\[1\] has NaN or infinite values"),
        (
            [IMAGES[0], IMAGES[1].half()],
            TypeError,
            r"data\[1\] has the dtype torch.float16, and data\[0\] torch.float64",
        ),
        ([IMAGES[0], IMAGES[1].to("meta")], TypeError, r"data\[1\] is on the meta device"),
    ],
    ids=["empty", "number", "nan", "dtype", "meta"],
)
def test_lists_that_hold_no_samples(data, error, message):
    with pytest.raises(error, match=message):
        CondAttribution(net(lambda s, x: x))(data, [{"y": 1}])


def test_ragged_samples_are_refused_where_one_tensor_is_needed():
    import crp

    model = net(lambda s, x: s.conv(x).mean((2, 3)), conv=nn.Conv2d(3, 5, 3))
    with pytest.raises(TypeError, match=r"samples of several shapes, \[\(3, 30, 55\), .* cannot be explained together"):
        crp.explain("intgrad", model, RAGGED, 1)


def boxes_of(returned: list[dict[str, Tensor]]) -> list[Tensor]:
    """Logits of one to three boxes of each image."""
    return [one["logits"][: 1 + int(one["boxes"][:, 0].round().sum()) % 3] for one in returned]


def test_numbers_of_boxes_may_differ_in_a_batch():
    attribution = CondAttribution(with_logits(detector("retinanet")), output=boxes_of)
    images = torch.cat([IMAGES, IMAGES.flip(2), IMAGES.flip(3)])
    result = attribution(images, [{"y": Element((0, 1))}], EpsilonPlus(), [LAYER])
    assert len({tuple(rows.shape) for rows in result.prediction}) > 1
    assert isinstance(result.heatmap, Tensor) and result.heatmap.shape == (6, 64, 64)
    for i, image in enumerate(images):
        one = attribution(image[None], [{"y": Element((0, 1))}], EpsilonPlus(), [LAYER])
        assert close(result.prediction[i], one.prediction[0], 1e-9)
        assert close(result.heatmap[i], one.heatmap[0], 1e-9)
        assert close(result.relevances[LAYER][i], one.relevances[LAYER][0], 1e-9)
    with pytest.raises(IndexError, match=r"names the element \(2, 1\), but the model's output has the shape"):
        attribution(images, [{"y": Element((2, 1))}], EpsilonPlus())


def test_lists_of_outputs_that_do_not_fit():
    short = CondAttribution(with_logits(detector("retinanet")), output=lambda out: [out[0]["logits"]])
    with pytest.raises(ValueError, match="output returned a list of 1 tensors for 2 samples; give one for each"):
        short(IMAGES, [{"y": 1}], EpsilonPlus())
    with pytest.raises(TypeError, match="output must return the tensor to explain; it returned a list"):
        CondAttribution(detector("retinanet"), output=lambda out: out)(IMAGES, [{"y": 1}], EpsilonPlus())
    with pytest.raises(TypeError, match=r"model returns a list.* choose .* segmentation\(\) and detection\(\)"):
        CondAttribution(detector("retinanet"))(IMAGES, [{"y": 1}], EpsilonPlus())


def test_outputs_for_data_and_reference_must_be_alike():
    model = net(lambda s, x: s.fc(x), fc=nn.Linear(3, 4))
    some = CondAttribution(model, output=lambda y: [row[: 2 + bool(row.abs().sum() > 4)][:, None] for row in y])
    with pytest.raises(ValueError, match="output for the reference is of another shape than that for the data"):
        some(torch.full((1, 3), 50.0).double(), [{"y": 1}], DeepLift())


def test_regions_of_images_may_differ_in_number():
    """A layer that runs on the regions of all images has entries of each row, as many as its image has regions."""
    model = with_logits(detector("faster_rcnn"))
    model.rpn.nms_thresh, model.rpn._post_nms_top_n = 0.01, {"testing": 50}
    attribution = CondAttribution(model, output=detection())
    layer = "roi_heads.box_head.fc6"
    result = attribution(torch.cat([IMAGES, IMAGES.flip(2)]), [{"y": 1}], EpsilonPlus(), [layer])
    sizes = [len(entries) for entries in result.relevances[layer]]
    assert len({*sizes}) > 1 and all(entries.shape[1:] == (12,) for entries in result.relevances[layer])


# --- concepts -------------------------------------------------------------------------------------------------------


class Pictures:
    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return numbers(3, 64, 64, seed=index).float().sigmoid(), index % 3


def check_detector(model: nn.Module, layer: str, data: Tensor, path) -> None:
    """Heatmap, condition, account, context, intervention, mining and references."""
    attribution = CondAttribution(with_logits(model), output=detection())
    whole = attribution(data, [{"y": 1}], EpsilonPlus(), [layer])
    n = whole.relevances[layer].shape[1]
    assert whole.heatmap.shape == (len(data), *data.shape[2:]) and whole.heatmap.any()
    account = attribution.absorbed(data, [{"y": 1}], EpsilonPlus())
    assert account.initial.abs().min() > 1e-3
    assert (account.rest.abs() <= 1e-6 * account.initial.abs()).all()
    conditions = [{"y": 1, layer: [0]}, {"y": 1, layer: range(1, n)}, {"y": 1, layer: range(n)}]
    parts = attribution(data[:1], conditions, EpsilonPlus())
    assert close(parts.heatmap[:2].sum(0), parts.heatmap[2], 1e-9)
    box = with_logits(model)(data[:1])[0]["boxes"][:1]
    best = int(whole.relevances[layer][0].flatten(1).sum(1).argmax())
    scores = context_scores(attribution, data[:1], [1], EpsilonPlus(), layer, ChannelConcept(), [best],
                            inside_boxes(box, data.shape[2:]))  # fmt: skip
    assert 0 <= scores.item() <= 1
    assert intervene(attribution, data[:1], layer, ChannelConcept(), [best], [1]).abs().item() > 0
    model.float()
    fv = FeatureVisualization(attribution, Pictures(), {layer: ChannelConcept()}, path=path)
    fv.run(EpsilonPlus(), 0, 6, batch_size=3, progress=False)
    assert Table.open(fv.path).n_rows == 6
    samples, heatmaps = fv.get_max_reference(best, layer, "relevance", (0, 2), EpsilonPlus(), plot_fn=None)[best]
    assert samples.shape == (2, 3, 64, 64) and heatmaps.shape == (2, 64, 64) and heatmaps.any()


@every_detector
def test_concepts_of_a_detector(tmp_path, name):
    check_detector(detector(name), LAYER, IMAGES, tmp_path / "fv")


@pytest.mark.parametrize("targets", ["prediction", [1, 2]], ids=str)
def test_mined_classes(tmp_path, targets):
    """The predicted class is that of the largest logit of any box."""
    model = detector("retinanet").float()
    attribution = CondAttribution(with_logits(model), output=detection())
    fv = FeatureVisualization(attribution, Pictures(), {LAYER: ChannelConcept()}, path=tmp_path / "fv")
    fv.run(EpsilonPlus(), 0, 6, batch_size=3, progress=False, targets=targets)
    rows = Table.open(fv.path).rows()
    if targets == "prediction":
        wanted = [int(with_logits(model)(Pictures()[i][0][None])[0]["labels"][0]) for i in range(6)]
        assert rows.target.tolist() == wanted
    else:
        assert rows.target.tolist() == [1, 2] * 6
    every = CondAttribution(with_logits(model), output=detection(box="all"))
    fv = FeatureVisualization(every, Pictures(), {LAYER: ChannelConcept()}, path=tmp_path / "all")
    with pytest.raises(ValueError, match=r"needs an output of shape .*classes.*, not a list of tensors"):
        fv.run(EpsilonPlus(), 0, 6, batch_size=3, progress=False, targets="prediction")


def test_conditions_of_a_box_by_its_number():
    """A box by ``box=`` and by `Element` is the same; a gradient says so in closed form."""
    model = with_logits(detector("retinanet"))
    leaf = IMAGES[:1].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(leaf)[0]["logits"][2, 1], leaf)
    for output, y in ((detection(box=2), 1), (detection(box="all"), Element((2, 1)))):
        result = CondAttribution(model, output=output)(IMAGES[:1], [{"y": y}], GradientTimesInput())
        assert close(result.heatmap, (gradient * IMAGES[:1]).sum(1), 1e-9)


def test_pixels_of_boxes():
    boxes = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.4, 9.0], [0.6, 0.0, 1.6, 2.0]])
    wanted = torch.zeros(3, 5, 4, dtype=torch.bool)
    wanted[0, 2:4, 1:3] = wanted[2, :2, 1] = True
    assert torch.equal(inside_boxes(boxes, (5, 4)), wanted)
    with pytest.raises(ValueError, match=r"boxes must be of shape \(boxes, 4\)"):
        inside_boxes(boxes[0], (5, 4))


# --- torchvision's networks -----------------------------------------------------------------------------------------

FEW = {"weights": None, "weights_backbone": None, "num_classes": 4}
NETWORKS = {
    "fasterrcnn": (
        lambda: torchvision_detection.fasterrcnn_mobilenet_v3_large_320_fpn(
            min_size=96, max_size=96, box_score_thresh=0.0, box_detections_per_img=6, rpn_pre_nms_top_n_test=40,
            rpn_post_nms_top_n_test=20, rpn_score_thresh=0.0, **FEW,
        ),
        "backbone.body.13",
    ),
    "retinanet": (
        lambda: torchvision_detection.retinanet_resnet50_fpn(
            min_size=96, max_size=96, score_thresh=0.0, detections_per_img=6, topk_candidates=20, **FEW
        ),
        "backbone.body.layer4.2.conv3",
    ),
    "ssdlite": (
        lambda: torchvision_detection.ssdlite320_mobilenet_v3_large(
            score_thresh=0.0, detections_per_img=6, topk_candidates=20, **FEW
        ),
        "backbone.features.1.2",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_concepts_of_torchvisions_detectors(tmp_path, name):
    make, layer = NETWORKS[name]
    model = make().eval().double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                fan_in = module.weight[0].numel()
                module.weight.copy_(torch.randn(module.weight.shape, generator=generator) * (2 / fan_in) ** 0.5)
            if isinstance(module, nn.BatchNorm2d | torchvision.ops.FrozenBatchNorm2d):
                module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)
    check_detector(model, layer, IMAGES, tmp_path / "fv")
