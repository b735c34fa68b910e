"""Batch norm goes into the layer before or after it, wherever that is exact, and nowhere else."""

import pytest
import torch
from canonizer_cases import check, layer_and_norms, random, ready
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn


def sequence(*layers):
    return ready(nn.Sequential(*layers))


def without_shift(model):
    for module in model:
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.zeros_(module.running_mean)
            nn.init.zeros_(module.bias)
    return model


AHEAD = {
    "linear": (lambda: nn.Linear(4, 6), nn.BatchNorm1d, (3, 4)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, bias=False), nn.BatchNorm1d, (2, 4, 7)),
    "strided": (lambda: nn.Conv2d(4, 6, 3, stride=2, dilation=2), nn.BatchNorm2d, (2, 4, 9, 9)),
    "grouped": (lambda: nn.Conv2d(4, 6, 2, groups=2), nn.BatchNorm2d, (2, 4, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, bias=False), nn.BatchNorm2d, (2, 4, 5, 5)),
    "valid": (lambda: nn.Conv2d(4, 6, 3, padding="valid"), nn.BatchNorm2d, (2, 4, 5, 5)),
    "same_1": (lambda: nn.Conv2d(4, 6, 1, padding="same"), nn.BatchNorm2d, (2, 4, 5, 5)),
    "reflect": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d, (2, 4, 5, 5)),
    "circular": (lambda: nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"), nn.BatchNorm1d, (2, 4, 5)),
    "replicate": (lambda: nn.Conv2d(4, 6, 3, padding="same", padding_mode="replicate"), nn.BatchNorm2d, (2, 4, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2), nn.BatchNorm3d, (2, 4, 3, 3, 3)),
    "transposed_1": (lambda: nn.ConvTranspose2d(4, 6, 1, groups=2), nn.BatchNorm2d, (2, 4, 3, 3)),
}
AT_BORDERS = {
    "padded": lambda: nn.Conv2d(4, 6, 3, padding=1),
    "padded_one_way": lambda: nn.Conv2d(4, 6, 3, padding=(0, 1), groups=2),
    "same": lambda: nn.Conv2d(4, 6, 3, padding="same"),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3, groups=2),
    "transposed_strided": lambda: nn.ConvTranspose2d(4, 6, 1, stride=2, bias=False),
    "transposed_tiles": lambda: nn.ConvTranspose2d(4, 6, 2, stride=2),
}


@pytest.mark.parametrize("name", list(AHEAD))
def test_merge_into_the_layer_after_it(name, untouched):
    make, norm, shape = AHEAD[name]
    model = sequence(norm(4, eps=1e-2), make())
    with untouched(model):
        check(model, random(*shape), {"0": "1"})


@pytest.mark.parametrize("name", list(AT_BORDERS))
def test_a_shift_is_not_merged_where_borders_would_miss_it(name, untouched):
    model, data = sequence(nn.BatchNorm2d(4), AT_BORDERS[name]()), random(2, 4, 5, 5)
    with untouched(model):
        check(model, data, {}, {"0": "its shift would not reach the borders of '1'"})
    without_shift(model)
    with untouched(model):
        check(model, data, {"0": "1"})


def test_a_shift_that_comes_later_is_noticed():
    model, data = without_shift(sequence(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1))), random(2, 4, 5, 5)
    check(model, data, {"0": "1"})
    with torch.no_grad():
        model[0].bias[2] = 1e-3
    check(model, data, {}, {"0": "its shift"})


@pytest.mark.parametrize("make", [lambda: nn.Conv2d(4, 6, 2, groups=2), lambda: nn.ConvTranspose2d(4, 6, 1, groups=2)])
def test_one_layer_takes_in_one_on_each_side(make, untouched):
    model = sequence(nn.BatchNorm2d(4), make(), nn.BatchNorm2d(6), nn.ReLU(), nn.BatchNorm2d(6))
    with untouched(model):
        check(model, random(2, 4, 5, 5), {"0": "1", "2": "1"}, {"4": "comes from '3' (ReLU)"})


def test_the_layer_before_it_comes_first():
    check(sequence(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)), random(2, 4, 3, 3), {"1": "0"})


def test_the_layer_after_it_serves_where_the_one_before_does_not(untouched):
    first = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1))
    model = sequence(first, nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    with untouched(model):
        check(model, random(2, 4, 3, 3), {"1": "2"})


def test_pre_activation_blocks_are_left_as_they_are(untouched):
    model = sequence(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))
    with untouched(model):
        reason = "input comes from the model's input; output is read by '1'"
        check(model, random(2, 4, 7, 7), {"3": "2"}, {"0": reason})


@pytest.mark.parametrize(
    ("layers", "shape", "norm"),
    [
        ((nn.Linear(5, 4), nn.BatchNorm1d(4)), (2, 4, 5), "1"),
        ((nn.BatchNorm1d(4), nn.Linear(4, 5)), (2, 4, 4), "0"),
        ((nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4)), (3, 4), "1"),  # one sample: axis 1 is the length
        ((nn.BatchNorm1d(4), nn.Conv1d(4, 4, 1)), (4, 4), "0"),
    ],
    ids=["tokens", "tokens_ahead", "unbatched", "unbatched_ahead"],
)
def test_the_axis_must_be_that_of_the_features(layers, shape, norm):
    check(sequence(*layers), random(*shape), {}, {norm: "another axis than the features of"})


@st.composite
def nets(draw):
    """A layer, possibly with batch norms around it, and an input; whether the first may be merged."""
    bias, mode = draw(st.booleans()), draw(st.sampled_from(["zeros", "replicate"]))
    eps, affine = draw(st.sampled_from([1e-5, 1e-1])), draw(st.booleans())
    layer, (first, second), data, exact = layer_and_norms(draw, bias, mode, eps=eps, affine=affine)
    before, after = draw(st.booleans()), draw(st.booleans())
    model = sequence(first if before else nn.Identity(), layer, second if after else nn.Identity())
    if draw(st.booleans()):
        without_shift_ = model[0] if before else nn.BatchNorm1d(1)
        nn.init.zeros_(without_shift_.running_mean)
        if affine and before:
            nn.init.zeros_(without_shift_.bias)
        exact = True
    return model, data, before, after, exact


@given(nets(), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_any_layer(net, seed):
    torch.manual_seed(seed)
    model, data, before, after, exact = net
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merged = ({"0": "1"} if before and exact else {}) | ({"2": "1"} if after else {})
    check(model, data, merged, {} if exact or not before else {"0": "its shift"})
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not any("forward" in vars(module) for module in model)
