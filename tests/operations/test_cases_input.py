"""Operations before the first convolution: rules at the input reach the data through them, and the account closes."""

from __future__ import annotations

import pytest
import torch
from detectors import DETECTORS
from preset_cases import (
    BOX,
    LRP_PRESETS,
    assert_closes,
    assert_same_map,
    kept,
    numbers,
    off,
    seeded,
)
from torch import nn
from torch.nn import functional as F
from torchvision import transforms

from crp.attribution import CondAttribution
from crp.composites import LRP
from crp.rules import Epsilon, Flat, WSquare, ZBox

IMAGES = numbers(2, 3, 8, 8, seed=3)


class Fronted(nn.Module):
    """A function of the picture, and a small net: (n, 3, 8, 8) -> (n, 3)."""

    def __init__(self, front, conv):
        super().__init__()
        self.front, self.conv = front, conv
        self.body, self.head = nn.Conv2d(4, 5, 3, padding=1), nn.Linear(5, 3)

    def forward(self, x):
        h = F.relu(self.conv(self.front(x)))
        return self.head(F.relu(self.body(h)).mean((2, 3)))


def fronted(front, conv=None):
    return seeded(Fronted(front, conv or nn.Conv2d(3, 4, 3, padding=1)))


def statistics(x):
    return (x - x.mean((2, 3), keepdim=True)) / x.std((2, 3), keepdim=True)


def framed(x):
    out = x.new_zeros(len(x), 3, 10, 10)
    out[:, :, 1:-1, 1:-1] = x
    return out


#: Fronts after which a convolution reads pictures of three channels.
FRONTS = {
    "zero_pad": nn.ZeroPad2d(4),
    "zero_pad_function": lambda x: F.pad(x, (4, 4, 4, 4)),
    "constant_pad": lambda x: F.pad(x, (1, 2, 0, 3), value=0.5),
    "reflect": nn.ReflectionPad2d(2),
    "replicate": lambda x: F.pad(x, (1, 1, 2, 2), mode="replicate"),
    "circular": lambda x: F.pad(x, (1, 1, 2, 2), mode="circular"),
    "framed": framed,
    "relu": F.relu,
    "relu_module": nn.ReLU(),
    "clamp": lambda x: x.clamp(0, 1),
    "clamp_in_place": lambda x: x.clone().clamp_(-0.5, 1.0),
    "normalised": lambda x: (x - 0.3) / 0.2,
    "normalised_in_place": lambda x: x.sub_(0.3).div_(0.2),
    "normalised_by_channel": lambda x: (x - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1).to(x)) / 0.5,
    "transform": transforms.Normalize((0.1, 0.2, 0.3), (0.5, 0.4, 0.6)),
    "transforms": nn.Sequential(transforms.Normalize((0.1, 0.2, 0.3), (0.5, 0.4, 0.6)), nn.ZeroPad2d(1)),
    "shifted": lambda x: 2 * x - 1,
    "inverted": lambda x: 1 - x,
    "statistics": statistics,
    "layer_norm": lambda x: F.layer_norm(x, x.shape[1:]),
    "instance_norm": nn.InstanceNorm2d(3, affine=True),
    "batch_norm": nn.BatchNorm2d(3),
    "batch_norm_padded": nn.Sequential(nn.BatchNorm2d(3), nn.ZeroPad2d(1)),
    "absolute": torch.abs,
    "tanh": torch.tanh,
    "flipped": lambda x: x.flip(1, 3),
    "channels_last": lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    "cropped": lambda x: x[:, :, 1:7, ::2],
    "repeated": lambda x: x[:, :1].repeat(1, 3, 1, 1),
    "grey": lambda x: x.mean(1, keepdim=True).expand(-1, 3, -1, -1),
    "resized": lambda x: F.interpolate(x, (6, 5)),
    "resized_smoothly": lambda x: F.interpolate(x, (6, 5), mode="bilinear"),
    "pooled": lambda x: F.avg_pool2d(x, 2),
    "max_pooled": lambda x: F.max_pool2d(x, 2),
    "mixed": lambda x: 0.5 * x + 0.5 * x.flip(3),
    "squares": lambda x: x**2,
    "masked": lambda x: x * (torch.arange(8) > 2).to(x),
    "where": lambda x: torch.where(torch.arange(8) > 2, x, 0.25),
    "clipped_and_padded": lambda x: F.pad(x.clamp(min=0), (2, 2, 2, 2)),
    "dropped": nn.Dropout(0.2),
    "unit": lambda x: F.normalize(x, dim=1),
}


@pytest.mark.covering(3)
@pytest.mark.parametrize("preset", LRP_PRESETS)
@pytest.mark.parametrize("name", FRONTS)
def test_the_account_closes_behind_what_stands_before_the_first_convolution(name, preset):
    model = fronted(FRONTS[name])
    composite = LRP_PRESETS[preset]()
    if preset == "contrastive_excitation_backprop":
        found = kept(model, IMAGES, composite)
        assert off(found.rest, found.initial) <= 1e-8  # (the dual takes all away)
    else:
        assert_closes(model, IMAGES, composite, 1e-8)


def conv(padding=0, **settings):
    return nn.Conv2d(3, 4, 3, padding=padding, **settings)


def unfolded(layer):
    def run(x):
        n, _, height, width = x.shape
        rows = F.unfold(x, 3, padding=1).mT @ layer.weight.flatten(1).T + layer.bias
        return rows.mT.reshape(n, 4, height, width)

    return run


#: Front and convolution, and the convolution that is the same function.
COPIES = {
    "zero_pad": (nn.ZeroPad2d(1), conv(), conv(1)),
    "zero_pad_wide": (lambda x: F.pad(x, (2, 2, 2, 2)), conv(), conv(2)),
    "reflect": (nn.ReflectionPad2d(1), conv(), conv(1, padding_mode="reflect")),
    "replicate": (lambda x: F.pad(x, (1,) * 4, mode="replicate"), conv(), conv(1, padding_mode="replicate")),
    "circular": (lambda x: F.pad(x, (1,) * 4, mode="circular"), conv(), conv(1, padding_mode="circular")),
    "framed": (framed, conv(), conv(1)),
    "framed_by_cat": (
        lambda x: torch.cat([torch.zeros(2, 3, 8, 1).to(x), x, torch.zeros(2, 3, 8, 1).to(x)], 3),
        conv((1, 0)),
        conv(1),
    ),
    "padded_twice": (lambda x: F.pad(F.pad(x, (1, 1)), (0, 0, 1, 1)), conv(), conv(1)),
    "there_and_back": (
        lambda x: x.permute(0, 2, 3, 1).flatten(1).view(-1, 8, 8, 3).permute(0, 3, 1, 2),
        conv(1),
        conv(1),
    ),
    "split_and_joined": (lambda x: torch.cat(x.split([1, 2], 1), 1), conv(1), conv(1)),
    "stacked": (lambda x: torch.stack(x.unbind(1), 1), conv(1), conv(1)),
    "cloned": (lambda x: x.clone().contiguous().to(torch.float64), conv(1), conv(1)),
    "dropped": (nn.Dropout(0.3), conv(1), conv(1)),
    "identity": (nn.Identity(), conv(1), conv(1)),
    "one": (lambda x: x.flatten(0, 0).unsqueeze(1).squeeze(1), conv(1), conv(1)),
}


@pytest.mark.covering(3)
@pytest.mark.parametrize("preset", LRP_PRESETS)
@pytest.mark.parametrize("name", COPIES)
def test_copies_of_the_input_are_the_input(name, preset):
    front, layer, plain_layer = COPIES[name]
    model, plain = fronted(front, layer), fronted(nn.Identity(), plain_layer)
    assert_same_map(model, plain, IMAGES, LRP_PRESETS[preset]())


class Patches(nn.Module):
    """Dense layer on patches of the picture, by a spelling of taking it apart: (n, 3, 8, 8) -> (n, 3)."""

    def __init__(self, embed):
        super().__init__()
        self.proj, self.head, self.embed = nn.Conv2d(3, 6, 4, 4), nn.Linear(6, 3), embed

    def forward(self, x):
        return self.head(F.relu(self.embed(x, self.proj.weight.flatten(1), self.proj.bias)).mean(1))


def by_reshape(x, w, b):
    x = x.reshape(-1, 3, 2, 4, 2, 4).permute(0, 2, 4, 1, 3, 5).reshape(len(x), 4, 48)
    return F.linear(x, w, b)


def by_conv(x, w, b):
    return F.conv2d(x, w.reshape(6, 3, 4, 4), b, 4).flatten(2).mT


PATCHES = {
    "reshape": by_reshape,
    "unfold": lambda x, w, b: F.linear(F.unfold(x, 4, stride=4).mT, w, b),
    "tensor_unfold": lambda x, w, b: F.linear(
        x.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2), w, b
    ),
    "pixel_unshuffle": lambda x, w, b: F.linear(F.pixel_unshuffle(x, 4).flatten(2).mT, w, b),
    "chunks": lambda x, w, b: torch.stack(
        [F.linear(tile.flatten(1), w, b) for row in x.chunk(2, 2) for tile in row.chunk(2, 3)], 1
    ),
}


@pytest.mark.parametrize(
    "rule", [Flat(1e-6), WSquare(1e-6), ZBox(stabilizer=1e-6, **BOX)], ids=["flat", "wsquare", "zbox"]
)
@pytest.mark.parametrize("name", PATCHES)
def test_patches_of_the_input_are_the_input(name, rule):
    model, plain = seeded(Patches(PATCHES[name])), seeded(Patches(by_conv))
    types = (nn.Conv2d, nn.Linear)
    composite = LRP(first_map=[(types, rule)], layer_map=[(types, Epsilon(1e-6))])
    assert_same_map(model, plain, IMAGES, composite)
    assert_closes(model, IMAGES, composite)


def test_box_of_bounds_for_each_pixel_goes_through_the_front():
    low, high = -4 - numbers(1, 3, 8, 8, seed=1).abs(), 4 + numbers(1, 3, 8, 8, seed=2).abs()
    composite = LRP(first_map=[(nn.Conv2d, ZBox(low, high))], layer_map=[((nn.Conv2d, nn.Linear), Epsilon())])
    for name in ("zero_pad", "reflect", "circular", "there_and_back"):
        front, layer, plain_layer = COPIES[name]
        assert_same_map(fronted(front, layer), fronted(nn.Identity(), plain_layer), IMAGES, composite)


def scores(out):
    return torch.stack([F.pad(found["scores"][:4], (0, 4 - len(found["scores"][:4]))) for found in out])


@pytest.mark.parametrize("preset", ["epsilon", "epsilon_plus", "epsilon_plus_flat"])
@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.filterwarnings("ignore:.*no rule for:UserWarning")
def test_the_account_of_a_detector_closes_or_is_refused(name, preset, untouched):
    """Never an error of an index or a shape from within."""
    model = seeded(DETECTORS[name]())
    data = numbers(2, 3, 64, 64).sigmoid()
    attribution = CondAttribution(model, output=scores)
    with untouched(model):
        prediction = attribution(data, [{"y": 0}], LRP_PRESETS[preset]()).prediction
        try:
            found = attribution.absorbed(data, [{"y": 0}], LRP_PRESETS[preset]())
        except ValueError as error:
            assert "samples" in str(error) or "account" in str(error), error
        else:
            missing = (found.input + found.total - found.initial).abs().max()
            assert found.initial.abs().max() > 0 and missing <= 1e-6 * found.initial.abs().max()
    assert off(prediction, scores(model(data)).detach()) <= 1e-9


class PerImage(nn.Module):
    """Loops over the pictures of a batch and adds up numbers without axes."""

    def __init__(self, wiring):
        super().__init__()
        self.conv, self.fc, self.wiring = nn.Conv2d(3, 4, 3), nn.Linear(4, 3), wiring

    def forward(self, x):
        return self.wiring(self, x)


PER_IMAGE = {
    "loop": lambda s, x: torch.stack([s.fc(F.relu(s.conv(image[None])).mean((2, 3)))[0] for image in x]),
    "without_batch": lambda s, x: torch.stack([s.fc(F.relu(s.conv(image)).mean((1, 2))) for image in x]),
    "numbers": lambda s, x: torch.stack(
        [torch.stack([F.relu(s.conv(image) + 0.1).sum() + 1.0, image.sum() * 2 + 0.5]) for image in x]
    ),
    "shifted_by_a_number": lambda s, x: torch.cat(
        [s.fc(F.relu(s.conv(image[None]) - s.conv(image[None]).mean()).mean((2, 3))) for image in x]
    ),
    "biased_image": lambda s, x: torch.stack([s.fc(s.conv(image).mean((1, 2)) + 1.0) + 0.5 for image in x]),
}


@pytest.mark.parametrize("preset", ["epsilon", "gamma", "epsilon_plus_flat", "epsilon_gamma_box"])
@pytest.mark.parametrize("name", PER_IMAGE)
def test_the_account_of_operations_of_one_image_closes_or_is_refused(name, preset):
    model = seeded(PerImage(PER_IMAGE[name]))
    for n in (1, 2, 4):
        try:
            assert_closes(model, numbers(n, 3, 8, 8), LRP_PRESETS[preset]())
        except ValueError as error:
            assert "samples" in str(error), error
