"""Models of other libraries and for other tasks: they run, conserve relevance, and are left as they were."""

from __future__ import annotations

import json

import pytest
import torch
import torchvision
from architectures import FAMILIES, randomized
from torch import nn
from torch.nn import functional as F

from crp.attribution import CondAttribution
from crp.canonizers import MergeBatchNorm
from crp.composites import EpsilonPlus, EpsilonPlusFlat


def images(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def check(model, data, untouched, output=None, composite=None):
    """All relevance of the strongest output is in the data or in a layer, and the model predicts as before."""
    attribution = CondAttribution(model, output=output)
    with torch.no_grad():
        logits = attribution.select_output(model(data))
    flat = logits.flatten(2).mean(2) if logits.dim() > 2 else logits
    condition = {"y": int(flat[0].argmax())}
    with untouched(model):
        result = attribution(data, [condition], composite or EpsilonPlus())
        kept = attribution.absorbed(data, [condition], composite or EpsilonPlus())
    assert (result.prediction - logits).abs().max() <= 1e-11 * logits.abs().max()
    assert result.heatmap.isfinite().all() and result.heatmap.any()
    assert (kept.rest / kept.initial).abs().max() <= 1e-9
    return kept


def hugging_face(kind):
    transformers = pytest.importorskip("transformers")
    if kind == "resnet":
        config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
        return transformers.ResNetForImageClassification(config)
    config = transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2)
    return transformers.ConvNextForImageClassification(config)


@pytest.mark.parametrize("kind", ["resnet", "convnext"])
def test_hugging_face_returns_records_with_logits(kind, untouched):
    model = randomized(hugging_face(kind).double(), 0).eval()
    kept = check(model, images(2, 3, 32, 32), untouched)
    chosen = check(model, images(2, 3, 32, 32), untouched, output=lambda record: record["logits"])
    assert torch.equal(kept.input, chosen.input)


@pytest.mark.parametrize("name", ["deeplabv3_resnet50", "fcn_resnet50", "lraspp_mobilenet_v3_large"])
def test_segmentation(name, untouched):
    model = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=4)
    model = randomized(model.double(), 0).eval()
    check(model, images(1, 3, 32, 32), untouched, output=lambda maps: maps["out"].mean((2, 3)))


def test_whole_maps_may_be_explained(untouched):
    model = torchvision.models.get_model("lraspp_mobilenet_v3_large", weights=None, weights_backbone=None)
    model = randomized(model.double(), 0).eval()
    check(model, images(1, 3, 32, 32), untouched, output=lambda maps: maps["out"])


def test_detection_backbone(untouched):
    detector = torchvision.models.detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    backbone = randomized(detector.backbone.double(), 0).eval()
    check(backbone, images(1, 3, 64, 64), untouched, output=lambda levels: levels["0"].mean((2, 3)))


def test_video(untouched):
    model = randomized(torchvision.models.video.r3d_18(weights=None, num_classes=5).double(), 0).eval()
    kept = check(model, images(1, 3, 4, 16, 16), untouched)
    assert 0 < kept.input / kept.initial < 1


class Signals(nn.Module):
    """Time-series classifier: dilated convolutions, GELU, gating, pooling over time."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv1d(2, 8, 5, padding=2), nn.BatchNorm1d(8), nn.GELU())
        self.gated = nn.Sequential(nn.Conv1d(8, 16, 3, padding=2, dilation=2), nn.GLU(1))
        self.down = nn.Sequential(
            nn.MaxPool1d(2), nn.Conv1d(8, 8, 3, padding=1, groups=4), nn.GroupNorm(2, 8), nn.SiLU()
        )
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        x = self.stem(x)
        x = self.down(x + self.gated(x))
        return self.head(torch.cat([x.mean(2), x.amax(2)], 1))


@pytest.mark.parametrize("gates", ["signal", "split"])
def test_time_series(gates, untouched):
    model = randomized(Signals().double(), 0).eval()
    kept = check(model, images(2, 2, 32), untouched, composite=EpsilonPlus(gates=gates))
    assert kept.input.isfinite().all()


class UNet(nn.Module):
    """Downward, upward by a transposed convolution and by interpolation, with concatenations on the way."""

    def __init__(self):
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.three = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())
        self.up = nn.Sequential(nn.ConvTranspose2d(16, 16, 2, 2), nn.BatchNorm2d(16))
        self.four = nn.Conv2d(32, 8, 3, padding=1)
        self.out = nn.Conv2d(16, 2, 1)

    def forward(self, x):
        one = self.one(x)
        two = self.two(F.max_pool2d(one, 2))
        three = self.three(F.avg_pool2d(two, 2))
        up = F.relu(self.four(torch.cat([two, self.up(three)], 1)))
        up = F.interpolate(up, scale_factor=2, mode="bilinear", align_corners=False)
        return self.out(torch.cat([one, up], 1))


def test_u_net(untouched):
    model = randomized(UNet().double(), 0).eval()
    check(model, images(1, 3, 16, 16), untouched)
    free = EpsilonPlus(epsilon=1e-14, stabilizer=1e-14, zero_params="bias")
    kept = check(model, images(1, 3, 16, 16), untouched, composite=free)
    empty = sum(shares["empty"] for shares in kept.layers.values())
    assert ((kept.input + empty) / kept.initial - 1).abs() <= 1e-9


class Tables(nn.Module):
    """Constants inside: mean subtraction in place, a table of positions, a constant channel."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.full((3, 1, 1), 0.3))
        self.register_buffer("table", torch.linspace(-1, 1, 64).reshape(8, 8))
        self.conv = nn.Conv2d(4, 6, 3, bias=False)
        self.head = nn.Linear(6, 3, bias=False)

    def forward(self, x):
        x = x.clone()
        x -= self.mean
        x = torch.cat([x, self.table.expand(len(x), 1, 8, 8)], 1)
        x = self.conv(x) + self.table[:6, :6]
        return self.head(x.relu().mean((2, 3)))


def test_constants_inside_a_model_are_accounted_for(untouched):
    model = randomized(Tables().double(), 0).eval()
    kept = check(model, images(2, 3, 8, 8), untouched)
    assert kept.layers[""]["bias"].abs().min() > 0.01


def test_output_must_be_a_function_that_returns_a_tensor():
    model = nn.Linear(3, 2).double().eval()
    with pytest.raises(TypeError, match="output must be a function of what the model returns, or None; not 'out'"):
        CondAttribution(model, output="out")
    with pytest.raises(TypeError, match="output must return the tensor to explain; it returned a dict"):
        CondAttribution(model, output=lambda y: {"out": y})(images(1, 3), [{"y": 0}], init_rel=1)


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "convnext_tiny"])
def test_report_says_what_happens_in_every_layer(name):
    family = next(family for family in FAMILIES if family.name == name)
    model, composite = family.build(), EpsilonPlusFlat([MergeBatchNorm()])
    report = composite.report(model, family.images())
    plain = json.loads(json.dumps(report.to_dict()))
    rules = {(o["layer"], o["function"]): o["rule"].partition("(")[0] for o in plain["operations"]}
    norms = [n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    convolutions = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    dense = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    assert [rules[n, "conv2d"] for n in convolutions] == ["Flat", *["ZPlus"] * (len(convolutions) - 1)]
    assert {rules[n, "linear"] for n in dense} == {"Epsilon"}
    assert sorted(plain["changed"]) == sorted(norms)
    assert all(what.startswith("merged into") for what in plain["changed"].values())
    assert "batch_norm" not in {function for _, function in rules}
    wanted = {("hardswish", "Pass"), ("hardsigmoid", "Pass"), ("mul", "Gate"), ("relu", "ordinary chain rule")}
    if name == "convnext_tiny":
        wanted = {("gelu", "Pass"), ("layer_norm", "Normalization"), ("add", "ordinary chain rule")}
    assert wanted <= {(function, rule) for (_, function), rule in rules.items()}
    assert report.left == []
    text = str(report)
    assert all(n in text for n in [*convolutions, *dense, *norms])
    end = f"canonizer MergeBatchNorm() changed {len(norms)} layers" if norms else "MergeBatchNorm() matched nothing"
    assert end in text and any(end.removeprefix("canonizer ") in line for line in report.to_dict()["canonizers"])


class CumulatedProduct(nn.Module):
    def forward(self, x):
        return x.cumprod(1)


def test_report_names_what_is_left_to_the_chain_rule():
    model = nn.Sequential(nn.Linear(4, 4), CumulatedProduct(), nn.Linear(4, 2)).double().eval()
    with pytest.warns(UserWarning, match=r"EpsilonPlus has no rule for cumprod\(\) in '1'"):
        report = EpsilonPlus().report(model, images(1, 4))
    assert report.to_dict()["left"] == ["cumprod() in '1'"]
    assert "without a rule, by the ordinary chain rule: cumprod() in '1'" in str(report)
