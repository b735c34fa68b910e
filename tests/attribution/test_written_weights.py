"""Weights that are written to between two calls, also where torch does not count it: relevance is that of a new net."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from crp.attribution import CondAttribution
from crp.composites import Composite, EpsilonAlpha2Beta1Flat, EpsilonGammaBox, EpsilonPlusFlat
from crp.layers.marks import TensorMark

DATA = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def made() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 128, 3), nn.ReLU()]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 5)).double().eval()
    net[1].running_mean.uniform_(-0.2, 0.2)
    return net


def by_array(net: nn.Sequential) -> None:
    net[3].weight.detach().numpy()[:] *= -1


WRITES: dict[str, Callable[[nn.Sequential], object]] = {
    "all of a weight": lambda net: net[3].weight.data.mul_(-1.5),
    "a filter": lambda net: net[3].weight.data[5].zero_(),
    "a channel of the input": lambda net: net[3].weight.data[:, 7].mul_(30),
    "a dense layer": lambda net: net[7].weight.data.neg_(),
    "a bias": lambda net: net[3].bias.data.add_(1),
    "statistics": lambda net: net[1].running_mean.data.add_(3),
    "a merged weight": lambda net: net[0].weight.data.mul_(-1),
    "by an array": by_array,
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["usual", "channels last"])
@pytest.mark.parametrize("make", [EpsilonPlusFlat, EpsilonAlpha2Beta1Flat, lambda: EpsilonGammaBox(low=0.0, high=1.0)])
@pytest.mark.parametrize("write", WRITES)
def test_writes_that_torch_does_not_count(
    write: str, make: Callable[[], Composite], layout: torch.memory_format
) -> None:
    net, composite = made().to(memory_format=layout), make()
    attribution = CondAttribution(net)
    before = attribution(DATA, [{"y": 1}], composite)
    WRITES[write](net)
    found = attribution(DATA, [{"y": 1}], composite)
    wanted = CondAttribution(copy.deepcopy(net))(DATA, [{"y": 1}], make())
    assert not torch.allclose(before.heatmap, wanted.heatmap, rtol=1e-3)
    torch.testing.assert_close(found.heatmap, wanted.heatmap, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(found.prediction, wanted.prediction, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [(), (0,), (7,), (512, 512, 3, 3), (96, 1, 3, 3), (1000, 4096), (4096, 1000), (768, 3000)]
)
def test_a_mark_sees_channels(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    mark, other = TensorMark(tensor), nn.Parameter(tensor)
    assert mark.is_of(tensor) and TensorMark(other).is_of(other) and not mark.is_of(other)
    for axis in range(tensor.dim()):
        for place in range(0, tensor.shape[axis], 61):
            channel = tensor.data.select(axis, place)
            before = channel.clone()
            channel += 1
            assert not mark.is_of(tensor), (axis, place)
            channel.copy_(before)
            assert mark.is_of(tensor)


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.to(memory_format=torch.channels_last),
        lambda t: t.transpose(0, 1),
        lambda t: t[:, 1:5],
        lambda t: t[3:4].expand(8, -1, -1, -1),
    ],
    ids=["channels last", "transposed", "part", "expanded"],
)
def test_a_mark_is_of_the_tensors_own_entries(view: Callable[[Tensor], Tensor]) -> None:
    tensor = view(torch.zeros(8, 16, 3, 3))
    mark = TensorMark(tensor)
    tensor.data[0, 2] = 1
    assert not mark.is_of(tensor)


def test_a_mark_is_of_one_tensor_with_its_memory() -> None:
    tensor = torch.zeros(4, 5)
    mark, before = TensorMark(tensor), tensor.data
    tensor.data = before.clone()  # (the former memory is still there, with the same entries)
    assert not mark.is_of(tensor) and not mark.is_of(tensor.clone())
    tensor.data = before
    assert mark.is_of(tensor)
    tensor.untyped_storage().resize_(0)
    assert not mark.is_of(tensor)


def test_there_is_no_glimpse_where_the_host_would_wait_or_there_are_no_numbers() -> None:
    for tensor in (torch.zeros(3, device="meta"), torch.zeros(0, 3)):
        mark = TensorMark(tensor)
        assert mark._entries is None and mark.is_of(tensor)
        tensor.add_(1)
        assert not mark.is_of(tensor)
    taken_away = torch.zeros(3)
    taken_away.untyped_storage().resize_(0)
    assert TensorMark(taken_away)._entries is None
