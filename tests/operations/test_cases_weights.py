"""Layers whose forward pass does not use their parameters as they are: the operand of the call is the weight."""

from __future__ import annotations

import copy

import pytest
import torch
from preset_cases import FEW, LRP_PRESETS, assert_same_map, ended, numbers, seeded
from timm.layers import ScaledStdConv2d, StdConv2d
from timm.layers.norm_act import GroupNormAct
from timm.models.resnetv2 import ResNetV2
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

IMAGES = numbers(2, 3, 8, 8, seed=3)


def standardised(w):
    v, m = torch.var_mean(w, dim=[*range(1, w.dim())], keepdim=True, unbiased=False)
    return (w - m) / torch.sqrt(v + 1e-5)


class Functional(nn.Conv2d):
    def forward(self, x):
        args = self.stride, self.padding, self.dilation, self.groups
        return F.conv2d(x, standardised(self.weight), self.bias, *args)


class Words(nn.Conv2d):
    def forward(self, x):
        return torch.conv2d(
            input=x, weight=standardised(self.weight), bias=self.bias, stride=self.stride, padding=self.padding,
            dilation=self.dilation, groups=self.groups,
        )  # fmt: skip


class Inherited(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, standardised(self.weight), self.bias)


class ByBatchNorm(nn.Conv2d):
    """As timm standardises weights."""

    def forward(self, x):
        w = F.batch_norm(
            self.weight.reshape(1, self.out_channels, -1), None, None, training=True, momentum=0.0, eps=1e-5
        )
        return self._conv_forward(x, w.reshape_as(self.weight), self.bias)


class Aten(nn.Conv2d):
    def forward(self, x):
        args = self.stride, self.padding, self.dilation, self.groups
        return torch.ops.aten.conv2d(x, standardised(self.weight), self.bias, *args)


class General(nn.Conv2d):
    def forward(self, x):
        args = self.stride, self.padding, self.dilation, False, (0, 0), self.groups
        return torch.convolution(x, standardised(self.weight), self.bias, *args)


class Own(nn.Module):
    """No subclass of a convolution: its parameters have names of their own."""

    def __init__(self, inputs, outputs, size, groups=1, **settings):
        super().__init__()
        conv = nn.Conv2d(inputs, outputs, size, groups=groups, **settings)
        self.weight, self.bias = conv.weight, conv.bias
        self.settings = {"groups": groups, **settings}

    def forward(self, x):
        return F.conv2d(x, standardised(self.weight), self.bias, **self.settings)


class Gain(nn.Module):
    """Standardisation as a parametrization, with gain 1."""

    def forward(self, w):
        return standardised(w)


def parametrized(*args, **settings):
    conv = nn.Conv2d(*args, **settings)
    parametrize.register_parametrization(conv, "weight", Gain())
    return conv


STANDARDISED = {
    "functional": Functional,
    "words": Words,
    "inherited": Inherited,
    "by_batch_norm": ByBatchNorm,
    "aten": Aten,
    "general": General,
    "own": Own,
    "parametrized": parametrized,
}


def conv_net(conv):
    return nn.Sequential(
        conv(3, 6, 3),
        nn.ReLU(),
        conv(6, 8, 3, padding=1, stride=2, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(72, 4),
    )


def spelled_and_plain(conv):
    """Net with a spelling of a weight-standardised convolution, and with plain ones."""
    plain = seeded(conv_net(nn.Conv2d))
    net = conv_net(conv).double().eval()
    with torch.no_grad():
        for i in (0, 2, 5):
            net[i].bias.copy_(plain[i].bias)
            original = net[i].parametrizations.weight.original if parametrize.is_parametrized(net[i]) else net[i].weight
            original.copy_(plain[i].weight)
        for i in (0, 2):
            plain[i].weight.copy_(standardised(plain[i].weight))
    return net, plain


@pytest.mark.covering(3)
@pytest.mark.parametrize("preset", LRP_PRESETS)
@pytest.mark.parametrize("spelling", STANDARDISED)
def test_weight_standardised_convolution_is_one_with_the_weight_that_it_uses(spelling, preset):
    net, plain = spelled_and_plain(STANDARDISED[spelling])
    assert_same_map(net, plain, IMAGES, LRP_PRESETS[preset]())


class Conv1(nn.Conv1d):
    def forward(self, x):
        return F.conv1d(x, standardised(self.weight), self.bias, self.stride, self.padding, self.dilation, self.groups)


class Conv3(nn.Conv3d):
    def forward(self, x):
        return self._conv_forward(x, standardised(self.weight), self.bias)


class Transposed(nn.ConvTranspose2d):
    def forward(self, x):
        return F.conv_transpose2d(x, standardised(self.weight), self.bias, self.stride, self.padding)


class Reflected(nn.Conv2d):
    def forward(self, x):
        x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
        return F.conv2d(x, standardised(self.weight), self.bias, self.stride)


class Dense(nn.Linear):
    def forward(self, x):
        return F.linear(x, standardised(self.weight), self.bias)


OTHERS = {
    "conv1d": (Conv1, nn.Conv1d, (3, 4, 3), {"padding": "same", "dilation": 2}, (2, 3, 9)),
    "conv3d": (Conv3, nn.Conv3d, (2, 3, 2), {"stride": (1, 2, 1)}, (2, 2, 4, 5, 3)),
    "transposed": (Transposed, nn.ConvTranspose2d, (3, 4, 3), {"stride": 2, "padding": 1}, (2, 3, 5, 4)),
    "reflected": (Reflected, nn.Conv2d, (3, 4, 3), {"padding": 1, "padding_mode": "reflect"}, (2, 3, 5, 4)),
    "dense": (Dense, nn.Linear, (6, 5), {}, (2, 3, 6)),
}


@pytest.mark.parametrize("preset", FEW)
@pytest.mark.parametrize("kind", OTHERS)
def test_standardised_weights_of_other_layers(kind, preset):
    spelled, plain_type, args, settings, shape = OTHERS[kind]
    data = numbers(*shape)
    plain = seeded(ended(plain_type(*args, **settings), data))
    net = ended(spelled(*args, **settings), data)
    net.load_state_dict(plain.state_dict())
    with torch.no_grad():
        plain[0].weight.copy_(standardised(plain[0].weight))
    assert_same_map(net, plain, data, LRP_PRESETS[preset]())


@pytest.mark.parametrize("preset", LRP_PRESETS)
@pytest.mark.parametrize("layer", [StdConv2d, ScaledStdConv2d], ids=["bit", "nfnet"])
def test_big_transfer_nets_equal_those_with_stored_weights(layer, preset):
    net = seeded(ResNetV2([1, 1], (8, 16), 3, stem_chs=8, conv_layer=layer, norm_layer=four_groups))
    plain = copy.deepcopy(net)
    for name, conv in [(n, m) for n, m in plain.named_modules() if isinstance(m, layer)]:
        parent, _, own = name.rpartition(".")
        setattr(plain.get_submodule(parent), own, stored(conv))
    assert_same_map(net, plain.eval(), numbers(1, 3, 32, 32), LRP_PRESETS[preset]())


def four_groups(channels, **settings):
    return GroupNormAct(channels, num_groups=4, **settings)


def stored(conv):
    """Plain convolution with the weight that a standardised one of timm uses."""
    plain = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,
                      conv.groups, conv.bias is not None).double()  # fmt: skip
    gain = (conv.gain * conv.scale).flatten() if isinstance(conv, ScaledStdConv2d) else 1.0
    flat = conv.weight.detach().flatten(1)
    flat = (flat - flat.mean(1, keepdim=True)) / (flat.var(1, keepdim=True, unbiased=False) + conv.eps).sqrt()
    with torch.no_grad():
        plain.weight.copy_((flat.T * gain).T.reshape_as(conv.weight))
        if conv.bias is not None:
            plain.bias.copy_(conv.bias)
    return plain


def straight_through(w):
    return w + (w.sign() - w).detach()


class Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w):
        return w.sign()

    @staticmethod
    def backward(ctx, grad):
        return grad


#: Binary weights; none of the calls that make them reads data.
BINARY = {
    "straight_through": straight_through,
    "sign": torch.sign,
    "custom_function": Sign.apply,
    "scaled": lambda w: w.sign() * w.abs().mean((1, 2, 3), keepdim=True),
    "where": lambda w: torch.where(w > 0, 1.0, -1.0).to(w),
    "rounded": lambda w: (w / w.abs().max() * 7).round() / 7,
    "vmapped": torch.vmap(torch.sign),
    "without_gradient": torch.no_grad()(torch.sign),
}


@pytest.mark.covering(3)
@pytest.mark.parametrize("preset", LRP_PRESETS)
@pytest.mark.parametrize("made", BINARY)
def test_binarised_convolution(made, preset):
    class Binary(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(x, BINARY[made](self.weight), self.bias)

    def net(conv):
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), conv(4, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3))

    plain = seeded(net(nn.Conv2d))
    model = net(Binary).double().eval()
    model.load_state_dict(plain.state_dict())
    with torch.no_grad():
        plain[2].weight.copy_(BINARY[made](plain[2].weight))
    assert_same_map(model, plain, IMAGES, LRP_PRESETS[preset]())
