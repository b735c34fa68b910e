"""Dense outputs: single pixels and elements, scores of segmentations, and context scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision
from attribution_cases import close, net
from torch import Tensor, nn

from crp.attribution import CondAttribution
from crp.audit import context_scores
from crp.composites import EpsilonPlus, GradientTimesInput
from crp.concepts import ChannelConcept
from crp.outputs import Element, Pixels, segmentation
from crp.visualization import FeatureVisualization
from crp.visualization.table.store import Table

C = 5


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return net(
        lambda s, x: {"out": s.head(s.conv(x).relu())}, conv=nn.Conv2d(3, C, 3, padding=1), head=nn.Conv2d(C, 4, 1)
    )


@pytest.fixture
def data() -> Tensor:
    return torch.randn(2, 3, 6, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def logits_of(returned) -> Tensor:
    return returned["out"]


# --- targets --------------------------------------------------------------------------------------------------------


def test_pixels_that_are_changed_between_parts_are_those_of_the_call(model, data):
    mask = torch.zeros(6, 7, dtype=torch.bool)
    mask[2, 3] = True
    parts = CondAttribution(model, output=logits_of).generate(
        data[:1], [{"y": [Pixels(c, mask)]} for c in range(2)], GradientTimesInput(), batch_size=1, verbose=False
    )
    next(parts)
    mask.zero_()
    assert next(parts).heatmap.any()


@pytest.mark.parametrize("kind", [torch.Tensor, np.ndarray], ids=["tensor", "array"])
def test_pixels(model, data, kind):
    """Relevance starts at the pixels of the mask, with their logits; pixels of several classes are summed."""
    attribution = CondAttribution(model, output=logits_of)
    masks = torch.zeros(2, 6, 7, dtype=torch.bool)
    masks[0, 2:4, 1:5] = masks[1, 5, 6] = True
    given = masks if kind is torch.Tensor else masks.numpy()
    leaf = data.clone().requires_grad_()
    logits = model(leaf)["out"]
    (one,) = torch.autograd.grad(logits[0, 1][masks[0]].sum() + logits[1, 3][masks[1]].sum(), leaf, retain_graph=True)
    found = attribution(data, [{"y": [Pixels(1, given[0])]}, {"y": Pixels(3, given[1])}], GradientTimesInput())
    assert close(found.heatmap, (data * one).sum(1), 1e-9)
    (both,) = torch.autograd.grad(
        logits[:, 1, masks[0]].sum() + logits[:, 3, masks[1]].sum() + logits[:, 0].sum(), leaf
    )
    several = [{"y": [0, Pixels(1, given[0]), Pixels(3, given[1])]}]
    assert close(attribution(data, several, GradientTimesInput()).heatmap, (data * both).sum(1), 1e-9)
    account = attribution.absorbed(data, several, EpsilonPlus())
    assert (account.rest.abs() <= 1e-9 * account.initial.abs()).all()


def test_elements(model, data):
    attribution = CondAttribution(model, output=logits_of)
    plain = attribution(data, [{"y": [(2, 3, 4)]}], EpsilonPlus()).heatmap
    for target in (Element((2, 3, 4)), [Element((2, 3, 4))]):
        assert torch.equal(attribution(data, [{"y": target}], EpsilonPlus()).heatmap, plain)


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        (Pixels(4, torch.ones(6, 7, dtype=torch.bool)), IndexError, r"pixels of class 4 by a mask of"),
        (Pixels(0, torch.ones(7, 6, dtype=torch.bool)), IndexError, r"mask of \(7, 6\), but .* \(4, 6, 7\)"),
        (Pixels(0, torch.ones(6, 7)), TypeError, r"with an int and a boolean mask, not Pixels\(.*…$"),
        (Pixels("a", torch.ones(6, 7, dtype=torch.bool)), TypeError, "an int and a boolean mask, not Pixels"),
        (Pixels(True, torch.ones(6, 7, dtype=torch.bool)), TypeError, "an int and a boolean mask, not Pixels"),
        (Element((0, 9, 0)), IndexError, "names the element"),
    ],
    ids=range(6),
)  # fmt: skip
def test_targets_that_are_not_there(model, data, target, error, message):
    with pytest.raises(error, match=message):
        CondAttribution(model, output=logits_of)(data, [{"y": [target]}], EpsilonPlus())


# --- scores of segmentations ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["own", "all"])
@pytest.mark.parametrize("positive", [True, False])
def test_score_of_a_class(model, data, where, positive):
    attribution = CondAttribution(model, output=segmentation(where=where, positive=positive))
    leaf = data.clone().requires_grad_()
    logits = model(leaf)["out"]
    kept = torch.ones_like(logits, dtype=torch.bool)
    if where == "own":
        kept &= logits.argmax(1, keepdim=True) == torch.arange(4)[:, None, None]
    if positive:
        kept &= logits > 0
    score = (logits * kept)[:, 2].sum()
    (gradient,) = torch.autograd.grad(score, leaf)
    found = attribution(data, [{"y": 2}], GradientTimesInput())
    assert close(found.heatmap, (data * gradient).sum(1), 1e-9)
    assert close(found.prediction[:, 2].sum(), score.detach(), 1e-12)


class Masked:
    def __len__(self):
        return 6

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return torch.randn(3, 64, 64, generator=generator), index % 3


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.middle = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.up, self.out = nn.ConvTranspose2d(8, 8, 2, 2), nn.Conv2d(16, 4, 1)

    def forward(self, x):
        first = self.down(x).relu()
        second = self.middle(nn.functional.max_pool2d(first, 2)).relu()
        return self.out(torch.cat([first, self.up(second)], 1))


NETS = {
    "unet": (UNet, "middle", None),
    "lraspp": (
        lambda: torchvision.models.segmentation.lraspp_mobilenet_v3_large(
            weights=None, weights_backbone=None, num_classes=4
        ),
        "backbone.16.0",
        "out",
    ),
    "deeplabv3": (
        lambda: torchvision.models.segmentation.deeplabv3_mobilenet_v3_large(
            weights=None, weights_backbone=None, num_classes=4
        ),
        "backbone.16.0",
        "out",
    ),
}


@pytest.mark.parametrize("name", NETS)
def test_nets(tmp_path, name):
    """Heatmap, condition, account, mining and references."""
    torch.manual_seed(0)
    make, layer, key = NETS[name]
    model = make().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
    attribution = CondAttribution(model.double(), output=segmentation(key, where="all"))
    data = Masked()[0][0][None].double()
    whole = attribution(data, [{"y": 1}], EpsilonPlus(), [layer])
    n = whole.relevances[layer].shape[1]
    assert whole.heatmap.any()
    account = attribution.absorbed(data, [{"y": 1}], EpsilonPlus())
    assert account.rest.abs() <= 1e-6 * account.initial.abs()
    part = attribution(data, [{"y": 1, layer: [0]}, {"y": 1, layer: range(1, n)}], EpsilonPlus())
    all_of_it = attribution(data, [{"y": 1, layer: range(n)}], EpsilonPlus())
    assert close(part.heatmap.sum(0), all_of_it.heatmap[0], 1e-9)
    model.float()
    fv = FeatureVisualization(attribution, Masked(), {layer: ChannelConcept()}, path=tmp_path / "fv")
    fv.run(EpsilonPlus(), 0, 6, batch_size=3, progress=False)
    assert Table.open(fv.path).n_rows == 6
    samples, heatmaps = fv.get_max_reference(0, layer, "relevance", (0, 2), EpsilonPlus(), plot_fn=None)[0]
    assert samples.shape == (2, 3, 64, 64) and heatmaps.shape == (2, 64, 64)


@pytest.mark.parametrize(
    ("key", "error", "message"),
    [
        ("aux", KeyError, r"the model returns \['out'\], and not 'aux'; name the logits: key="),
        (None, TypeError, r"a segmentation has logits of shape \(batch, classes, \*space\), not a dict"),
    ],
)
def test_outputs_that_are_no_segmentation(model, data, key, error, message):
    with pytest.raises(error, match=message):
        CondAttribution(model, output=segmentation(key))(data, [{"y": 1}])
    with pytest.raises(ValueError, match="where must be one of 'own', 'all', not 'mine'"):
        segmentation(where="mine")
    with pytest.raises(TypeError, match=r"the model returns a Tensor of shape .*, which has no 'out'"):
        segmentation()(torch.ones(1, 2, 3, 3))


# --- context --------------------------------------------------------------------------------------------------------


def test_context_scores():
    """A concept of the object, one of its surroundings, and one of neither."""
    model = net(lambda s, x: s.fc(s.conv(x).flatten(2).sum(2)), conv=nn.Conv2d(2, 3, 1, bias=False), fc=nn.Linear(3, 2))
    with torch.no_grad():
        model.conv.weight.copy_(torch.tensor([[1.0, 0], [0, 1], [0, 0]])[..., None, None])
        model.fc.weight.fill_(1.0)
    data = torch.zeros(2, 2, 4, 4, dtype=torch.float64)
    data[:, 0, 1:3, 1:3] = 1.0
    data[:, 1] = 1.0
    inside = torch.zeros(2, 4, 4, dtype=torch.bool)
    inside[:, 1:3, 1:3] = True
    found = context_scores(CondAttribution(model), data, [0, 1], EpsilonPlus(), "conv", ChannelConcept(), [0, 1, 2],
                           inside, batch_size=4)  # fmt: skip
    assert close(found[:, :2], torch.tensor([[0.0, 0.75]] * 2).double(), 1e-9)
    assert found[:, 2].isnan().all()
    with pytest.raises(ValueError, match="1 targets and 2 masks are given for 2 samples"):
        context_scores(CondAttribution(model), data, [0], None, "conv", ChannelConcept(), 0, inside)
    with pytest.raises(ValueError, match=r"inside must be boolean, of the heatmaps' shape \(4, 4\)"):
        context_scores(CondAttribution(model), data, [0, 1], None, "conv", ChannelConcept(), 0, inside.double())
