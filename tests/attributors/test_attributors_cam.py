"""Class activation maps: closed forms, enlarging, concepts, and layers that have none."""

import functools

import pytest
import torch
import zennit.core
from attributor_cases import close, gap_net, gradient, images
from torch import nn
from torch.nn import functional as F

from crp import explain
from crp.attributors import CAM, GradCAM, GradCAMPlusPlus, Gradient, GuidedGradCAM, Neuron
from crp.composites import EpsilonPlus, GuidedBackprop
from crp.concepts import DirectionConcept

LAYER = "4"


def parts(model, x, classes):
    activation = model[:5](x).detach()
    return activation, gradient(model[5:], activation, classes)


def test_cam_is_weights_times_activations_and_averages_to_the_score():
    model, x = gap_net(), images()
    activation, _ = parts(model, x, 2)
    output, maps = CAM(model, layer=LAYER).maps(x, 2)
    close(maps[:, 0], torch.einsum("k,nkij->nij", model[7].weight[2].detach(), activation))
    close(maps.mean((1, 2, 3)) + model[7].bias[2].detach(), output[:, 2])
    close(CAM(model, layer=LAYER, relu=True).maps(x, 2)[1], maps.clamp(min=0))


def test_grad_cam_is_the_mean_gradient():
    model, x = gap_net(), images()
    activation, g = parts(model, x, [0, 1, 2])
    expected = (g.mean((2, 3), keepdim=True) * activation).sum(1, keepdim=True)
    close(GradCAM(model, layer=LAYER).maps(x, [0, 1, 2])[1], expected.clamp(min=0))
    close(GradCAM(model, layer=LAYER, relu=False).maps(x, [0, 1, 2])[1], expected)


def test_grad_cam_is_cam_where_there_is_one():
    model, x = gap_net(), images()
    cam = CAM(model, layer=LAYER).maps(x, 1)[1]
    close(GradCAM(model, layer=LAYER, relu=False).maps(x, 1)[1], cam / cam[0].numel())


@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_grad_cam_plus_plus_is_equation_19(eps):
    x = images()
    # (a dense layer that sees positions, so that gradients differ among them)
    model = nn.Sequential(*gap_net()[:5], nn.Flatten(), nn.Linear(6 * 16, 4)).double().eval()
    activation, g = parts(model, x, 1)
    expected = torch.zeros(3, 4, 4, dtype=torch.float64)
    for n in range(3):
        for k in range(6):
            total = activation[n, k].sum()
            below = 2 * g[n, k] ** 2 + total * g[n, k] ** 3 + eps
            alpha = torch.where(g[n, k] == 0, 0, g[n, k] ** 2 / below)
            expected[n] += (alpha * g[n, k].clamp(min=0)).sum() * activation[n, k]
    close(GradCAMPlusPlus(model, layer=LAYER, eps=eps).maps(x, 1)[1][:, 0], expected.clamp(min=0))


@pytest.mark.parametrize("scale", [1e-12, 1e-25])
def test_grad_cam_plus_plus_does_not_vanish_with_the_score(scale):
    """Where the score is tiny, as a saturated probability is, the map is, too: α is 1/2, and the square is nothing."""
    model, x = gap_net().float(), images().float()
    found = GradCAMPlusPlus(model, layer=LAYER).maps(x, lambda output: output[:, 1] * scale)[1].double() / scale
    activation, g = parts(gap_net(), images(), 1)
    weights = (g.clamp(min=0) / 2).sum((2, 3), keepdim=True)
    wanted = (weights * activation).sum(1, keepdim=True).clamp(min=0)
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-6 * float(wanted.max()))


def test_zero_gradients_weigh_nothing():
    model, x = gap_net(), images()
    nn.init.zeros_(model[7].weight)
    maps = GradCAMPlusPlus(model, layer=LAYER).maps(x, 1)[1]
    assert (maps == 0).all()


@pytest.mark.parametrize("kind", [CAM, GradCAM, GradCAMPlusPlus])
def test_result_is_the_enlarged_map_in_every_channel(kind):
    model, x = gap_net(), images()
    _, maps = kind(model, layer=LAYER).maps(x, 1)
    for name, options in {
        "linear": {"mode": "bilinear", "align_corners": False},
        "nearest": {"mode": "nearest"},
    }.items():
        output, found = kind(model, layer=LAYER, interpolation=name)(x, 1)
        close(found, F.interpolate(maps, (8, 8), **options).expand(x.shape))
        close(output, model(x).detach())
    close(kind(model, layer=LAYER, batch_size=2)(x, [0, 1, 2])[1], kind(model, layer=LAYER)(x, [0, 1, 2])[1])


def test_guided_grad_cam_is_a_product():
    model, x = gap_net(), images()
    fine = Gradient(model, GuidedBackprop())(x, 1)[1]
    coarse = GradCAM(model, layer=LAYER)(x, 1)[1]
    close(GuidedGradCAM(model, layer=LAYER)(x, 1)[1], fine * coarse)
    other = Gradient(model, EpsilonPlus())(x, 1)[1]
    close(GuidedGradCAM(model, EpsilonPlus(), layer=LAYER)(x, 1)[1], other * coarse)


@pytest.mark.parametrize("kind", [CAM, functools.partial(GradCAM, relu=False)])
def test_channels_add_up(kind):
    model, x = gap_net(), images()
    each = [kind(model, layer=LAYER, condition={LAYER: [k]})(x, 1)[1] for k in range(6)]
    close(sum(each), kind(model, layer=LAYER)(x, 1)[1])
    close(each[0] + each[5], kind(model, layer=LAYER, condition={LAYER: [0, 5]})(x, 1)[1])


def test_directions_of_a_layer_add_up_in_its_map():
    """The part along a direction is that of a classifier whose weights lie along it."""
    model, x = gap_net(), images()
    unit = F.normalize(torch.arange(1.0, 7.0).double(), dim=0)
    concept = DirectionConcept(unit[None].numpy())
    along, rest = (CAM(model, layer=LAYER, condition={LAYER: [k]}, mask_map=concept.mask).maps(x, 1)[1] for k in (0, 1))
    activation, _ = parts(model, x, 1)
    close(along, (model[7].weight[1] @ unit * torch.einsum("c,nchw->nhw", unit, activation))[:, None].detach())
    close(along + rest, CAM(model, layer=LAYER).maps(x, 1)[1])


def test_concepts_of_a_layer_above_add_up():
    model, x = gap_net(), images()
    kind = functools.partial(GradCAM, model, layer="1", relu=False)
    close(sum(kind(condition={"3": k})(x, 1)[1] for k in range(6)), kind()(x, 1)[1])


def test_composite_takes_the_place_of_the_gradient():
    model, x = gap_net(), images()
    activation, _ = parts(model, x, 1)
    relevance = Gradient(model, EpsilonPlus(), layer=LAYER)(x, 1)[1]
    weights = torch.where(activation == 0, 0, relevance / activation).mean((2, 3), keepdim=True)
    close(GradCAM(model, EpsilonPlus(), layer=LAYER, relu=False).maps(x, 1)[1], (weights * activation).sum(1, True))


@pytest.mark.filterwarnings("ignore:.*ordinary chain rule")
def test_what_comes_back_by_a_composite_of_zennit_starts_from_the_score():
    model, x = gap_net(), images()
    found, plain = (GradCAM(model, by, layer="3", relu=False)(x, 2)[1] for by in (zennit.core.Composite(), None))
    close(found, plain * model(x).detach()[:, 2].view(-1, 1, 1, 1))


class Unused(nn.Sequential):
    """Has a layer that it does not call."""

    def forward(self, x):
        return self[0](x)


@pytest.mark.filterwarnings("ignore:layer '1' is not called")
def test_a_layer_that_is_not_called():
    model = Unused(gap_net(), nn.Conv2d(1, 1, 1)).eval()
    with pytest.raises(ValueError, match="layer '1' is not called in the forward pass; name another"):
        GradCAM(model, layer="1")(images(), 2)


def test_maps_of_signals():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 3, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)).double().eval()
    x = torch.randn(2, 2, 9).double()
    _, maps = GradCAM(model, layer="1").maps(x, 1)
    close(GradCAM(model, layer="1")(x, 1)[1], F.interpolate(maps, 9, mode="linear").expand(x.shape))


def test_masks_and_functions_as_targets():
    model, x = gap_net(), images()
    mask = torch.tensor([0.0, 1.0, 0.0, -2.0]).double()
    each = [CAM(model, layer=LAYER).maps(x, c)[1] for c in range(4)]
    close(CAM(model, layer=LAYER).maps(x, mask)[1], each[1] - 2 * each[3])
    close(CAM(model, layer=LAYER).maps(x, lambda y: y[:, 1] - 2 * y[:, 3])[1], each[1] - 2 * each[3])


@pytest.mark.parametrize("name", ["cam", "grad_cam", "grad_cam_pp", "guided_grad_cam"])
@pytest.mark.parametrize("how", ["autocast", "bfloat16"])
def test_maps_in_low_precision(name, how):
    model, x = gap_net().float(), images().float()
    wanted = explain(name, model, x, 1, layer="4")
    if how == "bfloat16":
        model, x = model.bfloat16(), x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        found = explain(name, model, x, 1, layer="4")
    assert found.dtype == x.dtype
    assert (found - wanted).abs().max() < 0.05 * wanted.abs().max()


@pytest.mark.parametrize("kind", [CAM, GradCAM, GradCAMPlusPlus, GuidedGradCAM])
def test_errors(kind, untouched):
    model, x = gap_net(), images()
    with untouched(model):
        with pytest.raises(ValueError, match=r"layer '6' has the output shape \(3, 6\), which has no positions"):
            kind(model, layer="6")(x, 1)
        with pytest.raises(KeyError, match="'conv9' not found in model"):
            kind(model, layer="conv9")
        with pytest.raises(IndexError, match="target 7 is out of range"):
            kind(model, layer=LAYER)(x, 7)
        with pytest.raises(ValueError, match="must be one of 'linear', 'nearest', not 'cubic'"):
            kind(model, layer=LAYER, interpolation="cubic")
        with pytest.raises(ValueError, match="explains an output of the model, not neurons"):
            kind(model, layer=LAYER)(x, Neuron("1", 0))


def test_errors_of_cam():
    model, x = gap_net(), images()
    with pytest.raises(ValueError, match="'7' maps 6 features to 4, where '1' has 5 channels"):
        CAM(model, layer="1")(x, 1)
    with pytest.raises(ValueError, match="the model's output is not '7' of the mean of '3'"):
        CAM(model, layer="3")(x, 1)  # before the ReLU
    with pytest.raises(ValueError, match=r"one of \['7'\], not '4'"):
        CAM(model, layer=LAYER, classifier="4")
    with pytest.raises(ValueError, match="not ''"):
        CAM(model[:5], layer="1")
    with pytest.raises(ValueError, match="weights for layer '4' only"):
        CAM(model, layer=LAYER, condition={"3": [0]})
    with pytest.raises(ValueError, match="models of one input, not of 2"):
        CAM(model, layer=LAYER)((x, x), 1)


def test_space_of_layer_and_input_must_agree():
    model = nn.Sequential(nn.Flatten(2), nn.Conv1d(1, 2, 3), nn.Flatten(), nn.Linear(28, 2)).double().eval()
    with pytest.raises(ValueError, match=r"has 1 axes of space and the input of shape .* has 2"):
        GradCAM(model, layer="1")(torch.randn(1, 1, 4, 4).double(), 0)
